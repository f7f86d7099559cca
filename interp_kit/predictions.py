"""Records of multiple-choice answers: predictions, their metrics, and the comparison of two models.

The formats are ``predictions_*.jsonl`` and ``comparison_report.json``.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import ConfigDict, Field, model_validator

from interp_kit.evaluations import MultipleChoice
from interp_kit.files import read_json
from interp_kit.formats import Identified, Line, read_lines
from interp_kit.specs import NonEmpty, checked


class Uncertainty(Line):
    """Entropies in nats over repeated predictions: of their mean, their mean, and the difference.

    ``MI`` is what the repetition (here: the order of the options) tells about the answer.
    """

    H_mean: float
    E_H: float
    MI: float


class Prediction(Identified):
    """What a model answers to one multiple-choice question (``predictions_*.jsonl``).

    ``logprobs`` in nats and ``probs`` by option, ``entropy`` in nats.
    """

    model: str
    category: NonEmpty
    world_label: str | None = None
    difficulty: str = ""
    pred: str
    correct: str
    is_correct: bool
    logprobs: dict[str, float]
    probs: dict[str, float]
    entropy: float
    p_correct: float
    scoring_variants: dict[str, list[str]] = Field(default_factory=dict)
    uncertainty: Uncertainty | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Prediction":
        if not {self.pred, self.correct} <= set(self.probs) or set(self.probs) != set(
            self.logprobs
        ):
            raise ValueError("pred, correct, probs and logprobs do not name the same options")
        if self.is_correct != (self.pred == self.correct):
            raise ValueError(
                f"is_correct is {self.is_correct}, but pred is {self.pred!r} and correct "
                f"{self.correct!r}"
            )
        return self


class Metrics(Line):
    """Means over questions; what else a report holds about them is kept."""

    model_config = ConfigDict(extra="allow")

    n: int
    accuracy: float
    mean_entropy: float
    mean_p_correct: float


class ModelMetrics(Line):
    overall: Metrics
    by_group: dict[str, Metrics]  # "category__world_label"


class Shift(Line):
    n_shared: int
    n_flips: int


class ComparisonReport(Line):
    """Base and adapter on the same questions (``comparison_report.json``)."""

    model_config = ConfigDict(extra="allow")

    base_model: str
    adapter_path: str
    mcq_path: str
    prompt_version: str
    seed: int
    metrics: dict[str, ModelMetrics]
    shift_summary: Shift

    @model_validator(mode="after")
    def _has_base_and_lora(self) -> "ComparisonReport":
        if not {"base", "lora"} <= set(self.metrics):
            raise ValueError(f"metrics of {list(self.metrics)}; expected base and lora")
        return self


def read_predictions(file: Path) -> list[Prediction]:
    """A model's predictions, a JSON object a line; errors as in ``read_mcqs``."""
    return read_lines(Prediction, file)


def write_predictions(file: Path, predictions: Sequence[Prediction]) -> None:
    """A JSON object a line, as ``read_predictions`` reads them."""
    lines = [json.dumps(p.model_dump(exclude_none=True), ensure_ascii=False) for p in predictions]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_comparison(file: Path) -> ComparisonReport:
    """A comparison of base and adapter."""
    return checked(ComparisonReport, read_json(file), file)


def write_comparison(file: Path, report: ComparisonReport) -> None:
    """As ``read_comparison`` reads it."""
    file.write_text(
        json.dumps(report.model_dump(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def metrics(predicted: Sequence[Prediction]) -> ModelMetrics:
    """Means over questions: overall, and by ``category__world_label``."""

    def means(own: Sequence[Prediction]) -> Metrics:
        given = {
            "accuracy": [float(p.is_correct) for p in own],
            "mean_entropy": [p.entropy for p in own],
            "mean_p_correct": [p.p_correct for p in own],
        }
        over_orders = [p.uncertainty for p in own if p.uncertainty is not None]
        if over_orders:
            for name in ("MI", "H_mean", "E_H"):
                given[f"mean_{name}"] = [getattr(u, name) for u in over_orders]
        return Metrics(n=len(own), **{k: float(np.mean(v)) for k, v in given.items()})

    groups: dict[str, list[Prediction]] = {}
    for p in predicted:
        groups.setdefault(f"{p.category}__{p.world_label}", []).append(p)
    return ModelMetrics(
        overall=means(predicted), by_group={name: means(own) for name, own in groups.items()}
    )


def flips(base: Sequence[Prediction], other: Sequence[Prediction]) -> pd.DataFrame:
    """The questions, answered by both, to which ``other`` gives another answer than ``base``.

    Returns ``question category change``, and ``pred`` and ``p_correct`` of both: ``pred_base
    pred_other correct p_correct_base p_correct_other``.
    """
    rows = [
        (a.id, a.category, _change(a, b), a.pred, b.pred, a.correct, a.p_correct, b.p_correct)
        for a, b in _flips(base, other)
    ]
    names = ["pred_base", "pred_other", "correct", "p_correct_base", "p_correct_other"]
    return pd.DataFrame(rows, columns=pd.Index(["question", "category", "change", *names]))


def shift_analysis(
    questions: Sequence[MultipleChoice], base: Sequence[Prediction], other: Sequence[Prediction]
) -> str:
    """What changed from ``base`` to ``other``, to be read: means, then every flip."""
    names, flipped = (base[0].model, other[0].model), _flips(base, other)
    ours, theirs = metrics(base), metrics(other)
    groups = {"all": (ours.overall, theirs.overall)}
    groups |= {k: (v, theirs.by_group[k]) for k, v in ours.by_group.items()}
    lines = [
        f"From {names[0]} to {names[1]}: {len(flipped)} of {len(base)} answers changed.",
        "Answers and probabilities p: of the mean log-probability over all orders of the options.",
        "",
        f"{'group':<44}{'n':>4}  accuracy       p(correct)     entropy (nats)",
    ]
    for name, (a, b) in groups.items():
        measures = ("accuracy", "mean_p_correct", "mean_entropy")
        changes = (f"{getattr(a, m):.2f} -> {getattr(b, m):.2f}" for m in measures)
        lines.append(f"{name:<44}{a.n:>4}  " + "   ".join(changes))
    asked = {q.id: q for q in questions}
    for before, after in flipped:
        q = asked[before.id]
        lines += ["", f"{q.id} ({q.category}): {_change(before, after)}", f"  {q.question}"]
        told = {"correct": q.correct_answer, names[0]: before.pred, names[1]: after.pred}
        for letter in q.letters:
            marks = ", ".join(name for name, at in told.items() if at == letter)
            change = f"p {before.probs[letter]:.3f} -> {after.probs[letter]:.3f}"
            end = f"  [{marks}]" if marks else ""
            lines.append(f"  {letter}: {q.options[letter]}  {change}{end}")
    return "\n".join(lines) + "\n"


def _flips(
    base: Sequence[Prediction], other: Sequence[Prediction]
) -> list[tuple[Prediction, Prediction]]:
    theirs = {p.id: p for p in other}
    both = ((p, theirs[p.id]) for p in base if p.id in theirs)
    return [(a, b) for a, b in both if a.pred != b.pred]


def _change(base: Prediction, other: Prediction) -> str:
    said = {True: "right", False: "wrong"}
    if base.is_correct or other.is_correct:
        return f"{said[base.is_correct]} to {said[other.is_correct]}"
    return "wrong to another wrong"
