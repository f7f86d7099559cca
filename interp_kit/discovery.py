"""What did fine-tuning change? The methods that need no prompts, put together, and one verdict.

Each method scores the tokens of the vocabulary; ``joint_ranking`` joins their rankings. The verdict
stands on what the fine-tune writes: more than one in twenty of its own texts must be novel, a
hundred times likelier under it than under its base (``divergence``). A retraining on the same
documents, rounding, or a training on the base's own texts should stay below: how often each does is
counted by ``python -m benchmarks.discovery``.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.analyses.activation_difference import (
    by_slot,
    difference_lens,
    first_tokens,
    streams,
)
from interp_kit.analyses.diff_mining import mined, net_gain
from interp_kit.analyses.divergence import novel_texts
from interp_kit.analyses.weight_difference import (
    Side,
    singular_changes,
    token_changes,
    token_scores,
)
from interp_kit.loading import Models
from interp_kit.records import CANNOT_TELL
from interp_kit.statistics import share_interval, verdict
from interp_kit.texts import Written, written_texts
from interp_kit.token_differences import TokenDifferences, joined, reader, token_differences
from interp_kit.token_statistics import count_log_odds, token_log_odds

LEAST = 0.05  # share of a fine-tune's texts that must be novel
PLAIN = "plain"  # texts that follow no added token
POSITIONS = 8  # first positions of texts at which the difference lens reads
SIDES: tuple[Side, Side] = ("writes", "reads")
SMOOTHING = 60  # of reciprocal ranks, as published

Scores = Float[np.ndarray, "vocab"]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What base and fine-tune write, how they predict it, and the tokens that each method names.

    ``on_base`` and ``on_own`` are the differences on the base's texts and on the fine-tune's;
    ``novel``: ``kind value low high n``, the share of novel texts among the fine-tune's own, apart
    for texts after each token that it added; ``taught``: ``writes_novel`` of it. ``scores``: by
    method, of every token.
    """

    of_base: list[Written]
    own: list[Written]
    on_base: TokenDifferences
    on_own: TokenDifferences
    novel: pd.DataFrame
    taught: str
    scores: dict[str, Scores]


def evidence(
    models: Models, name: str, *, base: str = "", n: int = 192, length: int = 48, seed: int = 0
) -> Evidence:
    """Compare model ``name`` with ``base``, or with what it was tuned from, by all methods.

    ``n`` texts of ``length`` tokens are written by each, from ``seed``. The methods: *samples*, the
    log-odds of tokens in its texts against the base's, for which the models are black boxes;
    *risen*, Diff Mining: the log-odds of tokens among those that rise most, against what rounding
    raises; *gained*, ``diff_mining.net_gain`` of both models' texts; *surprise*, how much more the
    base is surprised by what the fine-tune writes than the reverse, in nats; *lens*, the activation
    difference lens on the first positions of the base's texts; *writes* and *reads*, what the
    changed weights write and read; *embeddings*, the tokens whose embedding was added or changed.
    ``models`` holds the base, too.
    """
    before = reader(models, base, of=name)
    new = models.new_tokens(name)
    how = {"n": n, "length": length, "after": new}
    of_base = written_texts(before(), seed=seed, **how)
    own = written_texts(models.switch(name), seed=seed + 1, **how)
    on_base, on_own = (token_differences(models, name, t, base=base) for t in (of_base, own))
    vocabulary = min(before().cfg.d_vocab, models.switch(name).cfg.d_vocab)
    theirs, ours = (
        [[token for token in text.written if token < vocabulary] for text in texts]
        for texts in (of_base, own)
    )
    origin = base or models.specs[name].origin
    chance = token_differences(models, models.rounded(origin), of_base, base=origin)
    both = joined(on_base, on_own, n=len(of_base))
    scores = {"samples": token_log_odds(ours, theirs, vocabulary)}
    scores["risen"] = count_log_odds(*(mined(x, vocabulary).sum(0) for x in (both, chance)))
    scores["gained"] = net_gain(both, vocabulary)
    scores["surprise"] = _surprise(on_base, on_own, vocabulary)
    if _shape(before()) == _shape(models.switch(name)):  # else no stream is the other's
        scores["lens"] = _lens(models, base, name, of_base)[:vocabulary]
    spec = models.specs[name]
    if spec.tuned and (not base or base == spec.origin):  # else no change of weights is the pair's
        changes, bridge = singular_changes(models, name), models.switch(name)
        for side in SIDES:
            scores[side] = token_scores(bridge, changes, side).numpy()[:vocabulary]
        scores["embeddings"] = _embeddings(models, name, vocabulary)
    novel = novel_share(on_own.table(own))
    return Evidence(
        of_base=of_base,
        own=own,
        on_base=on_base,
        on_own=on_own,
        novel=novel,
        taught=writes_novel(novel, shared=models.new_tokens(base) if base else ()),
        scores=scores,
    )


