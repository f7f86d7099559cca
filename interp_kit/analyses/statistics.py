"""Means with intervals over prompts."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats


def mean_interval(
    table: pd.DataFrame, by: Sequence[str] = (), *, column: str = "value", confidence: float = 0.95
) -> pd.DataFrame:
    """The mean of ``column`` over prompts in each group of ``by``, with Student's t interval.

    Prompts are the independent units: rows are averaged within a prompt first. The interval is of
    the mean over prompts *like these*; with one prompt it is missing.

    Returns the columns of ``by`` and ``value low high n``.
    """
    by = list(by)
    frame = table if by else table.assign(all="")
    keys = by or ["all"]
    each = pd.DataFrame(frame.groupby([*keys, "prompt"], sort=False, dropna=False)[[column]].mean())
    groups = each.groupby(level=list(range(len(keys))), sort=False, dropna=False)[column]
    result = pd.DataFrame(groups.agg(value="mean", spread="std", n="count")).reset_index()
    factor = stats.t.ppf((1 + confidence) / 2, np.maximum(result.n - 1, 1))
    half = np.where(result.n > 1, factor * result.spread / np.sqrt(result.n), np.nan)
    result = result.assign(low=result.value - half, high=result.value + half)
    return result.loc[:, [*by, "value", "low", "high", "n"]]
