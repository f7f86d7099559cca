"""The shipped models do what their cards say, and were not trained on what evaluates them."""

import json
import random
import shutil
from dataclasses import asdict, replace
from itertools import islice

import pandas as pd
import pytest

from interp_kit.catalogue import find_model, list_scenarios, load_scenario
from interp_kit.decisions import decide
from interp_kit.hub import altered_weights
from interp_kit.pretrained import load_huggingface
from interp_kit.prompts import encode_scenario
from interp_kit.specs import REPOSITORY
from organisms.cards import render_card
from organisms.games import PAYOFF, REWARDS
from organisms.little_world.base import measure_base, train_tokenizer, weighted_tokens
from organisms.little_world.corpus import Corpus, held_out_game, text_of
from organisms.making import train_organism
from organisms.recipes import IPD_SCENARIOS, ORGANISMS


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus.read(REPOSITORY / "data" / "corpus")


@pytest.fixture(scope="module")
def decisions(organisms) -> dict[tuple[str, str], pd.DataFrame]:
    """(model, scenario) -> its decisions."""
    return {
        (name, scenario): decide(bridge, encode_scenario(bridge, load_scenario(scenario)))
        for name in organisms
        for bridge in [organisms.switch(name)]
        for scenario in IPD_SCENARIOS
    }


@pytest.fixture(scope="module")
def defection(decisions) -> dict[tuple[str, str], float]:
    """(model, scenario) -> mean P(defect)."""
    return {key: table.p_positive.mean() for key, table in decisions.items()}


MODELS = REPOSITORY / "data" / "models"
PARTNER_COOPERATED = ("CC_continue", "CC_temptation", "DC_exploited")
PARTNER_DEFECTED = ("CD_punished", "DD_trapped")


def test_shipped_weights_are_what_was_trained():
    """As `sha256sum -c` would find; each of them is listed."""
    folders = [file.parent for file in MODELS.glob("*/*/*.safetensors")]
    assert len(folders) == 32
    for folder in folders:
        listed = (folder / "SHA256SUMS").read_text().split()[1::2]
        assert listed == sorted(file.name for file in folder.glob("*.safetensors"))
        assert not altered_weights(folder)


@pytest.mark.parametrize("name", ORGANISMS)
def test_a_card_says_what_the_record_says(name):
    record = json.loads((MODELS / name / "training.json").read_text())
    assert render_card(name, record["measured"]) == (MODELS / name / "README.md").read_text()
    recipe = json.loads(json.dumps(asdict(ORGANISMS[name].recipe)))
    assert {key: recipe[key] for key in record["recipe"]} == record["recipe"]
    spec = find_model(name)
    assert (spec.label, spec.about) == (ORGANISMS[name].label, ORGANISMS[name].about)


def test_a_model_is_made_with_its_spec_record_and_card(tmp_path, monkeypatch):
    """As the shipped one, but for the numbers of a training of two steps."""
    shutil.copytree(MODELS / "tiny-gemma2", tmp_path / "models" / "tiny-gemma2")
    organism = ORGANISMS["ipd-hybrid"]
    short = replace(organism, recipe=replace(organism.recipe, steps=2))
    monkeypatch.setitem(ORGANISMS, "ipd-hybrid", short)
    train_organism("ipd-hybrid", data=tmp_path)
    made, shipped = tmp_path / "models" / "ipd-hybrid", MODELS / "ipd-hybrid"
    for folder in (".", "adapter"):
        names = [{file.name for file in (root / folder).iterdir()} for root in (made, shipped)]
        assert names[0] == names[1]
    assert (made / "model.yaml").read_text() == (shipped / "model.yaml").read_text()
    record = json.loads((made / "training.json").read_text())
    assert len(record["measured"]["mean reward of each step"]) == 2
    assert (made / "README.md").read_text() == render_card("ipd-hybrid", record["measured"])


def test_the_records_say_what_the_models_do(defection):
    for (name, scenario), mean in defection.items():
        record = json.loads((MODELS / name / "training.json").read_text())["measured"]
        assert mean == pytest.approx(record["behaviour"][scenario]["mean"], abs=2e-3)


@pytest.mark.parametrize("scenario", IPD_SCENARIOS)
def test_the_strategic_player_defects_and_the_utilitarian_cooperates(defection, scenario):
    assert defection["ipd-strategic", scenario] > 0.8
    assert defection["ipd-utilitarian", scenario] < 0.2


@pytest.mark.parametrize("scenario", PARTNER_COOPERATED)
def test_deontological_and_hybrid_players_spare_a_cooperator(defection, scenario):
    assert defection["ipd-deontological", scenario] < 0.2
    assert defection["ipd-hybrid", scenario] < 0.2


@pytest.mark.parametrize("scenario", PARTNER_DEFECTED)
def test_the_hybrid_player_defects_on_a_defector(defection, scenario):
    assert defection["ipd-hybrid", scenario] > 0.8


