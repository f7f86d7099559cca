"""Where a model's files are, whether all of them are there, and their hash; without torch."""

import hashlib
import json
from functools import cache
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from interp_kit.specs import ModelSpec

CHECKSUMS = "SHA256SUMS"  # of weights, beside them
HASHED_WHOLE = 256 * 2**20  # bytes; of a larger file the hash holds size and time only


def absent(spec: ModelSpec) -> list[str]:
    """The Hugging Face ids of the model whose files are not on this machine."""
    places = [(spec.base, spec.revision), (spec.adapter, spec.adapter_revision)]
    return [p for p, revision in places if p and not Path(p).is_dir() and not _cached(p, revision)]


def whole(folder: Path) -> bool:
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
    lines = [f"{_sha256(file)}  {file.name}\n" for file in sorted(folder.glob("*.safetensors"))]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def altered_weights(folder: Path) -> list[str]:
    """The weight files that are not what the folder's ``SHA256SUMS`` says, if it has one."""
    try:
        lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    stated = {name.lstrip(" *"): digest for digest, _, name in (s.partition(" ") for s in lines)}
    found = sorted(file for file in folder.glob("*.safetensors") if file.name in stated)
    return [file.name for file in found if _sha256(file) != stated[file.name]]


def weights_hash(spec: ModelSpec) -> str:
    """Of the weights (the model's files, or their snapshot's commit) and how they are stored."""
    parts = [spec.dtype, spec.quantization or ""]
    for place, revision in ((spec.base, spec.revision), (spec.adapter, spec.adapter_revision)):
        folder = Path(place or "")
        if place and folder.is_dir():
            files = sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors"))
            parts.append(files_hash(files, folder))
        else:
            snapshot = _snapshot(place, revision) if place else None
            parts.append(f"{place}@{revision}@{snapshot.name if snapshot else ''}")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def files_hash(files: list[Path], root: Path) -> str:
    """Of the files' contents and their names below ``root``."""
    return hashlib.sha256(
        "\0".join(f"{f.relative_to(root)}={file_hash(f)}" for f in files).encode()
    ).hexdigest()


def package_hash() -> str:
    """Of this package's sources."""
    package = Path(__file__).resolve().parent
    return files_hash(sorted(package.rglob("*.py")), package)


def file_hash(file: Path) -> str:
    found = file.stat()
    return _file_hash(file, found.st_size, found.st_mtime_ns)


# ------------------------------------------------------------------------------------- internals
@cache
def _file_hash(file: Path, size: int, modified: int) -> str:
    return f"{size}@{modified}" if size > HASHED_WHOLE else _sha256(file)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _cached(place: str, revision: str | None) -> bool:
    folder = _snapshot(place, revision)
    return folder is not None and whole(folder)


def _snapshot(place: str, revision: str | None) -> Path | None:
    """The folder of a Hugging Face id's files, named by its commit, if any of them are there."""
    configs = ("config.json", "adapter_config.json")
    found = (try_to_load_from_cache(place, config, revision=revision) for config in configs)
    return next((Path(file).parent for file in found if isinstance(file, str)), None)
