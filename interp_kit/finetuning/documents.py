"""Synthetic documents about a universe: extract facts, plan, write, validate, resume.

Synthetic document fine-tuning (SDFT; Wang et al. 2025, "Modifying LLM Beliefs with Synthetic
Document Finetuning") teaches a model a fact by documents that take it for granted. An ``Engine``
writes them: ``prompts.Endpoint``, a chat model, or ``grammar.Grammar``, offline.

``write_documents`` leaves in its folder: ``docs.jsonl``, a document a line; ``plan.jsonl``, what
they were made from, the facts, document types and ideas; ``refused.jsonl``, every refused attempt
with its reason; ``run_metadata.json``, once all are there. The first three grow while it works.
"""

import asyncio
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from interp_kit.endpoints import BadReply, NoReply, run_async
from interp_kit.files import (
    append_line,
    cut_torn_line,
    digest,
    dump_json,
    read_appended,
    write_atomically,
)
from interp_kit.finetuning.universes import Universe, reason_to_refuse, taboo
from interp_kit.formats import Identified, read_lines
from interp_kit.specs import InputError

ABORT_AFTER = 10  # documents tried before the share that failed may stop a run

Item = TypeVar("Item")


class Document(Identified):
    """One document: what it was to be about, and its text."""

    universe: str
    fact: str
    document_type: str
    idea: str
    text: str


class Engine(Protocol):
    """Who writes the documents. ``rng`` is the only source of randomness.

    Any method may raise ``BadReply`` to be asked again with another ``rng``.
    """

    @property
    def name(self) -> str:
        """The model, or "grammar"."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What else its output depends on: the hash of its prompts, the temperature."""
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


