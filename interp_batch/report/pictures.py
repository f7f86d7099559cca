"""Writes a run's figures as PNG files, with a headless browser."""

import json
import os
import shutil
from pathlib import Path

import plotly.io
from plotly.basedatatypes import BaseFigure
from tqdm import tqdm

BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
AT_ONCE = 20  # figures between two steps of the progress bar


def find_browser() -> str | None:
    """The path of a browser: ``BROWSER_PATH``, or the first of ``BROWSERS`` that is installed."""
    given = os.environ.get("BROWSER_PATH")
    return given or next((path for name in BROWSERS if (path := shutil.which(name))), None)


def write_pictures(folder: Path, *, browser: str) -> int:
    """Write ``NAME.png`` beside every ``figures/NAME.json`` below ``folder``; returns how many."""
    files = sorted(folder.glob("**/figures/*.json"))
    os.environ["BROWSER_PATH"] = browser  # where kaleido looks
    written = 0
    with tqdm(total=len(files), desc="pictures", unit="figure", leave=False) as bar:
        for start in range(0, len(files), AT_ONCE):
            some = files[start : start + AT_ONCE]
            figures = {f.with_suffix(".png"): figure for f in some if (figure := _read(f))}
            plotly.io.write_images(list(figures.values()), list(figures), width=1000)
            written += len(figures)
            bar.update(len(some))
    return written


def _read(file: Path) -> BaseFigure | None:
    """The figure; ``None`` for a view, which is text, and for a file that is damaged."""
    try:
        text = file.read_text(encoding="utf-8")
        return None if "view" in json.loads(text) else plotly.io.from_json(text)
    except (OSError, ValueError):
        return None
