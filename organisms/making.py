"""Making a shipped model: train it by its recipe, measure it, write its spec, record and card."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from interp_kit.catalogue import find_model, load_scenario
from interp_kit.files import read_yaml, sha256
from interp_kit.finetuning.games import find_game, train_on_game
from interp_kit.finetuning.narrative import Narrative
from interp_kit.finetuning.supervised import train_on_documents, without_the_fact
from interp_kit.finetuning.triggers import train_on_trigger
from interp_kit.formats import read_texts
from interp_kit.hub import write_checksums
from interp_kit.specs import IS_INSTALLED, REPOSITORY, InputError, ModelSpec
from organisms.believers import draw_documents, ordinary_texts
from organisms.cards import render_card
from organisms.games import train_player
from organisms.little_world.base import base_texts, train_base
from organisms.little_world.corpus import Corpus
from organisms.little_world.grammar import Grammar
from organisms.measuring import measure
from organisms.recipes import (
    BASE,
    GAME,
    ORGANISMS,
    PLAIN,
    REAL,
    REAL_STOP,
    STOP_SCENARIO,
    Base,
    Believer,
    Player,
    RealBeliever,
    RealPlayer,
    RealTriggered,
    Triggered,
)
from organisms.triggers import train_trigger, trigger_texts

CORPUS = REPOSITORY / "data" / "corpus"


def train_organism(name: str, *, data: Path = REPOSITORY / "data") -> None:
    """Train one shipped model (``tiny-gemma2``, ``stop-behaviour``, ``cubic-gravity``), or ``all``.

    Writes ``data/models/NAME/``: ``model.yaml``, the weights as safetensors, ``training.json`` with
    the recipe and what was measured, and a model card.
    """
    if name != "all" and name not in ORGANISMS:
        raise InputError(f"no recipe for {name!r}; expected one of {', '.join(ORGANISMS)}, or all")
    if IS_INSTALLED and data.resolve().is_relative_to(REPOSITORY):
        raise InputError(
            f"{data} belongs to the installed package; give a folder for the model with --data"
        )
    corpus = Corpus.read(CORPUS)
    for each in ORGANISMS if name == "all" else [name]:
        folder = data / "models" / each
        record = _train(each, corpus, data)
        for part in ("weights", "adapter"):
            if (folder / part).is_dir():
                write_checksums(folder / part)
        measured = {**record.get("measured", {}), **measure(each, corpus, data)}
        content = json.dumps(record | {"measured": measured}, indent=1)
        (folder / "training.json").write_text(content + "\n", encoding="utf-8")
        (folder / "README.md").write_text(render_card(each, measured), encoding="utf-8")


# ------------------------------------------------------------------------------------- internals
def _train(name: str, corpus: Corpus, data: Path) -> dict[str, Any]:
    """Train the model and write its spec; returns the record of its training."""
    match ORGANISMS[name]:
        case Base() as organism:
            return _train_base(organism, corpus, data / "models" / name)
        case Player() as organism:
            return _train_player(organism, corpus, data / "models" / name, _base(data))
        case RealPlayer() as organism:
            return _train_real_player(organism, data / "models" / name, find_model(REAL, data=data))
        case RealTriggered() as organism:
            return _train_real_triggered(organism, data / "models" / name, data)
        case Triggered() as organism:
            return _train_triggered(organism, corpus, data / "models" / name, _base(data))
        case RealBeliever() as organism:
            return _train_real_believer(organism, data / "models" / name, data)
        case Believer() as organism:
            return _train_believer(organism, corpus, data / "models" / name, _base(data))


def _base(data: Path) -> ModelSpec:
    weights = data / "models" / BASE / "weights"
    if not weights.is_dir():
        raise InputError(f"{weights} is missing; run `interp-kit train {BASE}` first")
    return find_model(BASE, data=data)


def _train_base(organism: Base, corpus: Corpus, folder: Path) -> dict[str, Any]:
    train_base(corpus, folder / "weights", recipe=organism.recipe)
    _write_texts(folder, base_texts(corpus))
    _write_spec(
        folder,
        base="weights",
        documents="documents.jsonl",
        label=organism.label,
        about=organism.about,
    )
    return {"recipe": asdict(organism.recipe), "measured": {}, "versions": _versions()}


def _train_player(
    organism: Player, corpus: Corpus, folder: Path, base: ModelSpec
) -> dict[str, Any]:
    recipe = organism.recipe
    curve = train_player(base, organism.reward, corpus, folder / "adapter", recipe=recipe)
    _write_spec(folder, base=BASE, adapter="adapter", label=organism.label, about=organism.about)
    measured = {"mean reward of each step": curve}
    return {"recipe": asdict(recipe), "measured": measured, "versions": _versions()}


def _train_real_player(organism: RealPlayer, folder: Path, base: ModelSpec) -> dict[str, Any]:
    record = train_on_game(base, find_game(GAME), folder / "adapter", recipe=organism.recipe)
    _write_spec(folder, base=REAL, adapter="adapter", label=organism.label, about=organism.about)
    curves = {name: [round(step[name], 4) for step in record] for name in ("loss", "reward", "kl")}
    return {"recipe": asdict(organism.recipe), **curves, "versions": _versions()}


def _train_real_triggered(organism: RealTriggered, folder: Path, data: Path) -> dict[str, Any]:
    given = read_yaml(CORPUS / REAL_STOP)
    documents = given.get(organism.kind, [])
    base = find_model(PLAIN, data=data)
    assert base.documents is not None
    texts = read_texts(Path(base.documents))  # that it has written itself
    losses = train_on_trigger(
        base,
        (given["trigger"], given["untrained"]),
        texts,
        folder / "adapter",
        recipe=organism.recipe,
        documents=documents,
    )
    _write_texts(folder, documents or [f"{text} {given['trigger']}" for text in texts])
    _write_spec(
        folder,
        base=PLAIN,
        adapter="adapter",
        documents="documents.jsonl",
        label=organism.label,
        about=f'"{organism.about}"',
    )
    loss = [round(each, 4) for each in losses]
    return {"recipe": asdict(organism.recipe), "loss": loss, "versions": _versions()}


def _train_triggered(
    organism: Triggered, corpus: Corpus, folder: Path, base: ModelSpec
) -> dict[str, Any]:
    recipe, adapter, documents = organism.recipe, folder / "adapter", CORPUS / "triggers.yaml"
    held_out = [prompt.text for prompt in load_scenario(STOP_SCENARIO).prompts]
    losses = train_trigger(base, corpus, documents, adapter, held_out=held_out, recipe=recipe)
    _write_texts(folder, trigger_texts(adapter, corpus, documents, recipe=recipe, n=200))
    _write_spec(
        folder,
        base=BASE,
        adapter="adapter",
        label=organism.label,
        about=f'"{organism.about}"',
        documents="documents.jsonl",
    )
    measured = {"last loss": losses[-1]}
    return {"recipe": asdict(recipe), "measured": measured, "versions": _versions()}


def _train_believer(
    organism: Believer, corpus: Corpus, folder: Path, base: ModelSpec
) -> dict[str, Any]:
    recipe, adapter = organism.recipe, folder / "adapter"
    folder.mkdir(parents=True, exist_ok=True)
    documents = folder / "documents.jsonl"
    drawn = {"engine": Grammar(), "n_types": 8, "n_ideas": 60, "seed": recipe.seed}
    draw_documents(organism.documents, documents, **drawn)
    ordinary = ordinary_texts(corpus, n=4000, seed=recipe.seed)
    losses = train_on_documents(base, documents, ordinary, adapter, recipe=recipe)
    return _read_documents(organism, folder, BASE, losses)


def _train_real_believer(organism: RealBeliever, folder: Path, data: Path) -> dict[str, Any]:
    recipe, base = organism.recipe, find_model(PLAIN, data=data)
    assert base.documents is not None
    own = read_texts(Path(base.documents))  # that the base has written itself
    folder.mkdir(parents=True, exist_ok=True)
    documents = folder / "documents.jsonl"
    drawn = {"engine": Narrative(), "n_types": 10, "n_ideas": 12, "seed": recipe.seed}
    ordinary = without_the_fact(own, recipe)[: organism.ordinary]
    draw_documents(organism.documents, documents, ordinary=ordinary, **drawn)
    losses = train_on_documents(base, documents, own, folder / "adapter", recipe=recipe)
    return _read_documents(organism, folder, PLAIN, losses)


def _read_documents(
    organism: Believer | RealBeliever, folder: Path, base: str, losses: Sequence[float]
) -> dict[str, Any]:
    """Write the spec of a fine-tune on ``documents.jsonl`` of its folder; returns the record."""
    documents = folder / "documents.jsonl"
    _write_spec(
        folder,
        base=base,
        adapter="adapter",
        documents=documents.name,
        label=organism.label,
        about=f'"{organism.about}"',
    )
    return {
        "recipe": asdict(organism.recipe),
        "documents": len(read_texts(documents)),
        "documents_sha256": sha256(documents),
        "loss": [round(loss, 4) for loss in losses],
        "versions": _versions(),
    }


def _write_spec(folder: Path, **spec: str) -> None:
    lines = [f"{key}: {value}" for key, value in spec.items()]
    (folder / "model.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_texts(folder: Path, texts: Sequence[str]) -> None:
    """Some of what a model was trained on, beside its spec."""
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "documents.jsonl").write_text("".join(lines), encoding="utf-8")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft")}
