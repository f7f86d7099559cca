"""Model specs -> Hugging Face models, and those -> ``TransformerBridge``."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from interp_kit.hub import adapter_folder, base_folder, check_weight_files, from_disk
from interp_kit.huggingface import config_of, default_device, quiet, shape_of, tokenizer_of
from interp_kit.lora import check_adapter, extend_embedding, whole_embedding
from interp_kit.prompts import Tokenizing
from interp_kit.quantization import check_quantization, finish_4bit, quantization_config
from interp_kit.specs import InputError, ModelSpec


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One base in memory, and the PEFT names of the adapters on it."""

    bridge: TransformerBridge
    adapters: dict[str, str]  # model name -> PEFT adapter name


def load_huggingface(spec: ModelSpec, *, device: str | None = None) -> torch.nn.Module:
    """The model as plain Hugging Face and PEFT compute it: the reference for the bridge."""
    model: Any = base_model(spec, device or default_device())
    extend_embedding(spec, model)
    if spec.adapter:
        from peft import PeftModel

        folder = adapter_folder(spec)
        check_adapter(spec, folder, model)
        with quiet():
            model = PeftModel.from_pretrained(model, str(folder))
        if whole_embedding(spec, folder):
            model.get_base_model().tie_weights()
    return model.eval()


def inspect_model(spec: ModelSpec) -> Tokenizing:
    """What encoding needs of the model, without its weights; their files are checked on the way.

    Raises what loading would raise, in a fraction of the time.
    """
    check_quantization(spec, default_device())
    config = config_of(spec)
    if Path(spec.base).is_dir():
        check_weight_files(Path(spec.base), spec.name)
    if spec.adapter:
        shape = shape_of(spec, config)
        extend_embedding(spec, shape)
        check_adapter(spec, adapter_folder(spec), shape)
    tokenizer = tokenizer_of(spec)
    text = config.get_text_config()
    cfg = SimpleNamespace(
        default_prepend_bos=spec.prepend_bos and tokenizer.bos_token_id is not None,
        d_vocab=max(text.vocab_size, max(tokenizer.get_vocab().values()) + 1),
        n_ctx=getattr(text, "max_position_embeddings", None) or tokenizer.model_max_length,
    )
    return cast(Tokenizing, SimpleNamespace(tokenizer=tokenizer, cfg=cfg))


def boot(spec: ModelSpec, tuned: list[ModelSpec], device: str) -> Loaded:
    model: Any = base_model(spec, device)
    extend_embedding(spec, model)
    adapters = {}
    for i, adapted in enumerate(tuned):
        folder = adapter_folder(adapted)
        check_adapter(adapted, folder, model)
        # PEFT names must not hold dots, and must not occur in the base's parameter names.
        adapters[adapted.name] = f"finetune_{i}"
        with quiet():
            model.load_adapter(str(folder), adapter_name=adapters[adapted.name])
        if whole_embedding(adapted, folder):
            model.tie_weights()  # the output matrix follows the embedding that was just replaced
    tokenizer = tokenizer_of(spec)
    has_bos = tokenizer.bos_token_id is not None
    with quiet():
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
    return Loaded(bridge=bridge, adapters=adapters)


def base_model(spec: ModelSpec, device: str) -> Any:
    check_quantization(spec, device)
    folder = base_folder(spec)
    if Path(spec.base).is_dir():
        check_weight_files(Path(spec.base), spec.name)
    how: dict[str, Any] = {}
    if spec.quantization:
        how["quantization_config"] = quantization_config(spec, shape_of(spec, config_of(spec)))
    if spec.quantization or spec.device_map:
        how["device_map"] = spec.device_map if spec.device_map and device != "cpu" else device
    with from_disk(spec.name), quiet():
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
        finish_4bit(model)
    return model if "device_map" in how else model.to(device)
