"""How many rows one forward pass holds, and whether a sweep fits into memory at all.

A *row* is one patched run inside a pass. More rows share the cost of calling the model's modules;
enough is when the device is busy, and too many is when activations of one block do not fit.
"""

import psutil
import torch
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.specs import InputError

# Patched tokens in one pass: enough to keep the device busy.
CHUNK_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 4096}
CHUNK_BYTES = 2**30  # that one block of a pass may take


def rows_at_once(bridge: TransformerBridge, *, suffix: int) -> int:
    """How many rows of ``suffix`` tokens one pass holds."""
    by_memory = CHUNK_BYTES // (suffix * _token_bytes(bridge, suffix))
    by_tokens = CHUNK_TOKENS.get(_device(bridge).type, CHUNK_TOKENS["cpu"]) // suffix
    return max(1, min(by_tokens, by_memory))


def check_memory(bridge: TransformerBridge, *, length: int) -> None:
    """Raise ``InputError`` if even one patch at a time would not fit into memory."""
    needed = 2 * length * _token_bytes(bridge, length)  # row 0 and one more
    recorded = 4 * bridge.cfg.d_model * bridge.cfg.n_layers * _item_bytes(bridge)
    needed += 2 * length * recorded  # source and target
    available = _available_bytes(bridge)
    if needed > available:
        raise InputError(
            f"a sweep over {length} tokens needs about {needed / 2**30:.1f} GiB even with one "
            f"patch at a time, and {available / 2**30:.1f} GiB are free; shorten the prompt, load "
            "the model in bfloat16, or free memory"
        )


def _device(bridge: TransformerBridge) -> torch.device:
    return torch.device(bridge.cfg.device or "cpu")


def _item_bytes(bridge: TransformerBridge) -> int:
    return bridge.cfg.dtype.itemsize


def _token_bytes(bridge: TransformerBridge, length: int) -> int:
    """What one token of one row takes at the widest point of a block, attention scores included."""
    cfg = bridge.cfg
    mlp = cfg.d_mlp or 4 * cfg.d_model
    return (3 * mlp + 8 * cfg.d_model + 3 * cfg.n_heads * length) * _item_bytes(bridge)


def _available_bytes(bridge: TransformerBridge) -> int:
    if _device(bridge).type == "cuda":
        return torch.cuda.mem_get_info(_device(bridge))[0]
    return psutil.virtual_memory().available
