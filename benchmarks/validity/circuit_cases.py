"""Circuits: are they the same on other prompts, and does chance pass their control?

*Jaccard*: of the circuits of every two among a hundred resamples of the prompts (bootstrap; 1 is
the same set every time; arXiv:2510.00845 reports .67 for GPT-2 and asks for .8). *random quantile*:
the share of random circuits of its size that are less faithful than the circuit, on prompts that it
was not found on. *false alarms*: random circuits that 05's rule calls better than random ones.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from benchmarks.validity.rows import YES, Row, row
from benchmarks.validity.scores import jaccard
from interp_kit import encode_scenario, load_models, load_scenario
from interp_kit.analyses.circuits import circuit_scores, find_circuit, random_circuits
from interp_kit.patching.experiments import (
    Experiment,
    components_between,
    cross_model_experiment,
)
from interp_kit.patching.table import places_of

RESAMPLES, NULLS, RANDOM = 100, 200, 99
PROMPTS = 16


def circuits(base: str, tuned: Sequence[str], scenario: str) -> Iterator[Row]:
    models = load_models([base, *tuned], device="cpu")
    for name in tuned:
        prompts = encode_scenario(models.switch(base), load_scenario(scenario))[:PROMPTS]
        candidates = components_between(models, [(name, base)])
        experiments = [
            cross_model_experiment(models, name, base, p, places_of(candidates)) for p in prompts
        ]
        half, rest = experiments[::2], experiments[1::2]
        rng, found = np.random.default_rng(0), []
        for _ in tqdm(range(RESAMPLES), desc=f"{name}, resampled circuits", unit="draw"):
            drawn = [half[i] for i in rng.integers(len(half), size=len(half))]
            circuit = find_circuit(drawn, candidates)
            found.append(circuit.components if circuit else [])
        yield row("circuit", "Jaccard", jaccard(found), kind="resampled prompts")
        circuit = find_circuit(half, candidates)
        if circuit is None:
            continue
        own = circuit_scores(rest, candidates, circuit.patches).faithfulness
        others = random_circuits(rest, candidates, circuit.patches, n=RANDOM)
        below = float((others.faithfulness < own).mean())
        yield row("circuit", "random quantile", below, kind="held-out prompts")
        yield row("circuit", "faithfulness", float(own), kind="held-out prompts")
        if name == tuned[0]:
            yield from _random_against_random(rest, candidates, circuit.patches)


def _random_against_random(
    experiments: Sequence[Experiment], candidates: Sequence, circuit: Sequence
) -> Iterator[Row]:
    """Every one of so many random circuits, by the rule of 05, against others that were drawn."""
    drawn = random_circuits(experiments, candidates, circuit, n=NULLS + RANDOM, seed=1)
    null, own = drawn[:RANDOM], drawn[RANDOM:]
    for _, one in own.iterrows():
        p = (1 + (null >= one[null.columns]).sum()) / (RANDOM + 1)
        yield row("circuit", "false alarms", (p < 0.05).all(), kind=YES)
        yield row("circuit", "false alarms", p.faithfulness < 0.05, kind="faithfulness alone")
