"""Runs the cells of a matrix with papermill, in parallel; what is up to date is skipped.

A cell's ``status.json`` is written last and only there it counts as done: a run that was
interrupted is simply run again. One failed cell never stops the others.
"""

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import papermill
from joblib import Parallel, delayed
from tqdm import tqdm

from interp_kit.batch.matrix import Cell
from interp_kit.reporting.records import dump_json, write_atomically

KERNEL = "python3"  # of the environment that runs the batch
CELL_TIMEOUT = 3600  # seconds that one notebook cell may take
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one cell of the matrix ended."""

    cell: Cell
    state: str  # "ok", "error" or "up to date"
    seconds: float
    error: str = ""


def stale(cells: Iterable[Cell]) -> list[Cell]:
    """The cells whose result is missing, failed or made from other inputs."""
    return [cell for cell in cells if not _up_to_date(cell)]


def run_cells(
    cells: Sequence[Cell], *, workers: int, data: str | Path | None = None
) -> list[Outcome]:
    """Run what is stale, ``workers`` at once; one outcome for each cell, in the order given."""
    todo = {cell.id for cell in stale(cells)}
    outcomes = {
        cell.id: Outcome(cell=cell, state="up to date", seconds=0.0)
        for cell in cells
        if cell.id not in todo
    }
    _prepare_environment(workers, data)
    jobs = [delayed(_run_cell)(cell) for cell in cells if cell.id in todo]
    # Kernels are processes of their own, so threads are enough to wait for them.
    pool = Parallel(n_jobs=workers, backend="threading", return_as="generator_unordered")
    with tqdm(total=len(jobs), desc="cells", unit="cell", disable=not jobs) as progress:
        for outcome in cast(Iterable[Outcome], pool(jobs)):
            outcomes[outcome.cell.id] = outcome
            failed = sum(o.state == "error" for o in outcomes.values())
            progress.set_postfix_str(f"{failed} failed" if failed else outcome.cell.id)
            progress.update()
    return [outcomes[cell.id] for cell in cells]


def _prepare_environment(workers: int, data: str | Path | None) -> None:
    """What the kernels inherit: the data folder, and no more threads than there are cores."""
    if data:
        os.environ["INTERP_KIT_DATA"] = str(Path(data).resolve())
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # MKL and torch follow it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of a headless notebook end up in its output


def _run_cell(cell: Cell) -> Outcome:
    started = time.monotonic()
    shutil.rmtree(cell.folder, ignore_errors=True)
    cell.folder.mkdir(parents=True)
    failure: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            papermill.execute_notebook(
                str(cell.notebook),
                str(cell.folder / "run.ipynb"),
                cell.parameters,
                kernel_name=KERNEL,
                progress_bar=False,
                execution_timeout=CELL_TIMEOUT,
                shutdown_kernel="immediate",  # nothing is left to save: 2 s less a run
                extra_arguments=["--IPKernelApp.log_level=40"],  # errors only
            )
    except papermill.PapermillExecutionError as error:
        failure = {
            "error": f"{error.ename}: {error.evalue}",
            "notebook_cell": error.cell_index,
            "traceback": ANSI.sub("", "\n".join(error.traceback)),
        }
    except Exception as error:  # a dead kernel, a timeout, a full disk: the others go on
        failure = {"error": f"{type(error).__name__}: {error}"}
    seconds = round(time.monotonic() - started, 2)
    status = {
        "state": "error" if failure else "ok",
        "id": cell.id,
        "key": cell.key,
        "seconds": seconds,
        "parameters": cell.parameters,
        **failure,
    }
    write_atomically(cell.folder / "status.json", dump_json(status))
    return Outcome(
        cell=cell, state=status["state"], seconds=seconds, error=failure.get("error", "")
    )


def read_status(folder: Path) -> dict[str, Any]:
    """``status.json``, or an empty one where it is missing or unreadable."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _up_to_date(cell: Cell) -> bool:
    status = read_status(cell.folder)
    return status.get("state") == "ok" and status.get("key") == cell.key
