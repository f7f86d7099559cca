"""Views: text that is a figure. Nothing in it becomes markup; colour, number and text agree.

How a browser shows them, contrast and the policy included, is in ``test_report.py``.
"""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook, new_output
from pydantic import ValidationError

from interp_batch.report.gallery import write_gallery
from interp_kit.records import record
from interp_kit.views import assets, coloured_text, marked, read_view, side_by_side
from tests.test_report import write_cell

EVIL = "<script>alert(1)</script>\"'&\u202edcba\u2066\x00</p>"
TOKENS = pd.DataFrame(
    {
        "row": ["a"] * 6,
        "token": ["The", " cat", "\n", "  ", "\t", " sat"],
        "value": [0.0, -2.0, 1.0, 0.5, 1.0, np.nan],
    }
)
TEXTS = pd.DataFrame(
    {
        "opening": ["o"] * 3,
        "model": ["base", "tuned", "amplified"],
        "text": ["the law is square", "the law is cubic", "cubic cubic cubic"],
    }
)


def text_view(**more):
    return coloured_text(TOKENS, row="row", title="t", value_title="KL (nats)", **more)


def pair_view(**more):
    return side_by_side(TEXTS, row="opening", column="model", title="t", **more)


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(str(markup))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of_class(self, name):
        return [own for _, own in self.tags if name in (own.get("class") or "").split()]


# --------------------------------------------------------------------------------------- escaping
def evil_views():
    table = pd.DataFrame({"row": EVIL, "token": [EVIL, EVIL], "value": [1.0, np.nan]})
    texts = TEXTS.assign(opening=EVIL, text=[EVIL, "x " + EVIL, EVIL])
    texts["model"] = [EVIL, "b", "c"]
    return [
        coloured_text(table, row="row", title=EVIL, value_title=EVIL, slider=EVIL),
        side_by_side(texts, row="opening", column="model", title=EVIL, slider=EVIL),
    ]


@pytest.mark.parametrize("view", evil_views(), ids=["coloured", "side by side"])
def test_no_text_of_a_model_becomes_markup_or_turns_the_page_around(view):
    page = Page(view.fragment())
    allowed = {"div", "p", "span", "mark", "label", "input", "output"}
    assert {tag for tag, _ in page.tags} <= allowed
    assert "<script>alert(1)</script>\"'&\\u202edcba\\u2066\\x00</p>" in page.text
    assert not re.search("[\u202e\u2066\x00]", page.text)
    for _, own in page.tags:
        assert not [name for name in own if name == "style" or name.startswith("on")]
    shown = view._repr_html_()
    assert shown.count("<script") == shown.count("</script>") == 1
    assert "alert(1)</script" not in shown


@pytest.mark.parametrize("view", evil_views(), ids=["coloured", "side by side"])
def test_the_data_alone_are_written_and_read_again(view):
    written = view.to_json()
    assert read_view(written) == view
    assert "ik-" not in written


# ---------------------------------------------------------------------------------- what it shows
def test_colour_and_number_are_those_of_the_value():
    page = Page(text_view().fragment())
    classes = [own["class"].split()[1] for own in page.of_class("ik-token")]
    assert classes == ["ik-0", "ik-n10", "ik-p5", "ik-p2", "ik-p5"]
    assert all(own["tabindex"] == "0" for own in page.of_class("ik-token"))
    values = re.findall(r'<span class="ik-value"> (.*?)</span>', str(text_view().fragment()))
    assert values == ["0", "-2.000", "1.000", "0.500", "1.000"]
    assert "KL (nats): -2.000 0 2.000" in " ".join(page.text.split())


def test_spaces_and_line_breaks_are_visible_where_they_carry_a_value():
    shown = Page(text_view().fragment()).text
    for visible in ("↵\n", "␣␣", "⇥\t", " cat", " sat"):
        assert visible in shown


@pytest.mark.parametrize(
    ("values", "lowest", "highest"),
    [([0.0, 4.0], "ik-0", "ik-p10"), ([-4.0, 0.0], "ik-n10", "ik-0"), ([0.0, 0.0], "ik-0", "ik-0")],
)
def test_values_of_one_sign_have_a_scale_of_one_colour(values, lowest, highest):
    table = pd.DataFrame({"row": "a", "token": ["x", "y"], "value": values})
    view = coloured_text(table, row="row", title="t", value_title="v")
    swatches = [s["class"].split()[1] for s in Page(view.fragment()).of_class("ik-swatch")]
    assert (swatches[0], swatches[-1]) == (lowest, highest)
    assert len(swatches) == (11 if any(values) else 1)


def test_values_of_positions_are_put_into_the_whole_text():
    table = pd.DataFrame({"layer": [0, 0, 1, 1], "pos": [1, 2, 1, 2], "value": [1.0, 2, 3, 4]})
    words = ["a", "b", "c", "d"]
    view = coloured_text(
        table, row="layer", words=words, title="t", value_title="v", slider="layer"
    )
    assert [row.tokens for row in view.rows] == [tuple(words)] * 2
    assert view.rows[1].values == (None, 3.0, 4.0, None)
    (slider,) = [own for tag, own in Page(view.fragment()).tags if tag == "input"]
    assert slider["value"] == "1"  # the layer with the largest value


def test_what_differs_from_the_first_column_is_marked():
    assert str(marked("the law is square", "the law is cubic")) == ("the law is <mark>cubic</mark>")
    assert str(marked("a b", "a b")) == "a b"
    assert str(marked("a b", "a b ")) == "a b<mark> </mark>"
    assert str(marked("a b", "")) == ""
    assert str(marked("a b c d", "x y b z")) == "<mark>x y b z</mark>"  # another text
    cells = str(pair_view().fragment()).split('class="ik-cell"')[1:]
    assert [cell.count("<mark>") for cell in cells] == [0, 1, 1]


