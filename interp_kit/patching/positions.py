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
MODES = ("decision", "segments", "all", "screened")  # of the notebooks


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


def aligned(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts whose counterfactual corresponds to them position by position."""
    return [p for p in prompts if p.counterfactual and len(p.tokens) == len(p.counterfactual)]


def check_positions(
    prompts: Sequence[Prompt], positions: str, *, across_models: bool = False
) -> None:
    """Raise ``InputError`` for a mode that a notebook does not have, or that prompts cannot have.

    Modes are "decision", "segments", "all" and "screened" (all positions at once, for components
    that a screen chooses). Across models every prompt corresponds to itself.
    """
    if positions not in MODES:
        raise InputError(f"unknown positions {positions!r}; expected one of {', '.join(MODES)}")
    lacking, what = [], ""
    if positions == "segments":
        lacking, what = [p.id for p in prompts if not p.segments], "segments"
    elif positions != "decision" and not across_models:
        whole = aligned(prompts)
        lacking = [p.id for p in prompts if p not in whole]
        what = "a counterfactual of the same number of tokens"
    if lacking:
        others = "decision" if positions == "segments" else "decision or segments"
        raise InputError(
            f'positions "{positions}" need {what}, which {len(lacking)} of {len(prompts)} prompts '
            f"lack, first {lacking[0]!r}; add them to the scenario, or choose {others}"
        )


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
