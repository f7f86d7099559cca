"""The report of a run: an index and a page for each cell, in plain HTML that works offline.

The templates escape everything that comes from models, prompts or files; ``policy`` is the second
defence. Figures are data, drawn by plotly.js in the reader's browser.
"""

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs
from pydantic import BaseModel

from interp_batch.report.components import write_components
from interp_batch.report.data import write_data
from interp_batch.report.findings import (
    OUTSIDE,
    Result,
    compare,
    findings,
    read_folder,
    read_result,
    what_is_wrong,
)
from interp_batch.report.policy import inlined, stylesheet_ids
from interp_batch.report.stills import small_table
from interp_kit.files import write_atomically
from interp_kit.records import GIVES, sentence
from interp_kit.scorecard import METHODS, known_cases, read_scorecard
from interp_kit.scorecard import sentence as known_sentence
from interp_kit.specs import NAME, InputError
from interp_kit.views import read_view

ENDED = {"ok": "ok", "error": "failed", "damaged": "damaged", "not run": "not run"}
NOT_LISTED = ("index.html", "status.json")
SENTENCES, PICTURES, DOUBTS = 3, 4, 5  # that the index opens with, at most


def write_gallery(
    folder: Path,
    *,
    title: str,
    about: str,
    cells: Sequence[Mapping[str, Any]],
    against: Path | None = None,
) -> Path:
    """Write ``folder/index.html``, a page for each cell, and the files of ``data``.

    Returns the path of the index.

    Each cell has ``notebook title model scenario folder``; the rest is read from its folder.
    ``against`` is the output folder of another run, whose values are compared with this run's.
    """
    results = [read_result(cell) for cell in cells]
    ran = [r for r in results if r.state != "not run"]
    pages = _environment(folder)
    write_atomically(folder / "plotly.min.js", get_plotlyjs())
    known = _known(ran)
    pages.globals["known"] = {notebook: known_sentence(row) for notebook, row in known.items()}
    problems = {
        result.id: _write_page(pages, folder, result, run=title, before=before, after=after)
        for before, result, after in zip([None, *ran], ran, [*ran[1:], None])
    }
    pages.globals["written"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    index = folder / "index.html"
    text = pages.get_template("index.html.jinja").render(
        title=title,
        description=about,
        components=write_components(pages, folder, ran, run=title),
        **_index(results, ran, problems),
        **_first_look(ran, problems),
        plotly_styles=stylesheet_ids(),
        scorecard=list({row.method: row for row in known.values()}.values()),
        **_comparison(ran, against),
        **inlined("state.js", "figures.js", "index.js", "pins.js"),
    )
    write_atomically(index, text)
    write_data(folder, title, ran, findings(ran))
    return index


# ------------------------------------------------------------------------------------------ pages
def _index(
    results: Sequence[Result], ran: Sequence[Result], problems: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """What the index shows of this run; ``problems``: cell id -> file -> what is wrong with it."""
    table = findings(sorted(ran, key=lambda r: not r.is_summary))
    beyond = table.reading == OUTSIDE
    return {
        "counts": _counts(results),
        "failed": [r for r in ran if r.state == "error"],
        "damaged": [(r, problem) for r in ran for problem in problems[r.id].items()],
        "summaries": [r for r in ran if r.recorded and r.is_summary],
        "singles": [r for r in ran if r.recorded and r.recorded.answers and not r.is_summary],
        "models": _each(m for r in ran for m in r.models),
        "scenarios": _each(s for r in ran for s in r.scenarios),
        "analyses": _each(r.notebook for r in ran),
        "beyond": _with_results(table.loc[beyond], ran),
        "others": _with_results(table.loc[~beyond], ran),
        "columns": _each(r.scenario for r in results),
        "matrix": _matrix(results),
        "made": _made_with(ran),
        "ran": ran,
    }


def _first_look(ran: Sequence[Result], problems: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What the index opens with: of each notebook one cell, its first answer and its figures.

    Notebooks that put others together come first, with all they have, answer by answer in turn:
    those of a study before the one that compares any models. Of a notebook's cells the first that
    says yes is taken, else the first. ``doubts``: answered no, or cannot tell.
    """
    told = [r for r in ran if r.recorded and r.recorded.answers]
    of_notebook: dict[str, list[Result]] = {}
    for r in sorted(told, key=lambda r: (not r.is_summary, r.notebook.startswith("90"))):
        of_notebook.setdefault(r.notebook, []).append(r)
    chosen = [next((r for r in own if _told(r)[0][1].startswith("yes")), own[0])
              for own in of_notebook.values()]  # fmt: skip
    shown = [r for r in chosen if r.recorded and r.recorded.headline]
    ranked_answers = [
        (pair[0] == GIVES, not r.is_summary, rank, (r, *pair))
        for r in shown or chosen
        for rank, pair in enumerate(_told(r)[: None if r.is_summary else 1])
    ]
    said = [each for *_, each in sorted(ranked_answers, key=lambda ranked: ranked[:3])]
    ranked = [
        (0 if r.is_summary else rank, r, name, how)
        for r in shown
        for rank, (name, how) in enumerate(r.recorded.headline.items() if r.recorded else ())
    ]
    pictures = [
        (r, _figure(file), how)
        for _, r, name, how in sorted(ranked, key=lambda each: each[0])
        for file in [r.folder / "figures" / f"{name}.json"]
        if NAME.fullmatch(name) and file.is_file() and f"figures/{file.name}" not in problems[r.id]
    ]
    doubts = [
        (r, question, answer)
        for r in told
        for question, answer in (r.recorded.answers.items() if r.recorded else ())
        if re.match(r"(no|cannot tell)\b", answer)
    ]
    return {
        "sentences": said[:SENTENCES],
        "pictures": pictures[:PICTURES],
        "doubts": doubts[:DOUBTS],
        "n_doubts": len(doubts),
    }


def _told(result: Result) -> list[tuple[str, str]]:
    """The questions of a cell with their answers; whether the model answers at all comes last."""
    answers = result.recorded.answers if result.recorded else {}
    return sorted(answers.items(), key=lambda pair: pair[0] == GIVES)


def _known(ran: Sequence[Result]) -> dict[str, Any]:
    """By notebook, how its method did on cases whose truth is known; nothing without the table."""
    try:
        by_method = {row.method: row for _, row in known_cases(read_scorecard()).iterrows()}
    except InputError:
        return {}
    return {r.notebook: by_method[METHODS[r.notebook]] for r in ran if r.notebook in METHODS}


def _write_page(
    pages: Environment,
    folder: Path,
    result: Result,
    *,
    run: str,
    before: Result | None,
    after: Result | None,
) -> dict[str, str]:
    """Write the cell's page; returns what is wrong with its files."""
    place = result.folder
    figures, problems = [], dict(result.damaged)
    for file in sorted((place / "figures").glob("*.json")):
        name = f"figures/{file.name}"
        try:
            figures += [_figure(file)] if name not in problems else []
        except (OSError, ValueError) as error:
            problems[name] = what_is_wrong(error)
    listed = sorted(p.name for p in place.iterdir() if p.is_file() and p.name.isprintable())
    status, recorded = result.status, result.recorded
    made = {
        "content key": status.key,
        "seconds": _number(status.seconds),
        "kernel": status.kernel,
        "parameters": _parameters(result),
        **status.made,
        **(recorded.versions if recorded else {}),
    }
    text = pages.get_template("cell.html.jinja").render(
        result=result,
        run=run,
        before=before,
        after=after,
        to_top="../" * len(place.relative_to(folder).parts),
        problems=problems,
        figures=figures,
        headline=recorded.headline if recorded else {},
        files=[(name, quote(name)) for name in listed if name not in NOT_LISTED],
        made=[(name, value) for name, value in made.items() if value],
        plotly_styles=stylesheet_ids(),
        **inlined("figures.js"),
    )
    write_atomically(place / "index.html", text)
    return problems


class _Kind(BaseModel):
    view: str = ""  # of a view (``interp_kit.views``); a figure of plotly has none


class _Figure(BaseModel):
    data: list[dict[str, Any]]
    layout: dict[str, Any] = {}


def _figure(file: Path) -> dict[str, Any]:
    text = file.read_text(encoding="utf-8")
    shown = {"name": file.stem, "href": quote(f"figures/{file.name}"), "html": "", "picture": ""}
    if _Kind.model_validate_json(text).view:
        view = read_view(text)
        return shown | {"title": view.title, "text": view.words(), "html": view.fragment()}
    figure = _Figure.model_validate_json(text)
    title = _title(figure.layout) or file.stem
    axes = {k: _title(v) for k, v in figure.layout.items() if re.match("[xy]axis", k)}
    x_titles, y_titles = ([t for k, t in axes.items() if k[0] == letter] for letter in "xy")
    series = [_plain_text(trace.get("name")) for trace in figure.data]
    parts = [title, *_named("across", x_titles), *_named("up", y_titles), *_named("shown", series)]
    picture = file.with_suffix(".png")
    return shown | {
        "title": title,
        "text": ". ".join(part.rstrip(".") for part in parts) + ".",
        "picture": quote(f"figures/{picture.name}") if picture.is_file() else "",
        "table": [[_plain_text(text) for text in row] for row in small_table(figure.data)],
        "spec": _harmless(text),
    }


def _named(word: str, names: Iterable[str]) -> list[str]:
    return [f"{word.capitalize()}: {', '.join(kept)}"] if (kept := _each(names)) else []


def _title(part: Any) -> str:
    """The title of a figure's layout or axis: a text, or an object that holds one."""
    title = part.get("title") if isinstance(part, dict) else None
    return _plain_text(title.get("text") if isinstance(title, dict) else title)


def _plain_text(text: Any) -> str:
    """Plotly's text, a subset of HTML, as a reader sees it."""
    return html.unescape(re.sub(r"<[^<>]*>", " ", text)).strip() if isinstance(text, str) else ""


def _harmless(text: str) -> str:
    """The same JSON, with escapes for the characters that could end its script element."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _counts(results: Sequence[Result]) -> str:
    states = [r.state for r in results]
    counts = [f"{states.count(s)} {word}" for s, word in ENDED.items() if s in states]
    return f"{len(results)} cells: {', '.join(counts)}."


def _matrix(results: Sequence[Result]) -> list[list[list[Result]]]:
    """Notebook -> model -> results."""
    order = {notebook: i for i, notebook in enumerate(_each(r.notebook for r in results))}
    models = {model: i for i, model in enumerate(_each(r.model for r in results))}
    ordered = sorted(results, key=lambda r: (order[r.notebook], models[r.model]))
    return [
        [list(row) for _, row in groupby(group, key=lambda r: r.model)]
        for _, group in groupby(ordered, key=lambda r: r.notebook)
    ]


def _made_with(ran: Sequence[Result]) -> dict[str, list[str]]:
    made: dict[str, list[str]] = {}
    for r in ran:
        own = {k: v for k, v in r.status.made.items() if k != "date"} | {"kernel": r.status.kernel}
        for name, value in (own | (r.recorded.versions if r.recorded else {})).items():
            if value and value not in made.setdefault(name, []):
                made[name].append(value)
    return {name: values for name, values in made.items() if values}


def _comparison(ran: Sequence[Result], against: Path | None) -> dict[str, Any]:
    if against is None:
        return {"other": ""}
    own, others = {r.id: r for r in ran}, {r.id: r for r in read_folder(against)}
    table = compare(findings(ran), findings(list(others.values())))
    counts = table.verdict.value_counts(sort=False)
    shared = [r for r in ran if r.id in others]
    return {
        "other": against.as_posix(),
        "verdicts": "; ".join(
            [f"{len(table)} values in both", *(f"{verdict}: {n}" for verdict, n in counts.items())]
        ),
        "comparison": _with_results(table, ran),
        "rekeyed": [
            (r, others[r.id].status.key) for r in shared if others[r.id].status.key != r.status.key
        ],
        "only_here": [id for id in own if id not in others],
        "only_there": [id for id in others if id not in own],
    }


def _with_results(table: pd.DataFrame, results: Sequence[Result]) -> list[tuple[Any, Result]]:
    by_id = {r.id: r for r in results}
    return [(row, by_id[id]) for row, id in zip(table.itertuples(), table["id"])]


def _each(names: Iterable[str]) -> list[str]:
    """Every name once, in order, without empty ones."""
    return [name for name in dict.fromkeys(names) if name]


# --------------------------------------------------------------------------------------- templates
def _environment(folder: Path) -> Environment:
    """The templates, which escape every value."""
    pages = Environment(
        loader=PackageLoader("interp_batch.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def page(result: Result) -> str:
        return quote((result.folder.relative_to(folder) / "index.html").as_posix())

    pages.filters |= {
        "page": page,
        "harmless": _harmless,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "sentences": _sentences,
        "parameters": _parameters,
        "ended": _ended,
        "number": _number,
        "plain": lambda value: "" if _missing(value) else repr(float(value)),
        "interval": lambda low, high: "" if _missing(low) else f"[{_number(low)}, {_number(high)}]",
        "yes_no": lambda value: "" if value is None else "yes" if value else "no",
    }
    return pages


def _sentences(result: Result) -> list[str]:
    if result.recorded is None:
        return []
    floor = 0.0 if math.isnan(result.recorded.noise_floor) else result.recorded.noise_floor
    lines = []
    for name, value in result.recorded.values.items():
        given = {k: v for k, v in value.model_dump().items() if k == "value" or not _missing(v)}
        lines.append(sentence(name, given, noise_floor=floor))
    return lines


def _parameters(result: Result) -> str:
    given = {k: v for k, v in result.status.parameters.items() if k != "output"}
    seed = (result.recorded.about if result.recorded else {}).get("seed")
    seeds = {} if seed is None else {"seed": seed}
    return json.dumps(seeds | given, ensure_ascii=False) if seeds | given else ""


def _ended(result: Result) -> str:
    seconds = f" ({result.status.seconds:.0f} s)" if result.status.seconds else ""
    return ENDED.get(result.state, result.state) + seconds


def _number(value: float | None) -> str:
    """Four significant digits; empty where there is no number."""
    if _missing(value):
        return ""
    value = float(value or 0)
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
