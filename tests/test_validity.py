"""The benchmark of methods: its scores by hand-worked values, its cases by independent means."""

import numpy as np
import pytest

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
