"""Studies on which an earlier version went wrong, each with its right value or its one line.

The studies are read where they are; a plain clone does not have them, and skips what needs them.
The kinds that they stand for are tested with checkpoints of this project in the other files.
"""

import re

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp_kit.analyses.weights import layer_swap, weight_norms
from interp_kit.catalogue import find_model, load_scenario
from interp_kit.decisions import decide
from interp_kit.evaluations import read_mcqs
from interp_kit.formats import read_texts
from interp_kit.loading import load_model, load_models
from interp_kit.pretrained import inspect_model
from interp_kit.prompts import encode, encode_scenario
from interp_kit.specs import InputError, ModelSpec

STATED = {  # by the case's own description: decisions of prompts, by plain transformers or PEFT
    "biasall": {"thebase": [-3.323, -1.742]},
    "wholeemb": {"thebase": [2.819, 3.044], "c": [2.220, 0.559]},
    "mts": {"a": [3.424, 2.615]},
    "mtstied": {},
    "gpt2qkv": {},
    "neoxqkv": {"a": [-0.843, -2.042]},
    "dora": {"a": [0.857, -0.064]},
    "headlora": {},
    "ia3": {},
}
REFUSED = {  # case -> (what reads it, the line)
    "empty": ("load", r"has no weights for: .*lora_A"),
    "defaultkeys": ("load", r"has no weights for: .*lora_A"),
    "origmod": ("load", r"has no weights for: lm_head\.weight and 29 more"),
    "missinglayer": ("load", r"has no weights for: model\.layers\.2\..* and 8 more"),
    "nan": ("load", "down_proj.weight holds values that are not finite"),
    "fp16overflow": ("load", "logits are not finite"),
    "tokenizer_beyond_model": ("check", r"the id 519, but its embedding has 512 rows"),
    "tokenizer_config_only": ("check", "no tokenizer that can be read"),
    "adapter_config_list": ("check", "is not a PEFT adapter config"),
    "prompt_tuning": ("check", "is of the kind PROMPT_TUNING"),
}


@pytest.fixture
def case(shared):
    return lambda name: shared / "cases" / name


def plain_decisions(spec: ModelSpec, prompts) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(spec.base)
    if spec.adapter:
        model = PeftModel.from_pretrained(model, spec.adapter)
    values = []
    for prompt in prompts:
        with torch.no_grad():
            logits = model(torch.tensor([prompt.branch])).logits[0, -1]
        values.append(float(logits[prompt.branch_ids[0]] - logits[prompt.branch_ids[1]]))
    return values


