"""One prompt, one run to patch and one source of activations: then any patch set has a value.

``counterfactual_experiment``: the source is another prompt. ``cross_model_experiment``: another
model on the same prompt. ``ablation_experiments``: no run (zero, or a mean).
``noise_experiments``: the clean run, written into runs whose embeddings are noisy. Activation
patching asks for one patch at a time, causal tracing for windows of layers, circuits for any sets.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.decisions import AnswerSequence
from interp_kit.loading import Models
from interp_kit.patching.memory import check_memory
from interp_kit.patching.patches import (
    EMBEDDING,
    UNPATCHED,
    Patch,
    PatchSet,
    Place,
    unit_patches,
)
from interp_kit.patching.positions import Positions, corresponding, named_segment, position_sets
from interp_kit.patching.recording import Recording, SourceValues, moved, record, recorded
from interp_kit.patching.scores import Metric, Score, read_sequences, score_of
from interp_kit.patching.sweep import Sweep
from interp_kit.prompts import Prompt
from interp_kit.readout import project_heads
from interp_kit.specs import InputError

Replacement = Literal["zero", "mean"]
Inputs = Literal["source", "target"]  # whose stream the source's components are given
Context = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True)
class PatchedSequence:
    """One sequence of tokens whose logits add to an experiment's value, and how they do.

    ``context`` is entered around every forward pass: what makes the target run what it is beyond
    its tokens (noise on the embeddings, an adapter).
    """

    sweep: Sweep
    score: Score
    context: Context = nullcontext

    def values(
        self, patch_sets: Sequence[PatchSet], *, base: PatchSet, start: int | None
    ) -> Float[Tensor, "row"]:
        """The score with ``base`` alone, then with each patch set."""
        with self.context():
            logits = self.sweep.logits(patch_sets, base=base, ids=self.score.ids, start=start)
        return self.score(logits)

    def value_of(self, run: Recording) -> Float[Tensor, ""]:
        """The score of a run as it was recorded."""
        logits = run.logits.cpu()
        return self.score((logits if self.score.ids is None else logits[:, self.score.ids])[None])[
            0
        ]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What patches do to one prompt: ``values(patch_sets)``.

    ``baseline`` and ``source_value`` are the values of the unpatched target run and of the source
    run (NaN if there is none). The metric "decision" is in nats, positive for the answer that the
    scenario names positive; "kl" is the divergence in nats of the next-token distribution where
    the answers part from that of the unpatched run. Either is a sum over ``sequences``. ``where``
    are the positions at which a patch is written that names none itself, ``None`` all.
    """

    prompt: Prompt
    metric: Metric
    baseline: float
    source_value: float
    sequences: tuple[PatchedSequence, ...]
    where: tuple[int, ...] | None = None

    def values(
        self,
        patch_sets: Sequence[PatchSet],
        *,
        base: PatchSet = UNPATCHED,
        start: int | None = None,
    ) -> Float[Tensor, "row"]:
        """The value with ``base`` alone, then with each patch set.

        A patch set that has ``base``'s patches names them, too: ``base`` only says from which
        patches to start, and many sets that are nearly equal to it cost less. ``start`` computes
        every set from that position on, even where nothing can change.
        """
        if self.where is not None:
            base, *patch_sets = (_placed(patches, self.where) for patches in (base, *patch_sets))
        parts = [s.values(patch_sets, base=base, start=start) for s in self.sequences]
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
    other = prompt.swapped().tokens
    sequences, sources = [], []
    for sequence in read_sequences(prompt, metric):
        check_memory(bridge, length=len(sequence.tokens))
        forced = sequence.tokens[len(prompt.tokens) :]
        target_run = recorded(bridge, sequence.tokens, places, read=sequence.read)
        again = {"read": sequence.read, "like": target_run}
        source_run = recorded(bridge, other + forced, places, **again)
        at = [*index, *range(len(other), len(other) + len(forced))]
        ours, theirs = target_run.activations, source_run.activations
        source = SourceValues(
            values={place: moved(theirs[place], ours[place], at) for place in places},
            entering=moved(source_run.stream[0], target_run.stream[0], at),
        )
        key = bridge, sequence.tokens, other + forced, tuple(at), sequence.read
        sequences.append(_patched(bridge, sequence, target_run, source, key=key))
        sources.append(source_run)
    return _experiment(prompt, metric, sequences, sources)


