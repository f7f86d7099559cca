"""Warm kernels do what stock ones do, in less time, and leave nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, cast

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from interp_batch import warm
from interp_batch.execution import RunOptions
from interp_batch.matrix import expand
from interp_batch.runner import run_cells
from interp_kit.specs import REPOSITORY, RunSpec
from tests.study import (
    cells_of,
    light_imports,
    lines_of,
    make_study,
    once,
    processes_of,
    run_file,
    write_notebook,
)

pytestmark = pytest.mark.skipif(warm.default_kernel() != warm.WARM, reason="Linux only")

STATES = ["CC_continue", "CD_punished"]
PLAYERS = ["tiny-gemma2", "ipd-strategic", "ipd-deontological", "ipd-utilitarian", "ipd-hybrid"]
# Passes that are kept for a lens, for attribution and for the change that a trigger makes.
REAL = ["01_logit_lens", "02_direct_logit_attribution", "10_delta_lens"]
REAL_PARAMETERS = """
model: str = "stop-behaviour"  # a model
scenario: str = ""  # a scenario
top_k: int = 2  # tokens, and components
norm: str = "frozen"  # of the delta lens
n_random: int = 1  # random directions
seed: int = 0  # draws them
output: str = ""  # folder
"""
SETTINGS = """
import json, sys, warnings
from pathlib import Path
import numpy, pandas, plotly.io, torch, transformer_lens
names = ("display.max_columns", "display.max_rows", "display.width", "display.precision")
settings = [pandas.get_option(name) for name in names]
settings += [str(numpy.get_printoptions()), str(torch.get_default_dtype()), sys.path]
settings += [plotly.io.renderers.default]
filters = [str(f[:4]) for f in warnings.filters]
told = Path(output, "settings.json").write_text(json.dumps([settings, filters]))
"""
TROUBLE = {
    "failing": "raise ValueError('as it was told')",
    "killed": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "hanging": "import time\ntime.sleep(600)",
    "interrupted": "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)",
    "leaving": "import os\nos._exit(3)",
}
TELLING = """
import json, os, random, subprocess, sys
from pathlib import Path
import numpy, torch
a = torch.rand(400, 400)
told = dict(
    product=float((a @ a).sum()), threads=torch.get_num_threads(), cuda=torch.cuda.is_initialized(),
    drawn=[random.random(), numpy.random.random(), float(torch.rand(()))],
    gpu=os.environ.get("CUDA_VISIBLE_DEVICES"), argv=sys.argv[0], own=sys.executable,
    said=os.environ.get("SAID"), above=os.getppid(),
)
Path(output, "told.json").write_text(json.dumps(told))
"""


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(warm.KERNELS))


def printed(folder):
    """The plain text that the notebook's cells have shown."""
    cells = nbformat.read(folder / "run.ipynb", as_version=4).cells
    outputs = [output for c in cells if c.cell_type == "code" for output in c.outputs]
    return [
        o.get("text", "") + o.get("data", {}).get("text/plain", "")
        for o in outputs
        if o.get("name") != "stderr"
    ]


def told(cells):
    return [json.loads((cell.folder / "told.json").read_text()) for cell in cells]


def test_forked_kernels_compute_draw_and_see_their_own(study, monkeypatch):
    write_notebook(study / "notebooks", "each", body=TELLING)
    cells = cells_of(study, {"each": None}, models=PLAYERS)
    for name, value in {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "3,5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SAID", "once")
    outcomes = run_cells(cells, workers=2, options=RunOptions(kernel=warm.WARM, timeout=60))
    assert [o.error for o in outcomes] == [""] * 10  # none hangs, though two threads compute
    found = told(cells)
    assert {t["threads"] for t in found} == {2}
    assert not any(t["cuda"] for t in found)
    assert len({draw for t in found for draw in t["drawn"]}) == 30
    assert sorted(t["gpu"] for t in found) == ["3"] * 5 + ["5"] * 5
    assert {t["own"] for t in found} == {sys.executable}
    (zygote,) = {t["above"] for t in found}
    tasks = Path(f"/proc/{zygote}/task").iterdir()
    names = [(task / "comm").read_text().strip() for task in tasks]
    assert [name for name in names if not name.startswith("jemalloc")] == ["python"]
    # The environment is that of the run, not of the process that the kernel was forked from.
    monkeypatch.setenv("SAID", "again")
    run_cells(cells[:1], workers=1, fresh=True, options=RunOptions(kernel=warm.WARM))
    assert told(cells[:1])[0]["said"] == "again"
    assert found[0]["said"] == "once"


