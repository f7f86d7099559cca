"""Model specs -> ``TransformerBridge``: many LoRA adapters on one base, switched in milliseconds.

Safetensors only, ``trust_remote_code`` only where the spec asks for it, and the network only for
what is neither a local folder nor in the Hugging Face cache; a token only from the environment.

Quantized weights (bitsandbytes) are read nowhere: what analyses take from a model is what its
modules compute. So that their identities hold to rounding, as for any other model,

- 4 bits multiply in the model's own dtype; the experts of a mixture are quantized too;
- 8 bits round each position's activations by itself. LLM.int8() would look for outliers in the
  whole batch, and a prompt's numbers would depend on its neighbours;
- the projections that heads are told apart by stay as they are: queries, keys and values in one
  matrix, and, since 8 bits are not linear in the activations, the attention output.
"""

import gc
import hashlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import logging as transformers_logging

from interp_kit.checkpoints import CHECKSUMS, altered_weights, whole
from interp_kit.decisions import Tokenizing
from interp_kit.specs import InputError, ModelSpec, find_model

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LOADED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]

# How architectures name what stays unquantized, and the experts' weights, [expert out in].
FUSED_QKV = ["c_attn", "query_key_value", "qkv_proj", "Wqkv"]
ATTENTION_OUTPUT = ["o_proj", "attn.c_proj", "attention.dense", "attn.out_proj", "attn.dense"]
EXPERTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
MOST_ROUNDED = 0.15  # of a random matrix, relative: NF4 loses 0.09, 8 bits 0.01

# It says on import and at every multiplication which kernel it does not use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


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
        return read_texts(Path(spec.documents)), read_texts(Path(spec.base_documents))

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
            _show_token_rows(model, loaded.adapters[name])
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
            _show_token_rows(loaded.bridge.original_model, None)
            self._active[self._key(name)] = ""
        return loaded.bridge

    def unload(self, name: str) -> None:
        """Free the memory of the base of model ``name``, and of all adapters on it.

        A bridge that is still held elsewhere stays alive. Asked for again, the model loads anew.
        """
        self._loaded.pop(self._key(name), None)
        self._active.pop(self._key(name), None)
        gc.collect()  # a bridge and its modules refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def memory(self) -> pd.DataFrame:
        """What is in memory, a row a base with its adapters.

        ``parameters`` counts weights, ``quantized`` is the share of them that is stored in 4 or 8
        bits, ``bytes`` is what parameters, buffers and the scales of quantized weights take.
        """
        rows = []
        for key, loaded in self._loaded.items():
            models = [name for name in self.specs if self._keys.get(name) == key]
            spec = self.specs[models[0]]
            row = {"base": spec.base_name or spec.base, "models": ", ".join(models)}
            row |= {"device": str(loaded.bridge.cfg.device), "dtype": spec.dtype}
            rows.append(row | {"quantization": spec.quantization or ""} | _size(loaded.bridge))
        columns = ["base", "models", "device", "dtype", "quantization"]
        return pd.DataFrame(rows, columns=[*columns, "parameters", "quantized", "bytes"])

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

        Of a quantized base, the weight as it is computed with. Raises ``InputError`` for a model
        without an adapter.
        """
        from peft.utils.integrations import dequantize_module_weight

        bridge = self.switch(name)
        adapter = self._load(name).adapters.get(name)
        if adapter is None:
            raise InputError(f"model {name!r} has no adapter; expected a fine-tune")
        for layer in range(bridge.cfg.n_layers):
            for module_name, module in _lora_modules(bridge, layer).items():
                if adapter in module.lora_A:
                    weight = dequantize_module_weight(module.get_base_layer()).detach()
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
    model: Any = _base_model(spec, device or _default_device())
    _extend(spec, model)
    if spec.adapter:
        from peft import PeftModel

        folder = _adapter_folder(spec)
        _check_adapter(spec, folder, model)
        with _quiet():
            model = PeftModel.from_pretrained(model, str(folder))
        if _whole_embedding(spec, folder):
            model.get_base_model().tie_weights()
    return model.eval()


def inspect_model(spec: ModelSpec) -> Tokenizing:
    """What encoding needs of the model, without its weights; their files are checked on the way.

    Raises what loading would raise, in a fraction of the time.
    """
    _check_quantization(spec, _default_device())
    config = _config(spec)
    if Path(spec.base).is_dir():
        _check_weight_files(Path(spec.base), spec.name)
    if spec.adapter:
        shape = _shape(spec, config)
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


def read_texts(file: Path) -> list[str]:
    """The texts of a file of lines {"text": ...}; ``InputError`` if it is none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{file}: expected a line {{"text": "..."}} for each document ({error}); mend it'
        ) from None


