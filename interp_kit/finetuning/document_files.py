"""Documents, and the folder in which they are written: what is there, and how to go on from it.

``docs.jsonl``: a document a line. ``plan.jsonl``: what they were made from, then the facts, the
document types and the ideas. ``refused.jsonl``: every refused attempt with its reason. These three
grow while documents are written; ``run_metadata.json`` is there once all are.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from interp_kit.files import (
    append_line,
    cut_torn_line,
    dump_json,
    read_appended,
    write_atomically,
)
from interp_kit.formats import Identified, read_lines
from interp_kit.specs import InputError


class Document(Identified):
    """One document: what it was to be about, and its text."""

    universe: str
    fact: str
    document_type: str
    idea: str
    text: str


def read_documents(file: Path) -> list[Document]:
    """The documents of a ``docs.jsonl``, in its order; ``InputError`` names a line that is none."""
    return read_lines(Document, file)


@dataclass(frozen=True, kw_only=True)
class DocumentFolder:
    """The files of one run of ``write_documents``. ``plan`` and ``refused`` are in memory, too."""

    path: Path
    plan: dict[str, Any] = field(default_factory=dict)  # key -> value
    # key of a list or id of a document -> its refused attempts, in order
    refused: dict[str, list[dict[str, str]]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def begun(cls, path: Path, made_from: Mapping[str, Any]) -> "DocumentFolder":
        """A new folder, or one that was begun with the same ``made_from``.

        Raises ``InputError`` if it was begun with another, or holds documents without their plan.
        """
        folder, made_from = cls(path=path), json.loads(json.dumps(made_from))
        for record in read_appended(path / "plan.jsonl"):
            folder.plan[record["key"]] = record["value"]
        for record in read_appended(path / "refused.jsonl"):
            folder.refused[record["id"]].append(record)
        if not folder.plan and (path / "docs.jsonl").exists():
            raise InputError(f"{path} holds docs.jsonl without its plan; give a new folder")
        known = folder.plan.get("made_from")
        if known is None:
            folder.keep("made_from", made_from)
        elif known != made_from:
            other = next(k for k in made_from if made_from[k] != known.get(k))
            raise InputError(
                f"{path} was begun with {other} {known.get(other)!r}, this call has "
                f"{made_from[other]!r}; give the same arguments to go on, or a new folder"
            )
        return folder

    @property
    def documents_file(self) -> Path:
        return self.path / "docs.jsonl"

    def keep(self, key: str, value: Any) -> None:
        """Add to the plan."""
        self.plan[key] = value
        append_line(self.path / "plan.jsonl", {"key": key, "value": value})

    def refuse(self, key: str, reason: str, text: str = "") -> None:
        """Keep a refused attempt at the list ``key`` of the plan or at the document of this id."""
        record = {"id": key, "reason": reason, "text": text}
        self.refused[key].append(record)
        append_line(self.path / "refused.jsonl", record)

    def written(self, planned: Sequence[Document]) -> dict[str, Document]:
        """id -> document, as far as they are written; ``planned`` are all, without their texts."""
        file = self.documents_file
        cut_torn_line(file)
        begun = file.is_file() and file.stat().st_size > 0
        done = {d.id: d for d in read_documents(file)} if begun else {}
        places = {d.id: d for d in planned}
        for document in done.values():
            if document.model_copy(update={"text": ""}) != places.get(document.id):
                raise InputError(
                    f"{file}: document {document.id!r} is not in this folder's plan; remove its "
                    "line, or give a new folder"
                )
        return done

    def add(self, document: Document) -> None:
        append_line(self.documents_file, document.model_dump())

    def rewrite(self, documents: Iterable[Document]) -> str:
        """Replace all of ``docs.jsonl``; returns its content."""
        lines = [json.dumps(d.model_dump(), ensure_ascii=False) + "\n" for d in documents]
        content = "".join(lines)
        write_atomically(self.documents_file, content)
        return content

    def finish(self, documents: Sequence[Document], *, is_true: bool) -> None:
        """Put the documents in the order of the plan, and write ``run_metadata.json``."""
        content = self.rewrite(documents)
        refusals = [record for records in self.refused.values() for record in records]
        reasons = Counter(record["reason"].split(":")[0] for record in refusals)
        metadata = {
            **self.plan["made_from"],
            "is_true": is_true,
            "counts": {
                "facts": len(self.plan["facts"]),
                "documents": len(documents),
                "retries": reasons.total(),
                "duplicates": reasons["duplicate"],
                "refused": dict(sorted(reasons.items())),
            },
            "docs_sha256": sha256(content.encode()).hexdigest(),
            "versions": {name: version(name) for name in ("interp-kit", "openai")},
        }
        write_atomically(self.path / "run_metadata.json", dump_json(metadata))
