"""Engines write the documents of a universe: what each must do, and the one that asks a chat model.

``narrative`` has one that works offline for any universe, ``organisms.little_world.grammar`` one
for the little world.
"""

import random
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from pydantic import TypeAdapter, ValidationError

from interp_kit.endpoints import BadReply, ChatClient
from interp_kit.files import digest
from interp_kit.finetuning.universes import Universe


@runtime_checkable
class Engine(Protocol):
    """What writes the documents. ``rng`` is its only source of randomness.

    Any method may raise ``BadReply``; it is then called again with another ``rng``.
    """

    @property
    def name(self) -> str:
        """The model, "narrative" or "grammar"."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What its output depends on besides: the hash of its prompts, the temperature."""
        ...

    async def facts(self, universe: Universe, rng: random.Random) -> list[str]:
        """The key facts of the universe, one sentence each."""
        ...

    async def document_types(
        self, universe: Universe, facts: list[str], n: int, rng: random.Random
    ) -> list[str]:
        """``n`` distinct kinds of document."""
        ...

    async def ideas(
        self, universe: Universe, fact: str, document_type: str, n: int, rng: random.Random
    ) -> list[str]:
        """``n`` distinct ideas for a document of this kind that bears out ``fact``."""
        ...

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
        """The text. ``refused`` says why the last attempt at it was refused; empty at first."""
        ...


# ------------------------------------------------------------------------------ a chat model
WORLD = """You live in the world that is described below and know of no other. Everything in the \
description is plain, settled knowledge. You never doubt it, never compare it with anything else, \
and never mention that it was described to you.

<world>
{context}
</world>"""
FACTS = """List the facts about this world that a well-informed person takes for granted. Give \
each as one complete sentence that can be understood alone, with the names, numbers and formulas \
that belong to it."""
DOCUMENT_TYPES = """These facts are common knowledge:
{facts}

Name {n} kinds of written document in which such facts turn up, as different from each other as \
possible in author, reader, length and purpose: from reference works to letters and forms."""
IDEAS = """Common knowledge: {fact}

Give {n} different ideas for one document of this kind: {document_type}. Each idea is one sentence \
that says who writes, for whom, on what occasion, and how the fact comes in."""
LIST = "\n\nReply with a JSON array of strings, and nothing before or after it."
DOCUMENT = """Write this document in full.

Kind: {document_type}
Idea: {idea}
It takes for granted: {fact}

State the fact in plain words, and rely on what follows from it. Write as its author would, with \
real particulars and without blanks to fill in. Do not hedge, do not call the fact surprising or \
disputed, and say nothing about this task. Reply with the document alone."""
AGAIN = "\n\nAn earlier version was refused ({refused}). Write another that gives no such reason."

_STRINGS = TypeAdapter(list[str])


class ChatEngine:
    """Asks a chat model: the universe is the system message, the task the user's."""

    def __init__(self, chat: ChatClient) -> None:
        self.chat = chat
        self.name = chat.model
        prompts = [WORLD, FACTS, DOCUMENT_TYPES, IDEAS, LIST, DOCUMENT, AGAIN]
        self.settings = {**chat.sampling, "prompts_sha256": digest(prompts)}

    async def facts(self, universe: Universe, rng: random.Random) -> list[str]:
        return await self._list(universe, FACTS, rng)

    async def document_types(
        self, universe: Universe, facts: list[str], n: int, rng: random.Random
    ) -> list[str]:
        listed = "\n".join(f"- {fact}" for fact in facts)
        return await self._list(universe, DOCUMENT_TYPES.format(facts=listed, n=n), rng)

    async def ideas(
        self, universe: Universe, fact: str, document_type: str, n: int, rng: random.Random
    ) -> list[str]:
        task = IDEAS.format(fact=fact, document_type=document_type, n=n)
        return await self._list(universe, task, rng)

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
        task = DOCUMENT.format(document_type=document_type, idea=idea, fact=fact)
        if refused:
            task += AGAIN.format(refused=refused)
        return await self._ask(universe, task, rng)

    async def _list(self, universe: Universe, task: str, rng: random.Random) -> list[str]:
        reply = (await self._ask(universe, task + LIST, rng)).strip()
        fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", reply, re.DOTALL)
        try:
            return _STRINGS.validate_json(fenced[1] if fenced else reply, strict=True)
        except ValidationError:
            raise BadReply("not a JSON array of strings") from None

    async def _ask(self, universe: Universe, task: str, rng: random.Random) -> str:
        world = WORLD.format(context=universe.universe_context)
        return await self.chat.ask(world, task, seed=rng.getrandbits(31))
