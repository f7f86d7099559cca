"""Sampling the continuations of many beginnings in one batch, however long each of them is.

All rows begin with as many tokens as the shortest has. At each step a row whose beginning goes on
takes its next given token, any other row a drawn one: so no row is padded, and keys and values of
all are computed once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from interp_kit.specs import InputError

# Takes tokens that follow those of earlier calls; gives the logits after the last of them.
Predict = Callable[[Int[Tensor, "row new"]], Float[Tensor, "row vocab"]]
ROWS = 256  # rows of one batch


def sampled_rows(
    begin: Callable[[], Predict],
    begun: Sequence[Sequence[int]],
    *,
    length: int,
    end: int | None,
    seed: int,
) -> list[tuple[int, ...]]:
    """Each beginning with what is drawn after it at temperature 1, in their order.

    ``length`` tokens at most, to the first drawn ``end``, which is kept. ``begin()`` starts a batch
    with empty caches. The draws are those of ``seed``; no global random state is touched.
    """
    draws = torch.Generator().manual_seed(seed)
    made: dict[int, tuple[int, ...]] = {}
    order = sorted(range(len(begun)), key=lambda i: len(begun[i]))
    for at in range(0, len(order), ROWS):
        index = order[at : at + ROWS]
        rows = _batch(begin(), [begun[i] for i in index], length, end, draws)
        made |= dict(zip(index, rows))
    return [made[i] for i in range(len(begun))]


def predicting(bridge: TransformerBridge) -> Predict:
    """The bridge's own next-token logits, with a cache of keys and values that begins empty."""
    cache: Any = DynamicCache()

    @torch.no_grad()
    def predict(tokens: Int[Tensor, "row new"]) -> Float[Tensor, "row vocab"]:
        logits = bridge.run_with_hooks(
            tokens.to(bridge.cfg.device),
            fwd_hooks=[("unembed.hook_in", lambda x, hook: x[:, -1:].contiguous())],
            past_key_values=cache,
        )
        return logits[:, -1].float().cpu()

    return predict


def check_context(bridge: TransformerBridge, begun: Sequence[Sequence[int]], length: int) -> None:
    """Raise ``InputError`` where a beginning and ``length`` more tokens exceed the context."""
    longest = max(map(len, begun))
    if longest + length > bridge.cfg.n_ctx:
        raise InputError(
            f"a beginning of {longest} tokens and {length} more do not fit into the model's "
            f"context of {bridge.cfg.n_ctx}; ask for fewer"
        )


# ------------------------------------------------------------------------------------- internals
def _batch(
    predict: Predict,
    begun: Sequence[Sequence[int]],
    length: int,
    end: int | None,
    draws: torch.Generator,
) -> list[tuple[int, ...]]:
    given = [len(row) for row in begun]
    last = [n + length for n in given]  # where each row's own length is reached
    rows = [list(row[: min(given)]) for row in begun]
    new, ended = torch.tensor(rows), [False] * len(rows)
    for at in tqdm(range(min(given), max(last)), desc="writing", unit="token", leave=False):
        drawn = torch.multinomial(predict(new).softmax(-1), 1, generator=draws)[:, 0].tolist()
        for i, (row, token) in enumerate(zip(rows, drawn)):
            known = at < given[i]
            row.append(int(begun[i][at]) if known else token)
            ended[i] |= at + 1 >= last[i] or (not known and token == end)
        if all(ended):
            break
        new = torch.tensor([row[-1:] for row in rows])
    return [_to_end(row[:n], start, end) for row, n, start in zip(rows, last, given)]


def _to_end(row: list[int], begun: int, end: int | None) -> tuple[int, ...]:
    drawn = row[begun:]
    return tuple(row[: begun + drawn.index(end) + 1] if end in drawn else row)
