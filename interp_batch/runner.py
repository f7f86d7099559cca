"""Runs the cells of a matrix with papermill, in parallel; what is up to date is skipped.

A cell runs in a folder of its own beside the results. Only what ended well is moved into place,
with a ``status.json`` that names every file by its hash; what failed is kept under ``failed/``. So
a run may be stopped at any moment: nothing half-written is ever read, and the same command goes on.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import papermill
import psutil
from filelock import FileLock, Timeout
from jupyter_client.kernelspec import KernelSpecManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from tqdm import tqdm

from interp_batch import warm
from interp_batch.client import PromptManager
from interp_batch.matrix import NOTEBOOKS, Cell, content_key
from interp_kit.files import altered_files, dump_json, sha256, write_atomically
from interp_kit.records import provenance
from interp_kit.specs import InputError, unknown

ATTEMPTS = 2  # of what may pass: a kernel that died, a timeout
ANSI = re.compile(r"\x1b\[[0-9;]*m")
RUNNING = ".running"  # of a run's folder: cells that have not ended
ACTIVATIONS = ".activations"  # beside the runs' folders: what notebooks share (interp_kit.store)

_at_start = dict(os.environ)
_stopped: set[str] = set()  # runs that were interrupted: what dies of them is no failure


class Stopped(KeyboardInterrupt):
    """Interrupted by Ctrl-C; what was done is kept."""


@dataclass(frozen=True, kw_only=True)
class How:
    """How cells are run, here or on a cluster's workers.

    ``timeout``: seconds for one code cell of a notebook. ``memory``: GiB that a notebook may
    take, under ``python3-warm``; no limit if ``None``. ``data``: a data folder, searched first.
    """

    kernel: str = warm.default_kernel()
    timeout: int = 3600
    memory: float | None = None
    data: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One call of ``run_cells``, as its cells need to know it, here or on a cluster's workers."""

    how: How
    threads: int  # of a kernel, unless the environment says
    activations: str  # the folder that keeps them
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one cell of the matrix ended."""

    cell: Cell
    state: str  # "ok", "error" or "up to date"
    seconds: float
    error: str = ""


def stale(cells: Iterable[Cell]) -> list[Cell]:
    """The cells whose result is missing, damaged, failed or made from other inputs."""
    return [cell for cell in cells if not _up_to_date(cell)]


def failed(cells: Iterable[Cell]) -> list[Cell]:
    """The cells whose last attempt failed."""
    return [cell for cell in cells if read_status(cell.failed_folder)]


def run_cells(
    cells: Sequence[Cell],
    *,
    workers: int,
    how: How = How(),
    fresh: bool = False,
    scheduler: str | None = None,
) -> list[Outcome]:
    """Run what is stale, ``workers`` at once; one outcome for each cell, in the order given.

    The cells may be of several runs. ``fresh`` runs all. ``scheduler`` is the address of a Dask
    scheduler, whose workers then run the cells. Raises ``InputError`` for an unknown kernel, if
    another run is writing to the same folder, if the folder cannot be written to and if no
    scheduler answers; ``Stopped`` after Ctrl-C.
    """
    folders = list(dict.fromkeys(cell.run_folder for cell in cells))
    run = _Run(
        how=how,
        threads=max(1, (os.cpu_count() or 1) // workers),
        activations=str(folders[0].parent.resolve() / ACTIVATIONS),
    )
    with _locked(folders), _environment(run), _cluster(scheduler) as client:
        _check_kernel(how)
        _remove_running(folders)  # of a run that was killed
        todo = list(cells) if fresh else stale(cells)
        outcomes = {c.folder: Outcome(cell=c, state="up to date", seconds=0.0) for c in cells}
        others = {child.pid for child in psutil.Process().children(recursive=True)}
        executor = client.get_executor(pure=False) if client else ThreadPoolExecutor(workers)
        at_once = (sum(client.nthreads().values()) or 1) if client else workers
        job = _run_remotely if client else _run_here
        futures = {executor.submit(job, cell, run): cell for cell in todo}
        try:
            for outcome in _watched(futures, at_once):
                outcomes[outcome.cell.folder] = outcome
        except KeyboardInterrupt:
            _stop(futures, run.id, client, others)
            kept = len(cells) - len(stale(cells))
            raise Stopped(
                f"stopped: {kept} of {len(cells)} cells are done and kept; the same command goes "
                "on from there"
            ) from None
        finally:
            executor.shutdown()
            _remove_running(folders)
    return [outcomes[cell.folder] for cell in cells]


def read_status(folder: Path) -> dict[str, Any]:
    """``status.json``, or an empty one where it is missing, unreadable or not as it was written."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        stated = status.pop("checksum")
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return {}
    return status if stated == _checksum(status) else {}


