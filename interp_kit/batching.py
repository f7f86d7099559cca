"""How rows of token ids become forward passes: of one length, padded, or from a shared beginning.

Prompts of one scenario repeat most of their text: a template, a table, a situation in several
versions. Causal attention lets nothing that follows change a beginning, so its keys and values are
computed once for all rows that share it (``parts``), and a pass holds what is left of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from interp_kit.identity import state_of

Ids = tuple[int, ...]
KeysValues = tuple[Float[Tensor, "row head pos d_head"], Float[Tensor, "row head pos d_head"]]

PADDED_ROWS = 32  # texts of one padded batch
MAX_TOKENS = 8192  # tokens in one forward pass: bounds memory, not results
MAX_LOGITS = 2**25  # logits that are kept of one pass, likewise
# What calling the modules and hooks of one block costs, in what the device computes meanwhile:
# measured on one core (positions x layers of 8 blocks: best of 0 to 1e8), and not on the others,
# which are taken to be so much faster.
CALL_FLOPS = {"cpu": 2e7, "cuda": 2e10, "mps": 2e9}


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rows ``index`` of a list, in one pass, but for the beginning that they share.

    ``tokens`` is what follows the beginning, padded at the right; ``lengths`` how much of each row
    is real. ``before`` are keyword arguments of the pass: keys and values of the beginning.
    """

    index: list[int]
    tokens: Int[Tensor, "row pos"]
    lengths: Int[Tensor, "row"]
    before: dict[str, Any]

    def last(self, x: Float[Tensor, "row pos *_"], read: int) -> Float[Tensor, "row read *_"]:
        """Of each row its last ``read`` positions; before its first one, that one again."""
        device = self.lengths.device
        at = (self.lengths[:, None] - torch.arange(read, 0, -1, device=device)).clamp(min=0)
        return x[torch.arange(len(x), device=device)[:, None], at]


def parts(
    bridge: TransformerBridge, rows: Sequence[Sequence[int]], *, read: Sequence[int]
) -> Iterator[Part]:
    """Passes that together hold the end of every row: its last ``read`` positions, or more.

    Beginnings are computed apart where that spares work. Not where attention looks ahead, where a
    block keeps more than keys and values, or while anything else takes part in passes that might
    treat positions differently, such as a hook.
    """
    alone = set(range(len(rows)))
    if resumable(bridge) and state_of(bridge) is not None:
        ends = [len(row) - n for row, n in zip(rows, read)]
        for index, length in shared_beginnings(rows, ends, call_tokens(bridge)):
            beginning = torch.tensor([list(rows[index[0]][:length])], device=bridge.cfg.device)
            keys_values = cached(bridge, beginning)
            before = {"past_key_values": shared_prefix(keys_values)}
            yield from _padded_parts(bridge, rows, index, length, before)
            alone -= set(index)
    yield from _padded_parts(bridge, rows, sorted(alone), 0, {})


def shared_beginnings(
    rows: Sequence[Sequence[int]], ends: Sequence[int], pass_tokens: int
) -> list[tuple[list[int], int]]:
    """Groups of rows, and how many first tokens all of a group share.

    At most ``ends[i]`` tokens of row i count. Rows stand together where most tokens are spared; a
    group spares more than two passes cost, each as much as ``pass_tokens`` tokens. Rows in no group
    share too little.
    """
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i][: ends[i]]))
    groups: list[tuple[list[int], int]] = []
    for i in order:
        if groups:
            index, length = groups[-1]
            joint = common_beginning(rows[index[0]][:length], rows[i][: ends[i]])
            if joint and len(index) * joint >= (len(index) - 1) * length:
                groups[-1] = [*index, i], joint
                continue
        groups.append(([i], ends[i]))
    return [own for own in groups if (len(own[0]) - 1) * own[1] > 2 * pass_tokens]


@torch.no_grad()
def cached(bridge: TransformerBridge, tokens: Int[Tensor, "row pos"]) -> list[KeysValues]:
    """Keys and values of every layer for these tokens."""
    cache: Any = DynamicCache()
    bridge.run_with_hooks(
        tokens,
        fwd_hooks=[("unembed.hook_in", lambda x, hook: x[:, -1:].contiguous())],
        past_key_values=cache,
    )
    return [(layer.keys, layer.values) for layer in cache.layers]


def shared_prefix(keys_values: Iterable[KeysValues]) -> DynamicCache:
    """A cache of these keys and values, [row head pos d_head] of each layer.

    Any multiple of their rows may attend to them, each in its turn, and none adds to them.
    """
    cache: Any = DynamicCache()  # no config: layers of full length; masks keep the window
    cache.layers = [_Prefix(keys, values) for keys, values in keys_values]
    return cache


