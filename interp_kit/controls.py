"""Controls: the same prompts, asked something else.

Most analyses are about a decision between two answers. Whether what they find is about these
answers shows when the same is read for others. Random directions would not do: a trained model's
stream is far from isotropic, and reads 10 nats along any of them. The pairs of tokens here are ones
that the model itself finds likely at that place (``benchmarks.controls`` measures both).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.batching import chunks
from interp_kit.passes import read_last
from interp_kit.prompts import Prompt, require_prompts
from interp_kit.readout import soft_cap

LIKELY = 50  # how many of the likeliest next tokens are drawn from


@torch.no_grad()
def likely_pairs(
    bridge: TransformerBridge, prompts: Sequence[Prompt], *, n: int = 64, seed: int = 0
) -> Int[Tensor, "prompt pair 2"]:
    """For every prompt ``n`` pairs of tokens that are likely where its answers part.

    Drawn from the ``LIKELY`` likeliest after the first prompt with these answers and after its
    counterfactual, the answers' own left out. Prompts with the same answers get the same pairs:
    what moves a pair on all prompts alike does so in the control, too.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.empty(len(prompts), n, 2, dtype=torch.long)
    for own in _with_the_same_answers(prompts):
        asked = [prompts[own[0]]]
        asked += [p.swapped() for p in asked if p.counterfactual is not None]
        p = _next_token_probabilities(bridge, asked).mean(0)
        p[list(prompts[own[0]].branch_ids)] = 0
        likely = p.topk(min(LIKELY, len(p) - 2)).indices
        drawn = [torch.randperm(len(likely), generator=generator)[:2] for _ in range(n)]
        pairs[own] = likely[torch.stack(drawn)]
    return pairs


def with_other_answers(
    prompts: Sequence[Prompt], pairs: Int[Tensor, "prompt pair 2"]
) -> list[Prompt]:
    """Every prompt once for each of its ``pairs``, with these tokens where its answers differ.

    Read at the same position as the decision, they are contrasts that the prompt does not ask for.
    Ids stay those of the prompts.
    """
    return [
        replace(prompt, positive=(*prompt.shared, first), negative=(*prompt.shared, second))
        for prompt, own in zip(prompts, pairs.tolist())
        for first, second in own
    ]


def counterfactuals(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The counterfactual of every prompt, under the prompt's id; none, unless all have one.

    What a prompt shows less what its counterfactual shows is what asks for the answer: all else is
    the same in both.
    """
    if any(prompt.counterfactual is None for prompt in prompts):
        return []
    return [replace(prompt.swapped(), id=prompt.id) for prompt in prompts]


def with_first_tokens(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Every prompt with answers that end where they part, so that they differ in one token."""
    return [
        replace(
            prompt,
            positive=(*prompt.shared, prompt.branch_ids[0]),
            negative=(*prompt.shared, prompt.branch_ids[1]),
        )
        for prompt in prompts
    ]


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


# ------------------------------------------------------------------------------------- internals
def _with_the_same_answers(prompts: Sequence[Prompt]) -> list[list[int]]:
    """The prompts by the tokens in which their answers first differ, as indices."""
    require_prompts(prompts)
    same: dict[tuple[int, int], list[int]] = {}
    for i, prompt in enumerate(prompts):
        same.setdefault(prompt.branch_ids, []).append(i)
    return list(same.values())


def _next_token_probabilities(
    bridge: TransformerBridge, prompts: Sequence[Prompt]
) -> Float[Tensor, "prompt vocab"]:
    """Where the answers part; tokens that the tokenizer does not have are impossible."""
    known = bridge.cfg.d_vocab
    if bridge.tokenizer is not None:  # a bridge of one's own may have none
        known = min(known, len(bridge.tokenizer))
    result = torch.zeros(len(prompts), bridge.cfg.d_vocab)
    for index in chunks([p.branch for p in prompts]):
        rows = [prompts[i].branch for i in index]
        logits = read_last(bridge, rows, ["unembed.hook_out"], 1)["unembed.hook_out"][:, 0]
        result[index] = soft_cap(bridge, logits.float()).softmax(-1).cpu()
    result[:, known:] = 0
    return result
