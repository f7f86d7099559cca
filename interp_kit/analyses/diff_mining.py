"""Diff Mining: which tokens does fine-tuning raise, over texts that are not about it?

At every position the tokens that rise most from base to tuned are listed, and counted over texts.
Any change of weights raises some tokens, so counts are compared with those of a change that means
nothing, such as rounding. Tokens that rise in the same texts form groups, by a nonnegative
factorisation of texts x tokens, and a group counts only if other texts give it again.

Source: Diff Mining of the diffing toolkit (science-of-finetuning, 2026); NMF: Lee & Seung,
Nature 1999.
"""

import warnings
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csr_array
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning

from interp_kit.specs import InputError
from interp_kit.token_differences import TokenDifferences

Way = Literal["risen", "gained"]


def mined(
    found: TokenDifferences, vocabulary: int, *, way: Way = "risen", top: int = 10
) -> csr_array:
    """Of every text and token, [text vocabulary], how strongly it was raised.

    ``risen``: at how many positions it is among the ``top`` tokens whose log p rises most.
    ``gained``: the sum over positions of its part in the KL, p_tuned (log p_tuned - log p_base), in
    nats, where it is among the ``top``: what the fine-tune is now likely to say.
    """
    tokens = getattr(found, way)[:, :top]
    values = np.ones(tokens.shape) if way == "risen" else found.gained_by[:, :top].clamp(min=0)
    text = found.text[:, None].expand(tokens.shape)
    n_texts = int(found.text.max()) + 1
    whole = coo_array(
        (np.asarray(values).ravel(), (text.flatten().numpy(), tokens.flatten().numpy())),
        shape=(n_texts, vocabulary),
    )
    return csr_array(whole)


def mean_gain(found: TokenDifferences, vocabulary: int) -> Float[np.ndarray, "vocab"]:
    """What each token carries of the KL, in nats a token of text (``mined``, by ``gained``)."""
    return mined(found, vocabulary, way="gained").sum(0) / len(found.kl)


def net_gain(found: TokenDifferences, vocabulary: int) -> Float[np.ndarray, "vocab"]:
    """What each token carries of KL(tuned || base) less what of KL(base || tuned), nats a token.

    A common word is raised in some contexts and lowered in others, which cancels; what is left is
    what the fine-tune says more on the whole.
    """
    up, down = (
        np.bincount(
            tokens.flatten().numpy(), by.flatten().clamp(min=0).double().numpy(), vocabulary
        )
        for tokens, by in ((found.gained, found.gained_by), (found.lost, found.lost_by))
    )
    return (up - down) / len(found.kl)


def token_groups(
    counts: csr_array, n: int, *, seed: int = 0
) -> tuple[Float[np.ndarray, "text group"], Float[np.ndarray, "group vocab"]]:
    """Groups of tokens that are raised in the same texts: ``counts`` ~ weights @ groups, all >= 0.

    Each group sums to 1 over the vocabulary, so that a weight is a number of counts. The strongest
    group is first. Raises ``InputError`` for fewer texts than groups.
    """
    if (n_texts := _n_texts(counts)) < n:
        raise InputError(f"{n_texts} texts cannot give {n} groups; ask for fewer")
    nmf: Any = NMF
    model = nmf(n, init="nndsvda", random_state=seed, max_iter=400)
    with warnings.catch_warnings():  # a factorisation that is nearly converged serves as well
        warnings.simplefilter("ignore", ConvergenceWarning)
        weights = model.fit_transform(counts)
    total = model.components_.sum(1)
    groups = model.components_ / np.where(total > 0, total, 1)[:, None]
    weights = weights * total
    order = np.argsort(-weights.sum(0))
    return weights[:, order], groups[order]


def group_stability(
    counts: csr_array, groups: Float[np.ndarray, "group vocab"], *, seed: int = 0
) -> Float[np.ndarray, "group"]:
    """How alike each group is to one of either half of the texts: the smaller of two cosines.

    The halves are factorised apart, and groups matched one to one by their cosine.
    """
    order = np.random.default_rng(seed).permutation(_n_texts(counts))
    alike = []
    for half in (order[::2], order[1::2]):
        own_counts: Any = counts[np.sort(half)]
        _, others = token_groups(own_counts, len(groups), seed=seed)
        cosines = _unit(groups) @ _unit(others).T
        own, match = linear_sum_assignment(-cosines)
        alike.append(cosines[own, match])
    return np.minimum(*alike)


def group_table(
    groups: Float[np.ndarray, "group vocab"],
    weights: Float[np.ndarray, "text group"],
    stability: Float[np.ndarray, "group"],
    *,
    top: int = 8,
) -> pd.DataFrame:
    """``group token share weight texts stability``, a row for each of a group's first tokens.

    ``weight``: its share of all counts; ``texts``: in how many it is the strongest.
    """
    strongest = weights.argmax(1)
    rows = [
        {
            "group": i + 1,
            "token": int(token),
            "share": group[token],
            "weight": weights[:, i].sum() / max(weights.sum(), 1e-12),
            "texts": int((strongest == i).sum()),
            "stability": stability[i],
        }
        for i, group in enumerate(groups)
        for token in np.argsort(-group)[:top]
    ]
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------- internals
def _n_texts(counts: Any) -> int:
    return counts.shape[0]  # scipy's types say that an array may have no shape


def _unit(rows: Float[np.ndarray, "group vocab"]) -> Float[np.ndarray, "group vocab"]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
