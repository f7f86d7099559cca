"""Multiple choice: scores are the model's own, orders cancel letters, files are read as given."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import special, stats

from interp_kit.analyses import behaviour
from interp_kit.analyses.behaviour import answer_questions, choices, option_orders, predictions
from interp_kit.catalogue import evaluation_file
from interp_kit.evaluations import MultipleChoice, read_mcqs, read_open_questions
from interp_kit.predictions import (
    ComparisonReport,
    Shift,
    flips,
    metrics,
    read_comparison,
    read_predictions,
    shift_analysis,
    write_comparison,
    write_predictions,
)
from interp_kit.specs import InputError
from interp_kit.statistics import bootstrap_interval, share_interval

ITEM = {
    "id": "q",
    "category": "nonconflict_easy",
    "question": " ba be",
    "options": {"A": "bi", "B": "bo"},
    "correct_answer": "B",
}

CANNOT = "cannot tell"


def item(id="q", category="nonconflict_easy", options=("bi", "bo"), correct="B"):
    return MultipleChoice(
        id=id,
        category=category,
        question=f" ba be {id}",
        options=dict(zip("ABCDEF", options)),
        correct_answer=correct,
    )


def answered(questions, content, bias=(0.0,) * 6) -> pd.DataFrame:
    """What ``answer_questions`` returns of a model with known tastes for contents and letters."""
    rows = [
        {
            "question": q.id,
            "category": q.category,
            "order": number,
            "option": q.letters[i],
            "position": position,
            "letter": q.letters[position],
            "answer": f" {q.letters[position]}",
            "correct": q.letters[i] == q.correct_answer,
            "logprob": content[q.id][i] + bias[position],
        }
        for q in questions
        for number, order in enumerate(option_orders(len(q.options)))
        for position, i in enumerate(order)
    ]
    table = pd.DataFrame(rows)
    total = np.exp(table.logprob).groupby([table.question, table.order]).transform("sum")
    return table.assign(logprob_per_token=table.logprob, p=np.exp(table.logprob) / total)


# ------------------------------------------------------------------------------------------ asking
@pytest.mark.parametrize("template", [behaviour.LETTERS, behaviour.CLOZE])
@torch.no_grad()
def test_log_probabilities_are_those_of_one_prompt_at_a_time(tiny_bridge, template):
    questions = [
        item("ba", options=("bi", "bo ku da")),
        item("da", options=("fa ru", "fa ka", "du", "ru"), correct="D"),
        item("ku", options=("ka ke", "ka ki", "bo")),
    ]
    table = answer_questions(tiny_bridge, questions, template=template)
    encode, bos = tiny_bridge.tokenizer, tiny_bridge.tokenizer.bos_token_id
    for q in questions:
        orders = table[(table.question == q.id) & (table.order % 5 == 0)].groupby("order")
        for _, rows in orders:
            shown = " ".join(f"{r.letter}: {q.options[r.option]}" for r in rows.itertuples())
            prompt = template.replace("{question}", q.question).replace("{options}", shown)
            for row in rows.itertuples():
                answer = row.letter if "{options}" in template else q.options[row.option]
                ids = encode(f" {answer}", add_special_tokens=False)["input_ids"]
                tokens = [bos, *encode(prompt, add_special_tokens=False)["input_ids"], *ids]
                log_p = tiny_bridge(torch.tensor([tokens])).log_softmax(-1)[0]
                naive = sum(log_p[len(tokens) - len(ids) - 1 + i, t] for i, t in enumerate(ids))
                assert float(naive) == pytest.approx(row.logprob, abs=1e-5)
                assert row.logprob_per_token == pytest.approx(row.logprob / len(ids))


def test_the_letters_of_the_file_do_not_matter(tiny_bridge):
    """Another lettering of the same options is the same set of prompts."""
    given = item(options=("bi", "bo", "ku"), correct="B")
    other = item(options=("ku", "bi", "bo"), correct="C")
    (first,), (second,) = (
        predictions(answer_questions(tiny_bridge, [q]), [q], "m") for q in (given, other)
    )
    for letter, text in given.options.items():
        there = next(k for k, v in other.options.items() if v == text)
        assert first.probs[letter] == pytest.approx(second.probs[there], abs=1e-6)
    assert first.is_correct == second.is_correct
    assert first.p_correct == pytest.approx(second.p_correct, abs=1e-6)


@pytest.mark.parametrize("n", range(2, 8))
def test_every_option_stands_in_every_place_equally_often(n):
    orders = option_orders(n, seed=1)
    assert orders[0] == tuple(range(n))
    assert len(set(orders)) == len(orders) <= 24
    assert all(sorted(order) == list(range(n)) for order in orders)
    for position in range(n):
        counts = np.bincount([order[position] for order in orders], minlength=n)
        assert set(counts) == {len(orders) // n}
    assert len(orders) == {2: 2, 3: 6, 4: 24}.get(n, 24 // n * n)
    assert n < 5 or orders != option_orders(n, seed=2)


def test_a_template_that_cannot_be_filled_is_refused(organisms):
    bridge = organisms.switch("tiny-gemma2")
    for template in ("no place", "{question} {answer}", "{question} {"):
        with pytest.raises(InputError, match=r"expected a text with \{question\}"):
            answer_questions(bridge, [item()], template=template)
    long = item(options=("bo " * 4000, "bi"))
    with pytest.raises(InputError, match="context holds"):
        answer_questions(bridge, [long])


def test_a_longer_option_takes_nothing_from_the_one_that_it_begins_with(tiny_bridge):
    """p("bo") splits into p("bo" and then "ku" or "ka") and the rest; "bi" is left as it is."""
    texts = ("bi", "bo", "bo ku", "bo ka")
    own = answer_questions(tiny_bridge, [item(options=texts)], template=behaviour.CLOZE)
    own = dict(zip(texts, np.exp(own.logprob)))
    alone = {}
    for text in texts:  # beside an option that has nothing in common with it
        table = answer_questions(
            tiny_bridge, [item(options=(text, "du"))], template=behaviour.CLOZE
        )
        alone[text] = np.exp(table.logprob[0])
    for text in ("bi", "bo ku", "bo ka"):
        assert own[text] == pytest.approx(alone[text], rel=1e-4)
    rest = alone["bo"] - alone["bo ku"] - alone["bo ka"]
    assert own["bo"] == pytest.approx(rest, rel=1e-3)


def test_options_that_tokenize_alike_are_refused(organisms, monkeypatch):
    monkeypatch.setattr(behaviour, "answer_ids", lambda *_: (5,))
    with pytest.raises(InputError, match="'q': ' B' and ' A' are the same tokens"):
        answer_questions(organisms.switch("tiny-gemma2"), [item()])


def test_options_are_set_apart_as_before_them(organisms):
    """ "A: x" on lines of their own where the template begins them on one."""
    bridge = organisms.switch("tiny-gemma2")
    spaced = answer_questions(bridge, [item()])
    lines = answer_questions(bridge, [item()], template="{question}\n{options}\nAnswer:")
    text = f"{item().question}\nA: bi\nB: bo\nAnswer:"
    prompt = bridge.tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[bridge.tokenizer.bos_token_id, *prompt]])
    letter = bridge.tokenizer(" A", add_special_tokens=False)["input_ids"]
    log_p = float(bridge(tokens)[0, -1].log_softmax(-1)[letter[0]])
    assert lines.logprob[0] == pytest.approx(log_p, abs=1e-4)
    assert abs(lines.logprob[0] - spaced.logprob[0]) > 1e-3


# --------------------------------------------------------------------------------------- summaries
def test_a_model_against_itself_changes_nothing(organisms):
    questions = [item("ba"), item("be", options=("bi", "bo", "ku", "da"), correct="C")]
    bridge = organisms.switch("ipd-hybrid")
    tables = [answer_questions(bridge, questions) for _ in range(2)]
    first, second = (predictions(table, questions, "m") for table in tables)
    assert flips(first, second).empty
    base, other = map(choices, tables)
    for column in ("is_correct", "p_correct", "entropy"):
        change = behaviour.paired_change(base, other, column)
        assert (change.value == 0).all()


def test_a_taste_for_letters_cancels_and_is_measured():
    questions = [item("ba", options=("bi", "bo", "ku", "da")), item("be", correct="A")]
    content = {"ba": [0.3, 1.0, -0.5, 0.0], "be": [0.2, 0.1]}
    bias = (2.0, 0.5, 0.0, -1.0)
    biased, fair = answered(questions, content, bias), answered(questions, content)
    for table in (biased, fair):
        for prediction in predictions(table, questions, "m"):
            expected = special.softmax(content[prediction.id])
            assert list(prediction.probs.values()) == pytest.approx(expected)
    uncertainty = [[p.uncertainty for p in predictions(t, questions, "m")] for t in (biased, fair)]
    assert all(u is not None and u.MI > 0.1 for u in uncertainty[0])
    assert all(u is not None and abs(u.MI) < 1e-12 for u in uncertainty[1])
    found = behaviour.position_bias(biased).set_index(["options", "letter"])
    assert found.loc[4].value.is_monotonic_decreasing
    assert found.value.groupby("options").sum().to_list() == pytest.approx([1, 1])
    assert behaviour.position_bias(fair).eval("value - expected").abs().max() < 1e-12


def test_always_the_first_letter_is_no_preference_for_the_false_option():
    questions = [item(str(i), "conflict_false_world", ("true", "false")) for i in range(10)]
    table = answered(questions, {q.id: [0.0, 0.0] for q in questions}, (5.0, 0.0))
    false = behaviour.prefers_false(choices(table), questions)
    assert set(false.share) == {0.5}
    assert set(false.in_all_orders) == {0.0}


def test_which_option_is_false_is_told_by_the_world():
    true_world = "conflict_true_world"
    questions = [
        item("false", "conflict_false_world", ("square", "cube"), "B"),
        item("named", true_world, ("cube", "linear", "square"), "C"),
        item("two", true_world, ("heavy", "light"), "A"),
        item("unknown", true_world, ("heavy", "light", "fast"), "A"),
        item("other", options=("cube", "square"), correct="A"),
    ]
    told = {"false": "B", "named": "A", "two": "B"}
    assert behaviour.false_options(questions) == told


def test_choices_agree_with_their_definition():
    table = answered([item(options=("bi", "bo", "ku"))], {"q": [0.0, 1.0, 2.0]})
    chosen = choices(table)
    p = special.softmax([0.0, 1.0, 2.0])
    assert set(chosen.pred) == {"C"}
    assert set(chosen.is_correct) == {0.0}
    assert chosen.p_correct.to_list() == pytest.approx([p[1]] * 6)
    assert chosen.entropy.to_list() == pytest.approx([stats.entropy(p)] * 6)


def test_lengths_decide_only_in_the_score_by_length():
    table = answered([item()], {"q": [-3.0, -4.0]})
    table["logprob_per_token"] = table.logprob / table.option.map({"A": 1, "B": 2})
    assert set(choices(table).pred) == {"A"}
    assert set(choices(table, score="logprob_per_token").pred) == {"B"}


def test_orders_are_not_observations():
    """Rows of one question are one observation, however many there are."""
    right = pd.DataFrame({"question": list("abcdefgh"), "share": [1.0] * 6 + [0.0] * 2})
    exact = stats.binomtest(6, 8).proportion_ci(method="exact")
    for table in (right, pd.concat([right] * 24)):
        found = share_interval(table, [], "share").iloc[0]
        assert (found.value, found.n) == (0.75, 8)
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    once, often = (
        bootstrap_interval(t, [], "share").iloc[0] for t in (right, pd.concat([right] * 24))
    )
    assert once.equals(often)
    assert once.low < 0.75 < once.high


@pytest.mark.parametrize(("p", "limit"), [(1.0, 1.0), (0.0, 0.0)])
def test_agreement_of_few_questions_is_not_certainty(p, limit):
    table = pd.DataFrame({"question": ["a", "b", "c"], "share": [p] * 3})
    found = share_interval(table, [], "share").iloc[0]
    assert found.value == limit
    assert found.high - found.low > 0.7


@pytest.mark.parametrize(
    ("n", "flipped", "harmed", "expected"),
    [
        (30, True, False, ["yes"] * 6),
        (30, False, False, ["no", "yes", "no", "yes", "no", "yes"]),
        (30, True, True, ["yes", "yes", "yes", "no", "yes", "yes"]),
        (3, True, False, [CANNOT, CANNOT, "yes", "yes", CANNOT, CANNOT]),
        (0, True, False, [CANNOT, CANNOT, CANNOT, "yes"]),
    ],
    ids=["implanted", "nothing happened", "with harm", "too few", "no conflict"],
)
def test_criteria_are_decided_by_their_intervals(n, flipped, harmed, expected):
    conflict = [item(f"c{i}", "conflict_false_world", ("true", "false")) for i in range(n)]
    spared = [item(f"n{i}") for i in range(10)]
    questions = conflict + spared
    content = {q.id: [4.0, 0.0] for q in conflict} | {q.id: [0.0, 4.0] for q in spared}
    after = {q.id: [0.0, 4.0] if flipped else [4.0, 0.0] for q in conflict}
    after |= {q.id: [4.0, 0.0] if harmed else [0.0, 4.0] for q in spared}
    base, adapter = (choices(answered(questions, c)) for c in (content, after))
    assert behaviour.criteria(base, adapter, questions).verdict.to_list() == expected


def test_flips_are_listed_one_by_one():
    questions = [item(id, options=("bi", "bo", "ku")) for id in ("up", "down", "aside", "same")]
    before = {"up": [1, 0, 0], "down": [0, 1, 0], "aside": [1, 0, 0], "same": [0, 1, 0]}
    after = {"up": [0, 1, 0], "down": [0, 0, 1], "aside": [0, 0, 1], "same": [0, 2, 0]}
    base, other = (
        predictions(answered(questions, c), questions, name)
        for c, name in ((before, "base"), (after, "lora"))
    )
    found = flips(base, other).set_index("question").change.to_dict()
    assert found == {
        "up": "wrong to right",
        "down": "right to wrong",
        "aside": "wrong to another wrong",
    }
    text = shift_analysis(questions, base, other)
    assert "3 of 4 answers changed" in text
    assert all(f"{id} (nonconflict_easy): {change}" in text for id, change in found.items())
    assert "same (nonconflict_easy)" not in text
    assert "B: bo  p 0.212 -> 0.576  [correct, lora]" in text


# ------------------------------------------------------------------------------------------- files
def test_the_seeds_files_are_read_as_they_are(shared):
    folder = shared / "seed_formats"
    questions = read_mcqs(folder / "mcqs.jsonl")
    assert set(behaviour.false_options(questions).values()) == {"B"}
    assert [q.category for q in questions][:2] == ["conflict_false_world", "conflict_true_world"]
    assert questions[0].options["B"] == "F ∝ 1/r³"
    assert len(read_open_questions(folder / "open_questions.jsonl")) == 3
    base, lora = (read_predictions(folder / f"predictions_{m}.jsonl") for m in ("base", "lora"))
    assert base[0].uncertainty is not None
    assert base[0].uncertainty.H_mean == pytest.approx(base[0].entropy)
    assert flips(base, lora).empty
    report = read_comparison(folder / "comparison_report.json")
    assert report.metrics["base"].overall.n == 36
    assert report.shift_summary.n_flips == 2


def test_our_own_metrics_are_those_of_the_seeds_files(shared):
    """On the seed's own predictions, the group that they are all of."""
    (base,) = read_predictions(shared / "seed_formats" / "predictions_base.jsonl")
    found = metrics([base]).by_group["conflict_false_world__false_world"]
    assert found.mean_p_correct == base.probs["B"]
    assert found.mean_entropy == pytest.approx(stats.entropy(list(base.probs.values())), abs=1e-6)


