"""The same dilemma with its options in either order: is the choice by content or by position?

A model that favours a place ("1", whatever is named first) favours opposite contents in the two
orders. The mean of both decisions is free of that; a word that the model prefers anyway is in the
decision on the counterfactual, too, and cancels in the difference.
"""

from collections.abc import Sequence
from itertools import combinations

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.decisions import decide
from interp_kit.prompts import Prompt
from interp_kit.records import CANNOT_TELL, Named, answer, named
from interp_kit.statistics import mean_interval, share_interval, verdict

COLUMNS = ["prompt", "content", "bias", "consistent"]


def swapped_options(
    bridge: TransformerBridge, prompts: Sequence[Prompt], decided: pd.DataFrame | None = None
) -> pd.DataFrame:
    """The decision in both orders of the options, of every dilemma that is asked in both.

    Two prompts of one ``group`` are such a pair, with decisions d1 and d2, where their positive and
    negative answers are exchanged ("1" for "2"), or where both have the same answers, words, and
    name them in opposite orders (each where it is last named). Returns one row for each:
    ``prompt`` (the group) ``content`` = (d1 + d2) / 2, towards the positive option; ``bias`` = half
    of how much more its first option is favoured than its second, both in nats; ``consistent``,
    whether the same content is chosen in both. No rows if no prompt has such a partner. ``decided``
    is what ``decide`` returned for these prompts, where that is known.
    """
    table = decide(bridge, prompts) if decided is None else decided
    values = dict(zip([p.id for p in prompts], table.value))
    rows = []
    for one, other in combinations(prompts, 2):
        first = _favours_first(bridge, one, other)
        if one.group == other.group and first is not None:
            d1, d2 = values[one.id], values[other.id]
            rows.append(
                {
                    "prompt": one.group,
                    "content": (d1 + d2) / 2,
                    "bias": (d1 - d2) / 2 * (1 if first else -1),
                    "consistent": (d1 > 0) == (d2 > 0),
                }
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def choice_by_content(
    asked: pd.DataFrame, changed: pd.DataFrame, label: str
) -> tuple[dict[str, Named], dict[str, str]]:
    """Does the model choose what is right, whatever the order? Summary values and answers.

    ``asked`` and ``changed`` are ``swapped_options`` of the prompts and of their counterfactuals,
    ``label`` what the positive answer is called. Its choices tell something where the same option
    wins in both orders in more than half of the dilemmas, with the whole interval; else the first
    answer is "cannot tell". The counterfactual's effect is half of the difference in content, in
    nats, positive towards what is right in each. Intervals are over dilemmas; none, no answers.
    """
    if asked.empty:
        return {}, {}
    content = mean_interval(asked, column="content")
    moved = asked.content.to_numpy() - changed.content.to_numpy()
    effect = mean_interval(asked.assign(value=moved / 2))
    same = share_interval(asked, [], "consistent", unit="prompt")
    summary = {
        "bias_for_the_first_option": named(mean_interval(asked, column="bias"), unit="nats"),
        "same_in_both_orders": named(same, unit="of dilemmas"),
        "mean_of_both_orders": named(content, unit="nats"),
        "effect_of_the_counterfactual": named(effect, unit="nats"),
    }
    low, high = content.low.item(), content.high.item()
    chooses = "yes" if low > 0 else "no" if high < 0 else CANNOT_TELL
    shown, because = ["mean_of_both_orders"], ""
    by_content = verdict(same.low, same.high, ">", 0.5)
    if by_content != "yes":
        because = f"its choices {'' if by_content == 'no' else 'may '}go by the order"
        chooses, shown = CANNOT_TELL, ["same_in_both_orders", "bias_for_the_first_option"]
    answers = {
        f"Does the model choose what is {label}, in either order?": answer(
            chooses, summary, *shown, because=because
        ),
        "Does the counterfactual move it towards the other option?": answer(
            verdict(effect.low, effect.high, ">", 0.0), summary, "effect_of_the_counterfactual"
        ),
    }
    return summary, answers


# ------------------------------------------------------------------------------------- internals
def _favours_first(bridge: TransformerBridge, one: Prompt, other: Prompt) -> bool | None:
    """Whether the positive answer of ``one`` is its first option; ``None`` if they are no pair."""
    answers, theirs = (one.positive, one.negative), (other.positive, other.negative)
    positive, negative = (bridge.tokenizer.decode(answer).strip() for answer in answers)
    if theirs == answers[::-1]:
        return positive < negative
    first, second = (
        text.rfind(positive) < text.rfind(negative)
        for text in map(bridge.tokenizer.decode, (one.tokens, other.tokens))
    )
    return first if theirs == answers and first != second else None
