"""Activation patching: which activations, moved from one run to another, move the decision?

Within a model, from a counterfactual prompt that asks for the other answer. *Denoising* runs the
counterfactual and writes in the prompt's activations: what restores the decision is sufficient for
it. *Noising* runs the prompt and writes in the counterfactual's: what breaks the decision is
necessary for it. Across models, from another fine-tune of the same base on the same prompt: what
carries the source's behaviour over is where the two fine-tunes differ. Ablation writes in zero or a
mean. One unit is patched at a time; all of them together take about three forward passes.

Sources: Meng et al., "Locating and Editing Factual Associations in GPT", arXiv:2202.05262;
Heimersheim and Nanda, "How to use and interpret activation patching", arXiv:2404.15255; Prakash et
al., "Fine-Tuning Enhances Existing Mechanisms", arXiv:2402.14811 (across models); Nanda,
"Attribution patching", 2023, and Syed et al., arXiv:2310.10348 (the gradient estimate).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.loading import Models
from interp_kit.passes import shared_passes
from interp_kit.patching.experiments import (
    Experiment,
    Replacement,
    ablation_experiments,
    components_between,
    counterfactual_experiment,
    cross_model_experiment,
    identity_experiment,
)
from interp_kit.patching.patches import EMBEDDING, Patch, Place, Unit, unit_patches
from interp_kit.patching.positions import (
    Direction,
    Positions,
    aimed,
    corresponding,
    first_difference,
    position_sets,
)
from interp_kit.patching.recording import gradients, moved, recorded
from interp_kit.patching.scores import Metric
from interp_kit.patching.table import outcomes, position_column
from interp_kit.prompts import Prompt, require_prompts


def activation_patching(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    *,
    unit: Unit = "component",
    positions: Positions = "all",
    directions: Sequence[Direction] = ("denoise", "noise"),
    metric: Metric = "decision",
    layer: int | None = None,
) -> pd.DataFrame:
    """The decision with one unit patched from the counterfactual prompt, for every unit.

    ``unit``: "component" is every head (its ``z``: truly one head under grouped-query attention)
    and every MLP; "head", "mlp_out", "attn_out", "resid_pre", "resid_mid" and "resid_post" are
    these alone, "neuron" those of one ``layer``. ``positions``: "all" at once; "each" by itself,
    from the first in which the prompts differ (before it nothing can change) to the one where the
    answers part, their shared tokens included; "decision", only that one; "segments", the named
    parts of the prompt, each at once. ``metric`` "kl": the divergence in nats of the next-token
    distribution where the answers part from the unpatched run's, instead of the decision.

    Returns one row for each direction, prompt and patch: ``direction prompt group component layer
    head neuron pos segment``, with -1 for what does not apply; ``baseline`` and ``source``, the
    values of the run that is patched and of the run that is copied from; ``value``, after patching;
    ``change`` = value - baseline, all in nats; ``recovered_fraction`` = change / (source -
    baseline), missing where those two differ by less than 0.01; ``effect_size`` = |change| /
    |baseline|; and ``flipped``, whether the likelier answer changed.

    Raises ``InputError`` for a prompt without counterfactual or with one whose positions do not
    correspond, for a unit, layer or segment that does not exist, and for a prompt that does not fit
    into memory.
    """
    patches = unit_patches(bridge, unit, layer=layer)
    tables = []
    how: dict[str, Any] = {"metric": metric, "positions": positions}
    with shared_passes():  # both directions need the same two runs
        for direction, prompt in aimed(prompts, directions):
            experiment = counterfactual_experiment(bridge, prompt, _places(patches), **how)
            table = _sweep(experiment, patches, positions, start=first_difference(prompt))
            tables.append(table.assign(direction=direction))
    return _finished(tables)


def cross_model_patching(
    models: Models,
    source: str,
    target: str,
    prompts: Sequence[Prompt],
    *,
    unit: Unit = "component",
    positions: Positions = "all",
    metric: Metric = "decision",
    layer: int | None = None,
) -> pd.DataFrame:
    """The decision of model ``target`` with one unit patched from model ``source``, same prompt.

    Options and columns are those of ``activation_patching``; ``direction`` is "source -> target".
    A head is patched with what it writes into the residual stream (its ``z`` and its share of the
    source's output projection). Between models that share no base the unit "component" has the
    embedding as well (``L0_RESID_PRE``). A model into itself changes nothing, exactly; neither does
    anything below the first layer in which the two differ: it is known to be 0, and not computed.

    Raises ``InputError`` unless the two are of one architecture and vocabulary, and as
    ``activation_patching``.
    """
    require_prompts(prompts)
    models.require_comparable(source, target)
    patches = unit_patches(models.switch(target), unit, layer=layer)
    if unit == "component" and layer is None:
        patches = components_between(models, [(source, target)])
    tables = []
    name = f"{models.title(source)} -> {models.title(target)}"
    for prompt in tqdm(prompts, desc=name, unit="prompt", leave=False):
        experiment = cross_model_experiment(
            models, source, target, prompt, _places(patches), metric=metric, positions=positions
        )
        table = _sweep(experiment, patches, positions)
        tables.append(table.assign(direction=f"{source} -> {target}"))
    return _finished(tables)


def ablation(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    *,
    replacement: Replacement,
    unit: Unit = "component",
    positions: Positions = "all",
    metric: Metric = "decision",
    layer: int | None = None,
) -> pd.DataFrame:
    """The decision with one unit replaced by zero, or by its mean over all prompts and positions.

    Options and columns are those of ``activation_patching``; ``direction`` is the replacement, and
    ``source`` and ``recovered_fraction`` are missing, since no run has these activations.
    """
    require_prompts(prompts)
    patches = unit_patches(bridge, unit, layer=layer)
    experiments = ablation_experiments(
        bridge, prompts, _places(patches), replacement=replacement, metric=metric
    )
    progress = tqdm(experiments, desc=f"{replacement} ablation", unit="prompt", leave=False)
    tables = [_sweep(experiment, patches, positions) for experiment in progress]
    return _finished([table.assign(direction=replacement) for table in tables])


def attribution_patching(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    *,
    unit: Unit = "component",
    positions: Positions = "all",
    directions: Sequence[Direction] = ("denoise", "noise"),
    layer: int | None = None,
) -> pd.DataFrame:
    """A first-order estimate of ``activation_patching``: change ~ (source - target) . gradient.

    The gradient of the decision is that of the run that is patched; one backward pass for all
    units. Columns as in ``activation_patching``. It is a screen, not a measurement: compare it with
    the exact values before believing it. Prompts whose answers differ in more than their last token
    are estimated for the first token in which they differ.
    """
    patches = unit_patches(bridge, unit, layer=layer)
    tables = []
    places = _places(patches)
    with shared_passes():
        for direction, prompt in aimed(prompts, directions):
            experiment = counterfactual_experiment(bridge, prompt, places, positions=positions)
            located = _located(prompt, patches, positions, first_difference(prompt))
            changes = _estimates(bridge, prompt, [patch for _, patch in located], positions)
            table = _table(experiment, located, experiment.baseline + changes)
            tables.append(table.assign(direction=direction))
    return _finished(tables)


def identity_patch_error(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> float:
    """Largest change of a decision, in nats, when a prompt is patched into itself: should be 0.

    Every head and MLP, and the residual stream at eight positions in each layer, each on one of the
    prompts in turn; from the first position in which prompt and counterfactual differ, as patches
    between the two, but computed in full: this is the noise floor of patching.
    """
    heads_and_mlps, stream = unit_patches(bridge, "component"), unit_patches(bridge, "resid_pre")
    units = [(patch, None) for patch in heads_and_mlps]
    units += [(patch, eighth / 8) for eighth in range(8) for patch in stream]
    worst = 0.0
    for i, prompt in enumerate(prompts[: len(units)]):
        start, end = first_difference(prompt), len(prompt.branch)
        patch_sets = []
        for patch, at in units[i :: len(prompts)]:
            one = start if at is None else start + int(at * (end - start))
            where = range(start, end) if at is None else [one]
            patch_sets.append(frozenset([replace(patch, positions=tuple(where))]))
        experiment = identity_experiment(bridge, prompt, _places([*heads_and_mlps, *stream]))
        values = experiment.values(patch_sets, start=start)
        worst = max(worst, float((values - values[0]).abs().max()))
    return worst


def transplant_error(models: Models, source: str, target: str, prompts: Sequence[Prompt]) -> float:
    """How far ``target`` with all of ``source``'s components is from ``source``, in nats.

    Adapters on one base have the same embedding and norms: with all heads and MLPs nothing is left,
    and the error should be 0. Otherwise the embedding is moved too, attention is moved as a whole
    (the norm and bias after it belong to no head), and the comparison is with ``target`` reading
    the final residual stream of ``source``: all together have to make that.
    """
    bridge, shared = models.switch(target), models.shares_base(source, target)
    components = unit_patches(bridge, "component")
    stream = unit_patches(bridge, "resid_post", layer=bridge.cfg.n_layers - 1)
    if not shared:
        whole = [*unit_patches(bridge, "attn_out"), *unit_patches(bridge, "mlp_out")]
        components = [EMBEDDING, *whole]
    worst = 0.0
    for prompt in prompts:
        places = _places([*components, *stream])
        experiment = cross_model_experiment(models, source, target, prompt, places)
        made, right = experiment.values([frozenset(components), frozenset(stream)])[1:].tolist()
        worst = max(worst, abs(made - (experiment.source_value if shared else right)))
    return worst


@torch.no_grad()
def attention_patterns(
    bridge: TransformerBridge, prompt: Prompt, heads: Sequence[tuple[int, int]]
) -> Float[Tensor, "head pos pos"]:
    """Attention of each (layer, head) on ``prompt.branch``, up to where the answers part.

    Row = attending position, column = attended to; the last row is where the decision is read.
    """
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda pattern, hook: kept.update({layer: pattern[0]})

    bridge.run_with_hooks(
        torch.tensor([prompt.branch], device=bridge.cfg.device),
        fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", keep(layer)) for layer, _ in heads],
    )
    return torch.stack([kept[layer][head] for layer, head in heads]).float().cpu()


# ------------------------------------------------------------------------------------- internals
def _places(patches: Sequence[Patch]) -> list[Place]:
    return list(dict.fromkeys(patch.place for patch in patches))


def _located(
    prompt: Prompt, patches: Sequence[Patch], positions: Positions, start: int
) -> list[tuple[str, Patch]]:
    """(segment, patch) for every patch at every position asked for."""
    where = position_sets(prompt, positions, start=start)
    return [(name, replace(patch, positions=at)) for patch in patches for name, at in where]


def _sweep(
    experiment: Experiment, patches: Sequence[Patch], positions: Positions, *, start: int = 0
) -> pd.DataFrame:
    located = _located(experiment.prompt, patches, positions, start)
    values = experiment.values([frozenset([patch]) for _, patch in located])[1:]
    return _table(experiment, located, values.numpy())


def _table(
    experiment: Experiment, located: Sequence[tuple[str, Patch]], values: np.ndarray
) -> pd.DataFrame:
    patches = [patch for _, patch in located]
    return outcomes(experiment, values).assign(
        component=[p.component for p in patches],
        layer=[p.layer for p in patches],
        head=[-1 if p.head is None else p.head for p in patches],
        neuron=[-1 if p.neuron is None else p.neuron for p in patches],
        pos=[position_column(p.positions) for p in patches],
        segment=[segment for segment, _ in located],
    )


def _finished(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    table = pd.concat(tables, ignore_index=True)
    table["effect_size"] = (table.change / table.baseline).abs().where(table.baseline != 0, np.nan)
    columns = ["direction", "prompt", "group", "component", "layer", "head", "neuron", "pos"]
    columns += ["segment", "baseline", "source", "value", "change", "recovered_fraction"]
    return table.loc[:, [*columns, "effect_size", "flipped"]]


def _estimates(
    bridge: TransformerBridge, prompt: Prompt, patches: Sequence[Patch], positions: Positions
) -> Float[np.ndarray, "patch"]:
    """(source - target) . gradient of the target's decision, summed over what is written."""
    assert prompt.counterfactual is not None
    places = _places(patches)
    here = recorded(bridge, prompt.branch, places)
    there = recorded(bridge, prompt.counterfactual + prompt.shared, places)
    at = [*corresponding(prompt, positions), *range(len(prompt.counterfactual), there.length)]
    slopes = gradients(bridge, prompt.branch, prompt.branch_ids, places)
    shares: dict[Place, np.ndarray] = {}
    for place in places:
        share = (moved(there, here, place, at) - here.activations[place]) * slopes[place]
        shares[place] = (share if place[0] == "neuron" else share.sum(-1)).cpu().numpy()
    return np.array([_picked(shares[patch.place], patch).sum() for patch in patches])


def _picked(share: np.ndarray, patch: Patch) -> np.ndarray:
    share = share if patch.unit is None else share[:, patch.unit]
    return share if patch.positions is None else share[list(patch.positions)]
