"""The methods that are scored: each gives every component a score, the larger the surer.

Between two models: which components of the fine-tune make its decisions differ from the base's?
Within a compiled program: which components does its answer depend on?
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.validity.programs import Intervention
from benchmarks.validity.scores import Scores
from interp_kit.analyses.activation_patching import (
    ablation,
    activation_patching,
    cross_model_patching,
)
from interp_kit.analyses.attribution import (
    direct_logit_attribution,
    head_outputs,
    record_last,
)
from interp_kit.analyses.attribution_patching import (
    attribution_patching,
    cross_model_attribution_patching,
    screen,
)
from interp_kit.analyses.causal_tracing import causal_trace
from interp_kit.analyses.circuits import find_circuit
from interp_kit.analyses.lens import logit_lens
from interp_kit.analyses.weights import layer_swap
from interp_kit.loading import Models
from interp_kit.passes import residuals
from interp_kit.patching.experiments import components_between, cross_model_experiment
from interp_kit.patching.patches import unit_patches
from interp_kit.patching.positions import Positions
from interp_kit.patching.table import places_of
from interp_kit.prompts import Prompt
from interp_kit.statistics import paired_difference

Method = Callable[[Models, str, str, Sequence[Prompt]], Scores]


def by_cross_model_patching(
    models: Models,
    base: str,
    tuned: str,
    prompts: Sequence[Prompt],
    *,
    positions: Positions = "all",
) -> Scores:
    """|mean change| of the base's decision by the fine-tune's component."""
    return _sizes(cross_model_patching(models, tuned, base, prompts, positions=positions))


def by_own_weights(models: Models, base: str, tuned: str, prompts: Sequence[Prompt]) -> Scores:
    """|mean change| of the base's decision by what the tuned component makes of its stream."""
    return _sizes(cross_model_patching(models, tuned, base, prompts, inputs="target"))


def by_attribution_patching(
    models: Models,
    base: str,
    tuned: str,
    prompts: Sequence[Prompt],
    *,
    positions: Positions = "all",
) -> Scores:
    """The same, estimated from one gradient."""
    return _sizes(
        cross_model_attribution_patching(models, tuned, base, prompts, positions=positions)
    )


def by_screening(models: Models, base: str, tuned: str, prompts: Sequence[Prompt]) -> Scores:
    """What 04 does with positions "screened": a gradient chooses twenty, these are patched."""
    estimated = cross_model_attribution_patching(models, tuned, base, prompts)
    chosen = screen(estimated, sample=0)
    exact = cross_model_patching(models, tuned, base, prompts, among=list(chosen.component))
    return dict.fromkeys(estimated.component, 0.0) | _sizes(exact)


def by_circuit(models: Models, base: str, tuned: str, prompts: Sequence[Prompt]) -> Scores:
    """Members of the circuit that recovers most of the effect, in their order; 0 for all others."""
    candidates = components_between(models, [(tuned, base)])
    places = places_of(candidates)
    experiments = [cross_model_experiment(models, tuned, base, p, places) for p in prompts]
    found = find_circuit(experiments, candidates)
    members = found.components if found else []
    return dict.fromkeys((patch.component for patch in candidates), 0.0) | {
        component: 1 / (1 + order) for order, component in enumerate(members)
    }


def by_direct_attribution(
    models: Models, base: str, tuned: str, prompts: Sequence[Prompt]
) -> Scores:
    """|mean difference| of direct logit attribution."""
    after = direct_logit_attribution(models.switch(tuned), prompts)
    before = direct_logit_attribution(models.switch(base), prompts)
    change = after.assign(change=after.value - before.value)
    return _sizes(change.query("kind in ['head', 'mlp']"))


def by_activation_difference(
    models: Models, base: str, tuned: str, prompts: Sequence[Prompt]
) -> Scores:
    """The size of the difference of what a component writes, where the answers part."""
    after, before = (_written(models, name, prompts) for name in (tuned, base))
    return {
        node: float(np.linalg.norm(after[node] - before[node], axis=-1).mean()) for node in after
    }


