"""Circuits: a smallest set of components that carries a behaviour from one run to another.

A circuit is a set of heads and MLPs whose activations, moved together from the source run into the
target run, make it decide as the source does. Components are added in the order of their single
effects until enough of the effect is recovered, then pruned until none can be left out.

faithfulness = recovered fraction with the circuit moved;
completeness = 1 - recovered fraction with everything *but* the circuit moved;
minimality = the smallest recovered fraction that is lost by leaving out one component.

A circuit of your own: ``[find_patch(bridge, name) for name in ("L7H6", "L7_MLP")]``.

Sources: Wang et al., "Interpretability in the Wild", arXiv:2211.00593 (the three criteria); Conmy
et al., "Towards Automated Circuit Discovery", arXiv:2304.14997; Shi et al., "Hypothesis Testing the
Circuit Hypothesis in LLMs", arXiv:2410.13032 (random circuits as the null).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from interp_kit.patching.experiments import Experiment
from interp_kit.patching.patches import UNPATCHED, Patch, PatchSet
from interp_kit.patching.table import SAME, recovered_fraction

AT_ONCE = 32  # sets of a search that are tried before looking whether they are enough


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """``patches`` in the order of their single effects, strongest first.

    ``to_flip``: how many components, added in that order, flip the mean decision; ``None`` if the
    source has the baseline's sign or no number does. ``added``: how many were added before pruning.
    ``growth``: the fraction recovered by the first n of all candidates in that order, by n: every n
    until the search ends, then every tenth, and all.
    """

    patches: tuple[Patch, ...]
    added: int
    to_flip: int | None
    growth: Mapping[int, float]

    @property
    def components(self) -> list[str]:
        return [patch.component for patch in self.patches]


def find_circuit(
    experiments: Sequence[Experiment], candidates: Sequence[Patch], *, recover: float = 0.8
) -> Circuit | None:
    """The smallest circuit that this search finds, for the mean decision over ``experiments``.

    ``recover`` is the fraction of source - baseline to recover; 0 stops as soon as the decision
    changes its sign. Every component of the result is needed: leaving out any one falls short. It
    need not be the smallest of all. ``None`` where there is nothing to explain (source and baseline
    differ by 0.01 nats or less or, for ``recover`` 0, have the same sign), or where all candidates
    together fall short.
    """
    if not _differ(experiments, recover):
        return None
    single = _recovered(experiments, [frozenset([c]) for c in candidates])
    order = [candidates[i] for i in np.argsort(-single, kind="stable")]
    growth = _growth(experiments, order, recover)
    counts, nested = np.array([*growth]), np.array([*growth.values()])
    flips = counts[_flipped(experiments, nested)]
    enough = counts[_enough(experiments, nested, recover)]
    if not len(enough):
        return None
    size = int(enough[0])
    return Circuit(
        patches=tuple(_pruned(experiments, order[:size], recover)),
        added=size,
        to_flip=int(flips[0]) if len(flips) else None,
        growth=growth,
    )


def single_effects(experiments: Sequence[Experiment], patches: Sequence[Patch]) -> dict[str, float]:
    """The fraction of the mean effect that each component recovers when it is moved alone."""
    alone = _recovered(experiments, [frozenset([patch]) for patch in patches])
    return {patch.component: float(value) for patch, value in zip(patches, alone)}


def circuit_scores(
    experiments: Sequence[Experiment], candidates: Sequence[Patch], circuit: Sequence[Patch]
) -> pd.Series:
    """``size faithfulness completeness minimality`` of one circuit, fractions of the effect.

    Missing where source and baseline differ by 0.01 nats or less: there is no effect.
    """
    whole = frozenset(circuit)
    without = [whole - {patch} for patch in circuit]
    recovered = _recovered(experiments, [whole, frozenset(candidates) - whole, *without])
    return pd.Series(
        {
            "size": len(whole),
            "faithfulness": recovered[0],
            "completeness": 1 - recovered[1],
            "minimality": recovered[0] - max(recovered[2:], default=np.nan),
        }
    )


def random_circuits(
    experiments: Sequence[Experiment],
    candidates: Sequence[Patch],
    circuit: Sequence[Patch],
    *,
    n: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """``faithfulness completeness`` of ``n`` random sets with as many heads and MLPs each."""
    rng = np.random.default_rng(seed)
    drawn = [frozenset(_alike(candidates, circuit, rng)) for _ in range(n)]
    everything = frozenset(candidates)
    recovered = _recovered(experiments, [*drawn, *(everything - patches for patches in drawn)])
    return pd.DataFrame({"faithfulness": recovered[:n], "completeness": 1 - recovered[n:]})


def against_random(
    experiments: Sequence[Experiment],
    candidates: Sequence[Patch],
    circuit: Sequence[Patch],
    *,
    n: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Rows ``faithfulness`` and ``completeness`` of a circuit against ``random_circuits``.

    Columns: ``value``; ``expected`` and 95 % range ``low high`` of the random circuits; ``p``, the
    chance that a random one does as well, (1 + count) / (n + 1).
    """
    scores = circuit_scores(experiments, candidates, circuit)
    drawn = random_circuits(experiments, candidates, circuit, n=n, seed=seed)
    return pd.DataFrame(
        {
            "value": scores[drawn.columns],
            "expected": drawn.mean(),
            "low": drawn.quantile(0.025),
            "high": drawn.quantile(0.975),
            "p": (1 + (drawn >= scores[drawn.columns]).sum()) / (n + 1),
        }
    )


