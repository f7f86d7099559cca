"""Which training documents taught a fine-tune its behaviour, and do more than words say so?

A document x of T predicted tokens has the mean loss L(x) = -1/T sum_t log p(x_t | x_<t); D is the
decision, log p(positive) - log p(negative), meaned over prompts. A step of gradient descent on x
with learning rate r changes the decision by

    dD = r s(x) + O(r^2),    s(x) = -grad D . grad L(x)

over the factors A and B of the fine-tune's LoRA: s > 0 means that training on x raises the
decision. Summed over the steps of a training this is TracIn. Of a finished fine-tune the steps are
not known, but the base that it began from and its end are; ``at`` says where between them s is
taken. At its end a training has used its documents up, and what is left of their gradients says
less of which mattered than at the start (``benchmarks/training_documents.py`` retrains).

The cheaper reading needs no gradient: how far a document moves the residual stream along the
direction in which the fine-tuning moved it at the decision (``probe_scores``). Either has to say
more than a document's length and its words (``word_scores``).

Sources: Pruthi et al. 2020, "Estimating Training Data Influence by Tracing Gradient Descent",
arXiv:2002.08484 (TracIn); Xia et al. 2024, "LESS", arXiv:2402.04333 (cosines, since long texts have
small gradients); Chen et al. 2025, "Persona Vectors", arXiv:2507.21509, and Kowal et al. 2026,
"Concept Influence", arXiv:2602.14869 (projections; of both the abstract).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.batching import padded, padded_batches
from interp_kit.identity import registered_again
from interp_kit.loading import Models
from interp_kit.lora import adapted_modules
from interp_kit.passes import residual_stream
from interp_kit.prompts import Prompt, require_prompts
from interp_kit.specs import InputError

Row = tuple[Sequence[int], slice]  # token ids; the positions at which the next one is predicted
Gradient = dict[str, Float[Tensor, "..."]]  # by every factor of the LoRA, by its name
PASS_TOKENS = 512  # of one pass, of which much is kept


def gradient_scores(
    bridge: TransformerBridge,
    documents: Sequence[Row],
    prompts: Sequence[Prompt],
    *,
    at: float = 0.0,
) -> pd.DataFrame:
    """How far a step on each document would move the decision, to first order.

    The bridge has to compute as the fine-tune. ``at`` scales its B: 0 is the base, with the A that
    was trained (and no gradient but B's), 1 the fine-tune, 0.5 halfway on the straight line.

    Returns ``document value cosine norm length``: ``value`` = s(x), nats of decision per unit of
    learning rate; ``cosine`` of the two gradients, the same without their sizes; ``norm`` of grad
    L(x); ``length``, predicted tokens. Nothing about the model is changed.

    Raises ``InputError`` unless the bridge computes with a LoRA on linear layers, and for a
    document without a predicted token. Trained rows of an embedding count as fixed.
    """
    _check(documents)
    toward = _decision_gradient(bridge, prompts, at=at)
    size = _inner(toward, toward).sqrt().item()
    value, norm = np.zeros(len(documents)), np.zeros(len(documents))
    progress = tqdm(total=len(documents), desc="gradients", unit="document", leave=False)
    for index, own in _row_gradients(bridge, documents, at=at):
        value[index], norm[index] = _inner(own, toward).cpu(), _inner(own, own).sqrt().cpu()
        progress.update(len(index))
    progress.close()
    return pd.DataFrame(
        {
            "document": range(len(documents)),
            "value": value,
            "cosine": value / np.maximum(norm * size, np.finfo(float).tiny),
            "norm": norm,
            "length": [len(_predicted(row)) for row in documents],
        }
    )


def _decision_gradient(
    bridge: TransformerBridge, prompts: Sequence[Prompt], *, at: float = 0.0
) -> Gradient:
    """The gradient of the decision, meaned over prompts, by each factor of the LoRA, [out in]."""
    require_prompts(prompts)
    rows, signs = _answers(prompts)
    total: dict[str, Tensor] = {}
    for index, own in _row_gradients(bridge, rows, at=at):
        # The gradients are of a mean over the answer's tokens: the decision is of whole answers.
        factors = [signs[i] * len(_predicted(rows[i])) / len(prompts) for i in index]
        weights = torch.tensor(factors, device=bridge.cfg.device)
        for name, g in own.items():
            total[name] = total.get(name, 0) + torch.einsum("r,roi->oi", weights, g)
    return total


def change_by_a_step(
    bridge: TransformerBridge,
    document: Row,
    prompts: Sequence[Prompt],
    *,
    nats: float = 0.01,
    at: float = 0.0,
) -> tuple[float, float]:
    """The change of the decision by one step on the document: as predicted, and as measured.

    In nats. The step is as long as to change it by ``nats`` if the gradient is right; it is taken
    half forwards and half backwards, so that only a third-order term is left between the two. The
    weights are put back bit by bit.
    """
    _check([document])
    toward = _decision_gradient(bridge, prompts, at=at)
    [(_, rows)] = _row_gradients(bridge, [document], at=at)
    own = {name: g[0] for name, g in rows.items()}
    slope = _inner(own, toward).item()
    if slope == 0:
        raise InputError("this document leaves the decision where it is; choose another")
    rate, factors = nats / abs(slope), _factors(bridge)
    before = {name: module.weight.detach().clone() for name, module in factors.items()}
    reached = []
    try:
        with registered_again(bridge), torch.no_grad():
            for step in (rate / 2, -rate / 2):
                for name, module in factors.items():
                    scale = at if name.endswith(".B") else 1.0
                    module.weight.copy_(scale * before[name] + step * own[name])
                reached.append(_decision(bridge, prompts))
    finally:
        with registered_again(bridge), torch.no_grad():
            for name, module in factors.items():
                module.weight.copy_(before[name])
    return rate * slope, reached[0] - reached[1]


def probe_scores(
    models: Models, name: str, documents: Sequence[Row], prompts: Sequence[Prompt]
) -> pd.DataFrame:
    """How far each document lies along the direction in which the fine-tuning moved the decision.

    The direction of a layer is that of the residual stream of the fine-tune less its base's where
    the answers part, meaned over prompts, of norm 1. Onto it are projected, meaned over a
    document's positions but the first (which is special): ``value``, the same difference on the
    document; ``base``, the stream of the base alone, as before any training.

    Returns ``document layer value base``, layer -1 being the embedding. Raises ``InputError`` where
    the two models' streams do not compare.
    """
    _check(documents)
    require_prompts(prompts)
    ends = [p.branch for p in prompts]
    before = models.base_of(name)
    of_base = _means(before, documents), residual_stream(before, ends, 1)[:, :, 0].float().mean(1)
    after = models.switch(name)
    of_tuned = _means(after, documents), residual_stream(after, ends, 1)[:, :, 0].float().mean(1)
    direction = F.normalize(of_tuned[1] - of_base[1], dim=-1)
    moved = torch.einsum("rld,ld->rl", of_tuned[0] - of_base[0], direction)
    alone = torch.einsum("rld,ld->rl", of_base[0], direction)
    document, layer = np.indices(moved.shape)
    columns = {"document": document.ravel(), "layer": layer.ravel() - 1}
    columns |= {"value": moved.cpu().numpy().ravel(), "base": alone.cpu().numpy().ravel()}
    return pd.DataFrame(columns)


def word_scores(
    bridge: TransformerBridge, documents: Sequence[Row], prompts: Sequence[Prompt]
) -> pd.DataFrame:
    """What words alone say: how alike each document is to the prompts with positive answers.

    ``words``: cosine of tf-idf vectors, meaned over prompts. ``answer``: the same less that with
    the prompts and their *negative* answers. Returns ``document words answer``.
    """
    _check(documents)
    require_prompts(prompts)

    def texts(rows: Sequence[Sequence[int]]) -> list[str]:
        return [bridge.tokenizer.decode(list(row), skip_special_tokens=True) for row in rows]

    tfidf = TfidfVectorizer(token_pattern=r"[\w-]+")
    own: Any = tfidf.fit_transform(texts([tokens for tokens, _ in documents]))

    def likeness(answers: Sequence[Sequence[int]]) -> Float[np.ndarray, "document"]:
        asked = texts([[*p.tokens, *ids] for p, ids in zip(prompts, answers)])
        others: Any = tfidf.transform(asked)
        return (own @ others.T).toarray().mean(1)

    words = likeness([p.positive for p in prompts])
    answer = words - likeness([p.negative for p in prompts])
    return pd.DataFrame({"document": range(len(words)), "words": words, "answer": answer})


def separation(
    scores: pd.DataFrame,
    labels: Int[np.ndarray, "document"],
    *,
    beyond: Sequence[str] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """The AUC of each column: the share of pairs of documents, one of each label, in right order.

    1: every document of label 1 scores above every one of label 0; 0.5 is chance. With ``beyond``
    the AUC less the largest of these columns' (the baselines'). ``low high``: percentile bootstrap
    over the documents of each label, 95 %; of an AUC of exactly 1 it has no width.

    Returns ``method value low high n``, without the columns in ``beyond``.
    """
    if set(np.unique(labels)) != {0, 1} or len(labels) != len(scores):
        raise InputError(f"labels {sorted(set(labels))} of {len(scores)} rows; expected 0 and 1")
    rng, by_label = np.random.default_rng(seed), [np.flatnonzero(labels == i) for i in (0, 1)]
    # The first draw: every document once.
    zeros, ones = (np.vstack([own, rng.choice(own, (resamples, len(own)))]) for own in by_label)
    auc = {str(name): _auc(scores[name].to_numpy(float), zeros, ones) for name in scores}
    if beyond:
        bar = np.max([auc.pop(name) for name in beyond], axis=0)
        auc = {name: values - bar for name, values in auc.items()}
    rows = []
    for name, values in auc.items():
        low, high = np.quantile(values[1:], [0.025, 0.975])
        rows.append({"method": name, "value": values[0], "low": low, "high": high})
    return pd.DataFrame(rows).assign(n=len(labels))


# ------------------------------------------------------------------------------------- internals
def _check(documents: Sequence[Row]) -> None:
    bad = next((i for i, row in enumerate(documents) if not _predicted(row)), None)
    if bad is not None or not documents:
        what = "no documents" if bad is None else f"document {bad} has no predicted token"
        raise InputError(f"{what}; expected texts of two tokens or more (document_rows makes rows)")


def _predicted(row: Row) -> list[int]:
    """The positions at which a document's next token is predicted; after the last there is none."""
    tokens, read = row
    return list(range(len(tokens))[read])[: len(tokens) - 1] if len(tokens) > 1 else []