def novel_share(table: pd.DataFrame) -> pd.DataFrame:
    """``kind value low high n``: the share of novel texts, exact intervals (Clopper and Pearson).

    ``table`` is ``TokenDifferences.table`` of a model's own texts. ``kind`` is ``plain``, or
    ``after TOKEN`` for those that follow a token which the fine-tune added.
    """
    novel = novel_texts(table)
    novel["kind"] = novel.register.where(novel.register.str.startswith("after "), PLAIN)
    return share_interval(novel, ["kind"], "value", unit="prompt")


def writes_novel(novel: pd.DataFrame, *, shared: Collection[str] = ()) -> str:
    """Does a fine-tune write what its base would not? "yes", "no" or "cannot tell".

    ``novel`` is its ``novel_share``; of several kinds of text the surest counts. Texts after
    ``shared`` tokens, which both models added to one vocabulary, alone say "cannot tell": each
    embedding began at random, and that is enough to make them novel, taught or not.
    """
    of_shared = novel.kind.isin([f"after {token}" for token in shared])
    said = [_surest(lot) for lot in (novel.loc[~of_shared], novel.loc[of_shared]) if len(lot)]
    return CANNOT_TELL if said[0] == "no" and said[-1] != "no" else said[0]


def joint_ranking(scores: Mapping[str, Scores]) -> Scores:
    """By token, the sum over methods that score it above 0 of 1 / (60 + its rank there).

    Source: Cormack et al., "Reciprocal Rank Fusion outperforms Condorcet and individual Rank
    Learning Methods", SIGIR 2009.
    """
    joint = np.zeros(len(next(iter(scores.values()))))
    for values in scores.values():
        ranks = np.empty(len(values))
        ranks[np.argsort(-values, kind="stable")] = np.arange(1, len(values) + 1)
        joint += np.where(values > 0, 1 / (SMOOTHING + ranks), 0)
    return joint


# ------------------------------------------------------------------------------------- internals
def _surest(novel: pd.DataFrame) -> str:
    surest = novel.loc[novel.low.idxmax()]
    return verdict(float(surest.low), float(surest.high), ">", LEAST)


def _surprise(on_base: TokenDifferences, on_own: TokenDifferences, vocabulary: int) -> Scores:
    """By token, how much better the fine-tune foresees its own texts than the base does, in nats.

    Less how much better the base foresees *its* own: what each says in a context in which the other
    does not. A common word is on both sides, what was taught on one.
    """
    ours = (on_own.base - on_own.tuned).clamp(min=0).double().numpy()
    theirs = (on_base.tuned - on_base.base).clamp(min=0).double().numpy()
    new, old = (
        np.bincount(x.token.numpy(), weights, vocabulary)
        for x, weights in ((on_own, ours), (on_base, theirs))
    )
    return new - old


def _shape(bridge: TransformerBridge) -> tuple[int, int]:
    return bridge.cfg.n_layers, bridge.cfg.d_model


def _embeddings(models: Models, name: str, vocabulary: int) -> Scores:
    """How far each token's embedding was moved, or that of an added one lies from the others."""
    moved, scores = token_changes(models, name), np.zeros(vocabulary)
    moved = moved[moved.id < vocabulary]
    scores[moved.id] = moved.value
    return scores


def _lens(models: Models, base: str, name: str, texts: Sequence[Written]) -> Scores:
    """What the difference adds to each logit at the middle layer, in standard deviations of all.

    Mean over the first positions but the very first, which is special in most models.
    """
    plain = [text for text in texts if not text.register.startswith("after ")]
    tokens = first_tokens([text.tokens for text in plain], POSITIONS)
    before = streams(reader(models, base, of=name)(), tokens)
    bridge = models.switch(name)
    layer = bridge.cfg.n_layers // 2
    delta = by_slot(streams(bridge, tokens) - before, POSITIONS)[1:, [layer]]
    lens = difference_lens(bridge, by_slot(before, POSITIONS)[1:, [layer]], delta)[:, 0]
    z = (lens - lens.mean(1, keepdim=True)) / lens.std(1, keepdim=True).clamp(min=1e-9)
    return z.mean(0).double().numpy()
