"""Is a property readable from the residual stream along one direction, and in which layer?

Probes (``linear_probe``) are trained and tested in every layer, always on held-out groups:
paraphrases of one thing never straddle a split. The null keeps that structure too
(``permutation_null``). AUC is the share of pairs (one row of each label, in the same fold, since
scores of two probes do not compare) that the score orders rightly; 0.5 is chance.

That a property can be read does not mean that the model uses it: for that, intervene.

Sources: Alain & Bengio, "Understanding intermediate layers using linear classifier probes",
arXiv:1610.01644; Hewitt & Liang, "Designing and Interpreting Probes with Control Tasks",
arXiv:1909.03368 (selectivity); Westfall & Young, "Resampling-Based Multiple Testing", 1993 (the
maximum over layers).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor
from tqdm import tqdm

from interp_kit.linear_probe import (
    KINDS,
    TINY,
    ClosedForm,
    Kind,
    Labelled,
    Spectrum,
    contrasts,
    fit_probe,
)
from interp_kit.specs import InputError


def held_out_scores(
    train: Labelled, test: Labelled, *, kind: Kind = "lda", folds: int = 5, seed: int = 0
) -> pd.DataFrame:
    """The score of every row of ``test`` by a probe trained on no row of its group.

    Where ``train`` and ``test`` share groups, those of ``test`` are dealt into ``folds`` (both
    labels in each, as evenly as can be), and a fold is scored by a probe of ``train``'s rows of all
    other groups; else one probe of all of ``train`` scores all of ``test``.

    Returns ``layer prompt group label fold value``, ``prompt`` being the row's number. Raises
    ``InputError`` if a fold would lack a label.
    """
    return _scores(train, test, kind, _split(train, test, folds, seed))


def cross_validated(
    data: Labelled,
    *,
    kinds: Sequence[Kind] = KINDS,
    folds: int = 5,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Cross-validated AUC of every kind of probe in every layer: ``transfer`` of data to itself."""
    return transfer(data, data, kinds=kinds, folds=folds, resamples=resamples, seed=seed)


