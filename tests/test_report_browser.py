"""The report in a real browser: state in the URL, pins, the component map, and use by all readers.

Every text of the run that is built here tries to become markup.
"""

import base64
import json
import re
import zlib
from urllib.parse import urlencode

import pandas as pd
import pytest

from interp_batch.report.gallery import write_gallery
from interp_kit.figures import heatmap
from tests.test_report import EVIL, hostile_figures, write_cell

LAYERS, HEADS = 4, 6
UNITS = [*(f"H{head}" for head in range(HEADS)), "_MLP"]
GRID = pd.DataFrame(
    [
        {"component": f"L{layer}{unit}", "value": (layer - 1.5) * (i - 2), "direction": "noise"}
        for layer in range(LAYERS)
        for i, unit in enumerate(UNITS)
    ]
)
GRID = GRID.assign(low=GRID.value - 1, high=GRID.value + 1, control=2.0, clear=GRID.value > 2)
LARGE = heatmap(  # too many values for a table
    pd.DataFrame({"pos": [*range(30)] * 9, "layer": sorted([*range(9)] * 30), "value": 1.0}),
    x="pos", y="layer", title="large", color_title="nats",
)  # fmt: skip
PAGES = ("index", "components", "cell")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two models and two scenarios, patched; component tables; texts that try to become markup."""
    folder = tmp_path_factory.mktemp("outputs") / "study"
    cells = [
        write_cell(
            folder, "03_activation_patching", model, scenario,
            answers={f"Is it {EVIL}?": f"yes: {EVIL}"}, headline={"lines": "A line.", "bars": ""},
            figures=hostile_figures() | {"large": LARGE},
        )
        for model in ("plain", "other")
        for scenario in ("one", "two")
    ]  # fmt: skip
    for i, cell in enumerate(cells):
        GRID.assign(value=GRID.value * (i + 1)).to_csv(cell["folder"] / "mean.csv", index=False)
        attends = {"prompt": ["p", "p", "q"], "token": [EVIL, "b", "c"], "value": [0.75, 0.25, 1]}
        pd.DataFrame(attends).assign(component="L3H5").to_csv(
            cell["folder"] / "attends.csv", index=False
        )
    write_gallery(folder, title="study", about="What of it?", cells=cells)
    return folder


@pytest.fixture
def page(study):
    places = {name: study / f"{name}.html" for name in ("index", "components")}
    places["cell"] = study / "03_activation_patching" / "plain" / "one" / "index.html"
    return places


def first_pin(tab):
    """Pin the first finding that is to be seen; returns its cell."""
    tab.js("document.querySelector('#findings [data-cell] .pin').click()")
    return tab.js("document.querySelector('#findings [data-cell]').dataset.cell")


def hash_of(tab):
    return tab.js("decodeURIComponent(location.hash.replaceAll('+', ' '))")


# -------------------------------------------------------------------------------- state in the URL
def test_a_link_shows_what_its_sender_saw(page, tab):
    tab.open(page["index"])
    tab.js("document.querySelector('[name=model]').focus()")
    tab.press("ArrowDown")
    tab.js("document.querySelector('[name=text]').focus()")
    tab.send("Input.insertText", text="gap & <b>")
    tab.send("Input.insertText", text="")
    tab.js("document.querySelector('[data-table=others] thead button').click()")
    tab.js("document.querySelector('[data-fold=\"content keys\"]').open = true")
    tab.js("document.querySelector('[data-fold=doubts], [data-fold=versions]').open = true")
    first_pin(tab)
    tab.js("document.querySelector('#pinned input').focus()")
    tab.send("Input.insertText", text="my <i>note</i> & more")
    tab.wait("decodeURIComponent(location.hash).includes('more')")
    sent = tab.js("location.hash")
    seen = """[[...form.elements].map(field => field.value),
      [...document.querySelectorAll('details[data-fold]')].map(fold => fold.open),
      [...document.querySelectorAll('[aria-sort]')].map(header => header.textContent),
      [...document.querySelectorAll('#pinned li a, #pinned li input')].map(e => e.value ?? e.text),
      [...document.querySelectorAll('#findings tbody tr:not([hidden])')].map(r => r.textContent)]"""
    before = tab.js(seen)
    assert before[3] == ["gap", "my <i>note</i> & more"]
    tab.open(page["index"], state=sent[1:])
    assert tab.js(seen) == before
    assert tab.js("document.getElementById('missing').hidden")
    assert tab.log == []


@pytest.mark.parametrize(
    ("name", "field"),
    [("model", "model"), ("scenario", "scenario"), ("pin", "pin"), ("sort", "sorting"),
     ("open", "fold")],
)  # fmt: skip
def test_what_a_link_names_and_is_not_there_is_said_as_text(page, tab, name, field):
    tab.open(page["index"], state=urlencode({name: EVIL, "analysis": "03_activation_patching"}))
    said = tab.js("document.getElementById('missing').innerText")
    assert said.startswith(f"Not in this report: {field} “<script>alert(1)")
    assert tab.js("document.getElementById('missing').children.length") == 0
    chosen = tab.js("document.querySelector('[name=analysis]').value")
    assert chosen == "03_activation_patching"  # the rest holds
    assert not [entry for entry in tab.log if entry.get("type") == "alert"]


def test_a_link_to_a_section_keeps_the_state(page, tab):
    tab.open(page["index"], state="model=plain")
    tab.js("document.querySelector('nav a[href=\"#cells\"]').click()")
    tab.wait("location.hash.startsWith('#model=plain')")
    assert tab.js("scrollY") > 100
    tab.open(page["index"], state="cells")
    assert tab.js("location.hash") == "#cells"


# ------------------------------------------------------------------------------------------- pins
def test_pins_are_saved_and_loaded_with_their_notes(page, tab, tmp_path):
    tab.open(page["index"])
    cell = first_pin(tab)
    tab.js("document.querySelector('#answers dl .pin').click()")
    tab.js("document.querySelector('#pinned input').focus()")
    tab.send("Input.insertText", text="seen")
    tab.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.js("document.querySelector('#pinned > .fields button').click()")
    file = tmp_path / "pins.json"
    tab.wait("true")
    for _ in range(100):
        if file.is_file() and file.stat().st_size:
            break
        tab.wait("new Promise(done => setTimeout(() => done(true), 50))")
    saved = json.loads(file.read_text())
    assert (saved["schema"], saved["run"]) == (1, "study")
    value, answer = saved["pins"]
    assert value == {
        "kind": "value", "cell": cell, "name": "gap", "value": 2, "interval": [1, 3],
        "control": 0.5, "note": "seen",
    }  # fmt: skip
    assert answer["answer"] == f"yes: {EVIL}".replace("\u2028", "\u2028")
    saved["pins"][0] |= {"note": "of a friend", "value": 7.0}
    saved["pins"].append(value | {"name": "gone", "note": ""})
    saved["run"] = "another"
    file.write_text(json.dumps(saved))
    tab.choose_file("#pinned input[type=file]", file)
    tab.wait("document.querySelector('#pinned > [role=status]').textContent")
    said = tab.js("document.querySelector('#pinned > [role=status]').textContent")
    assert said == (
        f"2 of 3 pins loaded. the file is of the run “another”. not in this report: gone of {cell}."
        f" other values in the file: gap of {cell} was 7."
    )
    notes = tab.js("[...document.querySelectorAll('#pinned li input')].map(e => e.value)")
    assert notes == ["seen / of a friend", ""]


def test_the_answers_that_the_page_opens_with_are_pinned_as_in_their_section(page, tab, tmp_path):
    """By keyboard; the state comes back, and a file of such pins is read again."""
    tab.open(page["index"])
    buttons = "[...document.querySelectorAll('#glance .answer .pin')]"
    answers = tab.js("document.querySelectorAll('#glance .answer').length")
    assert tab.js(f"{buttons}.length") == answers > 0
    tab.js(f"{buttons}[0].focus()")
    tab.press("Enter", text="\r")
    tab.wait("location.hash.includes('pin=answer')")
    pressed = "[...document.querySelectorAll('.pin[aria-pressed=true]')]"
    where = f"{pressed}.map(b => b.closest('section[id]').id)"
    assert tab.js(where) == ["glance", "answers"]
    shown = "[...document.querySelectorAll('#pinned li')].map(e => e.textContent)"
    before = tab.js(shown)
    assert len(before) == 1
    assert before[0].startswith(f"Is it {EVIL}?"[:20])
    saved = tab.js("JSON.stringify(asFile())")
    tab.open(page["index"], state=tab.js("location.hash")[1:])
    assert (tab.js(shown), tab.js(where)) == (before, ["glance", "answers"])
    tab.js(f"{buttons}[0].click()")
    assert tab.js(f"{pressed}.length") == 0
    (tmp_path / "pins.json").write_text(saved)
    tab.choose_file("#pinned input[type=file]", tmp_path / "pins.json")
    tab.wait(f"{pressed}.length === 2")
    assert tab.js(shown) == before
    assert tab.log == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", 'bad.json is not used: expected JSON as "Save pins" writes it; '),
        ("[]", "bad.json is not used: expected pins of schema 1, got schema none."),
        ('{"schema": 2}', "bad.json is not used: expected pins of schema 1, got schema 2."),
        ('{"schema": 1, "pins": 3}', "bad.json is not used: expected a list of pins."),
        ('{"schema": 1, "pins": [{"kind": "value"}]}', "pin 1: expected a text as cell."),
        ("null", "expected pins of schema 1, got schema none."),
        ("x" * 1_000_001, "expected at most 1000000 bytes, got 1000001."),
    ],
)
def test_a_file_of_no_pins_says_what_is_wrong(page, tab, tmp_path, content, said):
    tab.open(page["index"])
    first_pin(tab)
    (tmp_path / "bad.json").write_text(content)
    tab.choose_file("#pinned input[type=file]", tmp_path / "bad.json")
    tab.wait("document.querySelector('#pinned > [role=status]').textContent")
    assert said in tab.js("document.querySelector('#pinned > [role=status]').textContent")
    assert tab.js("document.querySelectorAll('#pinned li').length") == 1  # nothing is lost


# ------------------------------------------------------------------------------------------- map
def test_arrow_keys_move_over_the_map_and_enter_pins(page, tab):
    tab.open(page["components"], state="component=L3H0")
    tab.js("document.querySelector('#choose select[name=scenario]').focus()")
    tab.press("Tab")  # the prompt
    tab.press("Tab")
    assert tab.js("document.activeElement.dataset.component") == "L3H0"  # what is selected
    for key, at in (
        ("ArrowLeft", "L3H0"), ("ArrowUp", "L3H0"), ("ArrowRight", "L3H1"), ("ArrowDown", "L2H1"),
        ("End", "L2_MLP"), ("ArrowRight", "L2_MLP"), ("Home", "L2H0"),
    ):  # fmt: skip
        tab.press(key)
        assert tab.js("document.activeElement.dataset.component") == at
        assert tab.js("document.querySelector('#panel h3').firstChild.data.trim()") == at
    tab.press("Enter", text="\r")
    assert tab.js("document.activeElement.ariaSelected") == "true"
    tab.press("ArrowRight")
    assert tab.js("document.querySelector('#pins h3').firstChild.data.trim()") == "L2H0"
    assert "component=L2H1&pin=L2H0" in hash_of(tab)
    tab.press("Tab")  # to the pin of what is selected
    tab.press("Enter", text="\r")
    assert hash_of(tab).endswith("component=L2H1&pin=L2H0&pin=L2H1")
    assert tab.js("document.querySelectorAll('#map [tabindex=\"0\"]').length") == 1


def test_the_map_opens_with_its_strongest_component(page, tab):
    tab.open(page["components"])
    strongest = "L0_MLP"  # of -6 nats
    assert tab.js("document.querySelector('#panel h3').firstChild.data.trim()") == strongest
    assert tab.js("document.querySelector('[aria-current=true]').dataset.component") == strongest
    assert tab.js("document.querySelectorAll('#map [tabindex=\"0\"]').length") == 1
    assert tab.js("location.hash") == ""  # nobody chose it
    assert tab.log == []


def test_a_prompt_is_chosen_for_the_words_and_kept_in_the_url(page, tab):
    tab.open(page["components"], state="component=L3H5&model=other&scenario=two")
    field = "document.querySelector('[name=prompt]')"
    code = "[...document.querySelectorAll('#panel .words code')].map(c => c.textContent)"
    assert tab.js(f"{field}.value") == "other · two · p"  # of the scenario that is shown
    assert tab.js(code) == [EVIL, "b"]
    tab.js(f"{field}.focus()")
    tab.press("ArrowDown")
    assert tab.js(code) == ["c"]
    assert "prompt=other · two · q" in hash_of(tab)
    tab.open(page["components"], state=tab.js("location.hash")[1:])
    assert (tab.js(f"{field}.value"), tab.js(code)) == ("other · two · q", ["c"])


def test_a_panel_shows_every_value_with_interval_control_and_cell(page, tab):
    tab.open(page["components"], state="component=L3H5&model=other")
    lines = tab.js("[...document.querySelectorAll('#panel tbody tr')].map(r => r.innerText)")
    assert len(lines) == 4
    assert re.sub(r"\s+", " ", lines[0]) == (
        "activation patching (noise) other · one 13.5 nats [3.5, 5.5] 2"
    )
    links = tab.js(
        "[...document.querySelectorAll('#panel tbody a')].map(a => a.getAttribute('href'))"
    )
    assert links[0] == "03_activation_patching/other/one/index.html"
    assert tab.js("document.querySelector('#panel .words code').textContent") == EVIL
    ends = tab.js("document.getElementById('ends').innerText")
    assert ends.split() == ["−18", "0", "18", "nats"]
    assert "Dot: clear" in tab.js("document.getElementById('meaning').textContent")
    shown = tab.js("document.querySelector('[data-component=L3H5]').ariaLabel")
    assert shown == "L3H5: 13.5 nats, clear of its control"


def test_pointing_shows_and_leaving_shows_what_is_selected(page, tab):
    tab.open(page["components"], state="component=L0H0")
    where = (
        "(() => {{ const b = document.querySelector('{}').getBoundingClientRect();"
        " return [b.x + 5, b.y + 5]; }})()"
    )
    for selector, shown in (("[data-component=L1H2]", "L1H2"), ("h1", "L0H0")):
        x, y = tab.js(where.format(selector))
        tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        tab.wait(f"document.querySelector('#panel h3').firstChild.data.trim() === '{shown}'")
    x, y = tab.js(where.format("[data-component=L2H2]"))
    for kind in ("mousePressed", "mouseReleased"):
        tab.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert hash_of(tab).endswith("component=L2H2&pin=L2H2")


def test_the_state_of_the_map_comes_back_and_what_is_not_there_is_said(page, tab):
    state = {"model": "other", "scenario": "two", "component": "L1H1"}
    tab.open(page["components"], state=urlencode(state) + "&pin=L0H0&pin=L9H9&prompt=" + "%3Cb%3E")
    chosen = tab.js("['model', 'scenario'].map(n => document.forms.choose.elements[n].value)")
    assert chosen == ["other", "two"]
    titles = tab.js(
        "[...document.querySelectorAll('article h3')].map(h => h.firstChild.data.trim())"
    )
    assert titles == ["L1H1", "L0H0"]
    said = tab.js("document.getElementById('missing').textContent")
    assert said == "Not in this report: prompt “<b>”; component “L9H9”."


def test_a_larger_map_than_the_page_scrolls_in_its_place(tmp_path, tab):
    """32 layers of 32 heads, on a phone."""
    names = [f"L{layer}{u}" for layer in range(32) for u in [*(f"H{h}" for h in range(32)), "_MLP"]]
    table = pd.DataFrame({"component": names, "value": 1.0, "direction": "noise"})
    cell = write_cell(tmp_path, "03_activation_patching", "m", "s")
    table.to_csv(cell["folder"] / "mean.csv", index=False)
    write_gallery(tmp_path, title="t", about="", cells=[cell])
    tab.open(tmp_path / "components.html", width=390)
    assert tab.js("document.querySelectorAll('#map [data-component]').length") == 32 * 33
    assert tab.js("document.documentElement.scrollWidth") <= 390
    assert (tmp_path / "components.html").stat().st_size < 200_000


# -------------------------------------------------------------------------------- without scripts
def test_without_scripts_numbers_and_figures_still_show(page, tab):
    picture = page["cell"].parent / "figures" / "lines.png"
    picture.write_bytes(base64.b64decode(PIXEL))
    cell = {"notebook": "03_activation_patching", "title": "", "model": "plain", "scenario": "one"}
    write_gallery(
        page["index"].parent,
        title="study",
        about="",
        cells=[cell | {"folder": page["cell"].parent}],
    )
    tab.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        for name in PAGES:
            tab.send("Page.navigate", url=page[name].as_uri())
            tab.wait("document.readyState === 'complete'")
            text = tab.js("document.body.innerText")
            assert "undefined" not in text
            if name == "components":
                assert "L3H5" in text
                assert not tab.js("document.getElementById('explorer').checkVisibility()")
                continue
            tab.wait("[...document.images].every(image => image.naturalWidth === 1)")
            assert tab.js("document.images.length") == 1
            assert tab.js("document.querySelectorAll('figure table td').length") > 1
            assert "A browser that runs scripts draws it." in text or name == "index"
    finally:
        tab.send("Emulation.setScriptExecutionDisabled", value=False)
        picture.unlink()


PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJ"
    "RU5ErkJggg=="
)


# ------------------------------------------------------------------------------- for every reader
def colours(png: bytes) -> int:
    """How many different bytes lines hold: 1 or 2 in a blank picture."""
    chunks, at = b"", 8
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        chunks += png[at + 8 : at + 8 + size] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += size + 12
    return len(set(zlib.decompress(chunks)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_shown_and_says_nothing_of_errors(page, tab, tmp_path, name, width, scheme):
    tab.prefer(scheme)
    tab.open(page[name], width=width, state="component=L3H5" if name == "components" else "")
    shot = tab.shoot(tmp_path / f"{name}_{width}_{scheme}.png").read_bytes()
    assert colours(shot) > 50
    assert tab.log == []  # nor any word of the policy
    assert tab.js("document.documentElement.scrollWidth") <= width
    tab.prefer("light")


@pytest.mark.parametrize("name", PAGES)
def test_keys_alone_reach_every_control(page, tab, name):
    tab.open(page[name])
    for fold in ("pinned", "others", "versions"):
        tab.js(f"document.querySelectorAll('[data-fold={fold}]').forEach(e => e.open = true)")
    tab.js("window.reached = new Set(); addEventListener('focusin', e => reached.add(e.target))")
    kinds = "a[href], button, select, input, summary, [tabindex='0']"
    controls = (
        f'[...document.querySelectorAll("{kinds}")]'
        ".filter(e => e.checkVisibility() && e.tabIndex === 0)"
    )
    for _ in range(tab.js(f"{controls}.length") + 10):
        tab.press("Tab")
    missed = tab.js(f"{controls}.filter(e => !reached.has(e)).map(e => e.outerHTML.slice(0, 80))")
    assert missed == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_serious(page, tab, name, scheme):
    tab.prefer(scheme)
    tab.open(page[name], state="component=L3H5&pin=L1H1" if name == "components" else "")
    if name == "index":
        first_pin(tab)
    assert tab.serious_violations() == []
    tab.prefer("light")