def by_weight_difference(
    models: Models, base: str, tuned: str, prompts: Sequence[Prompt]
) -> Scores:
    """The Frobenius norm of the change of a component's weights; of shared keys, for every head."""
    bridge = models.switch(tuned)
    n_heads = bridge.cfg.n_heads
    n_keys = bridge.cfg.n_key_value_heads or n_heads
    squares = {
        node: 0.0
        for layer in range(bridge.cfg.n_layers)
        for node in [*(f"L{layer}H{head}" for head in range(n_heads)), f"L{layer}_MLP"]
    }
    for layer, module, change, _ in models.weight_changes(tuned):
        part = module.split(".")[-1]
        if module.startswith("mlp"):
            squares[f"L{layer}_MLP"] += float(change.norm()) ** 2
            continue
        rows = change.T if part == "o_proj" else change
        groups = n_keys if part in ("k_proj", "v_proj") else n_heads
        own = rows.split(len(rows) // groups)
        for head in range(n_heads):
            squares[f"L{layer}H{head}"] += float(own[head * groups // n_heads].norm()) ** 2
    return {node: value**0.5 for node, value in squares.items()}


def by_chance(models: Models, base: str, tuned: str, prompts: Sequence[Prompt]) -> Scores:
    """A random order, the same for a fine-tune every time."""
    rng = np.random.default_rng(list(Path(tuned).name.encode()))
    nodes = [patch.component for patch in unit_patches(models.switch(base), "component")]
    return dict(zip(nodes, rng.permutation(len(nodes)).astype(float)))


COMPONENTS: dict[str, Method] = {
    "cross-model patching": by_cross_model_patching,
    "cross-model patching, last position": partial(by_cross_model_patching, positions="decision"),
    "attribution patching": by_attribution_patching,
    "attribution patching, last position": partial(by_attribution_patching, positions="decision"),
    "cross-model patching, own weights": by_own_weights,
    "screened patching": by_screening,
    "circuit": by_circuit,
    "direct logit attribution": by_direct_attribution,
    "activation difference": by_activation_difference,
    "weight difference": by_weight_difference,
    "random order": by_chance,
}


# ----------------------------------------------------------------- between two models, by layer
def by_lens(models: Models, base: str, tuned: str, prompts: Sequence[Prompt]) -> Scores:
    """What each block adds to the difference of the two decisions, as the logit lens reads it."""
    tables = [logit_lens(models.switch(name), prompts) for name in (tuned, base)]
    gap = paired_difference(*tables, by=["prompt", "layer"]).groupby("layer").value.mean()
    return _layers(gap.diff().dropna())


def by_delta_norm(models: Models, base: str, tuned: str, prompts: Sequence[Prompt]) -> Scores:
    """||h_tuned - h_base|| / ||h_base|| after each block: its largest is a Δ-norm's peak."""
    after, before = (residuals(models.switch(name), prompts) for name in (tuned, base))
    relative = (after - before).norm(dim=-1) / before.norm(dim=-1)
    return _layers(pd.Series(relative.mean(0)[1:].numpy()))


def by_delta_norm_rise(models: Models, base: str, tuned: str, prompts: Sequence[Prompt]) -> Scores:
    """How much that norm rises with each block: its largest is where a Δ begins."""
    norm = by_delta_norm(models, base, tuned, prompts)
    return dict(zip(norm, np.diff([0.0, *norm.values()])))


def by_layer_swap(models: Models, base: str, tuned: str, prompts: Sequence[Prompt]) -> Scores:
    """|mean change| of the base's decision by the fine-tune's weights in one layer."""
    table = layer_swap(models, tuned, base, prompts)
    return _layers(table.groupby("layer").change.mean())


def by_causal_tracing(models: Models, base: str, tuned: str, prompts: Sequence[Prompt]) -> Scores:
    """Where a trace from the counterfactual differs most between the two models."""
    how: dict[str, Any] = {"sites": ("block",), "positions": "decision", "directions": ("noise",)}
    tables = [causal_trace(models.switch(name), prompts, **how) for name in (tuned, base)]
    changed = paired_difference(*tables, by=["prompt", "layer"], column="change")
    return _layers(changed.groupby("layer").change.mean())


LAYERS: dict[str, Method] = {
    "logit lens, largest step": by_lens,
    "Δ-norm, peak": by_delta_norm,
    "Δ-norm, largest rise": by_delta_norm_rise,
    "layer swap": by_layer_swap,
    "causal tracing": by_causal_tracing,
}


# ---------------------------------------------------------------------------- within one program
def by_patching(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> Scores:
    """The largest |change| of a decision by the counterfactual's component."""
    return _largest(activation_patching(bridge, prompts, directions=["noise"]))


def by_zero_ablation(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> Scores:
    return _largest(ablation(bridge, prompts, replacement="zero"))


def by_mean_ablation(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> Scores:
    return _largest(ablation(bridge, prompts, replacement="mean"))


def by_gradient(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> Scores:
    """``by_patching``, estimated from one gradient."""
    return _largest(attribution_patching(bridge, prompts, directions=["noise"]))


def by_attribution(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> Scores:
    """The largest |share| of a decision that a component writes itself."""
    table = direct_logit_attribution(bridge, prompts).query("kind in ['head', 'mlp']")
    return _largest(table.assign(change=table.value))


# Each with the intervention whose truth it is scored against.
IN_PROGRAMS: dict[str, tuple[Callable[..., Scores], Intervention]] = {
    "zero ablation": (by_zero_ablation, "zero"),
    "mean ablation": (by_mean_ablation, "mean"),
    "activation patching": (by_patching, "resample"),
    "attribution patching": (by_gradient, "resample"),
    "direct logit attribution": (by_attribution, "resample"),
}


# ------------------------------------------------------------------------------------- internals
def _largest(table: pd.DataFrame) -> dict[str, float]:
    return table.change.abs().groupby(table.component, sort=False).max().to_dict()


def _layers(values: pd.Series) -> Scores:
    return {f"L{layer}": abs(float(value)) for layer, value in values.items()}


def _sizes(table: pd.DataFrame) -> dict[str, float]:
    return table.groupby("component", sort=False).change.mean().abs().to_dict()


def _written(models: Models, name: str, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """What every component adds to the stream where the answers part, by prompt."""
    bridge = models.switch(name)
    cache = record_last(bridge, [p.branch for p in prompts])
    written = {}
    for layer in range(bridge.cfg.n_layers):
        for head, output in enumerate(head_outputs(bridge, layer, cache).unbind(1)):
            written[f"L{layer}H{head}"] = output.numpy()
        written[f"L{layer}_MLP"] = cache[f"blocks.{layer}.hook_mlp_out"].numpy()
    return written