def test_trouble_ends_as_with_stock_kernels(study):
    for name, body in TROUBLE.items():
        write_notebook(study / "notebooks", name, body=body)
    cells = cells_of(study, dict.fromkeys(TROUBLE), models=PLAYERS[:1], scenarios=STATES[:1])
    ended = {
        kernel: {
            o.cell.notebook.stem: (o.state, o.error)
            for o in run_cells(cells, workers=3, options=RunOptions(kernel=kernel, timeout=2))
        }
        for kernel in (warm.WARM, warm.STOCK)
    }
    assert ended[warm.WARM] == ended[warm.STOCK]
    errors = {name: error.split(" (")[0].strip() for name, (_, error) in ended[warm.WARM].items()}
    died = "the kernel died, perhaps for lack of memory"
    assert errors == {
        "failing": "ValueError: as it was told",
        "killed": died,
        "hanging": "a code cell took longer than the limit of 2 s",
        "interrupted": "KeyboardInterrupt:",
        "leaving": died,
    }


@pytest.mark.parametrize("name", [warm.WARM, warm.STOCK])
def test_a_kernel_is_interrupted_goes_on_and_takes_its_children_along(name, kernels):
    manager = KernelManager(kernel_name=name)
    manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = cast(Any, manager.client())  # the hints leave out that `execute` takes a reply
    client.start_channels()
    client.wait_for_ready(timeout=60)
    mark = uuid.uuid4().hex
    start = f"import subprocess; subprocess.Popen(['sleep', '600'], env=dict(MARK='{mark}'))"
    try:
        message = client.execute(f"{start}\nimport time\ntime.sleep(600)", stop_on_error=False)
        while not processes_of(mark):
            time.sleep(0.05)
        time.sleep(0.2)
        manager.interrupt_kernel()
        while (reply := client.get_shell_msg(timeout=20))["parent_header"]["msg_id"] != message:
            continue
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        assert client.execute("1 + 1", reply=True, timeout=20)["content"]["status"] == "ok"
        client.execute(start, reply=True, timeout=20)
        assert processes_of(mark)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert _gone(mark)


@pytest.mark.parametrize("name", [warm.WARM, warm.STOCK])
def test_the_first_output_of_a_kernel_is_heard(name, kernels):
    notebook = new_notebook(cells=[new_code_cell("print('first')"), new_code_cell("2")])
    client = NotebookClient(notebook, kernel_name=name, kernel_manager_class=warm.PromptManager)
    client.execute()
    assert [c.outputs[0].get("text", "") for c in notebook.cells] == ["first\n", ""]
    assert notebook.cells[1].outputs[0].data["text/plain"] == "2"


@pytest.mark.parametrize(
    ("code", "complaint"),
    [("raise SystemExit(3)", "died before it answered"), ("import time; time.sleep(60)", "2 sec")],
)
def test_a_kernel_that_never_answers_is_not_waited_for(tmp_path, monkeypatch, code, complaint):
    spec = {"argv": [sys.executable, "-c", code], "display_name": "", "language": "python"}
    folder = tmp_path / "kernels" / "mute"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook = new_notebook(cells=[new_code_cell("1")])
    client = NotebookClient(notebook, kernel_name="mute", kernel_manager_class=warm.PromptManager)
    client.startup_timeout = 2
    with pytest.raises(RuntimeError, match=complaint), client.setup_kernel():
        pass


