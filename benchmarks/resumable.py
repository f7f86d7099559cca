"""Runs the cases of a benchmark side by side; a file of their rows lets a stopped run go on."""

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

Row = dict[str, Any]
Cases = Mapping[str, Callable[[], Iterable[Row]]]


def run(cases: Cases, only: str, file: Path | None) -> list[Row]:
    """Rows of the cases whose name holds ``only``, those in ``file`` read rather than made.

    A case is a function at the top of a module, or a ``partial`` of one.
    """
    rows = [json.loads(line) for line in _lines(file)]
    done = {row["case"] for row in rows}
    rows = [row for row in rows if only in row["case"]]
    wanted = [name for name in cases if only in name and name not in done]
    workers = min(len(os.sched_getaffinity(0)), max(1, len(wanted)))
    # In workers: no bars beside that of the cases, and one thread, also of numpy.
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        running = {pool.submit(_rows, name, cases[name]): name for name in wanted}
        progress = tqdm(as_completed(running), total=len(running), desc="cases", unit="case")
        for future in progress:
            progress.set_postfix_str(running[future])
            if error := future.exception():  # the others go on, and this one is run again
                progress.write(f"{running[future]}: {type(error).__name__}: {error}")
                continue
            rows += future.result()
            if file:
                with file.open("a") as out:
                    out.writelines(json.dumps(row) + "\n" for row in future.result())
    return rows


def check_complete(cases: Cases, only: str, done: Collection[str]) -> None:
    """Exit with an error that names the cases of ``run`` that left no rows."""
    if missing := [name for name in cases if only in name and name not in done]:
        raise SystemExit(f"no rows of {', '.join(missing)}: run the command again")


# ------------------------------------------------------------------------------------- internals
def _rows(name: str, case: Callable[[], Iterable[Row]]) -> list[Row]:
    return [{"case": name} | row for row in case()]


def _lines(file: Path | None) -> list[str]:
    return file.read_text().splitlines() if file and file.is_file() else []