def _write_status(folder: Path, status: dict[str, Any]) -> None:
    written = json.loads(dump_json(status))  # as it will be read: without NaN
    text = dump_json(written | {"checksum": _checksum(written)})
    write_atomically(folder / "status.json", text)


def _checksum(status: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(status, sort_keys=True).encode()).hexdigest()


def damaged(folder: Path) -> list[str]:
    """The files of a cell's folder that are missing or not as its notebook wrote them."""
    return list(altered_files(folder, read_status(folder).get("files", {})))


def last_folder(cell: Cell) -> Path:
    """The folder of the cell's last attempt: the failed one, if it failed."""
    return cell.failed_folder if read_status(cell.failed_folder) else cell.folder


# ---------------------------------------------------------------------------------------- one cell
def _run_here(cell: Cell, run: _Run) -> Outcome:
    place = cell.run_folder / RUNNING / cell.id
    try:
        status = _execute(cell, place, run)
        if run.id in _stopped:
            return Outcome(cell=cell, state="error", seconds=0.0, error="stopped")
        return _put_in_place(cell, place, status)
    except OSError as error:  # a full disk, for instance; the others may still fit
        shutil.rmtree(place, ignore_errors=True)
        return Outcome(cell=cell, state="error", seconds=0.0, error=_writing(error))


def _execute(cell: Cell, place: Path, run: _Run) -> dict[str, Any]:
    """Run the cell's notebook into the new folder ``place``; returns its status."""
    started = time.monotonic()
    failure: dict[str, Any] = {}
    for attempt in range(1, ATTEMPTS + 1):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        failure, transient = _attempt(cell, place, run.how, again=attempt > 1)
        if not transient or run.id in _stopped:
            break
        failure["attempts"] = attempt
    return {
        "state": "error" if failure else "ok",
        "id": cell.id,
        "key": cell.key,
        "seconds": round(time.monotonic() - started, 2),
        "parameters": cell.parameters,
        "kernel": run.how.kernel,
        "made": provenance(),
        **failure,
    }


