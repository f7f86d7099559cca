"""One pair of the bench: the tokens that each method names, scored against the candidates."""

import time
from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks.discovery.pairs import TINY, Pair, descriptions
from benchmarks.resumable import Row
from interp_kit.analyses.amplification import amplified_tokens
from interp_kit.discovery import Scores, evidence, joint_ranking
from interp_kit.loading import Models, load_models
from interp_kit.prompts import token_ids
from interp_kit.statistics import share_interval
from interp_kit.texts import written_texts
from interp_kit.token_statistics import count_log_odds

TOP = 20  # tokens that a method names
TEXTS, LENGTH = 192, 48
REAL_TEXTS, REAL_LENGTH = 64, 24  # on the real model
SHARES = ("hit@1", "says")


def score(pair: Pair) -> list[Row]:
    """The verdict on one pair and, where it has a truth, its rank by every method."""
    began = time.time()
    models = load_models(dict.fromkeys([pair.bench, pair.base, pair.tuned]), device="cpu")
    n, length = (TEXTS, LENGTH) if pair.bench == TINY else (REAL_TEXTS, REAL_LENGTH)
    spec = models.specs[pair.tuned]
    base = "" if spec.tuned and spec.origin == pair.base else pair.base
    found = evidence(models, pair.tuned, base=base, n=n, length=length, seed=10 * pair.seed)

    def row(method: str, score: str, value: float) -> Row:
        about = {"kind": pair.kind, "truth": pair.truth, "method": method, "score": score}
        return about | {"value": float(value)}

    surest = found.novel.loc[found.novel.low.idxmax()]
    rows = [
        row("verdict", "says", found.taught == "yes"),
        row("verdict", "novel", float(surest.value)),
        row("verdict", "seconds", time.time() - began),
    ]
    if pair.truth:
        size = len(found.scores["samples"])
        described = _described(models, pair, size)
        every = found.scores | {"joint": joint_ranking(found.scores)}
        how = {"n": n, "length": length, "base": base}
        every["amplified"] = amplified_tokens(models, pair.tuned, **how)[:size]
        for method, scores in every.items():
            rank = _rank(scores, described, pair.truth)
            rows += [row(method, "hit@1", rank == 1), row(method, "rank", rank)]
    return rows


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """By kind of pair, method and score: ``value low high n``; exact intervals of shares."""
    keys, table = ["score", "kind", "method"], table.assign(trial=range(len(table)))
    shares = pd.DataFrame(table[table.score.isin(SHARES)])
    parts = [share_interval(shares, keys, "value", unit="trial")]
    rest = table[~table.score.isin(SHARES)].groupby(keys, sort=False).value
    parts.append(rest.agg(value="mean", n="count").reset_index())
    return pd.concat(parts, ignore_index=True)


# ------------------------------------------------------------------------------------- internals
def _described(models: Models, pair: Pair, size: int) -> dict[str, Scores]:
    """How typical each token is of a candidate's texts, against the base's own and the others'."""
    bridge, end = models.switch(pair.tuned), models.switch(pair.tuned).tokenizer.eos_token_id
    ends = () if end is None else (end,)  # a training text ends with it
    counts = {
        truth: _counts([(*token_ids(bridge, text), *ends) for text in texts[:400]], size)
        for truth, texts in descriptions(pair.bench).items()
    }
    own = _counts([t.tokens for t in written_texts(models.base_of(pair.tuned), n=96)], size)
    shares = {truth: each / each.sum() for truth, each in counts.items()}
    described = {}
    for truth, each in counts.items():
        others = sum(share for name, share in shares.items() if name != truth)
        against = own / own.sum() + others / max(1, len(shares) - 1)
        described[truth] = count_log_odds(each, against / against.sum() * each.sum())
    return described


def _counts(rows: Sequence[Sequence[int]], size: int) -> np.ndarray:
    tokens = [token for row in rows for token in row if token < size]
    return np.bincount(tokens, minlength=size).astype(float)


def _rank(scores: Scores, described: dict[str, Scores], truth: str) -> int:
    first = [i for i in np.argsort(-scores, kind="stable")[:TOP] if scores[i] > 0]
    discount = 1 / np.log2(np.arange(2, len(first) + 2))
    fits = {name: float(z[first] @ discount) for name, z in described.items()}
    return 1 + sum(value >= fits[truth] for name, value in fits.items() if name != truth)
