"""``interp-kit diff BASE TUNED``: the run file of a comparison of which nothing is known before.

The folder of the comparison gets ``study/``: the run file, which can be edited and run again, specs
of models that have none, and the scenarios that were found. The first stage looks for what changed;
``add_found`` adds the notebooks that look for causes, on what was found.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer

from interp_kit.catalogue import find_model, load_scenario
from interp_kit.files import read_yaml, write_atomically
from interp_kit.formats import stream_texts
from interp_kit.hub import find_files, tensor_shapes
from interp_kit.specs import InputError, ModelSpec, as_path, slug

FOUND = "found_contexts"
SUMMARY = "94_what_changed"
LENGTH = 32  # tokens that a text goes on
FEWEST, MOST = 48, 192  # texts of each model
AMPLIFIED, READ = 32, 4  # that are amplified, and without which each change is taken out
STEERED = {"wanted": "negative", "evaluation": "", "strengths": [0.0, 0.5], "n_random": 2}
LENSED = {"n_documents": 16, "n_random": 16}
# Minutes of one core on SmolLM2 (135 M parameters): of the notebooks however few the texts are, and
# for each text that a model writes and both predict. With 63 texts they say 20; it took 18.3.
FIXED, EACH, MEASURED = 15.0, 0.04, 135e6


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison: the base's name, its run file, its data folder, the folder of its results.

    ``alike``: both models have one shape, so that activations of one can stand in the other.
    """

    base: str
    file: Path
    data: Path
    results: Path
    alike: bool


def write_study(
    base: str,
    tuned: str,
    *,
    against: Sequence[str] = (),
    texts: Path | None = None,
    budget: float,
    cores: int,
    outputs: Path,
    data: Path | None = None,
) -> Study:
    """Write the run file, and specs of models that are given by folder or id.

    A base that has the weights of the one that ``tuned`` names, and other settings, is that one.

    Raises ``InputError`` for a model that is not found or named twice, two that number their tokens
    otherwise, texts that cannot be read, and a budget in minutes that is too small for anything.
    """
    name = f"diff_{slug(tuned)}_{slug(base)}"
    results = outputs / name
    folder = results / "study"
    before = _tuned_from(find_model(base, data=data), tuned, data)
    given = [tuned, *against]
    if len({base, *given}) < 1 + len(given):
        raise InputError(
            f"BASE, TUNED and --against name a model twice ({', '.join([base, *given])}); name "
            "each once"
        )
    if texts:
        next(stream_texts(texts))  # refuses what is not readable
    specs = {each: _described(each, before, data) for each in given}
    after = before if "adapter" in (specs[tuned] or {}) else find_model(tuned, data=data)
    _check_vocabulary(before, after)
    study = Study(
        base=before.name,
        file=folder / f"{name}.yaml",
        data=folder / "data",
        results=results,
        alike=_alike_in_shape(before, after),
    )
    models = [_named(each, own, study.data) for each, own in specs.items()]
    n = _texts_within(budget, before, len(models), cores)
    shared: dict[str, Any] = {"subject": models[0], "n_texts": n, "length": LENGTH}
    apart = not study.alike or (specs[tuned] is None and after.origin != before.name)
    if apart:
        shared["base"] = before.name
    reading = shared | ({"texts": str(texts.resolve())} if texts else {})
    # In this order: 17 and 94 find the texts and differences that 16 makes.
    notebooks: dict[str, dict[str, Any]] = {"16_divergence": reading}
    if not apart:
        few = {"subject": models[0], "length": LENGTH}
        notebooks["18_weight_difference"] = few | {
            "n_texts": READ,
            "controls": models[1:],
            "by": "layer",
        }
        notebooks["19_amplification"] = few | {"n_texts": AMPLIFIED}
    notebooks |= {"17_diff_mining": {**reading}, SUMMARY: shared}
    run = {
        "about": f"What did fine-tuning change from {before.name} to {models[0]}?",
        "models": [before.name, *models],
        "notebooks": notebooks,
    }
    _write(study.file, run)
    return study


def add_found(study: Study) -> bool:
    """Add the notebooks that look for causes, if contexts were found; whether any were.

    They run on the scenario that ``94_what_changed`` wrote, which is copied to the study's data.
    """
    made = study.results / SUMMARY / "all-models" / "all-scenarios" / "scenarios"
    if not (made / f"{FOUND}.yaml").is_file():
        return False
    scenario = load_scenario(str(made / f"{FOUND}.yaml"))
    file = study.data / "scenarios" / f"{FOUND}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (made / f"{FOUND}.yaml").read_text(encoding="utf-8"))
    run = read_yaml(study.file)
    base, subject = run["models"][:2]
    run["scenarios"] = [FOUND]
    causes: dict[str, dict[str, Any]] = {"01_logit_lens": {}, "02_direct_logit_attribution": {}}
    if study.alike:
        causes["04_cross_model_patching"] = {"pairs": [[subject, base]]}
    if all(prompt.counterfactual for prompt in scenario.prompts):
        causes["03_activation_patching"] = {"positions": "decision"}
    if scenario.neutral and study.alike:
        causes["12_steering"] = {"subject": subject, "reference": base} | STEERED
    if scenario.neutral and "18_weight_difference" in run["notebooks"]:  # subject's own base
        written = [run["notebooks"][SUMMARY][key] for key in ("n_texts", "length")]
        own = {"subject": subject, "written": written}
        causes["10b_activation_difference_lens"] = own | LENSED
    run["notebooks"] |= causes
    _write(study.file, run)
    return True


