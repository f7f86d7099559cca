"""Attribution patching: what activation patching would find, estimated from gradients.

Exact patching computes a row for every unit. An estimate for all of them at once is

    change ~ (source - target) . d decision / d activation

with the gradient of the run that is patched: one forward and one backward pass. It is a screen, not
a measurement. ``screen`` chooses the units that are worth an exact patch, and a random sample of
the others, so that ``screen_recall`` can say what the screen missed.

With ``steps`` the gradient is the mean of as many on the way from the target to the source, whose
embeddings are mixed (integrated gradients). That estimates what units do *together*; of single
patches, which leave all else as it is, the plain gradient was the better screen on every model that
was tried (``benchmarks.controls``).

Sources: Nanda, "Attribution patching", 2023; Syed et al., arXiv:2310.10348; Hanna et al., "Have
Faith in Faithfulness", arXiv:2403.17806 (integrated gradients from the inputs, there of edges).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.loading import Models
from interp_kit.passes import shared_passes
from interp_kit.patching.cost import SAMPLE, TOP
from interp_kit.patching.experiments import (
    Experiment,
    PatchedSequence,
    components_between,
    counterfactual_experiment,
    cross_model_experiment,
)
from interp_kit.patching.patches import HOOKS, Patch, Place, Unit, unit_patches
from interp_kit.patching.positions import Direction, Positions, aimed, first_difference
from interp_kit.patching.recording import gradients
from interp_kit.patching.table import finished, located, patch_table, places_of
from interp_kit.prompts import Prompt, require_prompts


def attribution_patching(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    *,
    unit: Unit = "component",
    positions: Positions = "all",
    directions: Sequence[Direction] = ("denoise", "noise"),
    layer: int | None = None,
    steps: int = 0,
) -> pd.DataFrame:
    """An estimate of ``activation_patching``, options and columns as there, of whole answers.

    ``steps`` 0 takes the gradient of the unpatched run, more the mean of so many runs on the way to
    the source: each a forward and a backward pass.
    """
    patches = unit_patches(bridge, unit, layer=layer)
    tables = []
    with shared_passes():
        for direction, prompt in aimed(prompts, directions):
            experiment = counterfactual_experiment(
                bridge, prompt, places_of(patches), positions=positions
            )
            start = first_difference(prompt)
            rows = located(prompt, patches, positions, start)
            changes = estimates(
                bridge, experiment, [patch for _, patch in rows], steps=steps, start=start
            )
            table = patch_table(experiment, rows, experiment.baseline + changes)
            tables.append(table.assign(direction=direction))
    return finished(tables)


def cross_model_attribution_patching(
    models: Models,
    source: str,
    target: str,
    prompts: Sequence[Prompt],
    *,
    positions: Positions = "all",
) -> pd.DataFrame:
    """An estimate of ``cross_model_patching`` of every component, columns as there."""
    require_prompts(prompts)
    patches = components_between(models, [(source, target)])
    tables = []
    for prompt in prompts:
        experiment = cross_model_experiment(
            models, source, target, prompt, places_of(patches), positions=positions
        )
        rows = located(prompt, patches, positions)
        bridge = models.switch(target)
        changes = estimates(bridge, experiment, [patch for _, patch in rows])
        table = patch_table(experiment, rows, experiment.baseline + changes)
        tables.append(table.assign(direction=f"{source} -> {target}"))
    return finished(tables)


def screen(
    estimated: pd.DataFrame, *, top: int = TOP, sample: int = SAMPLE, seed: int = 0
) -> pd.DataFrame:
    """Which components to patch exactly: ``component chosen``.

    ``chosen`` "screen": the ``top`` with the largest estimates, in absolute value and on average
    over the rows; "sample": ``sample`` of the others, at random.
    """
    sizes = _mean_size(estimated)
    ranked = sorted(sizes, key=lambda name: -sizes[name])
    others = ranked[top:]
    drawn = np.random.default_rng(seed).permutation(len(others))[:sample]
    names = [*ranked[:top], *(others[i] for i in sorted(drawn))]
    chosen = ["screen"] * len(ranked[:top]) + ["sample"] * len(drawn)
    return pd.DataFrame({"component": names, "chosen": chosen})


def screen_recall(
    measured: pd.DataFrame, chosen: pd.DataFrame, *, components: int, strongest: int = 20
) -> pd.Series:
    """How many of the ``strongest`` components the screen found, as its random sample tells.

    ``measured`` are exact changes of those in ``chosen`` (``screen``), of ``components`` in all.
    As many of the sample as exceed the ``strongest``-th largest change of the screened ones, in
    proportion so many of all that were left out are missing. Returns ``value``, and ``low``, with
    the upper end of that proportion's interval (95 %, Clopper and Pearson); ``missed``, how many of
    the sample; ``sampled``, of how many.
    """
    sizes = _mean_size(measured)
    found = np.sort([sizes[name] for name in chosen.component[chosen.chosen == "screen"]])[::-1]
    sample = np.array([sizes[name] for name in chosen.component[chosen.chosen == "sample"]])
    left_out, sampled = components - len(found), len(sample)
    if not sampled or len(found) < strongest:  # nothing was left out
        return pd.Series({"value": 1.0, "low": 1.0, "missed": 0, "sampled": 0})
    missed = int((sample > found[strongest - 1]).sum())
    most = stats.beta.ppf(0.95, missed + 1, sampled - missed) if missed < sampled else 1.0
    if sampled == left_out:
        most = missed / sampled
    value, low = (strongest / (strongest + share * left_out) for share in (missed / sampled, most))
    return pd.Series({"value": value, "low": low, "missed": missed, "sampled": sampled})


def estimates(
    bridge: TransformerBridge,
    experiment: Experiment,
    patches: Sequence[Patch],
    *,
    steps: int = 0,
    start: int = 0,
) -> Float[np.ndarray, "patch"]:
    """The estimated change of the decision by each patch, in nats.

    The bridge has to compute as the experiment's target. Before ``start`` source and target have to
    be the same.
    """
    total = np.zeros(len(patches))
    for sequence in experiment.sequences:
        with sequence.context():
            shares = _shares(bridge, sequence, places_of(patches), steps, start)
        total += [_picked(shares[p.place], p, start).sum() for p in patches]
    return total


# ------------------------------------------------------------------------------------- internals
def _mean_size(table: pd.DataFrame) -> dict[str, float]:
    """Mean absolute change by component, over prompts, directions and positions."""
    sizes = table.assign(size=table.change.abs()).groupby("component", sort=False)[["size"]].mean()
    return dict(pd.DataFrame(sizes).itertuples(name=None))


def _shares(
    bridge: TransformerBridge,
    sequence: PatchedSequence,
    places: Sequence[Place],
    steps: int,
    start: int,
) -> dict[Place, np.ndarray]:
    """By place, what each position and unit is estimated to change, from ``start`` on."""
    target, source, score = sequence.sweep.target, sequence.sweep.source, sequence.score
    start = start if target.keys_values else 0

    def value(logits: Tensor) -> Tensor:
        return score(logits if score.ids is None else logits[..., list(score.ids)])

    shares: dict[Place, np.ndarray] = {}
    for step in range(max(1, steps)):
        by = (step + 0.5) / steps if steps else 0.0
        own, other = target.stream[0], source.entering
        mixed = own if other is None else own + by * (other - own)
        slopes = gradients(bridge, target, value, places, entering=mixed, start=start)
        for site, layer in places:
            hook = HOOKS["attn_out" if site == "resid_mid" else site].format(layer)
            difference = source.values[site, layer] - target.activations[site, layer]
            share = difference[start:] * slopes[hook]
            share = share if site == "neuron" else share.sum(-1)
            if site == "z" and layer in source.head_shift:
                shift = source.head_shift[layer][-len(share) :]
                written = slopes[f"blocks.{layer}.attn.o.hook_out"][-len(shift) :, None]
                share[-len(shift) :] += (shift * written).sum(-1)
            found = share.float().cpu().numpy() / max(1, steps)
            shares[site, layer] = shares.get((site, layer), 0) + found
    return shares


def _picked(share: np.ndarray, patch: Patch, start: int) -> np.ndarray:
    share = share if patch.unit is None else share[:, patch.unit]
    if patch.positions is None:
        return share
    return share[[pos - start for pos in patch.positions if pos >= start]]
