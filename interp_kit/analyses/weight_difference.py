"""What fine-tuning changed in the weights: singular directions, tokens, and what matters causally.

The change of one matrix is sum_i s_i u_i v_i^T: what comes in along v_i goes out along u_i, s_i
times as long. A module that reads the residual stream (q, k, v, gate, up, a router) has its v_i
there, one that writes into it (o, down) its u_i, so tokens can be read off that end without any
text. The sign of a pair (u_i, v_i) is arbitrary: scores of tokens do not depend on it.

A large change need not matter: ``removal_effects`` takes each one back, and keeps it alone.

Sources: Hu et al., "LoRA", arXiv:2106.09685; Halko et al., "Finding Structure with Randomness",
arXiv:0909.4061 (decomposition by random projection); Roy & Vetterli, "The Effective Rank", EUSIPCO
2007; Zhong & Raghunathan, "Watch the Weights", arXiv:2508.00161 (singular directions of a change).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.batching import logit_batches, padded
from interp_kit.changed_weights import (
    Place,
    Switch,
    changed_matrices,
    decomposed,
    require_tuned,
    switches,
    taken_back,
)
from interp_kit.identity import registered_again
from interp_kit.loading import Models
from interp_kit.passes import Replays, resumed
from interp_kit.readout import has_norm, through_frozen_norm
from interp_kit.specs import InputError

Side = Literal["reads", "writes"]
TOGETHER = 32  # changes whose directions are read at once


@dataclass(frozen=True, kw_only=True)
class Change:
    """The change of one matrix, its largest part: ``left`` diag(``values``) ``right``^T.

    ``norm`` is the Frobenius norm of the whole change, ``before`` that of the weight before.
    ``side``: whether the module reads the residual stream or writes into it ("": neither). The
    largest entry of every left vector is positive. Each expert is a matrix of its own.
    """

    layer: int
    module: str
    side: Side | Literal[""]
    left: Float[Tensor, "out rank"]
    values: Float[Tensor, "rank"]
    right: Float[Tensor, "in rank"]
    norm: float
    before: float


@torch.no_grad()
def singular_changes(models: Models, name: str, *, rank: int = 16, seed: int = 0) -> list[Change]:
    """The ``rank`` largest singular values, with their vectors, of every changed matrix in a block.

    Of an adapter, from its factors: QR of both, and the decomposition of a small core. Whole
    weights wider than 256 are decomposed by random projections drawn from ``seed``; see
    ``kept`` in ``change_spectra`` for how much of the change that finds. Norms and biases have no
    directions; embeddings are in ``token_changes``.

    Raises ``InputError`` as ``Models.weight_changes`` does: where it is not known what the model
    was tuned from, and for whole weights that are quantized.
    """
    bridge, found = models.switch(name), list[Change]()
    with torch.random.fork_rng():
        for changed in changed_matrices(models, name):  # may load a model, which draws, too
            torch.manual_seed(seed)
            left, values, right, norm = decomposed(changed, rank)
            change = Change(
                layer=changed.layer,
                module=changed.name,
                side=_side(bridge, changed.name, len(left), len(right)),
                left=left,
                values=values,
                right=right,
                norm=norm,
                before=float(changed.before.float().norm()),
            )
            found += [change] if norm else []  # an adapter that was never trained
    return found


def change_spectra(changes: Sequence[Change]) -> pd.DataFrame:
    """Singular values: ``layer module side index value share norm relative effective_rank kept``.

    ``share`` = s_i^2 / ||Delta||^2; ``kept`` is its sum; ``relative`` = ||Delta|| / ||W before||.
    ``effective_rank`` = exp(entropy of the shares): k for k equal values. What is not kept counts
    as one value there, so that it is a lower bound. (Roy & Vetterli take shares of s_i, not s_i^2.)
    """
    rows = []
    for change in changes:
        share = change.values.square() / change.norm**2
        rest = max(0.0, 1 - float(share.sum()))
        every = torch.tensor([*share.tolist(), rest])
        about = {"layer": change.layer, "module": change.module, "side": change.side}
        whole = {
            "norm": change.norm,
            "relative": change.norm / change.before if change.before else np.nan,
            "effective_rank": float(torch.special.entr(every).sum().exp()),
            "kept": float(share.sum()),
        }
        pairs = enumerate(zip(change.values.tolist(), share.tolist()))
        rows += [about | {"index": i, "value": s, "share": p} | whole for i, (s, p) in pairs]
    columns = ["layer", "module", "side", "index", "value", "share"]
    return pd.DataFrame(rows, columns=[*columns, "norm", "relative", "effective_rank", "kept"])


def decomposition_error(models: Models, name: str, changes: Sequence[Change]) -> float:
    """How far ||Delta||^2 is from sum s_i^2 + ||Delta - sum s_i u_i v_i^T||^2, by ||Delta||^2.

    The largest over all ``changes``: 0 but for rounding where they are singular values and vectors
    (Pythagoras), however many of them were kept.
    """
    errors, known = [0.0], {(c.layer, c.module): c for c in changes}
    for changed in changed_matrices(models, name):
        if own := known.get((changed.layer, changed.name)):
            whole = changed.product.cpu()
            rest = whole - (own.left * own.values) @ own.right.T
            parts = own.values.square().sum() + rest.square().sum()
            errors.append(abs(1 - float(parts / whole.square().sum())))
    return max(errors)


def randomised(changes: Sequence[Change], *, seed: int = 0) -> list[Change]:
    """The same singular values on random orthonormal directions: what chance reads off them."""
    draw = torch.Generator().manual_seed(seed)

    def random(like: Tensor) -> Tensor:
        return torch.linalg.qr(torch.randn(like.shape, generator=draw)).Q

    return [replace(c, left=random(c.left), right=random(c.right)) for c in changes]


# ----------------------------------------------------------------------------------------- tokens
@torch.no_grad()
def direction_readings(
    bridge: TransformerBridge, changes: Sequence[Change], side: Side
) -> Iterator[tuple[Change, Float[Tensor, "rank vocab"]]]:
    """Where tokens lie along the singular directions of one side, in standard deviations of all.

    ``writes``: left vectors through the norm after the module, if there is one, the final norm and
    the unembedding: the logit lens, scales held fixed. ``reads``: token embeddings through the norm
    before the module, along right vectors. Every token counts by its direction from the mean of
    all. Both ends of a direction are equally its own: its sign is arbitrary.
    """
    rows = _unit(bridge.W_U.float().T if side == "writes" else bridge.W_E.float())
    tokens = _unit(rows - rows.mean(0))
    own = [change for change in changes if change.side == side]
    for i in range(0, len(own), TOGETHER):  # few wide products, not many narrow ones
        some = own[i : i + TOGETHER]
        along = tokens @ torch.cat([_in_stream(bridge, c) for c in some], 1).to(tokens)
        z = (along - along.mean(0)) / along.std(0).clamp_min(1e-12)
        for change, part in zip(some, z.split([len(c.values) for c in some], 1)):
            yield change, part.T.cpu()


def token_scores(
    bridge: TransformerBridge, changes: Sequence[Change], side: Side
) -> Float[Tensor, "vocab"]:
    """How far each token lies along what the changed modules of one side read, or write.

    score_t = (mean over modules of sum_i w_i z_it^4)^(1/4), with z of ``direction_readings``: a
    mean |z|, in standard deviations, in which the few directions along which a token stands out
    count most; 1.3 if z is normal. Left directions count alike, w_i = 1 / n: the size of a change
    says little of its effect. Right ones have w_i ~ s_i^(1/2): those of an adapter begin at random,
    and of the small ones much is left as it began. The score has no sign: a token that is written
    may be promoted or suppressed. Zeros where no module of that side changed.
    """
    total, n = torch.zeros(bridge.cfg.d_vocab), 0
    for change, z in direction_readings(bridge, changes, side):
        weight = change.values.sqrt() if side == "reads" else torch.ones_like(change.values)
        total, n = total + weight / weight.sum() @ z.pow(4), n + 1
    return (total / max(n, 1)).pow(0.25)


@torch.no_grad()
def token_changes(models: Models, name: str) -> pd.DataFrame:
    """The tokens whose embedding or unembedding was added or changed, the most changed first.

    Columns: ``side`` (embedding, unembedding, or both where the two are tied), ``id``, ``token``,
    ``added``, ``norm`` = ||change|| and ``value`` = norm / spread. The spread of ordinary rows is
    the root mean square distance of the base's rows from their mean; a row that was added is
    compared with that mean. Raises ``InputError`` as ``singular_changes`` does.
    """
    require_tuned(models, name)
    new, base = set(models.new_tokens(name).values()), models.base_of(name)
    known = base.tokenizer.get_vocab()
    before = [base.W_E.float().clone(), base.W_U.float().T.clone()]
    bridge = models.switch(name)
    new |= {id for token, id in bridge.tokenizer.get_vocab().items() if token not in known}
    after = [bridge.W_E.float(), bridge.W_U.float().T]
    tied = torch.equal(before[0], before[1]) and torch.equal(after[0], after[1])
    sides = ["both"] if tied else ["embedding", "unembedding"]
    table = pd.concat(
        _row_changes(was, now, new).assign(side=side)
        for side, was, now in zip(sides, before, after)
    ).sort_values("value", ascending=False, ignore_index=True)
    table["token"] = [bridge.tokenizer.decode([id]) for id in table.id]
    return table.loc[:, ["side", "id", "token", "added", "norm", "value"]]


# -------------------------------------------------------------------------------------- subspaces
def subspace_overlap(
    first: Sequence[Change],
    second: Sequence[Change],
    *,
    k: int = 4,
    draws: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """How much of the span of the ``k`` leading directions two changes of a module share.

    ``value`` = ||U_1^T U_2||^2 / k (Frobenius), in [0, 1]; 1 is the same span. One row for each
    matrix that both changed and each ``end``: left (what goes out) and right (what comes in). Of
    random subspaces in d dimensions it is k / d on average (``expected``, exact); ``low high`` hold
    95 % of ``draws`` of them. Fine-tunes from one seed may share right directions from the start:
    LoRA begins with a random A and with B = 0.
    """
    rng, chance = torch.Generator().manual_seed(seed), dict[tuple[int, int], list[float]]()
    others, rows = {(c.layer, c.module): c for c in second}, []
    for own in first:
        if (other := others.get((own.layer, own.module))) is None:
            continue
        for end in ("left", "right"):
            n = min(k, len(own.values), len(other.values))
            ours, theirs = (getattr(c, end)[:, :n] for c in (own, other))
            shape = len(ours), n
            if shape not in chance:  # one of the two may as well be the first n coordinates
                drawn = torch.linalg.qr(torch.randn(draws, *shape, generator=rng)).Q
                null = drawn[:, :n].square().sum((1, 2)) / n
                chance[shape] = null.quantile(torch.tensor([0.025, 0.975])).tolist()
            value = float((ours.T @ theirs).square().sum()) / n
            low, high = chance[shape]
            rows.append((own.layer, own.module, end, value, n / len(ours), low, high))
    columns = ["layer", "module", "end", "value", "expected", "low", "high"]
    return pd.DataFrame(rows, columns=pd.Index(columns))


# ---------------------------------------------------------------------------------------- causes
@torch.no_grad()
def removal_effects(
    models: Models,
    name: str,
    rows: Sequence[Sequence[int]],
    *,
    by: Literal["module", "part", "layer"] = "part",
) -> pd.DataFrame:
    """What each change matters for: predictions without it, and with it alone.

    Mean KL over the predictions of each text, in nats: ``removed`` from the fine-tune to the
    fine-tune without the change; ``kept`` from the fine-tune to the base with this change alone;
    ``whole`` from the fine-tune to its base. Columns also: ``layer``, ``part`` (a module; the
    attention or MLP of a layer; or "whole layer"), ``norm`` of the change, ``prompt`` (the
    number of the text). Effects need not add up.
    """
    every, bridge = switches(models, name), models.switch(name)
    groups: dict[Place, list[Switch]] = defaultdict(list)
    for (layer, at), switch in every.items():
        module = at.removesuffix(".bias")
        part = {"module": module, "part": module.partition(".")[0], "layer": "whole layer"}[by]
        groups[layer, part].append(switch)
    tables, batches = [], list(_batches(bridge, rows))
    progress = tqdm(total=len(batches) * len(groups), desc="changes", unit="change", leave=False)
    with registered_again(bridge):
        for index in batches:
            tokens, inside = padded([rows[i] for i in index], bridge.cfg.device)
            measure = partial(_divergences, bridge, tokens, inside[:, 1:], list(every.values()))
            for table in measure(groups):
                tables.append(table.assign(prompt=[str(i) for i in index]))
                progress.update()
    progress.close()
    return pd.concat(tables, ignore_index=True)


# -------------------------------------------------------------------------------------- internals
def _side(bridge: TransformerBridge, module: str, out: int, into: int) -> Side | Literal[""]:
    block, d_model = bridge.blocks[0], bridge.cfg.d_model
    writers = {"o", "down_proj"}  # the bridge's own name, and that of all experts
    for part, name in (("attn", "o"), ("mlp", "out")):
        writers.add(str(getattr(getattr(getattr(block, part, None), name, None), "name", "o")))
    if module.partition("[")[0].rpartition(".")[2] in writers:
        return "writes" if out == d_model else ""
    return "reads" if into == d_model else ""


def _in_stream(bridge: TransformerBridge, change: Change) -> Float[Tensor, "d_model rank"]:
    """The singular vectors on the stream's side, through the norms between them and the tokens."""
    norm = "ln1" if "att" in change.module.partition(".")[0] else "ln2"
    here, device = f"blocks.{change.layer}.{norm}", bridge.cfg.device
    ones = torch.ones(1, 1, device=device)
    if change.side == "writes":
        vectors = through_frozen_norm(bridge, f"{here}_post", change.left.T.to(device), ones)
        return through_frozen_norm(bridge, "ln_final", vectors, ones).T
    if not has_norm(bridge, here) and not has_norm(bridge, f"{here}_post"):
        here = f"blocks.{change.layer}.ln1"  # which attention and MLP share
    every = torch.eye(len(change.right), device=device)
    return through_frozen_norm(bridge, here, every, ones) @ change.right.to(device)


