"""The decision is a probability ratio of whole answers, and agrees with what the model samples."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from interp_kit.catalogue import load_scenario
from interp_kit.controls import LIKELY, likely_pairs, with_other_answers
from interp_kit.decisions import answer_log_probs, decide
from interp_kit.passes import residuals
from interp_kit.prompts import encode, encode_scenario
from interp_kit.specs import InputError
from tests.conftest import tiny_prompts


def naive_log_prob(bridge, tokens, answer) -> float:
    logits = bridge(torch.tensor([tokens + answer])).log_softmax(-1)[0]
    return sum(float(logits[len(tokens) - 1 + i, t]) for i, t in enumerate(answer))


def test_log_probs_of_whole_answers_equal_one_full_forward_each(tiny_bridge):
    prompts = tiny_prompts(tiny_bridge)
    ours = answer_log_probs(tiny_bridge, prompts)
    for i, p in enumerate(prompts):
        assert float(ours["positive"][i]) == pytest.approx(
            naive_log_prob(tiny_bridge, p.tokens, p.positive), abs=2e-5
        )
        assert float(ours["negative"][i]) == pytest.approx(
            naive_log_prob(tiny_bridge, p.tokens, p.negative), abs=2e-5
        )


def test_a_shared_prefix_leaves_the_logit_difference_of_the_differing_tokens(tiny_bridge):
    prompt = tiny_prompts(tiny_bridge)[0]
    assert len(prompt.shared) == 1
    logits = tiny_bridge(torch.tensor([prompt.branch]))[0, -1]
    positive, negative = prompt.branch_ids
    decision = decide(tiny_bridge, [prompt]).value[0]
    assert decision == pytest.approx(float(logits[positive] - logits[negative]), abs=2e-5)


@pytest.mark.parametrize("name", ["tiny-gemma2", "ipd-hybrid"])
def test_the_metric_predicts_sampled_answers(organisms, name):
    """2,000 answers sampled token by token: the share of defections is the metric's probability."""
    bridge, n = organisms.switch(name), 2000
    prompt = encode_scenario(bridge, load_scenario("CD_punished"))[0]
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([prompt.tokens]).expand(1, -1)
    first = bridge(rows)[0, -1].softmax(-1).multinomial(n, True, generator=generator)
    stem = prompt.shared[0]
    followed = bridge(torch.cat([rows, torch.tensor([[stem]])], 1))[0, -1].softmax(-1)
    second = followed.multinomial(int((first == stem).sum()), True, generator=generator)
    defections = int((second == prompt.positive[1]).sum())
    cooperations = int((second == prompt.negative[1]).sum())
    table = decide(bridge, [prompt])
    assert (defections + cooperations) / n == pytest.approx(table.answer_mass[0], abs=0.02)
    test = stats.binomtest(defections, defections + cooperations, table.p_positive[0])
    assert test.pvalue > 1e-3


def test_answers_that_tokenize_alike_are_refused(tiny_bridge):
    with pytest.raises(InputError, match="are the same tokens"):
        encode(tiny_bridge, " ba", positive=" be", negative=" be")


def test_an_answer_that_begins_the_other_is_refused(tiny_bridge):
    with pytest.raises(InputError, match="one answer is the beginning of the other"):
        encode(tiny_bridge, " ba", positive=" be", negative=" be bi")


def test_a_prompt_longer_than_the_context_is_refused(tiny_bridge):
    with pytest.raises(InputError, match="context holds 128"):
        encode(tiny_bridge, " ba" * 200, positive=" be", negative=" bi")


def test_prompts_begin_with_exactly_one_bos(organisms):
    bridge = organisms.switch("tiny-gemma2")
    bos = bridge.tokenizer.bos_token_id
    plain = encode(bridge, "The law", positive=" is", negative=" of").tokens
    given = encode(bridge, "<bos>The law", positive=" is", negative=" of").tokens
    assert plain == given
    assert plain.count(bos) == 1


def test_a_chat_template_is_used_as_in_generation(tiny_folders):
    from interp_kit.loading import load_model

    bridge = load_model(str(tiny_folders["llama"]))
    bridge.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %} ba{{ m.content }} be{% endfor %}"
    )
    prompt = encode(bridge, " ki", positive=" da", negative=" du")
    assert prompt.text == "<bos> ba ki be"
    assert prompt.tokens.count(bridge.tokenizer.bos_token_id) == 1
    assert bridge.tokenizer.decode(prompt.positive) == "da"  # a reply starts without a space


def test_the_batch_does_not_change_the_decision_or_the_stream(tiny_bridge):
    prompts = [p for n in (8, 13, 30) for p in tiny_prompts(tiny_bridge, length=n)]
    together = decide(tiny_bridge, prompts).value
    alone = [decide(tiny_bridge, [p]).value[0] for p in prompts]
    assert together.tolist() == pytest.approx(alone, abs=2e-5)
    ends = residuals(tiny_bridge, prompts)
    single = torch.cat([residuals(tiny_bridge, [p]) for p in prompts])
    torch.testing.assert_close(ends, single, rtol=1e-4, atol=1e-4)


def test_other_answers_are_likely_ones_read_at_the_same_place(tiny_bridge):
    prompts = tiny_prompts(tiny_bridge)
    pairs = likely_pairs(tiny_bridge, prompts, n=5, seed=1)
    assert pairs.tolist() == likely_pairs(tiny_bridge, prompts, n=5, seed=1).tolist()
    assert (pairs[..., 0] != pairs[..., 1]).all()
    for prompt, own in zip(prompts, pairs):
        assert not set(own.flatten().tolist()) & set(prompt.branch_ids)
        both = torch.tensor([prompt.branch, prompt.swapped().branch])
        p = tiny_bridge(both)[:, -1].softmax(-1).sum(0)
        p[len(tiny_bridge.tokenizer) :] = 0  # ids that no text has
        assert set(own.flatten().tolist()) <= set(p.topk(LIKELY + 2).indices.tolist())
    controls = with_other_answers(prompts, pairs)
    assert [c.id for c in controls[:5]] == ["0"] * 5
    assert controls[0].branch == prompts[0].branch  # read where the decision is read
    assert controls[0].branch_ids == tuple(pairs[0, 0].tolist())


def test_prompts_with_the_same_answers_get_the_same_pairs(tiny_bridge):
    first, _, third = tiny_prompts(tiny_bridge)
    second = replace(third, id="b", positive=first.positive, negative=first.negative)
    pairs = likely_pairs(tiny_bridge, [first, second, third], n=4)
    assert pairs[0].tolist() == pairs[1].tolist() != pairs[2].tolist()


def test_probability_is_the_sigmoid_of_the_decision(tiny_bridge):
    row = decide(tiny_bridge, tiny_prompts(tiny_bridge)).iloc[0]
    assert row.p_positive == pytest.approx(1 / (1 + math.exp(-row.value)))
