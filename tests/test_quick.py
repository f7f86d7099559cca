"""``look`` and how things show themselves in Jupyter: what the analyses say, and nothing else."""

import re
from typing import Any

import pytest
from pandas.testing import assert_frame_equal
from transformer_lens.model_bridge import TransformerBridge

from interp_kit import decide, encode, load_models, look
from interp_kit.analyses.activation_patching import activation_patching
from interp_kit.analyses.attribution import direct_logit_attribution
from interp_kit.analyses.lens import logit_lens
from interp_kit.specs import InputError
from tests.test_views import EVIL, Page
from tests.tiny import save_tiny

TEXT, OTHER = " ba de fi go mu", " ba de ki go mu"
ANSWERS: dict[str, Any] = {"positive": " ta", "negative": " su"}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def bridge(request, tmp_path_factory):
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param))
    return TransformerBridge.boot_transformers(str(folder), device="cpu")


def test_it_says_what_the_analyses_say(bridge):
    found = look(bridge, TEXT, **ANSWERS, counterfactual=OTHER)
    prompt = encode(bridge, TEXT, **ANSWERS, counterfactual=OTHER, labels=("ta", "su"))
    assert found.prompt == prompt
    assert_frame_equal(found.decision, decide(bridge, [prompt]))
    assert_frame_equal(found.lens, logit_lens(bridge, [prompt]))
    assert_frame_equal(found.attribution, direct_logit_attribution(bridge, [prompt]))
    assert_frame_equal(found.patching, activation_patching(bridge, [prompt]))
    each = {"positions": "each", "directions": ["denoise"]}
    assert_frame_equal(
        found.by_position, activation_patching(bridge, [prompt], unit="resid_pre", **each)
    )
    row = found.decision.iloc[0]
    assert found.probabilities["ta"] == pytest.approx(row.answer_mass * row.p_positive, rel=1e-4)


def test_its_figures_and_its_text_show_these_numbers(bridge):
    found = look(bridge, TEXT, **ANSWERS, counterfactual=OTHER)
    assert list(found.figures) == ["lens", "heads", "patched_heads", "text"]
    denoised = found.patching[found.patching.direction == "denoise"]
    strongest = denoised.loc[denoised.change.abs().idxmax()]
    assert found.strongest.component[0] == strongest.component
    assert found.strongest.denoise[0] == strongest.change
    page = Page(found._repr_html_())
    assert f"{strongest.change:.3f}" in page.text
    assert f"decision {found.decision.value[0]:.3f} nats" in page.text
    assert strongest.component in repr(found)
    text = found.figures["text"]
    assert [row.tokens for row in text.rows] == [
        tuple(found.prompt.spelled(found.prompt.branch))
    ] * 3
    at = {(r.layer, r.pos): r.change for r in found.by_position.itertuples()}
    for layer, row in enumerate(text.rows):
        assert {i: v for i, v in enumerate(row.values) if v is not None} == {
            pos: change for (own, pos), change in at.items() if own == layer
        }


def test_without_a_counterfactual_nothing_is_patched(bridge):
    found = look(bridge, TEXT, **ANSWERS)
    assert len(found.patching) == len(found.by_position) == 0
    assert list(found.figures) == ["lens", "heads"]
    assert list(found.strongest) == ["component", "attribution"]
    assert (
        found.strongest.attribution[0]
        == found.attribution.value.iloc[found.attribution.value.abs().argmax()]
    )
    assert "strongest components" in found._repr_html_()


def test_a_prompt_and_a_name_do_as_well():
    by_name = look("tiny-gemma2", "The law of gravity is", positive=" square", negative=" cubic")
    again = look("tiny-gemma2", by_name.prompt)
    assert_frame_equal(again.lens, by_name.lens)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"positive": " ta", "negative": " ta"}, "both answers are the same tokens"),
        ({"positive": " ta", "negative": " ta su"}, "one answer is the beginning of the other"),
        ({**ANSWERS, "counterfactual": " ba de"}, "has 5 tokens and its counterfactual 2"),
        ({"positive": " ta"}, "two answers are needed"),
    ],
)
def test_what_cannot_be_looked_at_is_said(bridge, given, message):
    before = bridge.cfg.default_prepend_bos
    bridge.cfg.default_prepend_bos = False
    with pytest.raises(InputError, match=message):
        look(bridge, TEXT, **given)
    bridge.cfg.default_prepend_bos = before


def test_answers_are_not_given_twice(bridge):
    with pytest.raises(InputError, match="a Prompt holds its answers"):
        look(bridge, encode(bridge, TEXT, **ANSWERS), positive=" ta")


class HookedTransformer:
    """What TransformerLens had before bridges."""


@pytest.mark.parametrize("model", [HookedTransformer(), None, 3])
def test_what_is_no_bridge_is_refused(model):
    named = f"got {type(model).__name__}; .*boot_transformers"
    with pytest.raises(InputError, match=named):
        look(model, TEXT, **ANSWERS)


# ------------------------------------------------------------------------------ prompts and models
def test_a_prompt_shows_tokens_positions_parts_and_answers(bridge):
    prompt = encode(
        bridge, TEXT, **ANSWERS, counterfactual=OTHER, segments={"part": ("fi go", "ki go")}
    )
    page = Page(prompt._repr_html_())
    n = len(prompt.tokens)
    assert len(page.of_class("ik-token")) == 2 * n + 2
    assert len(page.of_class("ik-s0")) == 2 * 2 + 1  # in both texts, and in the legend
    assert [tag for tag, _ in page.tags].count("mark") == 1  # where the counterfactual differs
    assert f"position {n - 1}, token {prompt.tokens[-1]}" in page.text
    assert f"position {n}, token {prompt.positive[0]}" in page.text
    shown = repr(prompt)
    assert f"{n} tokens, counterfactual {n} tokens; positive ' ta', negative ' su'" in shown
    assert "fi go mu" in shown
    assert "\n" not in shown
    assert repr(prompt.swapped()).startswith(
        f"Prompt('0*': {''.join(prompt.spelled(prompt.counterfactual or ()))!r}"
    )


def test_a_prompt_escapes_what_it_shows(bridge):
    prompt = encode(bridge, EVIL, **ANSWERS, id=EVIL, labels=(EVIL, "b"), segments={EVIL: "alert"})
    shown = prompt._repr_html_()
    assert shown.count("<script") == 1  # its own
    assert not re.search("[\u202e\u2066]", shown)
    assert [tag for tag, _ in Page(shown).tags if tag in ("img", "a", "iframe")] == []


def test_models_show_what_they_are_and_what_is_in_memory():
    models = load_models(["tiny-gemma2", "cubic-gravity"], device="cpu")
    table = models.overview()
    assert list(table) == [
        "model", "base", "adapter", "dtype", "quantization", "device", "memory",
    ]  # fmt: skip
    assert table.memory.tolist() == ["", ""]
    assert table.base[1] == "tiny-gemma2"
    models.switch("cubic-gravity")
    size = models.memory().bytes[0] / 1e6
    assert models.overview().memory.tolist() == [f"{size:.1f} MB"] * 2
    assert "cubic-gravity" in repr(models)
    assert f"<td>{size:.1f} MB</td>" in models._repr_html_()


def test_names_of_models_are_escaped():
    models = load_models(["tiny-gemma2"], device="cpu")
    models.specs[EVIL] = models.specs["tiny-gemma2"].model_copy(update={"name": EVIL})
    assert models._repr_html_().count("<script") == 1
