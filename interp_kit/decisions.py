"""The metric: the decision that every analysis is about.

decision = log p(positive answer | prompt) - log p(negative answer | prompt), in nats, of the whole
answers. Positive values favour the answer that the scenario names ``positive``. Where the answers
share their first tokens and differ in one, teacher-forcing the shared tokens makes this exactly the
logit difference of the two differing tokens: the normaliser cancels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit import store
from interp_kit.batching import Ids, Part, padded, padded_batches, parts
from interp_kit.prompts import Prompt, Sign, require_prompts, special_token
from interp_kit.records import GIVES, Named, answer, named
from interp_kit.specs import InputError
from interp_kit.statistics import mean_interval, verdict

LEAST_MASS = 0.1  # probability of either answer below which decisions say little
ROUNDED_LOGIT = 8.0  # the size of logits for which limits of rounding errors are stated


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
    require_prompts(prompts)
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


def answer_log_probs(
    bridge: TransformerBridge, prompts: Sequence[Prompt]
) -> dict[Sign, Float[Tensor, "prompt"]]:
    """log p(answer | prompt) in nats, of each whole answer."""
    asked = [(p.tokens, p.positive) for p in prompts] + [(p.tokens, p.negative) for p in prompts]
    positive, negative = continuation_log_probs(bridge, asked).split(len(prompts))
    return {"positive": positive, "negative": negative}


@torch.no_grad()
def continuation_log_probs(
    bridge: TransformerBridge, asked: Sequence[tuple[Ids, Ids]]
) -> Float[Tensor, "asked"]:
    """log p(answer | prompt) in nats, of each pair of token ids.

    Answers to one prompt that differ in their last token only share one row of a forward pass, and
    rows that begin alike the pass over their beginning. They are kept on disk, where there is a
    ``store``.
    """
    name = store.name_of(bridge, "log p", [(list(prompt), list(said)) for prompt, said in asked])
    if (found := store.find(name)) is not None:
        return found["log_p"]
    sharing: dict[Ids, list[int]] = {}
    for i, (prompt, said) in enumerate(asked):
        sharing.setdefault(prompt + said[:-1], []).append(i)
    rows = list(sharing)
    result = torch.empty(len(asked))
    reads = [max(len(asked[i][1]) for i in sharing[row]) for row in rows]
    for part in parts(bridge, rows, read=reads):
        logits = part_logits(bridge, part, max(reads[r] for r in part.index))
        for log_p, r in zip(logits.float().log_softmax(-1).cpu(), part.index):
            for i in sharing[rows[r]]:
                ids = torch.tensor(asked[i][1])
                result[i] = log_p[-len(ids) :].gather(-1, ids[:, None]).sum()
    store.keep(name, {"log_p": result})
    return result


def answer_sequences(prompt: Prompt) -> list[AnswerSequence]:
    """One sequence where the answers differ in their last token only, else one for each answer."""
    both: dict[Sign, tuple[int, ...]] = {"positive": prompt.positive, "negative": prompt.negative}
    groups: list[dict[Sign, tuple[int, ...]]] = [both]
    if not prompt.one_branch:
        groups = [{sign: ids} for sign, ids in both.items()]
    return [
        AnswerSequence(tokens=prompt.tokens + next(iter(answers.values()))[:-1], answers=answers)
        for answers in groups
    ]


@torch.no_grad()
def losses(bridge: TransformerBridge, rows: Sequence[Sequence[int]]) -> Float[Tensor, "row"]:
    """Mean next-token cross-entropy of each row of tokens, in nats."""
    result = torch.zeros(len(rows))
    for index in padded_batches(rows):
        tokens, inside = padded([rows[i] for i in index], bridge.cfg.device)
        logits = bridge(tokens).float()[:, :-1]
        each = F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none") * inside[:, 1:]
        result[index] = (each.sum(1) / inside[:, 1:].sum(1)).cpu()
    return result


def last_logits(
    bridge: TransformerBridge, tokens: Int[Tensor, "prompt pos"], read: int
) -> Float[Tensor, "prompt read vocab"]:
    """The model's logits at the last ``read`` positions only; the others are never unembedded."""
    lengths = torch.full(tokens.shape[:1], tokens.shape[1], device=bridge.cfg.device)
    part = Part(
        index=[*range(len(tokens))],
        tokens=tokens.to(bridge.cfg.device),
        lengths=lengths,
        before={},
    )
    return part_logits(bridge, part, read)


