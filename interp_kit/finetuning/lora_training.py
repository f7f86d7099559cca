"""Training a LoRA adapter: attach it, run the one training loop, save it unmerged.

A recipe says what its loss is; ``train`` does the rest. The parts of a loss are here, too:
``cross_entropy`` and ``divergence_from_base`` of the next token, at chosen positions of ``Row``s.
Method: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm

from interp_kit.specs import ModelSpec, slug

WARMUP = 10  # steps in which the learning rate rises to its height


class Row(NamedTuple):
    """Token ids, and the positions at which the prediction of the next token is read."""

    tokens: list[int]
    read: slice


def attach_lora(model: Any, *, rank: int, alpha: int, new_tokens: Sequence[int] = ()) -> PeftModel:
    """``model`` with an untrained LoRA on every linear layer but the last.

    A layer with weight W computes with W + (alpha / rank) B A; B is zero at first. The embedding
    rows of ``new_tokens`` are trained with it.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear",
        trainable_token_indices={"embed_tokens": list(new_tokens)} if new_tokens else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model.train(), config)


def train(
    model: PeftModel,
    loss: Callable[[], tuple[Float[Tensor, ""], Mapping[str, float]]],
    *,
    steps: int,
    learning_rate: float,
    title: str,
    accumulate: int = 1,
) -> list[dict[str, float]]:
    """Take ``steps`` optimizer steps on the trainable parameters of ``model``, in place.

    AdamW without weight decay; the gradient's norm is clipped at 1. The learning rate of step t of
    T is ``learning_rate * min(1, (t + 1) / 10) * (1 - 0.9 t / T)``.

    ``loss`` makes the next forward pass: it returns the loss and other numbers to be shown and
    recorded. A step takes ``accumulate`` passes and follows their mean gradient. Returns, for each
    step, the mean over its passes of "loss" and of those numbers.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (1 - 0.9 * step / steps)
    )
    record = []
    progress = tqdm(range(steps), desc=title, unit="step")
    for _ in progress:
        means: dict[str, float] = {}
        for _ in range(accumulate):
            value, others = loss()
            (value / accumulate).backward()
            for name, number in {"loss": float(value.detach()), **others}.items():
                means[name] = means.get(name, 0.0) + number / accumulate
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        record.append(means)
        progress.set_postfix({name: f"{number:.3f}" for name, number in means.items()})
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
    return model(input_ids=ids, use_cache=False).logits[read].float()
