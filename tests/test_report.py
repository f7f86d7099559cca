"""The report: what it says, that it is safe, and that a real browser shows it as meant.

Every text of the run that is built here tries to become markup.
"""

import base64
import hashlib
import html
import json
import math
import re
from itertools import pairwise

import pandas as pd
import pytest
from plotly.offline import get_plotlyjs
from typer.testing import CliRunner

from interp_batch.cli import app
from interp_batch.report.data import MEANING, FindingsFile
from interp_batch.report.findings import compare, findings, read_folder
from interp_batch.report.gallery import write_gallery
from interp_batch.report.pictures import write_pictures
from interp_batch.report.policy import crisp_image_style, stylesheet_ids
from interp_kit.figures import bars, heatmap, token_grid, trajectories
from interp_kit.files import dump_json
from interp_kit.records import named, provenance, record
from interp_kit.scorecard import known_cases, read_scorecard, sentence
from interp_kit.views import coloured_text, side_by_side

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'\u2028&</script><!--"
LAYERS = pd.DataFrame({"layer": [-1, 0, 1], "value": [0.0, 1.0, -2.0], "series": "a"})
LAYERS = LAYERS.assign(low=LAYERS.value - 1, high=LAYERS.value + 1)
ROW = pd.DataFrame({"value": [2.0], "low": [1.0], "high": [3.0], "n": [5]})
VALUES = {
    "gap": named(ROW, unit="nats", control=0.5),
    "held": named(ROW, unit="nats", control=2.5),
    "tiny": named(1e-7, unit="nats"),
    "share": named(1e-7, unit=""),
    "none": named(math.nan, unit="", control=math.nan),
}


def write_cell(
    run, notebook, model, scenario, *, values=VALUES, state="ok", figures=None, answers=None,
    headline=None, **more
):  # fmt: skip
    """A cell's folder as the batch leaves it; returns what the report is given of it."""
    place = run / notebook / re.sub(r"\W+", "-", model) / scenario
    if state == "error":
        place = run / "failed" / place.relative_to(run)
        place.mkdir(parents=True)
    else:
        record(
            place, table=LAYERS, summary=values, figures=figures or {}, noise_floor=1e-6,
            answers=answers, headline=headline, seed=0,
        )  # fmt: skip
        (place / "run.ipynb").write_text("{}")
        digest = hashlib.sha256((place / "summary.json").read_bytes()).hexdigest()
        more = {"files": {"summary.json": digest}} | more
    status = {"state": state, "key": "0" * 20, "seconds": 2.5, "kernel": "python3"}
    status |= {"parameters": {"model": model}, "made": provenance()} | more
    (place / "status.json").write_text(dump_json(status))
    return {
        "notebook": notebook, "title": f"What of {notebook}?", "model": model,
        "scenario": scenario, "folder": place,
    }  # fmt: skip


