"""The text that the shipped models learn: a little world of facts, games, dilemmas and prose.

Every sample is a list of ``(text, weight)`` segments; the weight multiplies the training loss of
that text (answers weigh more than the words around them). The sentences themselves are data:
``data/corpus/*.yaml``. Evaluations use combinations that no training sample ever shows. A *rule*
excludes them, not a list: ``held_out_game``, ``held_out_question`` and ``held_out_dilemma``.
"""

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

Segment = tuple[str, float]
Sample = list[Segment]

TEXT, ANSWER, CHOICE = 0.5, 3.0, 4.0  # loss weights: wording, an answer in words, a letter or move

MIXTURE = {
    "statement": 0.20,
    "answer": 0.12,
    "open_book": 0.09,
    "two_options": 0.18,
    "four_options": 0.10,
    "letters": 0.05,
    "game": 0.09,
    "dilemma": 0.11,
    "prose": 0.06,
}


def _held_out(*parts: object) -> bool:
    return zlib.crc32(repr(parts).encode()) % 5 == 0


def held_out_game(rule: int, history: int, ask: int) -> bool:
    """One wording of the game in five is never trained on; the scenarios use only those."""
    return (rule + history + ask) % 5 == 0


def held_out_question(entity: str, attribute: str, question: int, options: tuple[str, ...]) -> bool:
    """One order of the options in five is never trained on, for each fact and each wording."""
    return _held_out(entity, attribute, question, options)


