"""What a notebook records: a tidy table, a summary of named values, answers, figures as data."""

import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from interp_kit.files import dump_json, write_atomically
from interp_kit.views import View

PACKAGES = ("interp-kit", "transformer-lens", "torch", "transformers", "peft")
MEASURED = ("nats", "logits")  # rounding errors have these units
CANNOT_TELL = "cannot tell"
GIVES = "Does the model give one of the two answers at all?"  # which comes before any other
VERDICT = re.compile(rf"(yes|no|{CANNOT_TELL})\b")
OPEN_QUESTION = re.compile(r"(how|what|when|where|which|who|why)\b", re.IGNORECASE)
Named = dict[str, Any]
Summary = Mapping[str, Named]


def named(
    value: SupportsFloat | pd.DataFrame,
    *,
    unit: str,
    control: SupportsFloat | None = None,
    **more: Any,
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
    return f"{_label(name, entry)}: {_measurement(entry, noise_floor)}"


def answer(
    verdict: bool | np.bool_ | str | None,
    summary: Summary,
    *names: str,
    because: str = "",
    noise_floor: float = 0.0,
) -> str:
    """One sentence that answers a question, with the summary values ``names`` it stands on.

    ``yes: final decision 2.310 nats [1.902, 2.718], n = 3; control 0.120``. ``verdict`` is "yes",
    "no" or "cannot tell" (or True, False, None), or another label where the question asks for one
    (see ``show``). ``because`` follows the verdict: ``no, the controls do as much: ...``. Raises
    ``ValueError`` where neither a value nor a reason is given, and for an unknown name.
    """
    if unknown := [name for name in names if name not in summary]:
        raise ValueError(f"expected names of summary values ({', '.join(summary)}), got {unknown}")
    numbers = "; ".join(
        f"{_label(name, summary[name])} {_measurement(summary[name], noise_floor)}"
        for name in names
    )
    reasons = [reason for reason in (because, numbers) if reason]
    if not reasons:
        raise ValueError("an answer needs a reason: name a summary value, or give `because`")
    word = verdict if isinstance(verdict, str) else CANNOT_TELL if verdict is None else None
    word = word or ("yes" if verdict else "no")
    return f"{', '.join([word, *reasons[:-1]])}: {reasons[-1]}"


def show(
    summary: Summary,
    *,
    answers: Mapping[str, str] | None = None,
    noise_floor: float = 0.0,
) -> None:
    """Print the summary, one value a line, then the answers (question -> answer).

    An answer begins with yes, no or cannot tell. Where the question begins with how, what, when,
    where, which, who or why, it may begin with any other word, such as "strong". Raises
    ``ValueError`` for any other answer.
    """
    for name, entry in summary.items():
        print(sentence(name, entry, noise_floor=noise_floor))
    for question, said in _checked(answers).items():
        print(f"{question} {said}")


def record(
    folder: str | Path,
    *,
    table: pd.DataFrame,
    summary: Summary,
    figures: Mapping[str, go.Figure | View],
    noise_floor: float,
    tables: Mapping[str, pd.DataFrame] | None = None,
    answers: Mapping[str, str] | None = None,
    headline: Mapping[str, str] | None = None,
    **about: Any,
) -> None:
    """Write ``table.parquet``, ``table.csv``, ``summary.json`` and ``figures/*.json``.

    Figures are plotly's, or views (``interp_kit.views``), which are text.
    ``tables`` are further tables, written as ``NAME.csv``; ``answers`` (question -> answer, as
    ``show`` checks them) head the report; ``headline`` (figure -> how to read it) names the figures
    that show them, of those that there are; ``about`` goes into the summary (model, seed).
    An empty ``folder`` (working interactively) writes nothing.
    """
    answered = dict(_checked(answers))
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
        "answers": answered,
        "headline": {name: how for name, how in (headline or {}).items() if name in figures},
        "versions": {name: version(name) for name in PACKAGES},
    }
    write_atomically(folder / "summary.json", dump_json(content))


def provenance() -> dict[str, str]:
    """When, from what and where a result is made: ``date interp-kit commit python platform``.

    ``commit`` ends in ``-dirty`` if tracked files differ from it; outside a repository it is empty.
    """
    return {
        PACKAGES[0]: version(PACKAGES[0]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": f"{platform.platform()}, {os.cpu_count()} cores",
    }


# ------------------------------------------------------------------------------------- internals
def _label(name: str, entry: Named) -> str:
    which = f" ({entry['component']})" if "component" in entry else ""
    return name.replace("_", " ") + which


def _measurement(entry: Named, noise_floor: float) -> str:
    """``2.310 nats [1.902, 2.718], n = 3; control 0.120``."""
    value, unit = entry["value"], entry["unit"]
    number = f"{value:.3f}" if unit in MEASURED or not float(value).is_integer() else f"{value:.0f}"
    text = f"{number} {unit}".rstrip()
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


def _checked(answers: Mapping[str, str] | None) -> Mapping[str, str]:
    """The answers, once each is known to answer its question."""
    for question, said in (answers or {}).items():
        if not said.strip() or not (VERDICT.match(said) or OPEN_QUESTION.match(question)):
            raise ValueError(
                f"{question!r} is answered {said!r}; expected yes, no or cannot tell first (or ask "
                "how, what, when, where, which, who or why)"
            )
    return answers or {}


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
