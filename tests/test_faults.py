"""What really goes wrong in long runs: nothing corrupt is read as good, and a rerun completes.

Each test looks at two things after its fault: every cell that counts as done holds exactly what its
notebook writes; and what was done before is not done again, by the lines that each execution logs.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager

import psutil
import pytest

from interp_batch import matrix, warm
from interp_batch.execution import RunOptions
from interp_batch.preflight import check_inputs
from interp_batch.results import damaged, read_status, stale
from interp_batch.runner import run_cells
from interp_kit.files import write_atomically
from interp_kit.specs import REPOSITORY, InputError
from tests.study import (
    cells_of,
    expected_of,
    light_imports,
    make_study,
    processes_of,
    result_of,
    write_notebook,
)

PLAYERS = ["tiny-gemma2", "ipd-strategic", "ipd-deontological", "ipd-utilitarian", "ipd-hybrid"]
STATES = ["CC_continue", "CC_temptation", "CD_punished", "DC_exploited", "DD_trapped"]
RUNNER_KILLS, KERNEL_KILLS = 14, 36  # 50, the least that is asserted

as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a file system needs root"
)


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path)


def logged_cells(study, *, pause=0.0, models=PLAYERS, scenarios=STATES, **kwargs):
    given = {"logged": {"log": str(study / "log"), "pause": pause}}
    return cells_of(study, given, models=models, scenarios=scenarios, **kwargs)


def executions(study) -> Counter:
    """How often each cell's notebook was begun."""
    log = study / "log"
    return Counter(log.read_text().splitlines() if log.is_file() else [])


def line_of(cell) -> str:
    return f"{cell.parameters['model']} {cell.parameters['scenario']}"


def done_of(cells):
    """The cells that count as done; each holds what its notebook writes."""
    waiting = {cell.id for cell in stale(cells)}
    done = [cell for cell in cells if cell.id not in waiting]
    assert [result_of(cell) for cell in done] == [expected_of(cell) for cell in done]
    return done


def complete(study, cells, *, redone=None, options=None):
    """Run again: all is well, and of what was done only ``redone`` is executed."""
    redone = cells if redone is None else redone
    before = executions(study)
    outcomes = run_cells(cells, workers=4, options=options or RunOptions())
    assert [o.error for o in outcomes] == [""] * len(cells)
    assert len(done_of(cells)) == len(cells)
    assert executions(study) - before == Counter(line_of(cell) for cell in redone)
    assert {o.state for o in run_cells(cells, workers=2)} == {"up to date"}


@contextmanager
def file_system(folder, *options):
    """A small file system of its own at ``folder``."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def study_command(study, command, monkeypatch):
    """The command on the study's notebooks, which load no model."""
    defaults = (matrix.expand.__kwdefaults__ or {}) | {"notebooks": study / "notebooks"}
    monkeypatch.setattr(matrix.expand, "__kwdefaults__", defaults)
    monkeypatch.setattr("interp_batch.cli.preflight", lambda cells, data: None)
    return command


def fork_runner(cells, mark: str) -> int:
    """``run_cells`` in a process of its own that need not import everything first; its id.

    All that it starts has ``mark`` in the environment.
    """
    runner = os.fork()
    if runner == 0:
        os.setsid()
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        os.environ["MARK"] = mark
        try:
            run_cells(cells, workers=2, options=RunOptions(kernel=warm.STOCK))
        finally:
            os._exit(0)
    return runner


