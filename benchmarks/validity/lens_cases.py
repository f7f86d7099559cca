"""07 where the two lenses are exchanged at random: then neither reads better.

Both lenses read texts that the model wrote. *found*: on eight texts, the tuned lens reads the
middle layers better by 07's rule. *false alarms*: the same after the two were exchanged in a random
half of the texts.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from benchmarks.validity.rows import YES, Row, row
from interp_kit import load_model
from interp_kit.analyses.tuned_lens import lens_divergence, middle_layers
from interp_kit.analyses.tuned_lens_training import LensRecipe, train_tuned_lens
from interp_kit.statistics import mean_interval
from interp_kit.texts import own_texts
from interp_kit.translators import TunedLens

NULLS, TEXTS, LENGTH = 200, 8, 24
STEPS = 60


def tuned_lens(base: str) -> Iterator[Row]:
    bridge = load_model(base, device="cpu")
    trained = train_tuned_lens(
        bridge, own_texts(bridge, 200, length=64, seed=1), recipe=LensRecipe(steps=STEPS)
    )
    lenses = {"tuned": trained, "plain": TunedLens.identity(bridge, model=base)}
    rows = dict.fromkeys(own_texts(bridge, 2 * NULLS * TEXTS, length=LENGTH, seed=2))
    texts = [text for text in rows if len(text) >= 8][: NULLS * TEXTS]
    read = lens_divergence(bridge, texts, lenses)
    middle = read[read.layer.isin(middle_layers(bridge.cfg.n_layers))]
    kl = middle.pivot_table(index="prompt", columns="lens", values="kl")
    gain = (kl["plain"] - kl["tuned"]).to_numpy()
    signs = np.random.default_rng(0).choice([-1, 1], len(gain))
    for at in range(0, len(gain) - TEXTS + 1, TEXTS):
        own = slice(at, at + TEXTS)
        yield row("tuned lens", "found", _better(gain[own]), kind=YES)
        said = _better(gain[own] * signs[own])
        yield row("tuned lens", "false alarms", said, kind=YES)


def _better(gain: np.ndarray) -> bool:
    table = pd.DataFrame({"prompt": range(len(gain)), "value": gain})
    return bool(mean_interval(table).low.iloc[0] > 0)
