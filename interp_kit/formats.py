"""Reads the files that researchers already have, as they are, and writes results in those formats.

Prompt files become ``Scenario`` objects; question files and predictions become a spec a line. Keys
that are not known here are left alone; whatever is needed is checked, and an error names the line.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from interp_kit.files import read_json
from interp_kit.specs import (
    AnswerLabels,
    DecisionSpec,
    InputError,
    NonEmpty,
    Scenario,
    Spec,
    checked,
    explain,
)

PAIRS = ("base_prompts.json", "counterfactual_prompts.json")
OTHER = {"1": "2", "2": "1", "A": "B", "B": "A"}


class DilemmaSpec(Spec):
    """One record of ``base_prompts.json`` or ``counterfactual_prompts.json``; more keys may follow.

    ``original_id`` is the dilemma that several prompts word; ``segments`` name parts of the prompt.
    """

    model_config = ConfigDict(extra="ignore")

    prompt_id: NonEmpty
    prompt: NonEmpty
    ethical_option: Literal["1", "2", "A", "B"]
    original_id: str = ""
    segments: dict[str, str] = Field(default_factory=dict)


def read_dilemmas(folder: Path) -> Scenario:
    """Pairs of dilemmas by ``prompt_id``: positive is what is ethical in the *base* prompt.

    In a counterfactual with its options swapped the same answer means the other option.
    """
    base, counterfactual = (_dilemmas(folder / name) for name in PAIRS)
    for here, there, name in ((base, counterfactual, PAIRS[1]), (counterfactual, base, PAIRS[0])):
        unpaired = next((key for key in here if key not in there), None)
        if unpaired is not None:
            raise InputError(
                f"{folder / name}: no record has the prompt_id {unpaired!r}, so that prompt has no "
                "partner; add it there, or remove it from the other file"
            )
    swapped = sum(d.ethical_option != counterfactual[key].ethical_option for key, d in base.items())
    prompts = [
        {
            "id": key,
            "text": dilemma.prompt,
            "counterfactual": counterfactual[key].prompt,
            "group": dilemma.original_id,
            "positive": dilemma.ethical_option,
            "negative": OTHER[dilemma.ethical_option],
            "segments": {
                name: [text, counterfactual[key].segments.get(name, text)]
                for name, text in dilemma.segments.items()
            },
        }
        for key, dilemma in base.items()
    ]
    content = {
        "name": folder.name,
        "about": f"{len(prompts)} pairs of dilemmas; the options are swapped in {swapped}",
        "decision": {
            "positive": prompts[0]["positive"],
            "negative": prompts[0]["negative"],
            "labels": {"positive": "ethical", "negative": "unethical"},
        },
        "prompts": prompts,
        "source": " and ".join(PAIRS),
    }
    return checked(Scenario, content, folder / PAIRS[0])


def _dilemmas(file: Path) -> dict[str, DilemmaSpec]:
    records = read_json(file)
    if not isinstance(records, list) or not records:
        raise InputError(f"{file}: expected a list of records, found {type(records).__name__}")
    found: dict[str, DilemmaSpec] = {}
    for number, record in enumerate(records, 1):
        try:
            dilemma = DilemmaSpec.model_validate(record)
        except ValidationError as error:
            raise InputError(f"{file}, record {number}: {explain(error)}") from None
        if dilemma.prompt_id in found:
            raise InputError(
                f"{file}, record {number}: the prompt_id {dilemma.prompt_id!r} occurs twice; "
                "give every record its own"
            )
        found[dilemma.prompt_id] = dilemma
    return found


COOPERATE_OR_DEFECT = DecisionSpec(
    positive="action2",
    negative="action1",
    labels=AnswerLabels(positive="defect", negative="cooperate"),
)


class Line(Spec):
    """One object of a JSON Lines file, or part of one; unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore")


class Text(Line):
    """One text of a file of documents."""

    text: NonEmpty


class Identified(Line):
    """A line with an id that no other line of its file has."""

    id: NonEmpty


_L = TypeVar("_L", bound=Identified)
_Line = TypeVar("_Line", bound=Line)


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
            raise InputError(f"{file}: record {i}: {wrong} is of type {kind}; expected a string")
    return records


def read_lines(kind: type[_L], file: Path) -> list[_L]:
    """The records of a JSON Lines file; ``InputError`` names the line that is wrong."""
    found: dict[str, tuple[int, _L]] = {}
    for number, line in _lines(file):
        where = f"{file}, line {number}"
        read = _read_line(kind, line, where)
        if read.id in found:
            first = found[read.id][0]
            raise InputError(
                f"{where}: line {first} has the id {read.id!r}, too; give every line its own"
            )
        found[read.id] = number, read
    return [read for _, read in found.values()]


def read_texts(file: Path) -> list[str]:
    """The texts of lines {"text": ...}; a ``.txt`` is one text, and of a folder every ``.txt`` is.

    ``InputError`` names the file and line that is wrong.
    """
    if file.is_dir():
        found = sorted(file.glob("*.txt"))
        if not found:
            raise InputError(f"{file}: the folder has no .txt file; expected at least one")
        return [text for each in found for text in read_texts(each)]
    if file.suffix == ".txt":
        return [_content(file, "some text")]
    return [_read_line(Text, line, f"{file}, line {n}").text for n, line in _lines(file)]


def stream_texts(file: Path) -> Iterator[str]:
    """The texts of a file one by one, however large it is: lines {"text": ...}, or lines of a .txt.

    Blank lines are none. ``InputError`` names the file and line that is wrong, and an empty file.
    """
    empty, plain = True, file.suffix == ".txt"
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if text := line.strip():
                    empty = False
                    yield text if plain else _read_line(Text, text, f"{file}, line {number}").text
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file}: not readable as text ({error}); expected texts in UTF-8"
        ) from None
    if empty:
        raise InputError(f"{file}: the file is empty; expected a text a line")


def _lines(file: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers. Only a line feed ends a line."""
    lines = _content(file, "a file with one JSON object a line").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _content(file: Path, expected: str) -> str:
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file}: not readable as text ({error}); expected {expected}, in UTF-8"
        ) from None
    if not content.strip():
        raise InputError(f"{file}: the file is empty; expected {expected}")
    return content


def _read_line(kind: type[_Line], line: str, where: str) -> _Line:
    try:
        given = json.loads(line, object_pairs_hook=_distinct_keys)
        return kind.model_validate(given)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, kind)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a JSON object ({error}); fix the line") from None


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a repeated key ``json`` would silently keep the last value."""
    keys = [key for key, _ in pairs]
    repeated = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
    if repeated is not None:
        raise ValueError(f"the key {repeated!r} is given twice")
    return dict(pairs)
