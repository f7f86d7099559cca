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
# Minutes of one core on SmolLM2 (135 M parameters), from runs of 88 and 134 texts: of the
# notebooks however few the texts are, and for each text that a model writes and both predict.
FIXED, EACH, MEASURED = 13.0, 0.04, 135e6


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison: the base's name, its run file, its data folder, the folder of its results."""

    base: str
    file: Path
    data: Path
    results: Path


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

    Raises ``InputError`` for a model that is not found or named twice, texts that cannot be read,
    and a budget in minutes that is too small for anything.
    """
    name = f"diff_{slug(tuned)}_{slug(base)}"
    results = outputs / name
    folder = results / "study"
    before = _tuned_from(find_model(base, data=data), tuned, data)
    study = Study(
        base=before.name, file=folder / f"{name}.yaml", data=folder / "data", results=results
    )
    given = [tuned, *against]
    if len({base, *given}) < 1 + len(given):
        raise InputError(
            f"BASE, TUNED and --against name a model twice ({', '.join([base, *given])}); name "
            "each once"
        )
    if texts:
        next(stream_texts(texts))  # refuses what is not readable
    specs = {each: _described(each, before, data) for each in given}
    models = [_named(each, own, study.data) for each, own in specs.items()]
    n = _texts_within(budget, before, len(models), cores)
    shared: dict[str, Any] = {"subject": models[0], "n_texts": n, "length": LENGTH}
    apart = specs[tuned] is None and find_model(tuned, data=data).origin != before.name
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
    causes: dict[str, dict[str, Any]] = {
        "01_logit_lens": {},
        "02_direct_logit_attribution": {},
        "04_cross_model_patching": {"pairs": [[subject, base]]},
    }
    if all(prompt.counterfactual for prompt in scenario.prompts):
        causes["03_activation_patching"] = {"positions": "decision"}
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
    files = sorted(find_files(spec).base.glob("*.safetensors"))
    shapes = [shape for file in files for shape in tensor_shapes(file, spec.name).values()]
    return float(sum(math.prod(shape) for shape in shapes))