def _attempt(cell: Cell, place: Path, how: How, *, again: bool) -> tuple[dict[str, Any], bool]:
    """What went wrong, if anything; and whether it may pass.

    Made ``again``, the notebook is saved after every cell, and shows where a kernel died; as a rule
    that is .2 s for nothing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            papermill.execute_notebook(
                str(cell.notebook),
                str(place / "run.ipynb"),
                cell.parameters | {"output": place.as_posix()},
                kernel_name=how.kernel,
                progress_bar=False,
                request_save_on_cell_execute=again,
                execution_timeout=how.timeout,
                kernel_manager_class=PromptManager,
                shutdown_kernel="immediate",  # nothing is left to save: 2 s less a run
                extra_arguments=["--IPKernelApp.log_level=40"],  # errors only
            )
    except papermill.PapermillExecutionError as error:
        return {
            "error": f"{error.ename}: {error.evalue}",
            "notebook_cell": error.cell_index,
            "traceback": ANSI.sub("", "\n".join(error.traceback)),
        }, False
    except CellTimeoutError:
        return {"error": f"a code cell took longer than the limit of {how.timeout} s"}, True
    except DeadKernelError as error:
        return {"error": f"the kernel died, as for want of memory ({error})"}, True
    except OSError as error:
        return {"error": _writing(error)}, False
    except Exception as error:  # whatever it is, the others go on
        return {"error": f"{type(error).__name__}: {error}"}, isinstance(error, RuntimeError)
    return {}, False


def _put_in_place(cell: Cell, place: Path, status: dict[str, Any]) -> Outcome:
    """Move what was made to the results, or to what failed, with its status."""
    files = sorted(p for p in place.rglob("*") if p.is_file())
    status = status | {"files": {p.relative_to(place).as_posix(): sha256(p) for p in files}}
    _write_status(place, status)
    target = cell.failed_folder if status["state"] == "error" else cell.folder
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    place.rename(target)
    if status["state"] == "ok":
        shutil.rmtree(cell.failed_folder, ignore_errors=True)
    return Outcome(
        cell=cell,
        state=status["state"],
        seconds=status["seconds"],
        error=status.get("error", ""),
    )


def _up_to_date(cell: Cell) -> bool:
    """Whether the result is there, whole, and made from these inputs."""
    status = read_status(cell.folder)
    if status.get("state") != "ok" or status.get("key") != cell.key:
        return False
    if read_status(cell.failed_folder):  # a later attempt failed
        return False
    return not damaged(cell.folder)


def _writing(error: OSError) -> str:
    return f"{error.strerror or error} ({error.filename}); make room, or choose other --outputs"


def _check_kernel(how: How) -> None:
    known = KernelSpecManager().find_kernel_specs()
    if how.kernel not in known:
        raise InputError(unknown("kernel", how.kernel, known, "one that Jupyter is told of"))
    if how.memory and how.kernel != warm.WARM:
        raise InputError(
            f"a memory limit needs the kernel {warm.WARM}, got {how.kernel}; leave one of them out"
        )


@contextmanager
def _environment(run: _Run) -> Iterator[None]:
    """Inside, what kernels inherit; afterwards, what it was."""
    given = dict(os.environ)
    os.environ.update(_inherited(run, given))
    warm.find_kernels()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(given)


def _inherited(run: _Run, given: Mapping[str, str]) -> dict[str, str]:
    """What kernels need to know of the run; what the person's environment says goes first."""
    how = run.how
    folders = [f for f in (how.data, given.get("INTERP_KIT_DATA")) if f]
    shared = Path(run.activations).parent.is_dir()  # a worker elsewhere may not see it
    ours = {
        "OMP_NUM_THREADS": str(run.threads),  # MKL and torch follow it
        "TOKENIZERS_PARALLELISM": "false",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "TQDM_DISABLE": "1",  # bars of a headless notebook end up in its output
        "INTERP_KIT_ACTIVATIONS": run.activations if shared else "",
    }
    return {name: given.get(name, value) for name, value in ours.items()} | {
        "INTERP_KIT_DATA": os.pathsep.join(folders),
        warm.MEMORY_LIMIT: str(int(how.memory * 2**30)) if how.memory else "",
    }


# ------------------------------------------------------------------------------------- all of them
@contextmanager
def _locked(folders: Iterable[Path]) -> Iterator[None]:
    """The folders are this run's alone. The system drops the locks of a process that ends."""
    with ExitStack() as locks:
        for folder in sorted(folders):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                locks.enter_context(FileLock(folder / ".lock", timeout=0))
            except Timeout:
                raise InputError(
                    f"another run is writing to {folder}; wait for it, or choose other --outputs"
                ) from None
            except OSError as error:
                raise InputError(
                    f"cannot write to {folder} ({error.strerror or error}); choose other --outputs"
                ) from None
        yield


def _remove_running(folders: Iterable[Path]) -> None:
    """Remove what has not ended."""
    for folder in folders:
        shutil.rmtree(folder / RUNNING, ignore_errors=True)


