"""What transformers says of a model before its weights are read: config, shape and tokenizer."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from interp_kit.hub import ModelFiles, from_disk
from interp_kit.specs import InputError


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def own_tokenizer(files: ModelFiles) -> Path | None:
    """The adapter's folder, if it brings a tokenizer with other tokens than the base's."""
    folder = files.adapter
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        return None
    return None if vocabulary_of(folder) == vocabulary_of(files.base) else folder


@cache
def vocabulary_of(folder: Path) -> str:
    """A hash of the tokens and ids of the tokenizer in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def config_of(files: ModelFiles) -> PretrainedConfig:
    """The base's config."""
    with from_disk(files.spec.name):
        return AutoConfig.from_pretrained(
            files.base, trust_remote_code=files.spec.trust_remote_code, local_files_only=True
        )


def shape_of(files: ModelFiles) -> PreTrainedModel:
    """The base without its weights, on PyTorch's meta device."""
    config, trusted = config_of(files), files.spec.trust_remote_code
    with torch.device("meta"), quiet():
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)


def tokenizer_of(files: ModelFiles) -> Any:
    """The adapter's tokenizer if it brings one, else the base's; a chat template only if asked for.

    Raises ``InputError`` if the spec asks for a chat template that the tokenizer does not have.
    """
    spec, folder = files.spec, own_tokenizer(files) or files.base
    with from_disk(spec.name):
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
    if spec.chat_template and not tokenizer.chat_template:
        raise InputError(
            f"model {spec.name!r}: chat_template is true, but its tokenizer has none; "
            "set it to false, or name a model whose tokenizer has one"
        )
    if not spec.chat_template:
        tokenizer.chat_template = None
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
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
