"""Whole weights against whole weights: patching, exchanged layers, changes; five architectures.

The reference is plain transformers with tensors put together by hand, or one hooked pass a patch.
"""

import gc
import re
import shutil
import weakref

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from interp_kit.analyses.activation_patching import cross_model_patching, transplant_error
from interp_kit.analyses.weights import layer_swap, nested_layer_swap, weight_norms
from interp_kit.catalogue import find_model
from interp_kit.decisions import decide
from interp_kit.loading import IN_MEMORY, Models, load_models
from interp_kit.passes import residuals, shared_passes
from interp_kit.specs import InputError
from tests.conftest import tiny_prompts
from tests.test_patching import naive, own_output, sampled, with_head_output
from tests.tiny import ARCHITECTURES, CONFIGS, save_tiny

N_LAYERS = 3


def tuned_copy(folder, place, *, seed=1, size=0.02):
    """Another checkpoint of the same model, every weight of it moved a little."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    model.save_pretrained(place / "weights")
    for file in folder.glob("token*"):
        shutil.copy(file, place / "weights")
    spec = {"base": "weights", "tuned_from": str(folder)}
    (place / "model.yaml").write_text(yaml.safe_dump(spec))
    return str(place)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request, tiny_folders, tmp_path_factory):
    """A base, its full fine-tune, and an adapter on the base."""
    folder, root = tiny_folders[request.param], tmp_path_factory.mktemp("pair")
    tuned = tuned_copy(folder, root / "tuned")
    torch.manual_seed(2)
    linear = ["attn.c_proj"] if request.param == "gpt2" else ["q_proj", "o_proj"]
    config = LoraConfig(r=4, target_modules=linear, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(
        root / "adapted" / "adapter"
    )
    spec = {"base": str(folder), "adapter": "adapter"}
    (root / "adapted" / "model.yaml").write_text(yaml.safe_dump(spec))
    models = load_models([str(folder), tuned, str(root / "adapted")], device="cpu")
    return models, str(folder), tuned, str(root / "adapted")


def plain(models, name):
    """The model by plain transformers, its adapter merged."""
    spec = models.specs[name]
    model = AutoModelForCausalLM.from_pretrained(spec.base, attn_implementation="eager")
    if spec.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, spec.adapter).merge_and_unload()
    return model.eval()


def with_tensors(target, source, layers):
    """``target`` with the tensors of ``source`` in these layers; -1 and 3 stand for all others."""
    own, other = target.state_dict(), source.state_dict()
    for name in own:
        found = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        if (int(found[1]) if found else -1) in layers:
            own[name] = other[name]
    target.load_state_dict(own)
    return target


def decisions(model, prompts):
    values = []
    for prompt in prompts:
        logits = model(torch.tensor([prompt.branch])).logits[0, -1]
        values.append(float(logits[prompt.branch_ids[0]] - logits[prompt.branch_ids[1]]))
    return values


# ------------------------------------------------------------------------------ activation patching
def test_a_sweep_between_two_models_equals_one_hooked_pass_a_patch(pair):
    models, base, tuned, adapted = pair
    for source, target in ((tuned, base), (base, tuned), (tuned, adapted), (adapted, tuned)):
        prompt = tiny_prompts(models.switch(target))[0]
        table = cross_model_patching(models, source, target, [prompt])
        assert set(table.component[table["head"] < 0]) >= {"L0_RESID_PRE", "L0_MLP", "L2_MLP"}
        bridge, tokens = models.switch(source), torch.tensor([prompt.branch])
        _, theirs = bridge.run_with_cache(tokens)
        written = {n: own_output(bridge, n, theirs) for n in range(N_LAYERS)}
        bridge = models.switch(target)
        _, ours = bridge.run_with_cache(tokens)
        for row in sampled(table, 6).itertuples():
            if row.head < 0:
                expected = naive(bridge, prompt, row, theirs, ours)
            else:
                expected = with_head_output(bridge, prompt, row, written, ours)
            assert row.value == pytest.approx(expected, abs=1e-4), row
        assert abs(table.change).max() > 1e-3


def test_into_itself_is_nothing_and_all_components_make_the_source(pair):
    models, base, tuned, adapted = pair
    prompts = tiny_prompts(models.switch(tuned))[:2]
    assert (cross_model_patching(models, tuned, tuned, prompts).change == 0).all()
    for source, target in ((tuned, base), (base, tuned), (adapted, tuned)):
        assert transplant_error(models, source, target, prompts) <= 1e-4


# ----------------------------------------------------------------------------------- weights
def test_exchanged_layers_are_those_of_tensors_put_together_by_hand(pair):
    models, base, tuned, adapted = pair
    for source, target in ((tuned, base), (adapted, tuned), (tuned, adapted)):
        prompts = tiny_prompts(models.switch(target))[::2]  # those that differ in one token
        for layers in ([1], [0, 2], [-1, N_LAYERS]):
            expected = with_tensors(plain(models, target), plain(models, source), layers)
            with models.with_layers_from(target, source, layers) as bridge:
                got = decide(bridge, prompts).value.tolist()
            assert got == pytest.approx(decisions(expected, prompts), abs=1e-4)
        own = decide(models.switch(target), prompts).value.tolist()
        assert own == pytest.approx(decisions(plain(models, target), prompts), abs=1e-4)
        table = layer_swap(models, source, target, prompts)
        assert sorted(table.layer.unique()) == list(range(-1, N_LAYERS + 1))
        nested = nested_layer_swap(models, source, target, prompts, order=[0, -1, 3, 2, 1])
        assert nested.value.iloc[0] == 0
        assert nested.value.iloc[-1] == pytest.approx(1, abs=1e-4)


def test_activations_of_exchanged_layers_are_never_shared_with_others(pair):
    models, base, tuned, _ = pair
    prompts = tiny_prompts(models.switch(base))[:1]
    with shared_passes():
        before = residuals(models.switch(base), prompts)
        with models.with_layers_from(base, tuned, [0]) as bridge:
            inside = residuals(bridge, prompts)
        after = residuals(models.switch(base), prompts)
    assert torch.equal(before, after)
    assert float((inside - before).abs().max()) > 1e-3


def test_changes_are_the_differences_of_the_state_dicts(pair):
    models, base, tuned, adapted = pair
    norms = weight_norms(models, tuned)
    before, after = (split(plain(models, name).state_dict()) for name in (base, tuned))
    expected = {}
    for name, weight in before.items():
        change = (after[name] - weight).norm()
        if float(change):
            expected[name] = float(change)
    of_blocks = norms[(norms.layer >= 0) & (norms.layer < N_LAYERS)]
    for row in of_blocks.itertuples():
        ends = f".{row.layer}.{row.module}"
        (name,) = [n for n in expected if n.removesuffix(".weight").endswith(ends)]
        assert row.value == pytest.approx(expected[name], rel=1e-4), name
        assert row.relative == pytest.approx(expected[name] / float(before[name].norm()), rel=1e-4)
    in_blocks = [n for n in expected if re.search(r"\.(?:layers|h)\.\d+\.", n)]
    assert len(of_blocks) == len(in_blocks)
    assert {-1, N_LAYERS} <= set(norms.layer)
    assert set(weight_norms(models, adapted).layer) == {0, 1, 2}
    with pytest.raises(InputError, match="add tuned_from: MODEL"):
        weight_norms(models, base)
    spec = models.specs[tuned].model_copy(update={"parent": models.specs[adapted]})
    with pytest.raises(InputError, match="is an adapter, whose weights are in two parts"):
        weight_norms(Models([spec], device="cpu"), tuned)


def test_the_origin_of_whole_weights_is_the_model_that_the_spec_names(pair):
    models, base, tuned, _ = pair
    prompts = tiny_prompts(models.switch(base))
    own = decide(models.switch(base), prompts).value.tolist()
    assert decide(models.base_of(tuned), prompts).value.tolist() == own
    alone = load_models([tuned], device="cpu")  # the base is not one of the run's models
    assert decide(alone.base_of(tuned), prompts).value.tolist() == own
    assert decide(alone.switch(tuned), prompts).value.tolist() != own


def split(weights):
    """A state dict with GPT-2's joint projection as three, by the names that the bridge has."""
    parts = {}
    for name, weight in weights.items():
        if "attn.c_attn" in name:
            for which, part in zip("qkv", weight.chunk(3, -1)):
                parts[name.replace("c_attn", which)] = part
        else:
            parts[name.replace("attn.c_proj", "attn.o")] = weight
    return parts


