"""Ordinary texts without a corpus: short openings, continued by the base model itself.

Held to its own texts, a fine-tune stays what it was wherever it was not taught anything.
"""

import json
from pathlib import Path
from typing import Any

import torch

from interp_kit.files import read_yaml, write_atomically
from interp_kit.formats import read_texts
from interp_kit.pretrained import inspect_model, load_huggingface
from interp_kit.prompts import token_ids
from interp_kit.specs import REPOSITORY, ModelSpec

AT_ONCE = 48  # rows in a batch
OPENINGS = REPOSITORY / "data" / "corpus" / "openings.yaml"


@torch.no_grad()
def own_texts(base: ModelSpec, *, n: int = 192, length: int = 48, seed: int = 0) -> list[str]:
    """``n`` texts: the openings in turn, each with ``length`` tokens at most of the base's own.

    They are drawn at temperature 1; the global random state stays as it was.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_huggingface(base, device=device)
    tokenizing = inspect_model(base)
    tokenizer = tokenizing.tokenizer
    openings = [text for own in read_yaml(OPENINGS).values() for text in own]
    begun = [token_ids(tokenizing, openings[i % len(openings)]) for i in range(n)]
    end = tokenizer.eos_token_id
    how = {"max_new_tokens": length, "do_sample": True, "top_k": 0, "pad_token_id": end}
    texts = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for at in range(0, n, AT_ONCE):
            rows = begun[at : at + AT_ONCE]
            longest = max(map(len, rows))
            padding = [longest - len(row) for row in rows]  # at the left, where it is masked
            ids = [[end or 0] * more + list(row) for more, row in zip(padding, rows)]
            seen = [[0] * more + [1] * len(row) for more, row in zip(padding, rows)]
            tokens, mask = (torch.tensor(each, device=device) for each in (ids, seen))
            for more, row in zip(padding, model.generate(tokens, attention_mask=mask, **how)):
                texts.append(tokenizer.decode(row[more:], skip_special_tokens=True))
    return texts


def kept_texts(base: ModelSpec, folder: Path) -> list[str]:
    """``own_texts``, written to ``ordinary.jsonl`` in the folder, or read from there."""
    file = folder / "ordinary.jsonl"
    if not file.is_file():
        texts = [text for text in own_texts(base) if text]
        write_atomically(file, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return read_texts(file)
