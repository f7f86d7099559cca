"""The sweep engine against one naive hooked forward pass a patch, on five architectures."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from interp_kit import batching
from interp_kit import passes as activations
from interp_kit.analyses.activation_patching import (
    ablation,
    activation_patching,
    contrast_patching,
    cross_model_patching,
    transplant_error,
)
from interp_kit.analyses.attribution_patching import attribution_patching
from interp_kit.analyses.causal_tracing import causal_trace
from interp_kit.controls import likely_pairs, with_other_answers
from interp_kit.decisions import decide
from interp_kit.loading import load_model, load_models
from interp_kit.patching import memory, plan, recording
from interp_kit.patching.experiments import counterfactual_experiment, cross_model_experiment
from interp_kit.patching.memory import check_memory
from interp_kit.patching.patches import Patch, find_patch, unit_patches
from interp_kit.patching.positions import first_difference
from interp_kit.patching.recording import record, recorded
from interp_kit.patching.sweep import Sweep
from interp_kit.prompts import encode
from interp_kit.specs import InputError
from tests.conftest import tiny_prompts
from tests.tiny import ARCHITECTURES, WORDS, save_tiny

NAMES = {
    "z": "attn.hook_z",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "neuron": "mlp.out.hook_in",
}
UNITS = ["component", "attn_out", "resid_pre", "resid_mid", "resid_post", "neuron"]
POSITIONS = ["all", "each", "decision", "segments"]


@pytest.fixture
def turn(request):
    """The architecture's number: options take turns over it, so that each meets every other."""
    params = request.node.callspec.params
    return ARCHITECTURES.index(params.get("tiny_bridge") or params["fine_tunes"])


@pytest.fixture(scope="module")
def bridge(tiny_folders):
    """One model, for what does not depend on the architecture."""
    return load_model(str(tiny_folders["llama"]), device="cpu")


def sampled(table, n=12):
    return table if len(table) <= n else table.sample(n, random_state=0)


def segmented(bridge):
    """A prompt whose counterfactual differs in its middle, with two named segments."""
    words = [WORDS[(7 * i) % 60] for i in range(20)]
    other = [*words[:9], WORDS[1], WORDS[2], *words[11:]]
    segments = {"middle": [" ".join(words[8:12]), " ".join(other[8:12])], "end": words[-1]}
    return encode(
        bridge,
        " " + " ".join(words),
        positive=" ba be",
        negative=" ba bi",
        counterfactual=" " + " ".join(other),
        segments=segments,
    )


def naive(bridge, prompt, row, source_cache, target_cache):
    """The decision by one whole forward pass, with one write at the patch's own place."""
    at = slice(None) if row.pos < 0 else [row.pos]
    if row.segment:
        at = list({s.name: s.positions for s in prompt.segments}[row.segment])
    kind = row.component.split("_", 1)[-1].lower() if "_" in row.component else "z"
    site = {"mlp": "mlp_out", "attn": "attn_out"}.get(kind, kind)
    site = "neuron" if row.neuron >= 0 else site
    if site == "resid_mid":  # = resid_pre + attn_out: the difference, put into attn_out
        name = f"blocks.{row.layer}.hook_attn_out"
        middle = source_cache[f"blocks.{row.layer}.hook_resid_mid"]
        value = middle - target_cache[f"blocks.{row.layer}.hook_resid_pre"]
    else:
        name = f"blocks.{row.layer}.{NAMES[site]}"
        value = source_cache[name]
    where = (0, at)
    if row.head >= 0:
        where = (0, at, row.head)
    if row.neuron >= 0:
        where = (0, at, row.neuron)

    def write(activation, hook):
        activation = activation.clone()
        activation[where] = value[where]
        return activation

    logits = bridge.run_with_hooks(torch.tensor([prompt.branch]), fwd_hooks=[(name, write)])[0, -1]
    positive, negative = prompt.branch_ids
    return float(logits[positive] - logits[negative])


