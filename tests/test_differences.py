"""Δ: planted directions are found, chance is called chance, the lens is linear where it says so."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from interp_kit.analyses.differences import (
    components_for,
    curve_shape,
    delta_decision,
    delta_lens,
    delta_norm,
    deltas,
    first_component,
    grade,
    null_spectra,
    spectrum,
    stability,
)
from interp_kit.decisions import decide, end_probability
from interp_kit.passes import residuals
from interp_kit.prompts import encode, token_of
from interp_kit.specs import InputError
from tests.conftest import tiny_prompts


def planted(n=24, d=64, noise=0.05, seed=0):
    """Δs along one direction, of varying size, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(d, generator=generator)
    direction = direction / direction.norm()
    size = 1 + torch.rand(n, 1, generator=generator)
    return size * direction + noise * torch.randn(n, d, generator=generator) / d**0.5, direction


def isotropic(n=24, d=64, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_a_planted_direction_is_recovered():
    change, direction = planted()
    assert float(first_component(change) @ direction) > 0.99
    table = spectrum(change)
    assert table.value[0] > 0.95
    assert components_for(table, 0.8) == 1
    assert stability(change).min() > 0.99
    null = null_spectra(change, n=20)
    assert table.value[0] > null[null.kind == "random"].value.max()


def test_isotropic_changes_are_diffuse():
    change = isotropic()
    table = spectrum(change)
    assert table.value[0] < 0.2
    assert components_for(table, 0.8) > 8
    null = null_spectra(change, n=50)
    random = null[null.kind == "random"].value
    assert random.min() * 0.8 < table.value[0] < random.max() * 1.2


def test_shares_sum_to_one_and_rank_is_that_of_the_prompts():
    for centred in (False, True):
        table = spectrum(isotropic(n=10), centred=centred)
        assert table.cumulative.iloc[-1] == pytest.approx(1)
        assert len(table) == 10 - centred
    assert (spectrum(isotropic()).value.diff().dropna() <= 0).all()


@pytest.mark.parametrize(
    ("curve", "shape"),
    [
        ([1, 9, 10, 10, 10, 10, 10, 10, 10], "early"),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], "ramp"),
        ([1, 1, 1, 1, 1, 1, 1, 9, 10], "late"),
        ([5, 5, 5, 6, 5, 5, 5, 5, 5], "flat"),
        ([0, 0, 0], "flat"),
    ],
)
def test_the_shape_of_a_curve_follows_its_rule(curve, shape):
    assert curve_shape([float(value) for value in curve]) == shape


def test_delta_is_the_difference_of_two_runs(tiny_bridge):
    prompts = tiny_prompts(tiny_bridge)
    token = tiny_bridge.tokenizer(" ba", add_special_tokens=False)["input_ids"][0]
    change = deltas(tiny_bridge, prompts, {"word": token})["word"]
    prompt = prompts[1]
    _, long = tiny_bridge.run_with_cache(torch.tensor([[*prompt.tokens, token]]))
    _, short = tiny_bridge.run_with_cache(torch.tensor([prompt.tokens]))
    name = "blocks.1.hook_out"
    expected = long[name][0, -1] - short[name][0, -1]
    torch.testing.assert_close(change[1, 1], expected, atol=1e-5, rtol=1e-4)
    baseline = residuals(tiny_bridge, prompts)
    table = delta_norm({"word": change, "none": change * 0}, baseline, prompts)
    row = table[(table.prompt == prompt.id) & (table.layer == 1) & (table.condition == "word")]
    assert row.value.item() == pytest.approx(float(expected.norm()), rel=1e-4)
    assert (table[table.condition == "none"].value == 0).all()


def test_the_decision_of_whole_answers_changes_as_the_model_says(tiny_bridge):
    prompts = tiny_prompts(tiny_bridge)  # answers of one and two tokens, of unequal lengths too
    table = delta_decision(tiny_bridge, prompts, {"a": 7, "b": 9})
    last = table[table.layer == tiny_bridge.cfg.n_layers - 1]
    for name, token in (("a", 7), ("b", 9)):
        followed = [replace(p, tokens=(*p.tokens, token)) for p in prompts]
        change = decide(tiny_bridge, followed).value - decide(tiny_bridge, prompts).value
        ours = last[last.condition == name].value.to_numpy()
        assert ours == pytest.approx(change.to_numpy(), abs=1e-4)


