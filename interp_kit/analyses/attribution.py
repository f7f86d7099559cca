"""Direct logit attribution: the decision as a sum over embedding, heads, MLPs and biases.

Where a token of an answer is predicted, the residual stream is a sum of terms: the embedding, what
every component (head or MLP) wrote, and biases. With the final norm's statistics frozen, norm and
unembedding are linear, so the logit difference of the first tokens in which the answers differ is

    sum over terms c of  N(out_c) . (W_U[:, positive] - W_U[:, negative])

exactly: the normaliser of the softmax is the same for both. On models that normalise what a block
adds (Gemma-2's norm after attention), every head goes through that norm too, frozen.

An answer's further tokens t are predicted in a context that the other answer does not share:

    log p(t) = sum over terms c of  N(out_c) . (W_U[:, t] - sum over v of p(v) W_U[:, v])  -  H(p)

The direction is the gradient of log p(t) in the stream, so that what raises all logits alike gets
nothing; H(p), the entropy of the prediction, is what no term of the stream can be given
(``LOG_NORMALISER``). A final soft cap is not linear either: what it adds to all this is the term
``SOFT_CAP``. With these two the terms sum to the decision of ``decide``, for any answers.

Sources: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021); Wang et al.,
"Interpretability in the Wild", arXiv:2211.00593.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.answer_directions import AnswerToken, Asked, answer_tokens, ask
from interp_kit.batching import chunks
from interp_kit.passes import last_names, read_last
from interp_kit.prompts import Prompt, require_prompts
from interp_kit.readout import project_heads, projection_bias, through_frozen_norm
from interp_kit.specs import InputError

Cache = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Term:
    """A term of the sum: what a component, the embedding or a bias writes to the stream."""

    name: str
    kind: Literal["embed", "head", "mlp", "bias", "cap", "normaliser"]
    layer: int = -1
    head: int = -1

    def row(self, prompt: Prompt) -> dict[str, Any]:
        """The axis columns of a table."""
        return {
            "prompt": prompt.id,
            "group": prompt.group,
            "component": self.name,
            "kind": self.kind,
            "layer": self.layer,
            "head": self.head,
        }


def direct_logit_attribution(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> pd.DataFrame:
    """Every term's share of the decision on every prompt.

    Returns one row for each prompt and term: ``prompt group component kind layer head value``;
    ``component`` is the term's name (``embed``, ``L2H3``, ``L2_MLP``, ``L2_ATTN_BIAS``,
    ``SOFT_CAP``, ``LOG_NORMALISER``); ``kind`` is ``embed``, ``head``, ``mlp``, ``bias``, ``cap``
    or ``normaliser``; ``layer`` and ``head`` are -1 where there is none; ``value`` in nats,
    positive towards the positive answer. A prompt's values sum to the decision.

    Raises ``NotImplementedError`` if the parts do not sum to the model's own decision, which means
    an architecture that does more between its parts and its logits than is known here.
    """
    by_token = token_attribution(bridge, prompts)
    keys = ["prompt", "group", "component", "kind", "layer", "head"]
    return by_token.groupby(keys, sort=False, as_index=False).value.sum()


@torch.no_grad()
def token_attribution(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> pd.DataFrame:
    """``direct_logit_attribution`` token by token: what each term adds to each one's part.

    With the columns ``answer``, "both" where the answers part and else the answer whose further
    token it is, and ``token``, counted from where they part (0). The terms of a token sum to its
    part of the decision: the difference of both log probabilities where the answers part; log p of
    the positive answer's further tokens; minus that of the negative one's.
    """
    rows: dict[AnswerToken, list[dict[str, Any]]] = {}
    for batch in _batches(bridge, prompts):
        terms, normed = _terms(bridge, batch.cache)
        values = -_shares(batch, normed).diff(dim=-1)[..., 0]
        for at, own in zip(batch.tokens, values.tolist()):
            which = {"answer": at.answer, "token": at.token}
            rows[at] = [
                term.row(prompts[at.prompt]) | which | {"value": value}
                for term, value in zip([*terms, *batch.rest_terms], own)
            ]
    return pd.DataFrame([row for token in answer_tokens(prompts) for row in rows[token]])


@torch.no_grad()
def layer_attribution(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> pd.DataFrame:
    """Attention against MLP: what each layer's two parts write to each answer.

    Returns one row for each prompt and part: ``prompt group layer kind to_positive to_negative
    value``; ``kind`` is ``embed``, ``attn`` (all heads and their bias), ``mlp`` (all experts),
    ``bias``, ``cap`` or ``normaliser``. ``to_positive`` and ``to_negative`` are shares of the
    answers' logits where they part and of the log probabilities of their further tokens; ``value``
    is their difference, and sums to the decision. A share of *one* logit holds whatever raises all
    logits alike; only ``value`` is free of that.
    """
    totals: list[dict[tuple[str, int], np.ndarray]] = [{} for _ in prompts]
    for batch in _batches(bridge, prompts):
        parts: list[tuple[str, int]] = [("embed", -1)]
        outputs = [batch.cache["blocks.0.hook_resid_pre"].float()]
        for layer in range(bridge.cfg.n_layers):
            for kind in ("attn", "mlp"):
                if (name := f"blocks.{layer}.hook_{kind}_out") in batch.cache:
                    parts.append((kind, layer))
                    outputs.append(batch.cache[name].float())
        normed, norm_bias = _through_final_norm(bridge, batch.cache, torch.stack(outputs, 1))
        if norm_bias.any():
            parts.append(("bias", -1))
            normed = torch.cat([normed, norm_bias.expand_as(normed[:, :1])], 1)
        parts += [(term.kind, -1) for term in batch.rest_terms]
        shares = _shares(batch, normed).double().cpu().numpy()
        for at, own in zip(batch.tokens, shares):
            for part, share in zip(parts, own):
                totals[at.prompt][part] = totals[at.prompt].get(part, 0) + share
    return pd.DataFrame(
        {
            "prompt": prompt.id,
            "group": prompt.group,
            "layer": layer,
            "kind": kind,
            "to_positive": float(share[0]),
            "to_negative": float(share[1]),
            "value": float(share[0] - share[1]),
        }
        for prompt, own in zip(prompts, totals)
        for (kind, layer), share in own.items()
    )


def attention_share(layers: pd.DataFrame) -> pd.DataFrame:
    """How much of what each layer writes to the decision is attention's: 1 all, 0 none.

    From a ``layer_attribution`` table; |attn| / (|attn| + |mlp|) of ``value``. Returns ``prompt
    group layer attn mlp attn_mlp_ratio``.
    """
    both = layers[layers.kind.isin(["attn", "mlp"])]
    wide = both.pivot_table(
        index=["prompt", "group", "layer"], columns="kind", values="value", sort=False
    ).reset_index()
    size = wide[["attn", "mlp"]].abs()
    return wide.assign(attn_mlp_ratio=size.attn / size.sum(axis=1)).rename_axis(columns=None)


def option_attribution(
    bridge: TransformerBridge, layers: pd.DataFrame, prompts: Sequence[Prompt]
) -> pd.DataFrame:
    """A ``layer_attribution`` table by option rather than by side, for scripts that read it so.

    Returns ``prompt_id layer`` and, for each option X as the tokenizer spells it, ``attn_to_X
    mlp_to_X total_to_X``; then ``attn_mlp_ratio`` of the decision differential.
    """
    spelled = {
        p.id: [bridge.tokenizer.decode([token]).strip() for token in p.branch_ids] for p in prompts
    }
    ratio = attention_share(layers).set_index(["prompt", "layer"]).attn_mlp_ratio
    rows: dict[tuple[str, int], dict[str, float]] = {}
    columns = ["prompt", "layer", "kind", "to_positive", "to_negative"]
    both = layers.loc[layers.kind.isin(["attn", "mlp"]), columns]
    for prompt, layer, kind, *shares in both.itertuples(index=False, name=None):
        own = rows.setdefault((prompt, layer), {})
        for option, share in zip(spelled[prompt], shares):
            own[f"{kind}_to_{option}"] = share
            own[f"total_to_{option}"] = own.get(f"total_to_{option}", 0.0) + share
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(["prompt_id", "layer"])
    table["attn_mlp_ratio"] = ratio.to_numpy()
    return table.reset_index()


@torch.no_grad()
def contrast_attribution(
    bridge: TransformerBridge, prompts: Sequence[Prompt], pairs: Int[Tensor, "prompt pair 2"]
) -> pd.DataFrame:
    """Every term's share of other contrasts, where the answers part: a control.

    ``pairs`` are two tokens each (``controls.likely_pairs``), the positive one first. Returns
    ``prompt group component kind layer head draw value``, in logits before any cap.
    """
    tables = []
    firsts = [p.branch for p in prompts]
    for index in chunks(firsts):
        terms, normed = _terms(bridge, record_last(bridge, [firsts[i] for i in index]))
        both = bridge.W_U[:, pairs[index].to(bridge.W_U.device)].float()
        pattern = "prompt term d_model, d_model prompt draw -> prompt term draw"
        shares = einsum(normed, both[..., 0] - both[..., 1], pattern)
        rows = [term.row(prompts[i]) for i in index for term in terms]
        n = pairs.shape[1]
        table = pd.DataFrame(rows).loc[np.repeat(range(len(rows)), n)]
        draws = np.tile(range(n), len(rows))
        tables.append(table.assign(draw=draws, value=shares.flatten().cpu().double().numpy()))
    return pd.concat(tables, ignore_index=True)


@torch.no_grad()
def promoted_tokens(
    bridge: TransformerBridge, prompts: Sequence[Prompt], components: Sequence[str], *, k: int = 5
) -> pd.DataFrame:
    """What each component's output reads through the lens: the tokens it raises and lowers most.

    Its output at the position where the answers part goes through the final norm, statistics
    frozen, and the unembedding; the mean over all tokens, which changes no probability, is taken
    off. Returns ``prompt component says rank token value``: ``says`` is "promotes" or "demotes",
    ``rank`` counts from 1, ``value`` in logits before any cap. Raises ``InputError`` for an unknown
    component or a bridge without tokenizer.
    """
    if bridge.tokenizer is None:
        raise InputError("this bridge has no tokenizer, so there are no words to show")
    rows: dict[int, list[dict[str, Any]]] = {}
    firsts = [p.branch for p in prompts]
    for index in chunks(firsts):
        terms, normed = _terms(bridge, record_last(bridge, [firsts[i] for i in index]))
        names = [term.name for term in terms]
        if unknown := [name for name in components if name not in names]:
            raise InputError(f"unknown component {unknown[0]!r}; expected some of {names}")
        written = normed[:, [names.index(name) for name in components]] @ bridge.W_U.float()
        written = written - written.mean(-1, keepdim=True)
        for i, own in zip(index, written):
            rows[i] = [
                {"prompt": prompts[i].id, "component": name, "says": says, "rank": rank}
                | {"token": bridge.tokenizer.decode([int(token)]), "value": float(logits[token])}
                for name, logits in zip(components, own)
                for says, largest in (("promotes", True), ("demotes", False))
                for rank, token in enumerate(logits.topk(k, largest=largest).indices, 1)
            ]
    return pd.DataFrame([row for i in range(len(prompts)) for row in rows[i]])


def head_sum_error(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> float:
    """Largest difference, in any coordinate, between attention outputs and sums of heads."""
    require_prompts(prompts)
    worst, firsts = 0.0, [p.branch for p in prompts]
    for index in chunks(firsts):
        cache = record_last(bridge, [firsts[i] for i in index])
        for layer in range(bridge.cfg.n_layers):
            parts = head_outputs(bridge, layer, cache).sum(1) + attention_bias(bridge, layer, cache)
            whole = cache[f"blocks.{layer}.hook_attn_out"]
            worst = max(worst, float((parts - whole).abs().max()))
    return worst


@torch.no_grad()
def record_last(bridge: TransformerBridge, rows: Sequence[Sequence[int]]) -> Cache:
    """What ``head_outputs`` and the attributions need, at rows' last position, by hook name."""
    kept = read_last(bridge, rows, last_names(bridge), 1)
    return {name: x[:, -1] for name, x in kept.items()}