def overlap(
    first: Sequence[Patch],
    second: Sequence[Patch],
    candidates: Sequence[Patch],
    *,
    n: int = 9999,
    seed: int = 0,
) -> pd.Series:
    """How far two circuits share components: |both| / |either|, against a permutation null.

    The null permutes which components ``first`` holds, heads among heads and MLPs among MLPs.
    Returns ``value``; ``expected`` and its 95 % range ``low high`` under the null; ``p_more`` and
    ``p_less``, one-sided: whether they share more, or less, than chance.
    """
    rng = np.random.default_rng(seed)
    observed = _jaccard(set(first), set(second))
    null = np.array([_jaccard(set(_alike(candidates, first, rng)), set(second)) for _ in range(n)])
    return pd.Series(
        {
            "value": observed,
            "expected": null.mean(),
            "low": np.quantile(null, 0.025),
            "high": np.quantile(null, 0.975),
            "p_more": (1 + (null >= observed).sum()) / (n + 1),
            "p_less": (1 + (null <= observed).sum()) / (n + 1),
        }
    )


# ------------------------------------------------------------------------------------- internals
def _means(experiments: Sequence[Experiment]) -> tuple[float, float]:
    baseline = float(np.mean([e.baseline for e in experiments]))
    return baseline, float(np.mean([e.source_value for e in experiments]))


def _differ(experiments: Sequence[Experiment], recover: float) -> bool:
    baseline, source_value = _means(experiments)
    flips = (baseline > 0) != (source_value > 0)
    return abs(source_value - baseline) > SAME and (flips or recover > 0)


def _recovered(
    experiments: Sequence[Experiment], patch_sets: Sequence[PatchSet], *, base: PatchSet = UNPATCHED
) -> Float[np.ndarray, "patch_set"]:
    """The fraction of the mean effect over ``experiments`` that each patch set recovers."""
    baseline, source_value = _means(experiments)
    values = np.mean([e.values(patch_sets, base=base)[1:].numpy() for e in experiments], axis=0)
    return recovered_fraction(values - baseline, baseline, source_value)


def _growth(
    experiments: Sequence[Experiment], order: Sequence[Patch], recover: float
) -> dict[int, float]:
    """The fraction that the first n recover, by n: every n until nothing more is looked for.

    That is the first n that recovers enough and, where the source has the other sign, the first
    that flips the decision. From there on every tenth.
    """
    baseline, source_value = _means(experiments)
    flips = (baseline > 0) != (source_value > 0)
    found: dict[int, float] = {}

    def add(counts: Sequence[int]) -> None:
        sets = [frozenset(order[:n]) for n in counts]
        found.update(zip(counts, _recovered(experiments, sets).tolist()))

    n, everything = 0, len(order) + 1
    while n < everything:
        add(range(n, min(everything, n + AT_ONCE)))
        n = len(found)
        nested = np.array([*found.values()])
        flipped = not flips or _flipped(experiments, nested).any()
        if flipped and _enough(experiments, nested, recover).any():
            break
    if n < everything:
        add([*range(n, everything - 1, 10), everything - 1])
    return found


def _flipped(
    experiments: Sequence[Experiment], recovered: Float[np.ndarray, "patch_set"]
) -> Bool[np.ndarray, "patch_set"]:
    baseline, source_value = _means(experiments)
    return ((baseline + recovered * (source_value - baseline)) > 0) != (baseline > 0)


def _enough(
    experiments: Sequence[Experiment],
    recovered: Float[np.ndarray, "patch_set"],
    recover: float,
) -> Bool[np.ndarray, "patch_set"]:
    return _flipped(experiments, recovered) if recover == 0 else recovered >= recover


def _pruned(
    experiments: Sequence[Experiment], circuit: Sequence[Patch], recover: float
) -> list[Patch]:
    """Leave out what is not needed, least needed first, until every component is."""
    kept = list(circuit)
    while kept:
        base = frozenset(kept)
        without = _recovered(experiments, [base - {patch} for patch in kept], base=base)
        spare = [kept[i] for i in np.argsort(-without) if _enough(experiments, without, recover)[i]]
        if not spare:
            break
        fewer = [base - set(spare[: n + 1]) for n in range(len(spare))]
        good = _enough(experiments, _recovered(experiments, fewer, base=base), recover)
        n = int(np.argmin(good)) if not good.all() else len(spare)
        # The first can always go by itself: at least one leaves in every round.
        kept = [patch for patch in kept if patch not in spare[: max(1, n)]]
    return kept


def _alike(
    candidates: Sequence[Patch], circuit: Sequence[Patch], rng: np.random.Generator
) -> list[Patch]:
    """Random components, as many of each site as the circuit has."""
    drawn = []
    for site in sorted({patch.site for patch in circuit}):
        pool = [patch for patch in candidates if patch.site == site]
        size = sum(patch.site == site for patch in circuit)
        drawn += [pool[i] for i in rng.choice(len(pool), size, replace=False)]
    return drawn


def _jaccard(first: set[Patch], second: set[Patch]) -> float:
    return len(first & second) / len(first | second) if first | second else float("nan")