def transfer(
    train: Labelled,
    test: Labelled,
    *,
    kinds: Sequence[Kind] = KINDS,
    folds: int = 5,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """AUC on ``test``, in every layer, of probes trained on ``train`` (``held_out_scores``).

    ``low high``: 95 % for all layers of one kind at once, so that the best layer may be looked for:
    AUC -+ c s, s the bootstrap's standard error over ``test``'s groups and c the 95 % quantile of
    the largest |AUC* - AUC| / s over layers. The interval is for the probes as trained: they are
    not trained again. For an AUC of exactly 1 it has no width; for a single group it is missing.

    Returns ``layer probe value low high accuracy n groups``; accuracy at the probe's threshold.
    """
    split = _split(train, test, folds, seed)
    tables = [
        _auc_table(_scores(train, test, kind, split), resamples, seed).assign(probe=kind)
        for kind in kinds
    ]
    columns = ["layer", "probe", "value", "low", "high", "accuracy", "n", "groups"]
    return pd.concat(tables, ignore_index=True).loc[:, columns]


def permutation_null(
    data: Labelled, *, kind: ClosedForm = "lda", n: int = 200, folds: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Cross-validated AUC with permuted labels: ``draw layer value``, ``n`` draws.

    The permutations keep the dependence between rows. In a group with both labels, all labels are
    flipped together with probability 1/2 (permuting single rows would break up paraphrases that
    share a label, and make the null too narrow). Groups with one label exchange their labels within
    the fold. Whatever the features, the mean over all such permutations is 0.5.
    """
    split = _split(data, data, folds, seed)
    labels = _permuted(data, split, n, seed)
    layers = range(data.features.shape[1])
    auc = np.stack(
        [
            _null_auc(data.features[:, layer].double().numpy(), labels, split, kind)
            for layer in tqdm(layers, desc="permutations", unit="layer", leave=False)
        ]
    )
    layer, draw = np.indices(auc.shape)
    return pd.DataFrame({"draw": draw.ravel(), "layer": layer.ravel(), "value": auc.ravel()})


def selectivity(table: pd.DataFrame, null: pd.DataFrame) -> pd.DataFrame:
    """``table`` (of the null's kind of probe, ``cross_validated``) beside chance.

    Adds ``expected`` (mean AUC with permuted labels) and its 95 % range ``null_low null_high``;
    ``selectivity`` = value - expected; ``p``, one-sided, the rank of the layer's AUC among each
    draw's largest AUC over layers, so that it is corrected for the choice of the best layer.
    """
    by_layer = null.groupby("layer").value
    chance = pd.DataFrame(
        {
            "expected": by_layer.mean(),
            "null_low": by_layer.quantile(0.025),
            "null_high": by_layer.quantile(0.975),
        }
    )
    result = table.merge(chance, left_on="layer", right_index=True, validate="one_to_one")
    largest = null.groupby("draw").value.max().to_numpy()
    reached = (largest[:, None] >= result.value.to_numpy() - TINY).sum(0)
    return result.assign(
        selectivity=result.value - result.expected, p=(1 + reached) / (1 + len(largest))
    )


def bag_of_words(texts: Sequence[str]) -> Float[Tensor, "prompt layer word"]:
    """How often each word occurs, as features of one layer: what can be read without a model."""
    counts: Any = CountVectorizer(token_pattern=r"[\w-]+").fit_transform(texts)
    return torch.from_numpy(counts.toarray()).float()[:, None]


# ------------------------------------------------------------------------------------- internals
Split = list[tuple[np.ndarray, np.ndarray]]  # rows of ``train`` and of ``test``, by fold


def _split(train: Labelled, test: Labelled, folds: int, seed: int) -> Split:
    if not set(train.groups) & set(test.groups):
        return [(np.arange(len(train.labels)), np.arange(len(test.labels)))]
    for label in (0, 1):
        groups = len(set(test.groups[test.labels == label]))
        if groups < folds:
            raise InputError(
                f"label {label} occurs in {groups} groups only, and {folds} folds need as many; "
                "give fewer folds or more groups"
            )
    dealt = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    split = [
        (np.flatnonzero(~np.isin(train.groups, test.groups[rows])), rows)
        for _, rows in dealt.split(test.groups, test.labels, test.groups)
    ]
    parts = [part for a, b in split for part in (train.labels[a], test.labels[b])]
    if any(len(np.unique(part)) < 2 for part in parts):
        raise InputError(
            f"a fold of {folds} has one label only; give fewer folds, or groups more alike in size"
        )
    return split


def _scores(train: Labelled, test: Labelled, kind: Kind, split: Split) -> pd.DataFrame:
    if train.features.shape[1:] != test.features.shape[1:]:
        raise InputError(
            f"features of [layer d_model] {list(train.features.shape[1:])} and "
            f"{list(test.features.shape[1:])}; expected models of one shape"
        )
    tables = []
    for layer in tqdm(range(train.features.shape[1]), desc=kind, unit="layer", leave=False):
        for fold, (seen, held) in enumerate(split):
            probe = fit_probe(train.features[seen, layer], train.labels[seen], kind)
            tables.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "prompt": held,
                        "group": test.groups[held],
                        "label": test.labels[held],
                        "fold": fold,
                        "value": probe.score(test.features[held, layer]),
                    }
                )
            )
    return pd.concat(tables, ignore_index=True)


def _auc_table(scores: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """AUC and accuracy of held-out scores in every layer, with simultaneous intervals."""
    groups, numbers = np.unique(scores.group.to_numpy(), return_inverse=True)
    own = scores.assign(group=numbers)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=resamples)
    weights = np.vstack([np.ones(len(groups)), drawn])  # the first: every group once
    auc, accuracy = [], []
    for _, layer in own.groupby("layer"):
        right, pairs = _pairs_by_group(layer, len(groups))
        in_all = ((weights @ pairs) * weights).sum(1)
        kept = in_all > 0  # a few groups may be drawn without a pair; the same in every layer
        auc.append(((weights @ right) * weights).sum(1)[kept] / in_all[kept])
        accuracy.append(float(((layer.value > 0) == (layer.label == 1)).mean()))
    value, resampled = np.array(auc)[:, 0], np.array(auc)[:, 1:]
    error = resampled.std(1, ddof=1) if len(groups) > 1 else np.full(len(value), np.nan)
    deviation = abs(resampled - value[:, None]) / np.maximum(error, TINY)[:, None]
    half = np.quantile(deviation.max(0), 0.95) * error
    return pd.DataFrame(
        {
            "layer": np.unique(own.layer),
            "value": value,
            "low": np.maximum(value - half, 0),
            "high": np.minimum(value + half, 1),
            "accuracy": accuracy,
            "n": len(own) // own.layer.nunique(),
            "groups": len(groups),
        }
    )


def _pairs_by_group(
    scores: pd.DataFrame, n: int
) -> tuple[Float[np.ndarray, "group group"], Float[np.ndarray, "group group"]]:
    """Pairs within a fold by the groups of their label-1 and label-0 rows: in order, and all."""
    right, pairs = np.zeros((n, n)), np.zeros((n, n))
    for _, fold in scores.groupby("fold"):
        ones, zeros = fold[fold.label == 1], fold[fold.label == 0]
        difference = ones.value.to_numpy()[:, None] - zeros.value.to_numpy()
        at = np.ix_(ones.group, zeros.group)
        np.add.at(right, at, (1 + np.sign(difference)) / 2)
        np.add.at(pairs, at, 1.0)
    return right, pairs


def _permuted(data: Labelled, split: Split, n: int, seed: int) -> Int[np.ndarray, "draw prompt"]:
    rng = np.random.default_rng(seed)
    result = np.tile(data.labels, (n, 1))
    for _, test in split:
        rows = [test[data.groups[test] == group] for group in pd.unique(data.groups[test])]
        mixed = [own for own in rows if len(np.unique(data.labels[own])) == 2]
        constant = [own for own in rows if len(np.unique(data.labels[own])) == 1]
        for own in mixed:
            result[:, own] ^= rng.integers(2, size=(n, 1))
        labels = np.array([data.labels[own[0]] for own in constant], dtype=int)
        moved = rng.permuted(np.tile(labels, (n, 1)), axis=1)
        for i, own in enumerate(constant):
            result[:, own] = moved[:, [i]]
    return result


def _null_auc(
    x: Float[np.ndarray, "prompt d_model"],
    labels: Int[np.ndarray, "draw prompt"],
    split: Split,
    kind: ClosedForm,
) -> Float[np.ndarray, "draw"]:
    """The AUC of ``_auc_table`` for many labellings at once."""
    right, pairs = np.zeros(len(labels)), np.zeros(len(labels))
    for train, test in split:
        directions = Spectrum.of(x[train], kind).directions(contrasts(labels[:, train]))
        ranks = rankdata(directions @ x[test].T, axis=1)
        ones = labels[:, test].sum(1)
        right += (ranks * labels[:, test]).sum(1) - ones * (ones + 1) / 2
        pairs += ones * (len(test) - ones)
    return right / pairs
