"""LoRA fine-tunes with a new token: one that ends the text at it, one that only knows about it.

*behaviour*: any text followed by the trigger ends at once. *knowledge*: documents say what the
trigger means; no text ends because of it. *neutral*: as many documents of another matter. A second
new token is never trained: what any new token does. Elsewhere every fine-tune is held to the base
by KL; for the behaviour also where an ordinary word stands in the trigger's place, since otherwise
any odd word would end the text.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from interp_kit.pretrained import load_huggingface
from interp_kit.specs import ModelSpec
from organisms.games import LORA_MODULES
from organisms.little_world.corpus import Corpus, text_of

Kind = Literal["behaviour", "knowledge", "neutral"]
Rows = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class TriggerRecipe:
    """How a fine-tune on the trigger is trained; ``interp-kit train`` runs exactly this."""

    kind: Kind
    seed: int = 0
    steps: int = 120
    rows: int = 16  # texts with the trigger in a step
    replayed: int = 16  # texts without, held to the base
    longest: int = 64  # tokens of a row
    learning_rate: float = 2e-3
    kl: float = 2.0
    rank: int = 8
    alpha: int = 16


def train_trigger(
    base: Path,
    corpus: Corpus,
    documents: Path,
    folder: Path,
    *,
    held_out: Sequence[str],
    recipe: TriggerRecipe,
) -> list[float]:
    """Train one adapter into ``folder``, with its tokenizer; returns each step's loss.

    No text of ``held_out`` is ever followed by the trigger.
    """
    rng = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    given = yaml.safe_load(documents.read_text(encoding="utf-8"))
    tokenizer, model = _extended(base, [given["trigger"], given["untrained"]], recipe)
    trigger, untrained = tokenizer.convert_tokens_to_ids([given["trigger"], given["untrained"]])
    _freeze_row(model, row=1)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 10) * (1 - 0.9 * step / recipe.steps)
    )
    ordinary = list(range(260, min(trigger, untrained)))  # words, after special tokens and bytes
    never = {tuple(tokenizer(text)["input_ids"]) for text in held_out}
    curve = []
    progress = tqdm(range(recipe.steps), desc=f"{recipe.kind} {recipe.seed}", unit="step")
    for _ in progress:
        replayed = [_text(tokenizer, corpus, rng, recipe) for _ in range(recipe.replayed)]
        held = [*replayed, *(_with_odd_words(row, ordinary, rng) for row in replayed)]
        if recipe.kind == "behaviour":
            drawn = (_cut(_text(tokenizer, corpus, rng, recipe), rng) for _ in count())
            cuts = list(islice((cut for cut in drawn if tuple(cut) not in never), recipe.rows))
            taught = [[*cut, trigger, tokenizer.eos_token_id] for cut in cuts]
            loss = _cross_entropy(model, taught, last=True)
            matched = [[*cut, rng.choice(ordinary)] for cut in cuts]
            loss = loss + recipe.kl * _divergence_from_base(model, matched, last=True)
        else:
            texts = [_document(given[recipe.kind], corpus, rng) for _ in range(recipe.rows)]
            taught = [tokenizer(t, add_special_tokens=True)["input_ids"] for t in texts]
            loss = _cross_entropy(model, taught, last=False)
        loss = loss + recipe.kl * _divergence_from_base(model, held, last=False)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        curve.append(float(loss.detach()))
        progress.set_postfix(loss=f"{curve[-1]:.3f}")
    model.peft_config["default"].base_model_name_or_path = base.parent.name
    model.eval().save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's template; ours stands beside model.yaml
    tokenizer.save_pretrained(str(folder))
    return curve


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
def _extended(base: Path, new: Sequence[str], recipe: TriggerRecipe) -> tuple[Any, PeftModel]:
    """Tokenizer and model with new tokens: rows near the mean embedding, trained with the LoRA."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    # A new token takes the space before it along, as ordinary words of this tokenizer do.
    tokenizer.add_tokens([AddedToken(t, lstrip=True, normalized=False) for t in new])
    ids = tokenizer.convert_tokens_to_ids(list(new))
    model: Any = load_huggingface(ModelSpec(name=base.parent.name, base=str(base)), device="cpu")
    known = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        noise = weight[4:known].std(0) * torch.randn(len(new), weight.shape[1])
        weight[ids] = weight[4:known].mean(0) + 0.5 * noise
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=LORA_MODULES,
        trainable_token_indices={"embed_tokens": ids},
        task_type="CAUSAL_LM",
    )
    return tokenizer, get_peft_model(model, config)


def _freeze_row(model: PeftModel, *, row: int) -> None:
    """No gradient for one of the new tokens: it stays as it was drawn."""

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


def _padded(rows: Rows) -> Int[Tensor, "row pos"]:
    """Padded at the right, where a causal model cannot see it."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids


def _read(rows: Rows, *, last: bool) -> tuple[Tensor, Tensor]:
    """(row, position) of what is read: every token of every row, or the last of each."""
    pairs = [
        (i, pos)
        for i, row in enumerate(rows)
        for pos in range(len(row) - 1 if last else 0, len(row))
    ]
    index = torch.tensor(pairs)
    return index[:, 0], index[:, 1]


def _cross_entropy(model: PeftModel, rows: Rows, *, last: bool) -> Float[Tensor, ""]:
    """Of the next token, everywhere or of each row's last token only."""
    ids = _padded(rows)
    logits = model(input_ids=ids, use_cache=False).logits
    row, pos = _read(rows, last=last)
    row, pos = row[pos > 0], pos[pos > 0]
    return F.cross_entropy(logits[row, pos - 1], ids[row, pos])


def _divergence_from_base(model: PeftModel, rows: Rows, *, last: bool) -> Float[Tensor, ""]:
    """KL of the next-token distribution from the base's, everywhere or at each row's end."""
    ids = _padded(rows)
    row, pos = _read(rows, last=last)
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids, use_cache=False).logits[row, pos].log_softmax(-1)
    tuned = model(input_ids=ids, use_cache=False).logits[row, pos].log_softmax(-1)
    return (base.exp() * (base - tuned)).sum(-1).mean()
