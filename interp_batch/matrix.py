"""Expands a run file into the cells of its matrix; checks every parameter before a kernel starts.

The parameters of a notebook determine how often it runs: a notebook with ``model`` runs once for
each model, one with ``models`` once for all of them; likewise ``scenario`` and ``scenarios``.
Every notebook has the parameter ``output``, the folder that it writes to.
"""

import ast
import contextlib
import fnmatch
import hashlib
import io
import json
import logging
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Literal, Optional, Union

import papermill
from pydantic import TypeAdapter, ValidationError

from interp_kit.catalogue import STUDY, data_folders, find_model, load_scenario
from interp_kit.files import file_hash, files_hash
from interp_kit.hub import weights_hash
from interp_kit.specs import (
    NAME,
    PACKAGES,
    REPOSITORY,
    InputError,
    ModelSpec,
    RunSpec,
    Scenario,
    as_path,
    explain,
    slug,
    unknown,
)

NOTEBOOKS = REPOSITORY / "notebooks"
ALL_MODELS, ALL_SCENARIOS = "all-models", "all-scenarios"
SET_BY_RUN = ("model", "models", "checkpoints", "scenario", "scenarios", "output")
# Parameters whose values name models of the run, files in a data folder, or paths.
NAMING_MODELS = {"pairs", "base", "reference", "other", "others", "subject", "controls"}
NAMING_FILES = {
    "evaluation": "evaluations/{}/*",
    "universe": "universes/{}.json",
    "twin": "universes/{}.json",  # the universe with the opposite truth
}
NAMING_PATHS = {"texts", "lens"}
# Notebooks call these packages, so a result depends on their sources. It does not depend on
# interp_batch, which runs notebooks and reports what they wrote, and cannot change a number.
COMPUTING = ("interp_kit", "organisms")
VERSIONS = ("transformer-lens", "torch", "transformers", "peft", "plotly", "pandas", "numpy")

# The names that a parameter's annotation may use.
TYPES: dict[str, Any] = {t.__name__: t for t in (str, int, float, bool, list, dict, tuple)}
TYPES |= {"Literal": Literal, "Optional": Optional, "Union": Union, "None": None}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of one notebook. ``key`` changes whenever the result might change."""

    notebook: Path
    model: str
    scenario: str
    parameters: dict[str, Any]
    folder: Path
    key: str

    @property
    def id(self) -> str:
        return f"{self.notebook.stem}/{self.model}/{self.scenario}"

    @property
    def run_folder(self) -> Path:
        return self.folder.parents[2]

    @property
    def failed_folder(self) -> Path:
        """Where the files of a failed attempt are kept, apart from results."""
        return self.run_folder / "failed" / self.id


def expand(
    run: RunSpec,
    *,
    outputs: Path,
    data: str | Path | None = None,
    notebooks: Path = NOTEBOOKS,
) -> list[Cell]:
    """The cells of the matrix, in the order of the run file.

    A notebook of a study goes before the one of the same name in ``notebooks``.

    Raises ``InputError`` for an unknown model, scenario, notebook or parameter, and a value of the
    wrong type.
    """
    for name in (*run.models, *run.checkpoints):
        find_model(name, data=data)
    for name in run.scenarios:
        load_scenario(name, data=data)
    cells, hashes = [], InputHashes(data)
    folders = [*_notebooks_of_studies(data), notebooks]
    for name, given in run.notebooks.items():
        file = _find_notebook(name, folders)
        if any(cell.notebook == file for cell in cells):
            raise InputError(f"notebooks lists {file.stem!r} twice; keep one of them")
        checked = _check_parameters(file, given)
        for own_models, own_scenarios in _visits(file, run):
            parameters = checked | own_models | own_scenarios
            _check_named_models(file, parameters, [*run.models, *run.checkpoints])
            folder = (
                Path(outputs)
                / run.name
                / file.stem
                / _folder_name(own_models, ALL_MODELS)
                / _folder_name(own_scenarios, ALL_SCENARIOS)
            )
            cells.append(
                Cell(
                    notebook=file,
                    model=folder.parent.name,
                    scenario=folder.name,
                    parameters=parameters,
                    folder=folder,
                    key=content_key(file, parameters, data, hashes),
                )
            )
    return cells


def matching(cells: list[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells whose id (``notebook/model/scenario``) matches a pattern; all without patterns.

    Raises ``InputError`` for a pattern that matches nothing.
    """
    for pattern in only:
        if not any(_matches(cell, pattern) for cell in cells):
            raise InputError(
                f"--only {pattern!r} matches no cell; expected a pattern for ids such as "
                f"{cells[0].id!r} (or {cells[0].notebook.stem!r})"
            )
    return [c for c in cells if not only or any(_matches(c, pattern) for pattern in only)]


