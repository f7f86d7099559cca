"""Rows of the benchmark, and their summary: of every case and method, how often, of how many."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from interp_kit.statistics import mean_interval, share_interval

Row = dict[str, Any]

KEYS = ["case", "kind", "method", "score"]
# Shares of independent trials, with exact intervals; of "forbidden effect" the largest counts.
RATES = ("hit@1", "false alarms", "found", "right", "flipped")
WORST = ("forbidden effect",)
YES = "the notebook's yes"  # the kind of null on which a notebook's own rule is scored


def row(method: str, score: str, value: float, *, kind: str = "") -> Row:
    """One trial: ``value`` of ``score``; ``kind`` tells the trials of one case apart."""
    return {"kind": kind, "method": method, "score": score, "value": float(value)}


def summary(rows: Sequence[Row]) -> pd.DataFrame:
    """``case kind method score value low high n``: means with 95 % intervals over trials.

    The interval of a rate is exact (Clopper and Pearson), that of another mean Student's t, and a
    largest value has none. What was not measured has no row: it is missing, not 0.
    """
    table = pd.DataFrame(rows, columns=[*KEYS, "value"])
    table["trial"] = range(len(table))
    rate, worst = table.score.isin(RATES), table.score.isin(WORST)
    parts = []
    if rate.any():
        own = pd.DataFrame(table[rate])
        parts.append(share_interval(own, KEYS, "value", unit="trial"))
    if worst.any():
        own = table[worst].groupby(KEYS, sort=False).value
        parts.append(own.agg(value="max", n="count").reset_index())
    rest = pd.DataFrame(table[~rate & ~worst])
    if len(rest):
        parts.append(mean_interval(rest.assign(prompt=rest.trial), KEYS))
    columns = [*KEYS, "value", "low", "high", "n"]
    return pd.concat(parts, ignore_index=True).reindex(columns=columns) if parts else table
