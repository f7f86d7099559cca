"""What a decision asks of the residual stream: a direction for each token of its answers.

Where the answers part, the decision's part is the difference of two logits: the normaliser of the
softmax cancels, and the direction is W_U[:, positive] - W_U[:, negative]. A further token t of one
answer is predicted in a context that the other answer does not share. Its direction is the gradient
of log p(t), so that what raises all logits alike counts for nothing, and what is left is the
entropy of the prediction:

    log p(t) = h . (W_U[:, t] - sum over v of p(v) W_U[:, v]) + bias + cap - H(p)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.prompts import Prompt, require_prompts
from interp_kit.readout import soft_cap

Answer = Literal["both", "positive", "negative"]
AT_ONCE = 2**13  # tokens of the vocabulary in float64 at once: bounds memory, not results


@dataclass(frozen=True, kw_only=True)
class AnswerToken:
    """A token of an answer that is to be predicted, and what comes before it.

    ``token`` is counted from where the answers part: there, at 0, ``answer`` is "both". ``ids`` are
    the tokens to predict, of the positive and of the negative answer.
    """

    prompt: int
    answer: Answer
    token: int
    before: tuple[int, ...]
    ids: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Directions in the normed stream, for each answer, and what is added to them.

    Each is zero for an answer that a row does not ask for. ``bias`` is the unembedding's, ``cap``
    what the final soft cap adds and ``normaliser`` minus the entropy; ``log_p`` is the whole, by
    the model's own logits; of both answers, it is their difference that has these parts.
    """

    directions: Float[Tensor, "row 2 d_model"]
    bias: Float[Tensor, "row 2"]
    cap: Float[Tensor, "row 2"]
    normaliser: Float[Tensor, "row 2"]
    log_p: Float[Tensor, "row 2"]


def answer_tokens(prompts: Sequence[Prompt]) -> list[AnswerToken]:
    """Of every prompt the token where its answers part, then the further tokens of each answer."""
    require_prompts(prompts)
    tokens = []
    for i, prompt in enumerate(prompts):
        first = len(prompt.shared)
        parting = {"before": prompt.branch, "ids": prompt.branch_ids}
        tokens.append(AnswerToken(prompt=i, answer="both", token=0, **parting))
        sides: list[tuple[Answer, tuple[int, ...]]]
        sides = [("positive", prompt.positive), ("negative", prompt.negative)]
        tokens += [
            AnswerToken(
                prompt=i,
                answer=answer,
                token=at - first,
                before=prompt.tokens + ids[:at],
                ids=(ids[at], ids[at]),
            )
            for answer, ids in sides
            for at in range(first + 1, len(ids))
        ]
    return tokens


def ask(
    bridge: TransformerBridge, logits: Float[Tensor, "row vocab"], tokens: Sequence[AnswerToken]
) -> Asked:
    """What these tokens ask of the stream where they are predicted.

    ``logits`` are the model's own there, before any cap. Of the tokens either all are where answers
    part, or all are further ones.
    """
    ids = torch.tensor([token.ids for token in tokens], device=logits.device)
    W_U, b_U = bridge.W_U, bridge.b_U.float()
    directions = rearrange(W_U[:, ids].float(), "d_model row answer -> row answer d_model")
    bias, capped = b_U[ids], soft_cap(bridge, logits)
    cap = (capped - logits).gather(-1, ids)
    all_log_p = capped.log_softmax(-1)
    normaliser = torch.zeros_like(cap)
    if tokens[0].answer != "both":
        p = all_log_p.exp()
        directions = (directions.double() - _mean_over_vocabulary(p, W_U)[:, None]).float()
        bias = bias - (p @ b_U)[:, None]
        cap = cap - (p * (capped - logits)).sum(-1, keepdim=True)
        normaliser = (p * all_log_p).sum(-1, keepdim=True).expand_as(cap)
    sides = [[t.answer != "negative", t.answer != "positive"] for t in tokens]
    asked = torch.tensor(sides, device=logits.device).float()
    return Asked(
        directions=directions * asked[..., None],
        bias=bias * asked,
        cap=cap * asked,
        normaliser=normaliser * asked,
        log_p=all_log_p.gather(-1, ids) * asked,
    )


def _mean_over_vocabulary(
    p: Float[Tensor, "row vocab"], W_U: Float[Tensor, "d_model vocab"]
) -> Float[Tensor, "row d_model"]:
    """W_U p, summed in float64, some tokens at a time.

    The normed stream may be hundreds of times as long as a direction, and its rounding with it.
    """
    parts = zip(p.double().split(AT_ONCE, 1), W_U.split(AT_ONCE, 1))
    return torch.stack([own @ weights.double().mT for own, weights in parts]).sum(0)
