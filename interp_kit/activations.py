"""Pieces of the forward pass that several analyses read off a bridge.

Layers are counted as blocks: index l of a layer axis is ``resid_post`` of block l, so that l = 0
has been through one block and the last index goes to the final norm. The embedding is no layer; in
tables and figures it is -1. Prompts of one length go together, so that nothing is ever padded.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.checkpoints import weights_hash
from interp_kit.decisions import Prompt, batches
from interp_kit.specs import ModelSpec

Residuals = Float[Tensor, "prompt layer d_model"]


Passes = dict[tuple[int, bytes], dict[str, Tensor]]
_shared: ContextVar[Passes | None] = ContextVar("shared passes", default=None)


@contextmanager
def shared_passes() -> Iterator[None]:
    """Inside, one forward pass of a batch serves every analysis that reads its last positions.

    Lens, attribution and their controls then cost one pass together. Nothing may change what the
    model computes inside: no switch to another adapter, no hook, no steering.
    """
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def read_last(
    bridge: TransformerBridge, tokens: Tensor, names: Sequence[str], read: int
) -> dict[str, Tensor]:
    """Activations by hook name, [prompt read ...], at the last ``read`` positions.

    Of ``unembed.hook_out`` the last position only: the others are never unembedded.
    """
    passes = _shared.get()
    if passes is None:
        return _read_last(bridge, tokens, names, read)
    key = (id(bridge), repr(tokens.tolist()).encode())
    kept = passes.get(key)
    if kept is None or kept["blocks.0.hook_resid_pre"].shape[1] < read:
        kept = passes[key] = _read_last(bridge, tokens, last_names(bridge), read)
    return {name: kept[name][:, -read:] for name in names}


def last_names(bridge: TransformerBridge) -> list[str]:
    """What ``residual_stream`` and direct logit attribution read of a forward pass."""
    names = ["blocks.0.hook_resid_pre", "ln_final.hook_scale", "unembed.hook_out"]
    hooks = ("attn.hook_z", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    for layer, block in enumerate(bridge.blocks):
        names += [f"blocks.{layer}.{hook}" for hook in hooks]
        if hasattr(block, "ln1_post"):
            names.append(f"blocks.{layer}.ln1_post.hook_scale")
    return names


@torch.no_grad()
def residual_stream(
    bridge: TransformerBridge, tokens: Tensor, read: int
) -> Float[Tensor, "layer prompt read d_model"]:
    """The embedding and ``resid_post`` of every block, at the last ``read`` positions."""
    names = ["blocks.0.hook_resid_pre"]
    names += [f"blocks.{layer}.hook_resid_post" for layer in range(bridge.cfg.n_layers)]
    kept = read_last(bridge, tokens, names, read)
    return torch.stack([kept[name] for name in names])


@torch.no_grad()
def residuals(
    bridge: TransformerBridge, prompts: Sequence[Prompt], *, suffix: int | None = None
) -> Residuals:
    """The residual stream after every block at each prompt's last position, float32.

    ``suffix`` is one further token: then the last position is its.
    """
    rows = [(*p.tokens, *([] if suffix is None else [suffix])) for p in prompts]
    return _last_residuals(bridge, rows)


def stored_residuals(
    bridge: TransformerBridge, rows: Sequence[Sequence[int]], *, folder: str | Path, model_key: str
) -> Residuals:
    """``residuals`` at the last of each row of token ids, kept in ``folder`` by content.

    The file is named by a hash of ``model_key``, the token ids and the layer convention;
    ``model_key`` must change whenever the model's weights do, as that of ``model_key`` does. An
    empty ``folder`` keeps nothing. A damaged file is computed again, with a warning.
    """
    content = json.dumps(["resid_post, float32", model_key, [*map(list, rows)]])
    file = Path(folder) / f"{hashlib.sha256(content.encode()).hexdigest()}.safetensors"
    stream = _read_checked(file) if str(folder) and file.is_file() else None
    if stream is None:
        stream = _last_residuals(bridge, rows)
        if str(folder):
            _write_checked(file, stream)
    return stream


def model_key(spec: ModelSpec) -> str:
    """Identity of the weights: a hash of the model's files, or of its Hugging Face id."""
    return weights_hash(spec)


def through_frozen_norm(
    bridge: TransformerBridge,
    name: str,
    x: Float[Tensor, "*place d_model"],
    scale: Float[Tensor, "*place one"],
) -> Float[Tensor, "*place d_model"]:
    """The norm ``name`` as the linear map that it is once its scale is fixed (bias left out)."""
    norm: Any = bridge.get_submodule(name)
    gain = norm.weight.float()
    if getattr(bridge.cfg, "rmsnorm_uses_offset", False):
        gain = 1 + gain  # Gemma stores the gain less one
    x = x.float()
    if not norm.uses_rms_norm:
        x = x - x.mean(-1, keepdim=True)
    return x / scale.float() * gain


def norm_scale(
    bridge: TransformerBridge, name: str, x: Float[Tensor, "*place d_model"]
) -> Float[Tensor, "*place one"]:
    """The scale by which the norm ``name`` divides ``x``."""
    norm: Any = bridge.get_submodule(name)
    bias = getattr(norm, "bias", None)
    normed = norm(x).float() - (0 if bias is None else bias.float())
    unscaled = through_frozen_norm(bridge, name, x, x.new_ones(*x.shape[:-1], 1))
    return (unscaled * normed).sum(-1, keepdim=True) / (normed**2).sum(-1, keepdim=True)


# ------------------------------------------------------------------------------------- internals
@torch.no_grad()
def _read_last(
    bridge: TransformerBridge, tokens: Tensor, names: Sequence[str], read: int
) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda x, hook: kept.update({name: x[:, -read:]})

    bridge.run_with_hooks(
        tokens.to(bridge.cfg.device),
        fwd_hooks=[
            *((name, keep(name)) for name in names),
            ("unembed.hook_in", lambda x, hook: x[:, -1:]),
        ],
    )
    return kept


def _last_residuals(bridge: TransformerBridge, rows: Sequence[Sequence[int]]) -> Residuals:
    result = torch.empty(len(rows), bridge.cfg.n_layers, bridge.cfg.d_model)
    for index in batches([(len(row), None) for row in rows]):
        stream = residual_stream(bridge, torch.tensor([rows[i] for i in index]), 1)[1:, :, 0]
        result[index] = stream.movedim(0, 1).float().cpu()
    return result


def _write_checked(file: Path, stream: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    save_file({"stream": stream}, beside, metadata={"sha256": _digest(stream)})
    beside.replace(file)


def _read_checked(file: Path) -> Tensor | None:
    """The stored tensor; nothing, with a warning, if the file is not as it was written."""
    try:
        with safe_open(file, framework="pt") as stored:
            stream = stored.get_tensor("stream")
            if stored.metadata()["sha256"] == _digest(stream):
                return stream
            problem = "its checksum is another"
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        problem = str(error)
    warnings.warn(f"{file}: damaged ({problem}); its activations are computed again", stacklevel=3)
    return None


def _digest(stream: Tensor) -> str:
    return hashlib.sha256(repr(stream.shape).encode() + stream.numpy().tobytes()).hexdigest()
