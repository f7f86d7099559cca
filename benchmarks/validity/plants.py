"""Planted edits: fine-tunes of which it is known, without training, what they changed.

A LoRA of rank one on a projection that writes to the stream, ``s u v^T``: v is what a head (or the
MLP's neurons) holds for the prompts and not for their counterfactuals, u the difference of the
answers' unembeddings, and s is set so that the decision moves by so many nats on average. So the
truth is exact. *Origin*: the edited heads or MLPs. *Mediators*: what lies after them, and may
answer. *Forbidden*: what lies before them, or beside them in the same layer, and computes what it
did.

Kinds: one ``head`` or ``mlp``; ``split`` over eight heads; ``opposed``, two heads with opposite
signs; ``first``, an MLP whose v sees position 0 only, so that at the answer itself it does nothing;
``unread``, a head and a second one that writes twice as much in the direction to which the
decision answers least, and is not an origin.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.validity.adapters import write_adapter
from interp_kit import decide
from interp_kit.loading import Models, load_models
from interp_kit.lora import adapted_modules
from interp_kit.passes import read_last
from interp_kit.prompts import Prompt

LOUD = 2.0  # how much more than the first the second head of "unread" writes
MODULES = {"head": "self_attn.o_proj", "mlp": "mlp.down_proj"}
HOOKS = {"head": "blocks.{}.attn.o.hook_in", "mlp": "blocks.{}.mlp.out.hook_in"}
SMALLEST, LARGEST = 1e-4, 1e4  # strengths between which the wanted effect is looked for


@dataclass(frozen=True, kw_only=True)
class Plant:
    """Where an edit goes and how far it moves the decision, in nats; > 0: the positive answer.

    ``places`` are heads (layer, head) or MLPs (layer, -1); ``signs`` weigh them, 1 each without.
    """

    kind: str
    places: tuple[tuple[int, int], ...]
    nats: float
    signs: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        where = "-".join(_component(*place) for place in self.places)
        return f"{self.kind}-{where}-{self.nats:g}"

    @property
    def origin(self) -> set[str]:
        """Of "unread" the first head alone: the other moves nothing that anybody asked for."""
        causes = self.places[:1] if self.kind == "unread" else self.places
        return {_component(*place) for place in causes}

    @property
    def first_layer(self) -> int:
        return min(layer for layer, _ in self.places)

    def forbidden(self, nodes: Sequence[str]) -> set[str]:
        """Nodes whose activations are bit for bit the base's: patching them must do nothing."""
        first = self.first_layer
        edited = {_component(*place) for place in self.places}
        heads_first = min(head for layer, head in self.places if layer == first) >= 0
        before = {node for node in nodes if layer_of(node) < first}
        beside = {n for n in nodes if layer_of(n) == first and (not heads_first or "H" in n)}
        return (before | beside) - edited


def drawn_plants(
    bridge: TransformerBridge, *, heads: int, mlps: int, nats: Sequence[float], seed: int
) -> list[Plant]:
    """Single heads and MLPs at random places, each at every strength.

    Not in the last layer, where nothing lies between the edit and the answer.
    """
    rng = np.random.default_rng(seed)
    layers, n_heads = bridge.cfg.n_layers - 1, bridge.cfg.n_heads
    places = [divmod(int(i), n_heads) for i in rng.permutation(layers * n_heads)[:heads]]
    places += [(int(layer), -1) for layer in rng.permutation(layers)[:mlps]]
    return [
        Plant(kind="mlp" if head < 0 else "head", places=((layer, head),), nats=size)
        for layer, head in places
        for size in nats
    ]