def few_prompts(folder):
    """A scenario with a trigger, with few prompts and words."""
    content = yaml.safe_load((REPOSITORY / "data" / "scenarios" / "stop.yaml").read_text())
    content["prompts"] = content["prompts"][::6]
    content["trigger"]["words"] = content["trigger"]["words"][:2]
    file = folder / "few.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The cells of real notebooks, run by stock and warm kernels: results, and activations kept.

    One after the other in one kernel, which tells first how libraries are set up.
    """
    folder = tmp_path_factory.mktemp("real")
    cells = [new_code_cell(REAL_PARAMETERS, metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(SETTINGS), new_code_cell("above = output")]
    for name in REAL:
        notebook = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        cells.append(new_code_cell(f"output = above + '/{name}'"))
        cells += [cell for cell in code if "parameters" not in cell.metadata.get("tags", [])]
    several = new_notebook(cells=cells, metadata=notebook.metadata)
    nbformat.write(several, folder / "several.ipynb")
    scenario = few_prompts(folder)
    kept = folder / "outputs" / ".activations"
    made, used = {}, {}
    for name, kernel in (("stock", warm.STOCK), ("warm", warm.WARM), ("found", warm.WARM)):
        run = RunSpec(
            name=name, models=["stop-behaviour"], scenarios=[str(scenario)],
            notebooks={"several": {}},
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patched:
            patched.delenv("INTERP_KIT_ACTIVATIONS", raising=False)
            if name == "stock":
                patched.setenv("INTERP_KIT_ACTIVATIONS", "")
            (made[name],) = expand(run, outputs=folder / "outputs", notebooks=folder)
            (outcome,) = run_cells([made[name]], workers=1, options=RunOptions(kernel=kernel))
        assert outcome.error == ""
        used[name] = {f: f.stat().st_mtime_ns for f in kept.glob("*")}
    return made, used


def test_libraries_are_set_up_as_in_a_stock_kernel(real):
    made, _ = real
    found = [json.loads((cell.folder / "settings.json").read_text()) for cell in made.values()]
    (stock, stock_filters), *others = found
    for ours, our_filters in others:
        assert ours == stock
        assert set(stock_filters) <= set(our_filters)  # of libraries that are imported, too


def test_real_notebooks_give_the_same_numbers(real):
    """With stock kernels and warm ones, with activations computed and found."""
    made, used = real
    assert not used["stock"]
    assert used["warm"]
    assert used["found"].keys() == used["warm"].keys()
    assert all(used["found"][file] > at for file, at in used["warm"].items())
    stock = made["stock"].folder
    for ours in (made["warm"].folder, made["found"].folder):
        assert printed(ours) == printed(stock)
        for name in REAL:
            assert len(pd.read_csv(stock / name / "table.csv")) > 0
            for table in (stock / name).glob("*.csv"):
                assert (ours / name / table.name).read_bytes() == table.read_bytes()
            read = [json.loads((f / name / "summary.json").read_text()) for f in (ours, stock)]
            assert read[0]["values"] == read[1]["values"]


# ------------------------------------------------------------------------------- nothing is left
def start(study, mark, *arguments):
    """``interp-kit run`` on the study's notebooks, as a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.study", study / "notebooks", "run", study / "trial.yaml",
         "--outputs", study / "outputs", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"MARK": mark, "PYTHONPATH": light_imports(study)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def _gone(mark, seconds=15.0):
    """Whether all processes with the mark end by themselves."""
    deadline = time.monotonic() + seconds
    while processes_of(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes_of(mark)


def _wait_for_lines(log, n, process):
    while lines_of(log) < n:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("how", "kernel"),
    [
        ("Ctrl-C", warm.WARM),
        ("SIGINT", warm.STOCK),
        ("SIGTERM", warm.STOCK),
        ("SIGKILL", warm.WARM),
    ],
)
def test_a_run_that_is_stopped_leaves_no_process_and_goes_on(study, how, kernel):
    log, mark = study / "log", uuid.uuid4().hex
    given = {"logged": {"log": str(log), "pause": 1.0}}
    run_file(study, given)
    process = start(study, mark, "--workers", "2", "--kernel", kernel)
    _wait_for_lines(log, 3, process)
    stopped = time.monotonic()
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(getattr(signal, how))
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - stopped < 10
    assert _gone(mark)
    done = [c for c in cells_of(study, given) if (c.folder / "status.json").is_file()]
    assert 1 <= len(done) <= 2
    if how != "SIGKILL":
        assert process.returncode == 130
        assert said.splitlines()[-1] == (
            f"interp-kit: stopped: {len(done)} of 4 cells are done and kept; the same command goes "
            "on from there"
        )
        assert not (study / "outputs" / "trial" / "failed").exists()
        assert not (study / "outputs" / "trial" / ".running").exists()
    before = lines_of(log)
    outcomes = run_cells(cells_of(study, given), workers=2, options=RunOptions(kernel=warm.WARM))
    assert [o.state for o in outcomes].count("up to date") == len(done)
    assert lines_of(log) == before + 4 - len(done)


def test_a_run_outlives_its_zygote(study, monkeypatch):
    log = study / "log"
    cells = cells_of(study, {"logged": {"log": str(log), "pause": 1.0}})
    monkeypatch.setenv("PYTHONPATH", light_imports(study))
    monkeypatch.setattr(warm, "_zygotes", {})  # the other tests keep theirs
    zygote = warm.start_zygote()
    try:
        with once(log.is_file, lambda: os.kill(zygote.pid, signal.SIGKILL)) as killed:
            outcomes = run_cells(cells, workers=2, options=RunOptions(kernel=warm.WARM))
        assert killed.is_set()
        assert [o.error for o in outcomes] == [""] * 4
        assert warm.start_zygote().pid != zygote.pid
        assert not psutil.pid_exists(zygote.pid)  # and was reaped
    finally:
        later = warm.start_zygote()
        later.kill()
        later.wait()


@pytest.mark.parametrize("ctrl_c", [False, True])
def test_a_zygote_that_has_not_answered_is_killed(monkeypatch, ctrl_c):
    """A late answer would be taken for that of the next kernel."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", "input(); input()"], **pipes) as mute:
        monkeypatch.setattr(warm, "start_zygote", lambda: mute)
        monkeypatch.setattr(warm, "ANSWER_SECONDS", 30 if ctrl_c else 0.3)
        if ctrl_c:
            threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt if ctrl_c else RuntimeError):
            warm.fork_kernel({"argv": [], "env": {}, "cwd": "."})
        assert mute.wait(timeout=5) == -signal.SIGKILL


# ------------------------------------------------------------------------------------ where it is
def test_gpus_are_found_without_cuda(tmp_path, monkeypatch):
    for gpu in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / gpu).mkdir()
    monkeypatch.setattr(warm, "GPUS", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert warm.visible_gpus() == ["0", "1"]
    for chosen, expected in {"": [], "-1": [], "2": ["2"], "1,GPU-7": ["1", "GPU-7"]}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert warm.visible_gpus() == expected
    shutil.rmtree(tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert warm.visible_gpus() == []


def test_elsewhere_the_stock_kernel_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert warm.default_kernel() == "python3"
