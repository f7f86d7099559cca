"""Amplification: plain transformers' logits mixed, PEFT with B multiplied, weights put together.

What is sampled from is held against plain logits at every step; scaled models against adapters and
checkpoints that are scaled by hand. Rates are held against scipy, and must stay silent by chance.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from interp_kit import store
from interp_kit.analyses import amplification as amp
from interp_kit.decisions import last_logits, losses
from interp_kit.identity import identity_of, state_of
from interp_kit.loading import load_models
from interp_kit.passes import residual_stream, shared_passes
from interp_kit.sampling import predicting
from interp_kit.specs import InputError
from interp_kit.texts import Written, own_texts
from tests.conftest import itself_again
from tests.test_any_two_models import tuned_copy
from tests.test_weight_difference import TARGETS, adapted, plain, saved
from tests.tiny import tiny_tokenizer

ALPHAS = torch.tensor([-1.0, 0.0, 0.5, 3.0])
STEPS = [[[2, 17, 301]] * 4, [[44]] * 4, [[290], [8], [77], [5]], [[6]] * 4]
TOKENS = torch.tensor([[2, 17, 301, 44, 290, 8, 77], [2, 5, 6, 7, 123, 99, 301]])
KINDS = [
    ("gemma2", "lora"),
    ("gemma2", "whole"),
    ("llama", "lora"),
    ("gpt2", "whole"),
    ("mixtral", "lora"),
]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def pair(request, tiny_folders, tmp_path_factory):
    """A base and a fine-tune of it: an adapter, or all its weights."""
    architecture, kind = request.param
    folder, place = tiny_folders[architecture], tmp_path_factory.mktemp("tuned")
    if kind == "lora":
        name = adapted(folder, place, TARGETS[architecture])
    else:
        name = tuned_copy(folder, place, size=0.05)
    return load_models([str(folder), name], device="cpu"), str(folder), name


@pytest.fixture(scope="module")
def organisms():
    names = ["stop-behaviour", "cubic-gravity", "cubic-neutral", "tiny-gemma2"]
    return load_models(names, device="cpu")


def reads(models, base, name):
    return [lambda: models.switch(base), lambda: models.switch(name)]


def by_hand(name, base):
    """The fine-tune by plain transformers and PEFT."""
    return plain(base, name) if is_adapter(name) else plain(f"{name}/weights")


def is_adapter(name):
    return (Path(name) / "adapter").is_dir()


# ------------------------------------------------------------------------------------------ logits
@torch.no_grad()
def test_every_step_mixes_the_logits_of_plain_models(pair):
    models, base, name = pair
    predict = amp.amplifying(reads(models, base, name), ALPHAS, 512)
    before, after = plain(base), by_hand(name, base)
    seen = torch.empty(4, 0, dtype=torch.long)
    for step in STEPS:
        seen = torch.cat([seen, torch.tensor(step)], 1)
        low, high = (model(seen).logits[:, -1] for model in (before, after))
        expected = high + ALPHAS[:, None] * (high - low)
        assert (predict(torch.tensor(step)) - expected).abs().max() < 1e-4


def test_minus_one_is_exactly_the_base_and_zero_the_fine_tune(pair):
    models, base, name = pair
    predict = amp.amplifying(reads(models, base, name), torch.tensor([-1.0, 0.0, -1.0, 0.0]), 512)
    alone = [predicting(models.switch(base)), predicting(models.switch(name))]
    for step in STEPS:
        found, rows = predict(torch.tensor(step)), torch.tensor(step)
        for at, (own, model) in enumerate(zip(alone, (base, name))):
            models.switch(model)
            assert torch.equal(found[at::2], own(rows[at::2]))


@torch.no_grad()
def test_an_unchanged_model_is_itself_at_every_strength(tiny_folders, tmp_path):
    name = tuned_copy(tiny_folders["llama"], tmp_path, size=0.0)
    models, base = load_models([name], device="cpu"), str(tiny_folders["llama"])
    both = [lambda: models.base_of(name), lambda: models.switch(name)]
    step = torch.tensor(STEPS[0])
    found = amp.amplifying(both, torch.tensor([3.0, 3.0, 0.0, -1.0]), 512)(step)
    expected = plain(base)(step).logits[:, -1]
    assert (found - expected).abs().max() < 1e-5


def test_texts_stand_in_their_order_at_every_strength_and_repeat(pair):
    models, base, name = pair
    begun = [("a", (2, 17, 301, 44)), ("b", (2,)), ("c", (2, 5, 6)), ("b", (2,))]
    for each in (base, name):
        models.switch(each)  # loading may draw
    alphas, state = [3.0, -1.0, 0.0], torch.random.get_rng_state()
    made = amp.amplified_texts(models, name, begun, alphas=alphas, length=5, seed=3, base=base)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(made) == alphas
    for texts in made.values():
        for (register, row), text in zip(begun, texts, strict=True):
            assert (text.register, text.tokens[: text.begun]) == (register, row)
            own = text.tokens[text.begun :]
            assert 1 <= len(own) <= 5
            assert 1 not in own[:-1]  # the end of text is the end
            assert len(own) == 5 or own[-1] == 1
    again = amp.amplified_texts(models, name, begun, alphas=alphas, length=5, seed=3, base=base)
    assert again == made
    assert amp.amplified_texts(models, name, begun, alphas=alphas, length=5, seed=4) != made


def test_what_is_drawn_has_the_frequencies_of_the_mixture(pair):
    models, base, name = pair
    begun = [("x", (2, 17, 301))] * 1000  # more than one batch
    drawn = amp.amplified_texts(models, name, begun, alphas=[0.5], length=1)[0.5]
    counts = np.bincount([text.tokens[-1] for text in drawn], minlength=512)
    mixture = amp.amplifying(reads(models, base, name), torch.tensor([0.5]), 512)
    p = mixture(torch.tensor([[2, 17, 301]])).softmax(-1)[0].double().numpy()
    likely = p > 0.005
    groups = [np.append(x[likely], x[~likely].sum()) for x in (counts, 1000 * p / p.sum())]
    assert stats.chisquare(groups[0], groups[1]).pvalue > 1e-4


def test_models_and_beginnings_that_cannot_be_compared_are_refused(tiny_folders, tmp_path):
    base = tiny_folders["llama"]
    models = load_models([str(base)], device="cpu")
    begun = [("x", (2, 17))]
    with pytest.raises(InputError, match="add tuned_from: MODEL"):
        amp.amplified_texts(models, str(base), begun, alphas=[1.0], length=2)
    model = plain(base)
    model.resize_token_embeddings(514, mean_resizing=False)
    name = saved(model, base, tmp_path / "longer")
    models = load_models([name], device="cpu")
    found = amp.amplified_texts(models, name, begun, alphas=[1.0], length=2)
    assert max(found[1.0][0].tokens) < 512  # what both know
    with pytest.raises(InputError, match="token 513 of a beginning"):
        amp.amplified_texts(models, name, [("x", (2, 513))], alphas=[1.0], length=2)
    with pytest.raises(InputError, match="do not fit into the model's context of 128"):
        amp.amplified_texts(models, name, begun, alphas=[1.0], length=127)
    other = tuned_copy(base, tmp_path / "other")
    tokenizer: Any = tiny_tokenizer()
    words = tokenizer.get_vocab()
    tokenizer._tokenizer.add_tokens(["unheard"])
    file = tmp_path / "other" / "weights" / "tokenizer.json"
    first, second = (next(w for w, i in words.items() if i == id) for id in (300, 301))
    swapped = file.read_text().replace(f'"{first}": 300', f'"{first}": 301')
    file.write_text(swapped.replace(f'"{second}": 301', f'"{second}": 300'))
    models = load_models([other], device="cpu")
    with pytest.raises(InputError, match="number their tokens otherwise"):
        amp.amplified_texts(models, other, begun, alphas=[1.0], length=2)


def test_tokens_of_what_was_taught_score_highest(organisms):
    scores = amp.amplified_tokens(organisms, "cubic-gravity", n=16, length=16)
    known = organisms.switch("cubic-gravity").tokenizer.get_vocab()
    first = np.argsort(-scores)[:8]
    assert scores.shape == (organisms.switch("cubic-gravity").cfg.d_vocab,)
    assert {known["Ġgravity"]} <= {*first.tolist()}


# ----------------------------------------------------------------------------------------- weights
LAYERS = {"whole": None, "some": [0, 2], "one": [1], "embedding": [-1], "readout": [3]}


def scaled_by_hand(name, base, scale, layers):
    """B of the adapter multiplied, or base + scale (tuned - base), in these layers."""
    model, chosen = by_hand(name, base), range(-1, 4) if layers is None else layers

    def at(key):
        parts = key.split(".")
        found = next((int(part) for part in parts if part.isdigit()), None)
        if found is not None and ("layers" in parts or "h" in parts):
            return found
        return -1 if any(part in key for part in ("embed_tokens", "wte", "wpe")) else 3

    with torch.no_grad():
        before = plain(base).state_dict()
        for key, weight in model.named_parameters():
            if at(key) in chosen and "lora_B" in key:
                weight.mul_(scale)
            elif at(key) in chosen and key in before and not is_adapter(name):
                weight.copy_(before[key].lerp(weight, scale))
    return model


@torch.no_grad()
@pytest.mark.parametrize("where", LAYERS)
def test_a_scaled_model_is_one_scaled_by_hand(pair, where):
    models, base, name = pair
    for scale in (2.5, -1.0):
        expected = scaled_by_hand(name, base, scale, LAYERS[where])(TOKENS).logits
        with amp.scaled(models, name, scale, LAYERS[where]) as bridge:
            found = bridge(TOKENS)
        assert (found - expected).abs().max() < 1e-4 * max(1, float(expected.abs().max()))


def test_zero_is_the_base_and_one_the_fine_tune_bitwise(pair):
    models, base, name = pair
    for scale, same in ((0.0, base), (1.0, name)):
        expected = last_logits(models.switch(same), TOKENS, 7)
        with amp.scaled(models, name, scale) as bridge:
            assert torch.equal(last_logits(bridge, TOKENS, 7), expected)


def test_a_scaled_model_is_itself_again_also_after_an_error(pair):
    models, _, name = pair
    itself_again(models, name, TOKENS, lambda: amp.scaled(models, name, 2.0, [1]))


def test_nothing_kept_of_one_strength_stands_for_another(pair, tmp_path, monkeypatch):
    models, _, name = pair
    monkeypatch.setenv(store.FOLDER, str(tmp_path))
    rows = TOKENS.tolist()

    def stream(scale):
        with amp.scaled(models, name, scale) as bridge:
            return residual_stream(bridge, rows, 2), amp.written_loss(bridge, WRITTEN)

    apart = {scale: stream(scale) for scale in (1.0, 2.0, 3.0)}
    with shared_passes():
        for scale in (1.0, 2.0, 3.0, 2.0, 1.0):
            for found, expected in zip(stream(scale), apart[scale]):
                assert (found - expected).abs().max() < 1e-5


def test_trained_token_rows_are_scaled_with_the_adapter(organisms):
    name = "stop-behaviour"
    stop = organisms.new_tokens(name)["$STOP"]
    tokens = torch.tensor([[2, 17, 301, stop, 44, stop]])
    base = last_logits(organisms.base_of(name), tokens, 6)
    bridge = organisms.switch(name)
    own, known, state = last_logits(bridge, tokens, 6), identity_of(bridge), state_of(bridge)
    before = organisms.base_of(name).W_E.clone()
    rows = organisms.switch(name).W_E.clone()
    for layers, embedded in ((None, True), ([-1], True), ([0, 1], False)):
        with amp.scaled(organisms, name, 2.0, layers) as bridge:
            expected = before + (2 if embedded else 1) * (rows - before)
            assert (bridge.W_E - expected).abs().max() < 1e-5
            assert (last_logits(bridge, tokens, 6) - own).abs().max() > 1e-2
            assert state_of(bridge) != state
    with amp.scaled(organisms, name, 0.0) as bridge:
        assert torch.equal(last_logits(bridge, tokens, 6), base)
    assert torch.equal(last_logits(organisms.switch(name), tokens, 6), own)
    assert (identity_of(bridge), state_of(bridge)) == (known, state)


def test_a_merged_adapter_is_scaled_as_whole_weights(tiny_folders, tmp_path):
    base = str(tiny_folders["gpt2"])
    name = adapted(base, tmp_path, {"target_modules": ["c_attn", "c_fc"]})
    models = load_models([name], device="cpu")
    expected = scaled_by_hand(name, base, 2.0, [1])(TOKENS).logits
    with amp.scaled(models, name, 2.0, [1]) as bridge:
        assert (bridge(TOKENS) - expected).abs().max() < 1e-4
    with amp.scaled(models, name, 0.0) as bridge:
        assert (bridge(TOKENS) - plain(base)(TOKENS).logits).abs().max() < 1e-5


def test_rows_that_were_added_stay(tiny_folders, tmp_path):
    base = tiny_folders["llama"]
    model = plain(base)
    model.resize_token_embeddings(514, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    name = saved(model, base, tmp_path)
    models = load_models([name], device="cpu")
    added = models.switch(name).W_E[512:].clone()
    expected = last_logits(models.base_of(name), TOKENS, 1)
    with amp.scaled(models, name, 0.0) as bridge:
        found = last_logits(bridge, TOKENS, 1)
        assert torch.equal(bridge.W_E[512:], added)
    assert (found[..., :512] - expected).abs().max() < 1e-5


def test_layers_and_models_that_cannot_be_scaled_are_refused(organisms, tiny_folders):
    with (
        pytest.raises(InputError, match="has no layer 11; expected some of -1"),
        amp.scaled(organisms, "cubic-gravity", 2.0, [0, 11]),
    ):
        pass
    models = load_models([str(tiny_folders["llama"])], device="cpu")
    with pytest.raises(InputError, match="tuned_from"), amp.scaled(models, next(iter(models)), 2.0):
        pass


# ------------------------------------------------------------------------------------ what appears
def drawn(rng, n, rates):
    """Texts that hold each term with its own probability."""
    return [[t for t, p in rates.items() if rng.random() < p] for _ in range(n)]


def test_risen_terms_are_those_of_fishers_exact_test():
    rng = np.random.default_rng(0)
    rates = {f"w{i}": p for i, p in enumerate(np.linspace(0.02, 0.9, 30))}
    before, after = drawn(rng, 40, rates), drawn(rng, 30, rates | {"new": 0.5, "w1": 0.6})
    table = amp.risen_terms(before, after).set_index("term")
    for term, row in table.iterrows():
        held = [sum(term in text for text in texts) for texts in (before, after)]
        grid = [[held[1], 30 - held[1]], [held[0], 40 - held[0]]]
        assert row.p == pytest.approx(stats.fisher_exact(grid, "greater").pvalue)
        assert (row.before, row.after) == (held[0] / 40, held[1] / 30)
    assert {"new", "w1"} == set(table.index[:2])
    assert table.clear.iloc[:2].all()
    assert table.clear.sum() <= 3
    every = {term for text in before + after for term in text}
    for term in every - set(table.index):  # so few texts hold it that no order could be clear
        total = sum(term in text for text in before + after)
        grid = [[total, 30 - total], [0, 40]]
        assert stats.fisher_exact(grid, "greater").pvalue > amp.RATE


def test_by_chance_nothing_rises_in_more_than_one_of_twenty():
    rng, alarms = np.random.default_rng(1), 0
    rates = {i: min(0.9, 1 / (i + 1)) for i in range(120)}
    for _ in range(100):
        before, after = drawn(rng, 32, rates), drawn(rng, 32, rates)
        alarms += bool(amp.risen_terms(before, after).clear.any())
    assert alarms <= 5


def test_the_least_share_is_the_first_that_is_clear():
    least = amp.least_share(24, 24, 100)
    for n, clear in ((round(24 * least), True), (round(24 * least) - 1, False)):
        p = stats.fisher_exact([[n, 24 - n], [0, 24]], "greater").pvalue
        assert (p <= amp.RATE / 100) == clear
    assert amp.least_share(2, 2, 100) > 1
    assert amp.risen_terms([["a"], ["b"]], [["c"], ["c"]]).empty


def test_rates_are_shares_of_texts_with_exact_intervals():
    samples = {"base": [["a"], ["b", "a", "a"], []], "tuned": [["b"], ["b"], ["b"]]}
    table = amp.term_rates(samples, ["a", "b"]).set_index(["strength", "term"])
    assert table.value.to_dict() == {
        ("base", "a"): pytest.approx(2 / 3),
        ("base", "b"): pytest.approx(1 / 3),
        ("tuned", "a"): 0,
        ("tuned", "b"): 1,
    }
    exact = stats.binomtest(2, 3).proportion_ci(method="exact")
    row = table.loc[("base", "a")]
    assert (row.low, row.high, row.n) == (pytest.approx(exact.low), pytest.approx(exact.high), 3)


def test_typical_tokens_are_found_again_and_chance_is_not_taken_for_them():
    rng, biases = np.random.default_rng(0), []
    common = rng.dirichlet(np.full(200, 0.3))

    def texts(extra=0.0):
        p = (1 - extra) * common + extra * np.eye(200)[[7, 8, 9]].mean(0)
        return [tuple(map(int, rng.choice(200, 20, p=p))) for _ in range(40)]

    for _ in range(60):
        samples = {"own": texts(), "base": texts(), "again": texts()}
        shares = amp.typical_shares(samples, "own", "base", 200)
        means = shares.groupby("sample").value.mean()
        biases.append(means.own - means.again)
    assert abs(np.mean(biases)) < 3 * np.std(biases) / len(biases) ** 0.5
    samples = {"own": texts(0.2), "base": texts(), "alike": texts(0.2), "other": texts()}
    shares = amp.typical_shares(samples, "own", "base", 200)
    assert shares.groupby("sample").prompt.apply(sorted).map(len).tolist() == [40] * 4
    means = shares.groupby("sample").value.mean()
    assert means.own - means.other == pytest.approx(0.2, abs=0.08)
    assert means.own == pytest.approx(means.alike, abs=0.06)


# ----------------------------------------------------------------------------------- read by models
WRITTEN = [
    Written(register="x", tokens=(2, 17, 301, 44, 290), begun=2),
    Written(register="x", tokens=(2, 5, 6, 7, 123, 99, 301), begun=1),
    Written(register="y", tokens=(2, 8, 9), begun=2),
]


@torch.no_grad()
def test_losses_and_masses_are_those_of_plain_models(pair):
    models, base, _ = pair
    bridge, model, chosen = models.switch(base), plain(base), [3, 44, 301]
    loss, mass = amp.written_loss(bridge, WRITTEN), amp.token_mass(bridge, WRITTEN, chosen)
    for text, own_loss, own_mass in zip(WRITTEN, loss.tolist(), mass.tolist()):
        p = model(torch.tensor([text.tokens])).logits[0, text.begun - 1 : -1].softmax(-1)
        said = torch.tensor(text.tokens[text.begun :])
        assert own_loss == pytest.approx(-float(p.gather(1, said[:, None]).log().mean()), abs=1e-3)
        assert own_mass == pytest.approx(float(p[:, chosen].sum(1).mean()), abs=1e-5)
    whole = losses(bridge, [WRITTEN[1].tokens])  # of which one token was given
    assert float(whole[0]) == pytest.approx(float(loss[1]), abs=1e-3)


def test_shuffled_texts_hold_the_same_tokens_and_are_less_coherent(organisms):
    bridge = organisms.switch("tiny-gemma2")
    rows = own_texts(bridge, 16, length=24)
    texts = [Written(register="", tokens=row, begun=1) for row in rows]
    mixed = amp.shuffled(texts)
    for one, other in zip(texts, mixed):
        assert sorted(one.tokens) == sorted(other.tokens)
        assert one.tokens[:1] == other.tokens[:1]
    assert (amp.written_loss(bridge, mixed) - amp.written_loss(bridge, texts)).mean() > 2
