"""The methods that are scored: each gives every component a score, the larger the surer.

Between two models: which components of the fine-tune make its decisions differ from the base's?
Within a compiled program: which components does its answer depend on?
"""

from collections.abc import Callable, Sequence
from pathlib import Path

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
)
from interp_kit.loading import Models
from interp_kit.patching.patches import unit_patches
from interp_kit.prompts import Prompt

Method = Callable[[Models, str, str, Sequence[Prompt]], Scores]


def by_cross_model_patching(
    models: Models, base: str, tuned: str, prompts: Sequence[Prompt]
) -> Scores:
    """|mean change| of the base's decision by the fine-tune's component."""
    return _sizes(cross_model_patching(models, tuned, base, prompts, positions="decision"))


def by_attribution_patching(
    models: Models, base: str, tuned: str, prompts: Sequence[Prompt]
) -> Scores:
    """The same, estimated from one gradient."""
    return _sizes(
        cross_model_attribution_patching(models, tuned, base, prompts, positions="decision")
    )


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
    "attribution patching": by_attribution_patching,
    "direct logit attribution": by_direct_attribution,
    "activation difference": by_activation_difference,
    "weight difference": by_weight_difference,
    "random order": by_chance,
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
