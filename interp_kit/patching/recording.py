"""What is recorded of a run before anything is patched: activations, keys and values, gradients.

A ``Recording`` is one forward pass of one sequence of tokens. The *target* is the run that is
patched; its recording also spares the sweep what patches cannot change. The *source* is the run
that activations are copied from; ``SourceValues`` holds them at the target's positions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from interp_kit.batching import common_beginning, looks_back_only, resumable, shared_prefix
from interp_kit.passes import kept_before, once
from interp_kit.patching.patches import HOOKS, Place

Hooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One forward pass of one sequence, as far as sweeps need it.

    ``activations``, at all positions: [pos head d_head] for "z", else [pos d_model] or, for
    "neuron", [pos d_mlp]. ``stream`` is what enters each block. ``keys_values`` are those of each
    layer, [1 head pos d_head]; empty where attention looks ahead. ``final`` is what is unembedded
    at the last ``read`` positions, and ``logits`` (float32) what comes of it.
    """

    tokens: Int[Tensor, "1 pos"]
    activations: Mapping[Place, Tensor]
    stream: list[Float[Tensor, "pos d_model"]]
    keys_values: list[tuple[Tensor, Tensor]]
    final: Float[Tensor, "read d_model"]
    logits: Float[Tensor, "read vocab"]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def bytes(self) -> int:
        """The memory that it takes, logits left out."""
        kept = [*self.activations.values(), *self.stream]
        return sum(x.nbytes for x in [*kept, *(x for pair in self.keys_values for x in pair)])

    def prefix(self, length: int) -> DynamicCache | None:
        """Keys and values of the first ``length`` positions, which every row shares."""
        if length == 0:
            return None
        return shared_prefix([(k[:, :, :length], v[:, :, :length]) for k, v in self.keys_values])


@dataclass(frozen=True, kw_only=True)
class SourceValues:
    """What patches write, by place, at the *target's* positions: shapes as in ``Recording``.

    ``head_shift``, by layer, [tail head d_model] at the last positions: what each head's output
    gains beyond its ``z`` where source and target differ in the output projection too, as
    fine-tunes do. Before these positions, and in other layers, nothing. ``entering`` is what enters
    the first block of the source's run, where that is another prompt's.
    """

    values: Mapping[Place, Tensor]
    head_shift: Mapping[int, Float[Tensor, "tail head d_model"]] = field(default_factory=dict)
    entering: Float[Tensor, "pos d_model"] | None = None


