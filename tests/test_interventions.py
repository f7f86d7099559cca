"""Interventions: nothing written is the model itself, what is added can be removed, hooks go."""

import pytest
import torch

from interp_kit.interventions import add, intervene, remove, replace
from interp_kit.passes import residual_stream
from tests.conftest import tiny_prompts


def vector(bridge, seed=0):
    return torch.randn(bridge.cfg.d_model, generator=torch.Generator().manual_seed(seed))


def some_tokens(bridge, n=9):
    return torch.tensor([p.tokens[:n] for p in tiny_prompts(bridge)])


def after(bridge, tokens, layer):
    """The stream after a block, at all positions."""
    return residual_stream(bridge, tokens.tolist(), tokens.shape[1])[layer + 1]


def hooks_of(bridge):
    points = {id(point): point for point in bridge.hook_dict.values()}
    return sum(len(point.fwd_hooks) for point in points.values())


def test_removing_after_adding_leaves_the_component_of_the_reference():
    h = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
    v = torch.randn(16, generator=torch.Generator().manual_seed(1))
    unit = v / v.norm()
    moved = add(v, 0.7)(h)
    assert torch.allclose((moved - h) @ unit, 0.7 * h.norm(dim=-1), atol=1e-5)
    assert torch.allclose(remove(v)(moved) @ unit, torch.zeros(4, 5), atol=1e-5)
    rest = h - (h @ unit)[..., None] * unit
    assert torch.allclose(remove(v)(moved), rest, atol=1e-5)
    # With the stream itself as each row's reference, what was added is taken back.
    assert torch.allclose(remove(v, h[:, 0])(moved[:, :1]), h[:, :1], atol=1e-5)
    mean = h.mean((0, 1))
    assert torch.allclose(remove(v, mean)(moved) @ unit, (mean @ unit).expand(4, 5), atol=1e-5)
    assert torch.allclose(remove(v, mean)(remove(v, mean)(h)), remove(v, mean)(h), atol=1e-5)


def test_a_replaced_value_keeps_the_norm_and_takes_the_direction():
    h = torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(0))
    values = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    for given in (values, values[0]):
        written = replace(given)(h)
        assert torch.allclose(written.norm(dim=-1), h.norm(dim=-1))
        cosine = torch.cosine_similarity(written[:, 0], given.expand(4, 16), dim=-1)
        assert torch.allclose(cosine, torch.ones(4))
    assert torch.allclose(replace(h[:, 0])(h), h)


@torch.no_grad()
def test_no_operator_and_no_strength_change_no_bit(tiny_bridge):
    tokens, v = some_tokens(tiny_bridge), vector(tiny_bridge)
    own = tiny_bridge(tokens)
    for operators in ({}, {0: add(v, 0.0)}, {layer: add(v, 0.0) for layer in range(3)}):
        for at in (None, -1, torch.tensor([2, 0, 8])):
            with intervene(tiny_bridge, operators, at=at):
                assert torch.equal(tiny_bridge(tokens), own)


@torch.no_grad()
def test_what_is_written_is_planted_where_it_was_aimed(tiny_bridge):
    tokens, v = some_tokens(tiny_bridge), vector(tiny_bridge)
    own = after(tiny_bridge, tokens, 1)
    everywhere = torch.ones(tokens.shape, dtype=torch.bool)
    everywhere[:, 0] = False
    one, each = torch.zeros_like(everywhere), torch.zeros_like(everywhere)
    one[:, -2] = True
    each[range(3), [2, 0, 8]] = True
    for at, aimed in ((None, everywhere), (-2, one), (torch.tensor([2, 0, 8]), each)):
        with intervene(tiny_bridge, {1: add(v, 3.0)}, at=at):
            change = after(tiny_bridge, tokens, 1) - own
            before = after(tiny_bridge, tokens, 0)
        assert torch.equal(change.norm(dim=-1) > 0, aimed)
        assert (torch.cosine_similarity(change[aimed], v[None], dim=-1) > 0.99).all()
        assert torch.equal(before, after(tiny_bridge, tokens, 0))  # nothing before the block


@torch.no_grad()
def test_hooks_are_gone_after_an_error_and_outer_ones_stay(tiny_bridge):
    tokens, v = some_tokens(tiny_bridge), vector(tiny_bridge)
    own, hooks = tiny_bridge(tokens), hooks_of(tiny_bridge)
    with pytest.raises(IndexError), intervene(tiny_bridge, {0: add(v, 1.0)}):
        tiny_bridge(tokens + tiny_bridge.cfg.d_vocab)
    assert hooks_of(tiny_bridge) == hooks
    assert torch.equal(tiny_bridge(tokens), own)
    with intervene(tiny_bridge, {0: add(v, 1.0)}):
        outer = tiny_bridge(tokens)
        with intervene(tiny_bridge, {0: remove(v)}):
            assert not torch.equal(tiny_bridge(tokens), outer)
        assert torch.equal(tiny_bridge(tokens), outer)


@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(tiny_bridge):
    tokens, v = some_tokens(tiny_bridge)[:1], vector(tiny_bridge)
    how = {"max_new_tokens": 5, "do_sample": False, "verbose": False}
    texts = []
    for at in (None, torch.tensor([4])):
        with intervene(tiny_bridge, {1: add(v, 2.0)}, at=at):
            cached, naive = (
                tiny_bridge.generate(tokens, use_past_kv_cache=cache, **how)
                for cache in (True, False)
            )
        assert torch.equal(cached, naive)
        texts.append(cached.tolist())
    assert texts[0] != tiny_bridge.generate(tokens, **how).tolist()
