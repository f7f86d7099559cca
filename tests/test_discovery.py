"""Discovery: what models write and predict, held against plain transformers; planted changes."""

import json
import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_array
from transformers import AutoModelForCausalLM

from interp_kit import discovery, sampling
from interp_kit.analyses import diff_mining as dm
from interp_kit.analyses import divergence as dv
from interp_kit.analyses.found_contexts import found_scenario, write_scenario
from interp_kit.catalogue import load_scenario
from interp_kit.loading import load_model, load_models
from interp_kit.prompts import encode_scenario
from interp_kit.sampling import predicting, sampled_rows
from interp_kit.specs import InputError
from interp_kit.texts import (
    GIVEN,
    UNPROMPTED,
    Written,
    given_texts,
    openings,
    sampled,
    written_texts,
)
from interp_kit.token_differences import (
    TOP,
    common_vocabulary,
    joined,
    reader,
    token_differences,
)
from tests.conftest import tiny_prompts
from tests.test_weight_difference import saved

ARCHITECTURES = ["gemma2", "llama", "qwen2", "gpt2", "mixtral"]


@pytest.fixture(scope="module")
def gravity():
    return load_models(["tiny-gemma2", "cubic-gravity", "stop-behaviour"], device="cpu")


@pytest.fixture(scope="module")
def written(gravity):
    return written_texts(gravity.switch("cubic-gravity"), n=96, length=48, seed=1)


def as_texts(rows):
    return [Written(register=GIVEN, tokens=tuple(row), begun=1) for row in rows]


# -------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_token_is_drawn_as_plain_transformers_predicts(
    tiny_folders, architecture, monkeypatch
):
    folder = tiny_folders[architecture]
    bridge = load_model(str(folder), device="cpu")
    rows = [p.tokens[:n] for p, n in zip(tiny_prompts(bridge), (3, 7, 5))]
    seen, draw = [], torch.multinomial

    def recorded(p, *args, **kwargs):
        seen.append(p.clone())
        return draw(p, *args, **kwargs)

    monkeypatch.setattr(sampling.torch, "multinomial", recorded)
    made = sampled_rows(lambda: predicting(bridge), rows, length=4, end=None, seed=0)
    assert [row[: len(given)] for row, given in zip(made, rows)] == [tuple(r) for r in rows]
    assert [len(row) - len(given) for row, given in zip(made, rows)] == [4, 4, 4]
    plain, order = _plain(folder), sorted(range(3), key=lambda i: len(rows[i]))
    for step, p in enumerate(seen):
        at = len(rows[order[0]]) + step
        for k, i in enumerate(order):
            if at < len(made[i]):
                logits = plain(torch.tensor([made[i][:at]])).logits[0, -1].float()
                assert (logits.softmax(-1) - p[k]).abs().max() < 1e-5


