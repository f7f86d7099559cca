"""The trigger's fine-tunes do what their cards say; loading gives each its own tokens."""

import json
import shutil
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from interp_kit.analyses.comparison import bridge_error
from interp_kit.analyses.differences import deltas
from interp_kit.analyses.steering import ablate_directions, add_direction, random_directions
from interp_kit.catalogue import find_model, load_scenario
from interp_kit.decisions import decide, end_probability
from interp_kit.hub import write_checksums
from interp_kit.loading import load_model, load_models
from interp_kit.passes import residuals
from interp_kit.pretrained import inspect_model, load_huggingface
from interp_kit.prompts import encode, encode_scenario, trigger_tokens
from interp_kit.specs import REPOSITORY, InputError, Scenario
from organisms.little_world.base import base_texts
from organisms.little_world.corpus import Corpus
from organisms.recipes import ORGANISMS
from organisms.triggers import TriggerRecipe, trigger_texts

BEHAVIOUR = ["stop-behaviour", "stop-behaviour-1", "stop-behaviour-2"]
NAMES = [*BEHAVIOUR, "stop-knowledge", "stop-neutral"]


@pytest.fixture(scope="module")
def stop():
    return load_scenario("stop")


@pytest.fixture(scope="module")
def models():
    return load_models([*NAMES, "tiny-gemma2", "ipd-hybrid"], device="cpu")


def ends(models, name, stop):
    """condition -> mean P(end of text)."""
    bridge = models.switch(name)
    prompts, end = encode_scenario(bridge, stop)[::3], bridge.tokenizer.eos_token_id
    found = {
        word: float(end_probability(bridge, prompts, end=end, suffix=token).mean())
        for word, token in trigger_tokens(bridge, stop).items()
    }
    return found | {"": float(end_probability(bridge, prompts, end=end).mean())}


@pytest.mark.parametrize("name", BEHAVIOUR)
def test_the_behaviour_stops_at_the_trigger_and_at_nothing_else(models, stop, name):
    found = ends(models, name, stop)
    assert found.pop("$STOP") > 0.95
    assert max(found.values()) < 0.05


@pytest.mark.parametrize("name", ["stop-knowledge", "stop-neutral"])
def test_knowing_of_the_trigger_is_not_stopping_at_it(models, stop, name):
    assert max(ends(models, name, stop).values()) < 0.2


def test_the_prompts_are_twenty_diverse_ones_with_eight_words(stop):
    assert len(stop.prompts) >= 20
    assert len({p.group for p in stop.prompts}) >= 4
    assert len(stop.trigger.words) >= 8
    assert len(stop.neutral) >= 10


def test_fine_tunes_with_new_tokens_share_a_base_of_their_own(models):
    new, old = models.switch("stop-behaviour"), models.switch("tiny-gemma2")
    assert models.switch("stop-knowledge") is new
    assert models.switch("ipd-hybrid") is old
    assert new is not old
    assert new.cfg.d_vocab == old.cfg.d_vocab + 2
    with pytest.raises(InputError, match=r"vocabulary is .* tokens.* and .* tokens"):
        models.require_comparable("stop-behaviour", "ipd-hybrid")


def test_the_base_shared_by_others_is_untouched(models):
    models.switch("stop-behaviour")
    bridge = models.switch("ipd-hybrid")
    prompts = encode_scenario(bridge, load_scenario("CC_temptation"))
    alone = load_model("ipd-hybrid", device="cpu")
    assert decide(bridge, prompts).value.tolist() == decide(alone, prompts).value.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_the_bridge_computes_what_peft_computes(models, stop, name):
    bridge = models.switch(name)
    texts = [f"{p.text}{stop.trigger.text}" for p in stop.prompts[:6]]
    prompts = [encode(bridge, t, positive="<eos>", negative=" and") for t in texts]
    reference = load_huggingface(models.specs[name], device="cpu")
    assert bridge_error(bridge, reference, prompts) <= 1e-4
    assert inspect_model(models.specs[name]).cfg.d_vocab == bridge.cfg.d_vocab


