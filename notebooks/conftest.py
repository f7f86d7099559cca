"""Lets nbval accept float noise: numbers may differ by rounding, nothing else may differ.

Printed text and tables are compared. Figures and HTML are not: plotly stores arrays as base64, and
circuitsvis writes random ids. ``tests/test_notebooks.py`` proves that a change of 1 % fails.
"""

import math
import os
import re

import pytest

nbval = pytest.importorskip("nbval.plugin")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

RELATIVE, ABSOLUTE = 1e-3, 2e-3
NUMBER = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?\d+e[-+]?\d+", re.IGNORECASE)
# Rounding errors have no fixed size: "1.4e-06" may be "9e-07" elsewhere.
ROUNDING = re.compile(r"\d(?:\.\d+)?e-0[4-9]|\b0\.0e\+00")
SKIPPED = ("text/html", "application/javascript", "application/vnd.plotly.v1+json", "stderr")


def alike(reference: str, test: str) -> str:
    """``test``, or ``reference`` if the two differ by float noise only."""
    reference_, test_ = ROUNDING.sub("ROUNDING", reference), ROUNDING.sub("ROUNDING", test)

    def words(text: str) -> list[str]:
        return NUMBER.sub("#", text).split()

    if words(reference_) != words(test_):
        return test
    pairs = zip(NUMBER.findall(reference_), NUMBER.findall(test_))
    close = all(
        math.isclose(float(a), float(b), rel_tol=RELATIVE, abs_tol=ABSOLUTE) for a, b in pairs
    )
    return reference if close else test


_compare = nbval.IPyNbCell.compare_outputs


def _tolerant(self, test, ref, skip_compare=None):
    for ours, theirs in zip(test, ref):
        if "text" in ours and "text" in theirs:
            ours["text"] = alike(theirs["text"], ours["text"])
        for kind in set(ours.get("data", {})) & set(theirs.get("data", {})):
            if isinstance(theirs["data"][kind], str):
                ours["data"][kind] = alike(theirs["data"][kind], ours["data"][kind])
    return _compare(self, test, ref, skip_compare)


nbval.IPyNbCell.compare_outputs = _tolerant


def pytest_collectstart(collector):
    if getattr(collector, "skip_compare", None) is not None:
        collector.skip_compare += SKIPPED


def pytest_runtest_setup(item):
    """Fail the cells of a notebook without stored outputs: they would pass whatever they compute.

    They fail one by one, since an error at collection stops a worker of pytest-xdist without a
    word.
    """
    if isinstance(item, nbval.IPyNbCell):
        code = [c for c in item.parent.nb.cells if c.cell_type == "code"]
        if any(c.execution_count is None for c in code) or not any(c.outputs for c in code):
            pytest.fail(f"{item.parent.name} has no stored outputs; run it and save it")
