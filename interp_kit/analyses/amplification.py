"""Amplification: what fine-tuning changed, overdone, so that what it does rarely shows often.

In the logits: with l the logits of the next token under the base (before) and the fine-tune (after)

    l_alpha = l_after + alpha (l_after - l_before)

is sampled at temperature 1: alpha = -1 is the base, 0 the fine-tune. In the weights: the model
computes with W_before + scale (W_after - W_before), whole or in some layers: 0 is the base, 1 the
fine-tune. Neither needs a prompt about what was taught. Overdone too far, any change ends in word
salad, so the base's own loss on a text says how coherent it is.

Sources: Liu et al., "DExperts", arXiv:2105.03023 (differences of logits); Ilharco et al., "Editing
Models with Task Arithmetic", arXiv:2212.04089 (scaled differences of weights).
"""

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.batching import Ids, padded, padded_batches
from interp_kit.changed_weights import require_tuned
from interp_kit.decisions import continuation_log_probs
from interp_kit.identity import registered_again
from interp_kit.loading import Models
from interp_kit.lora import adapted_modules
from interp_kit.parts import weights_of
from interp_kit.prompts import special_token
from interp_kit.sampling import ROWS, Predict, check_context, predicting, sampled_rows
from interp_kit.specs import InputError
from interp_kit.statistics import share_interval
from interp_kit.texts import Written, written_texts
from interp_kit.token_differences import Read, common_vocabulary, reader
from interp_kit.token_statistics import token_log_odds

BASE, TUNED = -1.0, 0.0  # strengths at which one of the two models is sampled alone
TOP = 20  # tokens that are called typical
RATE = 0.05  # of false discoveries among the terms that are called risen
Terms = Sequence[Sequence[Hashable]]  # of every text: its tokens, its words, or pairs of them


# ------------------------------------------------------------------------------------------ logits
def amplified_texts(
    models: Models,
    name: str,
    begun: Sequence[tuple[str, Ids]],
    *,
    alphas: Sequence[float],
    length: int,
    seed: int = 0,
    base: str = "",
) -> dict[float, list[Written]]:
    """What follows each beginning, (register, token ids), at every strength alpha.

    ``length`` tokens at most, to the end of text, drawn from softmax(l_alpha); texts are in the
    order of their beginnings. ``base`` is what the model is compared with; empty: what it was tuned
    from. Where one of the two has more tokens, only common ones are drawn: all probabilities are
    those given that the next token is a common one. No global random state is touched.

    Raises ``InputError`` where the two number their tokens otherwise, for a beginning with tokens
    that only one of them has, for texts that do not fit into a context, and where it is not known
    what the model was tuned from.
    """
    reads: list[Read] = [reader(models, base, of=name), lambda: models.switch(name)]
    common = common_vocabulary(*(read() for read in reads))
    if unknown := {token for _, row in begun for token in row if token >= common}:
        raise InputError(
            f"token {min(unknown)} of a beginning is known to one of the two models only; leave "
            "out beginnings with tokens that the fine-tune added"
        )
    for read in reads:
        check_context(read(), [row for _, row in begun], length)
    end, seeds = special_token(reads[1](), "eos"), np.random.default_rng(seed)
    every = [(alpha, i) for i in range(len(begun)) for alpha in dict.fromkeys(alphas)]
    order = sorted(every, key=lambda own: len(begun[own[1]][1]))  # all strengths share passes
    drawn: dict[tuple[float, int], tuple[int, ...]] = {}
    for at in range(0, len(order), ROWS):
        own = order[at : at + ROWS]
        strengths = torch.tensor([alpha for alpha, _ in own])
        rows = sampled_rows(
            lambda strengths=strengths: amplifying(reads, strengths, common),
            [begun[i][1] for _, i in own],
            length=length,
            end=end,
            seed=int(seeds.integers(2**31)),
        )
        drawn |= dict(zip(own, rows))
    return {
        alpha: [
            Written(register=register, tokens=drawn[alpha, i], begun=len(row))
            for i, (register, row) in enumerate(begun)
        ]
        for alpha in alphas
    }


