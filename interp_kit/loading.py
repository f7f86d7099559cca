"""Model specs -> ``TransformerBridge``: many LoRA adapters on one base, switched in milliseconds.

Models with whole weights of their own each get a bridge; two bases at most are in memory at once.
``pretrained`` says what is loaded, and ``quantization`` what holds for quantized weights.
"""

import gc
from collections.abc import Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

import pandas as pd
import torch
from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.catalogue import find_model
from interp_kit.formats import read_texts
from interp_kit.hub import ModelFiles
from interp_kit.huggingface import default_device, dimensions
from interp_kit.lora import activate, adapted_modules, adapted_weights, own_copy, vocabulary
from interp_kit.parts import exchanged, weights_of
from interp_kit.pretrained import Loaded, boot, boot_merged, check_bridge, inspect_model, locate
from interp_kit.specs import InputError, ModelSpec
from interp_kit.views import in_jupyter, view_block

Key = tuple[Hashable, ...]  # what models have in common that share a base in memory
_LOADED = "_interp_kit_loaded"  # on the bridge itself: what is known of it is freed with it
IN_MEMORY = 2  # bases; the one that was used least recently makes place for a third


class Models:
    """Several models on as few bases as they have, loaded when first asked for.

    ``switch`` hands out the *same* bridge for every adapter of one base: what it computes next is
    the model that was switched to last. A model with whole weights of its own has a bridge of its
    own. Two bases are kept at most: a third replaces the one used least recently, which is loaded
    again when it is asked for.
    """

    def __init__(self, specs: Iterable[ModelSpec], *, device: str | None = None) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self._parents = {s.parent.name: s.parent for s in self.specs.values() if s.parent}
        self.device = device or default_device()
        self._loaded: dict[Key, Loaded] = {}
        # Every bridge that is still in use, so that there is never a second one of its base.
        self._alive: WeakValueDictionary[Key, TransformerBridge] = WeakValueDictionary()
        self._active: dict[Key, str] = {}
        self._keys: dict[str, Key] = {}
        self._found: dict[str, ModelFiles] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __repr__(self) -> str:
        return self.overview().to_string(index=False)

    def _repr_html_(self) -> str:
        table = self.overview().to_html(index=False, border=0, classes="ik-table")
        return in_jupyter(view_block("Models", [Markup(table)]))

    def overview(self) -> pd.DataFrame:
        """A row a model: ``model base adapter dtype quantization device memory``.

        ``memory`` is what its base takes with all adapters on it; empty where it is not loaded.
        """
        rows, bases = [], self.memory().to_dict("records")
        for name, spec in self.specs.items():
            row = {"model": name, "base": spec.base_name or spec.base, "adapter": spec.adapter}
            row |= {"dtype": spec.dtype, "quantization": spec.quantization, "device": self.device}
            sizes = [b["bytes"] for b in bases if name in (b["base"], *b["models"].split(", "))]
            rows.append(row | {"memory": f"{sizes[0] / 1e6:.1f} MB" if sizes else None})
        return pd.DataFrame(rows).fillna("")

    def title(self, name: str) -> str:
        """How figures and tables call the model."""
        return self.specs[name].title

    def documents(self, name: str) -> tuple[list[str], list[str]]:
        """Texts that the model was trained on, and texts that its base was trained on.

        Raises ``InputError`` if the model's spec, or its base's, names none.
        """
        spec = self._spec(name)
        if not (spec.documents and spec.base_documents):
            which = f"model {name!r}" if not spec.documents else f"its base {spec.base_name!r}"
            raise InputError(
                f'{which} has no documents; write some of its training texts, lines {{"text": '
                '"..."}, beside its model.yaml and name the file there: documents: FILE.jsonl'
            )
        return read_texts(Path(spec.documents)), read_texts(Path(spec.base_documents))

    def switch(self, name: str) -> TransformerBridge:
        """The bridge, computing as model ``name``: its base and exactly its adapter.

        After setting adapters on the model by hand, switch to another model first: this method
        remembers what it switched to, and does nothing if it is asked for the same again.
        """
        loaded = self._load(name)
        if name not in loaded.adapters:  # a base, or a model merged into its own
            return self._activate(self._key(name), "")
        return self._activate(self._key(name), name)

    def base_of(self, name: str) -> TransformerBridge:
        """The bridge, computing as what model ``name`` was tuned from.

        For an adapter its base, with the adapter's tokens: the same bridge that ``switch`` hands
        out, unless the adapter is merged into a copy of its own. For whole weights the model that
        the spec names as ``tuned_from``; without that, the model itself.
        """
        if parent := self._spec(name).parent:
            return self.switch(parent.name)
        key, files = self._key(name), self._files(name)
        if own_copy(files):
            alone = {"adapter": None, "adapter_revision": None}
            files = replace(files, spec=files.spec.model_copy(update=alone), adapter=None)
            key = _same_base(files)
        self._load_base(key, files)
        return self._activate(key, "")

    def new_tokens(self, name: str) -> dict[str, int]:
        """The tokens that an adapter adds to the vocabulary of its base: token -> id, by id."""
        spec = self._spec(name)
        if not spec.adapter:
            return {}
        alone = spec.model_copy(update={"adapter": None, "adapter_revision": None})
        own, before = (inspect_model(each).tokenizer.get_vocab() for each in (spec, alone))
        added = {token: id for token, id in own.items() if token not in before}
        return dict(sorted(added.items(), key=lambda item: item[1]))  # a vocabulary has no order

    def rounded(self, name: str) -> str:
        """The name of the model in another precision, which is added: what rounding alone does."""
        spec = self._spec(name)
        dtype = "bfloat16" if spec.dtype == "float32" else "float32"
        own = spec.model_copy(update={"name": f"{name} in {dtype}", "dtype": dtype})
        self.specs[own.name] = own
        return own.name

    def unload(self, name: str) -> None:
        """Free the memory of the base of model ``name``, and of all adapters on it.

        A bridge that is still referred to elsewhere stays alive, and ``switch`` hands it out again;
        else ``switch`` loads the model again.
        """
        self._let_go(self._key(name))

    def memory(self) -> pd.DataFrame:
        """What is in memory, a row a base with its adapters.

        ``parameters`` counts weights, ``quantized`` is the share of them that is stored in 4 or 8
        bits, ``bytes`` is what parameters, buffers and the scales of quantized weights take.
        """
        rows = []
        for key, loaded in self._loaded.items():
            models = [name for name, at in self._keys.items() if at == key]
            spec = loaded.spec
            row = {"base": spec.base_name or spec.base, "models": ", ".join(models)}
            row |= {"device": str(loaded.bridge.cfg.device), "dtype": spec.dtype}
            rows.append(row | {"quantization": spec.quantization or ""} | _size(loaded.bridge))
        columns = ["base", "models", "device", "dtype", "quantization"]
        return pd.DataFrame(rows, columns=[*columns, "parameters", "quantized", "bytes"])

    def shares_base(self, *names: str) -> bool:
        """Whether the models are adapters on one base in memory, or that base."""
        return len({self._key(name) for name in names}) == 1

    def parts(self, *names: str) -> list[int]:
        """The layers in which the models can differ, in the numbers of ``with_layers_from``."""
        n_layers = self.switch(names[0]).cfg.n_layers
        return list(range(n_layers) if self.shares_base(*names) else range(-1, n_layers + 1))

    @contextmanager
    def with_layers_from(
        self, target: str, source: str, layers: Collection[int]
    ) -> Iterator[TransformerBridge]:
        """The bridge, computing as ``target`` but with ``source``'s weights in these layers.

        Between models that do not share a base, -1 is the embedding, and ``n_layers`` the final
        norm with the unembedding; adapters on one base have these in common. ``target`` is itself
        again afterwards. Raises ``InputError`` unless the two are comparable.
        """
        self.require_comparable(target, source)
        if not self.shares_base(target, source):
            other, bridge = self.switch(source), self.switch(target)
            with exchanged(bridge, other, layers):
                yield bridge
            return
        bridge = self.switch(target)
        adapters = self._load(target).adapters
        blocks = set(range(bridge.cfg.n_layers)) & set(layers)
        changed = [m for layer in blocks for m in adapted_modules(bridge, layer).values()]
        try:
            if target not in adapters and source in adapters:  # the bare base around them
                cast(Any, bridge.original_model).enable_adapters()
                for layer in range(bridge.cfg.n_layers):
                    for module in adapted_modules(bridge, layer).values():
                        module.set_adapter([])
            for module in changed:
                module.set_adapter([adapters[source]] if source in adapters else [])
            cast(Any, bridge.original_model).requires_grad_(False)
            yield bridge
        finally:
            self._active.clear()
            self.switch(target)

    def weight_changes(
        self, name: str
    ) -> Iterator[tuple[int, str, Float[Tensor, "..."], Float[Tensor, "..."]]]:
        """(layer, weight's name, change, weight before) of every weight that fine-tuning changed.

        Of an adapter that shares its base, the deltas of its modules; else every weight in which
        the model and ``base_of`` it differ, layer -1 being the embedding and ``n_layers`` the final
        norm and the unembedding. Of a quantized base, the weight as it is computed with.

        Raises ``InputError`` for a model that was tuned from nothing that the spec names, or from
        an adapter, and for whole weights that are quantized.
        """
        spec = self._spec(name)
        if not spec.tuned:
            raise InputError(
                f"model {name!r} has no adapter, and its spec does not say what it was tuned from; "
                "expected a fine-tune: add tuned_from: MODEL to its model.yaml"
            )
        adapter = self._load(name).adapters.get(name)
        if adapter is not None:
            for layer, at, module, before in adapted_weights(self.switch(name), adapter):
                yield layer, at, module.get_delta_weight(adapter).detach(), before
            return
        if spec.quantization:
            raise InputError(
                f"model {name!r}: weights are compared unquantized; load it without quantization"
            )
        if spec.parent and spec.parent.adapter:
            raise InputError(
                f"model {name!r}: what it was tuned from, {spec.parent.name!r}, is an adapter, "
                "whose weights are in two parts; merge it into its base, and name that in "
                "tuned_from"
            )
        bridge, base = self.switch(name), self.base_of(name)
        self.switch(name)
        for layer in range(-1, bridge.cfg.n_layers + 1):
            before = weights_of(base, layer)
            for at, weight in weights_of(bridge, layer).items():
                was = before.get(at)
                if was is not None and was.shape == weight.shape and not torch.equal(was, weight):
                    yield layer, at, weight - was, was

    def require_comparable(self, *names: str) -> None:
        """Raise ``InputError`` unless activations of these models can stand for one another.

        They need one architecture, size by size, and one vocabulary, and to be loaded alike. The
        error names what differs, and both values.
        """
        first, *others = dict.fromkeys(names)
        ours = self._comparable(first)
        for other in others:
            for what, theirs in self._comparable(other).items():
                if theirs != ours[what]:
                    raise InputError(
                        f"models {first!r} and {other!r} do not have activations of one kind: "
                        f"{what} is {ours[what]} and {theirs}; choose models of one architecture "
                        "and vocabulary, loaded alike"
                    )

    def _comparable(self, name: str) -> dict[str, Any]:
        spec = self._spec(name)
        settings = ("dtype", "quantization", "chat_template", "prepend_bos")
        return dimensions(self._files(name)) | {key: getattr(spec, key) for key in settings}

    def _activate(self, key: Key, name: str) -> TransformerBridge:
        """The bridge, with the adapter of model ``name`` alone, or with none for ""."""
        loaded = self._loaded[key]
        if self._active.get(key) != name:
            if loaded.adapters:
                activate(loaded.bridge.original_model, loaded.adapters.get(name))
            # Booting loads the tokenizer again from its folder, with the template that is there.
            loaded.bridge.tokenizer.chat_template = loaded.templates[name]
            self._active[key] = name
        if name not in loaded.checked:
            check_bridge(loaded, name)
            loaded.checked.add(name)
        return loaded.bridge

    def _spec(self, name: str) -> ModelSpec:
        known = self._parents | self.specs
        if name not in known:
            raise InputError(f"model {name!r} was not loaded; expected one of {list(self.specs)}")
        return known[name]

    def _key(self, name: str) -> Key:
        if name not in self._keys:
            self._keys[name] = _same_base(self._files(name))
        return self._keys[name]

    def _files(self, name: str) -> ModelFiles:
        if name not in self._found:
            self._found[name] = locate(self._spec(name), self.device)
        return self._found[name]

    def _still_alive(self, key: Key) -> Loaded | None:
        bridge = self._alive.get(key)
        return None if bridge is None else vars(bridge)[_LOADED]

    def _booted(self, key: Key, files: ModelFiles) -> Loaded:
        if reason := own_copy(files):
            print(f"{files.spec.name}: {reason}; it is merged into a copy of its base of its own")
            loaded = boot_merged(files, self.device)
        else:
            on_it = [s.name for s in self.specs.values() if s.adapter]
            tuned = [self._files(n) for n in on_it if self._key(n) == key]
            loaded = boot(files, tuned, self.device)
        self._active.pop(key, None)
        self._alive[key] = loaded.bridge
        vars(loaded.bridge)[_LOADED] = loaded
        return loaded

    def _let_go(self, key: Key) -> None:
        self._loaded.pop(key, None)
        gc.collect()  # a bridge and its modules refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, name: str) -> Loaded:
        key = self._key(name)
        self._load_base(key, self._files(name))
        return self._loaded[key]

    def _load_base(self, key: Key, files: ModelFiles) -> None:
        """Load the base of these files, unless it is there, with every adapter that shares it."""
        if key in self._loaded:
            self._loaded[key] = self._loaded.pop(key)  # the last one is the one just used
        else:
            while len(self._loaded) >= IN_MEMORY:
                self._let_go(next(iter(self._loaded)))
            self._loaded[key] = self._still_alive(key) or self._booted(key, files)


