"""Linear probes: is a property readable from the residual stream along one direction, and where?

A probe of one layer is a unit direction v and a threshold: score = (h . v - threshold) / scale, and
label 1 is read where it is positive. Three kinds:

- ``logistic``: logistic regression on standardised features, L2, C = 0.1;
- ``mass-mean``: v along mu_1 - mu_0, the difference of the class means;
- ``lda``: v along S^-1 (mu_1 - mu_0), S the covariance of the training features, standardised and
  shrunk towards the identity (Ledoit and Wolf). S is that of all features rather than within
  classes: unshrunk, the two give the same direction, and this one does not change with the labels,
  so that permuting them costs next to nothing.

Everything is measured on held-out groups: paraphrases of one thing never straddle a split. The null
keeps that structure too (``permutation_null``). AUC is the share of pairs (one of each label, in
the same fold, since scores of two probes do not compare) that the score orders rightly.

That a property can be read does not mean that the model uses it: for that, intervene.

Sources: Alain & Bengio, "Understanding intermediate layers using linear classifier probes",
arXiv:1610.01644; Marks & Tegmark, "The Geometry of Truth", arXiv:2310.06824 (mass-mean; whitened,
it is ``lda``); Hewitt & Liang, "Designing and Interpreting Probes with Control Tasks",
arXiv:1909.03368 (selectivity); Westfall & Young, "Resampling-Based Multiple Testing", 1993 (the
maximum over layers); Ledoit & Wolf, J. Multivariate Anal. 88 (2004) 365.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

from interp_kit.specs import InputError

ClosedForm = Literal["mass-mean", "lda"]
Kind = Literal["logistic", "mass-mean", "lda"]
KINDS: tuple[Kind, ...] = get_args(Kind)
C = 0.1  # inverse strength of the logistic probe's L2 penalty
TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Features with a label, 0 or 1, and a group each; rows of one group depend on one another."""

    features: Float[Tensor, "prompt layer d_model"]
    labels: Int[np.ndarray, "prompt"]
    groups: np.ndarray

    def __post_init__(self) -> None:
        lengths = len(self.features), len(self.labels), len(self.groups)
        if len(set(lengths)) > 1:
            raise InputError(
                "{} rows of features, {} labels and {} groups; expected one of each a prompt"
                "".format(*lengths)
            )
        if set(np.unique(self.labels)) != {0, 1}:
            raise InputError(f"labels {sorted(set(self.labels))}; expected 0 and 1, and both")
        if not torch.isfinite(self.features).all():
            raise InputError("features with infinity or NaN; compute them in float32 or bfloat16")

    def rows(self, kept: Bool[np.ndarray, "prompt"]) -> "Labelled":
        """The rows for which ``kept`` holds."""
        return Labelled(
            features=self.features[torch.from_numpy(kept)],
            labels=self.labels[kept],
            groups=self.groups[kept],
        )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """``direction`` has norm 1 and points from label 0 to label 1.

    Score 0 is the threshold; where that lies midway between the class means of the training
    features, these score -1 and +1.
    """

    direction: Float[np.ndarray, "d_model"]
    threshold: float
    scale: float

    def score(self, features: Float[Tensor, "prompt d_model"]) -> Float[np.ndarray, "prompt"]:
        return (features.double().numpy() @ self.direction - self.threshold) / self.scale


def fit_probe(
    features: Float[Tensor, "prompt d_model"], labels: Int[np.ndarray, "prompt"], kind: Kind
) -> Probe:
    """The probe of one layer. Its threshold is midway between the class means, or the logistic one.

    Raises ``ConvergenceWarning`` as an error if the logistic fit does not converge.
    """
    x = features.double().numpy()
    if kind == "logistic":
        scaler = StandardScaler().fit(x)
        model: Any = LogisticRegression(C=C, max_iter=10_000)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            model.fit(scaler.transform(x), labels)
        raw = model.coef_[0] / np.asarray(scaler.scale_)
        intercept = float(model.intercept_[0] - raw @ scaler.mean_)
    else:
        raw, intercept = _Spectrum.of(x, kind).directions(_contrasts(labels[None]))[0], None
    size = max(float(np.linalg.norm(raw)), TINY)
    direction = raw / size
    means = [float((x[labels == label] @ direction).mean()) for label in (0, 1)]
    return Probe(
        direction=direction,
        threshold=sum(means) / 2 if intercept is None else -intercept / size,
        scale=max((means[1] - means[0]) / 2, TINY),
    )


