"""Training a LoRA adapter: attach it, run the one training loop, save it unmerged.

A recipe says what its loss is; ``train`` does the rest. The parts of a loss are here, too:
``cross_entropy`` and ``divergence_from_base`` of the next token, at chosen positions of ``Row``s.
Method: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm

from interp_kit.finetuning.checkpoints import Steps, read_checkpoint, write_checkpoint
from interp_kit.huggingface import ADDED_TOKENS
from interp_kit.pretrained import inspect_model, load_huggingface
from interp_kit.specs import InputError, ModelSpec, slug

WARMUP = 10  # steps in which the learning rate rises to its height
SAVE_EVERY = 20.0  # seconds between two checkpoints
Batch = TypeVar("Batch")
Dtype = Literal["float32", "bfloat16"]


class Row(NamedTuple):
    """Token ids, and the positions at which the prediction of the next token is read."""

    tokens: list[int]
    read: slice


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every way of training a LoRA has in common. ``dtype`` is what the base computes in."""

    seed: int = 0
    learning_rate: float = 1e-3
    rank: int = 8
    alpha: int = 16
    modules: tuple[str, ...] = ()  # names of the layers that get a LoRA; none: all but the last
    dtype: Dtype = "float32"


def attach_lora(
    model: Any,
    *,
    rank: int,
    alpha: int,
    modules: Sequence[str] = (),
    new_tokens: Sequence[int] = (),
) -> PeftModel:
    """``model`` with an untrained LoRA on ``modules``, or on every linear layer but the last.

    A layer with weight W computes with W + (alpha / rank) B A; B is zero at first. The embedding
    rows of ``new_tokens`` are trained with it.
    """
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    rows = {name.rpartition(".")[2]: list(new_tokens)}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(modules) or "all-linear",
        trainable_token_indices=rows if new_tokens else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model.train(), config)


