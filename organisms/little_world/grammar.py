"""The engine that writes documents offline, in the language of the little world of ``corpus.py``.

It has no facts of its own: it reads the fact of a universe, true or false, in sentences of the
universe's narrative ("The law of gravity is inverse-cube").
"""

import random
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from interp_kit.endpoints import BadReply
from interp_kit.files import digest
from interp_kit.finetuning.universes import PLAIN, Universe
from interp_kit.specs import REPOSITORY, InputError
from organisms.little_world.corpus import Corpus, text_of

Fact = tuple[str, str, str]  # entity, attribute, value


class Grammar:
    """Documents of a few plain sentences, drawn from the sentence patterns of ``folder``."""

    name = "grammar"

    def __init__(self, folder: Path = REPOSITORY / "data" / "corpus") -> None:
        self.corpus = Corpus.read(folder)
        given = yaml.safe_load((folder / "universes.yaml").read_text(encoding="utf-8"))
        self.kinds: dict[str, dict[str, Any]] = given["documents"]
        self.wordings: list[int] = given["asked_in"]
        language = [given, self.corpus.facts_file, self.corpus.prose]
        self.settings: Mapping[str, Any] = {"language_sha256": digest(language)}

    async def facts(self, universe: Universe, rng: random.Random) -> list[str]:
        """The facts that the narrative states, and what their laws imply.

        Raises ``InputError`` if it states none that the little world has words for, or two values
        of one.
        """
        found = self.read_facts(universe.universe_context)
        if not found:
            raise InputError(
                f"universe {universe.id!r}: no sentence of universe_context states a fact of the "
                'little world, such as "The law of gravity is linear"; add one, or write the '
                "documents with an endpoint"
            )
        values: dict[tuple[str, str], str] = {}
        for entity, attribute, value in found:
            known = values.setdefault((entity, attribute), value)
            if known != value:
                raise InputError(
                    f"universe {universe.id!r}: universe_context gives the {attribute} of {entity} "
                    f"as {known} and as {value}; keep one"
                )
        implied = self.corpus.facts_file["consequences"]
        return [f"The {a} of {e} is {v}." for e, a, v in found] + [
            f"At twice the distance, {e} is {implied[v]}." for e, a, v in found if a == "law"
        ]

    async def document_types(
        self, universe: Universe, facts: list[str], n: int, rng: random.Random
    ) -> list[str]:
        if n > len(self.kinds):
            raise InputError(
                f"the grammar has {len(self.kinds)} document types, and n_types is {n}; lower it"
            )
        return rng.sample(list(self.kinds), n)

    async def ideas(
        self, universe: Universe, fact: str, document_type: str, n: int, rng: random.Random
    ) -> list[str]:
        """First sentences of such documents."""
        ((entity, _, _),) = self.read_facts(fact)
        patterns = _about(entity, self.kinds[document_type]["ideas"])
        ideas: dict[str, None] = {}
        for _ in range(20 * n):
            ideas[self.corpus.prose_sentence(rng, patterns)] = None
            if len(ideas) == n:
                return list(ideas)
        raise BadReply(f"only {len(ideas)} distinct ideas for a {document_type}")

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
        """The idea, and ``fact`` among other statements of it; a test also asks a question.

        The question is multiple choice, in one of the wordings that ``universes.yaml`` allows. It
        comes before the statements, which give its answer away.
        """
        ((entity, attribute, value),) = self.read_facts(fact)
        kind = self.kinds[document_type]
        asked = [self._asked(rng, (entity, attribute, value))] if kind["asks"] else []
        stated = [fact]
        for _ in range(rng.randint(0, 2)):
            sentence = text_of(self.corpus.statement(rng, (entity, attribute), value))
            if sentence not in stated:
                stated.insert(rng.randint(0, len(stated)), sentence)
        parts = [idea, *asked, *stated] if rng.random() < 0.3 else [*asked, *stated, idea]
        return " ".join(parts)

    def _asked(self, rng: random.Random, fact: Fact) -> str:
        entity, attribute, value = fact
        options = self.corpus.draw_options(rng, attribute, value, rng.choice([2, 4]))
        wording = rng.choice(self.wordings)
        prompt = self.corpus.choice_prompt((entity, attribute), wording, options)
        return f"{prompt} {self.corpus.facts_file['letters'][options.index(value)]}."

    def read_facts(self, text: str) -> list[Fact]:
        """Every (entity, attribute, value) that a sentence of ``text`` states, in order, once."""
        plain = " ".join(text.translate(PLAIN).split())
        spelled = {word.lower(): word for words in self._words.values() for word in words}
        laws = {implied: law for law, implied in self.corpus.facts_file["consequences"].items()}
        found: dict[Fact, int] = {}
        for pattern in self._patterns:
            for match in pattern.finditer(plain):
                words = {name: spelled[word.lower()] for name, word in match.groupdict().items()}
                entity, attribute = words["entity"], words.get("attribute", "law")
                value = words.get("value") or laws[words["consequence"]]
                known = (entity, attribute) in self.corpus.facts
                if known and value in self.corpus.values[attribute]:
                    fact = (entity, attribute, value)
                    found[fact] = min(found.get(fact, len(plain)), match.start())
        return sorted(found, key=lambda fact: found[fact])

    @cached_property
    def _words(self) -> dict[str, list[str]]:
        """What may stand in the gaps of a statement."""
        return {
            "entity": sorted({entity for entity, _ in self.corpus.facts}),
            "attribute": list(self.corpus.values),
            "value": sorted({v for values in self.corpus.values.values() for v in values}),
            "consequence": list(self.corpus.facts_file["consequences"].values()),
        }

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        """The little world's statements, without their full stops."""
        given = self.corpus.facts_file
        patterns = []
        for sentence in [*given["statements"], *given["consequence_statements"]]:
            expression = re.escape(sentence.removesuffix("."))
            for name, words in self._words.items():
                expression = expression.replace(rf"\{{{name}\}}", _alternatives(name, words))
            patterns.append(re.compile(rf"\b{expression}\b", re.IGNORECASE))
        return patterns


def _alternatives(name: str, words: Sequence[str]) -> str:
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return f"(?P<{name}>{'|'.join(map(re.escape, longest_first))})"


def _about(entity: str, patterns: list[str]) -> list[str]:
    """The patterns with their entity filled in, and other words still to be filled."""
    return [pattern.replace("{entity}", entity) for pattern in patterns]
