"""Many patched forward passes in one: the engine behind patching, causal tracing and circuits.

A *patch* writes a source's activation over the target's, at one place. Of a *patch set* the logits
are wanted, with all of its patches written at once. One ordinary hooked forward pass of the model
computes many patch sets, each a *row*, exactly:

- Nothing before the first position in which a row's patches change anything is computed again: its
  keys and values come from the recorded target run. Patches that write what is already there change
  nothing, and are not computed at all. Rows that begin a little later go into an earlier pass where
  that costs less than a pass of their own (``plan``).
- Nothing below a patched layer is computed again: the pass starts with one row, and block l appends
  a copy of it for every row that first differs from it in block l. Rows of few tokens stand as
  positions of one sequence (``packing``).
- The source is written on copies, place by place (``writes``).
- Only the positions that are read, and of a decision only the two answers, are unembedded.

Masks, rotary embeddings, norms, caps and expert routing stay the model's own.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from interp_kit.passes import once
from interp_kit.patching.packing import growing_batch, one_sequence
from interp_kit.patching.patches import UNPATCHED, PatchSet
from interp_kit.patching.plan import Differences, Pass, plan_passes
from interp_kit.patching.recording import Hooks, Recording, SourceValues
from interp_kit.patching.writes import writing_hooks
from interp_kit.readout import unembed


class Sweep:
    """One target run and one source: ``logits(patch_sets)`` patches it in any number of ways.

    ``read`` is how many positions at the end are read. ``key`` names the two runs: inside
    ``shared_passes`` no patch set of theirs is computed twice.
    """

    def __init__(
        self,
        bridge: TransformerBridge,
        target: Recording,
        source: SourceValues,
        *,
        read: int = 1,
        key: Hashable = None,
    ) -> None:
        self.bridge, self.target, self.source, self.read = bridge, target, source, read
        self._key = key
        self._differences = Differences(target, source)

    @torch.no_grad()
    def logits(
        self,
        patch_sets: Sequence[PatchSet],
        *,
        base: PatchSet = UNPATCHED,
        ids: tuple[int, ...] | None = None,
        start: int | None = None,
    ) -> Float[Tensor, "row read token"]:
        """Logits at the positions read: row 0 has the patches ``base``, row 1 + i those of set i.

        A patch set that has ``base``'s patches names them, too; a ``base`` that most sets share
        saves time and changes nothing else. ``ids`` keeps these tokens only; ``None`` the whole
        vocabulary. ``start`` computes every row from that position on, even where nothing can
        change: for measuring the numerical noise of the computation itself.
        """
        before_unembedding = ids is not None and self._unembeds_alike(ids)
        result = _tokens(self.target.logits, ids).expand(1 + len(patch_sets), -1, -1).clone()
        for planned, out in self._outputs(patch_sets, base, start, before_unembedding):
            if before_unembedding:
                assert ids is not None
                out = unembed(self.bridge, out, ids)
            else:
                out = _tokens(out, ids)
            out = _with_rows_left_out(out.float(), len(planned.patch_sets))
            result[[1 + i for i in planned.asked]] = out[int(planned.has_base_row) :]
            if base:
                result[0] = out[0]
        return result.cpu()

    # --------------------------------------------------------------------------------- internals
    def _outputs(
        self,
        patch_sets: Sequence[PatchSet],
        base: PatchSet,
        start: int | None,
        before_unembedding: bool,
    ) -> Iterable[tuple[Pass, Float[Tensor, "row read _"]]]:
        """Every pass with what ``_run`` makes of it."""

        def run() -> Iterator[tuple[Pass, Tensor]]:
            passes = plan_passes(self.bridge, self._differences, patch_sets, base=base, start=start)
            for planned in passes:
                yield planned, self._run(planned, before_unembedding)

        if self._key is None or not before_unembedding:
            return run()  # logits of the whole vocabulary are too many to keep
        key = "patched", self._key, tuple(patch_sets), base, start
        return once(
            self.bridge,
            key,
            lambda: [(planned, out.clone()) for planned, out in run()],  # no view of the whole pass
            lambda made: sum(out.nbytes for _, out in made),
        )

    def _unembeds_alike(self, ids: tuple[int, ...]) -> bool:
        """Whether unembedding these tokens alone gives what the model itself gives."""
        ours = unembed(self.bridge, self.target.final, ids)
        return torch.allclose(ours, self.target.logits[:, list(ids)], rtol=1e-5, atol=1e-5)

    def _run(self, planned: Pass, before_unembedding: bool) -> Float[Tensor, "row read _"]:
        """One forward pass: logits, or what would be unembedded; rows equal to row 0 left out."""
        final: list[Tensor] = []

        def last(x: Tensor, hook: object) -> Tensor:
            kept = x.reshape(-1, planned.length, x.shape[-1])[:, -self.read :].contiguous()
            final.append(kept)
            return kept[:1] if before_unembedding else kept

        hooks: Hooks = [*self._row_hooks(planned), ("unembed.hook_in", last)]
        packed = (
            one_sequence(self.bridge, planned, self.target.stream)
            if planned.packed
            else nullcontext()
        )
        with packed:
            logits = self.bridge.run_with_hooks(
                self.target.tokens[:, planned.start :],
                fwd_hooks=hooks,
                **self._cache(planned.start),
            )
        return final[0] if before_unembedding else logits

    def _row_hooks(self, planned: Pass) -> Hooks:
        """What makes rows, and patches them."""
        writes = writing_hooks(planned, self.source)
        if planned.packed:
            return writes
        hooks = [*growing_batch(planned, self.target.stream), *writes]
        return hooks if planned.writes_neurons else self._trimmed(hooks, planned.length)

    def _trimmed(self, hooks: Hooks, length: int) -> Hooks:
        """In the last block only what is read goes through the projections after attention.

        Zeros stand where nothing reads, so that shapes stay.
        """
        read, last = self.read, f"blocks.{self.bridge.cfg.n_layers - 1}"

        def trim(x: Tensor, hook: object) -> Tensor:
            return x[:, -read:].contiguous()  # some experts insist

        def pad(x: Tensor, hook: object) -> Tensor:
            return torch.nn.functional.pad(x, (0, 0, length - x.shape[1], 0))

        parts = [f"{last}.attn.o", f"{last}.mlp"]
        parts = [part for part in parts if f"{part}.hook_in" in self.bridge.hook_dict]
        before: Hooks = [(f"{part}.hook_out", pad) for part in parts]
        return [*before, *hooks, *((f"{part}.hook_in", trim) for part in parts)]

    def _cache(self, start: int) -> dict[str, Any]:
        """Keyword arguments by which a pass attends to what comes before ``start``."""
        if not self.target.keys_values:
            return {}
        cache = self.target.prefix(start)
        return {"use_cache": False} if cache is None else {"past_key_values": cache}


def _tokens(
    logits: Float[Tensor, "*row vocab"], ids: tuple[int, ...] | None
) -> Float[Tensor, "*row token"]:
    return logits if ids is None else logits[..., list(ids)]


def _with_rows_left_out(
    out: Float[Tensor, "row read _"], rows: int
) -> Float[Tensor, "all_rows read _"]:
    """Rows that were not computed equal row 0."""
    return torch.cat([out, out[:1].expand(rows - len(out), *out.shape[1:])])
