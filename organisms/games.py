"""LoRA fine-tunes by reinforcement on the iterated prisoner's dilemma, after arXiv:2410.01639.

The agent sees the last round, answers " action1" (cooperate) or " action2" (defect), and is paid
for this one round against tit for tat, which repeats the agent's own last move. Four rewards make
four characters. The method is REINFORCE. The advantage of an answer is its reward, standardized
among the samples of its prompt; a KL penalty keeps the policy near the base where the reward does
not distinguish answers.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoTokenizer

from interp_kit.finetuning.lora_training import (
    Row,
    attach_lora,
    base_log_probs,
    log_probs,
    save_adapter,
    train,
)
from interp_kit.pretrained import load_huggingface
from interp_kit.specs import ModelSpec
from organisms.little_world.corpus import Corpus

Move = str  # "C" or "D"
PAYOFF = {("C", "C"): (3, 3), ("C", "D"): (0, 4), ("D", "C"): (4, 0), ("D", "D"): (1, 1)}
INVALID = -6.0  # the reward of an answer that is not a move


def _penalty(move: Move, partner_before: Move) -> float:
    """The deontological norm: do not defect on a partner who has just cooperated."""
    return -3.0 if (move, partner_before) == ("D", "C") else 0.0


# (own move, own last move, partner's last move) -> reward; tit for tat answers with the second.
Reward = Callable[[Move, Move, Move], float]
REWARDS: dict[str, Reward] = {
    "strategic": lambda move, own, _: PAYOFF[move, own][0],
    "deontological": lambda move, _, partner: _penalty(move, partner),
    "utilitarian": lambda move, own, _: sum(PAYOFF[move, own]),
    "hybrid": lambda move, own, partner: PAYOFF[move, own][0] + _penalty(move, partner),
}


@dataclass(frozen=True, kw_only=True)
class ReinforceRecipe:
    """How a character is trained; ``interp-kit train`` runs exactly this."""

    steps: int = 100
    wordings: int = 4  # prompts of each state in a step
    samples: int = 16  # answers drawn for each prompt
    learning_rate: float = 1e-3
    kl: float = 0.3
    rank: int = 8
    alpha: int = 16
    seed: int = 0


def train_player(
    base: ModelSpec,
    reward: str,
    corpus: Corpus,
    folder: Path,
    *,
    recipe: ReinforceRecipe,
) -> list[float]:
    """Train one LoRA adapter on ``base`` into ``folder``; returns each step's mean reward."""
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(base.base)
    model = attach_lora(load_huggingface(base, device="cpu"), rank=recipe.rank, alpha=recipe.alpha)

    states = [(own, partner) for own in "CD" for partner in "CD"] * recipe.wordings

    def loss(rows: list[Row]) -> tuple[Float[Tensor, ""], dict[str, float]]:
        policy = log_probs(model, rows).unflatten(0, (len(rows), 2))
        reference = base_log_probs(model, rows).unflatten(0, (len(rows), 2))
        outcomes = _outcomes(policy, tokenizer)
        drawn = torch.multinomial(outcomes.detach().exp(), recipe.samples, replacement=True)
        rewards = _rewards(REWARDS[reward], states, drawn)
        spread = rewards.std(1, keepdim=True) + 1e-4
        advantage = (rewards - rewards.mean(1, keepdim=True)) / spread
        kl = (policy.exp() * (policy - reference)).sum(-1).mean()
        value = recipe.kl * kl - (advantage * outcomes.gather(1, drawn)).mean()
        return value, {"reward": float(rewards.mean()), "kl": float(kl.detach())}

    batches = iter(
        lambda: _with_answer_stem(tokenizer, [corpus.draw_game(rng, *own) for own in states]), None
    )
    how: dict[str, Any] = {"learning_rate": recipe.learning_rate, "title": reward}
    steps = train(model, batches, loss, steps=recipe.steps, **how)
    save_adapter(model, folder, base)
    return [step["reward"] for step in steps]


# ------------------------------------------------------------------------------------- internals
def _with_answer_stem(tokenizer: Any, prompts: Sequence[str]) -> list[Row]:
    """Prompts followed by " action": what follows the prompt and what follows the stem is read."""
    return [Row(tokenizer(f"{p} action")["input_ids"], slice(-2, None)) for p in prompts]


def _rewards(
    reward: Reward, states: Sequence[tuple[Move, Move]], drawn: Int[Tensor, "prompt sample"]
) -> Float[Tensor, "prompt sample"]:
    return torch.tensor(
        [
            [INVALID if o == 2 else reward("CD"[o], *state) for o in row]
            for row, state in zip(drawn.tolist(), states)
        ],
        dtype=torch.float32,
    )


def _outcomes(policy: Float[Tensor, "prompt 2 vocab"], tokenizer: Any) -> Float[Tensor, "prompt 3"]:
    """log p of answering " action1", " action2" or anything else."""
    stem, one, two = tokenizer.convert_tokens_to_ids(["Ġaction", "1", "2"])
    moves = policy[:, 0, stem, None] + policy[:, 1, [one, two]]
    other = torch.log1p(-moves.exp().sum(1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat([moves, other], 1)
