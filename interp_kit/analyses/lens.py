"""Logit lens: what would the model decide if it stopped after layer l?

Every residual stream state is read through the model's own final norm (its statistics recomputed
for that state) and unembedding, soft cap included, so the last layer is the model's own decision.

Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.batching import chunks
from interp_kit.layer_readout import EMBEDDING, answers_by_layer, layer_table
from interp_kit.passes import residual_stream
from interp_kit.prompts import Prompt
from interp_kit.readout import final_norm, unembed
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
def contrast_lens(
    bridge: TransformerBridge, prompts: Sequence[Prompt], pairs: Int[Tensor, "prompt pair 2"]
) -> pd.DataFrame:
    """A control: the lens on other contrasts, where the answers part.

    ``pairs`` are two tokens each (``controls.likely_pairs``), the positive one first. Returns
    ``prompt group layer draw value``; ``value`` is the difference of the two tokens' logits as read
    after each layer, soft cap included, which is that of their log probabilities.
    """
    tables = []
    for index in chunks([p.branch for p in prompts]):
        stream = residual_stream(bridge, [prompts[i].branch for i in index], 1)[:, :, 0]
        normed = final_norm(bridge, stream)
        for row, i in enumerate(index):
            ids = pairs[i].flatten().tolist()
            both = unembed(bridge, normed[:, row], ids).unflatten(-1, (-1, 2)).cpu()
            values = both[..., 0] - both[..., 1]
            layer, draw = np.indices(values.shape)
            own = {"layer": layer.ravel() + EMBEDDING, "draw": draw.ravel()}
            own |= {"prompt": prompts[i].id, "group": prompts[i].group}
            tables.append(pd.DataFrame(own | {"value": values.double().flatten().numpy()}))
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
