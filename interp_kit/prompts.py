"""Prompts and answers -> token ids and positions."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, Protocol, runtime_checkable

from interp_kit.specs import InputError, Scenario
from interp_kit.tokenized import Prompt as Prompt
from interp_kit.tokenized import Segment as Segment

Sign = Literal["positive", "negative"]
PLACE = "=place="  # stands for a prompt, to see where a chat template puts it


class TooLongError(InputError):
    """A prompt that does not fit into the model's context."""


@runtime_checkable
class Tokenizing(Protocol):
    """What encoding needs of a model: a ``TransformerBridge`` has it, and so has a bare config.

    ``tokenizer`` of Hugging Face; ``cfg`` with ``default_prepend_bos d_vocab n_ctx``.
    """

    tokenizer: Any
    cfg: Any


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
    chat_template: bool = True,
) -> Prompt:
    """Tokenize one prompt as in generation: chat template where the tokenizer has one, then BOS.

    Without ``chat_template`` the text is read as it is; special tokens that it spells are tokens.

    Answers are what the tokenizer adds to the prompt: give the leading space, except after a chat
    template, where a leading space is dropped. Where it would join the prompt's end with an answer
    ("(" and "1" to "(1"), the answer is read as generation continues, with a warning. ``segments``
    name parts of the prompt by their text (or by two texts, in the prompt and in its
    counterfactual): every token that overlaps with it.

    Raises ``InputError`` if the answers have the same token ids, if one begins with the other, if a
    segment has different numbers of tokens in prompt and counterfactual, or if the prompt does not
    fit into the context.
    """
    if bridge.tokenizer is None:
        raise InputError(
            "this bridge has no tokenizer, so texts cannot be encoded; make prompts of token ids: "
            "Prompt(tokens=..., positive=..., negative=...)"
        )
    as_turn = chat_template and has_template(bridge)
    if as_turn:
        positive, negative = positive.lstrip(), negative.lstrip()
    formatted = with_template(bridge, text) if as_turn else text
    read = prompt_ids if as_turn else token_ids
    tokens = read(bridge, formatted)
    answers = [answer_ids(bridge, formatted, tokens, a, read=read) for a in (positive, negative)]
    swapped = None
    if counterfactual is not None:
        swapped = read(bridge, with_template(bridge, counterfactual) if as_turn else counterfactual)
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
            _segment(bridge, id, name, parts, text, counterfactual, as_turn)
            for name, parts in (segments or {}).items()
        ),
        decode=bridge.tokenizer.decode,
    )
    _check(bridge, prompt, positive, negative)
    return prompt


def encode_scenario(bridge: Tokenizing, scenario: Scenario) -> list[Prompt]:
    """Every prompt of the scenario, tokenized for this model; errors as in ``encode``."""
    decision, prompts = scenario.decision, []
    too_long: list[TooLongError] = []
    for prompt in scenario.prompts:
        try:
            encoded = encode(
                bridge,
                prompt.text,
                positive=prompt.positive or decision.positive,
                negative=prompt.negative or decision.negative,
                id=prompt.id,
                group=prompt.group,
                counterfactual=prompt.counterfactual,
                labels=(decision.labels.positive, decision.labels.negative),
                segments=prompt.segments,
                chat_template=scenario.chat_template,
            )
            prompts.append(encoded)
        except TooLongError as error:
            too_long.append(error)
    if too_long:
        which = f"{len(too_long)} of {len(scenario.prompts)} prompts are too long; the first, "
        raise InputError(f"{which if len(too_long) > 1 else ''}{too_long[0]}")
    return prompts


def require_prompts(prompts: Sequence[Prompt]) -> None:
    """Raise ``InputError`` for an empty list."""
    if not prompts:
        raise InputError("there are no prompts; give one or more")


def special_token(bridge: Tokenizing, kind: Literal["bos", "eos"]) -> int | None:
    """The token that begins or ends a text, if the model has one.

    For a tokenizer without, TransformerLens invents an id beyond the model's vocabulary.
    """
    id = getattr(bridge.tokenizer, f"{kind}_token_id", None)
    return id if id is not None and id < bridge.cfg.d_vocab else None


def end_token(bridge: Tokenizing) -> int:
    """The token that ends a text; ``InputError`` for a model without one."""
    id = special_token(bridge, "eos")
    if id is None:
        raise InputError(
            "this model's tokenizer has no token that ends a text, and the analysis reads its "
            "probability; use a model that has one"
        )
    return id


def token_ids(bridge: Tokenizing, text: str) -> tuple[int, ...]:
    """The text as the model reads it: with BOS if it takes one, without a chat template."""
    tokenizer = bridge.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = special_token(bridge, "bos")
    if (
        bridge.cfg.default_prepend_bos and bos is not None and ids[:1] != [bos]
    ):  # a chat template brings its own
        ids = [bos, *ids]
    return tuple(ids)


def prompt_ids(bridge: Tokenizing, formatted: str) -> tuple[int, ...]:
    """What generation begins with: a text ``with_template``, and BOS only where that gives it.

    Without a chat template, as ``token_ids``.
    """
    if not has_template(bridge):
        return token_ids(bridge, formatted)
    return tuple(bridge.tokenizer(formatted, add_special_tokens=False)["input_ids"])


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


