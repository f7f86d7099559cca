"""Steering: strength 0 is the model itself, a grid is its cells, doses are found as planted."""

from typing import cast

import pandas as pd
import pytest
import torch

from interp_kit.analyses.steering import (
    ablate_directions,
    add_direction,
    continuations,
    dose_response,
    least_effective,
    orthogonal_to,
    random_directions,
    steered,
    steering_grid,
    strongest_layer,
)
from interp_kit.decisions import decide
from interp_kit.interventions import add, intervene, remove
from interp_kit.patching import last_position
from interp_kit.specs import InputError
from tests.conftest import tiny_prompts


def direction_of(bridge):
    return torch.randn(bridge.cfg.d_model, generator=torch.Generator().manual_seed(0))


def test_strength_zero_is_the_model_itself(tiny_bridge):
    prompts, v = tiny_prompts(tiny_bridge), direction_of(tiny_bridge)
    own = decide(tiny_bridge, prompts).value
    for layer in range(tiny_bridge.cfg.n_layers):
        with steered(tiny_bridge, v, layer=layer, strength=0.0):
            assert decide(tiny_bridge, prompts).value.tolist() == own.tolist()
        with steered(tiny_bridge, v, layer=layer, strength=1.0):
            assert abs(decide(tiny_bridge, prompts).value - own).max() > 1e-2
    assert decide(tiny_bridge, prompts).value.tolist() == own.tolist()  # the hooks are gone


@torch.no_grad()
def test_the_grid_is_a_naive_loop_over_its_cells(tiny_bridge):
    prompts, v = tiny_prompts(tiny_bridge)[:2], direction_of(tiny_bridge)
    rows = [p.tokens for p in prompts]
    layers, strengths = (0, 2), [-1.0, 0.0, 1.0]
    each = v.expand(tiny_bridge.cfg.n_layers, -1)
    grid = steering_grid(
        tiny_bridge, prompts, rows, {"v": each}, layers=layers, strengths=strengths
    )
    assert grid.loc[grid.strength == 0, "kl"].abs().max() == 0
    assert (grid.loc[grid.strength != 0, "kl"] > 0).all()
    for key, cell in grid.groupby(["layer", "strength"]):
        layer, strength = cast(tuple[int, float], key)

        def write(x, hook, strength=strength):
            x = x.clone()
            for pos in range(1, x.shape[1]):
                x[:, pos] += strength * x[:, pos].norm(dim=-1, keepdim=True) * v / v.norm()
            return x

        kls = []
        for row in rows:
            tokens = torch.tensor([row])
            before = tiny_bridge(tokens).log_softmax(-1)
            name = f"blocks.{layer}.hook_resid_post"
            after = tiny_bridge.run_with_hooks(tokens, fwd_hooks=[(name, write)]).log_softmax(-1)
            kls += (before.exp() * (before - after)).sum(-1)[0].tolist()
        assert cell.kl.iloc[0] == pytest.approx(sum(kls) / len(kls), abs=1e-5)
        with tiny_bridge.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", write)]):
            naive = decide(tiny_bridge, prompts).value
        assert cell.value.tolist() == pytest.approx(naive.tolist(), abs=1e-4)


def test_generated_text_is_steered_alike_with_and_without_a_cache(tiny_bridge):
    prompts, v = tiny_prompts(tiny_bridge), direction_of(tiny_bridge)
    how = {"layer": 1, "strengths": [0.0, 2.0], "max_new_tokens": 5}
    table = continuations(tiny_bridge, prompts, v, **how)
    assert table.prompt.tolist() == [p.id for p in prompts for _ in range(2)]
    for row in table.itertuples():
        tokens = list(next(p.tokens for p in prompts if p.id == row.prompt))
        new = []
        with steered(tiny_bridge, v, layer=1, strength=row.strength), torch.no_grad():
            while len(new) < 5 and 1 not in new:  # 1: the end of the text
                new.append(int(tiny_bridge(torch.tensor([tokens + new]))[0, -1].argmax()))
        assert row.text == tiny_bridge.tokenizer.decode(new, skip_special_tokens=True).strip()
        log_p = tiny_bridge(torch.tensor([tokens + new])).log_softmax(-1)[0, len(tokens) - 1 : -1]
        own = -log_p.gather(1, torch.tensor(new)[:, None]).mean()
        assert row.surprise == pytest.approx(float(own), abs=1e-4)


def test_random_directions_vary_as_the_streams_do():
    """Streams that vary in two coordinates only: so does every other direction, as much in each."""
    streams = torch.zeros(400, 32)
    drawn = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    streams[:, 3], streams[:, 7] = 5 + 3 * drawn[:, 0], drawn[:, 1] - 2
    both = random_directions(4000, streams)
    assert both.norm(dim=1) == pytest.approx(torch.ones(4000), abs=1e-5)
    directions, isotropic = both[::2], both[1::2]
    assert isotropic.square().mean(0) == pytest.approx(torch.full((32,), 1 / 32), rel=0.15)
    assert directions[:, [i for i in range(32) if i not in (3, 7)]].abs().max() == 0
    spread = (directions[:, 3] / directions[:, 7]).abs().median()
    assert float(spread) == pytest.approx(3, rel=0.2)


