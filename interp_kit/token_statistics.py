"""Which tokens are typical of one set of texts against another, and do others' tokens belong to it?

Source: Monroe et al., "Fightin' Words", Political Analysis 2008 (log-odds of words between two
corpora, with a prior).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Num
from torch import Tensor

from interp_kit.specs import InputError

PRIOR = 500  # counts that the prior is worth: as much as so many tokens of text


def token_log_odds(
    own: Sequence[Sequence[int]], ordinary: Sequence[Sequence[int]], vocabulary: int
) -> Float[np.ndarray, "vocab"]:
    """How typical each token is of ``own`` against ``ordinary``: z of the log-odds ratio.

    With the counts of both together as prior; 0 for a token of neither.
    """
    y, x = (
        np.bincount([token for row in rows for token in row], minlength=vocabulary)
        for rows in (own, ordinary)
    )
    return count_log_odds(y, x)


def count_log_odds(
    own: Num[np.ndarray, "vocab"], other: Num[np.ndarray, "vocab"]
) -> Float[np.ndarray, "vocab"]:
    """``token_log_odds`` of counts, by token."""
    y, x = np.asarray(own, float), np.asarray(other, float)
    prior = (x + y) * (PRIOR / (x + y).sum())
    seen = prior > 0
    z = np.zeros(len(y))

    def log_odds(count: np.ndarray) -> np.ndarray:
        with_prior = count[seen] + prior[seen]
        return np.log(with_prior / (count.sum() + prior.sum() - with_prior))

    spread = np.sqrt(1 / (y[seen] + prior[seen]) + 1 / (x[seen] + prior[seen]))
    z[seen] = (log_odds(y) - log_odds(x)) / spread
    return z


def token_relevance(
    lens: Float[Tensor, "row vocab"],
    log_odds: Float[np.ndarray, "vocab"],
    *,
    top: int = 10,
    resamples: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """Are the most promoted tokens those of the fine-tuning texts? One row for each of ``lens``.

    ``value``: mean log-odds z of the ``top`` most promoted tokens that either corpus has. ``p``:
    of that or more among as many random ones of these tokens; ``expected`` is their mean.
    """
    seen = np.flatnonzero(log_odds)
    z = log_odds[seen]
    if len(seen) < top:
        raise InputError(f"both corpora have {len(seen)} tokens; {top} were asked for: give more")
    best = lens[:, torch.tensor(seen)].topk(top, dim=1).indices.numpy()
    values = z[best].mean(1)
    rng = np.random.default_rng(seed)
    chance = np.array([z[rng.choice(len(z), top, replace=False)].mean() for _ in range(resamples)])
    p = (1 + (chance[None] >= values[:, None]).sum(1)) / (resamples + 1)
    return pd.DataFrame({"value": values, "expected": chance.mean(), "p": p})
