"""LoRA adapters on a base: checks, the tokens that they bring, and the modules that they change."""

import json
from typing import Any

from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from interp_kit.hub import ADAPTER_WEIGHTS, ModelFiles, check_checksums, tensor_shapes
from interp_kit.huggingface import own_tokenizer, vocabulary_of
from interp_kit.specs import InputError


def vocabulary(files: ModelFiles) -> str:
    """Which tokens the adapter adds: empty, or a digest of its vocabulary.

    Adapters that overwrite the whole embedding share it with none.
    """
    folder = own_tokenizer(files)
    if folder is None:
        return ""
    return vocabulary_of(folder) + (str(folder) if whole_embedding(files) else "")


def whole_embedding(files: ModelFiles) -> int | None:
    """Rows of the embedding that an adapter saved as a whole, if it did."""
    if files.adapter is None:
        return None
    shapes = tensor_shapes(files.adapter / ADAPTER_WEIGHTS, files.spec.name)
    whole = [v[0] for k, v in shapes.items() if k.endswith(("embed_tokens.weight", "wte.weight"))]
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
    config = json.loads((folder / "adapter_config.json").read_text())
    trained = config.get("trainable_token_indices") or []
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


def lora_modules(bridge: TransformerBridge, layer: int) -> dict[str, Any]:
    """The modules of one block that carry adapters: ``self_attn.q_proj`` and so on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name.replace("_original_component.", "").removesuffix("._original_component"): module
        for name, module in bridge.blocks[layer].named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def check_adapter(files: ModelFiles, model: PreTrainedModel) -> None:
    """Raise ``InputError`` for an adapter whose modules or widths are not those of this base."""
    spec, folder = files.spec, files.adapter
    assert folder is not None
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