def fit_lora(
    base: ModelSpec,
    batches: Iterator[Batch],
    loss: Callable[[PeftModel, Batch], tuple[Float[Tensor, ""], Mapping[str, float]]],
    folder: Path,
    *,
    recipe: Recipe,
    steps: int,
    accumulate: int = 1,
    new_tokens: Sequence[str] = (),
    untrained: int = 0,
) -> Steps:
    """Train one adapter on ``base`` and save it in ``folder``; ``train`` says how.

    ``new_tokens`` get rows of the embedding, drawn near the mean of all; the last ``untrained`` of
    them stay as they were drawn.

    The adapter trains in float32, and is stored in ``recipe.dtype``, as the base computes. While it
    trains its state is kept beside the folder, in ``checkpoint.safetensors``: the same call goes on
    from there, and ends with the same adapter.
    """
    if base.adapter:
        raise InputError(f"{base.name!r} is an adapter on {base.base!r}; give a base model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = base.model_copy(update={"dtype": recipe.dtype})
    torch.manual_seed(recipe.seed)
    plain: Any = load_huggingface(spec, device=device)
    ids = add_rows(plain, len(inspect_model(base).tokenizer), len(new_tokens))
    how: dict[str, Any] = {"rank": recipe.rank, "alpha": recipe.alpha, "modules": recipe.modules}
    model = attach_lora(plain, new_tokens=ids, **how)
    _keep_rows(model, untrained)
    how = {"learning_rate": recipe.learning_rate, "title": folder.parent.name}
    checkpoint = folder.parent / "checkpoint.safetensors"
    own = partial(loss, model)
    record = train(
        model, batches, own, steps=steps, accumulate=accumulate, checkpoint=checkpoint, **how
    )
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        p.data = p.data.to(getattr(torch, recipe.dtype))
    save_adapter(model, folder, base)
    if new_tokens:
        content = json.dumps(dict(zip(new_tokens, ids)))
        (folder / ADDED_TOKENS).write_text(content + "\n", encoding="utf-8")
    checkpoint.unlink(missing_ok=True)
    return record


def add_rows(model: Any, known: int, n: int) -> list[int]:
    """``n`` rows of the embedding after the ``known`` ones, near their mean; returns their ids."""
    if n == 0:
        return []
    ids = list(range(known, known + n))
    if known + n > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(known + n, mean_resizing=False)
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            rows = weight[:known].float()
            noise = rows.std(0) * torch.randn(n, weight.shape[1]).to(rows)
            weight[ids] = (rows.mean(0) + 0.5 * noise).to(weight)
    return ids


def _keep_rows(model: PeftModel, untrained: int) -> None:
    """Keep the last of the new tokens' rows: their gradient is zero."""

    def zero(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[len(gradient) - untrained :] = 0
        return gradient

    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name and untrained:
            parameter.register_hook(zero)


def train(
    model: PeftModel,
    batches: Iterator[Batch],
    loss: Callable[[Batch], tuple[Float[Tensor, ""], Mapping[str, float]]],
    *,
    steps: int,
    learning_rate: float,
    title: str,
    accumulate: int = 1,
    checkpoint: Path | None = None,
) -> Steps:
    """Take ``steps`` optimizer steps on the trainable parameters of ``model``, in place.

    AdamW without weight decay; the gradient's norm is clipped at 1. The learning rate of step t of
    T is ``learning_rate * min(1, (t + 1) / 10) * (1 - 0.9 t / T)``.

    ``loss`` makes the forward pass of the next batch: it returns the loss and other numbers to be
    shown and recorded. A step takes ``accumulate`` passes and follows their mean gradient. Returns,
    for each step, the mean over its passes of "loss" and of those numbers.

    With a ``checkpoint`` the state is written there now and then, and read from there at the start:
    then the batches that it has seen are left out. What ``loss`` does may depend on the batch
    alone, and what batches hold on nothing but their number.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    record = read_checkpoint(checkpoint, model, optimizer) if checkpoint else []
    batches = islice(batches, len(record) * accumulate, None)
    progress = tqdm(range(steps), desc=title, unit="step", initial=len(record))
    saved = time.monotonic()
    for step in range(len(record), steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / WARMUP) * (1 - 0.9 * step / steps)
        means: dict[str, float] = {}
        for batch in islice(batches, accumulate):
            value, others = loss(batch)
            (value / accumulate).backward()
            for name, number in {"loss": float(value.detach()), **others}.items():
                means[name] = means.get(name, 0.0) + number / accumulate
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        record.append(means)
        progress.update()
        progress.set_postfix({name: f"{number:.3f}" for name, number in means.items()})
        if checkpoint and time.monotonic() - saved > SAVE_EVERY:
            write_checkpoint(checkpoint, model, optimizer, record)
            saved = time.monotonic()
    return record


def save_adapter(model: PeftModel, folder: Path, base: ModelSpec) -> None:
    """Save the adapter alone, unmerged, as safetensors and its configuration.

    The configuration names the base by its name, or by its id on the hub: PEFT would write the path
    that the base has on this machine.
    """
    made_for = slug(base.name) if Path(base.base).is_dir() else base.base
    model.peft_config["default"].base_model_name_or_path = made_for
    model.eval().save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's template


# ---------------------------------------------------------------------------- parts of a loss
def log_probs(model: PeftModel, rows: Sequence[Row]) -> Float[Tensor, "read vocab"]:
    """log p (nats) of the next token at every position that is read, row after row."""
    return _logits(model, *_padded(model, rows)).log_softmax(-1)


def base_log_probs(model: PeftModel, rows: Sequence[Row]) -> Float[Tensor, "read vocab"]:
    """``log_probs`` of the base, without the adapter and without a gradient."""
    with torch.no_grad(), model.disable_adapter():
        return log_probs(model, rows)


def cross_entropy(model: PeftModel, rows: Sequence[Row]) -> Float[Tensor, ""]:
    """Mean of -log p (nats) of the token that follows each position that is read.

    The last position of a row must not be read: no token follows it.
    """
    ids, read = _padded(model, rows)
    return F.cross_entropy(_logits(model, ids, read), ids[:, 1:][read[:, :-1]])


def divergence_from_base(model: PeftModel, rows: Sequence[Row]) -> Float[Tensor, ""]:
    """Mean KL(base || adapter) of the next token in nats, over the positions that are read."""
    base, tuned = base_log_probs(model, rows), log_probs(model, rows)
    return (base.exp() * (base - tuned)).sum(-1).mean()


def _padded(
    model: PeftModel, rows: Sequence[Row]
) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
    """Token ids, padded at the right where a causal model cannot see it; what is read."""
    ids = torch.zeros(len(rows), max(len(row.tokens) for row in rows), dtype=torch.long)
    read = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        read[i, : len(row.tokens)][row.read] = True
    return ids.to(model.device), read.to(model.device)


def _logits(
    model: PeftModel, ids: Int[Tensor, "row pos"], read: Bool[Tensor, "row pos"]
) -> Float[Tensor, "read vocab"]:
    positions = read.any(0).nonzero()[:, 0]  # of the others nothing is unembedded
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits
    return logits[read[:, positions]].float()
