"""Prompts and answers -> tokens, and the decision that every analysis is about.

decision = log p(positive answer | prompt) - log p(negative answer | prompt), in nats, of the whole
answers. Positive values favour the answer that the scenario names ``positive``. Where the answers
share their first tokens and differ in one, teacher-forcing the shared tokens makes this exactly the
logit difference of the two differing tokens: the normaliser cancels.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal, Protocol, runtime_checkable

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.specs import InputError, Scenario

PADDED_ROWS = 32  # texts of one padded batch

MAX_TOKENS = 8192  # tokens in one forward pass: bounds memory, not results

Sign = Literal["positive", "negative"]


@runtime_checkable
class Tokenizing(Protocol):
    """What encoding needs of a model: a ``TransformerBridge`` has it, and so has a bare config.

    ``tokenizer`` of Hugging Face; ``cfg`` with ``default_prepend_bos d_vocab n_ctx``.
    """

    tokenizer: Any
    cfg: Any


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A named part of a prompt: its token positions, and those of its counterfactual."""

    name: str
    positions: tuple[int, ...]
    counterfactual: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt and its two answers as token ids.

    ``text`` is what was tokenized, chat template included; ``counterfactual`` are the token ids of
    the prompt that asks for the other answer, if there is one.
    """

    id: str
    group: str = ""
    text: str
    tokens: tuple[int, ...]
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    positive_label: str = "positive"
    negative_label: str = "negative"
    counterfactual: tuple[int, ...] | None = None
    segments: tuple[Segment, ...] = ()

    @property
    def shared(self) -> tuple[int, ...]:
        """The tokens that both answers begin with."""
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(self.positive, self.negative))
        return tuple(first for first, _ in pairs)

    @property
    def branch(self) -> tuple[int, ...]:
        """Prompt and shared tokens: its last position is where the answers part."""
        return self.tokens + self.shared

    @property
    def branch_ids(self) -> tuple[int, int]:
        """The first tokens in which the answers differ: (positive, negative)."""
        at = len(self.shared)
        return self.positive[at], self.negative[at]

    @property
    def one_branch(self) -> bool:
        """Whether the answers differ in their last token only."""
        return self.positive[:-1] == self.negative[:-1]

    def swapped(self) -> "Prompt":
        """The counterfactual as a prompt of its own, with this one as its counterfactual."""
        if self.counterfactual is None:
            raise InputError(f"prompt {self.id!r} has no counterfactual; add one to the scenario")
        return replace(
            self,
            id=f"{self.id}*",
            text="",
            tokens=self.counterfactual,
            counterfactual=self.tokens,
            segments=tuple(
                replace(s, positions=s.counterfactual, counterfactual=s.positions)
                for s in self.segments
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Forced:
    """Prompts of one length, each followed by an answer but for its last token.

    ``tokens[i]`` belongs to ``prompts[index[i]]``; the last ``answers[sign].shape[1]`` positions
    predict ``answers[sign]``.
    """

    index: list[int]
    tokens: Int[Tensor, "prompt pos"]
    answers: dict[Sign, Int[Tensor, "prompt answer"]]


def encode(
    bridge: Tokenizing,
    text: str,
    *,
    positive: str,
    negative: str,
    id: str = "0",
    group: str = "",
    counterfactual: str | None = None,
    labels: tuple[str, str] = ("positive", "negative"),
    segments: Mapping[str, str | Sequence[str]] | None = None,
) -> Prompt:
    """Tokenize one prompt as in generation: chat template where the tokenizer has one, then BOS.

    Answers are what the tokenizer adds to the prompt: give the leading space, except after a chat
    template, where a leading space is dropped. Where it would join the prompt's end with an answer
    ("(" and "1" to "(1"), the answer is read as generation continues, with a warning. ``segments``
    name parts of the prompt by their text (or by two texts, in the prompt and in its
    counterfactual): every token that overlaps with it.

    Raises ``InputError`` if the answers have the same token ids, if one begins with the other, if a
    segment has different numbers of tokens in prompt and counterfactual, or if the prompt does not
    fit into the context.
    """
    formatted = with_template(bridge, text)
    if formatted != text:
        positive, negative = positive.lstrip(), negative.lstrip()
    tokens = token_ids(bridge, formatted)
    answers = [answer_ids(bridge, formatted, tokens, a) for a in (positive, negative)]
    swapped = (
        None if counterfactual is None else token_ids(bridge, with_template(bridge, counterfactual))
    )
    prompt = Prompt(
        id=id,
        group=group,
        text=formatted,
        tokens=tokens,
        positive=answers[0],
        negative=answers[1],
        positive_label=labels[0],
        negative_label=labels[1],
        counterfactual=swapped,
        segments=tuple(
            _segment(bridge, id, name, parts, formatted, counterfactual)
            for name, parts in (segments or {}).items()
        ),
    )
    _check(bridge, prompt, positive, negative)
    return prompt


def encode_scenario(bridge: Tokenizing, scenario: Scenario) -> list[Prompt]:
    """Every prompt of the scenario, tokenized for this model."""
    decision = scenario.decision
    return [
        encode(
            bridge,
            prompt.text,
            positive=prompt.positive or decision.positive,
            negative=prompt.negative or decision.negative,
            id=prompt.id,
            group=prompt.group,
            counterfactual=prompt.counterfactual,
            labels=(decision.labels.positive, decision.labels.negative),
            segments=prompt.segments,
        )
        for prompt in scenario.prompts
    ]


def with_random_answers(
    bridge: Tokenizing, prompts: Sequence[Prompt], *, n: int = 16, seed: int = 0
) -> list[Prompt]:
    """A control: every prompt ``n`` times, with two random tokens where its answers part.

    Read at the same position as the decision, they are a contrast that the prompt does not ask for.
    Ids stay those of the prompts.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(bridge.cfg.d_vocab, len(bridge.tokenizer))
    controls = []
    for prompt in prompts:
        for _ in range(n):
            first, second = torch.randperm(size, generator=generator)[:2].tolist()
            positive, negative = (*prompt.shared, first), (*prompt.shared, second)
            controls.append(replace(prompt, positive=positive, negative=negative))
    return controls


