"""A LoRA player of a two-player game, by policy gradient on the game's payoffs.

The agent reads the rules and the last round and answers with one of two moves. It is paid for this
one round, against a partner who repeats the agent's own last move (tit for tat). Which payoff it is
paid makes its character (``REWARDS``), after Tennant et al., "Moral Alignment for LLM Agents",
arXiv:2410.01639.

With two moves no answer needs to be sampled. The probabilities of either move, and of anything else
that is said, are read from the logits, and the policy gradient is exact:

    gradient = sum over a of p(a) A(a) d log p(a),    A(a) = (r(a) - mean of r) / deviation of r

A KL penalty to the base on the tokens of the answer keeps the rest of it.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from peft import PeftModel
from pydantic import Field, model_validator
from torch import Tensor

from interp_kit.catalogue import data_folders
from interp_kit.files import read_yaml
from interp_kit.finetuning.lora_training import (
    Recipe,
    Row,
    base_log_probs,
    fit_lora,
    log_probs,
)
from interp_kit.pretrained import inspect_model
from interp_kit.prompts import Prompt, encode
from interp_kit.specs import InputError, ModelSpec, NonEmpty, Spec, checked, unknown

Move = str  # "C", cooperate, or "D", defect
STATES = tuple(product("CD", repeat=2))  # own last move, the partner's last move
LEAST = 1e-7  # probability of a move before training
INVALID = -6.0  # the reward of an answer that is no move
SLOTS = re.compile(r"\{(\w+)\}")


class Payoffs(Spec):
    """Of both cooperating, cooperating alone, defecting alone, and both defecting."""

    reward: float
    sucker: float
    temptation: float
    punishment: float

    def of(self, own: Move, partner: Move) -> tuple[float, float]:
        """What the two are paid."""
        return {
            ("C", "C"): (self.reward, self.reward),
            ("C", "D"): (self.sucker, self.temptation),
            ("D", "C"): (self.temptation, self.sucker),
            ("D", "D"): (self.punishment, self.punishment),
        }[own, partner]


class Game(Spec):
    """A game file: what the two moves are called, what they pay, and how the agent is asked.

    ``{own}`` and ``{partner}`` in a wording are the last moves, ``{reward} {sucker} {temptation}
    {punishment}`` the payoffs.
    """

    about: str = ""
    cooperate: NonEmpty
    defect: NonEmpty
    payoffs: Payoffs
    wordings: Annotated[list[NonEmpty], Field(min_length=1)]

    @model_validator(mode="after")
    def _wordings_ask(self) -> "Game":
        known = {"own", "partner", *Payoffs.model_fields}
        for wording in self.wordings:
            slots = set(SLOTS.findall(wording))
            if missing := {"own", "partner"} - slots:
                raise ValueError(f"the wording {wording[:60]!r} has no {{{min(missing)}}}; add it")
            if strange := slots - known:
                raise ValueError(
                    f"the wording {wording[:60]!r} has {{{min(strange)}}}; expected one of "
                    + ", ".join(f"{{{name}}}" for name in sorted(known))
                )
        return self

    def prompt(self, wording: str, own: Move, partner: Move) -> str:
        """A wording with its slots filled."""
        said = {"C": self.cooperate, "D": self.defect}
        payoffs = {name: f"{value:g}" for name, value in self.payoffs.model_dump().items()}
        filled = {"own": said[own], "partner": said[partner], **payoffs}
        return SLOTS.sub(lambda slot: filled[slot[1]], wording)


# (payoffs, own move, own last move, partner's last move) -> reward
Reward = Callable[[Payoffs, Move, Move, Move], float]


def _norm(move: Move, partner: Move) -> float:
    """The deontological norm: do not defect on a partner who has just cooperated."""
    return -3.0 if (move, partner) == ("D", "C") else 0.0


REWARDS: dict[str, Reward] = {
    "strategic": lambda pay, move, own, partner: pay.of(move, own)[0],
    "deontological": lambda pay, move, own, partner: _norm(move, partner),
    "utilitarian": lambda pay, move, own, partner: sum(pay.of(move, own)),
    "hybrid": lambda pay, move, own, partner: pay.of(move, own)[0] + _norm(move, partner),
    # a control: given to either move at random
    "permuted": lambda pay, move, own, partner: pay.of(move, own)[0],
}


@dataclass(frozen=True, kw_only=True)
class GameRecipe(Recipe):
    """How a player is trained; ``interp-kit finetune game`` runs exactly this."""

    reward: str = "strategic"
    steps: int = 60
    wordings: int = 3  # in a step, each in all four states
    learning_rate: float = 6e-4
    kl: float = 0.3


def find_game(name: str, data: str | Path | None = None) -> Game:
    """The game ``games/NAME.yaml`` of the data folders, or of the path of a YAML file."""
    files = {f.stem: f for d in data_folders(data)[::-1] for f in d.glob("games/*.yaml")}
    if name not in files and not name.endswith(".yaml"):
        raise InputError(unknown("game", name, files, "the path of a .yaml file"))
    file = files.get(name, Path(name).expanduser())
    return checked(Game, read_yaml(file), file)


def train_on_game(
    base: ModelSpec, game: Game, folder: Path, *, recipe: GameRecipe
) -> list[dict[str, float]]:
    """Train one adapter on ``base`` into ``folder``; returns each step's loss, reward and KL.

    Raises ``InputError`` for a reward that is none of ``REWARDS``, and for a move that the base
    never says.
    """
    if recipe.reward not in REWARDS:
        raise InputError(f"unknown reward {recipe.reward!r}; expected one of {', '.join(REWARDS)}")
    tokenizing = inspect_model(base)
    says: dict[str, Any] = {"positive": f" {game.defect}", "negative": f" {game.cooperate}"}
    asked = [
        [encode(tokenizing, game.prompt(wording, *state), **says) for state in STATES]
        for wording in game.wordings
    ]
    before: dict[tuple[int, ...], Float[Tensor, "read vocab"]] = {}

    def loss(model: PeftModel, batch: _Batch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        begun, rows = bool(before), [row for prompt in batch.prompts for row in _rows(prompt)]
        for row in rows:
            if tuple(row.tokens) not in before:  # the base's prediction stays as it is
                before[tuple(row.tokens)] = base_log_probs(model, [row])
        reference = torch.cat([before[tuple(row.tokens)] for row in rows])
        policy = log_probs(model, rows)
        outcomes = _outcomes(policy, batch.prompts)
        if not begun:
            _require_said(game, outcomes)
        p = outcomes.detach().exp()
        mean = (p * batch.rewards).sum(1, keepdim=True)
        deviation = (p * (batch.rewards - mean) ** 2).sum(1, keepdim=True).sqrt() + 1e-4
        advantage = (batch.rewards - mean) / deviation
        gain = (p * advantage * outcomes).sum(1).mean()
        kl = (policy.exp() * (policy - reference)).sum(-1).mean()
        numbers = {"reward": float(mean.mean()), "kl": float(kl.detach())}
        return recipe.kl * kl - gain, numbers

    batches = _batches(game, asked, recipe)
    return fit_lora(base, batches, loss, folder, recipe=recipe, steps=recipe.steps)


# ------------------------------------------------------------------------------------- internals
@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Prompts, and what cooperating, defecting and anything else is paid after each."""

    prompts: list[Prompt]
    rewards: Float[Tensor, "prompt 3"]


