"""Activation patching: which activations, moved from one prompt to another, move the decision?

Every prompt has a counterfactual of the same length that asks for the other answer. *Denoising*
runs the counterfactual and writes in the prompt's activations: what restores the decision is
sufficient for it. *Noising* runs the prompt and writes in the counterfactual's: what breaks the
decision is necessary for it. One unit is patched at a time.

A sweep over all units is one forward pass, exact: keys and values before the first difference come
from the unpatched run, the batch starts with the unpatched prompt alone, and block l appends a copy
of it for every patch in block l, so that nothing below a patch is computed twice.

Sources: Meng et al., "Locating and Editing Factual Associations in GPT", arXiv:2202.05262;
Heimersheim and Nanda, "How to use and interpret activation patching", arXiv:2404.15255.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from interp_kit.decisions import MAX_TOKENS, Prompt, Sign, teacher_forced
from interp_kit.specs import InputError

Unit = Literal["component", "resid_pre"]
Direction = Literal["denoise", "noise"]
Site = Literal["z", "mlp_out", "resid_pre"]
HOOKS: dict[Site, str] = {
    "z": "blocks.{}.attn.hook_z",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_pre": "blocks.{}.hook_resid_pre",
}
Hooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]
SAME = 0.01  # nats: prompt and counterfactual decide alike, there is nothing to recover


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One place to write in: a head's ``z`` or a whole site, at one position or (-1) at all."""

    layer: int
    site: Site
    head: int = -1
    pos: int = -1

    @property
    def component(self) -> str:
        """As people write it: ``L2H3``, ``L2_MLP``, ``L2_RESID``."""
        names = {"z": f"H{self.head}", "mlp_out": "_MLP", "resid_pre": "_RESID"}
        return f"L{self.layer}{names[self.site]}"


def activation_patching(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    *,
    unit: Unit,
    directions: Sequence[Direction] = ("denoise", "noise"),
) -> pd.DataFrame:
    """The decision with one unit patched, for every unit.

    ``unit`` "component": every head (its ``z``: truly one head under grouped-query attention) and
    every MLP, at all positions. "resid_pre": the residual stream before every block, at every
    single position from the first in which the prompts differ (before it nothing can change) to
    the one where the answers part, their shared tokens included.

    Returns one row for each direction, prompt and unit: ``direction prompt group component layer
    head pos``, with ``pos`` -1 for all positions; ``baseline`` and ``source``, the decisions of the
    run that is patched and of the run that is copied from; ``value``, the decision after patching;
    ``change`` = value - baseline, all in nats; and ``recovered_fraction`` = change / (source -
    baseline), missing where those two differ by less than 0.01.

    Raises ``InputError`` for a prompt without counterfactual or with one of another length.
    """
    prompts = list(prompts)
    _require_aligned(prompts)
    tables = []
    pairs = [(direction, prompt) for direction in directions for prompt in prompts]
    for direction, prompt in tqdm(pairs, desc=f"patching {unit}", unit="sweep", leave=False):
        target = prompt.swapped() if direction == "denoise" else prompt
        assert target.counterfactual is not None
        start = _first_difference(target.tokens, target.counterfactual)
        patches = _patches(bridge, unit, range(start, len(target.branch)))
        table = _sweep(bridge, target, patches, start=start)
        tables.append(table.assign(direction=direction, prompt=prompt.id, group=prompt.group))
    table = pd.concat(tables, ignore_index=True)
    gap = table.source - table.baseline
    table["change"] = table.value - table.baseline
    table["recovered_fraction"] = (table.change / gap).where(gap.abs() > SAME, np.nan)
    columns = ["direction", "prompt", "group", "component", "layer", "head", "pos"]
    columns += ["baseline", "source", "value", "change", "recovered_fraction"]
    return table.loc[:, columns]


