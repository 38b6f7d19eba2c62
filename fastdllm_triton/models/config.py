"""What the transformer runtime needs to know about a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..types import NormRounding, RopeRounding


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: a file is missing or damaged, or it holds something else than expected.

    Its message is one line of bounded length, whatever names and values the files hold.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """A message without line breaks and control characters, cut to 1,000 characters; it may hold text from a file."""
    line = " ".join(part.strip() for part in message[:1000].splitlines())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return line if len(line) <= 1000 and len(message) <= 1000 else f"{line[:1000]} ..."


def shown(value: object) -> str:
    """A value from outside as an error shows it: its ``repr``, which escapes what is not printable, cut to 80 characters."""
    try:
        text = repr(value)
    except Exception as error:  # Integers of thousands of digits, objects of any class, depth.
        text = f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
    return text if len(text) <= 80 else f"{text[:80]} ..."


def shown_name(name: str) -> str:
    """The name of a tensor or a parameter as an error shows it: as it is, where it is printable and short."""
    return name if name.isprintable() and len(name) <= 80 else shown(name)


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
        qk_norm: whether every query and key head is normalised before the rotation.
        norm_rounding: whose rounding points these norms keep, see :func:`fastdllm_triton.reference.rope_kv_write.head_norm`.
        block_length: tokens of the blocks that the weights were trained with, counted from position 0, where attention is
            block-causal: a position attends its own block and the blocks before it. None where positions attend all others.
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
    qk_norm: bool = False
    norm_rounding: NormRounding = "qwen3"
    block_length: int | None = None

    @property
    def block_causal(self) -> bool:
        """Whether a position attends its own block and those before it, and not the ones behind."""
        return self.block_length is not None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise CheckpointError(f"config: {self.kv_heads} KV heads do not divide {self.heads} query heads")
        if self.head_dim % 2:
            raise CheckpointError(f"config: rotary embedding needs an even head dim, got {self.head_dim}")
        if self.embedding_size < self.vocab_size:
            raise CheckpointError(f"config: embedding_size {self.embedding_size} is below vocab_size {self.vocab_size}")
        if self.mask_id in self.eos_ids:
            raise CheckpointError(f"config: the mask token and an end-of-text token are the same, {self.mask_id}")

    @property
    def layer_parameters(self) -> int:
        """Matrix weights of one layer: fused QKV, output projection, gate and up, down."""
        heads = self.heads + 2 * self.kv_heads
        return self.width * (heads * self.head_dim + self.heads * self.head_dim + 3 * self.mlp)

    @property
    def streamed_parameters(self) -> int:
        """Matrix weights that a forward reads: all layers and the head. Of the embedding it reads a row a token."""
        return self.layers * self.layer_parameters + self.vocab_size * self.width


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
