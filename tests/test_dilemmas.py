"""Pairs of dilemmas: read as they are, held out, counterbalanced; what is wrong is said."""

import json
import shutil
from types import SimpleNamespace
from typing import cast

import pandas as pd
import pytest

from interp_kit.analyses import option_order
from interp_kit.analyses.option_order import choice_by_content, swapped_options
from interp_kit.catalogue import list_scenarios, load_scenario
from interp_kit.controls import with_unrelated_counterfactuals
from interp_kit.decisions import decide
from interp_kit.formats import PAIRS
from interp_kit.loading import load_model
from interp_kit.patching.positions import comparable_positions
from interp_kit.prompts import Tokenizing, encode, encode_scenario
from interp_kit.specs import REPOSITORY, InputError
from organisms.little_world.corpus import Corpus, held_out_dilemma

FOLDER = REPOSITORY / "data" / "scenarios" / "dilemmas"
NAMES = ("dilemmas", "dilemmas_free_length")
ENGLISH = "dilemmas_english"


@pytest.fixture(scope="module")
def base():
    return load_model("tiny-gemma2", device="cpu")


@pytest.fixture(scope="module")
def encoded(base):
    """Both sets of pairs, tokenized."""
    return {name: encode_scenario(base, load_scenario(name)) for name in NAMES}


@pytest.fixture(scope="module")
def plain(smollm2):
    """SmolLM2 without its chat template."""
    return load_model("smollm2-plain", device="cpu")


@pytest.fixture
def copy(tmp_path):
    """A copy of the pairs, and a function that changes one of its files."""
    folder = shutil.copytree(FOLDER, tmp_path / "mine")

    def change(name, how):
        records = json.loads((folder / name).read_text())
        how(records)
        (folder / name).write_text(json.dumps(records))
        return str(folder)

    return change


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_counterbalanced(name):
    prompts = load_scenario(name).prompts
    assert len(prompts) >= 40
    assert sum(p.positive == "1" for p in prompts) == len(prompts) / 2
    for group in {p.group for p in prompts}:  # each dilemma in both orders of its options
        assert sorted(str(p.positive) for p in prompts if p.group == group) == ["1", "2"]
    asked = [p.text.rpartition(" [1]")[0].rpartition(".")[2] for p in prompts]
    assert len(set(asked)) == 3


def test_no_dilemma_was_trained_on():
    """Every wording of the pairs is one that the corpus holds out, in both orders."""
    corpus = Corpus.read(REPOSITORY / "data" / "corpus")
    held_out = {
        corpus.dilemma_prompt(s, severity=severity, stakes=stakes, ask=ask, ethical_first=first)
        for s in range(len(corpus.dilemmas["situations"]))
        for stakes in range(3)
        for ask in range(3)
        for first in (True, False)
        if held_out_dilemma(s, stakes, ask, first)
        for severity in ("high", "low")
    }
    for prompt in load_scenario("dilemmas").prompts:
        assert {prompt.text, prompt.counterfactual} <= held_out


def test_length_matched_pairs_align_and_the_others_do_not(encoded):
    matched, free = encoded.values()
    assert all(len(p.tokens) == len(p.counterfactual) for p in matched)
    assert not any(len(p.tokens) == len(p.counterfactual) for p in free)
    assert all(len(p.segments) == 5 for p in matched)
    assert all(len(p.segments) == 3 for p in free)


def test_the_base_decides_by_the_stakes(base, encoded):
    """In the corpus people choose the ethical option with chance .95 or .35, by the stakes."""
    prompts = encoded["dilemmas"]
    assert abs(decide(base, prompts).p_positive.mean() - 0.95) < 0.05
    assert abs(decide(base, [p.swapped() for p in prompts]).p_positive.mean() - 0.35) < 0.05


def test_the_base_decides_by_content_and_not_by_place(base, encoded):
    bias = swapped_options(base, encoded["dilemmas"])
    assert len(bias) == 21
    assert bias.consistent.all()
    assert abs(bias.bias.mean()) < 0.2
    assert bias.bias.abs().max() < 1 < bias.content.min()


def test_a_planted_preference_for_a_place_is_found(base, encoded, monkeypatch):
    """Half a nat more for "1" wherever it stands is bias, and no content."""
    prompts = encoded["dilemmas"]
    before = swapped_options(base, prompts)
    one = base.tokenizer("1", add_special_tokens=False)["input_ids"][0]

    def prefers_one(bridge, prompts):
        table = decide(bridge, prompts)
        return table.assign(
            value=table.value + [0.5 * (1 if p.positive == (one,) else -1) for p in prompts]
        )

    monkeypatch.setattr(option_order, "decide", prefers_one)
    after = swapped_options(base, prompts)
    assert (after.bias - before.bias).tolist() == pytest.approx([0.5] * 21)
    assert after.content.tolist() == pytest.approx(before.content.tolist())


