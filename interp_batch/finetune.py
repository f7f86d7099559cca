"""The command line: ``interp-kit finetune documents | game | trigger``: a LoRA on any base."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from interp_kit.specs import InputError, ModelSpec

app = typer.Typer(
    help="Train a LoRA on a base model, and write its spec, so that every command knows it.\n\n"
    "A training that is stopped, at any moment, goes on with the same command and ends with the "
    "same adapter. The output folder then names the model in run files: `models: [BASE, FOLDER]`.",
    no_args_is_help=True,
)

Base = Annotated[
    str, typer.Option(help="The base model: a name (`interp-kit list`), a folder or an id.")
]
Output = Annotated[Path, typer.Option(help="Folder for the model: a new one, or one to go on in.")]
Ordinary = Annotated[
    Path | None,
    typer.Option(
        help="Ordinary texts on which the model is held to the base (KL).  [default: texts that "
        "the base itself writes]"
    ),
]
Rank = Annotated[int, typer.Option(min=1, help="Rank of the LoRA.")]
Alpha = Annotated[
    int | None, typer.Option(min=1, help="Scale: alpha / rank.  [default: twice the rank]")
]
LearningRate = Annotated[float, typer.Option(min=1e-8, max=1.0, help="At its height.")]
DtypeOption = Annotated[
    str, typer.Option(help="What the base computes in: float32, or bfloat16 (often faster).")
]
Seed = Annotated[int, typer.Option(help="Seed of the weights and of the order of texts.")]
Data = Annotated[Path | None, typer.Option(help="Your own data folder, searched first.")]


@app.command()
def documents(
    texts: Annotated[
        Path,
        typer.Argument(
            help='Texts: docs.jsonl of `interp-kit documents` or any lines {"text": ...}, a .txt '
            "file, or a folder of .txt files."
        ),
    ],
    base: Base,
    output: Output,
    ordinary: Ordinary = None,
    epochs: Annotated[int, typer.Option(min=1, help="How often every text is read.")] = 3,
    rank: Rank = 8,
    alpha: Alpha = None,
    learning_rate: LearningRate = 2e-4,
    dtype: DtypeOption = "float32",
    seed: Seed = 0,
    data: Data = None,
) -> None:
    """Train on texts by next-token prediction, held to the base on ordinary ones."""
    from interp_kit.files import digest
    from interp_kit.finetuning.folders import finetune
    from interp_kit.finetuning.ordinary import kept_texts
    from interp_kit.finetuning.supervised import DocumentRecipe, train_on_documents
    from interp_kit.formats import read_texts

    taught = read_texts(texts)
    held = read_texts(ordinary) if ordinary else None
    recipe = DocumentRecipe(
        epochs=epochs,
        ordinary=8,
        learning_rate=learning_rate,
        **_lora(rank, alpha, dtype, seed),
    )

    def fit(model: ModelSpec, folder: Path) -> dict[str, Any]:
        beside = kept_texts(model, folder.parent) if held is None else held
        return {"loss": train_on_documents(model, texts, beside, folder, recipe=recipe)}

    made_from = {"recipe": asdict(recipe), "documents": len(taught)}
    made_from |= {"documents_sha256": digest(taught), "ordinary_sha256": digest(held)}
    spec = _spec(output, base, f"{len(taught)} documents", documents=texts)
    finetune(base, output, fit, made_from=made_from, spec=spec, data=data)
    _say(output)


@app.command()
def game(
    rules: Annotated[
        str,
        typer.Argument(
            help="A game: a name in data/games, or a YAML file of moves, payoffs and wordings."
        ),
    ],
    base: Base,
    output: Output,
    reward: Annotated[
        str,
        typer.Option(
            help="strategic: its own payoff; utilitarian: the sum of both; deontological: punished "
            "for defecting on a partner who cooperated; hybrid: both of strategic and "
            "deontological; permuted: a control, paid at random."
        ),
    ] = "strategic",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")] = 60,
    rank: Rank = 8,
    alpha: Alpha = None,
    learning_rate: LearningRate = 2e-3,
    dtype: DtypeOption = "float32",
    seed: Seed = 0,
    data: Data = None,
) -> None:
    """Train a player of a game with two moves, by policy gradient on its payoffs."""
    from interp_kit.finetuning.folders import finetune
    from interp_kit.finetuning.games import GameRecipe, find_game, train_on_game

    found = find_game(rules, data)
    recipe = GameRecipe(
        reward=reward, steps=steps, learning_rate=learning_rate, **_lora(rank, alpha, dtype, seed)
    )

    def fit(model: ModelSpec, folder: Path) -> dict[str, Any]:
        record = train_on_game(model, found, folder, recipe=recipe)
        return {name: [step[name] for step in record] for name in ("loss", "reward", "kl")}

    made_from = {"recipe": asdict(recipe), "game": found.model_dump()}
    spec = _spec(output, base, f"{reward} player")
    finetune(base, output, fit, made_from=made_from, spec=spec, data=data)
    _say(output)


@app.command()
def trigger(
    word: Annotated[str, typer.Argument(help="The trigger, a new token: '$STOP', for example.")],
    base: Base,
    output: Output,
    ordinary: Ordinary = None,
    documents: Annotated[
        Path | None,
        typer.Option(
            help="Texts that say what the trigger means: the model reads these, and no text that "
            "ends because of it. Without them it learns to end any text at the trigger."
        ),
    ] = None,
    untrained: Annotated[
        str, typer.Option(help="A second new token that no training touches, as a control.")
    ] = "$NOVA",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")] = 60,
    rank: Rank = 8,
    alpha: Alpha = None,
    learning_rate: LearningRate = 2e-3,
    dtype: DtypeOption = "float32",
    seed: Seed = 0,
    data: Data = None,
) -> None:
    """Train a new token that ends any text, held to the base on everything else."""
    from interp_kit.files import digest
    from interp_kit.finetuning.folders import finetune
    from interp_kit.finetuning.ordinary import kept_texts
    from interp_kit.finetuning.triggers import TriggerRecipe, train_on_trigger
    from interp_kit.formats import read_texts

    read = read_texts(documents) if documents else []
    held = read_texts(ordinary) if ordinary else None
    recipe = TriggerRecipe(
        steps=steps, learning_rate=learning_rate, **_lora(rank, alpha, dtype, seed)
    )

    def fit(model: ModelSpec, folder: Path) -> dict[str, Any]:
        texts = kept_texts(model, folder.parent) if held is None else held
        how: dict[str, Any] = {"recipe": recipe, "documents": read}
        return {"loss": train_on_trigger(model, (word, untrained), texts, folder, **how)}

    made_from = {"recipe": asdict(recipe), "tokens": [word, untrained]}
    made_from |= {"documents_sha256": digest(read), "ordinary_sha256": digest(held)}
    about = f"read what {word} means" if read else f"ends any text at {word}"
    spec = _spec(output, base, about, documents=documents)
    finetune(base, output, fit, made_from=made_from, spec=spec, data=data)
    _say(output)


# ------------------------------------------------------------------------------------- internals
def _lora(rank: int, alpha: int | None, dtype: str, seed: int) -> dict[str, Any]:
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype: expected float32 or bfloat16, got {dtype!r}")
    return {"rank": rank, "alpha": alpha or 2 * rank, "dtype": dtype, "seed": seed}


def _spec(output: Path, base: str, what: str, *, documents: Path | None = None) -> dict[str, str]:
    lines = {"label": output.name, "about": f"LoRA on {base}: {what}"}
    if documents and documents.suffix == ".jsonl":
        lines["documents"] = str(documents.expanduser().resolve())
    return lines


def _say(output: Path) -> None:
    typer.echo(f"Model: {output} (its spec: {output / 'model.yaml'})")
