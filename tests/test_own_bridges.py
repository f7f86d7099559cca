"""Bridges that nobody loaded from a spec: native, without tokenizer, final norm or MLPs.

Each analysis works on them, or says in one line why not. Reference: the bridge's own logits.
"""

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from interp_kit import Prompt, decide, encode
from interp_kit.analyses.activation_patching import (
    ablation,
    activation_patching,
    identity_patch_error,
)
from interp_kit.analyses.attribution import direct_logit_attribution
from interp_kit.analyses.attribution_patching import attribution_patching
from interp_kit.analyses.causal_tracing import causal_trace
from interp_kit.analyses.lens import contrast_lens, logit_lens
from interp_kit.controls import likely_pairs
from interp_kit.layer_readout import top_tokens
from interp_kit.passes import residuals
from interp_kit.patching.patches import unit_patches
from interp_kit.specs import InputError

SHAPE = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_head": 8, "d_vocab": 50, "n_ctx": 24}
KINDS = {
    "with norms": {"d_mlp": 64, "act_fn": "relu", "normalization_type": "LN"},
    "without norms": {"d_mlp": 64, "act_fn": "relu", "normalization_type": None},
    "attention only": {"attn_only": True, "normalization_type": "LN"},
    "attention only, without norms": {"attn_only": True, "normalization_type": None},
}


@pytest.fixture(scope="module", params=KINDS)
def bridge(request):
    torch.manual_seed(0)
    bridge = TransformerBridge.boot_native(SHAPE | KINDS[request.param])
    with torch.no_grad():
        for parameter in bridge.original_model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return bridge.eval().requires_grad_(False)


@pytest.fixture
def prompts():
    rng = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 50, (3, 2, 12), generator=rng)
    return [
        Prompt(
            id=str(i),
            tokens=tuple(own.tolist()),
            counterfactual=tuple(torch.cat([own[:6], other[6:]]).tolist()),
            positive=(3,),
            negative=(7 + i,),
        )
        for i, (own, other) in enumerate(rows)
    ]


def test_it_has_no_tokenizer_and_says_so(bridge):
    assert bridge.tokenizer is None
    with pytest.raises(InputError, match=r"make prompts of token ids: Prompt\(tokens="):
        encode(bridge, "text", positive=" a", negative=" b")


def test_the_decision_is_the_difference_of_the_logits(bridge, prompts):
    logits = torch.stack([bridge(torch.tensor([p.tokens]))[0, -1] for p in prompts])
    right = [float(row[3] - row[p.negative[0]]) for row, p in zip(logits, prompts)]
    assert decide(bridge, prompts).value.tolist() == pytest.approx(right, abs=1e-5)


def test_lens_and_attribution_end_at_the_decision(bridge, prompts):
    own = decide(bridge, prompts).value.to_numpy()
    lens = logit_lens(bridge, prompts)
    last = lens[lens.layer == bridge.cfg.n_layers - 1].value.to_numpy()
    assert last == pytest.approx(own, abs=1e-4)
    parts = direct_logit_attribution(bridge, prompts)
    assert parts.groupby("prompt", sort=False).value.sum().to_numpy() == pytest.approx(
        own, abs=1e-4
    )
    assert ("mlp" in set(parts.kind)) == any(unit.head is None for unit in components(bridge))
    pairs = likely_pairs(bridge, prompts, n=4)
    assert len(contrast_lens(bridge, prompts, pairs)) == 3 * 4 * (bridge.cfg.n_layers + 1)
    assert residuals(bridge, prompts).shape == (3, 2, 32)


def components(bridge):
    return unit_patches(bridge, "component")


def test_patching_all_components_and_the_embedding_makes_the_counterfactual(bridge, prompts):
    assert identity_patch_error(bridge, prompts) <= 1e-4
    table = activation_patching(bridge, prompts, directions=["noise"])
    assert table.change.abs().max() > 1e-3
    for prompt in prompts[:1]:
        tokens = torch.tensor([prompt.tokens])
        other = torch.tensor([prompt.counterfactual])
        _, source = bridge.run_with_cache(other)
        row = table[(table.component == "L0H1") & (table.prompt == prompt.id)].iloc[0]

        def write(z, hook, source=source):
            z = z.clone()
            width = bridge.cfg.d_head
            theirs = source["blocks.0.attn.hook_z"]
            if z.ndim == 3:
                z[..., width : 2 * width] = theirs[..., width : 2 * width]
            else:
                z[:, :, 1] = theirs[:, :, 1]
            return z

        logits = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_z", write)])[0, -1]
        expected = float(logits[3] - logits[prompt.negative[0]])
        assert row.value == pytest.approx(expected, abs=1e-4)
    assert len(ablation(bridge, prompts, replacement="zero")) == 3 * len(components(bridge))
    assert len(attribution_patching(bridge, prompts)) == 2 * 3 * len(components(bridge))


def test_tracing_takes_the_sites_that_are_there(bridge, prompts):
    table = causal_trace(bridge, prompts, sites=("attn_out", "resid_post"))
    assert set(table.site) == {"attn_out", "resid_post"}
    if all(unit.head is not None for unit in components(bridge)):
        with pytest.raises(InputError, match="this model has no blocks"):
            causal_trace(bridge, prompts, sites=("mlp_out",))


def test_controls_need_no_tokenizer_and_words_do(bridge, prompts):
    assert likely_pairs(bridge, prompts, n=2).shape == (3, 2, 2)
    with pytest.raises(InputError, match="no tokenizer"):
        top_tokens(bridge, prompts)


@pytest.mark.parametrize(
    "analysis", [decide, logit_lens, direct_logit_attribution, activation_patching]
)
def test_no_prompts_are_refused(bridge, analysis):
    with pytest.raises(InputError, match="no prompts; give one or more"):
        analysis(bridge, [])
