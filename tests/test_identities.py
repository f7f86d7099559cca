"""Identities that hold for every transformer, on tiny random models of five architectures."""

from dataclasses import replace

import pytest
import torch

from interp_kit.analyses import attribution
from interp_kit.analyses.activation_patching import activation_patching, identity_patch_error
from interp_kit.analyses.attention import attended_tokens
from interp_kit.analyses.attribution import (
    attention_share,
    contrast_attribution,
    direct_logit_attribution,
    head_sum_error,
    layer_attribution,
    option_attribution,
    promoted_tokens,
    token_attribution,
)
from interp_kit.analyses.comparison import bridge_error
from interp_kit.analyses.lens import contrast_lens, logit_lens
from interp_kit.catalogue import find_model
from interp_kit.controls import likely_pairs, with_other_answers
from interp_kit.decisions import decide
from interp_kit.layer_readout import top_tokens
from interp_kit.loading import load_model
from interp_kit.passes import read_last, resumed, shared_passes
from interp_kit.patching import sweep
from interp_kit.patching.patches import unit_patches
from interp_kit.patching.positions import first_difference
from interp_kit.patching.writes import writing_hooks
from interp_kit.pretrained import load_huggingface
from interp_kit.specs import InputError
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


def of_lengths(bridge):
    """Prompts whose answers have one, two and three tokens, shared first tokens or none."""
    base = tiny_prompts(bridge)[0]
    answers = [(" da", " fa"), (" da ka", " fa"), (" da", " fa ka be"), (" da ku lo", " fa ka")]
    answers += [(" ba da ku", " ba fa ka")]
    prompts = []
    for i, pair in enumerate(answers):
        positive, negative = (
            tuple(bridge.tokenizer(a, add_special_tokens=False)["input_ids"]) for a in pair
        )
        prompts.append(replace(base, id=str(i), positive=positive, negative=negative))
    return prompts


def test_attributions_sum_to_the_decision_for_answers_of_any_length(tiny_bridge):
    """Against plain log probabilities of the whole answers, not against our own decision."""
    prompts = of_lengths(tiny_bridge)
    plain = []
    for prompt in prompts:
        for sign, answer in ((1, prompt.positive), (-1, prompt.negative)):
            logits = tiny_bridge(torch.tensor([prompt.tokens + answer]))[0]
            log_p = logits.log_softmax(-1)[len(prompt.tokens) - 1 : -1]
            plain.append(sign * float(log_p[range(len(answer)), list(answer)].sum()))
    whole = torch.tensor(plain).unflatten(0, (-1, 2)).sum(1).numpy()
    assert decide(tiny_bridge, prompts).value.to_numpy() == pytest.approx(whole, abs=1e-4)
    errors = {}
    for analysis in (direct_logit_attribution, token_attribution, layer_attribution):
        table = analysis(tiny_bridge, prompts)
        parts = table.groupby("prompt", sort=False).value.sum().to_numpy()
        errors[analysis.__name__] = abs(parts - whole).max()
    print(f"{tiny_bridge.cfg.architecture}: sums against plain log p {errors}")
    assert max(errors.values()) <= 1e-4
    assert abs(whole).max() > 0.1  # the sum is not trivially zero


def test_each_token_of_an_answer_has_its_own_part(tiny_bridge):
    prompt = of_lengths(tiny_bridge)[3]
    table = token_attribution(tiny_bridge, [prompt])
    parts = table.groupby(["answer", "token"], sort=False).value.sum()
    assert [*parts.index] == [("both", 0), ("positive", 1), ("positive", 2), ("negative", 1)]
    logits = tiny_bridge(torch.tensor([prompt.branch]))[0, -1, list(prompt.branch_ids)]
    assert parts["both", 0] == pytest.approx(float(logits[0] - logits[1]), abs=1e-4)
    forced = tiny_bridge(torch.tensor([prompt.branch + prompt.positive[:2]]))[0, -1]
    log_p = forced.log_softmax(-1)
    assert parts["positive", 2] == pytest.approx(float(log_p[prompt.positive[2]]), abs=1e-4)
    rest = table[(table.component == "LOG_NORMALISER") & (table.answer == "positive")]
    assert rest.value.iloc[-1] == pytest.approx(float((log_p.exp() * log_p).sum()), abs=1e-4)
    assert (table[table.answer == "both"].query("component == 'LOG_NORMALISER'").value == 0).all()


def test_what_raises_all_logits_alike_gets_nothing(tiny_bridge):
    """Along the mean of the unembedding, a further token's direction has no part but chance."""
    (asked,) = attribution._batches(tiny_bridge, [of_lengths(tiny_bridge)[0]])
    assert asked.asked.normaliser.abs().max() == 0
    prompt = of_lengths(tiny_bridge)[1]
    *_, further = attribution._batches(tiny_bridge, [prompt])
    logits = tiny_bridge(torch.tensor([prompt.branch + prompt.positive[:1]]))[0, -1]
    p = logits.softmax(-1)
    expected = tiny_bridge.W_U[:, prompt.positive[1]] - tiny_bridge.W_U @ p
    assert torch.allclose(further.asked.directions[0, 0], expected, atol=1e-4)


