"""What a notebook leaves behind: a tidy table, a summary of named values, figures as data."""

import math
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from interp_kit.files import dump_json, write_atomically

PACKAGES = ("interp-kit", "transformer-lens", "torch", "transformers", "peft")
MEASURED = ("nats", "logits")  # units that rounding errors have too
Named = dict[str, Any]
Summary = Mapping[str, Named]


def named(
    value: float | pd.DataFrame, *, unit: str, control: float | None = None, **more: Any
) -> Named:
    """One summary value: a number, or a one-row table of ``mean_interval``, with its unit.

    ``control`` is the same quantity where there should be no effect.
    """
    if isinstance(value, pd.DataFrame):
        row = value[["value", "low", "high", "n"]].iloc[0]
        entry: Named = {k: float(row[k]) for k in ("value", "low", "high")} | {"n": int(row["n"])}
    else:
        entry = {"value": float(value)}
    entry["unit"] = unit
    if control is not None:
        entry["control"] = float(control)
    return entry | more


def sentence(name: str, entry: Named, *, noise_floor: float = 0.0) -> str:
    """``final decision: 2.310 nats [1.902, 2.718], n = 3; control 0.120``.

    A value in nats or logits below the noise floor is shown as such and not interpreted.
    """
    value, unit = entry["value"], entry["unit"]
    number = f"{value:.3f}" if unit in MEASURED or not float(value).is_integer() else f"{value:.0f}"
    which = f" ({entry['component']})" if "component" in entry else ""
    text = f"{name.replace('_', ' ')}{which}: {number} {unit}".rstrip()
    if not math.isnan(entry.get("low", math.nan)):
        text += f" [{entry['low']:.3f}, {entry['high']:.3f}]"
    if "n" in entry:
        text += f", n = {entry['n']}"
    if "control" in entry:
        text += f"; control {entry['control']:.3f}"
    if "p" in entry:
        text += f", p = {entry['p']:.3f}" if entry["p"] >= 0.001 else ", p < 0.001"
    if unit in MEASURED and abs(value) < noise_floor:
        text += f" (below the numerical noise floor of {noise_floor:.1e}: not interpreted)"
    return text


def show(summary: Summary, *, noise_floor: float = 0.0) -> None:
    """Print the summary, a line a value."""
    for name, entry in summary.items():
        print(sentence(name, entry, noise_floor=noise_floor))


def record(
    folder: str | Path,
    *,
    table: pd.DataFrame,
    summary: Summary,
    figures: Mapping[str, go.Figure],
    noise_floor: float,
    tables: Mapping[str, pd.DataFrame] | None = None,
    answers: Mapping[str, str] | None = None,
    **about: Any,
) -> None:
    """Write ``table.parquet``, ``table.csv``, ``summary.json`` and ``figures/*.json``.

    ``tables`` are further tables, written as ``NAME.csv``; ``answers`` (question -> answer) head
    the report's page; ``about`` goes into the summary (model, scenario, seed). An empty ``folder``
    (working interactively) writes nothing.
    """
    if not str(folder):
        return
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / "table.parquet", index=False)
    for name, extra in {"table": table, **(tables or {})}.items():
        extra.to_csv(folder / f"{name}.csv", index=False)
    for name, figure in figures.items():
        write_atomically(folder / "figures" / f"{name}.json", str(figure.to_json()))
    content = {
        "about": about,
        "noise_floor": noise_floor,
        "values": summary,
        "answers": dict(answers or {}),
        "versions": {name: version(name) for name in PACKAGES},
    }
    write_atomically(folder / "summary.json", dump_json(content))


def provenance() -> dict[str, str]:
    """When, from which commit and on what this is made: ``date commit python platform``.

    ``commit`` ends in ``-dirty`` if tracked files differ from it; outside a repository it is empty.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": f"{platform.platform()}, {os.cpu_count()} cores",
    }


@cache
def _commit() -> str:
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed: a repository around it is another project's
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
