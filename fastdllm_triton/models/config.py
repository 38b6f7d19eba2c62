"""What the transformer runtime needs to know about a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..types import RopeRounding


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
        qkv_bias: whether the q, k and v projections have biases.
        shift: the row that predicts position ``i`` is the hidden state of position ``i - 1``; position 0 uses its own.
        rope_rounding: whose rounding points the rotation keeps, see :func:`fastdllm_triton.reference.rope_kv_write.rotate`.
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
    qkv_bias: bool = False
    shift: bool = False
    rope_rounding: RopeRounding = "llada"

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


#: What to do about an option that is not supported, where there is more to say than :func:`require_supported` does.
_ADVICE = {
    "use_sliding_window": "every position attends all others here; set it to false if the weights were trained that way",
    "rope_scaling": "set it to null to use the model within the length it was trained on",
}


def require_supported(raw: dict[str, Any], supported: dict[str, Any]) -> None:
    """Refuses a ``config.json`` that asks for a variant which the runtime would silently leave out.

    Args:
        raw: the file's fields. One that is absent or null has its default, which is the supported one.
        supported: field to the one value that is supported.

    Raises:
        CheckpointError: a field has another value; names it and says what to do.
    """
    for field, value in supported.items():
        given = raw.get(field)
        if given is not None and given != value:
            advice = _ADVICE.get(field, "use the code that the model was released with")
            raise CheckpointError(f"config.json: {field} = {given!r} is not supported, only {value!r}; {advice}")


def rope_theta(raw: dict[str, Any], default: float) -> float:
    """The base of the rotary frequencies, from ``rope_theta`` or from the ``rope_parameters`` that transformers 5 writes.

    Raises:
        CheckpointError: the frequencies are scaled (linear, dynamic, YaRN ...), which is not implemented.
    """
    for field in ("rope_scaling", "rope_parameters"):
        options = raw.get(field) or {}
        if not isinstance(options, dict):
            raise CheckpointError(f"config.json: {field} must be null or an object, got {options!r}")
        kind = options.get("rope_type", options.get("type", "default"))
        if kind != "default":
            raise CheckpointError(
                f"config.json: {field} of type {kind!r} is not supported, only 'default'; {_ADVICE['rope_scaling']}"
            )
    return float((raw.get("rope_parameters") or {}).get("rope_theta") or raw.get("rope_theta") or default)


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A field that holds a token id, several, or none."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)
