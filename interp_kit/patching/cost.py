"""What a sweep over all components costs, before it is made."""

import time
from collections.abc import Sequence

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.patching.patches import unit_patches
from interp_kit.patching.positions import aligned, first_difference, position_sets
from interp_kit.prompts import Prompt, require_prompts

TOP, SAMPLE = 60, 20  # components patched exactly: those that a screen ranks highest, and others
GRADIENT = 3  # forward passes that one forward and backward pass takes


def sweep_cost(
    bridge: TransformerBridge, prompts: Sequence[Prompt], *, across_models: bool = False
) -> pd.DataFrame:
    """What patching every component of one prompt in one direction takes, by ``positions``.

    Returns, by mode, ``forward_passes`` of that prompt, both recordings included, and ``seconds``
    on this machine, from one pass that is timed here. The prompt is the longest one. A pass of few
    tokens costs more than its share; expect up to twice as much.
    """
    require_prompts(prompts)
    longest = max(prompts, key=lambda p: len(p.branch))
    tokens = torch.tensor([longest.branch], device=bridge.cfg.device)
    started = time.perf_counter()
    with torch.no_grad():
        bridge.run_with_hooks(tokens, fwd_hooks=[("unembed.hook_in", lambda x, hook: x[:, -1:])])
    one, length = time.perf_counter() - started, tokens.shape[1]
    layers = [patch.layer for patch in unit_patches(bridge, "component")]
    through = sum(bridge.cfg.n_layers - layer for layer in layers) / bridge.cfg.n_layers
    start = 0 if across_models else first_difference(longest)
    every = through * (length - start) / length
    modes = {"decision": through / length}
    if longest.segments:
        firsts = [max(start, min(at)) for _, at in position_sets(longest, "segments") if at]
        modes["segments"] = sum(through * (length - first) / length for first in firsts)
    if across_models or aligned([longest]):
        gradient = GRADIENT * (length - start) / length
        modes["screened"] = gradient + every * min(1, (TOP + SAMPLE) / len(layers))
        modes["all"] = every
    passes = pd.Series(modes, name="forward_passes") + 2
    return pd.DataFrame({"forward_passes": passes, "seconds": passes * one}).rename_axis(
        "positions"
    )
