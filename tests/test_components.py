"""The component map: what it takes from the tables of a run, and how it fits into one page."""

import json

import pandas as pd
import pytest

from interp_batch.report import components
from interp_batch.report.components import as_json, component_maps, strongest
from interp_batch.report.findings import read_folder
from interp_batch.report.stills import small_table
from interp_kit.figures import bars, heatmap, trajectories
from tests.test_report import LAYERS, write_cell

NAMES = [f"L{layer}{unit}" for layer in range(3) for unit in ("H0", "H1", "_MLP")]


def effects(**columns):
    """A row for each component, whose value is its place."""
    table = pd.DataFrame({"component": NAMES, "value": [float(i) for i in range(len(NAMES))]})
    return table.assign(low=table.value - 1, high=table.value + 1, control=4.5, **columns)


def write_table(folder, notebook, file, table, *, model="m", scenario="s"):
    cell = write_cell(folder, notebook, model, scenario)
    table.to_csv(cell["folder"] / file, index=False)
    return cell["folder"]


def test_a_map_for_each_direction_holds_what_the_table_says(tmp_path):
    both = pd.concat([effects(direction="noise", clear=True), effects(direction="denoise")])
    write_table(tmp_path, "03_activation_patching", "mean.csv", both)
    maps, words, problems = component_maps(read_folder(tmp_path))
    assert (words, problems) == ([], [])
    assert [own.experiment for own in maps] == [
        "activation patching (noise)",
        "activation patching (denoise)",
    ]
    row = maps[0].table.set_index("component").loc["L2_MLP"]
    assert list(row[["value", "low", "high", "control"]]) == [8, 7, 9, 4.5]
    assert [bool(own.table.clear.all()) for own in maps] == [True, False]


def test_of_several_segments_the_strongest_effect_is_shown(tmp_path):
    weak, strong = effects(direction="noise"), effects(direction="noise")
    strong["value"] = -3 * strong.value
    write_table(tmp_path, "03_activation_patching", "mean.csv", pd.concat([weak, strong]))
    (own,) = component_maps(read_folder(tmp_path))[0]
    assert own.table.component.is_unique
    assert own.table.set_index("component").value["L2_MLP"] == -24


def test_prompts_are_averaged_for_each_scenario_unless_positions_differ(tmp_path):
    rows = [
        {"experiment": "A -> B", "scenario": scenario, "prompt": f"{scenario}/{i}",
         "component": "L1H1", "change": 1.0 + i}
        for scenario in ("one", "two")
        for i in range(3)
    ]  # fmt: skip
    folder = write_table(tmp_path, "04_cross_model_patching", "table.csv", pd.DataFrame(rows))
    maps = component_maps(read_folder(tmp_path))[0]
    assert [(own.model, own.scenario, own.table.value.item()) for own in maps] == [
        ("A -> B", "one", 2.0),
        ("A -> B", "two", 2.0),
    ]
    assert maps[0].table.low.item() < 2 < maps[0].table.high.item()
    pd.DataFrame(rows + rows).to_csv(folder / "table.csv", index=False)  # at two positions
    assert component_maps(read_folder(tmp_path))[0] == []


