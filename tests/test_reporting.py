"""Tables, summaries and figures: complete on disk, honest about noise, escaped."""

import functools
import json
import math
from typing import cast

import numpy as np
import pandas as pd
import plotly.io
import pytest
from scipy import stats

from interp_batch.report.pictures import find_browser, write_pictures
from interp_kit.analyses.lens import trajectory_statistics
from interp_kit.figures import (
    against_null,
    attention_view,
    bars,
    growth,
    heatmap,
    scatter,
    token_grid,
    trajectories,
)
from interp_kit.records import answer, named, record, sentence, show
from interp_kit.statistics import (
    breaking_layer,
    mean_interval,
    prediction_limit,
    rank_agreement,
    rank_correlation,
)

LAYERS = pd.DataFrame({"layer": [-1, 0, 1], "value": [0.0, 1.0, -2.0], "series": "a"})
LAYERS = LAYERS.assign(low=LAYERS.value - 1, high=LAYERS.value + 1)


def test_intervals_are_students_t_over_prompts():
    table = pd.DataFrame({"prompt": list("aabbcc"), "value": [1.0, 3, 4, 4, 9, 9]})
    (row,) = mean_interval(table).itertuples()
    means = [2.0, 4.0, 9.0]
    low, high = stats.t.interval(0.95, 2, np.mean(means), stats.sem(means))
    assert (row.value, row.n) == (5.0, 3)
    assert (row.low, row.high) == pytest.approx((low, high))


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"study": np.repeat(range(2000), 3), "prompt": np.tile(range(3), 2000)}
    ).assign(value=rng.normal(size=6000))
    found = mean_interval(table, ["study"])
    assert ((found.low < 0) & (found.high > 0)).mean() == pytest.approx(0.95, abs=0.02)


def test_asymmetric_intervals_are_drawn_as_they_are():
    table = pd.DataFrame({"component": ["a"], "value": [1.0], "low": [0.5], "high": [3.0]})
    error = bars(table, label="component", title="t", x_title="x").data[0].error_x
    assert (list(error.array), list(error.arrayminus)) == ([2.0], [0.5])


def test_an_empty_table_makes_an_empty_figure():
    empty = pd.DataFrame({"x": [], "y": [], "value": []})
    assert heatmap(empty, x="x", y="y", title="t", color_title="c").data[0].zmax == 1.0


def test_rank_correlation_finds_order_and_calls_chance_chance():
    rng = np.random.default_rng(0)
    x = pd.Series(rng.normal(size=40))
    found = rank_correlation(x, x**3, resamples=999)
    assert found.value == pytest.approx(1)
    assert found.p <= 0.002
    pairs = [pd.Series(rng.normal(size=40)) for _ in range(100)]
    p = [rank_correlation(x, y, resamples=199).p for y in pairs]
    assert np.mean(np.array(p) <= 0.05) < 0.15


def test_one_prompt_has_no_interval():
    row = mean_interval(pd.DataFrame({"prompt": ["a"], "value": [1.0]}), within=(0.0, 1.0)).iloc[0]
    assert math.isnan(row.low)
    assert math.isnan(row.high)


def test_the_interval_of_a_probability_is_one():
    table = pd.DataFrame({"prompt": list("abc"), "value": [0.9, 1.0, 0.5]})
    free, bound = mean_interval(table).iloc[0], mean_interval(table, within=(0.0, 1.0)).iloc[0]
    assert free.high > 1
    assert (bound.low, bound.high) == (free.low, 1)


def test_trajectory_statistics_on_a_curve_that_is_known():
    lens = pd.DataFrame(
        {"prompt": "p", "group": "", "layer": [-1, 0, 1, 2, 3], "value": [9.0, 1, -1, 2, 4]}
    )
    (row,) = trajectory_statistics(lens).itertuples()
    assert (row.mean, row.final) == (1.5, 4.0)
    assert (row.positive_layers, row.negative_layers) == (3, 1)
    assert (row.flip_layers, row.settled_layer) == ([1, 2], 2)


def test_signed_figures_are_centred_on_zero():
    table = pd.DataFrame({"layer": [0, 1], "head": [0, 0], "value": [-3.0, 1.0]})
    trace = heatmap(table, x="head", y="layer", title="t", color_title="c").data[0]
    assert (trace.zmin, trace.zmax) == (-3.0, 3.0)