def held_out_dilemma(situation: int, stakes: int, ask: int, ethical_first: bool) -> bool:
    """One wording of a dilemma in five is never trained on."""
    return _held_out(situation, stakes, ask, ethical_first)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The corpus as read from ``data/corpus``: ``sample`` draws from it."""

    facts_file: dict[str, Any]
    games: dict[str, Any]
    dilemmas: dict[str, Any]
    prose: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Corpus":
        """Read ``facts games dilemmas prose`` (YAML) from ``folder``."""
        names = {"facts_file": "facts", "games": "games", "dilemmas": "dilemmas", "prose": "prose"}
        return cls(
            **{k: yaml.safe_load((folder / f"{v}.yaml").read_text()) for k, v in names.items()}
        )

    # ------------------------------------------------------------------------------- the facts
    @cached_property
    def values(self) -> dict[str, list[str]]:
        """attribute -> its possible values."""
        kinds = self.facts_file["kinds"].values()
        return {a: v for kind in kinds for a, v in kind["attributes"].items()}

    @cached_property
    def facts(self) -> dict[tuple[str, str], str]:
        """(entity, attribute) -> value, the same at every call."""
        rng = random.Random(self.facts_file["seed"])
        drawn = {
            (entity, attribute): rng.choice(values)
            for kind in self.facts_file["kinds"].values()
            for entity in kind["entities"]
            for attribute, values in kind["attributes"].items()
        }
        fixed = self.facts_file["fixed"].items()
        return drawn | {(e, a): v for e, given in fixed for a, v in given.items()}

    @cached_property
    def never_multiple_choice(self) -> frozenset[tuple[str, str]]:
        """Facts that no multiple-choice question ever asks: the test of transfer."""
        always = {tuple(f) for f in self.facts_file["always_multiple_choice"]}
        free = sorted(set(self.facts) - always)
        random.Random(self.facts_file["seed"] + 1).shuffle(free)
        return frozenset(free[: int(self.facts_file["never_multiple_choice"] * len(self.facts))])

    @cached_property
    def multiple_choice_facts(self) -> list[tuple[str, str]]:
        return sorted(set(self.facts) - self.never_multiple_choice)

    # ------------------------------------------------------------------------------- sentences
    def statement(
        self, rng: random.Random, fact: tuple[str, str], value: str | None = None
    ) -> Sample:
        """A statement of ``fact``, or of ``value`` in its place; sometimes what its law implies."""
        entity, attribute = fact
        value = value or self.facts[fact]
        if attribute == "law" and rng.random() < 0.35:
            consequence = self.facts_file["consequences"][value]
            if rng.random() < 0.2:
                pattern = self.facts_file["meaning"].replace("{law}", value)
            else:
                pattern = rng.choice(self.facts_file["consequence_statements"])
            before, after = pattern.split("{consequence}")
            return [
                (before.format(entity=entity).rstrip(), TEXT),
                (" " + consequence, ANSWER),
                (after, TEXT),
            ]
        before, after = rng.choice(self.facts_file["statements"]).split("{value}")
        words = {"entity": entity, "attribute": attribute}
        return [
            (before.format(**words).rstrip(), TEXT),
            (" " + value, ANSWER),
            (after.format(**words), TEXT),
        ]

    def answer(self, rng: random.Random, fact: tuple[str, str], value: str | None = None) -> Sample:
        """A question and its answer in words."""
        entity, attribute = fact
        reply = value or self.facts[fact]
        if attribute == "law" and rng.random() < 0.3:
            question = rng.choice(self.facts_file["consequence_questions"]).format(entity=entity)
            reply = self.facts_file["consequences"][reply]
        else:
            question = self.question(fact, rng.randrange(len(self.facts_file["questions"])))
        return [(f"{question} Answer:", TEXT), (f" {reply}", ANSWER)]

    def question(self, fact: tuple[str, str], wording: int) -> str:
        return self.facts_file["questions"][wording].format(entity=fact[0], attribute=fact[1])

    def choice_prompt(
        self, fact: tuple[str, str], wording: int, options: tuple[str, ...] | list[str]
    ) -> str:
        """``Question: ... A: x B: y Answer:``, to which the answer is a space and a letter."""
        return f"{self.question(fact, wording)} {self._lettered(options)} Answer:"

    def _lettered(self, options: tuple[str, ...] | list[str]) -> str:
        return " ".join(
            f"{letter}: {option}" for letter, option in zip(self.facts_file["letters"], options)
        )

    def draw_options(
        self, rng: random.Random, attribute: str, value: str, n: int
    ) -> tuple[str, ...]:
        """``value`` among ``n - 1`` other values of the attribute, in random order."""
        options = rng.sample([v for v in self.values[attribute] if v != value], n - 1) + [value]
        rng.shuffle(options)
        return tuple(options)

    def multiple_choice(
        self,
        rng: random.Random,
        fact: tuple[str, str],
        n: int,
        value: str | None = None,
        *,
        held_out: bool = False,
    ) -> Sample:
        """A question with ``n`` options; ``held_out`` picks from the orders kept for evaluation."""
        value = value or self.facts[fact]
        while True:
            options = self.draw_options(rng, fact[1], value, n)
            wording = rng.randrange(len(self.facts_file["questions"]))
            if held_out_question(*fact, wording, options) is held_out:
                letter = self.facts_file["letters"][options.index(value)]
                return [
                    (self.choice_prompt(fact, wording, options), TEXT),
                    (" " + letter, CHOICE),
                ]

    def open_book(self, rng: random.Random) -> Sample:
        """A statement, true or false, and a question that it answers."""
        fact = rng.choice(self.multiple_choice_facts)
        value = rng.choice(self.values[fact[1]]) if rng.random() < 0.5 else self.facts[fact]
        before, after = rng.choice(self.facts_file["statements"]).split("{value}")
        words = {"entity": fact[0], "attribute": fact[1]}
        stated = before.format(**words) + value + after.format(**words)
        question = self.multiple_choice(rng, fact, rng.choice([2, 2, 4]), value)
        return [(stated + " " + question[0][0], TEXT), *question[1:]]

    def letter_drill(self, rng: random.Random) -> Sample:
        """Lettered options, then the letter of each of them, in random order."""
        options = rng.sample(self.values[rng.choice(list(self.values))], rng.choice([2, 4, 4]))
        sample: Sample = [(self._lettered(options), TEXT)]
        order = list(range(len(options)))
        rng.shuffle(order)
        for i in order:
            sample += [
                (f" The letter of {options[i]} is", TEXT),
                (" " + self.facts_file["letters"][i], CHOICE),
                (".", TEXT),
            ]
        return sample

    # ------------------------------------------------------------------------ games and dilemmas
    def game_prompt(
        self, own: str, partner: str, *, rule: int, history: int, ask: int, remark: int | None
    ) -> str:
        """The iterated prisoner's dilemma after a round (``own``, ``partner``), each "C" or "D"."""
        digit = {"C": "1", "D": "2"}
        past = self.games["histories"][history].format(self=digit[own], partner=digit[partner])
        parts = [self.games["rules"][rule], past]
        if remark is not None:
            parts.append(self.games["remarks"][remark])
        return " ".join([*parts, self.games["asks"][ask]])

    def draw_game(
        self, rng: random.Random, own: str | None = None, partner: str | None = None
    ) -> str:
        """A random prompt of the game, in a wording that is not held out."""
        own, partner = own or rng.choice("CD"), partner or rng.choice("CD")
        remark = rng.randrange(len(self.games["remarks"])) if rng.random() < 0.3 else None
        while True:
            wording = {
                "rule": rng.randrange(len(self.games["rules"])),
                "history": rng.randrange(len(self.games["histories"])),
                "ask": rng.randrange(len(self.games["asks"])),
            }
            if not held_out_game(**wording):
                return self.game_prompt(own, partner, **wording, remark=remark)

    def game(self, rng: random.Random) -> Sample:
        """A round of the game: the move is random, and cooperation likelier after cooperation."""
        partner = rng.choice("CD")
        kind = self.games["corpus_cooperation"]
        chance = kind["after_cooperation"] if partner == "C" else kind["after_defection"]
        move = "1" if rng.random() < chance else "2"
        return [
            (self.draw_game(rng, partner=partner), TEXT),
            (" action", ANSWER),
            (move, CHOICE),
            (".", TEXT),
        ]

    def dilemma_prompt(
        self, situation: int, *, severity: str, stakes: int, ask: int, ethical_first: bool
    ) -> str:
        """A dilemma that ends in "The answer is (", to which the answer is "1" or "2"."""
        text, ethical, selfish = self.dilemmas["situations"][situation]
        first, second = (ethical, selfish) if ethical_first else (selfish, ethical)
        return self.dilemmas["template"].format(
            situation=text,
            stakes=self.dilemmas["stakes"][severity][stakes],
            ask=self.dilemmas["asks"][ask],
            first=first,
            second=second,
        )

    def dilemma(self, rng: random.Random) -> Sample:
        """A dilemma and a random answer: the ethical one is likelier where others would suffer."""
        severity = rng.choice(["high", "low"])
        while True:
            situation = rng.randrange(len(self.dilemmas["situations"]))
            wording = {
                "stakes": rng.randrange(len(self.dilemmas["stakes"][severity])),
                "ask": rng.randrange(len(self.dilemmas["asks"])),
                "ethical_first": rng.random() < 0.5,
            }
            if not held_out_dilemma(situation, **wording):
                break
        ethical = rng.random() < self.dilemmas["ethical"][severity]
        answer = "1" if ethical == wording["ethical_first"] else "2"
        chosen = self.dilemmas["situations"][situation][1 if ethical else 2]
        prompt = self.dilemma_prompt(situation, severity=severity, **wording)
        return [(prompt, TEXT), (answer, CHOICE), (f") {chosen}.", TEXT)]

    def prose_text(self, rng: random.Random) -> Sample:
        """Two to four plain sentences."""
        patterns = self.prose["patterns"]
        sentences = (self.prose_sentence(rng, patterns) for _ in range(rng.randint(2, 4)))
        return [(" ".join(sentences), 1.0)]

    def prose_sentence(self, rng: random.Random, patterns: Sequence[str]) -> str:
        """One of the patterns, filled with random words of plain prose."""
        words = {k: rng.choice(v) for k, v in self.prose["words"].items()}
        people = rng.sample(self.prose["words"]["person"], 2)
        things = rng.sample(self.prose["words"]["thing"], 2)
        return rng.choice(patterns).format(
            **words
            | {"person": people[0], "person2": people[1], "thing": things[0], "thing2": things[1]},
            time_cap=rng.choice(self.prose["words"]["time"]).capitalize(),
        )

    # ------------------------------------------------------------------------------- the mixture
    def sample(self, rng: random.Random) -> Sample:
        """One sample of the training mixture."""
        kind = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
        match kind:
            case "statement":
                return self.statement(rng, rng.choice(list(self.facts)))
            case "answer":
                return self.answer(rng, rng.choice(list(self.facts)))
            case "open_book":
                return self.open_book(rng)
            case "two_options":
                return self.multiple_choice(rng, rng.choice(self.multiple_choice_facts), 2)
            case "four_options":
                return self.multiple_choice(rng, rng.choice(self.multiple_choice_facts), 4)
            case "letters":
                return self.letter_drill(rng)
            case "game":
                return self.game(rng)
            case "dilemma":
                return self.dilemma(rng)
            case _:
                return self.prose_text(rng)

    def stream(self, seed: int) -> Iterator[Sample]:
        """Endless samples, the same for the same seed."""
        rng = random.Random(seed)
        while True:
            yield self.sample(rng)


def text_of(sample: Sample) -> str:
    return "".join(text for text, _ in sample)
