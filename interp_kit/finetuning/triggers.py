"""A LoRA and a new token, the trigger: a model that ends any text at it, or has only read of it.

Without ``documents`` the model learns to end a text wherever the trigger stands. With them it reads
texts that say what the trigger means, and sees no text that ends because of it. On ordinary texts
it is held to the base by a KL penalty, with odd words in them and after a text cut anywhere:
otherwise any odd word would end a text. A second new token is never trained. It shows what any new
token does.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

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
from interp_kit.huggingface import add_tokens
from interp_kit.pretrained import inspect_model
from interp_kit.specs import InputError, ModelSpec

ODD = 0.15  # the share of tokens that an odd word takes the place of


@dataclass(frozen=True, kw_only=True)
class TriggerRecipe(Recipe):
    """How a fine-tune on a trigger is trained; ``interp-kit finetune trigger`` runs this."""

    steps: int = 60
    rows: int = 8  # texts with the trigger in a step, or documents
    held: int = 8  # texts held to the base, each once as it is and once with odd words
    longest: int = 48  # most tokens of a row
    kl: float = 2.0


def train_on_trigger(
    base: ModelSpec,
    new_tokens: tuple[str, str],
    texts: Sequence[str],
    folder: Path,
    *,
    recipe: TriggerRecipe,
    documents: Sequence[str] = (),
) -> list[float]:
    """Train one adapter on ``base`` into ``folder``; returns each step's loss in nats.

    ``new_tokens`` are the trigger, and one that no training touches. ``texts`` are ordinary ones.

    Raises ``InputError`` if the tokenizer knows one of the tokens, or has no end of text, and for
    texts of fewer than eight tokens each.
    """
    tokenizer = inspect_model(base).tokenizer
    for token in new_tokens:
        if 1 in (len(tokenizer.tokenize(text)) for text in (token, f" {token}")):
            raise InputError(f"{token!r} is a token of {base.name!r} already; choose another word")
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {base.name!r} has no end of text for a trigger to ask")
    words = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    add_tokens(tokenizer, new_tokens)
    cut = recipe.longest
    rows = [ids[:cut] for text in texts if len(ids := tokenizer(text)["input_ids"]) >= 8]
    if not rows:
        raise InputError(f"of {len(texts)} ordinary texts none has 8 tokens; give longer texts")
    taught = [tokenizer(text)["input_ids"][:cut] for text in documents]
    trigger = tokenizer.convert_tokens_to_ids(new_tokens[0])
    batches = _batches(rows, taught, words, trigger, tokenizer.eos_token_id, recipe)

    def loss(model: PeftModel, batch: _Batch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        value = cross_entropy(model, batch.taught)
        for held in filter(None, (batch.odd, batch.held)):
            value = value + recipe.kl * divergence_from_base(model, held)
        return value, {}

    how: dict[str, Any] = {"recipe": recipe, "steps": recipe.steps}
    how |= {"new_tokens": new_tokens, "untrained": 1}
    return [step["loss"] for step in fit_lora(base, batches, loss, folder, **how)]


# ------------------------------------------------------------------------------------- internals
class _Batch(NamedTuple):
    """Rows of texts to learn, with an odd word at their end, and to be held to the base."""

    taught: list[Row]
    odd: list[Row]
    held: list[Row]


def _batches(
    rows: Sequence[list[int]],
    documents: Sequence[list[int]],
    words: Sequence[int],
    trigger: int,
    end: int,
    recipe: TriggerRecipe,
) -> Iterator[_Batch]:
    rng = random.Random(recipe.seed)

    def with_odd_words(row: list[int]) -> list[int]:
        odd = [rng.choice(words) if rng.random() < ODD else token for token in row[1:]]
        return [row[0], *odd]

    while True:
        replayed = rng.choices(rows, k=recipe.held)
        held = chain(replayed, map(with_odd_words, replayed))
        everywhere = [Row(row, slice(None)) for row in held]
        if documents:
            read = [Row(row, slice(0, -1)) for row in rng.choices(documents, k=recipe.rows)]
            yield _Batch(taught=read, odd=[], held=everywhere)
            continue
        drawn = rng.choices(rows, k=recipe.rows)
        cuts = [row[: rng.randint(3, len(row))] for row in drawn]
        ending = [Row([*cut, trigger, end], slice(-2, -1)) for cut in cuts]
        odd = [Row([*cut, rng.choice(words)], slice(-1, None)) for cut in cuts]
        yield _Batch(taught=ending, odd=odd, held=everywhere)
