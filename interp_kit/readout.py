"""Readouts of the residual stream: frozen norms, unembedding and soft cap, heads through the output
projection.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge


def has_norm(bridge: TransformerBridge, name: str) -> bool:
    """Whether the model has the norm ``name``; a native model may have the identity there."""
    try:
        norm: Any = bridge.get_submodule(name)
    except AttributeError:
        return False
    return not isinstance(getattr(norm, "original_component", norm), torch.nn.Identity)


def final_norm(bridge: TransformerBridge, x: Tensor) -> Tensor:
    """``x`` through the final norm; unchanged where the model has none."""
    return bridge.ln_final(x) if has_norm(bridge, "ln_final") else x


def through_frozen_norm(
    bridge: TransformerBridge,
    name: str,
    x: Float[Tensor, "*place d_model"],
    scale: Float[Tensor, "*#place 1"],
) -> Float[Tensor, "*place d_model"]:
    """The norm ``name`` as the linear map that it is once its scale is fixed (bias left out).

    A model without that norm leaves ``x`` as it is.
    """
    if not has_norm(bridge, name):
        return x.float()
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
) -> Float[Tensor, "*place 1"]:
    """The scale by which the norm ``name`` divides ``x``; 1 where the model has none."""
    if not has_norm(bridge, name):
        return torch.ones_like(x[..., :1], dtype=torch.float32)
    norm: Any = bridge.get_submodule(name)
    bias = getattr(norm, "bias", None)
    normed = norm(x).float() - (0 if bias is None else bias.float())
    unscaled = through_frozen_norm(bridge, name, x, x.new_ones(*x.shape[:-1], 1))
    return (unscaled * normed).sum(-1, keepdim=True) / (normed**2).sum(-1, keepdim=True)


@torch.no_grad()
def project_heads(
    bridge: TransformerBridge, layer: int, z: Float[Tensor, "*place head d_head"]
) -> Float[Tensor, "*place head d_model"]:
    """What each head of ``layer`` writes: its ``z`` alone through the model's output projection.

    Before any norm after attention, without the projection's bias. Because the model's own module
    computes it, grouped-query attention, LoRA and quantized weights need no special case.
    """
    heads = z.shape[-2]
    one_each = torch.zeros(*z.shape[:-2], heads, heads, z.shape[-1], device=z.device, dtype=z.dtype)
    one_each[..., range(heads), range(heads), :] = z  # row h holds the z of head h only
    project = bridge.blocks[layer].attn.o.original_component
    return project(one_each.flatten(-2)) - projection_bias(bridge, layer, z)


@torch.no_grad()
def projection_bias(
    bridge: TransformerBridge, layer: int, z: Float[Tensor, "*place head d_head"]
) -> Float[Tensor, "d_model"]:
    """What the output projection of ``layer`` writes for a ``z`` of zeros; often zero itself."""
    nothing = z.new_zeros(z.shape[-2] * z.shape[-1])
    return bridge.blocks[layer].attn.o.original_component(nothing[None])[0]


def soft_cap(bridge: TransformerBridge, logits: Tensor) -> Tensor:
    """cap tanh(logits / cap) where the model caps its logits (Gemma-2), else the logits."""
    cap = getattr(bridge.cfg, "output_logits_soft_cap", None) or -1.0
    return torch.tanh(logits / cap) * cap if cap > 0 else logits


def unembed(
    bridge: TransformerBridge, final: Float[Tensor, "*rows d_model"], ids: Sequence[int]
) -> Float[Tensor, "*rows token"]:
    """The logits of the tokens ``ids`` only, float32, from the output of the final norm."""
    weight = bridge.unembed.original_component.weight[list(ids)]
    logits = torch.nn.functional.linear(final, weight, bridge.b_U[list(ids)].to(weight.dtype))
    return soft_cap(bridge, logits).float()
