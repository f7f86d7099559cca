"""Where a model's files are, whether all of them are there, and their hash; without torch."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open

from interp_kit.catalogue import gguf_file, is_gguf
from interp_kit.files import file_hash, files_hash, read_json, sha256
from interp_kit.specs import IS_INSTALLED, REPOSITORY, InputError, ModelSpec

CACHE = "INTERP_KIT_CACHE"  # environment variable: the folder of dequantised GGUF files
CHECKSUMS = "SHA256SUMS"  # of weights, beside them
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FETCHED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model's spec and where its files are on this machine."""

    spec: ModelSpec
    base: Path
    adapter: Path | None = None


def find_files(spec: ModelSpec) -> ModelFiles:
    """The folders of base and adapter; an id that is not in the cache is downloaded.

    Raises ``InputError`` for what is neither here nor on the hub, and for an adapter that is not
    saved as safetensors.
    """
    adapter = _adapter_folder(spec.adapter, spec) if spec.adapter else None
    return ModelFiles(spec=spec, base=_base_folder(spec), adapter=adapter)


def missing_files(spec: ModelSpec) -> list[str]:
    """The Hugging Face ids, or the GGUF file, of the model that are not on this machine."""
    if is_gguf(spec.base):
        try:
            gguf_file(spec.base, spec.name)
        except InputError:
            return [spec.base]
        return []
    places = [(spec.base, spec.revision), (spec.adapter, spec.adapter_revision)]
    return [p for p, revision in places if p and not Path(p).is_dir() and not _cached(p, revision)]


def only_in_clone(spec: ModelSpec) -> bool:
    """Whether the model is a shipped one whose adapter's weights the wheel leaves out."""
    folder = Path(spec.adapter or "")
    shipped = IS_INSTALLED and bool(spec.adapter) and folder.is_relative_to(REPOSITORY)
    return shipped and not (folder / ADAPTER_WEIGHTS).is_file()


def state_of_files(spec: ModelSpec) -> str:
    """What of a model's files is worth a note: ``[not on this machine: ...] ``; often nothing."""
    if only_in_clone(spec):
        return "[its weights come with a clone of the repository] "
    if missing := missing_files(spec):
        return f"[not on this machine: {', '.join(missing)}] "
    if is_gguf(spec.base) and is_complete(gguf_folder(spec)):
        return f"[dequantised in {gguf_folder(spec)}] "
    return ""


def gguf_folder(spec: ModelSpec) -> Path:
    """The folder into which the spec's GGUF file is dequantised: by its content and the dtype."""
    file = gguf_file(spec.base, spec.name)
    content = _sha256(file, file.stat().st_mtime_ns)[:16]
    return cache_folder() / "gguf" / f"{file.stem}-{spec.dtype}-{content}"


def cache_folder() -> Path:
    """Where what is made from models on this machine is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(home) / "interp-kit")


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint's, or an adapter's, config and every file of its weights are there."""
    if not any((folder / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / shard).is_file() for shard in shards)


def write_checksums(folder: Path) -> None:
    """Write ``SHA256SUMS`` for the weights in a folder, as ``sha256sum *.safetensors`` would."""
    lines = [f"{sha256(file)}  {file.name}\n" for file in sorted(folder.glob("*.safetensors"))]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def altered_weights(folder: Path) -> list[str]:
    """The weight files that are not what the folder's ``SHA256SUMS`` says, if it has one."""
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    stated = {name.lstrip(" *"): digest for digest, _, name in (s.partition(" ") for s in lines)}
    found = sorted(file for file in folder.glob("*.safetensors") if file.name in stated)
    return [file.name for file in found if sha256(file) != stated[file.name]]


def weights_hash(spec: ModelSpec) -> str:
    """Of the weights (the model's files, or their snapshot's commit) and how they are stored."""
    base = content_hash(spec.base, spec.revision)
    adapter = content_hash(spec.adapter, spec.adapter_revision)
    parts = [spec.dtype, spec.quantization or "", base, adapter]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def content_hash(place: str | None, revision: str | None) -> str:
    """Of a folder its config and weights, of a GGUF file itself, of an id its commit here."""
    folder = Path(place or "")
    if place and folder.is_dir():
        files = sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors"))
        return files_hash(files, folder)
    if place and is_gguf(place):
        return file_hash(gguf_file(place, place))
    found = snapshot(place, revision) if place else None
    return f"{place}@{revision}@{found.name if found else ''}"


def snapshot(place: str, revision: str | None) -> Path | None:
    """The folder of a Hugging Face id's files, named by its commit, if any of them are there."""
    configs = ("config.json", "adapter_config.json")
    found = (try_to_load_from_cache(place, config, revision=revision) for config in configs)
    return next((Path(file).parent for file in found if isinstance(file, str)), None)


