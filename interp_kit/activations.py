"""Pieces of the forward pass that several analyses read off a bridge."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.decisions import Prompt, batches

Residuals = Float[Tensor, "prompt layer d_model"]


@torch.no_grad()
def residual_stream(
    bridge: TransformerBridge, tokens: Tensor, read: int
) -> Float[Tensor, "layer prompt read d_model"]:
    """The embedding and ``resid_post`` of every block, at the last ``read`` positions."""
    names = ["blocks.0.hook_resid_pre"]
    names += [f"blocks.{layer}.hook_resid_post" for layer in range(bridge.cfg.n_layers)]
    kept: dict[str, Tensor] = {}
    bridge.run_with_hooks(
        tokens.to(bridge.cfg.device),
        fwd_hooks=[
            *(
                (name, lambda x, hook, name=name: kept.update({name: x[:, -read:]}))
                for name in names
            ),
            ("unembed.hook_in", lambda x, hook: x[:, -1:]),
        ],
    )
    return torch.stack([kept[name] for name in names])


@torch.no_grad()
def residuals(
    bridge: TransformerBridge, prompts: Sequence[Prompt], *, suffix: int | None = None
) -> Residuals:
    """The residual stream after every block at each prompt's last position, float32.

    ``suffix`` is one further token: then the last position is its.
    """
    rows = [(*p.tokens, *([] if suffix is None else [suffix])) for p in prompts]
    result = torch.empty(len(rows), bridge.cfg.n_layers, bridge.cfg.d_model)
    for index in batches([(len(row), None) for row in rows]):
        stream = residual_stream(bridge, torch.tensor([rows[i] for i in index]), 1)[1:, :, 0]
        result[index] = stream.movedim(0, 1).float().cpu()
    return result


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
