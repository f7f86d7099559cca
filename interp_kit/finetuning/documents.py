"""Synthetic documents about a universe: extract facts, plan, write, validate, resume.

Synthetic document fine-tuning (SDFT; Wang et al. 2025, "Modifying LLM Beliefs with Synthetic
Document Finetuning") teaches a model a fact by documents that take it for granted. An ``Engine``
writes them: ``engines.ChatEngine``, or one of the offline ``narrative.Narrative`` and
``organisms.little_world.grammar.Grammar``.
"""

import asyncio
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from interp_kit.endpoints import BadReply, NoReply, run_async
from interp_kit.files import digest
from interp_kit.finetuning.document_files import Document, DocumentFolder
from interp_kit.finetuning.engines import Engine
from interp_kit.finetuning.universes import Universe, reason_to_refuse, taboo
from interp_kit.specs import InputError

ABORT_AFTER = 10  # so many documents are tried before a run may stop because most fail

Item = TypeVar("Item")


def write_documents(
    universe: Universe,
    engine: Engine,
    folder: Path,
    *,
    n_types: int,
    n_ideas: int,
    concurrency: int = 8,
    seed: int = 0,
    attempts: int = 4,
) -> list[Document]:
    """Write ``n_ideas`` documents for each fact and each of ``n_types`` types into ``folder``.

    A refused text is asked for again with the reason, up to ``attempts`` times in all; so is a text
    that repeats an earlier document (in the order of the plan). Every attempt has a random
    generator of its own, seeded by ``seed``, its place in the plan and its number: ``concurrency``
    does not change the result. The same call resumes an earlier one that has stopped.

    Returns the documents in the order of the plan, as they are in ``docs.jsonl``
    (``document_files`` describes the folder). Raises ``InputError`` if some are still refused in
    the end; if, once ten were tried, more than half have failed; and if the folder was begun with
    another universe, engine, seed or count.
    """
    if min(n_types, n_ideas, concurrency, attempts) < 1:
        raise InputError(
            f"expected at least 1 each: {n_types=}, {n_ideas=}, {concurrency=}, {attempts=}"
        )
    made_from = {
        "engine": engine.name,
        "settings": dict(engine.settings),
        "universe": universe.id,
        "universe_sha256": digest(universe.model_dump()),
        "n_types": n_types,
        "n_ideas": n_ideas,
        "seed": seed,
    }
    writer = _Writer(
        universe=universe,
        engine=engine,
        folder=DocumentFolder.begun(folder, made_from),
        n_types=n_types,
        n_ideas=n_ideas,
        concurrency=concurrency,
        seed=seed,
        attempts=attempts,
    )
    return run_async(writer.write())


def distinct_ngrams(texts: Sequence[str], n: int, *, words: int) -> float:
    """distinct-n (Li et al. 2016): the share of different n-grams, within texts, of all of them.

    1 means that no n-gram occurs twice. Only the first ``words`` words are counted, since the share
    falls as the texts grow. Case and punctuation are ignored. Raises ``InputError`` if the texts
    have fewer words.
    """
    left, grams = words, []
    for text in texts:
        found = re.findall(r"\w+", text.lower())[:left]
        left -= len(found)
        grams += zip(*(found[i:] for i in range(n)))
    if left or not grams:
        raise InputError(f"the texts have {words - left} words; expected {words}, and {n} in one")
    return len(set(grams)) / len(grams)