def fit_direction(
    features: Float[Tensor, "prompt d_model"], labels: Int[np.ndarray, "prompt"], kind: Kind
) -> Float[Tensor, "d_model"]:
    """The probe's unit direction, from label 0 to label 1: what steering adds."""
    return torch.from_numpy(fit_probe(features, labels, kind).direction).to(features.dtype)


def held_out_scores(
    source: Labelled, target: Labelled, *, kind: Kind = "lda", folds: int = 5, seed: int = 0
) -> pd.DataFrame:
    """The score of every target row by a probe of the source that saw nothing of the row's group.

    Where the two share groups, the target's groups are dealt into ``folds`` (both labels in each,
    as evenly as can be), and a fold is scored by the source's rows of all other groups; else all of
    the source scores all of the target.

    Returns ``layer prompt group label fold value``, ``prompt`` being the row's number. Raises
    ``InputError`` if a fold would lack a label.
    """
    return _scores(source, target, kind, _split(source, target, folds, seed))


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
    source: Labelled,
    target: Labelled,
    *,
    kinds: Sequence[Kind] = KINDS,
    folds: int = 5,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """AUC on the target, in every layer, of probes trained on the source (``held_out_scores``).

    ``low high``: 95 % for all layers of one kind at once, so that the best layer may be looked for:
    AUC -+ c s, s the bootstrap's standard error over the target's groups and c the 95 % quantile of
    the largest |AUC* - AUC| / s over layers. It is of these probes: they are not trained again. An
    AUC of exactly 1 has no width, and a single group no interval.

    Returns ``layer probe value low high accuracy n groups``; accuracy at the probe's threshold.
    """
    split = _split(source, target, folds, seed)
    tables = [
        _auc_table(_scores(source, target, kind, split), resamples, seed).assign(probe=kind)
        for kind in kinds
    ]
    columns = ["layer", "probe", "value", "low", "high", "accuracy", "n", "groups"]
    return pd.concat(tables, ignore_index=True).loc[:, columns]


