"""What tables of patched runs share: one row for each patched run, values in nats."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Float

from interp_kit.patching.experiments import Experiment
from interp_kit.patching.patches import Patch, Place
from interp_kit.patching.positions import Positions, position_sets
from interp_kit.prompts import Prompt

SAME = 0.01  # nats: baseline and source are alike, there is nothing to carry over


def recovered_fraction(
    change: Float[np.ndarray, "*row"], baseline: float, source_value: float
) -> Float[np.ndarray, "*row"]:
    """change / (source - baseline): 0 if a patch changes nothing, 1 if it gives the source's value.

    NaN where source and baseline differ by 0.01 nats or less, or where there is no source value.
    Negative where the patch moves away from the source.
    """
    gap = source_value - baseline
    return change / gap if abs(gap) > SAME else np.full_like(change, np.nan)


def outcomes(experiment: Experiment, values: Float[np.ndarray, "row"]) -> pd.DataFrame:
    """The columns of every table of patched runs: one row for each of ``values``.

    ``prompt group``; ``baseline`` and ``source``, the values of the run that is patched and of the
    run that is copied from; ``value``, after patching; ``change`` = value - baseline, all in nats;
    ``recovered_fraction``; and ``flipped``, whether the likelier answer changed (never of "kl").
    """
    baseline, source_value = experiment.baseline, experiment.source_value
    change = values.astype(np.float64) - baseline
    is_decision = experiment.metric == "decision"
    return pd.DataFrame(
        {
            "prompt": experiment.prompt.id,
            "group": experiment.prompt.group,
            "baseline": baseline,
            "source": source_value,
            "value": values,
            "change": change,
            "recovered_fraction": recovered_fraction(change, baseline, source_value),
            "flipped": is_decision & ((values > 0) != (baseline > 0)),
        }
    )


def position_column(positions: tuple[int, ...] | None) -> int:
    """The position if it is a single one, else -1: all of them, or a segment of several."""
    return positions[0] if positions is not None and len(positions) == 1 else -1


def places_of(patches: Sequence[Patch]) -> list[Place]:
    """Every place that is written to, once."""
    return list(dict.fromkeys(patch.place for patch in patches))


def located(
    prompt: Prompt, patches: Sequence[Patch], positions: Positions, start: int = 0
) -> list[tuple[str, Patch]]:
    """(segment, patch) for every patch at every position asked for."""
    where = position_sets(prompt, positions, start=start)
    return [(name, replace(patch, positions=at)) for patch in patches for name, at in where]


def patch_table(
    experiment: Experiment,
    rows: Sequence[tuple[str, Patch]],
    values: Float[np.ndarray, "row"],
) -> pd.DataFrame:
    """``outcomes`` of single patches, with where each was written."""
    patches = [patch for _, patch in rows]
    return outcomes(experiment, values).assign(
        component=[p.component for p in patches],
        layer=[p.layer for p in patches],
        head=[-1 if p.head is None else p.head for p in patches],
        neuron=[-1 if p.neuron is None else p.neuron for p in patches],
        pos=[position_column(p.positions) for p in patches],
        segment=[segment for segment, _ in rows],
    )


def finished(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One table of several ``patch_table``, in the order of columns that all analyses give."""
    table = pd.concat(tables, ignore_index=True)
    table["effect_size"] = (table.change / table.baseline).abs().where(table.baseline != 0, np.nan)
    columns = ["direction", "prompt", "group", "component", "layer", "head", "neuron", "pos"]
    columns += ["segment", "baseline", "source", "value", "change", "recovered_fraction"]
    return table.loc[:, [*columns, "effect_size", "flipped"]]
