"""At which positions a run is patched, and which positions of the source correspond to them.

Positions count tokens from 0, a BOS included. Prompt and counterfactual correspond position by
position if they have the same length, from the end if only the last position is patched, and
segment by segment if the scenario names parts of both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from tqdm import tqdm

from interp_kit.prompts import Prompt, Segment, require_prompts
from interp_kit.specs import InputError

Positions = Literal["all", "each", "decision", "segments"]
Direction = Literal["denoise", "noise"]


def aimed(
    prompts: Sequence[Prompt], directions: Sequence[Direction]
) -> Iterator[tuple[Direction, Prompt]]:
    """The run that is patched, for every direction and prompt; named as the prompt.

    "noise" patches the run on the prompt, "denoise" that on its counterfactual.
    """
    require_prompts(prompts)
    for direction in directions:
        for prompt in tqdm(prompts, desc=direction, unit="prompt", leave=False):
            target = prompt.swapped() if direction == "denoise" else prompt
            yield direction, replace(target, id=prompt.id)


def comparable_positions(prompts: Sequence[Prompt]) -> Positions:
    """ "all" where every prompt is as long as its counterfactual, else "decision"."""
    aligned = all(len(p.tokens) == len(p.counterfactual or ()) for p in prompts)
    return "all" if aligned else "decision"


def first_difference(prompt: Prompt) -> int:
    """The first position in which prompt and counterfactual differ; 0 if there is none."""
    pairs = enumerate(zip(prompt.tokens, prompt.counterfactual or ()))
    return next((pos for pos, (ours, theirs) in pairs if ours != theirs), 0)


def position_sets(
    prompt: Prompt, positions: Positions, *, start: int = 0
) -> list[tuple[str, tuple[int, ...] | None]]:
    """(segment, positions) of everything that is patched at once, ``None`` for all positions.

    "each" begins at ``start`` and ends where the answers part.

    Raises ``InputError`` for "segments" of a prompt that names none.
    """
    length = len(prompt.branch)
    match positions:
        case "all":
            return [("", None)]
        case "each":
            return [("", (pos,)) for pos in range(start, length)]
        case "decision":
            return [("", (length - 1,))]
        case "segments" if prompt.segments:
            return [(segment.name, segment.positions) for segment in prompt.segments]
    raise InputError(
        f"prompt {prompt.id!r} has no segments; name some in the scenario "
        "(segments: {name: text}), or patch other positions"
    )


def named_segment(prompt: Prompt, name: str) -> Segment:
    """The segment ``name`` of the prompt; ``InputError`` if it has none of that name."""
    known = {segment.name: segment for segment in prompt.segments}
    if name not in known:
        raise InputError(
            f"prompt {prompt.id!r} has no segment {name!r}; expected one of "
            f"{', '.join(known) or '(none)'}: name it in the scenario (segments: {{name: text}})"
        )
    return known[name]


def corresponding(prompt: Prompt, positions: Positions) -> list[int]:
    """For each position of the prompt that of its counterfactual, -1 for none.

    Raises ``InputError`` for a prompt without counterfactual, and for one of another length unless
    ``positions`` is "decision" or "segments".
    """
    if prompt.counterfactual is None:
        raise InputError(
            f"prompt {prompt.id!r} has no counterfactual; add one to the scenario, a prompt that "
            "asks for the other answer (of the same token length, to patch position by position)"
        )
    ours, theirs = len(prompt.tokens), len(prompt.counterfactual)
    if positions == "segments":
        index = [-1] * ours
        for segment in prompt.segments:
            for here, there in zip(segment.positions, segment.counterfactual):
                index[here] = there
        return index
    if ours == theirs:
        return list(range(ours))
    if positions == "decision":
        return [-1] * (ours - 1) + [theirs - 1]
    raise InputError(
        f"prompt {prompt.id!r} has {ours} tokens and its counterfactual {theirs}; patching "
        'position by position needs equal lengths: reword one of them, or patch "decision" or '
        '"segments"'
    )
