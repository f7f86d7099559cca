"""Facts that a small real model knows: the answer has to follow the subject that is patched in.

What is known of such a fact is not its circuit but its *direction*: the stream at the subject's
tokens carries the subject in early layers, the stream at the last position carries the answer in
late ones; the reverse carries nothing. *right*: the share of facts of which a method says so. The
answer goes to the counterfactual where a stream is moved, of which more than half of the effect has
to arrive, or less than half.
"""

from collections.abc import Iterator
from itertools import pairwise

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.validity.rows import Row, row
from interp_kit import decide, load_model
from interp_kit.analyses.activation_patching import activation_patching
from interp_kit.analyses.attribution import direct_logit_attribution
from interp_kit.analyses.causal_tracing import causal_trace
from interp_kit.analyses.lens import logit_lens
from interp_kit.passes import shared_passes
from interp_kit.prompts import Prompt, encode
from interp_kit.specs import InputError

RELATIONS = {
    "The capital of {} is": {
        "France": "Paris",
        "Italy": "Rome",
        "Japan": "Tokyo",
        "Russia": "Moscow",
        "Spain": "Madrid",
        "Germany": "Berlin",
        "Egypt": "Cairo",
        "Greece": "Athens",
        "Ireland": "Dublin",
        "Cuba": "Havana",
        "Iraq": "Baghdad",
        "Austria": "Vienna",
        "Portugal": "Lisbon",
        "Poland": "Warsaw",
        "Iran": "Tehran",
        "Kenya": "Nairobi",
    },
    "The people of {} speak": {
        "France": "French",
        "Italy": "Italian",
        "Japan": "Japanese",
        "Russia": "Russian",
        "Germany": "German",
        "Spain": "Spanish",
        "Egypt": "Arabic",
        "Greece": "Greek",
        "Poland": "Polish",
        "Turkey": "Turkish",
        "Portugal": "Portuguese",
        "China": "Chinese",
    },
    "The opposite of {} is": {
        "hot": "cold",
        "big": "small",
        "up": "down",
        "left": "right",
        "good": "bad",
        "black": "white",
        "day": "night",
        "old": "young",
        "rich": "poor",
        "light": "dark",
        "fast": "slow",
        "wet": "dry",
    },
    "The color of {} is": {
        "grass": "green",
        "blood": "red",
        "snow": "white",
        "coal": "black",
        "gold": "yellow",
    },
    "A young {} is called a": {
        "cat": "kitten",
        "dog": "puppy",
        "cow": "calf",
        "sheep": "lamb",
        "bear": "cub",
    },
}
FEWEST = 40


def known_facts(bridge: TransformerBridge) -> list[Prompt]:
    """Each with the next subject of its relation as the counterfactual; both known to the model."""
    asked = []
    for text, pairs in RELATIONS.items():
        subjects = list(pairs)
        for one, other in pairwise([*subjects, subjects[0]]):
            try:
                prompt = encode(
                    bridge,
                    text.format(one),
                    counterfactual=text.format(other),
                    positive=f" {pairs[one]}",
                    negative=f" {pairs[other]}",
                    id=f"{text.format(one)}",
                    segments={"subject": [one, other]},
                )
            except InputError:  # a word that is split within the prompt
                continue
            if len(prompt.tokens) == len(prompt.counterfactual or ()) and prompt.one_branch:
                asked.append(prompt)
    own, other = (decide(bridge, given).value for given in (asked, [p.swapped() for p in asked]))
    return [p for p, here, there in zip(asked, own, other) if here > 0 > there]


def facts(base: str) -> Iterator[Row]:
    bridge = load_model(base, device="cpu")
    prompts, layers = known_facts(bridge), bridge.cfg.n_layers
    if len(prompts) < FEWEST:
        raise InputError(f"{base} knows {len(prompts)} of these facts; expected {FEWEST} or more")
    early, late = f"L{layers // 6}_RESID_PRE", f"L{layers - layers // 10}_RESID_PRE"
    stream = {"unit": "resid_pre", "among": [early, late], "directions": ["noise"]}
    with shared_passes():
        subject = activation_patching(bridge, prompts, positions="segments", **stream)
        last = activation_patching(bridge, prompts, positions="decision", **stream)
        trace = causal_trace(
            bridge, prompts, sites=("resid_post",), positions="segments", directions=("noise",)
        )
        own, other = (
            [a(bridge, p) for a in (logit_lens, direct_logit_attribution)]
            for p in (prompts, [p.swapped() for p in prompts])
        )
    for table, component, moves, kind in (
        (subject, early, True, "the subject, early layer: moves"),
        (subject, late, False, "the subject, late layer: does not"),
        (last, late, True, "the last position, late layer: moves"),
        (last, early, False, "the last position, early layer: does not"),
    ):
        for share in table[table.component == component].recovered_fraction:
            yield row("activation patching", "right", (share > 0.5) == moves, kind=kind)
    by_layer = trace.pivot_table(index="prompt", columns="layer", values="recovered_fraction")
    leaves = (by_layer < 0.5).idxmax(axis=1)
    for layer in leaves:
        kind = "leaves the subject after the first sixth of the layers"
        yield row("causal tracing", "right", layers // 6 <= layer < layers, kind=kind)
    for method, here, there in zip(("logit lens", "direct logit attribution"), own, other):
        for name, fact in _final(here).items():
            said = fact > 0 > _final(there)[f"{name}*"]
            yield row(method, "right", said, kind="both answers")


def _final(table: pd.DataFrame) -> dict[str, float]:
    """What the whole says: the last layer, or the sum of what the components write."""
    if "component" in table:
        written = table[table.kind.isin(["embed", "head", "mlp"])]
        return written.groupby("prompt", sort=False).value.sum().to_dict()
    return table[table.layer == table.layer.max()].set_index("prompt").value.to_dict()
