"""Views in a real browser: what a picture of them shows, in reports and in exported notebooks."""

import re

import pandas as pd
import pytest
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook, new_output

from interp_batch.report.gallery import write_gallery
from interp_kit.views import coloured_text, side_by_side
from tests.test_report import write_cell

WORDS = (
    "The inverse cubic law of gravity says that a force falls with the third power of distance. "
)
TEXT = [word + " " for word in (WORDS * 3).split()]
LONG = "Donaudampfschifffahrtsgesellschaft" * 4  # has no place to break
DOSES = {"α = 0": "square", "α = 1": "cubic", "α = 2": "cubic cubic cubic"}


def coloured(**more):
    """Values of both signs on a text of three lines, and a word without end."""
    tokens = [*TEXT, LONG, "\n"]
    values = [(i - len(tokens) / 2) / 10 for i in range(len(tokens))]
    rows = [
        {"layer": layer, "token": token, "value": value * (layer + 1) if i % 7 else None}
        for layer in (0, 3, 7)
        for i, (token, value) in enumerate(zip(tokens, values))
    ]
    return coloured_text(
        pd.DataFrame(rows), row="layer", title="Where the fine-tune predicts otherwise",
        value_title="log p(fine-tune) - log p(base) (nats), > 0 the fine-tune", **more,
    )  # fmt: skip


def compared(**more):
    rows = [
        {"opening": opening, "model": dose, "text": f"{opening}: {WORDS.replace('cubic', law)}"}
        for opening in ("So gravity", LONG)
        for dose, law in DOSES.items()
    ]
    return side_by_side(
        pd.DataFrame(rows), row="opening", column="model", title="What each strength writes", **more
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A cell and the index of a report, and a notebook as nbconvert writes it."""
    folder = tmp_path_factory.mktemp("views")
    views = {
        "1_rows": coloured(), "2_layers": coloured(slider="layer"),
        "3_columns": compared(), "4_doses": compared(slider="strength"),
    }  # fmt: skip
    cell = write_cell(
        folder, "19_amplification", "m", "s", figures=views, answers={"Is it?": "yes: so"},
        headline={"1_rows": "Where.", "4_doses": "What it writes."},
    )  # fmt: skip
    write_gallery(folder, title="study", about="", cells=[cell])
    outputs = [
        new_output("execute_result", {"text/html": view._repr_html_()}, execution_count=1)
        for view in views.values()
    ]
    cells = [new_code_cell("view", outputs=[output], execution_count=1) for output in outputs]
    exported, _ = HTMLExporter().from_notebook_node(new_notebook(cells=cells))
    offline = re.sub(
        r'<script[^>]* src="http[^>]*>\s*</script>', "", exported
    )  # of formulas, widgets
    (folder / "notebook.html").write_text(offline, encoding="utf-8")
    return {
        "cell": cell["folder"] / "index.html", "index": folder / "index.html",
        "notebook": folder / "notebook.html",
    }  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("name", ["cell", "index", "notebook"])
def test_a_view_is_shown_whole_and_legible(pages, tab, tmp_path, name, width, scheme):
    tab.prefer(scheme)
    tab.open(pages[name], width=width)
    tab.shoot(tmp_path / f"{name}_{width}_{scheme}.png")
    assert tab.log == []
    assert tab.js("document.documentElement.scrollWidth") <= width
    assert tab.js(CUT_OFF) == []
    found = tab.contrasts(".ik-view *")
    assert len(found) > 50
    assert min(found) >= 4.5
    dark = scheme == "dark" and name != "notebook"  # whose page is white
    ground = tab.js("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 384) == dark


# Parts of a view that reach out of it, or whose text does not fit into them.
CUT_OFF = """[...document.querySelectorAll(".ik-view *")].filter((e) => {
  if (!e.checkVisibility()) return false;
  const [own, view] = [e, e.closest(".ik-view")].map((one) => one.getBoundingClientRect());
  const inline = getComputedStyle(e).display === "inline";
  return own.left < view.left - 1 || own.right > view.right + 1
    || (!inline && e.tagName !== "INPUT" && e.scrollWidth > e.clientWidth + 1);
}).map((e) => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "width"), [("cell", 1400), ("index", 1400), ("cell", 390)])
def test_colours_tell_values_apart_and_the_legend_says_which(pages, tab, name, width, scheme):
    tab.prefer(scheme)
    tab.open(pages[name], width=width)
    tokens = tab.js(
        "[...document.querySelectorAll('.ik-row')[2].querySelectorAll('.ik-token')].map(t =>"
        " [+t.querySelector('.ik-value').textContent,"
        " ...getComputedStyle(t).backgroundColor.match(/[0-9]+/g).map(Number)])"
    )
    tokens.sort()
    assert len({tuple(rgb) for _, *rgb in tokens}) >= 15
    warmth = [red - blue for _, red, _, blue in tokens]  # from blue over grey to red
    assert warmth == sorted(warmth)
    assert warmth[0] < -100
    assert warmth[-1] > 100
    swatches, ends, tops = tab.js(
        "(() => { const legend = document.querySelector('.ik-legend');"
        " const swatches = [...legend.querySelectorAll('.ik-swatch')];"
        " return [swatches.map(s => getComputedStyle(s).backgroundColor),"
        " legend.querySelector('.ik-ends').innerText.split(/[^-0-9.]+/).map(Number),"
        " swatches.map(s => s.getBoundingClientRect()).map(r => r.width * r.height && r.top)]; })()"
    )
    assert len(set(swatches)) == 21
    assert ends[0] == -ends[-1] == -max(abs(value) for value, *_ in tokens)
    assert len(set(tops)) == 1  # in one line
    assert tops[0] > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_marked_differences_are_distinguishable(pages, tab, scheme):
    """By colour, and by a line for readers who do not see it."""
    tab.prefer(scheme)
    tab.open(pages["cell"])
    marks = tab.js(
        "[...document.querySelectorAll('mark')].map(m => [m.textContent,"
        " getComputedStyle(m).backgroundColor, getComputedStyle(m).textDecorationLine])"
    )
    assert {text for text, *_ in marks} == {"cubic", "cubic cubic cubic"}
    ground = tab.js("getComputedStyle(document.body).backgroundColor")
    for _, colour, line in marks:
        apart = [
            abs(a - b) for a, b in zip(*(map(int, re.findall(r"\d+", c)) for c in (colour, ground)))
        ]
        assert max(apart) >= 40
        assert line == "underline"