def test_an_unrelated_counterfactual_is_another_dilemma_with_the_same_answers(encoded):
    prompts = {p.id: p for p in encoded["dilemmas"]}
    by_tokens = {p.tokens: p for p in prompts.values()}
    controls = with_unrelated_counterfactuals(list(prompts.values()))
    assert len(controls) > 30
    for control in controls:
        other = by_tokens[control.counterfactual]
        assert other.group != control.group
        assert (other.positive, other.negative) == (control.positive, control.negative)
        assert len(other.tokens) == len(control.tokens)
        assert control.tokens == prompts[control.id].tokens
    assert with_unrelated_counterfactuals(controls[:1]) == []


def test_positions_correspond_where_all_lengths_are_equal(encoded):
    matched, free = encoded.values()
    assert comparable_positions(matched) == "all"
    assert comparable_positions([*matched, free[0]]) == "decision"


def test_what_a_model_chooses_is_told_where_it_goes_by_content(base, encoded):
    prompts = encoded["dilemmas"]
    asked = swapped_options(base, prompts)
    changed = swapped_options(base, [p.swapped() for p in prompts])
    values, answers = choice_by_content(asked, changed, "ethical")
    assert [said.partition(":")[0] for said in answers.values()] == ["yes", "yes"]
    half = (asked.content.mean() - changed.content.mean()) / 2
    assert values["effect_of_the_counterfactual"]["value"] == pytest.approx(half)
    assert choice_by_content(asked.head(0), changed.head(0), "ethical") == ({}, {})


@pytest.mark.parametrize(("share", "says"), [(0.0, "its choices go"), (0.5, "its choices may go")])
def test_a_choice_by_position_cannot_tell(share, says):
    n = 24
    asked = pd.DataFrame(
        {
            "prompt": [str(i) for i in range(n)],
            "content": [0.1 + i / 1000 for i in range(n)],
            "bias": [2.0 + i / 1000 for i in range(n)],
            "consistent": [i < share * n for i in range(n)],
        }
    )
    _, answers = choice_by_content(asked, asked.assign(content=0.0), "ethical")
    chooses, moves = answers.values()
    assert chooses.startswith(
        f"cannot tell, {says} by the order: same in both orders {share:{'.3f' if share else 'g'}}"
    )
    assert "bias for the first option 2.012 nats [" in chooses
    assert moves.startswith("yes: effect of the counterfactual 0.056 nats")


def test_one_order_says_nothing_of_a_bias(base, encoded):
    prompts = encoded["dilemmas"]
    assert swapped_options(base, prompts[::2]).empty


def test_dilemmas_in_english_are_counterbalanced():
    prompts = load_scenario(ENGLISH).prompts
    right = [(p.positive, p.negative) for p in prompts]
    assert right.count((" break", " keep")) == right.count((" keep", " break")) == 24
    for group in {p.group for p in prompts}:
        one, other = (p for p in prompts if p.group == group)
        assert one.text != other.text
        assert sorted(one.text) == sorted(other.text)
        assert (one.positive, one.negative) == (other.positive, other.negative)
        for parts in (one.segments, other.segments):
            assert list(parts) == ["situation", "stakes", "options", "answer"]
            assert not {"break", "keep"} & set(f"{parts['situation']} {parts['stakes']}".split())
        assert one.segments["stakes"] == other.segments["stakes"]


def test_no_dilemma_in_english_was_trained_on():
    """No sentence of them occurs in what any model here was made from."""
    data = REPOSITORY / "data"
    files = [f for folder in ("games", "corpus", "universes") for f in (data / folder).glob("*.*")]
    files += [*(data / "models").glob("*/*.jsonl"), *(data / "models").glob("*/training.json")]
    taught = [" ".join(file.read_text(encoding="utf-8").split()) for file in files]
    for prompt in load_scenario(ENGLISH).prompts:
        for part in (prompt.segments["situation"], *prompt.segments["stakes"]):
            assert not any(str(part) in text for text in taught), part


def test_dilemmas_in_english_align_and_both_orders_are_found(plain):
    prompts = encode_scenario(plain, load_scenario(ENGLISH))
    assert comparable_positions(prompts) == "all"
    assert all(len(p.positive) == len(p.negative) == 1 for p in prompts)
    few = prompts[::12] + prompts[1::12]
    table = decide(plain, few)
    orders = swapped_options(plain, few, table)
    assert sorted(orders.prompt) == sorted({p.group for p in few})
    first = {p.id: f"{plain.tokenizer.decode(p.positive).strip()}-" in p.id for p in few}
    sign = table.prompt.map(first).map({True: 1, False: -1})
    assert orders.bias.mean() == pytest.approx((table.value * sign).mean(), abs=1e-5)


