"""One transformer for every model: bidirectional or block-causal, pre-norm, rotary, gated MLP, over the ops and a cache that is
written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import Ops
from .config import ModelConfig, NameMap
from .kv_cache import KVCache


@dataclass
class Linear:
    """A weight that knows how to multiply, so that a quantised one can take its place."""

    weight: Tensor

    @property
    def operand(self) -> Tensor:
        """What the op ``linear`` takes for it."""
        return self.weight

    def __call__(self, ops: Ops, x: Tensor, **around: Any) -> Tensor:
        """``x @ weight.T``, with what :func:`fastdllm_triton.reference.linear.linear` can put in front of it and behind it."""
        y: Tensor = ops.linear(x, self.operand, **around)
        return y

    def of_norm(
        self, ops: Ops, x: Tensor, delta: Tensor | None, norm: Tensor, eps: float, **epilogue: Any
    ) -> tuple[Tensor, Tensor]:
        """The product of the norm of ``x + delta``, and ``x + delta``."""
        if delta is None:
            return ops.linear(x, self.operand, norm_weight=norm, eps=eps, **epilogue), x
        h, x = ops.rms_norm(delta, norm, eps, residual=x)
        return ops.linear(h, self.operand, **epilogue), x

    def add_to(self, ops: Ops, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """``x`` and what is to be added to it: nothing where the product adds it by itself, else the next norm does."""
        if ops.fuses_residual(h, self.operand):
            return ops.linear(h, self.operand, residual=x), None
        return x, ops.linear(h, self.operand)

    def prefetch(self, ahead: Callable[[Tensor], None]) -> None:
        """Asks for the weight before it is needed."""
        ahead(self.weight)


class Stacked(Linear):
    """Weights that share an input and lie apart, as in a file: they are multiplied one by one, and their products stand side
    by side. The op of a CPU takes them so.

    Args:
        parts: ``[N_i, K]`` each.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``[N, K]``: a copy of all of them."""
        return torch.cat(self.parts)

    @property
    def operand(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.parts

    def prefetch(self, ahead: Callable[[Tensor], None]) -> None:
        """Nothing: what prefetches is a kernel, and kernels take one weight."""


@dataclass
class Layer:
    """Parameters of a layer, projections that share an input fused: ``qkv [(Hq + 2 Hkv) D, E]``, ``gate_up [2F, E]``.

    ``qkv_bias [(Hq + 2 Hkv) D]`` and the norms of heads ``q_norm, k_norm [D]`` are apart from ``qkv``, since the op that rotates
    applies them in its own pass.
    """

    attn_norm: Tensor
    qkv: Linear
    attn_out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    def head_norms(self, c: ModelConfig) -> dict[str, Any]:
        """The norms of heads as the op that rotates takes them."""
        if self.q_norm is None:
            return {}
        return {"q_norm": self.q_norm, "k_norm": self.k_norm, "eps": c.eps, "norm_rounding": c.norm_rounding}


@dataclass
class Weights:
    """All parameters of a model. ``head`` is the embedding where the two are tied.

    ``mapped`` of their bytes are pages of files, which the system counts as available though forwards need them.
    """

    embedding: Tensor
    layers: list[Layer]
    final_norm: Tensor
    head: Tensor
    mapped: int = 0

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: memory of its own."""
        return vars(self) | {"mapped": 0}

    @classmethod
    def allocate(cls, c: ModelConfig, device: torch.device, dtype: torch.dtype) -> Weights:
        """Uninitialised parameters in the fused layout."""

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        layers = []
        for _ in range(c.layers):
            tensors = {field: empty(*shape) for field, shape in layer_shapes(c).items()}
            parts: dict[str, Any] = {field: Linear(t) if t.dim() == 2 else t for field, t in tensors.items()}
            layers.append(Layer(**parts))
        embedding = empty(c.embedding_size, c.width)
        head = embedding if c.tied else empty(c.embedding_size, c.width)
        return cls(embedding, layers, empty(c.width), head)

    @classmethod
    def of_parts(cls, c: ModelConfig, names: NameMap, tensors: Mapping[str, Tensor], mapped: int) -> Weights:
        """The tensors of a checkpoint where they are: matrices that share an input stay apart, biases are copied together."""

        def value(field: str, i: int) -> Any:
            parts = [tensors[name.format(i=i)] for name in names.layer[field]]
            if parts[0].dim() == 1:
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            return Linear(parts[0]) if len(parts) == 1 else Stacked(parts)

        layers = [Layer(**{field: value(field, i) for field in layer_shapes(c)}) for i in range(c.layers)]
        embedding = tensors[names.embedding]
        head = embedding if c.tied else tensors[names.head]
        return cls(embedding, layers, tensors[names.final_norm], head, mapped)

    def named(self, c: ModelConfig, names: NameMap) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of the checkpoint: itself, or a view of the fused one that holds it."""
        yield names.embedding, self.embedding
        for i, layer in enumerate(self.layers):
            for field, parts in names.layer.items():
                value = getattr(layer, field)
                views: Sequence[Tensor]
                if isinstance(value, Stacked):
                    views = value.parts
                else:
                    tensor = value.weight if isinstance(value, Linear) else value
                    views = tensor.split(_stacked_rows(c, field, len(tensor)))
                for part, view in zip(parts, views, strict=True):
                    yield part.format(i=i), view
        yield names.final_norm, self.final_norm
        if not c.tied:
            yield names.head, self.head


def expected_shapes(c: ModelConfig, names: NameMap) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a checkpoint must hold, in the order of :meth:`Weights.named`.

    They are made one at a time, without tensors: who looks for them in a file stops at the first that is not there, so that
    a config which asks for a billion layers costs nothing.
    """
    yield names.embedding, (c.embedding_size, c.width)
    layer = layer_shapes(c)
    for i in range(c.layers):
        for field, parts in names.layer.items():
            rows, *columns = layer[field]
            for part, part_rows in zip(parts, _stacked_rows(c, field, rows), strict=True):
                yield part.format(i=i), (part_rows, *columns)
    yield names.final_norm, (c.width,)
    if not c.tied:
        yield names.head, (c.embedding_size, c.width)


