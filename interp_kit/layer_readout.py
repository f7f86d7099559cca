"""What a model would say if it stopped after a layer: its stream there, normed and unembedded.

Every layer's residual stream is read through the model's own final norm (its statistics recomputed
for that state) and unembedding, soft cap included. Read as it is, this is the logit lens; first
translated into the last block's basis (``translate``), it is a tuned lens. Layer -1 is the
embedding, l the stream after block l; the last is the model itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import logit_readout

from interp_kit.batching import Ids, chunks, padded
from interp_kit.decisions import answer_sequences
from interp_kit.passes import residual_stream
from interp_kit.prompts import Prompt, Sign, require_prompts
from interp_kit.specs import InputError

EMBEDDING = -1  # the "layer" before block 0
READ_AT_ONCE = 2**25  # logits in memory at once: bounds memory, not results
Rows = Sequence[Sequence[int]]
Translate = Callable[[Tensor], Tensor]  # the stream [layer ... d_model] of every layer


@torch.no_grad()
def answers_by_layer(
    bridge: TransformerBridge, prompts: Sequence[Prompt], *, translate: Translate | None = None
) -> dict[Sign, Float[Tensor, "prompt layer"]]:
    """log p(answer | prompt) in nats as every layer has it, summed over the answer's tokens."""
    require_prompts(prompts)
    shape = len(prompts), bridge.cfg.n_layers + 1
    totals: dict[Sign, Tensor] = {"positive": torch.zeros(shape), "negative": torch.zeros(shape)}
    asked = [(i, own) for i, prompt in enumerate(prompts) for own in answer_sequences(prompt)]
    for chunk in chunks([sequence.tokens for _, sequence in asked]):
        own = [asked[k] for k in chunk]
        read = max(len(ids) for _, sequence in own for ids in sequence.answers.values())
        stream = residual_stream(bridge, [sequence.tokens for _, sequence in own], read)
        stream = stream if translate is None else translate(stream)
        alike: dict[tuple[Sign, int], list[tuple[int, int, Ids]]] = {}
        for row, (i, sequence) in enumerate(own):
            for sign, ids in sequence.answers.items():
                alike.setdefault((sign, len(ids)), []).append((row, i, ids))
        for (sign, length), answers in alike.items():
            rows, index, ids = zip(*answers)
            log_p = logit_readout(
                bridge,
                stream[:, list(rows), -length:].contiguous(),
                targets=torch.tensor(ids, device=stream.device),
                return_type="log_probs",
            )
            totals[sign][list(index)] = log_p.values[..., 0].sum(-1).T.cpu()
    return totals


def layer_table(prompts: Sequence[Prompt], values: Float[Tensor, "prompt layer"]) -> pd.DataFrame:
    """``prompt group layer value``; the first layer is the embedding, -1."""
    return pd.DataFrame(
        {"prompt": prompt.id, "group": prompt.group, "layer": layer, "value": value}
        for prompt, by_layer in zip(prompts, values.tolist())
        for layer, value in enumerate(by_layer, EMBEDDING)
    )


def top_tokens(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    *,
    k: int = 5,
    translate: Translate | None = None,
) -> pd.DataFrame:
    """The ``k`` likeliest next tokens after every block, where the answers part.

    Through the logit lens, or through a tuned lens' ``translate``. Returns one row for each prompt,
    layer and rank (from 1): ``prompt layer rank token p logit``.
    """
    if bridge.tokenizer is None:
        raise InputError("this bridge has no tokenizer, so there are no words to show")
    rows: dict[int, list[tuple[Any, ...]]] = {}
    for index in chunks([p.branch for p in prompts]):
        stream = residual_stream(bridge, [prompts[i].branch for i in index], 1)[:, :, 0]
        stream = stream if translate is None else translate(stream)
        logits, probs = (
            logit_readout(bridge, stream, top_k=k, return_type=kind) for kind in ("logits", "probs")
        )
        words = np.array(logits.decode(bridge.tokenizer), dtype=object)
        for row, i in enumerate(index):
            rows[i] = [
                (
                    prompts[i].id,
                    layer + EMBEDDING,
                    rank + 1,
                    words[layer, row, rank],
                    float(p),
                    float(logit),
                )
                for layer, both in enumerate(zip(probs.values[:, row], logits.values[:, row]))
                for rank, (p, logit) in enumerate(zip(*both))
            ]
    ordered = [row for i in range(len(prompts)) for row in rows[i]]
    return pd.DataFrame(ordered, columns=["prompt", "layer", "rank", "token", "p", "logit"])


def stream_log_probs(
    bridge: TransformerBridge, stream: Float[Tensor, "layer token d_model"], *, grad: bool = False
) -> Float[Tensor, "layer token vocab"]:
    """What every layer of a (translated) stream predicts; with ``grad``, to be differentiated."""
    at_once = stream.shape[0] * stream.shape[1]
    return logit_readout(
        bridge, stream, return_type="log_probs", chunk_size=at_once, enable_grad=grad
    ).values


def stream_positions(
    bridge: TransformerBridge, rows: Rows
) -> tuple[Float[Tensor, "layer token d_model"], Int[Tensor, "token"], Int[Tensor, "token"]]:
    """Of all positions but the first and the last: the stream, the next token, which row it is."""
    tokens, inside = padded(rows, bridge.cfg.device)
    kept = inside[:, 1:].clone()
    kept[:, 0] = False
    stream = residual_stream(bridge, tokens.tolist(), tokens.shape[1])[:, :, :-1][:, kept]
    return stream, tokens[:, 1:][kept], kept.nonzero()[:, 0]


def usable_rows(rows: Rows) -> list[tuple[int, ...]]:
    """The texts of three tokens or more; raises ``InputError`` if there is none."""
    long = [tuple(row) for row in rows if len(row) >= 3]
    if not long:
        raise InputError(
            f"none of {len(rows)} texts has three tokens; expected texts with a token between the "
            "first and the last: give longer ones"
        )
    return long


def tokens_at_once(bridge: TransformerBridge) -> int:
    """Positions of which all layers are unembedded together."""
    return max(1, READ_AT_ONCE // (bridge.cfg.d_vocab * (bridge.cfg.n_layers + 1)))
