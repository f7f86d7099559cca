"""What transformers says of a model before its weights are read: config, shape and tokenizer."""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from interp_kit.files import digest, read_json
from interp_kit.hub import ModelFiles, cache_folder, first_line, from_disk
from interp_kit.specs import InputError

SIZES = (
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "vocab_size",
)  # fmt: skip
ADDED_TOKENS = "added_tokens.json"
TEMPLATE_DATE = date(2025, 1, 1)
TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def own_tokenizer(files: ModelFiles) -> Path | None:
    """The adapter's folder, if it brings a tokenizer with other tokens than the base's.

    An adapter may also bring ``added_tokens.json`` alone (token -> id): then it is the base's
    tokenizer with these, which is written into the cache.
    """
    folder = files.adapter
    if folder is None:
        return None
    if not (folder / "tokenizer_config.json").is_file():
        return _with_added_tokens(files) if (folder / ADDED_TOKENS).is_file() else None
    try:
        return None if vocabulary_of(folder) == vocabulary_of(files.base) else folder
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {files.spec.name!r}: {folder} has a tokenizer_config.json, but no tokenizer "
            f"that can be read ({first_line(error)}); copy tokenizer.json there, or remove "
            "tokenizer_config.json"
        ) from None


def add_tokens(tokenizer: Any, tokens: Iterable[str]) -> None:
    """Give a tokenizer further tokens; a space before one belongs to it, as to an ordinary word."""
    new = [AddedToken(token, lstrip=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(new)


@cache
def vocabulary_of(folder: Path) -> str:
    """The number of tokens of the tokenizer in a folder, and a hash of them with their ids."""
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True).get_vocab()
    digest = hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest()
    return f"{len(tokens)} tokens, sha256 {digest[:16]}"


def dimensions(files: ModelFiles) -> dict[str, Any]:
    """What two models must have in common for activations of one to stand in the other."""
    text = config_of(files).get_text_config()
    vocabulary = vocabulary_of(own_tokenizer(files) or files.base)
    return {size: getattr(text, size, None) for size in SIZES} | {"vocabulary": vocabulary}


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
    """The adapter's tokenizer if it brings other tokens, else the base's; with ``template_of``."""
    own = own_tokenizer(files)
    tokenizer = _tokenizer(files, own or files.base)
    tokenizer.chat_template = template_of(files, base=None if own else tokenizer)
    return tokenizer


def template_of(files: ModelFiles, *, base: Any = None) -> str | None:
    """The chat template, if the spec asks for one: the adapter's own, else the base's.

    Where a template writes today's date it gets ``TEMPLATE_DATE`` instead, so that results do not
    change overnight. ``base`` is the base's tokenizer, if it was loaded before. Raises
    ``InputError`` if the spec asks for a chat template and there is none.
    """
    if not files.spec.chat_template:
        return None
    template = _template(files, base)
    if not template:
        raise InputError(
            f"model {files.spec.name!r}: chat_template is true, but its tokenizer has none; "
            "set it to false, or name a model whose tokenizer has one"
        )
    return TODAY.sub(lambda found: repr(TEMPLATE_DATE.strftime(found[2])), template)


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


# ------------------------------------------------------------------------------------- internals
def _template(files: ModelFiles, base: Any) -> str | None:
    """The adapter's, if it has one, else the base's, whose tokenizer may be loaded already."""
    folder = files.adapter
    if folder is not None and (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    own = None
    if folder is not None and (folder / "tokenizer_config.json").is_file():
        own = _tokenizer(files, folder).chat_template
    return own or (base or _tokenizer(files, files.base)).chat_template


def _with_added_tokens(files: ModelFiles) -> Path:
    """A folder with the base's tokenizer and the tokens of ``added_tokens.json``."""
    assert files.adapter is not None
    file = files.adapter / ADDED_TOKENS
    given = read_json(file)
    key = digest([vocabulary_of(files.base), given])[:16]
    folder = cache_folder() / "tokenizers" / key
    if (folder / "tokenizer_config.json").is_file():
        return folder
    tokenizer = _tokenizer(files, files.base)
    n = len(tokenizer)
    expected = {token: n + i for i, token in enumerate(given)} if isinstance(given, dict) else {}
    if not expected or given != expected:
        raise InputError(
            f"model {files.spec.name!r}: {file}: expected token -> id, from {n} on, the number of "
            f"tokens of its base; got {str(given)[:80]}"
        )
    add_tokens(tokenizer, given)
    beside = folder.with_name(f".{key}.{os.getpid()}")
    try:
        tokenizer.save_pretrained(beside)
        with suppress(OSError):  # somebody else has written it meanwhile
            beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _tokenizer(files: ModelFiles, folder: Path) -> Any:
    with from_disk(files.spec.name):
        return AutoTokenizer.from_pretrained(
            folder, trust_remote_code=files.spec.trust_remote_code, local_files_only=True
        )
