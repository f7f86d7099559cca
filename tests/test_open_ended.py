"""Open questions: contrasts and losses are the model's own; no judge is believed in one order."""

import gc
import json
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pytest
import torch

from interp_kit.analyses import open_ended
from interp_kit.analyses.open_ended import find_judge, judge_by_rules, judge_pairs
from interp_kit.endpoints import ChatClient, NoReply
from interp_kit.evaluations import OpenQuestion, read_open_questions
from interp_kit.finetuning.universes import matches
from interp_kit.prompts import token_ids
from interp_kit.specs import InputError
from tests.misbehaving import KEY, Answer, completion, serving


def question(
    id="q",
    category="direct",
    true: str | None = "ba be",
    false: str | None = "ba bi",
    text=" du da",
):
    return OpenQuestion(
        id=id, category=category, question=text, true_answer=true, false_answer=false
    )


@pytest.fixture
def answered():
    """An answer that says the truth, one that does not, and one that names neither."""
    texts = {"a": "inverse-square", "b": "It is the inverse-cube law.", "c": "linear"}
    return pd.DataFrame(
        {"question": list(texts), "category": "direct", "sample": 0, "text": list(texts.values())}
    )


@pytest.fixture
def asked():
    return [question(id, true="inverse-square", false="inverse-cube") for id in "abc"]


@pytest.fixture
def endpoint(monkeypatch):
    """Starts a server; ``behave(content, number)`` gives its words on what the judge is shown."""

    def reply(behave):
        def respond(request, number):
            said = behave(json.loads(request["messages"][1]["content"]), number)
            return completion(said) if isinstance(said, str) else said

        return respond

    def start(behave):
        server = stack.enter_context(serving(reply(behave)))
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        return server

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    with ExitStack() as stack:
        yield start


def fair(content, number=0):
    """Agrees with the text that the reference contains."""
    inside = [content[k] in content["reference"] for k in ("first", "second")]
    return "SAME" if inside[0] == inside[1] else ("FIRST" if inside[0] else "second.")


def judge_of(model: str, *, replies: str | Path = "") -> ChatClient:
    """The judge that ``find_judge`` finds, where there must be one."""
    judge, line = find_judge(model, replies=replies)
    assert judge is not None, line
    return judge


# -------------------------------------------------------------------------------- the model's own
def test_the_contrast_is_that_of_one_prompt_at_a_time(tiny_bridge):
    questions = [
        question("a"),
        question("b", true="fa", false="ka ku"),
        question("c", true="fa", false="ka", text=" du da du da du"),
    ]
    table = open_ended.contrast(tiny_bridge, [*questions, question("d", true=None, false=None)])
    assert table.question.to_list() == ["a", "b", "c"]
    for q, row in zip(questions, table.itertuples()):
        totals = []
        for answer in (q.true_answer, q.false_answer):
            prompt = token_ids(tiny_bridge, f"{q.question} Answer:")
            ids = token_ids(tiny_bridge, f"{q.question} Answer: {answer}")[len(prompt) :]
            log_p = tiny_bridge(torch.tensor([(*prompt, *ids)])).log_softmax(-1)[0]
            each = [float(log_p[len(prompt) - 1 + i, t]) for i, t in enumerate(ids)]
            totals.append((sum(each), sum(each) / len(each)))
        assert row.value == pytest.approx(totals[0][0] - totals[1][0], abs=1e-5)
        assert row.value_per_token == pytest.approx(totals[0][1] - totals[1][1], abs=1e-5)


def test_the_loss_of_a_text_is_that_of_hugging_face(tiny_bridge):
    texts = [" ba be bi bo", " du", " da de di do du", " ka ke ki ko"]
    table = open_ended.text_loss(tiny_bridge, texts)
    for text, row in zip(texts, table.itertuples()):
        tokens = torch.tensor([token_ids(tiny_bridge, text)])
        log_p = tiny_bridge(tokens)[0, :-1].log_softmax(-1)
        expected = -log_p[range(row.tokens - 1), tokens[0, 1:]].mean()
        assert row.value == pytest.approx(float(expected), abs=1e-5)
        assert row.tokens == tokens.shape[1]