def cross_model_experiment(
    models: Models,
    source: str,
    target: str,
    prompt: Prompt,
    places: Sequence[Place],
    *,
    metric: Metric = "decision",
    positions: Positions = "all",
    inputs: Inputs = "source",
) -> Experiment:
    """Activations of model ``source`` on the prompt, written into model ``target`` on it.

    A head is moved with what it *writes*: where the two differ in the output projection, z alone
    would leave that part of the fine-tune behind. So for adapters on one base all heads and MLPs
    together make the target the source. Whole weights also differ in the embedding, which can be
    moved too (``components_between``), in the norms and biases after attention, which belong to no
    head, and in the final norm and the unembedding: these read the target's stream, and are its
    own.

    ``inputs`` "target": what the source's components make of the *target's* residual stream, rather
    than of their own. What differs then is what their own weights change, and a component whose
    weights are the same changes nothing, exactly; of a stream no such patch exists.

    A patch that names no positions is written at all of those that ``positions`` means: where the
    answers part, or in every named segment.

    Raises ``InputError`` unless the two are of one architecture and vocabulary, and for a place of
    the residual stream with ``inputs`` "target".
    """
    models.require_comparable(source, target)
    asked = read_sequences(prompt, metric)
    bridge = models.switch(source)
    source_runs = []
    for sequence in asked:
        check_memory(bridge, length=len(sequence.tokens))
        source_runs.append(recorded(bridge, sequence.tokens, places, read=sequence.read))
    moved_runs, target_runs = source_runs, []
    if inputs == "target":
        target_runs = _recorded_alike(models.switch(target), asked, places)
        bridge = models.switch(source)
        moved_runs = [
            record(bridge, sequence.tokens, places, read=sequence.read, inputs=run)
            for sequence, run in zip(asked, target_runs)
        ]
    tails = [_tail(prompt, sequence, positions) for sequence in asked]
    written_there = [_written_by_heads(bridge, *own) for own in zip(moved_runs, tails)]
    bridge = models.switch(target)
    if inputs == "source":
        target_runs = [recorded(bridge, s.tokens, places, read=s.read) for s in asked]
    sequences = []
    for i, sequence in enumerate(asked):
        written, here = written_there[i], _written_by_heads(bridge, moved_runs[i], tails[i])
        shift = {layer: written[layer] - here[layer] for layer in written}
        shift = {layer: value for layer, value in shift.items() if bool(value.any())}
        values = SourceValues(values=moved_runs[i].activations, head_shift=shift)
        context = partial(_computing_as, models, target)
        key = "from", source, sequence.tokens, positions, sequence.read, inputs
        target_run = target_runs[i]
        sequences.append(_patched(bridge, sequence, target_run, values, key=key, context=context))
    experiment = _experiment(prompt, metric, sequences, source_runs)
    if positions not in ("decision", "segments"):
        return experiment
    at = {pos for _, own in position_sets(prompt, positions) for pos in own or ()}
    return replace(experiment, where=tuple(sorted(at)))


def components_between(models: Models, pairs: Iterable[Sequence[str]]) -> list[Patch]:
    """Every head and MLP of these models; the embedding too, where some pair shares no base.

    The embedding is what enters the first block, position embeddings included: ``L0_RESID_PRE``.
    """
    pairs = list(pairs)
    heads_and_mlps = unit_patches(models.switch(pairs[0][1]), "component")
    shared = all(models.shares_base(*pair) for pair in pairs)
    return heads_and_mlps if shared else [EMBEDDING, *heads_and_mlps]


