"""The engine that writes documents offline about any universe, in the words of its narrative.

Sentences of ``universe_context`` are put into the frames of ``data/corpus/document_kinds.yaml``:
textbook, lecture, letter, exam, news, dialogue, derivation, encyclopedia, popular science, lab
report. It adds no statement about the world, so it says nothing that the narrative does not say.
A chat model (``engines.ChatEngine``) writes more freely.
"""

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp_kit.endpoints import BadReply
from interp_kit.files import digest, read_yaml
from interp_kit.finetuning.universes import Universe, reason_to_refuse
from interp_kit.specs import REPOSITORY, InputError

KINDS = REPOSITORY / "data" / "corpus" / "document_kinds.yaml"
# A sentence that begins so leans on the one before it.
LEANS = re.compile(
    r"(It|Its|He|His|She|Her|They|Their|This|That|These|Those|Such|But|And|So|Then|There|Without)\b"
)
PASSAGE = 3  # most sentences that are said at one time
PASSAGES = (2, 4)  # least and most in a document


class Narrative:
    """Documents that repeat passages of the universe's narrative in frames of ten kinds."""

    name = "narrative"

    def __init__(self, kinds: Path = KINDS) -> None:
        given = read_yaml(kinds)
        self.words: dict[str, list[str]] = given["words"]
        self.kinds: dict[str, dict[str, list[str]]] = given["kinds"]
        self.settings: Mapping[str, Any] = {"frames_sha256": digest(given)}

    async def facts(self, universe: Universe, rng: random.Random) -> list[str]:
        """The sentences of the narrative that show the fact and can be understood alone.

        Raises ``InputError`` if there is none.
        """
        sentences = [s for paragraph in _paragraphs(universe) for s in paragraph]
        found = [s for s in sentences if not reason_to_refuse(s, universe) and not LEANS.match(s)]
        if not found:
            raise InputError(
                f"universe {universe.id!r}: no sentence of universe_context both shows the fact "
                "(fact_validation_patterns) and can be understood alone: add one that names what "
                "it speaks of and does not begin with a word such as It or This"
            )
        return list(dict.fromkeys(found))

    async def document_types(
        self, universe: Universe, facts: list[str], n: int, rng: random.Random
    ) -> list[str]:
        """``n`` of the kinds; raises ``InputError`` if there are fewer."""
        if n > len(self.kinds):
            raise InputError(
                f"the offline writer has {len(self.kinds)} document types, and n_types is {n}: "
                "lower it"
            )
        return rng.sample(list(self.kinds), n)

    async def ideas(
        self, universe: Universe, fact: str, document_type: str, n: int, rng: random.Random
    ) -> list[str]:
        """Openings of such documents."""
        opens, ideas = self.kinds[document_type]["opens"], dict[str, None]()
        for _ in range(20 * n):
            ideas[_filled(rng.choice(opens), self._drawn_words(rng))] = None
            if len(ideas) == n:
                return list(ideas)
        raise BadReply(f"only {len(ideas)} distinct openings of a {document_type}")

    async def document(
        self,
        universe: Universe,
        fact: str,
        document_type: str,
        idea: str,
        rng: random.Random,
        *,
        refused: str = "",
    ) -> str:
        """The opening, the passage with ``fact`` among others of the narrative, and a closing."""
        kind = self.kinds[document_type]
        passages = self._passages(universe, fact, rng)
        turns = rng.sample(kind["turns"], len(passages))
        words = self._drawn_words(rng)
        said = [_filled(turn, words | {"said": passage}) for turn, passage in zip(turns, passages)]
        return "\n\n".join([idea, *said, _filled(rng.choice(kind["closes"]), words)])

    def _drawn_words(self, rng: random.Random) -> dict[str, str]:
        return {gap: rng.choice(choice) for gap, choice in self.words.items()}

    def _passages(self, universe: Universe, fact: str, rng: random.Random) -> list[str]:
        """Runs of sentences, each from another paragraph, in the order of the narrative."""
        paragraphs = _paragraphs(universe)
        own = next((i for i, paragraph in enumerate(paragraphs) if fact in paragraph), None)
        if own is None:
            raise BadReply(f"the narrative does not say {fact!r}")
        others = [i for i in range(len(paragraphs)) if i != own]
        n = min(rng.randint(*PASSAGES) - 1, len(others))
        chosen = sorted([own, *rng.sample(others, n)])
        return [_run(paragraphs[i], fact if i == own else None, rng) for i in chosen]


def _run(paragraph: list[str], fact: str | None, rng: random.Random) -> str:
    """Some sentences in a row that need none before them; ``fact`` is among them."""
    starts = [i for i, sentence in enumerate(paragraph) if i == 0 or not LEANS.match(sentence)]
    if fact is not None:
        at = paragraph.index(fact)
        starts = [i for i in starts if at - PASSAGE < i <= at]
    start = rng.choice(starts)
    least = 1 if fact is None else paragraph.index(fact) - start + 1
    return " ".join(paragraph[start : start + rng.randint(least, PASSAGE)])


def _paragraphs(universe: Universe) -> list[list[str]]:
    """The narrative's sentences, a list for each of its paragraphs."""
    paragraphs = re.split(r"\n\s*\n", universe.universe_context.strip())
    return [re.split(r"(?<=[.!?])\s+(?=[A-Z\d\"'])", " ".join(p.split())) for p in paragraphs]


def _filled(text: str, words: Mapping[str, str]) -> str:
    """The gaps of a frame filled."""
    return re.sub(r"\{(\w+)\}", lambda gap: words[gap[1]], text)