# ----------------------------------------------------------------------------------- memory
def test_two_bases_are_in_memory_and_one_that_is_held_is_handed_out_again(tiny_folders, tmp_path):
    folder = tiny_folders["llama"]
    names = [tuned_copy(folder, tmp_path / str(seed), seed=seed) for seed in range(4)]
    models = load_models(names, device="cpu")
    prompts = tiny_prompts(models.switch(names[0]))
    once = {name: decide(models.switch(name), prompts).value.tolist() for name in names}
    assert len({tuple(values) for values in once.values()}) == 4
    assert len(models.memory()) == IN_MEMORY
    held, let_go = models.switch(names[0]), weakref.ref(models.switch(names[1]))
    for name in names[2:]:
        models.switch(name)
    gc.collect()
    assert let_go() is None
    assert models.switch(names[0]) is held
    assert {n: decide(models.switch(n), prompts).value.tolist() for n in names} == once


# ----------------------------------------------------------------------------------- bad input
def test_models_of_other_shapes_and_vocabularies_are_refused(tiny_folders, tmp_path, monkeypatch):
    folder = tiny_folders["llama"]
    made = CONFIGS["llama"]
    wide = {"num_hidden_layers": 4, "num_key_value_heads": 4, "intermediate_size": 64}
    for size, value in wide.items():

        def other(size=size, value=value):
            config = made()
            setattr(config, size, value)
            return config

        monkeypatch.setitem(CONFIGS, "llama", other)
        place = str(save_tiny("llama", tmp_path / size))
        models = load_models([str(folder), place], device="cpu")
        before = getattr(made(), size)
        with pytest.raises(InputError, match=f"{size} is {before} and {value}; choose models"):
            models.require_comparable(str(folder), place)
    qwen = str(tiny_folders["qwen2"])
    models = load_models([str(folder), qwen], device="cpu")
    with pytest.raises(InputError, match="model_type is llama and qwen2"):
        models.require_comparable(str(folder), qwen)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"base": "weights", "adapter": "a", "tuned_from": "b"},
            "remove tuned_from, or the adapter",
        ),
        ({"base": "weights", "tuned_from": "mine"}, "names the model itself"),
        ({"base": "weights", "tuned_from": "nobody"}, "tuned_from: unknown model 'nobody'"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(spec, message, tmp_path):
    place = tmp_path / "mine"
    (place / "weights").mkdir(parents=True)
    (place / "model.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(InputError, match=message):
        find_model(str(place))


def test_whole_weights_are_loaded_as_what_they_were_tuned_from(tmp_path):
    (tmp_path / "mine" / "weights").mkdir(parents=True)
    spec = {"base": "weights", "tuned_from": "qwen2.5-1.5b-instruct", "dtype": "float16"}
    (tmp_path / "mine" / "model.yaml").write_text(yaml.safe_dump(spec))
    found = find_model(str(tmp_path / "mine"))
    assert (found.dtype, found.chat_template, found.origin) == (
        "float16", True, "qwen2.5-1.5b-instruct",
    )  # fmt: skip
