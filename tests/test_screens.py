"""Attribution patching as a screen: what it estimates, what it chooses, what it says it missed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from interp_kit.analyses.activation_patching import (
    activation_patching,
    cross_model_patching,
    evenly,
)
from interp_kit.analyses.attribution_patching import (
    attribution_patching,
    cross_model_attribution_patching,
    screen,
    screen_recall,
)
from interp_kit.loading import load_models
from interp_kit.patching.cost import sweep_cost
from interp_kit.patching.positions import aligned, check_positions
from interp_kit.specs import InputError
from tests.conftest import tiny_prompts


@pytest.mark.parametrize("which", [0, 1], ids=["shared start", "unequal lengths"])
def test_it_is_the_slope_of_the_whole_decision(tiny_bridge, which):
    prompt = tiny_prompts(tiny_bridge)[which]
    longest = max(prompt.positive, prompt.negative, key=len)
    table = attribution_patching(tiny_bridge, [prompt], unit="mlp_out", directions=["noise"])
    assert prompt.counterfactual is not None
    sources = {}
    for answer in (prompt.positive, prompt.negative):
        tokens = torch.tensor([prompt.counterfactual + answer[:-1]])
        sources[answer] = tiny_bridge.run_with_cache(tokens)[1]
    for row in table.itertuples():
        name, slope = f"blocks.{row.layer}.hook_mlp_out", 0.0
        for sign, answer in ((1, prompt.positive), (-1, prompt.negative)):
            alone = replace(prompt, positive=answer, negative=answer[:-1])
            towards = sources[answer][name][0]
            ends = [_log_p(tiny_bridge, alone, name, towards, by) for by in (1e-2, -1e-2)]
            slope += sign * (ends[0] - ends[1]) / 2e-2
        assert row.change == pytest.approx(slope, abs=2e-3 + 0.02 * abs(slope)), row.component
    assert table.change.abs().max() > 1e-3
    assert len(longest) > 1


def _log_p(bridge, prompt, name, towards, by):
    """log p of the positive answer, with one activation moved ``by`` towards the source's."""

    def nudge(x, hook):
        return x + by * (towards - x)

    tokens = torch.tensor([prompt.tokens + prompt.positive[:-1]])
    logits = bridge.run_with_hooks(tokens, fwd_hooks=[(name, nudge)])[0]
    log_p = logits.log_softmax(-1)[len(prompt.tokens) - 1 :]
    answer = list(prompt.positive)
    return float(log_p[range(len(answer)), answer].sum())


def test_integrated_gradients_add_up_along_the_way(tiny_bridge):
    """All of the embedding, moved at once: with many steps their sum is the change itself."""
    if "Mixtral" in tiny_bridge.cfg.architecture:
        pytest.skip("a token that is sent to another expert makes the decision jump")
    prompt = tiny_prompts(tiny_bridge)[2]
    options = {"unit": "resid_pre", "layer": 0, "directions": ["noise"]}
    exact = activation_patching(tiny_bridge, [prompt], **options).change.item()
    estimates = [
        attribution_patching(tiny_bridge, [prompt], steps=n, **options).change.item()
        for n in (0, 64)
    ]
    assert estimates[1] == pytest.approx(exact, abs=0.02 * abs(estimates[0] - exact) + 1e-3)


def test_a_prefix_that_both_runs_share_is_left_out(tiny_bridge):
    """The same estimates, whether or not the shared beginning is computed again."""
    prompt = tiny_prompts(tiny_bridge)[0]
    by_each = attribution_patching(
        tiny_bridge, [prompt], unit="mlp_out", positions="each", directions=["noise"]
    )
    whole = attribution_patching(tiny_bridge, [prompt], unit="mlp_out", directions=["noise"])
    summed = by_each.groupby("component").change.sum()
    rest = whole.set_index("component").change[summed.index]
    assert summed.to_numpy() == pytest.approx(rest.to_numpy(), abs=1e-4)


