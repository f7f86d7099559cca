"""Decisions from intervals, and where a curve settles."""

import numpy as np
import pytest

from interp_kit.statistics import settled, verdict

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
