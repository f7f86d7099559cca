"""One prompt and one source of activations, recorded once: then any set of patches has a decision.

``counterfactual_experiment``: from another prompt. ``cross_model_experiment``: from another model
on the same prompt. ``ablation_experiment``: from nowhere (zero, or a mean). ``noise_experiments``:
from the clean run, into runs whose embeddings are noisy. Patching asks for one patch at a time,
causal tracing for windows of layers, circuits for any sets.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.decisions import teacher_forced
from interp_kit.loading import Models
from interp_kit.patching.memory import check_memory
from interp_kit.patching.positions import Positions, corresponding, named_segment
from interp_kit.patching.recording import (
    UNPATCHED,
    PatchSet,
    Place,
    Recording,
    Source,
    record,
    recorded,
)
from interp_kit.patching.sweep import Sweep
from interp_kit.prompts import Prompt, Sign
from interp_kit.readout import project_heads

Metric = Literal["decision", "kl"]
Replacement = Literal["zero", "mean"]
SAME = 0.01  # nats: target and source are alike, there is nothing to carry over


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What patches do to one prompt: ``values(rows)``.

    ``baseline`` and ``source`` are the unpatched values of the run that is patched and of the run
    that is copied from. Decisions are in nats; the metric "kl" is the divergence in nats of the
    next-token distribution where the answers part from that of the unpatched run.
    """

    prompt: Prompt
    metric: Metric
    baseline: float
    source: float
    _readings: "list[_Reading]"
    _switch: Callable[[], object] = lambda: None  # to the target, where a bridge serves several

    def values(
        self, rows: Sequence[PatchSet], *, base: PatchSet = UNPATCHED, start: int | None = None
    ) -> Float[Tensor, "row"]:
        """The base's value, then each row's. A row is a set of patches, ``base`` not included.

        ``start`` computes every row from that position on, even where nothing can change.
        """
        self._switch()
        parts = [reading.values(rows, base=base, start=start) for reading in self._readings]
        return torch.stack(parts).sum(0)


def counterfactual_experiment(
    bridge: TransformerBridge,
    prompt: Prompt,
    places: Sequence[Place],
    *,
    metric: Metric = "decision",
    positions: Positions = "all",
) -> Experiment:
    """Activations of the prompt's counterfactual, written into the run on the prompt.

    With ``positions`` "decision" or "segments" the two may differ in length: positions correspond
    from the end, or segment by segment.

    Raises ``InputError`` for a prompt without counterfactual, or with one whose positions do not
    correspond.
    """
    index = corresponding(prompt, positions)
    source_prompt = prompt.swapped()
    readings = []
    for sequence in _sequences(prompt, metric):
        check_memory(bridge, length=len(sequence.tokens))
        tail = sequence.tokens[len(prompt.tokens) :]
        ours = recorded(bridge, sequence.tokens, places, read=sequence.read)
        theirs = recorded(bridge, source_prompt.tokens + tail, places, read=sequence.read)
        at = [*index, *range(len(source_prompt.tokens), len(source_prompt.tokens) + len(tail))]
        values = {place: _moved(theirs, ours, place, at) for place in places}
        source = Source(values=values, head_shift={})
        key = bridge, sequence.tokens, source_prompt.tokens + tail, tuple(at), sequence.read
        readings.append(_reading(bridge, sequence, ours, source, theirs, metric, key=key))
    return _experiment(prompt, metric, readings)


def cross_model_experiment(
    models: Models,
    source: str,
    target: str,
    prompt: Prompt,
    places: Sequence[Place],
    *,
    metric: Metric = "decision",
    positions: Positions = "all",
) -> Experiment:
    """Activations of model ``source`` on the prompt, written into model ``target`` on it.

    A head is moved with what it *writes*: where the two differ in the output projection, z alone
    would leave that part of the fine-tune behind. So all heads and MLPs together make the target
    the source.

    Raises ``InputError`` if the two are not fine-tunes of one base.
    """
    models.require_one_base(source, target)
    sequences = _sequences(prompt, metric)
    bridge = models.switch(source)
    theirs, written = [], []
    for sequence in sequences:
        check_memory(bridge, length=len(sequence.tokens))
        theirs.append(record(bridge, sequence.tokens, places, read=sequence.read))
        tail = _tail(prompt, sequence, positions)
        written.append(_written_by_heads(bridge, theirs[-1], tail))
    bridge = models.switch(target)
    readings = []
    for sequence, recording, own in zip(sequences, theirs, written):
        ours = record(bridge, sequence.tokens, places, read=sequence.read)
        tail = _tail(prompt, sequence, positions)
        here = _written_by_heads(bridge, recording, tail)
        shift = {layer: own[layer] - here[layer] for layer in own}
        shift = {layer: value for layer, value in shift.items() if bool(value.any())}
        moved = Source(values=recording.activations, head_shift=shift)
        readings.append(_reading(bridge, sequence, ours, moved, recording, metric))
    made = _experiment(prompt, metric, readings)
    return replace(made, _switch=lambda: models.switch(target))