@contextmanager
def from_disk(name: str) -> Iterator[None]:
    """Turn errors of reading a model's files into an ``InputError``."""
    try:
        yield
    except SafetensorError as error:
        raise InputError(
            f"model {name!r}: a weight file is corrupt ({error}); copy it again"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r}: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_weight_files(folder: Path, name: str) -> None:
    """Raise ``InputError`` for weights that are missing, not safetensors, unreadable or altered."""
    weights = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if not weights:
        came = (
            f"found only {', '.join(pickles)} (pickle, which can run code)" if pickles else "none"
        )
        raise InputError(
            f"model {name!r}: expected *.safetensors in {folder}, {came}; "
            "convert or copy the weights as safetensors"
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(read_json(index).get("weight_map", {}).values())
        if missing := sorted(shards - {file.name for file in weights}):
            raise InputError(
                f"model {name!r}: {len(missing)} of {len(shards)} weight files are missing in "
                f"{folder}, such as {missing[0]}; copy them, too"
            )
    for file in weights:
        tensor_shapes(file, name)
    check_checksums(folder, name)


def check_checksums(folder: Path, name: str) -> None:
    """Raise ``InputError`` if a weight file differs from the folder's ``SHA256SUMS``."""
    if altered := altered_weights(folder):
        raise InputError(
            f"model {name!r}: {folder / altered[0]} is damaged: its hash is not the one in "
            f"{CHECKSUMS} beside it; copy the file again or, if it was meant to change, write "
            f"{CHECKSUMS} again"
        )


def tensor_shapes(file: Path, name: str) -> dict[str, list[int]]:
    """Shapes by tensor name, read from the header; ``InputError`` if it is not readable."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in sorted(tensors.keys())}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"model {name!r}: {file} is not readable as safetensors ({first_line(error)}); "
            "copy it again"
        ) from None


# ------------------------------------------------------------------------------------- internals
@cache
def _sha256(file: Path, modified: int) -> str:
    return sha256(file)


def _cached(place: str, revision: str | None) -> bool:
    folder = snapshot(place, revision)
    return folder is not None and is_complete(folder)


def _base_folder(spec: ModelSpec) -> Path:
    """The base's folder: as given, dequantised, or the cache's copy of what the hub has.

    transformers, given an id, asks the hub for an adapter beside it even when told not to.
    """
    if is_gguf(spec.base):
        return gguf_folder(spec)
    if Path(spec.base).is_dir():
        return Path(spec.base)

    def load(*, local_files_only: bool = False) -> str:
        folder = snapshot_download(
            spec.base,
            revision=spec.revision,
            allow_patterns=FETCHED,
            local_files_only=local_files_only,
        )
        if not is_complete(Path(folder)):
            raise OSError("config.json or some of its *.safetensors are missing")
        return folder

    return Path(_local_first(load, spec.base, spec.name))


def _local_first(load: Callable[..., str], source: str, name: str) -> str:
    """``load`` from disk; only what is not on disk is asked of the hub."""
    try:
        return load(local_files_only=True)
    except (OSError, ValueError):
        pass
    try:
        return load()
    except GatedRepoError:
        problem = (
            f"is gated: accept its licence at {constants.ENDPOINT}/{source}, then set HF_TOKEN to "
            f"a token of that account ({constants.ENDPOINT}/settings/tokens)"
        )
    except RepositoryNotFoundError:
        problem = (
            "is not on the Hugging Face hub, or is private: check the id, or set HF_TOKEN to a "
            "token that may read it"
        )
    except (OSError, ValueError) as error:
        problem = (
            "is not on disk, and the Hugging Face hub does not provide it "
            f"({first_line(error)}); download it (`hf download {source}`) or check the id"
        )
    raise InputError(f"model {name!r}: {source!r} {problem}")


def _adapter_folder(adapter: str, spec: ModelSpec) -> Path:
    """The adapter's local folder, fetched from the hub if it is an id."""
    if only_in_clone(spec):
        raise InputError(
            f"model {spec.name!r}: the weights of its adapter are not in the installed package, "
            "but in a clone of the repository; give the clone's data folder: --data CLONE/data"
        )
    folder = Path(adapter)
    if not folder.is_dir():

        def load(*, local_files_only: bool = False) -> str:
            return snapshot_download(
                adapter,
                revision=spec.adapter_revision,
                allow_patterns=["*.json", "*.safetensors"],
                local_files_only=local_files_only,
            )

        folder = Path(_local_first(load, adapter, spec.name))
    for needed in ("adapter_config.json", ADAPTER_WEIGHTS):
        if not (folder / needed).is_file():
            pickled = [p.name for p in folder.iterdir() if p.suffix in PICKLES]
            came = f"; {pickled[0]} is a pickle, which can run code" if pickled else ""
            raise InputError(
                f"model {spec.name!r}: adapter folder {folder} has no {needed}{came}; "
                "save the adapter with PEFT's save_pretrained (safetensors)"
            )
    return folder