# ------------------------------------------------------------------------------------------ kills
def test_the_runner_is_killed_at_random_moments(study):
    # So slow that there is always one to begin.
    cells = logged_cells(study, pause=1.0, scenarios=STATES[:2])
    draws = random.Random(7)
    settled: Counter = Counter()  # executions of the cells that are done
    begun = 0
    for _ in range(RUNNER_KILLS):
        runner = fork_runner(cells, str(study))
        time.sleep(draws.uniform(0.02, 2.5))
        os.kill(runner, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(runner, 0)[1])
        # What was done stays done; its kernels end by themselves, and nothing waits for them.
        assert {line: executions(study)[line] for line in settled} == dict(settled)
        settled = Counter({line_of(c): executions(study)[line_of(c)] for c in done_of(cells)})
        begun = executions(study).total()
    deadline = time.monotonic() + 20
    while (left := processes_of(str(study))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    missing = stale(cells)
    print(f"{RUNNER_KILLS} runners killed: {begun} cells begun, {len(cells) - len(missing)} done")
    complete(study, cells, redone=missing)


def test_kernels_are_killed_at_random_moments(study):
    cells = logged_cells(study, pause=0.3)
    draws = random.Random(8)
    killed, over = [], threading.Event()

    def kill() -> None:
        while not over.wait(draws.uniform(0.0, 0.4)) and len(killed) < KERNEL_KILLS:
            kernels = psutil.Process(warm.start_zygote().pid).children()
            if kernels:
                draws.choice(kernels).kill()
                killed.append(time.monotonic())

    runs = 0
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        while len(killed) < KERNEL_KILLS:
            # A kernel's death is noticed after a second: six at once do not wait for each other.
            outcomes = run_cells(cells, workers=6, fresh=runs % 3 == 2)
            assert all("died" in o.error for o in outcomes if o.state == "error"), outcomes
            for outcome in outcomes:
                assert outcome.state != "error" or read_status(outcome.cell.failed_folder)
            done_of(cells)
            runs += 1
    finally:
        over.set()
        killer.join()
    missing = stale(cells)
    print(f"{len(killed)} kernels killed in {runs} runs; {len(missing)} cells left to do")
    complete(study, cells, redone=missing)
    total = RUNNER_KILLS + len(killed)
    print(f"{total} processes killed in both tests")
    assert total >= 50


# ------------------------------------------------------------------------------- files that spoil
def spoil(file, how: str, draws: random.Random) -> None:
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[: draws.randrange(len(content))])
    else:
        at = draws.randrange(len(content))
        flipped = content[at] ^ 1 << draws.randrange(8)
        file.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])


@pytest.mark.parametrize("how", ["truncated", "flipped"])
@pytest.mark.parametrize("name", ["result.txt", "status.json", "run.ipynb"])
def test_a_spoiled_file_is_never_taken_for_a_result(study, how, name):
    cells = logged_cells(study, models=PLAYERS[:2], scenarios=STATES[:2])
    run_cells(cells, workers=2)
    draws = random.Random(9)
    good = (cells[1].folder / name).read_bytes()
    for _ in range(60):  # any bit of it
        spoil(cells[1].folder / name, how, draws)
        assert [c.id for c in stale(cells)] == [cells[1].id]
        assert name == "status.json" or damaged(cells[1].folder) == [name]
        (cells[1].folder / name).write_bytes(good)
    assert stale(cells) == []
    spoil(cells[1].folder / name, how, draws)
    (cells[2].folder / "result.txt").unlink()
    complete(study, cells, redone=[cells[1], cells[2]])


def test_spoiled_weights_are_found_and_old_results_do_not_count(study):
    """Even if size and time of the file are as before: nothing is run, nothing old is taken."""
    data = study / "data"
    said = {"truncated": "not readable as safetensors", "flipped": "is damaged"}
    for how in said:
        shutil.copytree(REPOSITORY / "data" / "models" / "ipd-hybrid", data / "models" / how)
    models = [*said, "tiny-gemma2"]
    cells = logged_cells(study, models=models, scenarios=STATES[:1], data=data)
    run_cells(cells, workers=2, options=RunOptions(data=str(data)))
    for how in said:
        weights = data / "models" / how / "adapter" / "adapter_model.safetensors"
        found = weights.stat()
        spoil(weights, how, random.Random(10))
        os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))
    # As the next process sees it: this one has hashed the files, and knows them by size and time.
    listed = subprocess.run(
        [sys.executable, "-m", "tests.study", study / "notebooks", "run", study / "trial.yaml",
         "--dry-run",
         "--data", data, "--outputs", study / "outputs"],
        capture_output=True, text=True, cwd=REPOSITORY, check=True,
        env=os.environ | {"PYTHONPATH": light_imports(study)},
    )  # fmt: skip
    lines = listed.stdout.splitlines()
    assert lines[0].startswith("to run      logged/truncated/CC_continue")
    assert lines[1].startswith("to run      logged/flipped/CC_continue")
    assert lines[2].startswith("up to date  logged/tiny-gemma2/CC_continue")
    for how, expected in said.items():
        with pytest.raises(InputError, match=expected):
            check_inputs({(how, "CC_continue", False)}, data=data)


# ------------------------------------------------------------------------------------ full of it
@as_root
def test_a_full_disk(study, study_command):
    with file_system(study / "small", "size=64k") as outputs:
        cells = logged_cells(study, outputs=outputs, models=PLAYERS[:2])
        outcomes = run_cells(cells, workers=2)
        trouble = [o for o in outcomes if o.state == "error"]
        assert trouble
        assert all("No space left on device" in o.error for o in trouble)
        done = done_of(cells)
        assert len(done) == len(cells) - len(trouble)
        code, _, said = study_command("report", study / "trial.yaml", "--outputs", outputs)
        assert code == 2
        assert said.startswith("interp-kit: No space left on device (")
        assert len(said.splitlines()) == 1
        subprocess.run(["mount", "-o", "remount,size=16m", str(outputs)], check=True)
        complete(study, cells, redone=[c for c in cells if c not in done])


