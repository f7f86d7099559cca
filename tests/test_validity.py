"""The benchmark of methods: its scores by hand-worked values, its cases by independent means."""

import numpy as np
import pytest

from benchmarks.validity.__main__ import score
from benchmarks.validity.methods import IN_PROGRAMS, by_cross_model_patching
from benchmarks.validity.plants import Plant, planted
from benchmarks.validity.programs import (
    INTERVENTIONS,
    NAMES,
    effects,
    load_program,
    logits,
    seen,
)
from benchmarks.validity.scores import (
    Rate,
    areas,
    auroc,
    average_precision,
    check_truth,
    hit_at_1,
    jaccard,
    recall_at,
)
from interp_kit.catalogue import load_scenario
from interp_kit.decisions import decide
from interp_kit.loading import load_model
from interp_kit.prompts import encode_scenario
from interp_kit.specs import InputError

SCORES = {"a": 3.0, "b": 2.0, "c": 1.0, "d": 1.0}


def test_auroc_counts_pairs_and_ties_half():
    assert auroc(SCORES, {"a"}) == 1
    assert auroc(SCORES, {"b"}) == pytest.approx(2 / 3)
    assert auroc(SCORES, {"c"}) == pytest.approx((0 + 0 + 0.5) / 3)
    assert auroc(dict.fromkeys(SCORES, 1.0), {"a", "c"}) == 0.5


def test_precision_and_hits():
    assert average_precision(SCORES, {"a", "c"}) == pytest.approx((1 + 2 / 4) / 2)
    assert hit_at_1(SCORES, {"a"}) == 1
    assert hit_at_1(SCORES, {"b"}) == 0
    assert hit_at_1({"a": 1.0, "b": 1.0, "c": 0.0}, {"a"}) == 0.5
    many = {str(i): float(i) for i in range(200)} | {"true": 150.5, "best": 500.0}
    assert recall_at(many, {"true", "best"}) == 0.5


def test_areas_under_faithfulness():
    shares = [0, 0.5, 1]
    assert areas(shares, [0, 1, 1]) == pytest.approx((0.75, 0.25))
    overshot = areas(shares, [0, 2, 1])
    assert overshot[0] == pytest.approx(0.75)
    assert overshot[1] == pytest.approx((1 + 1) / 2 * 0.5 + 0.5 / 2)


def test_stability_of_sets():
    assert jaccard([{"a", "b"}, {"b", "c"}, {"a", "b"}]) == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert jaccard([set(), set()]) == 1


def test_a_rate_without_a_trial_is_missing_and_others_have_an_exact_interval():
    assert np.isnan(Rate(hits=0, n=0).value)
    assert np.isnan(Rate(hits=0, n=0).interval[1])
    assert Rate(hits=0, n=59).interval == (0.0, pytest.approx(0.0606, abs=1e-4))
    assert Rate(hits=59, n=59).interval[1] == 1
    low, high = Rate(hits=16, n=200).interval
    assert low < 0.05 < high


@pytest.mark.parametrize("truth", [[], ["a", "b", "c", "d"], ["x"]])
def test_a_truth_that_no_method_can_be_scored_against_is_refused(truth):
    with pytest.raises(InputError, match="one: the truth"):
        check_truth(SCORES, truth, case="one")


def test_a_missing_score_is_refused():
    with pytest.raises(InputError, match="score of b is missing"):
        auroc({"a": 1.0, "b": float("nan")}, {"a"})


# ------------------------------------------------------------------------------ compiled programs
LIVE = {  # of how many nodes: as others have counted them
    "dyck1": (11, 18),
    "frac_prevs": (2, 4),
    "pair_balance": (4, 6),
    "redundant_or": (5, 9),
    "reverse": (5, 8),
    "sort": (4, 6),
    "sort_freq": (7, 10),
}


