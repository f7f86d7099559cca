"""Model specs -> Hugging Face models, and those -> ``TransformerBridge``.

Weights are read from safetensors only, and code of a repository runs only where the spec says
``trust_remote_code``. The network is used only for files that are neither in a local folder nor in
the Hugging Face cache; a token comes only from the environment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from interp_kit.files import digest
from interp_kit.hub import (
    ModelFiles,
    check_weight_files,
    content_hash,
    find_files,
    from_disk,
    weights_hash,
)
from interp_kit.huggingface import config_of, default_device, quiet, shape_of, tokenizer_of
from interp_kit.identity import register
from interp_kit.lora import check_adapter, extend_embedding, vocabulary, whole_embedding
from interp_kit.prompts import Tokenizing
from interp_kit.quantization import (
    check_machine,
    check_quantization,
    finish_4bit,
    quantization_config,
)
from interp_kit.specs import InputError, ModelSpec


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """One base in memory, and the PEFT names of the adapters on it."""

    bridge: TransformerBridge
    adapters: dict[str, str]  # model name -> PEFT adapter name


def load_huggingface(spec: ModelSpec, *, device: str | None = None) -> torch.nn.Module:
    """The model as plain Hugging Face and PEFT compute it: the reference for the bridge."""
    device = device or default_device()
    files = locate(spec, device)
    model: Any = _base_model(files, device)
    extend_embedding(files, model)
    if files.adapter:
        from peft import PeftModel

        check_adapter(files, model)
        with quiet():
            model = PeftModel.from_pretrained(model, str(files.adapter))
        if whole_embedding(files):
            model.get_base_model().tie_weights()
    return model.eval()


def inspect_model(spec: ModelSpec) -> Tokenizing:
    """What encoding needs of the model, without its weights; their files are checked on the way.

    Raises what loading would raise, in a fraction of the time.
    """
    files = locate(spec, default_device())
    check_quantization(files, default_device())
    config = config_of(files)
    if Path(spec.base).is_dir():
        check_weight_files(files.base, spec.name)
    if files.adapter:
        shape = shape_of(files)
        extend_embedding(files, shape)
        check_adapter(files, shape)
    tokenizer = tokenizer_of(files)
    text = config.get_text_config()
    cfg = SimpleNamespace(
        default_prepend_bos=spec.prepend_bos and tokenizer.bos_token_id is not None,
        d_vocab=max(text.vocab_size, max(tokenizer.get_vocab().values()) + 1),
        n_ctx=getattr(text, "max_position_embeddings", None) or tokenizer.model_max_length,
    )
    return cast(Tokenizing, SimpleNamespace(tokenizer=tokenizer, cfg=cfg))


def locate(spec: ModelSpec, device: str) -> ModelFiles:
    """The model's files, downloaded where they are missing if this machine can run the model."""
    check_machine(spec, device)
    return find_files(spec)


def boot(files: ModelFiles, tuned: Sequence[ModelFiles], device: str) -> Loaded:
    """The base as a bridge in evaluation mode, with the adapters of all ``tuned`` on it."""
    spec, base = files.spec, _base_hash(files)
    model: Any = _base_model(files, device)
    extend_embedding(files, model)
    adapters, hashes = {}, {}
    for i, own in enumerate(tuned):
        check_adapter(own, model)
        # PEFT names must not hold dots, and must not occur in the base's parameter names.
        name = adapters[own.spec.name] = f"finetune_{i}"
        hashes[name] = content_hash(own.spec.adapter, own.spec.adapter_revision)
        with quiet():
            model.load_adapter(str(own.adapter), adapter_name=name)
        if whole_embedding(own):
            model.tie_weights()  # the output matrix follows the embedding that was just replaced
    tokenizer = tokenizer_of(files)
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
    register(bridge, base=base, adapters=hashes)
    return Loaded(bridge=bridge, adapters=adapters)


# ------------------------------------------------------------------------------------- internals
def _base_hash(files: ModelFiles) -> str:
    """Of the weights that the models on this base share, rows for an adapter's tokens included."""
    spec = files.spec
    parts = [
        weights_hash(spec.model_copy(update={"adapter": None, "adapter_revision": None})),
        vocabulary(files),
    ]
    if whole_embedding(files):  # which replaces that of the base
        parts.append(content_hash(spec.adapter, spec.adapter_revision))
    return digest(parts)


def _base_model(files: ModelFiles, device: str) -> Any:
    spec = files.spec
    check_quantization(files, device)
    if Path(spec.base).is_dir():
        check_weight_files(files.base, spec.name)
    how: dict[str, Any] = {}
    if spec.quantization:
        how["quantization_config"] = quantization_config(files)
    if spec.quantization or spec.device_map:
        how["device_map"] = spec.device_map if spec.device_map and device != "cpu" else device
    with from_disk(spec.name), quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            files.base,
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
            f"{', '.join(sorted(places))}, but analyses compare its layers on one device; use a "
            "GPU that holds all of it, or set quantization: 4bit"
        )
    if spec.quantization == "4bit":
        finish_4bit(model)
    return model if "device_map" in how else model.to(device)
