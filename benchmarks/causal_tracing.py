"""How much faster is a causal trace than one forward pass a patch? What do shared passes save?

**The grid.** The residual stream before every block, what attention and what the MLP adds, at every
layer and position, from a counterfactual prompt: ``transformer_lens.patching``'s own
``get_act_patch_block_every``, a naive loop of one ``run_with_hooks`` a patch, and ``causal_trace``.
TransformerLens' grid has every position; the trace and the naive loop leave out those before the
prompts differ, where nothing can change (TransformerLens' values there are compared with the
unpatched run's). ``_difference`` is the largest |trace - loop| of the decision in nats. A loop that
would take over five minutes is run on evenly spaced patches, and its time scaled up (marked *).

**Shared passes.** Logit lens, direct logit attribution and a causal trace (what every layer writes
where the answers part, both directions) on the same prompts, one after the other, and the same
inside ``shared_passes``. There lens and attribution read one forward pass; the trace records its
own, once for both directions in either case. ``passes`` counts forward passes, those of sweeps
included, however many rows they have.

Times are wall seconds of one thread in float32, recording included: a forward pass is the median of
5; a trace the median of 3 after a warm-up, or a single one if it takes over 10 s. The model of 12
layers is random: time does not depend on what a model learned.
"""

import argparse
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.patching import (
    EFFECT,
    SAMPLE,
    SHIPPED,
    SLOW,
    machine,
    median_seconds,
    one_thread,
    random_prompt,
    save_random,
    timed,
)
from interp_kit import encode_scenario, load_model, load_scenario
from interp_kit.analyses.attribution import direct_logit_attribution
from interp_kit.analyses.causal_tracing import TraceSite, causal_trace
from interp_kit.analyses.lens import logit_lens
from interp_kit.passes import shared_passes
from interp_kit.prompts import Prompt

FULL = 300.0  # seconds: a loop that would take longer is run on a sample
SITES: tuple[TraceSite, ...] = ("resid_pre", "attn_out", "mlp_out")  # in TransformerLens' order
FUNCTIONS = {
    "resid_pre": patching.get_act_patch_resid_pre,
    "attn_out": patching.get_act_patch_attn_out,
    "mlp_out": patching.get_act_patch_mlp_out,
}
RANDOM, LENGTHS = "random-12", (50, 100)
PROMPTS = 8


def bridges(folder: Path) -> Iterator[tuple[str, TransformerBridge, list[list[Prompt]]]]:
    """Every model with lists of prompts; the first of each list is the one of its grid."""
    bridge = load_model(SHIPPED)
    yield SHIPPED, bridge, [encode_scenario(bridge, load_scenario("CC_temptation"))]
    bridge = load_model(str(save_random(RANDOM, folder / RANDOM)))
    yield RANDOM, bridge, [several(random_prompt(RANDOM, length)) for length in LENGTHS]


def several(prompt: Prompt) -> list[Prompt]:
    """The prompt, and others of its length that begin with another token."""
    first, tail = prompt.tokens[0], prompt.tokens[1:]
    theirs = (prompt.counterfactual or ())[1:]
    return [
        replace(prompt, id=str(i), tokens=(first + i, *tail), counterfactual=(first + i, *theirs))
        for i in range(PROMPTS)
    ]