def test_the_programs_are_all_there():
    assert [*LIVE] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_compute_the_program(name):
    program = load_program(name)
    assert (len(program.live), len(program.nodes)) == LIVE[name]
    assert len(set(program.outputs)) > 1
    decisions = decide(program.bridge, program.prompts).value
    for prompt, output, decision in zip(program.prompts, program.outputs, decisions, strict=True):
        plain = logits(program, prompt.tokens)
        assert decision == pytest.approx(
            plain[prompt.positive[0]] - plain[prompt.negative[0]], abs=1e-5
        )
        if program.answers:
            assert program.answers[plain.argmax()] == output
        else:
            assert plain[0] == pytest.approx(float(output), abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_exact_methods_find_what_their_intervention_can_see_and_nothing_dead(name):
    program = load_program(name)
    for method in ("zero ablation", "mean ablation", "activation patching"):
        rank, intervention = IN_PROGRAMS[method]
        found, truth = rank(program.bridge, program.prompts), seen(name, intervention)
        naive = effects(name, intervention)
        assert found == pytest.approx(naive, abs=1e-5)
        assert auroc(found, truth) == 1
        assert truth <= program.live
        assert {found[node] for node in set(program.nodes) - program.live} <= {0.0}


def test_each_intervention_has_its_own_truth():
    counts = {i: len(seen("reverse", i)) for i in INTERVENTIONS}
    assert counts == {"zero": 5, "mean": 3, "resample": 1}


def test_of_two_redundant_heads_neither_is_needed_and_both_are():
    program, flips = load_program("redundant_or"), {}
    for zeroed in (["L1H0"], ["L1H1"], ["L1H0", "L1H1"]):
        flipped = 0
        for prompt in program.prompts:
            own = {}
            logits(program, prompt.tokens, outputs=own)
            instead = {node: np.zeros_like(own[node]) for node in zeroed}
            after = logits(program, prompt.tokens, instead)
            flipped += after[prompt.positive[0]] < after[prompt.negative[0]]
        flips[len(zeroed)] = flips.get(len(zeroed), 0) + flipped / len(program.prompts)
    assert flips[1] == 0
    assert flips[2] > 0.5


# ---------------------------------------------------------------------------------- planted edits
PLANTS = [
    Plant(kind="head", places=((1, 2),), nats=0.5),
    Plant(kind="mlp", places=((2, -1),), nats=0.5),
    Plant(kind="split", places=((1, 0), (2, 1), (2, 3)), nats=0.5),
]


@pytest.fixture(scope="module")
def plants(tmp_path_factory):
    base = "tiny-llama"
    bridge = load_model(base, device="cpu")
    prompts = encode_scenario(bridge, load_scenario("cubic_gravity"))[:4]
    return base, prompts, *planted(base, PLANTS, prompts, tmp_path_factory.mktemp("plants"))


def test_a_plant_moves_the_decision_by_what_it_says(plants):
    base, prompts, models, kept = plants
    assert [*kept.values()] == PLANTS
    before = decide(models.switch(base), prompts).value.mean()
    for name, plant in kept.items():
        after = decide(models.switch(name), prompts).value.mean()
        assert after - before == pytest.approx(plant.nats, abs=0.02)


def test_what_a_plant_cannot_have_changed_has_an_effect_of_exactly_nothing(plants):
    base, prompts, models, kept = plants
    for name, plant in kept.items():
        found = by_cross_model_patching(models, base, name, prompts)
        forbidden = plant.forbidden(list(found))
        assert forbidden
        assert not forbidden & plant.origin
        assert {found[node] for node in forbidden} == {0.0}
        assert all(found[node] > 0 for node in plant.origin)


def test_every_method_is_scored_on_a_plant(plants):
    base, prompts, models, kept = plants
    name, plant = next(iter(kept.items()))
    rows = {row["method"]: row for row in score(models, base, name, plant, prompts)}
    assert rows["cross-model patching"]["hit"] == 1
    assert rows["cross-model patching"]["forbidden"] == 0
    assert rows["weight difference"]["auroc"] == 1
    assert rows["random order"]["auroc"] < 1
