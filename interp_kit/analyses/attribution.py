"""Direct logit attribution: the decision as a sum over embedding, heads, MLPs and biases.

At the position where the answers part, the residual stream is a sum of terms: the embedding, what
every component (head or MLP) wrote, and biases. With the final norm's statistics frozen, norm and
unembedding are linear, so the pre-cap logit difference is the sum of

    value(c) = N(out_c) . (W_U[:, positive] - W_U[:, negative])

over terms c, exactly: nothing is left over. On models that normalise what a block adds
(Gemma-2's norm after attention), every head goes through that norm too, with its statistics frozen.
A final soft cap is monotone but not linear, hence *pre-cap*.

Sources: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021); Wang et al.,
"Interpretability in the Wild", arXiv:2211.00593.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.decisions import batches
from interp_kit.passes import last_names, read_last
from interp_kit.prompts import Prompt, require_prompts
from interp_kit.readout import project_heads, projection_bias, through_frozen_norm

Cache = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Term:
    """A term of the sum: what a component, the embedding or a bias writes to the stream."""

    name: str
    kind: Literal["embed", "head", "mlp", "bias"]
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


@torch.no_grad()
def direct_logit_attribution(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> pd.DataFrame:
    """Every term's share of the decision on every prompt.

    Returns one row for each prompt and term: ``prompt group component kind layer head value``;
    ``component`` is the term's name (``embed``, ``L2H3``, ``L2_MLP``, ``L2_ATTN_BIAS``); ``kind``
    is ``embed``, ``head``, ``mlp`` or ``bias``; ``layer`` and ``head`` are -1 where there is none;
    ``value`` in logits, positive towards the positive answer. A prompt's values sum to
    ``pre_cap_decision``.

    Where answers differ in more than one token, this is the first in which they differ.

    Raises ``NotImplementedError`` if the parts do not sum to the model's own decision, which means
    an architecture that does more between its parts and its logits than is known here.
    """
    rows: list[list[dict[str, Any]]] = [[] for _ in prompts]
    for branch in _branches(bridge, prompts):
        cache = record_last(bridge, branch.tokens)
        terms, normed = _terms(bridge, cache)
        pattern = "prompt term d_model, prompt d_model -> prompt term"
        shares = einsum(normed, branch.direction, pattern)
        if branch.bias.any():
            terms.append(Term(name="UNEMBED_BIAS", kind="bias"))
            shares = torch.cat([shares, branch.bias[:, :1] - branch.bias[:, 1:]], 1)
        _require_sum(shares.sum(1), _measured(cache, branch))
        for i, own in zip(branch.index, shares.tolist()):
            rows[i] = [term.row(prompts[i]) | {"value": v} for term, v in zip(terms, own)]
    return pd.DataFrame([row for own in rows for row in own])


@torch.no_grad()
def layer_attribution(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> pd.DataFrame:
    """Attention against MLP: what each layer's two parts write to the logit of each answer.

    Returns one row for each prompt and part: ``prompt group layer kind to_positive to_negative
    value``; ``kind`` is ``embed``, ``attn`` (all heads and their bias), ``mlp`` (all experts) or
    ``bias``; ``to_positive`` and ``to_negative`` are shares of the answers' logits before any cap,
    ``value`` their difference, the decision differential. All three sum to what the model computes.
    A share of *one* logit holds whatever raises all logits alike; only ``value`` is free of that.
    """
    rows: list[list[dict[str, Any]]] = [[] for _ in prompts]
    for branch in _branches(bridge, prompts):
        cache = record_last(bridge, branch.tokens)
        parts: list[tuple[str, int]] = [("embed", -1)]
        outputs = [cache["blocks.0.hook_resid_pre"].float()]
        for layer in range(bridge.cfg.n_layers):
            parts += [("attn", layer), ("mlp", layer)]
            outputs += [
                cache[f"blocks.{layer}.hook_{kind}_out"].float() for kind in ("attn", "mlp")
            ]
        normed, norm_bias = _through_final_norm(bridge, cache, torch.stack(outputs, 1))
        pattern = "prompt part d_model, prompt answer d_model -> prompt part answer"
        shares = einsum(normed, branch.unembed, pattern)
        bias = branch.bias + einsum(
            norm_bias, branch.unembed, "d, prompt answer d -> prompt answer"
        )
        if bias.any():
            parts.append(("bias", -1))
            shares = torch.cat([shares, bias[:, None]], 1)
        _require_sum(shares.sum(1).diff(dim=-1)[:, 0].neg(), _measured(cache, branch))
        for i, own in zip(branch.index, shares.tolist()):
            rows[i] = [
                {
                    "prompt": prompts[i].id,
                    "group": prompts[i].group,
                    "layer": layer,
                    "kind": kind,
                    "to_positive": positive,
                    "to_negative": negative,
                    "value": positive - negative,
                }
                for (kind, layer), (positive, negative) in zip(parts, own)
            ]
    return pd.DataFrame([row for own in rows for row in own])


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
def random_direction_control(
    bridge: TransformerBridge, prompts: Sequence[Prompt], *, n: int = 64, seed: int = 0
) -> pd.DataFrame:
    """The shares of ``n`` random directions, each of the norm of the decision's own direction.

    What a term writes along an arbitrary direction of that length: a share of the decision
    that is no larger is chance alignment. Returns ``prompt group component kind layer head draw
    value``, in logits.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for branch in _branches(bridge, prompts):
        terms, normed = _terms(bridge, record_last(bridge, branch.tokens))
        random = torch.randn(bridge.cfg.d_model, n, generator=generator).to(normed.device)
        random = random / random.norm(dim=0) * branch.direction.norm(dim=1)[:, None, None]
        pattern = "prompt term d_model, prompt d_model draw -> prompt term draw"
        shares = einsum(normed, random, pattern)
        rows = [term.row(prompts[i]) for i in branch.index for term in terms]
        table = pd.DataFrame(rows).loc[np.repeat(range(len(rows)), n)]
        draws = np.tile(range(n), len(rows))
        tables.append(table.assign(draw=draws, value=shares.flatten().cpu().double().numpy()))
    return pd.concat(tables, ignore_index=True)