def ablation_experiments(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    places: Sequence[Place],
    *,
    replacement: Replacement,
    metric: Metric = "decision",
) -> list[Experiment]:
    """Zero, or the mean over all prompts' positions but the first, written into each prompt.

    The source's value is missing (NaN): no run has these activations. With one kind of prompt the
    mean still holds what these prompts share.
    """
    means = _means(bridge, prompts, places) if replacement == "mean" else {}
    experiments = []
    for prompt in prompts:
        readings = []
        for sequence in _sequences(prompt, metric):
            check_memory(bridge, length=len(sequence.tokens))
            ours = record(bridge, sequence.tokens, places, read=sequence.read)
            values = {
                place: means[place].expand_as(kept) if means else torch.zeros_like(kept)
                for place, kept in ours.activations.items()
            }
            source = Source(values=values, head_shift={})
            readings.append(_reading(bridge, sequence, ours, source, None, metric))
        experiments.append(_experiment(prompt, metric, readings))
    return experiments


def embedding_deviation(bridge: TransformerBridge, prompts: Sequence[Prompt], name: str) -> float:
    """Standard deviation of the token embeddings of the segment ``name``, over all prompts.

    Over all their coordinates together; embeddings as they enter the residual stream: scaled where
    the model scales them, without position embeddings.

    Raises ``InputError`` for a prompt without that segment.
    """
    ids = [
        prompt.tokens[pos] for prompt in prompts for pos in named_segment(prompt, name).positions
    ]
    with torch.no_grad():
        embeddings = bridge.embed(torch.tensor([ids], device=bridge.cfg.device))
    return float(embeddings.float().std(correction=0))


def noise_experiments(
    bridge: TransformerBridge,
    prompt: Prompt,
    places: Sequence[Place],
    *,
    segment: str,
    deviation: float,
    draws: int,
    seed: int,
) -> list[Experiment]:
    """The clean run's activations, written into ``draws`` runs with noise on the embeddings.

    Gaussian noise of standard deviation ``deviation`` is added to the token embeddings of the
    segment. ``baseline`` is the decision under the noise, ``source`` the clean one. The noise
    depends on ``seed`` and on the prompt's tokens alone.

    Raises ``InputError`` for a prompt without that segment.
    """
    at = list(named_segment(prompt, segment).positions)
    rng = np.random.default_rng([seed, *prompt.tokens])
    drawn = torch.from_numpy(rng.standard_normal((draws, len(at), bridge.cfg.d_model)) * deviation)
    clean = []
    for sequence in _sequences(prompt, "decision"):
        check_memory(bridge, length=len(sequence.tokens))
        recording = record(bridge, sequence.tokens, places, read=sequence.read)
        clean.append((sequence, recording, Source(values=recording.activations, head_shift={})))
    experiments = []
    for own in drawn:
        readings = []
        for sequence, recording, source in clean:
            noise = torch.zeros(len(sequence.tokens), bridge.cfg.d_model)
            noise[at] = own.float()
            during = partial(_noisy_embeddings, bridge, noise.to(recording.stream[0]))
            with during():
                noisy = record(bridge, sequence.tokens, places, read=sequence.read)
            reading = _reading(bridge, sequence, noisy, source, recording, "decision")
            readings.append(replace(reading, during=during))
        experiments.append(_experiment(prompt, "decision", readings))
    return experiments


def identity_experiment(
    bridge: TransformerBridge, prompt: Prompt, places: Sequence[Place]
) -> Experiment:
    """The prompt's own activations written into itself: nothing may change."""
    readings = []
    for sequence in _sequences(prompt, "decision"):
        ours = recorded(bridge, sequence.tokens, places, read=sequence.read)
        source = Source(values=ours.activations, head_shift={})
        readings.append(_reading(bridge, sequence, ours, source, ours, "decision"))
    return _experiment(prompt, "decision", readings)


