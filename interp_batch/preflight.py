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
from interp_kit.pretrained import inspect_model
from interp_kit.prompts import encode_scenario
from interp_kit.specs import InputError

READERS = {
    "mcqs.jsonl": read_mcqs,
    "open_questions.jsonl": read_open_questions,
    "probing_dataset.jsonl": read_probing_prompts,
    "statements.jsonl": read_statements,
}


def check_inputs(
    pairs: Iterable[tuple[str, str | None]], *, data: str | Path | None = None
) -> None:
    """Check every model, and every scenario as its tokenizer sees it.

    ``pairs`` are (model, scenario or none) as a run file names them. Raises ``InputError`` for
    weights that are missing, corrupt or pickled, an adapter made for another base, answers that
    tokenize alike and prompts longer than the context.
    """
    pairs = sorted(pairs, key=str)
    models = list(dict.fromkeys(model for model, _ in pairs))
    for name in tqdm(models, desc="checking models", unit="model", leave=False):
        tokenizing = inspect_model(find_model(name, data=data))
        for scenario in dict.fromkeys(s for m, s in pairs if m == name and s):
            try:
                encode_scenario(tokenizing, load_scenario(scenario, data=data))
            except InputError as error:
                raise InputError(f"model {name!r}, scenario {scenario!r}: {error}") from None


def check_files(files: Iterable[Path]) -> None:
    """Read every evaluation set and universe; ``InputError`` names the file and line at fault."""
    for file in dict.fromkeys(files):
        if file.name in READERS:
            READERS[file.name](file)
        elif file.suffix == ".json":
            read_universe(file)
