"""Logit lens: what would the model decide if it stopped after layer l?

Every residual stream state is read through the model's own final norm (its statistics recomputed
for that state) and unembedding, soft cap included, so the last layer is the model's own decision.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
"""

from collections.abc import Sequence
from typing import cast

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.layer_readout import EMBEDDING, answers_by_layer, layer_table
from interp_kit.passes import residual_stream
from interp_kit.prompts import Prompt
from interp_kit.readout import final_norm
from interp_kit.statistics import settled


def logit_lens(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> pd.DataFrame:
    """The decision after every block.

    Returns one row for each prompt and layer: ``prompt group layer value``; ``layer`` -1 is the
    embedding, l the residual stream after block l (``resid_post``); ``value`` is
    log p(positive) - log p(negative) in nats as read there, summed over the answers' tokens.
    """
    log_p = answers_by_layer(bridge, prompts)
    return layer_table(prompts, log_p["positive"] - log_p["negative"])


@torch.no_grad()
def random_direction_lens(
    bridge: TransformerBridge, prompts: Sequence[Prompt], *, n: int = 64, seed: int = 0
) -> pd.DataFrame:
    """A control: the lens along ``n`` random directions of the norm of the decision's own.

    Where the answers part, the decision before any cap is norm(h) . (W_U[:, +] - W_U[:, -]); here
    that difference is replaced by random vectors of its length. Returns ``prompt group layer draw
    value``, in logits: what a layer gives by chance.
    """
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(bridge.cfg.d_model, n, generator=generator).to(bridge.cfg.device)
    random = random / random.norm(dim=0)
    tables = []
    for prompt in prompts:
        resid = residual_stream(bridge, torch.tensor([prompt.branch]), 1)[:, 0]
        positive, negative = prompt.branch_ids
        norm = (bridge.W_U[:, positive].float() - bridge.W_U[:, negative].float()).norm()
        values = final_norm(bridge, resid)[:, 0].float() @ (random * norm)
        tables += [
            pd.DataFrame(
                {
                    "prompt": prompt.id,
                    "group": prompt.group,
                    "layer": layer,
                    "draw": range(n),
                    "value": values[layer + 1].tolist(),
                }
            )
            for layer in range(EMBEDDING, bridge.cfg.n_layers)
        ]
    return pd.concat(tables, ignore_index=True)


def trajectory_statistics(trajectories: pd.DataFrame) -> pd.DataFrame:
    """One row for each prompt of a ``logit_lens`` table: how the decision came about.

    ``mean std final`` of the decision over the blocks; ``positive_layers negative_layers``, how
    many blocks end on either side of zero; ``flip_layers``, the blocks after which the sign differs
    from the block before; ``settled_layer``, the first block from which the sign is the final one
    and stays so.
    """
    rows = []
    blocks_only = trajectories.loc[trajectories["layer"] > EMBEDDING].sort_values("layer")
    for key, blocks in blocks_only.groupby(["prompt", "group"], sort=False):
        prompt, group = cast(tuple[str, str], key)
        value, positive = blocks.value.to_numpy(), (blocks.value > 0).to_numpy()
        flips = [
            layer for layer in range(1, len(positive)) if positive[layer] != positive[layer - 1]
        ]
        rows.append(
            {
                "prompt": prompt,
                "group": group,
                "mean": value.mean(),
                "std": value.std(),
                "final": value[-1],
                "positive_layers": int(positive.sum()),
                "negative_layers": int((~positive).sum()),
                "flip_layers": flips,
                "settled_layer": int(settled(value[None])[0]),
            }
        )
    return pd.DataFrame(rows)