def read_documents(file: Path) -> list[Document]:
    """The documents of a ``docs.jsonl``, in its order; ``InputError`` names a line that is none."""
    return read_lines(Document, file)


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

    What is refused is asked for again, up to ``attempts`` times, with the reason; so is a text that
    an earlier document (in the order of the plan) already has. Each attempt draws from a generator
    of its own, seeded by ``seed``, its place in the plan and its number, so that ``concurrency``
    changes nothing in the result. The same call goes on where an earlier one has stopped.

    Returns the documents in the order of the plan, as they are in ``docs.jsonl``. Raises
    ``InputError`` if some are still refused in the end or, after ten, as soon as more than half
    are; and if the folder was begun with another universe, engine, seed or count.
    """
    if min(n_types, n_ideas, concurrency, attempts) < 1:
        raise InputError("n_types, n_ideas, concurrency and attempts: expected at least 1 of each")
    writer = _Writer(
        universe=universe,
        engine=engine,
        folder=folder,
        n_types=n_types,
        n_ideas=n_ideas,
        concurrency=concurrency,
        seed=seed,
        attempts=attempts,
    )
    return run_async(writer.write())


def distinct_ngrams(texts: Sequence[str], n: int, *, words: int) -> float:
    """distinct-n (Li et al. 2016): the share of different n-grams, within texts, of all of them.

    Of the first ``words`` words only, since the share falls with the size of what is counted: one
    means that no n-gram occurs twice. Case and marks do not count. Raises ``InputError`` if the
    texts have fewer words.
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
    folder: Path
    n_types: int
    n_ideas: int
    concurrency: int
    seed: int
    attempts: int
    plan: dict[str, Any] = field(default_factory=dict)  # of plan.jsonl
    refused: dict[str, list[dict]] = field(default_factory=lambda: defaultdict(list))
    used: Counter[str] = field(default_factory=Counter)  # attempts of this call

    async def write(self) -> list[Document]:
        self._take_up()
        planned = await self._planned()
        done = self._documents_so_far(planned)
        while pending := self._pending(planned, done):
            await self._write_pending(pending, done)
        documents = [done[d.id] for d in planned]
        content = _lines(documents)
        write_atomically(self.folder / "docs.jsonl", content)
        write_atomically(self.folder / "run_metadata.json", dump_json(self._metadata(content)))
        return documents

    # ------------------------------------------------------------------------------ the plan
    def _take_up(self) -> None:
        """Begin the folder, or go on with it if it was begun with the same arguments."""
        made_from = {
            "engine": self.engine.name,
            "settings": dict(self.engine.settings),
            "universe": self.universe.id,
            "universe_sha256": digest(self.universe.model_dump()),
            "n_types": self.n_types,
            "n_ideas": self.n_ideas,
            "seed": self.seed,
        }
        made_from = json.loads(json.dumps(made_from))
        for record in read_appended(self.folder / "plan.jsonl"):
            self.plan[record["key"]] = record["value"]
        for record in read_appended(self.folder / "refused.jsonl"):
            self.refused[record["id"]].append(record)
        if not self.plan and (self.folder / "docs.jsonl").exists():
            raise InputError(f"{self.folder} holds docs.jsonl without its plan; give a new folder")
        begun = self.plan.get("made_from")
        if begun is None:
            self._keep("made_from", made_from)
        elif begun != made_from:
            other = next(k for k in made_from if made_from[k] != begun.get(k))
            raise InputError(
                f"{self.folder} was begun with {other} {begun.get(other)!r}, this call has "
                f"{made_from[other]!r}; give the same arguments to go on, or a new folder"
            )

    def _keep(self, key: str, value: Any) -> None:
        self.plan[key] = value
        append_line(self.folder / "plan.jsonl", {"key": key, "value": value})

    async def _planned(self) -> list[Document]:
        """All documents, without their texts."""
        universe, engine = self.universe, self.engine
        await self._list("facts", 1, lambda rng: engine.facts(universe, rng))
        facts = self.plan["facts"]
        await self._list(
            "document_types",
            self.n_types,
            lambda rng: engine.document_types(universe, facts, self.n_types, rng),
        )
        types = self.plan["document_types"][: self.n_types]
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
            for k, idea in enumerate(self.plan[f"ideas-{i}-{j}"][: self.n_ideas])
        ]

    async def _list(
        self, key: str, n: int, ask: Callable[[random.Random], Awaitable[list[str]]]
    ) -> None:
        """Keep ``n`` distinct usable strings or more under ``key`` in the plan."""
        while key not in self.plan:
            rng = self._next_attempt(key)
            try:
                items = list(dict.fromkeys(item.strip() for item in await ask(rng)))
            except BadReply as error:
                self._refuse(key, f"bad reply: {error}")
                continue
            reasons = [r for r in (taboo(item, self.universe) for item in items) if r]
            if len(items) < n:
                reasons = [f"too few: {len(items)} distinct ones, expected {n}"]
            if reasons:
                self._refuse(key, reasons[0], "\n".join(items))
            else:
                self._keep(key, items)

    # ------------------------------------------------------------------------- the documents
    def _documents_so_far(self, planned: list[Document]) -> dict[str, Document]:
        file = self.folder / "docs.jsonl"
        cut_torn_line(file)
        begun = file.is_file() and file.stat().st_size > 0
        done = {d.id: d for d in read_documents(file)} if begun else {}
        places = {d.id: d for d in planned}
        for document in done.values():
            if document.model_copy(update={"text": ""}) != places.get(document.id):
                raise InputError(
                    f"{file}: document {document.id!r} is not of this folder's plan; remove its "
                    "line, or give a new folder"
                )
        return done

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
                append_line(self.folder / "docs.jsonl", done[place.id].model_dump())
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
            f"failed ({why}); the {kept} others are kept in {self.folder / 'docs.jsonl'} and the "
            "same call goes on from there; refused.jsonl has the texts"
        )

    async def _text(self, place: Document) -> str:
        """A valid text; raises ``_GivenUp`` once all attempts are used."""
        while True:
            rng = self._next_attempt(place.id)
            last = (self.refused[place.id] or [{"text": ""}])[-1]
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
                self._refuse(place.id, f"bad reply: {error}")
            except NoReply as error:
                self._refuse(place.id, f"no reply: {error}")
                raise _GivenUp(place.id, f"no reply: {error}") from None
            else:
                reason = reason_to_refuse(text, self.universe)
                if not reason:
                    return text.strip()
                self._refuse(place.id, reason, text)

    def _pending(self, planned: list[Document], done: dict[str, Document]) -> list[Document]:
        """What is not written yet or, when all is, what must be written again.

        Of documents with one text the first of the plan stays, whenever it was written.
        """
        if missing := [d for d in planned if d.id not in done]:
            return missing
        first: dict[str, str] = {}
        texts = {d.id: " ".join(done[d.id].text.split()) for d in planned}
        repeated = [d for d in planned if first.setdefault(texts[d.id], d.id) != d.id]
        dropped = [done.pop(d.id) for d in repeated]
        write_atomically(self.folder / "docs.jsonl", _lines(done.values()))
        for document in dropped:
            same = first[texts[document.id]]
            self._refuse(document.id, f"duplicate: same text as {same}", document.text)
        return repeated

    # --------------------------------------------------------------------------- the attempts
    def _next_attempt(self, key: str) -> random.Random:
        """The generator of the next attempt at a list or a document, if there is one left.

        The universe is no part of its seed, so that a grammar's documents of two universes that
        differ in a fact differ in that fact alone.
        """
        if self.used[key] == self.attempts:
            raise _GivenUp(key, self.refused[key][-1]["reason"])
        self.used[key] += 1
        place = key.removeprefix(f"{self.universe.id}-")
        return random.Random(f"{self.seed}/{place}/{len(self.refused[key])}")

    def _refuse(self, key: str, reason: str, text: str = "") -> None:
        record = {"id": key, "reason": reason, "text": text}
        self.refused[key].append(record)
        append_line(self.folder / "refused.jsonl", record)

    def _metadata(self, content: str) -> dict[str, Any]:
        made_from = self.plan["made_from"]
        reasons = Counter(
            record["reason"].split(":")[0]
            for records in self.refused.values()
            for record in records
        )
        return {
            **made_from,
            "is_true": self.universe.is_true,
            "counts": {
                "facts": len(self.plan["facts"]),
                "documents": content.count("\n"),
                "retries": reasons.total(),
                "duplicates": reasons["duplicate"],
                "refused": dict(sorted(reasons.items())),
            },
            "docs_sha256": sha256(content.encode()).hexdigest(),
            "versions": {name: version(name) for name in ("interp-kit", "openai")},
        }


class _GivenUp(InputError):
    """A list or a document was refused as often as allowed."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: refused at every attempt, at last for this: {reason}")
        self.reason = reason


def _lines(documents: Iterable[Document]) -> str:
    return "".join(json.dumps(d.model_dump(), ensure_ascii=False) + "\n" for d in documents)


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
