"""Adapters on a base: checks, the tokens that they bring, and what they change.

LoRA deltas of the base's own linear modules, and trained tokens, can share one base in memory and
are switched. Whatever else PEFT can merge gets a copy of the base of its own (``own_copy``).
"""

import json
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from interp_kit.hub import (
    ADAPTER_WEIGHTS,
    ModelFiles,
    check_checksums,
    first_line,
    tensor_shapes,
)
from interp_kit.huggingface import own_tokenizer, quiet, vocabulary_of
from interp_kit.specs import InputError

# Kinds of adapters that PEFT can merge into the weights.
MERGED = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "LN_TUNING")
# Linear modules that the bridge splits, so that an adapter on the whole of one is not computed.
FUSED = ("c_attn", "query_key_value", "qkv_proj", "gate_up_proj", "Wqkv", "W_pack")
HEADS = ("lm_head", "embed_out")
WHOLE_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


def adapter_config(files: ModelFiles) -> dict[str, Any]:
    """The adapter's PEFT config; ``InputError`` if it is none."""
    assert files.adapter is not None
    file = files.adapter / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if missing := {"base_model_name_or_path", "peft_type"} - set(config):
            raise ValueError(f"it has no {min(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"model {files.spec.name!r}: {file} is not a PEFT adapter config "
            f"({first_line(error)}); save the adapter with PEFT's save_pretrained"
        ) from None
    return config


def own_copy(files: ModelFiles) -> str:
    """What the adapter changes that cannot be switched on a shared base; empty if nothing.

    Such an adapter is merged into a copy of the base that it shares with none. Raises
    ``InputError`` for a kind of adapter that cannot be merged, and for a quantized base, where
    merging would round.
    """
    if files.adapter is None:
        return ""
    name, reason = files.spec.name, _beyond_lora(files)
    if reason and files.spec.quantization:
        raise InputError(
            f"model {name!r}: {reason}, which cannot be merged into a quantized base without "
            "rounding; load it without quantization, or merge it before quantizing"
        )
    return reason


def vocabulary(files: ModelFiles) -> str:
    """Which tokens the adapter adds: empty, or a digest of its vocabulary."""
    folder = own_tokenizer(files)
    return "" if folder is None else vocabulary_of(folder)


def whole_embedding(files: ModelFiles) -> int | None:
    """Rows of the embedding that an adapter saved as a whole, if it did."""
    if files.adapter is None:
        return None
    shapes = tensor_shapes(files.adapter / ADAPTER_WEIGHTS, files.spec.name)
    whole = [v[0] for k, v in shapes.items() if k.endswith(WHOLE_EMBEDDINGS)]
    return whole[0] if whole else None


def extend_embedding(files: ModelFiles, model: Any) -> None:
    """Give the embedding rows for the tokens that the adapter brings.

    Raises ``InputError`` if the adapter has no weights for some of its tokens.
    """
    folder = own_tokenizer(files)
    if folder is None:
        return
    known = model.get_input_embeddings().weight.shape[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    needed = max(tokenizer.get_vocab().values()) + 1
    saved = whole_embedding(files)
    trained = adapter_config(files).get("trainable_token_indices") or []
    if isinstance(trained, dict):
        trained = [i for ids in trained.values() for i in ids]
    missing = sorted(set(range(known, needed)) - set(trained if saved is None else range(saved)))
    if missing:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(missing[:3])))
        raise InputError(
            f"model {files.spec.name!r}: its tokenizer has {needed} tokens, and neither the base "
            f"({known} rows) nor the adapter has weights for {names}; save the adapter with "
            "trainable_token_indices or with its embedding, or remove the tokens from its tokenizer"
        )
    rows = max(known, needed) if saved is None else saved
    if rows != known:
        model.resize_token_embeddings(rows, mean_resizing=False)
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            rows_of_base = part.weight.data  # the new ones were drawn at random
            rows_of_base[known:] = rows_of_base[:known].mean(0)


def show_token_rows(model: Any, adapter: str | None) -> None:
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


def activate(model: Any, adapter: str | None) -> None:
    """Let the model compute with this adapter alone, or with none."""
    if adapter is None:
        model.disable_adapters()
    else:
        model.enable_adapters()
        model.set_adapter(adapter)
    show_token_rows(model, adapter)
    model.requires_grad_(False)  # set_adapter makes the adapter trainable


