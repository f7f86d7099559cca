"""The report of a run: written from its results, and compared with those of another."""

from collections.abc import Sequence
from pathlib import Path

import typer

from interp_batch.matrix import Cell, title_of
from interp_batch.report.gallery import write_gallery
from interp_batch.report.pictures import find_browser, write_pictures
from interp_batch.results import last_folder
from interp_kit.catalogue import read_run
from interp_kit.specs import InputError, RunSpec


def write_report(
    spec: RunSpec, cells: Sequence[Cell], outputs: Path, against: Path | None = None
) -> Path:
    """Write the report of the cells' results; returns its first page.

    ``against`` holds the results of another run, to compare with. Raises ``InputError`` where no
    cell has results.
    """
    entries = [
        {
            "notebook": cell.notebook.stem,
            "title": title_of(cell.notebook),
            "model": cell.model,
            "scenario": cell.scenario,
            "folder": last_folder(cell),
        }
        for cell in cells
    ]
    folder = outputs / spec.name
    if not any(entry["folder"].is_dir() for entry in entries):
        raise InputError(f"{folder} holds no results; run `interp-kit run` first")
    return write_gallery(folder, title=spec.name, about=spec.about, cells=entries, against=against)


def find_results(given: str, name: str, outputs: Path) -> Path:
    """The results of the run that ``--against`` gives by its run file, its name or its folder.

    The folder may be the run's own, or an ``--outputs`` folder that holds the run ``name``.
    """
    if given.endswith((".yaml", ".yml")):
        tried = [outputs / read_run(Path(given)).name]
    else:
        tried = [Path(given) / name, Path(given), outputs / given]
    for folder in tried:
        if any(folder.glob("*/*/*/status.json")):
            return folder
    raise InputError(
        f"--against {given!r}: no results in {', '.join(map(str, tried))}; expected a run file, "
        "the name of a run, or a folder that holds results"
    )


def write_figures(folder: Path) -> None:
    """Write every figure of the results as PNG, where a browser is found."""

    browser = find_browser()
    if browser is None:
        typer.echo(
            "No PNG files: neither Chromium nor Chrome was found; install one, or set "
            "BROWSER_PATH. The figures are in the report and, as data, in figures/*.json.",
            err=True,
        )
        return
    typer.echo(f"{write_pictures(folder, browser=browser)} figures written as PNG")
