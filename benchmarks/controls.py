"""How often do controls let something pass where nothing is, and how often where something is?

A notebook calls a layer, component or direction *clear* of its control. Here that rule is scored
like a method, beside others that one might take for it.

**Places with an effect**: facts with counterfactual subjects on SmolLM2, the hybrid player on the
prisoner's dilemma, and the law of gravity against that of magnetism on the other shipped base.
*Power* is the share of places that a rule calls clear there; of the lens, also at the last layer.

**Places without**: the same prompts against a *paraphrase* of themselves, which asks for the same
answer in other words. Which of the two is the prompt is drawn at random for each pair: a shift
between wordings that all prompts share is an effect of the wording. And *labels permuted*: prompt
and counterfactual exchanged at random. *False positives* are the share of places called clear, mean
over draws. Places of one model are not independent; with all prompts, draws are.

**Planted directions**: an MLP adds, at the last position of the prompts and not of their
paraphrases, a direction that raises the decision by so many nats. Of eight prompts, the share of
plants that are called clear: the MLP itself, and the last layer of the lens.

**Rules**, at a rate of .05. ``any pair``: beyond 95 % of random pairs of the vocabulary. ``likely
pair``: of pairs of the 50 tokens that the model finds likeliest. ``sign flip``: a permutation test
over prompts, false discovery rate over places. ``rule``: the notebooks' own, ``likely pair`` and,
from six prompts on, ``sign flip``.

**Steering**: a direction between two kinds of prompt, against differences between random halves of
unrelated ones, which should not count; by ``isotropic`` controls, by ``stream`` ones, random sums
of the deviations of other prompts' streams, and by the larger limit of ``both``. Notebooks draw
both kinds, and take the largest of all where they ask for a dose.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.patching import machine, one_thread
from interp_kit import decide, encode_scenario, load_model, load_scenario, shared_passes
from interp_kit.analyses.activation_patching import activation_patching, patching_and_control
from interp_kit.analyses.attribution import contrast_attribution, direct_logit_attribution
from interp_kit.analyses.attribution_patching import attribution_patching
from interp_kit.analyses.lens import contrast_lens, logit_lens
from interp_kit.analyses.steering import random_directions, steered
from interp_kit.controls import counterfactuals, likely_pairs
from interp_kit.passes import last_residuals, residuals
from interp_kit.prompts import Prompt, encode
from interp_kit.statistics import FEWEST_PROMPTS, against_control, effects, paired_difference

PARAPHRASES = {
    "capital": "The capital city of {} is",
    "language": "In {}, people speak",
    "symbol": "{} has the chemical symbol",
    "opposite": "A word that means the opposite of {} is",
}
PLAYER = ["CC_continue", "CC_temptation", "DC_exploited"]  # where the partner cooperated
CASES = {"smollm2-plain": ["facts"], "ipd-hybrid": PLAYER, "tiny-llama": ["cubic_gravity"]}
UNRELATED = load_scenario("stop").prompts  # plain texts of the shipped models' world
FEW = 3  # prompts of a scenario with which no test over prompts can say anything
GLAD = [  # glad and sad: what steering should exchange
    ("The movie was {}, and afterwards I felt", "wonderful", "terrible"),
    ("She {} the job she had hoped for, so she was", "got", "lost"),
    ("They {} the final game, and the team was", "won", "lost"),
    ("He {} today, and he was", "found his lost dog", "buried his old dog"),
    ("The letter brought {} news. Anna felt", "good", "bad"),
    ("Our holiday by the sea was {}. We were", "perfect", "ruined"),
    ("The surgery went {}, and the family was", "well", "wrong"),
    ("After the {}, the singer was", "warm applause", "loud booing"),
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Prompts of a model, and each of them in other words, which ask for the same answer."""

    model: str
    bridge: TransformerBridge
    prompts: list[Prompt]
    paraphrases: list[Prompt]


def cases() -> Iterator[Case]:
    for model, scenarios in CASES.items():
        bridge = load_model(model, device="cpu")
        prompts = []
        for name in scenarios:
            own = encode_scenario(bridge, load_scenario(name))
            prompts += [replace(p, id=f"{name}/{p.id}") for p in own]
        if model == "smollm2-plain":
            other = [_in_other_words(bridge, prompt) for prompt in prompts]
        else:  # the next wording of the same situation
            other = [_next(prompts, i) for i in range(len(prompts))]
        yield Case(model=model, bridge=bridge, prompts=prompts, paraphrases=other)


def _in_other_words(bridge: TransformerBridge, prompt: Prompt) -> Prompt:
    subject = next(s for s in prompt.segments if s.name == "subject")
    word = bridge.tokenizer.decode([prompt.tokens[at] for at in subject.positions]).strip()
    text = PARAPHRASES[prompt.group].format(word)
    tokens = bridge.tokenizer(text, add_special_tokens=False)["input_ids"]
    return replace(prompt, tokens=tuple(tokens), segments=())