def merged(model: Any) -> Any:
    """The base of a ``PeftModel`` with the adapter merged into its weights.

    An embedding and an unembedding that share their weights, and that the adapter changes, are
    separated first: PEFT would merge the change of either into both.
    """
    base = model.get_base_model()
    parts = [base.get_input_embeddings(), base.get_output_embeddings()]
    plain = [getattr(p, "base_layer", getattr(p, "original_module", p)) for p in parts]
    if parts != plain and plain[0].weight is plain[1].weight:
        plain[1].weight = torch.nn.Parameter(plain[1].weight.detach().clone())
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
    with quiet():
        return model.merge_and_unload(safe_merge=True)


def adapted_modules(bridge: TransformerBridge, layer: int) -> dict[str, Any]:
    """The modules of one block that carry adapters: ``self_attn.q_proj`` and so on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name.replace("_original_component.", "").removesuffix("._original_component"): module
        for name, module in bridge.blocks[layer].named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def adapted_weights(
    bridge: TransformerBridge, adapter: str
) -> Iterator[tuple[int, str, Any, Float[Tensor, "..."]]]:
    """Layer, name, PEFT's module and the weight before, of all that a LoRA adapter changes.

    The weights of all experts of a block are one, ``mlp.experts.down_proj``.
    """
    from peft.utils.integrations import dequantize_module_weight

    for layer in range(bridge.cfg.n_layers):
        for at, module in adapted_modules(bridge, layer).items():
            if adapter not in module.lora_A:
                continue
            if parameter := getattr(module, "parameter_name", ""):
                yield layer, f"{plain_name(at)}.{parameter}", module, module.get_param().detach()
            else:
                before = dequantize_module_weight(module.get_base_layer())
                yield layer, plain_name(at), module, before.detach()


def plain_name(name: str) -> str:
    """The name of a module, without what TransformerLens and PEFT put around it."""
    steps = name.split(".")
    return ".".join(s for s in steps if s not in ("_original_component", "base_layer"))


def check_adapter(files: ModelFiles, model: PreTrainedModel) -> None:
    """Raise ``InputError`` for an adapter whose modules or widths are not those of this base."""
    spec, folder = files.spec, files.adapter
    assert folder is not None
    made_for = adapter_config(files)["base_model_name_or_path"]
    wrong_base = (
        f"model {spec.name!r}: its adapter was made for {made_for!r}, not for "
        f"{spec.base_name or spec.base!r}"
    )
    if spec.base_name and made_for and "/" not in made_for and made_for != spec.base_name:
        raise InputError(f"{wrong_base}; set base to the model that it was trained on")
    modules = dict(model.named_modules())
    for key, shape in tensor_shapes(folder / ADAPTER_WEIGHTS, spec.name).items():
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
                f"{wrong_base}: {path} has width {width} in that base and {got} in the adapter; "
                "set base to the model that it was trained on"
            )
        if linear is None and not path.endswith(("experts", "experts.base_layer")):
            raise InputError(
                f"{wrong_base}: that base has no module {path}; set base to the model that it "
                "was trained on"
            )
    check_checksums(folder, spec.name)


# ------------------------------------------------------------------------------------- internals
def _beyond_lora(files: ModelFiles) -> str:
    config = adapter_config(files)
    kind = config["peft_type"]
    if kind not in MERGED:
        raise InputError(
            f"model {files.spec.name!r}: its adapter is of the kind {kind}, which adds no weights "
            f"that analyses could take apart; expected one of {', '.join(MERGED)}"
        )
    if kind != "LORA":
        return f"it is an adapter of the kind {kind}"
    if config.get("use_dora"):
        return "it is a DoRA adapter, which rescales whole weights"
    if config.get("modules_to_save"):
        return f"it replaces whole modules ({', '.join(config['modules_to_save'])})"
    assert files.adapter is not None
    for key in tensor_shapes(files.adapter / ADAPTER_WEIGHTS, files.spec.name):
        module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        last = module.rpartition(".")[2]
        if not part and not key.endswith(("trainable_tokens_delta", "token_indices")):
            return f"it replaces {module}"  # a bias, or the whole embedding
        if part.startswith("embedding"):
            return f"it changes the embedding ({module})"
        if last in HEADS:
            return f"it changes the unembedding ({module})"
        if last in FUSED:
            return f"it changes {module}, which holds several projections in one"
    return ""
