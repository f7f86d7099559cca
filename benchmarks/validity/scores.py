"""Scores of a method against a known truth: ranks, hits, areas, and how alike sets are.

A method gives every node (head, MLP, layer) a score, the larger the surer; the truth is a set of
nodes. Ties count half, so that a method which says the same of all nodes scores as chance does.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from interp_kit.specs import InputError

Scores = Mapping[str, float]


def check_truth(nodes: Collection[str], truth: Collection[str], *, case: str) -> None:
    """Raise ``InputError`` for a truth that no method can be scored against: none of them, or all.

    Also for nodes that the case does not have.
    """
    unknown = sorted(set(truth) - set(nodes))
    if unknown:
        raise InputError(f"{case}: the truth names {unknown[0]!r}, which is none of the nodes")
    if not truth or set(truth) == set(nodes):
        which = "none" if not truth else "all"
        raise InputError(
            f"{case}: the truth holds {which} of {len(nodes)} nodes, so that AUROC is undefined; "
            "add nodes that do nothing, or take another intervention"
        )


def auroc(scores: Scores, truth: Collection[str]) -> float:
    """The chance that a true node scores above another one; ties count half."""
    return float(roc_auc_score(*_labelled(scores, truth)))


def average_precision(scores: Scores, truth: Collection[str]) -> float:
    """Precision, averaged over the true nodes as they are found."""
    return float(average_precision_score(*_labelled(scores, truth)))


def hit_at_1(scores: Scores, truth: Collection[str]) -> float:
    """Whether the highest score is a true node's; of several highest ones, the share that are."""
    best = max(scores.values())
    first = [node for node, score in scores.items() if score == best]
    return sum(node in truth for node in first) / len(first)


def recall_at(scores: Scores, truth: Collection[str], *, false_positives: float = 0.01) -> float:
    """The share of true nodes above the score that so many of the others exceed."""
    labels, values = _labelled(scores, truth)
    limit = np.quantile(values[~labels], 1 - false_positives, method="higher")
    return float((values[labels] > limit).mean())


def areas(sizes: Sequence[float], faithfulness: Sequence[float]) -> tuple[float, float]:
    """CPR and CMD after MIB (arXiv:2504.13151), by trapezoids over the share of nodes kept.

    CPR is the area under faithfulness, here clipped to [0, 1] so that overshooting gains nothing;
    CMD that of its distance from 1, unclipped: 0 is best.
    """
    f = np.asarray(faithfulness)
    share = np.asarray(sizes)
    width = share[-1] - share[0]
    clipped = np.trapezoid(f.clip(0, 1), share) / width
    return float(clipped), float(np.trapezoid(np.abs(1 - f), share) / width)


def jaccard(sets: Sequence[Collection[str]]) -> float:
    """The mean |both| / |either| over all pairs of sets; two empty ones are alike."""
    found = [set(own) for own in sets]
    pairs = [(a, b) for i, a in enumerate(found) for b in found[:i]]
    return float(np.mean([len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]))


def _labelled(scores: Scores, truth: Collection[str]) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([float(score) for score in scores.values()])
    if np.isnan(values).any():
        missing = next(node for node, score in scores.items() if np.isnan(score))
        raise InputError(f"the score of {missing} is missing; expected a number for every node")
    return np.array([node in truth for node in scores]), values
