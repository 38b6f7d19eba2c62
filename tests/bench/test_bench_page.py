"""The page of a report: all on one page, without network, without errors in a browser, sortable, as wide as a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from _bench import made_up_report

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from fastdllm_triton.bench._page import page, write_page
from fastdllm_triton.bench._report import Report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, and there is none")


FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--hide-scrollbars",
]


@pytest.fixture(scope="module")
def html() -> str:
    return page(made_up_report(), made_up_report(1.2))


def browse(html: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What headless Chromium makes of a page; its console goes to stderr."""
    (tmp_path / "page.html").write_text(html)
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments, f"file://{tmp_path / 'page.html'}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def console(found: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in found.stderr.splitlines() if "CONSOLE" in line]


def test_the_page_holds_every_row_and_asks_for_nothing_elsewhere(html: str) -> None:
    report = made_up_report()
    for op in {row["op"] for row in report.rows}:
        # A table for each kind of shape.
        assert sum(map(int, re.findall(rf"{op}, (\d+) rows", html))) == sum(row["op"] == op for row in report.rows)
    assert "Made-up GPU" in html and "1,000 GB/s" in html
    assert not re.search(r'(?:src|href)="(?!#|data:)', html)
    assert "@import" not in html and "url(http" not in html


def test_the_page_has_the_plots_that_the_report_has_data_for(html: str) -> None:
    sections = re.findall(r"<h2>(.*?)</h2>", html)
    assert sections[0] == "How close to this GPU&#39;s ceilings"
    assert "window_attention: time" in sections
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids)) > 100
    without = page(Report({"device": "cpu", "gpu": None, "commit": None, "date": "2026-11-21"}))
    assert "<svg" not in without and "no speed was measured" in without


def test_text_of_a_report_is_not_markup() -> None:
    report = made_up_report()
    report.rows = [{**report.rows[0], "provider": "<script>alert(1)</script>"}]
    assert "<script>alert" not in page(report)


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    report = made_up_report()
    report.rows = report.rows[:3]
    write_page(report, tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@in_a_browser
def test_a_browser_has_nothing_to_complain_about_and_draws_it(html: str, tmp_path: Path) -> None:
    found = browse(html, tmp_path, "--window-size=500,1200", f"--screenshot={tmp_path / 'page.png'}")
    assert console(found) == []
    from matplotlib import image

    pixels = image.imread(tmp_path / "page.png")[..., :3]
    assert pixels.shape[1] == 500
    # White paper with ink of more than one colour on it.
    assert 0.5 < (pixels > 0.98).all(-1).mean() < 0.99
    assert len({tuple(pixel) for pixel in pixels.reshape(-1, 3)[::97].round(1).tolist()}) > 10


@in_a_browser
def test_an_error_on_a_page_would_show(html: str, tmp_path: Path) -> None:
    broken = html.replace("</body>", "<script>no_such_name()</script></body>")
    assert "no_such_name is not defined" in "".join(console(browse(broken, tmp_path, "--dump-dom")))


PROBE = """<script>
const table = document.querySelector("details table");
const column = (n) => [...table.tBodies[0].rows].map((row) => row.cells[n].textContent).join(";");
const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
const at = heads.indexOf("median ms"), out = document.createElement("pre");
table.tHead.rows[0].cells[at].querySelector("button").click();
const up = column(at);
table.tHead.rows[0].cells[at].querySelector("button").click();
out.id = "probe";
out.textContent = [up, column(at), table.tHead.rows[0].cells[at].getAttribute("aria-sort"),
  document.documentElement.scrollWidth <= window.innerWidth].join("|");
document.body.append(out);
</script></body>"""


@in_a_browser
def test_a_click_sorts_by_number_and_a_second_one_turns_it_round_on_a_page_as_wide_as_a_phone(html: str, tmp_path: Path) -> None:
    found = browse(html.replace("</body>", PROBE), tmp_path, "--window-size=500,900", "--dump-dom")
    up, down, order, fits = re.search(r'<pre id="probe">(.*?)</pre>', found.stdout, flags=re.S).group(1).split("|")  # type: ignore[union-attr]
    rising = [float(text) for text in up.split(";") if text]
    assert len(rising) > 100 and rising == sorted(rising)
    assert [float(text) for text in down.split(";") if text] == rising[::-1]
    # flash-attn has no times: last, whichever way.
    assert up.endswith(";") and down.endswith(";")
    assert (order, fits) == ("descending", "true")
