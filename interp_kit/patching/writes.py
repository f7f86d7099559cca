"""The hooks that write the source's activations into the rows of a pass.

``writing_hooks`` makes one write for each place, of all rows that have a patch there. A hook gets a
batch or a packed sequence alike: both are seen as [row pos ...]. It writes on a copy, since the
model may still need what it passed in.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool
from torch import Tensor

from interp_kit.patching.patches import HOOKS, Patch, Place
from interp_kit.patching.plan import Pass
from interp_kit.patching.recording import Hooks, SourceValues

SITES = list(HOOKS)


def writing_hooks(planned: Pass, source: SourceValues) -> Hooks:
    """Hooks for every patch of every row, in the order in which a pass reaches their places."""
    patches: dict[Place, list[tuple[int, Patch]]] = {}
    for row, patch_set in enumerate(planned.patch_sets):
        for patch in patch_set:
            if row < planned.rows_in_block[patch.layer]:
                patches.setdefault(patch.place, []).append((row, patch))
    hooks: Hooks = []
    for site, layer in sorted(patches, key=lambda place: (place[1], SITES.index(place[0]))):
        write = _write(planned, source.values[site, layer], patches[site, layer])
        if site == "resid_mid":
            hooks += _write_resid_mid(write, layer)
        elif site == "z" and layer in source.head_shift:
            hooks += _write_head_outputs(write, layer, source.head_shift[layer])
        else:
            hooks.append((HOOKS[site].format(layer), write.hook))
    return hooks


# ------------------------------------------------------------------------------------- internals
@dataclass(frozen=True, kw_only=True, repr=False)  # TransformerLens takes the repr of every hook
class _Write:
    """What is written at one place: ``values`` [pos ...] into ``rows`` where ``mask`` says so."""

    rows: list[int]
    mask: Bool[Tensor, "row pos unit"]  # by head or neuron; of other sites one unit is the whole
    values: Tensor
    length: int

    def by_row(self, x: Tensor) -> Tensor:
        """A batch or a packed sequence as [row pos ...]; z as [row pos head d_head]."""
        each = self.values.shape[1:] if self.values.ndim == 3 else x.shape[2:]
        return x.reshape(-1, self.length, *each)

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """``x`` with ``values`` [pos ...] or [row pos ...] in the rows."""
        mask = self.mask[..., None] if self.values.ndim == 3 else self.mask
        before = self.by_row(x)
        after = before.clone()
        after[self.rows] = torch.where(mask, values, before[self.rows])
        return after.view_as(x)

    def hook(self, x: Tensor, hook: object) -> Tensor:
        return self.put(x, self.values)


def _write_head_outputs(write: _Write, layer: int, head_shift: Tensor) -> Hooks:
    """Writes z, and after the output projection what the source's projection adds to it."""
    tail = min(len(head_shift), write.length)
    gained = head_shift[-tail:]
    here = write.mask[:, -tail:].to(gained.dtype)
    sums = einsum(here, gained, "row pos head, pos head d_model -> row pos d_model")

    def shift(x: Tensor, hook: object) -> Tensor:
        shifted = x.reshape(-1, write.length, x.shape[-1]).clone()
        shifted[write.rows, -tail:] = shifted[write.rows, -tail:] + sums
        return shifted.view_as(x)

    return [
        (HOOKS["z"].format(layer), write.hook),
        (f"blocks.{layer}.attn.o.hook_out", shift),
    ]


def _write_resid_mid(write: _Write, layer: int) -> Hooks:
    """The residual stream between attention and MLP is no module's output.

    So attention's output becomes what is missing to the source's value there.
    """
    entered: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: object) -> None:
        entered["stream"] = x

    def complete(x: Tensor, hook: object) -> Tensor:
        return write.put(x, write.values - write.by_row(entered["stream"])[write.rows])

    return [
        (HOOKS["resid_pre"].format(layer), keep),
        (HOOKS["attn_out"].format(layer), complete),
    ]


def _write(planned: Pass, values: Tensor, patches: list[tuple[int, Patch]]) -> _Write:
    """``patches`` are (row, patch) of one place; ``values`` those of all positions there."""
    site = patches[0][1].site
    units = values.shape[1] if site in ("z", "neuron") else 1
    rows = sorted({row for row, _ in patches})
    index = {row: i for i, row in enumerate(rows)}
    mask = np.zeros((len(rows), planned.length, units), dtype=bool)
    for row, patch in patches:
        unit: Any = slice(None) if patch.unit is None else patch.unit
        at: Any = slice(None)
        if patch.positions is not None:
            at = [pos - planned.start for pos in patch.positions if pos >= planned.start]
        mask[index[row], at, unit] = True
    return _Write(
        rows=rows,
        mask=torch.from_numpy(mask).to(values.device),
        values=values[planned.start :],
        length=planned.length,
    )
