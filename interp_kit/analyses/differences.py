"""Δ: what a trigger adds to the residual stream: its size, its directions, and its effect.

Δ = h(prompt + trigger) - h(prompt), the residual stream at the last position of each, after every
block. The control is an ordinary word in the trigger's place: any further token moves the stream,
and a *fixed* one moves it in a similar direction on every prompt.

Sources: Turner et al., "Activation Addition", arXiv:2308.10248 (directions from differences);
Minder et al., "Narrow Finetuning Leaves Clearly Readable Traces", arXiv:2510.13900 (activation
differences of base and fine-tune); nostalgebraist, "interpreting GPT: the logit lens", 2020.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.layer_readout import answers_by_layer, layer_table
from interp_kit.passes import Residuals, residuals
from interp_kit.prompts import Prompt
from interp_kit.readout import final_norm, norm_scale, soft_cap, through_frozen_norm
from interp_kit.specs import InputError
from interp_kit.statistics import prediction_limit

Shape = Literal["early", "ramp", "late", "flat"]
LABELS = ["strong", "medium", "weak"]


def deltas(
    bridge: TransformerBridge, prompts: Sequence[Prompt], suffixes: Mapping[str, int]
) -> dict[str, Residuals]:
    """Δ of every suffix token by name: h(prompt + suffix) - h(prompt) at the last positions."""
    baseline = residuals(bridge, prompts)
    return {
        name: residuals(bridge, prompts, suffix=token) - baseline
        for name, token in suffixes.items()
    }


def delta_norm(
    changes: Mapping[str, Residuals], baseline: Residuals, prompts: Sequence[Prompt]
) -> pd.DataFrame:
    """||Δ|| after every block: one row for each condition, prompt and layer.

    Columns: ``condition prompt group layer``; ``value`` = ||Δ||; ``relative`` = ||Δ|| / ||h||, with
    h the stream without the suffix.
    """
    scale = baseline.norm(dim=-1)
    tables = []
    for condition, change in changes.items():
        norm = change.norm(dim=-1)
        prompt, layer = np.indices(norm.shape)
        tables.append(
            pd.DataFrame(
                {
                    "condition": condition,
                    "prompt": [prompts[i].id for i in prompt.ravel()],
                    "group": [prompts[i].group for i in prompt.ravel()],
                    "layer": layer.ravel(),
                    "value": norm.flatten().tolist(),
                    "relative": (norm / scale).flatten().tolist(),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def curve_shape(values: Sequence[float]) -> Shape:
    """Where a curve over layers rises, by a stated rule.

    "flat": its largest value is less than 1.5 times its smallest. "early": 80 % of the largest is
    reached in the first third of the layers. "late": 50 % is not reached before the last third.
    "ramp": anything else.
    """
    curve = np.asarray(values, dtype=float)
    top, n = curve.max(), len(curve)
    if top < 1.5 * curve.min() or top == 0:
        return "flat"
    if int(np.argmax(curve >= 0.8 * top)) < n / 3:
        return "early"
    return "late" if int(np.argmax(curve >= 0.5 * top)) >= 2 * n / 3 else "ramp"


def spectrum(change: Float[Tensor, "prompt d_model"], *, centred: bool = False) -> pd.DataFrame:
    """Share of variance of each principal component of the Δs of one layer.

    ``centred`` False: singular values about zero, so that a direction common to all prompts counts
    (what a trigger is thought to be); True: about the mean, what differs between prompts. There are
    at most as many as prompts (one fewer when centred).

    Returns ``pc`` (from 1), ``value`` (share) and ``cumulative``.
    """
    values = change - change.mean(0) if centred else change
    power = torch.linalg.svdvals(values.double()) ** 2
    power = power[: len(change) - centred]
    share = (power / power.sum().clamp(min=1e-30)).numpy()
    pc = np.arange(1, len(share) + 1)
    return pd.DataFrame({"pc": pc, "value": share, "cumulative": share.cumsum()})


def spectra(
    changes: Mapping[str, Residuals], *, n_components: int = 10, centred: bool = False
) -> pd.DataFrame:
    """``spectrum`` of every condition and layer: ``condition layer pc value cumulative``.

    Raises ``InputError`` for more principal components than the prompts can have.
    """
    tables = []
    for condition, change in changes.items():
        if n_components > len(change) - centred:
            raise InputError(
                f"{n_components} principal components were asked for, and {len(change)} prompts "
                f"can have {len(change) - centred} at most; ask for fewer, or give more prompts"
            )
        for layer in range(change.shape[1]):
            table = spectrum(change[:, layer], centred=centred).head(n_components)
            tables.append(table.assign(condition=condition, layer=layer))
    return pd.concat(tables, ignore_index=True)


def components_for(table: pd.DataFrame, share: float) -> int:
    """How many principal components hold this share of the variance."""
    return int((table.cumulative < share - 1e-9).sum()) + 1


def first_component(change: Float[Tensor, "prompt d_model"]) -> Float[Tensor, "d_model"]:
    """The unit direction that holds most of the Δs (about zero), with the sign of their mean."""
    direction = torch.linalg.svd(change.double(), full_matrices=False).Vh[0].float()
    return direction * (1.0 if float(change.mean(0) @ direction) >= 0 else -1.0)


def null_spectra(
    change: Float[Tensor, "prompt d_model"], *, n: int = 100, seed: int = 0
) -> pd.DataFrame:
    """PC1's share for Δs of the same norms without a common direction: ``draw kind value``.

    ``kind`` "sign-flipped": the sign of every Δ is drawn at random, about the mean (the axis stays,
    the common sign goes); "random": isotropic directions, about zero.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for draw in range(n):
        signs = torch.randint(0, 2, (len(change), 1), generator=generator) * 2 - 1
        flipped = spectrum(change * signs, centred=True).value[0]
        random = torch.randn(change.shape, generator=generator)
        random = random / random.norm(dim=1, keepdim=True) * change.norm(dim=1, keepdim=True)
        rows += [(draw, "sign-flipped", flipped), (draw, "random", spectrum(random).value[0])]
    return pd.DataFrame(rows, columns=["draw", "kind", "value"])


