"""Circuits and adapters: the criteria hold by construction, planted answers are found."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from interp_kit.analyses import circuits
from interp_kit.analyses.circuits import circuit_scores, find_circuit, overlap, random_circuits
from interp_kit.analyses.weights import layer_swap, nested_layer_swap, weight_norms
from interp_kit.catalogue import load_scenario
from interp_kit.decisions import decide
from interp_kit.patching.experiments import cross_model_experiment
from interp_kit.patching.patches import unit_patches
from interp_kit.prompts import encode_scenario
from interp_kit.specs import InputError
from interp_kit.statistics import effects

A, B = "ipd-strategic", "ipd-deontological"


@pytest.fixture(scope="module")
def prompts(organisms):
    return encode_scenario(organisms.switch(A), load_scenario("CC_temptation"))[:4]


@pytest.fixture(scope="module")
def strategic_into_deontological(organisms, prompts):
    candidates = unit_patches(organisms.switch(A), "component")
    places = [c.place for c in candidates]
    made = [cross_model_experiment(organisms, A, B, p, places) for p in prompts[:2]]
    return made, candidates


@pytest.mark.parametrize("recover", [0.0, 0.5])
def test_a_circuit_suffices_and_every_component_of_it_is_needed(
    organisms, strategic_into_deontological, recover
):
    experiments, candidates = strategic_into_deontological
    circuit = find_circuit(experiments, candidates, recover=recover)
    assert circuit is not None
    baseline = np.mean([e.baseline for e in experiments])

    whole = frozenset(circuit.patches)
    sets = [whole, *(whole - {patch} for patch in circuit.patches)]
    values = np.mean([e.values(sets)[1:].numpy() for e in experiments], axis=0)
    source = np.mean([e.source_value for e in experiments])
    fractions = (values - baseline) / (source - baseline)
    enough = fractions >= recover if recover else (values > 0) != (baseline > 0)
    assert enough[0]
    assert not enough[1:].any()
    assert circuit.added >= len(circuit.patches)


@pytest.mark.parametrize("recover", [0.0, 0.5])
def test_the_search_stops_where_enough_is_found_and_finds_what_a_whole_one_does(
    strategic_into_deontological, monkeypatch, recover
):
    experiments, candidates = strategic_into_deontological
    monkeypatch.setattr(circuits, "AT_ONCE", 3)
    found = find_circuit(experiments, candidates, recover=recover)
    monkeypatch.setattr(circuits, "AT_ONCE", len(candidates) + 1)
    whole = find_circuit(experiments, candidates, recover=recover)
    assert found is not None
    assert whole is not None
    assert (found.patches, found.added, found.to_flip) == (
        whole.patches,
        whole.added,
        whole.to_flip,
    )
    assert [*whole.growth] == [*range(len(candidates) + 1)]
    assert [*found.growth][: found.added + 1] == [*range(found.added + 1)]
    assert len(found.growth) < len(whole.growth)
    assert len(candidates) in found.growth
    for n, value in found.growth.items():
        assert value == pytest.approx(whole.growth[n], abs=1e-4)


def test_everything_is_faithful_and_complete_and_nothing_is_neither(
    organisms, strategic_into_deontological
):
    experiments, candidates = strategic_into_deontological
    everything = circuit_scores(experiments, candidates, candidates)
    assert everything.faithfulness == pytest.approx(1, abs=1e-4)
    assert everything.completeness == pytest.approx(1, abs=1e-4)
    drawn = random_circuits(experiments, candidates, candidates[:3], n=5, seed=1)
    again = random_circuits(experiments, candidates, candidates[:3], n=5, seed=1)
    assert drawn.equals(again)
    assert drawn.faithfulness.nunique() > 1


def test_a_model_into_itself_has_no_circuit(organisms, prompts):
    candidates = unit_patches(organisms.switch(A), "component")
    experiment = cross_model_experiment(organisms, A, A, prompts[0], [c.place for c in candidates])
    assert find_circuit([experiment], candidates) is None
    assert find_circuit([experiment], candidates, recover=0.0) is None


def test_overlap_against_its_null(organisms):
    candidates = unit_patches(organisms.switch(A), "component")
    rng = np.random.default_rng(0)
    first = [candidates[i] for i in rng.choice(len(candidates), 12, replace=False)]
    same = overlap(first, first, candidates, n=999)
    assert same.value == 1
    assert same.p_more <= 0.002
    disjoint = overlap(first, [c for c in candidates if c not in first], candidates, n=999)
    assert disjoint.value == 0
    assert disjoint.p_less <= 0.002
    shares = [
        overlap(
            [candidates[i] for i in rng.choice(len(candidates), 12, replace=False)],
            [candidates[i] for i in rng.choice(len(candidates), 12, replace=False)],
            candidates,
            n=199,
        ).p_more
        for _ in range(60)
    ]
    assert np.mean(np.array(shares) <= 0.05) < 0.2  # chance is called chance


def test_swapping_every_layer_makes_the_other_model(organisms, prompts):
    layers = range(organisms.switch(A).cfg.n_layers)
    expected = decide(organisms.switch(A), prompts).value.to_numpy()
    before = decide(organisms.switch(B), prompts).value.to_numpy()
    with organisms.with_layers_from(B, A, layers) as bridge:
        assert decide(bridge, prompts).value.to_numpy() == pytest.approx(expected, abs=1e-5)
    assert decide(organisms.switch(B), prompts).value.to_numpy() == pytest.approx(before, abs=0)
    base = "tiny-gemma2"
    bare = decide(organisms.switch(base), prompts).value.to_numpy()
    with organisms.with_layers_from(B, base, layers) as bridge:
        assert decide(bridge, prompts).value.to_numpy() == pytest.approx(bare, abs=1e-5)
    with organisms.with_layers_from(base, A, layers) as bridge:
        assert decide(bridge, prompts).value.to_numpy() == pytest.approx(expected, abs=1e-5)
    assert decide(organisms.switch(base), prompts).value.to_numpy() == pytest.approx(bare, abs=0)


def test_layers_added_one_by_one_end_at_the_source(organisms, prompts):
    table = nested_layer_swap(organisms, A, B, prompts, order=[7, 6, 5, 4, 3, 2, 1, 0])
    assert table.value.iloc[0] == 0
    assert table.value.iloc[-1] == pytest.approx(1, abs=1e-5)
    one = layer_swap(organisms, A, B, prompts).query("layer == 7").value.mean()
    assert table.decision.iloc[1] == pytest.approx(one, abs=1e-5)
    enough = int(table.query("value >= 0.2").n.min())
    order = [7, 6, 5, 4, 3, 2, 1, 0]
    fewer = nested_layer_swap(organisms, A, B, prompts, order=order, until=0.2)
    assert fewer.n.tolist() == sorted({*range(enough + 1), *(n for n in (5, 8) if n > enough)})
    kept = table[table.n.isin(fewer.n)]
    assert fewer.decision.tolist() == pytest.approx(kept.decision.tolist(), abs=1e-5)
    assert fewer.layer.tolist() == kept.layer.tolist()


def test_one_layer_swapped_is_between_and_norms_are_of_the_weights(organisms, prompts):
    table = layer_swap(organisms, A, B, prompts)
    assert sorted(table.layer.unique()) == list(range(8))
    assert abs(table.change).max() > 0.1
    norms = weight_norms(organisms, A)
    assert len(norms) == 8 * 7
    assert (norms.relative > 0).all()
    with pytest.raises(InputError, match="has no adapter"):
        weight_norms(organisms, "tiny-gemma2")
    folder = Path(organisms.specs[A].adapter)
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.5.mlp.down_proj.lora_{}.weight"
    change = (
        weights[key.format("B")] @ weights[key.format("A")] * config["lora_alpha"] / config["r"]
    )
    row = norms[(norms.layer == 5) & (norms.module == "mlp.down_proj")].iloc[0]
    assert row.value == pytest.approx(float(change.norm()), rel=1e-5)


def test_effects_find_what_is_there_and_only_that():
    rng = np.random.default_rng(0)
    rows = [
        {"component": f"c{i}", "prompt": str(j), "change": rng.normal(3.0 if i < 3 else 0.0)}
        for i in range(40)
        for j in range(15)
    ]
    result = effects(pd.DataFrame(rows), ["component"])
    assert set(result[result.clear].component) >= {"c0", "c1", "c2"}
    assert result.clear.sum() <= 6
    assert ((result.low <= result.value) & (result.value <= result.high)).all()
    below = effects(pd.DataFrame(rows), ["component"], noise_floor=10.0)
    assert not below.clear.any()
    few = pd.DataFrame(rows).loc[lambda t: t.prompt.isin(["0", "1", "2"])]
    assert effects(few, ["component"]).p.min() >= 0.25  # three prompts cannot tell
    with pytest.raises(ValueError, match="same prompts"):
        effects(pd.DataFrame(rows[:-1]), ["component"])
