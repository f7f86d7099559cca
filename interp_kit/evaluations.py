"""Reads the texts that probes are trained on: true and false statements, prompts by category.

A JSON object a line, as in the other evaluation files (``formats``). Keys that are not known here
are left alone.
"""

from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from interp_kit.formats import Identified, read_lines
from interp_kit.specs import InputError, NonEmpty


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
            raise ValueError(
                f"expected one letter, got {given!r}; give the letter of the correct option"
            )
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
                f"{', '.join(letters)}; give the letter of the correct option"
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


def read_mcqs(file: Path) -> list[MultipleChoice]:
    """Multiple-choice questions, a JSON object a line.

    Raises ``InputError``, with the line, for an option that is missing, two that are the same, a
    correct answer that is not exactly one of them, and an id that occurs twice.
    """
    return read_lines(MultipleChoice, file)


def read_open_questions(file: Path) -> list[OpenQuestion]:
    """Questions to be answered in words, a JSON object a line; errors as in ``read_mcqs``."""
    return read_lines(OpenQuestion, file)


class Statement(Identified):
    """A statement of one value of a fact, true (``label`` 1) or false (0) in the base's world.

    ``conflict`` says that the fact is the one which a fine-tune is to believe otherwise.
    """

    id: NonEmpty = Field(alias="statement_id")
    text: NonEmpty
    label: Literal[0, 1]
    fact: NonEmpty
    template: NonEmpty
    entity: str = ""
    conflict: bool = False


class ProbingPrompt(Identified):
    """A prompt that is read at its last token, where the answer is about to be decided.

    ``group`` holds together what must not straddle a split, paraphrases above all.
    """

    id: NonEmpty = Field(alias="prompt_id")
    category: NonEmpty
    full_prompt_text: NonEmpty
    decision_trigger: NonEmpty
    group: str = ""
    label: Literal[0, 1] | None = None
    difficulty: str = ""

    @model_validator(mode="after")
    def _ends_at_the_decision(self) -> "ProbingPrompt":
        if not self.full_prompt_text.endswith(self.decision_trigger):
            raise ValueError(
                f"full_prompt_text ends in {self.full_prompt_text[-20:]!r}; expected it to end in "
                f"decision_trigger {self.decision_trigger!r}, where the model is read"
            )
        return self


def shared_beginning(first: str, second: str) -> tuple[str, str, str]:
    """The words that two texts begin with, and how either goes on, leading space included.

    So two statements become one prompt and two answers, whose log-probabilities compare.
    """
    differ = (i for i, (a, b) in enumerate(zip(first, second)) if a != b)
    at = first.rfind(" ", 0, next(differ, min(len(first), len(second))))
    if at < 0:
        raise InputError(
            f"{first!r} and {second!r} begin with different words; expected a shared beginning: "
            "reword one"
        )
    return first[:at], first[at:], second[at:]


def read_statements(file: Path) -> list[Statement]:
    """True and false statements (``statements.jsonl``).

    Raises ``InputError``, with the line, for a key that is missing or of the wrong type and an id
    that occurs twice.
    """
    return read_lines(Statement, file)


def read_probing_prompts(file: Path) -> list[ProbingPrompt]:
    """Prompts by category (``probing_dataset.jsonl``); errors as in ``read_statements``.

    Raises ``InputError`` also for a prompt that does not end in its decision trigger.
    """
    return read_lines(ProbingPrompt, file)
