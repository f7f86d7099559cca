"""Controls: the same prompts, asked something else."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from interp_kit.prompts import Prompt, Tokenizing


def with_random_answers(
    bridge: Tokenizing, prompts: Sequence[Prompt], *, n: int = 16, seed: int = 0
) -> list[Prompt]:
    """A control: every prompt ``n`` times, with two random tokens where its answers differ.

    Read at the same position as the decision, they are a contrast that the prompt does not ask for.
    Ids stay those of the prompts.
    """
    generator = torch.Generator().manual_seed(seed)
    size = bridge.cfg.d_vocab
    if bridge.tokenizer is not None:  # a bridge of one's own may have none
        size = min(size, len(bridge.tokenizer))
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
