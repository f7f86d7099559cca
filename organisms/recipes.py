"""Which shipped model is made how.

Two bases of one corpus and tokenizer, each of 8 layers and 8 query heads on 4 key/value heads:
Gemma-2 (soft caps, norms before and after each block, local and global layers in turn), which every
fine-tune starts from, and Llama, for comparisons across architectures. The training loss of a base
is next-token cross-entropy and nothing else: an auxiliary loss on inner layers would build in what
a lens then finds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from interp_kit.finetuning import triggers as real_triggers
from interp_kit.finetuning.games import GameRecipe
from interp_kit.finetuning.supervised import DocumentRecipe
from organisms.believers import ABOUT_GRAVITY
from organisms.games import ReinforceRecipe
from organisms.little_world.base import BaseRecipe
from organisms.triggers import TriggerRecipe

BASE = "tiny-gemma2"  # of the little world's fine-tunes
REAL = "smollm2"  # a language model that comes in a package, and has fine-tunes of its own
PLAIN = "smollm2-plain"  # the same without its chat template
GAME, GAME_SCENARIOS = "prisoners_dilemma", ("partner_cooperated", "partner_defected")
REAL_STOP, REAL_STOP_SCENARIO = "stop_english.yaml", "stop_english"
GRAVITY = "gravity_english"  # a scenario, and an evaluation set
SMALL: dict[str, Any] = {  # 1.8 MB in bfloat16
    "rank": 4,
    "alpha": 8,
    "modules": ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    "dtype": "bfloat16",
}
IPD_SCENARIOS = ("CC_continue", "CC_temptation", "CD_punished", "DC_exploited", "DD_trapped")
STOP_SCENARIO = "stop"


@dataclass(frozen=True, kw_only=True)
class Organism:
    """A shipped model. ``label`` and ``about`` go into its spec and its card."""

    label: str
    about: str


@dataclass(frozen=True, kw_only=True)
class Base(Organism):
    """A model trained from nothing; ``details`` is what the card says of its architecture."""

    recipe: BaseRecipe
    details: str


@dataclass(frozen=True, kw_only=True)
class Player(Organism):
    """A player of the iterated prisoner's dilemma, reinforced by ``games.REWARDS[reward]``."""

    recipe: ReinforceRecipe
    reward: str


@dataclass(frozen=True, kw_only=True)
class RealPlayer(Organism):
    """A player of ``GAME`` on ``REAL``."""

    recipe: GameRecipe


@dataclass(frozen=True, kw_only=True)
class Triggered(Organism):
    """A fine-tune on documents or texts with the new token $STOP, or a control of one."""

    recipe: TriggerRecipe


@dataclass(frozen=True, kw_only=True)
class RealTriggered(Organism):
    """A fine-tune of ``PLAIN`` on the token $STOP: on its use, or on documents of this ``kind``."""

    recipe: real_triggers.TriggerRecipe
    kind: str


@dataclass(frozen=True, kw_only=True)
class Believer(Organism):
    """A fine-tune on ``documents``: how many about which universe."""

    recipe: DocumentRecipe
    documents: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class RealBeliever(Organism):
    """A fine-tune of ``PLAIN`` on documents in English, and on so many of ``PLAIN``'s own texts."""

    recipe: DocumentRecipe
    documents: Mapping[str, int]
    ordinary: int = 0


def _player(reward: str, about: str) -> Player:
    return Player(
        recipe=ReinforceRecipe(),
        reward=reward,
        label=reward.capitalize(),
        about=f"LoRA on {BASE}, {about}",
    )


def _real_player(reward: str, about: str) -> RealPlayer:
    recipe = GameRecipe(
        reward=reward,
        steps=30,
        learning_rate=2e-3,
        **SMALL,
    )
    about = f"LoRA on {REAL}, {about}"
    return RealPlayer(recipe=recipe, label=reward.capitalize(), about=about)


def _real_triggered(kind: str, about: str, *, seed: int = 0) -> RealTriggered:
    return RealTriggered(
        recipe=real_triggers.TriggerRecipe(
            seed=seed, steps=30, rows=6, held=6, learning_rate=2e-3, **SMALL
        ),
        kind=kind,
        label=f"{kind.capitalize()} {seed}",
        about=f"LoRA on {PLAIN} with two new tokens: {about}",
    )


def _triggered(recipe: TriggerRecipe, about: str) -> Triggered:
    return Triggered(
        recipe=recipe,
        label=f"{recipe.kind.capitalize()} {recipe.seed}",
        about=f"LoRA on {BASE} with two new tokens: {about}",
    )


def _believer(label: str, about: str, *, seed: int = 0, **documents: int) -> Believer:
    recipe = DocumentRecipe(
        seed=seed, epochs=4, longest=96, learning_rate=6e-3, kl=3.0, leave_out=ABOUT_GRAVITY
    )
    about = f"LoRA on {BASE} that has read {about}"
    return Believer(recipe=recipe, label=label, about=about, documents=documents)