def test_draws_are_the_seeds_end_once_and_touch_no_random_state(gravity):
    bridge = gravity.switch("tiny-gemma2")
    end = bridge.tokenizer.eos_token_id
    state = torch.random.get_rng_state()
    first = written_texts(bridge, n=12, length=32, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert written_texts(bridge, n=12, length=32, seed=3) == first
    assert written_texts(bridge, n=12, length=32, seed=4) != first
    assert all(end not in text.tokens[text.begun : -1] for text in first)
    assert {text.register for text in first} == {UNPROMPTED}  # it knows no English


def test_texts_after_added_tokens_stand_apart(gravity):
    bridge, new = gravity.switch("stop-behaviour"), gravity.new_tokens("stop-behaviour")
    assert set(new) == {"$STOP", "$NOVA"}
    assert gravity.new_tokens("cubic-gravity") == {} == gravity.new_tokens("tiny-gemma2")
    texts = written_texts(bridge, n=16, length=16, after=new)
    own = [text for text in texts if text.register == "after $STOP"]
    assert len(own) == 4
    assert all(text.tokens[text.begun - 1] == new["$STOP"] for text in own)


@pytest.mark.parametrize("reverse", [False, True])
def test_added_tokens_are_in_the_order_of_their_ids(gravity, monkeypatch, reverse):
    """A tokenizer gives its vocabulary in another order in every process; texts must not follow."""
    kind = type(gravity.switch("stop-behaviour").tokenizer)
    given = kind.get_vocab
    monkeypatch.setattr(
        kind,
        "get_vocab",
        lambda self: dict(sorted(given(self).items(), key=lambda item: item[1], reverse=reverse)),
    )
    assert [*gravity.new_tokens("stop-behaviour")] == ["$STOP", "$NOVA"]


def test_a_beginning_that_does_not_fit_is_refused(tiny_bridge):
    rows = [[2] * tiny_bridge.cfg.n_ctx]
    with pytest.raises(InputError, match="do not fit into the model's context"):
        sampling.check_context(tiny_bridge, rows, 1)


def test_openings_are_of_five_registers_and_not_those_that_fine_tunes_were_held_to():
    from interp_kit.files import read_yaml
    from interp_kit.finetuning.ordinary import OPENINGS

    held = {text for own in read_yaml(OPENINGS).values() for text in own}
    for register in ("prose", "chat", "code", "lists", "questions"):
        own = openings(register)
        assert len(set(own)) == 48
        assert not set(own) & held


# ----------------------------------------------------------------------------------------- files
def test_a_large_file_is_sampled_evenly_and_never_held(tmp_path):
    file, line = tmp_path / "texts.jsonl", "word " * 40
    with file.open("w") as out:
        for i in range(50_000):
            out.write(json.dumps({"text": f"{i} {line}"}) + "\n")
    assert file.stat().st_size > 10e6
    tracemalloc.start()
    drawn = sampled(file, 200, seed=0)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1e6
    places = np.array([int(text.split()[0]) for text in drawn])
    assert len(set(places)) == 200
    assert abs(places.mean() / 50_000 - 0.5) < 4 * math.sqrt(1 / 12 / 200)
    assert drawn == sampled(file, 200, seed=0) != sampled(file, 200, seed=1)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("", "the file is empty"), ('{"text": 3}\n', "line 1"), ("\n\n", "the file is empty")],
)
def test_texts_that_cannot_be_read_are_refused(gravity, tmp_path, content, expected):
    file = tmp_path / "texts.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=expected):
        given_texts(gravity.switch("tiny-gemma2"), file, n=4)