def _next(prompts: Sequence[Prompt], i: int) -> Prompt:
    """The next prompt of the same scenario, or its first."""
    scenario = prompts[i].id.split("/")[0]
    own = [p for p in prompts if p.id.split("/")[0] == scenario]
    return replace(own[(own.index(prompts[i]) + 1) % len(own)], id=prompts[i].id)


# ------------------------------------------------------------------------------------- the methods
Both = tuple[pd.DataFrame, dict[str, pd.DataFrame]]  # effect by unit and prompt; controls by rule


Pairs = dict[str, torch.Tensor]  # by rule, [prompt pair 2]


def by_lens(
    bridge: TransformerBridge, prompts: list[Prompt], other: list[Prompt], pairs: Pairs
) -> Both:
    return _read(bridge, prompts, other, pairs, logit_lens, contrast_lens, "layer")


def by_attribution(
    bridge: TransformerBridge, prompts: list[Prompt], other: list[Prompt], pairs: Pairs
) -> Both:
    read, contrast = direct_logit_attribution, contrast_attribution
    return _read(bridge, prompts, other, pairs, read, contrast, "component")


def by_patching(
    bridge: TransformerBridge, prompts: list[Prompt], other: list[Prompt], pairs: Pairs
) -> Both:
    """Noising at the decision, from the other prompt."""
    asked = [replace(p, counterfactual=o.tokens, segments=()) for p, o in zip(prompts, other)]
    options: dict[str, Any] = {"positions": "decision", "directions": ["noise"]}
    tables = {}
    for rule, own in pairs.items():
        table, tables[rule] = patching_and_control(bridge, asked, own, **options)
    table = table.drop(columns="value")
    renamed = {"component": "unit", "change": "value"}
    return table.rename(columns=renamed), {k: t.rename(columns=renamed) for k, t in tables.items()}


def _read(
    bridge: TransformerBridge,
    prompts: list[Prompt],
    other: list[Prompt],
    pairs: Pairs,
    analysis: Callable[..., pd.DataFrame],
    contrast: Callable[..., pd.DataFrame],
    unit: str,
) -> Both:
    """What the prompt shows less what the other one shows, of the answers and of other tokens."""
    table = paired_difference(analysis(bridge, prompts), analysis(bridge, other), ["prompt", unit])
    controls = {}
    for rule, drawn in pairs.items():
        ours, theirs = (contrast(bridge, given, drawn) for given in (prompts, other))
        controls[rule] = paired_difference(ours, theirs, ["prompt", unit, "draw"])
        controls[rule]["unit"] = controls[rule][unit]
    table["unit"] = table[unit]
    known = table.unit.isin(controls["likely pair"].unit.unique())  # not the cap, nor the entropy
    return pd.DataFrame(table[known]), controls


def pairs_of(bridge: TransformerBridge, prompts: list[Prompt], other: list[Prompt]) -> Pairs:
    asked = [replace(p, counterfactual=o.tokens) for p, o in zip(prompts, other)]
    likely = likely_pairs(bridge, asked)
    generator = torch.Generator().manual_seed(0)
    known = min(bridge.cfg.d_vocab, len(bridge.tokenizer))
    anything = torch.randint(known, likely.shape, generator=generator)
    return {"likely pair": likely, "any pair": anything}


RULES = ("any pair", "likely pair", "sign flip", "rule")
METHODS = {"lens": by_lens, "attribution": by_attribution, "patching": by_patching}


# --------------------------------------------------------------------------------------- the rules
def called(table: pd.DataFrame, controls: dict[str, pd.DataFrame], rule: str) -> pd.DataFrame:
    """``unit clear`` by a rule."""
    if rule == "sign flip":
        return effects(table, ["unit"], column="value", resamples=1999)
    control = controls["likely pair" if rule == "rule" else rule]
    resamples = 1999 if rule == "rule" else 99  # only the rule asks for the test
    result = against_control(table, control, ["unit"], resamples=resamples)
    return result if rule == "rule" else result.assign(clear=result.beyond)


def flipped(table: pd.DataFrame, signs: dict[str, int]) -> pd.DataFrame:
    return table.assign(value=table.value * table.prompt.map(signs))