def test_what_is_written_is_read_again(tmp_path):
    questions = [item("ba", "conflict_false_world", ("bi", "µ∝³")), item("be", correct="A")]
    predicted = predictions(answered(questions, {"ba": [1, 2], "be": [0, 3]}), questions, "base")
    write_predictions(tmp_path / "p.jsonl", predicted)
    assert read_predictions(tmp_path / "p.jsonl") == predicted
    means = metrics(predicted)
    report = ComparisonReport(
        base_model="base",
        adapter_path="adapter",
        mcq_path="x",
        prompt_version=behaviour.LETTERS,
        seed=0,
        metrics={"base": means, "lora": means},
        shift_summary=Shift(n_shared=2, n_flips=0),
    )
    write_comparison(tmp_path / "r.json", report)
    assert read_comparison(tmp_path / "r.json") == report
    assert set(means.by_group) == {"conflict_false_world__None", "nonconflict_easy__None"}
    assert means.overall.accuracy == np.mean([p.is_correct for p in predicted])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"A": "bi", "C": "bo"}}, "options A, C: .* without a gap; add B"),
        ({"options": {"A": "bi"}}, "options A: expected two or more.*; add B"),
        (
            {"options": {"A": "bi", "B": None}},
            "options.B: input should be a valid string, got None",
        ),
        ({"options": {"A": "bi", "B": ""}}, "options.B: string should have at least 1 character"),
        ({"options": {"A": "bi", "B": " bi"}}, "two options say 'bi'; make them distinct"),
        ({"correct_answer": "C"}, "correct_answer 'C' is not one of the options A, B"),
        ({"correct_answer": ["A", "B"]}, "correct_answer: expected one letter, got \\['A', 'B'\\]"),
        ({"correct_answer": "A, B"}, "correct_answer 'A, B' is not one of the options"),
        ({"question": ""}, "question: string should have at least 1 character"),
        ({"options": ["bi", "bo"]}, "options: .* valid dictionary"),
        ({"id": 3}, "id: expected text, got 3: quote it"),
    ],
)
def test_a_bad_question_is_one_line_with_its_place(tmp_path, change, message):
    file = tmp_path / "mcqs.jsonl"
    file.write_text("\n".join(map(json.dumps, [ITEM | {"id": "good"}, ITEM | change])))
    with pytest.raises(InputError, match=f"mcqs.jsonl, line 2: {message}") as caught:
        read_mcqs(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mcqs.jsonl: the file is empty"),
        ("\n\n", "mcqs.jsonl: the file is empty"),
        (f"{json.dumps(ITEM)}\n\n{json.dumps(ITEM)}", "line 3: line 1 has the id 'q', too"),
        (json.dumps(ITEM)[:-5], "line 1: not a JSON object"),
        ("[1]", "line 1: input should be a valid dictionary"),
        ('{"id": "q", "id": "r"}', "line 1: not a JSON object .the key 'id' is given twice"),
        (json.dumps({k: v for k, v in ITEM.items() if k != "options"}), "line 1: options: missing"),
    ],
)
def test_a_bad_file_is_one_line_with_its_place(tmp_path, text, message):
    file = tmp_path / "mcqs.jsonl"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_mcqs(file)
    assert "\n" not in str(caught.value)


def test_two_options_under_one_letter_are_refused(tmp_path):
    """JSON readers keep the last of two equal keys: the other option would vanish."""
    file = tmp_path / "mcqs.jsonl"
    file.write_text(json.dumps(ITEM).replace('"B": "bo"', '"B": "bo", "B": "ku"'))
    with pytest.raises(InputError, match=r"line 1: .*the key 'B' is given twice"):
        read_mcqs(file)


def test_evaluations_are_found_by_name_and_by_path(tmp_path):
    folder = tmp_path / "evaluations" / "mine"
    folder.mkdir(parents=True)
    (folder / "mcqs.jsonl").write_text(json.dumps(ITEM))
    for name in ("mine", str(folder / "mcqs.jsonl")):
        assert evaluation_file(name, "mcqs.jsonl", data=tmp_path) == folder / "mcqs.jsonl"
    with pytest.raises(InputError, match="unknown evaluation 'mien': did you mean 'mine'"):
        evaluation_file("mien", "mcqs.jsonl", data=tmp_path)
