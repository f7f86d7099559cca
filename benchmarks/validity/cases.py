"""All cases of the benchmark of methods, by name."""

from collections.abc import Callable, Iterator
from functools import partial

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
