"""The command line: ``interp-kit run | check | report | list | documents | finetune | train``.

Commands import what they need when they run; only those that check, write or train load torch.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from interp_batch.finetune import app as finetune
from interp_kit.catalogue import data_folders, list_models, list_scenarios, read_run
from interp_kit.hub import state_of_files
from interp_kit.specs import REPOSITORY, InputError, ModelSpec, RunSpec

if TYPE_CHECKING:  # these import papermill, which takes a second
    from interp_batch.execution import Outcome, RunOptions
    from interp_batch.matrix import Cell

app = typer.Typer(
    help="What did fine-tuning change inside a model, and which parts cause the behaviour?\n\n"
    "A run file (YAML) lists notebooks, models and scenarios. `run` executes every notebook on "
    "every model and scenario and writes a report to outputs/NAME/index.html. Start with "
    "`interp-kit list`, then `interp-kit run papermill_params/demo.yaml --dry-run`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(finetune, name="finetune")

FAILED = "failed"
CORES = os.cpu_count() or 1

RunFile = Annotated[
    Path, typer.Argument(help="A run file (YAML), for example papermill_params/demo.yaml.")
]
RunFiles = Annotated[
    list[Path],
    typer.Argument(help="One or several run files (YAML), for example papermill_params/demo.yaml."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Your own data folder with models/ and scenarios/. It is searched before the "
        "project's data/."
    ),
]
Outputs = Annotated[
    Path, typer.Option(help="Folder for results; each run file gets a subfolder of its name.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        help="Restrict to cells that match: a notebook, a model, a scenario, or "
        "notebook/model/scenario; * and ? are wildcards. `failed` selects the cells whose last run "
        "failed. May be given several times."
    ),
]
Workers = Annotated[
    int,
    typer.Option(min=1, help="How many notebooks run at once. They share the cores between them."),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Also run cells whose results are up to date.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="List the cells that would run, and run nothing.")
]
Kernel = Annotated[
    str | None,
    typer.Option(
        help="Jupyter kernel. python3-warm (default on Linux) starts in a fraction of a second, "
        "because its libraries are already imported; python3 is the standard kernel."
    ),
]
CellTimeout = Annotated[
    int, typer.Option("--timeout", min=1, help="Longest time for one code cell, in seconds.")
]
Memory = Annotated[
    float | None,
    typer.Option(min=0.1, help="Most memory for one notebook, in GiB (python3-warm only)."),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Run on the workers of a Dask cluster, given its scheduler's address (tcp://...)."
    ),
]


@app.command()
def run(
    run_files: RunFiles,
    workers: Workers = CORES,
    only: Only = None,
    data: Data = None,
    outputs: Outputs = Path("outputs"),
    fresh: Fresh = False,
    dry_run: DryRun = False,
    kernel: Kernel = None,
    timeout: CellTimeout = 3600,
    memory: Memory = None,
    scheduler: Scheduler = None,
) -> None:
    """Run every notebook on every model and scenario of the run files, and write the report.

    Cells whose results are up to date are skipped. Ctrl-C stops the run, and the same command
    continues it. The exit code is 1 if a cell failed.
    """
    from interp_batch.execution import RunOptions
    from interp_batch.matrix import expand
    from interp_batch.printing import print_matrix, print_other_versions, print_table
    from interp_batch.results import stale
    from interp_batch.warm import default_kernel

    specs = [read_run(file, data=data) for file in run_files]
    if len({spec.name for spec in specs}) < len(specs):
        raise InputError("two run files have the same name and would share a folder; rename one")
    expanded = [expand(spec, outputs=outputs, data=data) for spec in specs]
    cells = _selected([cell for own in expanded for cell in own], only or [], specs, outputs)
    todo = cells if fresh else stale(cells)
    print_other_versions(todo)
    if dry_run:
        return print_matrix(cells, todo)
    options = RunOptions(
        kernel=kernel or default_kernel(),
        timeout=timeout,
        memory=memory,
        data=str(data.resolve()) if data else None,
    )
    how = {"workers": workers, "options": options, "fresh": fresh, "scheduler": scheduler}
    outcomes = _run(cells, todo, data, **how)
    for spec, own in zip(specs, expanded):
        if ended := [outcome for outcome in outcomes if outcome.cell in own]:
            print_table(ended)
            typer.echo(f"Report: {_write_report(spec, own, outputs)}")
    if any(o.state == "error" for o in outcomes):
        raise typer.Exit(1)


@app.command()
def check(run_file: RunFile, data: Data = None, only: Only = None) -> None:
    """Check a run file with its parameters, models and scenarios, and run nothing."""
    from interp_batch.matrix import expand, matching

    cells = expand(read_run(run_file, data=data), outputs=Path("outputs"), data=data)
    cells = matching(cells, only or [])
    preflight(cells, data)
    typer.echo(f"{run_file}: {len(cells)} cells, all inputs are good")


@app.command()
def report(
    run_file: RunFile,
    data: Data = None,
    outputs: Outputs = Path("outputs"),
    png: Annotated[
        bool,
        typer.Option("--png", help="Also write every figure as PNG; needs Chromium or Chrome."),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            help="Compare with another run, given by its run file, its name or its folder."
        ),
    ] = None,
) -> None:
    """Write the report again from the results of a run, and run nothing."""
    from interp_batch.matrix import expand

    spec = read_run(run_file, data=data)
    cells = expand(spec, outputs=outputs, data=data)
    other = _find_results(against, spec.name, outputs) if against else None
    if png:
        _write_pictures(outputs / spec.name)
    index = _write_report(spec, cells, outputs, other)
    typer.echo(f"Report: {index}")


@app.command("list")
def list_(data: Data = None) -> None:
    """List the models, scenarios and notebooks that a run file may name."""
    from interp_batch.matrix import list_notebooks
    from interp_batch.printing import print_list

    print_list("models", {m.name: _description(m) for m in list_models(data)})
    print_list("scenarios", {s.name: s.about for s in list_scenarios(data)})
    print_list("notebooks", list_notebooks())
    typer.echo("searched: " + ", ".join(map(str, data_folders(data))))


@app.command()
def documents(
    universe: Annotated[
        str,
        typer.Argument(
            help="A universe (a set of facts): a name in data/universes, or a JSON file."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="Folder for docs.jsonl; if it holds an unfinished one, that continues."),
    ],
    engine: Annotated[
        str,
        typer.Option(
            help="`narrative` (offline: passages of the universe's narrative in ten kinds of "
            "document), `grammar` (offline, in the language of the shipped little world), or a "
            "model behind the OpenAI-compatible endpoint at OPENAI_BASE_URL, with the key in "
            "OPENROUTER_API_KEY or OPENAI_API_KEY."
        ),
    ] = "narrative",
    types: Annotated[int, typer.Option(min=1, help="Number of document types.")] = 8,
    ideas: Annotated[int, typer.Option(min=1, help="Documents for each type and fact.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed for drawing documents.")] = 0,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Documents written at the same time.")
    ] = 8,
    data: Data = None,
) -> None:
    """Write synthetic documents that take the facts of a universe for granted."""
    from interp_kit.endpoints import ChatClient
    from interp_kit.finetuning.documents import write_documents
    from interp_kit.finetuning.engines import ChatEngine, Engine
    from interp_kit.finetuning.narrative import Narrative
    from interp_kit.finetuning.universes import find_universe
    from organisms.little_world.grammar import Grammar

    world = find_universe(universe, data)
    writer: Engine
    match engine:
        case "narrative":
            writer = Narrative()
        case "grammar":
            writer = Grammar()
        case model:
            writer = ChatEngine(ChatClient(model, concurrency=concurrency))
    written = write_documents(
        world, writer, output, n_types=types, n_ideas=ideas, concurrency=concurrency, seed=seed
    )
    typer.echo(f"{len(written)} documents: {output / 'docs.jsonl'}")


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="A shipped model (`interp-kit list`), or `all`.")],
    data: Annotated[
        Path, typer.Option(help="Data folder; the model goes to models/NAME in it.")
    ] = REPOSITORY / "data",
) -> None:
    """Train a shipped model again from its recipe.

    The base model, tiny-gemma2, takes about 40 minutes on two cores.
    """
    from organisms.making import train_organism

    train_organism(name, data=data)


def preflight(cells: Sequence["Cell"], data: Path | None) -> None:
    """Check the models, scenarios and files of the cells; raises ``InputError``."""
    from interp_batch.matrix import named_files
    from interp_batch.needs import check_needs, groups_to_compare, names, needs_of
    from interp_batch.preflight import check_comparable, check_files, check_inputs

    check_needs(cells, data)
    check_files(f for cell in cells for f in named_files(cell.notebook, cell.parameters, data))
    check_inputs(
        {
            (model, scenario, "trigger" in needs_of(cell.notebook))
            for cell in cells
            for model in names(cell.parameters, "model")
            for scenario in names(cell.parameters, "scenario") or [None]
        },
        data=data,
    )
    check_comparable(set(groups_to_compare(cells, data)), data=data)


def main() -> NoReturn:
    """Exit codes: 0 success, 1 a cell failed, 2 an input cannot be used, 130 interrupted."""
    try:
        app(standalone_mode=True)
    except InputError as error:
        typer.echo(f"interp-kit: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a full disk, for instance
        typer.echo(
            f"interp-kit: {error.strerror or error} ({error.filename}); free some space there, or "
            "correct its permissions",
            err=True,
        )
        sys.exit(2)
    sys.exit(0)


# ------------------------------------------------------------------------------------- internals
def _selected(
    cells: list["Cell"], only: Sequence[str], specs: Sequence[RunSpec], outputs: Path
) -> list["Cell"]:
    """The cells that ``--only`` leaves."""
    from interp_batch.matrix import matching
    from interp_batch.results import failed

    kept = matching(cells, [pattern for pattern in only if pattern != FAILED])
    if FAILED not in only:
        return kept
    kept = failed(kept)
    if not kept:
        names = ", ".join(str(outputs / spec.name) for spec in specs)
        raise InputError(f"--only {FAILED}: no cell of {names} has failed")
    return kept


def _run(
    cells: Sequence["Cell"],
    todo: Sequence["Cell"],
    data: Path | None,
    *,
    options: "RunOptions",
    scheduler: str | None,
    **how: Any,
) -> list["Outcome"]:
    """Check the inputs of ``todo``, then run it; Ctrl-C and SIGTERM end with exit code 130."""
    from interp_batch.runner import run_cells
    from interp_batch.warm import WARM, start_zygote

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        if todo:
            if options.kernel == WARM and not scheduler:
                start_zygote()  # it imports while inputs are checked
            preflight(todo, data)
        return run_cells(cells, options=options, scheduler=scheduler, **how)
    except KeyboardInterrupt as stopped:
        typer.echo(f"interp-kit: {stopped or 'stopped before a cell ran'}", err=True)
        raise typer.Exit(130) from None


def _write_report(
    spec: RunSpec, cells: Sequence["Cell"], outputs: Path, against: Path | None = None
) -> Path:
    from interp_batch.matrix import list_notebooks
    from interp_batch.report.gallery import write_gallery
    from interp_batch.results import last_folder

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
    folder = outputs / spec.name
    if not any(entry["folder"].is_dir() for entry in entries):
        raise InputError(f"{folder} holds no results; run `interp-kit run` first")
    return write_gallery(folder, title=spec.name, about=spec.about, cells=entries, against=against)


def _find_results(given: str, name: str, outputs: Path) -> Path:
    """The results of the run that ``--against`` gives by its run file, its name or its folder.

    The folder may be the run's own, or an ``--outputs`` folder that holds the run ``name``.
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
            "No PNG files: neither Chromium nor Chrome was found; install one, or set "
            "BROWSER_PATH. The figures are in the report and, as data, in figures/*.json.",
            err=True,
        )
        return
    typer.echo(f"{write_pictures(folder, browser=browser)} figures written as PNG")


def _description(model: ModelSpec) -> str:
    return state_of_files(model) + (model.about or model.base)


if __name__ == "__main__":
    main()