@dataclass(frozen=True, kw_only=True)
class _Sequence:
    """The prompt and an answer but for its last token; the last ``read`` positions are read."""

    tokens: tuple[int, ...]
    read: int
    answers: dict[Sign, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """What one sequence adds to the value; the value is the sum over sequences."""

    sweep: Sweep
    ids: tuple[int, ...] | None  # the tokens whose logits suffice
    score: Callable[[Tensor], Tensor]  # logits [row read token] -> [row]
    source: float
    during: Callable[[], AbstractContextManager[None]] = nullcontext  # what corrupts every row

    def values(self, rows: Sequence[PatchSet], *, base: PatchSet, start: int | None) -> Tensor:
        with self.during():
            return self.score(self.sweep.logits(rows, base=base, ids=self.ids, start=start))


def _experiment(prompt: Prompt, metric: Metric, readings: list[_Reading]) -> Experiment:
    baseline = sum(float(r.values([], base=UNPATCHED, start=None)[0]) for r in readings)
    source = sum(r.source for r in readings)
    return Experiment(
        prompt=prompt, metric=metric, baseline=baseline, source=source, _readings=readings
    )


@contextmanager
def _noisy_embeddings(
    bridge: TransformerBridge, noise: Float[Tensor, "pos d_model"]
) -> Iterator[None]:
    """Inside, ``noise`` is added to token embeddings; a suffix of the positions gets its own."""
    handle = bridge.embed.register_forward_hook(
        lambda module, args, embeddings: embeddings + noise[-embeddings.shape[1] :]
    )
    try:
        yield
    finally:
        handle.remove()


def _sequences(prompt: Prompt, metric: Metric) -> list[_Sequence]:
    if metric == "kl":
        return [_Sequence(tokens=prompt.branch, read=1, answers={})]
    return [
        _Sequence(
            tokens=tuple(forced.tokens[0].tolist()),
            read=1 if prompt.one_branch else next(iter(forced.answers.values())).shape[1],
            answers={sign: tuple(ids[0].tolist()) for sign, ids in forced.answers.items()},
        )
        for forced in teacher_forced([prompt])
    ]


def _reading(
    bridge: TransformerBridge,
    sequence: _Sequence,
    target: Recording,
    source: Source,
    source_run: Recording | None,
    metric: Metric,
    *,
    key: Hashable = None,
) -> _Reading:
    sweep = Sweep(bridge, target, source, read=sequence.read, key=key)
    ids = None
    if metric == "kl":
        score = _divergence_from(target.logits.cpu())
    elif len(sequence.answers) == 2:  # one branch: the normaliser cancels
        ids = (sequence.answers["positive"][-1], sequence.answers["negative"][-1])
        score = _difference
    else:
        score = _log_probability(sequence.answers)
    at_source = float("nan")
    if source_run is not None:
        logits = source_run.logits[-sweep.read :].cpu()
        at_source = float(score((logits if ids is None else logits[:, list(ids)])[None]))
    return _Reading(sweep=sweep, ids=ids, score=score, source=at_source)


def _difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 0] - logits[:, -1, 1]


def _log_probability(answers: dict[Sign, tuple[int, ...]]) -> Callable[[Tensor], Tensor]:
    ((sign, ids),) = answers.items()

    def score(logits: Tensor) -> Tensor:
        log_p = logits[:, -len(ids) :].log_softmax(-1)
        total = log_p[:, range(len(ids)), list(ids)].sum(-1)
        return total if sign == "positive" else -total

    return score


def _divergence_from(unpatched: Tensor) -> Callable[[Tensor], Tensor]:
    log_p = unpatched[-1].log_softmax(-1)

    def score(logits: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - logits[:, -1].log_softmax(-1))).sum(-1)

    return score


def _moved(theirs: Recording, ours: Recording, place: Place, index: list[int]) -> Tensor:
    """The source's activations at the target's positions; the target's own where none is."""
    at = torch.tensor(index)
    values = theirs.activations[place][at.clamp(min=0)]
    values[at < 0] = ours.activations[place][at < 0]
    return values


def _tail(prompt: Prompt, sequence: _Sequence, positions: Positions) -> range:
    """The positions at which heads may be patched, up to the end."""
    first = len(prompt.branch) - 1 if positions == "decision" else 0
    return range(first, len(sequence.tokens))


def _means(
    bridge: TransformerBridge, prompts: Sequence[Prompt], places: Sequence[Place]
) -> dict[Place, Tensor]:
    """Over all prompts and positions; the first position is unlike all others, and left out."""
    totals: dict[Place, Tensor] = {}
    count = 0
    for prompt in prompts:
        recording = record(bridge, prompt.branch, places)
        count += recording.length - 1
        for place, kept in recording.activations.items():
            totals[place] = totals.get(place, 0) + kept[1:].sum(0)
    return {place: total / count for place, total in totals.items()}


def _written_by_heads(
    bridge: TransformerBridge, recording: Recording, positions: Sequence[int]
) -> dict[int, Float[Tensor, "pos head d_model"]]:
    """Layer -> what its heads write for the recorded ``z``, by the bridge's own projection."""
    return {
        layer: project_heads(bridge, layer, z[list(positions)])
        for (site, layer), z in recording.activations.items()
        if site == "z"
    }