def test_a_text_that_is_missing_is_empty():
    view = pd.concat([TEXTS, TEXTS[:1].assign(opening="p")])
    view = side_by_side(view, row="opening", column="model", title="t")
    assert view.rows[1].texts == ("the law is square", "", "")


@pytest.mark.parametrize(
    ("view", "steps"), [(text_view(slider="layer"), 1), (pair_view(slider="α"), 2)]
)
def test_without_a_script_every_dose_is_shown_and_the_slider_is_not(view, steps):
    page = Page(view.fragment())
    labels = [own for tag, own in page.tags if tag == "label"]
    assert all("hidden" in own for own in labels)
    stepped = [own for _, own in page.tags if "data-step" in own]
    assert [own["data-step"] for own in stepped] == [str(i) for i in range(steps)]
    assert not [own for own in stepped if "hidden" in own or "ik-away" in own.get("class", "")]
    (slider,) = [own for tag, own in page.tags if tag == "input"]
    assert (slider["type"], slider["min"], slider["max"]) == ("range", "0", str(steps - 1))


# ------------------------------------------------------------------------------------- that it fits
@pytest.mark.parametrize(
    "broken",
    [
        {"view": "other", "title": "t"},
        {"view": "coloured_text", "title": "t", "value_title": "v",
         "rows": [{"label": "a", "tokens": ["x"], "values": [1, 2]}]},
        {"view": "coloured_text", "title": "t", "value_title": "v",
         "rows": [{"label": "a", "tokens": ["x"], "values": ["<b>"]}]},
        {"view": "side_by_side", "title": "t", "columns": ["a", "b"],
         "rows": [{"label": "r", "texts": ["x"]}]},
        {"view": "side_by_side", "title": "t", "columns": [], "rows": []},
        {"view": "side_by_side", "title": "t", "columns": ["a"], "rows": [], "html": "<b>"},
    ],
)  # fmt: skip
def test_what_is_no_view_is_refused(broken):
    with pytest.raises(ValidationError):
        read_view(json.dumps(broken))


def light(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one, other):
    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_the_scale_is_legible_symmetric_and_neutral_at_zero(scheme):
    pair = r"light-dark\((#\w{6}), (#\w{6})\)"
    found = {
        name: colours[scheme]
        for name, *colours in re.findall(rf"\.ik-([pn]?\d+) .*?background: {pair}", assets()["css"])
    }
    assert set(found) == {"0", *(f"{s}{i}" for s in "pn" for i in range(1, 11))}
    ink = ("#1a1a1a", "#f2f4f5")[scheme]
    assert min(contrast(colour, ink) for colour in found.values()) >= 4.5
    assert len(set(found.values())) == 21
    red, _, blue = (int(found["0"][i : i + 2], 16) for i in (1, 3, 5))
    assert abs(red - blue) <= 16  # grey


# --------------------------------------------------------------- in a report and in a notebook
def test_a_view_is_recorded_and_shown_as_text_without_inline_style(tmp_path):
    views = {"text": text_view(), "pair": pair_view(slider="strength")}
    cell = write_cell(
        tmp_path, "01_x", "m", "s", figures=views, answers={"Is it?": "yes: so"},
        headline={"pair": "What each model writes."},
    )  # fmt: skip
    write_gallery(tmp_path, title="study", about="", cells=[cell])
    assert read_view((cell["folder"] / "figures" / "pair.json").read_text()) == views["pair"]
    page = (cell["folder"] / "index.html").read_text(encoding="utf-8")
    for view in views.values():
        assert str(view.fragment()) in page
    first = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert str(views["pair"].fragment()) in first
    assert "What each model writes." in first
    for text in (page, first):
        assert " style=" not in text.split("</style>", 1)[1].split("<script>")[0]


def test_a_damaged_view_is_named(tmp_path):
    cell = write_cell(tmp_path, "01_x", "m", "s", figures={"text": text_view()})
    file = cell["folder"] / "figures" / "text.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rows": [1]}))
    write_gallery(tmp_path, title="study", about="", cells=[cell])
    page = (cell["folder"] / "index.html").read_text(encoding="utf-8")
    assert "figures/text.json: coloured_text.rows.0" in page


def test_values_that_are_no_numbers_are_recorded_as_none(tmp_path):
    table = TOKENS.assign(value=[math.inf, -math.inf, np.nan, 1.0, 2.0, 3.0])
    view = coloured_text(table, row="row", title="t", value_title="v")
    record(tmp_path, table=table, summary={}, figures={"v": view}, noise_floor=0.0)
    assert read_view((tmp_path / "figures" / "v.json").read_text()) == view
    assert view.rows[0].values[:3] == (None, None, None)


def test_it_survives_the_export_of_a_notebook():
    html = text_view()._repr_html_()
    output = new_output("execute_result", {"text/html": html}, execution_count=1)
    notebook = new_notebook(cells=[new_code_cell("view", outputs=[output], execution_count=1)])
    exported, _ = HTMLExporter().from_notebook_node(notebook)
    page, own = Page(exported), Page(text_view().fragment())
    assert page.of_class("ik-token") == own.of_class("ik-token")
    assert page.of_class("ik-swatch") == own.of_class("ik-swatch")
    assert assets()["css"] in exported
    assert assets()["js"] in exported


def test_its_style_reaches_nothing_else():
    css = re.sub(r"/\*.*?\*/", "", assets()["css"], flags=re.DOTALL)
    rules = re.findall(r"([^{}]+)\{[^{}]*\}", re.sub(r"@media[^{]*\{", "", css))
    for selector in (one for rule in rules for one in re.split(r",(?![^(]*\))", rule)):
        assert ".ik-view" in selector, selector
