"""How the rows of a pass stand beside each other: as a growing batch, or as one sequence.

Either way a block computes only the rows that have begun to differ; the next block adds copies of
row 0 (or of the unpatched run) for those that first differ in it. Rows of many tokens are a batch.
Rows of few tokens are positions of one sequence, under a mask that lets each see the prefix and
itself: so the prefix's keys and values, which are most of the work then, are never copied.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.patching.plan import Pass
from interp_kit.patching.recording import Hooks

Stream = Sequence[Float[Tensor, "pos d_model"]]  # what enters each block of the unpatched run


def growing_batch(planned: Pass, stream: Stream) -> Hooks:
    """Every block that rows enter appends row 0 for them, or the unpatched run without a base."""
    before = [1, *planned.rows_in_block]
    return [
        (
            f"blocks.{layer}.hook_in",
            _append(rows - before[layer], _unpatched(planned, stream, layer)),
        )
        for layer, rows in enumerate(planned.rows_in_block)
        if rows > before[layer]
    ]


@contextmanager
def one_sequence(bridge: TransformerBridge, planned: Pass, stream: Stream) -> Iterator[None]:
    """Inside, blocks get all rows as positions of one sequence: [1 row * pos d_model]."""
    mask = _TreeMask(planned)
    with ExitStack() as stack:
        for layer, (block, rows) in enumerate(zip(bridge.blocks, planned.rows_in_block)):
            pack = _packing(block, rows, planned.length, mask, _unpatched(planned, stream, layer))
            handle = block.register_forward_pre_hook(pack, with_kwargs=True)
            stack.callback(handle.remove)
        yield


# ------------------------------------------------------------------------------------- internals
def _unpatched(planned: Pass, stream: Stream, layer: int) -> Tensor | None:
    """What new rows begin as; ``None`` for copies of row 0, which has the base's patches."""
    return None if planned.has_base_row else stream[layer][planned.start :]


def _append(n: int, unpatched: Tensor | None) -> Callable[..., Tensor]:
    def append(x: Tensor, hook: object) -> Tensor:
        new = x[:1] if unpatched is None else unpatched[None]
        return torch.cat([x, new.expand(n, *x.shape[1:])])

    return append


def _packing(
    block: Any, rows: int, length: int, mask: "_TreeMask", unpatched: Tensor | None
) -> Callable[..., Any]:
    """A forward pre-hook by which ``block`` gets ``rows`` rows as one sequence.

    Rows keep their positions: rotary angles and position ids are those of one row, repeated.
    """
    names = list(inspect.signature(block.original_component.forward).parameters)

    def pack(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(names, args)), **kwargs}  # GPT-2 passes its mask by position
        x = given.pop(names[0]).unflatten(1, (-1, length))
        new = x[:, :1] if unpatched is None else unpatched[None, None]
        new = new.expand(-1, rows - x.shape[1], -1, -1)
        given["attention_mask"] = mask.of(given.get("attention_mask"), rows, x)
        if (positions := given.get("position_ids")) is not None:
            given["position_ids"] = positions.repeat(1, rows)
        if (angles := given.get("position_embeddings")) is not None:
            given["position_embeddings"] = tuple(a.repeat(1, rows, 1) for a in angles)
        return (torch.cat([x, new], 1).flatten(1, 2),), given

    return pack


class _TreeMask:
    """Attention masks by which every row sees the prefix and itself, and no other row.

    One is made for each mask that the model has (Gemma-2 has two), and cut to the rows of a block.
    """

    def __init__(self, planned: Pass) -> None:
        self.rows, self.length, self.start = planned.rows, planned.length, planned.start
        self._whole: dict[int, Tensor] = {}

    def of(self, mask: Tensor | None, rows: int, like: Tensor) -> Tensor:
        """The mask of the first ``rows`` rows, from the model's own ``mask`` of one row."""
        if id(mask) not in self._whole:
            self._whole[id(mask)] = self._of_all_rows(self._causal(like) if mask is None else mask)
        seen = rows * self.length
        return self._whole[id(mask)][:, :, :seen, : self.start + seen]

    def _of_all_rows(self, mask: Tensor) -> Tensor:
        length, start, rows = self.length, self.start, self.rows
        blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        whole = mask.new_full((1, 1, rows * length, start + rows * length), blocked)
        whole[..., :start] = mask[..., :start].repeat(1, 1, rows, 1)
        for row in range(rows):
            at = row * length
            whole[..., at : at + length, start + at : start + at + length] = mask[..., start:]
        return whole

    def _causal(self, like: Tensor) -> Tensor:
        """What the model means where it passes no mask: every earlier position."""
        allowed = torch.ones(self.length, self.start + self.length, device=like.device)
        allowed = allowed.tril(self.start).bool()
        lowest = torch.finfo(like.dtype).min
        mask = torch.zeros_like(allowed, dtype=like.dtype).masked_fill(~allowed, lowest)
        return mask[None, None]
