"""Checks models, scenarios and data files before a kernel starts or anything is written.

It loads no weights: configurations, tokenizers and the headers of the weight files suffice.
Importing this module imports torch.
"""

from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from interp_kit.catalogue import find_model, load_scenario
from interp_kit.evaluations import (
    read_mcqs,
    read_open_questions,
    read_probing_prompts,
    read_statements,
)
from interp_kit.finetuning.universes import read_universe
from interp_kit.loading import Models
from interp_kit.pretrained import inspect_model
from interp_kit.prompts import Prompt, Tokenizing, encode_scenario, trigger_tokens
from interp_kit.specs import InputError, Scenario

READERS = {
    "mcqs.jsonl": read_mcqs,
    "open_questions.jsonl": read_open_questions,
    "probing_dataset.jsonl": read_probing_prompts,
    "statements.jsonl": read_statements,
}


def check_inputs(
    asked: Iterable[tuple[str, str | None, bool]], *, data: str | Path | None = None
) -> None:
    """Check every model, and every scenario as its tokenizer sees it.

    ``asked`` are (model, scenario or none, whether its trigger is used) as a run file names them.
    Raises ``InputError`` for weights that are missing, corrupt or pickled, an adapter made for
    another base, answers that tokenize alike, prompts longer than the context, and a trigger that
    is not one token.
    """
    asked = sorted(asked, key=str)
    models = list(dict.fromkeys(model for model, _, _ in asked))
    for name in tqdm(models, desc="checking models", unit="model", leave=False):
        tokenizing = inspect_model(find_model(name, data=data))
        for scenario, triggered in dict.fromkeys((s, t) for m, s, t in asked if m == name and s):
            try:
                found = load_scenario(scenario, data=data)
                encode_scenario(tokenizing, found)
                if triggered:
                    trigger_tokens(tokenizing, found)
            except InputError as error:
                raise InputError(f"model {name!r}, scenario {scenario!r}: {error}") from None


def read_as(model: str, scenario: Scenario) -> tuple[Tokenizing, list[Prompt]]:
    """The model's tokenizer, and the scenario's prompts as it reads them."""
    tokenizing = inspect_model(find_model(model))
    return tokenizing, encode_scenario(tokenizing, scenario)


def check_comparable(groups: Iterable[tuple[str, ...]], *, data: str | Path | None = None) -> None:
    """Raise ``InputError`` unless the models of each group have activations of one kind."""
    for group in sorted(groups):
        models = Models([find_model(name, data=data) for name in dict.fromkeys(group)])
        models.require_comparable(*group)


def check_files(files: Iterable[Path]) -> None:
    """Read every evaluation set and universe; ``InputError`` names the file and line at fault."""
    for file in dict.fromkeys(files):
        if file.name in READERS:
            READERS[file.name](file)
        elif file.suffix == ".json":
            read_universe(file)
