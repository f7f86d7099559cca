"""The component map: what the tables of a run say of each head and MLP, joined for one page.

A map is one value for each component: of one model (or pair of models), in one scenario, by one
experiment. ``SOURCES`` names the tables that hold such values, ``WORDS`` those that say what a
component attends to and what its output reads.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment

from interp_batch.report.findings import Result, what_is_wrong
from interp_batch.report.policy import inlined
from interp_kit.files import write_atomically
from interp_kit.statistics import mean_interval

# At most three digits: a table that is not ours cannot ask for a grid of a million rows.
COMPONENT = re.compile(r"L(\d{1,3})(?:(H\d{1,3})|_(ATTN|MLP))")
NUMBERS = ("low", "high", "control")
LIMIT = 700_000  # characters of the data in the page
DETAILED = 40  # components of a map with interval and control, where all do not fit
STRONGEST = 3  # of each map, in the table that needs no script
LISTED = 150  # rows of that table, at most


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the cells of a notebook keep a value for each component.

    ``model``, ``scenario`` and ``by`` are columns that tell maps apart; empty: one for the cell.
    ``raw`` tables hold a row for each prompt, of which the mean and its interval are taken.
    """

    notebook: str
    file: str
    experiment: str
    meaning: str  # of a value above zero
    unit: str = "nats"
    value: str = "value"
    model: str = ""
    scenario: str = ""
    by: str = ""
    only: tuple[str, str] | None = None  # column and the text that it has
    raw: bool = False
    numbers: tuple[str, ...] = NUMBERS


@dataclass(frozen=True, kw_only=True)
class Map:
    """``table``: ``component value low high control clear``, each component once."""

    model: str
    scenario: str
    experiment: str
    meaning: str
    unit: str
    result: Result
    table: pd.DataFrame


WRITES = "writes towards the positive answer"
MOVES = "moves the decision towards the positive answer"
ATTRIBUTION, PATCHING = "02_direct_logit_attribution", "03_activation_patching"
CROSS, CIRCUITS, TRACING = "04_cross_model_patching", "05_circuits", "06_causal_tracing"
SOURCES = (
    Source(
        notebook=ATTRIBUTION, file="mean.csv", experiment="direct logit attribution",
        meaning=WRITES, numbers=("low", "high"),  # its control is that of the contrast
    ),
    Source(
        notebook=ATTRIBUTION, file="mean.csv", experiment="attribution less the counterfactual's",
        meaning=WRITES, value="contrast", numbers=("control",),
    ),
    Source(
        notebook=PATCHING, file="mean.csv", experiment="activation patching", by="direction",
        meaning=MOVES,
    ),
    Source(
        notebook=CROSS, file="effects.csv", experiment="cross-model patching", model="experiment",
        meaning=MOVES,
    ),
    Source(
        notebook=CROSS, file="table.csv", experiment="cross-model patching", model="experiment",
        scenario="scenario", value="change", raw=True, meaning=MOVES,
    ),
    Source(
        notebook=CROSS, file="own_weights.csv", experiment="patching of a component's own weights",
        model="experiment", only=("kind", "own weights"), meaning=MOVES, numbers=("low", "high"),
    ),
    Source(
        notebook=CIRCUITS, file="table.csv", experiment="member of the circuit", model="pair",
        unit="", meaning="is a member", numbers=(),
    ),
    Source(
        notebook=TRACING, file="table.csv", experiment="causal tracing", by="direction",
        value="recovered_fraction", unit="of the effect", raw=True,
        meaning="brings back the decision of the source",
    ),
    Source(
        notebook="90_compare_models", file="components.csv", experiment="direct logit attribution",
        model="model", meaning=WRITES, numbers=("low", "high"),
    ),
)  # fmt: skip
# Notebook, file, and what its column ``says`` of the component; the file names ``prompt component
# token value`` and, if it says several things, ``says``.
WORDS = ((ATTRIBUTION, "promotes.csv", ""), (PATCHING, "attends.csv", "attends to"))


def write_components(
    pages: Environment, folder: Path, results: Sequence[Result], *, run: str
) -> bool:
    """Write ``components.html`` where tables of the results name components; returns whether."""
    maps, words, problems = component_maps(results)
    file = folder / "components.html"
    if not maps and not problems:
        file.unlink(missing_ok=True)  # of an earlier report
        return False
    links = {r.id: pages.filters["page"](r) for r in results}
    data, left_out, all_said = as_json(maps, words, links)
    text = pages.get_template("components.html.jinja").render(
        run=run,
        maps=len(maps),
        left_out=left_out,
        all_said=all_said,
        strongest=strongest(maps),
        problems=problems,
        data=data,
        **inlined("state.js", *(["components.js"] if maps else [])),
    )
    write_atomically(file, text)
    return True