def test_the_stakes_move_a_real_model_and_no_place_does(plain):
    """But by a fifth of a nat: too little to choose the same option in both orders."""
    prompts = encode_scenario(plain, load_scenario(ENGLISH))
    asked = swapped_options(plain, prompts)
    changed = swapped_options(plain, [p.swapped() for p in prompts])
    values, answers = choice_by_content(asked, changed, "ethical")
    chooses, moves = answers.values()
    assert chooses.startswith("cannot tell")
    assert moves.startswith("yes")
    assert abs(values["bias_for_the_first_option"]["value"]) < 0.5


def test_the_seed_formats_are_read_as_they_are(shared, base):
    scenario = load_scenario(str(shared / "seed_formats"))
    assert [p.id for p in scenario.prompts] == ["p001", "p002"]
    assert [p.group for p in scenario.prompts] == ["G_058", "G_112"]
    assert "swapped in 2" in scenario.about
    prompts = encode_scenario(base, scenario)
    assert all(p.counterfactual and len(p.tokens) != len(p.counterfactual) for p in prompts)
    assert [base.tokenizer.decode(p.positive) for p in prompts] == ["1", "1"]


def test_folders_of_pairs_are_listed():
    assert set(NAMES) <= {scenario.name for scenario in list_scenarios()}


@pytest.mark.parametrize(
    ("name", "how", "says"),
    [
        (PAIRS[1], lambda r: r.pop(3), "has no partner"),
        (PAIRS[0], lambda r: r.pop(3), "has no partner"),
        (PAIRS[0], lambda r: r[4].update(ethical_option="3"), "record 5: ethical_option"),
        (PAIRS[0], lambda r: r[4].pop("prompt"), "record 5: prompt: missing"),
        (PAIRS[0], lambda r: r.append(r[0]), "occurs twice"),
        (PAIRS[0], lambda r: r.clear(), "expected a list of records"),
        (PAIRS[0], lambda r: r[0].update(segments={"stakes": "no words of it"}), "occurs 0 times"),
    ],
    ids=[
        "without counterfactual",
        "without base",
        "option",
        "no prompt",
        "twice",
        "empty",
        "segment",
    ],
)
def test_what_is_wrong_with_pairs_is_said(copy, name, how, says):
    with pytest.raises(InputError, match=says):
        load_scenario(copy(name, how))


def test_a_broken_file_of_pairs_is_said(copy):
    folder = copy(PAIRS[0], lambda r: None)
    with open(f"{folder}/{PAIRS[1]}", "w") as file:
        file.write("[{")
    with pytest.raises(InputError, match="not readable as JSON"):
        load_scenario(folder)


class Joining:
    """A tokenizer that has "(1" as one token, as some have; "2" it does not join."""

    bos_token_id = unk_token_id = None
    chat_template = None
    PIECES = ("(1", "(", "1", "2", " A", " B", "x")

    def __init__(self, prefix=""):
        self.prefix = prefix  # what it writes before a text that begins with a digit

    def __call__(self, text, **_):
        text, ids = (self.prefix + text if text[:1].isdigit() else text), []
        while text:
            piece = next((p for p in self.PIECES if text.startswith(p)), text[0])
            ids.append(self.PIECES.index(piece) if piece in self.PIECES else 100 + ord(piece))
            text = text[len(piece) :]
        return {"input_ids": ids}

    def decode(self, ids):
        return "".join(self.convert_ids_to_tokens(ids))

    def convert_ids_to_tokens(self, ids):
        return [self.PIECES[i] if i < 100 else chr(i - 100) for i in ids]


def joining(prefix="") -> Tokenizing:
    cfg = SimpleNamespace(default_prepend_bos=False, d_vocab=1000, n_ctx=100)
    return cast(Tokenizing, SimpleNamespace(tokenizer=Joining(prefix), cfg=cfg))


def test_a_joined_answer_is_read_as_generation_continues():
    with pytest.warns(UserWarning, match=r"'\(1' is one token"):
        prompt = encode(joining(), "x(", positive="1", negative="2")
    assert joining().tokenizer.decode(prompt.tokens + prompt.positive) == "x(1"


def test_an_answer_that_cannot_continue_the_prompt_is_refused():
    with pytest.raises(InputError, match=r"joins the end .* such as ' A' and ' B'"):
        encode(joining(prefix=" "), "x(", positive="1", negative="2")


def test_answers_that_tokenize_alike_are_refused_with_others_proposed(base):
    with pytest.raises(InputError, match=r"-> \[.*' A' and ' B'"):
        encode(base, "Question:", positive=" A", negative=" A")