def several(bridge: TransformerBridge, *, nats: float, seed: int) -> list[Plant]:
    """The traps: split over eight heads, opposed, at position 0 only, beside an unread one."""
    rng = np.random.default_rng(seed)
    layers, n_heads = bridge.cfg.n_layers - 1, bridge.cfg.n_heads
    drawn = [divmod(int(i), n_heads) for i in rng.permutation(layers * n_heads)[:12]]
    split, opposed = sorted(drawn[:8]), sorted(drawn[8:10])
    early = 1 + int(rng.integers(layers // 2 - 1))  # what follows carries it to the answer
    return [
        Plant(kind="split", places=tuple(split), nats=nats),
        Plant(kind="opposed", places=tuple(opposed), nats=nats / 2, signs=(2, -1)),
        Plant(kind="first", places=((early, -1),), nats=nats / 5),  # position 0 can hardly do more
        Plant(kind="unread", places=tuple(drawn[10:]), nats=nats / 2),
    ]


def planted(
    base: str, plants: Sequence[Plant], prompts: Sequence[Prompt], folder: Path
) -> tuple[Models, dict[str, Plant]]:
    """The base and all plants as its adapters, at their strengths; plants by model name.

    A plant that cannot reach its effect at any strength is left out.
    """
    models = load_models([base], device="cpu")
    bridge = models.switch(base)
    inputs = _inputs(bridge, prompts)
    towards = towards_answers(bridge, prompts)
    named = {}
    for plant in plants:
        place = folder / plant.name
        _write_adapter(place, base, _edits(bridge, plant, prompts, inputs, towards), towards)
        named[str(place)] = plant
    models = load_models([base, *named], device="cpu")
    before = decide(models.switch(base), prompts).value.to_numpy()
    kept = {}
    for name, plant in named.items():
        if _set_strength(models, name, plant, prompts, before):
            kept[name] = plant
    return models, kept


def layer_of(node: str) -> int:
    """Of a component by its name, ``L2H3`` or ``L2_MLP``."""
    return int(node.removeprefix("L").split("H")[0].split("_")[0])


# ------------------------------------------------------------------------------------- internals
Vector = Float[Tensor, "width"]
Edit = tuple[Vector, Vector]
Inputs = dict[tuple[str, int], Vector]


def _component(layer: int, head: int) -> str:
    return f"L{layer}_MLP" if head < 0 else f"L{layer}H{head}"


def _inputs(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> Inputs:
    """What enters each writing projection where the answers part: prompts less counterfactuals."""
    names = [HOOKS[kind].format(layer) for kind in HOOKS for layer in range(bridge.cfg.n_layers)]
    own, other = (
        read_last(bridge, [p.branch for p in asked], names, 1)
        for asked in (prompts, [p.swapped() for p in prompts])
    )
    return {
        (kind, layer): (own[hook.format(layer)] - other[hook.format(layer)]).mean((0, 1)).flatten()
        for kind, hook in HOOKS.items()
        for layer in range(bridge.cfg.n_layers)
    }


def towards_answers(
    bridge: TransformerBridge, prompts: Sequence[Prompt]
) -> Float[Tensor, "d_model"]:
    """The mean difference of the answers' unembeddings, of unit length."""
    ids = torch.tensor([p.branch_ids for p in prompts])
    both = bridge.W_U.float()[:, ids]
    mean = (both[..., 0] - both[..., 1]).mean(1)
    return mean / mean.norm()


def _write_adapter(
    folder: Path, base: str, edits: Mapping[str, Sequence[Edit]], towards: Vector
) -> None:
    """An adapter whose product is the sum of the edits, at strength 1."""
    rank = max(map(len, edits.values()))
    factors = {}
    for module, own in edits.items():
        reads, writes = (torch.stack(vectors) for vectors in zip(*own))
        pad = rank - len(own)
        factors[module] = (
            torch.cat([reads, reads.new_zeros(pad, reads.shape[1])]),
            torch.cat([writes, writes.new_zeros(pad, len(towards))]).T,
        )
    write_adapter(folder, base, factors)


def _edits(
    bridge: TransformerBridge,
    plant: Plant,
    prompts: Sequence[Prompt],
    inputs: Inputs,
    towards: Vector,
) -> dict[str, list[Edit]]:
    """By module, pairs of what an edit reads and what it writes."""
    signs = plant.signs or (1,) * len(plant.places)
    edits: dict[str, list[Edit]] = {}
    for number, ((layer, head), sign) in enumerate(zip(plant.places, signs)):
        kind = "mlp" if head < 0 else "head"
        contrast = inputs[kind, layer]
        reads = torch.zeros_like(contrast)
        d_head = len(contrast) // bridge.cfg.n_heads
        part = slice(None) if head < 0 else slice(head * d_head, (head + 1) * d_head)
        reads[part] = contrast[part] / contrast[part].norm() ** 2
        writes = sign * towards / len(plant.places)
        if plant.kind == "first":  # there the answers' own direction does next to nothing
            reads = _only_at_the_first(bridge, prompts, layer)
            felt = _gradients(bridge, prompts, f"blocks.{layer}.hook_mlp_out")
            writes = torch.stack([gradient[0] for gradient in felt]).mean(0)
            writes = writes / writes.norm()
        if plant.kind == "unread" and number:
            felt = torch.cat(_gradients(bridge, prompts, f"blocks.{layer}.hook_attn_out"))
            least = torch.linalg.svd(felt.double()).Vh[-1].float()
            writes = LOUD * least / len(plant.places)
        edits.setdefault(f"model.layers.{layer}.{MODULES[kind]}", []).append((reads, writes))
    return edits


@torch.no_grad()
def _only_at_the_first(bridge: TransformerBridge, prompts: Sequence[Prompt], layer: int) -> Vector:
    """What an MLP's neurons hold at position 0 and, of these prompts, at no other position."""
    rows = {p.branch for p in prompts} | {p.swapped().branch for p in prompts}
    hook = HOOKS["mlp"].format(layer)
    kept = [
        bridge.run_with_cache(torch.tensor([row]), names_filter=hook)[1][hook][0] for row in rows
    ]
    first = torch.stack([neurons[0] for neurons in kept]).mean(0)
    others = torch.cat([neurons[1:] for neurons in kept])
    basis = torch.linalg.svd(others.double(), full_matrices=False)
    spanned = basis.Vh[1e-6 * basis.S[0] < basis.S].float()
    own = first - spanned.T @ (spanned @ first)
    return own / own.norm() ** 2


def _gradients(
    bridge: TransformerBridge, prompts: Sequence[Prompt], name: str
) -> list[Float[Tensor, "pos d_model"]]:
    """Of every prompt's decision by the activation ``name``."""
    gradients = []
    for prompt in prompts:
        kept: list[Tensor] = []

        def keep(x: Tensor, hook: object, kept: list[Tensor] = kept) -> Tensor:
            kept.append(x.detach().requires_grad_())
            return kept[-1]

        with torch.enable_grad(), bridge.hooks(fwd_hooks=[(name, keep)]):
            logits = bridge(torch.tensor([prompt.branch]))[0, -1]
            positive, negative = prompt.branch_ids
            decision = logits[positive] - logits[negative]
        gradients.append(torch.autograd.grad(decision, kept)[0][0])
    return gradients


def _set_strength(
    models: Models,
    name: str,
    plant: Plant,
    prompts: Sequence[Prompt],
    before: Float[np.ndarray, "prompt"],
) -> bool:
    """Scale the adapter until the decision moves by ``plant.nats``; whether it can."""
    bridge, adapter = models.switch(name), models._load(name).adapters[name]
    layers = range(bridge.cfg.n_layers)
    adapted = [module for layer in layers for module in adapted_modules(bridge, layer).values()]
    own = [module for module in adapted if adapter in module.scaling]

    def beyond(log_strength: float, sign: int) -> float:
        for module in own:
            module.scaling[adapter] = sign * float(np.exp(log_strength))
        return float((decide(bridge, prompts).value - before).mean()) - plant.nats

    steps = np.linspace(np.log(SMALLEST), np.log(LARGEST), 17)
    for sign in (1, -1):  # what reads the stream later may turn an effect round
        for low, high in pairwise(steps):
            if beyond(high, sign) >= 0:
                brentq(beyond, low, high, args=(sign,), xtol=1e-3)
                return True
    return False
