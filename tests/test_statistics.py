"""Decisions from intervals and controls, and where a curve settles."""

import numpy as np
import pandas as pd
import pytest

from interp_kit.statistics import against_control, paired_difference, settled, verdict

NAN = float("nan")


@pytest.mark.parametrize(
    ("low", "high", "above", "below"),
    [
        (0.8, 0.9, "yes", "no"),
        (0.1, 0.2, "no", "yes"),
        (0.6, 0.8, "cannot tell", "cannot tell"),
        (0.6, 0.7, "no", "cannot tell"),  # the threshold itself is not beyond it
        (0.7, 0.8, "cannot tell", "no"),
        (NAN, NAN, "cannot tell", "cannot tell"),
        ([], [], "cannot tell", "cannot tell"),
        ([0.4, 0.72], [0.6, 0.9], "yes", "yes"),
        ([0.4, 0.5], [0.6, 0.9], "cannot tell", "yes"),
        ([0.4, NAN], [0.6, NAN], "cannot tell", "yes"),
        ([0.1, 0.2], [0.3, 0.4], "no", "yes"),
    ],
)
def test_a_verdict_holds_for_all_of_the_interval(low, high, above, below):
    assert verdict(low, high, ">", 0.7) == above
    assert verdict(low, high, "<", 0.7) == below


def test_a_curve_settles_where_it_keeps_its_sign_and_size():
    curves = np.array([[1.0, -1.0, 0.4, 1.0], [-1.0, -1.0, -1.0, -1.0], [3.0, 3.0, 3.0, -0.1]])
    assert settled(curves).tolist() == [2, 0, 3]
    assert settled(curves, share=0.5).tolist() == [3, 0, 3]
    for curve in np.random.default_rng(0).normal(size=(50, 6)):
        first = next(
            i
            for i in range(6)
            if all(v * curve[-1] > 0 and abs(v) >= 0.3 * abs(curve[-1]) for v in curve[i:])
        )
        assert settled(curve[None], share=0.3)[0] == first


def measured(values):
    """``place prompt value`` of an array [place prompt]."""
    place, prompt = np.indices(np.shape(values))
    table = {"place": place.ravel(), "prompt": [f"p{i}" for i in prompt.ravel()]}
    return pd.DataFrame(table | {"value": np.ravel(values)})


def drawn(scales, prompts, *, draws=200, seed=0):
    """Other contrasts: at each place, of every prompt, with this spread."""
    rng = np.random.default_rng(seed)
    tables = [
        measured(np.outer(scales, np.ones(prompts)) * rng.normal(size=(len(scales), 1)))
        for _ in range(draws)
    ]
    return pd.concat(table.assign(draw=i) for i, table in enumerate(tables))


def test_a_place_is_clear_beyond_what_other_contrasts_show_there():
    """Of four places, as large: small controls; large ones; of changing sign; below the noise."""
    signs = np.tile([1.0, -1.0], 4)
    values = np.array([np.full(8, 3.0), np.full(8, 3.0), 3 * signs, np.full(8, 1e-6)])
    control = drawn([0.5, 5.0, 0.01, 1e-8], 8)
    result = against_control(measured(values), control, ["place"], noise_floor=1e-5)
    assert result.clear.tolist() == [True, False, False, False]
    assert result.beyond.tolist() == [True, False, False, True]
    assert result.control[0] == pytest.approx(0.5 * 1.96, rel=0.2)
    few = against_control(measured(values[:, :3]), drawn([0.5, 5.0, 0.01, 1e-8], 3), ["place"])
    assert few.clear.tolist() == [True, False, True, True]  # no test, and no noise floor given
    missing = against_control(
        measured(values), pd.DataFrame(control[control.place != 0]), ["place"]
    )
    assert not missing.clear[0]  # what has no control is never clear


def test_one_place_among_hundreds_is_found_with_eight_prompts():
    """Where p of a place alone is at least 2 / 256; and where signs are arbitrary nothing is."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(300, 8))
    control = drawn(np.full(300, 0.5), 8, draws=64)
    values[7] = rng.normal(3, 0.2, 8)
    result = against_control(measured(values), control, ["place"])
    assert result.p[7] == pytest.approx(2 / 256)
    assert result.clear.to_numpy().nonzero()[0].tolist() == [7]
    wrong = [
        against_control(measured(values * rng.choice([-1, 1], 8)), control, ["place"]).clear.any()
        for _ in range(100)
    ]
    assert np.mean(wrong) <= 0.1


def test_too_few_draws_support_no_claim():
    values, control = np.full((1, 3), 5.0), drawn([0.1], 3, draws=18)
    assert not against_control(measured(values), control, ["place"]).clear[0]
    control = drawn([0.1], 3, draws=19)
    assert against_control(measured(values), control, ["place"]).clear[0]


def test_differences_are_paired_whatever_the_order():
    table = measured(np.arange(6.0).reshape(2, 3))
    other = measured(np.arange(6.0).reshape(2, 3) ** 2).sort_values("prompt")
    result = paired_difference(table, other, ["place", "prompt"])
    assert result.value.tolist() == [0, 0, -2, -6, -12, -20]
    assert list(result.columns) == list(table.columns)
    one, another = (pd.DataFrame(t[t.place == table.place.iloc[0]]) for t in (table, other))
    assert paired_difference(one, another, ["prompt"]).value.tolist() == [0, 0, -2]
    for wrong in (
        pd.DataFrame(other.iloc[1:]),
        pd.concat([other, other]),
        other.assign(prompt="q"),
    ):
        with pytest.raises(ValueError, match="the same rows by place, prompt"):
            paired_difference(table, wrong, ["place", "prompt"])