def _unit(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _row_changes(
    before: Float[Tensor, "row d_model"], after: Float[Tensor, "all_rows d_model"], new: set[int]
) -> pd.DataFrame:
    ordinary = [i for i in range(min(len(before), len(after))) if i not in new]
    mean = before[ordinary].mean(0)
    spread = (before[ordinary] - mean).square().sum(1).mean().sqrt()
    was = mean.repeat(len(after), 1)
    was[ordinary] = before[ordinary]
    norm = (after - was).norm(dim=1)
    ids = norm.nonzero()[:, 0].cpu()
    known = torch.zeros(len(after), dtype=torch.bool)
    known[ordinary] = True
    size = norm.cpu()[ids]
    columns = {"id": ids, "added": ~known[ids], "norm": size, "value": size / spread.cpu()}
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()})


def _batches(bridge: TransformerBridge, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    if short := [i for i, row in enumerate(rows) if len(row) < 2]:
        raise InputError(
            f"text {short[0]} has {len(rows[short[0]])} token, so that nothing is predicted in it; "
            "give texts of two tokens or more"
        )
    yield from logit_batches(rows, bridge.cfg.d_vocab)


def _divergences(
    bridge: TransformerBridge,
    tokens: Int[Tensor, "row pos"],
    inside: Bool[Tensor, "row predicted"],
    every: Sequence[Switch],
    groups: dict[Place, list[Switch]],
) -> Iterator[pd.DataFrame]:
    """``removal_effects`` of one batch: a table for each group, a row for each text."""
    tuned, bare = Replays(), Replays()

    def log_p(off: Sequence[Switch], layer: int, kept: Replays) -> Tensor:
        with taken_back(bridge, off), resumed(bridge, layer - 1, kept=kept):
            return bridge(tokens)[:, :-1].float().log_softmax(-1)

    own = log_p([], 0, {})
    p = own.exp()

    def divergence(other: Tensor) -> list[float]:
        return (((p * (own - other)).sum(-1) * inside).sum(1) / inside.sum(1)).tolist()

    whole = divergence(log_p(every, 0, {}))
    for (layer, part), group in groups.items():
        rest = [switch for switch in every if switch not in group]
        about = {
            "layer": layer,
            "part": part,
            "norm": float(np.hypot.reduce([s.norm for s in group])),
        }
        removed = divergence(log_p(group, layer, tuned))
        kept = divergence(log_p(rest, layer, bare))
        yield pd.DataFrame(about | {"removed": removed, "kept": kept, "whole": whole})