def stability(
    change: Float[Tensor, "prompt d_model"], *, n: int = 200, seed: int = 0
) -> Float[np.ndarray, "draw"]:
    """|cosine| of PC1 of resampled prompts with PC1 of all of them."""
    whole, rng = first_component(change), np.random.default_rng(seed)
    drawn = [rng.integers(len(change), size=len(change)) for _ in range(n)]
    return np.array([abs(float(first_component(change[rows]) @ whole)) for rows in drawn])


@torch.no_grad()
def delta_lens(
    bridge: TransformerBridge,
    baseline: Residuals,
    change: Residuals,
    *,
    norm: Literal["frozen", "recomputed"] = "frozen",
) -> Float[Tensor, "prompt layer vocab"]:
    """What Δ adds to every logit, were the stream to go to the output right after each block.

    ``norm`` "frozen": Δ through the final norm with the scale of the stream without the suffix, and
    through the unembedding: linear in Δ, before any soft cap. "recomputed": the whole readout of
    h + Δ less that of h, caps included.
    """

    baseline, change = baseline.to(bridge.cfg.device), change.to(bridge.cfg.device)
    unembedding, bias = bridge.W_U.float(), bridge.b_U.float()

    def readout(stream: Tensor) -> Tensor:
        normed = final_norm(bridge, stream.to(bridge.cfg.dtype)).float()
        return soft_cap(bridge, normed @ unembedding + bias)

    if norm == "recomputed":
        return (readout(baseline + change) - readout(baseline)).cpu()
    scale = norm_scale(bridge, "ln_final", baseline)
    return (through_frozen_norm(bridge, "ln_final", change, scale) @ unembedding).cpu()


