"""One analysis across models and scenarios, and how far a bridge is from the plain model."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.batching import batches
from interp_kit.loading import Models
from interp_kit.passes import shared_passes
from interp_kit.prompts import Prompt, encode_scenario
from interp_kit.specs import InputError, Scenario
from interp_kit.statistics import effects, settled

Analysis = Callable[[TransformerBridge, Sequence[Prompt]], pd.DataFrame]
PairAnalysis = Callable[[Models, str, str, Sequence[Prompt]], Sequence[pd.DataFrame]]


def across(
    models: Models, scenarios: Sequence[Scenario], *analyses: Analysis
) -> tuple[pd.DataFrame, ...]:
    """``analysis(bridge, prompts)`` for every model and scenario: one table for each analysis.

    The analyses share forward passes. Adds the columns ``model`` (its title) and ``scenario``, and
    beside ``layer`` its relative ``depth``, 0 for the embedding and 1 for the last block; prompts
    are renamed ``scenario/prompt``, so that they stay apart when scenarios are pooled.
    """
    tables: list[list[pd.DataFrame]] = [[] for _ in analyses]
    pairs = list(product(models, scenarios))
    for name, scenario in tqdm(pairs, desc="models", unit="cell", leave=False):
        bridge = models.switch(name)
        prompts = encode_scenario(bridge, scenario)
        with shared_passes():
            for own, analysis in zip(tables, analyses):
                table = analysis(bridge, prompts)
                table = table.assign(model=models.title(name), scenario=scenario.name)
                if "layer" in table:
                    table["depth"] = (table.layer + 1) / bridge.cfg.n_layers
                own.append(table.assign(prompt=scenario.name + "/" + table.prompt))
    return tuple(pd.concat(own, ignore_index=True) for own in tables)


def across_pairs(
    models: Models,
    pairs: Sequence[Sequence[str]],
    scenarios: Sequence[Scenario],
    analysis: PairAnalysis,
) -> tuple[pd.DataFrame, ...]:
    """``analysis(models, source, target, prompts)`` for every pair and scenario.

    The analysis gives one or several tables; as many are returned. Adds the columns ``experiment``
    ("source -> target", by title) and ``scenario``; prompts are renamed ``scenario/prompt``, so
    that they stay apart. Raises ``InputError`` for a pair that is not two loaded models.
    """
    for pair in pairs:
        if len(pair) != 2:
            raise InputError(f"expected pairs [source, target], got {list(pair)}")
        models.require_comparable(*pair)
    tables: dict[tuple[int, int], list[pd.DataFrame]] = {}
    everything = list(product(enumerate(scenarios), enumerate(pairs)))
    with shared_passes():  # a model may be part of several pairs
        for (j, scenario), (i, (source, target)) in tqdm(
            everything, desc="pairs", unit="cell", leave=False
        ):
            prompts = encode_scenario(models.switch(target), scenario)
            name = f"{models.title(source)} -> {models.title(target)}"
            tables[i, j] = [
                table.assign(
                    experiment=name,
                    scenario=scenario.name,
                    prompt=scenario.name + "/" + table.prompt,
                )
                for table in analysis(models, source, target, prompts)
            ]
    by_pair = zip(*(tables[cell] for cell in sorted(tables)))
    return tuple(pd.concat(own, ignore_index=True) for own in by_pair)


def paired_drops(
    table: pd.DataFrame,
    by: Sequence[str],
    *,
    series: str,
    first: str,
    noise_floor: float = 0.0,
    seed: int = 0,
) -> pd.DataFrame:
    """How much ``value`` drops from the series ``first`` to every other, paired by prompt.

    One row for each group of ``by`` and each other series: the ``effects`` of first - other, and
    the column ``other``.
    """
    wide = table.pivot_table(index=[*by, "prompt"], columns=series, values="value", sort=False)
    tables = []
    for other in [name for name in wide.columns if name != first]:
        drop = pd.DataFrame({"change": wide[first] - wide[other]}).reset_index()
        tables.append(effects(drop, by, noise_floor=noise_floor, seed=seed).assign(other=other))
    return pd.concat(tables, ignore_index=True)


def training_steps(names: Sequence[str]) -> list[int]:
    """The steps of checkpoints of one training: the numbers that end their names, if these ascend.

    Else 1, 2, 3 and so on, in the order given.
    """
    found = [re.search(r"(\d+)/?$", name) for name in names]
    steps = [int(match[1]) for match in found if match]
    ascend = all(a < b for a, b in pairwise(steps))
    return steps if len(steps) == len(names) and ascend else list(range(1, len(names) + 1))


def where_decided(
    lens: pd.DataFrame, summaries: pd.DataFrame | None, layers: pd.DataFrame
) -> pd.DataFrame:
    """The relative depth at which three techniques place the decision on every prompt.

    ``lens`` and ``layers`` are tables of ``across``: of ``logit_lens`` (or ``tuned_lens``) the
    first block from which the decision has its final sign and at least half its final size, and
    keeps both; of ``layer_attribution`` the block that writes most of it. ``summaries`` is the
    ``trace_summary`` of such a table of ``causal_trace``, or None: the block in which patching
    moves it most. Returns ``model prompt lens trace attribution``, from 1 / n_layers to 1; missing
    where there is nothing to place.
    """
    rows = []
    for model, own in lens.groupby("model", sort=False):
        n_layers = int(own.layer.max()) + 1
        by_layer = own[own.layer >= 0].pivot_table(index="prompt", columns="layer", values="value")
        places = pd.Series(settled(by_layer.to_numpy(), share=0.5), by_layer.index)
        peak: Mapping[Any, float] = {}
        if summaries is not None:
            peak = summaries[summaries.model == model].set_index("prompt").peak_layer.to_dict()
        blocks = layers[(layers.model == model) & (layers.layer >= 0)]
        written = blocks.groupby(["prompt", "layer"]).value.sum().abs().unstack().idxmax(axis=1)
        for prompt, layer in places.items():
            found = {"lens": layer, "trace": peak.get(prompt), "attribution": written[prompt]}
            found = {k: None if v is None else (v + 1) / n_layers for k, v in found.items()}
            rows.append({"model": model, "prompt": prompt, **found})
    return pd.DataFrame(rows, columns=["model", "prompt", "lens", "trace", "attribution"])


@torch.no_grad()
def bridge_error(
    bridge: TransformerBridge, reference: torch.nn.Module, prompts: Sequence[Prompt]
) -> float:
    """Largest difference of any logit between the bridge and the plain Hugging Face model."""
    worst = 0.0
    for index in batches([(len(p.tokens), None) for p in prompts]):
        tokens = torch.tensor([prompts[i].tokens for i in index], device=bridge.cfg.device)
        difference = bridge(tokens) - reference(tokens).logits.to(bridge.cfg.device)
        worst = max(worst, float(difference.abs().max()))
    return worst
