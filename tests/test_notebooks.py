"""The notebook tests can fail: a result changed by 1 % is caught, float noise is not."""

import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from interp_kit.specs import REPOSITORY

NOTEBOOK = "01_logit_lens.ipynb"
NUMBER = re.compile(r"(final decision: )(-?\d+\.\d+)")


def nbval(folder) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-current-env", "-p",
         "no:cacheprovider", "--rootdir", folder, folder],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def stored(folder, change) -> None:
    """A copy of the notebook with its stored summary changed by ``change(value)``."""
    notebook = nbformat.read(REPOSITORY / "notebooks" / NOTEBOOK, 4)
    changed = 0
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and NUMBER.search(output.text):
                output.text = NUMBER.sub(
                    lambda m: f"{m[1]}{change(float(m[2])):.3f}", output.text, count=1
                )
                changed += 1
    assert changed == 1
    nbformat.write(notebook, folder / NOTEBOOK)
    shutil.copy(REPOSITORY / "notebooks" / "conftest.py", folder)


@pytest.mark.parametrize(
    ("change", "passes"),
    [(lambda v: v * 1.01, False), (lambda v: v + 1e-3, True)],
    ids=["one percent fails", "float noise passes"],
)
def test_a_changed_result_is_caught(tmp_path, change, passes):
    stored(tmp_path, change)
    code, output = nbval(tmp_path)
    assert (code == 0) is passes, output[-3000:]
    if not passes:
        assert "final decision" in output


def test_a_stripped_notebook_does_not_pass(tmp_path):
    notebook = nbformat.read(REPOSITORY / "notebooks" / NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, tmp_path / NOTEBOOK)
    shutil.copy(REPOSITORY / "notebooks" / "conftest.py", tmp_path)
    code, output = nbval(tmp_path)
    assert code != 0
    assert "no stored outputs" in output
