"""Is a model in memory what its files say? Loading reports, finite weights, a probe of logits.

transformers and PEFT go on with random weights where a checkpoint lacks some, and without an
adapter where its tensors have other names; they only warn. Here such a model is refused. ``probe``
runs a short fixed sequence: what plain Hugging Face and PEFT give for it is kept before the model
becomes a bridge, and compared with what the bridge gives.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_kit.hub import ADAPTER_WEIGHTS, ModelFiles, tensor_shapes
from interp_kit.specs import InputError

EMBEDDINGS = tuple(
    f"{name}{part}.weight"
    for name in ("embed_tokens", "wte", "embed_in", "lm_head", "embed_out")
    for part in ("", ".base_layer")
)
PROBED = 12  # tokens
ROUNDINGS = 32  # steps of the model's precision at its largest logit, that two ways may differ by


@torch.no_grad()
def probe(model: Any) -> Float[Tensor, "pos vocab"]:
    """Logits, float32, on a short sequence of token ids spread over the vocabulary.

    Raises ``InputError`` where one is not finite.
    """
    inner = getattr(model, "original_model", model)
    size = inner.config.get_text_config().vocab_size
    device = next(inner.parameters()).device
    out = model((torch.arange(1, PROBED + 1, device=device) * 7919 % size)[None])
    logits = getattr(out, "logits", out)[0].float().cpu()
    if not logits.isfinite().all():
        dtype = str(next(inner.parameters()).dtype).removeprefix("torch.")
        raise InputError(
            f"{inner.config.model_type} in {dtype}: logits are not finite (NaN or infinite) on a "
            "plain forward pass; set dtype: float32 or bfloat16 if it overflows, or copy the "
            "weights again"
        )
    return logits


def noise_bound(logits: Tensor, dtype: torch.dtype) -> float:
    """How far two ways of computing these logits may be apart by rounding."""
    return ROUNDINGS * torch.finfo(dtype).eps * max(1.0, float(logits.abs().max()))


def check_finite(name: str, model: torch.nn.Module) -> None:
    """Raise ``InputError`` for the first weight that holds NaN or infinity."""
    for at, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.sum(dtype=torch.float32).isfinite():
            continue  # a sum that is finite has no other summand, and is quicker
        if not weight.isfinite().all():
            raise InputError(
                f"model {name!r}: {at} holds values that are not finite (NaN or infinite); the "
                "file is damaged or its training diverged: copy it again, or use another checkpoint"
            )


def check_vocabulary(name: str, tokenizer: Any, rows: int) -> None:
    """Raise ``InputError`` if the tokenizer has ids for which the embedding has no row."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        raise InputError(
            f"model {name!r}: its tokenizer gives {token!r} the id {largest}, but its embedding "
            f"has {rows} rows; use the tokenizer that the model was trained with, or resize the "
            "embedding and save the model again"
        )


def check_report(name: str, report: Any) -> None:
    """Raise ``InputError`` for what transformers reports of loading a checkpoint."""
    given: Mapping[str, Any] = report if isinstance(report, Mapping) else vars(report)
    _check_keys(
        name,
        missing=given["missing_keys"],
        unexpected=given["unexpected_keys"],
        mismatched=[key[0] if isinstance(key, tuple) else key for key in given["mismatched_keys"]],
    )


def check_adapter_report(name: str, report: Any, model: torch.nn.Module, *, adapter: str) -> None:
    """``check_report`` of one adapter.

    Left out is what is missing of others on the same base, and what shares its tensor with
    something that was loaded, as rows of a tied unembedding do.
    """
    missing = set(report.missing_keys)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(weight) for key, weight in parameters.items() if key not in missing}
    own = [key for key in missing if f".{adapter}" in key and id(parameters.get(key)) not in loaded]
    check_report(name, vars(report) | {"missing_keys": own})


def check_loaded(files: ModelFiles, model: Any) -> None:
    """Raise ``InputError`` unless PEFT has loaded the very tensors of the adapter's file."""
    from peft import get_peft_model_state_dict

    assert files.adapter is not None
    used = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    saved = set(tensor_shapes(files.adapter / ADAPTER_WEIGHTS, files.spec.name))
    whole = {key for key in saved - used if key.endswith(EMBEDDINGS)}  # PEFT loads them as well
    _check_keys(
        files.spec.name, missing=used - saved, unexpected=saved - used - whole, mismatched=()
    )


# ------------------------------------------------------------------------------------- internals
def _check_keys(
    name: str,
    *,
    missing: Collection[str],
    unexpected: Collection[str],
    mismatched: Collection[str],
) -> None:
    problems = [
        (missing, "has no weights for", "they would be drawn at random"),
        (mismatched, "has weights of another shape for", "they would be drawn at random"),
        (unexpected, "has weights that the model does not take", "they would be ignored"),
    ]
    for keys, what, effect in problems:
        if keys:
            first = min(keys)
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(
                f"model {name!r}: its checkpoint or adapter {what}: {first}{more}; {effect}: save "
                "it again with save_pretrained, from the model class that it was trained with"
            )