def test_where_answers_part_the_parts_sum_to_their_logits(tiny_bridge):
    prompts = [p for p in tiny_prompts(tiny_bridge) if p.one_branch]
    table = layer_attribution(tiny_bridge, prompts)
    sums = table.groupby("prompt", sort=False)[["to_positive", "to_negative"]].sum()
    for prompt, (_, own) in zip(prompts, sums.iterrows()):
        logits = tiny_bridge(torch.tensor([prompt.branch]))[0, -1, list(prompt.branch_ids)]
        assert abs(own.to_numpy() - logits.numpy()).max() <= 1e-4


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
        contrast_lens(tiny_bridge, prompts, likely_pairs(tiny_bridge, no_counterfactuals(prompts)))
    assert len(runs) == len({len(p.tokens) for p in prompts})
    for ours, theirs in zip(together, apart):
        assert ours.equals(theirs)
    logit_lens(tiny_bridge, prompts)
    assert len(runs) == 2 * len({len(p.tokens) for p in prompts})  # outside, nothing is kept


def test_shared_passes_read_further_back_when_asked(tiny_bridge):
    tokens = torch.tensor([tiny_prompts(tiny_bridge)[0].tokens])
    name = "blocks.1.hook_resid_post"
    alone = read_last(tiny_bridge, tokens.tolist(), [name], 3)[name]
    with shared_passes():
        read_last(tiny_bridge, tokens.tolist(), [name], 1)
        assert torch.equal(read_last(tiny_bridge, tokens.tolist(), [name], 3)[name], alone)
        assert torch.equal(read_last(tiny_bridge, tokens.tolist(), [name], 2)[name], alone[:, -2:])


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


def test_control_contrasts_are_the_decision_of_other_answers(tiny_bridge):
    prompts = [p for p in tiny_prompts(tiny_bridge) if p.one_branch]
    pairs = likely_pairs(tiny_bridge, prompts, n=3)
    others = with_other_answers(prompts, pairs)
    lens = contrast_lens(tiny_bridge, prompts, pairs)
    last = lens[lens.layer == lens.layer.max()].set_index(["prompt", "draw"]).value
    own = decide(tiny_bridge, others).value.to_numpy()
    keys = [(p.id, draw) for p in prompts for draw in range(3)]
    assert last.loc[keys].to_numpy() == pytest.approx(own, abs=1e-4)
    shares = contrast_attribution(tiny_bridge, prompts, pairs)
    own = direct_logit_attribution(tiny_bridge, others[:1])
    first = shares[(shares.prompt == prompts[0].id) & (shares.draw == 0)].set_index("component")
    own = own[~own.kind.isin(["cap", "normaliser"]) & (own.component != "UNEMBED_BIAS")]
    assert first.value[own.component].to_numpy() == pytest.approx(own.value.to_numpy(), abs=1e-4)


def test_what_a_component_promotes_are_the_ends_of_its_contrasts(tiny_bridge):
    """Over all tokens, its attributions of (token, first token) spread as far as its lens says."""
    prompts = tiny_prompts(tiny_bridge)
    names = ["L0H1", "L1_MLP"]
    said = promoted_tokens(tiny_bridge, prompts, names, k=3)
    assert len(said) == len(prompts) * len(names) * 2 * 3
    tokens = torch.arange(tiny_bridge.cfg.d_vocab)
    pairs = torch.stack([tokens, torch.zeros_like(tokens)], 1).expand(len(prompts), -1, -1)
    shares = contrast_attribution(tiny_bridge, prompts, pairs)
    ends = shares.groupby(["prompt", "component"]).value.agg(["max", "min"])
    first = said[said["rank"] == 1].set_index(["prompt", "component", "says"]).value.unstack()
    spread = ends.loc[first.index, "max"] - ends.loc[first.index, "min"]
    assert (first.promotes - first.demotes).to_numpy() == pytest.approx(spread, abs=1e-4)
    assert (first.promotes > 0).all()  # what raises all tokens alike is taken off
    assert (first.demotes < 0).all()
    with pytest.raises(InputError, match="unknown component 'L9H9'"):
        promoted_tokens(tiny_bridge, prompts, ["L9H9"])


def test_a_heads_attention_is_shared_among_the_tokens_of_the_prompt(tiny_bridge):
    prompts, heads = tiny_prompts(tiny_bridge), [(1, 1), (0, 0)]
    said = attended_tokens(tiny_bridge, prompts, heads, k=1000)
    whole = said.groupby(["prompt", "component"]).value.sum()
    assert len(whole) == len(prompts) * len(heads)
    assert whole.to_numpy() == pytest.approx(1, abs=1e-5)
    for prompt in prompts:
        own = said[(said.prompt == prompt.id) & (said.component == "L1H1")]
        words = [tiny_bridge.tokenizer.decode([token]) for token in prompt.branch]
        assert [words[pos] for pos in own.pos] == list(own.token)
        assert sorted(own.pos) == [*range(len(words))]
        assert own.value.is_monotonic_decreasing
    few = attended_tokens(tiny_bridge, prompts, heads, k=2)
    assert few.equals(
        said.groupby(["prompt", "component"], sort=False).head(2).reset_index(drop=True)
    )


def no_counterfactuals(prompts):
    return [replace(p, counterfactual=None) for p in prompts]