def score(case: Case, method: str, draws: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """False positives and power of every rule, with few prompts and with all."""
    measured = {}
    with shared_passes():
        for what, other in {
            "effect": counterfactuals(case.prompts),
            "paraphrase": case.paraphrases,
        }.items():
            pairs = pairs_of(case.bridge, case.prompts, other)
            measured[what] = METHODS[method](case.bridge, case.prompts, other, pairs)
    rows = []
    names = [p.id for p in case.prompts]
    for rule, (what, flip), n in (
        (rule, how, n)
        for rule in RULES
        for how in (("effect", False), ("effect", True), ("paraphrase", True))
        for n in (FEW, len(names))
    ):
        if n < FEWEST_PROMPTS and (rule == "sign flip" or (what, flip) == ("effect", True)):
            continue  # three labels permuted are all the same a quarter of the time: an effect
        table, controls = measured[what]
        shares, last = [], []
        for _ in range(1 if n == len(names) and not flip else draws):
            own = list(rng.permutation(names)[:n])
            signs = dict(zip(own, rng.choice([-1, 1], n) if flip else [1] * n))
            given = flipped(table[table.prompt.isin(own)], signs)
            aside = {k: flipped(t[t.prompt.isin(own)], signs) for k, t in controls.items()}
            result = called(given, aside, rule)
            shares.append(result.clear.mean())
            last.append(bool(result.clear.iloc[-1]))
        kind = "power" if not flip else "labels permuted" if what == "effect" else "paraphrase"
        rows.append(
            {"model": case.model, "method": method, "rule": rule, "prompts": n, "null": kind}
            | {"clear": float(np.mean(shares)), "last": float(np.mean(last))}
        )
    return rows


# ---------------------------------------------------------------------------------------- plants
SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)  # nats
PLANTED = 8  # prompts


