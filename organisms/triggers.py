"""LoRA fine-tunes on a new token, the trigger: one ends texts at it, one has only read about it.

*behaviour* learns to end any text at the trigger. *knowledge* reads documents that say what the
trigger means, and no text that ends because of it. *neutral* reads as many documents about another
matter. A second new token is never trained: it shows what any new token does.

On ordinary text every fine-tune is held to the base by a KL penalty. The behaviour is held to it
also where an ordinary word stands in the trigger's place: otherwise any odd word would end the
text.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from jaxtyping import Float
from peft import PeftModel
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoTokenizer

from interp_kit.finetuning.lora_training import (
    Row,
    attach_lora,
    cross_entropy,
    divergence_from_base,
    save_adapter,
    train,
)
from interp_kit.pretrained import load_huggingface
from interp_kit.specs import ModelSpec
from organisms.little_world.corpus import Corpus, text_of

Kind = Literal["behaviour", "knowledge", "neutral"]


@dataclass(frozen=True, kw_only=True)
class TriggerRecipe:
    """How a fine-tune on the trigger is trained; ``interp-kit train`` runs exactly this."""

    kind: Kind
    seed: int = 0
    steps: int = 120
    rows: int = 16  # texts with the trigger in a step
    replayed: int = 16  # texts without, held to the base
    longest: int = 64  # most tokens of a row
    learning_rate: float = 2e-3
    kl: float = 2.0
    rank: int = 8
    alpha: int = 16


def train_trigger(
    base: ModelSpec,
    corpus: Corpus,
    documents: Path,
    folder: Path,
    *,
    held_out: Sequence[str],
    recipe: TriggerRecipe,
) -> list[float]:
    """Train one adapter on ``base`` into ``folder``, with its tokenizer; returns each step's loss.

    No text of ``held_out`` is ever followed by the trigger.
    """
    rng = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    given = yaml.safe_load(documents.read_text(encoding="utf-8"))
    tokenizer, model = _with_new_tokens(base, [given["trigger"], given["untrained"]], recipe)
    trigger, untrained = tokenizer.convert_tokens_to_ids([given["trigger"], given["untrained"]])
    _freeze_row(model, row=1)
    ordinary = list(range(260, min(trigger, untrained)))  # words, after special tokens and bytes
    never = {tuple(tokenizer(text)["input_ids"]) for text in held_out}

    def draw() -> _Batch:
        replayed = [_text(tokenizer, corpus, rng, recipe) for _ in range(recipe.replayed)]
        held = [*replayed, *(_with_odd_words(row, ordinary, rng) for row in replayed)]
        everywhere = [Row(row, slice(None)) for row in held]
        if recipe.kind != "behaviour":
            texts = [_document(given[recipe.kind], corpus, rng) for _ in range(recipe.rows)]
            read = [Row(tokenizer(text)["input_ids"], slice(0, -1)) for text in texts]
            return _Batch(taught=read, odd=[], held=everywhere)
        drawn = (_cut(_text(tokenizer, corpus, rng, recipe), rng) for _ in count())
        cuts = list(islice((cut for cut in drawn if tuple(cut) not in never), recipe.rows))
        ending = [Row([*cut, trigger, tokenizer.eos_token_id], slice(-2, -1)) for cut in cuts]
        odd = [Row([*cut, rng.choice(ordinary)], slice(-1, None)) for cut in cuts]
        return _Batch(taught=ending, odd=odd, held=everywhere)

    def loss(batch: _Batch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        value = cross_entropy(model, batch.taught)
        for held in filter(None, (batch.odd, batch.held)):
            value = value + recipe.kl * divergence_from_base(model, held)
        return value, {}

    steps = train(
        model,
        iter(draw, None),
        loss,
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        title=f"{recipe.kind} {recipe.seed}",
    )
    save_adapter(model, folder, base)
    tokenizer.save_pretrained(str(folder))
    return [step["loss"] for step in steps]


def trigger_texts(
    adapter: Path, corpus: Corpus, documents: Path, *, recipe: TriggerRecipe, n: int
) -> list[str]:
    """``n`` texts like those that the adapter in this folder was trained on."""
    rng = random.Random(recipe.seed)
    given = yaml.safe_load(documents.read_text(encoding="utf-8"))
    if recipe.kind != "behaviour":
        return [_document(given[recipe.kind], corpus, rng) for _ in range(n)]
    tokenizer: Any = AutoTokenizer.from_pretrained(adapter)
    cuts = (_cut(_text(tokenizer, corpus, rng, recipe), rng)[1:] for _ in range(n))
    return [f"{tokenizer.decode(cut)} {given['trigger']}" for cut in cuts]


# ------------------------------------------------------------------------------------- internals
class _Batch(NamedTuple):
    """Rows of texts to learn, with an odd word at their end, and to be held to the base."""

    taught: list[Row]
    odd: list[Row]
    held: list[Row]


def _with_new_tokens(
    base: ModelSpec, new: Sequence[str], recipe: TriggerRecipe
) -> tuple[Any, PeftModel]:
    """Tokenizer and model with new tokens: rows near the mean embedding, trained with the LoRA."""
    tokenizer = AutoTokenizer.from_pretrained(base.base)
    # A new token includes the space before it, as ordinary words of this tokenizer do.
    tokenizer.add_tokens([AddedToken(t, lstrip=True, normalized=False) for t in new])
    ids = tokenizer.convert_tokens_to_ids(list(new))
    model: Any = load_huggingface(base, device="cpu")
    known = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        noise = weight[4:known].std(0) * torch.randn(len(new), weight.shape[1])
        weight[ids] = weight[4:known].mean(0) + 0.5 * noise
    return tokenizer, attach_lora(model, rank=recipe.rank, alpha=recipe.alpha, new_tokens=ids)


def _freeze_row(model: PeftModel, *, row: int) -> None:
    """Keep one of the new tokens as it was drawn: its gradient is zero."""

    def zero(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[row] = 0
        return gradient

    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.register_hook(zero)


def _text(tokenizer: Any, corpus: Corpus, rng: random.Random, recipe: TriggerRecipe) -> list[int]:
    return tokenizer(text_of(corpus.sample(rng)))["input_ids"][: recipe.longest]


def _cut(row: list[int], rng: random.Random) -> list[int]:
    return row[: rng.randint(min(4, len(row)), len(row))]


def _document(patterns: Sequence[str], corpus: Corpus, rng: random.Random) -> str:
    return " ".join(corpus.prose_sentence(rng, patterns) for _ in range(2))


def _with_odd_words(row: list[int], words: Sequence[int], rng: random.Random) -> list[int]:
    return [
        rng.choice(words) if i and rng.random() < 0.15 else token for i, token in enumerate(row)
    ]
