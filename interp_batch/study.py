"""The commands that begin a study: ``interp-kit new`` and ``interp-kit add``."""

from pathlib import Path
from typing import Annotated

import typer

from interp_kit.catalogue import STUDY, study_folder
from interp_kit.specs import InputError

add = typer.Typer(help="Add to the study in the current folder.", no_args_is_help=True)


def new(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    model: Annotated[
        str | None,
        typer.Option(help="The base: a name (`list`), a folder or a Hugging Face id."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="A LoRA fine-tune of it: a folder as PEFT saves it, a Hugging Face id, or a name. "
            "May be given several times."
        ),
    ] = None,
) -> None:
    """Lay out a study: models, scenarios, notebooks to edit, and a run file that runs at once.

    Without --model, it is about two small models that are shipped. Then: `cd FOLDER` and
    `interp-kit run`.
    """
    from interp_batch.layout import lay_out

    names = lay_out(folder, model, adapter or [])
    typer.echo(f"{folder} is a study of {', '.join(names)}; its README.md says what is where")
    spec = folder / "models" / names[0] / "model.yaml"
    if spec.is_file():
        typer.echo(f"See whether {spec} loads it as it should be: chat_template, dtype")
    typer.echo(f"Next:\n  cd {folder}\n  interp-kit run")


@add.command()
def scenario(
    name: Annotated[str, typer.Argument(help="Its name: it is written to scenarios/NAME.yaml.")],
    model: Annotated[
        str, typer.Option(help="The model whose tokenizer reads it: a name, a folder or an id.")
    ],
    positive: Annotated[
        str, typer.Option(help="One answer, exactly as it continues the prompt: mind the space.")
    ],
    negative: Annotated[str, typer.Option(help="The other answer.")],
    text: Annotated[list[str], typer.Option(help="A prompt. May be given several times.")],
    counterfactual: Annotated[
        list[str] | None,
        typer.Option(help="For each --text, in order: the prompt that asks for the other answer."),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option(help="Prompts become a user's turn, if the model has a template.")
    ] = True,
) -> None:
    """Write a scenario, checked, and show how its prompts and answers are split into tokens.

    Tokens stand between |; the first in which the answers differ stands in >> <<. What would not
    work is refused, and nothing is written.
    """
    from interp_batch.scenarios import add_scenario, describe_scenario

    study = study_folder()
    if study is None:
        raise InputError(
            f"{Path.cwd()} is no study (no {STUDY}); go to one, or lay one out: interp-kit new "
            "FOLDER"
        )
    content = describe_scenario(
        positive, negative, text, counterfactual or [], chat_template=chat_template
    )
    file, read = add_scenario(study, name, content, model)
    for line in read.lines:
        typer.echo(line)
    for note in read.notes:
        typer.echo(f"Note: {note}")
    typer.echo(f"Written: {file}")


def note_outdated() -> None:
    """Say, if the current study's notebooks are copies of which other ones are installed now."""
    from interp_batch.layout import outdated

    if (study := study_folder()) and (said := outdated(study)):
        typer.echo(f"Note: {said}", err=True)