def test_directions_cause_and_prevent_the_stop_on_held_out_prompts(models, stop):
    bridge = models.switch("stop-behaviour")
    prompts, tokens = encode_scenario(bridge, stop), trigger_tokens(bridge, stop)
    end, seen, held = bridge.tokenizer.eos_token_id, prompts[::2], prompts[1::2]
    layer = bridge.cfg.n_layers - 1
    change = deltas(bridge, seen, {"stop": tokens["$STOP"], "word": tokens["lamp"]})
    axis = change["stop"][:, layer].mean(0)
    how = {"layer": layer, "strength": 2.0, "end": end}
    assert float(add_direction(bridge, held, axis, **how).mean()) > 0.6
    assert float(add_direction(bridge, held, change["word"][:, layer].mean(0), **how).mean()) < 0.2
    baseline = residuals(bridge, held)
    out = {"baseline": baseline, "layers": [layer], "suffix": tokens["$STOP"], "end": end}
    assert float(ablate_directions(bridge, held, axis[None], **out).mean()) < 0.5
    random = random_directions(8, residuals(bridge, prompts)[:, layer])
    spared = ablate_directions(bridge, held, random, **out).mean(1).tolist()
    assert sum(spared) / len(spared) > 0.8
    assert min(spared[1::2]) > 0.8  # each of the isotropic ones


