"""Figures of the report in a real browser: they follow the scheme of the page, and fit into it."""

import numpy as np
import pandas as pd
import pytest

from interp_batch.report.gallery import write_gallery
from interp_kit.figures import against_null, bars, heatmap, token_grid, trajectories
from tests.test_report import write_cell
from tests.test_views import contrast

WHITE = [255, 255, 255]
SIGN = "change of the decision (nats): > 0 defects at once, < 0 cooperates for good"
COMPONENTS = [f"L{i // 8}H{i % 8} (not clear)" for i in range(40)]


def figures():
    """Long titles, more rows than a screen has, both kinds of colour scale, colours as names."""
    lines = pd.DataFrame({"layer": [*range(8)] * 2, "value": np.linspace(-2, 2, 16)})
    lines = lines.assign(low=lines.value - 1, high=lines.value + 1)
    lines["series"] = ["Strategic -> Deontological"] * 8 + ["black"] * 8
    many = pd.DataFrame({"component": ["black", "white", *COMPONENTS], "value": np.arange(42.0)})
    many = many.assign(low=many.value - 1, high=many.value + 1)
    null = pd.DataFrame({"name": ["rank correlation of effects", "overlap of circuits"]})
    null = null.assign(value=[0.8, 0.6], expected=0.1, low=0.0, high=0.2)
    grid = pd.DataFrame({"head": [*range(8)] * 30, "layer": sorted([*range(30)] * 8)})
    grid = grid.assign(value=np.linspace(-3, 3, 240))
    tokens = pd.DataFrame({"layer": [0, 1], "rank": 1, "token": [" a", " b"], "p": [0.1, 0.9]})
    return {
        "1_lines": trajectories(lines, y_title=SIGN, title=f"Lines: {SIGN}"),
        "2_bars": bars(many, label="component", title=f"Bars: {SIGN}", x_title=SIGN),
        "3_null": against_null(null, label="name", title="Null", x_title=f"1: the same; {SIGN}"),
        "4_grid": heatmap(grid, x="head", y="layer", title=f"Grid: {SIGN}", color_title="nats"),
        "5_tokens": token_grid(tokens, title="Tokens"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    own = figures()
    cell = write_cell(
        folder, "91_summary", "m", "s", figures=own, headline=dict.fromkeys([*own][:4], "How."),
        answers={f"{i}. Is what the question asks so?": "yes: it is so" for i in range(3)},
    )  # fmt: skip
    write_gallery(folder, title="study", about="What of it, asked at some length?", cells=[cell])
    return {"index": folder / "index.html", "cell": cell["folder"] / "index.html"}


GROUNDS = (
    "[...document.querySelectorAll('.plot .main-svg:first-child')]"
    ".map(s => getComputedStyle(s).backgroundColor.match(/[0-9]+/g).map(Number).slice(0, 3))"
)
TEXTS = ".plot svg :is(.xtick text, .ytick text, [class*=title], .legendtext, .crisp text)"


def grounds(tab):
    return tab.js(GROUNDS)


@pytest.mark.parametrize("name", ["index", "cell"])
def test_figures_are_dark_on_a_dark_page_and_as_they_were_on_a_light_one(pages, tab, name):
    """Also when the reader's system changes, without loading the page again."""
    tab.prefer("light")
    tab.open(pages[name])
    light = tab.js("JSON.stringify([...document.querySelectorAll('.plot')].map(p => p.data))")
    assert grounds(tab) == [WHITE] * (4 if name == "index" else 5)
    on_white = tab.contrasts(TEXTS)
    tab.prefer("dark")
    tab.wait(f"{GROUNDS}.every(g => Math.max(...g) < 64)")
    changed = grounds(tab)
    tab.open(pages[name])
    assert grounds(tab) == changed
    found = tab.contrasts(TEXTS)
    assert len(found) > 40
    assert min(found) >= 4.5
    assert tab.log == []
    tab.prefer("light")
    tab.wait(f"{GROUNDS}.every(g => Math.min(...g) === 255)")
    assert tab.contrasts(TEXTS) == on_white
    again = tab.js("JSON.stringify([...document.querySelectorAll('.plot')].map(p => p.data))")
    assert again == light


def test_scales_start_dark_on_a_dark_page_and_names_stay(pages, tab):
    tab.prefer("dark")
    tab.open(pages["cell"])
    scales = tab.js(
        "[...document.querySelectorAll('.plot')].flatMap(p => p.data).filter(t => 'zmin' in t)"
        ".map(t => [t.zmin < 0, t.colorscale.map(([, colour]) => colour)])"
    )
    (signed, both), (unsigned, one) = scales
    assert (signed, unsigned) == (True, False)
    texts = tab.js(
        "[...document.querySelectorAll('.heatmap-label text')].map(t => getComputedStyle(t).fill)"
    )
    assert set(texts) == {"rgb(255, 255, 255)"}
    assert min(contrast(colour, "#ffffff") for colour in one) >= 4.5
    brightness = [sum(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in (*both, *one)]
    assert brightness[1] < 200 < min(brightness[0], brightness[2])
    assert brightness[3] < 200 < brightness[4]
    named = tab.js("[...document.querySelectorAll('.ytick text')].map(t => t.textContent)")
    assert {"black", "white"} <= set(named)
    tab.prefer("light")


def test_paper_is_light(pages, tab):
    tab.prefer("dark")
    tab.open(pages["cell"])
    tab.js("dispatchEvent(new Event('beforeprint'))")
    assert grounds(tab) == [WHITE] * 5
    widths = tab.js("[...document.querySelectorAll('.main-svg')].map(s => s.clientWidth)")
    assert set(widths) == {660}
    tab.js("dispatchEvent(new Event('afterprint'))")
    assert max(map(max, grounds(tab))) < 64
    assert tab.js("document.querySelector('.main-svg').clientWidth") > 1000
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    tab.send("Emulation.setEmulatedMedia", media="print", features=[dark])
    tab.wait(f"{GROUNDS}.every(g => Math.min(...g) === 255)")
    tab.prefer("light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_the_answer_and_a_figure_fit_into_one_screen(pages, tab, tmp_path, width, scheme):
    tab.prefer(scheme)
    tab.open(pages["index"], width=width)
    tab.shoot(tmp_path / f"index_{width}_{scheme}.png")
    bottom = "document.querySelector('{}').getBoundingClientRect().bottom"
    last = "#glance .answer:last-of-type" if width == 390 else "#glance figure"
    assert tab.js(bottom.format(last)) < 844
    boxes = "[...document.querySelectorAll('.pictures .scroll')]"
    scrolls = "b.scrollHeight > b.clientHeight || b.scrollWidth > b.clientWidth"
    assert not tab.js(f"{boxes}.some(b => {scrolls})")
    assert tab.js(REACHES_OUT) == []
    tab.prefer("light")


# Texts of figures of which a part is not to be seen.
REACHES_OUT = """[...document.querySelectorAll(".plot")].flatMap((plot) => {
  const box = plot.getBoundingClientRect();
  return [...plot.querySelectorAll("svg text")].filter((text) => {
    const own = text.getBoundingClientRect();
    return own.width && (own.left < box.left - 1 || own.right > box.right + 1
      || own.top < box.top - 1 || own.bottom > box.bottom + 1);
  }).map((text) => text.textContent);
})"""


def test_a_title_stands_above_a_figure_where_plotly_would_cut_it(pages, tab):
    for name, width, shown in (("cell", 1400, False), ("cell", 390, True), ("index", 1400, True)):
        tab.open(pages[name], width=width)
        visible = tab.js("document.querySelector('figure .title').checkVisibility()")
        assert visible == shown
        assert tab.js("!!document.querySelector('.plot .gtitle')") != shown
