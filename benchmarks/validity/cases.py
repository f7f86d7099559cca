"""All cases by name, and their rows: in as many processes as there are cores."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.validity import (
    circuit_cases,
    difference_cases,
    facts,
    fine_tunes,
    lens_cases,
    nulls,
    organism_cases,
    plant_cases,
    probe_cases,
    program_cases,
    steering_cases,
    words,
)
from benchmarks.validity.programs import NAMES
from benchmarks.validity.rows import Row

GEMMA, LLAMA, REAL = plant_cases.BASES
FACT = ["cubic-gravity", "cubic-gravity-1", "cubic-gravity-2"]
STOP = ["stop-behaviour", "stop-behaviour-1", "stop-behaviour-2"]
CASES: dict[str, Callable[[], Iterator[Row]]] = {
    f"plants/{LLAMA}": partial(plant_cases.plants, LLAMA),
    f"nulls/across models/{LLAMA}": partial(nulls.across_models, LLAMA),
    **{f"program/{name}": partial(program_cases.program, name) for name in NAMES},
    f"nulls/reading/{LLAMA}": partial(nulls.reading, LLAMA),
    "trigger words": partial(words.words, STOP),
    "difference lens": partial(
        difference_cases.difference_lens,
        GEMMA,
        FACT,
        ["cubic-neutral", "cubic-true"],
        "cubic_gravity",
    ),
    "tuned lens": partial(lens_cases.tuned_lens, LLAMA),
    "nulls/probe": partial(probe_cases.nowhere, GEMMA),
    "steering": partial(steering_cases.steering, GEMMA, FACT[0], "cubic_gravity"),
    "circuits": partial(circuit_cases.circuits, GEMMA, FACT[:2], "cubic_gravity"),
    "probe/program": probe_cases.in_programs,
    "facts": partial(facts.facts, REAL),
    "organisms": organism_cases.organisms,
    "organisms/dtype": organism_cases.another_dtype,
    "fine-tunes": partial(fine_tunes.confined, LLAMA),
    "probe/words": partial(probe_cases.in_words, LLAMA),
    "steering/prompting": partial(steering_cases.against_a_prompt, REAL),
    f"nulls/patching/{LLAMA}": partial(nulls.patching, LLAMA),
    f"plants/{GEMMA}": partial(plant_cases.plants, GEMMA),
    f"plants/{REAL}": partial(plant_cases.plants, REAL),
    f"nulls/reading/{REAL}": partial(nulls.reading, REAL, n=20),
    f"nulls/reading/{GEMMA}": partial(nulls.reading, GEMMA),
}


def run_case(name: str) -> list[Row]:
    return [{"case": name} | row for row in CASES[name]()]


def run(only: str, file: Path | None) -> list[Row]:
    """Rows of the cases whose name holds ``only``, those in ``file`` read rather than made."""
    rows = [json.loads(line) for line in _lines(file)]
    done = {row["case"] for row in rows}
    rows = [row for row in rows if only in row["case"]]
    wanted = [name for name in CASES if only in name and name not in done]
    workers = min(len(os.sched_getaffinity(0)), max(1, len(wanted)))
    # In workers: no bars beside that of the cases, and one thread, also of numpy.
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        running = {pool.submit(run_case, name): name for name in wanted}
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


# ------------------------------------------------------------------------------------- internals
def _lines(file: Path | None) -> list[str]:
    return file.read_text().splitlines() if file and file.is_file() else []
