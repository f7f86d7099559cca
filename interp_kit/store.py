"""Activations on disk, kept by content: what one notebook has computed, the next one finds.

Off unless the environment names a folder, ``INTERP_KIT_ACTIVATIONS``; a batch names one beside its
results. A file's name is a hash of all that its numbers follow from, so a file that is found holds
what would be computed. Files are checked when they are read; a damaged one is computed again.
When the folder outgrows ``INTERP_KIT_ACTIVATIONS_GIB``, the least recently used files go first.
"""

import hashlib
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.files import digest, package_hash, replacing
from interp_kit.identity import identity_of
from interp_kit.specs import InputError

FOLDER, SIZE = "INTERP_KIT_ACTIVATIONS", "INTERP_KIT_ACTIVATIONS_GIB"
DEFAULT_GIB = 4.0
COMPUTING = ("torch", "transformers", "transformer-lens", "peft")


def name_of(bridge: TransformerBridge, *what: object) -> str:
    """The name of what is computed: a hash of the weights, the code, the machine and ``what``.

    The weights are those that are live in the bridge (``identity_of``). The numbers of a CPU depend
    on its instructions and on the threads that share a sum, and so does the name. It is empty where
    no folder keeps activations and where the bridge has no identity; nothing is found or kept
    under an empty name.
    """
    computes_as = identity_of(bridge) if _folder() is not None else None
    if computes_as is None:
        return ""
    device = torch.device(bridge.cfg.device or "cpu")
    machine = [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    if device.type == "cuda":
        machine = [torch.cuda.get_device_name(device), torch.get_float32_matmul_precision()]
    code = [package_hash(), *(version(name) for name in COMPUTING)]
    return digest([computes_as, code, device.type, machine, what])


def find(name: str) -> dict[str, Tensor] | None:
    """What was kept under this name; nothing, with a warning, if the file is damaged."""
    folder = _folder()
    file = folder / f"{name}.safetensors" if folder and name else None
    if file is None or not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
            if stored.metadata()["sha256"] == tensors_digest(name, **tensors):
                os.utime(file)  # used just now
                return tensors
            problem = "its checksum differs"
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        problem = str(error)
    warnings.warn(f"{file}: damaged ({problem}); its activations are computed again", stacklevel=3)
    return None


def keep(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep these under this name, and no more than the folder may hold.

    Raises ``InputError`` for a size that is no number, and warns where nothing can be written.
    """
    folder = _folder()
    if folder is None or not name:
        return
    ours = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    limit = _limit()
    if sum(tensor.nbytes for tensor in ours.values()) > limit:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{name}.safetensors") as beside:
            save_file(ours, beside, metadata={"sha256": tensors_digest(name, **ours)})
        _shrink(folder, limit)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"{folder}: activations are not kept ({error})", stacklevel=3)


def tensors_digest(*names: str, **tensors: Tensor) -> str:
    """A hash of tensors' names, types, shapes and bytes, and of further names."""
    made = hashlib.sha256(repr(names).encode())
    for key, tensor in sorted(tensors.items()):
        made.update(repr((key, tensor.dtype, tuple(tensor.shape))).encode())
        made.update(tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return made.hexdigest()


# ------------------------------------------------------------------------------------- internals
def _folder() -> Path | None:
    given = os.environ.get(FOLDER)
    return Path(given) if given else None


def _limit() -> float:
    given = os.environ.get(SIZE) or DEFAULT_GIB
    try:
        return float(given) * 2**30
    except ValueError:
        raise InputError(
            f"{SIZE}: expected a number of GiB, got {given!r}; set one, or unset it"
        ) from None


def _shrink(folder: Path, limit: float) -> None:
    """Remove what was used least recently until the rest fits; others may do so, too."""
    found = []
    for file in folder.iterdir():
        with suppress(FileNotFoundError):
            found.append((file.stat().st_mtime_ns, file.stat().st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total <= limit:
            return
        file.unlink(missing_ok=True)
        total -= size
