"""What a bridge computes as: the weights and the adapters that are live in it at this moment.

Activations are shared under this identity, never under a name that a caller gives. Whoever boots a
bridge registers the hashes of the files that it was booted from. The rest is read off the modules
before each pass: which adapters are active in each layer and how they are scaled, whether a
parameter was replaced or changed in place, and whether anything else takes part in the pass (a
hook, a replaced ``forward``, training mode, autocast).

PyTorch counts the changes of a tensor, and those are what is noticed here. Changes through
``parameter.data`` or a numpy view are not counted: change weights under ``torch.no_grad()``.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, count
from operator import attrgetter
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.files import digest

Adapters = tuple[tuple[str, tuple[tuple[str, float | None], ...]], ...]  # module -> (name, scaling)
State = tuple[int, Adapters]  # the last change of weights, 0 for none; the adapters that are live
COMPUTES_THE_SAME = "computes_the_same"  # marks a replaced ``forward`` that changes no number
_KEY = "_interp_kit_watched"  # on the bridge itself: what is kept about it is freed with it
_CHANGES = count(1)  # numbers of changes: none is given twice, also where one was undone between


def register(bridge: TransformerBridge, *, base: str | None, adapters: Mapping[str, str]) -> None:
    """Say what a bridge was booted from: hashes of its base, and of each adapter by PEFT name."""
    vars(bridge)[_KEY] = _Watched(bridge, base=base, adapters=adapters)


def state_of(bridge: TransformerBridge) -> State | None:
    """What is live in the bridge now; equal states of one bridge compute the same.

    Nothing, where something takes part in its passes that has no name, such as a hook.
    """
    watched = vars(bridge).get(_KEY)
    if watched is None:
        watched = vars(bridge)[_KEY] = _Watched(bridge, base=None, adapters={})
    return watched.state()


def identity_of(bridge: TransformerBridge) -> str | None:
    """A hash of the weights and adapters with which the bridge computes now.

    The same in every process. Nothing, where ``state_of`` is nothing, for a bridge that was not
    registered, and for one whose weights were changed since.
    """
    state = state_of(bridge)
    watched = vars(bridge)[_KEY]
    if state is None or watched.base is None:
        return None
    changes, live = state
    if changes or not {name for _, active in live for name, _ in active} <= set(watched.adapters):
        return None
    named = [(at, [(watched.adapters[name], by) for name, by in active]) for at, active in live]
    return digest([watched.base, named])


@contextmanager
def registered_again(bridge: TransformerBridge) -> Iterator[None]:
    """Around a change of the bridge that is undone at the end: it is known as before again."""
    watched = vars(bridge).get(_KEY)
    unchanged = watched is not None and watched.state() is not None and not watched.changes
    try:
        yield
    finally:
        if watched is not None and unchanged:
            register(bridge, base=watched.base, adapters=watched.adapters)


# ------------------------------------------------------------------------------------- internals
class _Watched:
    """A bridge's modules and tensors as they were last seen, in lists that are quick to compare."""

    def __init__(
        self, bridge: TransformerBridge, *, base: str | None, adapters: Mapping[str, str]
    ) -> None:
        self.base, self.adapters, self.changes = base, dict(adapters), 0
        self._roots = bridge, bridge.original_model
        self._look()

    def state(self) -> State | None:
        if self._children() != self._seen_children or self._tensors() != self._seen_tensors:
            self.changes = next(_CHANGES)
            self._look()
        if self._disturbed():
            return None
        live = []
        for name, module, owned in self._adapted:
            if getattr(module, "merged", False):
                return None
            if module.disable_adapters:
                continue
            scaling = vars(module).get("scaling", {})
            active = tuple((a, scaling.get(a)) for a in module.active_adapters if a in owned)
            if active:
                live.append((name, active))
        return self.changes, tuple(live)

    def _look(self) -> None:
        named = {module: name for root in self._roots for name, module in root.named_modules()}
        self._parents = [module._modules for module in named if module._modules]
        held = [d for module in named for d in (module._parameters, module._buffers) if d]
        self._holders = held
        self._hooks = [d for m in named for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._attributes = [vars(module) for module in named]
        self._adapted = [(named[module], module, owned) for module, owned in _adapted(named)]
        self._seen_children, self._seen_tensors = self._children(), self._tensors()
        # While these live, no other tensor can have their address.
        self._held = [
            t.detach() for t in chain.from_iterable(map(dict.values, held)) if t is not None
        ]

    def _children(self) -> list[torch.nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, self._parents)))

    def _tensors(self) -> list[tuple[int, int, int]]:
        tensors = chain.from_iterable(map(dict.values, self._holders))
        return [(id(t), t.data_ptr(), t._version) for t in tensors if t is not None]

    def _disturbed(self) -> bool:
        """Whether more takes part in a pass than weights and adapters."""
        return (
            any(
                not _only_captures(hook)
                for hooks in self._hooks
                if hooks
                for hook in hooks.values()
            )
            or bool(torch_module._global_forward_hooks)
            or bool(torch_module._global_forward_pre_hooks)
            or any(own["training"] or not _computes_the_same(own) for own in self._attributes)
            or torch.is_autocast_enabled("cpu")
            or torch.is_autocast_enabled("cuda")
        )


def _computes_the_same(attributes: Mapping[str, Any]) -> bool:
    """Whether a module computes by its own ``forward``, or by one that gives the same."""
    replaced = attributes.get("forward")
    return replaced is None or COMPUTES_THE_SAME in getattr(replaced, "__dict__", {})


def _only_captures(hook: object) -> bool:
    """Whether it is a hook with which the libraries themselves keep what passes by, unchanged.

    transformers and TransformerLens install them when an output is first asked for, and leave them.
    """
    ours = getattr(hook, "__module__", "").startswith(("transformers.", "transformer_lens."))
    return ours and "captur" in getattr(hook, "__qualname__", "")


def _adapted(modules: Mapping[torch.nn.Module, str]) -> Iterator[tuple[Any, set[str]]]:
    """The modules that hold adapters, and the names of those that they hold."""
    if "peft" not in sys.modules:  # importing it takes a second, and without it there are none
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for module in modules:
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            held = (attrgetter(name)(module) for name in module.adapter_layer_names)
            yield module, {name for adapters in held for name in adapters}