def hostile_figures():
    tokens = pd.DataFrame({"layer": [0], "rank": [1], "token": [EVIL], "p": [0.5]})
    texts = pd.DataFrame(
        {"model": ["a", EVIL, "c"], "prompt": "p", "text": ["so it is", EVIL, "so it was"]}
    )
    values = [*range(-10, 11), None]  # every colour
    coloured = pd.DataFrame({"row": EVIL, "token": [EVIL, *["a b\n"] * 21], "value": values})
    raw = trajectories(LAYERS, y_title="nats", title="raw")
    raw.update_layout(title=EVIL).update_traces(name=EVIL)  # as if nobody had escaped it
    return {
        "lines": trajectories(LAYERS.assign(series=EVIL), y_title="decision (nats)", title=EVIL),
        "bars": bars(
            pd.DataFrame({"component": [EVIL], "value": [1.0]}), label="component", title=EVIL,
            x_title="nats",
        ),
        "grid": heatmap(
            pd.DataFrame({"pos": [0], "layer": [0], "value": [1.0]}), x="pos", y="layer",
            title=EVIL, color_title="nats", x_labels=[EVIL],
        ),
        "tokens": token_grid(tokens, title=EVIL),
        "texts": side_by_side(texts, row="prompt", column="model", title=EVIL, slider=EVIL),
        "coloured": coloured_text(coloured, row="row", title=EVIL, value_title=EVIL),
        "raw": raw,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two analyses of two models and two scenarios, a summary, a failure, and damaged files."""
    folder = tmp_path_factory.mktemp("outputs") / "study"
    cells = [
        write_cell(
            folder, f"0{i}_analysis", model, scenario,
            values=VALUES | {"gap": named(ROW.assign(value=10.0 * i + j), unit="nats")},
            figures=hostile_figures() if (i, j) == (1, 0) else {},
            answers={f"{model}?": "yes" if i == 1 else "cannot tell, the control does as much"},
            headline={"lines": f"How to read it: {EVIL}", "bars": "", "gone": "it was not drawn"},
        )
        for i in (1, 2)
        for j, (model, scenario) in enumerate([("plain", "one"), (EVIL, "one"), (EVIL, "two")])
    ]  # fmt: skip
    cells += [
        write_cell(
            folder, "91_summary", "all-models", "one", answers={f"Is {EVIL} so?": f"yes {EVIL}"},
            parameters={"models": ["plain", EVIL], "prompt": EVIL},
        ),
        write_cell(
            folder, "03_failing", "plain", "one", state="error", error=f"ValueError: {EVIL}",
            traceback=f"line 1\n{EVIL}",
        ),
        write_cell(folder, "04_damaged", "plain", "one", figures=hostile_figures(), files={}),
        write_cell(folder, "04_damaged", "plain", "two"),
        write_cell(folder, "04_damaged", "plain", "three"),
        {
            "notebook": "05_waiting", "title": "", "model": "plain", "scenario": "one",
            "folder": folder / "05_waiting" / "plain" / "one",
        },
    ]  # fmt: skip
    damaged = folder / "04_damaged" / "plain"
    figures = folder / "01_analysis" / "plain" / "one" / "figures"
    (figures / "lines.png").touch()
    spec = json.loads((figures / "raw.json").read_text())
    (figures / "raw.json").write_text(json.dumps(spec, ensure_ascii=False))  # as others write JSON
    (damaged / "one" / "figures" / "bars.json").write_text('{"data": [')
    (damaged / "one" / "summary.json").write_text('{"values": {"gap": {"value": "<b>much</b>"}}}')
    (damaged / "two" / "status.json").write_text('{"state": "o')
    altered = (damaged / "three" / "summary.json").read_text().replace("2.0", "9.0")
    (damaged / "three" / "summary.json").write_text(altered)
    write_gallery(folder, title="study", about=f"About {EVIL}", cells=cells)
    return folder


def index_of(folder):
    return (folder / "index.html").read_text(encoding="utf-8")


def cell_page(folder):
    return folder / "01_analysis" / "plain" / "one" / "index.html"


# ----------------------------------------------------------------------------------- what it says
def test_what_failed_comes_first_then_answers_then_findings(run):
    text = index_of(run)
    order = ["<h2>Failed", "<h2>Damaged", "<h2>Answers", "<h2>Findings", "<h2>Cells"]
    assert sorted(order, key=text.index) == order
    assert "12 cells: 7 ok, 1 failed, 3 damaged, 1 not run." in text
    assert "ValueError: &lt;script&gt;" in text


def test_the_index_opens_with_answers_and_the_figures_that_notebooks_chose(run, tab):
    """Of each notebook one cell, with its figures; then what was not found."""
    tab.open(run / "index.html")
    first = tab.js("document.querySelector('main > section:not(#failed, #damaged)').id")
    assert first == "glance"
    said = tab.js("[...document.querySelectorAll('.answer')].map(p => p.innerText)")
    assert said[0].startswith("plain? yes")
    drawn = tab.js("document.querySelectorAll('.pictures .plot svg.main-svg').length")
    assert drawn >= 2
    captions = tab.js(
        "[...document.querySelectorAll('.pictures figcaption')].map(c => c.innerText)"
    )
    assert len(captions) == 2
    assert captions[0].startswith(f"How to read it: {EVIL[:20]}")
    doubts = tab.js("[...document.querySelectorAll('#glance li')].map(c => c.innerText)")
    assert len(doubts) == 3
    assert "plain? cannot tell, the control does as much" in doubts[0]


def test_every_answer_reaches_the_index_and_the_page_of_its_cell(run):
    """Of single analyses and of summaries, in full."""
    whole = html.unescape(index_of(run))
    answered = [r for r in read_folder(run) if r.recorded and r.recorded.answers]
    assert {r.notebook for r in answered} == {"01_analysis", "02_analysis", "91_summary"}
    for result in answered:
        page = html.unescape((result.folder / "index.html").read_text(encoding="utf-8"))
        own = whole[whole.index("<h2>Answers") : whole.index("<h2>Findings")]
        own = own[own.index(f'href="{result.id}/index.html"') :].split("</section>")[0]
        assert result.recorded is not None
        for question, said in result.recorded.answers.items():
            for text in (page, own):
                assert f"<dt>{question}</dt><dd>{said}</dd>" in text


def test_beside_every_answer_stands_how_its_method_did_where_the_truth_is_known(tmp_path):
    cells = [
        write_cell(tmp_path, notebook, "m", "s", answers={"Does it?": "yes: it does"})
        for notebook in ("04_cross_model_patching", "13_behaviour")
    ]
    write_gallery(tmp_path, title="study", about="", cells=cells)
    known = known_cases(read_scorecard()).set_index("method", drop=False)
    said = html.escape(sentence(known.loc["cross-model patching"]))
    text = index_of(tmp_path)
    assert f'<a href="#scorecard">On known cases</a>: {said}' in text
    assert text.count("On known cases") == 1  # no method of its own, and nothing is said of it
    table = text[text.index("<h2>Known cases") :].split("</section>")[0]
    assert table.count('<th scope="row">') == 1
    page = (tmp_path / "04_cross_model_patching" / "m" / "s" / "index.html").read_text("utf-8")
    assert f'index.html#scorecard">On known cases</a>: {said}' in page


def test_damaged_files_are_named_and_stop_nothing(run):
    text = html.unescape(index_of(run))
    damaged = text[text.index("<h2>Damaged") : text.index("<h2>Answers")]
    assert "summary.json: values.gap.value: Input should be a valid number" in damaged
    assert "figures/bars.json: Invalid JSON: EOF while parsing a list" in damaged
    assert "status.json: Invalid JSON: EOF while parsing a string" in damaged
    assert "04_damaged/plain/three" in damaged
    assert "summary.json: is not what the run wrote" in damaged
    assert 'data-sort="9.0"' not in text
    page = (run / "04_damaged" / "plain" / "one" / "index.html").read_text()
    assert page.count('class="plot"') == 4
    assert page.count('class="ik-view"') == 2
    assert "<b>much" not in page


def test_every_value_has_its_interval_control_and_noise_floor(run):
    table = findings(read_folder(run)).set_index(["id", "name"]).loc["91_summary/all-models/one"]
    gap = table.loc["gap"]
    assert (gap.value, gap.low, gap.high, gap.n, gap.control) == (2, 1, 3, 5, 0.5)
    assert table.noise_floor.isna().to_dict() == {
        "gap": False, "held": False, "tiny": False, "share": True, "none": True,
    }  # fmt: skip
    assert table.reading.to_dict() == {
        "gap": "control outside the interval",
        "held": "control inside the interval",
        "tiny": "below the noise floor: not interpreted",
        "share": "",  # no rounding error is known in this unit
        "none": "no number",
    }


def test_two_runs_are_compared_by_interval_and_noise_floor(tmp_path):
    def value(at, half=1.0, unit="nats"):
        return named(ROW.assign(value=at, low=at - half, high=at + half), unit=unit)

    point = {"bare": named(1.0, unit="nats"), "gone": named(math.nan, unit="")}
    here = {"same": value(1.0), "noise": value(2.0), "near": value(3.0), "far": value(9.0)}
    there = {"same": value(1.0), "noise": value(2.0 + 5e-7), "near": value(3.5), "far": value(5.0)}
    here |= point | {"unit": value(1.0), "mine": value(0.0)}
    there |= point | {"bare": named(2.0, unit="nats"), "unit": value(1.0, unit="logits")}
    for name, values, key in (("a", here, "k1"), ("b", there, "k2")):
        write_cell(tmp_path / name, "01_x", "m", "s", values=values, key=key)
    write_cell(tmp_path / "b", "01_x", "other", "s")
    a, b = read_folder(tmp_path / "a"), read_folder(tmp_path / "b")
    table = compare(findings(a), findings(b)).set_index("name")
    assert table.verdict.to_dict() == {
        "same": "the same",
        "noise": "within the noise floor",
        "near": "intervals overlap",
        "far": "intervals apart",
        "bare": "differs, no intervals",
        "gone": "no number",
        "unit": "other units",
    }
    assert table.difference["far"] == 4
    assert table.overlap.to_dict() | {"near": True, "far": False, "bare": None} == (
        table.overlap.to_dict()
    )
    assert list(table.beyond_noise[["noise", "near", "gone"]]) == [False, True, None]
    cell = {
        "notebook": "01_x", "title": "", "model": "m", "scenario": "s",
        "folder": tmp_path / "a" / "01_x" / "m" / "s",
    }  # fmt: skip
    write_gallery(tmp_path / "a", title="a", about="", cells=[cell], against=tmp_path / "b")
    text = index_of(tmp_path / "a")
    assert "7 values in both; intervals apart: 1; differs, no intervals: 1; other units: 1" in text
    assert "<code>k1</code>" in text
    assert "(there <code>k2</code>)" in text
    assert "<li>01_x/other/s</li>" in text  # only there


def test_runs_that_share_nothing_are_compared_without_a_table(tmp_path):
    cell = write_cell(tmp_path / "a", "01_x", "m", "s")
    write_cell(tmp_path / "b", "01_x", "other", "s")
    write_gallery(tmp_path / "a", title="a", about="", cells=[cell], against=tmp_path / "b")
    assert "0 values in both<" in index_of(tmp_path / "a")


def test_the_command_rebuilds_and_compares_and_says_where_it_looked(tmp_path):
    def command(*arguments):
        given = ["report", str(file), "--outputs", str(tmp_path), *arguments]
        return CliRunner().invoke(app, given)

    file = tmp_path / "small.yaml"
    file.write_text(
        "{name: small, about: One., models: [tiny-gemma2], scenarios: [CC_continue], "
        "notebooks: {01_logit_lens: {}}}"
    )
    assert "holds no results" in str(command().exception)
    for folder in (tmp_path / "small", tmp_path / "old" / "small"):
        write_cell(folder, "01_logit_lens", "tiny-gemma2", "CC_continue")
    done = command("--against", str(tmp_path / "old"))
    assert done.exit_code == 0, done.output
    assert "5 values in both; no number: 1; the same: 4" in index_of(tmp_path / "small")
    assert command("--against", str(file)).exit_code == 0
    assert command().exit_code == 0
    assert "values in both" not in index_of(tmp_path / "small")
    assert "no results in nowhere/small, nowhere, " in str(
        command("--against", "nowhere").exception
    )


def test_provenance_names_commit_python_and_machine(run):
    made = provenance()
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", made["commit"])
    assert made["date"].endswith("+00:00")
    text = index_of(run)
    assert made["platform"] in html.unescape(text)
    assert "0" * 20 in text
    assert "torch" in text


def test_a_figure_is_told_in_words(run):
    page = html.unescape(cell_page(run).read_text())
    words = f"{EVIL}. Across: layer (-1 = embedding). Up: decision (nats). Shown: {EVIL}."
    assert words in page
    assert 'href="figures/lines.json"' in page
    assert 'href="figures/lines.png"' in page
    assert "figures/bars.png" not in page


def test_a_damaged_figure_does_not_stop_the_pictures_of_others(tmp_path, monkeypatch):
    given = []
    monkeypatch.setenv("BROWSER_PATH", "")  # that it is set again is undone
    monkeypatch.setattr("plotly.io.write_images", lambda figures, files, width: given.extend(files))
    record(tmp_path, table=LAYERS, summary={}, figures=hostile_figures(), noise_floor=0.0)
    (tmp_path / "figures" / "bars.json").write_text('{"data": [')
    assert write_pictures(tmp_path, browser="none") == 4
    drawn = {f"{n}.png" for n in ("lines", "grid", "tokens", "raw")}  # views are text
    assert {file.name for file in given} == drawn


# --------------------------------------------------------------------------------- that it is safe
def inline(page, tag):
    return re.findall(rf"<{tag}(?: id=\"[^\"]*\")?>(.*?)</{tag}>", page, re.DOTALL)


def test_only_known_scripts_and_styles_may_run(run):
    for page in (index_of(run), cell_page(run).read_text()):
        found = re.search(r'Policy" content="([^"]*)"', page)
        assert found is not None
        policy = html.unescape(found[1])
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
        assert "unsafe-inline" not in policy
        assert "unsafe-eval" not in policy
        assert "connect-src" not in policy
        for tag in ("script", "style"):
            texts = inline(page, tag)
            assert texts
            for text in texts:
                digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                assert f"'sha256-{digest}'" in rules[f"{tag}-src"]


def test_plotly_still_sets_the_two_styles_that_the_policy_allows():
    """If a release of plotly fails here, look at how plotly.js sets styles now; see ``policy``."""
    (id,) = stylesheet_ids()
    assert re.search(rf'\.id="{id}",\w+\.textContent=.\.maplibregl-map', get_plotlyjs())
    assert crisp_image_style().startswith("image-rendering: optimizeSpeed; image-rendering: ")
    assert ".STYLE=" in get_plotlyjs().split("CSS_DECLARATIONS=")[1][:500]  # joined as we do it


def test_no_text_of_the_run_becomes_markup_or_leaves_its_script(run):
    for file in run.rglob("index.html"):
        page = file.read_text(encoding="utf-8")
        assert "<script>alert" not in page
        assert page.count("<img") == page.count('<noscript><img src="')  # where a PNG lies
        assert not re.search(r"(?:src|href)=\"(?:https?:)?//", page)
        for spec in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page):
            json.loads(spec)


# ------------------------------------------------------------------------------------- in a browser
def test_pages_load_without_a_word_and_figures_are_drawn(run, tab):
    for file in (run / "index.html", cell_page(run)):
        tab.open(file)
        assert tab.log == []
        assert tab.js("document.querySelectorAll('img, iframe, object, embed').length") == 0
    assert tab.js("document.querySelectorAll('.plot svg.main-svg').length") >= 6
    shown = tab.js("document.querySelector('.plot .gtitle').textContent")
    assert shown.startswith("<script>alert(1)</script><img src=x onerror=alert(2)>")
    assert tab.js("[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
    assert "Share" not in tab.js("document.querySelector('.modebar').outerHTML")  # no upload


def test_what_an_escape_forgot_cannot_run(run, tab):
    for file in (run / "index.html", cell_page(run)):
        page = file.read_text(encoding="utf-8")
        open_page = file.with_name("unescaped.html")
        open_page.write_text(re.sub(r"(<main[^>]*>)", lambda m: m[1] + EVIL, page, count=1))
        tab.open(open_page)
        open_page.unlink()
        assert tab.js("document.querySelectorAll('main > script, main > img').length") == 2
        assert not [entry for entry in tab.log if entry.get("type") == "alert"]
        assert json.dumps(tab.log).count("violates the following Content Security Policy") >= 2


def test_figures_answer_to_the_mouse(run, tab):
    tab.open(cell_page(run))
    point = tab.js(
        "(() => { const p = document.querySelector('.plot .point'); p.scrollIntoView();"
        " const b = p.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=point[0], y=point[1])
    tab.wait("document.querySelector('.plot .hovertext')")


def test_a_slider_shows_one_dose_beside_the_first_column(run, tab):
    tab.open(cell_page(run))
    slider = "document.querySelector('.ik-slider input')"
    heads = (
        f"[...{slider}.closest('.ik-view').querySelectorAll('.ik-head')]"
        ".filter(h => h.checkVisibility()).map(h => h.textContent)"
    )
    assert tab.js(f"{slider}.checkVisibility()")
    assert tab.js(heads)[::2] == ["a"]
    assert tab.js(heads)[1].startswith("<script>alert(1)")
    tab.js(f"{slider}.value = 1; {slider}.dispatchEvent(new Event('input'))")
    assert tab.js(heads) == ["a", "c"]
    assert tab.js(f"{slider}.ariaValueText || {slider}.getAttribute('aria-valuetext')") == "c"
    tab.send("Emulation.setEmulatedMedia", media="print")
    assert len(tab.js(heads)) == 3  # paper has no slider
    tab.send("Emulation.setEmulatedMedia", media="")


def test_arrows_go_from_token_to_token_and_show_its_value(run, tab):
    tab.open(cell_page(run))
    tokens = "[...document.querySelectorAll('.ik-token')]"
    assert tab.js(f"{tokens}.filter(t => t.tabIndex === 0).length") == 1
    tab.js(f"{tokens}[0].focus()")
    tab.press("ArrowDown")
    assert tab.js(f"{tokens}.indexOf(document.activeElement)") == 1
    shown = "getComputedStyle(document.activeElement.querySelector('.ik-value')).clipPath"
    assert tab.js(shown) == "none"


def test_filters_hide_rows_by_keyboard(run, tab):
    tab.open(run / "index.html")
    assert [name for name, *_ in tab.shown_rows()] == ["gap"]  # beyond its control; others folded
    tab.js("document.querySelector('select[name=model]').focus()")
    tab.press("ArrowDown")
    assert tab.js("document.querySelector('select[name=model]').value") == "plain"
    places = [place for *_, place in tab.shown_rows()]
    assert len(places) == 15  # its own, and the summary's, which is about it too
    assert all(place.startswith(("plain ·", "all-models ·")) for place in places)
    tab.press("Tab")  # to the scenario
    tab.press("Tab")  # to the analysis
    tab.press("ArrowDown")
    assert len(tab.shown_rows()) == 5
    tab.press("Tab")
    tab.send("Input.insertText", text="held NATS")
    assert [name for name, *_ in tab.shown_rows()] == ["held"]
    assert tab.js("document.querySelector('#filters output').value") == "1 of 35 findings shown"
    assert not tab.js("document.querySelector('#answers section').checkVisibility()")
    tab.press("Tab")
    tab.press("Enter", text="\r")  # Show all
    tab.wait("document.querySelector('#filters output').value === '35 of 35 findings shown'")
    assert len(tab.shown_rows()) == 35
    tab.js("document.querySelector('select[name=scenario]').focus()")
    tab.press("ArrowDown")
    tab.press("ArrowDown")
    assert {place.split(" · ")[1] for *_, place in tab.shown_rows()} == {"two"}


def test_columns_sort_by_keyboard_with_what_is_missing_last(run, tab):
    tab.open(run / "index.html")
    tab.js("document.querySelector('#findings details').open = true")
    headers = "[...document.querySelectorAll('#findings details th')]"
    header = f"{headers}.find(t => /Value/.test(t.textContent))"
    tab.js(f"{header}.querySelector('button').focus()")
    for state in ("ascending", "descending"):
        tab.press("Enter", text="\r")
        assert tab.js(f"{header}.getAttribute('aria-sort')") == state
        keys = [float(key) if key else None for _, key, _ in tab.shown_rows()][1:]
        numbers = [key for key in keys if key is not None]
        assert keys[len(numbers) :] == [None] * 7
        assert numbers == sorted(numbers, reverse=state == "descending")
        assert max(numbers) == 22.0


def test_a_reader_without_a_mouse_or_with_a_screen_reader_finds_the_way(run, tab):
    for file in (run / "index.html", cell_page(run)):
        tab.open(file)
        tab.press("Tab")
        assert tab.js("document.activeElement.textContent") == "Skip to the content"
        assert tab.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        levels = tab.js("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels))
        assert tab.js("document.documentElement.lang") == "en"
        for landmark in ("header", "main", "nav", "footer"):
            assert tab.js(f"document.querySelectorAll('{landmark}').length") == 1
        assert tab.js("[...document.querySelectorAll('table')].every(t => t.caption)")
        assert tab.js("[...document.querySelectorAll('th')].every(t => t.scope)")
        assert tab.js("[...document.querySelectorAll('input,select')].every(e => e.labels.length)")
        assert tab.js("[...document.querySelectorAll('.plot')].every(p => p.ariaLabel.length > 20)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(run, tab, scheme):
    tab.prefer(scheme)
    for file in (run / "index.html", cell_page(run)):
        tab.open(file)
        found = tab.contrasts()
        assert len(found) > 20
        assert min(found) >= 4.5
        ground = tab.js("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    tab.prefer("light")


def test_a_phone_scrolls_tables_and_figures_not_the_page(run, tab, tmp_path):
    for name, file in (("index", run / "index.html"), ("cell", cell_page(run))):
        tab.open(file, width=390)
        assert tab.js("document.documentElement.scrollWidth") <= 390
        assert tab.js("innerWidth") == 390
        wide = "[...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth)"
        assert tab.js(wide)
        assert tab.shoot(tmp_path / f"{name}_390.png").stat().st_size > 10_000


def test_desktop_and_print_show_everything(run, tab, tmp_path):
    for name, file in (("index", run / "index.html"), ("cell", cell_page(run))):
        tab.open(file)
        assert tab.shoot(tmp_path / f"{name}_1280.png").stat().st_size > 10_000
        printed = base64.b64decode(tab.send("Page.printToPDF", printBackground=True)["data"])
        (tmp_path / f"{name}.pdf").write_bytes(printed)
        assert len(re.findall(rb"/Type\s*/Page\b", printed)) > 0
        tab.send("Emulation.setEmulatedMedia", media="print")
        assert not tab.js("!!document.querySelector('#filters')?.checkVisibility()")
        tab.js("dispatchEvent(new Event('beforeprint'))")
        widths = tab.js("[...document.querySelectorAll('.main-svg')].map(s => s.clientWidth)")
        assert max(widths, default=0) <= 680  # of A4, less its margins
        tab.js("dispatchEvent(new Event('afterprint'))")
        tab.send("Emulation.setEmulatedMedia", media="")


def test_findings_and_tables_are_there_for_other_programs(run):
    read = FindingsFile.model_validate_json((run / "findings.json").read_text(encoding="utf-8"))
    table = findings(read_folder(run))
    numbers = {(f.name, f.value) for f in read.findings if f.value is not None}
    known = table[table.value.notna()]
    assert len(read.findings) == len(table)
    assert numbers == {*zip(known["name"], known["value"])}
    assert f"yes {EVIL}" in [answer.answer for answer in read.answers]
    text = (run / "README.md").read_text(encoding="utf-8")
    columns = pd.read_csv(cell_page(run).parent / "table.csv").columns
    assert "- `table.csv`: " + ", ".join(f"`{c}`" for c in columns) in text
    assert all(f"- `{c}`: " in text for c in set(columns) & set(MEANING))