def layer_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the fields of a :class:`Layer`."""
    qkv = (c.heads + 2 * c.kv_heads) * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (c.width,),
        "qkv": (qkv, c.width),
        "attn_out": (c.width, c.heads * c.head_dim),
        "mlp_norm": (c.width,),
        "gate_up": (2 * c.mlp, c.width),
        "down": (c.width, c.mlp),
    }
    if c.qkv_bias:
        shapes["qkv_bias"] = (qkv,)
    if c.qk_norm:
        shapes |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
    return shapes


def _stacked_rows(c: ModelConfig, field: str, rows: int) -> tuple[int, ...]:
    """How many of a field's rows each of the checkpoint's tensors has that are stacked in it."""
    if field in ("qkv", "qkv_bias"):
        return c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim
    return (c.mlp, c.mlp) if field == "gate_up" else (rows,)


class Transformer:
    """The network: token ids of a window in, hidden states of the window out, its keys and values written to the cache.

    Attributes:
        config: the model's shape.
        weights: its parameters.
        ops: the backend that runs.
        threads: of a CPU that a forward is to use; None is :func:`~fastdllm_triton.utils.threads.default_threads`.
    """

    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, threads: int | None = None) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        self.threads = threads

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, activations and caches."""
        return self.weights.embedding.dtype

    @property
    def head(self) -> Tensor:
        """``[V, E]``: the rows of the head that belong to the vocabulary."""
        return self.weights.head[: self.config.vocab_size]

    def new_cache(self, kv_start: Tensor, slots: int) -> KVCache:
        """A cache for ``len(kv_start)`` sequences of ``slots`` slots, left padded up to ``kv_start`` (``[B]`` int32)."""
        c = self.config
        return KVCache.allocate(c.layers, c.kv_heads, c.head_dim, slots, kv_start, self.dtype)

    def forward(
        self,
        ids: Tensor,
        window_start: Tensor,
        cache: KVCache,
        rows: Tensor | None = None,
        *,
        block_length: int | None = None,
    ) -> Tensor:
        """Recomputes a window in place.

        Args:
            ids: ``[B, W]``, the window's tokens.
            window_start: ``[B]`` int32, its first slot in each sequence.
            cache: read over ``[kv_start, kv_end)``, written over the window.
            rows: ``[P]`` int64, rows of the hidden states as if they were ``[B W, E]``; a negative one is none. With ``P = 0``
                the window's keys and values are all that is computed: the last layer ends with them.
            block_length: a token attends up to the end of its own block, in blocks of so many counted from ``kv_start``, and not
                beyond ``kv_end``. All of the slots above if not given, as where a window is one block that ends at ``kv_end``.

        Returns:
            ``[B, W, E]``: hidden states before the final norm; with ``rows`` ``[P, E]``: those rows behind it, zeros for none.
        """
        c, ops, weights = self.config, self.ops, self.weights
        attention: dict[str, Any] = {} if cache.span is None else {"span": cache.span}
        if block_length is not None:
            attention["block_causal"] = (window_start, block_length)
        only_writes = rows is not None and len(rows) == 0
        # The first norm gathers the embeddings.
        h, x = ops.rms_norm(weights.embedding, weights.layers[0].attn_norm, c.eps, rows=ids)
        delta: Tensor | None = None
        ahead = ops.prefetch(self.device)
        for i, (layer, k, v) in enumerate(zip(weights.layers, cache.k, cache.v, strict=True)):
            if i == 0:
                qkv = layer.qkv(ops, h)
            else:
                layer.qkv.prefetch(ahead)
                qkv, x = layer.qkv.of_norm(ops, x, delta, layer.attn_norm, c.eps)
            ends = only_writes and i == c.layers - 1
            if not ends:
                layer.attn_out.prefetch(ahead)
            q = ops.rope_kv_write(
                qkv,
                k,
                v,
                window_start,
                cache.kv_start,
                c.rope_theta,
                bias=layer.qkv_bias,
                rounding=c.rope_rounding,
                **layer.head_norms(c),
            )
            if ends:
                ahead.join()
                return torch.empty(0, c.width, dtype=self.dtype, device=self.device)
            attended = ops.window_attention(q, k, v, cache.kv_start, cache.kv_end, **attention).flatten(2)
            x, delta = layer.attn_out.add_to(ops, x, attended)
            layer.gate_up.prefetch(ahead)
            h, x = layer.gate_up.of_norm(ops, x, delta, layer.mlp_norm, c.eps, activation="swiglu")
            x, delta = layer.down.add_to(ops, x, h)
        if rows is not None:
            x, _ = ops.rms_norm(x, weights.final_norm, c.eps, residual=delta, rows=rows)
        elif delta is not None:
            x = x + delta
        ahead.join()  # Ahead of a kernel that waits for all before it, as the head does, and not of one that is launched early.
        return cast("Tensor", x)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm in front of the head, over ``[..., E]``."""
        y: Tensor = self.ops.rms_norm(hidden, self.weights.final_norm, self.config.eps)
        return y

    def logits(self, ids: Tensor) -> Tensor:
        """``[B, T]`` ids to ``[B, T, V]`` logits: a plain forward over whole sequences, for scoring and for checks.

        As the official modules' ``forward`` returns them: where the config says ``shift``, the logits at position ``i``
        predict position ``i + 1``. Attention is block-causal, in blocks of the config's length, where the model's is.
        """
        start = torch.zeros(len(ids), dtype=torch.int32, device=self.device)
        hidden = self.forward(ids, start, self.new_cache(start, ids.shape[1]), block_length=self.config.block_length)
        return F.linear(self.final_norm(hidden), self.head)
