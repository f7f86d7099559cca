"""Pieces of the forward pass that several analyses read off a bridge.

Layers are counted as blocks: index l of a layer axis is ``resid_post`` of block l, so that l = 0
has been through one block and the last index goes to the final norm. The embedding is no layer; in
tables and figures it is -1. Rows are padded at the right, where a causal model cannot see it.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeGuard, TypeVar

import psutil
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from interp_kit import store
from interp_kit.batching import Part, adds_nothing, before_layer, parts
from interp_kit.identity import COMPUTES_THE_SAME, state_of
from interp_kit.prompts import Prompt

Residuals = Float[Tensor, "prompt layer d_model"]
# What a block gave, and the keys and values that it added, by block and what entered the first.
Replays = dict[tuple[int, str], tuple[Any, dict[str, Tensor]]]
Kept = TypeVar("Kept")
# Of what is recorded, inside ``shared_passes``: an eighth of the memory, but at least one GiB.
KEPT_BYTES = max(2**30, psutil.virtual_memory().total // 8)

_shared: ContextVar["OrderedDict[Hashable, tuple[Any, int]] | None"] = ContextVar(
    "shared passes", default=None
)


@contextmanager
def shared_passes() -> Iterator[None]:
    """Inside, one forward pass of a batch serves every analysis that reads its last positions.

    Lens, attribution and their controls then cost one pass together, and patching a prompt again
    does not record it again. What is kept belongs to what the bridge computed as: after a switch to
    another adapter or a change of weights passes are run anew, and while hooks are on (steering,
    for instance) nothing is kept or found. Where there is a ``store``, other notebooks share the
    passes too. Inside another ``shared_passes`` it changes nothing.
    """
    if _shared.get() is not None:
        yield
        return
    token = _shared.set(OrderedDict())
    try:
        yield
    finally:
        _shared.reset(token)


def read_last(
    bridge: TransformerBridge, rows: Sequence[Sequence[int]], names: Sequence[str], read: int
) -> dict[str, Tensor]:
    """Activations by hook name, [row read ...], at the last ``read`` positions of rows of tokens.

    Before a row's first position stands that one again. Of ``unembed.hook_out`` there is the last
    position only: the others are never unembedded. Passes are shared of the hooks in
    ``last_names``; others are read in a pass of their own.
    """
    kept, shared = _shared.get(), last_names(bridge)
    state = state_of(bridge) if kept is not None and set(names) <= set(shared) else None
    if kept is None or state is None:
        return _read_last(bridge, rows, names, read)
    rows = [list(map(int, row)) for row in rows]
    key = "last", bridge, state, repr(rows)
    found = _find(kept, key)
    if not _reaches(found, read):
        found = _shared_pass(bridge, rows, shared, read)
        _keep(kept, key, found, sum(x.nbytes for x in found.values()))
    return {name: found[name][:, -read:] for name in names}


def once(
    bridge: TransformerBridge,
    key: Hashable,
    compute: Callable[[], Kept],
    size: Callable[[Kept], int],
) -> Kept:
    """What ``compute()`` gives; inside ``shared_passes`` what it gave before for this key.

    ``size`` in bytes: more than ``KEPT_BYTES`` together are not kept, the least recent goes first.
    Nothing is kept while the bridge computes with hooks.
    """
    kept = _shared.get()
    state = state_of(bridge) if kept is not None else None
    if kept is None or state is None:
        return compute()
    key = bridge, state, key
    if (found := _find(kept, key)) is not None:
        return found
    made = compute()
    _keep(kept, key, made, size(made))
    return made


def kept_before(bridge: TransformerBridge, kind: str) -> Iterator[tuple[Any, Any]]:
    """Keys that begin with ``kind``, and what ``once`` keeps for them, of what is computed now."""
    kept = _shared.get()
    state = state_of(bridge) if kept is not None else None
    if kept is None or state is None:
        return
    keys: list[Any] = list(kept)
    for key in keys:
        if key[:2] == (bridge, state) and key[2][0] == kind:
            yield key[2], kept[key][0]


def last_names(bridge: TransformerBridge) -> list[str]:
    """What ``residual_stream`` and direct logit attribution read of a forward pass.

    Norms and MLPs are left out where the model has none.
    """
    names = ["blocks.0.hook_resid_pre", "ln_final.hook_scale", "unembed.hook_out"]
    hooks = ("attn.hook_z", "hook_attn_out", "hook_mlp_out", "hook_resid_post")
    for layer, block in enumerate(bridge.blocks):
        names += [f"blocks.{layer}.{hook}" for hook in hooks]
        if hasattr(block, "ln1_post"):
            names.append(f"blocks.{layer}.ln1_post.hook_scale")
    return [name for name in names if name in bridge.hook_dict]


@torch.no_grad()
def residual_stream(
    bridge: TransformerBridge, rows: Sequence[Sequence[int]], read: int
) -> Float[Tensor, "layer row read d_model"]:
    """The embedding and ``resid_post`` of every block, at the last ``read`` positions of rows."""
    names = ["blocks.0.hook_resid_pre"]
    names += [f"blocks.{layer}.hook_resid_post" for layer in range(bridge.cfg.n_layers)]
    kept = read_last(bridge, rows, names, read)
    return torch.stack([kept[name] for name in names])


@torch.no_grad()
def residuals(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    *,
    suffix: int | None = None,
) -> Residuals:
    """The residual stream after every block at each prompt's last position, float32.

    ``suffix`` is one further token; the last position is then that token's. They are kept on disk,
    where there is a ``store``.
    """
    rows = [(*p.tokens, *([] if suffix is None else [suffix])) for p in prompts]
    return last_residuals(bridge, rows)


@torch.no_grad()
def last_residuals(bridge: TransformerBridge, rows: Sequence[Sequence[int]]) -> Residuals:
    """``residuals`` at the last of each row of token ids."""
    name = store.name_of(bridge, "last", [*map(list, rows)])
    found = store.find(name)
    if found is not None:
        return found["stream"]
    result = torch.empty(len(rows), bridge.cfg.n_layers, bridge.cfg.d_model)
    for part in parts(bridge, rows, read=[1] * len(rows)):
        result[part.index] = _last_stream(bridge, part).float().cpu()
    store.keep(name, {"stream": result})
    return result


@contextmanager
def resumed(
    bridge: TransformerBridge, layer: int, *, kept: Replays | None = None
) -> Iterator[None]:
    """Inside, a batch that comes again is computed from the output of block ``layer`` on.

    For many edits of the stream or the weights there or later: the blocks before are computed once.
    Nothing inside may change what those compute or read them. A batch is known again by what enters
    the first block, and by the beginning that it attends to. With ``kept``, which begins empty,
    what every block gave is kept for further such contexts, which may resume after another block;
    -1, and less, is none.
    """
    ended: Replays = {} if kept is None else kept
    now = ""

    def wrapped(at: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal now
            given = [*args, *kwargs.values()]
            cache = next((x for x in given if isinstance(x, DynamicCache)), None)
            if at == 0:
                entering = args[0] if args else kwargs["hidden_states"]
                now = store.tensors_digest(entering=entering, **before_layer(cache, 0))
            known = layer if kept is None else at  # what block ``layer`` gave passes through all
            if (known, now) in ended:
                out, states = ended[known, now]
                if kept is not None and states and cache is not None:
                    cache.update(states["keys"], states["values"], at)
                return out
            begun = before_layer(cache, at)
            out = forward(*args, **kwargs)
            added = {} if begun else before_layer(cache, at)
            if (at == layer or kept is not None) and (adds_nothing(cache, at) or not begun):
                ended[at, now] = out, added
            return out

        if kept is not None:
            vars(run)[COMPUTES_THE_SAME] = True
        return run

    blocks = [block.original_component for block in bridge.blocks[: max(0, layer + 1)]]
    own = [vars(block).get("forward") for block in blocks]
    try:
        for at, block in enumerate(blocks):
            block.forward = wrapped(at, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


# ------------------------------------------------------------------------------------- internals
def _find(kept: "OrderedDict[Hashable, tuple[Any, int]]", key: Hashable) -> Any:
    """What is kept under this key, now the most recent; nothing, if nothing is."""
    if key not in kept:
        return None
    kept.move_to_end(key)
    return kept[key][0]


def _keep(
    kept: "OrderedDict[Hashable, tuple[Any, int]]", key: Hashable, made: object, size: int
) -> None:
    """Keep it, and let go of the least recent until ``KEPT_BYTES`` hold the rest."""
    kept[key] = made, size
    kept.move_to_end(key)
    while sum(bytes for _, bytes in kept.values()) > KEPT_BYTES:
        kept.popitem(last=False)


def _reaches(kept: dict[str, Tensor] | None, read: int) -> TypeGuard[dict[str, Tensor]]:
    """Whether a pass was kept, as far back as is asked for."""
    return kept is not None and kept["blocks.0.hook_resid_pre"].shape[1] >= read


def _shared_pass(
    bridge: TransformerBridge, rows: Sequence[Sequence[int]], names: Sequence[str], read: int
) -> dict[str, Tensor]:
    """All that is shared of last positions, from the disk if it is there."""
    name = store.name_of(bridge, names, rows)
    found = store.find(name)
    if _reaches(found, read):
        return {key: tensor.to(bridge.cfg.device) for key, tensor in found.items()}
    computed = _read_last(bridge, rows, names, read)
    store.keep(name, computed)
    return computed


@torch.no_grad()
def _read_last(
    bridge: TransformerBridge, rows: Sequence[Sequence[int]], names: Sequence[str], read: int
) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    order: list[int] = []
    for part in parts(bridge, rows, read=[min(read, len(row)) for row in rows]):
        hooks: list[tuple[str | Callable[..., Any], Callable[..., Any]]]
        hooks = [(name, _keeping(part, read, kept)) for name, kept in found.items()]
        hooks.append(("unembed.hook_in", partial(_last_of, part)))
        bridge.run_with_hooks(part.tokens, fwd_hooks=hooks, **part.before)
        order += part.index
    place = torch.tensor(order).argsort()
    return {name: torch.cat(kept)[place.to(kept[0].device)] for name, kept in found.items()}


def _keeping(part: Part, read: int, kept: list[Tensor]) -> Callable[..., None]:
    def keep(x: Tensor, hook: Any) -> None:
        kept.append(x if hook.name == "unembed.hook_out" else part.last(x, read))

    return keep


def _last_stream(bridge: TransformerBridge, part: Part) -> Float[Tensor, "row layer d_model"]:
    """``resid_post`` of every block at the last position of every row."""
    stream: list[Tensor] = []

    def keep(x: Tensor, hook: object) -> None:
        stream.append(part.last(x, 1)[:, 0])

    names = [f"blocks.{layer}.hook_resid_post" for layer in range(bridge.cfg.n_layers)]
    hooks = [*((name, keep) for name in names), ("unembed.hook_in", partial(_last_of, part))]
    bridge.run_with_hooks(part.tokens, fwd_hooks=hooks, **part.before)
    return torch.stack(stream, 1)


def _last_of(part: Part, x: Tensor, hook: object) -> Tensor:
    """The last position of each row only: nothing else is unembedded."""
    return part.last(x, 1)
