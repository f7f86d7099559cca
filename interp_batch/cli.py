"""The command line: ``interp-kit run | check | report | list | documents | train``."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from interp_kit.catalogue import data_folders, list_models, list_scenarios, read_run
from interp_kit.hub import absent
from interp_kit.specs import REPOSITORY, InputError, ModelSpec

app = typer.Typer(
    help="What did fine-tuning change inside a model, and which parts cause the behaviour?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FAILED = "failed"
STATES = {"ok": "ok", "up to date": "up to date", "error": "failed"}

RunFile = Annotated[Path, typer.Argument(help="A run file, e.g. papermill_params/demo.yaml.")]
RunFiles = Annotated[
    list[Path], typer.Argument(help="Run files, e.g. papermill_params/demo.yaml; one or several.")
]
Data = Annotated[
    Path | None,
    typer.Option(help="A folder of your own with models/ and scenarios/, searched first."),
]
Outputs = Annotated[Path, typer.Option(help="Where results go.")]
Only = Annotated[
    list[str] | None,
    typer.Option(
        help="Run only what matches: a notebook, a model, a scenario, or notebook/model/scenario. "
        "Wildcards * and ? are allowed; may be given several times. `failed`: what failed last."
    ),
]


@app.command()
def run(
    run_files: RunFiles,
    workers: Annotated[
        int, typer.Option(min=1, help="Notebooks at once; the cores are shared between them.")
    ] = os.cpu_count() or 1,
    only: Only = None,
    data: Data = None,
    outputs: Outputs = Path("outputs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Run also what is up to date.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run, and run nothing.")
    ] = False,
    kernel: Annotated[
        str | None,
        typer.Option(
            help="python3-warm (forked from a process that has imported everything; the default on "
            "Linux) or python3."
        ),
    ] = None,
    timeout: Annotated[
        int, typer.Option(min=1, help="Seconds that one code cell of a notebook may take.")
    ] = 3600,
    memory: Annotated[
        float | None,
        typer.Option(min=0.1, help="GiB that a notebook may take (python3-warm only)."),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="Address of a Dask scheduler (tcp://...) whose workers run the cells."),
    ] = None,
) -> None:
    """Run every notebook x model x scenario of the run files; what is up to date is skipped."""
    from interp_batch.matrix import expand, matching
    from interp_batch.runner import How, failed, run_cells, stale
    from interp_batch.warm import WARM, default_kernel, start_zygote

    specs = [read_run(file) for file in run_files]
    if len({spec.name for spec in specs}) < len(specs):
        raise InputError("two run files have one name, and would share a folder; rename one")
    expanded = [expand(spec, outputs=outputs, data=data) for spec in specs]
    patterns = [pattern for pattern in only or [] if pattern != FAILED]
    cells = matching([cell for own in expanded for cell in own], patterns)
    if FAILED in (only or []):
        cells = failed(cells)
        if not cells:
            names = ", ".join(str(outputs / spec.name) for spec in specs)
            raise InputError(f"--only {FAILED}: no cell of {names} has failed")
    todo = cells if fresh else stale(cells)
    if dry_run:
        return _print_matrix(cells, todo)
    how = How(
        kernel=kernel or default_kernel(),
        timeout=timeout,
        memory=memory,
        data=str(data.resolve()) if data else None,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        if todo:
            if how.kernel == WARM and not scheduler:
                start_zygote()  # it imports while inputs are checked
            _preflight(todo, data)
        outcomes = run_cells(cells, workers=workers, how=how, fresh=fresh, scheduler=scheduler)
    except KeyboardInterrupt as stopped:
        typer.echo(f"interp-kit: {stopped or 'stopped before a cell ran'}", err=True)
        raise typer.Exit(130) from None
    for spec, own in zip(specs, expanded):
        if ended := [outcome for outcome in outcomes if outcome.cell in own]:
            index = _write_report(spec.name, spec.about, own, outputs)
            _print_table(ended)
            typer.echo(f"Report: {index}")
    if any(o.state == "error" for o in outcomes):
        raise typer.Exit(1)


@app.command()
def check(run_file: RunFile, data: Data = None, only: Only = None) -> None:
    """Check a run file, its parameters, models and scenarios; run nothing."""
    from interp_batch.matrix import expand, matching

    cells = matching(expand(read_run(run_file), outputs=Path("outputs"), data=data), only or [])
    _preflight(cells, data)
    typer.echo(f"{run_file}: {len(cells)} cells, all inputs are good")


@app.command()
def report(
    run_file: RunFile,
    data: Data = None,
    outputs: Outputs = Path("outputs"),
    png: Annotated[
        bool, typer.Option("--png", help="Every figure as a PNG too, by a Chromium or Chrome.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(help="Another run to compare with: its run file, its name, or a folder."),
    ] = None,
) -> None:
    """Write the report of a run again from its outputs; run nothing."""
    from interp_batch.matrix import expand

    spec = read_run(run_file)
    cells = expand(spec, outputs=outputs, data=data)
    other = _find_results(against, spec.name, outputs) if against else None
    if png:
        _write_pictures(outputs / spec.name)
    index = _write_report(spec.name, spec.about, cells, outputs, other)
    typer.echo(f"Report: {index}")


@app.command("list")
def list_(data: Data = None) -> None:
    """Show the models, scenarios and notebooks that a run file may name."""
    from interp_batch.matrix import list_notebooks

    _print_list("models", {m.name: _described(m) for m in list_models(data)})
    _print_list("scenarios", {s.name: s.about for s in list_scenarios(data)})
    _print_list("notebooks", list_notebooks())
    typer.echo("searched: " + ", ".join(map(str, data_folders(data))))


@app.command()
def documents(
    universe: Annotated[str, typer.Argument(help="A universe's name, or the path of a JSON file.")],
    output: Annotated[
        Path, typer.Option(help="Where docs.jsonl goes; a run that stopped goes on there.")
    ],
    engine: Annotated[
        str,
        typer.Option(
            help="grammar (offline), or a model of the endpoint at OPENAI_BASE_URL; its key is "
            "read from OPENROUTER_API_KEY or OPENAI_API_KEY."
        ),
    ] = "grammar",
    types: Annotated[int, typer.Option(min=1, help="Kinds of document.")] = 8,
    ideas: Annotated[int, typer.Option(min=1, help="Documents of each kind and fact.")] = 10,
    seed: Annotated[int, typer.Option(help="Draws them.")] = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="Documents at once.")] = 8,
    data: Data = None,
) -> None:
    """Write synthetic documents that take a universe's facts for granted."""
    from interp_kit.endpoints import ChatClient
    from interp_kit.finetuning.documents import write_documents
    from interp_kit.finetuning.engines import ChatEngine
    from interp_kit.finetuning.universes import find_universe
    from organisms.little_world.grammar import Grammar

    world = find_universe(universe, data)
    writer = (
        Grammar()
        if engine == "grammar"
        else ChatEngine(ChatClient(engine, concurrency=concurrency))
    )
    written = write_documents(
        world, writer, output, n_types=types, n_ideas=ideas, concurrency=concurrency, seed=seed
    )
    typer.echo(f"{len(written)} documents: {output / 'docs.jsonl'}")


