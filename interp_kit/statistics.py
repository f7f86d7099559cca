"""Means with intervals over prompts, and tests of many effects at once."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats

FEWEST_PROMPTS = 6  # with which a sign-flip test can reach .05
FLIPS = 2048  # of a test over many places


def mean_interval(
    table: pd.DataFrame,
    by: Sequence[str] = (),
    *,
    column: str = "value",
    confidence: float = 0.95,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> pd.DataFrame:
    """The mean of ``column`` over prompts in each group of ``by``, with Student's t interval.

    Prompts are the independent units: rows are averaged within a prompt first. The interval is of
    the mean over prompts *like these*; with one prompt it is missing. It ends where values cannot
    be: ``within`` (0, 1) for probabilities.

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
    low, high = (np.clip(result.value + sign * half, *within) for sign in (-1, 1))
    return result.assign(low=low, high=high).loc[:, [*by, "value", "low", "high", "n"]]


def share_interval(
    table: pd.DataFrame, by: Sequence[str], column: str, *, unit: str = "question"
) -> pd.DataFrame:
    """The mean of a share in [0, 1], with the 95 % interval of Clopper and Pearson.

    The trials are what ``unit`` names: rows are averaged within each first. The interval is exact
    for trials that are 0 or 1, conservative for values between; unlike a bootstrap interval it has
    a width even where all trials agree. Returns the columns of ``by`` and ``value low high n``.
    """

    def interval(x: np.ndarray) -> tuple[float, float]:
        hits, n = float(x.sum()), len(x)
        misses = n - hits
        low = stats.beta.ppf(0.025, hits, misses + 1) if hits > 0 else 0.0
        high = stats.beta.ppf(0.975, hits + 1, misses) if misses > 0 else 1.0
        return float(low), float(high)

    return _intervals(table, by, column, unit, interval)


