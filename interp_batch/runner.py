"""Runs the cells of a matrix in parallel, here or on a cluster; skips what is up to date.

A run may be stopped at any moment, by Ctrl-C or by a crash: the same command goes on from there.
"""

import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from jupyter_client.kernelspec import KernelSpecManager
from tqdm import tqdm

from interp_batch import warm
from interp_batch.cluster import connected, run_on_worker, store_sent
from interp_batch.execution import (
    UNFINISHED,
    Outcome,
    RunContext,
    RunOptions,
    kernel_environment,
    refuse,
    run_cell,
    stop_run,
)
from interp_batch.matrix import Cell
from interp_batch.needs import is_gate, names
from interp_batch.results import last_folder, read_status, stale
from interp_kit.specs import InputError, unknown

REFRESH_SECONDS = 10  # of the progress bar, where no cell ends
ACTIVATIONS = ".activations"  # beside the runs' folders: what notebooks share (interp_kit.store)


class Stopped(KeyboardInterrupt):
    """Interrupted by Ctrl-C; what was done is kept."""


def run_cells(
    cells: Sequence[Cell],
    *,
    workers: int,
    options: RunOptions | None = None,
    fresh: bool = False,
    scheduler: str | None = None,
) -> list[Outcome]:
    """Run what is stale, ``workers`` at once; one outcome for each cell, in the order given.

    The cells may be of several runs. ``fresh`` runs all. ``scheduler`` is the address of a Dask
    scheduler, whose workers then run the cells. Raises ``InputError`` for an unknown kernel, if
    another run is writing to the same folder, if the folder cannot be written to and if no
    scheduler answers; ``Stopped`` after Ctrl-C.
    """
    options = options or RunOptions()
    folders = list(dict.fromkeys(cell.run_folder for cell in cells))
    context = RunContext(
        options=options,
        threads=max(1, (os.cpu_count() or 1) // workers),
        activations=str(folders[0].parent.resolve() / ACTIVATIONS),
    )
    with _locked(folders), _environment(context), connected(scheduler) as client:
        _check_kernel(options)
        _remove_unfinished(folders)  # of a run that was killed
        todo = list(cells) if fresh else stale(cells)
        executor = client.get_executor(pure=False) if client else ThreadPoolExecutor(workers)
        at_once = (sum(client.nthreads().values()) or 1) if client else workers
        try:
            gates = [cell for cell in todo if is_gate(cell.notebook)]
            ended = _run_all(gates, context, executor, client, at_once=at_once)
            others = [cell for cell in todo if not is_gate(cell.notebook)]
            blocked = _blocked(others, ended)
            ended += blocked
            closed = {outcome.cell.folder for outcome in blocked}
            rest = [cell for cell in others if cell.folder not in closed]
            rest.sort(key=_size, reverse=True)  # so that the longest does not run alone at the end
            ended += _run_all(rest, context, executor, client, at_once=at_once)
        except KeyboardInterrupt:
            kept = len(cells) - len(stale(cells))
            raise Stopped(
                f"stopped: {kept} of {len(cells)} cells are done and kept; the same command goes "
                "on from there"
            ) from None
        finally:
            executor.shutdown()
            _remove_unfinished(folders)
    by_folder = {outcome.cell.folder: outcome for outcome in ended}
    return [by_folder.get(c.folder, Outcome(cell=c, state="up to date")) for c in cells]


# ----------------------------------------------------------------------------- all cells of a run
def _blocked(cells: Sequence[Cell], gates: Sequence[Outcome]) -> list[Outcome]:
    """The cells of models that failed their gate in the same run, refused."""
    failed = {
        (outcome.cell.run_folder, name): outcome.cell.id
        for outcome in gates
        if outcome.state == "error" and outcome.error != "stopped"
        for name in names(outcome.cell.parameters, "model")
    }
    refused = []
    for cell in cells:
        own = [(cell.run_folder, name) for name in names(cell.parameters, "model")]
        gate = next((place for place in own if place in failed), None)
        if gate is not None:
            reason = (
                f"not run: {failed[gate]} failed, so numbers of model {gate[1]!r} cannot be "
                "trusted; look there first, or leave the model out"
            )
            refused.append(refuse(cell, reason))
    return refused


def _size(cell: Cell) -> int:
    """How many models and scenarios a cell has to do with: the more, the longer it takes."""
    models, scenarios = (len(names(cell.parameters, kind)) for kind in ("model", "scenario"))
    return max(1, models) * max(1, scenarios)


def _run_all(
    cells: Sequence[Cell], context: RunContext, executor: Executor, client: Any, *, at_once: int
) -> list[Outcome]:
    """Run the cells; Ctrl-C ends whatever runs before it is raised again."""
    spared = {child.pid for child in psutil.Process().children(recursive=True)}
    job = run_on_worker if client else run_cell
    futures = {executor.submit(job, cell, context): cell for cell in cells}
    try:
        return list(_with_progress(futures, at_once))
    except KeyboardInterrupt:
        _stop(futures, context.id, client, spared)
        raise


def _with_progress(futures: dict[Future, Cell], at_once: int) -> Iterator[Outcome]:
    """Outcomes as cells end, with a bar that estimates how long the rest will take."""
    waiting = {c.folder: c for c in futures.values()}
    before = {folder: read_status(last_folder(c)).get("seconds") for folder, c in waiting.items()}
    seconds = size = 0.0
    n_failed = 0
    bar = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
    with tqdm(total=len(futures), desc="cells", bar_format=bar, disable=not futures) as progress:
        for future in _as_completed(futures, progress):
            outcome = _outcome(future, futures[future])
            seconds, size = seconds + outcome.seconds, size + _size(outcome.cell)
            n_failed += outcome.state == "error"
            waiting.pop(outcome.cell.folder)
            each = (before[f] or seconds / size * _size(c) for f, c in waiting.items())
            left = sum(each) / at_once
            parts = [f"about {left / 60:.0f} min left" if left > 90 else f"about {left:.0f} s left"]
            parts += [f"{n_failed} failed"] if n_failed else []
            progress.set_postfix_str(", ".join(parts), refresh=False)
            progress.update()
            yield outcome


def _as_completed(futures: Collection[Future], progress: tqdm) -> Iterator[Future]:
    """The futures as they end; until one does, the bar shows that time passes."""
    pending = set(futures)
    while pending:
        ended, pending = wait(pending, timeout=REFRESH_SECONDS, return_when=FIRST_COMPLETED)
        progress.refresh()
        yield from ended


def _outcome(future: Future, cell: Cell) -> Outcome:
    """How the cell ended, whether it ran here or on a worker."""
    try:
        result = future.result()
    except Exception as error:  # a cluster that lost the cell too often, for instance
        return Outcome(cell=cell, state="error", error=f"{type(error).__name__}: {error}")
    return result if isinstance(result, Outcome) else store_sent(cell, result)


def _stop(futures: Collection[Future], run: str, client: Any, spared: Collection[int]) -> None:
    """Start nothing more and end what runs; on this machine, wait until every thread is back."""
    for future in futures:
        future.cancel()
    if client:
        client.run(stop_run, run)
        return
    while not all(future.done() for future in futures):
        stop_run(run, spared)
        wait(futures, timeout=0.2)


# ------------------------------------------------------------- what a run needs and leaves behind
def _check_kernel(options: RunOptions) -> None:
    known = KernelSpecManager().find_kernel_specs()
    if options.kernel not in known:
        hint = "the name of an installed kernel (jupyter kernelspec list)"
        raise InputError(unknown("kernel", options.kernel, known, hint))
    if options.memory and options.kernel != warm.WARM:
        raise InputError(
            f"--memory works with the kernel {warm.WARM} only, got {options.kernel}; leave one of "
            "them out"
        )


@contextmanager
def _environment(context: RunContext) -> Iterator[None]:
    """Set the variables that kernels inherit; afterwards, restore what there was."""
    given = dict(os.environ)
    os.environ.update(kernel_environment(context, given))
    warm.find_kernels()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(given)


@contextmanager
def _locked(folders: Iterable[Path]) -> Iterator[None]:
    """Lock the folders for this run. The system drops the locks of a process that ends."""
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


def _remove_unfinished(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