def _batches(game: Game, asked: Sequence[Sequence[Prompt]], recipe: GameRecipe) -> Iterator[_Batch]:
    rng = random.Random(recipe.seed)
    while True:
        chosen = rng.sample(asked, min(recipe.wordings, len(asked)))
        rewards = []
        for own, partner in STATES * len(chosen):
            reward = REWARDS[recipe.reward]
            paid = [reward(game.payoffs, move, own, partner) for move in "CD"]
            if recipe.reward == "permuted" and rng.random() < 0.5:
                paid.reverse()
            rewards.append([*paid, INVALID])
        prompts = [prompt for own in chosen for prompt in own]
        yield _Batch(prompts=prompts, rewards=torch.tensor(rewards))


def _require_said(game: Game, outcomes: Float[Tensor, "prompt 3"]) -> None:
    """Raise ``InputError`` if a move is so unlikely at first that nothing can reinforce it."""
    likeliest = outcomes[:, :2].detach().max(0).values.exp().tolist()
    for move, p in zip((game.cooperate, game.defect), likeliest):
        if p < LEAST:
            raise InputError(
                f"the base says {move!r} with p = {p:.0e} at most, so there is nothing to "
                "reinforce; call the moves what it would say, or end the wordings so that it "
                "says them"
            )


def _rows(prompt: Prompt) -> list[Row]:
    """What goes through the model to have the probabilities of both answers, "C" first."""
    answers = [prompt.negative] if prompt.one_branch else [prompt.negative, prompt.positive]
    read = slice(len(prompt.tokens) - 1, None)
    return [Row([*prompt.tokens, *answer[:-1]], read) for answer in answers]


def _outcomes(
    log_p: Float[Tensor, "read vocab"], prompts: Sequence[Prompt]
) -> Float[Tensor, "prompt 3"]:
    """log p of cooperating, of defecting and of anything else."""
    at, moves = 0, []
    for prompt in prompts:
        for answer in (prompt.negative, prompt.positive):
            read = log_p[at : at + len(answer)]
            moves.append(read.gather(1, torch.tensor(answer, device=read.device)[:, None]).sum())
            at += 0 if prompt.one_branch else len(answer)
        at += len(prompt.negative) if prompt.one_branch else 0
    both = torch.stack(moves).unflatten(0, (-1, 2))
    other = torch.log1p(-both.exp().sum(1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat([both, other], 1)
