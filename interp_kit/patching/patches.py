"""Every head, MLP, neuron or residual state of a model as a patch."""

from typing import Literal

from transformer_lens.model_bridge import TransformerBridge

from interp_kit.patching.recording import HOOKS, Patch, Site
from interp_kit.specs import InputError

Unit = Literal[
    "component", "head", "attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post", "neuron"
]


def unit_patches(bridge: TransformerBridge, unit: Unit, *, layer: int | None = None) -> list[Patch]:
    """Every patch of this kind, at all positions: "component" is every head and every MLP.

    ``layer`` keeps to one layer; neurons need it. Raises ``InputError`` for a layer that the model
    does not have, and for a kind that it has not (no neurons in a mixture of experts).
    """
    cfg = bridge.cfg
    if layer is not None and not 0 <= layer < cfg.n_layers:
        raise InputError(f"layer {layer} does not exist; expected 0 to {cfg.n_layers - 1}")
    if unit == "neuron" and layer is None:
        raise InputError("neurons are patched in one layer at a time; give layer=")
    sites: list[Site] = {"component": ["z", "mlp_out"], "head": ["z"]}.get(unit, [unit])  # type: ignore
    layers = range(cfg.n_layers) if layer is None else [layer]
    for site in sites:
        name = HOOKS[site].format(layers[0])
        if name not in bridge.hook_dict:
            raise InputError(
                f"this model has no {name}, so unit {unit!r} cannot be patched; "
                f"expected a unit that it has, such as 'component' or 'resid_pre'"
            )
    n = {"z": cfg.n_heads, "neuron": cfg.d_mlp}
    return [
        Patch(layer=at, site=site, index=index)
        for at in layers
        for site in sites
        for index in (range(n[site]) if site in n else [-1])
    ]


def find_patch(bridge: TransformerBridge, name: str) -> Patch:
    """The head or MLP called ``name`` (``L2H3``, ``L2_MLP``); ``InputError`` if there is none."""
    known = {patch.component: patch for patch in unit_patches(bridge, "component")}
    if name not in known:
        last = bridge.cfg.n_layers - 1
        raise InputError(
            f"unknown component {name!r}; expected L0H0 to L{last}H{bridge.cfg.n_heads - 1}, or "
            f"L0_MLP to L{last}_MLP"
        )
    return known[name]
