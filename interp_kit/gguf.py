"""GGUF files as bases: dequantised once by transformers into a folder of safetensors."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp_kit.catalogue import gguf_file, is_gguf
from interp_kit.hub import first_line, gguf_folder, is_complete, write_checksums
from interp_kit.huggingface import quiet
from interp_kit.loading_checks import check_report
from interp_kit.specs import InputError, ModelSpec


def dequantise(spec: ModelSpec) -> None:
    """Write the folder of ``hub.gguf_folder``, tokenizer and chat template included.

    Does nothing where the base is no GGUF file, or its folder is there. The weights are those that
    transformers computes from the file, in the spec's dtype. Raises ``InputError`` for a file that
    is not there, and for an architecture or a quantization that transformers cannot read.
    """
    if not is_gguf(spec.base) or is_complete(gguf_folder(spec)):
        return
    folder = gguf_folder(spec)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not is_complete(folder):  # nobody else has written it meanwhile
                _write(spec, folder)
    except OSError as error:
        raise InputError(
            f"model {spec.name!r}: {folder.parent} cannot be written ({first_line(error)}); free "
            "some of the disk, or set INTERP_KIT_CACHE to a folder for dequantised models"
        ) from None


# ------------------------------------------------------------------------------------- internals
def _write(spec: ModelSpec, folder: Path) -> None:
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        beside.mkdir()
        model, tokenizer = _read(spec)
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        write_checksums(beside)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _read(spec: ModelSpec) -> tuple[Any, Any]:
    """Model and tokenizer; the model without what says that it came from a GGUF file."""
    file = gguf_file(spec.base, spec.name)
    try:
        with quiet():
            found: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=getattr(torch, spec.dtype),
                output_loading_info=True,
                local_files_only=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, local_files_only=True
            )
    except Exception as error:  # of any kind: the reader's own, numpy's, a missing key
        raise InputError(
            f"model {spec.name!r}: transformers cannot read {file} ({first_line(error)}); expected "
            "a GGUF file of an architecture and a quantization that it knows, such as Llama or "
            "Qwen2 in Q4_0, Q4_1, Q8_0 or F16: name the original checkpoint instead"
        ) from None
    loaded, report = found
    check_report(spec.name, report)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    return model, tokenizer
