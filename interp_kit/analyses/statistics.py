"""Means with intervals over prompts, and tests of many effects at once."""

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


def effects(
    table: pd.DataFrame,
    by: Sequence[str],
    *,
    column: str = "change",
    noise_floor: float = 0.0,
    rate: float = 0.05,
    resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """The mean of ``column`` over prompts in each group of ``by``, tested against no effect.

    ``low`` and ``high``: percentile bootstrap over prompts, 95 %. ``p``: sign-flip permutation test
    paired by prompt, two-sided, exact where 2^n <= ``resamples``; n prompts can give no less than
    2 / 2^n, so fewer than six never reach .05. ``q``: p after Benjamini and Hochberg over all
    groups. ``clear``: q <= ``rate`` and |value| above ``noise_floor``, the numerical error of the
    computation; what is not clear is not to be interpreted.

    Returns the columns of ``by`` and ``value low high n p q clear``. Raises ``ValueError`` unless
    every group has the same prompts.
    """
    by = list(by)
    wide = table.pivot_table(index=by, columns="prompt", values=column, sort=False, dropna=False)
    wide = wide.dropna(how="all")
    if wide.isna().to_numpy().any():
        raise ValueError("expected the same prompts in every group; test such groups apart")
    values = wide.to_numpy()
    n = values.shape[1]
    rng = np.random.default_rng(seed)
    drawn = rng.integers(n, size=(resamples, n))
    low, high = np.quantile(
        np.stack([row[drawn].mean(1) for row in values]), [0.025, 0.975], axis=1
    )
    p = stats.permutation_test(
        (values,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=500,
        axis=1,
        rng=rng,
    ).pvalue
    mean = values.mean(1)
    p = np.where(mean == 0, 1.0, p)
    q = stats.false_discovery_control(p)
    result = pd.DataFrame({"value": mean, "low": low, "high": high, "n": n, "p": p, "q": q})
    result["clear"] = (q <= rate) & (abs(mean) > noise_floor)
    keys = wide.index.to_frame(index=False)
    return pd.concat([keys, result], axis=1)


def prediction_limit(values: Sequence[float], *, confidence: float = 0.99) -> float:
    """Below this lies one further value of the same population, one-sided (Student's t).

    What a control could still reach: more than the largest of a few controls, which one further
    control exceeds with probability 1 / (n + 1).
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"expected two control values or more, got {n}")
    spread = float(np.std(values, ddof=1)) * np.sqrt(1 + 1 / n)
    return float(np.mean(values) + stats.t.ppf(confidence, n - 1) * spread)


def paired_drops(
    table: pd.DataFrame,
    by: Sequence[str],
    *,
    series: str,
    first: str,
    noise_floor: float = 0.0,
    seed: int = 0,
) -> pd.DataFrame:
    """How much less ``value`` is in every other ``series`` than in ``first``, paired by prompt.

    One row for each group of ``by`` and other series: ``effects`` of first - other, and the column
    ``other``.
    """
    wide = table.pivot_table(index=[*by, "prompt"], columns=series, values="value", sort=False)
    tables = []
    for other in [name for name in wide.columns if name != first]:
        drop = pd.DataFrame({"change": wide[first] - wide[other]}).reset_index()
        tables.append(effects(drop, by, noise_floor=noise_floor, seed=seed).assign(other=other))
    return pd.concat(tables, ignore_index=True)


def rank_correlation(
    first: pd.Series, second: pd.Series, *, resamples: int = 9999, seed: int = 0
) -> pd.Series:
    """Spearman's rank correlation against a null that permutes ``second``.

    Returns ``value``; ``expected`` and 95 % range ``low high`` under the null; ``p``, two-sided.
    """
    ranks = first.rank().to_numpy(), second.rank().to_numpy()
    rng = np.random.default_rng(seed)
    value = float(np.corrcoef(*ranks)[0, 1])
    null = np.array(
        [np.corrcoef(ranks[0], rng.permutation(ranks[1]))[0, 1] for _ in range(resamples)]
    )
    low, high = np.quantile(null, [0.025, 0.975])
    p = (1 + (abs(null) >= abs(value)).sum()) / (resamples + 1)
    return pd.Series({"value": value, "expected": null.mean(), "low": low, "high": high, "p": p})
