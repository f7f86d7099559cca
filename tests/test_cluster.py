"""Dask: a real scheduler and two real workers give what a local run gives, even when one dies."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace

import psutil
import pytest

from interp_batch.execution import RunOptions
from interp_batch.matrix import NOTEBOOKS
from interp_batch.runner import Stopped, run_cells
from interp_kit.specs import REPOSITORY, InputError
from tests.study import (
    MODELS,
    SCENARIOS,
    cells_of,
    expected_of,
    light_imports,
    lines_of,
    make_study,
    once,
    processes_of,
    result_of,
)

distributed = pytest.importorskip("distributed")
PAUSE = 2.0  # seconds in which a cell is half done


@pytest.fixture
def cluster(tmp_path):
    """The scheduler's address, and what starts a worker; each has ``MARK`` in its environment."""
    mark, file = uuid.uuid4().hex, tmp_path / "scheduler.json"
    started = []

    def start(*arguments, **environment):
        environment = os.environ | {"MARK": f"{mark}-{len(started)}"} | environment
        command = [sys.executable, "-m", "dask", *arguments, "--scheduler-file", str(file)]
        with (tmp_path / "dask.log").open("a") as log:
            started.append(
                subprocess.Popen(
                    command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log,
                    start_new_session=True,
                )
            )  # fmt: skip
        return started[-1]

    start("scheduler", "--port", "0", "--no-dashboard", "--host", "127.0.0.1")
    worker = ("worker", "--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1")

    def start_worker(**environment):
        """One more worker, and the mark of its processes."""
        number = len(started)
        folder = tmp_path / f"w{number}"
        process = start(*worker, "--local-directory", folder, **environment)
        with distributed.Client(scheduler_file=str(file), timeout=60) as client:
            client.wait_for_workers(number, timeout=60)
            return process, f"{mark}-{number}", client.scheduler.address

    yield start_worker
    for process in started:
        process.kill()  # Dask's own way out may take minutes on a busy machine
        process.wait(timeout=30)
    deadline = time.monotonic() + 15
    while processes_of(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(mark)


def is_writing(mark: str) -> bool:
    """Whether a kernel with the mark is in the middle of a result."""
    try:
        files = [file.path for process in processes_of(mark) for file in process.open_files()]
    except psutil.Error:  # one has just ended
        return False
    return any(file.endswith("result.txt") for file in files)


def test_a_killed_worker_changes_nothing_in_the_results(tmp_path, cluster):
    study, log = make_study(tmp_path), tmp_path / "log"
    shutil.copy(NOTEBOOKS / "01_logit_lens.ipynb", study / "notebooks")
    given = {"logged": {"log": str(log), "pause": PAUSE}}
    one = {"models": MODELS[:1], "scenarios": SCENARIOS[:1]}
    (lens, lens_there), (here, there) = (
        [cells_of(study, notebooks, outputs=tmp_path / name, **some) for name in ("here", "there")]
        for notebooks, some in (({"01_logit_lens": {}}, one), (given, {}))
    )
    options = RunOptions(timeout=120)
    assert [o.error for o in run_cells(lens + here, workers=2, options=options)] == [""] * 5
    assert lines_of(log) == 4

    # A real notebook on the first worker. The second starts quickly: it gets no model to run.
    _, mark, address = cluster()
    (outcome,) = run_cells(lens_there, workers=2, options=options, scheduler=address)
    assert (outcome.state, outcome.error) == ("ok", "")
    for table in lens[0].folder.glob("table.*"):
        assert table.read_bytes() == (lens_there[0].folder / table.name).read_bytes()
    assert (lens_there[0].folder / "table.csv").stat().st_size > 100
    worker, killed_mark, _ = cluster(PYTHONPATH=light_imports(tmp_path))

    with once(lambda: is_writing(killed_mark), worker.kill) as killed:
        outcomes = run_cells(there, workers=2, options=options, scheduler=address)
    assert killed.is_set()
    assert worker.wait() == -signal.SIGKILL
    assert [(o.state, o.error) for o in outcomes] == [("ok", "")] * 4
    assert lines_of(log) == 4 + 4 + 1  # one cell was run again, elsewhere
    assert not processes_of(killed_mark)  # its kernels went with it
    for ours, theirs in zip(here, there):
        assert result_of(ours) == result_of(theirs) == expected_of(ours)
    again = run_cells(lens_there + there, workers=2, options=options, scheduler=address)
    assert {o.state for o in again} == {"up to date"}

    # A worker that has other inputs says so, and computes nothing.
    (refused,) = run_cells([replace(there[0], key="other")], workers=1, scheduler=address)
    assert refused.state == "error"
    assert "has another version of the package" in refused.error
    assert lines_of(log) == 9

    # Ctrl-C ends what runs on workers too; nothing of that counts as failed.
    stopped = cells_of(study, given, outputs=tmp_path / "stopped")
    with (
        once(lambda: lines_of(log) >= 10, lambda: os.kill(os.getpid(), signal.SIGINT)),
        pytest.raises(Stopped, match="0 of 4 cells are done and kept"),
    ):
        run_cells(stopped, workers=1, options=options, scheduler=address)
    interrupted = time.monotonic()
    while len(processes_of(mark)) > 1:  # the worker itself
        assert time.monotonic() < interrupted + 10
    time.sleep(PAUSE + 1.0)
    assert lines_of(log) == 10  # no other cell was begun
    assert not (tmp_path / "stopped" / "trial" / "failed").exists()


def test_without_a_scheduler_or_dask_one_line_says_so(tmp_path, monkeypatch):
    client = distributed.Client
    monkeypatch.setattr(distributed, "Client", lambda address, timeout: client(address, timeout=1))
    cells = cells_of(make_study(tmp_path), {"each": None})
    with pytest.raises(InputError, match="no Dask scheduler answers at 'tcp:"):
        run_cells(cells, workers=1, scheduler="tcp://127.0.0.1:1")
    with pytest.raises(InputError, match="no Dask scheduler answers at 'nonsense'"):
        run_cells(cells, workers=1, scheduler="nonsense")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install 'interp-kit\[cluster\]'"):
        run_cells(cells, workers=1, scheduler="tcp://127.0.0.1:1")