@contextmanager
def _cluster(scheduler: str | None) -> Iterator[Any]:
    """A Dask client; nothing without an address."""
    if scheduler is None:
        yield None
        return
    try:
        from distributed import Client  # type: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "--scheduler needs Dask; install it with: pip install 'interp-kit[cluster]'"
        ) from None
    try:
        client = Client(scheduler, timeout=5)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no Dask scheduler answers at {scheduler!r} ({error}); start one, or mend the address"
        ) from None
    with client:
        if not client.nthreads():
            print(f"no worker is there yet; waiting for one at {scheduler}", file=sys.stderr)
        yield client


def _run_remotely(cell: Cell, run: _Run) -> tuple[dict[str, Any], dict[str, bytes]]:
    """On a worker: status and files of the cell, if this machine has the same inputs."""
    notebook = NOTEBOOKS / cell.notebook.name if not cell.notebook.is_file() else cell.notebook
    own = replace(cell, notebook=notebook)
    os.environ.update(_inherited(run, _at_start))  # a worker lives longer than a run
    warm.find_kernels()
    if content_key(notebook, cell.parameters, run.how.data) != cell.key:
        error = (
            f"worker {socket.gethostname()} has another version of the package, the notebook, the "
            "models or the scenario; install and copy the same there, and start it again"
        )
        status = {"state": "error", "id": cell.id, "key": cell.key, "seconds": 0.0, "error": error}
        return status, {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "cell"
        status = _execute(own, place, run)
        files = [p for p in place.rglob("*") if p.is_file()]
        return status, {p.relative_to(place).as_posix(): p.read_bytes() for p in files}


def _received(cell: Cell, status: dict[str, Any], files: dict[str, bytes]) -> Outcome:
    """Store what a worker sent, as if it had been made here."""
    place = cell.run_folder / RUNNING / cell.id
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for name, content in files.items():
            file = (place / name).resolve()
            if not file.is_relative_to(place.resolve()):
                raise OSError(f"a worker sent the file name {name!r}")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return _put_in_place(cell, place, status)
    except OSError as error:
        shutil.rmtree(place, ignore_errors=True)
        return Outcome(cell=cell, state="error", seconds=0.0, error=_writing(error))


def _watched(futures: dict[Future, Cell], at_once: int) -> Iterator[Outcome]:
    """Outcomes as they come, with a bar that says how long the rest will take."""
    expected = {c.folder: read_status(last_folder(c)).get("seconds") for c in futures.values()}
    measured: list[float] = []
    n_failed = 0
    bar = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
    with tqdm(total=len(futures), desc="cells", bar_format=bar, disable=not futures) as progress:
        for future in as_completed(futures):
            cell = futures[future]
            try:
                result = future.result()
            except Exception as error:  # a cluster that lost the cell too often
                message = f"{type(error).__name__}: {error}"
                result = Outcome(cell=cell, state="error", seconds=0.0, error=message)
            outcome = result if isinstance(result, Outcome) else _received(cell, *result)
            measured.append(outcome.seconds)
            n_failed += outcome.state == "error"
            expected.pop(cell.folder)
            left = sum(s if s else mean(measured) for s in expected.values()) / at_once
            parts = [f"about {left / 60:.0f} min left" if left > 90 else f"about {left:.0f} s left"]
            parts += [f"{n_failed} failed"] if n_failed else []
            progress.set_postfix_str(", ".join(parts), refresh=False)
            progress.update()
            yield outcome


def _stop(futures: Collection[Future], run: str, client: Any, others: Collection[int]) -> None:
    """Nothing new starts, and what runs ends: here until the last thread is back."""
    for future in futures:
        future.cancel()
    if client:
        client.run(_kill_kernels, run)
        return
    while not all(future.done() for future in futures):
        _kill_kernels(run, others)
        wait(futures, timeout=0.2)


def _kill_kernels(run: str, others: Collection[int] = ()) -> None:
    """End this process' children but for the ``others``, which are not the run's."""
    _stopped.add(run)
    for child in psutil.Process().children(recursive=True):
        if child.pid not in others:
            with suppress(psutil.Error):
                child.kill()
