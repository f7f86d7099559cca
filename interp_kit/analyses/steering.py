"""Add a direction to the residual stream, or remove one: does the behaviour follow?

``steered`` adds strength ||h|| v after one block at every position but 0, in units of the stream's
own norm there; whatever runs inside is steered: one decision, a grid of them, generated text.
``add_direction`` does the same at each prompt's last position alone. ``ablate_directions`` takes
back what a suffix changed along v, at the suffix's position, after the given blocks:

    h - ((h - h_without) . v) v

The control is random directions, added with the same strength. The operators are those of
``interventions``.

Sources: Turner et al., "Activation Addition", arXiv:2308.10248; Rimsky et al., "Steering Llama 2
via Contrastive Activation Addition", arXiv:2312.06681; Arditi et al., "Refusal in Language Models
Is Mediated by a Single Direction", arXiv:2406.11717 (directional ablation).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise, product
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.batching import batches, padded
from interp_kit.decisions import decide, generated
from interp_kit.interventions import Direction, add, intervene, remove
from interp_kit.passes import resumed
from interp_kit.patching.last_position import Edit, edited_end_probability
from interp_kit.prompts import Prompt, special_token

Directions = Float[Tensor, "layer d_model"]  # one for each layer


def random_directions(
    n: int, streams: Float[Tensor, "row d_model"], *, seed: int = 0
) -> Float[Tensor, "n d_model"]:
    """``n`` unit vectors, in turn with the covariance of ``streams`` and isotropic.

    The former are random sums of the streams' deviations from their mean. A trained model's stream
    varies along few directions: whether it answers more to these or to others differs from model to
    model, and either kind alone is too weak a control on some (``benchmarks.controls``).
    """
    generator = torch.Generator().manual_seed(seed)
    centred = streams.float() - streams.float().mean(0)
    drawn = torch.randn(n, len(centred), generator=generator) @ centred
    drawn[1::2] = torch.randn(n, centred.shape[1], generator=generator)[1::2]
    return drawn / drawn.norm(dim=1, keepdim=True)


def orthogonal_to(
    directions: Float[Tensor, "n d_model"], v: Direction
) -> Float[Tensor, "n d_model"]:
    """Unit vectors: each of ``directions`` without its part along ``v``."""
    unit = v / v.norm()
    rest = directions - (directions @ unit)[:, None] * unit
    return rest / rest.norm(dim=1, keepdim=True)


@contextmanager
def steered(
    bridge: TransformerBridge, direction: Direction, *, layer: int, strength: float
) -> Iterator[TransformerBridge]:
    """The bridge with ``strength`` ||h|| along the unit ``direction`` added after ``layer``.

    At every position but 0, and at every new one while text is generated.
    """
    with intervene(bridge, {layer: add(direction, strength)}):
        yield bridge


def steering_grid(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    neutral: Sequence[Sequence[int]],
    directions: Mapping[str, Directions],
    *,
    layers: Sequence[int],
    strengths: Sequence[float],
) -> pd.DataFrame:
    """The decision with every direction added after every layer at every strength.

    ``neutral`` are token rows of text that should stay as it is. Returns ``direction layer strength
    prompt value kl``: ``value`` is the decision in nats, ``kl`` the mean KL of the unsteered from
    the steered next-token distribution over ``neutral``, nats a token (the same for all prompts).
    """
    tokens, inside = padded(neutral, bridge.cfg.device)
    unsteered, at_rest = _log_probs(bridge, tokens), decide(bridge, prompts).value

    def table(name: str, layer: int, strength: float) -> pd.DataFrame:
        value, kl = at_rest, 0.0
        if strength != 0:
            with steered(bridge, directions[name][layer], layer=layer, strength=float(strength)):
                value = decide(bridge, prompts).value
                moved = _log_probs(bridge, tokens)
            kl = float((unsteered.exp() * (unsteered - moved)).sum(-1)[inside].mean())
        cell = {"direction": name, "layer": layer, "strength": strength, "kl": kl}
        return pd.DataFrame({"prompt": [p.id for p in prompts], "value": value, **cell})

    tables = {}
    for layer in tqdm(layers, desc="steering", unit="layer", leave=False):
        with resumed(bridge, layer):
            for name, strength in product(directions, strengths):
                tables[name, layer, strength] = table(name, layer, strength)
    order = product(directions, layers, strengths)
    return pd.concat([tables[cell] for cell in order], ignore_index=True)


def least_effective(
    grid: pd.DataFrame, *, wanted: int, share: float = 0.8, budget: float
) -> pd.DataFrame:
    """Each cell of a grid by how often the decision has the ``wanted`` sign, the least one first.

    Returns ``direction layer strength right wrong_way kl effective``: ``right``, the share of
    prompts whose decision has the sign; ``wrong_way``, of those that moved against it from where
    they are at strength 0 (which the grid must hold); ``effective``: ``right`` > ``share`` at a
    ``kl`` of at most ``budget``. Sorted: effective ones first, by |strength|, then by KL; the best
    within the budget next; strength 0 last.
    """
    keys = ["direction", "layer", "strength"]
    still = grid[grid.strength == 0].set_index(["direction", "layer", "prompt"]).value
    if still.empty:
        raise ValueError("expected strength 0 in the grid, for where the decisions start")
    places = [tuple(row) for row in grid[["direction", "layer", "prompt"]].to_numpy()]
    at_rest = still.loc[places].to_numpy()
    table = grid.assign(
        right=grid.value * wanted > 0, wrong_way=(grid.value - at_rest) * wanted < -1e-6
    )
    columns = ["right", "wrong_way", "kl"]
    means = pd.DataFrame(table.groupby(keys, sort=False)[columns].mean()).reset_index()
    means["effective"] = (means.right > share) & (means.kl <= budget) & (means.strength != 0)
    order = means.assign(
        not_yet=~means.effective,
        size=means.strength.abs().where(means.effective, 0.0),
        still=means.strength == 0,
        dear=means.kl > budget,
        short=(-means.right).where(~means.effective, 0.0),
    )
    by = ["not_yet", "size", "still", "dear", "short", "kl"]
    return means.loc[order.sort_values(by).index].reset_index(drop=True)


@torch.no_grad()
def continuations(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    direction: Direction,
    *,
    layer: int,
    strengths: Sequence[float],
    max_new_tokens: int = 16,
) -> pd.DataFrame:
    """Greedy text with a direction added, and what it costs.

    Returns ``prompt strength text surprise repeated``: ``surprise`` is the unsteered model's loss
    on the new tokens (nats a token; its exp is the perplexity), ``repeated`` the share of word
    pairs that occurred before in the text.
    """
    rows = []
    for strength in strengths:
        for index in batches([(len(p.tokens), None) for p in prompts]):
            tokens = torch.tensor([prompts[i].tokens for i in index], device=bridge.cfg.device)
            with steered(bridge, direction, layer=layer, strength=float(strength)):
                whole = generated(bridge, tokens, max_new_tokens=max_new_tokens, do_sample=False)
            whole = whole.to(tokens.device)
            logits = bridge(whole).float()[:, tokens.shape[1] - 1 : -1]
            new = whole[:, tokens.shape[1] :]
            losses = F.cross_entropy(logits.mT, new, reduction="none")
            for i, ids, loss in zip(index, new.tolist(), losses.tolist()):
                rows.append(_continuation(bridge, prompts[i].id, float(strength), ids, loss))
    table = pd.DataFrame(rows)
    order = {p.id: i for i, p in enumerate(prompts)}
    return table.sort_values("prompt", key=lambda c: c.map(order), kind="stable", ignore_index=True)


def add_direction(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    direction: Direction,
    *,
    layer: int,
    strength: float,
    end: int,
) -> Float[Tensor, "prompt"]:
    """p(end token) with ``strength`` ||h|| along the unit ``direction`` added after ``layer``."""
    return edited_end_probability(
        bridge, prompts, lambda index: [{layer: add(direction, strength)}], end
    )[0]


def ablate_directions(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    directions: Float[Tensor, "direction d_model"],
    *,
    baseline: Float[Tensor, "prompt layer d_model"],
    layers: Sequence[int],
    suffix: int,
    end: int,
) -> Float[Tensor, "direction prompt"]:
    """p(end token) after prompt and ``suffix``, what it changed along each direction taken back.

    ``baseline`` is the stream without the suffix, at each prompt's last position.
    """

    def edits(index: list[int]) -> list[Edit]:
        return [{layer: remove(v, baseline[index, layer]) for layer in layers} for v in directions]

    return edited_end_probability(bridge, prompts, edits, end, suffix=suffix)


def dose_response(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    directions: Mapping[str, Direction],
    *,
    layer: int,
    strengths: Sequence[float],
    end: int,
) -> pd.DataFrame:
    """``add_direction`` for every direction and strength: ``direction prompt strength value``."""
    doses = list(product(directions, strengths))
    edits: list[Edit] = [{layer: add(directions[name], by)} for name, by in doses]
    values = edited_end_probability(bridge, prompts, lambda index: edits, end)
    ids = [p.id for p in prompts]
    tables = [
        pd.DataFrame({"prompt": ids, "value": row.tolist(), "direction": name, "strength": by})
        for (name, by), row in zip(doses, values)
    ]
    return pd.concat(tables, ignore_index=True)


def strongest_layer(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    change: Float[Tensor, "prompt layer d_model"],
    *,
    strength: float,
    end: int,
) -> int:
    """The layer after which adding that layer's mean change raises p(end token) most.

    Choose on prompts that are not used to measure the effect.
    """
    edits: list[Edit] = [{layer: add(v, strength)} for layer, v in enumerate(change.mean(0))]
    return int(edited_end_probability(bridge, prompts, lambda index: edits, end).mean(1).argmax())


# ------------------------------------------------------------------------------------- internals
def _continuation(
    bridge: TransformerBridge, prompt: str, strength: float, ids: list[int], loss: list[float]
) -> dict[str, Any]:
    """One row of ``continuations``; what follows the end of the text is not counted."""
    end = special_token(bridge, "eos")
    n = ids.index(end) + 1 if end in ids else len(ids)
    text = bridge.tokenizer.decode(ids[:n], skip_special_tokens=True).strip()
    words = text.split()
    pairs = list(pairwise(words))
    repeated = 1 - len(set(pairs)) / len(pairs) if pairs else 0.0
    return {
        "prompt": prompt,
        "strength": strength,
        "text": text,
        "surprise": float(np.mean(loss[:n])),
        "repeated": repeated,
    }


@torch.no_grad()
def _log_probs(
    bridge: TransformerBridge, tokens: Int[Tensor, "row pos"]
) -> Float[Tensor, "row pos vocab"]:
    return bridge(tokens).float().log_softmax(-1)