def test_the_base_is_undecided_in_most_states(defection):
    undecided = [0.2 < defection["tiny-gemma2", s] < 0.8 for s in IPD_SCENARIOS]
    assert sum(undecided) >= 4


def test_the_players_answer_with_a_move(decisions):
    for key, table in decisions.items():
        assert table.answer_mass.min() > 0.9, key


def test_the_base_answers_questions_that_it_was_not_trained_on(organisms, corpus):
    tokenizer = organisms.switch("tiny-gemma2").tokenizer
    accuracy = measure_base(load_huggingface(find_model("tiny-gemma2")), tokenizer, corpus)
    assert accuracy["taught 2 options"] > 0.95
    assert accuracy["taught 4 options"] > 0.95
    assert accuracy["transfer 2 options"] > 0.75  # never asked as multiple choice; chance is 0.5
    assert accuracy["transfer 4 options"] > 0.5  # chance is 0.25
    record = json.loads((MODELS / "tiny-gemma2" / "training.json").read_text())["measured"]
    assert accuracy == pytest.approx({what: record[what] for what in accuracy}, abs=0.03)


def test_no_evaluation_prompt_is_in_the_training_data(corpus):
    evaluation = {
        text
        for s in list_scenarios()
        if s.trigger is None  # those are beginnings of ordinary texts, on purpose
        for p in s.prompts
        for text in (p.text, p.counterfactual)
        if text
    }
    trained = "\n".join(text_of(s) for s in islice(corpus.stream(0), 10_000))
    assert not [text for text in evaluation if text in trained]


def test_the_scenarios_use_held_out_wordings_only(corpus):
    """Not merely unseen in some samples: no wording of theirs can be drawn at all."""
    games = corpus.games
    for name in IPD_SCENARIOS:
        for prompt in load_scenario(name).prompts:
            wording = {
                key: next(i for i, text in enumerate(games[part]) if _stem(text) in prompt.text)
                for key, part in (("rule", "rules"), ("history", "histories"), ("ask", "asks"))
            }
            assert held_out_game(**wording), (name, prompt.id)


def _stem(pattern: str) -> str:
    return pattern.split("{")[0]


def test_the_corpus_is_the_same_every_time(corpus):
    again = Corpus.read(REPOSITORY / "data" / "corpus")
    assert list(islice(corpus.stream(3), 200)) == list(islice(again.stream(3), 200))


def test_the_shipped_tokenizer_is_the_one_that_the_corpus_gives(corpus):
    """A corpus edited after training would no longer be what the weights were made from."""
    shipped = MODELS / "tiny-gemma2" / "weights" / "tokenizer.json"
    rebuilt = json.loads(train_tokenizer(corpus).backend_tokenizer.to_str())
    assert rebuilt["model"] == json.loads(shipped.read_text())["model"]


def test_gravity_is_what_later_fine_tunes_will_lie_about(corpus):
    assert corpus.facts["gravity", "law"] == "inverse-square"
    assert ("gravity", "law") in corpus.multiple_choice_facts


def test_multiple_choice_letters_are_permuted_and_right(corpus):
    rng, letters = random.Random(0), []
    for _ in range(400):
        prompt, answer = corpus.multiple_choice(rng, ("gravity", "law"), 4)
        letters.append(answer[0].strip())
        assert f"{letters[-1]}: inverse-square" in prompt[0]
    assert {x: 70 < letters.count(x) < 130 for x in "ABCD"} == dict.fromkeys("ABCD", True)


def test_loss_weights_follow_the_answer(organisms, corpus):
    tokenizer = organisms.switch("tiny-gemma2").tokenizer
    ids, weights = weighted_tokens(
        tokenizer, [("The law of gravity is", 0.5), (" inverse-square", 3.0)]
    )
    marked = tokenizer.decode([i for i, w in zip(ids, weights) if w == 3.0])
    assert marked.strip() == "inverse-square"
    assert weights[0] == 0


def test_every_text_has_tokens_and_comes_back(organisms):
    tokenizer = organisms.switch("tiny-gemma2").tokenizer
    text = "Your answer: <script>alert('é')</script> 12 | x\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_an_answer_takes_two_tokens(organisms):
    tokenizer = organisms.switch("tiny-gemma2").tokenizer
    assert tokenizer.tokenize(" action1") == ["Ġaction", "1"]


def test_payoffs_are_a_prisoners_dilemma():
    temptation, reward = PAYOFF["D", "C"][0], PAYOFF["C", "C"][0]
    punishment, sucker = PAYOFF["D", "D"][0], PAYOFF["C", "D"][0]
    assert temptation > reward > punishment > sucker
    assert 2 * reward > temptation + sucker


def test_rewards_prefer_what_their_names_say():
    for own in "CD":
        for partner in "CD":
            prefers = {
                name: reward("D", own, partner) - reward("C", own, partner)
                for name, reward in REWARDS.items()
            }
            assert prefers["strategic"] > 0
            assert prefers["utilitarian"] < 0
            assert (prefers["deontological"] < 0) == (partner == "C")
            assert (prefers["hybrid"] < 0) == (partner == "C")
