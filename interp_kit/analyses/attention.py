"""Attention patterns: which tokens heads look at, up to where the answers part."""

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.prompts import Prompt
from interp_kit.specs import InputError


def attention_patterns(
    bridge: TransformerBridge, prompt: Prompt, heads: Sequence[tuple[int, int]]
) -> Float[Tensor, "head pos pos"]:
    """Attention of each (layer, head) on ``prompt.branch``, up to where the answers part.

    Row = attending position, column = attended to; the last row is where the decision is read.
    """
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda pattern, hook: kept.update({layer: pattern[0]})

    bridge.run_with_hooks(
        torch.tensor([prompt.branch], device=bridge.cfg.device),
        fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", keep(layer)) for layer, _ in heads],
    )
    return torch.stack([kept[layer][head] for layer, head in heads]).float().cpu()


def attended_tokens(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    heads: Sequence[tuple[int, int]],
    *,
    k: int = 6,
) -> pd.DataFrame:
    """The ``k`` tokens that each (layer, head) attends to most where the decision is read.

    Returns ``prompt component pos token value``, strongest first; ``value`` is a share of the
    head's attention, 0 to 1. Raises ``InputError`` for a bridge without tokenizer.
    """
    if bridge.tokenizer is None:
        raise InputError("this bridge has no tokenizer, so there are no words to show")
    rows = []
    for prompt in prompts:
        words = [bridge.tokenizer.decode([token]) for token in prompt.branch]
        last = attention_patterns(bridge, prompt, heads)[:, -1]
        for (layer, head), shares in zip(heads, last):
            own = {"prompt": prompt.id, "component": f"L{layer}H{head}"}
            for value, pos in zip(*(t.tolist() for t in shares.topk(min(k, len(words))))):
                rows.append(own | {"pos": pos, "token": words[pos], "value": value})
    return pd.DataFrame(rows)
