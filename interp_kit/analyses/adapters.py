"""What a LoRA fine-tune changed in the weights, and through which layers it acts.

``lora_norms``: how much each weight changed. ``layer_swap``: the decision when one layer's adapter
is another fine-tune's. A large change need not matter, and a small one may: compare the two.

Source: Hu et al., "LoRA", arXiv:2106.09685.
"""

from collections.abc import Sequence

import pandas as pd
from tqdm import tqdm

from interp_kit.decisions import decide
from interp_kit.loading import Models
from interp_kit.prompts import Prompt


def lora_norms(models: Models, name: str) -> pd.DataFrame:
    """Frobenius norms of what the adapter adds to every weight: one row a weight.

    Columns: ``layer``, ``module`` (``self_attn.q_proj``), ``value`` = ||scale B A||, and
    ``relative`` = ||scale B A|| / ||W||. Raises ``InputError`` for a model without an adapter.
    """
    rows = []
    for layer, module, change, weight in models.adapter_weights(name):
        norm, whole = float(change.float().norm()), float(weight.float().norm())
        rows.append({"layer": layer, "module": module, "value": norm, "relative": norm / whole})
    return pd.DataFrame(rows)


def layer_swap(models: Models, source: str, target: str, prompts: Sequence[Prompt]) -> pd.DataFrame:
    """The decision of ``target`` with ``source``'s adapter in one layer, for every layer.

    Columns: ``direction`` ("source -> target"), ``prompt``, ``group``, ``layer``, ``baseline`` and
    ``source`` (the decisions of the two themselves), ``value``, ``change`` = value - baseline, in
    nats. Layers interact: the changes need not add up to source - baseline.

    Raises ``InputError`` unless both are fine-tunes of one base.
    """
    models.require_one_base(source, target)
    source_value = decide(models.switch(source), prompts).value
    baseline = decide(models.switch(target), prompts).value
    tables = []
    layers = range(models.switch(target).cfg.n_layers)
    for layer in tqdm(layers, desc="swapping layers", unit="layer", leave=False):
        with models.with_layers_from(target, source, [layer]) as bridge:
            table = decide(bridge, prompts)[["prompt", "group", "value"]]
        table = table.assign(layer=layer, baseline=baseline, source=source_value)
        tables.append(table.assign(change=table.value - baseline))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(direction=f"{source} -> {target}")


def nested_layer_swap(
    models: Models, source: str, target: str, prompts: Sequence[Prompt], *, order: Sequence[int]
) -> pd.DataFrame:
    """The mean decision of ``target`` with ``source``'s adapter in the first n layers of ``order``.

    Columns: ``n``, ``layer`` (the one added; -1 for none), ``decision`` in nats, and ``value``, the
    fraction of source - target that is recovered: 0 for no layer, 1 for all of them.
    """
    goal = float(decide(models.switch(source), prompts).value.mean())
    decisions = []
    for n in range(len(order) + 1):
        with models.with_layers_from(target, source, order[:n]) as bridge:
            decisions.append(float(decide(bridge, prompts).value.mean()))
    table = pd.DataFrame({"n": range(len(order) + 1), "layer": [-1, *order]})
    table["decision"] = decisions
    return table.assign(value=(table.decision - decisions[0]) / (goal - decisions[0]))
