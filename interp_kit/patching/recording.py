"""Recorded forward passes, and the patches that write one recording into another."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from interp_kit.passes import once

Site = Literal["resid_pre", "z", "attn_out", "resid_mid", "neuron", "mlp_out", "resid_post"]
Place = tuple[Site, int]  # a site in a layer
Hooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]
# In the order in which a block computes them; ``mlp_out`` and ``attn_out`` are what is added to the
# residual stream, after a post-norm where the model has one.
HOOKS: dict[Site, str] = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "z": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "neuron": "blocks.{}.mlp.out.hook_in",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_post": "blocks.{}.hook_resid_post",
}


@dataclass(frozen=True, kw_only=True, order=True)
class Patch:
    """One place to write in: a site of a layer, or one head or neuron of it.

    ``index`` is the head of ``z`` or the neuron, -1 for the whole site; ``positions`` are those of
    the target's tokens, ``None`` for all of them.
    """

    layer: int
    site: Site
    index: int = -1
    positions: tuple[int, ...] | None = None

    @property
    def place(self) -> Place:
        return self.site, self.layer

    @property
    def component(self) -> str:
        """As people write it: ``L2H3``, ``L2_MLP``, ``L2_ATTN``, ``L2_RESID_MID``, ``L2N17``."""
        names = {"z": f"H{self.index}", "neuron": f"N{self.index}"}
        names |= {"mlp_out": "_MLP", "attn_out": "_ATTN"}
        return f"L{self.layer}{names.get(self.site, '_' + self.site.upper())}"


PatchSet = frozenset[Patch]
UNPATCHED: PatchSet = frozenset()


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One forward pass of one sequence, as far as sweeps need it."""

    tokens: Int[Tensor, "1 pos"]
    activations: Mapping[Place, Tensor]  # [pos ...]
    stream: list[Float[Tensor, "pos d_model"]]  # what enters each block
    keys_values: list[tuple[Tensor, Tensor]]  # of each layer; none where attention looks ahead
    final: Float[Tensor, "read d_model"]  # what is unembedded
    logits: Float[Tensor, "read vocab"]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        kept = [*self.activations.values(), *self.stream]
        return sum(x.nbytes for x in [*kept, *(x for pair in self.keys_values for x in pair)])

    def prefix(self, length: int) -> DynamicCache | None:
        """Keys and values of the first ``length`` positions, which every row shares."""
        if length == 0:
            return None
        cache: Any = DynamicCache()  # no config: layers of full length; masks keep the window
        cache.layers = [Prefix(k[:, :, :length], v[:, :, :length]) for k, v in self.keys_values]
        return cache


@dataclass(frozen=True, kw_only=True)
class Source:
    """What patches write: values [pos ...] of every place, at the *target's* positions.

    ``head_shift`` (layer -> [tail head d_model], of the last positions; none before) is what a
    head's output gains beyond its ``z`` where source and target differ in the output projection
    too, as fine-tunes do.
    """

    values: Mapping[Place, Tensor]
    head_shift: Mapping[int, Tensor]


@torch.no_grad()
def record(
    bridge: TransformerBridge, tokens: Sequence[int], places: Iterable[Place], *, read: int = 1
) -> Recording:
    """Run ``tokens`` once and keep what sweeps need; the last ``read`` positions are unembedded."""
    activations: dict[Place, Tensor] = {}
    stream: list[Tensor] = []
    final: list[Tensor] = []

    def keep(place: Place) -> Callable[..., None]:
        def hook_function(x: Tensor, hook: object) -> None:
            heads = place[0] == "z" and x.ndim == 3
            activations[place] = (by_head(bridge, x) if heads else x)[0].clone()

        return hook_function

    def last(x: Tensor, hook: object) -> Tensor:
        final.append(x[0, -read:])
        return x[:, -read:]

    places = sorted(set(places), key=lambda place: place[1])
    hooks: Hooks = [(HOOKS[site].format(layer), keep((site, layer))) for site, layer in places]
    hooks += [
        (f"blocks.{layer}.hook_in", lambda x, hook: stream.append(x[0].clone()))
        for layer in range(bridge.cfg.n_layers)
    ]
    ids = torch.tensor([list(tokens)], device=bridge.cfg.device)
    cache: Any = DynamicCache()
    logits = bridge.run_with_hooks(
        ids,
        fwd_hooks=[*hooks, ("unembed.hook_in", last)],
        **({"past_key_values": cache} if looks_back_only(bridge) else {}),
    )
    return Recording(
        tokens=ids,
        activations=activations,
        stream=stream,
        keys_values=[(layer.keys, layer.values) for layer in cache.layers],
        final=final[0],
        logits=logits[0].float(),
    )


def recorded(
    bridge: TransformerBridge, tokens: Sequence[int], places: Iterable[Place], *, read: int = 1
) -> Recording:
    """``record`` of the model as it is: inside ``shared_passes``, what was recorded before."""
    kept = frozenset(places)
    key = "recording", tuple(tokens), kept, read
    return once(
        bridge, key, lambda: record(bridge, tokens, kept, read=read), lambda made: made.bytes
    )


@torch.enable_grad()
def gradients(
    bridge: TransformerBridge,
    tokens: Sequence[int],
    ids: tuple[int, int],
    places: Sequence[Place],
) -> dict[Place, Tensor]:
    """d(logit of ids[0] - logit of ids[1] at the last position) / d(activation), [pos ...] each."""
    kept: dict[Place, Tensor] = {}

    def keep(place: Place) -> Callable[..., Tensor]:
        def hook_function(x: Tensor, hook: object) -> Tensor:
            kept[place] = x
            return x  # what is returned is what the model goes on with: z may be a reshaped view

        return hook_function

    # The stream between attention and MLP moves as far as attention's output does.
    named = {p: HOOKS["attn_out" if p[0] == "resid_mid" else p[0]].format(p[1]) for p in places}
    hooks: Hooks = [("blocks.0.hook_in", lambda x, hook: x.detach().requires_grad_())]
    hooks += [(name, keep(place)) for place, name in named.items()]
    hooks.append(("unembed.hook_in", lambda x, hook: x[:, -1:]))
    batch = torch.tensor([list(tokens)], device=bridge.cfg.device)
    logits = bridge.run_with_hooks(batch, fwd_hooks=hooks)[0, -1]
    order = list(kept)
    slopes = torch.autograd.grad(logits[ids[0]] - logits[ids[1]], [kept[place] for place in order])
    return {
        place: (by_head(bridge, slope) if place[0] == "z" and slope.ndim == 3 else slope)[0]
        for place, slope in zip(order, slopes)
    }


class Prefix(DynamicLayer):
    """Keys and values of a prefix that every row attends to and none adds to."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._prefix = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows = (key_states.shape[0], -1, -1, -1)
        keys, values = self._prefix
        return (
            torch.cat([keys.expand(rows), key_states], -2),
            torch.cat([values.expand(rows), value_states], -2),
        )


def by_head(bridge: TransformerBridge, z: Tensor) -> Tensor:
    return z.unflatten(-1, (bridge.cfg.n_heads, -1))


def looks_back_only(bridge: TransformerBridge) -> bool:
    return getattr(bridge.cfg, "attention_dir", "causal") == "causal"