def test_across_models_small_adapters_are_estimated_exactly(tiny_folders, tmp_path):
    """Two LoRAs of which one is the other, every matrix B moved by a thousandth."""
    torch.manual_seed(0)
    folder, names = tiny_folders["llama"], [str(tmp_path / "a"), str(tmp_path / "b")]
    modules = ["q_proj", "v_proj", "o_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    for name in names:
        model.save_pretrained(f"{name}/adapter")
        spec = {"base": str(folder), "adapter": "adapter"}
        Path(name, "model.yaml").write_text(yaml.safe_dump(spec))
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    weight += 1e-3 * torch.randn_like(weight)
    models = load_models(names, device="cpu")
    prompts = tiny_prompts(models.switch(names[1]))
    itself = cross_model_attribution_patching(models, names[0], names[0], prompts)
    assert (itself.change == 0).all()
    first, second = names
    exact = cross_model_patching(models, first, second, prompts)
    estimated = cross_model_attribution_patching(models, first, second, prompts)
    largest = exact.change.abs().max()
    assert largest > 1e-3
    assert abs(exact.change - estimated.change).max() < 0.05 * largest


def changes(values):
    return pd.DataFrame(
        {"component": [f"c{i}" for i in range(len(values))], "change": np.asarray(values, float)}
    )


def test_the_screen_takes_the_largest_and_a_sample_of_the_rest():
    values = np.r_[np.arange(10), -np.arange(100, 110)]
    chosen = screen(changes(values), top=10, sample=3, seed=1)
    top = chosen[chosen.chosen == "screen"].component
    assert set(top) == {f"c{i}" for i in range(10, 20)}
    sample = chosen[chosen.chosen == "sample"].component
    assert len(sample) == 3
    assert not set(sample) & set(top)
    assert chosen.equals(screen(changes(values), top=10, sample=3, seed=1))


def test_recall_counts_what_the_sample_shows_to_be_missing():
    names = [f"c{i}" for i in range(100)]
    chosen = pd.DataFrame({"component": names[:50], "chosen": ["screen"] * 40 + ["sample"] * 10})
    exact = changes(np.r_[np.arange(40, 0, -1), np.zeros(10)])
    none = screen_recall(exact, chosen, components=100, strongest=20)
    assert none.value == 1.0
    assert 0.3 < none.low < 1.0  # ten of sixty say little
    exact.loc[45, "change"] = -30.0  # one of ten is among the strongest
    one = screen_recall(exact, chosen, components=100, strongest=20)
    assert (one.missed, one.sampled) == (1, 10)
    assert one.value == pytest.approx(20 / (20 + 6))
    assert one.low < one.value
    everything = screen_recall(exact, chosen, components=50, strongest=20)
    assert everything.value == everything.low == pytest.approx(20 / 21)


# ------------------------------------------------------------------------------- modes and costs
def test_modes_that_prompts_cannot_have_are_refused(tiny_bridge):
    prompts = tiny_prompts(tiny_bridge)
    shorter = replace(prompts[1], counterfactual=prompts[1].tokens[1:])
    check_positions([*prompts, shorter], "decision")
    check_positions(prompts, "all")
    assert aligned([prompts[0], shorter]) == [prompts[0]]
    for mode in ("all", "screened"):
        with pytest.raises(InputError, match=r"1 of 2 prompts lack, first '1'.*choose decision"):
            check_positions([prompts[0], shorter], mode)
        check_positions([prompts[0], shorter], mode, across_models=True)
    with pytest.raises(InputError, match="need segments, which 3 of 3 prompts lack"):
        check_positions(prompts, "segments")
    with pytest.raises(
        InputError, match="unknown positions 'everywhere'; expected one of decision"
    ):
        check_positions(prompts, "everywhere")
    with pytest.raises(InputError, match="unknown component 'L9_NONE'"):
        activation_patching(tiny_bridge, prompts, among=["L9_NONE"])


def test_the_cost_counts_what_is_computed(tiny_bridge):
    cost = sweep_cost(tiny_bridge, tiny_prompts(tiny_bridge))
    assert list(cost.index) == ["decision", "screened", "all"]
    assert (cost.seconds > 0).all()
    assert cost.forward_passes["decision"] < cost.forward_passes["all"]
    across = sweep_cost(tiny_bridge, tiny_prompts(tiny_bridge), across_models=True)
    assert across.forward_passes["all"] > cost.forward_passes["all"]  # no beginning is shared


def test_evenly_keeps_the_ends():
    assert evenly(range(30), 8)[0] == 0
    assert evenly(range(30), 8)[-1] == 29
    assert len(evenly(range(30), 8)) == 8
    assert evenly([1, 2], 8) == [1, 2]
    assert evenly([1, 2, 3], 1) == [1]
