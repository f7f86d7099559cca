"""Reads what the cells of a run found, as one table, and compares two runs.

Nothing in a folder can stop a report: a file that cannot be read, or differs from what the batch
wrote, is named in ``Result.damaged`` and not used.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pandas as pd
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from interp_kit.files import altered_files
from interp_kit.records import MEASURED

Kind = TypeVar("Kind", bound=BaseModel)
Number = Annotated[float, BeforeValidator(lambda v: math.nan if v is None else v)]
NAN = math.nan
OUTSIDE = "control outside the interval"
VERDICTS = (  # most telling first
    "intervals apart",
    "differs, no intervals",
    "other units",
    "no number",
    "intervals overlap",
    "within the noise floor",
    "the same",
)
COLUMNS = ["id", "name", "value", "low", "high", "n", "unit", "control", "p", "noise_floor"]


class Value(BaseModel):
    """One value of ``summary.json``; a number that is missing is NaN."""

    model_config = ConfigDict(extra="allow")  # such as ``component``
    value: Number
    low: Number = NAN
    high: Number = NAN
    n: int | None = None
    unit: str = ""
    control: Number = NAN
    p: Number = NAN


class Recorded(BaseModel):
    """``summary.json``, as ``record`` writes it."""

    about: dict[str, Any] = {}
    noise_floor: Number = NAN
    values: dict[str, Value]
    answers: dict[str, str] = {}
    headline: dict[str, str] = {}
    versions: dict[str, str] = {}


class Status(BaseModel):
    """``status.json``, as the batch writes it."""

    state: str
    key: str = ""
    seconds: float = 0.0
    kernel: str = ""
    parameters: dict[str, Any] = {}
    made: dict[str, str] = {}
    files: dict[str, str] = {}
    error: str = ""
    traceback: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One cell of the matrix, as it lies on disk.

    ``state`` is "ok", "error", "damaged" or "not run". ``models`` and ``scenarios`` are all that
    the cell covers. ``recorded`` is ``None`` unless the cell ended well and its summary is whole;
    ``damaged`` maps files to what is wrong with them.
    """

    notebook: str
    title: str
    model: str
    scenario: str
    models: tuple[str, ...]
    scenarios: tuple[str, ...]
    folder: Path
    state: str
    status: Status
    recorded: Recorded | None
    damaged: dict[str, str]

    @property
    def id(self) -> str:
        return f"{self.notebook}/{self.model}/{self.scenario}"

    @property
    def is_summary(self) -> bool:
        """Whether its notebook (90 to 99) puts the others together."""
        return self.notebook.startswith("9") and self.notebook[1:2].isdigit()


def read_result(cell: Mapping[str, Any]) -> Result:
    """The result of a cell, given its ``notebook title model scenario folder``."""
    folder = Path(cell["folder"])
    problems: dict[str, str] = {}
    status = _read(folder / "status.json", Status, problems)
    recorded = None
    if not folder.is_dir():
        state = "not run"
    elif status is None:
        state = "damaged"
        problems.setdefault("status.json", "is missing")
    else:
        recorded = _read(folder / "summary.json", Recorded, problems)
        problems |= altered_files(folder, status.files)
        state = "damaged" if problems and status.state == "ok" else status.state
    if "summary.json" in problems or state not in ("ok", "damaged"):
        recorded = None
    status = status or Status(state=state)
    return Result(
        notebook=cell["notebook"],
        title=cell["title"] or cell["notebook"],
        model=cell["model"],
        scenario=cell["scenario"],
        models=_covered(status, "models", cell["model"]),
        scenarios=_covered(status, "scenarios", cell["scenario"]),
        folder=folder,
        state=state,
        status=status,
        recorded=recorded,
        damaged=problems,
    )