def test_text_from_models_never_becomes_markup():
    evil = "<b onclick=x>&"
    tokens = pd.DataFrame({"layer": [0], "rank": [1], "token": [evil], "p": [0.5]})
    components = pd.DataFrame({"component": [evil], "value": [1.0]})
    figures = [
        token_grid(tokens, title=evil),
        bars(components, label="component", title=evil, x_title="x"),
        trajectories(LAYERS.assign(series=evil), y_title="y", title=evil),
        heatmap(
            pd.DataFrame({"pos": [0], "layer": [0], "value": [1.0]}),
            x="pos", y="layer", title=evil, color_title="c", x_labels=[evil],
        ),
        heatmap(
            components.assign(layer=0), x="component", y="layer", title=evil, color_title="c"
        ),
        growth(
            LAYERS.assign(series=evil), series="series", x="layer", title=evil,
            x_title="x", y_title="y",
        ),
        against_null(
            components.assign(expected=0, low=-1, high=1), label="component", title=evil,
            x_title="x",
        ),
        scatter(
            components.assign(other=[2.0]), x="value", y="other", label="component", title=evil,
            x_title="x", y_title="y",
        ),
    ]  # fmt: skip
    for figure in figures:
        assert "<b onclick" not in cast(str, figure.to_json()).replace("\\u003c", "<")
    view = attention_view(["</script><script>alert(1)</script>"], np.ones((1, 1, 1)))
    assert "</script><script>alert" not in cast(str, view.data)


def test_a_value_below_the_noise_floor_is_not_interpreted():
    entry = named(1e-6, unit="nats")
    assert "below the numerical noise floor" in sentence("x", entry, noise_floor=1e-5)
    assert "below" not in sentence("x", named(1.0, unit="nats"), noise_floor=1e-5)


SUMMARY = {
    "final_decision": named(2.31, unit="nats", control=0.12, low=1.902, high=2.718, n=3),
    "drop": named(7, unit="of 8 heads", component="L7H6", p=0.0001),
}


def test_an_answer_gives_its_verdict_and_the_numbers_it_stands_on():
    decision = "final decision 2.310 nats [1.902, 2.718], n = 3; control 0.120"
    drop = "drop (L7H6) 7 of 8 heads, p < 0.001"
    assert answer(True, SUMMARY, "final_decision") == f"yes: {decision}"
    assert answer(np.bool_(False), SUMMARY, "drop") == f"no: {drop}"
    assert answer(None, SUMMARY, "final_decision", "drop") == f"cannot tell: {decision}; {drop}"
    assert answer("strong", SUMMARY, "drop", because="on both") == f"strong, on both: {drop}"
    assert answer(None, {}, because="two prompts") == "cannot tell: two prompts"
    assert "below the numerical noise floor" in answer(
        False, SUMMARY, "final_decision", noise_floor=3.0
    )
    with pytest.raises(ValueError, match="expected names of summary values"):
        answer(True, SUMMARY, "decision")
    with pytest.raises(ValueError, match="needs a reason"):
        answer(True, SUMMARY)


@pytest.mark.parametrize(
    ("question", "said", "is_answer"),
    [
        ("Is it so?", "yes", True),
        ("Is it so?", "no, the controls do as much: 3", True),
        ("Is it so?", "cannot tell: two prompts", True),
        ("Is it so?", "strong: 0.9", False),
        ("Is it so?", "not by itself", False),
        ("How clean is it?", "strong: 0.9", True),
        ("How clean is it?", " ", False),
    ],
)
def test_a_question_gets_an_answer_that_fits_it(tmp_path, capsys, question, said, is_answer):
    nothing = {"table": LAYERS, "figures": {}, "noise_floor": 0.0}
    if not is_answer:
        for folder in (tmp_path, ""):  # found in an interactive session, too
            with pytest.raises(ValueError, match="expected yes, no or cannot tell first"):
                record(folder, summary=SUMMARY, answers={question: said}, **nothing)
        return
    show(SUMMARY, answers={question: said})
    assert capsys.readouterr().out.splitlines()[-1] == f"{question} {said}"
    record(tmp_path, summary=SUMMARY, answers={question: said}, **nothing)
    assert json.loads((tmp_path / "summary.json").read_text())["answers"] == {question: said}


