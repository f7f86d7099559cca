"""``interp-kit doctor``: what is installed, which machine this is, and what is missing there."""

import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

import psutil

from interp_batch.options import CORES
from interp_batch.report.pictures import find_browser
from interp_kit.catalogue import (
    data_folders,
    gguf_file,
    is_gguf,
    list_models,
    list_scenarios,
)
from interp_kit.hub import cache_folder, missing_files, only_in_clone
from interp_kit.specs import InputError, ModelSpec

NAME = "interp-kit"
SHOWN = ("torch", "transformers", "transformer-lens", "peft", "papermill", "plotly")
ROOM = 2.0  # GiB that results and what is kept of activations soon take
OPTIONAL = {
    "bitsandbytes": "models in 4 or 8 bits: pip install 'interp-kit[quantization]'",
    "distributed": "--scheduler: pip install 'interp-kit[cluster]'",
}


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Facts by name; what is missing for some uses, and what for all, with what mends it."""

    facts: dict[str, str]
    limits: list[str]
    broken: list[str]


def examine(outputs: Path, data: Path | None) -> Examination:
    """Look at packages, device, disk, data and models; nothing is loaded or downloaded."""
    installed = {name: _version(name) for name in _required()}
    broken = [
        f"{name} is not installed: pip install {name}" for name, v in installed.items() if not v
    ]
    room = shutil.disk_usage(_existing(outputs)).free / 2**30
    if not os.access(_existing(outputs), os.W_OK):
        broken.append(f"{outputs} cannot be written to: give another folder with --outputs")
    elif room < ROOM:
        broken.append(f"{room:.1f} GiB are free in {outputs}: free {ROOM:g}, or give --outputs")
    device, memory = _device() if installed.get("torch") else ("unknown", "")
    models = list_models(data)
    remote, apart, unusable = _lacking(models)
    here = len(models) - len(remote) - len(apart) - len(unusable)
    facts = {
        NAME: f"{_version(NAME)}, Python {platform.python_version()}, {platform.platform()}",
        "packages": ", ".join(f"{name} {installed[name] or 'missing'}" for name in SHOWN),
        "device": device,
        "memory": memory,
        "outputs": f"{outputs.resolve()}, {room:.0f} GiB free",
        "kept": f"{cache_folder()}",
        "data": ", ".join(map(str, data_folders(data))),
        "models": f"{len(models)}, {here} on this machine",
        "scenarios": str(len(list_scenarios(data))),
    }
    limits = [*unusable]
    if remote:
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        when = "but HF_HUB_OFFLINE is set: unset it" if offline else "when first used"
        limits.append(f"weights to download, {when}: {', '.join(remote)}")
    if apart:
        limits.append(
            f"weights in a clone of the repository (--data CLONE/data): {', '.join(apart)}"
        )
    limits += [
        f"without {name}, no {what}" for name, what in OPTIONAL.items() if not find_spec(name)
    ]
    if not find_browser():
        limits.append("without Chromium or Chrome, no figures as PNG (`report --png`): install one")
    return Examination(facts={k: v for k, v in facts.items() if v}, limits=limits, broken=broken)


# ------------------------------------------------------------------------------------- internals
def _required() -> Iterator[str]:
    for line in requires(NAME) or ():
        if "extra ==" not in line and (name := re.match(r"[\w.-]+", line)):
            yield name[0]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _device() -> tuple[str, str]:
    """Where models run, and its memory."""
    import torch

    if torch.cuda.is_available():
        own = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        sizes = ", ".join(f"{gpu.total_memory / 2**30:.0f} GiB" for gpu in own)
        return f"cuda: {', '.join(gpu.name for gpu in own)}", sizes
    memory = psutil.virtual_memory()
    free = f"{memory.total / 2**30:.0f} GiB, {memory.available / 2**30:.0f} free"
    return f"cpu: {CORES} cores; no GPU is used", free


def _lacking(models: Sequence[ModelSpec]) -> tuple[list[str], list[str], list[str]]:
    """Names of models that are downloaded when first used, and of those in a clone only.

    Then, why others cannot be used.
    """
    remote, apart, unusable = [], [], []
    for spec in models:
        try:
            if only_in_clone(spec):
                apart.append(spec.name)
            elif is_gguf(spec.base):
                gguf_file(spec.base, spec.name)
            elif missing_files(spec):
                remote.append(spec.name)
        except InputError as error:
            unusable.append(str(error))
    return remote, apart, unusable
