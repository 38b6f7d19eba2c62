"""A recorded generation: its data, and the page that replays it, in a browser without a screen."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fastdllm_triton as fdt
from fastdllm_triton import loading
from fastdllm_triton.cli.app import app
from fastdllm_triton.engine.generation import Forward
from fastdllm_triton.engine.trace import Trace, page
from fastdllm_triton.utils import files

PROMPTS = (
    "Tom has 51 coins. Tom finds 27. Tom sells 19. How many?",
    "Ann has 20 books. Ann buys 30. Ann loses 12. Ann gets 25. How many?",
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, to look at the page")


def _record(lm: fdt.MaskedDiffusionLM, path: Path, **options: Any) -> tuple[dict[str, Any], fdt.GenerationOutput]:
    prompts = [lm.encode(prompt) for prompt in PROMPTS]
    config = lm.options(**{"cache": "dual", "strategy": fdt.Threshold(0.9), **options})
    trace = Trace(path, lm, prompts, config)
    output = lm.generate(prompts, config, callback=trace)
    trace.write()
    return trace.data, output


def test_the_data_is_the_generation(tiny: fdt.MaskedDiffusionLM, tmp_path: Path) -> None:
    data, output = _record(tiny, tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text()) == json.loads(json.dumps(data))
    assert len(data["forwards"]) == output.nfe
    assert sum(forward["refresh"] for forward in data["forwards"]) == output.refreshes
    assert [row["generated"] for row in data["rows"]] == output.generated.tolist()
    assert [row["prompt"] for row in data["rows"]] == [tiny.encode(prompt) for prompt in PROMPTS]
    steps, confidences = (-output.step_map.new_ones(2, 48)).tolist(), [[None] * 48 for _ in range(2)]
    for index, forward in enumerate(data["forwards"]):
        for part in forward["rows"]:
            for slot, confidence in part["committed"]:
                steps[part["row"]][slot], confidences[part["row"]][slot] = index, confidence
    assert steps == output.step_map.tolist()
    sure = output.confidence[0].tolist()
    assert confidences[0] == [None if math.isnan(p) else round(p, 6) for p in sure]
    text = "".join(data["pieces"][token] for token in data["rows"][0]["generated"] if token not in data["eos_ids"])
    assert text == output.texts[0]


@pytest.mark.parametrize(
    ("options", "refreshed", "stepped"),
    [
        ({"cache": "none"}, (0, 48), (0, 48)),
        ({"cache": "prefix"}, (0, 48), (16, 48)),
        ({"cache": "dual"}, (0, 48), (16, 32)),
        ({"cache": "dual", "look_back": 4, "look_ahead": 8}, (0, 48), (12, 40)),
        ({"cache": "prefix", "suffix_window": 4}, (0, 36), (16, 36)),
    ],
)
def test_windows_are_those_that_were_recomputed(
    tiny: fdt.MaskedDiffusionLM, tmp_path: Path, options: dict[str, Any], refreshed: tuple[int, int], stepped: tuple[int, int]
) -> None:
    data, _ = _record(tiny, tmp_path / "trace.json", strategy=fdt.FixedSteps(12), **options)
    found: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    for forward in data["forwards"]:
        for part in forward["rows"]:
            if part["row"] == 0 and part["block"] == 1:
                found[forward["refresh"]].add(tuple(part["window"]))
    prompt = len(tiny.encode(PROMPTS[0]))
    assert found == {True: {(-prompt, refreshed[1])}, False: {(stepped[0] - (prompt if stepped[0] == 0 else 0), stepped[1])}}


def test_an_interrupted_generation_is_recorded_up_to_there(tiny: fdt.MaskedDiffusionLM, tmp_path: Path) -> None:
    prompts = [tiny.encode(PROMPTS[0])]
    config = tiny.options()
    trace = Trace(tmp_path / "trace.html", tiny, prompts, config)
    for forward in tiny.stream(prompts, config):
        trace(forward)
        if forward.index == 1:
            break
    trace.write()
    assert len(trace.data["forwards"]) == 2
    assert trace.data["rows"][0]["generated"].count(trace.data["mask_id"]) > 24
    assert '"forwards"' in (tmp_path / "trace.html").read_text()


def test_generate_records_itself_and_what_there_was_before_an_exception(tiny: fdt.MaskedDiffusionLM, tmp_path: Path) -> None:
    output = tiny.generate(list(PROMPTS), trace=tmp_path / "whole.json")
    data = json.loads((tmp_path / "whole.json").read_text())
    assert len(data["forwards"]) == output.nfe
    assert [row["generated"] for row in data["rows"]] == output.generated.tolist()
    told: list[int] = []

    def stop(forward: fdt.Forward) -> None:
        told.append(forward.index)
        if forward.index == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        tiny.generate(PROMPTS[0], trace=tmp_path / "part.html", callback=stop)
    assert told == [0, 1, 2]
    assert '"forwards"' in (tmp_path / "part.html").read_text()
    with pytest.raises(ValueError, match=r"trace must end in \.html or \.json"):
        tiny.generate(PROMPTS[0], trace="trace.txt", callback=stop)
    assert told == [0, 1, 2]


def test_the_command_line_records_too(tmp_path: Path) -> None:
    path = tmp_path / "trace.html"
    result = CliRunner().invoke(app, ["generate", "--prompt", PROMPTS[0], "--trace", str(path)])
    assert result.exit_code == 0, result.output
    assert "A generation, forward by forward" in path.read_text()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("trace.txt", ValueError, "trace must end in .html or .json, got"),
        ("nowhere/trace.html", FileNotFoundError, "there is no folder"),
        ("folder.html", IsADirectoryError, "is a folder"),
    ],
)
def test_bad_paths_are_told_before_any_work(
    tiny: fdt.MaskedDiffusionLM, tmp_path: Path, name: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(error, match=message):
        Trace(tmp_path / name, tiny, [[5]], tiny.options())
    assert len(list(tmp_path.iterdir())) == 1


def test_the_page_needs_no_network_and_text_cannot_leave_its_script(tiny: fdt.MaskedDiffusionLM, tmp_path: Path) -> None:
    _record(tiny, tmp_path / "trace.html")
    text = (tmp_path / "trace.html").read_text()
    addresses = set(re.findall(r"https?://[^\"' ]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # The name of SVG, not a place.
    assert "default-src 'none'" in text
    assert not re.search(r"<(link|script|img)[^>]+(src|href)=\"(?!data:)", text)
    hostile = page(json.dumps({"pieces": {"1": "</script><script>alert(1)</script><!--"}}))
    assert hostile.count("</script>") == 1
    assert hostile.count("<script>") == 1
    assert "<!--" not in hostile


# What a reader does and sees, run inside the page; the results come back in its title.
_PROBE = """
<script>
const seen = [];
const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const look = () => ({
  frame: Number($("slider").value),
  now: $("now").textContent,
  masked: cells.map((c) => c.generated.filter((e) => e.classList.contains("masked")).length),
  fresh: cells.map((c) => c.generated.filter((e) => e.classList.contains("fresh")).length),
  window: [...cells[0].prompt, ...cells[0].generated].filter((e) => e.classList.contains("window"))
    .map((e) => Number(e.dataset.slot)),
  refreshed: cells[0].panel.classList.contains("refreshed"),
  text: cells[0].generated.filter((e) => !e.classList.contains("masked")).map((e) => e.textContent).join(""),
  wide: document.documentElement.scrollWidth > window.innerWidth,
  hash: location.hash,
  sign: $("play").getAttribute("aria-label"),
});
const opened = look();
press("End"); seen.push(look());
press("Home"); seen.push(look());
press("ArrowRight"); seen.push(look());
press("ArrowRight"); seen.push(look());
press("ArrowLeft"); seen.push(look());
$("next").click(); seen.push(look());
$("slider").value = 5; $("slider").dispatchEvent(new Event("input")); seen.push(look());
const box = $("bars").getBoundingClientRect();
$("bars").dispatchEvent(new MouseEvent("click", { clientX: box.left + box.width * 0.999, bubbles: true })); seen.push(look());
cells[0].generated[0].click();
const told = [$("token").textContent];
press("Home"); cells[0].generated[0].click(); told.push($("token").textContent);
$("play").click(); const playing = look();
setTimeout(() => {
  const during = look();
  press(" ");
  document.title = JSON.stringify({ opened, seen, told, playing, during, paused: look(), bars: bars.length });
}, 1500);
</script>
"""


def _browse(folder: Path, html: str, flags: str = "", mark: str = "") -> dict[str, Any]:
    """Opens a page that puts what it sees into its title."""
    assert CHROMIUM is not None
    (folder / "page.html").write_text(html)
    flags += " --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", (folder / "page.html").as_uri() + mark]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = re.search(r"<title>(\{.*?\})</title>", dom, flags=re.S)
    assert found, dom[-2000:]
    told: dict[str, Any] = json.loads(found.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return told


@needs_chromium
@pytest.mark.parametrize("size", ["1100,800", "360,740"])
def test_the_page_replays_the_generation(tiny: fdt.MaskedDiffusionLM, tmp_path: Path, size: str) -> None:
    _, output = _record(tiny, tmp_path / "trace.html")
    told = _browse(tmp_path, (tmp_path / "trace.html").read_text() + _PROBE, f"--window-size={size}")

    nfe = output.nfe
    assert (told["opened"]["frame"], told["opened"]["sign"], told["opened"]["hash"]) == (1, "pause", "")
    assert [look["frame"] for look in told["seen"]] == [nfe, 0, 1, 2, 1, 2, 5, nfe]
    end, start, first, second = told["seen"][:4]
    assert end["text"].rstrip("¶") == output.texts[0]
    assert end["masked"] == [0, 0]
    assert start["masked"] == [48, 48]
    assert start["now"] == f"before the first of {nfe} forwards"
    steps = output.step_map
    assert first["fresh"] == [(row == 0).sum() for row in steps]
    assert first["masked"] == [48 - (row == 0).sum() for row in steps]
    prompt = len(tiny.encode(PROMPTS[0]))
    assert first["window"] == list(range(-prompt, 48))  # A refresh recomputes everything,
    assert (first["refreshed"], second["refreshed"]) == (True, False)
    assert second["window"] == list(range(16))  # a step over the dual cache the block.
    committed = int((steps == 1).sum())
    assert second["now"].startswith(f"forward 2 of {nfe}: step, {committed} token")
    assert end["now"].endswith(f"{output.tokens_per_forward:.2f} tokens per forward so far")
    assert end["hash"] == f"#{nfe}"
    assert not any(look["wide"] for look in told["seen"])
    assert told["bars"] == nfe
    assert f"committed by forward {int(steps[0, 0]) + 1} at confidence {float(output.confidence[0, 0]):.4f}" in told["told"][0]
    assert told["told"][1].endswith("still masked")
    assert (told["playing"]["frame"], told["playing"]["sign"]) == (0, "pause")
    assert told["during"]["frame"] > 0
    assert (told["paused"]["sign"], told["paused"]["hash"]) == ("play", f"#{told['during']['frame']}")


# What is there once the page has been open for a while.
_LATER = """
<script>
setTimeout(() => {
  const given = cells[0].generated.filter((e) => e.classList.contains("given"));
  document.title = JSON.stringify({
    frame, sign: $("play").getAttribute("aria-label"), given: given.map((e) => Number(e.dataset.slot)),
    masked: given.some((e) => e.classList.contains("masked")), legend: !$("given").hidden,
  });
}, 3000);
</script>
"""


@needs_chromium
@pytest.mark.parametrize(("flags", "mark", "stands"), [("", "", None), ("--force-prefers-reduced-motion", "", 1), ("", "#3", 3)])
def test_the_page_plays_unless_motion_is_unwanted_or_a_forward_asked_for(
    tiny: fdt.MaskedDiffusionLM, tmp_path: Path, flags: str, mark: str, stands: int | None
) -> None:
    data, _ = _record(tiny, tmp_path / "trace.html")
    told = _browse(tmp_path, (tmp_path / "trace.html").read_text() + _LATER, flags, mark)
    assert told["sign"] == ("pause" if stands is None else "play")
    assert 1 < told["frame"] < len(data["forwards"]) if stands is None else told["frame"] == stands
    assert not told["legend"]


@needs_chromium
def test_slots_that_were_given_are_shown_as_such_from_the_start(tiny: fdt.MaskedDiffusionLM, tmp_path: Path) -> None:
    data, _ = _record(tiny, tmp_path / "trace.html")
    data["rows"][0]["fixed"] = [3, 4]
    told = _browse(tmp_path, page(json.dumps(data)) + _LATER, mark="#0")
    assert told == {"frame": 0, "sign": "play", "given": [3, 4], "masked": False, "legend": True}


def test_generate_writes_the_trace_also_when_it_is_stopped(tiny: fdt.MaskedDiffusionLM, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    seen: list[int] = []
    out = tiny.generate("Tom has 5 coins.", trace=whole, callback=lambda forward: seen.append(forward.index))
    assert len(json.loads(whole.read_text())["forwards"]) == len(seen) == out.nfe

    def stop(forward: Forward) -> None:
        if forward.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.generate("Tom has 5 coins.", trace=part, callback=stop)
    assert len(json.loads(part.read_text())["forwards"]) == 2


def test_a_trace_that_cannot_be_written_is_an_error_before_any_forward(
    tiny: fdt.MaskedDiffusionLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.network, "forward", None)
    with pytest.raises(FileNotFoundError, match=r"^trace: .*a\.html cannot be written: there is no folder"):
        tiny.generate("Tom", trace=tmp_path / "missing" / "a.html")
    with pytest.raises(ValueError, match=r"trace must end in \.html or \.json"):
        tiny.generate("Tom", trace=tmp_path / "a.txt")
    monkeypatch.setattr(loading, "load", None)  # On the command line, before the model is loaded.
    result = CliRunner().invoke(app, ["generate", "--prompt", "Tom", "--trace", str(tmp_path / "missing" / "a.html")])
    assert result.exit_code == 2
    assert " ".join(result.stderr.split()).startswith("error: --trace: ")


def _full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fsync)


def test_what_was_generated_comes_with_the_error_of_a_trace_that_cannot_be_written(
    tiny: fdt.MaskedDiffusionLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.html").write_text("old")
    wanted = tiny.generate(PROMPTS[0])
    _full_disk(monkeypatch)
    with pytest.raises(OSError, match=r"^trace: .*a\.html cannot be written: No space left on device$") as caught:
        tiny.generate(PROMPTS[0], trace=tmp_path / "a.html")
    output = caught.value.output  # type: ignore[attr-defined]
    assert output.texts == wanted.texts
    assert output.nfe == wanted.nfe
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_what_stopped_a_generation_is_told_before_its_trace(tiny: fdt.MaskedDiffusionLM, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()

    def stop(forward: Forward) -> None:
        if forward.index == 2:
            folder.rmdir()
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own") as caught:
        tiny.generate(PROMPTS[0], trace=folder / "a.html", callback=stop)
    assert caught.value.output.nfe == 3  # type: ignore[attr-defined]
    (note,) = caught.value.__notes__
    assert note.startswith(f"FileNotFoundError: trace: {folder / 'a.html'} cannot be written: ")


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_line_prints_the_text_before_it_tells_of_the_trace(
    tiny: fdt.MaskedDiffusionLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    text = tiny.generate(PROMPTS[0]).texts[0]
    _full_disk(monkeypatch)
    path = tmp_path / "a.html"
    result = CliRunner().invoke(app, ["generate", "--prompt", PROMPTS[0], "--trace", str(path), *["--json"] * as_json])
    assert result.exit_code == 2
    assert text in (json.loads(result.stdout)["results"][0]["text"] if as_json else result.stdout)
    assert result.stderr.splitlines() == [f"error: --trace: {path} cannot be written: No space left on device"]


def test_a_prompt_that_is_refused_leaves_an_earlier_trace(tiny: fdt.MaskedDiffusionLM, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(ValueError, match="row 0 is empty"):
        tiny.generate([[]], trace=tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "old"