@torch.no_grad()
def head_outputs(
    bridge: TransformerBridge, layer: int, cache: Cache
) -> Float[Tensor, "prompt head d_model"]:
    """What every head adds to the residual stream, post-norm included, biases left out.

    The heads sum to the layer's ``attn_out`` less ``attention_bias``.
    """
    out = project_heads(bridge, layer, cache[f"blocks.{layer}.attn.hook_z"])
    return _after_attention(bridge, layer, out, cache)


@torch.no_grad()
def attention_bias(
    bridge: TransformerBridge, layer: int, cache: Cache
) -> Float[Tensor, "prompt d_model"]:
    """What the attention output adds whatever the heads do (GPT-2's output bias); often zero."""
    z = cache[f"blocks.{layer}.attn.hook_z"]
    bias = projection_bias(bridge, layer, z).expand(len(z), 1, -1)
    return _after_attention(bridge, layer, bias, cache)[:, 0]


# ------------------------------------------------------------------------------------- internals
@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Tokens to predict after contexts of one length, and what is asked of the stream there."""

    tokens: list[AnswerToken]
    cache: Cache
    asked: Asked
    rest_terms: list[Term]  # what is no term of the stream
    rest: Float[Tensor, "row rest 2"]


def _batches(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> Iterator[_Batch]:
    tokens = answer_tokens(prompts)
    kinds: list[tuple[Term, str]] = []  # the same for all prompts, so that tables have no gaps
    if bridge.b_U.any():
        kinds.append((Term(name="UNEMBED_BIAS", kind="bias"), "bias"))
    if (getattr(bridge.cfg, "output_logits_soft_cap", None) or -1.0) > 0:
        kinds.append((Term(name="SOFT_CAP", kind="cap"), "cap"))
    if any(token.answer != "both" for token in tokens):
        kinds.append((Term(name="LOG_NORMALISER", kind="normaliser"), "normaliser"))
    parting = [token for token in tokens if token.answer == "both"]
    further = [token for token in tokens if token.answer != "both"]
    asked_together = [
        [alike[i] for i in chunk]
        for alike in (parting, further)
        for chunk in chunks([token.before for token in alike])
    ]
    for own in asked_together:
        cache = record_last(bridge, [token.before for token in own])
        asked = ask(bridge, cache["unembed.hook_out"].float(), own)
        rest = [getattr(asked, name) for _, name in kinds]
        yield _Batch(
            tokens=own,
            cache=cache,
            asked=asked,
            rest_terms=[term for term, _ in kinds],
            rest=torch.stack(rest, 1) if rest else asked.bias[:, None][:, :0],
        )


def _shares(batch: _Batch, normed: Float[Tensor, "row part d_model"]) -> Float[Tensor, "row all 2"]:
    """What every part of the stream, and then the rest, adds to each answer."""
    pattern = "row part d_model, row answer d_model -> row part answer"
    written = einsum(normed.double(), batch.asked.directions.double(), pattern).float()
    shares = torch.cat([written, batch.rest], 1)
    _require_sum(-shares.sum(1).diff(dim=-1)[:, 0], -batch.asked.log_p.diff(dim=-1)[:, 0])
    return shares


def _terms(
    bridge: TransformerBridge, cache: Cache
) -> tuple[list[Term], Float[Tensor, "prompt term d_model"]]:
    """Every term and what it writes, through the final norm with its statistics frozen."""
    terms = [Term(name="embed", kind="embed")]
    outputs = [cache["blocks.0.hook_resid_pre"].float()]
    for layer in range(bridge.cfg.n_layers):
        heads = head_outputs(bridge, layer, cache)
        outputs += heads.unbind(1)
        terms += [
            Term(name=f"L{layer}H{head}", kind="head", layer=layer, head=head)
            for head in range(heads.shape[1])
        ]
        bias = attention_bias(bridge, layer, cache)
        if bias.any():
            outputs.append(bias)
            terms.append(Term(name=f"L{layer}_ATTN_BIAS", kind="bias", layer=layer))
        mlp = f"blocks.{layer}.hook_mlp_out"
        if mlp in cache:  # some models are attention only
            outputs.append(cache[mlp].float())
            terms.append(Term(name=f"L{layer}_MLP", kind="mlp", layer=layer))
    normed, norm_bias = _through_final_norm(bridge, cache, torch.stack(outputs, 1))
    if norm_bias.any():
        terms.append(Term(name="FINAL_NORM_BIAS", kind="bias"))
        normed = torch.cat([normed, norm_bias.expand_as(normed[:, :1])], 1)
    return terms, normed


def _through_final_norm(
    bridge: TransformerBridge, cache: Cache, outputs: Float[Tensor, "prompt part d_model"]
) -> tuple[Float[Tensor, "prompt part d_model"], Float[Tensor, "d_model"]]:
    """Every part through the final norm with its statistics frozen; and the norm's bias."""
    scale = cache.get("ln_final.hook_scale", torch.ones_like(outputs[:, 0, :1]))
    normed = through_frozen_norm(bridge, "ln_final", outputs, scale[:, None])
    bias = getattr(getattr(bridge, "ln_final", None), "bias", None)
    return normed, torch.zeros_like(normed[0, 0]) if bias is None else bias.float()


def _require_sum(summed: Tensor, measured: Tensor) -> None:
    worst = float((summed - measured).abs().max())
    if worst > 0.05 * max(1.0, float(measured.abs().max())):  # bfloat16 stays within
        raise NotImplementedError(
            f"the terms sum to within {worst:.2g} of the model's decision only; expected a "
            "residual stream that is the plain sum of attention and MLP outputs, which this "
            "architecture does not have"
        )


def _after_attention(
    bridge: TransformerBridge,
    layer: int,
    out: Float[Tensor, "prompt head d_model"],
    cache: Cache,
) -> Float[Tensor, "prompt head d_model"]:
    """Through the norm that some models put after attention, its statistics frozen."""
    name = f"blocks.{layer}.ln1_post"
    if f"{name}.hook_scale" not in cache:
        return out.float()
    return through_frozen_norm(bridge, name, out, cache[f"{name}.hook_scale"][:, None])