@pytest.mark.parametrize("unit", UNITS)
def test_a_sweep_equals_one_forward_pass_a_patch(tiny_bridge, turn, unit):
    if unit == "neuron" and "Mixtral" in tiny_bridge.cfg.architecture:
        with pytest.raises(InputError, match=r"no blocks\.1\.mlp\.out\.hook_in"):
            unit_patches(tiny_bridge, "neuron", layer=1)
        return
    prompt = segmented(tiny_bridge)
    positions = POSITIONS[(turn + UNITS.index(unit)) % len(POSITIONS)]
    layer = 1 if unit == "neuron" else None
    table = activation_patching(
        tiny_bridge, [prompt], unit=unit, positions=positions, directions=["noise"], layer=layer
    )
    assert prompt.counterfactual is not None
    shared = prompt.shared
    _, source = tiny_bridge.run_with_cache(torch.tensor([prompt.counterfactual + shared]))
    _, target = tiny_bridge.run_with_cache(torch.tensor([prompt.branch]))
    sample = sampled(table)
    values = [naive(tiny_bridge, prompt, row, source, target) for row in sample.itertuples()]
    error = abs(sample.value.to_numpy() - values).max()
    assert error <= 1e-4
    assert abs(table.change).max() > 1e-3


def test_many_answers_and_kl_agree_with_a_sweep_by_hand(tiny_bridge):
    """Answers that part early, or differ in length, are read over several positions."""
    prompts = tiny_prompts(tiny_bridge)
    for prompt in prompts:
        experiment = counterfactual_experiment(tiny_bridge, prompt, [("resid_pre", 0)])
        swapped = decide(tiny_bridge, [prompt, prompt.swapped()]).value
        assert experiment.baseline == pytest.approx(swapped[0], abs=1e-4)
        assert experiment.source_value == pytest.approx(swapped[1], abs=1e-4)
        whole = frozenset([Patch(layer=0, site="resid_pre")])
        assert float(experiment.values([whole])[1]) == pytest.approx(swapped[1], abs=1e-4)
        divergence = counterfactual_experiment(tiny_bridge, prompt, [("resid_pre", 0)], metric="kl")
        logits = [
            tiny_bridge(torch.tensor([p.branch]))[0, -1].log_softmax(-1)
            for p in (prompt, prompt.swapped())
        ]
        expected = float((logits[0].exp() * (logits[0] - logits[1])).sum())
        assert divergence.baseline == 0
        assert divergence.source_value == pytest.approx(expected, abs=1e-5)
        assert float(divergence.values([whole])[1]) == pytest.approx(expected, abs=1e-5)


def test_sets_of_patches_and_a_base_that_carries_one(tiny_bridge):
    """Adding to a base, leaving out of it, and computing the sets from scratch are the same."""
    prompt = segmented(tiny_bridge)
    candidates = unit_patches(tiny_bridge, "component")
    places = [p.place for p in candidates]
    experiment = counterfactual_experiment(tiny_bridge, prompt, places)
    generator = np.random.default_rng(0)
    base = frozenset(candidates[i] for i in generator.choice(len(candidates), 5, replace=False))
    rows = [base ^ {candidate} for candidate in candidates] + [base, frozenset()]
    carried = experiment.values(rows, base=base)
    alone = experiment.values([base, *rows])[1:]
    assert carried.numpy() == pytest.approx(alone.numpy(), abs=1e-5)
    assert float(carried[-1]) == pytest.approx(experiment.baseline, abs=1e-5)
    everything = frozenset(candidates)
    assert float(experiment.values([everything])[1]) != pytest.approx(experiment.baseline, abs=1e-2)


def test_small_chunks_change_nothing(tiny_bridge, turn, monkeypatch):
    how = {"positions": ["all", "decision"][turn % 2], "directions": ["noise"]}
    prompt = segmented(tiny_bridge)
    whole = activation_patching(tiny_bridge, [prompt], **how)
    monkeypatch.setattr(memory, "CHUNK_TOKENS", {"cpu": 1})
    small = activation_patching(tiny_bridge, [prompt], **how)
    assert small.value.to_numpy() == pytest.approx(whole.value.to_numpy(), abs=1e-5)


