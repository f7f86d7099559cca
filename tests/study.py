"""A small study: trivial notebooks, a run file, an output folder.

``python -m tests.study FOLDER run ...`` is ``interp-kit run ...`` on the notebooks of ``FOLDER``.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import psutil
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from interp_batch import matrix
from interp_batch.matrix import Cell, expand
from interp_kit.catalogue import read_run

PARAMETERS = """
model: str = "tiny-gemma2"  # a model
scenario: str = "CC_continue"  # a scenario
fail_on: str = ""  # raise for this scenario
times: int = 1  # how often
output: str = ""  # folder
"""
BODY = """
from pathlib import Path
if scenario == fail_on:
    raise ValueError("made to fail <script>alert(1)</script>")
Path(output, "result.txt").write_text(model * times)
"""
# Logs every execution; for `pause` seconds, half of its result is written.
LOGGED_PARAMETERS = """
model: str = "tiny-gemma2"  # a model
scenario: str = "CC_continue"  # a scenario
log: str = ""  # every execution adds a line
pause: float = 0.0  # seconds, with the result half written
output: str = ""  # folder
"""
LOGGED = """
import time
from pathlib import Path
with open(log, "a") as lines:
    print(model, scenario, file=lines)
with open(Path(output, "result.txt"), "w") as result:
    print(model, file=result, flush=True)
    time.sleep(pause)
    print(scenario, file=result)
"""
# What takes seconds to import, and what the trivial notebooks do not use.
SLOW = ["circuitsvis", "peft", "rfc3987_syntax", "scipy", "sklearn"]
SLOW += ["transformer_lens", "transformers"]
NO_TORCH = "def set_num_threads(n): pass\n\n\ndef seed(): pass\n"  # a zygote calls both
MODELS = ["tiny-gemma2", "ipd-hybrid"]
SCENARIOS = ["CC_continue", "CD_punished"]


def write_notebook(folder, name, parameters=PARAMETERS, body=BODY, tag="parameters"):
    cells = [new_markdown_cell(f"# {name}?"), new_code_cell(parameters), new_code_cell(body)]
    cells[1].metadata["tags"] = [tag]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")


def make_study(folder: Path) -> Path:
    """Two small notebooks, and one that logs every execution."""
    notebooks = folder / "notebooks"
    notebooks.mkdir()
    write_notebook(notebooks, "each")
    together = 'models: list[str] = []\nscenarios: list[str] = []\noutput: str = ""\n'
    write_notebook(
        notebooks, "all", together, "from pathlib import Path\nPath(output, 'x').touch()"
    )
    write_notebook(notebooks, "logged", LOGGED_PARAMETERS, LOGGED)
    return folder


def run_file(study: Path, notebooks, models=MODELS, scenarios=SCENARIOS) -> Path:
    file = study / "trial.yaml"
    run = {"models": list(models), "scenarios": list(scenarios), "notebooks": notebooks}
    file.write_text(yaml.safe_dump(run, sort_keys=False))
    return file


def cells_of(study, notebooks, *, models=MODELS, scenarios=SCENARIOS, **kwargs) -> list[Cell]:
    run = read_run(run_file(study, notebooks, models, scenarios))
    given = {"outputs": study / "outputs", "notebooks": study / "notebooks"} | kwargs
    return expand(run, **given)


def light_imports(folder: Path) -> str:
    """A PYTHONPATH with which processes for trivial notebooks, zygotes too, start in a second.

    Slow libraries cannot be imported with it, and nothing else changes.
    """
    light = folder / "light"
    light.mkdir()
    for name in SLOW:
        (light / f"{name}.py").write_text('raise ImportError("too slow for this test")\n')
    (light / "torch.py").write_text(NO_TORCH)
    return str(light)


@contextmanager
def once(condition: Callable[[], bool], act: Callable[[], object]) -> Iterator[threading.Event]:
    """Another thread calls ``act`` as soon as ``condition()``; it ends with the context.

    The event is set if it did.
    """
    over, acted = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            if condition():
                acted.set()
                act()
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield acted
    finally:
        over.set()
        watcher.join()


def lines_of(log: Path) -> int:
    """How many executions the notebook ``logged`` has logged."""
    return len(log.read_text().splitlines()) if log.is_file() else 0


def result_of(cell: Cell) -> str:
    return (cell.folder / "result.txt").read_text()


def expected_of(cell: Cell) -> str:
    """What the notebook ``logged`` writes."""
    return f"{cell.parameters['model']}\n{cell.parameters['scenario']}\n"


def processes_of(text: str) -> list[psutil.Process]:
    """Running processes whose environment or command line contains ``text``."""
    found = []
    for process in psutil.process_iter():
        try:
            said = [*process.cmdline(), *process.environ().values()]
            if process.status() != psutil.STATUS_ZOMBIE and any(text in word for word in said):
                found.append(process)
        except psutil.Error:
            continue
    return found


def main() -> None:
    from interp_batch import cli

    folder = sys.argv.pop(1)
    defaults = matrix.expand.__kwdefaults__
    assert defaults is not None
    defaults["notebooks"] = Path(folder)
    cli.preflight = lambda cells, data: None  # these notebooks load no model
    cli.main()


if __name__ == "__main__":
    main()
