"""Identities that hold for every transformer, on tiny random models of five architectures."""

from dataclasses import replace

import pytest
import torch

from interp_kit.analyses.activation_patching import activation_patching, identity_patch_error
from interp_kit.analyses.attribution import (
    attention_share,
    direct_logit_attribution,
    head_sum_error,
    layer_attribution,
    option_attribution,
    pre_cap_decision,
    random_direction_control,
)
from interp_kit.analyses.comparison import bridge_error
from interp_kit.analyses.lens import logit_lens, random_direction_lens
from interp_kit.catalogue import find_model
from interp_kit.decisions import decide
from interp_kit.layer_readout import top_tokens
from interp_kit.loading import load_model
from interp_kit.passes import read_last, resumed, shared_passes
from interp_kit.patching import sweep
from interp_kit.patching.patches import unit_patches
from interp_kit.patching.positions import first_difference
from interp_kit.patching.writes import writing_hooks
from interp_kit.pretrained import load_huggingface
from tests.conftest import tiny_prompts
from tests.tiny import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_bridge_computes_what_hugging_face_computes(architecture, tiny_folders):
    folder = str(tiny_folders[architecture])
    bridge = load_model(folder, device="cpu")
    reference = load_huggingface(find_model(folder), device="cpu")
    error = bridge_error(bridge, reference, tiny_prompts(bridge))
    print(f"{architecture}: bridge against Hugging Face {error:.1e} logits")
    assert error <= 1e-4


def test_attributions_sum_to_the_decision_before_the_cap(tiny_bridge):
    prompts = tiny_prompts(tiny_bridge)
    table = direct_logit_attribution(tiny_bridge, prompts)
    parts = table.groupby("prompt", sort=False).value.sum().to_numpy()
    whole = pre_cap_decision(tiny_bridge, prompts).value.to_numpy()
    error = abs(parts - whole).max()
    print(f"{tiny_bridge.cfg.architecture}: attribution sum {error:.1e} logits")
    assert error <= 1e-4
    assert abs(whole).max() > 0.1  # the sum is not trivially zero


def test_attention_and_mlps_sum_to_the_decision_before_the_cap(tiny_bridge):
    prompts = tiny_prompts(tiny_bridge)
    table = layer_attribution(tiny_bridge, prompts)
    sums = table.groupby("prompt", sort=False)[["to_positive", "to_negative", "value"]].sum()
    whole = pre_cap_decision(tiny_bridge, prompts).value.to_numpy()
    error = abs(sums.value.to_numpy() - whole).max()
    print(f"{tiny_bridge.cfg.architecture}: attention and MLPs {error:.1e} logits")
    assert error <= 1e-4
    if tiny_bridge.cfg.output_logits_soft_cap > 0:
        return  # what the parts of one logit sum to is no output of this model
    for prompt, (_, own) in zip(prompts, sums.iterrows()):
        logits = tiny_bridge(torch.tensor([prompt.branch]))[0, -1, list(prompt.branch_ids)]
        assert abs(own[["to_positive", "to_negative"]].to_numpy() - logits.numpy()).max() <= 1e-4


def test_attention_writes_what_its_heads_and_bias_write(tiny_bridge):
    prompts = tiny_prompts(tiny_bridge)
    heads = direct_logit_attribution(tiny_bridge, prompts)
    heads = heads[(heads.kind == "head") | heads.component.str.contains("ATTN_BIAS")]
    layers = layer_attribution(tiny_bridge, prompts)
    by_layer = [
        t.groupby(["prompt", "layer"]).value.sum() for t in (heads, layers.query("kind == 'attn'"))
    ]
    assert (by_layer[0] - by_layer[1]).abs().max() <= 1e-4


def test_attribution_by_option_is_that_by_side(tiny_bridge):
    prompts = tiny_prompts(tiny_bridge)[:1]
    prompts += [
        replace(
            prompts[0], id="swapped", positive=prompts[0].negative, negative=prompts[0].positive
        )
    ]
    layers = layer_attribution(tiny_bridge, prompts)
    options = option_attribution(tiny_bridge, layers, prompts)
    one, swapped = (
        own.drop(columns="prompt_id").reset_index(drop=True)
        for _, own in options.groupby("prompt_id", sort=False)
    )
    assert {"attn_to_be", "mlp_to_bi", "total_to_be", "attn_mlp_ratio"} <= set(one)
    assert (one - swapped[one.columns]).abs().to_numpy().max() == 0
    assert (one.total_to_be - one.attn_to_be - one.mlp_to_be).abs().max() <= 1e-6
    share = attention_share(layers)
    assert share.attn_mlp_ratio.between(0, 1).all()
    assert options.attn_mlp_ratio.tolist() == share.attn_mlp_ratio.tolist()


