"""Where do two models predict otherwise? KL by token, novel texts, the contexts that differ most.

KL(tuned || base) of every next-token prediction, in nats, over texts that the base wrote and over
the fine-tune's own. A text is *novel* where the fine-tune gives it more than ``FACTOR`` times the
probability that the base does. Of what the base itself writes at most one text in ``FACTOR`` can
be, by Markov's inequality, whatever the fine-tune is: so a larger share of the fine-tune's own
texts says that it writes something that the base does not, with no other control needed.
"""

import math

import pandas as pd

from interp_kit.token_differences import TokenDifferences

FACTOR = 100.0
APART = 8  # tokens between two contexts of one text


def novel_texts(table: pd.DataFrame, *, factor: float = FACTOR) -> pd.DataFrame:
    """``prompt register log_ratio value`` by text: is it novel?

    ``table`` is ``TokenDifferences.table``. ``log_ratio`` = log p_tuned - log p_base of what was
    written, in nats; ``value`` is 1 where it exceeds log ``factor``, else 0.
    """
    written = table[table.written]
    ratio = (written.base - written.tuned).groupby([written.prompt, written.register], sort=False)
    rows = ratio.sum().rename("log_ratio").reset_index()
    return rows.assign(value=(rows.log_ratio > math.log(factor)).astype(float))


def top_contexts(found: TokenDifferences, *, n: int = 12) -> pd.DataFrame:
    """The predictions that differ most, most first: ``text pos kl raised lowered``.

    ``pos`` is the place of the token that is predicted; ``raised`` is the token that gains most of
    the KL there, ``lowered`` the one that the base finds likelier and whose log p falls most. Of
    predictions of one text within ``APART`` tokens, and of those that raise the same token after
    the same token, the first counts.
    """
    texts, places = found.text.tolist(), found.pos.tolist()
    tokens, raised = found.token.tolist(), found.gained[:, 0].tolist()
    kept: list[int] = []
    seen: set[tuple[int, int]] = set()
    for i in found.kl.argsort(descending=True).tolist():
        before = tokens[i - 1] if i and texts[i - 1] == texts[i] else -1
        near = any(texts[k] == texts[i] and abs(places[k] - places[i]) < APART for k in kept)
        if not near and (before, raised[i]) not in seen:
            kept.append(i)
            seen.add((before, raised[i]))
        if len(kept) == n:
            break
    return pd.DataFrame(
        {
            "text": [texts[i] for i in kept],
            "pos": [places[i] for i in kept],
            "kl": [float(found.kl[i]) for i in kept],
            "raised": [raised[i] for i in kept],
            "lowered": [int(found.lost[i, 0]) for i in kept],
        }
    )


def windows(
    table: pd.DataFrame, contexts: pd.DataFrame, *, before: int = 8, after: int = 3
) -> pd.DataFrame:
    """The tokens around each context: ``context place token value``, ``value`` the KL in nats."""
    parts, by_text = [], dict(iter(table.groupby("prompt")))
    for i, (text, pos) in enumerate(zip(contexts.text, contexts.pos), 1):
        own: pd.DataFrame = by_text[str(text)]
        near = pd.DataFrame(own[own.pos.between(pos - before, pos + after)])
        place = near.pos - pos
        parts.append(
            pd.DataFrame(near[["token"]]).assign(context=str(i), place=place, value=near.kl)
        )
    return pd.concat(parts, ignore_index=True)