@pytest.mark.parametrize("name", STATED)
def test_an_adapter_and_its_siblings_decide_as_peft_says_in_any_order(case, name):
    folder = case(name)
    names = yaml.safe_load((folder / "run.yaml").read_text())["models"]
    scenario = load_scenario("tiny", data=folder)
    for order in (names, names[::-1]):
        models = load_models(order, data=folder, device="cpu")
        found = {}
        for model in (*order, *order[::-1]):  # and again, after all the others
            prompts = encode_scenario(models.switch(model), scenario)
            found[model] = decide(models.switch(model), prompts).value.tolist()
            right = plain_decisions(models.specs[model], prompts)
            assert found[model] == pytest.approx(right, abs=1e-4), model
        for model, values in STATED[name].items():
            assert found[model][: len(values)] == pytest.approx(values, abs=6e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_is_refused_in_one_line(case, name):
    folder = case(name)
    by, line = REFUSED[name]
    model = yaml.safe_load((folder / "run.yaml").read_text())["models"][-1]
    read = inspect_model if by == "check" else lambda spec: load_model(model, data=folder)
    spec = find_model(model, data=folder)
    with pytest.raises(InputError, match=line) as refused:
        read(spec)
    assert "\n" not in str(refused.value)


def test_layers_of_an_adapter_on_the_head_are_exchanged_rightly(case):
    folder = case("headlora")
    models = load_models(["thebase", "a"], data=folder, device="cpu")
    prompts = encode_scenario(models.switch("a"), load_scenario("tiny", data=folder))
    with models.with_layers_from("thebase", "a", []) as bridge:
        none = decide(bridge, prompts).value.tolist()
    assert none == pytest.approx(plain_decisions(models.specs["thebase"], prompts), abs=1e-4)
    table = layer_swap(models, "a", "thebase", prompts[:1])
    head = table[table.layer == table.layer.max()]
    assert abs(head.change).item() > 0.01  # the unembedding is what the adapter changed


def test_norms_of_an_adapter_that_scales_are_those_of_what_it_changes(case):
    folder = case("ia3")
    models = load_models(["thebase", "a"], data=folder, device="cpu")
    norms = weight_norms(models, "a")
    spec = models.specs["a"]
    base = AutoModelForCausalLM.from_pretrained(spec.base)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    after = PeftModel.from_pretrained(base, str(spec.adapter)).merge_and_unload().state_dict()
    right = sorted(float((after[n] - w).norm()) for n, w in before.items() if (after[n] - w).any())
    assert sorted(norms.value) == pytest.approx(right, rel=1e-4)


# ------------------------------------------------------------------------------------ templates
def test_a_template_without_bos_gets_none(case):
    folder = case("chat_nobos")
    bridge = load_model("m", data=folder, device="cpu")
    prompts = encode_scenario(bridge, load_scenario("tiny", data=folder))
    assert decide(bridge, prompts).value.tolist() == pytest.approx([-1.549, 0.311], abs=6e-4)


def test_segments_are_those_of_the_prompt_not_of_the_template(case):
    folder = case("chat_chatml")
    tokenizing = inspect_model(find_model("m", data=folder))
    prompt = encode_scenario(tokenizing, load_scenario("tiny", data=folder))[0]
    # The description says 86: it counts a BOS, which this template does not give.
    assert prompt.segments[0].positions[0] == 85
    said = tokenizing.tokenizer.decode([prompt.tokens[at] for at in prompt.segments[0].positions])
    assert said.strip() == "You are a"


def test_the_date_of_a_template_is_fixed(case):
    folder = case("chat_date")
    prompts = encode_scenario(
        inspect_model(find_model("m", data=folder)), load_scenario("tiny", data=folder)
    )
    assert "2025" in prompts[0].text


def test_an_adapters_own_template_is_used(case):
    folder = case("adapter_chat_template")
    scenario = load_scenario("tiny", data=folder)
    tuned = find_model("ft", data=folder)
    bridge = load_model("ft", data=folder, device="cpu")
    turn = [{"role": "user", "content": scenario.prompts[0].text}]
    tokenizer = AutoTokenizer.from_pretrained(str(tuned.adapter))
    right = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    prompts = encode_scenario(bridge, scenario)
    assert prompts[0].text == right
    assert encode_scenario(inspect_model(tuned), scenario)[0].tokens == prompts[0].tokens


# ------------------------------------------------------------------------------------- files
GOOD = {"blankline": 2, "bom": 1, "crlf": 2, "ff": 2, "nel": 1, "u2028": 2}
BAD = {
    "array": "line 1",
    "empty": "the file is empty",
    "emptytext": "line 1: text: string should have at least 1 character",
    "latin1": "not readable as text",
    "none": "line 1: text: input should be a valid string, got None",
    "num": "line 1: text: expected text, got 5: quote it",
}


@pytest.mark.parametrize("name", GOOD | BAD)
def test_files_of_documents(case, name):
    file = case("documents") / f"{name}.jsonl"
    if name in GOOD:
        assert len(read_texts(file)) == GOOD[name]
        return
    with pytest.raises(InputError, match=BAD[name]):
        read_texts(file)


@pytest.mark.parametrize("name", ["bom", "crlf", "u2028", "lower", "nan", "numid"])
def test_files_of_questions(case, name):
    file = case("documents") / f"mcq_{name}.jsonl"
    if name in ("bom", "crlf", "u2028"):
        assert len(read_mcqs(file)) == 1
        return
    with pytest.raises(InputError, match="line 1"):
        read_mcqs(file)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("yesno", "quote it; YAML reads yes, no"),
        ("norway", "quote it; YAML reads yes, no"),
        ("dupkey", r"line \d+: the key .* is given twice; remove one"),
    ],
)
def test_yaml_that_does_not_say_what_it_seems_to(case, name, line, command):
    code, _, said = command("check", case(name) / "run.yaml", "--data", case(name))
    assert code == 2
    (only,) = said.strip().splitlines()
    assert re.search(line, only), only


def test_pairs_with_a_byte_order_mark_are_read(case, command):
    code, _, said = command("check", case("pairsbom") / "run.yaml", "--data", case("pairsbom"))
    assert code == 0, said


def test_braces_in_the_name_of_the_outputs_are_no_parameters(case, command, tmp_path):
    folder, outputs = case("braces"), tmp_path / "{model}"
    where = ["--data", folder, "--outputs", outputs, "--workers", 1]
    code, _, said = command("run", folder / "run.yaml", *where)
    assert code == 0, said
    assert len(list(outputs.rglob("run.ipynb"))) == 1


def test_a_prompt_without_tokens_is_refused(tiny_bridge):
    bridge = tiny_bridge
    before = bridge.cfg.default_prepend_bos
    try:
        bridge.cfg.default_prepend_bos = False
        with pytest.raises(InputError, match="has no tokens for this model"):
            encode(bridge, "", positive=" ba", negative=" ku")
    finally:
        bridge.cfg.default_prepend_bos = before


def test_a_model_folder_with_a_space_is_named(tmp_path, command):
    (tmp_path / "models" / "my model").mkdir(parents=True)
    (tmp_path / "models" / "my model" / "model.yaml").write_text("base: tiny-gemma2\n")
    code, _, said = command("list", "--data", tmp_path)
    assert code == 2
    assert "my model: a model's folder is its name" in said
