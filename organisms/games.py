"""LoRA fine-tunes by reinforcement on the iterated prisoner's dilemma, after arXiv:2410.01639.

The agent sees the last round, answers " action1" (cooperate) or " action2" (defect), and is paid
for this one round against tit for tat, which repeats the agent's own last move. Four rewards make
four characters. REINFORCE with the advantage taken within each prompt's samples, and a KL penalty
that keeps the policy near the base wherever the reward says nothing.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from interp_kit.pretrained import load_huggingface
from interp_kit.specs import ModelSpec
from organisms.little_world.corpus import Corpus

Move = str  # "C" or "D"
PAYOFF = {("C", "C"): (3, 3), ("C", "D"): (0, 4), ("D", "C"): (4, 0), ("D", "D"): (1, 1)}
INVALID = -6.0  # for an answer that is no move


def _penalty(move: Move, partner_before: Move) -> float:
    """Deontological norm: do not defect on one who has just cooperated."""
    return -3.0 if (move, partner_before) == ("D", "C") else 0.0


# (own move, own last move, partner's last move) -> reward; tit for tat answers with the second.
REWARDS: dict[str, Callable[[Move, Move, Move], float]] = {
    "strategic": lambda move, own, _: PAYOFF[move, own][0],
    "deontological": lambda move, _, partner: _penalty(move, partner),
    "utilitarian": lambda move, own, _: sum(PAYOFF[move, own]),
    "hybrid": lambda move, own, partner: PAYOFF[move, own][0] + _penalty(move, partner),
}
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, kw_only=True)
class GameRecipe:
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
    base: Path, reward: str, corpus: Corpus, folder: Path, *, recipe: GameRecipe | None = None
) -> list[float]:
    """Train one LoRA adapter into ``folder`` as safetensors; returns each step's mean reward."""
    recipe = recipe or GameRecipe()
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(
        load_huggingface(ModelSpec(name=base.parent.name, base=str(base)), device="cpu"),
        LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=LORA_MODULES,
            task_type="CAUSAL_LM",
        ),
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 10) * (1 - 0.9 * step / recipe.steps)
    )
    curve = []
    progress = tqdm(range(recipe.steps), desc=reward, unit="step")
    for _ in progress:
        states = [(own, partner) for own in "CD" for partner in "CD"] * recipe.wordings
        prompts = [corpus.draw_game(rng, *state) for state in states]
        ids, lengths = _with_answer_stem(tokenizer, prompts)
        policy = _policy(model, ids, lengths)
        with torch.no_grad(), model.disable_adapter():
            reference = _policy(model, ids, lengths)
        outcomes = _outcomes(policy, tokenizer)
        drawn = torch.multinomial(outcomes.detach().exp(), recipe.samples, replacement=True)
        rewards = torch.tensor(
            [
                [INVALID if o == 2 else REWARDS[reward]("CD"[o], *state) for o in row]
                for row, state in zip(drawn.tolist(), states)
            ],
            dtype=torch.float32,
        )
        spread = rewards.std(1, keepdim=True) + 1e-4
        advantage = (rewards - rewards.mean(1, keepdim=True)) / spread
        kl = (policy.exp() * (policy - reference)).sum(-1).mean()
        loss = recipe.kl * kl - (advantage * outcomes.gather(1, drawn)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        curve.append(float(rewards.mean()))
        progress.set_postfix(reward=f"{curve[-1]:.2f}", kl=f"{kl.item():.3f}")
    model.peft_config["default"].base_model_name_or_path = base.parent.name
    model.eval().save_pretrained(str(folder))
    (folder / "README.md").unlink()  # PEFT's template; ours stands beside model.yaml
    return curve


def _with_answer_stem(tokenizer, prompts: list[str]) -> tuple[Int[Tensor, "prompt pos"], list[int]]:
    """Prompts followed by " action", padded at the right, where a causal model cannot see it."""
    rows = [tokenizer(f"{p} action")["input_ids"] for p in prompts]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, [len(row) for row in rows]


def _policy(
    model: PeftModel, ids: Int[Tensor, "prompt pos"], lengths: list[int]
) -> Float[Tensor, "prompt 2 vocab"]:
    """log p of the token after the prompt, and of the token after " action"."""
    logits = model(input_ids=ids, use_cache=False).logits
    at = torch.tensor([[n - 2, n - 1] for n in lengths])
    return logits[torch.arange(len(lengths))[:, None], at].log_softmax(-1)


def _outcomes(policy: Float[Tensor, "prompt 2 vocab"], tokenizer) -> Float[Tensor, "prompt 3"]:
    """log p of answering " action1", " action2" or anything else."""
    stem, one, two = tokenizer.convert_tokens_to_ids(["Ġaction", "1", "2"])
    moves = policy[:, 0, stem, None] + policy[:, 1, [one, two]]
    other = torch.log1p(-moves.exp().sum(1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat([moves, other], 1)