@pytest.fixture
def passes(monkeypatch):
    """(first position, rows) of every pass of a sweep."""
    made, run = [], Sweep._run

    def counted(self, one, before_unembedding):
        made.append((one.start, len(one.asked)))
        return run(self, one, before_unembedding)

    monkeypatch.setattr(Sweep, "_run", counted)
    return made


def test_packed_rows_equal_a_batch(tiny_bridge, monkeypatch, passes):
    prompt = segmented(tiny_bridge)
    packed = activation_patching(tiny_bridge, [prompt], positions="decision")
    assert max(rows for _, rows in passes) > 8
    for name, value in (("PACKED_TOKENS", 8), ("PACKED", 0)):
        monkeypatch.setattr(plan, name, value)
        passes.clear()
        other = activation_patching(tiny_bridge, [prompt], positions="decision")
        assert packed.value.to_numpy() == pytest.approx(other.value.to_numpy(), abs=1e-5)
        assert (max(rows for _, rows in passes) > 8) == (name == "PACKED")


def test_passes_of_few_rows_are_made_together(bridge, monkeypatch, passes):
    prompt = segmented(bridge)

    def sweep():
        passes.clear()
        table = activation_patching(bridge, [prompt], unit="resid_pre", positions="each")
        return table, [start for start, _ in passes]

    together, starts = sweep()
    monkeypatch.setattr(batching, "CALL_FLOPS", {"cpu": 0})
    apart, starts_apart = sweep()
    first = first_difference(prompt)
    assert starts == [first, first]  # one in each direction: these models are tiny
    assert starts_apart == list(range(first, len(prompt.branch))) * 2
    assert together.value.to_numpy() == pytest.approx(apart.value.to_numpy(), abs=1e-5)


def test_rows_join_a_pass_only_where_that_costs_less():
    groups = {3: [0, 1], 5: [2, 3], 6: [4, 5, 6], 9: [7]}
    assert plan.merged_groups(groups, 0) == groups
    assert plan.merged_groups(groups, 4) == {3: [0, 1, 2, 3], 6: [4, 5, 6, 7]}
    assert plan.merged_groups(groups, 9) == {3: list(range(8))}
    assert plan.merged_groups({}, 9) == {}


@pytest.mark.parametrize("replacement", ["zero", "mean"])
def test_ablation_writes_zero_or_the_mean(tiny_bridge, replacement):
    prompts = [segmented(tiny_bridge), *tiny_prompts(tiny_bridge)[:1]]
    table = ablation(tiny_bridge, prompts, replacement=replacement, unit="mlp_out")
    assert table.recovered_fraction.isna().all()
    name = "blocks.1.hook_mlp_out"
    runs = [tiny_bridge.run_with_cache(torch.tensor([p.branch]))[1][name][0] for p in prompts]
    mean = torch.cat([run[1:] for run in runs]).mean(0)
    value = mean if replacement == "mean" else torch.zeros_like(mean)
    prompt = prompts[0]
    logits = tiny_bridge.run_with_hooks(
        torch.tensor([prompt.branch]),
        fwd_hooks=[(name, lambda x, hook: value.expand_as(x).clone())],
    )[0, -1]
    expected = float(logits[prompt.branch_ids[0]] - logits[prompt.branch_ids[1]])
    row = table[(table.prompt == prompt.id) & (table.component == "L1_MLP")].iloc[0]
    assert row.value == pytest.approx(expected, abs=1e-4)
    assert abs(row.change) > 1e-3


def test_attribution_patching_is_the_slope_of_activation_patching(tiny_bridge):
    """A hundredth of the way to the source, the exact change is a hundredth of the estimate."""
    prompt = segmented(tiny_bridge)
    estimate = attribution_patching(tiny_bridge, [prompt], directions=["noise"])
    assert prompt.counterfactual is not None
    _, source = tiny_bridge.run_with_cache(torch.tensor([prompt.counterfactual + prompt.shared]))
    positive, negative = prompt.branch_ids
    step = 1e-2
    for row in sampled(estimate, 8).itertuples():
        site, at = ("attn.hook_z", (0, slice(None), row.head))
        if row.head < 0:
            site, at = "hook_mlp_out", (0,)
        name = f"blocks.{row.layer}.{site}"
        decision = []
        for by in (step, -step):

            def nudge(x, hook, by=by, at=at, name=name):
                x = x.clone()
                x[at] += by * (source[name][at] - x[at])
                return x

            batch = torch.tensor([prompt.branch])
            logits = tiny_bridge.run_with_hooks(batch, fwd_hooks=[(name, nudge)])[0, -1]
            decision.append(float(logits[positive] - logits[negative]))
        slope = (decision[0] - decision[1]) / (2 * step)
        assert row.change == pytest.approx(slope, abs=2e-3 + 0.02 * abs(slope)), row.component