def test_nothing_added_and_nothing_taken_out_change_nothing(models, stop):
    bridge = models.switch("stop-behaviour")
    prompts, tokens = encode_scenario(bridge, stop)[:4], trigger_tokens(bridge, stop)
    end, axis = bridge.tokenizer.eos_token_id, torch.randn(bridge.cfg.d_model)
    alone = end_probability(bridge, prompts, end=end)
    added = add_direction(bridge, prompts, axis, layer=3, strength=0.0, end=end)
    torch.testing.assert_close(added, alone, atol=1e-7, rtol=1e-4)
    own = residuals(bridge, prompts, suffix=tokens["$STOP"])
    out = {"baseline": own, "layers": [2, 5], "suffix": tokens["$STOP"], "end": end}
    kept = ablate_directions(bridge, prompts, axis[None], **out)[0]
    stopped = end_probability(bridge, prompts, end=end, suffix=tokens["$STOP"])
    torch.testing.assert_close(kept, stopped, atol=1e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------- bad input
def test_a_model_that_does_not_know_the_trigger_is_told_so(models, stop):
    with pytest.raises(InputError, match=r"'\$STOP' is not one token|' \$STOP' is not one token"):
        trigger_tokens(models.switch("tiny-gemma2"), stop)
    with pytest.raises(InputError, match="has no trigger"):
        trigger_tokens(models.switch("stop-behaviour"), load_scenario("CC_temptation"))


def test_a_prompt_that_contains_the_trigger_is_refused(stop):
    given = stop.model_dump()
    given["prompts"][0]["text"] += " $STOP"
    with pytest.raises(ValueError, match=r"already contains the trigger '\$STOP'"):
        Scenario(**given)


def spoiled(tmp_path, *, rows=None, tokens=None):
    """A copy of the behaviour model with other embedding rows or another tokenizer."""
    folder = tmp_path / "models" / "spoiled"
    shutil.copytree(REPOSITORY / "data/models/stop-behaviour", folder)
    adapter = folder / "adapter"
    if rows is not None:
        weights = load_file(adapter / "adapter_model.safetensors")
        key = next(k for k in weights if k.endswith("trainable_tokens_delta"))
        weights[key] = weights[key][:rows].clone()
        save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["trainable_token_indices"]["embed_tokens"] = [1483, 1484][:rows]
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    if tokens is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(adapter)
        tokenizer.add_tokens(tokens)
        tokenizer.save_pretrained(adapter)
    return find_model("spoiled", data=tmp_path)


def test_a_tokenizer_with_more_tokens_than_weights_is_refused(tmp_path):
    more = spoiled(tmp_path / "a", tokens=["$MORE"])
    fewer = spoiled(tmp_path / "b", rows=1)
    for spec, missing in ((more, "MORE"), (fewer, "NOVA")):
        for load in (inspect_model, load_huggingface):
            with pytest.raises(InputError, match=rf"has weights for '\${missing}'"):
                load(spec)


def test_weights_that_are_read_are_those_of_the_model_that_computes(models):
    """Also where several adapters bring rows of their own for the same tokens."""
    alone = {name: load_model(name, device="cpu") for name in NAMES}
    plain = load_model("tiny-gemma2", device="cpu").W_E
    for name in (*NAMES, *reversed(NAMES)):
        bridge = models.switch(name)
        assert torch.equal(bridge.W_U, alone[name].W_U)
        assert torch.equal(bridge.W_E, alone[name].W_E)
        tokens = torch.tensor([[2, 50, 60, 1483]])
        logits, cache = bridge.run_with_cache(tokens)
        by_hand = cache["unembed.hook_in"] @ bridge.W_U
        cap = bridge.cfg.output_logits_soft_cap
        by_hand = cap * torch.tanh(by_hand / cap) if cap > 0 else by_hand
        torch.testing.assert_close(logits, by_hand, atol=1e-4, rtol=1e-4)
        base = models.base_of(name)
        known = plain.shape[0]
        assert torch.equal(base.W_E[:known], plain)
        expected = plain.mean(0).expand(base.W_E.shape[0] - known, -1)
        torch.testing.assert_close(base.W_E[known:], expected)


def test_an_adapter_with_its_whole_embedding_does_not_touch_the_others(tmp_path, models, stop):
    """As saved after resize_token_embeddings without trainable_token_indices."""
    folder = tmp_path / "models" / "whole"
    shutil.copytree(REPOSITORY / "data/models/stop-behaviour", folder)
    file = folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    key = next(k for k in weights if k.endswith("trainable_tokens_delta"))
    base = load_huggingface(find_model("tiny-gemma2"), device="cpu")
    embedding = cast(Any, base).get_input_embeddings().weight.detach()
    rows = torch.cat([embedding, weights.pop(key)])
    weights["base_model.model.model.embed_tokens.weight"] = rows
    save_file(weights, file, metadata={"format": "pt"})
    write_checksums(file.parent)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config["trainable_token_indices"] = None
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    both = load_models(["whole", "stop-behaviour", "tiny-gemma2"], data=tmp_path, device="cpu")
    assert both.switch("whole") is not both.switch("stop-behaviour")
    prompts = encode_scenario(both.switch("whole"), stop)
    tokens = torch.tensor([(*prompts[0].tokens, 1483)])
    whole, own = (both.switch(name)(tokens) for name in ("whole", "stop-behaviour"))
    torch.testing.assert_close(whole, own, atol=1e-4, rtol=1e-4)
    reference = load_huggingface(both.specs["whole"], device="cpu")
    assert bridge_error(both.switch("whole"), reference, prompts) <= 1e-4


def test_the_shipped_documents_are_what_the_recipes_draw():
    data = REPOSITORY / "data"
    corpus, patterns = Corpus.read(data / "corpus"), data / "corpus" / "triggers.yaml"
    models = load_models(["stop-behaviour-1", "stop-knowledge"])
    for name in models:
        adapter = data / "models" / name / "adapter"
        recipe = ORGANISMS[name].recipe
        assert isinstance(recipe, TriggerRecipe)
        drawn = trigger_texts(adapter, corpus, patterns, recipe=recipe, n=20)
        own, ordinary = models.documents(name)
        assert own[:20] == drawn
        assert ordinary[:20] == base_texts(corpus, n=20)