def has_template(bridge: Tokenizing) -> bool:
    """Whether prompts become a user's turn."""
    return bool(bridge.tokenizer.chat_template)


def with_template(bridge: Tokenizing, text: str) -> str:
    """The text as a user's turn, answer to follow, if the model has a chat template."""
    if not has_template(bridge):
        return text
    turn = [{"role": "user", "content": text}]
    return bridge.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)


def _segment(
    bridge: Tokenizing,
    prompt: str,
    name: str,
    parts: str | Sequence[str],
    text: str,
    counterfactual: str | None,
    as_turn: bool,
) -> Segment:
    here, there = (parts, parts) if isinstance(parts, str) else parts
    ours = _positions_of(bridge, here, text, as_turn)
    if counterfactual is None:
        return Segment(name=name, positions=ours)
    theirs = _positions_of(bridge, there, counterfactual, as_turn)
    if len(ours) != len(theirs):
        raise InputError(
            f"prompt {prompt!r}: segment {name!r} has {len(ours)} tokens, and {len(theirs)} in the "
            "counterfactual; expected equal numbers, so that positions correspond: reword one"
        )
    return Segment(name=name, positions=ours, counterfactual=theirs)


def _positions_of(bridge: Tokenizing, part: str, text: str, as_turn: bool) -> tuple[int, ...]:
    """Positions, BOS counted, of the tokens that overlap with ``part`` of the prompt ``text``.

    The chat template's own words are not searched: it is asked where it puts another text.
    """
    formatted, before, after = text, "", ""
    if as_turn:
        formatted = with_template(bridge, text)
        before, after = with_template(bridge, PLACE).split(PLACE, 1)
    offsets = bridge.tokenizer(formatted, add_special_tokens=False, return_offsets_mapping=True)
    first = formatted.find(part, len(before), len(formatted) - len(after))
    if first < 0 or not formatted.startswith(before):
        raise InputError(f"segment {part!r} does not occur in {text!r}; give words of the prompt")
    last = first + len(part)
    read = prompt_ids if as_turn else token_ids
    added = len(read(bridge, formatted)) - len(offsets["input_ids"])  # a BOS
    return tuple(
        added + i
        for i, (start, end) in enumerate(offsets["offset_mapping"])
        if start < last and end > first
    )


def answer_ids(
    bridge: Tokenizing,
    text: str,
    tokens: tuple[int, ...],
    answer: str,
    *,
    read: Callable[[Tokenizing, str], tuple[int, ...]] = prompt_ids,
) -> tuple[int, ...]:
    """What the answer adds to the prompt's ``tokens``, which ``read`` made of the ``text``.

    Where the tokenizer would merge the end of the prompt with the answer (a prompt that ends in a
    space, say), the prompt stays as a user sends it and the answer is tokenized alone: that is what
    generation continues from.

    Raises ``InputError`` if the answer's tokens alone do not spell it there.
    """
    tokenizer = bridge.tokenizer
    whole = read(bridge, text + answer)
    if whole[: len(tokens)] == tokens:
        return whole[len(tokens) :]
    apart = tuple(tokenizer(answer, add_special_tokens=False)["input_ids"])
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(whole, tokens))))
    joined = tokenizer.decode(whole[same : same + 1])
    if tokenizer.decode([*tokens, *apart]) != tokenizer.decode(tokens) + answer:
        raise InputError(
            f"the tokenizer joins the end of the prompt with the answer {answer!r} to {joined!r}, "
            f"and alone the answer is {tokenizer.convert_ids_to_tokens(list(apart))}, which does "
            f"not continue the prompt; end the prompt before {joined!r}, or choose other answers, "
            f"such as {_proposed(bridge)}"
        )
    warnings.warn(
        f"the tokenizer joins a prompt's end with its answer ({joined!r} is one token); the answer "
        "is read as generation continues, as a token of its own",
        stacklevel=3,
    )
    return apart


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
        problem = (
            "both answers are the same tokens"
            if prompt.positive == prompt.negative
            else "one answer is the beginning of the other"
        )
        raise InputError(
            f"prompt {prompt.id!r}: {problem} ({'; '.join(shown)}); expected answers that differ "
            "before either of them ends: reword them, end both with a period, or choose others, "
            f"such as {_proposed(bridge)}"
        )
    if not prompt.tokens or prompt.counterfactual == ():
        raise InputError(
            f"prompt {prompt.id!r}: it, or its counterfactual, has no tokens for this model, which "
            "adds no BOS; give it some text"
        )
    longest = max(len(prompt.tokens), len(prompt.counterfactual or ()))
    longest += max(len(prompt.positive), len(prompt.negative))
    if longest > bridge.cfg.n_ctx:
        raise TooLongError(
            f"prompt {prompt.id!r}: {longest} tokens with its answer, but the model's context "
            f"holds {bridge.cfg.n_ctx}; shorten the prompt"
        )