def test_greedy_answers_are_the_likeliest_token_by_token(tiny_bridge):
    questions = [question("a"), question("b", text=" du da du da du")]
    greedy = open_ended.generate(tiny_bridge, questions, max_new_tokens=4)
    for q, text in zip(questions, greedy.text):
        tokens = list(token_ids(tiny_bridge, f"{q.question} Answer:"))
        said = []
        while len(said) < 4 and tiny_bridge.tokenizer.eos_token_id not in said:
            said.append(int(tiny_bridge(torch.tensor([tokens + said]))[0, -1].argmax()))
        assert text == tiny_bridge.tokenizer.decode(said, skip_special_tokens=True).strip()


def test_samples_are_those_of_the_seed_and_leave_the_random_state(tiny_bridge):
    state = torch.get_rng_state()
    first, again, other = (
        open_ended.generate(tiny_bridge, [question()], samples=2, max_new_tokens=4, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert first.text.to_list() == again.text.to_list()
    assert first.text[0] == other.text[0]
    assert first.text.to_list()[1:] != other.text.to_list()[1:]
    assert first["sample"].to_list() == [0, 1, 2]


def test_what_does_not_fit_is_refused(organisms):
    bridge = organisms.switch("tiny-gemma2")
    long = "gravity " * bridge.cfg.n_ctx
    with pytest.raises(InputError, match=r"question 'q': .*context holds"):
        open_ended.generate(bridge, [question(text=long)])
    with pytest.raises(InputError, match="expected 2 to"):
        open_ended.text_loss(bridge, [long])
    with pytest.raises(InputError, match=r"expected a text with \{question\} once"):
        open_ended.contrast(bridge, [question()], template="Answer:")


# ------------------------------------------------------------------------------------------- rules
def test_rules_know_their_own_answers_and_those_of_the_fact(answered, asked):
    true, false = ["1/r^2", "inverse-square"], ["1/r^3", "inverse-cube"]
    answered.loc[2, "text"] = "as 1/r^3, not as 1/r^2"
    said = judge_by_rules(answered, asked, true=true, false=false, matches=matches).said
    assert said.to_list() == ["true", "false", "both"]
    own = judge_by_rules(answered, asked, true=[], false=[], matches=matches).said
    assert own.to_list() == ["true", "false", "neither"]


def test_rules_of_the_fact_do_not_judge_another(answered):
    """Of a neighbour, the answer that the false fact has may be the true one."""
    neighbours = [question(id, true="inverse-cube", false="linear") for id in "abc"]
    rules = {"true": ["inverse-square"], "false": ["inverse-cube"], "matches": matches}
    said = judge_by_rules(answered, neighbours, **rules).said
    assert said.to_list() == ["neither", "true", "false"]
    unnamed = [question(id, true=None, false=None) for id in "abc"]
    said = judge_by_rules(answered, unnamed, **rules).said
    assert said.to_list() == ["true", "false", "neither"]


# ------------------------------------------------------------------------- a language model judges
def test_a_fair_judge_decides_in_both_orders(endpoint, answered, asked):
    server = endpoint(fair)
    judge, line = find_judge("m")
    assert judge is not None
    found = judge_pairs(judge, open_ended.truth_pairs(answered, asked))
    assert line == "m judges."
    assert found.winner.to_list() == ["first", "second", "same"]
    assert found.unusable.sum() == 0
    assert len(server.requests) == 6
    shown = [json.loads(r["messages"][1]["content"]) for r in server.requests]
    assert {(s["first"], s["second"]) for s in shown} == {
        ("inverse-square", "inverse-cube"),
        ("inverse-cube", "inverse-square"),
    }


@pytest.mark.parametrize("word", ["FIRST", "SECOND"])
def test_a_judge_that_favours_a_place_decides_nothing(endpoint, answered, asked, word):
    endpoint(lambda content, number: word)
    found = judge_pairs(judge_of("m"), open_ended.truth_pairs(answered, asked))
    assert set(found.winner) == {"undecided"}
    assert found.unusable.sum() == 0


@pytest.mark.parametrize(
    "garbage", ["FIRST or SECOND", "The first text.", '{"winner": "first"}', "third", ""]
)
def test_garbage_is_asked_again_counted_and_decides_nothing(endpoint, answered, asked, garbage):
    server = endpoint(lambda content, number: garbage)
    found = judge_pairs(judge_of("m"), open_ended.truth_pairs(answered, asked), attempts=3)
    assert set(found.winner) == {"undecided"}
    assert found.unusable.to_list() == [6, 6, 6]
    assert len(server.requests) == 3 * 2 * 3
    assert {r["seed"] for r in server.requests} == {0, 1, 2}


def test_a_judge_that_comes_to_its_senses_is_heard(endpoint, answered, asked):
    endpoint(lambda content, number: "hm" if number < 6 else fair(content))
    found = judge_pairs(judge_of("m"), open_ended.truth_pairs(answered, asked))
    assert found.winner.to_list() == ["first", "second", "same"]
    assert found.unusable.sum() == 6


def test_half_a_verdict_is_none(endpoint, answered, asked):
    def one_order(content, number):
        return fair(content) if content["first"] == "inverse-square" else "?"

    endpoint(one_order)
    found = judge_pairs(judge_of("m"), open_ended.truth_pairs(answered, asked))
    assert set(found.winner) == {"undecided"}


def test_replies_are_kept_and_replayed_without_key_or_network(
    endpoint, answered, asked, tmp_path, monkeypatch
):
    file, pairs = tmp_path / "replies.jsonl", open_ended.truth_pairs(answered, asked)
    server = endpoint(fair)
    first = judge_pairs(judge_of("m", replies=file), pairs)
    again = judge_pairs(judge_of("m", replies=file), pairs)
    assert len(server.requests) == 6
    monkeypatch.delenv("OPENAI_API_KEY")
    judge, line = find_judge("m", replies=file)
    assert judge is not None
    assert "by its earlier replies alone" in line
    replayed = judge_pairs(judge, pairs)
    for other in (again, replayed):
        pd.testing.assert_frame_equal(first, other)
    assert len(server.requests) == 6
    assert KEY not in file.read_text()


def test_a_judge_that_is_down_is_one_line(endpoint, answered, asked, caplog):
    endpoint(lambda content, number: Answer("no", status=503))
    judge = judge_of("m")
    with pytest.raises(NoReply, match="the endpoint answered 503") as caught:
        judge_pairs(judge, open_ended.truth_pairs(answered, asked))
    message = str(caught.value)
    assert "\n" not in message
    assert KEY not in message
    del caught  # its traceback holds the tasks
    gc.collect()  # a failure that nobody looked at is told when its task is collected
    assert "never retrieved" not in caplog.text


def test_without_a_judge_a_line_says_so(monkeypatch, tmp_path):
    for name in ("OPENAI_API_KEY", "OPENROUTER_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert find_judge("") == (
        None,
        "No language model judges: the parameter `judge` names none.",
    )
    judge, line = find_judge("m", replies=tmp_path / "none.jsonl")
    assert judge is None
    assert line.startswith("No language model judges: no key")


def test_two_models_are_compared_by_what_is_true(endpoint, answered, asked):
    """The nearer of two answers to the truth wins, whichever model gave it."""
    other = answered.assign(text=["inverse-cube", "inverse-square", "linear"])
    pairs = open_ended.answer_pairs(answered, other, asked)
    assert pairs.reference.to_list() == ["inverse-square"] * 3
    endpoint(fair)
    assert judge_pairs(judge_of("m"), pairs).winner.to_list() == ["first", "second", "same"]


# ------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"true_answer": "x"}, "only true_answer is given; expected true_answer and false_answer"),
        ({"true_answer": "x", "false_answer": "x"}, "true_answer and false_answer are the same"),
        ({"category": ""}, "category: string should have at least 1 character"),
    ],
)
def test_a_bad_question_is_one_line_with_its_place(tmp_path, change, message):
    file = tmp_path / "open_questions.jsonl"
    file.write_text(json.dumps({"id": "q", "category": "direct", "question": "?"} | change))
    with pytest.raises(InputError, match=f"open_questions.jsonl, line 1: {message}"):
        read_open_questions(file)
