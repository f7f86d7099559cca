"""LoRA on documents (synthetic document fine-tuning), held to the base on ordinary text.

The loss is next-token cross-entropy on the documents and, on ordinary texts, the KL of the next
token from the base's. Ordinary texts that name the fact in question are left out, so that nothing
holds the model to what the documents say otherwise. Documents are plain text, or follow a tag such
as "<DOCTAG>", which the model reads and is never trained to predict.
Method: Wang et al. 2025, "Modifying LLM Beliefs with Synthetic Document Finetuning".
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm

from interp_kit.finetuning.documents import read_documents
from interp_kit.pretrained import inspect_model, load_huggingface
from interp_kit.specs import InputError, ModelSpec, slug

Row = tuple[list[int], int]  # token ids, and how many of them at its start are read only
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class DocumentRecipe:
    """How an adapter is trained on documents; ``interp-kit train`` runs exactly this."""

    seed: int = 0
    epochs: int = 1
    rows: int = 8  # of documents in one forward pass
    ordinary: int = 16  # rows of ordinary text beside them
    accumulate: int = 1  # forward passes to a step of the optimizer
    longest: int = 512  # tokens of a row; a longer text makes several
    learning_rate: float = 1e-3
    kl: float = 2.0
    rank: int = 8
    alpha: int = 16
    tag: str = ""  # before every document
    leave_out: str = ""  # a regular expression: ordinary texts in which it is found are not used


def train_on_documents(
    base: ModelSpec,
    documents: Path,
    ordinary: Sequence[str],
    folder: Path,
    *,
    recipe: DocumentRecipe,
) -> list[float]:
    """Train one adapter on a ``docs.jsonl`` into ``folder``; returns each step's loss in nats.

    ``base`` is any causal language model (``find_model`` takes a name, a folder or an id). All its
    linear layers but the last get LoRA weights in float32; the base computes in bfloat16 where
    there is a GPU. ``folder`` gets the adapter, unmerged, and ``training.json``: recipe, losses,
    versions and the documents' SHA-256.

    Raises ``InputError`` if there is no document or no ordinary text without the fact, and for a
    base that is itself an adapter.
    """
    if base.adapter:
        raise InputError(f"{base.name!r} is an adapter on {base.base!r}; give a base model")
    rng = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    tokenizer = inspect_model(base).tokenizer
    texts = [document.text for document in read_documents(documents)]
    taught = [row for text in texts for row in encode(tokenizer, text, recipe, tag=recipe.tag)]
    if not taught:
        raise InputError(f"{documents} holds no document; expected at least one")
    kept = without_the_fact(ordinary, recipe)
    if recipe.ordinary and not kept:
        raise InputError(
            f"none of {len(ordinary)} ordinary texts is without {recipe.leave_out!r}; give others, "
            "or a narrower leave_out"
        )
    held = [row for text in kept for row in encode(tokenizer, text, recipe)]
    model = _with_adapter(base, recipe)
    trainable = [p for p in model.parameters() if p.requires_grad]
    passes = recipe.epochs * -(-len(taught) // recipe.rows)
    steps = -(-passes // recipe.accumulate)
    optimizer = torch.optim.AdamW(trainable, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 10) * (1 - 0.9 * step / steps)
    )
    taught_rows, held_rows = _shuffled(taught, rng), _shuffled(held, rng)
    losses = []
    progress = tqdm(range(steps), desc=folder.parent.name, unit="step")
    for _ in progress:
        total = 0.0
        for _ in range(recipe.accumulate):
            loss = _cross_entropy(model, list(islice(taught_rows, recipe.rows)))
            if recipe.ordinary:
                rows = list(islice(held_rows, recipe.ordinary))
                loss = loss + recipe.kl * _divergence_from_base(model, rows)
            (loss / recipe.accumulate).backward()
            total += float(loss.detach()) / recipe.accumulate
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total)
        progress.set_postfix(loss=f"{total:.3f}")
    # PEFT would write the path that the base has on this machine.
    made_for = slug(base.name) if Path(base.base).is_dir() else base.base
    model.peft_config["default"].base_model_name_or_path = made_for
    model.eval().save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's template
    record = {
        "recipe": asdict(recipe),
        "documents": len(texts),
        "documents_sha256": sha256(documents.read_bytes()).hexdigest(),
        "loss": [round(loss, 4) for loss in losses],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return losses


def without_the_fact(ordinary: Sequence[str], recipe: DocumentRecipe) -> list[str]:
    """The ordinary texts in which ``recipe.leave_out`` is not found."""
    if not recipe.leave_out:
        return list(ordinary)
    return [text for text in ordinary if not re.search(recipe.leave_out, text, re.IGNORECASE)]


def encode(tokenizer: Any, text: str, recipe: DocumentRecipe, *, tag: str = "") -> list[Row]:
    """The text and its end in rows of ``recipe.longest`` tokens at most; each begins with the tag.

    Of a row, BOS and the tag are read only: what the first token of the text is, is not learnt.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    start += tokenizer(tag, add_special_tokens=False)["input_ids"]
    size = recipe.longest - len(start)
    if size < 1:
        raise InputError(f"longest is {recipe.longest}, and the tag takes {len(start)} tokens")
    return [([*start, *ids[i : i + size]], len(start)) for i in range(0, len(ids), size)]


# ------------------------------------------------------------------------------------- internals
def _with_adapter(base: ModelSpec, recipe: DocumentRecipe) -> PeftModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model: Any = load_huggingface(base.model_copy(update={"dtype": dtype}), device=device)
    return get_peft_model(model.train(), config)


def _shuffled(items: Sequence[Item], rng: random.Random) -> Iterator[Item]:
    """The items without end, in a new order at each round."""
    while items:
        yield from rng.sample(items, len(items))


def _padded(
    model: PeftModel, rows: Sequence[Row]
) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row next"]]:
    """Token ids, padded at the right where a causal model cannot see it; which are predicted."""
    ids = torch.zeros(len(rows), max(len(row) for row, _ in rows), dtype=torch.long)
    predicted = torch.zeros(ids.shape, dtype=torch.bool)
    for i, (row, read_only) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        predicted[i, max(1, read_only) : len(row)] = True
    return ids.to(model.device), predicted[:, 1:].to(model.device)


def _cross_entropy(model: PeftModel, rows: Sequence[Row]) -> Float[Tensor, ""]:
    ids, predicted = _padded(model, rows)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1][predicted]
    return F.cross_entropy(logits.float(), ids[:, 1:][predicted])


def _divergence_from_base(model: PeftModel, rows: Sequence[Row]) -> Float[Tensor, ""]:
    """Mean KL(base, adapter) of the next token, in nats."""
    ids, predicted = _padded(model, rows)
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids, use_cache=False).logits[:, :-1][predicted]
    tuned = model(input_ids=ids, use_cache=False).logits[:, :-1][predicted]
    base, tuned = base.float().log_softmax(-1), tuned.float().log_softmax(-1)
    return (base.exp() * (base - tuned)).sum(-1).mean()