def test_shared_passes_give_the_same_numbers_in_one_pass(tiny_bridge, monkeypatch):
    prompts = [p for p in tiny_prompts(tiny_bridge) if len(p.positive) == len(p.negative) == 1]
    apart = logit_lens(tiny_bridge, prompts), direct_logit_attribution(tiny_bridge, prompts)
    runs = []
    run = tiny_bridge.run_with_hooks
    monkeypatch.setattr(
        tiny_bridge, "run_with_hooks", lambda *a, **k: runs.append(1) or run(*a, **k)
    )
    with shared_passes():
        together = logit_lens(tiny_bridge, prompts), direct_logit_attribution(tiny_bridge, prompts)
        pre_cap_decision(tiny_bridge, prompts)
    assert len(runs) == len({len(p.tokens) for p in prompts})
    for ours, theirs in zip(together, apart):
        assert ours.equals(theirs)
    logit_lens(tiny_bridge, prompts)
    assert len(runs) == 2 * len({len(p.tokens) for p in prompts})  # outside, nothing is kept


def test_shared_passes_read_further_back_when_asked(tiny_bridge):
    tokens = torch.tensor([tiny_prompts(tiny_bridge)[0].tokens])
    name = "blocks.1.hook_resid_post"
    alone = read_last(tiny_bridge, tokens, [name], 3)[name]
    with shared_passes():
        read_last(tiny_bridge, tokens, [name], 1)
        assert torch.equal(read_last(tiny_bridge, tokens, [name], 3)[name], alone)
        assert torch.equal(read_last(tiny_bridge, tokens, [name], 2)[name], alone[:, -2:])


def test_a_batch_that_comes_again_resumes_where_it_is_edited(tiny_bridge):
    """Bit by bit what a whole pass gives, whatever is written after the block, and ever after."""
    rows = [torch.tensor([p.tokens]) for p in tiny_prompts(tiny_bridge)]
    n_layers = tiny_bridge.cfg.n_layers
    ran = []

    def count(module, args):
        ran.append(1)

    def edited(row, layer, strength):
        def write(x, hook):
            return x + strength * x.norm(dim=-1, keepdim=True)

        hooks = [(f"blocks.{layer}.hook_resid_post", write)]
        with torch.no_grad():
            return tiny_bridge.run_with_hooks(row, fwd_hooks=hooks)

    handles = [block.attn.register_forward_pre_hook(count) for block in tiny_bridge.blocks]
    for layer in (0, n_layers // 2, n_layers - 1):
        strengths = (0.0, 1.0, -2.0)
        whole = [edited(row, layer, s) for s in strengths for row in rows]
        ran.clear()
        with resumed(tiny_bridge, layer):
            again = [edited(row, layer, s) for s in strengths for row in rows]
        assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
        n = len({tuple(row[0].tolist()) for row in rows})
        later = n_layers - layer - 1
        assert len(ran) == n * (layer + 1) + len(again) * later
    assert torch.equal(edited(rows[0], 0, 1.0), edited(rows[0], 0, 1.0))
    with pytest.raises(ZeroDivisionError), resumed(tiny_bridge, 0):
        raise ZeroDivisionError
    ran.clear()
    edited(rows[0], 0, 0.0)
    assert len(ran) == n_layers
    for handle in handles:
        handle.remove()


def test_the_decision_before_the_cap_is_the_decision_where_there_is_none(tiny_bridge):
    if tiny_bridge.cfg.output_logits_soft_cap > 0:
        pytest.skip("this architecture has a final soft cap")
    prompts = [p for p in tiny_prompts(tiny_bridge) if p.one_branch]
    whole = pre_cap_decision(tiny_bridge, prompts).value.to_numpy()
    assert abs(whole - decide(tiny_bridge, prompts).value.to_numpy()).max() <= 1e-4


def test_heads_sum_to_their_layers_attention_output(tiny_bridge):
    error = head_sum_error(tiny_bridge, tiny_prompts(tiny_bridge))
    print(f"{tiny_bridge.cfg.architecture}: heads against attention output {error:.1e}")
    assert error <= 1e-4


def test_one_row_for_every_component(tiny_bridge):
    table = direct_logit_attribution(tiny_bridge, tiny_prompts(tiny_bridge)[:1])
    cfg = tiny_bridge.cfg
    assert (table.kind == "head").sum() == cfg.n_layers * cfg.n_heads
    assert (table.kind == "mlp").sum() == cfg.n_layers
    assert not table.component.duplicated().any()


def test_the_last_layer_of_the_lens_is_the_model(tiny_bridge):
    prompts = tiny_prompts(tiny_bridge)
    lens = logit_lens(tiny_bridge, prompts)
    last = lens[lens.layer == tiny_bridge.cfg.n_layers - 1].value.to_numpy()
    assert abs(last - decide(tiny_bridge, prompts).value.to_numpy()).max() <= 1e-4


def test_the_lens_names_the_models_own_next_token(tiny_bridge):
    prompt = tiny_prompts(tiny_bridge)[2]
    top = top_tokens(tiny_bridge, [prompt], k=1).iloc[-1]
    logits = tiny_bridge(torch.tensor([prompt.tokens]))[0, -1]
    assert top.token == tiny_bridge.tokenizer.decode([int(logits.argmax())])
    assert top.p == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)


