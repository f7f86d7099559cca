"""Adapters on one base equal merged models; what is unsafe or wrong is refused before it loads."""

import json
import os
import shutil
import socket
import subprocess
import sys
from typing import Any, cast

import pytest
import torch

from interp_kit.catalogue import find_model, load_scenario
from interp_kit.hub import altered_weights, write_checksums
from interp_kit.loading import load_model, load_models
from interp_kit.pretrained import inspect_model, load_huggingface
from interp_kit.prompts import encode_scenario
from interp_kit.specs import REPOSITORY, InputError
from tests.conftest import IPD
from tests.tiny import save_tiny

MODELS = REPOSITORY / "data" / "models"


@pytest.mark.parametrize("name", IPD)
def test_a_switched_adapter_equals_the_model_loaded_and_merged_alone(organisms, name):
    bridge = organisms.switch(name)
    tokens = torch.tensor([encode_scenario(bridge, load_scenario("CC_continue"))[0].tokens])
    alone = load_huggingface(find_model(name), device="cpu")
    assert float((bridge(tokens) - alone(tokens).logits.detach()).abs().max()) <= 1e-5
    if name != "tiny-gemma2":  # merging rounds the weights once more
        merged = cast(Any, alone).merge_and_unload()
        assert float((bridge(tokens) - merged(tokens).logits.detach()).abs().max()) <= 1e-3


def test_switching_forth_and_back_restores_the_numbers(organisms):
    tokens = torch.arange(3, 40)[None]
    before = {name: organisms.switch(name)(tokens) for name in IPD}
    for name in reversed(IPD):
        assert torch.equal(organisms.switch(name)(tokens), before[name])
    assert len({float(v.sum()) for v in before.values()}) == len(IPD)


def test_every_fine_tune_shares_one_base(organisms):
    assert len({id(organisms.switch(name)) for name in IPD}) == 1


def test_nothing_is_trainable_after_a_switch(organisms):
    bridge = organisms.switch("ipd-hybrid")
    assert not any(p.requires_grad for p in bridge.parameters())
    assert not bridge.training


def adapter_study(tmp_path, change):
    """A study with one adapter model, spoiled by ``change(folder)``."""
    folder = tmp_path / "models" / "mine"
    shutil.copytree(MODELS / "ipd-hybrid", folder)
    change(folder)
    return tmp_path


def both_refuse(name, *, data=None) -> str:
    """The check without weights and the loading itself must refuse alike."""
    with pytest.raises(InputError) as checked:
        inspect_model(find_model(name, data=data))
    with pytest.raises(InputError) as loaded:
        load_model(name, data=data)
    assert str(checked.value) == str(loaded.value)
    assert "\n" not in str(loaded.value)
    return str(loaded.value)


def test_an_adapter_for_another_base_is_refused(tmp_path, tiny_folders):
    study = adapter_study(
        tmp_path,
        lambda f: (f / "model.yaml").write_text(f"base: {f.parent / 'other'}\nadapter: adapter\n"),
    )
    shutil.copytree(tiny_folders["llama"], tmp_path / "models" / "other")
    (tmp_path / "models" / "mine" / "model.yaml").write_text("base: ../other\nadapter: adapter\n")
    text = both_refuse("mine", data=study)
    assert "was made for 'tiny-gemma2'" in text
    assert "has width" in text or "no module" in text


def test_an_adapter_that_records_another_base_is_refused(tmp_path):
    def rename(folder):
        config = folder / "adapter" / "adapter_config.json"
        content = json.loads(config.read_text()) | {"base_model_name_or_path": "other-base"}
        config.write_text(json.dumps(content))

    text = both_refuse("mine", data=adapter_study(tmp_path, rename))
    assert "made for 'other-base', not for 'tiny-gemma2'" in text


def test_a_pickled_adapter_is_refused(tmp_path):
    def pickle(folder):
        (folder / "adapter" / "adapter_model.safetensors").rename(
            folder / "adapter" / "adapter_model.bin"
        )

    text = both_refuse("mine", data=adapter_study(tmp_path, pickle))
    assert "adapter_model.bin is a pickle" in text


