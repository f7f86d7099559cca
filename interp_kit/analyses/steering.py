"""Directions written into the residual stream, or taken out of it: does the behaviour follow?

Adding: h + strength ||h|| v at each prompt's last position after one block, in units of the
stream's own norm there. Ablating: what a suffix changed along v is taken back at its position after
the given blocks, h - ((h - h_without) . v) v. Random directions of equal norm are the control.

Sources: Turner et al., "Activation Addition", arXiv:2308.10248; Arditi et al., "Refusal in Language
Models Is Mediated by a Single Direction", arXiv:2406.11717 (directional ablation).
"""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.decisions import Prompt, batches

Direction = Float[Tensor, "d_model"]


def random_directions(n: int, like: Direction, *, seed: int = 0) -> Float[Tensor, "n d_model"]:
    """``n`` isotropic unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, len(like), generator=generator)
    return drawn / drawn.norm(dim=1, keepdim=True)


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
    unit = direction / direction.norm()

    def add(h: Float[Tensor, "prompt d_model"], layer: int, index: list[int]) -> Tensor:
        return h + strength * h.norm(dim=1, keepdim=True) * unit.to(h)

    return _end_probability(bridge, [p.tokens for p in prompts], {layer: add}, end)


def ablate_direction(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    direction: Direction,
    *,
    baseline: Float[Tensor, "prompt layer d_model"],
    layers: Sequence[int],
    suffix: int,
    end: int,
) -> Float[Tensor, "prompt"]:
    """p(end token) after prompt and ``suffix``, what it changed along ``direction`` taken back.

    ``baseline`` is the stream without the suffix, at each prompt's last position.
    """
    unit = direction / direction.norm()

    def ablate(h: Float[Tensor, "prompt d_model"], layer: int, index: list[int]) -> Tensor:
        v = unit.to(h)
        changed = ((h - baseline[index, layer].to(h)) @ v)[:, None]
        return h - changed * v

    rows = [(*p.tokens, suffix) for p in prompts]
    return _end_probability(bridge, rows, dict.fromkeys(layers, ablate), end)


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
    tables = []
    for name, direction in tqdm(directions.items(), desc="adding", unit="direction", leave=False):
        for strength in strengths:
            value = add_direction(
                bridge, prompts, direction, layer=layer, strength=strength, end=end
            )
            table = pd.DataFrame({"prompt": [p.id for p in prompts], "value": value.tolist()})
            tables.append(table.assign(direction=name, strength=strength))
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
    effects = [
        float(
            add_direction(
                bridge, prompts, change[:, layer].mean(0), layer=layer, strength=strength, end=end
            ).mean()
        )
        for layer in range(change.shape[1])
    ]
    return max(range(len(effects)), key=effects.__getitem__)


# ------------------------------------------------------------------------------------- internals
Edit = Callable[[Tensor, int, list[int]], Tensor]


@torch.no_grad()
def _end_probability(
    bridge: TransformerBridge, rows: Sequence[tuple[int, ...]], edits: dict[int, Edit], end: int
) -> Float[Tensor, "prompt"]:
    """p(end token) with the stream at the last position edited after the given blocks."""
    result = torch.empty(len(rows))
    for index in batches([(len(row), None) for row in rows]):

        def hook(layer: int, edit: Edit, index: list[int]) -> Callable[..., Tensor]:
            def write(x: Tensor, hook: object) -> Tensor:
                last = edit(x[:, -1], layer, index)
                return torch.cat([x[:, :-1], last[:, None]], 1)

            return write

        hooks = [
            (f"blocks.{layer}.hook_resid_post", hook(layer, edit, index))
            for layer, edit in edits.items()
        ]
        logits = bridge.run_with_hooks(
            torch.tensor([rows[i] for i in index], device=bridge.cfg.device),
            fwd_hooks=[*hooks, ("unembed.hook_in", lambda x, hook: x[:, -1:])],
        )
        result[index] = logits[:, -1].float().softmax(-1)[:, end].cpu()
    return result