def test_patching_a_prompt_into_itself_changes_nothing(tiny_bridge):
    prompts = tiny_prompts(tiny_bridge)
    prompts += [replace(p, counterfactual=None) for p in prompts]  # then from the first position
    error = max(identity_patch_error(tiny_bridge, [p]) for p in prompts)
    print(f"{tiny_bridge.cfg.architecture}: identity patch {error:.1e} nats")
    assert error <= 1e-5


def test_the_identity_patch_is_computed_though_nothing_can_change(tiny_bridge, monkeypatch):
    prompt = tiny_prompts(tiny_bridge)[0]
    written = []

    def off_by_one(one, source):
        written.extend(patch for patches in one.patch_sets for patch in patches)
        hooks = writing_hooks(one, source)
        return [(name, lambda x, hook, put=put: put(x, hook) + 1) for name, put in hooks]

    monkeypatch.setattr(sweep, "writing_hooks", off_by_one)
    assert identity_patch_error(tiny_bridge, [prompt]) > 1e-3
    assert min(pos for patch in written for pos in patch.positions) == first_difference(prompt)
    stream = [patch for patch in written if patch.site == "resid_pre"]
    assert len(written) - len(stream) == len(unit_patches(tiny_bridge, "component"))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_whole_stream_at_the_only_difference_carries_the_whole_decision(tiny_bridge, direction):
    prompts = tiny_prompts(tiny_bridge)[:2]
    table = activation_patching(tiny_bridge, prompts, unit="resid_pre", directions=[direction])
    first = table[(table.layer == 0)].groupby("prompt").head(1)
    assert first.value.to_numpy() == pytest.approx(first.source.to_numpy(), abs=1e-4)


def test_random_directions_are_as_long_as_the_decisions_own(tiny_bridge):
    """A random direction r of length |w| gives each part o a share of variance |o|^2 |w|^2 / d."""
    prompts = [tiny_prompts(tiny_bridge)[2]]
    shares = random_direction_control(tiny_bridge, prompts, n=2000, seed=0)
    summed = shares.groupby("draw").value.sum()
    final = tiny_bridge.run_with_cache(torch.tensor([prompts[0].tokens]))[1]["ln_final.hook_out"]
    positive, negative = prompts[0].branch_ids
    w = tiny_bridge.W_U[:, positive] - tiny_bridge.W_U[:, negative]
    expected = float(final[0, -1].norm() * w.norm() / tiny_bridge.cfg.d_model**0.5)
    assert summed.std() == pytest.approx(expected, rel=0.1)
    lens = random_direction_lens(tiny_bridge, prompts, n=2000, seed=0)
    last = lens[lens.layer == lens.layer.max()]
    assert last.value.std() == pytest.approx(expected, rel=0.1)