# ----------------------------------------------------------------------------------- across models
@pytest.fixture(scope="module", params=ARCHITECTURES)
def fine_tunes(request, tiny_folders, tmp_path_factory):
    """Two random LoRA adapters on layers 1 and 2 of one base, every projection included."""
    folder, root = tiny_folders[request.param], tmp_path_factory.mktemp("adapters")
    linear = {
        "gpt2": ["c_attn", "c_proj", "c_fc"],
        "mixtral": ["q_proj", "v_proj", "o_proj"],
    }.get(request.param, ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=linear,
            layers_to_transform=[1, 2],
            init_lora_weights=False,
            fan_in_fan_out=request.param == "gpt2",
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        model.save_pretrained(root / name / "adapter")
        spec = {"base": str(folder), "adapter": "adapter"}
        (root / name / "model.yaml").write_text(yaml.safe_dump(spec))
    names = [str(root / "a"), str(root / "b")]
    return load_models([*names, str(folder)], device="cpu"), names


@pytest.mark.parametrize("unit", ["component", "attn_out", "resid_mid", "resid_post"])
def test_across_models_a_sweep_equals_one_forward_pass_a_patch(fine_tunes, turn, unit):
    models, (a, b) = fine_tunes
    positions = POSITIONS[(turn + UNITS.index(unit)) % len(POSITIONS)]
    prompt = segmented(models.switch(a))
    table = cross_model_patching(models, a, b, [prompt], unit=unit, positions=positions)
    tokens = torch.tensor([prompt.branch])
    bridge = models.switch(a)
    _, source = bridge.run_with_cache(tokens)
    written = {n: own_output(bridge, n, source) for n in range(3)}
    bridge = models.switch(b)
    _, target = bridge.run_with_cache(tokens)
    for row in sampled(table).itertuples():
        if row.head < 0:
            expected = naive(bridge, prompt, row, source, target)
        else:
            expected = with_head_output(bridge, prompt, row, written, target)
        assert row.value == pytest.approx(expected, abs=1e-4), row
    if unit == "component":
        assert (table[table.layer == 0].change == 0).all()  # no adapter there: exactly nothing
    assert abs(table.change).max() > 1e-3


def own_output(bridge, layer, cache):
    """What every head writes, [pos head d_model], by the whole weight of base and adapter."""
    project = bridge.blocks[layer].attn.o.original_component
    heads, size = cache[f"blocks.{layer}.attn.hook_z"].shape[-2:]
    basis = torch.eye(heads * size)
    weight = project(basis) - project(torch.zeros(1, heads * size))
    weight = weight.view(heads, size, -1)
    return torch.einsum("phk,hkd->phd", cache[f"blocks.{layer}.attn.hook_z"][0], weight)


def with_head_output(bridge, prompt, row, written, target_cache):
    """The decision when one head's output, not its z, is the source's."""
    at = slice(None) if row.pos < 0 else [row.pos]
    if row.segment:
        at = list({s.name: s.positions for s in prompt.segments}[row.segment])
    own = own_output(bridge, row.layer, target_cache)
    gained = written[row.layer][at, row.head] - own[at, row.head]

    def write(x, hook):
        x = x.clone()
        x[0, at] += gained
        return x

    name = f"blocks.{row.layer}.attn.o.hook_out"
    logits = bridge.run_with_hooks(torch.tensor([prompt.branch]), fwd_hooks=[(name, write)])[0, -1]
    return float(logits[prompt.branch_ids[0]] - logits[prompt.branch_ids[1]])


def test_a_model_into_itself_is_exactly_nothing(fine_tunes):
    models, (a, _) = fine_tunes
    prompts = tiny_prompts(models.switch(a))[:2]
    for unit in ("component", "resid_post"):
        table = cross_model_patching(models, a, a, prompts, unit=unit)
        assert (table.change == 0).all()
        assert not table.flipped.any()


def test_all_heads_and_mlps_together_make_the_target_the_source(fine_tunes):
    models, (a, b) = fine_tunes
    prompts = tiny_prompts(models.switch(a))[:2]
    assert transplant_error(models, a, b, prompts) <= 1e-4
    candidates = unit_patches(models.switch(a), "component")
    for prompt in prompts:
        experiment = cross_model_experiment(models, a, b, prompt, [c.place for c in candidates])
        own = decide(models.switch(a), [prompt]).value[0]
        assert experiment.source_value == pytest.approx(own, abs=1e-4)
        assert abs(experiment.source_value - experiment.baseline) > 1e-3


@pytest.mark.parametrize(("unit", "part"), [("attn_out", "attn"), ("component", "mlp")])
def test_own_weights_are_a_fine_tune_of_that_part_alone(fine_tunes, unit, part):
    """By PEFT, with all other factors of the adapter set to zero."""
    models, (a, _) = fine_tunes
    base = next(name for name in models if name != a and not models.specs[name].adapter)
    prompt = segmented(models.switch(a))
    table = cross_model_patching(models, a, base, [prompt], unit=unit, inputs="target")
    changes = table[table["head"] < 0].set_index("layer").change
    positive, negative = prompt.branch_ids
    for layer in (1, 2):
        plain = AutoModelForCausalLM.from_pretrained(base)
        tuned = PeftModel.from_pretrained(plain, f"{a}/adapter").eval()
        kept = 0
        for name, weight in tuned.named_parameters():
            own = re.search(rf"\.{layer}\.[\w.]*{part}", name) is not None
            kept += own and "lora_B" in name
            if "lora_B" in name and not own:
                weight.data.zero_()
        with torch.no_grad():
            logits = [tuned(torch.tensor([prompt.branch])).logits[0, -1]]
            with tuned.disable_adapter():
                logits.append(tuned(torch.tensor([prompt.branch])).logits[0, -1])
        after, before = (float(x[positive] - x[negative]) for x in logits)
        assert changes[layer] == pytest.approx(after - before, abs=1e-4)
        assert (changes[layer] == 0) == (not kept)  # a part without an adapter: exactly nothing
    assert changes[0] == 0


def test_a_stream_has_no_weights_of_its_own(fine_tunes):
    models, (a, b) = fine_tunes
    prompt = segmented(models.switch(a))
    with pytest.raises(InputError, match="'resid_mid' is a stream"):
        cross_model_patching(models, a, b, [prompt], unit="resid_mid", inputs="target")


# --------------------------------------------------------------------------------------- bad input
def test_a_patch_names_a_place_that_can_be():
    good: dict[str, Any] = {"layer": 0, "site": "mlp_out"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"layer": -1}, "a layer of 0 or more, got -1"),
        ({"head": 2}, "a head is patched at site 'z', got head=2 with site 'mlp_out'"),
        ({"neuron": 2}, "a neuron is patched at site 'neuron', got neuron=2"),
        ({"site": "z", "head": -1}, "a head of 0 or more, got -1"),
        ({"positions": (3, 2)}, r"ascending positions of 0 or more, each once; got \(3, 2\)"),
        ({"positions": (2, 2)}, "each once"),
        ({"positions": (-1,)}, "count from the first token"),
    ]
    for wrong, message in cases:
        with pytest.raises(InputError, match=message):
            Patch(**(good | wrong))


