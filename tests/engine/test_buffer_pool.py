"""Buffers that outlive a generation: for whom, how much, and that nothing keeps them alive once nobody wants them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _modules import load_module
from conftest import GOLDEN

import fastdllm_triton as fdt
from fastdllm_triton.engine import engine
from fastdllm_triton.engine.buffer_pool import BufferPool
from fastdllm_triton.integrations.transformers import runtime_of
from fastdllm_triton.models.transformer import Transformer

OPTIONS: dict[str, Any] = {"gen_length": 16, "block_length": 8}
PROMPTS = [[5, 6, 7]]


@pytest.fixture(autouse=True)
def _kept_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BufferPool, "of", classmethod(lambda cls, device: cls(2**40)))


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Python's cyclic collector is off: what is freed is freed because nobody refers to it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _references(model: fdt.MaskedDiffusionLM) -> dict[str, weakref.ref[Any]]:
    (batch,) = model.buffers._runners
    network = model.network
    weight = network.weights.layers[0].qkv.weight
    return {"network": weakref.ref(network), "weight": weakref.ref(weight), "cache": weakref.ref(batch.cache.k)}


def _alive(references: dict[str, weakref.ref[Any]]) -> list[str]:
    return [name for name, reference in references.items() if reference() is not None]


@pytest.mark.usefixtures("no_collector")
def test_a_dropped_model_frees_its_weights_and_buffers_at_once() -> None:
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu")
    model.generate(PROMPTS, **OPTIONS)
    references = _references(model)
    assert len(_alive(references)) == 3
    del model
    assert _alive(references) == []


@pytest.mark.usefixtures("no_collector")
def test_a_model_frees_what_a_left_stream_held() -> None:
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu")
    stream = model.stream(PROMPTS, **OPTIONS)
    next(stream)
    cache = weakref.ref(stream.batch.cache.k)
    del stream
    model.release()
    assert cache() is None


@pytest.mark.usefixtures("no_collector")
def test_restore_and_a_dropped_module_free_everything_at_once() -> None:
    for drop in (True, False):
        module = load_module(GOLDEN / "llada-gqa")
        fdt.accelerate(module)
        module.generate(PROMPTS, **OPTIONS)
        references = _references(runtime_of(module))
        if drop:
            del module
        else:
            fdt.restore(module)
        assert _alive(references) == [], f"dropped: {drop}"


@pytest.mark.usefixtures("no_collector")
def test_a_module_that_moved_is_fused_again_without_its_former_memory() -> None:
    module = load_module(GOLDEN / "llada-gqa")
    fdt.accelerate(module)
    module.generate(PROMPTS, **OPTIONS)
    references = _references(runtime_of(module))
    module.to(torch.float64)
    module.generate(PROMPTS, **OPTIONS)
    assert _alive(references) == []


@pytest.mark.usefixtures("no_collector")
def test_release_gives_the_buffers_back_at_once_and_the_model_stays_usable() -> None:
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu")
    module = load_module(GOLDEN / "llada-gqa")
    fdt.accelerate(module)
    for owner, runtime in ((model, model), (module, runtime_of(module))):
        before = owner.generate(PROMPTS, **OPTIONS)
        cache = _references(runtime)["cache"]
        owner.release()
        assert cache() is None
        assert owner.generate(PROMPTS, **OPTIONS).sequences.tolist() == before.sequences.tolist()


def test_larger_buffers_serve_any_options_and_smaller_or_guided_ones_do_not() -> None:
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu")
    model.generate([[1] * 40, [2] * 3], **OPTIONS)
    (batch,) = model.buffers._runners
    model.generate([[5, 6, 7]], **OPTIONS, seed=3, strategy=fdt.Threshold(0.5))
    assert model.buffers._runners == [batch]
    changes: list[dict[str, Any]] = [
        {"temperature": 0.5},
        {"block_length": 4},
        {"forbidden": (3,)},
        {"strategy": fdt.Factor(1.0)},
    ]
    for change in changes:
        model.generate([[5, 6, 7]], **OPTIONS | change)
        assert model.buffers._runners == [batch]
    for other in ({"prompts": [[1] * 60]}, {"prompts": [[1]] * 3}, {"prompts": [[1]], "cfg_scale": 1.0}):
        model.generate(**other, **OPTIONS)
        assert model.buffers._runners[-1] is not batch
    assert len(model.buffers) == 4


def test_what_is_kept_is_bounded_and_the_ones_used_least_recently_go() -> None:
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu")
    pool = model.buffers
    model.generate([[1] * 10], **OPTIONS)
    pool.limit = 3 * pool.nbytes
    for length in (20, 30, 40, 50):
        model.generate([[1] * length], **OPTIONS)
    assert pool.nbytes <= pool.limit
    assert [batch.slots for batch in pool._runners] == [66]
    pool.limit = 1
    model.generate([[1] * 20], **OPTIONS)
    assert len(pool) == 1, "the one used last stays"
    pool.limit = 0
    model.generate([[1] * 20], **OPTIONS)
    assert len(pool) == 0


def test_kept_buffers_make_room_for_a_generation_that_would_not_fit_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu")
    model.generate([[1] * 10], **OPTIONS)

    def short(network: Transformer, *sizes: Any, **more: Any) -> None:
        if len(model.buffers):
            raise MemoryError("it does not fit")

    monkeypatch.setattr(engine, "check_memory", short)
    assert model.generate([[1] * 90], **OPTIONS).nfe
    assert [batch.slots for batch in model.buffers._runners] == [106]

    monkeypatch.setattr(engine, "check_memory", lambda *sizes, **more: (_ for _ in ()).throw(MemoryError("it does not fit")))
    with pytest.raises(MemoryError, match="it does not fit"):
        model.generate([[1] * 200], **OPTIONS)


def test_a_generation_that_is_never_begun_takes_nothing() -> None:
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu")
    model.generate(PROMPTS, **OPTIONS)
    stream = model.stream(PROMPTS, **OPTIONS)
    assert len(model.buffers) == 1
    out = stream.output()
    assert out.sequences[0].tolist() == [*PROMPTS[0], *[model.config.mask_id] * 16]
    assert (out.nfe, out.committed) == (0, 0)
    stream.close()
    assert len(model.buffers) == 1


def test_generations_at_once_have_buffers_of_their_own() -> None:
    model = fdt.load(GOLDEN / "llada-gqa", device="cpu")
    alone = model.generate(PROMPTS, **OPTIONS)
    streams = [model.stream(PROMPTS, **OPTIONS) for _ in range(3)]
    for _ in zip(*streams, strict=True):
        assert len({id(stream.batch) for stream in streams}) == 3
    assert all(stream.output().sequences.tolist() == alone.sequences.tolist() for stream in streams)
    assert len(model.buffers) == 3