# ------------------------------------------------------------------------------------- internals
def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _same_base(spec: ModelSpec) -> tuple[Any, ...]:
    """What two models have in common that can share one base in memory.

    An adapter with a tokenizer of its own gets a base whose embedding has rows for it.
    """
    how = (spec.dtype, spec.quantization, spec.device_map, spec.chat_template, spec.prepend_bos)
    return (spec.base, spec.revision, *how, spec.trust_remote_code, _vocabulary(spec))


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
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            rows_of_base = part.weight.data  # the new ones were drawn at random
            rows_of_base[known:] = rows_of_base[:known].mean(0)


def _show_token_rows(model: Any, adapter: str | None) -> None:
    """Let the embedding's ``weight``, where it is read, be that of this adapter, or the base's.

    transformers switches what the rows of trained tokens compute, but not what PEFT's wrapper
    around them shows.
    """
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.enable_adapters(adapter is not None)
            trained: Any = module.token_adapter.trainable_tokens_delta
            shown = [adapter] if adapter is not None and adapter in trained else []
            AuxiliaryTrainingWrapper.set_adapter(module, shown)


def _lora_modules(bridge: TransformerBridge, layer: int) -> dict[str, Any]:
    """The modules of one block that carry adapters: ``self_attn.q_proj`` and so on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name.replace("_original_component.", "").removesuffix("._original_component"): module
        for name, module in bridge.blocks[layer].named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def _boot(spec: ModelSpec, tuned: list[ModelSpec], device: str) -> _Loaded:
    model: Any = _base_model(spec, device)
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
            hf_model=model,
            tokenizer=tokenizer,
            device=device,
            dtype=getattr(torch, spec.dtype),
        )
    # Booting invents a BOS for a tokenizer without one; prompts must not get that.
    bridge.cfg.default_prepend_bos = spec.prepend_bos and has_bos
    bridge.eval().requires_grad_(False)
    return _Loaded(bridge=bridge, adapters=adapters)


def _base_model(spec: ModelSpec, device: str) -> Any:
    _check_quantization(spec, device)
    folder = _base_folder(spec)
    if Path(spec.base).is_dir():
        _check_weight_files(Path(spec.base), spec.name)
    how: dict[str, Any] = {}
    if spec.quantization:
        how["quantization_config"] = _quantization_config(spec, _shape(spec, _config(spec)))
    if spec.quantization or spec.device_map:
        how["device_map"] = spec.device_map if spec.device_map and device != "cpu" else device
    with _from_disk(spec.name), _quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, spec.dtype),
            attn_implementation="eager",  # the bridge needs it, and Gemma-2 refuses sdpa
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            local_files_only=True,
            **how,
        )
    places = {str(parameter.device) for parameter in model.parameters()}
    if len(places) > 1:
        raise InputError(
            f"model {spec.name!r}: device_map {spec.device_map!r} spread it over "
            f"{', '.join(sorted(places))}, and analyses compare its layers on one device; use a "
            "GPU that holds all of it, or set quantization: 4bit"
        )
    if spec.quantization == "4bit":
        _finish_4bit(model)
    return model if "device_map" in how else model.to(device)


def _config(spec: ModelSpec) -> Any:
    folder = _base_folder(spec)
    with _from_disk(spec.name):
        return AutoConfig.from_pretrained(
            folder, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )


def _shape(spec: ModelSpec, config: Any) -> PreTrainedModel:
    """The model without its weights."""
    with torch.device("meta"), _quiet():
        return AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)


def _quantization_config(spec: ModelSpec, shape: PreTrainedModel) -> BitsAndBytesConfig:
    kept = [*get_keys_to_not_convert(shape), *FUSED_QKV]
    if spec.quantization == "8bit":
        kept += ATTENTION_OUTPUT
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=kept
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, spec.dtype),
        llm_int8_skip_modules=kept,
    )


def _check_quantization(spec: ModelSpec, device: str) -> None:
    """Raise ``InputError`` if this machine cannot quantize this model, before any weight loads."""
    if not spec.quantization:
        return
    name = f"model {spec.name!r}: quantization {spec.quantization}"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"{name} needs bitsandbytes, which is not installed; "
            'pip install "interp-kit[quantization]", or remove quantization from the spec'
        )
    _check_width(spec, 64, device)  # whether it works at all, before anything is downloaded
    config = _config(spec)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"{name} is asked for, but its files are quantized already; remove it from the spec, "
            "or name the files of the whole model"
        )
    for width in sorted(_widths(_shape(spec, config))):
        _check_width(spec, width, device)


def _check_width(spec: ModelSpec, width: int, device: str) -> None:
    name = f"model {spec.name!r}: quantization {spec.quantization}"
    otherwise = "remove it from the spec, or use another machine"
    try:
        lost = _lost(str(spec.quantization), width, device)
    except Exception as error:  # whatever it raises, it cannot
        raise InputError(
            f"{name} does not work on {device} here ({_first_line(error)}); {otherwise}"
        ) from None
    if lost > MOST_ROUNDED:
        raise InputError(
            f"{name}: on {device}, bitsandbytes multiplies by matrices {width} wide with a "
            f"relative error of {lost:.2f}, expected at most {MOST_ROUNDED}; {otherwise}"
        )


def _widths(shape: PreTrainedModel) -> set[int]:
    """Of the matrices that may be quantized."""
    linear = {m.in_features for m in shape.modules() if isinstance(m, torch.nn.Linear)}
    conv = {m.weight.shape[0] for m in shape.modules() if isinstance(m, Conv1D)}
    return linear | conv | {getattr(m, name).shape[-1] for m, name in _experts(shape)}


@cache
def _lost(quantization: str, width: int, device: str) -> float:
    """Relative error of a product with a random matrix that bitsandbytes has quantized.

    Measured, because it is not what it should be everywhere: on processors with AVX-512, version
    0.50 reads 4-bit matrices wrongly whose rows are not whole blocks of 64.
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    draw = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(64, width, generator=draw) for _ in range(2))
    if quantization == "4bit":
        linear = Linear4bit(
            width, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4",
            compress_statistics=False,
        )  # fmt: skip
        linear.support_avx512bf16_for_cpu = False
    else:
        linear = Linear8bitLt(width, 64, bias=False, has_fp16_weights=False)
    linear.load_state_dict({"weight": weight})
    with torch.no_grad():
        product = linear.to(device)(x.to(device)).float().cpu()
    expected = x @ weight.T
    return float((product - expected).norm() / expected.norm())


