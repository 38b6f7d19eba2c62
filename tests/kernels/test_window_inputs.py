"""window_inputs: tokens of the windows, and the list of what a forward predicts, against plain Python."""

from __future__ import annotations

import pytest
import torch
from _support import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdllm_triton.kernels.window_inputs import window_inputs as kernel
from fastdllm_triton.reference.window_inputs import window_inputs as reference
from fastdllm_triton.types import WindowInputs

MASK = 9
OPS = {"reference": reference, "triton": kernel}
SLOTS, BLOCK = 12, 4


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def ints(values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def text(*rows: str) -> torch.Tensor:
    """A row a string: ``_`` is masked, a digit itself."""
    return ints([[MASK if c == "_" else int(c) for c in row] for row in rows], torch.int64)  # type: ignore[misc]


def call(op, x: torch.Tensor, start: list[int], left: list[int], **options) -> WindowInputs:
    sizes = {"window": BLOCK, "block": BLOCK, "predicted": BLOCK * len(x), "mask_id": MASK} | options
    base, kv_start = sizes.pop("base", ints(start)), sizes.pop("kv_start", ints([0] * len(x)))
    return op(x, base, ints(start), ints(left), kv_start, **sizes)


def test_masked_slots_are_packed_in_order_and_places_that_nobody_takes_are_none(op):
    found = call(op, text("12345678_0_2", "1234____5678"), [8, 4], [2, 4])
    assert found.ids.tolist() == [[MASK, 0, MASK, 2], [MASK] * 4]
    assert found.start.tolist() == [8, 4]
    assert found.place.tolist() == [[0, -1, 1, -1], [2, 3, 4, 5]]
    assert found.rows.tolist() == [0, 2, 4, 5, 6, 7, -1, -1]
    assert found.batch_row.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert found.keys.shape == (3, 0)


def test_rows_with_fewer_masks_than_their_counter_leave_holes_and_nothing_moves(op):
    found = call(op, text("12345678_0_2", "1234____5678"), [8, 4], [4, 4])
    assert found.place.tolist() == [[0, -1, 1, -1], [4, 5, 6, 7]]
    assert found.rows.tolist() == [0, 2, -1, -1, 4, 5, 6, 7]
    assert found.batch_row.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_slot_beyond_its_rows_places_or_the_lists_end_has_none(op):
    x = text("12345678____", "1234____5678")
    assert call(op, x, [8, 4], [3, 4]).place.tolist() == [[0, 1, 2, -1], [3, 4, 5, 6]]
    found = call(op, x, [8, 4], [4, 4], predicted=5)
    assert found.place.tolist() == [[0, 1, 2, 3], [4, -1, -1, -1]]
    assert found.rows.tolist() == [0, 1, 2, 3, 4]


def test_a_row_with_nothing_left_begins_behind_the_cache(op):
    found = call(op, text("123456789999", "1234____5678"), [8, 4], [0, 4])
    assert found.start.tolist() == [SLOTS, 4]
    assert found.place.tolist() == [[-1] * 4, [0, 1, 2, 3]]


def test_a_shifted_model_predicts_from_the_slot_before(op):
    # The window begins one slot ahead of the block, and at the sequence's front with it.
    found = call(op, text("____12345678", "1234____5678"), [0, 4], [4, 4], back=1, window=BLOCK + 1, shift=True)
    assert found.start.tolist() == [0, 3]
    assert found.rows.tolist() == [0, 0, 1, 2, 5, 6, 7, 8]


def test_position_0_of_a_shifted_model_predicts_itself(op):
    found = call(op, text("8888____1234", "8888____1234"), [4, 4], [4, 4], back=1, window=6, shift=True, kv_start=ints([4, 0]))
    assert found.start.tolist() == [3, 3]
    assert found.rows.tolist() == [1, 1, 2, 3, 6, 7, 8, 9]


def test_one_base_serves_all_rows(op):
    found = call(op, text("1234____5678", "12345678____"), [4, 8], [4, 4], base=ints([2])[0], window=10)
    assert found.start.tolist() == [2, 2]
    assert found.ids[0].tolist() == [3, 4, *[MASK] * 4, 5, 6, 7, 8]
    assert found.rows.tolist() == [2, 3, 4, 5, 16, 17, 18, 19]


def test_keys_of_the_noise_go_with_their_slots(op):
    keys = {"kv_start": ints([1, 3]), "seed": ints([50, 60], torch.int64), "step": ints([0, 7])}
    found = call(op, text("12345678_0_2", "1234____5678"), [8, 4], [2, 4], **keys)
    seed, position, step = found.keys.tolist()
    assert seed == [50, 50, 60, 60, 60, 60, 0, 0]
    assert position == [7, 9, 1, 2, 3, 4, 0, 0]
    assert step == [0, 0, 7, 7, 7, 7, 0, 0]


@given(
    st.integers(1, 6).flatmap(lambda rows: st.tuples(
        st.lists(st.text("_1234", min_size=20, max_size=20), min_size=rows, max_size=rows),
        st.lists(st.integers(0, 12), min_size=rows, max_size=rows),
        st.lists(st.integers(0, 8), min_size=rows, max_size=rows),
    )),
    st.integers(0, 3), st.integers(5, 20), st.integers(1, 5), st.integers(1, 40), st.booleans(),
)  # fmt: skip
@settings(max_examples=30)
def test_the_kernel_does_what_the_reference_does(case, back, window, block, predicted, shift):
    rows, start, left = case
    options = {
        "back": back, "window": window, "block": block, "predicted": predicted, "shift": shift, "kv_start": ints(start),
        "seed": ints(left, torch.int64), "step": ints(left),
    }  # fmt: skip
    want, got = (call(op, text(*rows), start, left, **options) for op in (reference, kernel))
    for name, tensor in vars(want).items():
        assert torch.equal(getattr(got, name), tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, SLOTS)}, r"x must be \[B, L\] torch.int64 of last stride 1, got torch.float32 \[2, 12\]"),
        ({"block": BLOCK + 1}, "block must be 1 to 4, the window's slots, got 5"),
        ({"predicted": 0}, "predicted must be at least 1, got 0"),
        ({"remaining": torch.zeros(2, dtype=torch.int64)}, r"remaining must be of dtype torch.int32, got torch.int64"),
        ({"base": torch.zeros(3, dtype=torch.int32)}, r"base must be .*, got torch.int32 \[3\]"),
        ({"kv_start": torch.zeros(2, dtype=torch.int64)}, "kv_start must be of dtype torch.int32, got torch.int64"),
        ({"step": torch.zeros(2, dtype=torch.int32)}, "seed must be given with step, or neither, got one of them"),
    ],
)
def test_bad_arguments_are_named(change, message):
    start = ints([8, 4])
    arguments = {
        "x": text("12345678____", "1234____5678"),
        "base": start,
        "block_start": start,
        "remaining": start,
        "kv_start": start,
    }
    arguments |= {"window": BLOCK, "block": BLOCK, "predicted": 8, "mask_id": MASK}
    arguments |= {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        kernel(**arguments)
