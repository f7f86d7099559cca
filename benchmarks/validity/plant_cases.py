"""Planted edits as cases: what every method says of fine-tunes whose cause is known.

*hit@1*: the first component (or layer) is an edited one; of several first ones, their share.
*AUROC* and *average precision* of the edited ones, *recall at 1 %* false positives. *forbidden
effect*: the largest score, relative to the largest of all, of components that compute exactly what
they did.
*layer error*: how many layers the first one is off. *|cos|* of a direction with the planted one.
*CPR*, *CMD*: how much of the effect the first components of a ranking carry.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.controls import GLAD
from benchmarks.validity.methods import COMPONENTS, LAYERS
from benchmarks.validity.plants import Plant, drawn_plants, planted, several, towards_answers
from benchmarks.validity.rows import Row, row
from benchmarks.validity.scores import (
    Scores,
    areas,
    auroc,
    average_precision,
    check_truth,
    hit_at_1,
    recall_at,
)
from interp_kit import encode_scenario, load_model, load_scenario
from interp_kit.analyses.differences import first_component
from interp_kit.loading import Models
from interp_kit.passes import residuals, shared_passes
from interp_kit.patching.experiments import components_between, cross_model_experiment
from interp_kit.patching.table import places_of, recovered_fraction
from interp_kit.prompts import Prompt, encode

BASES = ["tiny-gemma2", "tiny-llama", "smollm2-plain"]
PROMPTS = 8
STRENGTHS = (0.05, 0.1, 1.0)  # nats, beside .5, for a power curve
NUMBERS = {  # heads and MLPs of .5 nats, seeds of the traps
    "tiny-llama": (20, 5, 3),
    "tiny-gemma2": (12, 4, 2),
    "smollm2-plain": (6, 2, 1),
}
CURVE = "tiny-llama"
# A real model gets four prompts, and goes without what takes ten seconds an edit and more.
TOO_SLOW = ("cross-model patching", "screened patching", "circuit", "causal tracing")
SHARES = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)  # of all components, for CPR and CMD
RANKED = (
    "cross-model patching",
    "cross-model patching, own weights",
    "attribution patching",
    "direct logit attribution",
    "activation difference",
    "weight difference",
    "random order",
)


def prompts_of(base: str) -> list[Prompt]:
    """Prompts with one pair of answers, and counterfactuals that ask for the other."""
    bridge = load_model(base, device="cpu")
    if base.startswith("tiny-"):
        return encode_scenario(bridge, load_scenario("cubic_gravity"))[:PROMPTS]
    return glad_prompts(bridge)[: PROMPTS // 2]


def glad_prompts(bridge: TransformerBridge) -> list[Prompt]:
    """Happy beginnings, glad against sad; the counterfactuals are sad ones."""
    return [
        encode(
            bridge,
            text.format(one),
            positive=" glad",
            negative=" sad",
            id=str(i),
            counterfactual=text.format(two),
        )
        for i, (text, one, two) in enumerate(GLAD)
    ]


def plants_of(base: str) -> list[Plant]:
    bridge = load_model(base, device="cpu")
    heads, mlps, seeds = NUMBERS[base]
    made = drawn_plants(bridge, heads=heads, mlps=mlps, nats=[0.5], seed=0)
    if base == CURVE:
        made += drawn_plants(bridge, heads=6, mlps=0, nats=STRENGTHS, seed=1)
    return made + [p for seed in range(seeds) for p in several(bridge, nats=1.0, seed=seed)]


def plants(base: str) -> Iterator[Row]:
    wanted, prompts = plants_of(base), prompts_of(base)
    with tempfile.TemporaryDirectory() as folder:
        models, kept = planted(base, wanted, prompts, Path(folder))
        if len(kept) < len(wanted):
            left = len(wanted) - len(kept)
            print(f"{base}: {left} of {len(wanted)} plants reach their size at no strength")
        for name, plant in tqdm(kept.items(), desc=f"{base}, planted edits", unit="plant"):
            yield from score(models, base, name, plant, prompts)


def score(
    models: Models, base: str, name: str, plant: Plant, prompts: list[Prompt]
) -> Iterator[Row]:
    """Of every method, all scores of one planted edit."""
    kind = f"{plant.kind}, {plant.nats:g} nats"
    in_curve, one_layer = plant.nats in STRENGTHS, len({layer for layer, _ in plant.places}) == 1
    asked = {m: COMPONENTS[m] for m in RANKED} if in_curve and one_layer else COMPONENTS
    by_layer = LAYERS if one_layer and not in_curve else {}
    if not base.startswith("tiny-"):
        asked = {method: rank for method, rank in asked.items() if method not in TOO_SLOW}
        by_layer = {method: rank for method, rank in by_layer.items() if method not in TOO_SLOW}
    with shared_passes():
        found = {method: rank(models, base, name, prompts) for method, rank in asked.items()}
        layers = {method: rank(models, base, name, prompts) for method, rank in by_layer.items()}
        directions = _directions(models, base, name, plant, prompts)
        if plant.kind in ("split", "opposed"):
            for method, (cpr, cmd) in _areas(models, base, name, prompts, found).items():
                yield row(method, "CPR", cpr, kind=kind)
                yield row(method, "CMD", cmd, kind=kind)
    for method, own in found.items():
        check_truth(own, plant.origin, case=plant.name)
        forbidden = plant.forbidden(list(own))
        yield from component_rows(method, own, plant.origin, forbidden, kind=kind)
    for method, own in layers.items():
        error = abs(int(max(own, key=lambda layer: own[layer])[1:]) - plant.first_layer)
        yield row(method, "hit@1", hit_at_1(own, {f"L{plant.first_layer}"}), kind=kind)
        yield row(method, "layer error", error, kind=kind)
    for method, cosine in directions.items():
        yield row(method, "|cos|", cosine, kind=kind)


def component_rows(
    method: str, found: Scores, truth: set[str], forbidden: set[str], *, kind: str
) -> Iterator[Row]:
    largest = max(found.values()) or 1.0
    yield row(method, "hit@1", hit_at_1(found, truth), kind=kind)
    yield row(method, "AUROC", auroc(found, truth), kind=kind)
    yield row(method, "average precision", average_precision(found, truth), kind=kind)
    yield row(method, "recall at 1 %", recall_at(found, truth), kind=kind)
    wrong = max((found[node] / largest for node in forbidden), default=0.0)
    yield row(method, "forbidden effect", wrong, kind=kind)


# ------------------------------------------------------------------------------------- internals
def _directions(
    models: Models, base: str, name: str, plant: Plant, prompts: Sequence[Prompt]
) -> dict[str, float]:
    """|cosine| with the planted direction: in the edited layer, and after the last."""
    after, before = (residuals(models.switch(m), prompts) for m in (name, base))
    change, truth = after - before, towards_answers(models.switch(base), prompts)
    at = 1 + max(layer for layer, _ in plant.places)
    found = {
        "PCA, edited layer": first_component(change[:, at]),
        "PCA, last layer": first_component(change[:, -1]),
        "mean difference, edited layer": change[:, at].mean(0),
        "mean difference, last layer": change[:, -1].mean(0),
    }
    return {
        method: abs(float(torch.cosine_similarity(own, truth, dim=0)))
        for method, own in found.items()
    }


def _areas(
    models: Models,
    base: str,
    name: str,
    prompts: Sequence[Prompt],
    found: Mapping[str, Scores],
) -> dict[str, tuple[float, float]]:
    """CPR and CMD of each ranking: its first components are moved into the base."""
    patches = components_between(models, [(name, base)])
    experiments = [
        cross_model_experiment(models, name, base, p, places_of(patches)) for p in prompts
    ]
    counts = [round(share * len(patches)) for share in SHARES]
    sets, ranked = {}, [method for method in RANKED if method in found]
    for method in ranked:
        order = sorted(patches, key=lambda patch: -found[method][patch.component])
        sets |= {(method, n): frozenset(order[:n]) for n in counts}
    values = np.mean([e.values([*sets.values()])[1:].numpy() for e in experiments], axis=0)
    baseline = float(np.mean([e.baseline for e in experiments]))
    source = float(np.mean([e.source_value for e in experiments]))
    fractions = dict(zip(sets, recovered_fraction(values - baseline, baseline, source)))
    return {m: areas(counts, [float(fractions[m, n]) for n in counts]) for m in ranked}
