"""Which forward passes a sweep makes: what each computes, from which position on, for which rows.

A ``Pass`` is planned before anything runs. It computes no position before the first that any of its
patches changes, and no row before the block in which it first differs from row 0. Patch sets that
change nothing are in no pass at all.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.batching import call_tokens
from interp_kit.patching.memory import rows_at_once
from interp_kit.patching.patches import Patch, PatchSet, Place
from interp_kit.patching.recording import Recording, SourceValues

PACKED = 6  # rows of up to so many tokens become positions of one sequence
PACKED_TOKENS = 512  # of one such sequence: attention in it grows with their square


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass: ``patch_sets[i]`` is written into row i, of positions ``start`` and later.

    ``asked`` are the places of these patch sets in the list that was asked for; the base's row,
    if there is one, comes before them. Rows stand in the order of the block in which they first
    differ from row 0. ``rows_in_block[l]`` rows leave block l: the others equal row 0 until then.
    With a base, row 0 is the base; without, it is the first patch set, which equals the unpatched
    run until its own first patch. ``packed``: rows are positions of one sequence, not a batch.
    """

    patch_sets: tuple[PatchSet, ...]
    asked: tuple[int, ...]
    start: int
    length: int
    rows_in_block: tuple[int, ...]
    packed: bool

    @property
    def has_base_row(self) -> bool:
        return len(self.patch_sets) > len(self.asked)

    @property
    def rows(self) -> int:
        """How many rows are computed; the later ones equal row 0."""
        return self.rows_in_block[-1]

    @property
    def writes_neurons(self) -> bool:
        return any(patch.site == "neuron" for patches in self.patch_sets for patch in patches)


class Differences:
    """Where source and target differ: only there can a patch change anything."""

    def __init__(self, target: Recording, source: SourceValues) -> None:
        self.target, self.source = target, source
        self._by_place: dict[Place, Bool[np.ndarray, "pos unit"]] = {}

    def first_changed(self, patches: Iterable[Patch]) -> int | None:
        """The first position that the patches can change; ``None`` if they change nothing.

        Before it, source and target agree in every place that is written, and attention only looks
        back: by induction over layers nothing there can change, however many patches there are.
        Where attention looks ahead, everything can.
        """
        firsts = [first for p in patches if (first := self._first_written(p)) is not None]
        return min(firsts, default=None) if self.target.keys_values or not firsts else 0

    def _first_written(self, patch: Patch) -> int | None:
        """The first patched position where source and target differ in the patch's place."""
        units = self._at(patch.place)
        differs = np.any(units, axis=1) if patch.unit is None else units[:, patch.unit]
        positions = range(len(differs)) if patch.positions is None else patch.positions
        return next((pos for pos in positions if differs[pos]), None)

    def _at(self, place: Place) -> Bool[np.ndarray, "pos unit"]:
        """By head or neuron; of other sites there is one unit, the whole."""
        if place not in self._by_place:
            site, layer = place
            differs = self.target.activations[place] != self.source.values[place]
            if site != "neuron":
                differs = differs.any(-1)
            if site == "z" and layer in self.source.head_shift:
                shifted = (self.source.head_shift[layer] != 0).any(-1)
                differs[-len(shifted) :] |= shifted
            self._by_place[place] = differs.reshape(len(differs), -1).cpu().numpy()
        return self._by_place[place]


def plan_passes(
    bridge: TransformerBridge,
    differences: Differences,
    patch_sets: Sequence[PatchSet],
    *,
    base: PatchSet,
    start: int | None,
) -> Iterator[Pass]:
    """Passes that together hold every patch set that can change anything.

    ``start`` computes every patch set from that position on, whether or not it can change anything.
    """
    target, layers = differences.target, bridge.cfg.n_layers
    groups = _by_start(differences, patch_sets, base, start)
    for first, asked in merged_groups(groups, call_tokens(bridge)).items():
        asked.sort(key=lambda i: _first_block(patch_sets[i], base, layers))
        length = target.length - first
        size = rows_at_once(bridge, suffix=length)
        if length <= PACKED:
            size = min(size, PACKED_TOKENS // length)
        for at in range(0, max(1, len(asked)), size):
            own = asked[at : at + size]
            sets = [patch_sets[i] for i in own]
            yield Pass(
                patch_sets=(base, *sets) if base or not sets else tuple(sets),
                asked=tuple(own),
                start=first,
                length=length,
                rows_in_block=_rows_in_block(sets, base, layers),
                packed=length <= PACKED and bool(target.keys_values),
            )


def merged_groups(groups: dict[int, list[int]], pass_tokens: int) -> dict[int, list[int]]:
    """Groups of rows by their first position, ascending; neighbours merged where that is cheaper.

    A pass of its own costs as much as ``pass_tokens`` tokens; joining an earlier group computes
    more positions of every row.
    """
    merged: dict[int, list[int]] = {}
    begun = 0
    for first, rows in groups.items():
        if not merged or len(rows) * (first - begun) > pass_tokens:
            begun = first
        merged.setdefault(begun, []).extend(rows)
    return merged


# ------------------------------------------------------------------------------------- internals
def _by_start(
    differences: Differences, patch_sets: Sequence[PatchSet], base: PatchSet, start: int | None
) -> dict[int, list[int]]:
    """First position that can change -> indices of patch sets, ascending; unchanged ones nowhere.

    A base that changes something needs a pass even if nothing else does.
    """
    if start is not None and not differences.target.keys_values:
        start = 0
    groups: dict[int, list[int]] = {}
    for i, patches in enumerate(patch_sets):
        first = differences.first_changed([*patches, *base]) if start is None else start
        if first is not None:
            groups.setdefault(first, []).append(i)
    if base and not groups and (first := differences.first_changed(base)) is not None:
        groups[first] = []
    return dict(sorted(groups.items()))


def _first_block(patches: PatchSet, base: PatchSet, layers: int) -> int:
    """The block in which a patch set first differs from the base; ``layers`` if in none."""
    return min((patch.layer for patch in patches ^ base), default=layers)


def _rows_in_block(sets: Sequence[PatchSet], base: PatchSet, layers: int) -> tuple[int, ...]:
    firsts = [_first_block(patches, base, layers) for patches in sets]
    base_rows = 1 if base or not sets else 0
    return tuple(
        max(1, base_rows + sum(first <= layer for first in firsts)) for layer in range(layers)
    )
