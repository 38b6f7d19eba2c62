"""head_statistics: token statistics straight from hidden states."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from fastdllm_triton.kernels._arch import ARCHS
from fastdllm_triton.kernels._check import INTERPRETED
from fastdllm_triton.kernels.head_statistics import FUSED_ROWS, select_config
from fastdllm_triton.kernels.head_statistics import head_statistics as kernel
from fastdllm_triton.reference.head_statistics import head_statistics as reference
from fastdllm_triton.reference.token_statistics import token_statistics
from fastdllm_triton.tools.compile_report import read_json
from fastdllm_triton.types import TokenStatistics

COMMITTED = Path(__file__).parents[2] / "bench" / "compile_report.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = {"reference": reference, "triton": kernel}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def head(rows: int, vocabulary: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * vocabulary + width)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * 3 / math.sqrt(width)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def check(found: TokenStatistics, logits: torch.Tensor, error: float = 1e-5) -> None:
    """Compares with the statistics of float64 logits; ``error`` is what float32 products may differ by."""
    exact = token_statistics(logits.double())
    assert found.token.tolist() == exact.token.tolist()
    for name in ("logit", "second_logit", "logsumexp", "entropy", "confidence"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(exact, name), atol=error, rtol=error)
    torch.testing.assert_close(found.rest.double(), exact.rest, atol=1e-30, rtol=10 * error)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "dtype"),
    [
        (1, 1, 16, torch.float32),  # one token
        (1, 320, 128, torch.float32),  # the built-in model's shape
        (5, 999, 80, torch.float32),  # nothing divides a tile
        (17, 4096, 96, torch.float16),
        (33, 1000, 64, torch.float32),
        (64, 640, 130, torch.float16),
        (66, 640, 64, torch.float32),  # more rows than one program takes
    ],
)
def test_statistics_are_those_of_the_logits(op, rows, vocabulary, width, dtype):
    hidden, weight = head(rows, vocabulary, width, dtype)
    check(op(hidden, weight), hidden.double() @ weight.double().T)


@pytest.mark.parametrize("listed", [[4], [0, 1, 2, 3, 4, 5], [5, 2, 2, 0], [3] * 66])
def test_only_listed_rows_take_part(op, listed):
    hidden, weight = head(6, 500, 32)
    hidden[[row for row in range(6) if row not in listed]] = math.nan
    rows = torch.tensor(listed, device=DEVICE)
    check(op(hidden, weight, rows=rows), (hidden.double() @ weight.double().T)[rows])


@pytest.mark.parametrize("count", [4, 66])
def test_minus_one_asks_for_nothing(op, count):
    hidden, weight = head(3, 500, 32)
    rows = torch.full((count,), -1, device=DEVICE)
    rows[1] = 2
    found = op(hidden, weight, rows=rows)
    missing = [row for row in range(count) if row != 1]
    assert found.token[missing].tolist() == [-1] * (count - 1)
    assert found.rest[missing].tolist() == [math.inf] * (count - 1)
    for field in (found.logit, found.second_logit, found.logsumexp, found.entropy):
        assert field[missing].isnan().all()
    check(TokenStatistics(*(getattr(found, f.name)[1:2] for f in fields(found))), (hidden.double() @ weight.double().T)[2:])


def test_nothing_asked_and_nothing_listed(op):
    hidden, weight = head(3, 500, 32)
    assert op(hidden, weight, rows=torch.full((2,), -1, device=DEVICE)).token.tolist() == [-1, -1]
    assert op(hidden, weight, rows=torch.zeros(0, dtype=torch.int64, device=DEVICE)).token.shape == (0,)


@pytest.mark.parametrize("rows", [3, 66])
def test_bias_is_added(op, rows):
    hidden, weight = head(rows, 500, 32)
    bias = torch.linspace(-4, 4, 500, device=DEVICE)
    check(op(hidden, weight, bias=bias), hidden.double() @ weight.double().T + bias.double())


@pytest.mark.parametrize("rows", [3, 66])
def test_logits_are_rounded_on_request(op, rows):
    hidden, weight = head(rows, 500, 32)
    rounded = (hidden @ weight.T).to(torch.float16)
    found = op(hidden, weight, logits_dtype=torch.float16)
    # A logit on the edge between two float16 numbers may go either way; a tenth of that is far more than such edges.
    agree = found.logit.double() == rounded.double().max(1).values
    assert agree.double().mean() > 0.9
    assert (found.logit == found.logit.half()).all() and (found.second_logit == found.second_logit.half()).all()
    exact = token_statistics(rounded.double())
    torch.testing.assert_close(found.logsumexp.double(), exact.logsumexp, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [2, 66])
def test_rounding_makes_ties_that_go_to_the_lowest_id(op, rows):
    hidden = torch.ones(rows, 16, device=DEVICE)
    weight = torch.zeros(300, 16, device=DEVICE)
    weight[7, 0], weight[290, 0] = 100.0, 100.01  # one float16 number
    assert set(op(hidden, weight).token.tolist()) == {290}
    found = op(hidden, weight, logits_dtype=torch.float16)
    assert set(found.token.tolist()) == {7} and set(found.second_logit.tolist()) == {100.0}


@pytest.mark.parametrize("rows", [3, 66])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_forbidden_tokens_take_no_part(op, rows, as_tensor):
    hidden, weight = head(rows, 500, 32)
    logits = hidden.double() @ weight.double().T
    ids = sorted(set(logits.argmax(1).tolist()))[:5] + [499]
    logits[:, ids] = -math.inf
    check(op(hidden, weight, forbidden=torch.tensor(ids, device=DEVICE) if as_tensor else ids), logits)


def test_broken_rows_say_so_and_leave_the_others_alone(op):
    hidden, weight = head(4, 500, 32)
    hidden[1, 3] = math.nan
    hidden[2] = math.inf
    found = op(hidden, weight)
    assert (found.token[[0, 3]] >= 0).all()
    assert found.token[[1, 2]].tolist() == [-1, -1] and found.rest[[1, 2]].tolist() == [math.inf] * 2


@pytest.mark.parametrize("repeat", [1, 11])
def test_samples_are_those_of_token_statistics(op, repeat):
    hidden, weight = head(6, 300, 32)
    listed = torch.tensor([3, -1, 0, 5, 5, 1] * repeat, device=DEVICE)
    seed = torch.arange(len(listed), device=DEVICE) + 40
    keys = {"position": torch.arange(len(listed), device=DEVICE) * 3, "step": 2}
    found = op(hidden, weight, rows=listed, temperature=1.3, seed=seed, **keys)
    asked = listed >= 0
    logits = (hidden.double() @ weight.double().T)[listed[asked]]
    keys["position"] = keys["position"][asked]
    exact = token_statistics(logits, temperature=1.3, seed=seed[asked], **keys)
    assert found.token[asked].tolist() == exact.token.tolist()
    assert (found.token[~asked] == -1).all()
    torch.testing.assert_close(found.rest[asked].double(), exact.rest, atol=0, rtol=1e-4)


@pytest.mark.parametrize("rows", [5, 70])  # 70: more than the fused kernel takes
def test_options_of_a_row_give_what_they_give_for_all_rows(op, rows):
    hidden, weight = head(rows, 200, 32)
    asked = torch.arange(rows, device=DEVICE).roll(1)
    asked[3] = -1
    temperature = torch.tensor([0.4, 1.3, 2.0, 1.0, 0.7], device=DEVICE).repeat(rows // 5)
    forbidden = torch.randint(0, 200, (rows, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    forbidden[:, 20:] = -1
    together = op(hidden, weight, rows=asked, temperature=temperature, forbidden=forbidden, seed=7)
    assert together.token[3] == -1
    for row in range(5):
        options = {"temperature": temperature[row].item(), "forbidden": forbidden[row, :20]}
        alone = op(hidden, weight, rows=asked, seed=7, **options)
        for found, want in zip(vars(together).values(), vars(alone).values(), strict=True):
            assert torch.equal(found[row], want[row]) or (found[row].isnan() and want[row].isnan())


def test_a_row_of_temperature_zero_takes_the_argmax_among_rows_that_draw(op):
    hidden, weight = head(4, 200, 32)
    found = op(hidden, weight, temperature=torch.tensor([0.0, 5.0, 0.0, 5.0], device=DEVICE), seed=7)
    want = op(hidden, weight)
    assert found.token[::2].tolist() == want.token[::2].tolist()
    assert found.token[1::2].tolist() == op(hidden, weight, temperature=5.0, seed=7).token[1::2].tolist()
    torch.testing.assert_close(found.rest[::2], want.rest[::2])


def test_a_row_draws_the_same_in_any_company(op):
    hidden, weight = head(3, 300, 32)
    assert op(hidden, weight, temperature=1.3, seed=7).token.tolist() == [
        op(
            hidden,
            weight,
            rows=torch.tensor([i], device=DEVICE),
            position=torch.tensor([i], device=DEVICE),
            temperature=1.3,
            seed=7,
        ).token.item()
        for i in range(3)
    ]


def test_out_is_overwritten_and_returned(op):
    hidden, weight = head(3, 500, 32)
    poisoned = [torch.full((3,), math.nan, device=DEVICE) for _ in range(5)]
    out = TokenStatistics(torch.full((3,), -7, device=DEVICE), *poisoned)
    assert op(hidden, weight, out=out) is out
    check(out, hidden.double() @ weight.double().T)


def test_bad_temperature(op):
    hidden, weight = head(3, 500, 32)
    with pytest.raises(ValueError, match="temperature must be 0 or more, got -1"):
        op(hidden, weight, temperature=-1.0)
    with pytest.raises(ValueError, match="needs a seed"):
        op(hidden, weight, temperature=1.0)


# --- the kernel alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
@pytest.mark.parametrize(("vocabulary", "width"), [(320, 128), (126_464, 4096), (152_064, 3584)])
def test_the_parts_cover_the_vocabulary_in_one_wave(arch, vocabulary, width):
    for sample in (False, True):
        most = FUSED_ROWS[arch.name][sample]
        assert select_config(arch, most + 1, vocabulary, width, 2, sample) is None
        for rows in sorted({1, 16, most // 2 + 1, most}):
            for element_size in (2, 4):
                config = select_config(arch, rows, vocabulary, width, element_size, sample)
                assert (config.parts - 1) * config.part < vocabulary <= config.parts * config.part
                assert config.part % 16 == 0 and config.parts <= 2 * arch.sms
                assert rows <= config.block_rows < max(17, 2 * rows)
                tiles = (config.block_vocabulary + config.block_rows) * config.block_width * element_size
                assert tiles * config.num_stages <= arch.shared_bytes
                # What the fused path adds to memory: six floats and an id for each row of each part.
                assert 28 * rows * config.parts < 4e6


def test_no_more_programs_share_an_sm_than_the_compiled_kernels_have_registers_for():
    records = [record for record in read_json(COMMITTED) if record["kernel"] == "_head_statistics_kernel"]
    assert len(records) > 80
    for record in records:
        dtype, width, rows = re.match(r"(\w+) E=(\d+) rows=(\d+)", record["config"]).groups()
        arch, sizes = ARCHS[record["arch"]], (int(rows), 126_464, int(width), 4 if dtype == "fp32" else 2)
        config = select_config(arch, *sizes, "sample" in record["config"])
        assert -(-config.parts // arch.sms) <= record["ctas_per_sm"], record


def test_many_rows_are_left_to_the_matmul(monkeypatch):
    launched = []
    monkeypatch.setattr("fastdllm_triton.kernels.head_statistics._head_statistics_kernel", launched)
    hidden, weight = head(65, 300, 32)
    check(kernel(hidden, weight), hidden.double() @ weight.double().T)
    with pytest.raises(TypeError):  # the list is no kernel
        kernel(hidden[:64], weight)
    assert select_config(ARCHS["sm_90"], 65, 300, 32, 2, False) is None


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_no_partition_changes_a_choice(parts, monkeypatch):
    hidden, weight = (matrix.mul(2).round() for matrix in head(4, 900, 32))  # whole numbers: no product rounds
    weight[[2, 50, 250, 800]] = weight[2] + 4 * hidden[0].sign()  # ties in a tile, in a part and between parts

    def config(*arguments):
        found = select_config(*arguments)
        part = -(-900 // parts // 16) * 16
        return type(found)(**{**vars(found), "part": part, "parts": -(-900 // part)})

    monkeypatch.setattr("fastdllm_triton.kernels.head_statistics.select_config", config)
    logits = hidden.double() @ weight.double().T
    check(kernel(hidden, weight), logits)
    drawn = token_statistics(logits, temperature=1.0, seed=5).token
    assert kernel(hidden, weight, temperature=1.0, seed=5).token.tolist() == drawn.tolist()


def test_unwritten_workspace_would_show(monkeypatch):
    empty = torch.empty

    def poisoned(*shape, **options):
        memory = empty(*shape, **options)
        return memory.fill_(math.nan if memory.is_floating_point() else -1)

    hidden, weight = head(5, 900, 32)
    rows = torch.tensor([4, -1, 0], device=DEVICE)
    monkeypatch.setattr(torch, "empty", poisoned)
    found = kernel(hidden, weight, rows=rows)
    assert found.token[1].item() == -1
    asked = TokenStatistics(*(getattr(found, field.name)[[0, 2]] for field in fields(found)))
    check(asked, (hidden.double() @ weight.double().T)[[4, 0]])


def test_strided_rows_of_hidden_states_and_weight():
    hidden, weight = head(6, 300, 64)
    check(kernel(hidden[::2, :48], weight[:, 16:]), hidden[::2, :48].double() @ weight[:, 16:].double().T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4)}, r"hidden must be \[N, E\] float32, float16 or bfloat16, got torch.float32 \[4\]"),
        ({"hidden": torch.zeros(2, 16).double()}, "hidden must be .* got torch.float64"),
        ({"hidden": torch.zeros(2, 16, device="meta")}, "hidden must be a GPU tensor .*, got a tensor on meta"),
        ({"hidden": torch.zeros(16, 2).t()}, "hidden must have last stride 1"),
        ({"weight": torch.zeros(9, 15)}, r"weight must be torch.float32 \[9, 16\]"),
        ({"weight": torch.zeros(9, 16).half()}, "weight must be torch.float32"),
        ({"weight": torch.zeros(0, 16)}, "1 to 2.30 tokens, got 0"),
        ({"bias": torch.zeros(8)}, r"bias must be torch.float32 \[9\]"),
        ({"bias": torch.zeros(9, dtype=torch.int32)}, "bias must be contiguous and floating point"),
        ({"rows": torch.zeros(2, dtype=torch.int32)}, r"rows must be torch.int64 \[2\]"),
        ({"rows": torch.zeros(2, 1, dtype=torch.int64)}, r"rows must be torch.int64 \[2\]"),
        ({"logits_dtype": torch.float64}, "logits_dtype must be float32, float16, bfloat16 or None, got torch.float64"),
        ({"forbidden": [9]}, r"forbidden must hold ids in \[0, 9\), got \[9\]"),
        ({"temperature": 1.0, "seed": torch.zeros(3, dtype=torch.int64)}, "seed must be one integer or .2. integers"),
        ({"out": token_statistics(torch.zeros(3, 4))}, r"out.token must be a contiguous torch.int64 \[2\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"hidden": torch.zeros(2, 16, device=DEVICE), "weight": torch.zeros(9, 16, device=DEVICE)} | change
    with pytest.raises(ValueError, match=message):
        kernel(**arguments)


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter has no bfloat16")
def test_the_interpreter_refuses_what_it_computes_wrong():
    with pytest.raises(ValueError, match="float32 or float16 in Triton's interpreter"):
        kernel(torch.zeros(2, 16).bfloat16(), torch.zeros(9, 16).bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize(("vocabulary", "width"), [(126_464, 4096), (152_064, 3584)])
@pytest.mark.parametrize("rows", [1, 17, 32, 64, 128])
def test_bfloat16_on_a_gpu(rows, vocabulary, width):
    hidden, weight = (matrix.to(DEVICE) for matrix in head(rows, vocabulary, width, torch.bfloat16))
    exact = token_statistics(hidden.double() @ weight.double().T)
    found = kernel(hidden, weight)
    assert (found.token == exact.token).double().mean() > 0.99
    torch.testing.assert_close(found.logsumexp.double(), exact.logsumexp, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.entropy.double(), exact.entropy, rtol=0, atol=1e-3)