def with_unrelated_counterfactuals(prompts: Sequence[Prompt]) -> list[Prompt]:
    """A control: every prompt with another prompt in its counterfactual's place.

    The next one of another group, with the same answers and number of tokens: it asks for the same
    answer in other words. Prompts for which there is none are left out.
    """
    controls = []
    for i, prompt in enumerate(prompts):
        others = [*prompts[i + 1 :], *prompts[:i]]
        same = (
            other
            for other in others
            if (other.positive, other.negative) == (prompt.positive, prompt.negative)
            and len(other.tokens) == len(prompt.tokens)
            and (other.group != prompt.group or not prompt.group)
        )
        if (other := next(same, None)) is not None:
            controls.append(replace(prompt, counterfactual=other.tokens, segments=()))
    return controls


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


def teacher_forced(prompts: Sequence[Prompt]) -> Iterator[Forced]:
    """Batches of prompts of one length with their answers; no padding, so no masks to get wrong.

    Answers that differ in their last token only share one forward pass; others take two.
    """
    for index in batches([(len(p.tokens), _answer_shape(p)) for p in prompts]):
        ours = [prompts[i] for i in index]
        answers: dict[Sign, list[tuple[int, ...]]] = {
            "positive": [p.positive for p in ours],
            "negative": [p.negative for p in ours],
        }
        if all(p.one_branch for p in ours):
            yield _forced(ours, index, answers)
        else:
            for sign, ids in answers.items():
                yield _forced(ours, index, {sign: ids})


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


def token_ids(bridge: Tokenizing, text: str) -> tuple[int, ...]:
    """The text as the model reads it: with BOS if it takes one, without a chat template."""
    tokenizer = bridge.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    wanted = bridge.cfg.default_prepend_bos and bos is not None and bos < bridge.cfg.d_vocab
    if wanted and ids[:1] != [bos]:  # a chat template brings its own
        ids = [bos, *ids]
    return tuple(ids)


def token_of(bridge: Tokenizing, text: str) -> int:
    """The one token that ``text`` adds to a prompt.

    Raises ``InputError`` if the tokenizer splits it, and names new tokens that it does know.
    """
    ids = bridge.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != bridge.tokenizer.unk_token_id:
        return ids[0]
    added = sorted(bridge.tokenizer.get_added_vocab())
    pieces = bridge.tokenizer.convert_ids_to_tokens(ids)
    raise InputError(
        f"{text!r} is not one token of this model's tokenizer, which splits it into {pieces}; "
        f"expected a single token such as one of its added ones ({', '.join(added) or 'none'}), "
        "or a model whose tokenizer has it"
    )


def trigger_tokens(bridge: Tokenizing, scenario: Scenario) -> dict[str, int]:
    """What may follow the scenario's prompts, name -> token: trigger, untrained token, words.

    Raises ``InputError`` for a scenario without a trigger, and for one that is not one token.
    """
    given = scenario.trigger
    if given is None:
        raise InputError(
            f"scenario {scenario.name!r} has no trigger; expected one that says "
            "trigger: {text: ..., words: [...]}"
        )
    texts = [given.text, *([given.untrained] if given.untrained else []), *given.words]
    return {text.strip(): token_of(bridge, text) for text in texts}


# ------------------------------------------------------------------------------------- internals
def _forced(
    prompts: list[Prompt], index: list[int], answers: dict[Sign, list[tuple[int, ...]]]
) -> Forced:
    forced = next(iter(answers.values()))
    return Forced(
        index=index,
        tokens=torch.tensor([p.tokens + a[:-1] for p, a in zip(prompts, forced)]),
        answers={sign: torch.tensor(ids) for sign, ids in answers.items()},
    )


