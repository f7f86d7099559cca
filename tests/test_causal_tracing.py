"""Causal tracing against one naive hooked forward pass a row, and models traced by construction."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from interp_kit.analyses.causal_tracing import (
    TraceSite,
    causal_trace,
    gini_coefficient,
    noise_trace,
    trace_summary,
)
from interp_kit.decisions import decide
from interp_kit.loading import load_model
from interp_kit.prompts import encode
from interp_kit.specs import InputError
from tests.conftest import tiny_prompts
from tests.tiny import ARCHITECTURES, WORDS, save_tiny

SITES: list[TraceSite] = ["resid_pre", "resid_post", "attn_out", "mlp_out", "block"]
RESTORED: list[TraceSite] = [site for site in SITES if site != "resid_pre"]
POSITIONS = ["all", "each", "segments", "decision"]


@pytest.fixture
def turn(request):
    """The architecture's number: options take turns over it, so that each meets every other."""
    return ARCHITECTURES.index(request.node.callspec.params["tiny_bridge"])


@pytest.fixture(scope="module")
def bridge(tiny_folders):
    """One model, for what does not depend on the architecture."""
    return load_model(str(tiny_folders["llama"]), device="cpu")


def pair(bridge, *, longer=0):
    """A prompt and its counterfactual, which may begin with further words; answers part early.

    The segment that differs stands at other positions in a longer counterfactual.
    """
    words = [WORDS[(7 * i) % 60] for i in range(16)]
    other = [*WORDS[:longer], *words[:7], WORDS[1], WORDS[2], *words[9:]]
    segments = {"changed": [" ".join(words[6:10]), " ".join(other[longer + 6 : longer + 10])]}
    return encode(
        bridge,
        " " + " ".join(words),
        positive=" da",
        negative=" fa ka",
        counterfactual=" " + " ".join(other),
        segments=segments | {"end": words[-1]},
        id=f"longer{longer}",
    )


def answers_under(bridge, prompt, hooks_for):
    """log p(positive) - log p(negative) by one whole forward pass an answer."""
    total = 0.0
    for sign, answer in ((1, prompt.positive), (-1, prompt.negative)):
        tokens = torch.tensor([prompt.tokens + answer[:-1]])
        logits = bridge.run_with_hooks(tokens, fwd_hooks=hooks_for(answer))[0, -len(answer) :]
        total += sign * float(logits.log_softmax(-1)[range(len(answer)), list(answer)].sum())
    return total


def writes(row, window, n_layers, source, here, there):
    """Hooks that write the source's activations at ``there`` over those at ``here``."""

    def write(x, hook, name):
        x = x.clone()
        x[0, here] = source[name][0, there]
        return x

    parts, layers = [row.site], [row.layer]
    if row.site in ("attn_out", "mlp_out", "block"):
        parts = ["attn_out", "mlp_out"] if row.site == "block" else parts
        first, last = row.layer - window // 2, row.layer + -(-window // 2)
        layers = range(max(0, first), min(n_layers, last))
    names = [f"blocks.{layer}.hook_{part}" for layer in layers for part in parts]
    return [(name, lambda x, hook, name=name: write(x, hook, name)) for name in names]


def runs_on(bridge, tokens, answers):
    """Activations of the prompt with each answer but for its last token."""
    rows = [torch.tensor([tokens + answer[:-1]]) for answer in answers]
    return {answer: bridge.run_with_cache(row)[1] for answer, row in zip(answers, rows)}


def naive(bridge, prompt, row, window, sources):
    """The value of a row of a trace, ``prompt`` being the run that is patched."""

    def hooks_for(answer):
        here = there = slice(None)
        if row.segment:
            segment = next(s for s in prompt.segments if s.name == row.segment)
            here, there = list(segment.positions), list(segment.counterfactual)
        elif row.pos >= 0:
            from_end = row.pos - len(prompt.tokens)
            here, there = [row.pos], [len(prompt.counterfactual) + from_end]
        return writes(row, window, bridge.cfg.n_layers, sources[answer], here, there)

    return answers_under(bridge, prompt, hooks_for)


def sampled(table, n):
    return table if len(table) <= n else table.sample(n, random_state=0)


