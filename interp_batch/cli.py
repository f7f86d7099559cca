"""The commands of ``interp-kit``, from ``run`` to ``train``.

Commands import what they need when they run; only those that check, write or train load torch.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from interp_batch import study
from interp_batch.finetune import app as finetune
from interp_batch.options import (
    CORES,
    CellTimeout,
    Data,
    DryRun,
    Fresh,
    Kernel,
    Memory,
    Only,
    Outputs,
    RunFile,
    RunFiles,
    Scheduler,
    Workers,
)
from interp_kit.catalogue import (
    data_folders,
    list_models,
    list_scenarios,
    read_run,
    study_folder,
)
from interp_kit.hub import state_of_files
from interp_kit.specs import REPOSITORY, InputError, ModelSpec

if TYPE_CHECKING:  # these import papermill, which takes a second
    from interp_batch.execution import Outcome, RunOptions
    from interp_batch.matrix import Cell

app = typer.Typer(
    help="What did fine-tuning change inside a model, and which parts cause the behaviour?\n\n"
    "A run file (YAML) lists notebooks, models and scenarios. `run` executes every notebook on "
    "every model and scenario and writes a report to outputs/NAME/index.html. Start with "
    "`interp-kit new my_study`, then `interp-kit run` in that folder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command()(study.new)
app.add_typer(study.add, name="add")
app.add_typer(finetune, name="finetune")


@app.command()
def run(
    run_files: RunFiles = None,
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

    Without a file, in a study, it takes all in papermill_params. Cells whose results are up to date
    are skipped. Ctrl-C stops the run, and the same command continues it. The exit code is 1 if a
    cell failed.
    """
    from interp_batch.execution import RunOptions
    from interp_batch.layout import run_files_here
    from interp_batch.matrix import expand
    from interp_batch.printing import print_matrix, print_other_versions, print_table
    from interp_batch.results import selected, stale
    from interp_batch.warm import default_kernel

    specs = [read_run(file, data=data) for file in run_files or run_files_here()]
    study.note_outdated()
    if len({spec.name for spec in specs}) < len(specs):
        raise InputError("two run files have the same name and would share a folder; rename one")
    expanded = [expand(spec, outputs=outputs, data=data) for spec in specs]
    cells = selected([cell for own in expanded for cell in own], only or [])
    todo = cells if fresh else stale(cells)
    print_other_versions(todo)
    if dry_run:
        return print_matrix(cells, todo)
    options = RunOptions(
        kernel=kernel or default_kernel(),
        timeout=timeout,
        memory=memory,
        data=str(data.resolve()) if data else None,
        study=str(study_folder() or ""),
    )
    how = {"workers": workers, "options": options, "fresh": fresh, "scheduler": scheduler}
    outcomes = _run(cells, todo, data, **how)
    from interp_batch.reporting import write_report  # scipy and plotly, which take a while

    for spec, own in zip(specs, expanded):
        if ended := [outcome for outcome in outcomes if outcome.cell in own]:
            print_table(ended)
            typer.echo(f"Report: {write_report(spec, own, outputs)}")
    if any(o.state == "error" for o in outcomes):
        raise typer.Exit(1)


@app.command()
def check(run_file: RunFile, data: Data = None, only: Only = None) -> None:
    """Check a run file with its parameters, models and scenarios, and run nothing."""
    from interp_batch.matrix import expand, matching

    study.note_outdated()
    cells = expand(read_run(run_file, data=data), outputs=Path("outputs"), data=data)
    cells = matching(cells, only or [])
    preflight(cells, data)
    typer.echo(f"{run_file}: {len(cells)} cells, all inputs are good")


@app.command()
def doctor(data: Data = None, outputs: Outputs = Path("outputs")) -> None:
    """Say what is installed, what machine this is, and what is missing.

    Nothing is loaded or downloaded. The exit code is 1 if nothing could run.
    """
    from interp_batch.doctor import examine
    from interp_batch.printing import print_examination

    found = examine(outputs, data)
    print_examination(found)
    if found.broken:
        raise typer.Exit(1)


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
    from interp_batch.reporting import find_results, write_figures, write_report

    spec = read_run(run_file, data=data)
    cells = expand(spec, outputs=outputs, data=data)
    other = find_results(against, spec.name, outputs) if against else None
    if png:
        write_figures(outputs / spec.name)
    index = write_report(spec, cells, outputs, other)
    typer.echo(f"Report: {index}")


@app.command()
def diff(
    base: Annotated[
        str, typer.Argument(help="The base: a name (`list`), a folder or a Hugging Face id.")
    ],
    tuned: Annotated[
        str,
        typer.Argument(
            help="The fine-tune: a name, a folder (whole weights, or a LoRA as PEFT saves it) or "
            "an id of whole weights."
        ),
    ],
    texts: Annotated[
        Path | None,
        typer.Option(
            help='Texts to compare on, lines {"text": "..."} or of a .txt. Without, both models '
            "write their own."
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="A fine-tune that serves as control: what it shares with TUNED is not TUNED's "
            "own. May be given several times."
        ),
    ] = None,
    budget: Annotated[
        float, typer.Option(min=0.1, help="Minutes that it may take, about: sets how many texts.")
    ] = 10.0,
    workers: Workers = CORES,
    data: Data = None,
    outputs: Outputs = Path("outputs"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the run file and list its cells, no more.")
    ] = False,
) -> None:
    """What did fine-tuning change, when nothing else is known? From two models to causes.

    Both models write texts. Where their predictions differ, which tokens rise, what the weights
    say and what amplification brings out is joined in one report, with controls. The contexts that
    differ most become a scenario, on which lens, attribution and patching run. The run file is
    kept in outputs/NAME/study.
    """
    from interp_batch.diff import add_found, write_study

    if data:
        found = os.environ.get("INTERP_KIT_DATA", "").split(os.pathsep)
        os.environ["INTERP_KIT_DATA"] = os.pathsep.join(filter(None, [str(data), *found]))
    how: dict[str, Any] = {"budget": budget, "cores": workers, "outputs": outputs, "data": data}
    study = write_study(base, tuned, against=against or [], texts=texts, **how)
    typer.echo(f"Run file: {study.file}")
    if study.base != base:
        typer.echo(f"{tuned} was tuned from {study.base}, which has the weights of {base}")
    if not study.alike:
        typer.echo("The two differ in shape: no activation of one can stand in the other")
    again: dict[str, Any] = {"data": study.data, "outputs": outputs, "workers": workers}
    failed = _failed(partial(run, [study.file], dry_run=dry_run, **again))
    if not dry_run and add_found(study):
        failed |= _failed(partial(run, [study.file], **again))
    if failed:
        raise typer.Exit(1)


@app.command("list")
def list_(data: Data = None) -> None:
    """List the models, scenarios and notebooks that a run file may name."""
    from interp_batch.matrix import list_notebooks
    from interp_batch.printing import print_list

    print_list("models", {m.name: _description(m) for m in list_models(data)})
    print_list("scenarios", {s.name: s.about for s in list_scenarios(data)})
    print_list("notebooks", list_notebooks(data))
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
def _failed(command: Callable[[], None]) -> bool:
    """Run a command that ends with exit code 1 where a cell failed."""
    try:
        command()
    except typer.Exit as ended:
        return bool(ended.exit_code)
    return False


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


def _description(model: ModelSpec) -> str:
    return state_of_files(model) + (model.about or model.base)


if __name__ == "__main__":
    main()