def _answer_shape(prompt: Prompt) -> tuple[int, int, bool]:
    return len(prompt.positive), len(prompt.negative), prompt.one_branch


def with_template(bridge: Tokenizing, text: str) -> str:
    """The text as a user's turn, answer to follow, if the model has a chat template."""
    tokenizer = bridge.tokenizer
    if not tokenizer.chat_template:
        return text
    turn = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


def _segment(
    bridge: Tokenizing,
    prompt: str,
    name: str,
    parts: str | Sequence[str],
    formatted: str,
    counterfactual: str | None,
) -> Segment:
    here, there = (parts, parts) if isinstance(parts, str) else parts
    ours = _positions_of(bridge, here, formatted)
    if counterfactual is None:
        return Segment(name=name, positions=ours)
    theirs = _positions_of(bridge, there, with_template(bridge, counterfactual))
    if len(ours) != len(theirs):
        raise InputError(
            f"prompt {prompt!r}: segment {name!r} has {len(ours)} tokens, and {len(theirs)} in the "
            "counterfactual; expected equal numbers, so that positions correspond: reword one"
        )
    return Segment(name=name, positions=ours, counterfactual=theirs)


def _positions_of(bridge: Tokenizing, part: str, text: str) -> tuple[int, ...]:
    """Positions, BOS counted, of the tokens that overlap with ``part`` in ``text``."""
    offsets = bridge.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if (first := text.find(part)) < 0:
        raise InputError(f"segment {part!r} does not occur in {text!r}; give words of the prompt")
    last = first + len(part)
    added = len(token_ids(bridge, text)) - len(offsets["input_ids"])  # a BOS
    return tuple(
        added + i
        for i, (start, end) in enumerate(offsets["offset_mapping"])
        if start < last and end > first
    )


def answer_ids(
    bridge: Tokenizing, text: str, tokens: tuple[int, ...], answer: str
) -> tuple[int, ...]:
    """What the answer adds to the prompt's tokens.

    Where the tokenizer would merge the end of the prompt with the answer (a prompt that ends in a
    space, say), the prompt stays as a user sends it and the answer is tokenized alone: that is what
    generation continues from.

    Raises ``InputError`` if the answer's tokens alone do not spell it there.
    """
    tokenizer = bridge.tokenizer
    whole = token_ids(bridge, text + answer)
    if whole[: len(tokens)] == tokens:
        return whole[len(tokens) :]
    alone = tuple(tokenizer(answer, add_special_tokens=False)["input_ids"])
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(whole, tokens))))
    joined = tokenizer.decode(whole[same : same + 1])
    if tokenizer.decode([*tokens, *alone]) != tokenizer.decode(tokens) + answer:
        raise InputError(
            f"the tokenizer joins the end of the prompt with the answer {answer!r} to {joined!r}, "
            f"and alone the answer is {tokenizer.convert_ids_to_tokens(list(alone))}, which does "
            f"not continue the prompt; end the prompt before {joined!r}, or choose other answers, "
            f"such as {_proposed(bridge)}"
        )
    warnings.warn(
        f"the tokenizer joins a prompt's end with its answer ({joined!r} is one token); the answer "
        "is read as generation continues, as a token of its own",
        stacklevel=3,
    )
    return alone


def _proposed(bridge: Tokenizing) -> str:
    """Pairs of common answers that are different single tokens for this tokenizer."""
    tokenizer, found = bridge.tokenizer, []
    for pair in ((" A", " B"), ("1", "2"), (" yes", " no"), (" first", " second")):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair]
        known = all(len(i) == 1 and i[0] != tokenizer.unk_token_id for i in ids)
        if known and ids[0] != ids[1]:
            found.append(f"{pair[0]!r} and {pair[1]!r}")
    return ", or ".join(found) or "two of its single tokens"


def _check(bridge: Tokenizing, prompt: Prompt, positive: str, negative: str) -> None:
    shown = [
        f"{text!r} -> {bridge.tokenizer.convert_ids_to_tokens(list(ids))}"
        for text, ids in ((positive, prompt.positive), (negative, prompt.negative))
    ]
    if prompt.shared in (prompt.positive, prompt.negative):
        same = (
            "are the same tokens"
            if prompt.positive == prompt.negative
            else "begin alike to the end"
        )
        raise InputError(
            f"prompt {prompt.id!r}: the answers {same} for this tokenizer ({'; '.join(shown)}); "
            "expected answers that part at some token: reword them, end both with a period, or "
            f"take words that it tells apart, such as {_proposed(bridge)}"
        )
    longest = max(len(prompt.tokens), len(prompt.counterfactual or ()))
    longest += max(len(prompt.positive), len(prompt.negative))
    if longest > bridge.cfg.n_ctx:
        raise InputError(
            f"prompt {prompt.id!r}: {longest} tokens with its answer, the model's context holds "
            f"{bridge.cfg.n_ctx}; shorten it"
        )