# ------------------------------------------------------------------------------------- internals
def _tuned_from(before: ModelSpec, tuned: str, data: Path | None) -> ModelSpec:
    """The base by the name that ``tuned`` knows it by, if it has the same weights; else itself."""
    folder = as_path(tuned)
    if folder.is_dir() and not (folder / "model.yaml").is_file():
        return before
    spec = find_model(tuned, data=data)
    if before.tuned or not spec.tuned or spec.origin == before.name:
        return before
    origin = find_model(spec.origin, data=data)
    same = ("base", "revision", "dtype", "quantization")
    alike = all(getattr(origin, key) == getattr(before, key) for key in same)
    return origin if alike and not origin.tuned else before


def _described(tuned: str, before: ModelSpec, data: Path | None) -> dict[str, Any] | None:
    """The spec that a model needs which does not say what it was tuned from; None, if it does."""
    folder = as_path(tuned)
    if (folder / "adapter_config.json").is_file() and not (folder / "model.yaml").is_file():
        return {"base": _place(before), "adapter": str(folder.resolve())} | _alike(before)
    spec = find_model(tuned, data=data)
    if spec.tuned:
        return None
    if spec.base == before.base and spec.dtype == before.dtype:
        raise InputError(f"{tuned!r} and {before.name!r} are one model; name a fine-tune of it")
    return {"base": spec.base, "tuned_from": before.name} | _alike(before)


def _alike_in_shape(before: ModelSpec, after: ModelSpec) -> bool:
    """Whether the weights have the same names and sizes, but for tokens that one of them adds."""
    if before.base == after.base:
        return True
    ours, theirs = (
        {name: shape[1:] for name, shape in _shapes(spec).items()} for spec in (before, after)
    )
    return ours == theirs


def _check_vocabulary(before: ModelSpec, after: ModelSpec) -> None:
    """``InputError`` where a token id means something else to the second model."""
    files = [find_files(spec).base / "tokenizer.json" for spec in (before, after)]
    if files[0] == files[1] or not all(file.is_file() for file in files):
        return  # of a tokenizer in another format the notebooks say so
    ours, theirs = (Tokenizer.from_file(str(f)).get_vocab(with_added_tokens=False) for f in files)
    named = {id: token for token, id in theirs.items()}
    if any(named.get(id, token) != token for token, id in ours.items()):
        raise InputError(
            f"{before.name!r} and {after.name!r} number their tokens otherwise ({len(ours)} and "
            f"{len(theirs)} tokens), so what they predict cannot be compared token by token. With "
            "a scenario (two answers to a prompt) 01 to 03 look into each by itself, and "
            "90_compare_models and 14_open_ended compare what they decide and write"
        )


def _place(spec: ModelSpec) -> str:
    return spec.name if spec.name == slug(spec.name) else spec.base


def _alike(spec: ModelSpec) -> dict[str, Any]:
    keys = ("dtype", "chat_template", "prepend_bos")
    return {key: getattr(spec, key) for key in keys}


def _named(tuned: str, spec: Mapping[str, Any] | None, data: Path) -> str:
    """The name under which a run finds the model: its own, or that of a spec written for it."""
    if spec is None:
        return tuned
    name = slug(tuned)
    _write(data / "models" / name / "model.yaml", spec)
    return name


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def _texts_within(budget: float, base: ModelSpec, n_models: int, cores: int) -> int:
    """How many texts of each model the minutes allow; ``InputError`` where that is too few."""
    size = max(0.02, _parameters(base) / MEASURED)
    each = EACH * size * (1 + n_models) / cores
    fixed = FIXED * size / cores
    n = int((budget - fixed) / each)
    if n < FEWEST:
        raise InputError(
            f"--budget {budget:g}: {n_models + 1} models of this size need about "
            f"{fixed + FEWEST * each:.0f} minutes on {cores} cores; give so many, or fewer controls"
        )
    return min(n, MOST)


def _parameters(spec: ModelSpec) -> float:
    """How many weights the base has; of a GGUF file from its dequantised copy."""
    return float(sum(math.prod(shape) for shape in _shapes(spec).values()))


def _shapes(spec: ModelSpec) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in sorted(find_files(spec).base.glob("*.safetensors")):
        shapes |= tensor_shapes(file, spec.name)
    return shapes