def test_a_trace_names_sites(tmp_path):
    trace = pd.DataFrame(
        [("noise", "p", site, layer, float(layer)) for site in ("attn_out", "mlp_out", "block")
         for layer in range(2)],
        columns=["direction", "prompt", "site", "layer", "recovered_fraction"],
    )  # fmt: skip
    write_table(tmp_path, "06_causal_tracing", "table.csv", trace)
    (own,) = component_maps(read_folder(tmp_path))[0]
    assert set(own.table.component) == {"L0_ATTN", "L1_ATTN", "L0_MLP", "L1_MLP"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("component,high\nL0H0,1", "expected the columns direction, value; got component, high"),
        ("direction,component,value\nnoise,L0H0,much", "Unable to parse string 'much'"),
        ("", "No columns to parse"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path, content, said):
    folder = write_table(tmp_path, "03_activation_patching", "mean.csv", effects())
    (folder / "mean.csv").write_text(content)
    maps, _, ((result, file, problem),) = component_maps(read_folder(tmp_path))
    assert maps == []
    assert (result.notebook, file) == ("03_activation_patching", "mean.csv")
    assert said in problem


def test_no_table_asks_for_a_grid_without_end(tmp_path):
    table = effects(direction="noise")
    table.loc[0, "component"] = "L999999999H0"
    write_table(tmp_path, "03_activation_patching", "mean.csv", table)
    maps, *_ = component_maps(read_folder(tmp_path))
    assert "L999999999H0" not in set(maps[0].table.component)


@pytest.mark.parametrize(("layers", "heads"), [(12, 8), (30, 9), (32, 32)])
def test_the_data_of_many_maps_fit_into_one_page(tmp_path, layers, heads, monkeypatch):
    """Values, then intervals of the strongest, then fewer maps: and the page says so."""
    units = [*(f"H{head}" for head in range(heads)), "_MLP"]
    names = [f"L{layer}{unit}" for layer in range(layers) for unit in units]
    table = pd.DataFrame({"component": names, "value": [i / 7 for i in range(len(names))]})
    table = table.assign(low=table.value - 1 / 7, high=table.value + 1 / 7, control=1 / 7)
    for i in range(3):
        write_table(
            tmp_path, "03_activation_patching", "mean.csv", table.assign(direction="noise"),
            scenario=f"s{i}",
        )  # fmt: skip
    results = read_folder(tmp_path)
    maps, words, _ = component_maps(results)
    pages = {result.id: "page" for result in results}
    whole, left_out, _ = as_json(maps, words, pages)
    assert left_out == 0
    data = json.loads(whole)
    assert len(data["units"]) == heads + 1
    first = data["maps"][0]
    assert len(first["values"]) == len(first["details"]) == len(names)
    assert first["details"]["7"] == [0.8571, 1.143, 0.1429]
    monkeypatch.setattr(components, "LIMIT", len(whole) - 1)
    fewer, left_out, _ = as_json(maps, words, pages)
    assert left_out == 0
    assert len(json.loads(fewer)["maps"][0]["details"]) == components.DETAILED
    monkeypatch.setattr(components, "LIMIT", len(fewer) - 1)
    least, left_out, _ = as_json(maps, words, pages)
    assert left_out == 1
    assert len(least) < len(fewer)


def test_the_strongest_of_every_map_are_listed(tmp_path):
    write_table(tmp_path, "03_activation_patching", "mean.csv", effects(direction="noise"))
    maps, *_ = component_maps(read_folder(tmp_path))
    assert [row.component for _, row in strongest(maps)] == ["L2_MLP", "L2H1", "L2H0"]


def test_what_a_component_attends_to_is_read_as_text(tmp_path):
    said = pd.DataFrame(
        {"prompt": "p", "component": "L1H1", "token": ["NA", "", " <b>"], "value": [0.5, 0.3, 0.2]}
    )
    write_table(tmp_path, "03_activation_patching", "attends.csv", said)
    (words,) = component_maps(read_folder(tmp_path))[1]
    assert words["tokens"] == {"L1H1": [["NA", 0.5], ["", 0.3], [" <b>", 0.2]]}
    assert (words["says"], words["prompt"]) == ("attends to", "m · s · p")


@pytest.mark.parametrize("scenarios", [1, 5])
def test_the_words_of_a_deep_model_leave_room_for_its_maps(tmp_path, scenarios, monkeypatch):
    """30 layers of 9 heads: three prompts of each of five scenarios fit, or one of each does."""
    names = [f"L{layer}H{head}" for layer in range(30) for head in range(9)]
    table = pd.DataFrame({"component": names, "value": [i / 7 for i in range(len(names))]})
    table = table.assign(low=table.value - 1 / 7, high=table.value + 1 / 7, direction="noise")
    said = pd.DataFrame(
        [(f"s/{i}", name, f" token{k}", 1 / (k + 3)) for i in range(3) for name in names[:20]
         for k in range(6)],
        columns=["prompt", "component", "token", "value"],
    )  # fmt: skip
    promoted = pd.concat([said.assign(says="promotes"), said.assign(says="demotes")])
    for i in range(scenarios):
        where = {"scenario": f"s{i}"}
        folder = write_table(tmp_path, "03_activation_patching", "mean.csv", table, **where)
        said.to_csv(folder / "attends.csv", index=False)
        write_table(tmp_path, "02_direct_logit_attribution", "promotes.csv", promoted, **where)
    results = read_folder(tmp_path)
    maps, words, _ = component_maps(results)
    pages = {result.id: "a/page/of/some/length" for result in results}
    whole, left_out, every_prompt = as_json(maps, words, pages)
    assert (left_out, every_prompt) == (0, True)
    assert len(whole) < 400_000
    assert len({word["prompt"] for word in json.loads(whole)["words"]}) == 3 * scenarios
    monkeypatch.setattr(components, "LIMIT", len(whole) - 1)
    fewer, left_out, every_prompt = as_json(maps, words, pages)
    assert (left_out, every_prompt) == (0, False)
    data = json.loads(fewer)
    assert {word["prompt"].rsplit(" ", 1)[1] for word in data["words"]} == {"s/0"}
    assert len(data["maps"][0]["details"]) == len(names)  # words go first


# --------------------------------------------------------------------------- without any script
def data_of(figure):
    return json.loads(figure.to_json())["data"]


def test_a_figure_without_scripts_is_a_table_of_its_numbers():
    lines = small_table(data_of(trajectories(LAYERS, y_title="nats", title="t")))
    assert lines == [
        ["series", "across", "up"],
        ["a", "-1", "0"],
        ["a", "0", "1"],
        ["a", "1", "-2"],
    ]
    table = pd.DataFrame({"component": ["L1H0"], "value": [2.5]})
    drawn = bars(table, label="component", title="t", x_title="nats")
    assert small_table(data_of(drawn))[1][1:] == ["2.5", "L1H0"]
    grid = pd.DataFrame({"pos": [0, 1], "layer": [0, 0], "value": [1.0, -1.0]})
    drawn = heatmap(grid, x="pos", y="layer", title="t", color_title="n", x_labels=["a", "b"])
    assert small_table(data_of(drawn)) == [["", "a", "b"], ["0", "1", "-1"]]


def test_a_figure_of_too_many_points_or_of_another_kind_gives_no_table():
    many = pd.DataFrame({"pos": range(200), "layer": 0, "value": 1.0})
    assert small_table(data_of(heatmap(many, x="pos", y="layer", title="", color_title=""))) == []
    assert small_table([{"type": "table", "cells": {"values": [["a"]]}}]) == []
    assert small_table([]) == []
    assert small_table([{"type": "bar", "x": {"bdata": "!", "dtype": "f8"}, "y": [1]}]) == []
