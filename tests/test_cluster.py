"""Dask: a real scheduler and two real workers give what a local run gives, even when one dies."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import replace

import pytest

from interp_batch.execution import RunOptions
from interp_batch.matrix import NOTEBOOKS
from interp_batch.runner import Stopped, run_cells
from interp_kit.specs import REPOSITORY, InputError
from tests.study import cells_of, expected_of, make_study, processes_of, result_of

distributed = pytest.importorskip("distributed")


@pytest.fixture
def cluster(tmp_path):
    """The scheduler's address and its two workers; each process has ``MARK`` in its environment."""
    mark, file = uuid.uuid4().hex, tmp_path / "scheduler.json"
    started = []

    def start(*arguments):
        environment = os.environ | {"MARK": f"{mark}-{len(started)}"}
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
    workers = [start(*worker, "--local-directory", tmp_path / f"w{i}") for i in (1, 2)]
    with distributed.Client(scheduler_file=str(file), timeout=60) as client:
        client.wait_for_workers(2, timeout=60)
        address = client.scheduler.address
    yield address, workers, mark
    for process in started:
        process.kill()  # Dask's own way out may take minutes on a busy machine
        process.wait(timeout=30)
    deadline = time.monotonic() + 15
    while processes_of(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(mark)


def test_a_killed_worker_changes_nothing_in_the_results(tmp_path, cluster):
    address, workers, mark = cluster
    study, log = make_study(tmp_path), tmp_path / "log"
    shutil.copy(NOTEBOOKS / "01_logit_lens.ipynb", study / "notebooks")
    given = {"logged": {"log": str(log), "pause": 3.0}, "01_logit_lens": {}}
    here, there = (cells_of(study, given, outputs=tmp_path / name) for name in ("here", "there"))
    options = RunOptions(timeout=120)
    assert [o.error for o in run_cells(here, workers=2, options=options)] == [""] * 8
    assert len(log.read_text().splitlines()) == 4

    def kill_one():
        while len(log.read_text().splitlines()) < 6:  # now both workers are in the middle of one
            time.sleep(0.05)
        os.kill(workers[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    outcomes = run_cells(there, workers=2, options=options, scheduler=address)
    killer.join(timeout=10)
    assert workers[0].wait() == -signal.SIGKILL
    assert [(o.state, o.error) for o in outcomes] == [("ok", "")] * 8
    assert len(log.read_text().splitlines()) == 4 + 4 + 1  # one cell was run again, elsewhere
    assert not processes_of(f"{mark}-1")  # its kernels went with it
    for ours, theirs in zip(here, there):
        if ours.notebook.stem == "logged":
            assert result_of(ours) == result_of(theirs) == expected_of(ours)
        else:
            for table in ours.folder.glob("table.*"):
                assert table.read_bytes() == (theirs.folder / table.name).read_bytes()
            assert (theirs.folder / "table.csv").stat().st_size > 100
    again = run_cells(there, workers=2, options=options, scheduler=address)
    assert {o.state for o in again} == {"up to date"}

    # A worker that has other inputs says so, and computes nothing.
    (refused,) = run_cells([replace(there[0], key="other")], workers=1, scheduler=address)
    assert refused.state == "error"
    assert "has another version of the package" in refused.error
    assert len(log.read_text().splitlines()) == 9

    # Ctrl-C ends what runs on workers too; nothing of that counts as failed.
    stopped = cells_of(study, given, outputs=tmp_path / "stopped")

    def interrupt():
        while len(log.read_text().splitlines()) < 10:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Stopped, match="0 of 8 cells are done and kept"):
        run_cells(stopped, workers=1, options=options, scheduler=address)
    interrupted = time.monotonic()
    while len(processes_of(f"{mark}-2")) > 1:  # the worker itself
        assert time.monotonic() < interrupted + 10
    time.sleep(4.0)
    assert len(log.read_text().splitlines()) == 10  # no other cell was begun
    assert not (tmp_path / "stopped" / "trial" / "failed").exists()


def test_without_a_scheduler_or_dask_one_line_says_so(tmp_path, monkeypatch):
    cells = cells_of(make_study(tmp_path), {"each": None})
    with pytest.raises(InputError, match="no Dask scheduler answers at 'tcp:"):
        run_cells(cells, workers=1, scheduler="tcp://127.0.0.1:1")
    with pytest.raises(InputError, match="no Dask scheduler answers at 'nonsense'"):
        run_cells(cells, workers=1, scheduler="nonsense")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install 'interp-kit\[cluster\]'"):
        run_cells(cells, workers=1, scheduler="tcp://127.0.0.1:1")
