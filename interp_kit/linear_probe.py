"""Linear probes: a direction of the residual stream that tells two labels apart.

A probe of one layer is a unit direction v and a threshold: score = (h . v - threshold) / scale, and
label 1 is read where it is positive. Three kinds:

- ``logistic``: logistic regression on standardised features, L2, C = 0.1;
- ``mass-mean``: v along mu_1 - mu_0, the difference of the class means;
- ``lda``: v along S^-1 (mu_1 - mu_0), S the covariance of the training features, standardised and
  shrunk towards the identity (Ledoit and Wolf). S is that of all features rather than within
  classes: unshrunk, the two give the same direction, and this one does not change with the labels,
  so that permuting them costs next to nothing.

Sources: Alain & Bengio, "Understanding intermediate layers using linear classifier probes",
arXiv:1610.01644; Marks & Tegmark, "The Geometry of Truth", arXiv:2310.06824 (mass-mean; whitened,
it is ``lda``); Ledoit & Wolf, J. Multivariate Anal. 88 (2004) 365.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

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
        raw, intercept = Spectrum.of(x, kind).directions(contrasts(labels[None]))[0], None
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


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Centred features as ``us @ v``, orthogonal columns and rows, and what S^-1 divides by.

    Differences of means lie in the span of ``v``: nothing of d_model x d_model is ever made.
    """

    us: Float[np.ndarray, "prompt axis"]
    v: Float[np.ndarray, "axis d_model"]
    divisor: Float[np.ndarray, "axis"]
    spread: Float[np.ndarray, "d_model"]

    @classmethod
    def of(cls, x: Float[np.ndarray, "prompt d_model"], kind: ClosedForm) -> "Spectrum":
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


def contrasts(labels: Int[np.ndarray, "draw prompt"]) -> Float[np.ndarray, "draw prompt"]:
    """Rows that make the difference of the class means of what they multiply."""
    ones = labels.sum(1, keepdims=True)
    return labels / ones - (1 - labels) / (labels.shape[1] - ones)
