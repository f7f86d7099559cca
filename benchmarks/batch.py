"""What a batch costs: the same cells with stock kernels and with warm ones, at equal workers.

``python -m benchmarks.batch`` runs 24 cells of the demo (``papermill_params/demo.yaml``: lens,
attribution and patching on four players and two states of the game) by `run_cells`, once with the
kernel ``python3`` and once with ``python3-warm``; then 24 and 240 cells of a notebook that computes
almost nothing, warm, which shows how the cost grows.

A cell's wall time is that of its run: papermill, from opening the notebook until it is written. Its
computing time is what papermill measured for its code cells under the warm kernel, without the cell
that imports. (Under a stock kernel, other cells also import: libraries load parts on first use.)
The overhead is the difference: starting a kernel, importing, ending. Before its first cell, a warm
batch waits for the process that kernels are forked from; this counts in the total and in no median.
Memory is the proportional set size of all processes, sampled every second.
"""

import argparse
import json
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import psutil
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from interp_batch import warm
from interp_batch.execution import RunOptions
from interp_batch.matrix import Cell, expand
from interp_batch.results import read_status
from interp_batch.runner import run_cells
from interp_kit.specs import RunSpec

NOTEBOOKS = ["01_logit_lens", "02_direct_logit_attribution", "03_activation_patching"]
MODELS = ["ipd-strategic", "ipd-deontological", "ipd-utilitarian", "ipd-hybrid"]
SCENARIOS = ["CC_temptation", "DD_trapped"]
IMPORTS = re.compile(r"^(import|from) \w", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="4 cells, and 4 and 8: a smoke test")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        demo = {k: demo_cells(root / k, quick=given.quick) for k in (warm.STOCK, warm.WARM)}
        rows = [_measured(kernel, cells, given.workers) for kernel, cells in demo.items()]
        each = compared(demo[warm.STOCK], demo[warm.WARM])
        counts = (4, 8) if given.quick else (24, 240)
        grown = [_measured(warm.WARM, small_cells(root, count), given.workers) for count in counts]
    print(f"{len(psutil.Process().cpu_affinity())} cores, {given.workers} workers\n")
    print("Cells of the demo, median seconds")
    by_notebook = each.groupby("notebook").median()
    print(by_notebook.round(2).to_string(), "\n")
    print("The same as a batch")
    print(pd.DataFrame(rows).to_string(index=False), "\n")
    print("Cells that compute next to nothing")
    print(pd.DataFrame(grown).to_string(index=False), "\n")
    middle = each.drop(columns="notebook").median()
    stock, ours = rows
    claims = [
        ("overhead of a warm run, s", middle.warm_overhead, "<= 1.2", middle.warm_overhead <= 1.2),
        _at_least("whole cells: stock / warm", stock["s_a_cell"] / ours["s_a_cell"], 3.5),
        _within("cost of a cell, many / few", grown[1]["s_a_cell"] / grown[0]["s_a_cell"], 0.2),
    ]
    for claim, measured, expected, holds in claims:
        print(f"{claim:>40}  {measured:6.2f}  {expected:>12}  {'PASS' if holds else 'FAIL'}")


def _at_least(claim: str, measured: float, least: float) -> tuple[str, float, str, bool]:
    return claim, measured, f">= {least}", measured >= least


def _within(claim: str, ratio: float, share: float) -> tuple[str, float, str, bool]:
    return claim, ratio, f"1 +- {share}", abs(ratio - 1) <= share


def demo_cells(outputs: Path, *, quick: bool) -> list[Cell]:
    """24 cells of the demo: three notebooks, four models, two scenarios."""
    run = RunSpec(
        name="demo",
        models=MODELS[:1] if quick else MODELS,
        scenarios=SCENARIOS,
        notebooks={name: {} for name in (NOTEBOOKS[:2] if quick else NOTEBOOKS)},
    )
    return expand(run, outputs=outputs)


def small_cells(folder: Path, count: int) -> list[Cell]:
    """``count`` cells of notebooks that import torch and write a file."""
    notebooks = folder / f"notebooks-{count}"
    notebooks.mkdir()
    code = (
        'import torch\nfrom pathlib import Path\nPath(output, "x").write_text(str(torch.ones(2)))'
    )
    for number in range(count // 4):
        cells = [
            new_markdown_cell("# How long?"),
            new_code_cell('model: str = ""\nscenario: str = ""\noutput: str = ""'),
            new_code_cell(code),
        ]
        cells[1].metadata["tags"] = ["parameters"]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, notebooks / f"small_{number}.ipynb")
    run = RunSpec(
        name="small",
        models=MODELS[:2],
        scenarios=SCENARIOS,
        notebooks={file.stem: {} for file in sorted(notebooks.glob("*.ipynb"))},
    )
    return expand(run, outputs=folder / f"outputs-{count}", notebooks=notebooks)


def _measured(kernel: str, cells: list[Cell], workers: int) -> dict[str, Any]:
    """One row: the whole batch, and the most memory that it took."""
    with _Memory() as memory:
        started = time.monotonic()
        outcomes = run_cells(cells, workers=workers, options=RunOptions(kernel=kernel))
        total = time.monotonic() - started
    failed = [o.error for o in outcomes if o.state != "ok"]
    if failed:
        raise SystemExit(f"{len(failed)} cells failed, the first with: {failed[0]}")
    return {
        "kernel": kernel,
        "cells": len(cells),
        "total_s": round(total, 1),
        "s_a_cell": round(total / len(cells), 3),
        "peak_gib": round(memory.peak / 2**30, 2),
    }


def compared(stock: list[Cell], ours: list[Cell]) -> pd.DataFrame:
    """Every cell under both kernels: its seconds, their ratio, its own computing, overheads."""
    rows = []
    for a, b in zip(stock, ours, strict=True):
        slow, fast = (read_status(cell.folder)["seconds"] for cell in (a, b))
        own = computing(b.folder / "run.ipynb")
        row = {"notebook": a.notebook.stem, "stock_s": slow, "warm_s": fast, "ratio": slow / fast}
        row |= {"computing_s": own, "stock_overhead": slow - own, "warm_overhead": fast - own}
        rows.append(row)
    return pd.DataFrame(rows)


def computing(notebook: Path) -> float:
    """Seconds that the notebook's code cells took, but for those that import."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return sum(
        cell["metadata"]["papermill"]["duration"] or 0.0
        for cell in cells
        if cell["cell_type"] == "code" and not IMPORTS.search("".join(cell["source"]))
    )


class _Memory:
    """The most that this process and all that it starts take together, in bytes."""

    def __enter__(self) -> "_Memory":
        self.peak = 0
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._sample)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()

    def _sample(self) -> None:
        own = psutil.Process()
        while not self._over.wait(1.0):
            taken = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    taken += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, taken)


if __name__ == "__main__":
    main()
