"""A study's folder: laid out once, and recognised by this and later versions.

``interp-kit.yaml`` in it names the version that laid it out, and the notebooks' copies by hash, so
that a later version knows which of them were edited, and which it would copy otherwise.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from interp_batch.matrix import NOTEBOOKS, notebook_hash
from interp_kit.catalogue import LOADED_ALIKE, STUDY, find_model, list_models
from interp_kit.files import read_json, read_yaml, write_atomically
from interp_kit.hub import snapshot
from interp_kit.specs import (
    IS_INSTALLED,
    PACKAGES,
    REPOSITORY,
    InputError,
    ModelSpec,
    Spec,
    as_path,
    checked,
    slug,
)

PROJECT = "interp-kit"
RUN_FILES = "papermill_params"
EXAMPLE = ("tiny-gemma2", "ipd-hybrid")  # a shipped base and an adapter on it
MARKED = (
    "# This folder is a study of interp-kit: commands that run in it search it before the shipped\n"
    "# data. Below, the version that laid it out, and the notebooks as they were copied.\n"
)


class Marker(Spec):
    """``interp-kit.yaml``: the version that laid a study out; notebook -> hash when copied."""

    laid_out_by: str
    notebooks: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A model as run files of a study name it, and the text of the spec that it needs, if any."""

    name: str
    spec: ModelSpec
    text: str = ""


def lay_out(folder: Path, model: str | None = None, adapters: Sequence[str] = ()) -> list[str]:
    """Write a new study, of which the first run file runs at once; returns its models' names.

    ``model`` is the base, ``adapters`` are LoRA fine-tunes of it: names, folders or Hugging Face
    ids; without, two shipped ones. Raises ``InputError``, and writes nothing, for a folder that
    holds anything, and for a model that is not found.
    """
    folder = as_path(folder)
    _check_empty(folder)
    if adapters and model is None:
        raise InputError("--adapter needs --model: the base that the adapter was trained on")
    base = _base(model or EXAMPLE[0])
    models = [base, *(_tuned(a, base) for a in (adapters if model else EXAMPLE[1:]))]
    names = [each.name for each in models]
    if len(set(names)) < len(names):
        raise InputError(
            f"two of the models would be named alike ({', '.join(names)}); rename a folder"
        )
    scenario = "betrayed" if _is_shipped(base.spec) else "capitals"
    specs = {f"models/{own.name}/model.yaml": own.text for own in models if own.text}
    about = {"models": names, "specs": specs, "scenario": scenario, "version": version(PROJECT)}
    files = {
        "README.md": _filled("README.md.jinja", name=folder.resolve().name, **about),
        f"{RUN_FILES}/first.yaml": _filled("run.yaml.jinja", **about),
        f"scenarios/{scenario}.yaml": _filled(f"{scenario}.yaml"),
        **specs,
        **{f"notebooks/{f.name}": _without_outputs(f) for f in sorted(NOTEBOOKS.glob("*.ipynb"))},
        STUDY: _marker(),  # last: what was not laid out to the end is no study
    }
    (folder / "models").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, text)
    return names


def run_files_here() -> list[Path]:
    """All run files of the study that the current folder is; ``InputError`` if it is none."""
    here = Path.cwd()
    found = sorted(Path(RUN_FILES).glob("*.yaml"))
    if (here / STUDY).is_file():
        if found:
            return found
        raise InputError(f"{here / RUN_FILES} has no run file (*.yaml); write one, or name a file")
    if here == PACKAGES and not IS_INSTALLED:
        why = "this is the repository, whose run files take hours together: `make run` runs four"
    else:
        why = f"{here} is no study: go to one, or lay one out (`interp-kit new FOLDER`)"
    names = f", such as {found[0]}" if found else ""
    raise InputError(f"expected a run file{names}; {why}")


def outdated(study: Path) -> str:
    """What is to be said of a study's notebooks of which other ones are installed now; often "".

    They were copied, and a later version may have other ones of the same names. Raises
    ``InputError`` for an ``interp-kit.yaml`` that is not one.
    """
    marker = _read_marker(study)
    new, own = _hashes(NOTEBOOKS), _hashes(study / "notebooks")
    changed = [
        name
        for name, copied in sorted(marker.notebooks.items())
        if name in own and new.get(name) not in (own[name], copied)
    ]
    kept = [name for name in changed if own[name] == marker.notebooks[name]]
    edited = [name for name in changed if name not in kept]
    said = ""
    if kept:
        said += f"; to use the new ones, remove these copies: {', '.join(kept)}"
    if edited:
        said += f"; edited here, so compare with {NOTEBOOKS}: {', '.join(edited)}"
    since = f"copied by {PROJECT} {marker.laid_out_by}, and {version(PROJECT)} has others"
    return f"the notebooks of {study} were {since}{said}" if said else ""


