"""How often does a notebook name something where there is nothing?

Each null is one run of a notebook's rule on data of its own, in which the answer is known to be no;
a *false alarm* is a yes. Nulls share a model and nothing else, so that their share has an exact
interval.

``unrelated_prompts``: eight prompts and as many counterfactuals, all of them different texts that
the model wrote, and a pair of tokens that is likely after the first: nothing sets prompts apart
from counterfactuals, so no layer and no component can. ``random_adapters``: fine-tunes with a LoRA
of random numbers in one module. They change every decision a little, and the answers' no more than
that of any other tokens.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.validity.adapters import random_adapters
from benchmarks.validity.plant_cases import prompts_of
from benchmarks.validity.rows import YES, Row, row
from interp_kit import decide, load_model
from interp_kit.analyses.activation_patching import (
    cross_model_patching_and_control,
    patching_and_control,
)
from interp_kit.analyses.attribution import contrast_attribution, direct_logit_attribution
from interp_kit.analyses.causal_tracing import causal_trace
from interp_kit.analyses.lens import contrast_lens, logit_lens
from interp_kit.controls import counterfactuals, likely_pairs, with_unrelated_counterfactuals
from interp_kit.loading import load_models
from interp_kit.passes import shared_passes
from interp_kit.prompts import Prompt
from interp_kit.statistics import (
    against_control,
    effects,
    mean_interval,
    paired_difference,
    verdict,
)
from interp_kit.texts import own_texts

NULLS = 200
PROMPTS = 8
AT_ONCE = 25
TOKENS = 12
FLOOR = 1e-4  # nats: above the rounding of every model here
FALSE_ALARMS = "false alarms"


def unrelated_prompts(
    bridge: TransformerBridge, *, n: int = NULLS, seed: int = 0
) -> list[list[Prompt]]:
    """By null, prompts whose counterfactuals are other texts; all texts differ."""
    wanted, rows = 2 * n * PROMPTS, dict[tuple[int, ...], None]()
    while len(rows) < wanted:
        drawn = own_texts(bridge, wanted, length=TOKENS, seed=seed + len(rows))
        rows.update(dict.fromkeys(text for text in drawn if len(text) == TOKENS))
    texts, made = list(rows)[:wanted], []
    for null in range(n):
        own = texts[2 * null * PROMPTS :][: 2 * PROMPTS]
        prompts = [
            Prompt(
                id=f"{null}/{i}",
                group=str(i),
                tokens=own[2 * i],
                counterfactual=own[2 * i + 1],
                positive=(0,),
                negative=(1,),
            )
            for i in range(PROMPTS)
        ]
        first, second = likely_pairs(bridge, prompts[:1], n=1, seed=seed + null)[0, 0].tolist()
        made.append([replace(p, positive=(first,), negative=(second,)) for p in prompts])
    return made


def reading(base: str, *, n: int = NULLS) -> Iterator[Row]:
    """01 and 02: layers and components that are clear of the control, and the notebooks' yes.

    Also the plain t interval of the decision, prompt less counterfactual, that others build on.
    """
    bridge = load_model(base, device="cpu")
    ways: dict[str, tuple[Any, Any, str]] = {
        "logit lens": (logit_lens, contrast_lens, "layer"),
        "direct logit attribution": (direct_logit_attribution, contrast_attribution, "component"),
    }
    for prompts in tqdm(unrelated_prompts(bridge, n=n), desc=f"{base}, reading", unit="null"):
        pairs, swapped = likely_pairs(bridge, prompts), counterfactuals(prompts)
        decisions = decide(bridge, prompts)
        decided = _decided(decisions)
        apart = decisions.value - decide(bridge, swapped).value
        said = _decided(decisions.assign(value=apart))
        yield row("comparison of decisions", FALSE_ALARMS, said, kind=YES)
        for method, (analysis, contrast, unit) in ways.items():
            with shared_passes():
                own, other = analysis(bridge, prompts), analysis(bridge, swapped)
                ours, theirs = (contrast(bridge, p, pairs) for p in (prompts, swapped))
            tested = against_control(
                paired_difference(own, other, ["prompt", unit]),
                paired_difference(ours, theirs, ["prompt", unit, "draw"]),
                [unit],
                noise_floor=FLOOR,
                resamples=999,
            )
            yield row(method, FALSE_ALARMS, tested.clear.any(), kind=f"any {unit}")
            if unit == "layer":
                said = bool(tested.clear.iloc[-1]) and decided
            else:
                said = tested.value[tested.clear].sum() / tested.value.sum() > 0.5 and decided
            yield row(method, FALSE_ALARMS, said, kind=YES)


def patching(base: str) -> Iterator[Row]:
    """03 and 06: components that are clear, in both directions; a layer beyond the control."""
    bridge = load_model(base, device="cpu")
    for prompts in tqdm(unrelated_prompts(bridge), desc=f"{base}, patching", unit="null"):
        pairs = likely_pairs(bridge, prompts)
        with shared_passes():
            table, others = patching_and_control(bridge, prompts, pairs, positions="decision")
            trace = causal_trace(bridge, prompts, sites=("block",), directions=("noise",))
            unrelated = with_unrelated_counterfactuals(prompts)
            other = causal_trace(bridge, unrelated, sites=("block",), directions=("noise",))
        by = ["direction", "component"]
        how: dict[str, Any] = {"column": "change", "noise_floor": FLOOR, "resamples": 999}
        tested = against_control(table, others, by, **how)
        clear = tested.groupby("direction").clear.any()
        yield row("activation patching", FALSE_ALARMS, clear.any(), kind="any component")
        yield row("activation patching", FALSE_ALARMS, clear.all(), kind=YES)
        said = _layer_decides(trace, other)
        yield row("causal tracing", FALSE_ALARMS, said, kind=YES)


def across_models(base: str) -> Iterator[Row]:
    """04: components of a random fine-tune that are clear of the control."""
    prompts = prompts_of(base)
    with tempfile.TemporaryDirectory() as folder:
        names = random_adapters(base, Path(folder), n=NULLS)
        for at in range(0, NULLS, AT_ONCE):  # every switch goes through all that are loaded
            yield from _across(base, names[at : at + AT_ONCE], prompts)


def _across(base: str, names: list[str], prompts: list[Prompt]) -> Iterator[Row]:
    models = load_models([base, *names], device="cpu")
    before = decide(models.switch(base), prompts)
    for name in tqdm(names, desc=f"{base}, across models", unit="null"):
        change = paired_difference(decide(models.switch(name), prompts), before, ["prompt"])
        with shared_passes():
            table, others = cross_model_patching_and_control(
                models, name, base, prompts, positions="decision"
            )
        how: dict[str, Any] = {"column": "change", "noise_floor": FLOOR, "resamples": 999}
        clear = against_control(table, others, ["component"], **how).clear.any()
        moved = _decided(change)
        yield row("cross-model patching", FALSE_ALARMS, clear, kind="any component")
        yield row("cross-model patching", FALSE_ALARMS, clear and moved, kind=YES)
        plain = effects(table, ["component"], resamples=999, noise_floor=FLOOR).clear.any()
        yield row("cross-model patching", FALSE_ALARMS, plain, kind="without the control")


# ------------------------------------------------------------------------------------- internals
def _decided(table: pd.DataFrame) -> bool:
    mean = mean_interval(table)
    return bool(mean.low.iloc[0] > 0 or mean.high.iloc[0] < 0)


def _layer_decides(trace: pd.DataFrame, other: pd.DataFrame) -> bool:
    """06: whether writing the best layer in recovers more than an unrelated prompt does there."""
    gap = trace.assign(value=trace.source - trace.baseline).drop_duplicates("prompt")
    scale = other.prompt.map(gap.set_index("prompt").value)
    by_layer = trace.dropna(subset="recovered_fraction")
    best = mean_interval(by_layer, ["layer"], column="recovered_fraction").nlargest(1, "value")
    beside = (other.change / scale)[other.layer == best.layer.item()].abs().mean()
    beyond = verdict(best.low, best.high, ">", beside) == "yes"
    return beyond and _decided(gap)