@pytest.mark.parametrize("window", [1, 2])
def test_a_trace_equals_one_forward_pass_a_row(tiny_bridge, turn, window):
    positions = POSITIONS[(turn + 2 * window) % len(POSITIONS)]
    prompt = pair(tiny_bridge, longer=3 if positions in ("segments", "decision") else 0)
    table = causal_trace(tiny_bridge, [prompt], sites=SITES, positions=positions, window=window)
    assert set(table.direction) == {"noise", "denoise"}
    assert set(table.site) == set(SITES)
    assert set(table.layer) == {0, 1, 2}
    for direction, own in table.groupby("direction"):
        target = prompt if direction == "noise" else prompt.swapped()
        sources = runs_on(tiny_bridge, target.counterfactual, [prompt.positive, prompt.negative])
        rows = sampled(own, 8)
        values = [naive(tiny_bridge, target, row, window, sources) for row in rows.itertuples()]
        assert abs(rows.value.to_numpy() - values).max() <= 1e-4
        assert abs(own.change).max() > 1e-2
    swapped = decide(tiny_bridge, [prompt, prompt.swapped()]).value
    noise = table[table.direction == "noise"]
    assert noise.baseline.to_numpy() == pytest.approx(swapped[0], abs=1e-4)
    assert noise.source.to_numpy() == pytest.approx(swapped[1], abs=1e-4)
    gap = table.source - table.baseline
    assert (table.recovered_fraction * gap).to_numpy() == pytest.approx(table.change.to_numpy())
    assert (table.flipped == (np.sign(table.value) != np.sign(table.baseline))).all()


def test_the_whole_stream_is_the_source_in_every_layer(tiny_bridge):
    """Which is why only what a layer writes, or one position, says anything about layers."""
    table = causal_trace(tiny_bridge, tiny_prompts(tiny_bridge), sites=["resid_post", "block"])
    whole = table[table.site == "resid_post"]
    assert whole.value.to_numpy() == pytest.approx(whole.source.to_numpy(), abs=1e-4)
    written = table[table.site == "block"]
    assert abs(written.value - written.source).max() > 1e-2


def test_a_prompt_into_itself_changes_nothing(tiny_bridge, turn):
    positions = POSITIONS[turn % len(POSITIONS)]
    prompt = pair(tiny_bridge)
    segments = tuple(replace(s, counterfactual=s.positions) for s in prompt.segments)
    same = replace(prompt, counterfactual=prompt.tokens, segments=segments)
    table = causal_trace(tiny_bridge, [same], sites=SITES, positions=positions, window=2)
    assert (table.change == 0).all()
    assert table.recovered_fraction.isna().all()