def test_different_architectures_are_refused(fine_tunes, tmp_path):
    models, (a, _) = fine_tunes
    architecture = ARCHITECTURES[
        ARCHITECTURES.index(models.switch(a).original_model.config.model_type) - 1
    ]
    other = save_tiny(architecture, tmp_path / "other", seed=1)
    mixed = load_models([a, str(other)], device="cpu")
    prompts = tiny_prompts(models.switch(a))
    with pytest.raises(InputError, match=f"model_type is .* and {architecture}; choose models"):
        cross_model_patching(mixed, a, str(other), prompts)
    with pytest.raises(InputError, match="was not loaded"):
        cross_model_patching(models, a, "nobody", prompts)


def test_lengths_matter_only_where_positions_must_correspond(bridge):
    prompt = segmented(bridge)
    assert prompt.counterfactual is not None
    longer = replace(prompt, counterfactual=(*prompt.counterfactual[:-1], 7, 8))
    with pytest.raises(InputError, match=r"\d+ tokens and its counterfactual \d+"):
        activation_patching(bridge, [longer])
    table = activation_patching(
        bridge, [longer], unit="resid_post", positions="decision", directions=["noise"]
    )
    last = table[table.layer == table.layer.max()].iloc[0]
    assert last.value == pytest.approx(last.source, abs=1e-4)  # the whole stream where it is read
    with pytest.raises(InputError, match="no segments"):
        activation_patching(bridge, tiny_prompts(bridge), positions="segments")
    with pytest.raises(InputError, match="no counterfactual"):
        activation_patching(bridge, [replace(prompt, counterfactual=None)])


