"""Runs cells on the workers of a Dask cluster; their files come back over the network.

Workers need the same package, notebooks, models and scenarios, but no shared file system: the
content key, computed again on the worker, proves that the inputs are the same.
"""

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from interp_batch import warm
from interp_batch.execution import (
    Outcome,
    RunContext,
    execute,
    explain_os_error,
    kernel_environment,
    move_into_place,
    unfinished_folder,
)
from interp_batch.matrix import NOTEBOOKS, Cell, content_key
from interp_kit.specs import InputError

Sent = tuple[dict[str, Any], dict[str, bytes]]  # a cell's status, and its files by name
_environment_at_import = dict(os.environ)


@contextmanager
def connected(scheduler: str | None) -> Iterator[Any]:
    """A Dask client; ``None`` without an address. Raises ``InputError`` if nothing answers."""
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
            f"no Dask scheduler answers at {scheduler!r} ({error}); start one, or correct the "
            "address"
        ) from None
    with client:
        if not client.nthreads():
            print(f"{scheduler} has no workers yet; waiting for one", file=sys.stderr)
        yield client


def run_on_worker(cell: Cell, context: RunContext) -> Sent:
    """On a worker: run the cell if this machine has the same inputs."""
    notebook = NOTEBOOKS / cell.notebook.name if not cell.notebook.is_file() else cell.notebook
    # A worker lives longer than a run: what an earlier run has set must not count as the user's.
    os.environ.update(kernel_environment(context, _environment_at_import))
    warm.find_kernels()
    if content_key(notebook, cell.parameters, context.options.data) != cell.key:
        error = (
            f"worker {socket.gethostname()} has another version of the package, the notebook, the "
            "models or the scenario; install and copy the same there, and restart the worker"
        )
        status = {"state": "error", "id": cell.id, "key": cell.key, "seconds": 0.0, "error": error}
        return status, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "cell"
        status = execute(replace(cell, notebook=notebook), folder, context)
        files = [p for p in folder.rglob("*") if p.is_file()]
        return status, {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def store_sent(cell: Cell, sent: Sent) -> Outcome:
    """Store what a worker sent, as if the cell had run here."""
    status, files = sent
    folder = unfinished_folder(cell)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, content in files.items():
            file = (folder / name).resolve()
            if not file.is_relative_to(folder.resolve()):
                raise OSError(f"a worker sent the file name {name!r}")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return move_into_place(cell, folder, status)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        return Outcome(cell=cell, state="error", error=explain_os_error(error))
