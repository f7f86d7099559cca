"""Causal tracing: in which layers, and at which tokens, is the decision made?

``causal_trace`` writes activations of the counterfactual prompt into the run on the prompt
(*noise*) or the reverse (*denoise*), one place of one layer at a time. ``noise_trace`` corrupts the
embeddings of a named part of the prompt and restores one clean activation at a time.

At all positions at once the residual stream after any block is everything that the model still
knows: patched there, every layer gives the source's decision, and nothing is said about layers.
What a layer *writes* is its own (``attn_out``, ``mlp_out``, or the two together, ``block``); the
residual stream tells something position by position. What one layer writes is little beside the
sum of all others, hence windows: ``window`` layers around one, patched together.

Source: Meng et al., "Locating and Editing Factual Associations in GPT", arXiv:2202.05262.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.passes import shared_passes
from interp_kit.patching.experiments import (
    Experiment,
    counterfactual_experiment,
    embedding_deviation,
    noise_experiments,
)
from interp_kit.patching.patches import PatchSet, Place, Unit, unit_patches
from interp_kit.patching.positions import (
    Direction,
    Positions,
    aimed,
    first_difference,
    position_sets,
)
from interp_kit.patching.table import outcomes, position_column
from interp_kit.prompts import Prompt
from interp_kit.specs import InputError

TraceSite = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "block"]

PARTS: dict[TraceSite, tuple[Unit, ...]] = {  # what is patched together
    "resid_pre": ("resid_pre",),
    "resid_post": ("resid_post",),
    "attn_out": ("attn_out",),
    "mlp_out": ("mlp_out",),
    "block": ("attn_out", "mlp_out"),
}
RESIDUAL = ("resid_pre", "resid_post")
KEYS = ["direction", "prompt", "group", "site"]
COLUMNS = [*KEYS, "layer", "pos", "segment", "baseline", "source", "value", "change"]
COLUMNS += ["recovered_fraction", "flipped"]
SHAPES = ["peak_layer", "gini_coefficient", "top3_concentration", "top5_concentration"]


def causal_trace(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    *,
    sites: Sequence[TraceSite] = ("resid_post", "attn_out", "mlp_out", "block"),
    positions: Positions = "all",
    window: int = 1,
    directions: Sequence[Direction] = ("noise", "denoise"),
) -> pd.DataFrame:
    """The decision with counterfactual activations at one site of one layer, for every layer.

    ``sites``: what attention or the MLP adds to the residual stream, both together ("block"), or
    the whole stream before or after the block. ``window`` w: of "attn_out", "mlp_out" and "block"
    the layers [l - floor(w/2), l + ceil(w/2)) are patched together, clipped at the ends; the
    residual stream is patched after one layer, which carries all before it. ``positions``: "all"
    at once; "each" by itself, from the first in which the prompts differ to the one where the
    answers part; "segments", the named parts of the prompt, each at once; "decision", where the
    answers part. The last two need no prompts of equal length. ``directions``: "noise" writes the
    counterfactual's activations into the run on the prompt, "denoise" the reverse.

    Returns one row for each direction, prompt, site, layer and place: ``direction prompt group site
    layer pos segment``, with -1 and "" for what does not apply; ``baseline`` and ``source``, the
    decisions of the run that is patched and of the run that is copied from; ``value``, after
    patching; ``change`` = value - baseline, all in nats; ``recovered_fraction`` = change / (source
    - baseline), missing where those two differ by less than 0.01; and ``flipped``, whether the
    likelier answer changed.

    Raises ``InputError`` for an unknown site or a window below 1, for a prompt without
    counterfactual or segments, and for one of another length where positions must correspond.
    """
    _check(sites, list(PARTS), window)
    tables = []
    with shared_passes():  # both directions need the same two runs
        for direction, prompt in aimed(prompts, directions):
            spots = _spots(bridge, prompt, sites, positions, window, first_difference(prompt))
            places = _places(spots)
            experiment = counterfactual_experiment(bridge, prompt, places, positions=positions)
            tables.append(_table(experiment, spots).assign(direction=direction))
    return pd.concat(tables, ignore_index=True).loc[:, COLUMNS]


def noise_trace(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    *,
    segment: str,
    sites: Sequence[TraceSite] = ("resid_post", "attn_out", "mlp_out", "block"),
    positions: Positions = "each",
    window: int = 1,
    scale: float = 3.0,
    draws: int = 10,
    seed: int,
) -> pd.DataFrame:
    """The decision under noisy embeddings, with clean activations at one site of one layer.

    Gaussian noise is added to the token embeddings of ``segment`` as they enter the residual stream
    (scaled where the model scales them, before position embeddings). Its standard deviation is
    ``scale`` times that of these embeddings, all coordinates together, of the segment's tokens in
    all prompts. Each of ``draws`` noises is one corrupted run of every prompt; it depends on
    ``seed`` and the prompt's tokens. ``positions`` "each" begins at the segment's first token.
    Other options are those of ``causal_trace``; no counterfactual is needed. "resid_pre" is
    refused: in layer 0 it would undo the noise itself, and elsewhere "resid_post" has the same
    states, one layer earlier.

    Returns the columns of ``causal_trace`` and ``draw``; ``direction`` is "restore", ``baseline``
    the decision under that draw's noise, ``source`` the clean one, ``value`` the restored one.

    Raises ``InputError`` for an unknown site, a window or draws below 1, a negative scale, and for
    a prompt without that segment.
    """
    _check(sites, [site for site in PARTS if site != "resid_pre"], window)
    if scale < 0 or draws < 1:
        raise InputError(f"expected scale >= 0 and draws >= 1, got {scale:g} and {draws}")
    deviation = scale * embedding_deviation(bridge, prompts, segment)
    tables = []
    for prompt in tqdm(prompts, desc=f"noise on {segment}", unit="prompt", leave=False):
        corrupted = next(s.positions for s in prompt.segments if s.name == segment)
        spots = _spots(bridge, prompt, sites, positions, window, min(corrupted))
        experiments = noise_experiments(
            bridge,
            prompt,
            _places(spots),
            segment=segment,
            deviation=deviation,
            draws=draws,
            seed=seed,
        )
        tables += [_table(e, spots).assign(draw=draw) for draw, e in enumerate(experiments)]
    table = pd.concat(tables, ignore_index=True).assign(direction="restore")
    return table.loc[:, [*COLUMNS, "draw"]]


def trace_summary(table: pd.DataFrame, *, noise_floor: float = 0.0) -> pd.DataFrame:
    """Where the effect lies: one row for each direction, prompt and site of a trace.

    Also for each ``model`` and ``scenario`` where the table has these columns.

    A layer's score x_l is the largest |change| over the places (positions, segments) traced in it,
    after averaging over draws; with one place, |change| itself. ``peak_layer``, that of the largest
    score; ``num_choice_flips``, the layers in which a change above ``noise_floor`` flips the
    choice; ``gini_coefficient``, of the n scores in ascending order,

        sum_i (2 i - n - 1) x_i / ((n - 1) sum_i x_i):

    0 for equal scores and, divided by n - 1 rather than n, 1 for a single layer whatever n is;
    ``top3_concentration`` and ``top5_concentration``, the share of ``total`` in the 3 and 5 largest
    scores; ``early_mean middle_mean late_mean``, mean scores over thirds of the layers, earlier
    thirds taking what is left over; ``total``, the sum of scores. Scores are sizes: signs are in
    the trace.

    Where no score exceeds ``noise_floor``, peak, Gini coefficient and concentrations are missing.
    """
    keys = [*(column for column in ("model", "scenario") if column in table), *KEYS]
    places = [*keys, "layer", "pos", "segment"]
    mean = table.groupby(places, sort=False)[["baseline", "value", "change"]].mean()
    mean = pd.DataFrame(mean).reset_index()
    mean["score"] = mean.change.abs()
    mean["flipped"] = ((mean.value > 0) != (mean.baseline > 0)) & (mean.score > noise_floor)
    best = mean.groupby([*keys, "layer"], sort=False)[["score", "flipped"]].max()
    layers = pd.DataFrame(best).reset_index().sort_values("layer", kind="stable")
    rows = []
    for _, own in layers.groupby(keys, sort=False):
        scores = own.score.to_numpy()
        early, middle, late = (pd.Series(third).mean() for third in np.array_split(scores, 3))
        row = {
            **{key: own[key].iloc[0] for key in keys},
            "peak_layer": float(own.layer.to_numpy()[scores.argmax()]),
            "num_choice_flips": int(own.flipped.sum()),
            "gini_coefficient": gini_coefficient(scores),
            "top3_concentration": _concentration(scores, 3),
            "top5_concentration": _concentration(scores, 5),
            "early_mean": early,
            "middle_mean": middle,
            "late_mean": late,
            "total": scores.sum(),
        }
        if scores.max() <= noise_floor:
            row |= dict.fromkeys(SHAPES, np.nan)
        rows.append(row)
    return pd.DataFrame(rows)


def gini_coefficient(scores: Float[np.ndarray, "layer"]) -> float:
    """Concentration of non-negative scores: 0 if all are equal, 1 if one has everything.

    With the factor n / (n - 1) for few values; missing for fewer than two, or if all are 0.
    """
    n, total = len(scores), scores.sum()
    if n < 2 or total == 0:
        return float("nan")
    weights = 2 * np.arange(1, n + 1) - n - 1
    return float(weights @ np.sort(scores) / ((n - 1) * total))


# ------------------------------------------------------------------------------------- internals
@dataclass(frozen=True, kw_only=True)
class _Spot:
    """One row of a trace: what is patched together, and what it is called."""

    site: TraceSite
    layer: int
    segment: str
    positions: tuple[int, ...] | None
    patches: PatchSet


def _check(sites: Sequence[TraceSite], known: Sequence[TraceSite], window: int) -> None:
    unknown = [site for site in sites if site not in known]
    if unknown:
        raise InputError(f"expected sites of {', '.join(known)}; got {unknown[0]!r}")
    if window < 1:
        raise InputError(f"expected a window of 1 layer or more, got {window}")


def _spots(
    bridge: TransformerBridge,
    prompt: Prompt,
    sites: Sequence[TraceSite],
    positions: Positions,
    window: int,
    start: int,
) -> list[_Spot]:
    """What each row of the trace patches, in the order of sites, layers and positions."""
    sets = position_sets(prompt, positions, start=start)
    spots = []
    for site in sites:
        parts = [unit_patches(bridge, part) for part in PARTS[site]]
        before, after = (0, 1) if site in RESIDUAL else (window // 2, (window + 1) // 2)
        for layer in range(bridge.cfg.n_layers):
            together = [p for part in parts for p in part[max(0, layer - before) : layer + after]]
            spots += [
                _Spot(
                    site=site,
                    layer=layer,
                    segment=name,
                    positions=at,
                    patches=frozenset(replace(patch, positions=at) for patch in together),
                )
                for name, at in sets
            ]
    return spots


def _places(spots: Sequence[_Spot]) -> list[Place]:
    return list(dict.fromkeys(patch.place for spot in spots for patch in spot.patches))


def _table(experiment: Experiment, spots: Sequence[_Spot]) -> pd.DataFrame:
    values = experiment.values([spot.patches for spot in spots])[1:].numpy()
    return outcomes(experiment, values).assign(
        site=[spot.site for spot in spots],
        layer=[spot.layer for spot in spots],
        pos=[position_column(spot.positions) for spot in spots],
        segment=[spot.segment for spot in spots],
    )


def _concentration(scores: np.ndarray, n: int) -> float:
    """The share of the ``n`` largest scores in all of them."""
    total = scores.sum()
    return float(np.sort(scores)[-n:].sum() / total) if total else float("nan")