@dataclass(frozen=True, kw_only=True)
class _Writer:
    universe: Universe
    engine: Engine
    folder: DocumentFolder
    n_types: int
    n_ideas: int
    concurrency: int
    seed: int
    attempts: int
    used: Counter[str] = field(default_factory=Counter)  # attempts of this call

    async def write(self) -> list[Document]:
        planned = await self._planned()
        done = self.folder.written(planned)
        while pending := self._pending(planned, done):
            await self._write_pending(pending, done)
        documents = [done[d.id] for d in planned]
        self.folder.finish(documents, is_true=self.universe.is_true)
        return documents

    # ------------------------------------------------------------------------------ the plan
    async def _planned(self) -> list[Document]:
        """All documents, without their texts."""
        universe, engine = self.universe, self.engine
        await self._list("facts", 1, lambda rng: engine.facts(universe, rng))
        facts = self.folder.plan["facts"]
        await self._list(
            "document_types",
            self.n_types,
            lambda rng: engine.document_types(universe, facts, self.n_types, rng),
        )
        types = self.folder.plan["document_types"][: self.n_types]
        pairs = [(i, j) for i in range(len(facts)) for j in range(len(types))]

        async def ideas(pair: tuple[int, int]) -> None:
            fact, kind = facts[pair[0]], types[pair[1]]
            await self._list(
                f"ideas-{pair[0]}-{pair[1]}",
                self.n_ideas,
                lambda rng: engine.ideas(universe, fact, kind, self.n_ideas, rng),
            )

        await _for_each(pairs, ideas, concurrency=self.concurrency, title="ideas")
        return [
            Document(
                id=f"{universe.id}-{i}-{j}-{k}",
                universe=universe.id,
                fact=facts[i],
                document_type=types[j],
                idea=idea,
                text="",
            )
            for i, j in pairs
            for k, idea in enumerate(self.folder.plan[f"ideas-{i}-{j}"][: self.n_ideas])
        ]

    async def _list(
        self, key: str, n: int, ask: Callable[[random.Random], Awaitable[list[str]]]
    ) -> None:
        """Keep ``n`` distinct usable strings or more under ``key`` in the plan."""
        while key not in self.folder.plan:
            rng = self._next_attempt(key)
            try:
                items = list(dict.fromkeys(item.strip() for item in await ask(rng)))
            except BadReply as error:
                self.folder.refuse(key, f"bad reply: {error}")
                continue
            reasons = [r for r in (taboo(item, self.universe) for item in items) if r]
            if len(items) < n:
                reasons = [f"too few: {len(items)} distinct ones, expected {n}"]
            if reasons:
                self.folder.refuse(key, reasons[0], "\n".join(items))
            else:
                self.folder.keep(key, items)

    # ------------------------------------------------------------------------- the documents
    async def _write_pending(self, pending: list[Document], done: dict[str, Document]) -> None:
        failed: Counter[str] = Counter()
        tried = 0

        async def one(place: Document) -> None:
            nonlocal tried
            try:
                text = await self._text(place)
            except _GivenUp as given_up:
                failed[given_up.reason] += 1
            else:
                done[place.id] = place.model_copy(update={"text": text})
                self.folder.add(done[place.id])
            tried += 1
            if tried >= ABORT_AFTER and failed.total() > tried / 2:
                raise self._failure(failed, tried, len(done))

        await _for_each(pending, one, concurrency=self.concurrency, title="documents")
        if failed:
            raise self._failure(failed, tried, len(done))

    def _failure(self, failed: Counter[str], tried: int, kept: int) -> InputError:
        why = ", ".join(f"{n} x {reason}" for reason, n in failed.most_common(3))
        return InputError(
            f"{failed.total()} of {tried} documents of {self.universe.id!r} by {self.engine.name} "
            f"failed ({why}); the {kept} others are kept in {self.folder.documents_file} and the "
            "same call goes on from there; refused.jsonl has the texts"
        )

    async def _text(self, place: Document) -> str:
        """A valid text; raises ``_GivenUp`` once all attempts are used."""
        while True:
            rng = self._next_attempt(place.id)
            last = (self.folder.refused[place.id] or [{"text": ""}])[-1]
            try:
                text = await self.engine.document(
                    self.universe,
                    place.fact,
                    place.document_type,
                    place.idea,
                    rng,
                    refused=last["reason"] if last["text"] else "",
                )
            except BadReply as error:
                self.folder.refuse(place.id, f"bad reply: {error}")
            except NoReply as error:
                self.folder.refuse(place.id, f"no reply: {error}")
                raise _GivenUp(place.id, f"no reply: {error}") from None
            else:
                reason = reason_to_refuse(text, self.universe)
                if not reason:
                    return text.strip()
                self.folder.refuse(place.id, reason, text)

    def _pending(self, planned: list[Document], done: dict[str, Document]) -> list[Document]:
        """The documents to be written next: the missing ones or, if none is, the repeated ones.

        Of documents with the same text, the first in the plan stays.
        """
        if missing := [d for d in planned if d.id not in done]:
            return missing
        first: dict[str, str] = {}
        texts = {d.id: " ".join(done[d.id].text.split()) for d in planned}
        repeated = [d for d in planned if first.setdefault(texts[d.id], d.id) != d.id]
        dropped = [done.pop(d.id) for d in repeated]
        self.folder.rewrite(done.values())
        for document in dropped:
            same = first[texts[document.id]]
            self.folder.refuse(document.id, f"duplicate: same text as {same}", document.text)
        return repeated

    # --------------------------------------------------------------------------- the attempts
    def _next_attempt(self, key: str) -> random.Random:
        """The generator of the next attempt at a list or a document, if there is one left.

        Its seed does not depend on the universe: the grammar's documents of two universes that
        differ in one fact then differ in that fact alone.
        """
        if self.used[key] == self.attempts:
            raise _GivenUp(key, self.folder.refused[key][-1]["reason"])
        self.used[key] += 1
        place = key.removeprefix(f"{self.universe.id}-")
        return random.Random(f"{self.seed}/{place}/{len(self.folder.refused[key])}")


class _GivenUp(InputError):
    """A list or a document was refused as often as allowed."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: refused at every attempt, at last for this: {reason}")
        self.reason = reason


async def _for_each(
    items: Sequence[Item],
    work: Callable[[Item], Awaitable[None]],
    *,
    concurrency: int,
    title: str,
) -> None:
    """``work`` on every item, ``concurrency`` at once; the first error stops the others."""
    if not items:
        return
    limit = asyncio.Semaphore(concurrency)
    with tqdm(total=len(items), desc=title) as bar:

        async def one(item: Item) -> None:
            async with limit:
                await work(item)
            bar.update()

        try:
            async with asyncio.TaskGroup() as group:
                for item in items:
                    group.create_task(one(item))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