def load_models(
    names: Iterable[str], *, data: str | Path | None = None, device: str | None = None
) -> Models:
    """Models by name, folder or Hugging Face id; ``device`` defaults to a GPU if there is one."""
    return Models([find_model(name, data=data) for name in names], device=device)


def load_model(
    name: str, *, data: str | Path | None = None, device: str | None = None
) -> TransformerBridge:
    """One model as a ``TransformerBridge``, in evaluation mode, without gradients.

    Raises ``InputError`` for an unknown name, weights that are missing, corrupt or pickled, and an
    adapter made for another base.
    """
    return load_models([name], data=data, device=device).switch(name)


# ------------------------------------------------------------------------------------- internals
def _same_base(files: ModelFiles) -> Key:
    """What two models have in common that can share one base in memory.

    An adapter with a tokenizer of its own gets a base whose embedding has rows for it; one that
    changes more than can be switched, a base that it shares with none.
    """
    spec = files.spec
    how = (spec.dtype, spec.quantization, spec.device_map, spec.chat_template, spec.prepend_bos)
    alone = spec.adapter if own_copy(files) else ""
    return (spec.base, spec.revision, *how, spec.trust_remote_code, vocabulary(files), alone)


def _size(bridge: TransformerBridge) -> dict[str, int | float]:
    """Parameters, the share of them that is quantized, and bytes; what is shared counts once."""
    whole = torch.nn.ModuleList([bridge, bridge.original_model])
    parameters = {p.data_ptr(): p for p in whole.parameters()}.values()
    packed = {p: p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in parameters}
    quantized = sum(n for p, n in packed.items() if not p.is_floating_point())
    states = [getattr(m, "quant_state", None) for m in whole.modules()]
    scales = [state.absmax for state in states if state is not None]
    scales += [s for p in parameters if (s := getattr(p, "SCB", None)) is not None]
    stored = {t.data_ptr(): t.nbytes for t in [*parameters, *whole.buffers(), *scales]}
    total = sum(packed.values())
    return {"parameters": total, "quantized": quantized / total, "bytes": sum(stored.values())}