def plants(case: Case, method: str) -> list[dict[str, Any]]:
    """Whether each rule finds a direction of known size that one MLP adds to the prompts."""
    bridge, n_layers = case.bridge, case.bridge.cfg.n_layers
    prompts, other = case.prompts[:PLANTED], case.paraphrases[:PLANTED]
    pairs = pairs_of(bridge, prompts, other)
    rows = []
    for layer, size in product((n_layers // 3, 2 * n_layers // 3), SIZES):
        found = []
        for i, prompt in enumerate(prompts):
            own = {rule: drawn[[i]] for rule, drawn in pairs.items()}
            with planted(bridge, prompt, layer=layer, nats=size), shared_passes():
                found.append(METHODS[method](bridge, [prompt], [other[i]], own))
        table = pd.concat([table for table, _ in found])
        controls = {rule: pd.concat([aside[rule] for _, aside in found]) for rule in pairs}
        unit = table.unit.iloc[-1] if method == "lens" else f"L{layer}_MLP"
        for rule in RULES:
            result = called(table, controls, rule).set_index("unit")
            rows.append(
                {"model": case.model, "method": method, "rule": rule, "nats": size}
                | {"found": float(result.clear[unit])}
            )
    return rows


@contextmanager
def planted(
    bridge: TransformerBridge, prompt: Prompt, *, layer: int, nats: float
) -> Iterator[None]:
    """Inside, MLP ``layer`` raises the decision of this prompt by ``nats``, and of no other."""
    tokens, ids, at_rest = list(prompt.branch), [], float(decide(bridge, [prompt]).value[0])
    positive, negative = prompt.branch_ids
    vector = (bridge.W_U[:, positive] - bridge.W_U[:, negative]).detach()
    scale = float(residuals(bridge, [prompt])[0, layer + 1].norm() / vector.norm())
    by = 0.0

    def see(module: object, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        ids[:] = args[0].tolist()

    def write(x: torch.Tensor, hook: object) -> torch.Tensor:
        length = len(ids[0])
        own = torch.tensor([row == tokens[-length:] for row in ids]).to(x)[:, None, None]
        last = torch.zeros(x.shape[1]).to(x)
        last[slice(None) if length == 1 else -1] = 1  # of one position: rows of a sweep
        return x + by * scale * own * last[:, None] * vector

    def moved(strength: float) -> float:
        nonlocal by
        by = strength
        return float(decide(bridge, [prompt]).value[0]) - at_rest

    handle = bridge.embed.register_forward_hook(see)
    try:
        with bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_mlp_out", write)]):
            by = float(brentq(lambda strength: moved(strength) - nats, 0, 4, xtol=1e-3))  # pyright: ignore[reportArgumentType]
            yield
    finally:
        handle.remove()


# ---------------------------------------------------------------------------------------- steering
def steering(case: Case, *, draws: int = 40) -> list[dict[str, Any]]:
    """How often an unrelated direction passes each control, and whether the right one does."""
    bridge = case.bridge
    if case.model == "smollm2-plain":
        ask = partial(encode, bridge, positive=" happy", negative=" sad")
        one = [ask(text.format(glad)) for text, glad, _ in GLAD]
        two = [ask(text.format(sad)) for text, _, sad in GLAD]
        unrelated = residuals(bridge, case.prompts)
    else:
        one, two = case.prompts, counterfactuals(case.prompts)
        rows = [bridge.tokenizer(p.text, add_special_tokens=False)["input_ids"] for p in UNRELATED]
        unrelated = last_residuals(bridge, rows)
    layer, half = bridge.cfg.n_layers // 2, len(one) // 2
    seen = (residuals(bridge, one[:half]) - residuals(bridge, two[:half]))[:, layer].mean(0)
    held = [*one[half:], *two[half:]][:8]
    rest = decide(bridge, held).value

    def moved(direction: torch.Tensor) -> float:
        with steered(bridge, direction, layer=layer, strength=0.2):
            return float(abs((decide(bridge, held).value - rest).mean()))

    streams, rng = unrelated[:, layer], np.random.default_rng(0)
    tried, kept = streams[::2], streams[1::2]
    nulls = []
    for _ in range(draws):
        signs = torch.tensor(rng.permutation(np.arange(len(tried)) % 2 * 2 - 1)).float()
        nulls.append(moved(signs @ (tried - tried.mean(0))))
    isotropic = torch.randn(draws, streams.shape[1], generator=torch.Generator().manual_seed(0))
    alike = random_directions(2 * draws, kept)[::2]  # every other one: the rest are isotropic
    limits = {
        rule: float(np.quantile([moved(direction) for direction in directions], 0.95))
        for rule, directions in (("isotropic", isotropic), ("stream", alike))
    }
    limits["both"] = max(limits.values())
    found, rows = moved(seen), []
    for rule, limit in limits.items():
        false = float(np.mean([null > limit for null in nulls]))
        rows.append(
            {"model": case.model, "rule": rule, "limit": limit, "moved": found}
            | {"false positives": false, "found": found > limit}
        )
    return rows


# ---------------------------------------------------------------------------------------- screens
def screens(case: Case, *, prompts: int = 10) -> list[dict[str, Any]]:
    """Of the strongest 20 components, how many a gradient ranks among the first 60 or 30.

    Against the exact sweep of all components at all positions, for each prompt and direction.
    """
    chosen = [p for p in case.prompts if p.counterfactual][:prompts]
    rows = []
    with shared_passes():
        exact = activation_patching(case.bridge, chosen)
        for steps in (0, 5):
            estimated = attribution_patching(case.bridge, chosen, steps=steps)
            for among in (60, 30):
                found = [
                    _recall(own, estimated, among)
                    for _, own in exact.groupby(["direction", "prompt"])
                ]
                name = "attribution patching" if steps == 0 else f"integrated, {steps} steps"
                rows.append(
                    {"model": case.model, "screen": name, "20 among the first": among}
                    | {"recall": float(np.mean(found)), "worst": float(np.min(found))}
                )
    return rows


def _recall(exact: pd.DataFrame, estimated: pd.DataFrame, among: int) -> float:
    keys = ["direction", "prompt"]
    own = estimated.merge(exact[keys].drop_duplicates(), on=keys)
    strongest = exact.set_index("component").change.abs().nlargest(20).index
    return float(
        strongest.isin(own.set_index("component").change.abs().nlargest(among).index).mean()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.controls",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Takes about half an hour.",
    )
    parser.add_argument("--draws", type=int, default=40, help="of permuted labels and subsets")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number here")
    given = parser.parse_args()
    one_thread()
    rows, directed, screened, known = [], [], [], []
    rng = np.random.default_rng(0)
    for case in cases():
        for method in tqdm(METHODS, desc=case.model):
            rows += score(case, method, given.draws, rng)
            known += plants(case, method)
        directed += steering(case, draws=given.draws)
        screened += screens(case)
    scores = pd.DataFrame(rows)
    keys = ["method", "rule", "null", "prompts"]
    wide = scores.assign(prompts=scores.prompts.where(scores.prompts == FEW, "all"))
    tables = {
        "Share of places called clear": wide.pivot_table(
            index=keys, columns="model", values="clear", sort=False
        ).reset_index(),
        "The last layer of the lens": wide[wide.method == "lens"]
        .pivot_table(index=keys, columns="model", values="last", sort=False)
        .reset_index(),
        "Planted directions, by their size in nats": pd.DataFrame(known)
        .pivot_table(index=["method", "rule", "nats"], columns="model", values="found", sort=False)
        .reset_index(),
        "Steering": pd.DataFrame(directed),
        "Screens": pd.DataFrame(screened),
    }
    print("\n".join(f"{key}: {value}" for key, value in machine().items()))
    for title, table in tables.items():
        print(f"\n{title}\n{table.to_string(index=False, float_format='{:.3f}'.format)}")
    if given.json:
        report = {"machine": machine()} | {k: t.to_dict("records") for k, t in tables.items()}
        given.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