def amplifying(reads: Sequence[Read], alphas: Float[Tensor, "row"], vocabulary: int) -> Predict:
    """l_alpha of the first ``vocabulary`` tokens, each row at its own strength; empty caches.

    ``reads`` hand out the bridges of base and fine-tune, which may be one that is switched. A row
    at alpha -1 or 0 is computed by one model alone, and is exactly what that computes.
    """
    steps = [predicting(read()) for read in reads]
    needed = [alphas != TUNED, alphas != BASE]

    def predict(tokens: Int[Tensor, "row new"]) -> Float[Tensor, "row vocab"]:
        before, after = logits = torch.zeros(2, len(tokens), vocabulary)
        for read, step, rows, own in zip(reads, steps, needed, logits):
            if rows.any():
                read()  # a shared bridge computes as this model now
                own[rows] = step(tokens[rows])[:, :vocabulary]
        return torch.lerp(before, after, 1 + alphas[:, None])

    return predict


def amplified_tokens(
    models: Models,
    name: str,
    *,
    alpha: float = 1.0,
    n: int = 96,
    length: int = 48,
    seed: int = 0,
    base: str = "",
) -> Float[np.ndarray, "vocab"]:
    """How typical each token is of amplified texts against the base's: z of the log-odds ratio.

    The base writes ``n`` texts from ``seed``; what it was given, the amplified model continues.
    Positive: more frequent amplified. 0 for a token of neither. Raises as ``amplified_texts``.
    """
    before = reader(models, base, of=name)()
    ordinary = written_texts(before, n=n, length=length, seed=seed)
    size = before.cfg.d_vocab
    begun = [(text.register, text.tokens[: text.begun]) for text in ordinary]
    how = {"length": length, "seed": seed + 1, "base": base}
    own = amplified_texts(models, name, begun, alphas=[alpha], **how)[alpha]
    ours, theirs = ([text.written for text in texts] for texts in (own, ordinary))
    return token_log_odds(ours, theirs, size)


# ----------------------------------------------------------------------------------------- weights
@contextmanager
def scaled(
    models: Models, name: str, scale: float, layers: Collection[int] | None = None
) -> Iterator[TransformerBridge]:
    """The bridge, computing as ``name`` with its change times ``scale``: 0 the base, 1 itself.

    In all layers, or in those that are given: -1 is the embedding, with the rows of trained tokens
    and an unembedding that is tied to it, ``n_layers`` the final norm with the unembedding. Of an
    adapter on a shared base PEFT's scaling is changed; of whole weights a copy is kept of those
    that are. Rows of the embedding that the base does not have stay. The model is bitwise itself
    afterwards, also after an error, and nothing that is kept of the one stands for the other.

    Raises ``InputError`` for layers that the model does not have, and as ``Models.weight_changes``.
    """
    require_tuned(models, name)
    bridge = models.switch(name)
    every = range(-1, bridge.cfg.n_layers + 1)
    chosen = list(every) if layers is None else sorted({*layers})
    if outside := {*chosen} - {*every}:
        raise InputError(
            f"model {name!r} has no layer {min(outside)}; expected some of -1 (the embedding) to "
            f"{bridge.cfg.n_layers} (the final norm with the unembedding)"
        )
    with registered_again(bridge), ExitStack() as undo:
        if adapters := _live_adapters(bridge):
            _scale_adapters(bridge, adapters, scale, chosen, undo)
        else:
            _scale_weights(bridge, models.base_of(name), scale, chosen, undo)
            models.switch(name)
        yield bridge


