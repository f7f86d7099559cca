"""What a model, a scenario and a run file may say. Strict; every error says how to fix it.

``find_model``, ``find_scenario`` and ``find_notebook`` turn what people write (a name, a folder, a
Hugging Face id) into a spec. Nothing here imports torch: a run is checked before anything loads.
"""

import difflib
import re
import reprlib
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PACKAGES = Path(__file__).resolve().parents[1]  # the folder that holds the packages
_SHIPPED = Path(__file__).resolve().parent / "shipped"  # a wheel's notebooks, run files and data
IS_INSTALLED = _SHIPPED.is_dir()  # from a wheel: nothing is written there
REPOSITORY = _SHIPPED if IS_INSTALLED else PACKAGES
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
HUGGING_FACE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


class InputError(ValueError):
    """Input that cannot be used: one line with what was expected, what came and how to fix it."""

    def __init__(self, said: str) -> None:
        """``said`` may quote anything: what does not print is shown by its escape."""
        shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in said)
        super().__init__("".join(shown))


class Spec(BaseModel):
    """Strict and immutable; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


NonEmpty = Annotated[str, Field(min_length=1)]
_S = TypeVar("_S", bound=Spec)


class ModelSpec(Spec):
    """One model: whole weights, or an adapter on a base.

    ``base`` and ``adapter`` are each a folder beside the spec file, another model's name (``base``
    only) or a Hugging Face id. After ``find_model`` they are absolute folders or ids.
    ``tuned_from`` is the model, by name, folder or id, that whole weights were tuned from: a full
    fine-tune, a later checkpoint, a merged model. ``documents`` is a file beside the spec with some
    of the texts that it was trained on, lines {"text": ...}. ``quantization`` stores the weights in
    4 or 8 bits as they load (bitsandbytes); ``device_map`` places them as Accelerate does, straight
    onto the GPU.
    """

    name: str
    base: str
    base_name: str = ""  # filled in: the name of the base model's own spec, where it has one
    base_documents: str | None = None  # filled in: the base's own documents
    adapter: str | None = None
    tuned_from: str | None = None
    parent: "ModelSpec | None" = None  # filled in: the spec of tuned_from
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

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSpec":
        if self.adapter and self.tuned_from:
            raise ValueError(
                "tuned_from: an adapter was tuned from its base; remove tuned_from, or the adapter"
            )
        return self

    @property
    def tuned(self) -> bool:
        """Whether it is known what the model was tuned from."""
        return bool(self.adapter or self.parent)

    @property
    def origin(self) -> str:
        """The name of what the model was tuned from; its own, if that is not known."""
        if self.parent:
            return self.parent.name
        return (self.base_name or self.base) if self.adapter else self.name

    @property
    def slug(self) -> str:
        """The name as one safe folder name."""
        return slug(self.name)

    @property
    def title(self) -> str:
        return self.label or self.name


class AnswerLabels(Spec):
    positive: str
    negative: str


class DecisionSpec(Spec):
    """The two answers; decision = log p(positive) - log p(negative). Give the leading space."""

    positive: NonEmpty
    negative: NonEmpty
    labels: AnswerLabels


class PromptSpec(Spec):
    id: NonEmpty
    text: NonEmpty
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
                    f"segment {name!r}: expected its text, or two texts (in the prompt, in the "
                    f"counterfactual), got {_short(given)}"
                )
            for part, text in zip(parts, (self.text, self.counterfactual)):
                if text is not None and text.count(part) != 1:
                    raise ValueError(
                        f"segment {name!r}: {part!r} occurs {text.count(part)} times in the "
                        "prompt or its counterfactual, expected once; give more of its words"
                    )
        return self


class TriggerSpec(Spec):
    """A token that may follow every prompt, and what stands in its place as a control.

    ``words`` are ordinary words, each a control of its own: always the same word. ``untrained`` is
    a token that the model knows and that no training touched. Give the leading space.
    """

    text: NonEmpty
    untrained: str | None = None
    words: Annotated[list[str], Field(min_length=2)]


class Scenario(Spec):
    """Prompts that ask for one of two answers.

    ``chat_template: false``: the model reads them as they are written, even if it has a template.
    """

    name: str
    about: str = ""
    decision: DecisionSpec
    prompts: Annotated[list[PromptSpec], Field(min_length=1)]
    trigger: TriggerSpec | None = None
    chat_template: bool = True
    neutral: list[str] = []  # texts that have nothing to do with the prompts, for controls
    source: str = ""

    @model_validator(mode="after")
    def _without_the_trigger(self) -> "Scenario":
        word = self.trigger.text.strip() if self.trigger else None
        for text in [*(p.text for p in self.prompts), *self.neutral]:
            if word and word in text:
                raise ValueError(
                    f"the text {text!r} already contains the trigger {word!r}; reword it"
                )
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
            raise ValueError("positive and negative are the same answer; expected two that differ")
        return self


class RunSpec(Spec):
    """Which notebooks run on which models and scenarios, with which parameters.

    ``checkpoints`` are further models: states of one training, in its order.
    """

    name: str
    about: str = ""
    models: Annotated[list[str], Field(min_length=1)]
    checkpoints: list[str] = []
    scenarios: list[str] = []
    notebooks: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> "RunSpec":
        every = [*self.models, *self.checkpoints]
        for what, values in (("models", every), ("scenarios", self.scenarios)):
            slugs = [slug(v) for v in values]
            repeated = next((v for i, v in enumerate(values) if slugs[i] in slugs[:i]), None)
            if repeated is not None:
                raise ValueError(
                    f"{what} lists {repeated!r} twice, or two that share one folder name; "
                    "remove or rename one"
                )
        return self


def as_path(name: str | Path) -> Path:
    """``name`` with ``~`` expanded; ``InputError`` if no file can have that name."""
    try:
        path = Path(name).expanduser()  # RuntimeError: no such user
        path.exists()  # OSError: too long
        path.resolve()  # ValueError: a NUL
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{str(name)!r} cannot be a path ({error}); choose another") from None
    return path


def slug(name: str) -> str:
    """``name`` as a folder name: the last part of a path, ``org--name`` for a Hugging Face id.

    A scenario file loses its ``.yaml``; of ``FILE.json#NAME`` it is the name.
    """
    name = name.rpartition("#")[2]
    if HUGGING_FACE_ID.fullmatch(name) and not as_path(name).is_dir():
        return name.replace("/", "--")
    last = Path(name).name.removesuffix(".yaml")
    if not NAME.fullmatch(last):
        raise InputError(
            f"{name!r} cannot name a folder: expected letters, digits, '.', '_', '-' "
            "and a letter or digit first; rename it"
        )
    return last


def unknown(what: str, name: str, known: Iterable[str], otherwise: str) -> str:
    """The error text for an unknown name, with the known name nearest to it."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"unknown {what} {name!r}: {hint}expected one of {', '.join(sorted(known)) or '(none)'}, "
        f"or {otherwise}"
    )


def _short(value: Any) -> str:
    """``repr``, cut short: the value may be of any size and depth."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 200
    return shortener.repr(value)


def checked(kind: type[_S], given: object, file: Path) -> _S:
    """``given`` as a spec; ``InputError`` names the file and what is wrong in it."""
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
        case "string_type" if isinstance(first["input"], bool | int | float | date):
            message = f"expected text, got {_short(first['input'])}: quote it"
            if isinstance(first["input"], bool):
                message += "; YAML reads yes, no, on, off, true and false without quotes so"
        case _:
            message = f"{message[0].lower()}{message[1:]}, got {_short(first['input'])}"
    more = len(error.errors()) - 1
    text = f"{where}: {message}" if where else message
    return text + (f" (and {more} more)" if more else "")
