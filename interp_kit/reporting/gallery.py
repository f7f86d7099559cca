"""The report of a run: plain HTML that works offline, an index and a page for each cell.

Everything that comes from models, prompts or files is escaped.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import plotly.io
from plotly.offline import get_plotlyjs

from interp_kit.reporting.records import sentence, write_atomically

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff }
h1, h2 { line-height: 1.2 } a { color: #0b5394 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { border: 1px solid #ccc;
       padding: .3rem .6rem; text-align: left; vertical-align: top }
.error { color: #a40000; font-weight: 600 } .scroll { overflow-x: auto }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto }
"""


def write_gallery(
    folder: Path, *, title: str, about: str, cells: Sequence[Mapping[str, Any]]
) -> Path:
    """Write ``folder/index.html`` and a page a cell; returns the index.

    Each cell gives ``notebook title model scenario folder state seconds error``; its figures,
    summary and status are read from its folder.
    """
    write_atomically(folder / "plotly.min.js", get_plotlyjs())
    for cell in cells:
        _write_page(folder, cell)
    failed = [c for c in cells if c["state"] == "error"]
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(about)}</p>"]
    parts.append(f"<p>{len(cells)} cells, {len(failed)} failed.</p>")
    if failed:
        parts.append("<h2>Failed</h2><ul>")
        parts += [
            f"<li>{_link(folder, c, _place(c))}: <span class=error>{escape(c['error'])}</span></li>"
            for c in failed
        ]
        parts.append("</ul>")
    for notebook in dict.fromkeys(c["notebook"] for c in cells):
        parts.append(_section(folder, [c for c in cells if c["notebook"] == notebook]))
    index = folder / "index.html"
    write_atomically(index, _page(title, "\n".join(parts)))
    return index


def _section(folder: Path, cells: Sequence[Mapping[str, Any]]) -> str:
    models = list(dict.fromkeys(c["model"] for c in cells))
    scenarios = list(dict.fromkeys(c["scenario"] for c in cells))
    by_place = {(c["model"], c["scenario"]): c for c in cells}
    head = "".join(f"<th scope=col>{escape(s)}</th>" for s in scenarios)
    rows = []
    for model in models:
        entries = "".join(
            f"<td>{_entry(folder, by_place.get((model, scenario)))}</td>" for scenario in scenarios
        )
        rows.append(f"<tr><th scope=row>{escape(model)}</th>{entries}</tr>")
    return (
        f"<h2>{escape(cells[0]['title'] or cells[0]['notebook'])}</h2>"
        f"<p>{escape(cells[0]['notebook'])}</p><div class=scroll><table>"
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _entry(folder: Path, cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    kind = " class=error" if cell["state"] == "error" else ""
    word = "failed" if cell["state"] == "error" else "ok"
    return f"<span{kind}>{_link(folder, cell, word)}</span>"


def _write_page(folder: Path, cell: Mapping[str, Any]) -> None:
    place = Path(cell["folder"])
    to_top = "../" * len(place.relative_to(folder).parts)
    parts = [
        f'<p><a href="{to_top}index.html">All cells</a></p>',
        f"<h1>{escape(cell['title'] or cell['notebook'])}</h1><p>{escape(_place(cell))}</p>",
    ]
    summary = _read_json(place / "summary.json")
    if cell["state"] == "error":
        parts.append(f"<p class=error>{escape(cell['error'])}</p>")
        parts.append(f"<pre>{escape(_read_json(place / 'status.json').get('traceback', ''))}</pre>")
    if summary:
        floor = summary["noise_floor"] or 0.0
        lines = [
            sentence(name, {k: _number(k, v) for k, v in entry.items()}, noise_floor=floor)
            for name, entry in summary["values"].items()
        ]
        answers = [
            f"{question}{' ' if question.endswith('?') else ': '}{answer}"
            for question, answer in summary.get("answers", {}).items()
        ]
        parts += [f"<p><b>{escape(answer)}</b></p>" for answer in answers]
        parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>")
        parts.append(f"<p>Numerical noise floor: {floor:.1e}</p>")
    for i, file in enumerate(sorted((place / "figures").glob("*.json"))):
        figure = plotly.io.from_json(file.read_text(encoding="utf-8"))
        parts.append(
            plotly.io.to_html(figure, include_plotlyjs=False, full_html=False, div_id=f"figure{i}")
        )
    files = sorted(p.name for p in place.iterdir() if p.is_file() and p.name != "index.html")
    links = [f'<li><a href="{quote(name)}">{escape(name)}</a></li>' for name in files]
    parts.append(f"<h2>Files</h2><ul>{''.join(links)}</ul>")
    script = f'<script src="{to_top}plotly.min.js"></script>'
    write_atomically(place / "index.html", _page(_place(cell), script + "\n".join(parts)))


def _number(name: str, value: Any) -> Any:
    numbers = ("value", "low", "high", "control", "p")
    return float("nan") if value is None and name in numbers else value


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _place(cell: Mapping[str, Any]) -> str:
    return f"{cell['notebook']} · {cell['model']} · {cell['scenario']}"


def _link(folder: Path, cell: Mapping[str, Any], text: str) -> str:
    target = quote((Path(cell["folder"]).relative_to(folder) / "index.html").as_posix())
    return f'<a href="{target}">{escape(text)}</a>'


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>"
    )