# ---------------------------------------------------------------------------------------- the grid
def grid(model: str, bridge: TransformerBridge, prompt: Prompt) -> dict[str, Any]:
    """One row: the trace, both loops, and how far they agree."""
    tokens = torch.tensor([prompt.branch], device=bridge.cfg.device)
    source = torch.tensor([cast(tuple[int, ...], prompt.counterfactual) + prompt.shared])
    trace = partial(
        causal_trace, bridge, [prompt], sites=SITES, positions="each", directions=["noise"]
    )
    bridge(tokens)
    forward = median_seconds([lambda: bridge(tokens)] * 5)
    table, warm_up = timed(trace)
    seconds = median_seconds([trace] * (1 if warm_up > SLOW else 3))
    places = pd.MultiIndex.from_product(
        [SITES, range(bridge.cfg.n_layers), range(tokens.shape[1])], names=["site", "layer", "pos"]
    )
    traced = table.set_index(["site", "layer", "pos"]).value
    everywhere = traced.reindex(places).fillna(table.baseline[0]).reset_index()
    row = {
        "model": model,
        "layers": bridge.cfg.n_layers,
        "tokens": tokens.shape[1],
        "places": len(places),
        "traced": len(table),
        "forward_s": forward,
        "trace_s": seconds,
        "effect": float(table.change.abs().max()),
    }
    assert row["effect"] > EFFECT, f"{model}: no patch moves the decision; nothing to compare"
    metric = partial(decision, prompt)
    loops = {"tl": (transformer_lens_loop, everywhere), "naive": (naive_loop, table)}
    for name, (loop, whole) in loops.items():
        sample = evenly(whole, forward)
        (_, cache), recording = timed(partial(bridge.run_with_cache, source))
        values, looping = timed(partial(loop, bridge, tokens, cache, metric, sample))
        row[f"{name}_run"] = len(sample)
        row[f"{name}_s"] = recording + looping * len(whole) / len(sample)
        row[f"{name}_ratio"] = row[f"{name}_s"] / seconds
        row[f"{name}_difference"] = float(np.abs(values - sample.value).max())
    return row


def evenly(whole: pd.DataFrame, forward: float) -> pd.DataFrame:
    """All rows, or evenly spaced ones where all would take too long."""
    if len(whole) * forward <= FULL:
        return whole
    run = max(24, int(SAMPLE / forward))
    return whole.iloc[np.linspace(0, len(whole) - 1, run).round().astype(int)]


def decision(prompt: Prompt, logits: Tensor) -> Tensor:
    positive, negative = prompt.branch_ids
    return logits[0, -1, positive] - logits[0, -1, negative]


def transformer_lens_loop(
    bridge: TransformerBridge, tokens: Tensor, cache: Any, metric: Any, sample: pd.DataFrame
) -> np.ndarray:
    """Decisions by ``get_act_patch_block_every``; of a sample, by the functions that it wraps."""
    with redirect_stderr(io.StringIO()):  # its progress bars
        if len(sample) == len(SITES) * bridge.cfg.n_layers * tokens.shape[1]:
            every = patching.get_act_patch_block_every(bridge, tokens, cache, metric)
            return cast(Tensor, every).flatten().cpu().numpy()
        values = pd.Series(np.nan, index=sample.index)
        for site, part in sample.groupby("site"):
            how = {"index_axis_names": None, "index_df": part[["layer", "pos"]]}
            values[part.index] = (
                FUNCTIONS[str(site)](bridge, tokens, cache, metric, **how).cpu().numpy()
            )
    return values.to_numpy()


def naive_loop(
    bridge: TransformerBridge, tokens: Tensor, cache: Any, metric: Any, sample: pd.DataFrame
) -> np.ndarray:
    """Decisions by one ordinary hooked forward pass a patch."""
    values = []
    for site, layer, pos in sample[["site", "layer", "pos"]].itertuples(index=False):
        name = f"blocks.{layer}.hook_{site}"

        def write(x: Tensor, hook: object, name: str = name, pos: int = pos) -> Tensor:
            x = x.clone()
            x[0, pos] = cache[name][0, pos]
            return x

        values.append(float(metric(bridge.run_with_hooks(tokens, fwd_hooks=[(name, write)]))))
    return np.array(values)


