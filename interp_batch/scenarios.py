"""A scenario written from the command line: checked as a run checks it, shown token by token."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from interp_kit.files import write_atomically
from interp_kit.prompts import Prompt, Tokenizing
from interp_kit.specs import NAME, InputError, Scenario, checked

SHOWN = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}  # a prompt stays on one line


@dataclass(frozen=True, kw_only=True)
class Read:
    """How a model reads a scenario: a line for each text, and what is worth a warning."""

    lines: list[str]
    notes: list[str]


def describe_scenario(
    positive: str,
    negative: str,
    texts: Sequence[str],
    counterfactuals: Sequence[str] = (),
    *,
    chat_template: bool = True,
) -> dict[str, Any]:
    """The content of a scenario's file; the answers are their own labels.

    Raises ``InputError`` unless every text, or none, has a counterfactual.
    """
    if counterfactuals and len(counterfactuals) != len(texts):
        raise InputError(
            f"{len(texts)} --text and {len(counterfactuals)} --counterfactual are given; expected "
            "one counterfactual for each text, in the same order, or none"
        )
    prompts: list[dict[str, str]] = [{"id": f"v{i}", "text": t} for i, t in enumerate(texts)]
    for prompt, other in zip(prompts, counterfactuals):
        prompt["counterfactual"] = other
    labels = {"positive": positive.strip(), "negative": negative.strip()}
    decision = {"positive": positive, "negative": negative, "labels": labels}
    plain = {} if chat_template else {"chat_template": False}
    return {"decision": decision, **plain, "prompts": prompts}


def add_scenario(study: Path, name: str, content: dict[str, Any], model: str) -> tuple[Path, Read]:
    """Write ``scenarios/NAME.yaml`` of a study; returns the file, and how the model reads it.

    Raises ``InputError``, and writes nothing, for a name that is taken or no name, and for all that
    ``interp-kit check`` would refuse.
    """
    if not NAME.fullmatch(name):
        raise InputError(
            f"{name!r} cannot name a scenario: expected letters, digits, '.', '_', '-' and a "
            "letter or digit first"
        )
    file = study / "scenarios" / f"{name}.yaml"
    if file.exists():
        raise InputError(f"{file} exists; choose another name, or edit that file")
    read = how_it_is_read(checked(Scenario, {"name": name, **content}, file), model)
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000))
    return file, read


def how_it_is_read(scenario: Scenario, model: str) -> Read:
    """The tokens of prompts and answers; ``InputError`` where the scenario would not work."""
    from interp_batch.preflight import read_as

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        tokenizing, prompts = read_as(model, scenario)
    lines = [line for prompt in prompts for line in _lines(tokenizing, prompt)]
    notes = list(dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning))
    apart = [
        f"{p.id} ({len(p.tokens)} and {len(p.counterfactual)} tokens)"
        for p in prompts
        if p.counterfactual and len(p.counterfactual) != len(p.tokens)
    ]
    if apart:
        notes.append(
            f"of other length than its counterfactual: {', '.join(apart)}; patching works at the "
            "decision (the default), and not position by position: reword one for that"
        )
    if not all(p.counterfactual for p in prompts):
        notes.append("no counterfactuals: everything works but patching within a model")
    return Read(lines=lines, notes=notes)


# ------------------------------------------------------------------------------------- internals
def _lines(tokenizing: Tokenizing, prompt: Prompt) -> list[str]:
    at = len(prompt.shared)
    rows = {"prompt": _tokens(tokenizing, prompt.tokens)}
    if prompt.counterfactual:
        rows["counterfactual"] = _tokens(tokenizing, prompt.counterfactual)
    rows["positive"] = _tokens(tokenizing, prompt.positive, marked=at)
    rows["negative"] = _tokens(tokenizing, prompt.negative, marked=at)
    return [f"{prompt.id}  {what:<16}{shown}" for what, shown in rows.items()]


def _tokens(tokenizing: Tokenizing, ids: Sequence[int], marked: int | None = None) -> str:
    """The tokens with ``|`` between them; the one at ``marked`` stands in >> <<."""
    shown = [_token(tokenizing.tokenizer, id) for id in ids]
    if marked is not None:
        shown[marked] = f">>{shown[marked]}<<"
    return "|".join(shown)


def _token(tokenizer: Any, id: int) -> str:
    """Its text; as the vocabulary has it, where it is a part of a character."""
    text = tokenizer.decode([id])
    if "\ufffd" in text:
        text = str(tokenizer.convert_ids_to_tokens(id))
    return "".join(SHOWN.get(c, c if c.isprintable() else ascii(c)[1:-1]) for c in text)