def bootstrap_interval(
    table: pd.DataFrame,
    by: Sequence[str],
    column: str,
    *,
    unit: str = "question",
    resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """The mean, with the 95 % percentile interval of a bootstrap over what ``unit`` names.

    Rows are averaged within each unit first; with a single unit the interval is missing. Returns
    the columns of ``by`` and ``value low high n``.
    """

    def interval(x: np.ndarray) -> tuple[float, float]:
        if len(x) < 2:
            return float("nan"), float("nan")
        drawn = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
        low, high = np.quantile(x[drawn].mean(1), [0.025, 0.975])
        return float(low), float(high)

    return _intervals(table, by, column, unit, interval)


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
    2 / 2^n, so fewer than six never reach .05, and a single one has no interval either. ``q``: p
    after Benjamini and Hochberg over all groups. ``clear``: q <= ``rate`` and |value| above
    ``noise_floor``, the numerical error of the computation; what is not clear is not to be
    interpreted.

    Returns the columns of ``by`` and ``value low high n p q clear``. Raises ``ValueError`` unless
    every group has the same prompts.
    """
    wide = _by_prompt(table, by, column)
    values = wide.to_numpy()
    n = values.shape[1]
    rng = np.random.default_rng(seed)
    drawn = rng.integers(n, size=(resamples, n))
    low, high = np.quantile(
        np.stack([row[drawn].mean(1) for row in values]), [0.025, 0.975], axis=1
    )
    mean, p = values.mean(1), np.ones(len(values))
    if n > 1:
        p = _sign_flip_p(values, resamples, rng)
    else:  # the sign of a single prompt says nothing
        low = high = np.full(len(values), np.nan)
    p = np.where(mean == 0, 1.0, p)
    q = stats.false_discovery_control(p)
    result = pd.DataFrame({"value": mean, "low": low, "high": high, "n": n, "p": p, "q": q})
    result["clear"] = (q <= rate) & (abs(mean) > noise_floor)
    keys = wide.index.to_frame(index=False)
    return pd.concat([keys, result], axis=1)


def paired_difference(
    table: pd.DataFrame, other: pd.DataFrame, by: Sequence[str], *, column: str = "value"
) -> pd.DataFrame:
    """``table`` with the ``column`` of ``other`` taken away, row by row.

    Rows belong together where the columns ``by`` are the same; raises ``ValueError`` unless every
    row has just one of the other's.
    """
    ours, theirs = (pd.MultiIndex.from_frame(pd.DataFrame(t[list(by)])) for t in (table, other))
    if theirs.has_duplicates or set(theirs) != set(ours) or ours.has_duplicates:
        raise ValueError(f"expected both tables to have the same rows by {', '.join(by)}")
    less = pd.Series(other[column].to_numpy(), theirs).reindex(ours)
    return table.assign(**{column: table[column].to_numpy() - less.to_numpy()})


def against_control(
    table: pd.DataFrame,
    control: pd.DataFrame,
    by: Sequence[str],
    *,
    column: str = "value",
    noise_floor: float = 0.0,
    rate: float = 0.05,
    resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """``effects`` of the decision, beside what other contrasts show at the same place.

    ``control`` has the columns ``by``, ``prompt``, ``draw`` and ``column``: the same for pairs of
    tokens that the prompts do not ask for (``controls.likely_pairs``). The column ``control`` is
    the absolute mean over prompts that at most ``rate`` of the draws and the decision together may
    reach; ``beyond``, whether the decision's exceeds it. ``clear`` asks for that, for the noise
    floor, and, where there are ``FEWEST_PROMPTS`` or more, for q <= ``rate``. With fewer no test
    can say so: at most ``rate`` of all places are then beyond the control by chance, if the
    decision is a pair of tokens like the others.

    ``q`` is of a sign-flip test of those places whose root mean square over prompts exceeds the
    control (a choice that signs do not enter), with one distribution of chance for all of them: the
    few flips of few prompts would otherwise leave no place among hundreds a chance. Else it is 1.
    """
    by = list(by)
    how: dict[str, Any] = {"noise_floor": noise_floor, "rate": rate, "seed": seed}
    result = effects(table, by, column=column, resamples=resamples, **how)
    draws = pd.DataFrame(control.groupby([*by, "draw"], sort=False)[[column]].mean()).abs()
    reached = int(rate * (1 + control.draw.nunique()))  # so many draws may: with fewer, none is
    limits: Any = draws.groupby(level=by, sort=False)[column].apply(
        lambda own: np.sort(own)[-reached] if reached else np.inf
    )
    result = result.merge(limits.rename("control").reset_index(), on=by, how="left")
    values = _by_prompt(table, by, column).to_numpy()
    large = np.sqrt((values**2).mean(1)) > result.control.to_numpy()
    result["q"] = 1.0
    result.loc[large, "q"] = _pooled_q(values[large], np.random.default_rng(seed))
    result["beyond"] = result.value.abs() > result.control
    tested = (result.q <= rate) | (result.n < FEWEST_PROMPTS)
    result["clear"] = tested & result.beyond & (result.value.abs() > noise_floor)
    return result


def settled(
    values: Float[np.ndarray, "*series layer"], *, share: float = 0.0
) -> Int[np.ndarray, "*series"]:
    """The first layer (by index) from which a curve has the sign of its last value, and keeps it.

    With a ``share`` in (0, 1], the first from which it has at least this share of the last value's
    size as well. 0 counts as negative.
    """
    last = values[..., -1:]
    away = ((values > 0) != (last > 0)) | (abs(values) < share * abs(last))
    return (away * np.arange(1, values.shape[-1] + 1)).max(-1)


def verdict(
    low: float | Sequence[float] | pd.Series,
    high: float | Sequence[float] | pd.Series,
    sign: Literal["<", ">"],
    threshold: float,
) -> Literal["yes", "no", "cannot tell"]:
    """Whether a value lies beyond ``threshold`` on the side of ``sign``, decided by its interval.

    "yes" if all of [low, high] does, "no" if none of it does, else "cannot tell". Of several
    simultaneous intervals: "yes" if one of them says so, "no" if all say no. A bound that is NaN
    leaves the question open, and so does having no interval.
    """
    lows, highs = np.atleast_1d(np.asarray(low, float)), np.atleast_1d(np.asarray(high, float))
    if sign == "<":
        lows, highs, threshold = -highs, -lows, -threshold
    if (lows > threshold).any():
        return "yes"
    return "no" if len(highs) and bool((highs <= threshold).all()) else "cannot tell"


def breaking_layer(
    table: pd.DataFrame,
    *,
    series: str,
    reference: str,
    share: float = 0.5,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """The layer at which each other ``series`` breaks away from the ``reference``.

    ``table`` has ``layer prompt value`` and ``series``. It is the first layer from which the mean
    difference from the reference, paired by prompt, has the sign of the last layer's and at least
    ``share`` of its size, and keeps both. ``low high``: 95 % of it, bootstrap over prompts.

    Returns ``series value low high n gap``; ``gap`` is the mean difference at the last layer.
    """
    wide = table.pivot_table(index=[series, "prompt"], columns="layer", values="value", sort=False)
    layers = wide.columns.to_numpy()
    base = wide.loc[reference]
    rng = np.random.default_rng(seed)
    rows = []
    for name in [n for n in wide.index.unique(series) if n != reference]:
        gap = (wide.loc[name] - base).dropna().to_numpy()
        drawn = rng.integers(len(gap), size=(resamples, len(gap)))
        means = np.concatenate([gap.mean(0, keepdims=True), gap[drawn].mean(1)])
        first = layers[settled(means, share=share)]
        low, high = np.quantile(first[1:], [0.025, 0.975])
        rows.append((name, float(first[0]), low, high, len(gap), means[0, -1]))
    return pd.DataFrame(rows, columns=[series, "value", "low", "high", "n", "gap"])


def prediction_limit(values: Sequence[float], *, confidence: float = 0.99) -> float:
    """The upper limit of one further value from the same population, one-sided (Student's t).

    It says how high another control could come. The largest of n controls would not do: another
    control exceeds that with probability 1 / (n + 1).
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"expected two control values or more, got {n}")
    spread = float(np.std(values, ddof=1)) * np.sqrt(1 + 1 / n)
    return float(np.mean(values) + stats.t.ppf(confidence, n - 1) * spread)


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


def rank_agreement(
    table: pd.DataFrame, columns: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Spearman's rank correlation of every two ``columns`` over the rows.

    ``low high``: percentile bootstrap over rows, 95 %; ``p``: of ``rank_correlation``. All are
    missing where a column is constant; the interval is also missing where a column is constant in
    more than one resample in twenty.
    Returns ``first second value low high n p``.
    """
    rng, rows = np.random.default_rng(seed), []
    for first, second in combinations(columns, 2):
        pair = table[[first, second]].dropna()
        result: dict[str, Any] = {"first": first, "second": second, "n": len(pair)}
        if len(pair) > 2 and bool(np.all(pair.nunique() > 1)):
            found = rank_correlation(
                pd.Series(pair[first]), pd.Series(pair[second]), resamples=resamples, seed=seed
            )
            values = pair.to_numpy()
            drawn = [values[rng.integers(len(pair), size=len(pair))] for _ in range(resamples)]
            varied = [d for d in drawn if (d != d[0]).any(0).all()]
            spread = [np.corrcoef(stats.rankdata(d, axis=0).T)[0, 1] for d in varied]
            low = high = np.nan
            if len(varied) >= 0.95 * resamples:
                low, high = np.quantile(spread, [0.025, 0.975])
            result |= {"value": found.value, "low": low, "high": high, "p": found.p}
        rows.append(result)
    return pd.DataFrame(rows, columns=["first", "second", "value", "low", "high", "n", "p"])


def _sign_flip_p(
    values: Float[np.ndarray, "group prompt"], resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, "group"]:
    """Of the mean over prompts, were the sign of each arbitrary; two-sided."""
    tested: Any = stats.permutation_test(
        (values,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=500,
        axis=1,
        rng=rng,
    )
    return tested.pvalue


def _by_prompt(table: pd.DataFrame, by: Sequence[str], column: str) -> pd.DataFrame:
    """A row for each group of ``by``, a column for each prompt."""
    how: dict[str, Any] = {"index": list(by), "columns": "prompt", "values": column}
    wide = table.pivot_table(**how, sort=False, dropna=False).dropna(how="all")
    if wide.isna().to_numpy().any():
        raise ValueError("expected the same prompts in every group; test such groups apart")
    return wide


def _pooled_q(
    values: Float[np.ndarray, "group prompt"], rng: np.random.Generator
) -> Float[np.ndarray, "group"]:
    """Of the mean over prompts in units of the root mean square, after Benjamini and Hochberg.

    The signs of prompts are flipped in all groups at once. p is the share of all groups' values,
    over all flips, that reach a group's own (Tusher et al., doi:10.1073/pnas.091062498).
    """
    n = values.shape[1]
    if not values.size or n < 2:
        return np.ones(len(values))
    signs = rng.choice([-1, 1], (FLIPS, n))
    signs[0] = 1
    size = np.sqrt(n * (values**2).sum(1, keepdims=True))
    statistic = abs(values @ signs.T) / size
    chance = np.sort(statistic.ravel())
    below = np.searchsorted(chance, statistic[:, 0] - 1e-9)
    return stats.false_discovery_control(1 - below / len(chance))


def _intervals(
    table: pd.DataFrame,
    by: Sequence[str],
    column: str,
    unit: str,
    interval: Callable[[np.ndarray], tuple[float, float]],
) -> pd.DataFrame:
    """``interval`` of the units' values in each group; one row of NaN if there is none."""
    keys = list(by)
    frame = table if keys else table.assign(all="")
    each = frame.groupby([*(keys or ["all"]), unit], sort=False)[[column]].mean()
    groups: dict[tuple[Any, ...], list[float]] = {}
    for name, value in pd.DataFrame(each).itertuples(name=None):
        groups.setdefault(name[:-1] if keys else (), []).append(value)
    rows = [
        (*name, float(np.mean(values)), *interval(np.array(values)), len(values))
        for name, values in groups.items()
    ]
    if not keys and not rows:
        rows = [(np.nan, np.nan, np.nan, 0)]
    return pd.DataFrame(rows, columns=pd.Index([*keys, "value", "low", "high", "n"]))
