"""Finds models, scenarios, evaluation sets and run files by the names that people write.

A name is looked up in the data folders; a path or a Hugging Face id works as well. Nothing here
imports torch: a run is checked before anything loads.
"""

import os
from pathlib import Path

from interp_kit.files import read_yaml
from interp_kit.formats import PAIRS, read_dilemmas
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

LOADED_ALIKE = {  # what a fine-tune takes from its base's spec unless it says otherwise
    "revision", "dtype", "quantization", "device_map", "chat_template", "prepend_bos",
    "trust_remote_code",
}  # fmt: skip


def data_folders(extra: str | Path | None = None) -> list[Path]:
    """Where models and scenarios are found: ``extra``, ``INTERP_KIT_DATA``, the shipped data."""
    given = [extra] if extra else []
    given += [p for p in os.environ.get("INTERP_KIT_DATA", "").split(os.pathsep) if p]
    return [as_path(p).resolve() for p in given] + [REPOSITORY / "data"]


def list_models(data: str | Path | None = None) -> list[ModelSpec]:
    """Every model that has a spec in the data folders, by name."""
    names = {p.parent.name for f in data_folders(data) for p in f.glob("models/*/model.yaml")}
    return [find_model(name, data=data) for name in sorted(names)]


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
    if HUGGING_FACE_ID.fullmatch(name) and not name.startswith("."):
        return ModelSpec(name=name, base=name)
    known = {p.parent.name for f in data_folders(data) for p in f.glob("models/*/model.yaml")}
    raise InputError(unknown("model", name, known, "a folder or a Hugging Face id (org/name)"))


def _resolve(spec: ModelSpec, spec_file: Path, data: str | Path | None) -> ModelSpec:
    """``base`` and ``adapter`` as absolute folders or Hugging Face ids.

    What the spec does not say of how to load, it takes from its base's own spec.
    """
    beside = spec_file.parent
    for given in (spec.base, spec.adapter, spec.documents):
        as_path(beside / (given or ""))
    base, inherited = spec.base, {}
    if (beside / base).is_dir():
        base = str((beside / base).resolve())
    elif NAME.fullmatch(base) and _in_data(f"models/{base}/model.yaml", data):
        if base == beside.name:
            raise InputError(f"{spec_file}: base names the model itself; give a folder or an id")
        parent = find_model(base, data=data)
        if parent.adapter:
            raise InputError(
                f"{spec_file}: base {base!r} is itself an adapter on {parent.base_name!r}; "
                "name a base model"
            )
        inherited = {"base_name": base, "base_documents": parent.documents}
        for key in LOADED_ALIKE - spec.model_fields_set:
            inherited[key] = getattr(parent, key)
        base = parent.base
    elif not HUGGING_FACE_ID.fullmatch(base):
        known = {p.parent.name for f in data_folders(data) for p in f.glob("models/*/model.yaml")}
        raise InputError(
            f"{spec_file}: " + unknown("base", base, known, "a folder beside the spec, or org/name")
        )
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


def load_scenario(name: str, *, data: str | Path | None = None) -> Scenario:
    """The scenario given by name, by the path of a YAML file, or by a folder of dilemmas.

    Such a folder holds ``base_prompts.json`` and ``counterfactual_prompts.json``.
    """
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


def read_run(file: Path) -> RunSpec:
    """The run file, checked by itself (``batch.matrix`` checks it against the notebooks)."""
    if not file.is_file():
        raise InputError(f"run file {str(file)!r} does not exist; papermill_params/ holds examples")
    given = read_yaml(file)
    notebooks = given.get("notebooks")
    if isinstance(notebooks, dict):  # `01_logit_lens:` with nothing behind it means no parameters
        given["notebooks"] = {k: {} if v is None else v for k, v in notebooks.items()}
    spec = checked(RunSpec, {"name": file.stem, **given}, file)
    slug(spec.name)
    return spec


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