def part_logits(
    bridge: TransformerBridge, part: Part, read: int
) -> Float[Tensor, "row read vocab"]:
    """The logits of each row of a part at its last ``read`` positions."""
    return bridge.run_with_hooks(
        part.tokens,
        fwd_hooks=[("unembed.hook_in", lambda x, hook: part.last(x, read))],
        **part.before,
    )


def generated(
    bridge: TransformerBridge,
    tokens: Int[Tensor, "row pos"],
    *,
    max_new_tokens: int,
    do_sample: bool,
) -> Int[Tensor, "row all_pos"]:
    """The rows and what the model continues them by, at temperature 1, up to its end of text."""
    written: Any = bridge.generate(
        tokens,
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        stop_at_eos=special_token(bridge, "eos") is not None,
        verbose=False,
    )
    return written


@torch.no_grad()
def end_probability(
    bridge: TransformerBridge, prompts: Sequence[Prompt], *, end: int, suffix: int | None = None
) -> Float[Tensor, "prompt"]:
    """p(end token) after each prompt, or after the prompt and one further token."""
    rows = [(*p.tokens, *([] if suffix is None else [suffix])) for p in prompts]
    result = torch.empty(len(rows))
    for part in parts(bridge, rows, read=[1] * len(rows)):
        logits = part_logits(bridge, part, 1)[:, 0].float()
        result[part.index] = logits.softmax(-1)[:, end].cpu()
    return result


def noise_limit(
    bridge: TransformerBridge, prompts: Sequence[Prompt], *, most: float = 1e-4
) -> float:
    """How far rounding may move a decision on these prompts, in nats; above it something is wrong.

    ``most`` is for float32 and logits of up to ``ROUNDED_LOGIT``. Rounding grows with the logits
    that are computed, whose size softmax does not see, and in half precision a thousandfold.
    """
    rows = [p.branch for p in prompts[:: max(1, len(prompts) // 8)]]  # eight say how large
    name = store.name_of(bridge, "largest logit", [list(row) for row in rows])
    if (found := store.find(name)) is None:
        of_parts = parts(bridge, rows, read=[1] * len(rows))
        sizes = [part_logits(bridge, part, 1).abs().max() for part in of_parts]
        found = {"largest": torch.stack(sizes).max()}
        store.keep(name, found)
    largest = float(found["largest"])
    precision = 1 if bridge.cfg.dtype.itemsize == 4 else 1e3
    return most * precision * max(1.0, largest / ROUNDED_LOGIT)


def check_noise(measured: float, limit: float) -> None:
    """Raise ``InputError`` for a noise floor above its limit (``noise_limit``)."""
    if not measured <= limit:
        raise InputError(
            f"the noise floor of this model is {measured:.1e} nats, above its limit of "
            f"{limit:.1e}: an identity that holds for every transformer fails, so nothing is "
            "analysed; run 00_numerics_gate, try dtype: float32, and report the model's config"
        )


def answers_given(decisions: pd.DataFrame) -> tuple[dict[str, Named], dict[str, str]]:
    """Whether the model gives one of the two answers at all: a summary value and an answer.

    Where it hardly does, a decision compares two answers that nobody would hear, and what moves it
    explains little. ``decisions`` is a table of ``decide``; of several models, in the column
    ``model``, the one that gives them least counts. The answer is printed.
    """
    by = ["model"] if "model" in decisions else []
    masses = mean_interval(decisions, by, column="answer_mass", within=(0.0, 1.0))
    least = masses.nsmallest(1, "value")
    which = f" of {least.model.item()}" if "model" in least else ""
    summary = {f"answer mass{which}": named(least, unit="")}
    row = {key: float(least[key].item()) for key in ("value", "low", "high", "n")}
    low, high = [row["value"]] * 2 if row["n"] == 1 else (row["low"], row["high"])
    given = verdict(low, high, ">", LEAST_MASS)
    rarely = "hardly ever, so read its decisions with care" if given == "no" else ""
    answers = {GIVES: answer(given, summary, *summary, because=rarely)}
    print(GIVES, answers[GIVES])
    return summary, answers