def read_folder(folder: Path) -> list[Result]:
    """Every result in the output folder of a run, whatever the run file says now."""
    return [
        read_result(
            {
                "notebook": place.parts[-3],
                "title": "",
                "model": place.parts[-2],
                "scenario": place.parts[-1],
                "folder": place,
            }
        )
        for place in (file.parent for file in sorted(folder.glob("*/*/*/status.json")))
    ]


def findings(results: Sequence[Result]) -> pd.DataFrame:
    """All summary values: ``id name value low high n unit control p noise_floor reading``.

    ``reading`` compares the value with its noise floor and its interval with the control, in words.
    """
    rows = [
        {"id": r.id, "name": name, "noise_floor": r.recorded.noise_floor}
        | {k: getattr(value, k) for k in ("value", "low", "high", "n", "unit", "control", "p")}
        for r in results
        if r.recorded
        for name, value in r.recorded.values.items()
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["noise_floor"] = table.noise_floor.where(table.unit.isin(MEASURED))
    return table.assign(reading=[_reading(row) for row in table.itertuples()])


def compare(here: pd.DataFrame, there: pd.DataFrame) -> pd.DataFrame:
    """Values that two tables of findings share, and how they differ.

    Columns: ``id name unit``; those of both tables, with the suffixes ``_here`` and ``_there``;
    ``difference`` (here less there); ``noise_floor`` (the larger one; NaN for units without one);
    ``overlap`` (of the intervals) and ``beyond_noise``, which are True, False or, if unknown, None;
    ``verdict``, one of ``VERDICTS``. Rows are in the order of ``VERDICTS``.
    """
    both = here.merge(there, on=["id", "name"], suffixes=("_here", "_there"))
    same_unit = both.unit_here == both.unit_there
    both = both.assign(
        unit=both.unit_here,
        difference=(both.value_here - both.value_there).where(same_unit),
        noise_floor=both[["noise_floor_here", "noise_floor_there"]].max(axis=1),
    )
    both["overlap"] = pd.Series(
        [_overlap(row) if same else None for row, same in zip(both.itertuples(), same_unit)],
        dtype=object,
    )
    both["beyond_noise"] = pd.Series(
        [
            None if math.isnan(d) or math.isnan(floor) else abs(d) > floor
            for d, floor in zip(both.difference, both.noise_floor)
        ],
        dtype=object,
    )
    both = both.assign(verdict=[_verdict(row) for row in both.itertuples()])
    return both.sort_values("verdict", key=lambda v: v.map(VERDICTS.index), kind="stable")


def what_is_wrong(error: OSError | ValueError) -> str:
    """One line on a file that could not be read."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")
    return str(error)


def _read(file: Path, kind: type[Kind], problems: dict[str, str]) -> Kind | None:
    """What the file holds, if it is there; what is wrong with it is added to ``problems``."""
    try:
        return kind.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems[file.name] = what_is_wrong(error)
    return None


def _covered(status: Status, name: str, own: str) -> tuple[str, ...]:
    given = status.parameters.get(name)
    return tuple(map(str, given)) if isinstance(given, list) and given else (own,)


def _reading(row: Any) -> str:
    if math.isnan(row.value):
        return "no number"
    if abs(row.value) < row.noise_floor:
        return "below the noise floor: not interpreted"
    if math.isnan(row.control) or math.isnan(row.low) or math.isnan(row.high):
        return ""
    inside = row.low <= row.control <= row.high
    return "control inside the interval" if inside else OUTSIDE


def _overlap(row: Any) -> bool | None:
    ends = (row.low_here, row.high_here, row.low_there, row.high_there)
    if any(map(math.isnan, ends)):
        return None
    return row.low_here <= row.high_there and row.low_there <= row.high_here


def _verdict(row: Any) -> str:
    if row.unit_here != row.unit_there:
        return "other units"
    if math.isnan(row.difference):
        return "no number"
    if row.difference == 0:
        return "the same"
    if row.beyond_noise is False:
        return "within the noise floor"
    words = {True: "intervals overlap", False: "intervals apart", None: "differs, no intervals"}
    return words[row.overlap]
