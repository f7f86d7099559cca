"""The state of a training in one file, from which it goes on as if nothing had happened.

Trained weights, the optimizer's moments and the record of all steps so far, as safetensors. The
file is replaced as a whole: whenever a training is killed, an old state or a new one is there.
"""

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from interp_kit.files import replacing
from interp_kit.specs import InputError

Steps = list[dict[str, float]]  # for each step its loss and other numbers
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def write_checkpoint(
    file: Path, model: PeftModel, optimizer: torch.optim.Optimizer, record: Steps
) -> None:
    """Replace ``file``. Raises ``OSError`` where it cannot; the earlier state is then left."""
    tensors: dict[str, Tensor] = {}
    for name, p in _trainable(model).items():
        tensors[f"weight {name}"] = p.detach()
        tensors |= {f"{kind} {name}": optimizer.state[p][kind] for kind in MOMENTS}
    file.parent.mkdir(parents=True, exist_ok=True)
    content = save(tensors, metadata={"record": json.dumps(record)})
    with replacing(file) as beside:
        beside.write_bytes(content)


def read_checkpoint(file: Path, model: PeftModel, optimizer: torch.optim.Optimizer) -> Steps:
    """Put a state back; returns the record, which is empty where there is no file.

    Raises ``InputError`` for a file of another training, or one that is damaged.
    """
    if not file.is_file():
        return []
    try:
        with safe_open(file, framework="pt") as kept:
            for name, p in _trainable(model).items():
                p.data.copy_(kept.get_tensor(f"weight {name}"))
                moments = {kind: kept.get_tensor(f"{kind} {name}") for kind in MOMENTS}
                optimizer.state[p] = {
                    kind: moment if kind == "step" else moment.to(p.device)
                    for kind, moment in moments.items()
                }
            return json.loads(kept.metadata()["record"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{file} is no state of this training ({error}); remove it to begin anew"
        ) from None


def _trainable(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
