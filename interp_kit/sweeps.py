"""Many patched forward passes in one: the engine behind activation patching and circuits.

A *patch* writes a source's activation over a target's, at one place. A *row* is a set of patches
whose decision is wanted. One ordinary hooked forward pass of the model serves many rows, exactly:

- Nothing before the first position in which a row's patches change anything is computed again: its
  keys and values come from the recorded target run. Patches that write what is already there change
  nothing, and are not computed at all. Rows that begin a little later join a pass where that
  costs less than one of their own.
- Nothing below a patched layer is computed again: the pass starts with one row, the base, and block
  l appends a copy of it for every row that first differs from it in block l.
- Rows of few tokens stand as further positions of one sequence under a mask that lets each see the
  prefix and itself (so that the prefix is never copied); longer ones are a batch.
- Only the positions that are read, and of a decision only the two answers, are unembedded.

Masks, rotary embeddings, norms, caps and expert routing stay the model's own.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psutil
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from interp_kit.activations import once
from interp_kit.specs import InputError

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
PACKED = 6  # rows of up to so many tokens become positions of one sequence
PACKED_TOKENS = 512  # of one such sequence: attention in it grows with their square
CHUNK_TOKENS = {
    "cpu": 2048,
    "cuda": 16384,
    "mps": 4096,
}  # patched tokens in one pass: enough to keep it busy
CHUNK_BYTES = 2**30
# What calling the modules and hooks of one block costs, in what the device computes meanwhile:
# measured on one core (positions x layers of 8 blocks: best of 0 to 1e8), and not on the others,
# which are taken to be so much faster.
CALL_FLOPS = {"cpu": 2e7, "cuda": 2e10, "mps": 2e9}


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


Row = frozenset[Patch]
NOTHING: Row = frozenset()


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
        cache.layers = [_Prefix(k[:, :, :length], v[:, :, :length]) for k, v in self.keys_values]
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
            activations[place] = (_by_head(bridge, x) if heads else x)[0].clone()

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
        **({"past_key_values": cache} if _looks_back_only(bridge) else {}),
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
    key = "recording", bridge, tuple(tokens), kept, read
    return once(key, lambda: record(bridge, tokens, kept, read=read), lambda made: made.bytes)


@torch.no_grad()
def head_projections(
    bridge: TransformerBridge, activations: Mapping[Place, Tensor], positions: Sequence[int]
) -> dict[int, Float[Tensor, "pos head d_model"]]:
    """What each head writes, layer -> [pos head d_model], by the bridge's own output projection.

    Before a post-norm, without the bias; ``activations`` hold the layers' ``z``.
    """
    outputs = {}
    for (site, layer), z in activations.items():
        if site != "z":
            continue
        z = z[list(positions)]
        pos, heads, _ = z.shape
        alone = torch.zeros(pos, heads, *z.shape[1:], dtype=z.dtype, device=z.device)
        alone.diagonal(dim1=1, dim2=2).copy_(z.movedim(1, -1))  # row h holds head h's z only
        project = bridge.blocks[layer].attn.o.original_component
        bias = project(torch.zeros_like(z[:1].flatten(1)))
        outputs[layer] = project(alone.flatten(0, 1).flatten(1)).view(pos, heads, -1) - bias
    return outputs


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
        place: (_by_head(bridge, slope) if place[0] == "z" and slope.ndim == 3 else slope)[0]
        for place, slope in zip(order, slopes)
    }


class Sweep:
    """One target run and one source: ``logits(rows)`` runs any number of patch sets."""

    def __init__(
        self,
        bridge: TransformerBridge,
        target: Recording,
        source: Source,
        *,
        read: int = 1,
        key: Hashable = None,
    ) -> None:
        self.bridge, self.target, self.source, self.read = bridge, target, source, read
        self._key = key  # names the two runs: inside ``shared_passes``, no row is run twice
        self._differs: dict[Place, np.ndarray] = {}

    @torch.no_grad()
    def logits(
        self,
        rows: Sequence[Row],
        *,
        base: Row = NOTHING,
        ids: tuple[int, ...] | None = None,
        start: int | None = None,
    ) -> Float[Tensor, "row read token"]:
        """Logits at the positions read: row 0 is ``base``, row 1 + i is ``rows[i]``.

        ``ids`` keeps these tokens only; ``None`` the whole vocabulary. ``start`` computes every row
        from that position on, those that cannot differ, too: for measuring the numerical noise of
        the computation itself.
        """
        alone = ids is not None and self._unembeds_alike(ids)
        unpatched = self.target.logits if ids is None else self.target.logits[:, list(ids)]
        result = unpatched.expand(1 + len(rows), *unpatched.shape).clone()
        for order, part in self._parts(rows, base, start, alone):
            if alone:
                assert ids is not None
                part = _unembed(self.bridge, part, ids)
            elif ids is not None:
                part = part[..., list(ids)]
            lead = len(base) > 0
            same = part[:1].expand(lead + len(order) - len(part), *part.shape[1:])
            part = torch.cat([part, same]).float()  # rows that equal the base are not computed
            result[[1 + i for i in order]] = part[lead:]
            if base:
                result[0] = part[0]
        return result.cpu()

    # --------------------------------------------------------------------------------- internals
    def _parts(
        self, rows: Sequence[Row], base: Row, start: int | None, alone: bool
    ) -> Iterable[tuple[list[int], Float[Tensor, "row read _"]]]:
        """(the rows, what ``_pass`` makes of them) of every pass."""

        def run() -> Iterator[tuple[list[int], Tensor]]:
            for at, order in self._chunks(rows, base, start):
                yield order, self._pass([rows[i] for i in order], base, at, alone)

        if self._key is None or not alone:
            return run()  # logits of the whole vocabulary are too many to keep
        key = "patched", self._key, tuple(rows), base, start
        return once(
            key,
            lambda: [(order, part.clone()) for order, part in run()],  # no view of the whole pass
            lambda made: sum(part.nbytes for _, part in made),
        )

    def _chunks(
        self, rows: Sequence[Row], base: Row, start: int | None
    ) -> Iterator[tuple[int, list[int]]]:
        """(first position, rows) of every pass: rows of one start in the order of their layers."""
        if start is not None and not self.target.keys_values:
            start = 0
        firsts = [self._first([*row, *base]) if start is None else start for row in rows]
        groups: dict[int, list[int]] = {}
        for i, first in sorted(enumerate(firsts), key=lambda pair: pair[1] or 0):
            if first is not None:
                groups.setdefault(first, []).append(i)
        if base and not groups and (first := self._first(base)) is not None:
            groups[first] = []
        layers = self.bridge.cfg.n_layers
        for first, order in _merged(groups, _call_tokens(self.bridge)).items():
            order.sort(key=lambda i: _joins(rows[i], base, layers))
            length = self.target.length - first
            size = rows_at_once(self.bridge, suffix=length)
            if length <= PACKED:
                size = min(size, PACKED_TOKENS // length)
            yield from ((first, order[i : i + size]) for i in range(0, max(1, len(order)), size))

    def _first(self, patches: Iterable[Patch]) -> int | None:
        """The first position that the patches can change; ``None`` if they change nothing.

        Before it, source and target agree in every place that is written, and attention only looks
        back: by induction over layers nothing there can change, however many patches there are.
        """
        live = [first for p in patches if (first := self._live(p)) is not None]
        return min(live, default=None) if self.target.keys_values or not live else 0

    def _live(self, patch: Patch) -> int | None:
        """The first patched position where source and target differ in the patch's place."""
        if patch.place not in self._differs:
            ours, theirs = self.target.activations[patch.place], self.source.values[patch.place]
            differs = ours != theirs
            if patch.site != "neuron":
                differs = differs.any(-1)
            if patch.site == "z" and patch.layer in self.source.head_shift:
                shifted = (self.source.head_shift[patch.layer] != 0).any(-1)
                differs[-len(shifted) :] |= shifted
            self._differs[patch.place] = differs.cpu().numpy()
        differs = self._differs[patch.place]
        if patch.index >= 0:
            differs = differs[:, patch.index]
        elif differs.ndim > 1:
            differs = np.any(differs, axis=1)
        differs = np.atleast_1d(differs)
        positions = range(len(differs)) if patch.positions is None else sorted(patch.positions)
        return next((pos for pos in positions if differs[pos]), None)

    def _unembeds_alike(self, ids: tuple[int, ...]) -> bool:
        """Whether unembedding these tokens alone gives what the model itself gives."""
        ours = _unembed(self.bridge, self.target.final, ids)
        return torch.allclose(ours, self.target.logits[:, list(ids)], rtol=1e-5, atol=1e-5)

    def _pass(
        self,
        rows: Sequence[Row],
        base: Row,
        start: int,
        alone: bool,
    ) -> Float[Tensor, "row read _"]:
        """One forward pass of the positions from ``start``: the base (if it has patches), ``rows``.

        The rows are in the order of their layers. Without a base of its own the first row leads;
        it is the unpatched run until it joins. Returns logits; ``alone``, what is unembedded.
        Rows that equal the first are left out.
        """
        suffix = self.target.tokens[:, start:]
        length, layers = suffix.shape[1], self.bridge.cfg.n_layers
        joins = [_joins(row, base, layers) for row in rows]
        lead = 1 if base or not rows else 0
        alive = [max(1, lead + sum(join <= layer for join in joins)) for layer in range(layers)]
        sets = [base, *rows] if lead else list(rows)
        packed = length <= PACKED and bool(self.target.keys_values)
        hooks = [] if packed else self._growing(alive, start, copy=bool(lead))
        hooks += self._writes(sets, alive, start, length)
        if not packed and not any(p.site == "neuron" for row in sets for p in row):
            hooks = self._trimmed(hooks, length)
        final: list[Tensor] = []

        def last(x: Tensor, hook: object) -> Tensor:
            kept = x.reshape(-1, length, x.shape[-1])[:, -self.read :]
            final.append(kept)
            return kept[:1] if alone else kept

        cache = self.target.prefix(start)
        how: dict[str, Any] = {"past_key_values": cache} if cache else {}
        if not cache and self.target.keys_values:
            how = {"use_cache": False}
        with ExitStack() as stack:
            if packed:
                tree = _Tree(alive[-1], length, start)
                for block, n, unpatched in zip(self.bridge.blocks, alive, self.target.stream):
                    pack = tree.before(block, n, None if lead else unpatched[start:])
                    handle = block.register_forward_pre_hook(pack, with_kwargs=True)
                    stack.callback(handle.remove)
            out = self.bridge.run_with_hooks(
                suffix, fwd_hooks=[*hooks, ("unembed.hook_in", last)], **how
            )
        return final[0] if alone else out

    def _trimmed(self, hooks: Hooks, length: int) -> Hooks:
        """In the last block only what is read goes through the projections after attention.

        Zeros stand where nothing reads, so that shapes stay.
        """
        read, last = self.read, f"blocks.{self.bridge.cfg.n_layers - 1}"

        def trim(x: Tensor, hook: object) -> Tensor:
            return x[:, -read:].contiguous()  # some experts insist

        def pad(x: Tensor, hook: object) -> Tensor:
            return torch.nn.functional.pad(x, (0, 0, length - x.shape[1], 0))

        parts = [f"{last}.attn.o", f"{last}.mlp"]
        before: Hooks = [(f"{part}.hook_out", pad) for part in parts]
        return [*before, *hooks, *((f"{part}.hook_in", trim) for part in parts)]

    def _growing(self, alive: Sequence[int], start: int, *, copy: bool) -> Hooks:
        """Every block appends the unpatched stream, or a ``copy`` of row 0, for rows joining it."""
        before = [1, *alive]
        return [
            (
                f"blocks.{layer}.hook_in",
                _append(n - before[layer], None if copy else self.target.stream[layer][start:]),
            )
            for layer, n in enumerate(alive)
            if n > before[layer]
        ]

    def _writes(self, rows: Sequence[Row], alive: Sequence[int], start: int, length: int) -> Hooks:
        entries: dict[Place, list[tuple[int, Patch]]] = defaultdict(list)
        for row, patches in enumerate(rows):
            for patch in patches:
                if row < alive[patch.layer]:
                    entries[patch.place].append((row, patch))
        hooks: Hooks = []
        order = list(HOOKS)
        for place in sorted(entries, key=lambda place: (place[1], order.index(place[0]))):
            hooks += self._write(place, entries[place], start, length)
        return hooks

    def _write(
        self, place: Place, entries: list[tuple[int, Patch]], start: int, length: int
    ) -> Hooks:
        """Hooks that write the source into the rows that ask for it, on a copy."""
        site, layer = place
        values = self.source.values[place][start:]
        rows = sorted({row for row, _ in entries})
        mask = _mask(
            entries, rows, values.shape[1] if site in ("z", "neuron") else 1, start, length
        )
        mask = torch.from_numpy(mask).to(values.device)
        wide = mask[..., None] if site == "z" else mask

        def write(x: Tensor, hook: object, new: Tensor = values) -> Tensor:
            view = x.reshape(-1, length, *(values.shape[1:] if site == "z" else x.shape[2:]))
            patched = view.clone()
            patched[rows] = torch.where(wide, new, view[rows])
            return patched.view_as(x)

        def shift(x: Tensor, hook: object) -> Tensor:
            view = x.reshape(-1, length, x.shape[-1]).clone()
            gained = self.source.head_shift[layer][-length:]
            tail = len(gained)
            here = mask[:, -tail:].to(gained.dtype)
            sums = einsum(here, gained, "row pos head, pos head d_model -> row pos d_model")
            view[rows, -tail:] = view[rows, -tail:] + sums
            return view.view_as(x)

        if site == "z" and layer in self.source.head_shift:
            return [(HOOKS["z"].format(layer), write), (f"blocks.{layer}.attn.o.hook_out", shift)]
        if site != "resid_mid":
            return [(HOOKS[site].format(layer), write)]
        # The residual stream between attention and MLP is no module's output: let attention write
        # what is missing to the source's value there.
        before: list[Tensor] = []

        def keep(x: Tensor, hook: object) -> None:
            before[:] = [x]

        def complete(x: Tensor, hook: object) -> Tensor:
            missing = values - before[0].reshape(-1, length, x.shape[-1])[rows]
            return write(x, hook, new=missing)

        return [
            (HOOKS["resid_pre"].format(layer), keep),
            (HOOKS["attn_out"].format(layer), complete),
        ]


