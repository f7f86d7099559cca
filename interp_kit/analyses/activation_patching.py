"""Activation patching: which activations, moved from one run to another, move the decision?

Within a model, from a counterfactual prompt that asks for the other answer. *Denoising* runs the
counterfactual and writes in the prompt's activations: what restores the decision is sufficient for
it. *Noising* runs the prompt and writes in the counterfactual's: what breaks the decision is
necessary for it. Across models, from another fine-tune of the same base on the same prompt: what
carries the source's behaviour over is where the two fine-tunes differ. Ablation writes in zero or a
mean. One unit is patched at a time; all of them together take about three forward passes.

Sources: Meng et al., "Locating and Editing Factual Associations in GPT", arXiv:2202.05262;
Heimersheim and Nanda, "How to use and interpret activation patching", arXiv:2404.15255; Prakash et
al., "Fine-Tuning Enhances Existing Mechanisms", arXiv:2402.14811 (across models).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.controls import likely_pairs, with_first_tokens
from interp_kit.loading import Models
from interp_kit.passes import shared_passes
from interp_kit.patching.experiments import (
    Experiment,
    Inputs,
    Replacement,
    ablation_experiments,
    components_between,
    counterfactual_experiment,
    cross_model_experiment,
    identity_experiment,
)
from interp_kit.patching.patches import EMBEDDING, Patch, Unit, unit_patches
from interp_kit.patching.positions import Direction, Positions, aimed, first_difference
from interp_kit.patching.scores import Metric
from interp_kit.patching.table import finished, located, patch_table, places_of
from interp_kit.prompts import Prompt, require_prompts
from interp_kit.specs import InputError

Item = TypeVar("Item")
PROBED_TOKENS = 16
PROBED = 4  # layers, prompts and positions on which the numerical noise is measured


def activation_patching(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    *,
    unit: Unit = "component",
    positions: Positions = "all",
    directions: Sequence[Direction] = ("denoise", "noise"),
    metric: Metric = "decision",
    layer: int | None = None,
    among: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The decision with one unit patched from the counterfactual prompt, for every unit.

    ``unit``: "component" is every head (its ``z``: truly one head under grouped-query attention)
    and every MLP; "head", "mlp_out", "attn_out", "resid_pre", "resid_mid" and "resid_post" are
    these alone, "neuron" those of one ``layer``; ``among`` keeps to components of these names, such
    as a screen chose. ``positions``: "all" at once; "each" by itself,
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
    patches = _named(unit_patches(bridge, unit, layer=layer), among)
    tables = []
    how: dict[str, Any] = {"metric": metric, "positions": positions}
    with shared_passes():  # both directions need the same two runs
        for direction, prompt in aimed(prompts, directions):
            experiment = counterfactual_experiment(bridge, prompt, places_of(patches), **how)
            table = _sweep(experiment, patches, positions, start=first_difference(prompt))
            tables.append(table.assign(direction=direction))
    return finished(tables)


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
    among: Sequence[str] | None = None,
    inputs: Inputs = "source",
) -> pd.DataFrame:
    """The decision of model ``target`` with one unit patched from model ``source``, same prompt.

    Options and columns are those of ``activation_patching``; ``direction`` is "source -> target".
    A head is patched with what it writes into the residual stream (its ``z`` and its share of the
    source's output projection). Between models that share no base the unit "component" has the
    embedding as well (``L0_RESID_PRE``). A model into itself changes nothing, exactly; neither does
    anything below the first layer in which the two differ: it is known to be 0, and not computed.

    ``inputs`` "source" moves what the source's component gives in the source's own run: what it
    does differently, whether its own weights changed or what reaches it. "target" moves what it
    makes of the target's stream: what its own weights changed, alone. A component whose weights are
    the same then changes nothing, exactly; norms and embedding belong to no component.

    Raises ``InputError`` unless the two are of one architecture and vocabulary, and as
    ``activation_patching``.
    """
    require_prompts(prompts)
    models.require_comparable(source, target)
    patches = unit_patches(models.switch(target), unit, layer=layer)
    if unit == "component" and layer is None and inputs == "source":
        patches = components_between(models, [(source, target)])
    patches = _named(patches, among)
    tables = []
    name = f"{models.title(source)} -> {models.title(target)}"
    for prompt in tqdm(prompts, desc=name, unit="prompt", leave=False):
        how: dict[str, Any] = {"metric": metric, "positions": positions, "inputs": inputs}
        experiment = cross_model_experiment(
            models, source, target, prompt, places_of(patches), **how
        )
        table = _sweep(experiment, patches, positions)
        tables.append(table.assign(direction=f"{source} -> {target}"))
    return finished(tables)


def contrast_patching(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    pairs: Int[Tensor, "prompt pair 2"],
    *,
    positions: Positions = "all",
    directions: Sequence[Direction] = ("denoise", "noise"),
    among: Sequence[str] | None = None,
) -> pd.DataFrame:
    """A control: the patches of ``activation_patching``, read for pairs of other tokens.

    ``pairs`` are two tokens each (``controls.likely_pairs``), read where the answers part. Returns
    ``direction prompt component draw change``, in nats. Inside ``shared_passes`` it costs no pass
    where ``activation_patching`` ran before with the same options.
    """
    patches, tables = _named(unit_patches(bridge, "component"), among), []
    places = places_of(patches)
    numbers = {prompt.id: i for i, prompt in enumerate(prompts)}
    for direction, prompt in aimed(with_first_tokens(prompts), directions):
        experiment = counterfactual_experiment(bridge, prompt, places, positions=positions)
        own, start = pairs[numbers[prompt.id]], first_difference(prompt)
        table = _contrasts(experiment, patches, own, positions, start=start)
        tables.append(table.assign(direction=direction))
    return pd.concat(tables, ignore_index=True)


def cross_model_contrasts(
    models: Models,
    source: str,
    target: str,
    prompts: Sequence[Prompt],
    pairs: Int[Tensor, "prompt pair 2"],
    *,
    positions: Positions = "all",
    among: Sequence[str] | None = None,
    inputs: Inputs = "source",
) -> pd.DataFrame:
    """A control: the patches of ``cross_model_patching``, read as in ``contrast_patching``."""
    patches, tables = components_between(models, [(source, target)]), []
    patches = [p for p in patches if inputs == "source" or p != EMBEDDING]
    patches = _named(patches, among)
    for prompt, own in zip(with_first_tokens(prompts), pairs):
        how: dict[str, Any] = {"positions": positions, "inputs": inputs}
        experiment = cross_model_experiment(
            models, source, target, prompt, places_of(patches), **how
        )
        table = _contrasts(experiment, patches, own, positions)
        tables.append(table.assign(direction=f"{source} -> {target}"))
    return pd.concat(tables, ignore_index=True)


def patching_and_control(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    pairs: Int[Tensor, "prompt pair 2"],
    **options: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``activation_patching`` and ``contrast_patching`` from the same passes, prompt by prompt.

    ``options``: ``positions``, ``directions`` and ``among`` of both.
    """
    both = []
    for i, prompt in enumerate(tqdm(prompts, desc="patching", unit="prompt", leave=False)):
        with shared_passes():
            table = activation_patching(bridge, [prompt], **options)
            both.append((table, contrast_patching(bridge, [prompt], pairs[i : i + 1], **options)))
    tables, controls = zip(*both)
    return pd.concat(tables, ignore_index=True), pd.concat(controls, ignore_index=True)


def cross_model_patching_and_control(
    models: Models,
    source: str,
    target: str,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    **options: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """As ``patching_and_control``, across models; ``options``: ``positions among inputs``.

    The control's pairs of tokens are ones that are likely in the target, drawn by ``seed``.
    """
    pairs, both = likely_pairs(models.switch(target), prompts, seed=seed), []
    name = f"{models.title(source)} -> {models.title(target)}"
    for i, prompt in enumerate(tqdm(prompts, desc=name, unit="prompt", leave=False)):
        given = models, source, target, [prompt]
        with shared_passes():
            table = cross_model_patching(*given, **options)
            both.append((table, cross_model_contrasts(*given, pairs[i : i + 1], **options)))
    tables, controls = zip(*both)
    return pd.concat(tables, ignore_index=True), pd.concat(controls, ignore_index=True)


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
        bridge, prompts, places_of(patches), replacement=replacement, metric=metric
    )
    progress = tqdm(experiments, desc=f"{replacement} ablation", unit="prompt", leave=False)
    tables = [_sweep(experiment, patches, positions) for experiment in progress]
    return finished([table.assign(direction=replacement) for table in tables])


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most or most < 2:
        return list(items[:most])
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def identity_patch_error(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> float:
    """Largest change of a decision, in nats, when a prompt is patched into itself: should be 0.

    Every head and MLP of at most ``PROBED`` layers, and the residual stream there at as many
    positions, each on one of as many prompts in turn; from the first position in which prompt and
    counterfactual differ (or the last ``PROBED_TOKENS``), as patches between the two, but computed
    in full: this is the noise floor of patching.
    """
    layers = evenly(range(bridge.cfg.n_layers), PROBED)
    prompts = evenly(prompts, PROBED)
    heads_and_mlps, stream = (
        [patch for patch in unit_patches(bridge, unit) if patch.layer in layers]
        for unit in ("component", "resid_pre")
    )
    units = [(patch, None) for patch in heads_and_mlps]
    units += [(patch, part / PROBED) for part in range(PROBED) for patch in stream]
    worst = 0.0
    for i, prompt in enumerate(prompts[: len(units)]):
        end = len(prompt.branch)
        start = max(first_difference(prompt), end - PROBED_TOKENS)
        patch_sets = []
        for patch, at in units[i :: len(prompts)]:
            one = start if at is None else start + int(at * (end - start))
            where = range(start, end) if at is None else [one]
            patch_sets.append(frozenset([replace(patch, positions=tuple(where))]))
        experiment = identity_experiment(bridge, prompt, places_of([*heads_and_mlps, *stream]))
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
        places = places_of([*components, *stream])
        experiment = cross_model_experiment(models, source, target, prompt, places)
        made, right = experiment.values([frozenset(components), frozenset(stream)])[1:].tolist()
        worst = max(worst, abs(made - (experiment.source_value if shared else right)))
    return worst


@torch.no_grad()
# ------------------------------------------------------------------------------------- internals
def _sweep(
    experiment: Experiment, patches: Sequence[Patch], positions: Positions, *, start: int = 0
) -> pd.DataFrame:
    rows = located(experiment.prompt, patches, positions, start)
    values = experiment.values([frozenset([patch]) for _, patch in rows])[1:]
    return patch_table(experiment, rows, values.numpy())


def _named(patches: Sequence[Patch], among: Sequence[str] | None) -> list[Patch]:
    if among is None:
        return list(patches)
    known = {patch.component: patch for patch in patches}
    if unknown := [name for name in among if name not in known]:
        raise InputError(
            f"unknown component {unknown[0]!r}; expected some of {', '.join([*known][:3])}, ... "
            f"{[*known][-1]}"
        )
    return [patch for name, patch in known.items() if name in set(among)]


def _contrasts(
    experiment: Experiment,
    patches: Sequence[Patch],
    pairs: Int[Tensor, "pair 2"],
    positions: Positions,
    *,
    start: int = 0,
) -> pd.DataFrame:
    """Changes of the logit difference of each pair, from the same passes as the decision's."""
    rows = located(experiment.prompt, patches, positions, start)
    (sequence,) = experiment.sequences
    with sequence.context():
        logits = sequence.sweep.logits(
            [frozenset([patch]) for _, patch in rows], ids=tuple(pairs.flatten().tolist())
        )
    both = logits[:, -1].unflatten(-1, (-1, 2))
    values = (both[..., 0] - both[..., 1]).double()
    row, draw = np.indices((len(rows), len(pairs)))
    return pd.DataFrame(
        {
            "prompt": experiment.prompt.id,
            "component": [rows[i][1].component for i in row.ravel()],
            "segment": [rows[i][0] for i in row.ravel()],
            "draw": draw.ravel(),
            "change": (values[1:] - values[:1]).flatten().numpy(),
        }
    )