# ------------------------------------------------------------------------ traced by construction
@pytest.fixture(scope="module")
def one_layer_writes(tmp_path_factory):
    """A model whose layers 0 and 2 write nothing into the residual stream."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("planted") / "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in (0, 2):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    return load_model(str(folder), device="cpu")


def test_only_the_layer_that_writes_has_any_effect(one_layer_writes):
    table = causal_trace(one_layer_writes, [pair(one_layer_writes)], sites=["block"])
    assert (table[table.layer != 1].change == 0).all()  # exactly, not nearly
    planted = table[table.layer == 1]  # its tokens at the end are the source's: all that is left
    assert planted.value.to_numpy() == pytest.approx(planted.source.to_numpy(), abs=1e-4)
    summary = trace_summary(table)
    assert (summary.peak_layer == 1).all()
    assert (summary.gini_coefficient == 1).all()
    assert (summary.top3_concentration == 1).all()


def test_a_window_reaches_the_layer_that_writes(one_layer_writes):
    prompt = pair(one_layer_writes)
    two, three = (
        causal_trace(one_layer_writes, [prompt], sites=["block"], window=window)
        for window in (2, 3)
    )
    assert (three.value - three.source).abs().max() <= 1e-4
    reached = (two.value - two.source).abs() <= 1e-4
    assert (reached == two.layer.isin([1, 2])).all()  # of two layers, the one and the one before


# ---------------------------------------------------------------------------------- noise variant
def test_a_noise_trace_equals_a_naive_loop_with_the_same_noise(tiny_bridge):
    prompts = [replace(pair(tiny_bridge), counterfactual=None), pair(tiny_bridge, longer=1)]
    changed = [next(s for s in p.segments if s.name == "changed").positions for p in prompts]
    ids = [p.tokens[pos] for p, at in zip(prompts, changed) for pos in at]
    with torch.no_grad():
        deviation = float(tiny_bridge.embed(torch.tensor([ids])).std(correction=0))
    table = noise_trace(
        tiny_bridge, prompts[:2], segment="changed", sites=RESTORED, window=2, draws=2, seed=5
    )
    prompt, at = prompts[0], list(changed[0])
    assert table.pos.min() == min(at)
    noise = np.random.default_rng([5, *prompt.tokens]).standard_normal((2, len(at), 32))
    noise = torch.tensor(noise * 3 * deviation, dtype=torch.float32)
    name = "blocks.0.hook_resid_pre"

    def corrupted(draw):
        def add(x, hook):
            x = x.clone()
            x[0, at] += noise[draw]
            return x

        return [(name, add)]

    cleans = runs_on(tiny_bridge, prompt.tokens, [prompt.positive, prompt.negative])

    def restored(row):
        def hooks_for(answer):
            here, n_layers = [row.pos], tiny_bridge.cfg.n_layers
            return corrupted(row.draw) + writes(row, 2, n_layers, cleans[answer], here, here)

        return answers_under(tiny_bridge, prompt, hooks_for)

    own = table[table.prompt == prompt.id]
    for draw in range(2):
        baseline = answers_under(tiny_bridge, prompt, lambda answer, draw=draw: corrupted(draw))
        assert own[own.draw == draw].baseline.to_numpy() == pytest.approx(baseline, abs=1e-4)
    clean = decide(tiny_bridge, [prompt]).value[0]
    assert own.source.to_numpy() == pytest.approx(clean, abs=1e-4)
    rows = sampled(own, 12)
    values = [restored(row) for row in rows.itertuples()]
    assert abs(rows.value.to_numpy() - values).max() <= 1e-4
    assert abs(own.change).max() > 1e-2


def test_one_seed_is_one_table(bridge):
    prompt = pair(bridge)
    how = {"segment": "changed", "positions": "segments", "draws": 2}
    first = noise_trace(bridge, [prompt], seed=0, **how)
    pd.testing.assert_frame_equal(first, noise_trace(bridge, [prompt], seed=0, **how))
    twice = noise_trace(bridge, [prompt, replace(prompt, id="again")], seed=0, **how)
    assert twice.value[: len(first)].to_numpy() == pytest.approx(first.value.to_numpy(), abs=1e-4)
    other = noise_trace(bridge, [prompt], seed=1, **how)
    assert abs(other.baseline - first.baseline).min() > 1e-3


def test_no_noise_changes_nothing_and_the_clean_stream_undoes_it(tiny_bridge):
    prompts = [pair(tiny_bridge)]
    how = {"segment": "changed", "positions": "all", "seed": 0, "draws": 3}
    nothing = noise_trace(tiny_bridge, prompts, scale=0.0, **how)
    assert (nothing.change == 0).all()
    assert (nothing.baseline == nothing.source).all()
    table = noise_trace(tiny_bridge, prompts, **how)
    assert abs(table.baseline - table.source).max() > 1e-2
    whole = table[table.site == "resid_post"]
    assert whole.value.to_numpy() == pytest.approx(whole.source.to_numpy(), abs=1e-4)
    assert whole.recovered_fraction.dropna().to_numpy() == pytest.approx(1, abs=1e-2)


def test_noise_averages_over_draws_before_it_is_summarised(bridge):
    table = noise_trace(bridge, [pair(bridge)], segment="changed", draws=4, seed=0)
    summary = trace_summary(table).set_index("site")
    for site, own in table.groupby("site"):
        scores = own.groupby(["layer", "pos"]).change.mean().abs().groupby("layer").max()
        assert summary.total[site] == pytest.approx(scores.sum())
        assert summary.peak_layer[site] == scores.idxmax()


# --------------------------------------------------------------------------------------- summaries
def trace(changes, **columns):
    """A trace of one place a layer, from a baseline of 1."""
    given = {"direction": "noise", "prompt": "0", "group": "", "site": "block", "pos": -1}
    given |= {"segment": "", "layer": range(len(changes)), "baseline": 1.0, "change": changes}
    return pd.DataFrame(given | columns).eval("value = baseline + change")


def mean_difference_gini(x):
    """By the definition: half the mean difference of pairs of different layers over the mean."""
    differences = abs(np.subtract.outer(x, x)).sum() / (len(x) * (len(x) - 1))
    return differences / (2 * np.mean(x))


def test_the_gini_coefficient_runs_from_equal_to_one_layer():
    assert gini_coefficient(np.full(7, 2.0)) == pytest.approx(0)
    assert gini_coefficient(np.eye(7)[3]) == pytest.approx(1)
    x = np.random.default_rng(0).exponential(size=9)
    assert gini_coefficient(x) == pytest.approx(mean_difference_gini(x))
    assert gini_coefficient(5 * x) == pytest.approx(gini_coefficient(x))
    assert np.isnan(gini_coefficient(np.zeros(4)))
    assert np.isnan(gini_coefficient(np.ones(1)))


def test_a_summary_by_hand():
    changes = [0.5, -3.0, 1.0, -0.25, -1.25, 0.0, 2.0]
    (row,) = trace_summary(trace(changes)).itertuples()
    assert (row.direction, row.prompt, row.site) == ("noise", "0", "block")
    assert row.peak_layer == 1
    assert row.num_choice_flips == 2  # to -2 and to -0.25
    assert row.total == 8.0
    assert row.top3_concentration == pytest.approx((3 + 2 + 1.25) / 8)
    assert row.top5_concentration == pytest.approx((3 + 2 + 1.25 + 1 + 0.5) / 8)
    assert row.gini_coefficient == pytest.approx(mean_difference_gini(np.abs(changes)))
    assert row.early_mean == pytest.approx(4.5 / 3)  # of 7 layers: 3, 2 and 2
    assert row.middle_mean == pytest.approx(0.75)
    assert row.late_mean == pytest.approx(1)


def test_a_layer_scores_its_strongest_place():
    table = pd.concat([trace([0.5, -0.1, 0.0], pos=0), trace([-0.2, -1.5, 0.3], pos=1)])
    (row,) = trace_summary(table).itertuples()
    assert (row.peak_layer, row.num_choice_flips) == (1, 1)
    assert row.total == pytest.approx(0.5 + 1.5 + 0.3)


def test_models_are_summarised_apart():
    table = pd.concat([trace([3.0, 0.0], model="a"), trace([0.0, 3.0], model="b")])
    assert trace_summary(table).set_index("model").peak_layer.to_dict() == {"a": 0, "b": 1}


def test_below_the_noise_floor_there_is_no_shape():
    table = pd.concat([trace([1e-7, -2e-7, 0.0], prompt="a", baseline=1e-7), trace([0, 1.0, 0.0])])
    below, above = trace_summary(table, noise_floor=1e-6).itertuples()
    shapes = ["peak_layer", "gini_coefficient", "top3_concentration", "top5_concentration"]
    assert all(np.isnan(getattr(below, shape)) for shape in shapes)
    assert below.num_choice_flips == 0  # from 1e-7 to -1e-7: noise
    assert below.total == pytest.approx(3e-7)
    assert above.peak_layer == 1


# --------------------------------------------------------------------------------------- bad input
def test_what_cannot_be_traced_is_said(bridge):
    prompt, longer = pair(bridge), pair(bridge, longer=2)
    for positions in ("all", "each"):
        with pytest.raises(InputError, match=r'needs equal lengths.*"decision" or "segments"'):
            causal_trace(bridge, [longer], positions=positions)
    with pytest.raises(InputError, match="a window of 1 layer or more, got 0"):
        causal_trace(bridge, [prompt], window=0)
    with pytest.raises(InputError, match="has no counterfactual"):
        causal_trace(bridge, [replace(prompt, counterfactual=None)], directions=["noise"])
    with pytest.raises(InputError, match="has no segments"):
        causal_trace(bridge, tiny_prompts(bridge), positions="segments")
    noise = {"segment": "changed", "seed": 0}
    with pytest.raises(InputError, match=r"expected sites of resid_post.*got 'resid_pre'"):
        noise_trace(bridge, [prompt], sites=["resid_pre"], **noise)
    with pytest.raises(InputError, match="no segment 'subject'; expected one of changed, end"):
        noise_trace(bridge, [prompt], segment="subject", seed=0)
    with pytest.raises(InputError, match="draws >= 1, got 3 and 0"):
        noise_trace(bridge, [prompt], draws=0, **noise)
    with pytest.raises(InputError, match="scale >= 0"):
        noise_trace(bridge, [prompt], scale=-1.0, **noise)