def test_a_record_is_complete_and_valid_json(tmp_path):
    table = pd.DataFrame({"prompt": ["a"], "value": [1.0]})
    record(
        tmp_path,
        table=table,
        summary={"x": named(mean_interval(table), unit="nats", control=0.1)},
        figures={"f": trajectories(LAYERS, y_title="y", title="t")},
        noise_floor=1e-6,
        model="m",
    )
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["values"]["x"] | {"low": None, "n": 1} == summary["values"]["x"]
    assert summary["about"] == {"model": "m"}
    assert summary["versions"]["torch"]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), table)
    assert plotly.io.read_json(tmp_path / "figures" / "f.json").layout.title.text == "t"
    assert not [p for p in tmp_path.rglob(".*")]


def test_an_empty_folder_name_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record("", table=LAYERS, summary={}, figures={}, noise_floor=0.0)
    assert not list(tmp_path.iterdir())


def test_figures_become_pictures_where_there_is_a_browser(tmp_path):
    browser = find_browser()
    if browser is None:
        pytest.skip("needs Chromium or Chrome")
    figure = trajectories(LAYERS, y_title="nats", title="t")
    for cell in ("a", "b"):
        record(tmp_path / cell, table=LAYERS, summary={}, figures={"f": figure}, noise_floor=0.0)
    assert write_pictures(tmp_path, browser=browser) == 2
    for cell in ("a", "b"):
        assert (tmp_path / cell / "figures" / "f.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_prediction_limit_is_passed_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr(stats.t, "ppf", functools.cache(stats.t.ppf))  # the same for each draw
    rng = np.random.default_rng(0)
    draws = rng.normal(3.0, 2.0, size=(20_000, 9))
    over = [d[0] > prediction_limit(d[1:].tolist(), confidence=0.95) for d in draws]
    assert np.mean(over) == pytest.approx(0.05, abs=0.006)
    with pytest.raises(ValueError, match="two control values"):
        prediction_limit([1.0])


def test_rank_agreement_has_an_interval_and_none_where_a_column_is_constant():
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    table = pd.DataFrame({"a": x, "b": x + 0.3 * rng.normal(size=40), "c": 1.0, "d": -x})
    found = rank_agreement(table, ["a", "b", "c", "d"], resamples=500)
    by = found.set_index(["first", "second"])
    assert by.low["a", "b"] > 0.7
    assert by.low["a", "b"] < by.value["a", "b"] < by.high["a", "b"]
    assert by.value["a", "d"] == pytest.approx(-1)
    assert by.p["a", "b"] < 0.01
    assert by.loc[("a", "c"), ["value", "low", "high"]].isna().all()


def test_rank_agreement_covers_no_correlation_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(100):
        (row,) = rank_agreement(
            pd.DataFrame(rng.normal(size=(30, 2)), columns=["a", "b"]), ["a", "b"], resamples=100
        ).itertuples()
        covered.append(row.low <= 0 <= row.high)
    assert 0.85 <= np.mean(covered) <= 1


def test_the_breaking_layer_is_where_two_curves_part_for_good():
    rng = np.random.default_rng(0)
    rows = []
    for prompt in range(12):
        for layer in range(8):
            shared = rng.normal()
            gap = {2: 9.0, 5: 4.0, 6: 6.0, 7: 6.0}.get(layer, 0.0)  # a bump, then for good
            noise = rng.normal(0, 0.3)
            rows += [
                ("base", prompt, layer, shared),
                ("tuned", prompt, layer, shared + gap + noise),
            ]
    table = pd.DataFrame(rows, columns=["model", "prompt", "layer", "value"])
    (row,) = breaking_layer(table, series="model", reference="base").itertuples()
    assert (row.value, row.low, row.high, row.n) == (5, 5, 5, 12)
    assert row.gap == pytest.approx(6, abs=0.3)
    late = breaking_layer(table, series="model", reference="base", share=0.9).value[0]
    assert late == 6
