"""Model specs -> ``TransformerBridge``: many LoRA adapters on one base, switched in milliseconds.

Safetensors only, ``trust_remote_code`` only where the spec asks for it, and the network only for
what is neither a local folder nor in the Hugging Face cache.
"""

import hashlib
import json
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from interp_kit.decisions import Tokenizing
from interp_kit.specs import InputError, ModelSpec, find_model

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """One base in memory, and the PEFT names of the adapters on it."""

    bridge: TransformerBridge
    adapters: dict[str, str]  # model name -> PEFT adapter name


class Models:
    """Several fine-tunes on as few bases as they have, loaded when first asked for.

    ``switch`` hands out the *same* bridge for every adapter of one base: what it computes next is
    the model that was switched to last.
    """

    def __init__(self, specs: Iterable[ModelSpec], *, device: str | None = None) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.device = device or _default_device()
        self._loaded: dict[tuple[Any, ...], _Loaded] = {}
        self._active: dict[tuple[Any, ...], str] = {}
        self._keys: dict[str, tuple[Any, ...]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

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
        return _texts(Path(spec.documents)), _texts(Path(spec.base_documents))

    def switch(self, name: str) -> TransformerBridge:
        """The bridge, computing as model ``name``: its base and exactly its adapter.

        Switching is this method's alone: adapters set on the model by hand are not noticed.
        """
        loaded = self._load(name)
        if self._active.get(self._key(name)) == name:
            return loaded.bridge
        if name in loaded.adapters:
            model: Any = loaded.bridge.original_model
            model.enable_adapters()
            model.set_adapter(loaded.adapters[name])
            model.requires_grad_(False)  # set_adapter makes the adapter trainable
            self._active[self._key(name)] = name
        else:
            self.base_of(name)
        return loaded.bridge

    def base_of(self, name: str) -> TransformerBridge:
        """The bridge, computing as the base of model ``name``: with no adapter, and its tokens.

        The same bridge that ``switch`` hands out.
        """
        loaded = self._load(name)
        if loaded.adapters and self._active.get(self._key(name)) != "":
            cast(Any, loaded.bridge.original_model).disable_adapters()
            self._active[self._key(name)] = ""
        return loaded.bridge

    @contextmanager
    def with_layers_from(
        self, target: str, source: str, layers: Collection[int]
    ) -> Iterator[TransformerBridge]:
        """The bridge, computing as ``target`` but with ``source``'s adapter in these layers.

        A model without an adapter stands for the bare base there. ``target`` is itself again
        afterwards. Raises ``InputError`` unless both are fine-tunes of one base.
        """
        self.require_one_base(target, source)
        bridge = self.switch(target)
        adapters = self._load(target).adapters
        changed = [m for layer in layers for m in _lora_modules(bridge, layer).values()]
        try:
            if target not in adapters and source in adapters:  # the bare base around them
                cast(Any, bridge.original_model).enable_adapters()
                for layer in range(bridge.cfg.n_layers):
                    for module in _lora_modules(bridge, layer).values():
                        module.set_adapter([])
            for module in changed:
                module.set_adapter([adapters[source]] if source in adapters else [])
            cast(Any, bridge.original_model).requires_grad_(False)
            yield bridge
        finally:
            self._active.clear()
            self.switch(target)

    def adapter_weights(
        self, name: str
    ) -> Iterator[tuple[int, str, Float[Tensor, "out in"], Float[Tensor, "out in"]]]:
        """(layer, module, change, base weight) of every weight that the adapter changes.

        Raises ``InputError`` for a model without an adapter.
        """
        bridge = self.switch(name)
        adapter = self._load(name).adapters.get(name)
        if adapter is None:
            raise InputError(f"model {name!r} has no adapter; expected a fine-tune")
        for layer in range(bridge.cfg.n_layers):
            for module_name, module in _lora_modules(bridge, layer).items():
                if adapter in module.lora_A:
                    weight = module.get_base_layer().weight.detach()
                    yield layer, module_name, module.get_delta_weight(adapter).detach(), weight

    def require_one_base(self, *names: str) -> None:
        """Raise ``InputError`` unless all of these are fine-tunes of one base, or that base."""
        keys = {self._key(name) for name in names}
        if len(keys) > 1:
            bases = ", ".join(f"{name!r} on {self.specs[name].base!r}" for name in names)
            raise InputError(
                f"activations move only between fine-tunes of one base, loaded alike ({bases}); "
                "choose models with the same base, revision, dtype, prompt format and tokens"
            )

    def _spec(self, name: str) -> ModelSpec:
        if name not in self.specs:
            raise InputError(f"model {name!r} was not loaded; expected one of {list(self.specs)}")
        return self.specs[name]

    def _key(self, name: str) -> tuple[Any, ...]:
        if name not in self._keys:
            self._keys[name] = _same_base(self._spec(name))
        return self._keys[name]

    def _load(self, name: str) -> _Loaded:
        key = self._key(name)
        if key not in self._loaded:
            tuned = [s for s in self.specs.values() if s.adapter and self._key(s.name) == key]
            self._loaded[key] = _boot(self._spec(name), tuned, self.device)
        return self._loaded[key]


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


def load_huggingface(spec: ModelSpec, *, device: str | None = None) -> PreTrainedModel:
    """The model as plain Hugging Face and PEFT compute it: the reference for the bridge."""
    model: Any = _base_model(spec)
    _extend(spec, model)
    if spec.adapter:
        from peft import PeftModel

        folder = _adapter_folder(spec)
        _check_adapter(spec, folder, model)
        with _quiet():
            model = PeftModel.from_pretrained(model, str(folder))
        if _whole_embedding(spec, folder):
            model.get_base_model().tie_weights()
    return model.to(device or _default_device()).eval()


def inspect_model(spec: ModelSpec) -> Tokenizing:
    """What encoding needs of the model, without its weights; their files are checked on the way.

    Raises what loading would raise, in a fraction of the time.
    """
    config = _local_first(
        lambda **kwargs: AutoConfig.from_pretrained(
            _base_folder(spec),
            trust_remote_code=spec.trust_remote_code,
            **kwargs,
        ),
        spec.base,
        spec.name,
    )
    if Path(spec.base).is_dir():
        _check_weight_files(Path(spec.base), spec.name)
    if spec.adapter:
        with torch.device("meta"), _quiet():
            shape = AutoModelForCausalLM.from_config(config)
            _extend(spec, shape)
        _check_adapter(spec, _adapter_folder(spec), shape)
    tokenizer = _tokenizer(spec)
    text = config.get_text_config()
    cfg = SimpleNamespace(
        default_prepend_bos=spec.prepend_bos and tokenizer.bos_token_id is not None,
        d_vocab=max(text.vocab_size, max(tokenizer.get_vocab().values()) + 1),
        n_ctx=getattr(text, "max_position_embeddings", None) or tokenizer.model_max_length,
    )
    return cast(Tokenizing, SimpleNamespace(tokenizer=tokenizer, cfg=cfg))


# ------------------------------------------------------------------------------------- internals
def _texts(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{file}: expected a line {{"text": "..."}} for each document ({error}); mend it'
        ) from None


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _same_base(spec: ModelSpec) -> tuple[Any, ...]:
    """What two models have in common that can share one base in memory.

    An adapter with a tokenizer of its own gets a base whose embedding has rows for it.
    """
    how = (spec.dtype, spec.chat_template, spec.prepend_bos, spec.trust_remote_code)
    return (spec.base, spec.revision, *how, _vocabulary(spec))


def _vocabulary(spec: ModelSpec) -> str:
    """Which tokens the adapter adds: empty, or a digest of its vocabulary.

    Adapters that overwrite the whole embedding share it with none.
    """
    folder = _own_tokenizer(spec)
    if folder is None:
        return ""
    return _vocabulary_of(str(folder)) + (str(folder) if _whole_embedding(spec, folder) else "")


def _own_tokenizer(spec: ModelSpec) -> Path | None:
    """The adapter's folder, if it brings a tokenizer with other tokens than the base's."""
    folder = _adapter_folder(spec) if spec.adapter else None
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        return None
    same = _vocabulary_of(str(folder)) == _vocabulary_of(_base_folder(spec))
    return None if same else folder


@cache
def _vocabulary_of(folder: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _whole_embedding(spec: ModelSpec, folder: Path) -> int | None:
    """Rows of the embedding that an adapter saved as a whole, if it did."""
    shapes = _tensor_shapes(folder / ADAPTER_WEIGHTS, spec.name)
    whole = [v[0] for k, v in shapes.items() if k.endswith(("embed_tokens.weight", "wte.weight"))]
    return whole[0] if whole else None


def _extend(spec: ModelSpec, model: Any) -> None:
    """Give the embedding rows for the tokens that the adapter brings.

    Raises ``InputError`` if the adapter has no weights for some of its tokens.
    """
    folder = _own_tokenizer(spec)
    if folder is None:
        return
    known = model.get_input_embeddings().weight.shape[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    needed = max(tokenizer.get_vocab().values()) + 1
    saved = _whole_embedding(spec, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    trained = config.get("trainable_token_indices") or []
    if isinstance(trained, dict):
        trained = [i for ids in trained.values() for i in ids]
    missing = sorted(set(range(known, needed)) - set(trained if saved is None else range(saved)))
    if missing:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(missing[:3])))
        raise InputError(
            f"model {spec.name!r}: its tokenizer has {needed} tokens, and neither the base "
            f"({known} rows) nor the adapter has weights for {names}; save the adapter with "
            "trainable_token_indices or with its embedding, or mend its tokenizer"
        )
    rows = max(known, needed) if saved is None else saved
    if rows != known:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _lora_modules(bridge: TransformerBridge, layer: int) -> dict[str, Any]:
    """The modules of one block that carry adapters: ``self_attn.q_proj`` and so on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name.replace("_original_component.", "").removesuffix("._original_component"): module
        for name, module in bridge.blocks[layer].named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def _boot(spec: ModelSpec, tuned: list[ModelSpec], device: str) -> _Loaded:
    model: Any = _base_model(spec)
    _extend(spec, model)
    adapters = {}
    for i, adapted in enumerate(tuned):
        folder = _adapter_folder(adapted)
        _check_adapter(adapted, folder, model)
        # PEFT names must not hold dots, and must not occur in the base's parameter names.
        adapters[adapted.name] = f"finetune_{i}"
        with _quiet():
            model.load_adapter(str(folder), adapter_name=adapters[adapted.name])
        if _whole_embedding(adapted, folder):
            model.tie_weights()  # the output matrix follows the embedding that was just replaced
    tokenizer = _tokenizer(spec)
    has_bos = tokenizer.bos_token_id is not None
    with _quiet():
        bridge = TransformerBridge.boot_transformers(
            spec.base,
            hf_model=model.to(device),
            tokenizer=tokenizer,
            device=device,
            dtype=getattr(torch, spec.dtype),
        )
    # Booting invents a BOS for a tokenizer without one; prompts must not get that.
    bridge.cfg.default_prepend_bos = spec.prepend_bos and has_bos
    bridge.eval().requires_grad_(False)
    return _Loaded(bridge=bridge, adapters=adapters)


def _base_model(spec: ModelSpec) -> PreTrainedModel:
    def load(**kwargs: Any) -> PreTrainedModel:
        with _quiet():
            return AutoModelForCausalLM.from_pretrained(
                _base_folder(spec),
                dtype=getattr(torch, spec.dtype),
                attn_implementation="eager",  # the bridge needs it, and Gemma-2 refuses sdpa
                use_safetensors=True,
                trust_remote_code=spec.trust_remote_code,
                **kwargs,
            )

    if Path(spec.base).is_dir():
        _check_weight_files(Path(spec.base), spec.name)
    return _local_first(load, spec.base, spec.name)


def _tokenizer(spec: ModelSpec) -> Any:
    def load(**kwargs: Any) -> Any:
        return AutoTokenizer.from_pretrained(
            str(_own_tokenizer(spec) or _base_folder(spec)),
            trust_remote_code=spec.trust_remote_code,
            **kwargs,
        )

    tokenizer = _local_first(load, spec.base, spec.name)
    if spec.chat_template and not tokenizer.chat_template:
        raise InputError(
            f"model {spec.name!r}: chat_template is true, but its tokenizer has none; "
            "set it to false or give a model with one"
        )
    if not spec.chat_template:
        tokenizer.chat_template = None
    return tokenizer


def _base_folder(spec: ModelSpec) -> str:
    """The base's folder: as given, or the cache's copy of what the hub has.

    transformers, given an id, asks the hub for an adapter beside it even when told not to.
    """
    if Path(spec.base).is_dir():
        return spec.base

    def load(**kwargs: Any) -> str:
        folder = snapshot_download(
            spec.base,
            revision=spec.revision,
            ignore_patterns=[f"*{suffix}" for suffix in PICKLES],
            **kwargs,
        )
        if not (Path(folder) / "config.json").is_file():
            raise OSError(f"{spec.base} has no config.json in the cache")
        return folder

    return _local_first(load, spec.base, spec.name)


def _local_first(load: Any, source: str, name: str) -> Any:
    """``load`` from disk; only what is not on disk is asked of the hub."""
    try:
        return load(local_files_only=True)
    except SafetensorError as error:
        raise InputError(
            f"model {name!r}: a weight file is corrupt ({error}); copy it anew"
        ) from None
    except (OSError, ValueError) as first:
        if Path(source).is_dir():
            raise InputError(f"model {name!r}: {_first_line(first)}") from None
    try:
        return load()
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {name!r}: {source!r} is neither on disk nor to be had from the Hugging Face "
            f"hub ({_first_line(error)}); download it, check the id, or log in if it is gated"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_weight_files(folder: Path, name: str) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if not weights:
        came = (
            f"found only {', '.join(pickles)} (pickle, which can run code)" if pickles else "none"
        )
        raise InputError(
            f"model {name!r}: expected *.safetensors in {folder}, {came}; "
            "convert or copy the weights as safetensors"
        )
    for file in weights:
        _tensor_shapes(file, name)


def _tensor_shapes(file: Path, name: str) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in sorted(tensors.keys())}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"model {name!r}: {file} is not readable as safetensors ({_first_line(error)}); "
            "copy it anew"
        ) from None


def _adapter_folder(spec: ModelSpec) -> Path:
    """The adapter's local folder, fetched from the hub if it is an id."""
    assert spec.adapter is not None
    folder = Path(spec.adapter)
    if not folder.is_dir():

        def load(**kwargs: Any) -> str:
            return snapshot_download(
                str(spec.adapter),
                revision=spec.adapter_revision,
                allow_patterns=["*.json", "*.safetensors"],
                **kwargs,
            )

        folder = Path(_local_first(load, spec.adapter, spec.name))
    for needed in ("adapter_config.json", ADAPTER_WEIGHTS):
        if not (folder / needed).is_file():
            pickled = [p.name for p in folder.iterdir() if p.suffix in PICKLES]
            came = f"; {pickled[0]} is a pickle, which can run code" if pickled else ""
            raise InputError(
                f"model {spec.name!r}: adapter folder {folder} lacks {needed}{came}; "
                "save the adapter with PEFT's save_pretrained (safetensors)"
            )
    return folder


def _check_adapter(spec: ModelSpec, folder: Path, model: PreTrainedModel) -> None:
    """Refuse an adapter whose modules or widths are not those of this base."""
    try:
        made_for = json.loads((folder / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
    except (ValueError, KeyError) as error:
        raise InputError(
            f"model {spec.name!r}: {folder / 'adapter_config.json'} is not a PEFT adapter config "
            f"({error}); save the adapter with PEFT's save_pretrained"
        ) from None
    wrong_base = (
        f"model {spec.name!r}: its adapter was made for {made_for!r}, not for "
        f"{spec.base_name or spec.base!r}"
    )
    if spec.base_name and made_for and "/" not in made_for and made_for != spec.base_name:
        raise InputError(f"{wrong_base}; set base to the model that it was trained on")
    modules = dict(model.named_modules())
    for key, shape in _tensor_shapes(folder / ADAPTER_WEIGHTS, spec.name).items():
        path, _, kind = key.removeprefix("base_model.model.").partition(".lora_")
        if not kind.startswith(("A.", "B.")):
            continue
        linear = modules.get(path)
        linear = getattr(linear, "base_layer", linear)  # another adapter may sit on it already
        base_shape = getattr(getattr(linear, "weight", None), "shape", None)
        width = None if base_shape is None else base_shape[1 if kind.startswith("A.") else 0]
        # GPT-2's Conv1D stores its weight transposed.
        if type(linear).__name__ == "Conv1D" and base_shape is not None:
            width = base_shape[0 if kind.startswith("A.") else 1]
        got = shape[1] if kind.startswith("A.") else shape[0]
        if width is not None and width != got:
            raise InputError(
                f"{wrong_base}: {path} has width {width} there and {got} in the adapter"
            )
        if linear is None and not path.endswith(("experts", "experts.base_layer")):
            raise InputError(f"{wrong_base}: the base has no module {path}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the bars, notices and deprecations of transformers while it loads; errors still show."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