def test_orthogonal_directions_have_nothing_along_it():
    v = torch.randn(32, generator=torch.Generator().manual_seed(1))
    streams = torch.randn(12, 32, generator=torch.Generator().manual_seed(2))
    others = orthogonal_to(random_directions(5, streams), v)
    assert (others @ v).abs().max() < 1e-5
    assert others.norm(dim=1) == pytest.approx(torch.ones(5), abs=1e-5)


def test_the_least_effective_dose_is_the_smallest_within_the_budget():
    def cell(layer, strength, values, kl):
        return pd.DataFrame(
            {
                "direction": "v",
                "layer": layer,
                "strength": strength,
                "prompt": list("abcde"),
                "value": values,
                "kl": kl,
            }
        )

    start = [2.0, 2.0, 2.0, 2.0, -1.0]
    grid = pd.concat(
        [cell(layer, 0.0, start, 0.0) for layer in (0, 1)]
        + [
            cell(0, 0.5, [-1.0] * 5, 0.9),  # too dear
            cell(1, 0.5, [-1.0, -1.0, 3.0, -1.0, -0.5], 0.01),  # 4 of 5 are not more than 80 %
            cell(1, 1.0, [-1.0, -1.0, -1.0, -1.0, -0.5], 0.02),
            cell(1, 2.0, [-3.0] * 5, 0.05),
        ]
    )
    table = least_effective(grid, wanted=-1, budget=0.1)
    best = table.iloc[0]
    assert (best.layer, best.strength, bool(best.effective)) == (1, 1.0, True)
    assert table.effective.tolist() == [True, True, False, False, False, False]
    by_cell = table.set_index(["layer", "strength"])
    assert by_cell.wrong_way[1, 0.5] == 0.4  # one up from 2, one up from -1
    assert by_cell.right[1, 0.5] == 0.8
    # Where none is effective: what does most within the budget comes first, doing nothing last.
    poor = grid.loc[~((grid.layer == 1) & (grid.strength > 0.5))]
    ranked = least_effective(poor, wanted=-1, budget=0.1)
    assert not ranked.effective.any()
    assert ranked[["layer", "strength"]].to_numpy().tolist()[:2] == [[1, 0.5], [0, 0.5]]
    assert (ranked.strength.iloc[2:] == 0).all()
    with pytest.raises(ValueError, match="strength 0"):
        least_effective(grid.loc[grid.strength > 0], wanted=-1, budget=0.1)


def test_adding_at_the_last_position_alone_is_not_steering_all(tiny_bridge):
    prompts, v = tiny_prompts(tiny_bridge)[:1], direction_of(tiny_bridge)
    last = add_direction(tiny_bridge, prompts, v, layer=0, strength=1.0, end=1)
    with steered(tiny_bridge, v, layer=0, strength=1.0), torch.no_grad():
        everywhere = tiny_bridge(torch.tensor([prompts[0].tokens]))[0, -1].softmax(-1)[1]
    assert abs(float(last) - float(everywhere)) > 1e-6


@pytest.mark.parametrize("rows", [8, 512])
def test_edits_of_the_last_position_are_those_of_whole_runs(tiny_bridge, monkeypatch, rows):
    """In several passes and in one; prompts of two lengths, and edits of several layers."""
    monkeypatch.setattr(last_position, "EDITED_ROWS", rows)
    prompts, end, suffix = tiny_prompts(tiny_bridge), 1, 9
    n, d = tiny_bridge.cfg.n_layers, tiny_bridge.cfg.d_model
    change = torch.randn(len(prompts), n, d, generator=torch.Generator().manual_seed(0))

    def whole(tokens, operators):
        with intervene(tiny_bridge, operators, at=-1), torch.no_grad():
            return float(tiny_bridge(torch.tensor([tokens]))[0, -1].softmax(-1)[end])

    directions = {"v": change[0, 0], "w": change[1, 1]}
    doses = dose_response(tiny_bridge, prompts, directions, layer=1, strengths=[0.0, 2.0], end=end)
    tokens_of = {p.id: p.tokens for p in prompts}
    assert doses.value.tolist() == pytest.approx(
        [
            whole(tokens_of[row.prompt], {1: add(directions[row.direction], row.strength)})
            for row in doses.itertuples()
        ],
        abs=1e-5,
    )
    added = [
        sum(whole(p.tokens, {layer: add(v, 3.0)}) for p in prompts)
        for layer, v in enumerate(change.mean(0))
    ]
    best = strongest_layer(tiny_bridge, prompts, change, strength=3.0, end=end)
    assert added[best] == pytest.approx(max(added), abs=1e-5)
    taken = {"baseline": change, "layers": [0, 2], "suffix": suffix, "end": end}
    out = ablate_directions(tiny_bridge, prompts, change[:3, 1], **taken)
    for i, p in enumerate(prompts):
        naive = [
            whole([*p.tokens, suffix], {layer: remove(v, change[i, layer]) for layer in (0, 2)})
            for v in change[:3, 1]
        ]
        assert out[:, i].tolist() == pytest.approx(naive, abs=1e-5)


def test_attention_that_looks_ahead_is_refused(tiny_bridge, monkeypatch):
    monkeypatch.setattr(tiny_bridge.cfg, "attention_dir", "bidirectional", raising=False)
    prompts = tiny_prompts(tiny_bridge)
    direction = torch.ones(tiny_bridge.cfg.d_model)
    with pytest.raises(InputError, match="expected causal attention"):
        add_direction(tiny_bridge, prompts, direction, layer=0, strength=1.0, end=0)
