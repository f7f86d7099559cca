"""Does the activation difference lens read a fine-tune that learned something, and no other?

*found*: fine-tunes on documents about a fact, by 10b's rule on their own documents. *false alarms*:
of the same rule, fine-tunes with a LoRA of random numbers in one module. And the shipped control
fine-tunes, which read as many documents about something else, held up to the first one's documents.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from benchmarks.validity.adapters import random_adapters
from benchmarks.validity.rows import YES, Row, row
from interp_kit import load_models, load_scenario
from interp_kit.analyses import activation_difference as adl
from interp_kit.analyses.steering import random_directions
from interp_kit.analyses.tuned_lens import text_rows
from interp_kit.loading import Models
from interp_kit.prompts import token_ids
from interp_kit.token_statistics import token_log_odds, token_relevance

NULLS = 200
POSITIONS, FIRST, RANDOM = 12, 3, 64  # as 10b has them
Lens = Float[Tensor, "slot vocab"]


def difference_lens(
    base: str, tuned: Sequence[str], controls: Sequence[str], scenario: str
) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        random = random_adapters(base, Path(folder), n=NULLS)
        models = load_models([base, *tuned, *controls, *random], device="cpu")
        reader = _Reader(models, base, scenario)
        typical = {name: reader.typical(name) for name in tuned}
        for name in tuned:
            yield row(METHOD, "found", reader.reads(name, typical[name]), kind=YES)
        for name in controls:
            said = reader.reads(name, typical[tuned[0]])
            yield row(METHOD, "false alarms", said, kind="taught something else")
        for name in tqdm(random, desc="activation difference lens", unit="null"):
            said = reader.reads(name, typical[tuned[0]])
            yield row(METHOD, "false alarms", said, kind=YES)


METHOD = "activation difference lens"


class _Reader:
    """The base's streams on neutral text, and what random differences read like."""

    def __init__(self, models: Models, base: str, scenario: str) -> None:
        self.models, self.bridge = models, models.switch(base)
        self.layer = self.bridge.cfg.n_layers // 2
        rows = [token_ids(self.bridge, text) for text in load_scenario(scenario).neutral]
        self.tokens = adl.first_tokens(rows, POSITIONS)
        self.base, self.name = adl.streams(self.bridge, self.tokens), base
        self.mean = adl.by_slot(self.base, FIRST)
        drawn = random_directions(RANDOM, self.base[:, FIRST:, self.layer].flatten(0, 1))
        start = self.mean[-1:, self.layer].expand(RANDOM, 1, -1)
        self.chance = adl.difference_lens(self.bridge, start, drawn[:, None])[:, 0]

    def typical(self, name: str) -> Float[np.ndarray, "vocab"]:
        taught, ordinary = (
            text_rows(self.bridge, texts, length=self.bridge.cfg.n_ctx)
            for texts in self.models.documents(name)
        )
        return token_log_odds(taught, ordinary, self.bridge.cfg.d_vocab)

    def reads(self, name: str, typical: Float[np.ndarray, "vocab"]) -> bool:
        """10b: better than random tokens, and than random differences."""
        tuned = adl.streams(self.models.switch(name), self.tokens)
        delta = adl.by_slot(tuned - self.base, FIRST)
        lens = adl.difference_lens(self.models.switch(self.name), self.mean, delta)[:, self.layer]
        read = token_relevance(lens, typical, resamples=1999)
        by_chance = token_relevance(self.chance, typical, resamples=1).value
        q = stats.false_discovery_control(read.p.to_numpy())
        best = int(read.value.argmax())
        return bool(q[best] < 0.05 and read.value[best] > by_chance.quantile(0.95))