# ------------------------------------------------------------------------------------- internals
def _check_empty(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give a new folder")
    if not (folder / STUDY).is_file():
        raise InputError(f"{folder} is not empty; give a new folder (nothing was written)")
    by = f"laid out by {PROJECT} {_read_marker(folder).laid_out_by}, and this is {version(PROJECT)}"
    more = outdated(folder)
    raise InputError(
        f"{folder} is a study already, {by}; nothing was written: go on in it, or give a new folder"
        + (f" ({more})" if more else "")
    )


def _read_marker(study: Path) -> Marker:
    return checked(Marker, read_yaml(study / STUDY), study / STUDY)


def _hashes(notebooks: Path) -> dict[str, str]:
    return {file.stem: notebook_hash(file)[:16] for file in sorted(notebooks.glob("*.ipynb"))}


def _base(given: str) -> NamedModel:
    """The base by the name of its own spec, or with the spec that it needs."""
    spec = find_model(given)
    if spec.tuned and spec.adapter:
        raise InputError(
            f"--model {given!r} is an adapter on {spec.origin!r}; give that with --model, and "
            f"--adapter {given}"
        )
    known = [m for m in list_models() if (m.base == spec.base and not m.tuned) or m.name == given]
    if known:
        named = next((m for m in known if m.name == given), known[0])
        return NamedModel(name=named.name, spec=named)
    more = {key: getattr(spec, key) for key in sorted(LOADED_ALIKE & spec.model_fields_set)}
    asked = more.pop("chat_template", None)
    template = _has_template(spec) if asked is None else asked
    name = slug(given)
    about = {"base": spec.base, "label": Path(given).name, "chat_template": template, "more": more}
    return NamedModel(name=name, spec=spec, text=_filled("base.yaml.jinja", **about))


def _tuned(given: str, base: NamedModel) -> NamedModel:
    """A fine-tune by the name of its own spec, or, for a mere adapter, with a spec on ``base``."""
    folder = as_path(given)
    mere = (folder / "adapter_config.json").is_file() and not (folder / "model.yaml").is_file()
    known = mere or find_model(given)
    if isinstance(known, ModelSpec) and known.tuned:
        if known.adapter and known.base != base.spec.base:
            raise InputError(
                f"--adapter {given!r} was trained on {known.origin!r}, not on {base.name!r}; give "
                "that with --model"
            )
        name = str(folder.resolve()) if (folder / "model.yaml").is_file() else given
        return NamedModel(name=name, spec=known)
    if not mere and folder.is_dir():
        raise InputError(
            f"--adapter {given!r} has no adapter_config.json; expected a folder as PEFT's "
            "save_pretrained writes it"
        )
    place = str(folder.resolve()) if mere else given
    about = {"base": base.name, "adapter": place, "label": Path(given).name}
    text = _filled("adapter.yaml.jinja", **about)
    return NamedModel(name=slug(given), spec=base.spec, text=text)


def _is_shipped(spec: ModelSpec) -> bool:
    """Whether the model is a shipped one, whose tokenizer knows the words of the little world."""
    return Path(spec.base).is_relative_to(REPOSITORY)


def _has_template(spec: ModelSpec) -> bool:
    """Whether the base's tokenizer has a chat template; of an id, as far as it is downloaded."""
    folder = Path(spec.base) if Path(spec.base).is_dir() else snapshot(spec.base, spec.revision)
    if folder is None:
        return False
    config = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file():
        return True
    return config.is_file() and bool(read_json(config).get("chat_template"))


def _without_outputs(file: Path) -> str:
    """A notebook with the results of other models left out."""
    content = json.loads(file.read_text(encoding="utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _marker() -> str:
    marker = {"laid_out_by": version(PROJECT), "notebooks": _hashes(NOTEBOOKS)}
    return MARKED + yaml.safe_dump(marker, sort_keys=False)


@cache
def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader("interp_batch", "new_study"),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    made.filters["quoted"] = lambda value: json.dumps(value, ensure_ascii=False)
    return made


def _filled(template: str, /, **given: Any) -> str:
    return _templates().get_template(template).render(**given)
