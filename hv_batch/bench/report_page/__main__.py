"""`python -m hv_batch.bench.report_page`: prints one line for each measurement."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hv_batch.bench.report_page.browser import chromium
from hv_batch.bench.report_page.server import CountingServer, serve
from hv_batch.bench.report_page.synthetic import SyntheticReport, synthetic_samples
from hv_batch.bench.report_page.synthetic_root import write_root
from hv_batch.job.formatting import size
from hv_batch.protocol import UserError

# Runs before the scripts of the page. `window.marks` has milliseconds since the navigation, `window.frames_ms` the time
# from each frame to the next while `window.watching` is set.
WATCH = """
window.marks = {}; window.frames_ms = [];
let last = 0;
const frame = (now) => {
  if (window.watching && last) window.frames_ms.push(now - last);
  last = window.watching ? now : 0;
  if (!window.marks.cards && document.querySelector(".card .id")) window.marks.cards = performance.now();
  const posters = document.querySelectorAll(".card img.ready").length;
  if (!window.marks.posters && posters >= 6) window.marks.posters = performance.now();
  requestAnimationFrame(frame);
};
requestAnimationFrame(frame);
"""
# Scrolls to the end of the page with a constant speed in 6 s, then jumps to 12 places in 3 s.
SCROLL = """async () => {
  const wait = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });
  const end = document.body.scrollHeight - innerHeight, begun = performance.now();
  window.watching = true;
  for (let share = 0; share < 1;) {
    share = Math.min(1, (performance.now() - begun) / 6000);
    scrollTo(0, share * Math.min(end, 60000));
    await new Promise(requestAnimationFrame);
  }
  for (let jump = 0; jump < 12; jump += 1) { scrollTo(0, end * ((jump * 5) % 12) / 12); await wait(250); }
  window.watching = false;
  return window.frames_ms;
}"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hv_batch.bench.report_page", description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--videos", type=int, default=2, help="videos of one prompt")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="hv_batch_page_") as folder, chromium() as browser:
            root = Path(folder)
            write_root(root, SyntheticReport(list(synthetic_samples(options.samples, videos=options.videos))))
            page = (root / "report/index.html").stat().st_size
            print(f"{options.samples:,} samples of 20 MB; index.html has {size(page)}")
            with serve(root) as server:
                rounds = [_measure(browser, server) for _ in range(options.rounds)]
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    for name, unit in rounds[0]:
        median = statistics.median(each[name, unit] for each in rounds)
        print(f"{name:<44} {f'{median:,.0f}' if median >= 20 else f'{median:,.1f}':>9} {unit}")
    return 0


def _measure(browser: Any, server: CountingServer) -> dict[tuple[str, str], float]:
    """One visit of the page: what is measured, with its unit."""
    server.sent.clear()
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.add_init_script(WATCH)
    page.goto(server.url)
    _wait(page, "window.marks.posters")
    page.wait_for_load_state("networkidle")
    marks = page.evaluate("window.marks")
    found = {
        ("first cards", "ms"): marks["cards"],
        ("six posters", "ms"): marks["posters"],
        ("transferred before the first scroll", "kB"): sum(server.sent.values()) / 1000,
        ("of it videos", "kB"): server.sent["data"] / 1000,
        ("elements", ""): page.evaluate("document.querySelectorAll('*').length"),
    }
    devtools = context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
    before = _cpu_seconds(devtools)
    frames = page.evaluate(SCROLL)
    found["CPU time of the page, per frame of a scroll", "ms"] = 1000 * (_cpu_seconds(devtools) - before) / len(frames)
    found["longest frame while it scrolls", "ms"] = max(frames)
    found["frames over 100 ms", ""] = sum(frame > 100 for frame in frames)
    found["median frame", "ms"] = statistics.median(frames)
    page.evaluate("scrollTo(0, 0)")
    begun = time.monotonic()
    page.fill("#query", "a")
    _wait(page, "/^[\\d,]+ of /.test(document.querySelector('#shown').textContent) && "
          "!document.querySelector('#shown').textContent.includes('reading')")  # fmt: skip
    found["search over all samples, with their download", "ms"] = 1000 * (time.monotonic() - begun)
    begun = time.monotonic()
    page.select_option("#sort", "slowest")
    page.wait_for_timeout(1)
    found["sort of all samples", "ms"] = 1000 * (time.monotonic() - begun)
    found["transferred in all", "kB"] = sum(server.sent.values()) / 1000
    context.close()
    return found


def _cpu_seconds(devtools: Any) -> float:
    """CPU time of all tasks of the page's main thread."""
    metrics = devtools.send("Performance.getMetrics")["metrics"]
    seconds: float = next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")
    return seconds


def _wait(page: Any, expression: str) -> None:
    """Wait until it is true; the policy of the page forbids the `eval` that playwright's own wait needs."""
    end = time.monotonic() + 60
    while not page.evaluate(expression):
        if time.monotonic() > end:
            raise UserError(f"The page was not ready within a minute: {expression}")
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
