"""The single weights that fine-tuning changed: as matrices, and to be taken back one by one.

``Models.weight_changes`` hands out whole changes; here they are the factors of an adapter where
there are any, each expert apart, always [out, in]. ``without``: the model with some taken back.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers.pytorch_utils import Conv1D

from interp_kit.identity import registered_again
from interp_kit.loading import Models
from interp_kit.lora import adapted_weights, plain_name, show_token_rows
from interp_kit.parts import weights_of

EXACT = 256  # matrices up to so wide are decomposed exactly
OVERSAMPLED, POWERS = 10, 8  # directions beyond those asked for, and power iterations
Place = tuple[int, str]  # layer and name of a weight, as in ``interp_kit.parts``


@dataclass(frozen=True, kw_only=True)
class ChangedMatrix:
    """One matrix: the product of ``factors`` is its change, [out, in]; the weight ``before``."""

    layer: int
    name: str
    factors: list[Float[Tensor, "_ _"]]
    before: Float[Tensor, "_ _"]  # as it is stored

    @property
    def product(self) -> Float[Tensor, "out in"]:
        """The change itself."""
        return self.factors[0] @ self.factors[1] if len(self.factors) == 2 else self.factors[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Switch:
    """One change in a bridge: its norm, and what turns it off (False) and on again (True)."""

    norm: float
    turn: Callable[[bool], object]


def require_tuned(models: Models, name: str) -> None:
    """Raise ``InputError`` where ``Models.weight_changes`` would."""
    if _active_adapter(models.switch(name)) is None:
        next(models.weight_changes(name), None)


def changed_matrices(models: Models, name: str) -> Iterator[ChangedMatrix]:
    """All matrices in the blocks that fine-tuning changed; an expert's is ``NAME[expert]``.

    Two factors for a LoRA adapter that shares its base, else the change itself. Norms and biases
    are left out. Raises ``InputError`` as ``Models.weight_changes`` does.
    """
    bridge = models.switch(name)
    if (adapter := _active_adapter(bridge)) is not None:
        for layer, at, module, weight in adapted_weights(bridge, adapter):
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            n = getattr(module, "num_experts", 1)
            ins = a.detach().float().view(n, -1, a.shape[1])
            outs = b.detach().float().view(len(b), -1, n) * module.scaling[adapter]
            for e in range(n):
                at_e, before = (f"{at}[{e}]", weight[e]) if weight.ndim > 2 else (at, weight)
                factors = [outs[..., e], ins[e]]
                yield ChangedMatrix(layer=layer, name=at_e, factors=factors, before=before)
        return
    for layer, at, change, weight in models.weight_changes(name):
        if not 0 <= layer < bridge.cfg.n_layers or change.ndim < 2 or at.endswith("bias"):
            continue
        matrix = change.float().mT if _is_transposed(bridge, layer, at) else change.float()
        if change.ndim == 2:
            yield ChangedMatrix(layer=layer, name=at, factors=[matrix], before=weight)
            continue
        for e, (own, before) in enumerate(zip(matrix, weight)):
            yield ChangedMatrix(layer=layer, name=f"{at}[{e}]", factors=[own], before=before)


def decomposed(
    matrix: ChangedMatrix, rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank"], Float[Tensor, "in rank"], float]:
    """The ``rank`` largest singular values of the change, with left and right vectors; its norm.

    Of two factors by QR of both and the decomposition of a small core. Matrices wider than
    ``EXACT`` by random projections, drawn from torch's global state (Halko et al.,
    arXiv:0909.4061). The largest entry of each left vector is positive.
    """
    first = matrix.factors[0]
    if len(matrix.factors) == 2:
        outer, inner = (torch.linalg.qr(f) for f in (first, matrix.factors[1].T))
        u, values, v = torch.linalg.svd(outer.R @ inner.R.T)
        left, right, norm = outer.Q @ u, inner.Q @ v.T, float(values.norm())
    elif min(first.shape) <= EXACT:
        left, values, v = torch.linalg.svd(first, full_matrices=False)
        right, norm = v.T, float(first.norm())
    else:
        q = min(rank + OVERSAMPLED, *first.shape)
        left, values, right = torch.svd_lowrank(first, q=q, niter=POWERS)
        norm = float(first.norm())
    left, values, right = (x[..., :rank].cpu() for x in (left, values, right))
    sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    return left * sign, values, right * sign, norm


def switches(models: Models, name: str) -> dict[Place, Switch]:
    """Every change of the model by its place; the bridge must be on the model when one is turned.

    The rows of trained tokens are at (-1, "embed"). An unembedding that is the embedding goes with
    it. Rows that the base does not have stay.
    """
    bridge = models.switch(name)
    if (adapter := _active_adapter(bridge)) is None:
        return dict(_of_whole_weights(models, name))
    return dict(_of_adapter(bridge, adapter))


@contextmanager
def without(models: Models, name: str, places: Collection[Place]) -> Iterator[TransformerBridge]:
    """The bridge, computing as model ``name`` with the changes at these ``places`` taken back.

    It is the model itself again afterwards, also after an error.
    """
    every, bridge = switches(models, name), models.switch(name)
    with registered_again(bridge), taken_back(bridge, [every[place] for place in places]):
        yield bridge


@contextmanager
def taken_back(bridge: TransformerBridge, changes: Sequence[Switch]) -> Iterator[None]:
    """Inside, the bridge computes without these changes; around, ``registered_again`` it is."""
    try:
        for change in changes:
            change.turn(False)
        bridge.original_model.requires_grad_(False)  # which switching an adapter may set
        yield
    finally:
        for change in changes:
            change.turn(True)
        bridge.original_model.requires_grad_(False)


# ------------------------------------------------------------------------------------- internals
def _active_adapter(bridge: TransformerBridge) -> str | None:
    """PEFT's name of the adapter with which the bridge computes now."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in bridge.original_model.modules():
        if isinstance(module, BaseTunerLayer) and not module.disable_adapters:
            for adapter in module.active_adapters:
                return adapter
    return None


