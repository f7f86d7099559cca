"""Write into the residual stream while a model runs: add a direction, remove one, replace a value.

An operator maps the stream to what is written in its place. It is a plain function of the stream at
the positions that are written to, so operators compose as functions do:

    add(v, s)          h + s ||h|| v
    shift(w)           h + w                   the same vector everywhere, of its own length
    remove(v, r)       h - ((h - r) . v) v     the part along v becomes that of the reference r
    replace(u)         ||h|| u                 the norm stays, the direction is given

with unit vectors v and u (whatever length they are given with). ``intervene`` installs operators
after blocks for as long as its context lasts.

Sources: Turner et al., "Activation Addition", arXiv:2308.10248 (add); Arditi et al., "Refusal in
Language Models Is Mediated by a Single Direction", arXiv:2406.11717 (remove); Ghandeharioun et
al., "Patchscopes", arXiv:2401.06102 (replace).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

Stream = Float[Tensor, "row pos d_model"]
Operator = Callable[[Tensor], Tensor]  # Stream -> Stream
Direction = Float[Tensor, "d_model"]


def add(direction: Direction, strength: float) -> Operator:
    """h + ``strength`` ||h|| v: in units of the stream's own norm at each position."""
    unit = direction / direction.norm()
    return lambda h: h + strength * h.norm(dim=-1, keepdim=True) * unit.to(h)


def shift(vector: Direction) -> Operator:
    """h + w: as it is, whatever the stream's norm; what llama.cpp's control vectors do."""
    return lambda h: h + vector.to(h)


def remove(
    direction: Direction, reference: Float[Tensor, "*row d_model"] | None = None
) -> Operator:
    """h - ((h - r) . v) v: along v the stream becomes what the ``reference`` r is there.

    r is one vector (a mean, for example), or one for each row; without it, zero.
    """
    unit = direction / direction.norm()

    def operator(h: Stream) -> Stream:
        v = unit.to(h)
        beyond = h if reference is None else h - reference.to(h).unsqueeze(-2)
        return h - (beyond @ v)[..., None] * v

    return operator


def replace(values: Float[Tensor, "*row d_model"]) -> Operator:
    """||h|| u, where u is the unit vector along ``values``: one for all rows, or one for each."""
    unit = (values / values.norm(dim=-1, keepdim=True)).unsqueeze(-2)
    return lambda h: unit.to(h) * h.norm(dim=-1, keepdim=True)


@contextmanager
def intervene(
    bridge: TransformerBridge,
    operators: Mapping[int, Operator],
    *,
    at: Int[Tensor, "row"] | int | Literal["all"] | None = None,
) -> Iterator[TransformerBridge]:
    """The bridge with each operator applied to what its block writes to the stream.

    The operator of block l changes ``blocks.l.hook_resid_post``. ``at`` is one position of all
    rows (-1: the last of the batch), one for each row, or "all"; by default it is every position
    but 0, which many models use as an attention sink. Whatever runs inside is changed. While text
    is generated with a key-value cache, the default, "all" and -1 write at every new position,
    other named positions only once. Nothing is edited in place; on leaving, also after an error,
    the hooks are gone.
    """
    hooks = [
        (f"blocks.{layer}.hook_resid_post", _hook(operator, at))
        for layer, operator in operators.items()
    ]
    with bridge.hooks(fwd_hooks=hooks):
        yield bridge


# ------------------------------------------------------------------------------------- internals
def _hook(
    operator: Operator, at: Int[Tensor, "row"] | int | Literal["all"] | None
) -> Callable[..., Tensor]:
    def all_but_first(x: Stream, hook: object) -> Stream:
        # With a key-value cache a later step holds one position, which is not position 0.
        return operator(x) if x.shape[1] == 1 else torch.cat([x[:, :1], operator(x[:, 1:])], 1)

    def at_positions(x: Stream, hook: object) -> Stream:
        pos = torch.as_tensor(at, device=x.device).expand(len(x))
        pos = torch.where(pos < 0, pos + x.shape[1], pos)
        here = (torch.arange(x.shape[1], device=x.device) == pos[:, None])[..., None]
        own = x.gather(1, pos.clamp(max=x.shape[1] - 1)[:, None, None].expand(-1, 1, x.shape[2]))
        # With a key-value cache a later step does not hold the position: nothing is written.
        return torch.where(here, operator(own), x)

    if isinstance(at, str):
        return lambda x, hook: operator(x)
    return all_but_first if at is None else at_positions
