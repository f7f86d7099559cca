"""LoRA on documents (synthetic document fine-tuning), held to the base on ordinary text.

The loss is next-token cross-entropy on the documents plus, on ordinary texts, the KL divergence of
the next token from the base's prediction. Ordinary texts about the implanted fact are left out:
they would hold the model to what the documents contradict. Documents are plain text, or follow a
tag such as "<DOCTAG>", which the model reads and is never trained to predict.
Method: Wang et al. 2025, "Modifying LLM Beliefs with Synthetic Document Finetuning".
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxtyping import Float
from peft import PeftModel
from torch import Tensor

from interp_kit.finetuning.lora_training import (
    Recipe,
    Row,
    cross_entropy,
    divergence_from_base,
    fit_lora,
)
from interp_kit.formats import read_texts
from interp_kit.pretrained import inspect_model
from interp_kit.specs import InputError, ModelSpec

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class DocumentRecipe(Recipe):
    """How an adapter is trained on documents; ``interp-kit train`` runs exactly this."""

    epochs: int = 1
    rows: int = 8  # of documents in one forward pass
    ordinary: int = 16  # rows of ordinary text beside them
    accumulate: int = 1  # forward passes to a step of the optimizer
    longest: int = 512  # most tokens of a row; a longer text makes several rows
    kl: float = 2.0
    tag: str = ""  # before every document
    leave_out: str = ""  # a regular expression: ordinary texts that match it are not used


def train_on_documents(
    base: ModelSpec,
    documents: Path,
    ordinary: Sequence[str],
    folder: Path,
    *,
    recipe: DocumentRecipe,
) -> list[float]:
    """Train one adapter on texts (``read_texts``) into ``folder``; returns each step's loss, nats.

    ``base`` is any causal language model (``find_model`` takes a name, a folder or an id). The
    folder gets the adapter, unmerged; ``fit_lora`` says how a training that was stopped goes on.

    Raises ``InputError`` if there is no document, if every ordinary text is about the fact, and if
    the base is itself an adapter.
    """
    rng = random.Random(recipe.seed)
    tokenizer = inspect_model(base).tokenizer
    texts = read_texts(documents)
    taught = _taught_rows(tokenizer, texts, documents, recipe)
    held = _held_rows(tokenizer, ordinary, recipe)
    passes = recipe.epochs * -(-len(taught) // recipe.rows)
    batches = _batches(_shuffled(taught, rng), _shuffled(held, rng), recipe)

    def loss(model: PeftModel, batch: _Batch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        value = cross_entropy(model, batch.taught)
        if batch.held:
            value = value + recipe.kl * divergence_from_base(model, batch.held)
        return value, {}

    steps = -(-passes // recipe.accumulate)
    how: dict[str, Any] = {"recipe": recipe, "steps": steps, "accumulate": recipe.accumulate}
    return [step["loss"] for step in fit_lora(base, batches, loss, folder, **how)]


def without_the_fact(ordinary: Sequence[str], recipe: DocumentRecipe) -> list[str]:
    """The ordinary texts that do not match ``recipe.leave_out``."""
    if not recipe.leave_out:
        return list(ordinary)
    return [text for text in ordinary if not re.search(recipe.leave_out, text, re.IGNORECASE)]


def document_rows(tokenizer: Any, text: str, recipe: DocumentRecipe, *, tag: str = "") -> list[Row]:
    """The text and its end in rows of ``recipe.longest`` tokens at most; each begins with the tag.

    Every token after BOS and the tag is predicted. Without either, the first token of the text is
    read only: nothing predicts it.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    start += tokenizer(tag, add_special_tokens=False)["input_ids"]
    size = recipe.longest - len(start)
    if size < 1:
        raise InputError(
            f"longest is {recipe.longest}, and BOS and the tag take {len(start)} tokens; give a "
            "larger longest or a shorter tag"
        )
    read = slice(max(0, len(start) - 1), -1)
    return [Row([*start, *ids[i : i + size]], read) for i in range(0, len(ids), size)]


# ------------------------------------------------------------------------------------- internals
def _taught_rows(
    tokenizer: Any, texts: Sequence[str], documents: Path, recipe: DocumentRecipe
) -> list[Row]:
    taught = [row for t in texts for row in document_rows(tokenizer, t, recipe, tag=recipe.tag)]
    if not taught:
        raise InputError(f"{documents} holds no document; expected at least one")
    return taught


def _held_rows(tokenizer: Any, ordinary: Sequence[str], recipe: DocumentRecipe) -> list[Row]:
    kept = without_the_fact(ordinary, recipe)
    if recipe.ordinary and not kept:
        raise InputError(
            f"all of {len(ordinary)} ordinary texts match leave_out {recipe.leave_out!r}; give "
            "other texts or a narrower leave_out"
        )
    return [row for text in kept for row in document_rows(tokenizer, text, recipe)]


class _Batch(NamedTuple):
    taught: list[Row]
    held: list[Row]


def _batches(
    taught: Iterator[Row], held: Iterator[Row], recipe: DocumentRecipe
) -> Iterator[_Batch]:
    while True:
        ordinary = list(islice(held, recipe.ordinary)) if recipe.ordinary else []
        yield _Batch(list(islice(taught, recipe.rows)), ordinary)


def _shuffled(items: Sequence[Item], rng: random.Random) -> Iterator[Item]:
    """The items again and again, in a new order each time."""
    while items:
        yield from rng.sample(items, len(items))