@as_root
def test_a_folder_that_cannot_be_written_to(study):
    with file_system(study / "fixed", "size=1m") as outputs:
        cells = logged_cells(study, outputs=outputs, models=PLAYERS[:1], scenarios=STATES[:2])
        run_cells(cells[:1], workers=1)
        subprocess.run(["mount", "-o", "remount,ro", str(outputs)], check=True)
        with pytest.raises(InputError, match="Read-only file system"):
            run_cells(cells, workers=1)
        assert stale(cells) == cells[1:]  # what is there can still be read
        subprocess.run(["mount", "-o", "remount,rw", str(outputs)], check=True)
        complete(study, cells, redone=cells[1:])


def test_a_half_written_file_never_replaces_a_whole_one(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    write_atomically(file, "whole")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "half\ud800")
    assert file.read_text() == "whole"


@pytest.mark.skipif(warm.default_kernel() != warm.WARM, reason="Linux only")
def test_a_notebook_that_fills_memory_fails_alone(study):
    body = "data = []\nfor i in range(64):\n    data.append(bytes(2**26))\nprint(len(data))"
    write_notebook(study / "notebooks", "filling", body=body)
    given = {"filling": {}, "logged": {"log": str(study / "log")}}
    cells = cells_of(study, given, models=PLAYERS[:1], scenarios=STATES[:1])
    first, second = run_cells(cells, workers=2, options=RunOptions(memory=0.5))
    assert (first.error, second.error) == ("MemoryError: ", "")
    assert "attempts" not in read_status(cells[0].failed_folder)  # it would fail again
    again = run_cells(cells, workers=2, options=RunOptions())  # without a limit there is room
    assert [o.state for o in again] == ["ok", "up to date"]


def test_a_notebook_that_hangs_is_tried_again_and_then_given_up(study):
    body = "import time\nfrom pathlib import Path\nopen(fail_on, 'a').write('x')\ntime.sleep(600)"
    write_notebook(study / "notebooks", "hanging", body=body)
    given = {"hanging": {"fail_on": str(study / "tries")}, "logged": {"log": str(study / "log")}}
    cells = cells_of(study, given, models=PLAYERS[:1], scenarios=STATES[:1])
    outcomes = run_cells(cells, workers=2, options=RunOptions(timeout=2))
    assert [o.error for o in outcomes] == ["a code cell took longer than the limit of 2 s", ""]
    assert (study / "tries").read_text() == "xx"
    assert read_status(cells[0].failed_folder)["attempts"] == 2
    assert (cells[0].failed_folder / "run.ipynb").is_file()  # to look into


# ----------------------------------------------------------------------------------- locks, clocks
def test_two_runners_at_once_and_a_lock_that_was_left_behind(study, study_command):
    cells = logged_cells(study, pause=30.0, models=PLAYERS[:1], scenarios=STATES[:1])
    first = fork_runner(cells, str(study))
    try:
        while not executions(study):
            assert os.waitpid(first, os.WNOHANG) == (0, 0)
            time.sleep(0.05)
        code, _, said = study_command("run", study / "trial.yaml", "--outputs", study / "outputs")
        assert code == 2
        assert said == (
            f"interp-kit: another run is writing to {study / 'outputs' / 'trial'}; wait for it, or "
            "choose other --outputs\n"
        )
    finally:
        os.kill(first, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(first, 0)[1])
    assert (study / "outputs" / "trial" / ".lock").exists()
    complete(study, logged_cells(study, models=PLAYERS[:1], scenarios=STATES[:1]))


def test_a_clock_that_goes_backwards(study, monkeypatch):
    cells = logged_cells(study, models=PLAYERS[:2], scenarios=STATES[:1])
    real, steps = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * next(steps))
    run_cells(cells[:1], workers=1)
    monkeypatch.undo()
    assert 0 <= read_status(cells[0].folder)["seconds"] < 300
    for years in (-20, 20):  # the files' times say nothing about whether they are good
        for file in study.rglob("*"):
            then = real() + years * 3e7
            os.utime(file, (then, then))
        assert stale(logged_cells(study, models=PLAYERS[:2], scenarios=STATES[:1])) == cells[1:]
    complete(study, cells, redone=cells[1:])
    assert json.loads((cells[0].folder / "status.json").read_text())["state"] == "ok"