def test_a_truncated_adapter_is_refused(tmp_path):
    def truncate(folder):
        file = folder / "adapter" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])

    assert "not readable as safetensors" in both_refuse(
        "mine", data=adapter_study(tmp_path, truncate)
    )


@pytest.mark.parametrize("part", ["weights", "adapter"])
def test_a_flipped_bit_in_weights_with_checksums_is_damage(tmp_path, part):
    """safetensors itself would read it: only the checksum tells."""
    for name in ("ipd-hybrid", "tiny-gemma2"):
        shutil.copytree(MODELS / name, tmp_path / "models" / name)
    (file,) = (tmp_path / "models").glob(f"*/{part}/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    message = both_refuse("ipd-hybrid", data=tmp_path)
    assert f"{file} is damaged: its hash is not the one in SHA256SUMS beside it" in message
    write_checksums(file.parent)  # it was meant to change
    assert not altered_weights(file.parent)
    load_model("ipd-hybrid", data=tmp_path)


@pytest.mark.parametrize("spoil", ["missing", "truncated", "pickle"])
def test_bad_base_weights_are_refused(tmp_path, spoil):
    folder = save_tiny("llama", tmp_path / "base")
    weights = folder / "model.safetensors"
    if spoil == "truncated":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif spoil == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    else:
        weights.unlink()
    expected = {
        "missing": "expected *.safetensors",
        "truncated": "not readable as safetensors",
        "pickle": "found only pytorch_model.bin (pickle",
    }
    assert expected[spoil] in both_refuse(str(folder))


def test_a_model_that_is_nowhere_is_refused():
    assert "is not on disk, and the Hugging Face hub does not provide it" in both_refuse(
        "no-such-org/no-such-model"
    )


def test_a_chat_template_is_asked_for_but_not_there(tmp_path):
    study = adapter_study(
        tmp_path,
        lambda f: (f / "model.yaml").write_text(
            "base: tiny-gemma2\nadapter: adapter\nchat_template: true\n"
        ),
    )
    assert "chat_template is true" in both_refuse("mine", data=study)


def test_only_models_that_were_loaded_can_be_switched_to():
    with pytest.raises(InputError, match="was not loaded"):
        load_models(["tiny-gemma2"]).switch("ipd-hybrid")


def test_a_real_checkpoint_loads_by_folder(shared):
    bridge = load_model(str(shared / "models" / "stories260K"))
    assert (bridge.cfg.n_layers, bridge.cfg.n_heads, bridge.cfg.n_key_value_heads) == (5, 8, 4)
    text = bridge.generate("Once upon a time", max_new_tokens=20, do_sample=False, verbose=False)
    assert "there was" in text


def test_a_base_and_its_adapter_load_by_hugging_face_id_from_the_cache(tmp_path, tiny_folders):
    """As gemma-2-2b-it with a LoRA does once it was downloaded: ids, no network, no retries."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def publish(repository: str):
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        return folder / "snapshots" / ("0" * 40)

    shutil.copytree(tiny_folders["gemma2"], publish("acme/tiny"))
    base = AutoModelForCausalLM.from_pretrained(tiny_folders["gemma2"])
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    get_peft_model(base, lora).save_pretrained(str(publish("acme/lora")))
    spec = tmp_path / "models" / "mine" / "model.yaml"
    spec.parent.mkdir(parents=True)
    spec.write_text("base: acme/tiny\nadapter: acme/lora\n")
    code = (
        "import torch; from interp_kit import load_models\n"
        f"models = load_models(['mine', 'acme/tiny'], data={str(tmp_path)!r})\n"
        "tokens = torch.arange(3, 20)[None]\n"
        "mine = models.switch('mine')(tokens)\n"
        "print(float((models.switch('acme/tiny')(tokens) - mine).abs().max()) > 0.01)"
    )
    with socket.create_server(("127.0.0.1", 0)) as hub:  # stands for the hub, and only listens
        environment = {
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}",
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, capture_output=True,
            text=True, timeout=120,
        )  # fmt: skip
        assert done.stdout.strip() == "True", done.stderr[-2000:]
        hub.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody knocked
            hub.accept()
