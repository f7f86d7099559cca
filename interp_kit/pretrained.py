"""Model specs -> Hugging Face models, and those -> ``TransformerBridge``.

Weights are read from safetensors only, and code of a repository runs only where the spec says
``trust_remote_code``. The network is used only for files that are neither in a local folder nor in
the Hugging Face cache; a token comes only from the environment.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from interp_kit.catalogue import is_gguf
from interp_kit.files import digest
from interp_kit.gguf import dequantise
from interp_kit.hub import (
    ModelFiles,
    check_weight_files,
    content_hash,
    find_files,
    from_disk,
    weights_hash,
)
from interp_kit.huggingface import (
    config_of,
    default_device,
    own_tokenizer,
    quiet,
    shape_of,
    template_of,
    tokenizer_of,
)
from interp_kit.identity import register
from interp_kit.loading_checks import (
    check_adapter_report,
    check_finite,
    check_loaded,
    check_report,
    check_vocabulary,
    noise_bound,
    probe,
)
from interp_kit.lora import (
    activate,
    check_adapter,
    extend_embedding,
    merged,
    own_copy,
    vocabulary,
)
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
    """One base in memory, and the PEFT names of the adapters that share it."""

    bridge: TransformerBridge
    spec: ModelSpec  # for which it was loaded: its base, and how
    adapters: dict[str, str]  # model name -> PEFT adapter name
    templates: dict[str, str | None]  # chat templates, by model name; "" for the base
    # Logits of plain Hugging Face and PEFT on a fixed sequence, by model name; "" for the base, or
    # for the one model that is merged into it.
    expected: dict[str, Float[Tensor, "pos vocab"]]
    checked: set[str] = field(default_factory=set)  # for which the bridge was compared with them


def load_huggingface(spec: ModelSpec, *, device: str | None = None) -> torch.nn.Module:
    """The model as plain Hugging Face and PEFT compute it: the reference for the bridge."""
    device = device or default_device()
    return _huggingface(locate(spec, device), device)


def inspect_model(spec: ModelSpec) -> Tokenizing:
    """What encoding needs of the model, without its weights; their files are checked on the way.

    Raises what loading would raise, in a fraction of the time.
    """
    files = locate(spec, default_device())
    own_copy(files)
    check_quantization(files, default_device())
    config = config_of(files)
    with _files_checked(files):
        pass
    if files.adapter:
        shape = shape_of(files)
        extend_embedding(files, shape)
        check_adapter(files, shape)
    tokenizer = tokenizer_of(files)
    text = config.get_text_config()
    if own_tokenizer(files) is None:
        check_vocabulary(spec.name, tokenizer, text.vocab_size)
    cfg = SimpleNamespace(
        default_prepend_bos=spec.prepend_bos and tokenizer.bos_token_id is not None,
        d_vocab=max(text.vocab_size, max(tokenizer.get_vocab().values()) + 1),
        n_ctx=getattr(text, "max_position_embeddings", None) or tokenizer.model_max_length,
    )
    return cast(Tokenizing, SimpleNamespace(tokenizer=tokenizer, cfg=cfg))


def locate(spec: ModelSpec, device: str) -> ModelFiles:
    """The model's files, downloaded or dequantised first if this machine can run the model."""
    check_machine(spec, device)
    dequantise(spec)
    return find_files(spec)


def boot(files: ModelFiles, tuned: Sequence[ModelFiles], device: str) -> Loaded:
    """The base as a bridge in evaluation mode, with the adapters of all ``tuned`` on it.

    Raises ``InputError`` if the bridge does not compute what plain Hugging Face and PEFT do.
    """
    model: Any = _base_model(files, device)
    extend_embedding(files, model)
    adapters, hashes = {}, {}
    for i, own in enumerate(tuned):
        check_adapter(own, model)
        # PEFT names must not hold dots, and must not occur in the base's parameter names.
        name = adapters[own.spec.name] = f"finetune_{i}"
        hashes[name] = content_hash(own.spec.adapter, own.spec.adapter_revision)
        with quiet():
            report = model.load_adapter(str(own.adapter), adapter_name=name)
        check_adapter_report(own.spec.name, report, model, adapter=name)
    expected: dict[str, Tensor] = {}
    for own, name in adapters.items():
        activate(model, name)
        expected[own] = probe(model)
    if adapters:
        activate(model, None)
    expected[""] = probe(model)
    tokenizer = tokenizer_of(files)
    bridge = _bridge(files, model, tokenizer, device)
    register(bridge, base=_base_hash(files), adapters=hashes)
    # The base's own template, whichever adapter was asked for first.
    templates = {own.spec.name: template_of(own) for own in tuned}
    templates[""] = (
        tokenizer.chat_template
        if files.adapter is None
        else template_of(replace(files, adapter=None))
    )
    return Loaded(
        bridge=bridge,
        spec=files.spec,
        adapters=adapters,
        templates=templates,
        expected=expected,
    )


