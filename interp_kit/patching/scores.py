"""From the logits of one patched sequence to a number of nats.

The decision is log p(positive answer) - log p(negative answer). Where the answers differ in their
last token only, both are read off one sequence, and the normaliser cancels: ``LogitDifference``.
Else each answer has a sequence of its own and adds its ``AnswerLogProbability``, the negative one
with a minus sign. The metric "kl" is the ``Divergence`` from the unpatched run instead.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from interp_kit.decisions import AnswerSequence, answer_sequences
from interp_kit.prompts import Prompt, Sign

Metric = Literal["decision", "kl"]


@dataclass(frozen=True, kw_only=True)
class LogitDifference:
    """logit(positive token) - logit(negative token) at the last position."""

    ids: tuple[int, int]  # the only tokens whose logits are needed: (positive, negative)

    def __call__(self, logits: Float[Tensor, "row read 2"]) -> Float[Tensor, "row"]:
        return logits[:, -1, 0] - logits[:, -1, 1]


@dataclass(frozen=True, kw_only=True)
class AnswerLogProbability:
    """log p(answer | prompt), or minus that for the negative answer."""

    answer: tuple[int, ...]
    sign: Sign
    ids: None = None  # of the whole vocabulary

    def __call__(self, logits: Float[Tensor, "row read vocab"]) -> Float[Tensor, "row"]:
        log_p = logits[:, -len(self.answer) :].log_softmax(-1)
        total = log_p[:, range(len(self.answer)), list(self.answer)].sum(-1)
        return total if self.sign == "positive" else -total


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL(unpatched || patched) of the next-token distribution at the last position."""

    unpatched: Float[Tensor, "vocab"]  # log probabilities
    ids: None = None

    def __call__(self, logits: Float[Tensor, "row read vocab"]) -> Float[Tensor, "row"]:
        log_p = logits[:, -1].log_softmax(-1)
        return (self.unpatched.exp() * (self.unpatched - log_p)).sum(-1)


Score = LogitDifference | AnswerLogProbability | Divergence


def read_sequences(prompt: Prompt, metric: Metric) -> list[AnswerSequence]:
    """The sequences whose logits make the metric: its value is the sum of their scores."""
    if metric == "kl":
        return [AnswerSequence(tokens=prompt.branch, answers={})]
    return answer_sequences(prompt)


def score_of(sequence: AnswerSequence, unpatched: Float[Tensor, "read vocab"]) -> Score:
    """What to make of the sequence's logits, given those of the run that is patched."""
    match sequence.answers:
        case {"positive": positive, "negative": negative}:
            return LogitDifference(ids=(positive[-1], negative[-1]))
        case {"positive": answer}:
            return AnswerLogProbability(answer=answer, sign="positive")
        case {"negative": answer}:
            return AnswerLogProbability(answer=answer, sign="negative")
    return Divergence(unpatched=unpatched[-1].cpu().log_softmax(-1))
