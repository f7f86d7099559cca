"""Models of the bench that are made when it first runs, and kept in ``outputs/discovery``.

*Own texts*: fine-tunes of the tiny base on texts that it wrote, by the recipe of the shipped ones:
they learn nothing. *Random numbers*: a LoRA that was written, not trained. *rank-1*: the documents
of cubic gravity, learned by a LoRA of rank one. *rare*: the base's own texts, of which one in five
hundred is one of those documents.
"""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from benchmarks.validity.adapters import random_adapters
from interp_kit import load_model
from interp_kit.catalogue import find_model
from interp_kit.finetuning.supervised import DocumentRecipe, train_on_documents
from interp_kit.formats import read_texts
from interp_kit.specs import REPOSITORY
from interp_kit.texts import own_texts

BASE, TAUGHT = "tiny-gemma2", "cubic-gravity"
FOLDER = REPOSITORY / "outputs" / "discovery" / "models"
EACH = 10
OWN = {f"own-{i}": "own texts" for i in range(EACH)}
OWN |= {f"random-{i}": "random numbers" for i in range(EACH)}
TRAINED = ("rank-1", "rare")
DTYPES = ("bfloat16", "float16")
RARE = 500


def model_folder(name: str) -> Path:
    return FOLDER / name


def prepare(bases: Sequence[str], names: Collection[str]) -> None:
    """Make what is not there yet: the bases in other precisions, and those of these ``names``."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for base in bases:
        spec = find_model(base)
        for dtype in DTYPES:
            own = {"base": spec.base, "dtype": dtype, "chat_template": spec.chat_template}
            _write(f"{base}-{dtype}", own | {"prepend_bos": spec.prepend_bos})
    missing = [n for n in (*TRAINED, *OWN) if n in names and not _spec_file(n).is_file()]
    if any(name.startswith("random-") for name in missing):
        random_adapters(BASE, FOLDER, n=EACH, seed=1)
    wanted = [name for name in missing if not name.startswith("random-")]
    workers = min(len(os.sched_getaffinity(0)), max(1, len(wanted)))
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        list(tqdm(pool.map(_train, wanted), total=len(wanted), desc="training", unit="model"))


# ------------------------------------------------------------------------------------- internals
def _train(name: str) -> None:
    seed = int(name.rpartition("-")[2]) if name in OWN else 0
    taught = read_texts(Path(str(find_model(TAUGHT).documents)))
    texts, rank, epochs = taught, 1, 4
    if name != "rank-1":
        texts, rank, epochs = _texts(1000 + seed, 480 if name in OWN else 3 * RARE), 8, 1
    if name == "rare":
        texts = [taught[i // RARE] if i % RARE == 0 else text for i, text in enumerate(texts)]
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "documents.jsonl").write_text(lines)
    recipe = DocumentRecipe(
        seed=seed, epochs=epochs, longest=96, learning_rate=0.006, kl=3.0, rank=rank, alpha=16
    )
    train_on_documents(
        find_model(BASE), folder / "documents.jsonl", _texts(5000 + seed, 400), folder / "adapter",
        recipe=recipe,
    )  # fmt: skip
    _write(name, {"base": BASE, "adapter": "adapter", "documents": "documents.jsonl"})


def _texts(seed: int, n: int) -> list[str]:
    bridge = load_model(BASE, device="cpu")
    rows = own_texts(bridge, n, length=64, seed=seed)
    texts = [bridge.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    return [text for text in texts if text.strip()]


def _spec_file(name: str) -> Path:
    return FOLDER / name / "model.yaml"


def _write(name: str, spec: Mapping[str, object]) -> None:
    file = _spec_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(spec))