def test_the_last_layer_of_the_delta_lens_is_what_the_suffix_does(tiny_bridge):
    """Recomputed: exactly the change of the logits. Frozen: linear in the change."""
    prompts = tiny_prompts(tiny_bridge)
    token = tiny_bridge.tokenizer(" ba", add_special_tokens=False)["input_ids"][0]
    baseline = residuals(tiny_bridge, prompts)
    change = deltas(tiny_bridge, prompts, {"word": token})["word"]
    lens = delta_lens(tiny_bridge, baseline, change, norm="recomputed")
    for i, prompt in enumerate(prompts):
        after = tiny_bridge(torch.tensor([[*prompt.tokens, token]]))[0, -1]
        before = tiny_bridge(torch.tensor([prompt.tokens]))[0, -1]
        torch.testing.assert_close(lens[i, -1], after - before, atol=1e-4, rtol=1e-3)
    frozen = delta_lens(tiny_bridge, baseline, change)
    torch.testing.assert_close(
        delta_lens(tiny_bridge, baseline, 2 * change), 2 * frozen, atol=1e-4, rtol=1e-4
    )
    small = delta_lens(tiny_bridge, baseline, baseline * 1e-3)
    uncapped = tiny_bridge.ln_final(baseline).float()
    bias = getattr(tiny_bridge.ln_final, "bias", None)
    expected = (uncapped - (0 if bias is None else bias)) @ tiny_bridge.W_U * 1e-3
    torch.testing.assert_close(small, expected, atol=1e-4, rtol=1e-3)


def test_end_probability_is_the_models_own(tiny_bridge):
    prompt = encode(tiny_bridge, " ba be bi", positive=" ba", negative=" be")
    end = prompt.positive[0]
    p = float(end_probability(tiny_bridge, [prompt], end=end)[0])
    table = decide(tiny_bridge, [prompt])
    assert p == pytest.approx(float(table.answer_mass[0] * table.p_positive[0]), rel=1e-4)


def test_a_trigger_that_the_tokenizer_splits_is_named(tiny_bridge):
    assert isinstance(token_of(tiny_bridge, " ba"), int)
    with pytest.raises(InputError, match="is not one token of this model's tokenizer"):
        token_of(tiny_bridge, " $STOP")


def measured(**own):
    """Eight words that are all much the same, and a token with the given values."""
    word = {"shape": "early", "norm": 1.2, "pc1": 0.8, "top3": 0.9, "top10": 0.97, "end": 2.0}
    word |= {"content": -1.0, "added": 0.3, "kept": 0.9, "removed": 0.1}
    wobble = [0.95, 0.97, 0.99, 1.0, 1.01, 1.03, 1.05, 1.02]
    vary = ("norm", "pc1", "end", "added")
    rows = {f"w{i}": word | {k: word[k] * f for k in vary} for i, f in enumerate(wobble)}
    return pd.DataFrame.from_dict(rows | {"token": word | own}, orient="index")


def test_strong_means_more_than_a_fixed_word_does_not_a_bare_threshold():
    words = [f"w{i}" for i in range(8)]
    strong = {"norm": 2.0, "pc1": 0.95, "end": 12.0, "added": 0.9}
    assert grade(measured(**strong), of="token", controls=words).label.tolist() == ["strong"] * 5
    # Every threshold is passed by such a token, and none beyond what the words do.
    table = grade(measured(added=0.7), of="token", controls=words).set_index("criterion")
    assert (table.threshold == "strong").all()
    assert table.label.to_dict() == {
        "size": "weak",
        "directions": "weak",
        "output": "weak",
        "causes": "strong",
        "overall": "weak",
    }
    for word in words:  # any of them in the trigger's place, the others as its controls
        others = [w for w in words if w != word]
        assert grade(measured(), of=word, controls=others).label.iloc[-1] != "strong"


def test_an_isotropic_change_is_called_diffuse():
    change = isotropic()
    cumulative = spectrum(change).cumulative
    shares = {"pc1": cumulative[0], "top3": cumulative[2], "top10": cumulative[9]}
    table = grade(measured(**shares), of="token", controls=[f"w{i}" for i in range(8)])
    assert table.set_index("criterion").threshold["directions"] == "weak"
    planted_change, _ = planted()
    cumulative = spectrum(planted_change).cumulative
    shares = {"pc1": cumulative[0], "top3": cumulative[2], "top10": cumulative[9]}
    table = grade(measured(**shares), of="token", controls=[f"w{i}" for i in range(8)])
    assert table.set_index("criterion").label["directions"] == "strong"
