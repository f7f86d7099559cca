"""One analysis across models and scenarios, and how far a bridge is from the plain model."""

from collections.abc import Callable, Sequence
from itertools import product

import pandas as pd
import torch
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.decisions import Prompt, batches, encode_scenario
from interp_kit.loading import Models
from interp_kit.specs import InputError, Scenario

Analysis = Callable[[TransformerBridge, Sequence[Prompt]], pd.DataFrame]
PairAnalysis = Callable[[Models, str, str, Sequence[Prompt]], pd.DataFrame]


def across(models: Models, scenarios: Sequence[Scenario], analysis: Analysis) -> pd.DataFrame:
    """``analysis(bridge, prompts)`` for every model and scenario, in one table.

    Adds the columns ``model`` (its title) and ``scenario``; prompts are renamed
    ``scenario/prompt``, so that they stay apart when scenarios are pooled.
    """
    tables = []
    pairs = list(product(models, scenarios))
    for name, scenario in tqdm(pairs, desc=analysis.__name__, unit="cell", leave=False):
        bridge = models.switch(name)
        table = analysis(bridge, encode_scenario(bridge, scenario))
        table = table.assign(model=models.title(name), scenario=scenario.name)
        tables.append(table.assign(prompt=scenario.name + "/" + table.prompt))
    return pd.concat(tables, ignore_index=True)


def across_pairs(
    models: Models,
    pairs: Sequence[Sequence[str]],
    scenarios: Sequence[Scenario],
    analysis: PairAnalysis,
) -> pd.DataFrame:
    """``analysis(models, source, target, prompts)`` for every pair and scenario, in one table.

    Adds the columns ``experiment`` ("source -> target", by title) and ``scenario``; prompts are
    renamed ``scenario/prompt``. Raises ``InputError`` for a pair that is not two loaded models.
    """
    for pair in pairs:
        if len(pair) != 2:
            raise InputError(f"expected pairs [source, target], got {list(pair)}")
        models.require_one_base(*pair)
    tables = []
    everything = list(product(pairs, scenarios))
    for (source, target), scenario in tqdm(everything, desc="pairs", unit="cell", leave=False):
        prompts = encode_scenario(models.switch(target), scenario)
        table = analysis(models, source, target, prompts)
        name = f"{models.title(source)} -> {models.title(target)}"
        table = table.assign(experiment=name, scenario=scenario.name)
        tables.append(table.assign(prompt=scenario.name + "/" + table.prompt))
    return pd.concat(tables, ignore_index=True)


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
