"""Runs one cell with papermill, in a folder of its own, and moves the result into place.

Only a notebook that ended well is moved to the results; a failed one is kept under ``failed/``. A
run may be stopped at any moment: nothing half-written is ever read.
"""

import errno
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import papermill
import psutil
from nbclient.exceptions import CellTimeoutError, DeadKernelError

from interp_batch import warm
from interp_batch.matrix import Cell
from interp_batch.results import write_status
from interp_kit.files import sha256
from interp_kit.records import provenance

State = Literal["ok", "error", "up to date"]
ATTEMPTS = 2  # where the cause may be temporary: a kernel that died, a timeout
ANSI = re.compile(r"\x1b\[[0-9;]*m")
UNFINISHED = ".running"  # in a run's folder: holds cells that have not ended

_stopped_runs: set[str] = set()  # kernels of these runs are killed on purpose: no cell failed


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the user chooses for all cells, here or on a cluster's workers.

    ``timeout``: seconds for one code cell of a notebook. ``memory``: GiB that a notebook may
    take, under ``python3-warm``; no limit if ``None``. ``data``: a data folder, searched first;
    ``study``: that of the study in which the command was given, searched last.
    """

    kernel: str = warm.default_kernel()
    timeout: int = 3600
    memory: float | None = None
    data: str | None = None
    study: str = ""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """One call of ``run_cells``, as its cells need to know it, here or on a cluster's workers.

    ``threads``: of each kernel, unless the environment says otherwise. ``activations``: the folder
    that keeps them.
    """

    options: RunOptions
    threads: int
    activations: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def is_stopped(self) -> bool:
        return self.id in _stopped_runs


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one cell of the matrix ended."""

    cell: Cell
    state: State
    seconds: float = 0.0
    error: str = ""


def run_cell(cell: Cell, context: RunContext) -> Outcome:
    """Run the cell on this machine and move its files into place."""
    folder = unfinished_folder(cell)
    try:
        status = execute(cell, folder, context)
        if context.is_stopped:
            return Outcome(cell=cell, state="error", error="stopped")
        return move_into_place(cell, folder, status)
    except OSError as error:  # a full disk, for instance; other cells may still fit
        shutil.rmtree(folder, ignore_errors=True)
        return Outcome(cell=cell, state="error", error=explain_os_error(error))


def execute(cell: Cell, folder: Path, context: RunContext) -> dict[str, Any]:
    """Run the cell's notebook into the new ``folder``; returns the content of its status."""
    started = time.monotonic()
    failure: dict[str, Any] = {}
    for attempt in range(1, ATTEMPTS + 1):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        failure, is_temporary = _attempt(cell, folder, context.options, is_repeat=attempt > 1)
        if not is_temporary or context.is_stopped:
            break
        failure["attempts"] = attempt
    return {
        "state": "error" if failure else "ok",
        "id": cell.id,
        "key": cell.key,
        "seconds": round(time.monotonic() - started, 2),
        "parameters": cell.parameters,
        "kernel": context.options.kernel,
        "made": provenance(),
        **failure,
    }


def move_into_place(cell: Cell, folder: Path, status: dict[str, Any]) -> Outcome:
    """Move ``folder`` to the cell's results, or to its failures, and write the status there."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    hashes = {p.relative_to(folder).as_posix(): sha256(p) for p in files}
    write_status(folder, status | {"files": hashes})
    target = cell.failed_folder if status["state"] == "error" else cell.folder
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # a link leads to another filesystem
            raise
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copytree(folder, beside)
        beside.rename(target)
        shutil.rmtree(folder)
    if status["state"] == "ok":
        shutil.rmtree(cell.failed_folder, ignore_errors=True)
    return Outcome(
        cell=cell,
        state=status["state"],
        seconds=status["seconds"],
        error=status.get("error", ""),
    )


def refuse(cell: Cell, reason: str) -> Outcome:
    """Let the cell fail for this reason without running it."""
    folder = unfinished_folder(cell)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    status = {"state": "error", "id": cell.id, "key": cell.key, "seconds": 0.0, "error": reason}
    return move_into_place(cell, folder, status | {"parameters": cell.parameters})


def unfinished_folder(cell: Cell) -> Path:
    """Where the cell runs until it has ended."""
    return cell.run_folder / UNFINISHED / cell.id


def kernel_environment(context: RunContext, given: Mapping[str, str]) -> dict[str, str]:
    """The variables that kernels inherit; what the user has set in ``given`` takes precedence."""
    options = context.options
    folders = [f for f in (options.data, given.get("INTERP_KIT_DATA"), options.study) if f]
    is_shared = Path(context.activations).parent.is_dir()  # another machine may not see it
    defaults = {
        "OMP_NUM_THREADS": str(context.threads),  # MKL and torch follow it
        "TOKENIZERS_PARALLELISM": "false",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "TQDM_DISABLE": "1",  # a notebook without a reader would keep progress bars as output
        "INTERP_KIT_ACTIVATIONS": context.activations if is_shared else "",
    }
    return {name: given.get(name, value) for name, value in defaults.items()} | {
        "INTERP_KIT_DATA": os.pathsep.join(folders),
        warm.MEMORY_LIMIT: str(int(options.memory * 2**30)) if options.memory else "",
    }


def stop_run(id: str, spared: Collection[int] = ()) -> None:
    """Mark a run as stopped and kill this process' children except the process ids ``spared``."""
    _stopped_runs.add(id)
    for child in psutil.Process().children(recursive=True):
        if child.pid not in spared:
            with suppress(psutil.Error):
                child.kill()


def explain_os_error(error: OSError) -> str:
    """One line on a file that could not be written."""
    return f"{error.strerror or error} ({error.filename}); make room, or choose other --outputs"


# ------------------------------------------------------------------------------------- internals
def _literal(path: Path) -> str:
    """A path as papermill takes it, which puts parameters where it finds their names in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _attempt(
    cell: Cell, folder: Path, options: RunOptions, *, is_repeat: bool
) -> tuple[dict[str, Any], bool]:
    """What went wrong, if anything; and whether the cause may be temporary.

    A repeated attempt saves the notebook after every cell, which shows where a kernel died. The
    first attempt does not, since that takes 0.2 s.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            papermill.execute_notebook(
                _literal(cell.notebook),
                _literal(folder / "run.ipynb"),
                cell.parameters | {"output": folder.as_posix()},
                kernel_name=options.kernel,
                progress_bar=False,
                request_save_on_cell_execute=is_repeat,
                execution_timeout=options.timeout,
                kernel_manager_class=warm.PromptManager,
                shutdown_kernel="immediate",  # nothing is left to save; saves 2 s a run
                extra_arguments=["--IPKernelApp.log_level=40"],  # errors only
            )
    except papermill.PapermillExecutionError as error:
        return {
            "error": f"{error.ename}: {error.evalue}",
            "notebook_cell": error.cell_index,
            "traceback": ANSI.sub("", "\n".join(error.traceback)),
        }, False
    except CellTimeoutError:
        return {"error": f"a code cell took longer than the limit of {options.timeout} s"}, True
    except DeadKernelError as error:
        return {"error": f"the kernel died, perhaps for lack of memory ({error})"}, True
    except OSError as error:
        return {"error": explain_os_error(error)}, False
    except Exception as error:  # whatever it is, the other cells go on
        return {"error": f"{type(error).__name__}: {error}"}, isinstance(error, RuntimeError)
    return {}, False
