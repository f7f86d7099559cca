"""Reading and writing files: JSON, YAML, JSON Lines, atomic replacement and hashes."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from interp_kit.specs import InputError

HASHED_WHOLE = 256 * 2**20  # bytes; the hash of a larger file is that of its size and time


# ---------------------------------------------------------------------------------------- reading
def read_json(file: Path) -> Any:
    """What a JSON file holds; ``InputError`` if it is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); fix the file") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """What a YAML file of ``key: value`` lines holds; ``InputError`` if it is none."""
    try:
        given = yaml.load(file.read_text(encoding="utf-8"), _DistinctKeys)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise InputError(f"{file}: not readable as YAML ({where}); fix the file") from None
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise InputError(f"{file}: expected `key: value` lines, found {type(given).__name__}")
    return given


def read_appended(file: Path) -> list[dict[str, Any]]:
    """What ``append_line`` has written to ``file``; a last line torn by a crash is cut off."""
    cut_torn_line(file)
    records = []
    for number, line in enumerate(file.read_bytes().splitlines() if file.is_file() else [], 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise InputError(f"{file}, line {number}: not JSON; fix or remove the line") from None
    return records


def cut_torn_line(file: Path) -> None:
    """Cut off a last line without its end, as a crash while writing leaves it."""
    content = file.read_bytes() if file.is_file() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(file, content.rfind(b"\n") + 1)


class _DistinctKeys(yaml.SafeLoader):
    """Of a key that is given twice YAML's own loader silently keeps the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if key in keys[:i] and key != "<<":
                line = node.value[i][0].start_mark.line + 1
                raise ValueError(f"line {line}: the key {key!r} is given twice; remove one")
        return super().construct_mapping(node, deep)


# ---------------------------------------------------------------------------------------- writing
@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside ``file`` to write to. At the end it replaces ``file``; after an error it goes.

    Readers see the old file or the new one, never a part.
    """
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield beside
        beside.replace(file)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def write_atomically(file: Path, text: str) -> None:
    """Write the whole text, or leave the file as it was."""
    with replacing(file) as beside:
        beside.write_text(text, encoding="utf-8")


def append_line(file: Path, record: dict[str, Any]) -> None:
    """Add one line of JSON to the end of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8", newline="\n") as lines:
        lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def dump_json(content: Any) -> str:
    """JSON that every reader accepts: NaN and infinity become null."""
    return json.dumps(_finite(content), indent=1, ensure_ascii=False)


# ----------------------------------------------------------------------------------------- hashes
def sha256(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def digest(content: Any) -> str:
    """SHA-256 of anything that JSON can express."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(file: Path) -> str:
    """``sha256``, computed once for each state of a file; of a large file its size and time."""
    found = file.stat()
    return _file_hash(file, found.st_size, found.st_mtime_ns)


def files_hash(files: list[Path], root: Path) -> str:
    """SHA-256 of the files' hashes and their names below ``root``."""
    return hashlib.sha256(
        "\0".join(f"{f.relative_to(root)}={file_hash(f)}" for f in files).encode()
    ).hexdigest()


def package_hash() -> str:
    """``files_hash`` of this package's sources."""
    package = Path(__file__).resolve().parent
    return files_hash(sorted(package.rglob("*.py")), package)


def altered_files(folder: Path, files: Mapping[str, str]) -> dict[str, str]:
    """The files (name -> expected sha256) that are missing or differ, and how."""
    altered = {}
    for name, expected in files.items():
        try:
            if sha256(folder / name) != expected:
                altered[name] = "is not what the run wrote"
        except OSError as error:
            altered[name] = error.strerror or str(error)
    return altered


# -------------------------------------------------------------------------------------- internals
@cache
def _file_hash(file: Path, size: int, modified: int) -> str:
    return f"{size}@{modified}" if size > HASHED_WHOLE else sha256(file)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(k): _finite(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(v) for v in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content
