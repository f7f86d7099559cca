"""Reads the files that researchers already have, as they are, and writes results in those formats.

Prompt files become ``Scenario`` objects; question files and predictions become a spec a line. Keys
that are not known here are left alone; whatever is needed is checked, and an error names the line.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from interp_kit.specs import (
    NAME,
    AnswerLabels,
    DecisionSpec,
    InputError,
    Scenario,
    Spec,
    as_path,
    checked,
    data_folders,
    explain,
    read_json,
    unknown,
)

COOPERATE_OR_DEFECT = DecisionSpec(
    positive="action2",
    negative="action1",
    labels=AnswerLabels(positive="defect", negative="cooperate"),
)

NonEmpty = Annotated[str, Field(min_length=1)]


class _Line(Spec):
    model_config = ConfigDict(extra="ignore")


class Identified(_Line):
    """A line with an id; no two lines of a file share one."""

    id: NonEmpty


_L = TypeVar("_L", bound=Identified)


class MultipleChoice(Identified):
    """A question with lettered options, one of them correct (``mcqs.jsonl``).

    ``world_label`` says in which world it is: of a ``conflict_false_world`` question the correct
    answer is the false universe's.
    """

    category: NonEmpty
    world_label: str | None = None
    difficulty: str = ""
    question: NonEmpty
    options: dict[str, NonEmpty]
    correct_answer: str

    @field_validator("correct_answer", mode="before")
    @classmethod
    def _one_letter(cls, given: Any) -> Any:
        if not isinstance(given, str):
            raise ValueError(f"expected one letter, got {given!r}; give the one that is correct")
        return given

    @model_validator(mode="after")
    def _one_of_the_options_is_correct(self) -> "MultipleChoice":
        letters = list(self.options)
        expected = list(ascii_uppercase[: max(2, len(letters))])
        if sorted(letters) != expected:
            missing = ", ".join(sorted(set(expected) - set(letters)))
            raise ValueError(
                f"options {', '.join(letters) or '(none)'}: expected two or more, lettered from A "
                f"without a gap; add {missing}"
            )
        if self.correct_answer not in letters:
            raise ValueError(
                f"correct_answer {self.correct_answer!r} is not one of the options "
                f"{', '.join(letters)}; give the letter of the one that is correct"
            )
        texts = [text.strip() for text in self.options.values()]
        repeated = next((text for i, text in enumerate(texts) if text in texts[:i]), None)
        if repeated is not None:
            raise ValueError(f"two options say {repeated!r}; make them distinct")
        return self

    @property
    def letters(self) -> list[str]:
        return sorted(self.options)


class OpenQuestion(Identified):
    """A question to be answered in words (``open_questions.jsonl``).

    ``true_answer`` and ``false_answer`` are how a true and a false answer begin, if that is known.
    """

    category: NonEmpty
    difficulty: str = ""
    question: NonEmpty
    true_answer: NonEmpty | None = None
    false_answer: NonEmpty | None = None

    @model_validator(mode="after")
    def _both_answers_or_none(self) -> "OpenQuestion":
        if (self.true_answer is None) != (self.false_answer is None):
            given = "false_answer" if self.true_answer is None else "true_answer"
            raise ValueError(f"only {given} is given; expected true_answer and false_answer")
        if self.true_answer and self.true_answer == self.false_answer:
            raise ValueError("true_answer and false_answer are the same; make them distinct")
        return self


class Uncertainty(_Line):
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


class Metrics(_Line):
    """Means over questions; what else a report holds about them is kept."""

    model_config = ConfigDict(extra="allow")

    n: int
    accuracy: float
    mean_entropy: float
    mean_p_correct: float


class ModelMetrics(_Line):
    overall: Metrics
    by_group: dict[str, Metrics]  # "category__world_label"


class Shift(_Line):
    n_shared: int
    n_flips: int


class ComparisonReport(_Line):
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


def evaluation_file(name: str, kind: str, *, data: str | Path | None = None) -> Path:
    """``evaluations/NAME/KIND`` in the data folders, or the file whose path is given.

    ``kind`` is the file's name there: ``mcqs.jsonl``, for instance.
    """
    file = as_path(name)
    folders = [folder / "evaluations" for folder in data_folders(data)]
    if NAME.fullmatch(name):
        found = next((f / name / kind for f in folders if (f / name / kind).is_file()), None)
        if found is not None:
            return found
    if file.is_file():
        return file
    known = {path.parent.name for folder in folders for path in folder.glob(f"*/{kind}")}
    raise InputError(unknown("evaluation", name, known, f"the path of a {kind}"))


def read_mcqs(file: Path) -> list[MultipleChoice]:
    """Multiple-choice questions, a JSON object a line.

    Raises ``InputError``, with the line, for an option that is missing, two that are the same, a
    correct answer that is not exactly one of them, and an id that occurs twice.
    """
    return read_lines(MultipleChoice, file)


def read_open_questions(file: Path) -> list[OpenQuestion]:
    """Questions to be answered in words, a JSON object a line; errors as in ``read_mcqs``."""
    return read_lines(OpenQuestion, file)


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


def read_ipd_prompts(file: Path, *, decision: DecisionSpec = COOPERATE_OR_DEFECT) -> list[Scenario]:
    """Iterated prisoner's dilemma prompts (``ipd_eval_prompts.json``): one scenario for each name.

    Records hold ``id scenario variant state_self state_opp description prompt`` and more. Prompts
    that repeat the text of an earlier variant are dropped, for they would count one observation
    twice; the scenario's ``about`` says how many.
    """
    records = _records(file, required=("id", "scenario", "prompt", "state_self", "state_opp"))
    scenarios: list[Scenario] = []
    for name in dict.fromkeys(r["scenario"] for r in records):
        ours = [r for r in records if r["scenario"] == name]
        distinct = list({r["prompt"]: r for r in reversed(ours)}.values())[::-1]
        about = str(ours[0].get("description", ""))
        if len(distinct) < len(ours):
            about += f" ({len(ours) - len(distinct)} of {len(ours)} prompts repeated another)"
        scenarios.append(
            checked(
                Scenario,
                {
                    "name": name,
                    "about": about,
                    "decision": decision,
                    "prompts": [
                        {
                            "id": r["id"],
                            "text": r["prompt"],
                            "group": f"{r['state_self']}/{r['state_opp']}",
                        }
                        for r in distinct
                    ],
                    "source": file.name,
                },
                file,
            )
        )
    return scenarios


def _records(file: Path, *, required: tuple[str, ...]) -> list[dict[str, Any]]:
    records = read_json(file)
    if not isinstance(records, list):
        raise InputError(f"{file}: expected a list of records, found {type(records).__name__}")
    for i, record in enumerate(records):
        missing = [k for k in required if not isinstance(record, dict) or k not in record]
        if missing:
            raise InputError(f"{file}: record {i} lacks {', '.join(missing)}; add it")
        wrong = next((k for k in required if not isinstance(record[k], str)), None)
        if wrong is not None:
            kind = type(record[wrong]).__name__
            raise InputError(f"{file}: record {i}: {wrong} is of type {kind}; expected text")
    return records


def read_lines(kind: type[_L], file: Path) -> list[_L]:
    """The records of a file of JSON lines; ``InputError`` names the line that is wrong."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not readable as text ({error}); mend the file") from None
    found: dict[str, tuple[int, _L]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        read = _read_line(kind, line, where)
        if read.id in found:
            first = found[read.id][0]
            raise InputError(
                f"{where}: the id {read.id!r} is that of line {first}; make it distinct"
            )
        found[read.id] = number, read
    if not found:
        raise InputError(f"{file}: it is empty; expected one JSON object a line")
    return [read for _, read in found.values()]


def _read_line(kind: type[_L], line: str, where: str) -> _L:
    try:
        given = json.loads(line, object_pairs_hook=_distinct_keys)
        return kind.model_validate(given)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, kind)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a JSON object ({error}); mend the line") from None


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a key that is given twice JSON would silently keep the last."""
    keys = [key for key, _ in pairs]
    repeated = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
    if repeated is not None:
        raise ValueError(f"the key {repeated!r} is given twice")
    return dict(pairs)