def before_layer(cache: DynamicCache | None, layer: int) -> dict[str, Tensor]:
    """``keys`` and ``values`` that a cache holds for a layer; nothing where it holds none."""
    held: Any = cache.layers[layer] if cache and len(cache.layers) > layer else None
    if held is None or not held.is_initialized:
        return {}
    return {"keys": held.keys, "values": held.values}


def adds_nothing(cache: DynamicCache | None, layer: int) -> bool:
    """Whether a pass leaves the cache's layer as it is: there is no cache, or a shared prefix."""
    return cache is None or (len(cache.layers) > layer and isinstance(cache.layers[layer], _Prefix))


def looks_back_only(bridge: TransformerBridge) -> bool:
    """Whether no position attends to a later one, so that a prefix can be computed once."""
    return getattr(bridge.cfg, "attention_dir", "causal") == "causal"


def resumable(bridge: TransformerBridge) -> bool:
    """Whether keys and values are all that later positions take from earlier ones."""
    kinds = getattr(getattr(bridge.original_model, "config", None), "layer_types", None) or ()
    known = {"full_attention", "sliding_attention"}
    with_attention = all(hasattr(block, "attn") for block in bridge.blocks)
    return looks_back_only(bridge) and with_attention and set(kinds) <= known


def call_tokens(bridge: TransformerBridge) -> int:
    """How many tokens cost as much as calling the modules and hooks of a pass."""
    cfg, device = bridge.cfg, torch.device(bridge.cfg.device or "cpu")
    weights = cfg.d_model * (4 * cfg.d_model + 3 * (cfg.d_mlp or 4 * cfg.d_model))
    return int(CALL_FLOPS.get(device.type, CALL_FLOPS["cpu"]) / (2 * weights))


def common_beginning(first: Sequence[int], second: Sequence[int]) -> int:
    """How many first tokens are the same."""
    pairs = enumerate(zip(first, second))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def chunks(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of rows as they stand, some at a time: at most ``MAX_TOKENS`` together."""
    chunk: list[int] = []
    for i, row in enumerate(rows):
        if chunk and sum(len(rows[k]) for k in chunk) + len(row) > MAX_TOKENS:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


def batches(shapes: Sequence[tuple[int, object]]) -> Iterator[list[int]]:
    """Indices of items of equal shape ``(length, anything)``, at most ``MAX_TOKENS`` at once."""
    for shape in dict.fromkeys(shapes):
        same = [i for i, other in enumerate(shapes) if other == shape]
        size = max(1, MAX_TOKENS // shape[0])
        yield from (same[i : i + size] for i in range(0, len(same), size))


def padded_batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Which rows go into one padded batch, by their index: those of nearly one length.

    At most ``PADDED_ROWS`` rows and ``MAX_TOKENS`` positions; no row is padded by more than a
    quarter of its length and 16 positions.
    """
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        length = len(rows[i])
        if batch and (
            len(batch) == PADDED_ROWS
            or length * (len(batch) + 1) > MAX_TOKENS
            or length > 1.25 * len(rows[batch[0]]) + 16
        ):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def logit_batches(rows: Sequence[Sequence[int]], vocabulary: int) -> Iterator[list[int]]:
    """``padded_batches`` of which the logits at every position fit: at most ``MAX_LOGITS``."""
    for index in padded_batches(rows):
        size = max(1, MAX_LOGITS // (vocabulary * max(len(rows[i]) for i in index)))
        yield from (index[i : i + size] for i in range(0, len(index), size))


def padded(
    rows: Sequence[Sequence[int]], device: Any
) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
    """Token ids, padded at the right where a causal model cannot see it; which are real."""
    tokens = pad_sequence([torch.tensor(list(row)) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    return tokens.to(device), inside.to(device)


# ------------------------------------------------------------------------------------- internals
def _padded_parts(
    bridge: TransformerBridge,
    rows: Sequence[Sequence[int]],
    index: Sequence[int],
    start: int,
    before: dict[str, Any],
) -> Iterator[Part]:
    tails = [rows[i][start:] for i in index]
    for batch in padded_batches(tails):
        tokens, inside = padded([tails[k] for k in batch], bridge.cfg.device)
        own = [index[k] for k in batch]
        yield Part(index=own, tokens=tokens, lengths=inside.sum(1), before=before)


class _Prefix(DynamicLayer):
    """Keys and values of one layer and a prefix that rows attend to and none adds to."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._prefix = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._before(0, key_states), self._before(1, value_states)

    def _before(self, which: int, states: Tensor) -> Tensor:
        kept = self._prefix[which]
        times = len(states) // len(kept)
        return torch.cat([kept.expand(times, *kept.shape).flatten(0, 1), states], -2)
