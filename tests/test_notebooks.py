"""The notebook tests can fail: a result changed by 1 % is caught, float noise is not.

What every notebook has printed is printed again, by cells that compute nothing, and compared with
what is stored, of which one number a cell is changed.
"""

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from xml.etree import ElementTree

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output

from interp_kit.specs import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.+-])-?\d+\.\d+(?![\w.])")
SMALLEST = 0.3  # of this, 1 % is more than the absolute tolerance
REPLAY = "from IPython.display import publish_display_data\npublish_display_data({!r})"


def nbval(folder) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-current-env", "-p",
         "no:cacheprovider", "--junitxml", folder / "results.xml", "--rootdir", folder, folder],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def printed() -> list[tuple[str, bool]]:
    """What all notebooks show as text; and whether it is printed, or else a table."""
    outputs = [
        output
        for file in NOTEBOOKS
        for cell in nbformat.read(file, 4).cells
        for output in cell.get("outputs", [])
    ]
    streams = [o.text for o in outputs if o.get("name") == "stdout"]
    tables = [o.data["text/plain"] for o in outputs if "text/html" in o.get("data", {})]
    return [(t, True) for t in streams] + [(t, False) for t in tables if not t.startswith("<")]


def replayed(text: str, is_stream: bool, *, stored: str) -> NotebookNode:
    """A cell that shows ``text``, with the output ``stored``."""
    if is_stream:
        source, output = f"print({text!r}, end='')", new_output("stream", text=stored)
    else:
        source = REPLAY.format({"text/plain": text})
        output = new_output("display_data", {"text/plain": stored})
    return new_code_cell(source, outputs=[output], execution_count=1)


def changed(text: str, change: Callable[[float], float], draws: random.Random) -> str | None:
    """The text with one of its numbers changed; ``None`` if there is none."""
    found = [m for m in NUMBER.finditer(text) if abs(float(m[0])) >= SMALLEST]
    if not found:
        return None
    number = draws.choice(found)
    return f"{text[: number.start()]}{change(float(number[0])):.4f}{text[number.end() :]}"


def write(folder, cells) -> None:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / "replayed.ipynb")
    shutil.copy(REPOSITORY / "notebooks" / "conftest.py", folder)


def test_a_changed_result_is_caught_in_whatever_is_printed(tmp_path):
    draws, cells, passes = random.Random(0), [], []
    for text, is_stream in printed():
        for change, is_noise in ((lambda v: v * 1.01, False), (lambda v: v + 1e-3, True)):
            stored = changed(text, change, draws)
            if stored is not None:
                cells.append(replayed(text, is_stream, stored=stored))
                passes.append(is_noise)
    assert len(cells) > 150
    write(tmp_path, cells)
    code, output = nbval(tmp_path)
    assert code == 1, output[-3000:]
    results = ElementTree.parse(tmp_path / "results.xml").iter("testcase")
    assert [result.find("failure") is None for result in results] == passes


def test_a_stripped_notebook_does_not_pass(tmp_path):
    cells = [replayed(*shown, stored=shown[0]) for shown in printed()[:2]]
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    write(tmp_path, cells)
    code, output = nbval(tmp_path)
    assert code != 0
    assert "no stored outputs" in output
