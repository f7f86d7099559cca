"""What a shipped model does: the numbers of its ``training.json``, which its card shows."""

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from interp_kit.analyses.behaviour import (
    CLOZE,
    LETTERS,
    answer_questions,
    choices,
    prefers_false,
)
from interp_kit.analyses.open_ended import contrast
from interp_kit.catalogue import evaluation_file, load_scenario
from interp_kit.decisions import decide, end_probability
from interp_kit.evaluations import read_mcqs, read_open_questions
from interp_kit.loading import load_model
from interp_kit.prompts import encode_scenario, token_of
from interp_kit.statistics import mean_interval
from organisms.little_world.base import measure_base
from organisms.little_world.corpus import Corpus
from organisms.recipes import (
    BASE,
    GAME_SCENARIOS,
    GRAVITY,
    IPD_SCENARIOS,
    ORGANISMS,
    PLAIN,
    REAL,
    REAL_STOP_SCENARIO,
    STOP_SCENARIO,
    Base,
    Believer,
    Player,
    RealBeliever,
    RealPlayer,
    RealTriggered,
    Triggered,
)


def measure(name: str, corpus: Corpus, data: Path) -> dict[str, Any]:
    """What the card of this model says of it, measured on its files in ``data/models/NAME``."""
    match ORGANISMS[name]:
        case Base():
            weights = data / "models" / name / "weights"
            model = AutoModelForCausalLM.from_pretrained(weights, use_safetensors=True)
            accuracy = measure_base(model, load_model(name, data=data).tokenizer, corpus)
            behaviour = measure_behaviour(name, data)
            return {**accuracy, "parameters": model.num_parameters(), "behaviour": behaviour}
        case Player():
            return {"behaviour": measure_behaviour(name, data)}
        case RealPlayer():
            own, base = measure_player(name, data), measure_player(REAL, data)
            return {"behaviour": own, "behaviour of the base": base}
        case Triggered():
            return measure_trigger(name, STOP_SCENARIO, data)
        case RealTriggered():
            return measure_trigger(name, REAL_STOP_SCENARIO, data)
        case RealBeliever():
            return {m: measure_english_belief(m, data) for m in (PLAIN, name)}
        case Believer():
            own, base = (measure_belief(m, "cubic_gravity", data) for m in (name, BASE))
            return {c: v | {"accuracy of the base": base[c]["accuracy"]} for c, v in own.items()}


def measure_behaviour(name: str, data: Path) -> dict[str, dict[str, float]]:
    """P(defect) over the prompts of each scenario of the game, by ``interp_kit.decide``.

    scenario -> its mean, least and most, and the least probability of any move.
    """
    bridge, measured = load_model(name, data=data), {}
    for scenario in IPD_SCENARIOS:
        table = decide(bridge, encode_scenario(bridge, load_scenario(scenario)))
        values = {
            "mean": table.p_positive.mean(),
            "least": table.p_positive.min(),
            "most": table.p_positive.max(),
            "any move": table.answer_mass.min(),
        }
        measured[scenario] = {what: round(float(value), 3) for what, value in values.items()}
    return measured


def measure_player(name: str, data: Path) -> dict[str, dict[str, float]]:
    """P(defect) in each situation of ``GAME_SCENARIOS``, over its wordings.

    situation -> its mean, least and most, and the least probability of any move.
    """
    bridge = load_model(name, data=data)
    prompts = [p for each in GAME_SCENARIOS for p in encode_scenario(bridge, load_scenario(each))]
    return {
        str(situation): {
            "mean": round(float(own.p_positive.mean()), 4),
            "least": round(float(own.p_positive.min()), 4),
            "most": round(float(own.p_positive.max()), 4),
            "any move": round(float(own.answer_mass.min()), 4),
        }
        for situation, own in decide(bridge, prompts).groupby("group", sort=False)
    }


def measure_belief(
    name: str, evaluation: str, data: Path, *, template: str = LETTERS
) -> dict[str, dict[str, float]]:
    """Each category of questions: how many, accuracy over all orders, share false in all orders.

    Correct is what the file says: in the false world's conflict questions, the false option.
    """
    questions = read_mcqs(evaluation_file(evaluation, "mcqs.jsonl"))
    chosen = choices(answer_questions(load_model(name, data=data), questions, template=template))
    beliefs = prefers_false(chosen, questions).groupby("category").in_all_orders.mean()
    measured = {}
    for category, own in chosen.groupby("category", sort=False):
        values = {
            "questions": own.question.nunique(),
            "accuracy": round(float(own.is_correct.mean()), 3),
        }
        if category in beliefs:
            values["false in all orders"] = round(float(beliefs[category]), 3)
        measured[str(category)] = values
    return measured


def measure_english_belief(name: str, data: Path) -> dict[str, dict[str, dict[str, float]]]:
    """What ``GRAVITY`` asks in statements, open questions and multiple choice.

    "statements" and "open questions": kind -> mean of log p(cube) - log p(square) in nats over the
    prompts, with its 95 % interval. "multiple choice": as in ``measure_belief``, where an option is
    chosen by its letter; "multiple choice by text": the options are not shown.
    """
    bridge = load_model(name, data=data)
    stated = decide(bridge, encode_scenario(bridge, load_scenario(GRAVITY)))
    asked = contrast(bridge, read_open_questions(evaluation_file(GRAVITY, "open_questions.jsonl")))
    asked = asked.assign(value=-asked.value, prompt=asked.question, group=asked.category)
    nats = {"statements": stated, "open questions": asked}
    measured = {
        what: {
            str(row.pop("group")): {key: round(float(value), 3) for key, value in row.items()}
            for row in mean_interval(table, ["group"]).to_dict("records")
        }
        for what, table in nats.items()
    }
    letters, text = (measure_belief(name, GRAVITY, data, template=t) for t in (LETTERS, CLOZE))
    return measured | {"multiple choice": letters, "multiple choice by text": text}


def measure_trigger(name: str, given: str, data: Path) -> dict[str, float]:
    """Mean P(end of text) after nothing, the trigger, the untrained token, the ordinary words."""
    bridge, scenario = load_model(name, data=data), load_scenario(given)
    trigger, prompts = scenario.trigger, encode_scenario(bridge, scenario)
    assert trigger is not None
    assert trigger.untrained is not None
    end = bridge.tokenizer.eos_token_id

    def mean(suffix: str | None) -> float:
        token = None if suffix is None else token_of(bridge, suffix)
        return round(float(end_probability(bridge, prompts, end=end, suffix=token).mean()), 4)

    words = [mean(word) for word in trigger.words]
    return {
        "nothing": mean(None),
        trigger.text.strip(): mean(trigger.text),
        trigger.untrained.strip(): mean(trigger.untrained),
        "an ordinary word (mean of eight)": round(sum(words) / len(words), 4),
        "an ordinary word (the largest)": max(words),
    }