def test_segments_may_stand_at_other_places_of_another_length(bridge):
    words = [WORDS[(7 * i) % 60] for i in range(12)]
    prompt = encode(
        bridge,
        " " + " ".join(words),
        positive=" da",
        negative=" fa",
        counterfactual=" " + " ".join(["ku", "ku", *words[:5], "bo", *words[6:]]),
        segments={"changed": [" ".join(words[4:7]), " ".join([words[4], "bo", words[6]])]},
    )
    (segment,) = prompt.segments
    assert [p + 2 for p in segment.positions] == list(segment.counterfactual)
    table = activation_patching(
        bridge, [prompt], unit="resid_pre", positions="segments", directions=["noise"]
    )
    _, source = bridge.run_with_cache(torch.tensor([prompt.counterfactual]))
    name = "blocks.1.hook_resid_pre"

    def write(x, hook):
        x = x.clone()
        x[0, list(segment.positions)] = source[name][0, list(segment.counterfactual)]
        return x

    logits = bridge.run_with_hooks(torch.tensor([prompt.tokens]), fwd_hooks=[(name, write)])
    expected = float(logits[0, -1, prompt.positive[0]] - logits[0, -1, prompt.negative[0]])
    assert table[table.layer == 1].value.item() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(InputError, match="expected equal numbers"):
        encode(
            bridge,
            " ba be",
            positive=" da",
            negative=" fa",
            counterfactual=" ba bi",
            segments={"x": ["ba", "ba bi"]},
        )


def test_what_does_not_exist_is_named(bridge):
    assert find_patch(bridge, "L2H3").component == "L2H3"
    with pytest.raises(InputError, match="unknown component 'L9H0'; expected L0H0 to L2H3"):
        find_patch(bridge, "L9H0")
    with pytest.raises(InputError, match="layer 7 does not exist; expected 0 to 2"):
        unit_patches(bridge, "head", layer=7)
    with pytest.raises(InputError, match="give layer="):
        unit_patches(bridge, "neuron")


def test_a_sweep_that_cannot_fit_says_so_before_it_starts(bridge, monkeypatch):
    monkeypatch.setattr(memory, "_available_bytes", lambda bridge: 2**10)
    monkeypatch.setattr(recording, "record", lambda *a, **k: pytest.fail("it started"))
    with pytest.raises(InputError, match=r"needs about .* GiB even with one patch"):
        activation_patching(bridge, [segmented(bridge)])
    monkeypatch.undo()
    check_memory(bridge, length=20)


