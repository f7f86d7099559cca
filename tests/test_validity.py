"""The benchmark of methods: its scores by hand-worked values, its cases by independent means."""

from functools import partial

import numpy as np
import pytest

from benchmarks.resumable import check_complete, run
from benchmarks.validity import cases, nulls
from benchmarks.validity.adapters import random_adapters
from benchmarks.validity.facts import RELATIONS
from benchmarks.validity.methods import IN_PROGRAMS, by_cross_model_patching, by_own_weights
from benchmarks.validity.plant_cases import score
from benchmarks.validity.plants import Plant, planted
from benchmarks.validity.programs import (
    INTERVENTIONS,
    NAMES,
    effects,
    load_program,
    logits,
    seen,
)
from benchmarks.validity.rows import YES, row, summary
from benchmarks.validity.scores import (
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
from interp_kit.loading import load_model, load_models
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


def test_a_rate_has_an_exact_interval_and_what_was_not_measured_is_missing():
    def of(hits, n):
        rows = [row("one", "false alarms", i < hits) for i in range(n)]
        return summary([{"case": "a"} | r for r in rows])

    assert of(0, 0).empty
    nothing, some = of(0, 59).iloc[0], of(16, 200).iloc[0]
    assert (nothing.value, nothing.low) == (0, 0)
    assert nothing.high == pytest.approx(0.0606, abs=1e-4)
    assert some.low < 0.05 < some.high
    assert of(59, 59).high.item() == 1


def test_means_have_an_interval_and_of_forbidden_effects_the_largest_counts():
    rows = [row("one", "AUROC", x) for x in (0.5, 0.7, 0.9)]
    rows += [row("one", "forbidden effect", x) for x in (0.0, 0.2, 0.1)]
    table = summary([{"case": "a"} | r for r in rows]).set_index("score")
    assert table.value["AUROC"] == pytest.approx(0.7)
    assert table.low["AUROC"] < 0.5
    assert table.value["forbidden effect"] == 0.2
    assert list(table.n) == [3, 3]


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
    Plant(kind="first", places=((2, -1),), nats=0.1),
    Plant(kind="unread", places=((4, 3), (3, 0)), nats=0.5),
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


def test_own_weights_name_the_edited_and_nothing_that_answers_to_it(plants):
    base, prompts, models, kept = plants
    for name, plant in kept.items():
        found = by_own_weights(models, base, name, prompts)
        assert max(found, key=lambda node: found[node]) in plant.origin
        edited = {node for node, effect in found.items() if effect > 0}
        assert plant.origin <= edited
        assert len(edited) == len(plant.places)


def test_at_the_first_position_only_means_nothing_at_the_last(plants):
    base, prompts, models, kept = plants
    name = next(name for name, plant in kept.items() if plant.kind == "first")
    last = by_cross_model_patching(models, base, name, prompts, positions="decision")
    assert last["L2_MLP"] < 1e-3
    assert by_cross_model_patching(models, base, name, prompts)["L2_MLP"] > 0.09


def test_every_method_is_scored_on_a_plant(plants):
    base, prompts, models, kept = plants
    name, plant = next(iter(kept.items()))
    table = summary([{"case": "a"} | r for r in score(models, base, name, plant, prompts)])
    by = table.set_index(["method", "score"]).value
    assert by["cross-model patching", "hit@1"] == 1
    assert by["cross-model patching", "forbidden effect"] == 0
    assert by["weight difference", "AUROC"] == 1
    assert by["random order", "AUROC"] < 1
    assert by["layer swap", "layer error"] == 0
    assert by["PCA, edited layer", "|cos|"] > 0.5


# ------------------------------------------------------------------------------------------ nulls
def test_nulls_share_no_text():
    bridge = load_model("tiny-llama", device="cpu")
    made = nulls.unrelated_prompts(bridge, n=3)
    texts = [text for own in made for p in own for text in (p.tokens, p.counterfactual)]
    assert len(texts) == len(set(texts)) == 3 * 2 * nulls.PROMPTS
    assert all(len({(p.positive, p.negative) for p in own}) == 1 for own in made)


def test_each_null_is_one_trial_of_the_notebooks_rule():
    table = summary([{"case": "a"} | r for r in nulls.reading("tiny-llama", n=3)])
    own = table[table.kind == YES].set_index("method")
    assert set(own.index) == {"logit lens", "direct logit attribution", "comparison of decisions"}
    assert (own.n == 3).all()
    assert own.value.between(0, 1).all()


def test_random_adapters_change_one_module_by_a_percent(tmp_path):
    names = random_adapters("tiny-llama", tmp_path, n=2)
    models = load_models(["tiny-llama", *names], device="cpu")
    for name in names:
        changes = list(models.weight_changes(name))
        assert len(changes) == 1
        _, _, change, weight = changes[0]
        assert float(change.norm() / weight.norm()) == pytest.approx(0.01, rel=1e-3)


# ------------------------------------------------------------------------------------- the command
def test_cases_are_run_once_and_found_again(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    first = run(cases.CASES, "probe/program", file)
    assert {r["case"] for r in first} == {"probe/program"}
    nothing = dict.fromkeys(cases.CASES, list)  # has no rows
    assert run(nothing, "probe/program", file) == first


def test_a_benchmark_says_which_cases_failed(capsys):
    every = {"good": dict, "bad": partial(int, "x"), "not asked for": dict}
    assert run(every, "bad", None) == []
    assert "bad: ValueError" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no rows of bad: run the command again"):
        check_complete(every, "d", {"good", "not asked for"})


def test_there_are_enough_facts_to_choose_from():
    assert sum(map(len, RELATIONS.values())) >= 48
