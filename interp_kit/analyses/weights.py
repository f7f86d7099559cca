"""What fine-tuning changed in the weights, and through which layers it acts.

``weight_norms``: how much each weight changed. ``layer_swap``: the decision when one layer's
weights are another model's. A large change need not matter, and a small one may: compare the two.

Source of the deltas of adapters: Hu et al., "LoRA", arXiv:2106.09685.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from tqdm import tqdm

from interp_kit.decisions import decide
from interp_kit.loading import Models
from interp_kit.passes import Replays, resumed
from interp_kit.prompts import Prompt


def weight_norms(models: Models, name: str) -> pd.DataFrame:
    """Frobenius norms of the change of every weight that fine-tuning changed: one row a weight.

    Columns: ``layer`` (-1 the embedding, ``n_layers`` the final norm and the unembedding),
    ``module`` (``self_attn.q_proj``, ``input_layernorm``), ``value`` = ||change||, and ``relative``
    = ||change|| / ||weight before||. Raises ``InputError`` for a model of which it is not known
    what it was tuned from.
    """
    rows = []
    for layer, module, change, weight in models.weight_changes(name):
        norm, whole = float(change.float().norm()), float(weight.float().norm())
        rows.append({"layer": layer, "module": module, "value": norm, "relative": norm / whole})
    return pd.DataFrame(rows, columns=["layer", "module", "value", "relative"])


def layer_swap(models: Models, source: str, target: str, prompts: Sequence[Prompt]) -> pd.DataFrame:
    """The decision of ``target`` with ``source``'s weights in one layer, for every layer.

    Between models that share no base, the embedding counts as layer -1, the final norm with the
    unembedding as layer ``n_layers``. Columns: ``direction`` ("source -> target"), ``prompt``,
    ``group``, ``layer``, ``baseline`` and ``source`` (the decisions of the two themselves),
    ``value``, ``change`` = value - baseline, in nats. Layers interact: the changes need not add up
    to source - baseline.

    Raises ``InputError`` unless the two are of one architecture and vocabulary.
    """
    models.require_comparable(source, target)
    source_value = decide(models.switch(source), prompts).value
    baseline = decide(models.switch(target), prompts).value
    tables = []
    kept: Replays = {}  # what the target's blocks give, to begin each run at the exchanged one
    for layer in tqdm(
        models.parts(target, source), desc="swapping layers", unit="layer", leave=False
    ):
        with (
            models.with_layers_from(target, source, [layer]) as bridge,
            resumed(bridge, layer - 1, kept=kept),
        ):
            table = decide(bridge, prompts)[["prompt", "group", "value"]]
        table = table.assign(layer=layer, baseline=baseline, source=source_value)
        tables.append(table.assign(change=table.value - baseline))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(direction=f"{source} -> {target}")


def nested_layer_swap(
    models: Models,
    source: str,
    target: str,
    prompts: Sequence[Prompt],
    *,
    order: Sequence[int],
    until: float = np.inf,
) -> pd.DataFrame:
    """The mean decision of ``target`` with ``source``'s weights in the first n layers of ``order``.

    Columns: ``n``, ``layer`` (the one added; -1 for none), ``decision`` in nats, and ``value``, the
    fraction of source - target that is recovered: 0 for no layer, 1 for all of them. Once ``until``
    is recovered only every fifth n is computed, and all.
    """
    goal = float(decide(models.switch(source), prompts).value.mean())
    rows: list[dict[str, float]] = []
    kept: Replays = {}
    for n in tqdm(range(len(order) + 1), desc="layers together", unit="layer", leave=False):
        recovered = any(row["value"] >= until for row in rows)
        if recovered and n % 5 and n < len(order):
            continue
        below = min(order[:n], default=models.switch(target).cfg.n_layers)
        with (
            models.with_layers_from(target, source, order[:n]) as bridge,
            resumed(bridge, below - 1, kept=kept),
        ):
            decision = float(decide(bridge, prompts).value.mean())
        first = rows[0]["decision"] if rows else decision
        value = (decision - first) / (goal - first) if goal != first else np.nan
        layer = order[n - 1] if n else -1
        rows.append({"n": n, "layer": layer, "decision": decision, "value": value})
    return pd.DataFrame(rows)
