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

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.passes import once
from interp_kit.patching.memory import call_tokens, rows_at_once
from interp_kit.patching.packing import Tree
from interp_kit.patching.recording import (
    HOOKS,
    UNPATCHED,
    Hooks,
    Patch,
    PatchSet,
    Place,
    Recording,
    Source,
)
from interp_kit.readout import unembed

PACKED = 6  # rows of up to so many tokens become positions of one sequence
PACKED_TOKENS = 512  # of one such sequence: attention in it grows with their square


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
        rows: Sequence[PatchSet],
        *,
        base: PatchSet = UNPATCHED,
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
                part = unembed(self.bridge, part, ids)
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
        self, rows: Sequence[PatchSet], base: PatchSet, start: int | None, alone: bool
    ) -> Iterable[tuple[list[int], Float[Tensor, "row read _"]]]:
        """(the rows, what ``_pass`` makes of them) of every pass."""

        def run() -> Iterator[tuple[list[int], Tensor]]:
            for at, order in self._chunks(rows, base, start):
                yield order, self._pass([rows[i] for i in order], base, at, alone)

        if self._key is None or not alone:
            return run()  # logits of the whole vocabulary are too many to keep
        key = "patched", self._key, tuple(rows), base, start
        return once(
            self.bridge,
            key,
            lambda: [(order, part.clone()) for order, part in run()],  # no view of the whole pass
            lambda made: sum(part.nbytes for _, part in made),
        )

    def _chunks(
        self, rows: Sequence[PatchSet], base: PatchSet, start: int | None
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
        for first, order in _merged(groups, call_tokens(self.bridge)).items():
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
        ours = unembed(self.bridge, self.target.final, ids)
        return torch.allclose(ours, self.target.logits[:, list(ids)], rtol=1e-5, atol=1e-5)

    def _pass(
        self,
        rows: Sequence[PatchSet],
        base: PatchSet,
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
                tree = Tree(alive[-1], length, start)
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

    def _writes(
        self, rows: Sequence[PatchSet], alive: Sequence[int], start: int, length: int
    ) -> Hooks:
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


def _merged(groups: dict[int, list[int]], worth: int) -> dict[int, list[int]]:
    """Groups of rows by first position, ascending; ``worth`` tokens more are as dear as a pass."""
    merged: dict[int, list[int]] = {}
    begun = 0
    for first, rows in groups.items():
        if not merged or len(rows) * (first - begun) > worth:
            begun = first
        merged.setdefault(begun, []).extend(rows)
    return merged


def _joins(row: PatchSet, base: PatchSet, layers: int) -> int:
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
