"""Many edits of the stream at the last position of prompts, in one pass.

Causal attention lets such an edit change nothing before that position. So the keys and values
before it are computed once, and a pass holds one position for each prompt and edit. Edits join it
after the first block that they change. Prompts of several lengths share a pass: what comes before
is aligned at its end, and a mask hides the rest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.batching import (
    MAX_TOKENS,
    Ids,
    cached,
    looks_back_only,
    padded,
    padded_batches,
    shared_prefix,
)
from interp_kit.interventions import Operator
from interp_kit.passes import once
from interp_kit.patching.recording import Hooks
from interp_kit.prompts import Prompt
from interp_kit.specs import InputError

Edit = Mapping[int, Operator]  # by layer, of the stream at the last position
EDITED_ROWS = 512  # of a pass: bounds memory, not results


@torch.no_grad()
def edited_end_probability(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    edits: Callable[[list[int]], Sequence[Edit]],
    end: int,
    *,
    suffix: int | None = None,
) -> Float[Tensor, "edit prompt"]:
    """p(end token) after each prompt, and the suffix, with each edit of the last position.

    ``edits`` are those of some prompts, by their index. What comes before the last position is the
    same for all of them: it is computed once. Raises ``InputError`` where attention looks ahead,
    so that this does not hold.
    """
    if not looks_back_only(bridge):
        raise InputError(
            "expected causal attention: where it looks ahead, an edit of the last position changes "
            "what comes before it"
        )
    columns: dict[int, Tensor] = {}
    for index in padded_batches([p.tokens for p in prompts]):
        rows = [prompts[i].tokens for i in index]
        last = [row[-1] if suffix is None else suffix for row in rows]
        before = [row[:-1] if suffix is None else row for row in rows]
        positions = len(rows) * len(rows[-1])
        size = max(1, min(EDITED_ROWS // len(rows), 16 * MAX_TOKENS // positions))
        each = edits(index)
        parts = [
            _edited(bridge, before, last, each[at : at + size]).float().softmax(-1)[..., end].cpu()
            for at in range(0, len(each), size)
        ]
        columns |= dict(zip(index, torch.cat(parts).T))
    return torch.stack([columns[i] for i in range(len(prompts))], 1)


# ------------------------------------------------------------------------------------- internals
def _edited(
    bridge: TransformerBridge,
    before: Sequence[Ids],
    last: Sequence[int],
    edits: Sequence[Edit],
) -> Float[Tensor, "edit prompt vocab"]:
    """Logits at the last position with each edit of the stream there.

    The pass begins with the prompts unedited. An edit's rows, one for each prompt, are copied from
    them after the first block that it edits, since nothing differs before.
    """
    device, n = bridge.cfg.device, len(last)
    order = sorted(range(len(edits)), key=lambda i: min(edits[i]))
    begin = [min(edits[i]) for i in order]

    def after(layer: int) -> Callable[..., Tensor]:
        def write(x: Tensor, hook: object) -> Tensor:
            new = x[:n].repeat(begin.count(layer), 1, 1)
            first, *others = torch.cat([x, new]).split(n)
            own = (edits[i].get(layer) for i in order)
            written = [h if edit is None else edit(h) for h, edit in zip(others, own)]
            return torch.cat([first, *written])

        return write

    layers = range(bridge.cfg.n_layers)
    hooks: Hooks = [(f"blocks.{layer}.hook_resid_post", after(layer)) for layer in layers]
    hooks.append(("unembed.hook_in", lambda x, hook: x[n:].contiguous()))
    lengths = torch.tensor([len(row) for row in before], device=device)[:, None]
    longest = int(lengths.max())
    seen = torch.arange(longest + 1, device=device) >= longest - lengths
    with _repeated_inputs(bridge, n):
        logits = bridge.run_with_hooks(
            torch.tensor(last, device=device)[:, None],
            fwd_hooks=hooks,
            attention_mask=seen.long(),
            position_ids=lengths,
            past_key_values=shared_prefix(_keys_values(bridge, before)),
        )
    return logits.unflatten(0, (-1, n))[torch.tensor(order).argsort(), :, 0]


def _keys_values(bridge: TransformerBridge, rows: Sequence[Ids]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, [row head pos d_head], every row's last at the end.

    Before a row's first position its first stands; a mask has to hide it.
    """

    def compute() -> list[tuple[Tensor, Tensor]]:
        tokens, inside = padded(rows, bridge.cfg.device)
        length = tokens.shape[1]
        at = torch.arange(length, device=tokens.device) - (length - inside.sum(1))[:, None]
        at = at.clamp(min=0)[:, None, :, None]

        def aligned(x: Tensor) -> Tensor:
            return x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3]))

        return [(aligned(keys), aligned(values)) for keys, values in cached(bridge, tokens)]

    key = "keys and values", tuple(rows)
    return once(bridge, key, compute, lambda made: sum(k.nbytes + v.nbytes for k, v in made))


@contextmanager
def _repeated_inputs(bridge: TransformerBridge, rows: int) -> Iterator[None]:
    """Inside, a block that gets a multiple of ``rows`` rows gets masks and angles as often."""

    def repeat(module: object, args: Any, kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        times = len(x) // rows

        def repeated(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(repeated, value))
            if isinstance(value, Tensor) and value is not x and len(value) == rows:
                return value.repeat(times, *[1] * (value.ndim - 1))
            return value

        return tuple(map(repeated, args)), {name: repeated(v) for name, v in kwargs.items()}

    with ExitStack() as stack:
        for block in bridge.blocks:
            handle = block.register_forward_pre_hook(repeat, with_kwargs=True)
            stack.callback(handle.remove)
        yield
