"""How heavy the pages of reports are, and how soon a browser shows their first figure.

    python -m benchmarks.report before=outputs_old/ipd now=outputs/ipd --runs 15

Each folder holds a written report. The pages of all reports are opened in turn, again and again, in
new tabs of one headless Chromium, so that what else the machine does meets all of them alike.
``first`` is the median time from the start of navigation to the frame after the first figure is
there, ``all`` to the frame after the last one.
"""

import argparse
import asyncio
from pathlib import Path
from statistics import median

import pandas as pd
from choreographer import Browser

from interp_batch.report.pictures import find_browser

LONGEST = 60  # seconds for a page
WATCH = """
window.seen = {};
new MutationObserver(() => {
  const plots = [...document.querySelectorAll(".plot")];
  const drawn = plots.filter((plot) => plot.querySelector("svg.main-svg")).length;
  const note = (what) => (seen[what] ??= requestAnimationFrame((now) => (seen[`${what}At`] = now)));
  if (drawn) note("first");
  if (drawn && drawn === plots.length && document.readyState !== "loading") note("all");
}).observe(document, { childList: true, subtree: true });
"""


def weights(reports: dict[str, Path], pages: list[str]) -> pd.DataFrame:
    """Bytes of every page, and of the library beside it, by report."""
    names = [*pages, "components.html", "plotly.min.js"]
    rows = {
        name: {
            label: (folder / name).stat().st_size if (folder / name).is_file() else 0
            for label, folder in reports.items()
        }
        for name in names
    }
    return pd.DataFrame.from_dict(rows, orient="index")


async def opened(browser: Browser, page: Path) -> tuple[float, float]:
    """Milliseconds until the first figure is shown, and until all are."""
    tab = await browser.create_tab()
    await tab.send_command("Page.enable")
    size = {"width": 1400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    await tab.send_command("Emulation.setDeviceMetricsOverride", size)
    await tab.send_command("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    await tab.send_command("Page.navigate", {"url": page.resolve().as_uri()})
    read = {"expression": "[seen.firstAt, seen.allAt]", "returnByValue": True}
    for _ in range(LONGEST * 10):
        await asyncio.sleep(0.1)
        answer = await tab.send_command("Runtime.evaluate", read)
        first, last = answer["result"]["result"].get("value", [None, None])
        if first and last:
            await browser.close_tab(tab.target_id)
            return first, last
    raise TimeoutError(f"{page} did not draw its figures in {LONGEST} s")


async def measure(reports: dict[str, Path], pages: list[str], runs: int) -> pd.DataFrame:
    rows = []
    browser = Browser(path=find_browser(), headless=True)
    await browser.open()
    for run in range(runs + 1):
        for page in pages:
            for label, folder in reports.items():
                first, last = await opened(browser, folder / page)
                if run:  # the first round fills the disk's cache
                    rows.append({"page": page, "report": label, "first": first, "all": last})
    await browser.close()
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--pages", nargs="+", default=["index.html"], help="within the folders")
    parser.add_argument("--runs", type=int, default=15)
    given = parser.parse_args()
    reports = {name: Path(folder) for name, folder in (one.split("=", 1) for one in given.reports)}
    print("Bytes\n", weights(reports, given.pages).to_string(), sep="")
    times = asyncio.run(measure(reports, given.pages, given.runs))
    times = times.groupby(["page", "report"], sort=False).agg(median).round(0).astype(int)
    print(f"\nMilliseconds, median of {given.runs}\n", times.to_string(), sep="")


if __name__ == "__main__":
    main()
