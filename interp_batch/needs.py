"""What a notebook needs of a run, checked before anything is computed.

A notebook says so in its metadata, ``"interp_kit": {"needs": [...]}``, by these names:

- ``counterfactuals``: every prompt has one;
- ``two prompts``, ``two models``: at least so many;
- ``trigger``, ``neutral texts``: the scenario has them, the trigger as one token of the model;
- ``documents``: the spec of the model in question, and that of its base, name texts, unless the
  parameter ``written`` lets both models write some;
- ``comparable models``: one architecture and vocabulary, for every pair or all models at once;
- ``mcqs.jsonl`` and so on: the evaluation set has this file; ``mcqs.jsonl or none``: it has, or the
  parameter ``evaluation`` is empty.

Defaults are checked like what a run file gives. ``"interp_kit": {"gate": true}`` marks a notebook
that says whether a model can be analysed at all: where it fails, the others do not run.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from interp_batch.matrix import Cell, defaults_of
from interp_kit.catalogue import evaluation_file, find_model, load_scenario
from interp_kit.specs import InputError, Scenario

KNOWN = {
    "counterfactuals", "two prompts", "two models", "trigger", "neutral texts", "documents",
    "comparable models",
}  # fmt: skip

OR_NONE = " or none"


def needs_of(notebook: Path) -> frozenset[str]:
    """The needs that a notebook's metadata lists; ``InputError`` for one that is not known."""
    needs = frozenset(_metadata(notebook).get("needs", ()))
    for need in sorted(needs - KNOWN):
        if not need.removesuffix(OR_NONE).endswith(".jsonl"):
            raise InputError(
                f"{notebook}: its metadata needs {need!r}; expected one of "
                f"{', '.join(sorted(KNOWN))}, or a file of an evaluation set (mcqs.jsonl)"
            )
    return needs


def is_gate(notebook: Path) -> bool:
    """Whether a model for which this notebook fails is to be analysed by no other."""
    return bool(_metadata(notebook).get("gate"))


def check_needs(cells: Sequence[Cell], data: str | Path | None) -> None:
    """Raise ``InputError``, which names notebook and scenario or model, for a need that is not met.

    What takes a tokenizer or a config to see is left to ``preflight``.
    """
    for cell in cells:
        needs, given = needs_of(cell.notebook), all_parameters(cell)
        where = f"notebook {cell.notebook.stem}"
        for name in names(given, "scenario"):
            _check_scenario(f"{where}: scenario {name!r}", needs, load_scenario(name, data=data))
        models = names(given, "model")
        if "two models" in needs and len(models) < 2:
            raise InputError(f"{where} compares models, and the run has {len(models)}; name two")
        if "documents" in needs and not given.get("written"):
            _check_documents(where, given.get("subject") or models[0], data)
        for kind in sorted(need for need in needs if ".jsonl" in need):
            if kind.endswith(OR_NONE) and not given["evaluation"]:
                continue
            kind = kind.removesuffix(OR_NONE)
            try:
                evaluation_file(str(given["evaluation"]), kind, data=data)
            except InputError as error:
                raise InputError(f"{where} needs {kind}: {error}") from None
        if part := cell.parameters.get("noise_segment"):
            scenario = load_scenario(given["scenario"], data=data)
            if not any(part in prompt.segments for prompt in scenario.prompts):
                known = sorted({name for p in scenario.prompts for name in p.segments})
                raise InputError(
                    f"{where}: no prompt of {scenario.name!r} has a segment {part!r}; expected one "
                    f"of {', '.join(known) or '(none)'}, or leave noise_segment out"
                )


def groups_to_compare(cells: Sequence[Cell], data: str | Path | None) -> Iterator[tuple[str, ...]]:
    """The models of which some notebook moves activations into each other."""
    for cell in cells:
        if "comparable models" not in needs_of(cell.notebook):
            continue
        given = all_parameters(cell)
        if "pairs" in given:
            yield from (tuple(pair) for pair in given["pairs"])
        elif "model" in given:
            yield given["model"], given.get("other") or find_model(given["model"], data=data).origin
        elif "others" in given:
            yield tuple(names(given, "other", "reference"))
        else:
            yield tuple(names(given, "model"))


def all_parameters(cell: Cell) -> dict[str, Any]:
    """The parameters of a cell: what is given, and the notebook's defaults for the rest."""
    return defaults_of(cell.notebook) | cell.parameters


def names(given: dict[str, Any], one: str, *more: str) -> list[str]:
    """The names in the parameter ``one`` or ``ones``, after those in ``more``."""
    first = [given[name] for name in more if given.get(name)]
    return first + ([given[one]] if one in given else list(given.get(f"{one}s", [])))


# ------------------------------------------------------------------------------------- internals
@cache
def _metadata(notebook: Path) -> dict[str, Any]:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    return content.get("metadata", {}).get("interp_kit", {})


def _check_scenario(where: str, needs: frozenset[str], scenario: Scenario) -> None:
    if "counterfactuals" in needs:
        lacking = [p.id for p in scenario.prompts if p.counterfactual is None]
        if lacking:
            raise InputError(
                f"{where}: prompt {lacking[0]!r} has no counterfactual ({len(lacking)} of "
                f"{len(scenario.prompts)} have none), and activations come from it; add them"
            )
    if "two prompts" in needs and len(scenario.prompts) < 2:
        raise InputError(f"{where} has one prompt, and the notebook splits them; give two or more")
    if "trigger" in needs and scenario.trigger is None:
        raise InputError(
            f"{where} has no trigger; expected one that says trigger: {{text: ..., words: [...]}}"
        )
    if "neutral texts" in needs and not scenario.neutral:
        raise InputError(f"{where} has no neutral texts; add some under neutral: [...]")


def _check_documents(where: str, model: str, data: str | Path | None) -> None:
    spec = find_model(model, data=data)
    for of, file in ((f"model {model!r}", spec.documents), ("its base", spec.base_documents)):
        if not file:
            raise InputError(
                f'{where}: {of} names no documents; write some training texts, lines {{"text": '
                '"..."}, beside its model.yaml and name the file there: documents: FILE.jsonl'
            )
