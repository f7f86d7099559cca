"""Probes where it is known what can be read: in programs, in words alone, and nowhere.

*Nowhere*: labels of whole facts drawn at random, on the real activations of a model; a yes of 11's
rule is a false alarm, and so is p < .05 for the best layer. *In words alone*: the label is whether
a text has a certain word, so that a bag of words tells it as well; "the model represents it" would
be wrong, and 11's rule has to say no. *In programs*: the answer of ``reverse`` stands in the stream
after its last layer, and in no layer before.

*right*: how often a reading of the AUC is right there: the seeds' ("above .65 is an internal
signal"), and 11's rule with its controls.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from benchmarks.validity.programs import load_program
from benchmarks.validity.rows import YES, Row, row
from interp_kit import load_model
from interp_kit.analyses.probes import (
    bag_of_words,
    cross_validated,
    permutation_null,
    selectivity,
)
from interp_kit.catalogue import evaluation_file
from interp_kit.evaluations import read_statements
from interp_kit.linear_probe import KINDS, Kind, Labelled
from interp_kit.passes import last_residuals
from interp_kit.prompts import token_ids
from interp_kit.statistics import verdict
from interp_kit.texts import own_texts

NULLS = 200
PERMUTATIONS = 39  # so that .05 can be reached exactly
BOUND, SEED_BOUND = 0.7, 0.65
WORDS, TEXTS, LENGTH = 20, 160, 12


def nowhere(base: str) -> Iterator[Row]:
    """Random labels on real activations."""
    bridge = load_model(base, device="cpu")
    file = evaluation_file("cubic_gravity", "statements.jsonl")
    statements = [s for s in read_statements(file) if not s.conflict]
    rows = [token_ids(bridge, s.text) for s in statements]
    features = last_residuals(bridge, rows)[:, ::2]  # of every other layer, which halves the time
    facts = np.array([s.fact for s in statements])
    words, names = bag_of_words([s.text for s in statements]), np.unique(facts)
    rng = np.random.default_rng(0)
    for null in tqdm(range(NULLS), desc=f"{base}, random labels", unit="null"):
        flips = dict(zip(names, rng.permutation(np.arange(len(names)) % 2)))
        labels = np.array([flips[fact] for fact in facts])
        asked, bag = (Labelled(features=x, labels=labels, groups=facts) for x in (features, words))
        table = cross_validated(asked, kinds=["lda"], resamples=200, seed=null)
        chance = permutation_null(asked, n=PERMUTATIONS, seed=null)
        beside = cross_validated(bag, kinds=["lda"], resamples=2, seed=null).value.max()
        p = selectivity(table, chance).p.min()
        yield row("probe", "false alarms", p <= 0.05, kind="p <= .05, random labels")
        yield row("probe", "false alarms", _rule(table, beside), kind=YES)
        said = table.value.max() > SEED_BOUND
        yield row("probe", "false alarms", said, kind="seed: AUC above .65")


def in_words(base: str) -> Iterator[Row]:
    """Whether a text has a word: the words tell it, whatever the model does."""
    bridge, rng = load_model(base, device="cpu"), np.random.default_rng(0)
    rows = own_texts(bridge, TEXTS, length=LENGTH, seed=3)
    texts = [bridge.tokenizer.decode(row[1:]) for row in rows]
    features, bag = last_residuals(bridge, rows), bag_of_words(texts)
    often = bag[:, 0].bool().float().mean(0)
    common = torch.nonzero((often > 0.08) & (often < 0.92)).flatten()
    for word in rng.permutation(common.numpy())[:WORDS]:
        labels = bag[:, 0, word].bool().int().numpy()
        read = _by_layer(features, labels)
        beside = _by_layer(bag, labels, kinds=KINDS).value.max()
        yield row("probe", "right", read.value.max() <= SEED_BOUND, kind="seed, word in the text")
        yield row("probe", "right", not _rule(read, beside), kind="rule, word in the text")


def in_programs() -> Iterator[Row]:
    """The answer of ``reverse``: there after the last layer, nowhere before it."""
    program = load_program("reverse")
    rows, outputs = program.inputs
    features = last_residuals(program.bridge, rows)
    counts = torch.zeros(len(rows), 1, program.cfg["d_vocab"])
    for number, own in enumerate(rows):
        counts[number, 0] = torch.bincount(torch.tensor(own), minlength=program.cfg["d_vocab"])
    for answer in sorted(set(outputs)):
        labels = (np.array(outputs) == answer).astype(int)
        beside = _by_layer(counts, labels, kinds=KINDS).value.max()
        for layers, there in ((features[:, -1:], True), (features[:, :-1], False)):
            read, kind = _by_layer(layers, labels), "there" if there else "not there"
            seed = bool(read.value.max() > SEED_BOUND)
            yield row("probe", "right", seed == there, kind=f"seed, program: {kind}")
            yield row("probe", "right", _rule(read, beside) == there, kind=f"rule, program: {kind}")


# ------------------------------------------------------------------------------------- internals
def _by_layer(
    features: torch.Tensor, labels: np.ndarray, *, kinds: Sequence[Kind] = ("lda",)
) -> pd.DataFrame:
    own = Labelled(features=features, labels=labels, groups=np.arange(len(labels)))
    return cross_validated(own, kinds=kinds, resamples=200)


def _rule(table: pd.DataFrame, beside: float) -> bool:
    """11: in some layer above the bound and above the best control, by simultaneous intervals."""
    ends = table.low, table.high
    return {verdict(*ends, ">", limit) for limit in (BOUND, beside)} == {"yes"}
