"""Notebooks by hand: what help says, what Jupyter opens and runs, what a missing file is called."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid

import nbformat
import papermill.cli
import plotly.io as pio
import pytest
from click.testing import CliRunner
from jupyter_client.blocking.client import BlockingKernelClient

from interp_batch.matrix import NAMING_FILES, NAMING_PATHS
from interp_kit.specs import REPOSITORY, InputError

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
MISSING = "no-such-thing"
TOKEN = uuid.uuid4().hex
NAMING = ("model", "models", "scenario", "scenarios", *NAMING_FILES, *sorted(NAMING_PATHS))


def code_cells(file) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(file, 4).cells if cell.cell_type == "code"]


def run_all(file, namespace: dict, parameters: dict) -> None:
    """Every cell, here, with these parameters."""
    for cell in code_cells(file):
        exec(compile(cell.source, file.name, "exec"), namespace)
        if "parameters" in cell.metadata.get("tags", []):
            namespace.update(parameters)


def parameters_of(file) -> list[dict]:
    return list(papermill.inspect_notebook(str(file)).values())


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda p: p.stem)
def test_papermill_tells_what_every_parameter_is(file):
    shown = CliRunner().invoke(papermill.cli.papermill, ["--help-notebook", str(file)])
    assert shown.exit_code == 0
    text = " ".join(shown.output.split())
    found = parameters_of(file)
    assert found
    for parameter in found:
        assert f"{parameter['name']}: {parameter['inferred_type_name']} (default " in text
        assert len(parameter["help"]) > 4, parameter
        assert " ".join(parameter["help"].split()) in text


# ----------------------------------------------------------------------------------- Jupyter itself
@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A running ``jupyter lab`` on the repository: its address, and where its kernels are."""
    runtime = tmp_path_factory.mktemp("runtime")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.port={port}"]
    command += [
        f"--ServerApp.root_dir={REPOSITORY}",
        f"--IdentityProvider.token={TOKEN}",
        "--allow-root",
    ]
    environment = os.environ | {"JUPYTER_RUNTIME_DIR": str(runtime)}
    with open(runtime / "log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, (runtime / "log").read_text()
            try:
                asked(f"{address}/api/status")
                break
            except OSError:
                time.sleep(0.25)
        else:
            pytest.fail((runtime / "log").read_text())
        yield address, runtime
    finally:
        server.terminate()
        server.wait(30)


def asked(address: str, given: dict | None = None) -> dict:
    """What the server answers; a question with content is a POST."""
    request = urllib.request.Request(address, method="POST" if given else "GET")
    request.add_header("Authorization", f"token {TOKEN}")
    if given:
        request.data = json.dumps(given).encode()
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_jupyter_lab_opens_every_notebook_with_a_kernel_that_it_has(lab):
    address, _ = lab
    kernels = asked(f"{address}/api/kernelspecs")["kernelspecs"]
    for file in NOTEBOOKS:
        opened = asked(f"{address}/api/contents/notebooks/{file.name}?content=1")
        assert opened["type"] == "notebook"
        assert opened.get("message") is None  # what its validation found
        notebook = nbformat.from_dict(opened["content"])
        nbformat.validate(notebook)
        assert notebook.metadata.kernelspec.name in kernels


def test_run_all_runs_a_notebook_from_top_to_bottom(lab):
    """In a kernel that Jupyter starts, in the folder and with the defaults that it has there.

    Every notebook's cells run this way, one after the other, in the regression tests.
    """
    address, runtime = lab
    file = REPOSITORY / "notebooks" / "01_logit_lens.ipynb"
    given = {"path": f"notebooks/{file.name}", "type": "notebook", "name": file.name}
    session = asked(f"{address}/api/sessions", given | {"kernel": {"name": "python3"}})
    client = BlockingKernelClient(
        connection_file=str(runtime / f"kernel-{session['kernel']['id']}.json")
    )
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(60)
    shown = []
    for cell in code_cells(file):
        answer = client.execute_interactive(
            cell.source, timeout=120, output_hook=lambda message: shown.append(message)
        )
        assert answer["content"]["status"] == "ok", answer["content"]
    client.stop_channels()
    figures = [m for m in shown if "application/vnd.plotly.v1+json" in m["content"].get("data", {})]
    assert len(figures) >= 2


# ------------------------------------------------------------------------------- what is not there
NAMED = [
    (file, "reference" if name == "models" and file.stem == "91_summary" else name)
    for file in NOTEBOOKS
    for name in (parameter["name"] for parameter in parameters_of(file))
    if name in NAMING
]  # 91 reads its reference and others, of the run's models


FEW = {"models": ["tiny-gemma2", "cubic-gravity"], "samples": 1, "max_new_tokens": 1}
CHEAP = {"14_open_ended": FEW}  # computes before it reads the last that may be missing


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[f"{f.stem}-{name}" for f, name in NAMED])
def test_a_notebook_says_what_it_needs_when_that_is_missing(file, name, monkeypatch):
    monkeypatch.setattr(pio.renderers, "default", "json")
    monkeypatch.chdir(file.parent)
    given = [MISSING] if name in ("models", "scenarios") else MISSING
    namespace: dict = {"display": lambda *_: None}
    with pytest.raises(InputError) as found:
        run_all(file, namespace, CHEAP.get(file.stem, {}) | {name: given})
    message = str(found.value)
    assert MISSING in message
    assert "expected" in message or "did you mean" in message or "no such" in message
    assert "\n" not in message