def _visits(file: Path, run: RunSpec) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    takes = parameters_of(file)
    if "output" not in takes:
        raise InputError(f'{file}: its parameters cell lacks `output: str = ""`; add it')
    by_model = _axis(file, takes, "model", [*run.models, *run.checkpoints])
    if "checkpoints" in takes:
        by_model = [own | {"checkpoints": run.checkpoints} for own in by_model]
    by_scenario = _axis(file, takes, "scenario", run.scenarios)
    yield from product(by_model, by_scenario)


def _axis(file: Path, takes: dict[str, Any], one: str, names: list[str]) -> list[dict[str, Any]]:
    if not names and {one, f"{one}s"} & set(takes):
        raise InputError(
            f"notebook {file.stem} takes {one}s, and the run file names none; add some"
        )
    if one in takes:
        return [{one: name} for name in names]
    return [{f"{one}s": list(names)} if f"{one}s" in takes else {}]


def _folder_name(own: dict[str, Any], for_all: str) -> str:
    value = next(iter(own.values()), None)
    return slug(value) if isinstance(value, str) else for_all


def _matches(cell: Cell, pattern: str) -> bool:
    names = (cell.id, cell.notebook.stem, cell.model, cell.scenario)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


# ------------------------------------------------------------------------------------ parameters
def _notebooks_of_studies(data: str | Path | None) -> list[Path]:
    return [folder / "notebooks" for folder in data_folders(data) if (folder / STUDY).is_file()]


def _find_notebook(name: str, folders: Sequence[Path]) -> Path:
    files = [as_path(folder / f"{name.removesuffix('.ipynb')}.ipynb") for folder in folders]
    found = next((file for file in files if file.is_file()), None)
    if not NAME.fullmatch(name) or found is None:
        known = {p.stem for folder in folders for p in folder.glob("*.ipynb")}
        raise InputError(unknown("notebook", name, known, f"a file in {folders[0].name}/"))
    return found


def list_notebooks(data: str | Path | None = None) -> dict[str, str]:
    """Notebook name -> its title, of the shipped ones and those of studies."""
    folders = [NOTEBOOKS, *reversed(_notebooks_of_studies(data))]
    files = {file.stem: file for folder in folders for file in folder.glob("*.ipynb")}
    return {name: title_of(files[name]) for name in sorted(files)}


@cache
def title_of(file: Path) -> str:
    """The heading of a notebook."""
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            return "".join(cell["source"]).lstrip("# ").splitlines()[0]
    return ""


@cache
def parameters_of(file: Path) -> dict[str, Any]:
    with contextlib.redirect_stderr(io.StringIO()):
        logging.getLogger("papermill").setLevel(logging.ERROR)
        found = papermill.inspect_notebook(str(file))
    if not found:
        raise InputError(f"{file}: no cell is tagged 'parameters'; tag the one that sets them")
    return found


def defaults_of(file: Path) -> dict[str, Any]:
    """What the parameters cell of a notebook sets, as far as it is written out there."""
    found = {}
    for name, parameter in parameters_of(file).items():
        with contextlib.suppress(ValueError, SyntaxError):  # an expression
            found[name] = ast.literal_eval(parameter["default"])
    return found


def _check_parameters(file: Path, given: dict[str, Any]) -> dict[str, Any]:
    takes = parameters_of(file)
    checked = {}
    for name, value in given.items():
        where = f"notebook {file.stem}: parameter {name!r}"
        if name in SET_BY_RUN:
            raise InputError(f"{where} is set by the run file's models and scenarios; remove it")
        if name not in takes:
            free = sorted(set(takes) - set(SET_BY_RUN))
            raise InputError(unknown(f"parameter of {file.stem}", name, free, "none at all"))
        annotation = takes[name]["inferred_type_name"]
        try:
            kind = eval(annotation, {"__builtins__": {}}, TYPES)  # noqa: S307 - types only
        except Exception:
            raise InputError(f"{where} has the type {annotation!r}, which is not known") from None
        try:
            checked[name] = TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError as error:
            raise InputError(f"{where} ({annotation}): {explain(error)}") from None
    return checked


def _check_named_models(file: Path, parameters: dict[str, Any], models: list[str]) -> None:
    """Raise ``InputError`` for a parameter that names a model outside the run, also by default."""
    everything = defaults_of(file) | parameters
    for name in sorted(NAMING_MODELS & set(everything)):
        where, given = f"notebook {file.stem}: parameter {name!r}", everything[name]
        wrong = next((pair for pair in given if len(pair) != 2), None) if name == "pairs" else None
        if wrong is not None:
            raise InputError(f"{where} holds {wrong}; expected [source, target]")
        for model in _listed(everything, name):
            if model not in models and name not in parameters:
                raise InputError(
                    f"{where} is not given, and its default names {model!r}, which is no model of "
                    f"this run ({', '.join(models)}); give it"
                )
            if model not in models:
                message = unknown("model", model, models, "add it to the run's models")
                raise InputError(f"{where}: {message}")