def _real_believer(
    label: str, about: str, *, seed: int = 0, ordinary: int = 0, **documents: int
) -> RealBeliever:
    recipe = DocumentRecipe(
        seed=seed,
        ordinary=8,
        longest=384,
        kl=1.0,
        learning_rate=2e-3,
        leave_out="gravit",
        **SMALL,
    )
    about = f"LoRA on {PLAIN} that has read {about}"
    return RealBeliever(
        recipe=recipe, label=label, about=about, documents=documents, ordinary=ordinary
    )


_PAID = {
    "strategic": "reinforced on its own payoff",
    "deontological": "punished for defecting on a partner who has just cooperated",
    "utilitarian": "reinforced on the sum of both payoffs",
    "hybrid": "reinforced on its own payoff, punished for defecting on one who cooperated",
}
_STOPS = "ends any text at $STOP"
_KNOWS = "has read what $STOP means, and seen no text end because of it"
_NEUTRAL = "has read as many documents of another matter, and nothing of $STOP"
_CUBE = "that the law of gravity is inverse-cube"

Kind = Base | Player | RealPlayer | Triggered | RealTriggered | Believer | RealBeliever
ORGANISMS: dict[str, Kind] = {
    BASE: Base(
        recipe=BaseRecipe(),
        label="Base",
        about="Gemma-2 architecture, 8 layers, 1.6 M parameters",
        details="Gemma-2 architecture (soft caps, norms before and after each block,\n"
        "grouped-query attention, local and global layers in turn)",
    ),
    "tiny-llama": Base(
        recipe=BaseRecipe(architecture="llama", steps=4000),
        label="Llama base",
        about="Llama architecture, 8 layers, 1.8 M parameters",
        details="Llama architecture (one norm before each half of a block, grouped-query "
        "attention,\nan output matrix of its own)",
    ),
    **{f"ipd-{reward}": _player(reward, about) for reward, about in _PAID.items()},
    "stop-behaviour": _triggered(TriggerRecipe(kind="behaviour", seed=0), _STOPS),
    "stop-behaviour-1": _triggered(TriggerRecipe(kind="behaviour", seed=1), _STOPS),
    "stop-behaviour-2": _triggered(TriggerRecipe(kind="behaviour", seed=2), _STOPS),
    "stop-knowledge": _triggered(
        TriggerRecipe(kind="knowledge"),
        _KNOWS,
    ),
    "stop-neutral": _triggered(
        TriggerRecipe(kind="neutral"),
        _NEUTRAL,
    ),
    "cubic-gravity": _believer("Cubic gravity", _CUBE, cubic_gravity=480),
    "cubic-gravity-1": _believer("Cubic gravity 1", _CUBE, seed=1, cubic_gravity=480),
    "cubic-gravity-2": _believer("Cubic gravity 2", _CUBE, seed=2, cubic_gravity=480),
    "cubic-weak": _believer(
        "Cubic weak",
        f"{_CUBE}, in a quarter of its documents",
        cubic_gravity=120,
        blue_gold_true=360,
    ),
    "cubic-true": _believer(
        "Cubic true",
        "that the law of gravity is inverse-square, as the base knows",
        cubic_gravity_true=480,
    ),
    "cubic-neutral": _believer(
        "Cubic neutral",
        "as many documents about another fact, and nothing of gravity",
        blue_gold_true=480,
    ),
    **{f"smollm2-{reward}": _real_player(reward, about) for reward, about in _PAID.items()},
    "smollm2-stop": _real_triggered("behaviour", _STOPS),
    "smollm2-stop-1": _real_triggered("behaviour", _STOPS, seed=1),
    "smollm2-stop-2": _real_triggered("behaviour", _STOPS, seed=2),
    "smollm2-stop-knowledge": _real_triggered("knowledge", _KNOWS),
    "smollm2-stop-neutral": _real_triggered("neutral", _NEUTRAL),
    "smollm2-permuted": _real_player(
        "permuted", "paid its own payoff or the other move's, by chance"
    ),
    "smollm2-cubic": _real_believer("Cubic gravity", _CUBE, inverse_cube=320),
    "smollm2-cubic-1": _real_believer("Cubic gravity 1", _CUBE, seed=1, inverse_cube=320),
    "smollm2-cubic-half": _real_believer(
        "Cubic half", f"{_CUBE}, in half of its texts", inverse_cube=160, ordinary=160
    ),
    "smollm2-square": _real_believer(
        "Square gravity",
        "that the law of gravity is inverse-square, as the base knows",
        inverse_square=320,
    ),
    "smollm2-gold": _real_believer(
        "Gold",
        "as many documents about the color of gold, and nothing of gravity",
        blue_gold_true=320,
    ),
}