@torch.no_grad()
def record(
    bridge: TransformerBridge,
    tokens: Sequence[int],
    places: Iterable[Place],
    *,
    read: int = 1,
    like: Recording | None = None,
    inputs: Recording | None = None,
) -> Recording:
    """Run ``tokens`` once and keep ``places``, and what else sweeps need.

    Only the last ``read`` positions are unembedded. The beginning that ``tokens`` share with
    ``like``, a recording of the same places, is taken from there. With ``inputs``, another model's
    recording with every "attn_out", each block and its MLP get what they got there: what is kept is
    what this model's components make of it.
    """
    shared = _shared_beginning(tokens, like, at_most=len(tokens) - read)
    activations: dict[Place, Tensor] = {}
    stream: list[Tensor] = []
    final: list[Tensor] = []

    def whole(x: Tensor, before: Callable[[Recording], Tensor]) -> Tensor:
        return torch.cat([before(like)[:shared], x[0]]) if like and shared else x[0].clone()

    def keep(place: Place) -> Callable[..., None]:
        def hook_function(x: Tensor, hook: object) -> None:
            heads = place[0] == "z" and x.ndim == 3
            own = _by_head(bridge, x) if heads else x
            activations[place] = whole(own, lambda earlier: earlier.activations[place])

        return hook_function

    def enters(layer: int) -> Callable[..., None]:
        return lambda x, hook: stream.append(whole(x, lambda earlier: earlier.stream[layer]))

    def last(x: Tensor, hook: object) -> Tensor:
        final.append(x[0, -read:])
        return x[:, -read:]

    places = sorted(set(places), key=lambda place: place[1])
    hooks: Hooks = [(HOOKS[site].format(layer), keep((site, layer))) for site, layer in places]
    hooks += [(f"blocks.{layer}.hook_in", enters(layer)) for layer in range(bridge.cfg.n_layers)]
    hooks += [] if inputs is None else _giving(inputs)  # after what keeps a place
    ids = torch.tensor([list(tokens)], device=bridge.cfg.device)
    cache: Any = DynamicCache()
    if like and shared:
        for layer, (keys, values) in enumerate(like.keys_values):
            cache.update(keys[:, :, :shared], values[:, :, :shared], layer)
    logits = bridge.run_with_hooks(
        ids[:, shared:],
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


def _giving(inputs: Recording) -> Hooks:
    """Every block, and its MLP, gets what it got in that run."""

    def instead(value: Tensor) -> Callable[..., Tensor]:
        return lambda x, hook: value[None]

    return [
        pair
        for layer, stream in enumerate(inputs.stream)
        for pair in (
            (f"blocks.{layer}.hook_in", instead(stream)),
            (HOOKS["attn_out"].format(layer), instead(inputs.activations["attn_out", layer])),
        )
    ]


def recorded(
    bridge: TransformerBridge,
    tokens: Sequence[int],
    places: Iterable[Place],
    *,
    read: int = 1,
    like: Recording | None = None,
) -> Recording:
    """As ``record``; inside ``shared_passes`` a run that was recorded before is not run again.

    Of one that was not, the beginning is taken from the recording that begins most like it.
    """
    kept = frozenset(places)
    key = "recording", tuple(tokens), kept, read

    def make() -> Recording:
        earlier = like or _most_alike(bridge, tokens, kept)
        return record(bridge, tokens, kept, read=read, like=earlier)

    return once(bridge, key, make, lambda made: made.bytes)


def moved(source: Tensor, target: Tensor, index: Sequence[int]) -> Tensor:
    """The source's values at the target's positions; the target's own where none is."""
    at = torch.tensor(list(index))
    values = source[at.clamp(min=0)]
    values[at < 0] = target[at < 0]
    return values


@torch.enable_grad()
def gradients(
    bridge: TransformerBridge,
    run: Recording,
    score: Callable[[Float[Tensor, "1 read vocab"]], Float[Tensor, "1"]],
    places: Sequence[Place],
    *,
    entering: Float[Tensor, "pos d_model"],
    start: int = 0,
) -> dict[str, Tensor]:
    """d score / d activation by hook name, [suffix ...], from position ``start`` on.

    ``entering`` goes into the first block: the run's own, or something between it and another
    run's. What lies before ``start`` is taken from ``run``. One forward and one backward pass. For
    "z" there is also the gradient of what the output projection gives,
    ``blocks.L.attn.o.hook_out``.
    """
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook_function(x: Tensor, hook: object) -> Tensor:
            kept[name] = x
            return x  # what is returned is what the model goes on with: z may be a reshaped view

        return hook_function

    first = entering[None, start:].detach().clone().requires_grad_()
    hooks: Hooks = [("blocks.0.hook_in", lambda x, hook: first)]
    hooks += [(name, keep(name)) for name in dict.fromkeys(chain(*map(_hooks_of, places)))]
    read = len(run.logits)
    hooks.append(("unembed.hook_in", lambda x, hook: x[:, -read:].contiguous()))
    prefix = run.prefix(start)
    cache: dict[str, Any] = {} if prefix is None else {"past_key_values": prefix}
    logits = bridge.run_with_hooks(run.tokens[:, start:], fwd_hooks=hooks, **cache)
    order = list(kept)
    slopes = torch.autograd.grad(score(logits.float())[0], [kept[name] for name in order])
    heads = {HOOKS["z"].format(layer) for site, layer in places if site == "z"}
    return {
        name: (_by_head(bridge, slope) if name in heads and slope.ndim == 3 else slope)[0]
        for name, slope in zip(order, slopes)
    }


# ------------------------------------------------------------------------------------- internals
def _most_alike(
    bridge: TransformerBridge, tokens: Sequence[int], places: frozenset[Place]
) -> Recording | None:
    """Of what is kept, the recording of these places that has most first tokens in common."""
    if not resumable(bridge):
        return None
    made = [run for key, run in kept_before(bridge, "recording") if key[2] == places]
    return max(made, key=lambda run: common_beginning(run.tokens[0].tolist(), tokens), default=None)


def _shared_beginning(tokens: Sequence[int], like: Recording | None, *, at_most: int) -> int:
    """How many first tokens are those of a recording that has their keys and values."""
    if like is None or not like.keys_values:
        return 0
    return common_beginning(tokens[:at_most], like.tokens[0].tolist())


def _hooks_of(place: Place) -> list[str]:
    """Where the gradient of a place is read off."""
    site, layer = place
    if site == "resid_mid":  # it moves as far as what attention adds
        site = "attn_out"
    projected = [f"blocks.{layer}.attn.o.hook_out"] if site == "z" else []
    return [HOOKS[site].format(layer), *projected]


def _by_head(bridge: TransformerBridge, z: Tensor) -> Tensor:
    """[... head * d_head] -> [... head d_head]."""
    return z.unflatten(-1, (bridge.cfg.n_heads, -1))