@torch.no_grad()
def pre_cap_decision(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> pd.DataFrame:
    """What the attributions sum to: the logit difference where the answers part, before any cap.

    Returns ``prompt group value``, in logits, from the model's own forward pass.
    """
    values = torch.zeros(len(prompts))
    for branch in _branches(bridge, prompts):
        values[branch.index] = _measured(record_last(bridge, branch.tokens), branch).cpu()
    return pd.DataFrame(
        {
            "prompt": [p.id for p in prompts],
            "group": [p.group for p in prompts],
            "value": values.tolist(),
        }
    )


def head_sum_error(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> float:
    """Largest difference, in any coordinate, between attention outputs and sums of heads."""
    worst = 0.0
    for branch in _branches(bridge, prompts):
        cache = record_last(bridge, branch.tokens)
        for layer in range(bridge.cfg.n_layers):
            parts = head_outputs(bridge, layer, cache).sum(1) + attention_bias(bridge, layer, cache)
            whole = cache[f"blocks.{layer}.hook_attn_out"]
            worst = max(worst, float((parts - whole).abs().max()))
    return worst


@torch.no_grad()
def record_last(bridge: TransformerBridge, tokens: Int[Tensor, "prompt pos"]) -> Cache:
    """What ``head_outputs`` and the attributions need, at the last position, by hook name."""
    kept = read_last(bridge, tokens, last_names(bridge), 1)
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
class _Branch:
    """Prompts of one length up to where their answers part, and the question asked there."""

    index: list[int]
    tokens: Int[Tensor, "prompt pos"]
    ids: Int[Tensor, "prompt 2"]  # of the positive and of the negative answer
    unembed: Float[Tensor, "prompt 2 d_model"]  # W_U[:, positive], W_U[:, negative]
    bias: Float[Tensor, "prompt 2"]  # b_U of both

    @property
    def direction(self) -> Float[Tensor, "prompt d_model"]:
        """W_U[:, positive] - W_U[:, negative]."""
        return self.unembed[:, 0] - self.unembed[:, 1]


def _branches(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> Iterator[_Branch]:
    require_prompts(prompts)
    W_U, b_U = bridge.W_U, bridge.b_U
    for index in batches([(len(p.branch), None) for p in prompts]):
        ids = torch.tensor([prompts[i].branch_ids for i in index], device=W_U.device)
        yield _Branch(
            index=index,
            tokens=torch.tensor([prompts[i].branch for i in index]),
            ids=ids,
            unembed=rearrange(
                W_U[:, ids].float(), "d_model prompt answer -> prompt answer d_model"
            ),
            bias=b_U[ids].float(),
        )


def _measured(cache: Cache, branch: _Branch) -> Float[Tensor, "prompt"]:
    both = cache["unembed.hook_out"].float().gather(-1, branch.ids)
    return both[:, 0] - both[:, 1]


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
