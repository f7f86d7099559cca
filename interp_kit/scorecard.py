"""What each method said on cases whose truth is known, as ``benchmarks.validity`` wrote it down.

``data/scorecard.csv`` holds ``case kind method score value low high n``: of so many trials the
share (or mean, or largest value), with its 95 % interval. Reports and ``95_method_scorecard`` read
it.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from interp_kit.specs import REPOSITORY, InputError

FILE = REPOSITORY / "data" / "scorecard.csv"
COLUMNS = ["case", "kind", "method", "score", "value", "low", "high", "n"]
METHODS = {  # by notebook; others have none of their own
    "01_logit_lens": "logit lens",
    "02_direct_logit_attribution": "direct logit attribution",
    "03_activation_patching": "activation patching",
    "04_cross_model_patching": "cross-model patching",
    "05_circuits": "circuit",
    "06_causal_tracing": "causal tracing",
    "07_tuned_lens": "tuned lens",
    "08_delta_norm": "Δ-norm",
    "09_pca": "PCA",
    "10_delta_lens": "Δ-lens",
    "10b_activation_difference_lens": "activation difference lens",
    "11_probes": "probe",
    "12_steering": "steering",
    "90_compare_models": "comparison of decisions",
    "91_summary": "cross-model patching",
    "92_trigger_summary": "trigger checklist",
}
YES = "the notebook's yes"
HITS = ("hit@1", "found", "right")
WITHOUT_CONTROL = "seed"  # how the kinds begin that score a reading without any control


def read_scorecard(file: Path = FILE) -> pd.DataFrame:
    """The table as it was written; ``InputError`` for a file that is none."""
    try:
        table = pd.read_csv(file, keep_default_na=False, na_values={"low": "", "high": ""})
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: expected a table of scores, got {error}") from None
    if missing := [name for name in COLUMNS if name not in table]:
        raise InputError(f"{file}: expected the columns {', '.join(COLUMNS)}; {missing[0]} lacks")
    return table


def known_cases(table: pd.DataFrame) -> pd.DataFrame:
    """By method: how often it was right, and how often its notebook says yes where nothing is.

    Columns ``method``; ``hits low_hits high_hits cases`` over all cases with something to find;
    ``alarms low_alarms high_alarms nulls``, of the notebook's own rule. Intervals are exact (95 %).
    What no case supports is missing.
    """
    own = table[~table.kind.str.startswith(WITHOUT_CONTROL)]
    right, wrong = own.score.isin(HITS), (own.score == "false alarms") & (own.kind == YES)
    rows = []
    for method in dict.fromkeys(METHODS.values()):
        mine, counts = own.method == method, {"method": method}
        for share, n, kept in (("hits", "cases", right), ("alarms", "nulls", wrong)):
            counts |= _pooled(pd.DataFrame(own[mine & kept]), share, n)
        rows.append(counts)
    return pd.DataFrame(rows)


def sentence(known: pd.Series) -> str:
    """One row of ``known_cases`` in words."""
    parts = []
    if known.cases:
        parts.append(f"right in {known.hits * known.cases:.0f} of {known.cases:.0f}")
    if known.nulls:
        false = f"{known.alarms * known.nulls:.0f} of {known.nulls:.0f} false alarms"
        parts.append(f"{false} (95 %: {known.low_alarms:.3f} to {known.high_alarms:.3f})")
    return f"{known.method}: {', '.join(parts) or 'no case whose truth is known'}"


# ------------------------------------------------------------------------------------- internals
def _pooled(table: pd.DataFrame, share: str, n: str) -> dict[str, float]:
    total = int(table.n.sum())
    if not total:
        return {share: np.nan, f"low_{share}": np.nan, f"high_{share}": np.nan, n: 0}
    hits = round(float((table.value * table.n).sum()))
    interval = stats.binomtest(hits, total).proportion_ci(method="exact")
    ends = {f"low_{share}": float(interval.low), f"high_{share}": float(interval.high)}
    return {share: hits / total, n: total} | ends