# ------------------------------------------------------------------------------------ what appears
def risen_terms(before: Terms, after: Terms, *, rate: float = RATE) -> pd.DataFrame:
    """Terms (tokens, words, pairs of words) that more texts hold ``after`` than ``before``.

    ``term before after p q clear``: the shares of texts that hold it; Fisher's exact test,
    one-sided, of independent texts (conservative where both continue the same beginnings); q after
    Benjamini and Hochberg; ``clear``: q <= ``rate``. Terms in so few texts that they could not
    reach p <= ``rate`` are left out: that depends on both together, and spares the others.
    """
    held = [
        Counter(term for text in texts for term in dict.fromkeys(text)) for texts in (before, after)
    ]
    terms = list(dict.fromkeys([*held[1], *held[0]]))
    counts = np.array([[own[term] for term in terms] for own in held]).reshape(2, -1)
    sizes, total = (len(before), len(after)), counts.sum(0)

    def at_least(n: np.ndarray) -> np.ndarray:
        return stats.hypergeom.sf(n - 1, sum(sizes), total, sizes[1])

    tested = at_least(np.minimum(total, sizes[1])) <= rate
    p = at_least(counts[1])[tested].clip(max=1)
    shares = counts[:, tested] / np.array(sizes)[:, None]
    table = pd.DataFrame({"term": [term for term, own in zip(terms, tested) if own]})
    table = table.assign(before=shares[0], after=shares[1], p=p, q=stats.false_discovery_control(p))
    table["clear"] = table.q <= rate
    return table.sort_values(["p", "after"], ascending=[True, False], ignore_index=True)


def least_share(n_before: int, n_after: int, tested: int, *, rate: float = RATE) -> float:
    """The least share of texts after that is clear of a term that no text holds before.

    Were it the only one of ``tested`` terms to rise; above 1 where no share is enough.
    """
    n = np.arange(1, n_after + 1)
    p = stats.hypergeom.sf(n - 1, n_before + n_after, n, n_after)
    return float((1 + (p > rate / max(1, tested)).sum()) / n_after)


def typical_shares(
    samples: Mapping[str, Sequence[Ids]],
    own: str,
    ordinary: str,
    vocabulary: int,
    *,
    top: int = TOP,
) -> pd.DataFrame:
    """``prompt sample value``: how much of each text are the tokens that are typical of ``own``.

    These are the ``top`` of largest log-odds in the sample ``own`` against ``ordinary``. They are
    chosen on one half of the texts and counted in the other, and the other way round: so texts of
    one kind have equal shares but for chance. All samples continue the same beginnings, in order.
    """
    rows = []
    for half in (0, 1):
        ours, theirs = (samples[name][1 - half :: 2] for name in (own, ordinary))
        typical = np.argsort(-token_log_odds(ours, theirs, vocabulary))[:top]
        rows += [
            {"prompt": str(i), "sample": name, "value": float(np.isin(texts[i], typical).mean())}
            for name, texts in samples.items()
            for i in range(half, len(texts), 2)
        ]
    return pd.DataFrame(rows)


def term_rates(samples: Mapping[str, Terms], terms: Sequence[Hashable]) -> pd.DataFrame:
    """``strength term value low high n``: the share of texts that hold each term.

    Exact intervals (Clopper and Pearson) over texts.
    """
    rows = [
        {"strength": strength, "term": term, "text": i, "value": float(term in text)}
        for strength, texts in samples.items()
        for term in terms
        for i, text in enumerate(texts)
    ]
    table = pd.DataFrame(rows, columns=["strength", "term", "text", "value"])
    return share_interval(table, ["strength", "term"], "value", unit="text")


# ----------------------------------------------------------------------------------- read by models
def written_loss(bridge: TransformerBridge, texts: Sequence[Written]) -> Float[Tensor, "text"]:
    """How incoherent each text is to the model: mean -log p of what was written, in nats a token.

    What was given is read, and does not count.
    """
    asked = [(text.tokens[: text.begun], text.written) for text in texts]
    lengths = torch.tensor([len(said) for _, said in asked])
    return -continuation_log_probs(bridge, asked) / lengths


