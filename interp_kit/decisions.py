"""The metric: the decision that every analysis is about.

decision = log p(positive answer | prompt) - log p(negative answer | prompt), in nats, of the whole
answers. Positive values favour the answer that the scenario names ``positive``. Where the answers
share their first tokens and differ in one, teacher-forcing the shared tokens makes this exactly the
logit difference of the two differing tokens: the normaliser cancels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.prompts import Prompt, Sign

PADDED_ROWS = 32  # texts of one padded batch
MAX_TOKENS = 8192  # tokens in one forward pass: bounds memory, not results


@dataclass(frozen=True, kw_only=True)
class Forced:
    """Prompts of one length, each followed by an answer but for its last token.

    ``tokens[i]`` belongs to ``prompts[index[i]]``; the last ``answers[sign].shape[1]`` positions
    predict ``answers[sign]``.
    """

    index: list[int]
    tokens: Int[Tensor, "prompt pos"]
    answers: dict[Sign, Int[Tensor, "prompt answer"]]


@dataclass(frozen=True, kw_only=True)
class AnswerSequence:
    """One prompt followed by an answer but for its last token.

    The last positions predict ``answers``: both, where they differ in their last token only.
    """

    tokens: tuple[int, ...]
    answers: dict[Sign, tuple[int, ...]]

    @property
    def read(self) -> int:
        """How many positions at the end are read: of two answers only the one where they part."""
        return len(next(iter(self.answers.values()))) if len(self.answers) == 1 else 1


def decide(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> pd.DataFrame:
    """The decision on every prompt.

    Columns: ``prompt``, ``group``; ``value``, the decision in nats; ``p_positive``, the probability
    of the positive answer given that one of the two is given; ``answer_mass``, the probability that
    one of the two is given at all; ``action``, the label of the likelier answer.
    """
    log_p = answer_log_probs(bridge, prompts)
    value = log_p["positive"] - log_p["negative"]
    return pd.DataFrame(
        {
            "prompt": [p.id for p in prompts],
            "group": [p.group for p in prompts],
            "value": value.tolist(),
            "p_positive": value.sigmoid().tolist(),
            "answer_mass": (log_p["positive"].exp() + log_p["negative"].exp()).tolist(),
            "action": [
                p.positive_label if v > 0 else p.negative_label for p, v in zip(prompts, value)
            ],
        }
    )


@torch.no_grad()
def answer_log_probs(
    bridge: TransformerBridge, prompts: Sequence[Prompt]
) -> dict[Sign, Float[Tensor, "prompt"]]:
    """log p(answer | prompt) in nats, of each whole answer."""
    totals: dict[Sign, Tensor] = {
        "positive": torch.zeros(len(prompts)),
        "negative": torch.zeros(len(prompts)),
    }
    for forced in teacher_forced(prompts):
        read = max(ids.shape[1] for ids in forced.answers.values())
        logits = last_logits(bridge, forced.tokens, read)
        log_p = logits.float().log_softmax(-1).cpu()
        for sign, ids in forced.answers.items():
            chosen = log_p[:, -ids.shape[1] :].gather(-1, ids[..., None])
            totals[sign][forced.index] = chosen[..., 0].sum(-1)
    return totals


def answer_sequences(prompt: Prompt) -> list[AnswerSequence]:
    """One sequence where the answers differ in their last token only, else one for each answer."""
    both: dict[Sign, tuple[int, ...]] = {"positive": prompt.positive, "negative": prompt.negative}
    groups = [both] if prompt.one_branch else [{sign: ids} for sign, ids in both.items()]
    return [
        AnswerSequence(tokens=prompt.tokens + next(iter(answers.values()))[:-1], answers=answers)
        for answers in groups
    ]


def teacher_forced(prompts: Sequence[Prompt]) -> Iterator[Forced]:
    """Batches of prompts of one length with their answers; no padding, so no masks to get wrong.

    Answers that differ in their last token only share one forward pass; others take two.
    """
    for index in batches([(len(p.tokens), _answer_shape(p)) for p in prompts]):
        for batch in zip(*(answer_sequences(prompts[i]) for i in index)):
            yield Forced(
                index=index,
                tokens=torch.tensor([sequence.tokens for sequence in batch]),
                answers={
                    sign: torch.tensor([sequence.answers[sign] for sequence in batch])
                    for sign in batch[0].answers
                },
            )


def batches(shapes: Sequence[tuple[int, object]]) -> Iterator[list[int]]:
    """Indices of items of equal shape ``(length, anything)``, at most ``MAX_TOKENS`` at once."""
    for shape in dict.fromkeys(shapes):
        same = [i for i, other in enumerate(shapes) if other == shape]
        size = max(1, MAX_TOKENS // shape[0])
        yield from (same[i : i + size] for i in range(0, len(same), size))


def padded(
    rows: Sequence[Sequence[int]], device: Any
) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
    """Token ids, padded at the right where a causal model cannot see it; which are real."""
    tokens = pad_sequence([torch.tensor(list(row)) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    inside = torch.arange(tokens.shape[1]) < lengths[:, None]
    return tokens.to(device), inside.to(device)


@torch.no_grad()
def losses(bridge: TransformerBridge, rows: Sequence[Sequence[int]]) -> Float[Tensor, "row"]:
    """Mean next-token cross-entropy of each row of tokens, in nats."""
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    result = torch.zeros(len(rows))
    for start in range(0, len(rows), PADDED_ROWS):
        index = by_length[start : start + PADDED_ROWS]
        tokens, inside = padded([rows[i] for i in index], bridge.cfg.device)
        logits = bridge(tokens).float()[:, :-1]
        each = F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none") * inside[:, 1:]
        result[index] = (each.sum(1) / inside[:, 1:].sum(1)).cpu()
    return result


def last_logits(
    bridge: TransformerBridge, tokens: Int[Tensor, "prompt pos"], read: int
) -> Float[Tensor, "prompt read vocab"]:
    """The model's logits at the last ``read`` positions only; the others are never unembedded."""
    return bridge.run_with_hooks(
        tokens.to(bridge.cfg.device),
        fwd_hooks=[("unembed.hook_in", lambda resid, hook: resid[:, -read:])],
    )


@torch.no_grad()
def end_probability(
    bridge: TransformerBridge, prompts: Sequence[Prompt], *, end: int, suffix: int | None = None
) -> Float[Tensor, "prompt"]:
    """p(end token) after each prompt, or after the prompt and one further token."""
    rows = [(*p.tokens, *([] if suffix is None else [suffix])) for p in prompts]
    result = torch.empty(len(rows))
    for index in batches([(len(row), None) for row in rows]):
        tokens = torch.tensor([rows[i] for i in index])
        logits = last_logits(bridge, tokens, 1)[:, -1].float()
        result[index] = logits.softmax(-1)[:, end].cpu()
    return result


def _answer_shape(prompt: Prompt) -> tuple[int, int, bool]:
    return len(prompt.positive), len(prompt.negative), prompt.one_branch
