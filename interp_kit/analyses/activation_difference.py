"""Activation difference lens (ADL): traces of fine-tuning on text unrelated to it.

delta = h_tuned - h_base, the residual stream on the same neutral tokens, after every block and at
every position. Position 0 is special in most models and the next few carry the clearest traces,
so the first positions are kept apart; "rest" is the mean over all later ones.

Sources: Minder et al., "Narrow Finetuning Leaves Clearly Readable Traces in Activation
Differences", arXiv:2510.13900; Ghandeharioun et al., "Patchscopes", arXiv:2401.06102.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.decisions import last_logits, losses
from interp_kit.interventions import add, intervene, remove, replace
from interp_kit.passes import residual_stream, resumed
from interp_kit.readout import norm_scale, through_frozen_norm
from interp_kit.specs import InputError

REST = "rest"
Streams = Float[Tensor, "text pos layer d_model"]
BySlot = Float[Tensor, "slot layer d_model"]


def first_tokens(rows: Sequence[Sequence[int]], n_positions: int) -> Int[Tensor, "text pos"]:
    """The first ``n_positions`` tokens of every text that has as many.

    Raises ``InputError`` if fewer than two texts have.
    """
    long = [list(row[:n_positions]) for row in rows if len(row) >= n_positions]
    if len(long) < 2:
        raise InputError(
            f"{len(long)} of {len(rows)} texts have {n_positions} tokens; give longer texts, or "
            "ask for fewer positions"
        )
    return torch.tensor(long)


@torch.no_grad()
def streams(bridge: TransformerBridge, tokens: Int[Tensor, "text pos"]) -> Streams:
    """The residual stream after every block at every position, float32."""
    kept = residual_stream(bridge, tokens.tolist(), tokens.shape[1])[1:]
    return torch.einsum("l t p d -> t p l d", kept).float().cpu()


def slots(n_positions: int, first: int) -> list[str]:
    """The positions that are kept apart, by number, and the rest."""
    return [*map(str, range(first)), *([REST] if n_positions > first else [])]


def by_slot(values: Streams, first: int) -> BySlot:
    """Mean over texts at each of the ``first`` positions, and over texts and later positions."""
    mean = values.mean(0)
    rest = [mean[first:].mean(0, keepdim=True)] if len(mean) > first else []
    return torch.cat([mean[:first], *rest])


def difference_norms(base: Streams, tuned: Streams, *, first: int) -> pd.DataFrame:
    """||delta|| of every text by slot and layer: ``prompt slot layer value relative``.

    ``relative`` is divided by the norm of the base's stream there; prompts are texts, by number.
    """
    norm, scale = (tuned - base).norm(dim=-1), base.norm(dim=-1)
    text, pos, layer = np.indices(norm.shape)
    names = np.array([*map(str, range(first)), *[REST] * (norm.shape[1] - first)])
    table = pd.DataFrame(
        {
            "prompt": text.ravel(),
            "slot": names[pos.ravel()],
            "layer": layer.ravel(),
            "value": norm.flatten().numpy(),
            "relative": (norm / scale).flatten().numpy(),
        }
    )
    keys = ["prompt", "slot", "layer"]
    return pd.DataFrame(table.groupby(keys, sort=False)[["value", "relative"]].mean()).reset_index()


def difference_lens(
    bridge: TransformerBridge, base: BySlot, delta: BySlot
) -> Float[Tensor, "slot layer vocab"]:
    """What delta adds to every logit: through the final norm, its scale held at the base's.

    Linear in delta, before any soft cap.
    """
    device = bridge.cfg.device
    scale = norm_scale(bridge, "ln_final", base.to(device))
    normed = through_frozen_norm(bridge, "ln_final", delta.to(device), scale)
    return (normed @ bridge.W_U.float()).cpu()


@torch.no_grad()
def patchscope(
    bridge: TransformerBridge,
    prompt: Sequence[int],
    directions: Float[Tensor, "row d_model"],
    *,
    layer: int,
) -> Float[Tensor, "row vocab"]:
    """Next-token log-probabilities of an inspection prompt whose last position is overwritten.

    After block ``layer`` the stream there becomes each direction, at the norm that it had.
    """
    tokens = torch.tensor([list(prompt)] * len(directions), device=bridge.cfg.device)
    with intervene(bridge, {layer: replace(directions)}, at=-1):
        logits = bridge(tokens)
    return logits[:, -1].float().log_softmax(-1).cpu()


@torch.no_grad()
def steered_relevance(
    bridge: TransformerBridge,
    tokens: Int[Tensor, "text pos"],
    directions: Float[Tensor, "row d_model"],
    log_odds: Float[np.ndarray, "vocab"],
    *,
    layer: int,
    strength: float,
) -> Float[np.ndarray, "row"]:
    """Expected log-odds z of the next token with each direction added, less without.

    ``strength`` ||h|| of the unit direction is added at every position but 0, after ``layer``;
    read at the last position, mean over texts.
    """
    z = torch.tensor(log_odds, dtype=torch.float32)

    def expected() -> float:
        return float((last_logits(bridge, tokens, 1)[:, 0].float().softmax(-1).cpu() @ z).mean())

    steered = []
    with resumed(bridge, layer):
        without = expected()
        for direction in directions:
            with intervene(bridge, {layer: add(direction, strength)}):
                steered.append(expected())
    return np.array(steered) - without


@torch.no_grad()
def loss_without(
    bridge: TransformerBridge,
    rows: Sequence[Sequence[int]],
    directions: Float[Tensor, "row d_model"],
    base_mean: Float[Tensor, "d_model"],
    *,
    layer: int,
) -> Float[np.ndarray, "row text"]:
    """Change of each text's loss (nats a token) with each direction removed; > 0: it was needed.

    After ``layer``, at every position but 0, the stream's part along the direction becomes what it
    is on average in the base.
    """
    changes = []
    with resumed(bridge, layer):
        before = losses(bridge, rows)
        for direction in directions:
            with intervene(bridge, {layer: remove(direction, base_mean)}):
                changes.append(losses(bridge, rows) - before)
    return torch.stack(changes).numpy()
