"""What lies in a cell's folder: its status, whether its files are whole, whether it is up to date.

``status.json`` names every file of the folder by its hash, and carries a checksum of itself, so
that nothing half-written or altered is ever taken for a result.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from interp_batch.matrix import Cell, matching
from interp_kit.files import altered_files, dump_json, write_atomically
from interp_kit.specs import InputError

PROJECT = "interp-kit"
FAILED = "failed"  # a pattern of --only


def stale(cells: Iterable[Cell]) -> list[Cell]:
    """The cells whose result is missing, damaged, failed or made from other inputs."""
    return [cell for cell in cells if not _is_up_to_date(cell)]


def selected(cells: list[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that ``--only`` leaves; ``InputError`` if there are none."""
    kept = matching(cells, [pattern for pattern in only if pattern != FAILED])
    if FAILED not in only:
        return kept
    kept = failed(kept)
    if not kept:
        names = ", ".join(str(folder) for folder in dict.fromkeys(c.run_folder for c in cells))
        raise InputError(f"--only {FAILED}: no cell of {names} has failed")
    return kept


def failed(cells: Iterable[Cell]) -> list[Cell]:
    """The cells whose last attempt failed."""
    return [cell for cell in cells if read_status(cell.failed_folder)]


def count_by_other_versions(cells: Iterable[Cell]) -> Counter[str]:
    """Version of this project -> results that it made with another content key than ``cells`` have.

    Results of the installed version are not counted.
    """
    makers: Counter[str] = Counter()
    for cell in cells:
        status = read_status(cell.folder)
        if status.get("state") == "ok" and status.get("key") != cell.key:
            made_by = _made_by(cell.folder, status)
            makers.update([made_by] if made_by not in ("", version(PROJECT)) else [])
    return makers


def read_status(folder: Path) -> dict[str, Any]:
    """``status.json``; empty where the file is missing, unreadable or altered."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        stated = status.pop("checksum")
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError):
        return {}
    return status if stated == _checksum(status) else {}


def write_status(folder: Path, status: dict[str, Any]) -> None:
    """Write ``status.json`` with its checksum."""
    written = json.loads(dump_json(status))  # as it will be read: without NaN
    text = dump_json(written | {"checksum": _checksum(written)})
    write_atomically(folder / "status.json", text)


def damaged(folder: Path) -> list[str]:
    """The files of a cell's folder that are missing or differ from what its notebook wrote."""
    return list(altered_files(folder, read_status(folder).get("files", {})))


def last_folder(cell: Cell) -> Path:
    """The folder of the cell's last attempt: the failed one, if it failed."""
    return cell.failed_folder if read_status(cell.failed_folder) else cell.folder


# ------------------------------------------------------------------------------------- internals
def _is_up_to_date(cell: Cell) -> bool:
    """Whether the result is there, whole, and made from the same inputs."""
    status = read_status(cell.folder)
    if status.get("state") != "ok" or status.get("key") != cell.key:
        return False
    if read_status(cell.failed_folder):  # a later attempt failed
        return False
    return not damaged(cell.folder)


def _made_by(folder: Path, status: dict[str, Any]) -> str:
    """The version that made a result; 0.1 wrote it to ``summary.json`` only."""
    if PROJECT in status.get("made", {}):
        return status["made"][PROJECT]
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return str(summary["versions"][PROJECT])
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return ""


def _checksum(status: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(status, sort_keys=True).encode()).hexdigest()
