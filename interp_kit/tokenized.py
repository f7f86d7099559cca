"""A tokenized prompt with its answers, and how Jupyter shows it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from markupsafe import Markup

from interp_kit.specs import InputError
from interp_kit.views import in_jupyter, text_block, view_block, visible

SEGMENT_COLOURS = 6  # of views.css; further segments begin again with the first


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A named part of a prompt: its token positions, and those of its counterfactual."""

    name: str
    positions: tuple[int, ...]
    counterfactual: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt and its two answers as token ids; for a bridge without a tokenizer, made of these.

    ``text`` is what was tokenized, chat template included; ``counterfactual`` are the token ids of
    the prompt that asks for the other answer, if there is one; ``decode`` of the tokenizer spells
    tokens where a prompt is shown.
    """

    id: str = "0"
    group: str = ""
    text: str = ""
    tokens: tuple[int, ...]
    positive: tuple[int, ...]
    negative: tuple[int, ...]
    positive_label: str = "positive"
    negative_label: str = "negative"
    counterfactual: tuple[int, ...] | None = None
    segments: tuple[Segment, ...] = ()
    decode: Callable[..., str] | None = field(default=None, compare=False)

    @property
    def shared(self) -> tuple[int, ...]:
        """The tokens that both answers begin with."""
        pairs = takewhile(lambda pair: pair[0] == pair[1], zip(self.positive, self.negative))
        return tuple(first for first, _ in pairs)

    @property
    def branch(self) -> tuple[int, ...]:
        """Prompt and shared tokens: the answers differ in the token after them."""
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

    def spelled(self, tokens: Sequence[int]) -> list[str]:
        """Each token as text; its id, where there is no tokenizer."""
        return [self.decode([t]) if self.decode else f"{t} " for t in tokens]

    def __repr__(self) -> str:
        text, positive, negative = (
            "".join(self.spelled(ids)) for ids in (self.tokens, self.positive, self.negative)
        )
        swapped = self.counterfactual
        other = "no counterfactual" if swapped is None else f"counterfactual {len(swapped)} tokens"
        return (
            f"Prompt({self.id!r}: {text!r}, {len(self.tokens)} tokens, {other}; "
            f"{self.positive_label} {positive!r}, {self.negative_label} {negative!r})"
        )

    def _repr_html_(self) -> str:
        return in_jupyter(prompt_fragment(self))


def prompt_fragment(prompt: Prompt) -> Markup:
    """The prompt's tokens with their positions, by segment, its counterfactual and its answers.

    What differs in a counterfactual of the same length is marked.
    """
    ours, theirs = prompt.tokens, prompt.counterfactual
    number = {s.name: i % SEGMENT_COLOURS for i, s in enumerate(prompt.segments)}
    here = {at: s.name for s in prompt.segments for at in s.positions}
    there = {at: s.name for s in prompt.segments for at in s.counterfactual}
    parts = [_row(f"{len(ours)} tokens", prompt.spelled(ours), ours, here, number)]
    if theirs is not None:
        other = {i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b}
        changed = other if len(ours) == len(theirs) else set()
        label = f"counterfactual, {len(theirs)} tokens"
        parts.append(_row(label, prompt.spelled(theirs), theirs, there, number, marked=changed))
    for label, ids in (
        (prompt.positive_label, prompt.positive),
        (prompt.negative_label, prompt.negative),
    ):
        words = prompt.spelled(ids)
        parts.append(_row(f"answer: {label}", words, ids, {}, number, start=len(ours)))
    names = [
        Markup('<span class="ik-segment ik-s{}">{}</span>').format(at, visible(name))
        for name, at in number.items()
    ]
    if names:
        parts.append(Markup('<p class="ik-legend">parts: {}</p>').format(Markup(" ").join(names)))
    return view_block(f"Prompt {prompt.id}", parts)


# ------------------------------------------------------------------------------------- internals
def _row(
    label: str,
    words: Sequence[str],
    ids: Sequence[int],
    segments: dict[int, str],
    number: dict[str, int],
    *,
    marked: set[int] | None = None,
    start: int = 0,
) -> Markup:
    tokens = []
    for at, (word, id) in enumerate(zip(words, ids)):
        name = segments.get(at)
        shown = visible(word, spaces=True)
        tokens.append(
            Markup(
                '<span class="ik-token ik-box{}" tabindex="0">{}<sub>{}</sub>'
                '<span class="ik-value"> position {}, token {}{}</span></span>'
            ).format(
                "" if name is None else f" ik-segment ik-s{number[name]}",
                Markup("<mark>{}</mark>").format(shown) if at in (marked or ()) else shown,
                start + at, start + at, id, "" if name is None else visible(f", {name}"),
            )
        )  # fmt: skip
    return Markup('<div class="ik-row"><p class="ik-label">{}</p>{}</div>').format(
        visible(label), text_block(Markup("").join(tokens))
    )
