"""Weights quantized to 4 or 8 bits by bitsandbytes.

No analysis reads a quantized weight: what analyses take from a model is what its modules compute.
So that identities hold to rounding, as for any other model,

- 4 bits multiply in the model's own dtype, and the experts of a mixture are quantized too;
- 8 bits round the activations of each position by themselves. LLM.int8() would look for outliers
  in the whole batch, and the numbers of a prompt would depend on its neighbours;
- the projections by which heads are told apart stay unquantized: queries, keys and values in one
  matrix, and, since 8 bits are not linear in the activations, the attention output.
"""

import importlib.util
import logging
from functools import cache
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from interp_kit.hub import ModelFiles, first_line
from interp_kit.huggingface import config_of, shape_of
from interp_kit.specs import InputError, ModelSpec

# How architectures name what stays unquantized, and the experts' weights, [expert out in].
FUSED_QKV = ["c_attn", "query_key_value", "qkv_proj", "Wqkv"]
ATTENTION_OUTPUT = ["o_proj", "attn.c_proj", "attention.dense", "attn.out_proj", "attn.dense"]
EXPERTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
MOST_ROUNDED = 0.15  # of a random matrix, relative: NF4 loses 0.09, 8 bits 0.01
# bitsandbytes logs, on import and at every product, which kernel it does not use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quantization_config(files: ModelFiles) -> BitsAndBytesConfig:
    """How the model's weights are quantized as they load, and which stay as they are."""
    spec, kept = files.spec, [*get_keys_to_not_convert(shape_of(files)), *FUSED_QKV]
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


def check_machine(spec: ModelSpec, device: str) -> None:
    """Raise ``InputError`` if this machine cannot quantize at all: before files are downloaded."""
    if not spec.quantization:
        return
    name = f"model {spec.name!r}: quantization {spec.quantization}"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"{name} needs bitsandbytes, which is not installed; "
            'pip install "interp-kit[quantization]", or remove quantization from the spec'
        )
    _check_width(spec, 64, device)


def check_quantization(files: ModelFiles, device: str) -> None:
    """Raise ``InputError`` if this machine cannot quantize this model, before any weight loads."""
    spec = files.spec
    if not spec.quantization:
        return
    if getattr(config_of(files), "quantization_config", None) is not None:
        raise InputError(
            f"model {spec.name!r}: quantization {spec.quantization} is asked for, but its files "
            "are quantized already; remove it from the spec, or name the files of the whole model"
        )
    for width in sorted(_widths(shape_of(files))):
        _check_width(spec, width, device)


def finish_4bit(model: PreTrainedModel) -> None:
    """Quantize the experts, which transformers leaves out, and keep to the model's own dtype."""
    from bitsandbytes.nn.modules import Linear4bit
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for module, name in _experts(model):
        replace_parameter_4bit(module, name, quant_type="nf4")
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # Otherwise processors with AVX-512 BF16 multiply in bfloat16, whatever the dtype, and
            # without a gradient.
            module.support_avx512bf16_for_cpu = False


@cache
def rounding_error(quantization: str, width: int, device: str) -> float:
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


# ------------------------------------------------------------------------------------- internals
def _check_width(spec: ModelSpec, width: int, device: str) -> None:
    name = f"model {spec.name!r}: quantization {spec.quantization}"
    otherwise = "remove it from the spec, or use another machine"
    try:
        lost = rounding_error(str(spec.quantization), width, device)
    except Exception as error:  # whatever it raises, it cannot
        raise InputError(
            f"{name} does not work on {device} here ({first_line(error)}); {otherwise}"
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


def _experts(model: torch.nn.Module) -> list[tuple[Any, str]]:
    """(module, name) of every parameter that holds all experts of a layer."""
    return [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name in EXPERTS and parameter.ndim == 3
    ]