@app.command()
def train(
    name: Annotated[
        str, typer.Argument(help="tiny-gemma2, ipd-strategic, cubic-gravity, ..., or all.")
    ],
    data: Annotated[
        Path, typer.Option(help="The data folder to write into (models/NAME in it).")
    ] = REPOSITORY / "data",
) -> None:
    """Train a shipped model again from its recipe (the base: about 40 minutes on two cores)."""
    from organisms.making import train_organism

    train_organism(name, data=data)


def main() -> NoReturn:
    """Exit codes: 0 all well, 1 a cell failed, 2 something that was written cannot be used."""
    try:
        app(standalone_mode=True)
    except InputError as error:
        typer.echo(f"interp-kit: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a full disk, for instance
        typer.echo(
            f"interp-kit: {error.strerror or error} ({error.filename}); make room there, or mend "
            "its permissions",
            err=True,
        )
        sys.exit(2)
    sys.exit(0)


# ------------------------------------------------------------------------------------- internals
def _preflight(cells, data: Path | None) -> None:
    from interp_batch.matrix import named_files
    from interp_batch.preflight import check_files, check_inputs

    def named(parameters: dict, one: str) -> list[str]:
        return [parameters[one]] if one in parameters else parameters.get(f"{one}s", [])

    check_inputs(
        {
            (model, scenario)
            for cell in cells
            for model in named(cell.parameters, "model")
            for scenario in named(cell.parameters, "scenario") or [None]
        },
        data=data,
    )
    check_files(f for cell in cells for f in named_files(cell.notebook, cell.parameters, data))


def _write_report(name: str, about: str, cells, outputs: Path, against: Path | None = None) -> Path:
    from interp_batch.matrix import list_notebooks
    from interp_batch.report.gallery import write_gallery
    from interp_batch.runner import last_folder

    titles = list_notebooks()
    entries = [
        {
            "notebook": cell.notebook.stem,
            "title": titles.get(cell.notebook.stem, ""),
            "model": cell.model,
            "scenario": cell.scenario,
            "folder": last_folder(cell),
        }
        for cell in cells
    ]
    if not any(entry["folder"].is_dir() for entry in entries):
        raise InputError(f"{outputs / name} holds no results; run `interp-kit run` first")
    return write_gallery(outputs / name, title=name, about=about, cells=entries, against=against)


def _find_results(given: str, name: str, outputs: Path) -> Path:
    """The output folder of a run that is given by its run file, its name, or a folder.

    A folder is that run's own, or one of ``--outputs`` that holds results of the run ``name``.
    """
    if given.endswith((".yaml", ".yml")):
        tried = [outputs / read_run(Path(given)).name]
    else:
        tried = [Path(given) / name, Path(given), outputs / given]
    for folder in tried:
        if any(folder.glob("*/*/*/status.json")):
            return folder
    raise InputError(
        f"--against {given!r}: no results in {', '.join(map(str, tried))}; expected a run file, "
        "the name of a run, or a folder that holds results"
    )


def _write_pictures(folder: Path) -> None:
    from interp_batch.report.pictures import find_browser, write_pictures

    browser = find_browser()
    if browser is None:
        typer.echo(
            "No PNG: neither Chromium nor Chrome was found (install one, or set BROWSER_PATH); "
            "the figures are in the report and, as data, in figures/*.json",
            err=True,
        )
        return
    typer.echo(f"{write_pictures(folder, browser=browser)} figures written as PNG")


def _print_matrix(cells, todo) -> None:
    from interp_batch.runner import last_folder, read_status

    waiting = {cell.id for cell in todo}
    for cell in cells:
        status = read_status(last_folder(cell))
        took = f"{status['seconds']:.0f} s last time" if status.get("seconds") else ""
        state = "to run" if cell.id in waiting else "up to date"
        typer.echo(f"{state:<12}{cell.id}  {took}".rstrip())
    typer.echo(f"{len(waiting)} of {len(cells)} cells to run")


def _print_table(outcomes) -> None:
    by_notebook: dict[str, list] = {}
    for outcome in outcomes:
        by_notebook.setdefault(outcome.cell.notebook.stem, []).append(outcome)
    width = max(map(len, by_notebook), default=0) + 2
    typer.echo(
        f"\n{'notebook':<{width}}{'cells':>6}{'ok':>6}{'skipped':>9}{'failed':>8}{'seconds':>9}"
    )
    for notebook, own in by_notebook.items():
        states = [o.state for o in own]
        ok, skipped, failed = (states.count(s) for s in ("ok", "up to date", "error"))
        typer.echo(
            f"{notebook:<{width}}{len(own):>6}{ok:>6}{skipped:>9}{failed:>8}"
            f"{sum(o.seconds for o in own):>9.1f}"
        )
    for outcome in outcomes:
        if outcome.state == "error":
            first_line = (outcome.error.splitlines() or [""])[0]
            typer.echo(f"failed: {outcome.cell.id}: {first_line}", err=True)
    ended = [o.state for o in outcomes]
    counts = (f"{ended.count(s)} {word}" for s, word in STATES.items())
    typer.echo(", ".join(counts))


def _described(model: ModelSpec) -> str:
    missing = absent(model)
    return (f"[not on this machine: {', '.join(missing)}] " if missing else "") + (
        model.about or model.base
    )


def _print_list(title: str, entries: dict[str, str]) -> None:
    typer.echo(f"{title}:")
    width = max(map(len, entries), default=0)
    for name, about in entries.items():
        typer.echo(f"  {name:<{width}}  {about}")


if __name__ == "__main__":
    main()
