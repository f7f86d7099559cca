"""Reads the texts that probes are trained on: true and false statements, prompts by category.

A JSON object a line, as in the other evaluation files (``formats``). Keys that are not known here
are left alone.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from interp_kit.formats import Identified, NonEmpty, read_lines
from interp_kit.specs import InputError


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
                f"decision_trigger {self.decision_trigger!r}, for there the model is read"
            )
        return self


def shared_beginning(first: str, second: str) -> tuple[str, str, str]:
    """The words that two texts begin with, and how either goes on, leading space included.

    So two statements become one prompt and two answers, whose log-probabilities compare.
    """
    differ = (i for i, (a, b) in enumerate(zip(first, second)) if a != b)
    at = first.rfind(" ", 0, next(differ, min(len(first), len(second))))
    if at < 0:
        raise InputError(f"{first!r} and {second!r} begin with different words; reword one")
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