# -------------------------------------------------------------------------------- three techniques
def techniques(
    model: str, bridge: TransformerBridge, prompts: Sequence[Prompt]
) -> Iterator[dict[str, Any]]:
    """One row for lens and attribution, and one for all three: apart, and in shared passes."""
    each = {
        "lens": partial(logit_lens, bridge, prompts),
        "attribution": partial(direct_logit_attribution, bridge, prompts),
        "trace": partial(causal_trace, bridge, prompts, sites=["block"], positions="decision"),
    }

    def run(names: Sequence[str], passes: Callable[[], Any]) -> list[pd.DataFrame]:
        with passes():
            return [each[name]() for name in names]

    for names in (["lens", "attribution"], list(each)):
        apart, shared = partial(run, names, nullcontext), partial(run, names, shared_passes)
        first, passes_apart = counted(bridge, apart)
        second, passes_shared = counted(bridge, shared)
        seconds = [(timed(apart)[1], timed(shared)[1]) for _ in range(5)]  # in turn: load is shared
        apart_s, shared_s = np.median(seconds, axis=0)
        yield {
            "model": model,
            "prompts": len(prompts),
            "techniques": " + ".join(names),
            "apart_passes": passes_apart,
            "shared_passes": passes_shared,
            "apart_s": apart_s,
            "shared_s": shared_s,
            "ratio": apart_s / shared_s,
            "difference": max((a.value - b.value).abs().max() for a, b in zip(first, second)),
        }


def counted(
    bridge: TransformerBridge, function: Callable[[], list[pd.DataFrame]]
) -> tuple[list[pd.DataFrame], int]:
    """The function's result, and how many forward passes it took."""
    calls: list[int] = []
    kind = type(bridge.embed)
    embed = kind.forward

    def counted_embed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return embed(*args, **kwargs)

    with patch.object(kind, "forward", counted_embed):  # with a hook on, no pass would be shared
        return function(), len(calls)


# -------------------------------------------------------------------------------------- the report
def claims(grids: pd.DataFrame, shared: pd.DataFrame) -> pd.DataFrame:
    """What this project says of itself, with the worst row that it is said of."""
    ratio = grids[grids.layers >= 12].tl_ratio.min()
    error = grids[["tl_difference", "naive_difference"]].max(axis=None)
    difference = shared.difference.max()
    rows = [
        ("grid of 12 layers: times TL", ratio, ">= 8", ratio >= 8),
        ("every grid: largest difference, nats", error, "<= 0.0001", error <= 1e-4),
        ("shared passes: largest difference", difference, "== 0", difference == 0),
    ]
    table = pd.DataFrame(rows, columns=["claim", "measured", "expected", "result"])
    return table.assign(result=table.result.map({True: "PASS", False: "FAIL"}))


def tidy(grids: pd.DataFrame) -> pd.DataFrame:
    """The grids as people read them; * marks what is scaled up from the patches that were run."""
    shown = grids.round({"forward_s": 4, "trace_s": 2})
    for loop, whole in (("tl", grids.places), ("naive", grids.traced)):
        mark = np.where(grids[f"{loop}_run"] < whole, "*", " ")
        for column in (f"{loop}_s", f"{loop}_ratio"):
            shown[column] = grids[column].map("{:.1f}".format) + mark
        shown[f"{loop}_difference"] = grids[f"{loop}_difference"].map("{:.1e}".format)
    return shown.assign(effect=grids.effect.map("{:.1e}".format)).drop(columns="layers")


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks.causal_tracing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Took 17 minutes on a busy machine. Run it in a checkout.",
    ).parse_args()
    one_thread()
    grids, shared = [], []
    with tempfile.TemporaryDirectory() as folder:
        for model, bridge, lists in bridges(Path(folder)):
            grids += [grid(model, bridge, prompts[0]) for prompts in lists]
            shared += techniques(model, bridge, lists[0])
    tables = {
        "Grids (seconds; * scaled up from the patches that were run)": tidy(pd.DataFrame(grids)),
        "Shared passes (median seconds of 5)": pd.DataFrame(shared),
        "Claims": claims(pd.DataFrame(grids), pd.DataFrame(shared)),
    }
    print("\n".join(f"{key}: {value}" for key, value in machine().items()))
    for title, table in tables.items():
        print(f"\n{title}\n{table.to_string(index=False, float_format='{:.4g}'.format)}")


if __name__ == "__main__":
    main()