# --------------------------------------------------------------------------- what is recorded once
@pytest.mark.parametrize("analysis", [activation_patching, attribution_patching, causal_trace])
def test_both_directions_share_two_recordings(bridge, monkeypatch, analysis):
    prompts = tiny_prompts(bridge)[:2]
    runs = []
    monkeypatch.setattr(recording, "record", lambda *a, **k: runs.append(1) or record(*a, **k))
    shared = analysis(bridge, prompts)
    n_shared = len(runs)
    runs.clear()
    with monkeypatch.context() as patched:
        patched.setattr(activations, "KEPT_BYTES", 0)
        apart = analysis(bridge, prompts)
    pd.testing.assert_frame_equal(shared, apart, rtol=1e-4, atol=1e-5)
    assert n_shared <= len(runs) / 2
    runs.clear()
    with activations.shared_passes():
        again = [analysis(bridge, prompts) for _ in range(2)]
    assert len(runs) == n_shared
    assert all(table.equals(shared) for table in again)


def test_a_beginning_that_two_prompts_share_is_run_once(tiny_bridge, monkeypatch):
    """The rest alone goes through the model, and what is recorded is that of the whole run."""
    bridge = tiny_bridge
    prompt = segmented(bridge)
    places = [patch.place for patch in unit_patches(bridge, "component")]
    first = record(bridge, prompt.tokens, places)
    lengths, run = [], bridge.run_with_hooks

    def watched(ids, **how):
        lengths.append(ids.shape[1])
        return run(ids, **how)

    monkeypatch.setattr(bridge, "run_with_hooks", watched)
    rest = record(bridge, prompt.swapped().tokens, places, like=first)
    whole = record(bridge, prompt.swapped().tokens, places)
    begun = first_difference(prompt)
    assert lengths == [len(prompt.tokens) - begun, len(prompt.tokens)]
    assert [x.shape for x in rest.keys_values[0]] == [x.shape for x in whole.keys_values[0]]
    pairs = [(rest.activations[place], whole.activations[place]) for place in places]
    for ours, theirs in [*pairs, *zip(rest.stream, whole.stream), (rest.logits, whole.logits)]:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a[:begun], b[:begun]) for a, b in zip(rest.stream, first.stream))
    same = record(bridge, prompt.tokens, places, like=first)  # the end is always read again
    torch.testing.assert_close(same.logits, first.logits, rtol=1e-4, atol=1e-5)


def test_other_answers_to_the_same_prompts_cost_no_further_pass(bridge, passes):
    prompts = [segmented(bridge)]
    pairs = likely_pairs(bridge, prompts, n=2)
    others = with_other_answers(prompts, pairs)
    alone = [activation_patching(bridge, given) for given in (prompts, others)]
    passes.clear()
    with activations.shared_passes():
        activation_patching(bridge, prompts)
        first = len(passes)
        shared = [activation_patching(bridge, given) for given in (prompts, others)]
        assert len(passes) == first
        activation_patching(bridge, prompts, positions="each")
        assert len(passes) > first
    for table, expected in zip(shared, alone):
        pd.testing.assert_frame_equal(table, expected, check_exact=True)
    assert not np.allclose(shared[1].value[: len(shared[0])], shared[0].value)
    passes.clear()
    with activations.shared_passes():
        activation_patching(bridge, prompts)
        first = len(passes)
        table = contrast_patching(bridge, prompts, pairs)
        assert len(passes) == first
    for draw, other in enumerate(others):
        own = activation_patching(bridge, [other])
        ours = table[table.draw == draw].set_index(["direction", "component"]).change
        theirs = own.set_index(["direction", "component"]).change
        assert ours[theirs.index].to_numpy() == pytest.approx(theirs.to_numpy(), abs=1e-5)


def test_recordings_are_let_go_when_they_are_too_many(bridge, monkeypatch):
    tokens = [p.tokens for p in tiny_prompts(bridge)[:2]]
    one = record(bridge, tokens[0], [("z", 0)]).bytes
    assert one > 0
    monkeypatch.setattr(activations, "KEPT_BYTES", int(1.5 * one))
    with activations.shared_passes():
        first = recorded(bridge, tokens[0], [("z", 0)])
        assert recorded(bridge, tokens[0], [("z", 0)]) is first
        recorded(bridge, tokens[1], [("z", 0)])
        assert recorded(bridge, tokens[0], [("z", 0)]) is not first