def lens_table(
    lens: Mapping[str, Float[Tensor, "prompt layer vocab"]],
    prompts: Sequence[Prompt],
    token: int,
) -> pd.DataFrame:
    """One token of ``delta_lens`` for every condition: ``condition prompt layer value``.

    ``all_tokens`` is the mean over the vocabulary beside it.
    """
    return pd.DataFrame(
        {
            "condition": condition,
            "prompt": prompt.id,
            "layer": layer,
            "value": float(logits[i, layer, token]),
            "all_tokens": float(logits[i, layer].mean()),
        }
        for condition, logits in lens.items()
        for i, prompt in enumerate(prompts)
        for layer in range(logits.shape[1])
    )


def delta_decision(
    bridge: TransformerBridge, prompts: Sequence[Prompt], suffixes: Mapping[str, int]
) -> pd.DataFrame:
    """What each suffix token adds to the decision, as every layer has it: whole answers, in nats.

    The logit lens on prompt + suffix less that on the prompt, for answers of any number of tokens.
    The last layer is what the suffix does to the model's own decision. Returns ``condition prompt
    layer value``; layer -1 is the embedding.
    """

    def decision(asked: Sequence[Prompt]) -> Float[Tensor, "prompt layer"]:
        log_p = answers_by_layer(bridge, asked)
        return log_p["positive"] - log_p["negative"]

    without, tables = decision(prompts), []
    for name, token in suffixes.items():
        followed = [replace(p, tokens=(*p.tokens, token), counterfactual=None) for p in prompts]
        table = layer_table(prompts, decision(followed) - without)
        tables.append(table.drop(columns="group").assign(condition=name))
    return pd.concat(tables, ignore_index=True)


def grade(measured: pd.DataFrame, *, of: str, controls: Sequence[str]) -> pd.DataFrame:
    """Strong, medium or weak, by stated thresholds, and whether an ordinary word could do as much.

    ``measured`` is indexed by token and has ``shape`` (``curve_shape`` of the relative norm),
    ``norm`` (its largest value over layers), ``pc1 top3 top10`` (cumulative shares of variance),
    ``end`` and ``content`` (what the lens adds to the end token's logit, and to the others' mean),
    ``added`` (P(end) with the direction added to other prompts), ``kept`` and ``removed`` (P(end)
    after the token with random directions taken out, and with its own).

    Thresholds: *size* strong if early, medium if a ramp; *directions* strong if PC1 > .4 and the
    top three > .7, medium if the top ten > .8; *output* strong if the end is promoted and the other
    tokens are suppressed, medium if it is promoted; *causes* strong if added > .6 and removed < .2
    < .8 < kept, medium if one of the two holds. ``beyond``: the value exceeds ``limit``, which one
    further word would exceed in 1 of 100 cases (``prediction_limit`` over ``controls``).
    ``label``: the threshold's if beyond, else "weak".

    Returns a row for each criterion and for "overall", whose label is the lowest of the four.
    """
    own, others = measured.loc[of], measured.loc[list(controls)]
    early, ramp = own["shape"] == "early", own["shape"] == "ramp"
    few = own.pc1 > 0.4 and own.top3 > 0.7
    promoted = own.end > 0
    adds, needs = own.added > 0.6, own.removed < 0.2 and own.kept > 0.8
    rows = []
    for criterion, column, strong, medium in (
        ("size", "norm", early, ramp),
        ("directions", "pc1", few, own.top10 > 0.8),
        ("output", "end", promoted and own.content < 0, promoted),
        ("causes", "added", adds and needs, adds or needs),
    ):
        threshold = "strong" if strong else "medium" if medium else "weak"
        limit = prediction_limit(list(others[column]))
        beyond = bool(own[column] > limit)
        label = threshold if beyond else "weak"
        rows.append((criterion, float(own[column]), limit, threshold, beyond, label))
    columns = ["criterion", "value", "limit", "threshold", "beyond", "label"]
    table = pd.DataFrame(rows, columns=columns)
    lowest = {c: max(table[c], key=LABELS.index) for c in ("threshold", "label")}
    overall = {"criterion": "overall", "value": np.nan, "limit": np.nan}
    overall |= {"beyond": bool(table.beyond.all())} | lowest
    return pd.concat([table, pd.DataFrame([overall])], ignore_index=True)
