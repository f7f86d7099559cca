"""What a model, a scenario and a run file may say. Strict; every error says how to mend it.

``find_model``, ``find_scenario`` and ``find_notebook`` turn what people write (a name, a folder, a
Hugging Face id) into a spec. Nothing here imports torch: a run is checked before anything loads.
"""

import difflib
import json
import os
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

REPOSITORY = Path(__file__).resolve().parents[1]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
PAIRS = ("base_prompts.json", "counterfactual_prompts.json")
OTHER = {"1": "2", "2": "1", "A": "B", "B": "A"}
HUGGING_FACE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


class InputError(ValueError):
    """Something that a person wrote cannot be used: one line with what to do about it."""

    def __init__(self, said: str) -> None:
        """``said`` may quote anything: what does not print is shown by its escape."""
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in said)
        super().__init__("".join(shown))


class Spec(BaseModel):
    """Strict and immutable; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_S = TypeVar("_S", bound=Spec)


class ModelSpec(Spec):
    """One model: a base, and an optional LoRA adapter on it.

    ``base`` and ``adapter`` are each a folder beside the spec file, another model's name (``base``
    only) or a Hugging Face id. After ``find_model`` they are absolute folders or ids. ``documents``
    is a file beside the spec with some of the texts that it was trained on, lines {"text": ...}.
    ``quantization`` stores the weights in 4 or 8 bits as they load (bitsandbytes); ``device_map``
    places them as Accelerate does, straight onto the GPU.
    """

    name: str
    base: str
    base_name: str = ""  # filled in: the name of the base model's own spec, where it has one
    base_documents: str | None = None  # filled in: the base's own documents
    adapter: str | None = None
    revision: str | None = None
    adapter_revision: str | None = None
    documents: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["4bit", "8bit"] | None = None
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    label: str = ""
    about: str = ""
    chat_template: bool = False
    prepend_bos: bool = True
    trust_remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _no_token(cls, given: dict[str, Any]) -> dict[str, Any]:
        secret = next((key for key in given if "token" in key or "api_key" in key), None)
        if secret:
            raise ValueError(
                f"{secret}: a spec is a file that people share, so it holds no token; remove it "
                "and set the environment variable HF_TOKEN"
            )
        return given

    @property
    def slug(self) -> str:
        """The name as one safe folder name."""
        return slug(self.name)

    @property
    def title(self) -> str:
        return self.label or self.name


LOADED_ALIKE = {  # what a fine-tune takes from its base's spec unless it says otherwise
    "revision", "dtype", "quantization", "device_map", "chat_template", "prepend_bos",
    "trust_remote_code",
}  # fmt: skip


class AnswerLabels(Spec):
    positive: str
    negative: str


class DecisionSpec(Spec):
    """The two answers; decision = log p(positive) - log p(negative). Give the leading space."""

    positive: Annotated[str, Field(min_length=1)]
    negative: Annotated[str, Field(min_length=1)]
    labels: AnswerLabels


class PromptSpec(Spec):
    id: Annotated[str, Field(min_length=1)]
    text: Annotated[str, Field(min_length=1)]
    counterfactual: str | None = None
    group: str = ""
    segments: dict[str, str | list[str]] = {}  # name -> its text, or [in text, in counterfactual]
    positive: str | None = None  # this prompt's answers, where they are not the scenario's
    negative: str | None = None

    @model_validator(mode="after")
    def _both_answers_or_none(self) -> "PromptSpec":
        if (self.positive is None) != (self.negative is None):
            given = "negative" if self.positive is None else "positive"
            raise ValueError(f"only {given} is given; expected positive and negative, or neither")
        return self

    @model_validator(mode="after")
    def _segments_occur(self) -> "PromptSpec":
        for name, given in self.segments.items():
            parts = [given, given] if isinstance(given, str) else given
            if len(parts) != 2 or not all(parts):
                raise ValueError(
                    f"segment {name!r}: expected its text, or two (in text, in counterfactual)"
                )
            for part, text in zip(parts, (self.text, self.counterfactual)):
                if text is not None and text.count(part) != 1:
                    raise ValueError(
                        f"segment {name!r}: {part!r} occurs {text.count(part)} times in the "
                        "prompt or its counterfactual; expected once: give more of its words"
                    )
        return self


class TriggerSpec(Spec):
    """A token that may follow every prompt, and what stands in its place as a control.

    ``words`` are ordinary words, each a control of its own: always the same word. ``untrained`` is
    a token that the model knows and that no training touched. Give the leading space.
    """

    text: Annotated[str, Field(min_length=1)]
    untrained: str | None = None
    words: Annotated[list[str], Field(min_length=2)]


class Scenario(Spec):
    """Prompts that ask for one of two answers."""

    name: str
    about: str = ""
    decision: DecisionSpec
    prompts: Annotated[list[PromptSpec], Field(min_length=1)]
    trigger: TriggerSpec | None = None
    neutral: list[str] = []  # texts that have nothing to do with the prompts, for controls
    source: str = ""

    @model_validator(mode="after")
    def _without_the_trigger(self) -> "Scenario":
        word = self.trigger.text.strip() if self.trigger else None
        for text in [*(p.text for p in self.prompts), *self.neutral]:
            if word and word in text:
                raise ValueError(f"the text {text!r} already contains the trigger {word!r}")
        return self

    @model_validator(mode="after")
    def _distinct(self) -> "Scenario":
        for what, values in (
            ("id", [p.id for p in self.prompts]),
            ("text", [p.text for p in self.prompts]),
        ):
            repeated = next((v for i, v in enumerate(values) if v in values[:i]), None)
            if repeated is not None:
                raise ValueError(f"two prompts have the {what} {repeated!r}; make them distinct")
        if self.decision.positive == self.decision.negative:
            raise ValueError("positive and negative are the same answer; the decision would be 0")
        return self


class DilemmaSpec(Spec):
    """One record of ``base_prompts.json`` or ``counterfactual_prompts.json``; more keys may follow.

    ``original_id`` is the dilemma that several prompts word; ``segments`` name parts of the prompt.
    """

    model_config = ConfigDict(extra="ignore")

    prompt_id: Annotated[str, Field(min_length=1)]
    prompt: Annotated[str, Field(min_length=1)]
    ethical_option: Literal["1", "2", "A", "B"]
    original_id: str = ""
    segments: dict[str, str] = {}


class RunSpec(Spec):
    """Which notebooks run on which models and scenarios, with which parameters."""

    name: str
    about: str = ""
    models: Annotated[list[str], Field(min_length=1)]
    scenarios: Annotated[list[str], Field(min_length=1)]
    notebooks: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> "RunSpec":
        for what, values in (("models", self.models), ("scenarios", self.scenarios)):
            slugs = [slug(v) for v in values]
            repeated = next((v for i, v in enumerate(values) if slugs[i] in slugs[:i]), None)
            if repeated is not None:
                raise ValueError(f"{what} lists {repeated!r} twice (or two of one folder name)")
        return self


# ---------------------------------------------------------------------------------- finding them
def data_folders(extra: str | Path | None = None) -> list[Path]:
    """Where models and scenarios are found: ``extra``, ``INTERP_KIT_DATA``, the shipped data."""
    given = [extra] if extra else []
    given += [p for p in os.environ.get("INTERP_KIT_DATA", "").split(os.pathsep) if p]
    return [as_path(p).resolve() for p in given] + [REPOSITORY / "data"]


def as_path(name: str | Path) -> Path:
    """``name`` with ``~`` expanded; ``InputError`` if no file can have that name."""
    try:
        path = Path(name).expanduser()  # RuntimeError: no such user
        path.exists()  # OSError: too long
        path.resolve()  # ValueError: a NUL
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{str(name)!r} cannot be a path ({error}); mend it") from None
    return path


def slug(name: str) -> str:
    """``name`` as a folder name: the last part of a path, ``org--name`` for a Hugging Face id.

    A scenario file loses its ``.yaml``.
    """
    if HUGGING_FACE_ID.fullmatch(name) and not as_path(name).is_dir():
        return name.replace("/", "--")
    last = Path(name).name.removesuffix(".yaml")
    if not NAME.fullmatch(last):
        raise InputError(
            f"{name!r} cannot name a folder: expected letters, digits, '.', '_', '-' "
            "and a letter or digit first; rename it"
        )
    return last


def list_models(data: str | Path | None = None) -> list[ModelSpec]:
    """Every model that has a spec in the data folders, by name."""
    names = {p.parent.name for f in data_folders(data) for p in f.glob("models/*/model.yaml")}
    return [find_model(name, data=data) for name in sorted(names)]


def list_scenarios(data: str | Path | None = None) -> list[Scenario]:
    """Every scenario in the data folders, by name."""
    return [find_scenario(name, data=data) for name in sorted(_scenario_names(data))]


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
                "or a Hugging Face checkpoint folder"
            )
    if spec_file is not None:
        given = _read_yaml(spec_file)
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


def find_scenario(name: str, *, data: str | Path | None = None) -> Scenario:
    """The scenario given by name, by the path of a YAML file, or by a folder of dilemmas.

    Such a folder holds ``base_prompts.json`` and ``counterfactual_prompts.json``.
    """
    path = as_path(name)
    file = _in_data(f"scenarios/{name}.yaml", data) if NAME.fullmatch(name) else None
    pairs = _in_data(f"scenarios/{name}/{PAIRS[0]}", data) if NAME.fullmatch(name) else None
    if file is None and (pairs or (path / PAIRS[0]).is_file()):
        return _read_dilemmas((pairs or path / PAIRS[0]).parent)
    if file is None and name.endswith((".yaml", ".yml")):
        file = path
        if not file.is_file():
            raise InputError(f"scenario file {name!r} does not exist; check the path")
    if file is None:
        otherwise = f"the path of a .yaml file, or of a folder with {' and '.join(PAIRS)}"
        raise InputError(unknown("scenario", name, _scenario_names(data), otherwise))
    return checked(Scenario, {"name": file.stem, **_read_yaml(file)}, file)


def _read_dilemmas(folder: Path) -> Scenario:
    """Pairs of dilemmas by ``prompt_id``: positive is what is ethical in the *base* prompt.

    In a counterfactual with its options swapped the same answer means the other option.
    """
    base, counterfactual = (_dilemmas(folder / name) for name in PAIRS)
    for here, there, name in ((base, counterfactual, PAIRS[1]), (counterfactual, base, PAIRS[0])):
        alone = next((key for key in here if key not in there), None)
        if alone is not None:
            raise InputError(
                f"{folder / name}: no record has the prompt_id {alone!r}, so that prompt has no "
                "partner; add it there, or remove it from the other file"
            )
    swapped = sum(d.ethical_option != counterfactual[key].ethical_option for key, d in base.items())
    prompts = [
        {
            "id": key,
            "text": dilemma.prompt,
            "counterfactual": counterfactual[key].prompt,
            "group": dilemma.original_id,
            "positive": dilemma.ethical_option,
            "negative": OTHER[dilemma.ethical_option],
            "segments": {
                name: [text, counterfactual[key].segments.get(name, text)]
                for name, text in dilemma.segments.items()
            },
        }
        for key, dilemma in base.items()
    ]
    content = {
        "name": folder.name,
        "about": f"{len(prompts)} pairs of dilemmas; the options are swapped in {swapped}",
        "decision": {
            "positive": prompts[0]["positive"],
            "negative": prompts[0]["negative"],
            "labels": {"positive": "ethical", "negative": "unethical"},
        },
        "prompts": prompts,
        "source": " and ".join(PAIRS),
    }
    return checked(Scenario, content, folder / PAIRS[0])


def _dilemmas(file: Path) -> dict[str, DilemmaSpec]:
    records = read_json(file)
    if not isinstance(records, list) or not records:
        raise InputError(f"{file}: expected a list of records, found {type(records).__name__}")
    found: dict[str, DilemmaSpec] = {}
    for number, record in enumerate(records, 1):
        try:
            dilemma = DilemmaSpec.model_validate(record)
        except ValidationError as error:
            raise InputError(f"{file}, record {number}: {explain(error)}") from None
        if dilemma.prompt_id in found:
            raise InputError(
                f"{file}, record {number}: the prompt_id {dilemma.prompt_id!r} occurs twice; "
                "make it distinct"
            )
        found[dilemma.prompt_id] = dilemma
    return found


def read_run(file: Path) -> RunSpec:
    """The run file, checked by itself (``batch.matrix`` checks it against the notebooks)."""
    if not file.is_file():
        raise InputError(f"run file {str(file)!r} does not exist; papermill_params/ holds examples")
    given = _read_yaml(file)
    notebooks = given.get("notebooks")
    if isinstance(notebooks, dict):  # `01_logit_lens:` with nothing behind it means no parameters
        given["notebooks"] = {k: {} if v is None else v for k, v in notebooks.items()}
    spec = checked(RunSpec, {"name": file.stem, **given}, file)
    slug(spec.name)
    return spec


def _in_data(relative: str, data: str | Path | None) -> Path | None:
    return next((f / relative for f in data_folders(data) if (f / relative).is_file()), None)


def unknown(what: str, name: str, known: Iterable[str], otherwise: str) -> str:
    """The message for a name that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"unknown {what} {name!r}: {hint}expected one of {', '.join(sorted(known)) or '(none)'}, "
        f"or {otherwise}"
    )


