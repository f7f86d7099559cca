"""Many short patched runs as one sequence, under a tree mask."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Tree:
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