def rows_at_once(bridge: TransformerBridge, *, suffix: int) -> int:
    """How many rows of ``suffix`` tokens one pass holds."""
    by_memory = CHUNK_BYTES // (suffix * _token_bytes(bridge, suffix))
    return max(
        1, min(CHUNK_TOKENS.get(_device(bridge).type, CHUNK_TOKENS["cpu"]) // suffix, by_memory)
    )


def check_memory(bridge: TransformerBridge, *, length: int) -> None:
    """Raise ``InputError`` if even one patch at a time would not fit into memory."""
    needed = 2 * length * _token_bytes(bridge, length)  # the base and one row
    recorded = 4 * bridge.cfg.d_model * bridge.cfg.n_layers * _item_bytes(bridge)
    needed += 2 * length * recorded  # source and target
    available = _available_bytes(bridge)
    if needed > available:
        raise InputError(
            f"a sweep over {length} tokens needs about {needed / 2**30:.1f} GiB even with one "
            f"patch at a time, and {available / 2**30:.1f} GiB are free; shorten the prompt, load "
            "the model in bfloat16, or free memory"
        )


# ------------------------------------------------------------------------------------- internals
class _Prefix(DynamicLayer):
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


class _Tree:
    """Lays rows out as positions of one sequence, each seeing the prefix and itself.

    Rows of one length keep their positions: rotary angles and masks are the base's, repeated.
    """

    def __init__(self, rows: int, length: int, start: int) -> None:
        self.rows, self.length, self.start = rows, length, start
        self._masks: dict[int, Tensor] = {}

    def before(self, block: Any, rows: int, unpatched: Tensor | None) -> Callable[..., Any]:
        """A forward pre-hook by which ``block`` gets ``rows`` rows as one sequence.

        New rows are ``unpatched``, or copies of row 0.
        """
        names = list(inspect.signature(block.original_component.forward).parameters)

        def pack(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = {**dict(zip(names, args)), **kwargs}  # GPT-2 passes its mask by position
            x = given.pop(names[0]).unflatten(1, (-1, self.length))
            new = x[:, :1] if unpatched is None else unpatched[None, None]
            new = new.expand(-1, rows - x.shape[1], -1, -1)
            given["attention_mask"] = self._mask(given.get("attention_mask"), rows, x)
            if (positions := given.get("position_ids")) is not None:
                given["position_ids"] = positions.repeat(1, rows)
            if (angles := given.get("position_embeddings")) is not None:
                given["position_embeddings"] = tuple(a.repeat(1, rows, 1) for a in angles)
            return (torch.cat([x, new], 1).flatten(1, 2),), given

        return pack

    def _mask(self, mask: Tensor | None, rows: int, like: Tensor) -> Tensor:
        """The mask of the first ``rows`` rows, from the model's own mask of one."""
        if id(mask) not in self._masks:
            self._masks[id(mask)] = self._whole(mask, like)
        seen = rows * self.length
        return self._masks[id(mask)][:, :, :seen, : self.start + seen]

    def _whole(self, mask: Tensor | None, like: Tensor) -> Tensor:
        length, start, rows = self.length, self.start, self.rows
        if mask is None:
            allowed = torch.ones(length, start + length, device=like.device).tril(start).bool()
            lowest = torch.finfo(like.dtype).min
            mask = torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, lowest)
            mask = mask[None, None]
        blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        whole = mask.new_full((1, 1, rows * length, start + rows * length), blocked)
        whole[..., :start] = mask[..., :start].repeat(1, 1, rows, 1)
        for row in range(rows):
            at = row * length
            whole[..., at : at + length, start + at : start + at + length] = mask[..., start:]
        return whole


def _call_tokens(bridge: TransformerBridge) -> int:
    """How many tokens cost as much as calling the modules and hooks of a pass."""
    cfg = bridge.cfg
    weights = cfg.d_model * (4 * cfg.d_model + 3 * (cfg.d_mlp or 4 * cfg.d_model))
    return int(CALL_FLOPS.get(_device(bridge).type, CALL_FLOPS["cpu"]) / (2 * weights))


def _merged(groups: dict[int, list[int]], worth: int) -> dict[int, list[int]]:
    """Groups of rows by first position, ascending; ``worth`` tokens more are as dear as a pass."""
    merged: dict[int, list[int]] = {}
    begun = 0
    for first, rows in groups.items():
        if not merged or len(rows) * (first - begun) > worth:
            begun = first
        merged.setdefault(begun, []).extend(rows)
    return merged


def _joins(row: Row, base: Row, layers: int) -> int:
    """The block in which a row first differs from the base."""
    return min((patch.layer for patch in row ^ base), default=layers)


def _mask(
    entries: list[tuple[int, Patch]], rows: list[int], units: int, start: int, length: int
) -> Bool[np.ndarray, "row pos unit"]:
    mask = np.zeros((len(rows), length, units), dtype=bool)
    at = {row: i for i, row in enumerate(rows)}
    for row, patch in entries:
        unit = patch.index if patch.index >= 0 else slice(None)
        if patch.positions is None:
            mask[at[row], :, unit] = True
        else:
            mask[at[row], [p - start for p in patch.positions if p >= start], unit] = True
    return mask


def _append(n: int, unpatched: Tensor | None) -> Callable[..., Tensor]:
    def append(x: Tensor, hook: object) -> Tensor:
        new = x[:1] if unpatched is None else unpatched[None]
        return torch.cat([x, new.expand(n, *x.shape[1:])])

    return append


def _by_head(bridge: TransformerBridge, z: Tensor) -> Tensor:
    return z.unflatten(-1, (bridge.cfg.n_heads, -1))


def _unembed(
    bridge: TransformerBridge, final: Float[Tensor, "*rows d_model"], ids: Sequence[int]
) -> Float[Tensor, "*rows token"]:
    weight = bridge.unembed.original_component.weight[list(ids)]
    logits = torch.nn.functional.linear(final, weight, bridge.b_U[list(ids)].to(weight.dtype))
    cap = getattr(bridge.cfg, "output_logits_soft_cap", None) or -1.0
    return (torch.tanh(logits / cap) * cap if cap > 0 else logits).float()


def _looks_back_only(bridge: TransformerBridge) -> bool:
    return getattr(bridge.cfg, "attention_dir", "causal") == "causal"


def _device(bridge: TransformerBridge) -> torch.device:
    return torch.device(bridge.cfg.device or "cpu")


def _item_bytes(bridge: TransformerBridge) -> int:
    return bridge.cfg.dtype.itemsize


def _token_bytes(bridge: TransformerBridge, length: int) -> int:
    """What one token of one row takes at the widest point of a block, attention scores included."""
    cfg = bridge.cfg
    mlp = cfg.d_mlp or 4 * cfg.d_model
    return (3 * mlp + 8 * cfg.d_model + 3 * cfg.n_heads * length) * _item_bytes(bridge)


def _available_bytes(bridge: TransformerBridge) -> int:
    if _device(bridge).type == "cuda":
        return torch.cuda.mem_get_info(_device(bridge))[0]
    return psutil.virtual_memory().available
