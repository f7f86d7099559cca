"""The activation difference lens: zero where nothing was trained, planted words, fast = naive."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from interp_kit.analyses import activation_difference as adl
from interp_kit.analyses.differences import delta_lens
from interp_kit.catalogue import load_scenario
from interp_kit.decisions import last_logits
from interp_kit.loading import load_models
from interp_kit.prompts import token_ids
from interp_kit.specs import InputError
from interp_kit.token_statistics import token_log_odds, token_relevance
from tests.conftest import tiny_prompts


@pytest.fixture(scope="module")
def stop():
    return load_models(["stop-behaviour", "stop-neutral"], device="cpu")


def some_tokens(bridge, n=6):
    return adl.first_tokens([p.tokens for p in tiny_prompts(bridge)], n)


def test_identical_models_differ_by_exactly_zero(tiny_bridge):
    tokens = some_tokens(tiny_bridge)
    base = adl.streams(tiny_bridge, tokens)
    again = adl.streams(tiny_bridge, tokens)
    norms = adl.difference_norms(base, again, first=2)
    assert (norms.value == 0).all()
    zero = adl.by_slot(again - base, 2)
    assert not adl.difference_lens(tiny_bridge, adl.by_slot(base, 2), zero).any()


def test_a_base_is_the_same_whichever_fine_tune_it_is_asked_of(stop):
    text = load_scenario("stop").neutral[0]
    alone = load_models(["tiny-gemma2"], device="cpu").switch("tiny-gemma2")
    tokens = torch.tensor([token_ids(alone, text)])
    before = adl.streams(stop.switch("stop-behaviour"), tokens)
    base = adl.streams(stop.base_of("stop-behaviour"), tokens)
    assert torch.equal(base, adl.streams(alone, tokens))
    assert torch.equal(before, adl.streams(stop.switch("stop-behaviour"), tokens))
    assert (before - base).abs().max() > 1e-3


def test_the_streams_end_in_the_models_own_logits(tiny_bridge):
    tokens = some_tokens(tiny_bridge)
    final = adl.streams(tiny_bridge, tokens)[:, -1, -1]
    normed = tiny_bridge.ln_final(final[:, None])[:, 0]
    logits = normed @ tiny_bridge.W_U + tiny_bridge.b_U
    cap = getattr(tiny_bridge.cfg, "output_logits_soft_cap", None) or -1.0
    logits = torch.tanh(logits / cap) * cap if cap > 0 else logits
    own = last_logits(tiny_bridge, tokens, 1)[:, 0]
    assert (logits - own).abs().max() < 1e-4


def test_first_positions_are_kept_apart():
    values = torch.arange(2 * 4 * 1 * 1.0).view(2, 4, 1, 1)  # text, pos: 4 * text + pos
    assert adl.slots(4, 2) == ["0", "1", "rest"]
    assert adl.by_slot(values, 2).flatten().tolist() == [2.0, 3.0, 4.5]
    table = adl.difference_norms(values + 1, values * 2 + 1, first=2)
    assert table[table.slot == "rest"].value.tolist() == [2.5, 6.5]


def test_the_lens_is_the_delta_lens(tiny_bridge):
    tokens = some_tokens(tiny_bridge)
    base = adl.by_slot(adl.streams(tiny_bridge, tokens), 2)
    delta = torch.randn(base.shape, generator=torch.Generator().manual_seed(0))
    ours = adl.difference_lens(tiny_bridge, base, delta)
    assert (ours - delta_lens(tiny_bridge, base, delta)).abs().max() < 1e-5


def test_a_patchscope_given_what_was_there_changes_nothing(tiny_bridge):
    tokens = tiny_prompts(tiny_bridge)[0].tokens
    stream = adl.streams(tiny_bridge, torch.tensor([tokens]))
    own = last_logits(tiny_bridge, torch.tensor([tokens]), 1)[:, 0].log_softmax(-1)
    for layer in range(tiny_bridge.cfg.n_layers):
        same = adl.patchscope(tiny_bridge, tokens, stream[:, -1, layer], layer=layer)
        assert (same - own).abs().max() < 1e-4
        other = adl.patchscope(tiny_bridge, tokens, -stream[:, -1, layer], layer=layer)
        assert (other - own).abs().max() > 1e-2


def test_planted_words_are_found_and_chance_is_called_chance():
    rng = np.random.default_rng(0)
    ordinary = [rng.integers(0, 80, 20).tolist() for _ in range(50)]
    special = list(range(80, 90))
    own = [
        [*rng.integers(0, 80, 10).tolist(), *rng.choice(special, 10).tolist()] for _ in range(50)
    ]
    z = token_log_odds(own, ordinary, 100)
    assert set(np.argsort(-z)[:10]) == set(special)
    assert (z[90:] == 0).all()  # tokens of neither say nothing
    assert token_log_odds(ordinary, own, 100) == pytest.approx(-z)
    planted = torch.zeros(1, 100)
    planted[0, special] = 1.0
    assert token_relevance(planted, z, resamples=999).p[0] == 0.001
    noise = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    p = token_relevance(noise, z, resamples=999).p
    assert 0.01 <= (p < 0.05).mean() <= 0.10
    with pytest.raises(InputError, match="give more"):
        token_relevance(planted, z, top=95)


def test_steering_by_nothing_moves_nothing(tiny_bridge):
    tokens = some_tokens(tiny_bridge)
    z = np.random.default_rng(0).normal(size=tiny_bridge.cfg.d_vocab)
    directions = torch.randn(3, tiny_bridge.cfg.d_model, generator=torch.Generator().manual_seed(0))
    how = {"layer": 1, "log_odds": z}
    none = adl.steered_relevance(tiny_bridge, tokens, directions, strength=0.0, **how)
    some = adl.steered_relevance(tiny_bridge, tokens, directions, strength=1.0, **how)
    assert not none.any()
    assert (abs(some) > 1e-3).all()


def test_losses_in_padded_batches_are_those_of_each_text_alone(tiny_bridge):
    rows = [p.tokens[: 9 + 3 * i] for i, p in enumerate(tiny_prompts(tiny_bridge))]
    direction = torch.randn(tiny_bridge.cfg.d_model, generator=torch.Generator().manual_seed(0))
    v, mean = direction / direction.norm(), 0.3 * direction

    def remove(x, hook):
        x = x.clone()
        for pos in range(1, x.shape[1]):
            x[0, pos] = x[0, pos] - torch.dot(x[0, pos] - mean, v) * v
        return x

    naive = []
    for row in rows:
        tokens, losses = torch.tensor([row]), []
        for hooks in ([("blocks.1.hook_resid_post", remove)], []):
            logits = tiny_bridge.run_with_hooks(tokens, fwd_hooks=hooks)
            losses.append(float(F.cross_entropy(logits[0, :-1], tokens[0, 1:])))
        naive.append(losses[0] - losses[1])
    ours = adl.loss_without(tiny_bridge, rows, direction[None], mean, layer=1)
    assert ours[0] == pytest.approx(naive, abs=1e-5)
    assert np.abs(ours).max() > 1e-3


def test_the_trained_trace_names_what_ends_the_text(stop):
    """On neutral text the lens reads the end of text, and the control fine-tune's does not."""
    neutral, first = load_scenario("stop").neutral, 3
    bridge = stop.base_of("stop-behaviour")
    end = bridge.tokenizer.eos_token_id
    tokens = adl.first_tokens([token_ids(bridge, text) for text in neutral], 12)
    base = adl.streams(bridge, tokens)
    ranks = {}
    for name in stop:
        delta = adl.by_slot(adl.streams(stop.switch(name), tokens) - base, first)
        logits = adl.difference_lens(bridge, adl.by_slot(base, first), delta)[:, -1]
        ranks[name] = (logits > logits[:, [end]]).sum(1)
    assert (ranks["stop-behaviour"][1:] < 3).all()
    assert (ranks["stop-neutral"][1:] > 100).all()


def test_too_short_texts_and_missing_documents_are_told():
    with pytest.raises(InputError, match="1 of 2 texts have 4 tokens"):
        adl.first_tokens([[1, 2, 3, 4], [1, 2]], 4)
    with pytest.raises(InputError, match="'ipd-hybrid' has no documents; write some"):
        load_models(["ipd-hybrid"]).documents("ipd-hybrid")