def _is_transposed(bridge: TransformerBridge, layer: int, at: str) -> bool:
    """Whether the weight is stored [in, out]."""
    modules: dict[str, Any] = {plain_name(n): m for n, m in bridge.blocks[layer].named_modules()}
    owner = modules[at] if at in modules else modules[at.rpartition(".")[0]]
    return isinstance(owner, Conv1D) or bool(getattr(owner, "is_transposed", False))


def _of_adapter(bridge: TransformerBridge, adapter: str) -> Iterator[tuple[Place, Switch]]:
    from peft.utils.other import TrainableTokensWrapper

    tokens: list[Any] = [
        module.token_adapter
        for module in bridge.original_model.modules()
        if isinstance(module, TrainableTokensWrapper)
        and adapter in module.token_adapter.trainable_tokens_delta
    ]
    if tokens:  # more than one where the unembedding is tied to the embedding
        rows = tokens[0].trainable_tokens_delta[adapter].detach()
        before = tokens[0].get_base_layer().weight[tokens[0].token_indices[adapter]]

        def turn_rows(on: bool) -> None:
            show_token_rows(bridge.original_model, adapter if on else None)

        yield (-1, "embed"), Switch(norm=float((rows - before).norm()), turn=turn_rows)
    for layer, at, module, _ in adapted_weights(bridge, adapter):

        def turn(on: bool, module: Any = module) -> None:
            module.set_adapter([adapter] if on else [], inference_mode=True)

        change = module.get_delta_weight(adapter).detach().float()
        yield (layer, at), Switch(norm=float(change.norm()), turn=turn)


def _of_whole_weights(models: Models, name: str) -> Iterator[tuple[Place, Switch]]:
    """Tensors are exchanged where modules hold them: nothing is copied."""
    norms = {
        (layer, at): float(c.float().norm()) for layer, at, c, _ in models.weight_changes(name)
    }
    base, bridge = models.base_of(name), models.switch(name)
    held: dict[int, list[tuple[dict[str, Any], str]]] = defaultdict(list)
    for module in {*bridge.modules(), *bridge.original_model.modules()}:
        for key, weight in module._parameters.items():
            if weight is not None:
                held[weight.data_ptr()].append((module._parameters, key))
    seen = set[int]()
    for layer in range(-1, bridge.cfg.n_layers + 1):
        before = weights_of(base, layer)
        for at, own in weights_of(bridge, layer).items():
            theirs, norm = before.get(at), norms.get((layer, at))
            if theirs is not None and theirs.shape != own.shape:  # tokens were added
                n = min(len(own), len(theirs))
                theirs = torch.cat([theirs[:n], own[n:]])
                norm = float((own - theirs).float().norm())
            if not norm or theirs is None or own.data_ptr() in seen:  # an embedding that is tied
                continue
            seen.add(own.data_ptr())
            slots = [(d, key, d[key]) for d, key in held[own.data_ptr()]]
            yield (layer, at), Switch(norm=norm, turn=partial(_exchange, slots, own.shape, theirs))


def _exchange(slots: Sequence[Any], shape: torch.Size, theirs: Tensor, on: bool) -> None:
    for holder, key, own in slots:
        if own.shape == shape:  # not a whole that begins where its first part does
            holder[key] = own if on else torch.nn.Parameter(theirs, requires_grad=False)
