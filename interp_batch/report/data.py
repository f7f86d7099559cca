"""What a run found, for other programs: ``findings.json``, and a README of its tables."""

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
from pydantic import BaseModel

from interp_batch.report.findings import Result
from interp_kit.files import dump_json, write_atomically

MEANING = {  # of columns that many tables share; a notebook explains those of its own
    "added": "components that a search added before it pruned",
    "baseline": "decision without the intervention, nats",
    "beyond": "whether the value is beyond its control",
    "change": "decision with the intervention less without it, nats",
    "clear": "whether it is beyond the control and passes a test over prompts",
    "clear_of_control": "whether it is beyond the control and passes a test over prompts",
    "component": "head (L2H3), MLP (L2_MLP) or block of the model",
    "control": "the same quantity where there should be no effect",
    "decision": "log p(positive answer) - log p(negative answer), nats",
    "direction": "direction of the residual stream, or which run was patched into which",
    "effect_size": "mean over prompts, divided by their standard deviation",
    "expected": "middle of what is found where there is no effect",
    "experiment": "which run was patched into which",
    "flipped": "whether the intervention changes the answer",
    "group": "kind of the component",
    "head": "number of the attention head, from 0",
    "high": "upper end: of the 95 % interval or, beside `expected`, of what chance reaches",
    "kl": "Kullback-Leibler divergence, nats a token",
    "layer": "block, from 0; -1: the embedding",
    "low": "lower end: of the 95 % interval or, beside `expected`, of what chance reaches",
    "model": "name of the model",
    "n": "how many prompts or samples the value is the mean of; of a growing set, its size",
    "noise_floor": "size that rounding errors reach, in the unit of the value",
    "p": "probability of such a value, or a larger one, where there is no effect",
    "pair": "source -> target",
    "pos": "position of the token, from 0",
    "prompt": "id of the prompt in its scenario",
    "q": "p, corrected for how many were tested (Benjamini and Hochberg)",
    "recovered_fraction": "change, divided by source less target",
    "scenario": "name of the scenario",
    "segment": "named part of the prompt",
    "strength": "strength of steering, in units of the stream's norm",
    "unit": "unit of the value",
    "value": "what the figure of the table shows; its axis gives the unit",
}


class Finding(BaseModel):
    """One value of one cell. ``low`` to ``high`` is its 95 % interval."""

    id: str
    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = ""
    control: float | None = None
    p: float | None = None
    noise_floor: float | None = None
    reading: str = ""


class Answer(BaseModel):
    """A question that a cell asked, and its answer."""

    id: str
    question: str
    answer: str


class FindingsFile(BaseModel):
    """What ``findings.json`` holds; ``id`` is notebook/model/scenario."""

    schema_version: Literal[1] = 1
    run: str
    answers: list[Answer]
    findings: list[Finding]


def write_data(folder: Path, run: str, results: Sequence[Result], table: pd.DataFrame) -> None:
    """Write ``findings.json`` and ``README.md`` beside the report.

    ``table`` holds the findings of ``results`` (``findings.findings``).
    """
    rows = [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in table.to_dict("records")
    ]
    answers = [
        Answer(id=r.id, question=question, answer=said)
        for r in results
        if r.recorded
        for question, said in r.recorded.answers.items()
    ]
    found = [Finding.model_validate({str(k): v for k, v in row.items()}) for row in rows]
    content = FindingsFile(run=run, answers=answers, findings=found)
    write_atomically(folder / "findings.json", dump_json(content.model_dump()))
    write_atomically(folder / "README.md", "\n".join(_readme(run, results)) + "\n")


# ------------------------------------------------------------------------------------- internals
def _readme(run: str, results: Sequence[Result]) -> Iterator[str]:
    yield f"# Results of {run}\n"
    yield "`index.html` is the report. `findings.json` holds its answers and values, with their"
    yield "intervals and controls. Each cell has a folder, NOTEBOOK/MODEL/SCENARIO:\n"
    yield "- `run.ipynb`: the notebook as it ran; `status.json`: how it ended, from what;"
    yield "- `summary.json`: its values and answers; `figures/*.json`: its figures (plotly);"
    yield "- `table.parquet` and `table.csv`: its main table; further tables as CSV.\n"
    yield "## Tables, by notebook\n"
    used: set[str] = set()
    first = {r.notebook: r for r in reversed(results) if r.recorded}
    for notebook in sorted(first):
        tables = {
            file.name: _columns(file) for file in sorted(first[notebook].folder.glob("*.csv"))
        }
        if tables:
            yield f"### {notebook}\n"
        for name, columns in tables.items():
            yield f"- `{name}`: " + ", ".join(f"`{column}`" for column in columns)
            used |= set(columns)
        yield ""
    yield "## Columns\n"
    yield from (f"- `{column}`: {what}" for column, what in MEANING.items() if column in used)
    yield "\nA column that is not listed is explained in its notebook."


def _columns(file: Path) -> list[str]:
    """The names in the first line, without characters that would end their code span."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [name.replace("`", "'") for name in next(csv.reader(lines), [])]