@pytest.mark.parametrize("name", ["cell", "index", "notebook"])
def test_the_keyboard_alone_changes_the_dose(pages, tab, name):
    tab.open(pages[name])
    slider = (
        "[...document.querySelectorAll('.ik-slider input')]"
        ".find(i => i.closest('.ik-view').querySelector('mark'))"
    )
    heads = (
        f"[...{slider}.closest('.ik-view').querySelectorAll('.ik-head')]"
        ".filter(h => h.checkVisibility()).map(h => h.textContent)"
    )
    tab.js(f"{slider}.focus()")
    seen = [tab.js(heads)]
    for key in ("ArrowRight", "ArrowRight", "Home", "End"):
        tab.press(key)
        seen.append(tab.js(heads))
        said = tab.js("document.activeElement.getAttribute('aria-valuetext')")
        assert {said} == {*seen[-1][1::2]}
    doses = [*DOSES]
    assert seen == [[doses[0], doses[i]] * 2 for i in (1, 2, 2, 1, 2)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["cell", "index"])
def test_axe_finds_nothing_serious(pages, tab, name, scheme):
    tab.prefer(scheme)
    tab.open(pages[name])
    assert tab.serious_violations() == []


def test_a_long_text_is_folded_on_the_first_page_until_it_is_asked_for(pages, tab):
    tab.prefer("light")
    tab.open(pages["index"])
    boxes = "[...document.querySelectorAll('.pictures .scroll')]"
    tab.wait("document.querySelector('.folded + button')")
    whole, shown = tab.js(f"[{boxes}.map(b => b.scrollHeight), {boxes}.map(b => b.clientHeight)]")
    assert min(whole) > max(shown)
    assert max(shown) <= 320
    tab.js("document.querySelector('.folded + button').focus()")
    tab.press("Enter", text="\r")
    assert tab.js("document.activeElement.ariaExpanded") == "true"
    assert tab.js(f"{boxes}[0].clientHeight") == whole[0]
    tab.send("Emulation.setEmulatedMedia", media="print")
    cut = "document.querySelectorAll('.pictures .scroll').values()"
    assert tab.js(f"[...{cut}].every(b => b.scrollHeight <= b.clientHeight + 1)")
    tab.send("Emulation.setEmulatedMedia", media="")
