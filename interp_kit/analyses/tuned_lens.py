"""Tuned lens: what would the model say if it stopped after layer l, read in that layer's own basis?

The logit lens reads every layer's residual stream h as if it were the last one's. The tuned lens
first translates it by a trained affine map, h -> h + A_l h + b_l (``TunedLens``), and then uses the
model's own final norm and unembedding, soft cap included. The embedding (-1) and every block but
the last have a translator; the last block is the model itself. Zero A and b are the logit lens.

Position 0 (in most models the same token in every text, and an attention sink) and the last one,
after which nothing follows, are neither trained on nor measured.

Source: Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens",
arXiv:2303.08112; prediction depth after Baldock et al., arXiv:2106.09647.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil, log
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import logit_readout

from interp_kit.batching import padded, padded_batches
from interp_kit.layer_readout import (
    EMBEDDING,
    Rows,
    answers_by_layer,
    layer_table,
    stream_log_probs,
    stream_positions,
    tokens_at_once,
    usable_rows,
)
from interp_kit.passes import residual_stream
from interp_kit.prompts import Prompt, special_token, token_ids
from interp_kit.translators import TunedLens


def middle_layers(n_layers: int) -> range:
    """The blocks of the middle third: l with n/3 <= l < 2n/3."""
    return range(ceil(n_layers / 3), ceil(2 * n_layers / 3))


def text_rows(
    bridge: TransformerBridge, texts: Sequence[str], *, length: int = 128
) -> list[tuple[int, ...]]:
    """Every text as token ids, with its end where the tokenizer has one; ``length`` at most."""
    end = special_token(bridge, "eos")
    ends = () if end is None else (end,)
    return [(*token_ids(bridge, text), *ends)[:length] for text in texts]


@torch.no_grad()
def lens_divergence(
    bridge: TransformerBridge, rows: Rows, lenses: Mapping[str, TunedLens]
) -> pd.DataFrame:
    """How well each lens predicts what the model will say, and what the text says, by layer.

    One row for each lens, text and layer (-1 is the embedding, the last is the model itself), means
    over the text's positions: ``lens prompt layer kl cross_entropy bits``. ``kl``: KL(model's
    distribution || lens') in nats; ``cross_entropy``: -log p of the true next token in nats;
    ``bits``: the same in bits a token, cross_entropy / ln 2. ``prompt`` is the text's number among
    those of three tokens or more.

    All lenses share one forward pass of each text. Raises ``InputError`` for a lens of another
    shape, and if no text has three tokens.
    """
    tables = []
    for stream, following, text in _read_texts(bridge, rows):
        for name, lens in lenses.items():
            log_p = stream_log_probs(bridge, lens.translate(stream))
            tables += [
                _divergences(log_p[-1], log_q, following, text).assign(lens=name, layer=layer)
                for layer, log_q in enumerate(log_p, EMBEDDING)
            ]
    return _means_by_text(pd.concat(tables))


@torch.no_grad()
def frequency_divergence(
    bridge: TransformerBridge, rows: Rows, held_out: Rows, *, name: str = "token frequencies"
) -> pd.DataFrame:
    """A control: the best lens that never looks at the text, read on ``held_out``.

    It always predicts the mean of the model's distributions on ``rows``, which of all constant
    predictions has the least mean KL there. Returns what ``lens_divergence`` returns, the same
    values at every layer.
    """
    total = torch.zeros(bridge.cfg.d_vocab, dtype=torch.float64)
    for stream, _, _ in _read_texts(bridge, rows):
        total += stream_log_probs(bridge, stream[-1:])[0].exp().double().sum(0).cpu()
    mean = (total / total.sum()).clamp(min=torch.finfo(torch.float32).tiny)
    constant = mean.log().float().to(bridge.cfg.device)
    tables = []
    for stream, following, text in _read_texts(bridge, held_out):
        final = stream_log_probs(bridge, stream[-1:])[0]
        tables.append(_divergences(final, constant.expand_as(final), following, text))
    layers = pd.DataFrame({"layer": range(EMBEDDING, bridge.cfg.n_layers)})
    return _means_by_text(pd.concat(tables).assign(lens=name).merge(layers, how="cross"))


def tuned_lens(
    bridge: TransformerBridge, prompts: Sequence[Prompt], lens: TunedLens
) -> pd.DataFrame:
    """The decision after every block, read through the translators.

    Returns one row for each prompt and layer: ``prompt group layer value``, as ``logit_lens`` does
    (exactly the same for the identity): log p(positive) - log p(negative) in nats, summed over the
    answers' tokens.
    """
    log_p = answers_by_layer(bridge, prompts, translate=lens.translate)
    return layer_table(prompts, log_p["positive"] - log_p["negative"])


def option_trajectories(
    bridge: TransformerBridge, prompts: Sequence[Prompt], lens: TunedLens
) -> pd.DataFrame:
    """log p of either answer after every block, in nats, summed over its tokens.

    Returns ``prompt group layer option value``; ``option`` is the answer's label.
    """
    log_p = answers_by_layer(bridge, prompts, translate=lens.translate)
    tables = []
    for sign, values in log_p.items():
        labels = [p.positive_label if sign == "positive" else p.negative_label for p in prompts]
        table = layer_table(prompts, values)
        table.insert(3, "option", np.repeat(labels, values.shape[1]))
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def top_token_records(tokens: pd.DataFrame) -> list[dict[str, Any]]:
    """A table of ``top_tokens`` as ``tuned_lens_*.json`` has it, one record a prompt and layer.

    Keys: ``layer prompt_id top_tokens top_probs top_logits``.
    """
    ordered = tokens.sort_values("rank", kind="stable")
    return [
        {
            "layer": int(own["layer"].iloc[0]),
            "prompt_id": own["prompt"].iloc[0],
            "top_tokens": own["token"].tolist(),
            "top_probs": own["p"].tolist(),
            "top_logits": own["logit"].tolist(),
        }
        for _, own in ordered.groupby(["prompt", "layer"], sort=False)
    ]


@torch.no_grad()
def prediction_depth(bridge: TransformerBridge, rows: Rows, lens: TunedLens) -> pd.DataFrame:
    """After how many blocks the lens' likeliest token is the model's, and stays so.

    Returns one row for each row of token ids and position: ``prompt pos value``; ``prompt`` is the
    row's number, ``value`` 0 where the embedding suffices, n_layers where the last block decides.
    """
    tables = []
    for index in padded_batches(rows):
        tokens, inside = padded([rows[i] for i in index], bridge.cfg.device)
        stream = residual_stream(bridge, tokens.tolist(), tokens.shape[1])[:, inside]
        best = logit_readout(bridge, lens.translate(stream), top_k=1).top_ids
        assert best is not None
        other = (best[..., 0] != best[-1, :, 0]).cpu()
        last = (other * torch.arange(1, len(other) + 1)[:, None]).amax(0)  # the last that differs
        row, pos = inside.nonzero().cpu().unbind(1)
        text = torch.tensor(index)[row]
        tables.append(pd.DataFrame({"prompt": text, "pos": pos, "value": last}))
    return pd.concat(tables).sort_values(["prompt", "pos"], ignore_index=True)


# ------------------------------------------------------------------------------------- internals
def _read_texts(
    bridge: TransformerBridge, rows: Rows
) -> Iterator[
    tuple[Float[Tensor, "layer token d_model"], Int[Tensor, "token"], Int[Tensor, "token"]]
]:
    """``stream_positions`` of all texts, with their numbers, in parts that fit in memory."""
    usable = usable_rows(rows)
    for index in padded_batches(usable):
        stream, following, row = stream_positions(bridge, [usable[i] for i in index])
        text = torch.tensor(index, device=row.device)[row]
        size = tokens_at_once(bridge)
        yield from zip(stream.split(size, dim=1), following.split(size), text.split(size))


def _divergences(
    final: Float[Tensor, "token vocab"],
    log_q: Float[Tensor, "token vocab"],
    following: Int[Tensor, "token"],
    text: Int[Tensor, "token"],
) -> pd.DataFrame:
    """``prompt kl cross_entropy`` of every position."""
    kl = F.kl_div(log_q, final, log_target=True, reduction="none").sum(-1)
    cross_entropy = -log_q.gather(-1, following[:, None])[:, 0]
    return pd.DataFrame(
        {
            "prompt": text.cpu(),
            "kl": kl.double().cpu(),
            "cross_entropy": cross_entropy.double().cpu(),
        }
    )


def _means_by_text(table: pd.DataFrame) -> pd.DataFrame:
    means = pd.DataFrame(table.groupby(["lens", "prompt", "layer"]).mean()).reset_index()
    return means.assign(bits=means["cross_entropy"] / log(2))