def boot_merged(files: ModelFiles, device: str) -> Loaded:
    """The base with one adapter merged into its weights, shared with no other model."""
    model: Any = _huggingface(files, device)
    expected = {"": probe(model)}
    tokenizer = tokenizer_of(files)
    bridge = _bridge(files, merged(model), tokenizer, device)
    register(bridge, base=weights_hash(files.spec), adapters={})
    return Loaded(
        bridge=bridge,
        spec=files.spec,
        adapters={},
        templates={"": tokenizer.chat_template},
        expected=expected,
    )


def check_bridge(loaded: Loaded, name: str) -> None:
    """Raise ``InputError`` unless the bridge computes now as Hugging Face and PEFT did before.

    ``name`` is the model whose adapter is active; empty for the base, or for a merged model.
    """
    expected = loaded.expected[name]
    found = probe(loaded.bridge)
    error = float((found - expected).abs().max())
    if not error <= noise_bound(expected, loaded.bridge.cfg.dtype):
        raise InputError(
            f"{f'model {name!r}' if name else 'the base'}: its logits differ by {error:.1e} "
            "between TransformerLens' bridge and plain Hugging Face, of "
            f"{float(expected.abs().max()):.1f} at most; this architecture or adapter is not "
            "computed rightly, so nothing is analysed: merge the adapter into its base, or report "
            "the model's config to TransformerLens"
        )


# ------------------------------------------------------------------------------------- internals
def _huggingface(files: ModelFiles, device: str) -> torch.nn.Module:
    model: Any = _base_model(files, device)
    extend_embedding(files, model)
    if files.adapter:
        from peft import PeftModel

        check_adapter(files, model)
        with quiet(), from_disk(files.spec.name):
            model = PeftModel.from_pretrained(model, str(files.adapter))
        check_loaded(files, model)
    return model.eval()


def _bridge(files: ModelFiles, model: Any, tokenizer: Any, device: str) -> TransformerBridge:
    spec = files.spec
    invented = [t for t in ("bos_token", "eos_token", "pad_token") if getattr(tokenizer, t) is None]
    check_vocabulary(spec.name, tokenizer, model.get_input_embeddings().weight.shape[0])
    with quiet():
        bridge = TransformerBridge.boot_transformers(
            str(files.base) if is_gguf(spec.base) else spec.base,
            hf_model=model,
            tokenizer=tokenizer,
            device=device,
            dtype=getattr(torch, spec.dtype),
        )
    # Booting invents special tokens for a tokenizer without them; texts must not get those.
    for token in invented:
        setattr(bridge.tokenizer, token, None)
    bridge.cfg.default_prepend_bos = spec.prepend_bos and "bos_token" not in invented
    return bridge.eval().requires_grad_(False)


def _base_hash(files: ModelFiles) -> str:
    """Of the weights that the models on this base share, rows for an adapter's tokens included."""
    alone = files.spec.model_copy(update={"adapter": None, "adapter_revision": None})
    return digest([weights_hash(alone), vocabulary(files)])


@contextmanager
def _files_checked(files: ModelFiles) -> Iterator[None]:
    """Check the weight files, whose hash takes as long as reading them, beside what is done inside.

    What is wrong with a file goes before what failed because of it.
    """
    spec = files.spec
    local = is_gguf(spec.base) or Path(spec.base).is_dir()
    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(check_weight_files, files.base, spec.name) if local else None
        try:
            yield
        finally:
            if check is not None:
                check.result()


def _base_model(files: ModelFiles, device: str) -> Any:
    spec = files.spec
    check_quantization(files, device)
    how: dict[str, Any] = {}
    if spec.quantization:
        how["quantization_config"] = quantization_config(files)
    if spec.quantization or spec.device_map:
        how["device_map"] = spec.device_map if spec.device_map and device != "cpu" else device
    with _files_checked(files), from_disk(spec.name), quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.base,
            output_loading_info=True,
            dtype=getattr(torch, spec.dtype),
            attn_implementation="eager",  # the bridge needs it, and Gemma-2 refuses sdpa
            use_safetensors=True,
            trust_remote_code=spec.trust_remote_code,
            local_files_only=True,
            **how,
        )
    model, report = loaded
    check_report(spec.name, report)
    places = {str(parameter.device) for parameter in model.parameters()}
    if len(places) > 1:
        raise InputError(
            f"model {spec.name!r}: device_map {spec.device_map!r} spread it over "
            f"{', '.join(sorted(places))}, but analyses compare its layers on one device; use a "
            "GPU that holds all of it, or set quantization: 4bit"
        )
    check_finite(spec.name, model)
    if spec.quantization == "4bit":
        finish_4bit(model)
    return model if "device_map" in how else model.to(device)
