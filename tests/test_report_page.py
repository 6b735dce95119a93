"""The report's page in a real browser, at the width of a desktop and of a phone."""

import json
import re
import shutil
import subprocess

import pytest
import synthetic_study
from synthetic_study import LOSS, PR

from qkjax.report import report

pytest.importorskip("matplotlib", reason="matplotlib is absent: pip install -e '.[report]'")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
    "--virtual-time-budget=10000",
    "--dump-dom",
)
WIDTHS = (1280, 390)
HEIGHT = 900  # of the first screen
# Shows the page in a frame of each width, without scroll bars, and says what it found there.
PROBE = """<!DOCTYPE html><body><script>
const found = {};
for (const width of [%s]) {
  const frame = document.createElement("iframe");
  frame.style = "border: 0"; frame.width = width; frame.height = 900; frame.scrolling = "no";
  frame.src = "%s";
  frame.onload = () => {
    const page = frame.contentDocument;
    const box = element => element.getBoundingClientRect();
    const inside = ".table, pre, svg, nav";  // these scroll or clip by themselves
    page.querySelectorAll("details").forEach(element => element.open = true);
    const first = page.querySelector("#result");
    const bottom = element => box(element).bottom;
    found[width] = {
      width: page.documentElement.scrollWidth,
      sections: Object.fromEntries([...page.querySelectorAll("section")].map(
        section => [section.id, box(section).height])),
      lead: bottom(first.querySelector(".lead")),
      numbers: bottom(first.querySelector("table")),
      drawn: [...first.querySelectorAll(".chart svg")].map(
        svg => [box(svg).top, box(svg).bottom, box(svg).left]),
      hints: [...page.querySelectorAll(".table")].map(element => [
        element.scrollWidth > element.clientWidth,
        getComputedStyle(element).backgroundAttachment]),
      charts: [...page.querySelectorAll(".chart svg")].map(svg => box(svg).width),
      beyond: [...page.querySelectorAll("body *")].filter(
        element => box(element).right > width + 1 && !element.closest(inside)
      ).map(element => element.tagName + " " + element.className),
    };
    document.title = JSON.stringify(found);
  };
  document.body.append(frame);
}
</script></body>"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[str]]:
    """What the browser found at each width, and what it wrote to its console."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    folder = tmp_path_factory.mktemp("page")
    arms = synthetic_study.arms(32, adamw_qk={PR: 12.0, LOSS: 3.6}, muon_qk_frozen={PR: 21.0})
    synthetic_study.write(
        folder / "study", arms, seeds=(42, 43), noise={PR: 0.2}, scale="tiny", spectra=True
    )
    rates = {"muon_qk": {0.006: 3.0, 0.012: 3.1}}
    prs = {"muon_qk": {0.006: 20.0, 0.012: 18.0}}
    synthetic_study.write_sweep(folder / "study", rates, prs=prs)
    synthetic_study.write_surgery(folder / "study", {"muon_qk": (8, 12)}, seeds=(42, 43))
    right = {"muon_noqk": 0.4, "adamw_qk": 0.3}
    synthetic_study.write_downstream(folder / "study", right, seeds=(42, 43), items=50)
    page = report.make_report(folder / "study")
    (folder / "probe.html").write_text(PROBE % (", ".join(map(str, WIDTHS)), page.as_uri()))
    done = subprocess.run(
        [
            browser,
            *FLAGS,
            f"--user-data-dir={folder / 'profile'}",
            (folder / "probe.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(title[1]), console


@pytest.mark.process
def test_the_browser_has_nothing_to_say(shown: tuple[dict, list[str]]):
    assert shown[1] == []


@pytest.mark.process
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_its_window(shown: tuple[dict, list[str]], width: int):
    found = shown[0][str(width)]
    assert found["beyond"] == [] and found["width"] <= width
    assert len(found["sections"]) == 14 and min(found["sections"].values()) > 60
    assert len(found["charts"]) > 25
    assert min(found["charts"]) > 280  # wide enough to read, also three in a row


@pytest.mark.process
def test_the_first_screen_holds_sentence_numbers_and_pictures(shown: tuple[dict, list[str]]):
    wide, narrow = (shown[0][str(width)] for width in WIDTHS)
    assert wide["lead"] < narrow["lead"] < wide["numbers"] < narrow["numbers"] < HEIGHT
    (one, other) = wide["drawn"]
    assert one[1] < HEIGHT and one[:2] == other[:2] and one[2] < other[2]  # side by side
    above, below = narrow["drawn"]
    assert above[0] < 0.9 * HEIGHT and above[1] <= below[0]  # one above the other


@pytest.mark.process
def test_tables_that_scroll_hint_at_it(shown: tuple[dict, list[str]]):
    hints = shown[0]["390"]["hints"]
    assert any(scrolls for scrolls, _ in hints)
    assert {attachment for _, attachment in hints} == {"local, local, scroll, scroll"}
