"""A bridge in parts: its embedding, its blocks, and its final norm with the unembedding.

``weights_of`` one part, and ``exchanged``: a model that computes with parts of another.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.identity import registered_again

EMBEDDING = ("embed", "pos_embed")
JOINT = "qkv"  # the whole of a projection that is split: computed with are its parts
READOUT = ("ln_final", "unembed")


def weights_of(bridge: TransformerBridge, part: int) -> dict[str, Float[Tensor, "..."]]:
    """The weights of one part, by the names that they have in the bridge.

    Mostly those of the model's own code; a projection that the bridge splits into q, k and v is
    three. ``part`` is a layer, -1 for the embedding, or ``n_layers`` for the final norm and
    unembedding.
    """
    named = {}
    for root, module in _modules(bridge, part).items():
        for name, weight in module.named_parameters():
            steps = f"{root}.{name}" if root else name
            plain = [s for s in steps.split(".") if s not in ("_original_component", "base_layer")]
            if JOINT not in plain:
                named[".".join(plain).removesuffix(".weight")] = weight.detach()
    return named


@contextmanager
def exchanged(
    bridge: TransformerBridge, other: TransformerBridge, parts: Collection[int]
) -> Iterator[None]:
    """Inside, ``bridge`` computes with the weights that ``other`` has in these parts.

    ``parts`` are numbered as in ``weights_of``. The two have the same architecture. Adapters go
    with the weights under them, as they are active in ``other``.
    """
    places = [
        place
        for part in parts
        for mine, theirs in zip(
            _modules(bridge, part).values(), _modules(other, part).values(), strict=True
        )
        for place in _differing(mine, theirs)
    ]
    before = [(holder, name, holder[name]) for holder, name, _ in places]
    with registered_again(bridge):
        try:
            for holder, name, instead in places:
                holder[name] = instead
            yield
        finally:
            for holder, name, own in before:
                holder[name] = own


# ------------------------------------------------------------------------------------- internals
def _modules(bridge: TransformerBridge, part: int) -> dict[str, nn.Module]:
    if 0 <= part < bridge.cfg.n_layers:
        return {"": bridge.blocks[part]}
    names = EMBEDDING if part < 0 else READOUT
    return {name: module for name in names if (module := getattr(bridge, name, None)) is not None}


def _differing(mine: nn.Module, theirs: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """(dictionary of a module, key in it, what ``theirs`` has there) for every weight and buffer.

    Where only one of the two has an adapter, or both do, the whole linear module is exchanged.
    Hook points stay, so that whoever hooks the bridge hooks what it computes.
    """
    seen: set[nn.Module] = set()
    pairs = [(mine, theirs)]
    while pairs:
        ours, other = pairs.pop()
        if ours in seen:
            continue
        seen.add(ours)
        for name in ours._parameters:
            yield ours._parameters, name, other._parameters[name]
        for name in ours._buffers:
            yield ours._buffers, name, other._buffers[name]
        for name, child in ours._modules.items():
            instead = other._modules[name]
            if child is None or instead is None:
                continue
            if hasattr(child, "base_layer") or hasattr(instead, "base_layer"):
                yield ours._modules, name, instead
            else:
                pairs.append((child, instead))