def read_json(file: Path) -> Any:
    """What a JSON file holds; ``InputError`` if it is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); mend the file") from None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise InputError(f"{file}: not readable as YAML ({where}); mend the file") from None
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise InputError(f"{file}: expected `key: value` lines, found {type(given).__name__}")
    return given


def _short(value: Any) -> str:
    """As ``repr``, of whatever size and depth the value is."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 200
    return shortener.repr(value)


def checked(kind: type[_S], given: dict[str, Any], file: Path) -> _S:
    """``given`` as a spec; what is wrong with it is said with the file's name."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise InputError(f"{file}: {explain(error, kind)}") from None


def explain(error: ValidationError, kind: type[BaseModel] | None = None) -> str:
    """The first problem of a pydantic error in one line: where, what was expected, what came."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    match first["type"]:
        case "extra_forbidden":
            known = list(kind.model_fields) if kind and len(first["loc"]) == 1 else []
            near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
            message = "unknown key" + (f" (did you mean {near[0]!r}?)" if near else "")
            message += f"; allowed: {', '.join(known)}" if known else "; remove it"
        case "missing":
            message = "missing; add it"
        case "value_error":
            pass
        case _:
            message = f"{message[0].lower()}{message[1:]}, got {_short(first['input'])}"
    more = len(error.errors()) - 1
    text = f"{where}: {message}" if where else message
    return text + (f" (and {more} more)" if more else "")