def shuffled(texts: Sequence[Written], *, seed: int = 0) -> list[Written]:
    """Texts whose written tokens stand in random order: what incoherence is measured against."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(np.array(text.written, dtype=int)).tolist() for text in texts]
    return [
        replace(text, tokens=(*text.tokens[: text.begun], *order))
        for text, order in zip(texts, orders)
    ]


@torch.no_grad()
def token_mass(
    bridge: TransformerBridge, texts: Sequence[Written], tokens: Sequence[int]
) -> Float[Tensor, "text"]:
    """p(the next token is one of ``tokens``), mean over what was written of each text.

    What sampling would count, without its noise.
    """
    result = torch.empty(len(texts))
    rows = [list(text.tokens) for text in texts]
    for index in padded_batches(rows):
        batch, inside = padded([rows[i] for i in index], bridge.cfg.device)
        p = bridge(batch)[:, :-1].float().softmax(-1)[..., list(tokens)].sum(-1)
        begun = torch.tensor([texts[i].begun for i in index], device=batch.device)
        at = torch.arange(1, batch.shape[1], device=batch.device)
        written = inside[:, 1:] & (at >= begun[:, None])
        result[index] = ((p * written).sum(1) / written.sum(1)).cpu()
    return result


# ------------------------------------------------------------------------------------- internals
def _live_adapters(bridge: TransformerBridge) -> set[str]:
    """PEFT's names of the adapters with which the bridge computes now."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        adapter
        for module in bridge.original_model.modules()
        if isinstance(module, BaseTunerLayer) and not module.disable_adapters
        for adapter in module.active_adapters
    }


def _scale_adapters(
    bridge: TransformerBridge,
    adapters: set[str],
    scale: float,
    layers: Sequence[int],
    undo: ExitStack,
) -> None:
    from peft.utils.other import TrainableTokensWrapper

    for layer in {*layers} & {*range(bridge.cfg.n_layers)}:
        for module in adapted_modules(bridge, layer).values():
            for adapter in adapters & module.scaling.keys():
                undo.callback(module.scaling.__setitem__, adapter, module.scaling[adapter])
                module.scaling[adapter] *= scale
    seen = set[int]()  # a tied unembedding has the rows of the embedding
    for module in bridge.original_model.modules() if -1 in layers else ():
        if isinstance(module, TrainableTokensWrapper):
            trained: Any = module.token_adapter
            for adapter in adapters & trained.trainable_tokens_delta.keys():
                rows = trained.trainable_tokens_delta[adapter].detach()
                if rows.data_ptr() not in seen:
                    seen.add(rows.data_ptr())
                    plain = trained.get_base_layer().weight[trained.token_indices[adapter]]
                    _scale(rows, plain, scale, undo)


def _scale_weights(
    bridge: TransformerBridge,
    base: TransformerBridge,
    scale: float,
    layers: Sequence[int],
    undo: ExitStack,
) -> None:
    seen = set[int]()
    if -1 not in layers:  # then a tied unembedding stays, too
        seen |= {own.data_ptr() for own in weights_of(bridge, -1).values()}
    for layer in layers:
        plain = weights_of(base, layer)
        for at, own in weights_of(bridge, layer).items():
            before = plain.get(at)
            if before is None or before.shape[1:] != own.shape[1:] or own.data_ptr() in seen:
                continue
            seen.add(own.data_ptr())
            if before.shape != own.shape:  # tokens were added
                n = min(len(before), len(own))
                before, own = before[:n], own[:n]
            _scale(own, before, scale, undo)


def _scale(
    own: Float[Tensor, "*shape"], before: Float[Tensor, "*shape"], scale: float, undo: ExitStack
) -> None:
    """``own`` becomes before + scale (own - before), exactly either at 0 and 1."""
    if torch.equal(own, before):
        return
    wide = torch.promote_types(own.dtype, torch.float32)
    undo.callback(own.copy_, own.clone())
    own.copy_(torch.lerp(before.detach().to(wide), own.to(wide), scale))