def component_maps(
    results: Iterable[Result],
) -> tuple[list[Map], list[dict[str, Any]], list[tuple[Result, str, str]]]:
    """The maps, the words, and of tables that cannot be used (result, file, what is wrong)."""
    maps: list[Map] = []
    words: list[dict[str, Any]] = []
    problems: list[tuple[Result, str, str]] = []
    for result in results:
        if result.recorded is None:
            continue
        for source in (s for s in SOURCES if s.notebook == result.notebook):
            try:
                maps += _maps(source, result)
            except (OSError, ValueError) as error:
                problems.append((result, source.file, what_is_wrong(error)))
        for notebook, file, says in WORDS:
            try:
                words += _words(result, file, says) if notebook == result.notebook else []
            except (OSError, ValueError) as error:
                problems.append((result, file, what_is_wrong(error)))
    return maps, words, list({(r.id, file): (r, file, why) for r, file, why in problems}.values())


def strongest(maps: Sequence[Map]) -> list[tuple[Map, Any]]:
    """Of every map the components with the largest values: the map and a row of its table."""
    rows = [
        (own, row)
        for own in maps
        for row in own.table.sort_values("value", key=abs, ascending=False)
        .head(STRONGEST)
        .itertuples()
    ]
    return rows[:LISTED]


def as_json(
    maps: Sequence[Map], words: Sequence[dict[str, Any]], pages: Mapping[str, str]
) -> tuple[str, int, bool]:
    """The page's data, how many maps it leaves out, and whether it has the words of all prompts.

    The data are ``units cells words maps``; ``pages`` are links by cell id. A map's ``values`` are
    in the order layer by layer, unit by unit of ``units``, None where there is no value;
    ``details`` gives ``[low, high, control]`` at the same index, ``clear`` the indices of values
    that are clear of their control. Where not all fit into ``LIMIT``, words are those of each
    cell's first prompt; then only the strongest components have details; then the last maps are
    left out.
    """
    units = _units(maps)
    ids = dict.fromkeys([*(own.result.id for own in maps), *(word["cell"] for word in words)])
    cells = {id: i for i, id in enumerate(ids)}
    listed = [[id, pages[id]] for id in cells]
    said = [word | {"cell": cells[word["cell"]]} for word in words]
    few = list({(word["cell"], word["says"]): word for word in reversed(said)}.values())[::-1]
    for shown, detailed in ((said, None), (few, None), (few, DETAILED)):
        packed = [_packed(own, units, cells[own.result.id], detailed) for own in maps]
        text = _dump({"units": units, "cells": listed, "words": shown, "maps": packed})
        if len(text) <= LIMIT:
            return text, 0, len(shown) == len(said)
    fits = max(1, int(len(packed) * LIMIT / len(text)))
    data = {"units": units, "cells": listed, "words": few, "maps": packed[:fits]}
    return _dump(data), len(packed) - fits, len(few) == len(said)


# ------------------------------------------------------------------------------------- internals
def _maps(source: Source, result: Result) -> Iterator[Map]:
    file = result.folder / source.file
    if not file.is_file() or source.file in result.damaged:
        return  # an older run, or one of no such table; damage is named elsewhere
    keys = [key for key in (source.model, source.scenario, source.by) if key]
    required = {*keys, "component", source.value}
    required |= {source.only[0]} if source.only else set()
    table = _read(file, required | ({"prompt"} if source.raw else set()))
    if source.only:
        table = pd.DataFrame(table[table[source.only[0]] == source.only[1]])
    table = table.assign(**{source.value: pd.to_numeric(table[source.value])})
    if source.raw:
        if table.duplicated([*keys, "component", "prompt"]).any():
            return  # patched at several positions, whose mean says nothing
        table = mean_interval(table, [*keys, "component"], column=source.value)
    else:
        table = table.assign(value=table[source.value])
    numbers = {
        name: pd.to_numeric(table[name]) if name in source.numbers and name in table else None
        for name in NUMBERS
    }
    clear = (
        table["clear"].astype(str).eq("True")
        if "clear" in table and "control" in source.numbers
        else False
    )
    table = table.assign(**numbers, clear=clear).dropna(subset="value")
    if len(table):
        yield from _apart(source, result, table, keys)