def identity_patch_error(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> float:
    """Largest change of a decision, in nats, when a prompt is patched into itself: should be 0.

    Every head and MLP at all positions, and the residual stream at eight positions in each layer.
    """
    worst = 0.0
    for prompt in prompts:
        itself = replace(prompt, counterfactual=prompt.tokens)
        length = len(prompt.branch)
        patches = _patches(bridge, "component", range(0))
        patches += _patches(bridge, "resid_pre", range(0, length, max(1, length // 8)))
        table = _sweep(bridge, itself, patches, start=0)
        worst = max(worst, float((table.value - table.baseline).abs().max()))
    return worst


@torch.no_grad()
def attention_patterns(
    bridge: TransformerBridge, prompt: Prompt, heads: Sequence[tuple[int, int]]
) -> Float[Tensor, "head pos pos"]:
    """Attention of each (layer, head) on ``prompt.branch``, up to where the answers part.

    Row = attending position, column = attended to; the last row is where the decision is read.
    """
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda pattern, hook: kept.update({layer: pattern[0]})

    bridge.run_with_hooks(
        torch.tensor([prompt.branch], device=bridge.cfg.device),
        fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", keep(layer)) for layer, _ in heads],
    )
    return torch.stack([kept[layer][head] for layer, head in heads]).float().cpu()


# ------------------------------------------------------------------------------------- internals
def _patches(bridge: TransformerBridge, unit: Unit, positions: range) -> list[Patch]:
    layers = range(bridge.cfg.n_layers)
    if unit == "resid_pre":
        return [Patch(layer=n, site="resid_pre", pos=pos) for n in layers for pos in positions]
    heads = range(bridge.cfg.n_heads)
    return [
        patch
        for n in layers
        for patch in (
            *(Patch(layer=n, site="z", head=head) for head in heads),
            Patch(layer=n, site="mlp_out"),
        )
    ]


def _sweep(
    bridge: TransformerBridge, target: Prompt, patches: list[Patch], *, start: int
) -> pd.DataFrame:
    """Patch ``target.counterfactual``'s activations into ``target``, one patch at a time.

    Positions before ``start`` must be the same in both. One row for each patch.
    """
    assert target.counterfactual is not None
    source = replace(target, tokens=target.counterfactual, counterfactual=None)
    decisions, source_decision = torch.zeros(1 + len(patches)), 0.0
    signs: dict[Sign, int] = {"positive": 1, "negative": -1}
    for ours, theirs in zip(teacher_forced([target]), teacher_forced([source])):
        from_run = _record(bridge, theirs.tokens, patches)
        into_run = _record(bridge, ours.tokens, [])
        read = max(ids.shape[1] for ids in ours.answers.values())
        logits = _patched_logits(bridge, into_run, from_run, patches, start=start, read=read)
        log_p, source_log_p = logits.log_softmax(-1), from_run.logits[-read:].log_softmax(-1)
        for sign, ids in ours.answers.items():
            at = (slice(-ids.shape[1], None), range(ids.shape[1]), ids[0])
            decisions += signs[sign] * log_p[:, at[0]][:, at[1], at[2]].sum(-1)
            source_decision += signs[sign] * float(source_log_p[at[0]][at[1], at[2]].sum())
    return pd.DataFrame(
        {
            "component": patch.component,
            "layer": patch.layer,
            "head": patch.head,
            "pos": patch.pos,
            "baseline": float(decisions[0]),
            "source": source_decision,
            "value": float(decisions[1 + i]),
        }
        for i, patch in enumerate(patches)
    )


class _Prefix(DynamicLayer):
    """Keys and values of a prefix that every row of a batch attends to and none adds to."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._prefix = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows = (key_states.shape[0], -1, -1, -1)
        keys, values = self._prefix
        return (
            torch.cat([keys.expand(rows), key_states], -2),
            torch.cat([values.expand(rows), value_states], -2),
        )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One recorded forward pass of one sequence."""

    tokens: Tensor  # [1, pos]
    logits: Float[Tensor, "pos vocab"]
    keys_values: list[tuple[Tensor, Tensor]]  # of each layer, each [1, head, pos, d_head]
    activations: dict[str, Tensor]  # hook name -> [pos, ...]

    def prefix(self, length: int) -> DynamicCache | None:
        if length == 0:
            return None
        cache: Any = DynamicCache()  # no config: layers of full length; masks keep the window
        cache.layers = [_Prefix(k[:, :, :length], v[:, :, :length]) for k, v in self.keys_values]
        return cache


@torch.no_grad()
def _record(bridge: TransformerBridge, tokens: Tensor, patches: Sequence[Patch]) -> _Run:
    """Run ``tokens`` [1, pos] and keep keys, values and what the patches copy."""
    activations: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda x, hook: activations.update({name: x[0].clone()})

    names = {HOOKS[p.site].format(p.layer) for p in patches}
    cache: Any = DynamicCache()
    tokens = tokens.to(bridge.cfg.device)
    hooks: Hooks = [(name, keep(name)) for name in names]
    logits = bridge.run_with_hooks(tokens, fwd_hooks=hooks, past_key_values=cache)
    return _Run(
        tokens=tokens,
        logits=logits[0].float().cpu(),
        keys_values=[(layer.keys, layer.values) for layer in cache.layers],
        activations=activations,
    )


@torch.no_grad()
def _patched_logits(
    bridge: TransformerBridge,
    target: _Run,
    source: _Run,
    patches: list[Patch],
    *,
    start: int,
    read: int,
) -> Float[Tensor, "row read vocab"]:
    """Logits at the last ``read`` positions: row 0 unpatched, row 1 + i with patch i.

    Patches go in the order of their layers, as many at once as ``MAX_TOKENS`` allows.
    """
    suffix = target.tokens[:, start:]
    cache = target.prefix(start)
    with_cache: dict[str, Any] = {"past_key_values": cache} if cache else {"use_cache": False}
    order = sorted(range(len(patches)), key=lambda i: patches[i].layer)
    size = max(1, MAX_TOKENS // target.tokens.shape[1])
    result = torch.empty(1 + len(patches), read, bridge.cfg.d_vocab_out)
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        hooks = _growing_hooks(bridge, source, [patches[i] for i in chosen], start=start)
        logits = bridge.run_with_hooks(
            suffix,
            fwd_hooks=[*hooks, ("unembed.hook_in", lambda x, hook: x[:, -read:])],
            **with_cache,
        )
        result[[0, *(1 + i for i in chosen)]] = logits.float().cpu()
    return result


def _growing_hooks(
    bridge: TransformerBridge, source: _Run, patches: list[Patch], *, start: int
) -> Hooks:
    """Hooks by which every block appends its patches' rows and writes the source into them."""
    hooks: Hooks = []
    for layer in range(bridge.cfg.n_layers):
        new = {row: patch for row, patch in enumerate(patches, 1) if patch.layer == layer}
        if new:
            hooks.append((f"blocks.{layer}.hook_in", _append_rows(len(new))))
        sites: set[Site] = {patch.site for patch in new.values()}
        for site in sites:
            name = HOOKS[site].format(layer)
            rows = {row: patch for row, patch in new.items() if patch.site == site}
            hooks.append((name, _write(rows, source.activations[name][start:], start)))
    return hooks


def _append_rows(n: int) -> Callable[..., Tensor]:
    return lambda x, hook: torch.cat([x, x[:1].expand(n, *x.shape[1:])])


def _write(rows: dict[int, Patch], values: Tensor, start: int) -> Callable[..., Tensor]:
    """Write ``values`` [pos, ...] into each row at its own place, on a copy."""

    def write(activation: Tensor, hook: object) -> Tensor:
        patched = activation.clone()
        for row, patch in rows.items():
            where = slice(None) if patch.pos < 0 else patch.pos - start
            if patch.head >= 0:
                patched[row, where, patch.head] = values[where, patch.head]
            else:
                patched[row, where] = values[where]
        return patched

    return write


def _first_difference(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    differ = [pos for pos, (a, b) in enumerate(zip(first, second)) if a != b]
    return differ[0] if differ else 0


def _require_aligned(prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        if prompt.counterfactual is None:
            raise InputError(
                f"prompt {prompt.id!r} has no counterfactual; add one to the scenario, a prompt of "
                "the same token length that asks for the other answer"
            )
        ours, theirs = len(prompt.tokens), len(prompt.counterfactual)
        if ours != theirs:
            raise InputError(
                f"prompt {prompt.id!r} has {ours} tokens and its counterfactual {theirs}; patching "
                "position by position needs equal lengths: reword one of them"
            )
