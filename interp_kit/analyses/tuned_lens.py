"""Tuned lens: what would the model say if it stopped after layer l, read in that layer's own basis?

The logit lens reads every layer's residual stream h as if it were the last one's. The tuned lens
first translates it by a trained affine map, h -> h + A_l h + b_l, and then uses the model's own
final norm and unembedding, soft cap included. The embedding (-1) and every block but the last have
a translator; the last block is the model itself. Zero A and b are the logit lens.

Translators minimise KL(model's next-token distribution || lens') in nats, mean over positions, by
stochastic gradient descent with Nesterov momentum, a rate that decays linearly to zero and clipped
gradients. Clipped is each translator's own gradient, so that what one layer learns does not depend
on the others. Position 0 (in most models the same token in every text, and an attention sink) and
the last one, after which nothing follows, are neither trained on nor measured.

Source: Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens",
arXiv:2303.08112; prediction depth after Baldock et al., arXiv:2106.09647.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import ceil, log
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import logit_readout

from interp_kit.decisions import PADDED_ROWS, batches, padded, teacher_forced
from interp_kit.files import read_json
from interp_kit.passes import residual_stream
from interp_kit.prompts import Prompt, Sign, token_ids
from interp_kit.specs import InputError, Spec, checked

EMBEDDING = -1  # the "layer" before block 0
READ_AT_ONCE = 2**25  # logits in memory at once while training: bounds memory, not results
CONFIG, PARAMETERS = "config.json", "params.safetensors"
Rows = Sequence[Sequence[int]]
Stream = Float[Tensor, "layer *place d_model"]


class LensConfig(Spec):
    """``config.json`` of the public tuned-lens package."""

    model_config = ConfigDict(extra="ignore")

    base_model_name_or_path: str
    d_model: int
    num_hidden_layers: int = Field(ge=1)
    bias: Literal[True] = True
    base_model_revision: str | None = None
    unembed_hash: str | None = None
    lens_type: Literal["linear_tuned_lens"] = "linear_tuned_lens"


@dataclass(frozen=True, kw_only=True)
class TunedLens:
    """The translators h -> h + ``weight[i]`` h + ``bias[i]``; i = l + 1 reads layer l.

    float32, on the CPU. ``config`` says which model they are for.
    """

    weight: Float[Tensor, "translator out d_model"]
    bias: Float[Tensor, "translator d_model"]
    config: LensConfig

    @classmethod
    def identity(
        cls, bridge: TransformerBridge, *, model: str = "", revision: str | None = None
    ) -> "TunedLens":
        """Translators that change nothing: the logit lens. ``model`` is the name to be kept."""
        n, d = bridge.cfg.n_layers, bridge.cfg.d_model
        config = LensConfig(
            base_model_name_or_path=model,
            base_model_revision=revision,
            d_model=d,
            num_hidden_layers=n,
            unembed_hash=_unembed_hash(bridge),
        )
        return cls(weight=torch.zeros(n, d, d), bias=torch.zeros(n, d), config=config)

    def translate(self, stream: Stream) -> Stream:
        """The stream of every layer (embedding first) as the last layer would write it, float32."""
        return translate(stream, self.weight.to(stream.device), self.bias.to(stream.device))

    def permuted(self, *, seed: int = 0) -> "TunedLens":
        """A control: the same translators with the stream's coordinates shuffled.

        P A P^T and P b have the norm and the singular values of A and b.
        """
        order = torch.randperm(self.bias.shape[1], generator=torch.Generator().manual_seed(seed))
        weight = self.weight[:, order][:, :, order]
        return TunedLens(weight=weight, bias=self.bias[:, order], config=self.config)

    def save(self, folder: str | Path) -> None:
        """Write the public package's ``config.json``, and its tensors as ``params.safetensors``.

        Tensor ``0.weight`` is A of the embedding, ``1.weight`` that of block 0, and so on.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}.weight": A.contiguous() for i, A in enumerate(self.weight)}
        tensors |= {f"{i}.bias": b.contiguous() for i, b in enumerate(self.bias)}
        replace_file(folder / PARAMETERS, tensors)
        (folder / CONFIG).write_text(json.dumps(self.config.model_dump(), indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path, *, bridge: TransformerBridge | None = None) -> "TunedLens":
        """Read what ``save`` wrote; with a ``bridge``, only if the lens was trained for its model.

        Raises ``InputError`` for a folder that holds no lens, one that holds a pickle only, tensors
        that do not fit the config, and a lens for another number of layers, width or unembedding.
        """
        folder = Path(folder)
        _require_safetensors(folder)
        config = checked(LensConfig, read_json(folder / CONFIG), folder / CONFIG)
        n, d = config.num_hidden_layers, config.d_model
        expected = {f"{i}.weight": (d, d) for i in range(n)} | {f"{i}.bias": (d,) for i in range(n)}
        tensors, _ = read_tensors(folder / PARAMETERS)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in expected | found:
            if expected.get(name) != found.get(name):
                raise InputError(
                    f"{folder / PARAMETERS}: tensor {name} has shape {found.get(name, 'none')}, "
                    f"config.json says {expected.get(name, 'there is none')}; save the lens again"
                )
        lens = cls(
            weight=torch.stack([tensors[f"{i}.weight"].float() for i in range(n)]),
            bias=torch.stack([tensors[f"{i}.bias"].float() for i in range(n)]),
            config=config,
        )
        if bridge is not None:
            _require_fit(lens, bridge)
            if config.unembed_hash and config.unembed_hash != _unembed_hash(bridge):
                raise InputError(
                    f"{folder}: the lens was trained for {config.base_model_name_or_path!r}, whose "
                    "unembedding is not this model's; give the lens of this model, or train one"
                )
        return lens


def middle_layers(n_layers: int) -> range:
    """The blocks of the middle third: l with n/3 <= l < 2n/3."""
    return range(ceil(n_layers / 3), ceil(2 * n_layers / 3))


def text_rows(
    bridge: TransformerBridge, texts: Sequence[str], *, length: int = 128
) -> list[tuple[int, ...]]:
    """Every text as token ids, with its end where the tokenizer has one; ``length`` at most."""
    end = bridge.tokenizer.eos_token_id
    ends = () if end is None else (end,)
    return [(*token_ids(bridge, text), *ends)[:length] for text in texts]


@torch.no_grad()
def lens_divergence(
    bridge: TransformerBridge, rows: Rows, lenses: Mapping[str, TunedLens]
) -> pd.DataFrame:
    """How well each lens predicts what the model will say, and what the text says, by layer.

    One row for each lens, text and layer (-1 is the embedding, the last is the model itself), means
    over the text's positions: ``lens prompt layer kl cross_entropy bits``. ``kl``: KL(model's
    distribution || lens') in nats; ``cross_entropy``: -log p of the true next token in nats;
    ``bits``: the same in bits a token, cross_entropy / ln 2. ``prompt`` is the text's number among
    those of three tokens or more.

    All lenses share one forward pass of each text. Raises ``InputError`` for a lens of another
    shape, and if no text has three tokens.
    """
    for lens in lenses.values():
        _require_fit(lens, bridge)
    tables = []
    for stream, following, text in _read_texts(bridge, rows):
        for name, lens in lenses.items():
            log_p = lens_log_probs(bridge, lens.translate(stream))
            tables += [
                _divergences(log_p[-1], log_q, following, text).assign(lens=name, layer=layer)
                for layer, log_q in enumerate(log_p, EMBEDDING)
            ]
    return _means_by_text(pd.concat(tables))


@torch.no_grad()
def frequency_divergence(
    bridge: TransformerBridge, rows: Rows, held_out: Rows, *, name: str = "token frequencies"
) -> pd.DataFrame:
    """A control: the best lens that never looks at the text, read on ``held_out``.

    It always predicts the mean of the model's distributions on ``rows``, which of all constant
    predictions has the least mean KL there. Returns what ``lens_divergence`` returns, the same
    values at every layer.
    """
    total = torch.zeros(bridge.cfg.d_vocab, dtype=torch.float64)
    for stream, _, _ in _read_texts(bridge, rows):
        total += lens_log_probs(bridge, stream[-1:])[0].exp().double().sum(0).cpu()
    mean = (total / total.sum()).clamp(min=torch.finfo(torch.float32).tiny)
    constant = mean.log().float().to(bridge.cfg.device)
    tables = []
    for stream, following, text in _read_texts(bridge, held_out):
        final = lens_log_probs(bridge, stream[-1:])[0]
        tables.append(_divergences(final, constant.expand_as(final), following, text))
    layers = pd.DataFrame({"layer": range(EMBEDDING, bridge.cfg.n_layers)})
    return _means_by_text(pd.concat(tables).assign(lens=name).merge(layers, how="cross"))


def tuned_lens(
    bridge: TransformerBridge, prompts: Sequence[Prompt], lens: TunedLens
) -> pd.DataFrame:
    """The decision after every block, read through the translators.

    Returns one row for each prompt and layer: ``prompt group layer value``, as ``logit_lens`` does
    (exactly the same for the identity): log p(positive) - log p(negative) in nats, summed over the
    answers' tokens.
    """
    log_p = _option_log_probs(bridge, prompts, lens)
    return _by_layer(prompts, log_p["positive"] - log_p["negative"])


def option_trajectories(
    bridge: TransformerBridge, prompts: Sequence[Prompt], lens: TunedLens
) -> pd.DataFrame:
    """log p of either answer after every block, in nats, summed over its tokens.

    Returns ``prompt group layer option value``; ``option`` is the answer's label.
    """
    log_p = _option_log_probs(bridge, prompts, lens)
    tables = []
    for sign, values in log_p.items():
        labels = [p.positive_label if sign == "positive" else p.negative_label for p in prompts]
        table = _by_layer(prompts, values)
        table.insert(3, "option", np.repeat(labels, values.shape[1]))
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def top_tokens(
    bridge: TransformerBridge, prompts: Sequence[Prompt], lens: TunedLens, *, k: int = 5
) -> pd.DataFrame:
    """The ``k`` likeliest next tokens after every block, where the answers part.

    Returns one row for each prompt, layer and rank: ``prompt layer rank token p logit``.
    """
    _require_fit(lens, bridge)
    rows: dict[int, list[tuple[Any, ...]]] = {}
    for index in batches([(len(p.branch), None) for p in prompts]):
        tokens = torch.tensor([prompts[i].branch for i in index])
        stream = lens.translate(residual_stream(bridge, tokens, 1)[:, :, 0])
        logits, probs = (
            logit_readout(bridge, stream, top_k=k, return_type=kind) for kind in ("logits", "probs")
        )
        words = np.array(logits.decode(bridge.tokenizer), dtype=object)
        for row, i in enumerate(index):
            rows[i] = [
                (
                    prompts[i].id,
                    layer + EMBEDDING,
                    rank + 1,
                    words[layer, row, rank],
                    float(p),
                    float(logit),
                )
                for layer, both in enumerate(zip(probs.values[:, row], logits.values[:, row]))
                for rank, (p, logit) in enumerate(zip(*both))
            ]
    ordered = [row for i in range(len(prompts)) for row in rows[i]]
    return pd.DataFrame(ordered, columns=["prompt", "layer", "rank", "token", "p", "logit"])


def top_token_records(tokens: pd.DataFrame) -> list[dict[str, Any]]:
    """A table of ``top_tokens`` as ``tuned_lens_*.json`` has it, one record a prompt and layer.

    Keys: ``layer prompt_id top_tokens top_probs top_logits``.
    """
    ordered = tokens.sort_values("rank", kind="stable")
    return [
        {
            "layer": int(own["layer"].iloc[0]),
            "prompt_id": own["prompt"].iloc[0],
            "top_tokens": own["token"].tolist(),
            "top_probs": own["p"].tolist(),
            "top_logits": own["logit"].tolist(),
        }
        for _, own in ordered.groupby(["prompt", "layer"], sort=False)
    ]


@torch.no_grad()
def prediction_depth(bridge: TransformerBridge, rows: Rows, lens: TunedLens) -> pd.DataFrame:
    """After how many blocks the lens' likeliest token is the model's, and stays so.

    Returns one row for each row of token ids and position: ``prompt pos value``; ``prompt`` is the
    row's number, ``value`` 0 where the embedding suffices, n_layers where the last block decides.
    """
    _require_fit(lens, bridge)
    tables = []
    for index in _by_length(rows):
        tokens, inside = padded([rows[i] for i in index], bridge.cfg.device)
        stream = residual_stream(bridge, tokens, tokens.shape[1])[:, inside]
        best = logit_readout(bridge, lens.translate(stream), top_k=1).top_ids
        assert best is not None
        other = (best[..., 0] != best[-1, :, 0]).cpu()
        last = (other * torch.arange(1, len(other) + 1)[:, None]).amax(0)  # the last that differs
        row, pos = inside.nonzero().cpu().unbind(1)
        text = torch.tensor(index)[row]
        tables.append(pd.DataFrame({"prompt": text, "pos": pos, "value": last}))
    return pd.concat(tables).sort_values(["prompt", "pos"], ignore_index=True)


def translate(
    stream: Stream,
    weight: Float[Tensor, "translator out d_model"],
    bias: Float[Tensor, "translator d_model"],
) -> Stream:
    layers = [h + h @ A.T + b for h, A, b in zip(stream.float(), weight, bias)]
    return torch.stack([*layers, stream[-1].float()])


def lens_log_probs(
    bridge: TransformerBridge, stream: Float[Tensor, "layer token d_model"], *, grad: bool = False
) -> Float[Tensor, "layer token vocab"]:
    at_once = stream.shape[0] * stream.shape[1]
    return logit_readout(
        bridge, stream, return_type="log_probs", chunk_size=at_once, enable_grad=grad
    ).values


def stream_positions(
    bridge: TransformerBridge, rows: Rows
) -> tuple[Float[Tensor, "layer token d_model"], Int[Tensor, "token"], Int[Tensor, "token"]]:
    """Of all positions but the first and the last: the stream, the next token, which row it is."""
    tokens, inside = padded(rows, bridge.cfg.device)
    kept = inside[:, 1:].clone()
    kept[:, 0] = False
    stream = residual_stream(bridge, tokens, tokens.shape[1])[:, :, :-1][:, kept]
    return stream, tokens[:, 1:][kept], kept.nonzero()[:, 0]


def usable_rows(rows: Rows) -> list[tuple[int, ...]]:
    long = [tuple(row) for row in rows if len(row) >= 3]
    if not long:
        raise InputError(
            f"none of {len(rows)} texts has three tokens; expected texts with a token between the "
            "first and the last: give longer ones"
        )
    return long


def _by_length(rows: Rows) -> Iterator[list[int]]:
    """Which rows go into one padded batch: those of nearly one length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    yield from (order[i : i + PADDED_ROWS] for i in range(0, len(order), PADDED_ROWS))


def _read_texts(
    bridge: TransformerBridge, rows: Rows
) -> Iterator[
    tuple[Float[Tensor, "layer token d_model"], Int[Tensor, "token"], Int[Tensor, "token"]]
]:
    """``stream_positions`` of all texts, with their numbers, in parts that fit in memory."""
    usable = usable_rows(rows)
    for index in _by_length(usable):
        stream, following, row = stream_positions(bridge, [usable[i] for i in index])
        text = torch.tensor(index, device=row.device)[row]
        size = tokens_at_once(bridge)
        yield from zip(stream.split(size, dim=1), following.split(size), text.split(size))


def tokens_at_once(bridge: TransformerBridge) -> int:
    """Positions of which all layers are unembedded together."""
    return max(1, READ_AT_ONCE // (bridge.cfg.d_vocab * (bridge.cfg.n_layers + 1)))


def _divergences(
    final: Float[Tensor, "token vocab"],
    log_q: Float[Tensor, "token vocab"],
    following: Int[Tensor, "token"],
    text: Int[Tensor, "token"],
) -> pd.DataFrame:
    """``prompt kl cross_entropy`` of every position."""
    kl = F.kl_div(log_q, final, log_target=True, reduction="none").sum(-1)
    cross_entropy = -log_q.gather(-1, following[:, None])[:, 0]
    return pd.DataFrame(
        {
            "prompt": text.cpu(),
            "kl": kl.double().cpu(),
            "cross_entropy": cross_entropy.double().cpu(),
        }
    )


def _means_by_text(table: pd.DataFrame) -> pd.DataFrame:
    means = pd.DataFrame(table.groupby(["lens", "prompt", "layer"]).mean()).reset_index()
    return means.assign(bits=means["cross_entropy"] / log(2))


@torch.no_grad()
def _option_log_probs(
    bridge: TransformerBridge, prompts: Sequence[Prompt], lens: TunedLens
) -> dict[Sign, Float[Tensor, "prompt layer"]]:
    _require_fit(lens, bridge)
    shape = len(prompts), bridge.cfg.n_layers + 1
    totals: dict[Sign, Tensor] = {"positive": torch.zeros(shape), "negative": torch.zeros(shape)}
    for forced in teacher_forced(prompts):
        read = max(ids.shape[1] for ids in forced.answers.values())
        stream = lens.translate(residual_stream(bridge, forced.tokens, read))
        for sign, ids in forced.answers.items():
            at_answer = stream[:, :, -ids.shape[1] :]
            log_p = logit_readout(bridge, at_answer, targets=ids, return_type="log_probs").values
            totals[sign][forced.index] = log_p[..., 0].sum(-1).T.cpu()
    return totals


def _by_layer(prompts: Sequence[Prompt], values: Float[Tensor, "prompt layer"]) -> pd.DataFrame:
    return pd.DataFrame(
        {"prompt": prompt.id, "group": prompt.group, "layer": layer, "value": value}
        for prompt, by_layer in zip(prompts, values.tolist())
        for layer, value in enumerate(by_layer, EMBEDDING)
    )


def _require_fit(lens: TunedLens, bridge: TransformerBridge) -> None:
    ours, theirs = tuple(lens.bias.shape), (bridge.cfg.n_layers, bridge.cfg.d_model)
    if ours != theirs:
        raise InputError(
            f"the lens of {lens.config.base_model_name_or_path!r} has {ours[0]} translators of "
            f"width {ours[1]}, the model {theirs[0]} layers of width {theirs[1]}; give the lens of "
            "this model, or train one"
        )


def _unembed_hash(bridge: TransformerBridge) -> str:
    """As the public package computes it: of the matrix as NumPy prints it, with one decimal."""
    matrix = bridge.W_U.detach().T.float().cpu().numpy()
    with np.printoptions(edgeitems=3, threshold=1000, linewidth=75, suppress=False):
        return sha256(np.array_str(matrix, precision=1).encode()).hexdigest()


def _require_safetensors(folder: Path) -> None:
    if (folder / PARAMETERS).is_file():
        return
    if (folder / "params.pt").is_file():
        raise InputError(
            f"{folder} holds params.pt, a pickle, which may run code when it is read; expected "
            f"{PARAMETERS}. If you trust it, convert it once: "
            "safetensors.torch.save_file(torch.load('params.pt', weights_only=True), "
            f"'{PARAMETERS}')"
        )
    raise InputError(f"{folder} holds no tuned lens; expected a folder with {PARAMETERS}")


def replace_file(
    file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """The whole file or none: written beside and moved into place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.part")
    save_file(tensors, beside, metadata=metadata)
    beside.replace(file)


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return tensors, stored.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not readable ({error}); delete it and train again") from None