def permutation_null(
    data: Labelled, *, kind: ClosedForm = "lda", n: int = 200, folds: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Cross-validated AUC when labels say nothing: ``draw layer value``, ``n`` draws.

    Labels are permuted so that rows which depend on one another keep depending on one another. A
    group with both labels has them exchanged as a whole with probability 1/2 (moving single rows
    would break up the paraphrases that share a label, and make the null too narrow); groups with
    one label exchange theirs with others of the same fold. Whatever the features, the mean over
    all such permutations is 0.5.
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
    ``selectivity`` = value - expected; ``p``, one-sided, of the layer's AUC among the largest over
    layers of each draw: it holds for all layers at once, and the smallest is that of the best.
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


def exceeds(table: pd.DataFrame, bound: float) -> Literal["yes", "no", "cannot tell"]:
    """Whether ``value`` is above ``bound`` in some layer, decided from simultaneous intervals."""
    if (table.low > bound).any():
        return "yes"
    return "no" if (table.high <= bound).all() else "cannot tell"


def bag_of_words(texts: Sequence[str]) -> Float[Tensor, "prompt layer word"]:
    """How often each word occurs, as features of one layer: what can be read without a model."""
    counts: Any = CountVectorizer(token_pattern=r"[\w-]+").fit_transform(texts)
    return torch.from_numpy(counts.toarray()).float()[:, None]


# ------------------------------------------------------------------------------------- internals
Split = list[tuple[np.ndarray, np.ndarray]]  # rows of the source to train on, of the target to test


def _split(source: Labelled, target: Labelled, folds: int, seed: int) -> Split:
    if not set(source.groups) & set(target.groups):
        return [(np.arange(len(source.labels)), np.arange(len(target.labels)))]
    for label in (0, 1):
        groups = len(set(target.groups[target.labels == label]))
        if groups < folds:
            raise InputError(
                f"label {label} occurs in {groups} groups only, and {folds} folds need as many; "
                "give fewer folds or more groups"
            )
    dealt = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    split = [
        (np.flatnonzero(~np.isin(source.groups, target.groups[test])), test)
        for _, test in dealt.split(target.groups, target.labels, target.groups)
    ]
    parts = [part for train, test in split for part in (source.labels[train], target.labels[test])]
    if any(len(np.unique(part)) < 2 for part in parts):
        raise InputError(
            f"a fold of {folds} has one label only; give fewer folds, or groups more alike in size"
        )
    return split


def _scores(source: Labelled, target: Labelled, kind: Kind, split: Split) -> pd.DataFrame:
    if source.features.shape[1:] != target.features.shape[1:]:
        raise InputError(
            f"features of [layer d_model] {list(source.features.shape[1:])} and "
            f"{list(target.features.shape[1:])}; expected models of one shape"
        )
    tables = []
    for layer in tqdm(range(source.features.shape[1]), desc=kind, unit="layer", leave=False):
        for fold, (train, test) in enumerate(split):
            probe = fit_probe(source.features[train, layer], source.labels[train], kind)
            tables.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "prompt": test,
                        "group": target.groups[test],
                        "label": target.labels[test],
                        "fold": fold,
                        "value": probe.score(target.features[test, layer]),
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
        directions = _Spectrum.of(x[train], kind).directions(_contrasts(labels[:, train]))
        ranks = rankdata(directions @ x[test].T, axis=1)
        ones = labels[:, test].sum(1)
        right += (ranks * labels[:, test]).sum(1) - ones * (ones + 1) / 2
        pairs += ones * (len(test) - ones)
    return right / pairs


def _contrasts(labels: Int[np.ndarray, "draw prompt"]) -> Float[np.ndarray, "draw prompt"]:
    """Rows that make the difference of the class means of what they multiply."""
    ones = labels.sum(1, keepdims=True)
    return labels / ones - (1 - labels) / (labels.shape[1] - ones)


@dataclass(frozen=True, kw_only=True)
class _Spectrum:
    """Centred features as ``us @ v``, orthogonal columns and rows, and what S^-1 divides by.

    Differences of means lie in the span of ``v``: nothing of d_model x d_model is ever made.
    """

    us: Float[np.ndarray, "prompt component"]
    v: Float[np.ndarray, "component d_model"]
    divisor: Float[np.ndarray, "component"]
    spread: Float[np.ndarray, "d_model"]

    @classmethod
    def of(cls, x: Float[np.ndarray, "prompt d_model"], kind: ClosedForm) -> "_Spectrum":
        centred, noise = x - x.mean(0), 1e-10 * np.abs(x).max()
        spread = np.ones(x.shape[1])
        if kind == "lda":
            spread = centred.std(0)
            spread[spread <= noise] = np.inf  # a feature without variance is rounding errors
            centred = centred / spread
        u, s, v = np.linalg.svd(centred, full_matrices=False)
        kept = s > noise * np.sqrt(x.size)
        u, s, v = u[:, kept], s[kept], v[kept]
        divisor = np.ones_like(s)
        if kind == "lda" and len(s):
            shrinkage = ledoit_wolf_shrinkage(centred, assume_centered=True)
            variance = s**2 / len(x)
            divisor = (1 - shrinkage) * variance + shrinkage * variance.sum() / x.shape[1]
        return cls(us=u * s, v=v, divisor=divisor, spread=spread)

    def directions(
        self, contrasts: Float[np.ndarray, "draw prompt"]
    ) -> Float[np.ndarray, "draw d_model"]:
        """Mass-mean or LDA direction, not normalised, of each labelling."""
        return (contrasts @ self.us / self.divisor) @ self.v / self.spread