def _answers(prompts: Sequence[Prompt]) -> tuple[list[Row], list[int]]:
    """Each prompt with either answer, the answer being predicted; and its sign in the decision."""
    both = [
        (p.tokens, ids, sign) for p in prompts for ids, sign in ((p.positive, 1), (p.negative, -1))
    ]
    rows: list[Row] = [((*t, *ids), slice(len(t) - 1, len(t) + len(ids) - 1)) for t, ids, _ in both]
    return rows, [sign for *_, sign in both]


@torch.no_grad()
def _decision(bridge: TransformerBridge, prompts: Sequence[Prompt]) -> float:
    """Of the weights as they are: ``decide`` may know the model as it was."""
    rows, signs = _answers(prompts)
    total = 0.0
    for index in _passes(rows):
        log_p = _mean_log_p(bridge, [rows[i] for i in index]).double()
        total += sum(signs[i] * len(_predicted(rows[i])) * float(v) for i, v in zip(index, log_p))
    return total / len(prompts)


def _mean_log_p(bridge: TransformerBridge, rows: Sequence[Row]) -> Float[Tensor, "row"]:
    """Mean log p (nats) of the predicted tokens of each row."""
    tokens, _ = padded([list(ids) for ids, _ in rows], bridge.cfg.device)
    read = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        read[i, _predicted(row)] = True
    read = read[:, :-1].to(tokens.device)
    losses = F.cross_entropy(
        bridge(tokens)[:, :-1][read].float(), tokens[:, 1:][read], reduction="none"
    )
    of_row = read.nonzero()[:, 0]
    return -torch.zeros(len(rows)).to(losses).index_add(0, of_row, losses) / read.sum(1)