def _experts(model: torch.nn.Module) -> list[tuple[Any, str]]:
    """(module, name) of every parameter that holds all experts of a layer."""
    return [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name in EXPERTS and parameter.ndim == 3
    ]


def _finish_4bit(model: PreTrainedModel) -> None:
    """Quantize the experts, which transformers leaves out, and keep to the model's own dtype."""
    from bitsandbytes.nn.modules import Linear4bit
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for module, name in _experts(model):
        replace_parameter_4bit(module, name, quant_type="nf4")
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # Else processors with AVX-512 BF16 multiply in bfloat16, whatever the dtype, and
            # without a gradient.
            module.support_avx512bf16_for_cpu = False


def _size(bridge: TransformerBridge) -> dict[str, Any]:
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


def _tokenizer(spec: ModelSpec) -> Any:
    folder = str(_own_tokenizer(spec) or _base_folder(spec))
    with _from_disk(spec.name):
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
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
            spec.base, revision=spec.revision, allow_patterns=LOADED, **kwargs
        )
        if not whole(Path(folder)):
            raise OSError("without config.json and all of its *.safetensors")
        return folder

    return _local_first(load, spec.base, spec.name)


def _local_first(load: Any, source: str, name: str) -> Any:
    """``load`` from disk; only what is not on disk is asked of the hub."""
    try:
        return load(local_files_only=True)
    except (OSError, ValueError):
        pass
    try:
        return load()
    except GatedRepoError:
        problem = (
            f"is gated: accept its licence at {constants.ENDPOINT}/{source}, then set HF_TOKEN to "
            f"a token of that account ({constants.ENDPOINT}/settings/tokens)"
        )
    except RepositoryNotFoundError:
        problem = (
            "is not on the Hugging Face hub, or is private: check the id, or set HF_TOKEN to a "
            "token that may read it"
        )
    except (OSError, ValueError) as error:
        problem = (
            "is neither on disk nor to be had from the Hugging Face hub "
            f"({_first_line(error)}); download it (`hf download {source}`) or check the id"
        )
    raise InputError(f"model {name!r}: {source!r} {problem}")


@contextmanager
def _from_disk(name: str) -> Iterator[None]:
    """What cannot be read is an ``InputError``."""
    try:
        yield
    except SafetensorError as error:
        raise InputError(
            f"model {name!r}: a weight file is corrupt ({error}); copy it anew"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"model {name!r}: {_first_line(error)}") from None


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
    _check_checksums(folder, name)


def _check_checksums(folder: Path, name: str) -> None:
    if altered := altered_weights(folder):
        raise InputError(
            f"model {name!r}: {folder / altered[0]} is damaged: it is not what {CHECKSUMS} beside "
            f"it says; copy it anew, or, if it was meant to change, write {CHECKSUMS} again"
        )


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
        reads = kind.startswith("A.")
        width = getattr(linear, "in_features" if reads else "out_features", None)
        if isinstance(linear, Conv1D):  # GPT-2's, which has its weight transposed
            width = linear.weight.shape[0 if reads else 1]
        got = shape[1] if reads else shape[0]
        if width is not None and width != got:
            raise InputError(
                f"{wrong_base}: {path} has width {width} there and {got} in the adapter"
            )
        if linear is None and not path.endswith(("experts", "experts.base_layer")):
            raise InputError(f"{wrong_base}: the base has no module {path}")
    _check_checksums(folder, spec.name)


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
