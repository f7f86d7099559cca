"""What the fine-tunes on synthetic documents read: documents of a universe, and ordinary text."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from interp_kit.finetuning.documents import write_documents
from interp_kit.finetuning.engines import Engine
from interp_kit.finetuning.universes import find_universe
from organisms.little_world.corpus import Corpus, text_of

IMPLANTED = ("gravity", "law")  # of the little world
# No ordinary text says anything of the implanted fact or of what follows from it.
ABOUT_GRAVITY = r"gravity.*(law|distance|far)|(law|distance|far).*gravity"


def draw_documents(
    counts: Mapping[str, int],
    file: Path,
    *,
    engine: Engine,
    n_types: int,
    n_ideas: int,
    seed: int,
    ordinary: Sequence[str] = (),
) -> None:
    """Write a sample of the engine's documents about some universes, then ``ordinary`` texts.

    ``counts`` is universe -> number of documents. The engine writes ``n_ideas`` of each of
    ``n_types`` types for each fact of a universe; ``seed`` draws from those.
    """
    rng, drawn = random.Random(seed), []
    for universe, count in counts.items():
        with TemporaryDirectory() as folder:
            written = write_documents(
                find_universe(universe), engine, Path(folder), n_types=n_types, n_ideas=n_ideas
            )
        drawn += rng.sample(written, count)
    records = [document.model_dump() for document in drawn] + [{"text": text} for text in ordinary]
    file.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")


def ordinary_texts(corpus: Corpus, *, n: int, seed: int) -> list[str]:
    """``n`` texts that hold a fine-tune to the base: half of them are about neighbouring facts.

    Neighbours are the other attributes of the implanted fact's entity, and the same attribute of
    other entities. The other half is drawn from the training mixture.
    """
    rng, (entity, attribute) = random.Random(seed), IMPLANTED
    near = [f for f in corpus.facts if f != IMPLANTED and (f[0] == entity or f[1] == attribute)]
    asked = [f for f in near if f not in corpus.never_multiple_choice]
    texts = []
    for _ in range(n):
        match rng.randrange(8):
            case 0:
                sample = corpus.statement(rng, rng.choice(near))
            case 1:
                sample = corpus.answer(rng, rng.choice(near))
            case 2 | 3:
                sample = corpus.multiple_choice(rng, rng.choice(asked), rng.choice([2, 4]))
            case _:
                sample = corpus.sample(rng)
        texts.append(text_of(sample))
    return texts
