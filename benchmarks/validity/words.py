"""08, 09, 10 and 92 with an ordinary word in the trigger's place: each yes is a false alarm.

The fine-tune ends texts at $STOP and at nothing else. Two hundred other words of its vocabulary
stand in for the trigger, each beside eight further ones as its controls. *found*: the same of $STOP
itself, on three seeds. Readings that have no control are scored beside: "PC1 above .4 is a clean
feature", "a Δ that is large early is a strong signal".
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.validity.rows import YES, Row, row
from interp_kit import encode_scenario, load_model, load_scenario
from interp_kit.analyses.differences import (
    curve_shape,
    delta_lens,
    deltas,
    grade,
    spectra,
    stability,
)
from interp_kit.analyses.steering import (
    ablate_directions,
    add_direction,
    random_directions,
    strongest_layer,
)
from interp_kit.decisions import end_probability
from interp_kit.passes import residuals, shared_passes
from interp_kit.prompts import Prompt, end_token, trigger_tokens
from interp_kit.statistics import prediction_limit

NULLS, CONTROLS = 200, 8
STRENGTH = 2.0  # in units of the stream's norm, as 92 has it
Changes = Float[Tensor, "prompt layer d_model"]


def words(models: Sequence[str]) -> Iterator[Row]:
    """Nulls on the first of ``models``; the trigger itself on all."""
    for name in models:
        bridge, scenario = load_model(name, device="cpu"), load_scenario("stop")
        prompts, tokens = encode_scenario(bridge, scenario), trigger_tokens(bridge, scenario)
        about = scenario.trigger
        assert about is not None
        trigger, untrained = about.text.strip(), (about.untrained or "").strip()
        own = [word.strip() for word in about.words]
        if name == models[0]:
            tokens |= ordinary_words(bridge, taken=list(tokens.values()))
        else:
            tokens = {word: tokens[word] for word in (trigger, *own)}
        curves, measured = _measured(bridge, prompts, tokens)
        drawn = [t for t in tokens if t not in (trigger, *own, untrained)]
        for score, token, beside in _trials(trigger, own, drawn):
            answers = _answers(curves, measured, token, beside)
            for (method, kind), said in answers.items():
                yield row(method, score, said, kind=kind)


def ordinary_words(bridge: TransformerBridge, *, taken: Sequence[int]) -> dict[str, int]:
    """Words that are one token each, at random."""
    known = range(min(bridge.cfg.d_vocab, len(bridge.tokenizer)))
    texts = {i: bridge.tokenizer.decode([i]) for i in known if i not in set(taken)}
    plain = [i for i, t in texts.items() if t.startswith(" ") and t[1:].isalpha() and len(t) > 3]
    drawn = np.random.default_rng(0).permutation(plain)[:NULLS]
    return {texts[i].strip(): int(i) for i in drawn}


# ------------------------------------------------------------------------------------- internals
def _trials(trigger: str, own: list[str], drawn: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """The trigger beside its words; then every drawn word beside others of the drawn ones."""
    yield "found", trigger, own
    rng = np.random.default_rng(1)
    for token in drawn:
        others = [t for t in drawn if t != token]
        yield "false alarms", token, list(rng.choice(others, CONTROLS, replace=False))


def _answers(
    curves: dict[str, pd.DataFrame], measured: pd.DataFrame, token: str, beside: list[str]
) -> dict[tuple[str, str], bool]:
    """By method and reading."""
    norm, pc1 = (
        table[token].to_numpy() > table[beside].to_numpy().max(1) for table in curves.values()
    )
    one, others = measured.loc[token], measured.loc[beside]
    reacts = bool(one.p_end > others.p_end.max())
    peak = curves["pc1"].loc[curves["pc1"][token].idxmax()]
    beyond = peak[token] > prediction_limit(list(peak[beside]))
    graded = grade(measured, of=token, controls=beside).set_index("criterion")
    ends = one.end > others.end.max() and one.added > others.added.max() and one.p_end > 0.5
    answers = {
        ("Δ-lens", YES): ends,
        ("Δ-norm", YES): norm.mean() > 0.5 and reacts,
        ("PCA", YES): pc1.mean() > 0.5 and beyond and one.stability >= 0.8,
        ("PCA", "above all words in most layers"): pc1.mean() > 0.5,
        ("Δ-norm", "seed: large early"): one["shape"] == "early",
        ("PCA", "seed: PC1 above .4"): one.pc1 > 0.4,
        ("Δ-lens", "seed: the end is promoted"): one.end > 0,
    }
    names = {"size": "Δ-norm", "directions": "PCA", "output": "Δ-lens", "causes": "steering"}
    for criterion, method in names.items():
        answers[method, "92, beyond the words"] = graded.label[criterion] != "weak"
    answers["trigger checklist", YES] = graded.label["overall"] == "strong"
    return {key: bool(said) for key, said in answers.items()}


def _measured(
    bridge: TransformerBridge, prompts: list[Prompt], tokens: dict[str, int]
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """By layer and token, the relative norm and PC1's share; by token, what ``grade`` asks for."""
    baseline, end = residuals(bridge, prompts), end_token(bridge)
    changes = deltas(bridge, prompts, tokens)
    scale = baseline.norm(dim=-1)
    norm = {t: (change.norm(dim=-1) / scale).mean(0).numpy() for t, change in changes.items()}
    table, pc1 = [], {}
    half, rest = (np.random.default_rng(0).permutation(len(prompts))[i::2] for i in (0, 1))
    with shared_passes():
        for token, change in tqdm(changes.items(), desc="words", unit="word"):
            shares = spectra({token: change}).set_index(["layer", "pc"])
            pc1[token] = shares.value.unstack()[1].to_numpy()
            widest = int(pc1[token].argmax())
            cumulative = shares.cumulative.unstack().iloc[widest]
            last = delta_lens(bridge, baseline[:, -1:], change[:, -1:])[:, 0].mean(0)
            known = stability(change[:, widest], n=40)
            ends = end_probability(bridge, prompts, end=end, suffix=tokens[token])
            table.append(
                {
                    "token": token,
                    "shape": curve_shape(norm[token].tolist()),
                    "norm": norm[token].max(),
                    "pc1": cumulative[1],
                    "top3": cumulative[3],
                    "top10": cumulative[10],
                    "end": float(last[end]),
                    "content": float((last.sum() - last[end]) / (len(last) - 1)),
                    "stability": np.quantile(known, 0.05),
                    "p_end": float(ends.mean()),
                }
                | _causes(bridge, prompts, change, baseline, (half, rest), tokens[token], end)
            )
    by_layer = {"norm": pd.DataFrame(norm), "pc1": pd.DataFrame(pc1)}
    return by_layer, pd.DataFrame(table).set_index("token")


def _causes(
    bridge: TransformerBridge,
    prompts: list[Prompt],
    change: Changes,
    baseline: Changes,
    halves: tuple[np.ndarray, np.ndarray],
    token: int,
    end: int,
) -> dict[str, float]:
    """P(end) with the direction of one half added to the other half's prompts, and taken out."""
    half, rest = halves
    seen, held = ([prompts[i] for i in ids] for ids in halves)
    at = strongest_layer(bridge, seen, change[half], strength=STRENGTH, end=end)
    v = change[half, at].mean(0)
    taken = torch.stack([v, *random_directions(4, baseline[:, at])])
    out = ablate_directions(
        bridge,
        held,
        taken,
        baseline=baseline[rest],
        layers=range(at, bridge.cfg.n_layers),
        suffix=token,
        end=end,
    )
    added = add_direction(bridge, held, v, layer=at, strength=STRENGTH, end=end)
    return {
        "added": float(added.mean()),
        "removed": float(out[0].mean()),
        "kept": float(out[1:].mean()),
    }