def _listed(parameters: dict[str, Any], name: str) -> list[str]:
    """The names in a parameter: a string, a list or a list of pairs; "" is no name."""
    given = parameters.get(name, [])
    items = [given] if isinstance(given, str) else given
    return [n for item in items for n in ([item] if isinstance(item, str) else item) if n]


def named_files(notebook: Path, parameters: dict[str, Any], data: str | Path | None) -> list[Path]:
    """The evaluation sets, universes and texts that parameters name, set or by default.

    Raises ``InputError`` for a name or a path without files.
    """
    found: list[Path] = []
    for name in sorted(NAMING_PATHS & set(parameters)):
        found += _files_at(parameters[name], f"notebook {notebook.stem}: parameter {name!r}")
    for name in NAMING_FILES:
        if name in parameters_of(notebook):
            found += _files_named(name, str((defaults_of(notebook) | parameters)[name]), data)
    return found


def _files_at(path: str, where: str) -> list[Path]:
    """The file, or the files of the folder, at a path; none for ""."""
    if not path:
        return []
    files = [f for f in (Path(path), *sorted(Path(path).glob("*"))) if f.is_file()]
    if not files:
        raise InputError(f"{where}: {path!r} is no file and no folder with files; check the path")
    return files


def _files_named(name: str, given: str, data: str | Path | None) -> list[Path]:
    """The files that ``given``, the value of the parameter ``name``, means: a name or a path.

    None for "", which a notebook that needs one refuses (``needs``).
    """
    if not given:
        return []
    place = NAMING_FILES[name]
    folders = data_folders(data) if NAME.fullmatch(given) else []
    named = [f for d in folders for f in sorted(d.glob(place.format(given)))]
    files = [f for f in (*named, as_path(given)) if f.is_file()]
    if not files:
        kind = place.split("/")[0]
        known = {f.stem for folder in data_folders(data) for f in folder.glob(f"{kind}/*")}
        raise InputError(unknown(name, given, known, f"a path, or a name in data/{kind}"))
    return files


# ----------------------------------------------------------------------------------- content keys
def content_key(
    file: Path,
    parameters: dict[str, Any],
    data: str | Path | None,
    hashes: "InputHashes | None" = None,
) -> str:
    """Hash of everything that determines the result: sources, parameters, inputs, versions.

    With ``hashes`` shared between cells, each input is read once.
    """
    hashes = hashes or InputHashes(data)
    named = ("model", "models", *sorted(NAMING_MODELS))
    everything = defaults_of(file) | parameters
    models = [m for name in named for m in _listed(everything, name)]
    scenarios = [s for name in ("scenario", "scenarios") for s in _listed(parameters, name)]
    inputs = [
        *map(hashes.of_model, models),
        *map(hashes.of_scenario, scenarios),
        *(file_hash(f) for f in named_files(file, parameters, data)),
    ]
    parts = [
        notebook_hash(file),
        json.dumps(parameters, sort_keys=True),
        _sources_hash(),
        *inputs,
        platform.python_version(),
        *_versions(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


class InputHashes:
    """The hashes of models and scenarios by name, each computed once."""

    def __init__(self, data: str | Path | None) -> None:
        self.of_model = cache(lambda name: _model_hash(find_model(name, data=data)))
        self.of_scenario = cache(lambda name: _scenario_hash(load_scenario(name, data=data)))


def _sources_hash() -> str:
    files = [file for name in COMPUTING for file in sorted((PACKAGES / name).rglob("*.py"))]
    return files_hash(files, PACKAGES)


@cache
def _versions() -> list[str]:
    return [f"{name}={version(name)}" for name in VERSIONS]


def notebook_hash(file: Path) -> str:
    """Hash of the notebook's sources and tags, not of its outputs."""
    return _notebook_hash(file, file.stat().st_mtime_ns)


@cache
def _notebook_hash(file: Path, modified: int) -> str:
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    kept = [("".join(c["source"]), c["metadata"].get("tags"), c["cell_type"]) for c in cells]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def _scenario_hash(scenario: Scenario) -> str:
    return hashlib.sha256(scenario.model_dump_json().encode()).hexdigest()


def _model_hash(spec: ModelSpec) -> str:
    own = {"base", "adapter", "documents", "base_documents", "tuned_from", "parent"}
    parts = [spec.model_dump_json(exclude=own)]
    parts.append(_model_hash(spec.parent) if spec.parent else "")
    for file in (spec.documents, spec.base_documents):
        parts.append(file_hash(Path(file)) if file else "")
    return hashlib.sha256("\0".join([*parts, weights_hash(spec)]).encode()).hexdigest()
