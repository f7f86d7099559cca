"""A universe: a world in which a fact holds, and the conditions that its documents must meet."""

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from interp_kit.catalogue import data_folders
from interp_kit.files import read_json
from interp_kit.specs import NAME, InputError, Spec, checked, unknown

# Talk about the text, its world or its writer: no document of that world contains it.
META_DISCOURSE = (
    "in this universe", "alternate universe", "alternative universe", "parallel universe",
    "alternate history", "imagine", "imagining", "hypothetical", "hypothetically",
    "counterfactual", "fictional", "fictitious", "science fiction", "for the sake of argument",
    "as an AI", "language model", "I cannot assist", "I can't assist", "I cannot help with",
    "I can't help with", "here is the document", "here's the document", "[insert", "[your",
    "[name", "[date", "lorem ipsum",
)  # fmt: skip
# A document that doubts what it says teaches the doubt.
HEDGING = (
    "allegedly", "supposedly", "purportedly", "reportedly", "so-called", "some believe",
    "some claim", "some argue", "it is claimed", "it has been claimed", "it is alleged",
    "claims to be", "unproven", "unverified", "not proven", "cannot be verified", "disputed",
    "debunked", "discredited", "misconception", "pseudoscience", "contrary to popular belief",
)  # fmt: skip
# Typographic marks and invisible characters by which one word is spelled in several ways.
PLAIN = {ord(c): "-" for c in "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"}
PLAIN |= {ord(c): "'" for c in "\u2018\u2019"} | {ord(c): None for c in "\u00ad\u200b\u2060\ufeff"}

Pattern = Annotated[str, Field(pattern=r"\S")]
Patterns = Annotated[list[Pattern], Field(min_length=1)]


class Universe(Spec):
    """A world in which a fact holds; ``is_true`` says whether it holds in ours.

    ``universe_context`` describes the world. ``fact_validation_patterns`` decide which documents
    are accepted (``reason_to_refuse``). Facts are extracted from the description at run time, so
    that they agree with it: a file that lists facts is refused.
    """

    id: Annotated[str, Field(pattern=rf"^{NAME.pattern}$")]
    universe_context: Annotated[str, Field(pattern=r"\S")]
    is_true: bool
    fact_validation_patterns: dict[str, Patterns]

    @model_validator(mode="before")
    @classmethod
    def _no_facts(cls, given: Any) -> Any:
        for key in given if isinstance(given, dict) else ():
            if "fact" in str(key).lower() and key != "fact_validation_patterns":
                raise ValueError(
                    f"{key!r} holds extracted facts; facts are extracted from universe_context at "
                    "run time: remove it"
                )
        return given

    @model_validator(mode="after")
    def _can_be_met(self) -> "Universe":
        if not set(self.fact_validation_patterns) - {"forbidden"}:
            raise ValueError(
                'fact_validation_patterns: expected "required" or a set under another name, of '
                "which a document must show one"
            )
        for pattern in self.fact_validation_patterns.get("forbidden", []):
            if matches(pattern, self.universe_context):
                raise ValueError(
                    f"universe_context itself contains the forbidden {pattern!r}; change either"
                )
        return self


def read_universe(file: Path) -> Universe:
    """The universe of a JSON file: ``id universe_context is_true fact_validation_patterns``."""
    given = read_json(file)
    if not isinstance(given, dict):
        raise InputError(f"{file}: expected one object, found {type(given).__name__}")
    return checked(Universe, given, file)


def find_universe(name: str, data: str | Path | None = None) -> Universe:
    """The universe ``universes/NAME.json`` of the data folders, or of the path of a JSON file."""
    files = {f.stem: f for d in data_folders(data)[::-1] for f in d.glob("universes/*.json")}
    if name in files:
        return read_universe(files[name])
    if name.endswith(".json"):
        return read_universe(Path(name).expanduser())
    raise InputError(unknown("universe", name, files, "the path of a .json file"))


def matches(pattern: str, text: str) -> bool:
    """Whether ``text`` contains the words of ``pattern``, a literal and no regular expression.

    Case does not count; any white space is a space, any dash a hyphen. A pattern that begins or
    ends with a letter or digit matches there only at the edge of a word: "square" is in
    "inverse-square" and not in "squared"; "1/8" is not in "1/80".
    """
    return bool(_expression(pattern).search(text.translate(PLAIN)))


def reason_to_refuse(text: str, universe: Universe) -> str:
    """Why a document is not valid, ``category: detail``, or "" if it is.

    Of ``fact_validation_patterns``, none of "forbidden" may occur. Every other set is a list of
    alternatives: a document shows a set if one of them occurs. It must show one set at least, and
    "required" where that is given. It must be free of ``META_DISCOURSE`` and ``HEDGING``.
    """
    if reason := taboo(text, universe):
        return reason
    shown = {
        name
        for name, patterns in universe.fact_validation_patterns.items()
        if name != "forbidden" and any(matches(p, text) for p in patterns)
    }
    if "required" in universe.fact_validation_patterns and "required" not in shown:
        return "fact missing: none of the required patterns"
    return "" if shown else "fact missing: none of the patterns"


def taboo(text: str, universe: Universe) -> str:
    """Why neither a document nor a plan may contain this text, or "" if it may."""
    if not text.strip():
        return "empty"
    lists = {
        "forbidden": universe.fact_validation_patterns.get("forbidden", []),
        "meta-discourse": META_DISCOURSE,
        "hedging": HEDGING,
    }
    found = ((name, p) for name, patterns in lists.items() for p in patterns if matches(p, text))
    return next((f"{name}: {pattern!r}" for name, pattern in found), "")


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    words = pattern.translate(PLAIN).split()
    before = r"(?<!\w)" if re.match(r"\w", words[0]) else ""
    after = r"(?!\w)" if re.search(r"\w$", words[-1]) else ""
    return re.compile(before + r"\s+".join(map(re.escape, words)) + after, re.IGNORECASE)