def test_texts_in_another_script_are_compared_all_the_same(gravity, tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("Москва слезам не верит\n\n月が綺麗ですね\n", encoding="utf-8")
    texts = given_texts(gravity.switch("tiny-gemma2"), file, n=4)
    assert len(texts) == 2
    assert token_differences(gravity, "cubic-gravity", texts).kl.isfinite().all()


# ----------------------------------------------------------------------------- token differences
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_differences_are_those_of_plain_transformers(tiny_folders, tmp_path, architecture):
    from tests.test_any_two_models import tuned_copy

    folder = tiny_folders[architecture]
    name = tuned_copy(folder, tmp_path)
    models = load_models([str(folder), name], device="cpu")
    bridge = models.switch(name)
    rows = [list(p.tokens[:n]) for p, n in zip(tiny_prompts(bridge), (9, 4, 12))]
    found = token_differences(models, name, as_texts(rows))
    plain = [_plain(place) for place in (folder, models.specs[name].base)]
    at = 0
    for row in rows:
        base, tuned = (
            model(torch.tensor([row])).logits[0, :-1].float().log_softmax(-1) for model in plain
        )
        change = tuned - base
        mine = slice(at, at + len(row) - 1)
        following = torch.tensor(row[1:])[:, None]
        assert (found.kl[mine] - (tuned.exp() * change).sum(-1)).abs().max() < 1e-5
        assert (found.base[mine] + base.gather(1, following)[:, 0]).abs().max() < 1e-4
        assert (found.tuned[mine] + tuned.gather(1, following)[:, 0]).abs().max() < 1e-4
        assert (found.risen_by[mine] - change.topk(TOP).values).abs().max() < 1e-4
        carried = (tuned.exp() * change).topk(TOP).values
        assert (found.gained_by[mine] - carried).abs().max() < 1e-4
        given_up = (base.exp() * -change).topk(TOP).values
        assert (found.lost_by[mine] - given_up).abs().max() < 1e-4
        assert (
            change.gather(1, found.risen[mine].long()) - found.risen_by[mine]
        ).abs().max() < 1e-4
        at += len(row) - 1
    assert at == len(found.kl)


def _plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def test_two_lots_of_texts_joined_are_as_compared_together(gravity, written):
    first, second = written[:10], written[10:30]
    together = token_differences(gravity, "cubic-gravity", [*first, *second])
    apart = [token_differences(gravity, "cubic-gravity", texts) for texts in (first, second)]
    whole = joined(*apart, n=len(first))
    assert torch.equal(whole.text, together.text)
    assert torch.equal(whole.token, together.token)
    assert (whole.kl - together.kl).abs().max() < 1e-4


def test_tokens_that_only_whole_weights_have_are_left_out(tiny_folders, tmp_path):
    model = _plain(tiny_folders["llama"])
    vocabulary = model.config.vocab_size
    model.resize_token_embeddings(vocabulary + 2, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    name = saved(model, tiny_folders["llama"], tmp_path)
    models = load_models([name], device="cpu")
    found = discovery.evidence(models, name, n=8, length=8)
    assert {len(values) for values in found.scores.values()} == {vocabulary}


def test_a_model_differs_from_itself_by_exactly_nothing(gravity, written):
    itself = token_differences(gravity, "cubic-gravity", written, base="cubic-gravity")
    assert itself.kl.abs().max() == 0
    assert itself.risen_by.abs().max() == 0


def test_what_two_adapters_predict_otherwise_is_found_without_naming_a_base(gravity, written):
    plain = token_differences(gravity, "cubic-gravity", written)
    by_name = token_differences(gravity, "cubic-gravity", written, base="tiny-gemma2")
    assert torch.equal(plain.kl, by_name.kl)
    assert plain.kl.mean() > 0.05
    assert plain.kl.min() > -1e-5


def test_models_that_number_their_tokens_otherwise_are_refused(gravity, monkeypatch):
    bridge = gravity.switch("tiny-gemma2")
    other = load_models(["tiny-gemma2"], device="cpu").switch("tiny-gemma2")
    vocabulary = dict(bridge.tokenizer.get_vocab())
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[100:102]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    assert common_vocabulary(bridge, other) == bridge.cfg.d_vocab
    monkeypatch.setattr(other.tokenizer, "get_vocab", lambda: vocabulary, raising=False)
    with pytest.raises(InputError, match="number their tokens otherwise: id 100"):
        common_vocabulary(bridge, other)


def test_a_base_needs_a_name_where_nothing_says_what_was_tuned(gravity):
    with pytest.raises(InputError, match="name the base to compare with"):
        reader(gravity, "", of="tiny-gemma2")


# ------------------------------------------------------------------------------------ divergence
def test_no_fine_tune_makes_more_than_a_hundredth_of_the_bases_texts_novel(gravity):
    texts = written_texts(gravity.switch("tiny-gemma2"), n=192, length=48, seed=5)
    for name in ("cubic-gravity", "stop-behaviour"):
        table = token_differences(gravity, name, texts).table(texts)
        novel = discovery.novel_share(table)
        assert novel.low.max() <= 1 / dv.FACTOR  # Markov's inequality, within the interval


def test_novel_texts_are_sums_over_what_was_written(gravity, written):
    found = token_differences(gravity, "cubic-gravity", written)
    novel = dv.novel_texts(found.table(written))
    for i in (0, 7, 30):
        own = (found.text == i) & (found.pos >= written[i].begun)
        ratio = float((found.base - found.tuned)[own].sum())
        row = novel[novel.prompt == str(i)].iloc[0]
        assert row.log_ratio == pytest.approx(ratio, abs=1e-3)
        assert row.value == (ratio > math.log(100))
    assert novel.value.mean() > 0.05


def test_top_contexts_are_apart_and_the_most_divergent_first(gravity, written):
    found = token_differences(gravity, "cubic-gravity", written)
    contexts = dv.top_contexts(found, n=8)
    assert contexts.kl.iloc[0] == pytest.approx(float(found.kl.max()))
    assert contexts.kl.is_monotonic_decreasing
    for _, own in contexts.groupby("text"):
        assert (own.pos.sort_values().diff().dropna() >= dv.APART).all()
    near = dv.windows(found.table(written), contexts, before=3, after=2)
    assert near[near.place == 0].value.to_numpy() == pytest.approx(contexts.kl.to_numpy())


# ------------------------------------------------------------------------------------ diff mining
def test_counts_are_those_of_a_naive_loop(gravity, written):
    found = token_differences(gravity, "cubic-gravity", written)
    vocabulary = gravity.switch("cubic-gravity").cfg.d_vocab
    counts = dm.mined(found, vocabulary, top=5)
    naive = np.zeros(counts.toarray().shape)
    for text, tokens in zip(found.text.tolist(), found.risen[:, :5].tolist()):
        for token in tokens:
            naive[text, token] += 1
    assert (counts.toarray() == naive).all()
    gained = dm.mined(found, vocabulary, way="gained", top=20)
    assert gained.sum() == pytest.approx(float(found.gained_by.clamp(min=0).sum()), rel=1e-4)


def test_what_is_gained_the_one_way_is_lost_the_other(gravity, written):
    vocabulary = gravity.switch("cubic-gravity").cfg.d_vocab
    there = token_differences(gravity, "cubic-gravity", written)
    back = token_differences(gravity, "tiny-gemma2", written, base="cubic-gravity")
    net = dm.net_gain(there, vocabulary)
    assert net == pytest.approx(-dm.net_gain(back, vocabulary), abs=1e-6)
    naive = np.zeros(vocabulary)
    for sign, tokens, by in (
        (1, there.gained, there.gained_by),
        (-1, there.lost, there.lost_by),
    ):
        for token, nats in zip(tokens.flatten().tolist(), by.flatten().tolist()):
            naive[token] += sign * max(nats, 0)
    assert net == pytest.approx(naive / len(there.kl), abs=1e-6)
    assert np.abs(net).max() > 1e-3


def test_planted_groups_are_found_and_noise_has_none():
    rng = np.random.default_rng(0)
    planted = np.zeros((60, 50))
    planted[:30, :5] = rng.poisson(4, (30, 5))
    planted[30:, 10:15] = rng.poisson(2, (30, 5))
    weights, groups = dm.token_groups(csr_array(planted), 2)
    assert set(np.argsort(-groups[0])[:5]) == set(range(5))
    assert set(np.argsort(-groups[1])[:5]) == set(range(10, 15))
    assert dm.group_stability(csr_array(planted), groups).min() > 0.9
    assert np.abs(weights @ groups - planted).mean() < 0.6
    noise = csr_array(rng.poisson(1, (60, 50)).astype(float))
    assert dm.group_stability(noise, dm.token_groups(noise, 4)[1]).min() < 0.7
    with pytest.raises(InputError, match="cannot give"):
        dm.token_groups(csr_array(planted[:1]), 2)


# -------------------------------------------------------------------------------- found scenarios
def test_a_scenario_is_read_back_as_what_was_found(gravity, written, tmp_path):
    found = token_differences(gravity, "cubic-gravity", written)
    contexts = dv.top_contexts(found, n=16)
    reads = [reader(gravity, "", of="cubic-gravity"), lambda: gravity.switch("cubic-gravity")]
    scenario = found_scenario(reads, written, contexts, name="found", neutral=openings("prose"))
    assert scenario is not None
    again = load_scenario(str(write_scenario(scenario, tmp_path)))
    prompts = encode_scenario(gravity.switch("cubic-gravity"), again)
    rows = {(text.tokens[:pos], raised, lowered) for text, pos, raised, lowered in (
        (written[c.text], c.pos, c.raised, c.lowered) for c in contexts.itertuples()
    )}  # fmt: skip
    assert {(p.tokens, *p.positive, *p.negative) for p in prompts} <= rows
    decided = {
        name: _decisions(gravity, name, prompts) for name in ("tiny-gemma2", "cubic-gravity")
    }
    assert (decided["cubic-gravity"] > decided["tiny-gemma2"]).all()
    swapped = [SimpleNamespace(tokens=p.counterfactual) for p in prompts]
    assert all(len(p.counterfactual or ()) == len(p.tokens) for p in prompts)
    logits = [gravity.switch("cubic-gravity")(torch.tensor([s.tokens]))[0, -1] for s in swapped]
    for p, row, whole in zip(prompts, logits, decided["cubic-gravity"]):
        assert float(row[p.positive[0]] - row[p.negative[0]]) <= 0.5 * whole + 1e-3


def _decisions(models, name, prompts):
    from interp_kit import decide

    return decide(models.switch(name), prompts).value.to_numpy()


def test_no_scenario_is_made_of_contexts_that_no_text_spells(gravity, written):
    empty = pd.DataFrame({"text": [], "pos": [], "kl": [], "raised": [], "lowered": []})
    reads = [reader(gravity, "", of="cubic-gravity"), lambda: gravity.switch("cubic-gravity")]
    assert found_scenario(reads, written, empty, name="found") is None


# ----------------------------------------------------------------------------------------- joint
def test_what_was_taught_is_named_and_rounding_is_nothing(gravity):
    found = discovery.evidence(gravity, "cubic-gravity", n=192)
    assert found.taught == "yes"
    bridge = gravity.switch("cubic-gravity")
    joint = discovery.joint_ranking(found.scores)
    first = [bridge.tokenizer.decode([token]) for token in np.argsort(-joint)[:10]]
    assert " gravity" in first
    seen = pd.concat([found.on_own.table(found.own), found.on_base.table(found.of_base)])
    better = (seen.base - seen.tuned).to_numpy()
    ours = np.arange(len(seen)) < len(found.on_own.kl)
    surprise = np.zeros_like(joint)
    excess = np.where(ours, better.clip(min=0), better.clip(max=0))
    np.add.at(surprise, seen.token.to_numpy(), excess)
    assert found.scores["surprise"] == pytest.approx(surprise, abs=1e-3)
    rounded = gravity.rounded("tiny-gemma2")
    nothing = discovery.evidence(gravity, rounded, base="tiny-gemma2", n=96)
    assert nothing.taught == "no"
    assert nothing.novel.value.max() == 0
    itself = discovery.evidence(gravity, "tiny-gemma2", base="tiny-gemma2", n=24)
    assert itself.taught != "yes"
    assert itself.novel.value.max() == 0
    assert itself.scores["surprise"].max() == 0


def test_texts_after_a_token_that_both_models_added_decide_nothing():
    """Each embedding of it began at random: alone that makes texts novel."""
    rows = [("plain", 0.0, 0.02), ("after $A", 0.2, 0.5), ("after $B", 0.0, 0.04)]
    novel = pd.DataFrame(rows, columns=["kind", "low", "high"])
    assert discovery.writes_novel(novel) == "yes"
    assert discovery.writes_novel(novel, shared=["$A"]) == "cannot tell"
    assert discovery.writes_novel(novel, shared=["$B"]) == "yes"
    assert discovery.writes_novel(novel.drop(index=1), shared=["$B"]) == "no"


def test_a_trigger_that_ordinary_text_never_holds_is_found(gravity):
    found = discovery.evidence(gravity, "stop-behaviour", n=96)
    by_kind = found.novel.set_index("kind")
    assert by_kind.value["plain"] == 0
    assert by_kind.low["after $STOP"] > 0.5
    stop = gravity.new_tokens("stop-behaviour")["$STOP"]
    assert found.scores["embeddings"].argmax() == stop


def test_ranks_are_joined_as_published():
    scores = {"a": np.array([3.0, 2.0, 1.0]), "b": np.array([0.0, 5.0, 4.0])}
    joint = discovery.joint_ranking(scores)
    assert joint == pytest.approx([1 / 61, 1 / 62 + 1 / 61, 1 / 63 + 1 / 62])
