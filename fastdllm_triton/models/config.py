"""What the transformer runtime needs to know about a model."""

from __future__ import annotations

from dataclasses import dataclass


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: a file is missing or damaged, or it holds something else than expected."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a masked-diffusion transformer.

    Attributes:
        architecture: the name its ``config.json`` gives, such as ``llada``.
        vocab_size: tokens ``V``; ids are below it.
        embedding_size: rows of the embedding and the head, ``V`` or more; the surplus is never predicted.
        width: ``E``.
        layers: number of layers.
        heads, kv_heads, head_dim: ``Hq``, ``Hkv``, ``D``.
        mlp: ``F``.
        rope_theta: base of the rotary frequencies.
        eps: of the RMS norms.
        max_length: most positions of prompt and generation together.
        tied: whether the head is the embedding.
        mask_id: the ``[MASK]`` token.
        eos_ids: tokens that end a text; the first one fills what comes after.
    """

    architecture: str
    vocab_size: int
    embedding_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float
    eps: float
    max_length: int
    tied: bool
    mask_id: int
    eos_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp", "max_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise CheckpointError(f"config: {name} must be a positive integer, got {value!r}")
        if self.heads % self.kv_heads:
            raise CheckpointError(f"config: {self.kv_heads} KV heads do not divide {self.heads} query heads")
        if self.head_dim % 2:
            raise CheckpointError(f"config: rotary embedding needs an even head dim, got {self.head_dim}")
        if self.embedding_size < self.vocab_size:
            raise CheckpointError(f"config: embedding_size {self.embedding_size} is below vocab_size {self.vocab_size}")
        for token in (self.mask_id, *self.eos_ids):
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise CheckpointError(f"config: token id {token!r} is outside the vocabulary [0, {self.vocab_size})")


@dataclass(frozen=True)
class NameMap:
    """Where a checkpoint keeps each tensor. ``{i}`` stands for the layer; several names are stacked along the rows.

    Attributes:
        embedding, final_norm, head: names of single tensors.
        layer: field of :class:`~fastdllm_triton.models.transformer.Layer` to the names that make it up.
    """

    embedding: str
    final_norm: str
    head: str
    layer: dict[str, tuple[str, ...]]