def ablation_experiments(
    bridge: TransformerBridge,
    prompts: Sequence[Prompt],
    places: Sequence[Place],
    *,
    replacement: Replacement,
    metric: Metric = "decision",
) -> list[Experiment]:
    """Zero, or the mean over all prompts' positions but the first, written into each prompt.

    ``source_value`` is missing (NaN): no run has these activations. With one kind of prompt the
    mean still holds what these prompts share.
    """
    means = _means(bridge, prompts, places) if replacement == "mean" else {}
    experiments = []
    for prompt in prompts:
        sequences = []
        for sequence in read_sequences(prompt, metric):
            check_memory(bridge, length=len(sequence.tokens))
            target_run = record(bridge, sequence.tokens, places, read=sequence.read)
            values = {
                place: means[place].expand_as(kept) if means else torch.zeros_like(kept)
                for place, kept in target_run.activations.items()
            }
            sequences.append(_patched(bridge, sequence, target_run, SourceValues(values=values)))
        experiments.append(_experiment(prompt, metric, sequences, None))
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
    segment. ``baseline`` is the decision under the noise, ``source_value`` the clean one. The noise
    depends on ``seed`` and on the prompt's tokens alone.

    Raises ``InputError`` for a prompt without that segment.
    """
    at = list(named_segment(prompt, segment).positions)
    rng = np.random.default_rng([seed, *prompt.tokens])
    drawn = torch.from_numpy(rng.standard_normal((draws, len(at), bridge.cfg.d_model)) * deviation)
    asked = read_sequences(prompt, "decision")
    clean = []
    for sequence in asked:
        check_memory(bridge, length=len(sequence.tokens))
        clean.append(record(bridge, sequence.tokens, places, read=sequence.read))
    experiments = []
    for own in drawn:
        sequences = []
        for sequence, recording in zip(asked, clean):
            noise = torch.zeros(len(sequence.tokens), bridge.cfg.d_model)
            noise[at] = own.float()
            context = partial(_noisy_embeddings, bridge, noise.to(recording.stream[0]))
            with context():
                noisy = record(bridge, sequence.tokens, places, read=sequence.read)
            source = SourceValues(values=recording.activations)
            sequences.append(_patched(bridge, sequence, noisy, source, context=context))
        experiments.append(_experiment(prompt, "decision", sequences, clean))
    return experiments


def identity_experiment(
    bridge: TransformerBridge, prompt: Prompt, places: Sequence[Place]
) -> Experiment:
    """The prompt's own activations written into itself: nothing may change."""
    sequences, sources = [], []
    for sequence in read_sequences(prompt, "decision"):
        own_run = recorded(bridge, sequence.tokens, places, read=sequence.read)
        source = SourceValues(values=own_run.activations)
        sequences.append(_patched(bridge, sequence, own_run, source))
        sources.append(own_run)
    return _experiment(prompt, "decision", sequences, sources)


# ------------------------------------------------------------------------------------- internals
def _recorded_alike(
    bridge: TransformerBridge, asked: Sequence[AnswerSequence], places: Sequence[Place]
) -> list[Recording]:
    """Runs for what another model is to make of them: each one pass, whatever was recorded before.

    Then equal weights give equal bits, and what is equal is known to change nothing.
    """
    if stream := next((site for site, _ in places if site.startswith("resid")), None):
        raise InputError(
            f"{stream!r} is a stream, and no component makes it; with inputs='target' patch heads, "
            "MLPs or neurons"
        )
    attention: list[Place] = [("attn_out", layer) for layer in range(bridge.cfg.n_layers)]
    return [record(bridge, s.tokens, [*places, *attention], read=s.read) for s in asked]


def _placed(patches: PatchSet, where: tuple[int, ...]) -> PatchSet:
    return frozenset(replace(p, positions=where) if p.positions is None else p for p in patches)


def _patched(
    bridge: TransformerBridge,
    sequence: AnswerSequence,
    target: Recording,
    source: SourceValues,
    *,
    key: Hashable = None,
    context: Context = nullcontext,
) -> PatchedSequence:
    sweep = Sweep(bridge, target, source, read=sequence.read, key=key)
    return PatchedSequence(sweep=sweep, score=score_of(sequence, target.logits), context=context)


def _experiment(
    prompt: Prompt,
    metric: Metric,
    sequences: Sequence[PatchedSequence],
    sources: Sequence[Recording] | None,
) -> Experiment:
    """``sources`` are the source's runs on the sequences, in the same order."""
    targets = [sequence.sweep.target for sequence in sequences]
    return Experiment(
        prompt=prompt,
        metric=metric,
        baseline=_value(sequences, targets),
        source_value=float("nan") if sources is None else _value(sequences, sources),
        sequences=tuple(sequences),
    )


def _value(sequences: Sequence[PatchedSequence], runs: Sequence[Recording]) -> float:
    """Summed as ``Experiment.values`` sums, so that what is not patched changes by exactly 0."""
    parts = [sequence.value_of(run) for sequence, run in zip(sequences, runs)]
    return float(torch.stack(parts).sum(0))


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


@contextmanager
def _computing_as(models: Models, name: str) -> Iterator[None]:
    models.switch(name)
    yield


def _tail(prompt: Prompt, sequence: AnswerSequence, positions: Positions) -> range:
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