def _apart(
    source: Source, result: Result, table: pd.DataFrame, keys: Sequence[str]
) -> Iterator[Map]:
    strongest_first = table.sort_values("value", key=abs, ascending=False, kind="stable")
    once = strongest_first.drop_duplicates([*keys, "component"])  # of several segments
    groups: Any = once.sort_index().groupby(list(keys), sort=False) if keys else [((), once)]
    for names, own in groups:
        given = dict(zip(keys, map(str, names)))
        which = f" ({given[source.by]})" if source.by else ""
        yield Map(
            model=given.get(source.model, result.model),
            scenario=given.get(source.scenario, result.scenario),
            experiment=source.experiment + which,
            meaning=source.meaning,
            unit=source.unit,
            result=result,
            table=own.loc[:, ["component", "value", *NUMBERS, "clear"]],
        )


def _words(result: Result, name: str, says: str) -> list[dict[str, Any]]:
    file = result.folder / name
    if not file.is_file() or name in result.damaged:
        return []
    required = {"prompt", "component", "token", "value"} | (set() if says else {"says"})
    table = _read(file, required)
    table = table.assign(value=pd.to_numeric(table["value"]), says=says or table.get("says"))
    groups: Any = table.dropna(subset="value").groupby(["prompt", "says"], sort=False)
    return [
        {
            "model": result.model,
            "scenario": result.scenario,
            "prompt": f"{result.model} · {result.scenario} · {prompt}",
            "says": str(what),
            "cell": result.id,
            "tokens": {
                str(component): [[str(t), _short(v)] for t, v in zip(of.token, of.value)]
                for component, of in own.groupby("component", sort=False)
            },
        }
        for (prompt, what), own in groups
    ]


def _read(file: Path, required: set[str]) -> pd.DataFrame:
    """The rows of heads, attentions and MLPs."""
    # A token such as "NA" or an empty one is a text, not a number that is missing.
    numbers = {*NUMBERS, *(source.value for source in SOURCES)}
    empty = {name: [""] for name in numbers}
    table = pd.read_csv(file, keep_default_na=False, na_values=empty, low_memory=False)
    if "site" in table and "layer" in table:  # a trace names whole sites: attn_out, mlp_out, block
        units = table.site.map({"attn_out": "ATTN", "mlp_out": "MLP"})
        table = table.assign(component="L" + table.layer.astype(str) + "_" + units)
    if missing := sorted(required - set(table.columns)):
        raise ValueError(f"expected the columns {', '.join(missing)}; got {', '.join(table)}")
    return pd.DataFrame(table[table.component.astype(str).str.fullmatch(COMPONENT)])


def _units(maps: Sequence[Map]) -> list[str]:
    """``H0``, ``H1``, ..., ``ATTN``, ``MLP``: those that there are."""
    found = {_place(name)[1] for own in maps for name in own.table.component}
    return sorted(found, key=lambda unit: (unit[0] != "H", int(unit[1:]) if unit[0] == "H" else 0))


def _place(component: str) -> tuple[int, str]:
    found = COMPONENT.fullmatch(component)
    assert found is not None, component
    return int(found[1]), found[2] or found[3]


def _packed(own: Map, units: Sequence[str], cell: int, detailed: int | None) -> dict[str, Any]:
    column = {unit: i for i, unit in enumerate(units)}
    places = [_place(name) for name in own.table.component]
    at = [layer * len(units) + column[unit] for layer, unit in places]
    values: list[float | None] = [None] * ((max(at, default=-1)) + 1)
    for i, value in zip(at, own.table.value):
        values[i] = _short(value)
    detailed = len(at) if detailed is None else detailed
    order = own.table.assign(at=at).sort_values("value", key=abs, ascending=False)
    rows: Any = order.head(detailed).itertuples()
    details = {
        row.at: [_short(number) for number in (row.low, row.high, row.control)] for row in rows
    }
    return {
        "model": own.model,
        "scenario": own.scenario,
        "experiment": own.experiment,
        "meaning": own.meaning,
        "unit": own.unit,
        "cell": cell,
        "values": values,
        "details": {i: own for i, own in details.items() if own != [None] * 3},
        "clear": [i for i, clear in zip(at, own.table.clear) if clear],
    }


def _short(value: Any) -> float | int | None:
    """Four significant digits; None where there is no number."""
    if value is None or not pd.notna(value) or abs(value) == float("inf"):
        return None
    value = float(f"{value:.4g}")
    return int(value) if value.is_integer() else value


def _dump(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
