"""What the commands print: lists, what would run, and how it ended."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from interp_batch.execution import Outcome, State
from interp_batch.matrix import Cell
from interp_batch.results import count_by_other_versions, last_folder, read_status

if TYPE_CHECKING:  # it imports plotly
    from interp_batch.doctor import Examination

WORDS: dict[State, str] = {"ok": "ok", "up to date": "up to date", "error": "failed"}


def print_other_versions(todo: Sequence[Cell]) -> None:
    """Say why results are run again although the user has changed nothing."""
    for made_by, n in sorted(count_by_other_versions(todo).items()):
        results, are = ("result was", "is") if n == 1 else ("results were", "are")
        typer.echo(f"{n} {results} made by interp-kit {made_by} and {are} run again")


def print_matrix(cells: Sequence[Cell], todo: Sequence[Cell]) -> None:
    """One line a cell: whether it would run, and how long it took last time."""
    waiting = {cell.id for cell in todo}
    for cell in cells:
        status = read_status(last_folder(cell))
        took = f"{status['seconds']:.0f} s last time" if status.get("seconds") else ""
        state = "to run" if cell.id in waiting else "up to date"
        typer.echo(f"{state:<12}{cell.id}  {took}".rstrip())
    typer.echo(f"{len(waiting)} of {len(cells)} cells to run")


def print_table(outcomes: Sequence[Outcome]) -> None:
    """Counts and seconds by notebook; then what failed, and the totals."""
    by_notebook: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_notebook.setdefault(outcome.cell.notebook.stem, []).append(outcome)
    width = max(map(len, by_notebook), default=0) + 2
    typer.echo(
        f"\n{'notebook':<{width}}{'cells':>6}{'ok':>6}{'skipped':>9}{'failed':>8}{'seconds':>9}"
    )
    for notebook, own in by_notebook.items():
        states = [o.state for o in own]
        ok, skipped, failed = (states.count(s) for s in WORDS)
        typer.echo(
            f"{notebook:<{width}}{len(own):>6}{ok:>6}{skipped:>9}{failed:>8}"
            f"{sum(o.seconds for o in own):>9.1f}"
        )
    for outcome in outcomes:
        if outcome.state == "error":
            first_line = (outcome.error.splitlines() or [""])[0]
            typer.echo(f"failed: {outcome.cell.id}: {first_line}", err=True)
    ended = [o.state for o in outcomes]
    counts = (f"{ended.count(s)} {word}" for s, word in WORDS.items())
    typer.echo(", ".join(counts))


def print_examination(found: "Examination") -> None:
    """Facts, then what is missing."""
    width = max(map(len, found.facts)) + 2
    for name, fact in found.facts.items():
        typer.echo(f"{name:<{width}}{fact}")
    for title, lines in (("To be mended first", found.broken), ("Missing", found.limits)):
        if lines:
            typer.echo(f"\n{title}:" + "".join(f"\n- {line}" for line in lines))


def print_list(title: str, entries: Mapping[str, str]) -> None:
    """Names with their descriptions, under a title."""
    typer.echo(f"{title}:")
    width = max(map(len, entries), default=0)
    for name, about in entries.items():
        typer.echo(f"  {name:<{width}}  {about}")
