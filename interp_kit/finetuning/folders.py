"""The folder of one fine-tune: begun, gone on with, finished, and then a model by its name.

``begun.json`` says what the fine-tune is made from, while it trains ``checkpoint.safetensors``
keeps its state. In the end there are ``adapter/``, ``training.json`` (recipe, losses, versions) and
``model.yaml``, by which every command knows the model.
"""

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from interp_kit.catalogue import find_model
from interp_kit.files import dump_json, read_json, write_atomically
from interp_kit.specs import InputError, ModelSpec

Fit = Callable[[ModelSpec, Path], Mapping[str, Any]]  # base, folder of the adapter -> its record


def finetune(
    base: str,
    folder: Path,
    fit: Fit,
    *,
    made_from: Mapping[str, Any],
    spec: Mapping[str, str],
    data: str | Path | None = None,
) -> None:
    """``fit`` an adapter on the model ``base`` (name, folder or id) and make ``folder`` its model.

    ``made_from`` is all that decides the result; ``spec`` are further lines of ``model.yaml``. The
    same call goes on with a training that was stopped, and does nothing once it has ended.

    Raises ``InputError`` if the folder holds something else, or was begun with another
    ``made_from``.
    """
    found = find_model(base, data=data)
    folder = folder.expanduser().resolve()
    begun = folder / "begun.json"
    given = json.loads(json.dumps({"base": base, **made_from}))
    if begun.is_file():
        known = read_json(begun)
        for key in given:
            if known.get(key) != given[key]:
                raise InputError(
                    f"{folder} was begun with {key} {known.get(key)!r}, this call has "
                    f"{given[key]!r}; give the same arguments to go on, or another folder"
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty, and no fine-tune was begun there; give another")
    if (folder / "model.yaml").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(begun, dump_json(given) + "\n")
    record = fit(found, folder / "adapter")
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    write_atomically(
        folder / "training.json", dump_json({**given, **record, "versions": versions}) + "\n"
    )
    at = str(Path(base).expanduser().resolve()) if Path(base).expanduser().exists() else base
    lines = {"base": at, "adapter": "adapter", **spec}
    write_atomically(folder / "model.yaml", yaml.safe_dump(lines, sort_keys=False, width=1000))