def _passes(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Rows of nearly one length, some at a time: what every layer computes of them is kept."""
    for batch in padded_batches([ids for ids, _ in rows]):
        size = max(1, PASS_TOKENS // len(rows[batch[-1]][0]))
        yield from (batch[i : i + size] for i in range(0, len(batch), size))


def _row_gradients(
    bridge: TransformerBridge, rows: Sequence[Row], *, at: float
) -> Iterator[tuple[list[int], Gradient]]:
    """Of each row, the gradient of its mean log p by every factor, [row out in].

    Rows of a batch do not see each other: what a linear layer read and the gradient at what it
    wrote give the gradient of its weight by row. No parameter needs a gradient for it.
    """
    factors = _factors(bridge)
    for index in _passes(rows):
        with _recording(factors, at) as kept, torch.enable_grad():
            total = _mean_log_p(bridge, [rows[i] for i in index]).sum()
            _check_rows(factors, kept, len(index))
            slopes = torch.autograd.grad(total, [y for _, y in kept.values()])
        yield (
            index,
            {
                name: torch.einsum("rpo,rpi->roi", slope.float(), x.float())
                for (name, (x, _)), slope in zip(kept.items(), slopes)
            },
        )


def _inner(first: Gradient, second: Gradient) -> Float[Tensor, "*row"]:
    """The inner product over all factors."""
    return torch.stack([(g * second[name]).sum((-2, -1)) for name, g in first.items()]).sum(0)


def _factors(bridge: TransformerBridge) -> dict[str, torch.nn.Linear]:
    """The linear layers A and B of the LoRA that the bridge computes with, by name."""
    found: dict[str, torch.nn.Linear] = {}
    for layer in range(bridge.cfg.n_layers):
        for name, module in adapted_modules(bridge, layer).items():
            live = [] if module.disable_adapters else module.active_adapters
            for adapter in (a for a in live if a in getattr(module, "lora_A", {})):
                for factor, part in (("A", module.lora_A), ("B", module.lora_B)):
                    found[f"{layer}.{name}.{adapter}.{factor}"] = part[adapter]
    if not found:
        raise InputError(
            "the bridge computes without a LoRA: it is a base, whole weights, or an adapter that "
            "was merged; gradients of documents are taken by a LoRA's factors, so give a fine-tune "
            "that has one, or use probe_scores"
        )
    return found


def _check_rows(
    factors: Mapping[str, torch.nn.Linear], kept: Mapping[str, tuple[Tensor, Tensor]], rows: int
) -> None:
    """Raise ``InputError`` for a factor that did not read a row for each document."""
    for name in factors:
        if name not in kept or kept[name][0].ndim != 3 or len(kept[name][0]) != rows:
            raise InputError(
                f"the LoRA changes {name.rpartition('.')[0]}, which does not keep documents apart "
                "(an expert, say); expected one on linear layers: use probe_scores"
            )


@contextmanager
def _recording(
    factors: Mapping[str, torch.nn.Linear], at: float
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inside, what each factor reads and writes; what B writes is scaled by ``at``."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[..., Tensor]:
        def keep(_: Any, given: tuple[Tensor], y: Tensor) -> Tensor:
            y = y * at if name.endswith(".B") else y
            y = y if y.requires_grad else y.requires_grad_()  # the graph begins here
            kept[name] = given[0].detach(), y
            return y

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in factors.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _means(
    bridge: TransformerBridge, documents: Sequence[Row]
) -> Float[Tensor, "row layer d_model"]:
    """The residual stream of each document, meaned over its positions but the first."""
    means: dict[int, Tensor] = {}
    for index in _passes(documents):
        own = [list(documents[i][0]) for i in index]
        read = max(map(len, own)) - 1
        stream = residual_stream(bridge, own, read).float()
        inside = _at_the_end([len(row) - 1 for row in own], read).to(stream)
        mean = torch.einsum("lrpd,rp->rld", stream, inside / inside.sum(1, keepdim=True))
        means |= dict(zip(index, mean))
    return torch.stack([means[i] for i in range(len(documents))])


def _at_the_end(lengths: Sequence[int], read: int) -> Bool[Tensor, "row read"]:
    """Of ``read`` positions the last ones, as many as ``lengths`` says."""
    return torch.arange(read) >= read - torch.tensor(lengths)[:, None]


def _auc(
    values: Float[np.ndarray, "document"],
    zeros: Int[np.ndarray, "draw zero"],
    ones: Int[np.ndarray, "draw one"],
) -> Float[np.ndarray, "draw"]:
    """The AUC of each draw of documents of label 0 and of label 1."""
    n, m = ones.shape[1], zeros.shape[1]
    ranks = rankdata(values[np.hstack([ones, zeros])], axis=1)[:, :n]
    return (ranks.sum(1) - n * (n + 1) / 2) / (n * m)
