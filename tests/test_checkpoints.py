"""Ready specs load from the hub's file layout; identities hold where weights are quantized."""

import importlib.util
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from interp_batch.cli import app
from interp_batch.matrix import _model_hash
from interp_kit import hub as hub_module
from interp_kit import loading, quantization
from interp_kit.analyses.activation_patching import (
    activation_patching,
    identity_patch_error,
)
from interp_kit.analyses.attribution import (
    direct_logit_attribution,
    head_sum_error,
)
from interp_kit.analyses.attribution_patching import attribution_patching
from interp_kit.analyses.comparison import bridge_error
from interp_kit.analyses.lens import logit_lens
from interp_kit.catalogue import find_model
from interp_kit.decisions import decide
from interp_kit.hub import find_files, missing_files, weights_hash
from interp_kit.huggingface import config_of
from interp_kit.loading import load_model, load_models
from interp_kit.loading_checks import noise_bound
from interp_kit.pretrained import inspect_model, load_huggingface
from interp_kit.quantization import MOST_ROUNDED, rounding_error
from interp_kit.specs import InputError, ModelSpec
from tests.conftest import tiny_prompts
from tests.test_patching import naive, segmented
from tests.tiny import ARCHITECTURES, LATER, PARALLEL, save_tiny

READY = {  # spec -> its architecture
    "gemma-2-2b-it": "gemma2",
    "llama-3.1-8b-instruct": "llama",
    "qwen2.5-1.5b-instruct": "qwen2",
    "gpt2": "gpt2",
    "mixtral-8x7b-instruct": "mixtral",
    "pythia-160m": "gpt_neox",
    "smollm2-135m-instruct": "llama",
    "smollm2-360m-instruct": "llama",
    "smollm2-1.7b-instruct": "llama",
    "qwen3-0.6b": "qwen3",
    "qwen3-1.7b": "qwen3",
    "qwen3-4b": "qwen3",
    "gemma-3-270m": "gemma3_text",
    "gemma-3-1b-it": "gemma3_text",
    "llama-3.2-1b-instruct": "llama",
    "olmo-2-1b-instruct": "olmo2",
    "gpt-oss-20b": "gpt_oss",
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} ba {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} be{% endif %}"
)


def require(kind: str | None) -> None:
    """Skip, with the reason, where the machine cannot quantize."""
    if kind:
        pytest.importorskip("bitsandbytes")
        try:
            lost = rounding_error(kind, 64, "cpu")
        except Exception as error:
            pytest.skip(f"bitsandbytes does not run here: {error}")
        assert lost <= MOST_ROUNDED


def publish(hub: Path, repository: str) -> Path:
    """The folder of a repository's files as the Hugging Face cache lays them out."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return folder / "snapshots" / ("0" * 40)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hugging Face cache with a tiny random checkpoint under each ready spec's own id."""
    hub = tmp_path_factory.mktemp("hub")
    for name, architecture in READY.items():
        spec = find_model(name)
        sharded = "40KB" if name == "llama-3.1-8b-instruct" else "1GB"
        folder = publish(hub, spec.base)
        save_tiny(architecture, folder, wide=True, shard=sharded)
        if spec.chat_template:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.chat_template = TEMPLATE
            tokenizer.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
        yield hub


@pytest.mark.parametrize("name", READY)
def test_a_ready_spec_loads_as_soon_as_its_files_are_there(hub, name):
    spec = find_model(name)
    require(spec.quantization)
    assert missing_files(spec) == []
    models = load_models([name], device="cpu")
    bridge = models.switch(name)
    kinds = {p.dtype for p in bridge.parameters() if p.is_floating_point()}
    assert kinds == {getattr(torch, spec.dtype)}
    prompts = tiny_prompts(bridge)
    begun = int(spec.chat_template or spec.prepend_bos)  # the template of these has a BOS
    assert all(p.tokens.count(bridge.tokenizer.bos_token_id) == begun for p in prompts)
    assert prompts[0].tokens == tiny_prompts(inspect_model(spec))[0].tokens
    # TransformerLens rounds OLMo-2's norms elsewhere than transformers does, in bfloat16 only.
    most = 1e-5
    if READY[name] == "olmo2":
        most = noise_bound(bridge(torch.tensor([prompts[0].tokens])), bridge.cfg.dtype)
    assert bridge_error(bridge, load_huggingface(spec, device="cpu"), prompts) <= most
    assert decide(bridge, prompts).value.abs().max() > 0.1
    assert (models.memory().quantized > 0).all() == bool(spec.quantization)


def test_an_update_of_the_hubs_files_makes_other_weights(hub):
    spec = find_model("pythia-160m")
    folder = hub / "models--EleutherAI--pythia-160m"
    before = weights_hash(spec)
    assert weights_hash(spec) == before
    updated = folder / "snapshots" / ("1" * 40)
    shutil.copytree(folder / "snapshots" / ("0" * 40), updated)
    try:
        (folder / "refs" / "main").write_text("1" * 40)
        assert weights_hash(spec) != before
    finally:
        (folder / "refs" / "main").write_text("0" * 40)
        shutil.rmtree(updated)
    assert weights_hash(spec) == before


def test_one_ready_spec_is_sharded(hub):
    (folder,) = (hub / "models--meta-llama--Llama-3.1-8B-Instruct" / "snapshots").iterdir()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    away = shards[0].rename(folder / "away")
    spec = find_model("llama-3.1-8b-instruct")
    try:
        assert missing_files(spec) == [spec.base]
        with pytest.raises(InputError, match=r"hf download meta-llama/Llama-3\.1-8B-Instruct"):
            inspect_model(spec)
    finally:
        away.rename(shards[0])


def test_list_says_whose_files_are_not_there(hub, monkeypatch):
    listed = CliRunner().invoke(app, ["list"]).output
    assert "not on this machine" not in listed.replace("[not on this machine: package:", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub / "empty"))
    listed = CliRunner().invoke(app, ["list"]).output
    assert listed.count("not on this machine: ") == len(READY)
    assert "[not on this machine: openai-community/gpt2]" in listed


# ------------------------------------------------------------------------------------ identities
def hold(bridge) -> dict[str, float]:
    """The errors of all identities; each is 0 but for rounding."""
    prompts, prompt = tiny_prompts(bridge), segmented(bridge)
    parts = direct_logit_attribution(bridge, prompts).groupby("prompt", sort=False).value.sum()
    whole = decide(bridge, prompts).value.to_numpy()
    lens = logit_lens(bridge, prompts)
    last = lens[lens.layer == bridge.cfg.n_layers - 1].value.to_numpy()
    errors = {
        "attribution": abs(parts.to_numpy() - whole).max(),
        "heads": head_sum_error(bridge, prompts),
        "lens": abs(last - decide(bridge, prompts).value.to_numpy()).max(),
        "identity patch": identity_patch_error(bridge, prompts),
    }
    assert prompt.counterfactual is not None
    _, source = bridge.run_with_cache(torch.tensor([prompt.counterfactual + prompt.shared]))
    _, target = bridge.run_with_cache(torch.tensor([prompt.branch]))
    for unit in ("component", "attn_out", "resid_post"):
        table = activation_patching(
            bridge, [prompt], unit=unit, positions="each", directions=["noise"]
        )
        sample = table.sample(12, random_state=0)
        values = [naive(bridge, prompt, row, source, target) for row in sample.itertuples()]
        errors[f"sweep of {unit}"] = abs(sample.value.to_numpy() - values).max()
        assert table.change.abs().max() > 1e-2
    screen = attribution_patching(bridge, [prompt], unit="component")
    assert screen.value.abs().max() > 1e-3
    return errors


def test_identities_hold_where_attention_and_mlp_run_in_parallel(tmp_path):
    bridge = load_model(str(save_tiny("gpt_neox", tmp_path / "m")), device="cpu")
    errors = hold(bridge)
    print(errors)
    assert max(errors.values()) <= 1e-4
    with pytest.raises(InputError, match=r"no blocks\.0\.hook_resid_mid"):
        activation_patching(bridge, [segmented(bridge)], unit="resid_mid")


@pytest.mark.parametrize("architecture", LATER)
def test_identities_hold_on_the_other_architectures_of_ready_specs(architecture, tmp_path):
    bridge = load_model(str(save_tiny(architecture, tmp_path / "m")), device="cpu")
    errors = hold(bridge)
    print(architecture, errors)
    assert max(errors.values()) <= 1e-4


@pytest.fixture(scope="module")
def wide_folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("wide")
    return {n: save_tiny(n, root / n, wide=True) for n in (*ARCHITECTURES, *PARALLEL)}


def spec_of(folder: Path, **given) -> ModelSpec:
    return ModelSpec(name="m", base=str(folder), **given)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *PARALLEL])
def test_identities_hold_on_quantized_weights(wide_folders, architecture, quantization):
    require(quantization)
    spec = spec_of(wide_folders[architecture], quantization=quantization)
    models = loading.Models([spec], device="cpu")
    bridge = models.switch("m")
    errors = hold(bridge)
    (row,) = models.memory().itertuples()
    print(architecture, quantization, row.quantized, row.bytes, errors)
    reference = load_huggingface(spec, device="cpu")
    assert bridge_error(bridge, reference, tiny_prompts(bridge)) <= 1e-5
    assert max(errors.values()) <= 1e-4
    plain = loading.Models([spec_of(wide_folders[architecture])], device="cpu")
    tokens = torch.arange(3, 23)[None]
    assert float((bridge(tokens) - plain.switch("m")(tokens)).abs().max()) > 1e-3
    (unquantized,) = plain.memory().itertuples()
    assert (row.parameters, unquantized.quantized) == (unquantized.parameters, 0)
    saved = {"4bit": 4 - (0.5 + 4 / 64), "8bit": 4 - 1}[quantization]  # bytes a parameter
    expected = unquantized.bytes - saved * row.quantized * row.parameters
    assert row.bytes == pytest.approx(expected, rel=0.02)


def test_the_experts_of_a_mixture_are_quantized_to_4_bits_only(wide_folders):
    require("4bit")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def share(quantization):
        models = loading.Models(
            [spec_of(wide_folders["mixtral"], quantization=quantization)], device="cpu"
        )
        return models.switch("m"), float(models.memory().quantized.iloc[0])

    bridge, whole = share("4bit")
    _, without_experts = share("8bit")
    print(f"quantized: {whole:.2f} of the parameters, without the experts {without_experts:.2f}")
    plain = AutoModelForCausalLM.from_pretrained(wide_folders["mixtral"])
    counts = {n: p.numel() for n, p in plain.named_parameters()}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj", "experts"}
    quantized = sum(n for key, n in counts.items() if attention & set(key.split(".")))
    assert whole == pytest.approx(quantized / sum(counts.values()))
    assert without_experts < 0.2 < whole

    expert = plain.model.layers[1].mlp.experts.down_proj.detach()
    rounded = dequantize_4bit(*quantize_4bit(expert, quant_type="nf4"))
    held = bridge.original_model.get_submodule("model.layers.1.mlp.experts").down_proj
    assert isinstance(held, torch.Tensor)
    assert torch.equal(held, rounded)
    assert 0.05 < float((held - expert).norm() / expert.norm()) < MOST_ROUNDED


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_adapters_sit_on_a_quantized_base(wide_folders, tmp_path, quantization):
    require(quantization)
    base = AutoModelForCausalLM.from_pretrained(wide_folders["llama"])
    targets = ["q_proj", "o_proj", "down_proj"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(str(tmp_path / "adapter"))
    plain = spec_of(wide_folders["llama"], quantization=quantization)
    tuned = plain.model_copy(update={"name": "tuned", "adapter": str(tmp_path / "adapter")})
    models = loading.Models([plain, tuned], device="cpu")
    tokens = torch.arange(3, 23)[None]
    logits = models.switch("tuned")(tokens)
    alone = load_huggingface(tuned, device="cpu")(tokens).logits
    assert float((logits - alone).abs().max()) <= 1e-5
    assert float((models.switch("m")(tokens) - logits).abs().max()) > 0.1
    assert max(hold(models.switch("tuned")).values()) <= 1e-4
    for layer, module, change, weight in models.weight_changes("tuned"):
        original = base.get_submodule(f"model.layers.{layer}.{module}")
        original = getattr(original, "base_layer", original).weight
        assert isinstance(original, torch.Tensor)
        assert change.shape == weight.shape == original.shape
        error = float((weight - original).norm() / original.norm())
        assert error <= MOST_ROUNDED
        assert (error == 0) == (quantization == "8bit" and module.endswith("o_proj"))


def test_a_notebook_runs_on_4_bits_as_it_is(tmp_path, command):
    require("4bit")
    study(tmp_path, "base: tiny-gemma2\nquantization: 4bit\n")
    run = {
        "models": ["mine"],
        "scenarios": ["CC_temptation"],
        "notebooks": {"02_direct_logit_attribution": {}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    where = ["--data", tmp_path, "--outputs", tmp_path / "out", "--workers", 1]
    code, _, said = command("run", tmp_path / "run.yaml", *where)
    assert code == 0, said[-2000:]
    (summary,) = (tmp_path / "out").rglob("summary.json")
    assert json.loads(summary.read_text())["noise_floor"] <= 1e-4


# ------------------------------------------------------------------------------ what is refused
def both_refuse(spec: ModelSpec, monkeypatch) -> str:
    """The check without weights and the loading itself refuse alike, before any weight loads."""
    monkeypatch.delattr(AutoModelForCausalLM, "from_pretrained")
    with pytest.raises(InputError) as checked:
        inspect_model(spec)
    with pytest.raises(InputError) as loaded:
        loading.Models([spec]).switch(spec.name)
    assert str(checked.value) == str(loaded.value)
    return str(loaded.value)


def test_quantization_without_bitsandbytes_is_refused(wide_folders, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = both_refuse(spec_of(wide_folders["llama"], quantization="4bit"), monkeypatch)
    assert 'pip install "interp-kit[quantization]"' in text


def test_quantization_that_does_not_run_is_refused(wide_folders, monkeypatch):
    require("4bit")

    def fail(*given):
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(quantization, "rounding_error", fail)
    text = both_refuse(spec_of(wide_folders["llama"], quantization="4bit"), monkeypatch)
    assert "no kernel for this device" in text


def test_quantization_that_computes_something_else_is_refused(wide_folders, monkeypatch):
    require("4bit")
    monkeypatch.setattr(
        quantization, "rounding_error", lambda q, width, d: 0.4 if width == 128 else 0.09
    )
    text = both_refuse(spec_of(wide_folders["llama"], quantization="4bit"), monkeypatch)
    assert "matrices 128 wide with a relative error of 0.40" in text


def test_files_that_are_quantized_already_are_not_quantized_again(tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    text = both_refuse(spec_of(folder, quantization="8bit"), monkeypatch)
    assert "quantized already" in text


def test_a_model_that_does_not_fit_one_device_is_refused(wide_folders, monkeypatch):
    def spread(*given, **how):
        model = AutoModelForCausalLM.from_config(config_of(find_files(spec)))
        model.lm_head.to("meta")
        return model, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    spec = spec_of(wide_folders["llama"], device_map="auto")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spread)
    with pytest.raises(InputError, match="spread it over cpu, meta"):
        loading.Models([spec], device="cpu").switch("m")


def study(folder: Path, text: str) -> Path:
    (folder / "models" / "mine").mkdir(parents=True)
    (folder / "models" / "mine" / "model.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("key", ["token", "hf_token", "use_auth_token"])
def test_a_token_in_a_spec_is_refused_and_not_repeated(tmp_path, key):
    data = study(tmp_path, f"base: google/gemma-2-2b-it\n{key}: hf_secret\n")
    with pytest.raises(InputError, match="environment variable HF_TOKEN") as refused:
        find_model("mine", data=data)
    assert "hf_secret" not in str(refused.value)


def test_an_unknown_quantization_or_device_map_is_refused(tmp_path):
    data = study(tmp_path, "base: google/gemma-2-2b-it\nquantization: 3bit\n")
    with pytest.raises(InputError, match="quantization: input should be '4bit' or '8bit'"):
        find_model("mine", data=data)
    with pytest.raises(InputError, match="device_map"):
        find_model("mine", data=study(tmp_path / "b", "base: a/b\ndevice_map: gpu\n"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("GatedRepoError", "is gated: accept its licence at https://huggingface.co/acme/none"),
        ("RepositoryNotFoundError", "is not on the Hugging Face hub, or is private"),
    ],
)
def test_what_the_hub_does_not_hand_out_says_how_to_get_it(monkeypatch, error, expected):
    from httpx2 import Request, Response
    from huggingface_hub import errors

    def refuse(*given, local_files_only=False, **how):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not in the cache")
        request = Request("GET", "https://huggingface.co/api/models/acme/none")
        response = Response(401, request=request)
        raise getattr(errors, error)("401 Client Error", response=response)

    monkeypatch.setattr(hub_module, "snapshot_download", refuse)
    text = both_refuse(ModelSpec(name="none", base="acme/none"), monkeypatch)
    assert expected in text
    assert "set HF_TOKEN to" in text
    assert "\n" not in text


# ------------------------------------------------------------------------- identity and lifetime
def test_a_fine_tune_loads_as_its_base_unless_it_says_otherwise(tmp_path):
    data = study(tmp_path, "base: mixtral-8x7b-instruct\nadapter: acme/lora\ndevice_map: null\n")
    spec, base = find_model("mine", data=data), find_model("mixtral-8x7b-instruct")
    assert (spec.dtype, spec.quantization, spec.chat_template) == ("bfloat16", "4bit", True)
    assert (base.device_map, spec.device_map) == ("auto", None)


def test_quantized_is_another_model(wide_folders):
    spec = spec_of(wide_folders["llama"])
    other = spec.model_copy(update={"quantization": "4bit"})
    for identity in (weights_hash, _model_hash):
        assert identity(spec) != identity(other)
    models = loading.Models([spec, other.model_copy(update={"name": "other"})], device="cpu")
    with pytest.raises(InputError, match=r"quantization is None and 4bit; .* loaded alike"):
        models.require_comparable("m", "other")


def test_unloading_frees_the_memory(wide_folders):
    a = spec_of(wide_folders["llama"])
    b = spec_of(wide_folders["gpt2"]).model_copy(update={"name": "other", "dtype": "bfloat16"})
    models = loading.Models([a, b], device="cpu")
    assert models.memory().empty
    tokens = torch.arange(3, 23)[None]
    logits = models.switch("m")(tokens)
    models.switch("other")
    alive = weakref.ref(models.switch("m").original_model)
    table = models.memory().set_index("models")
    plain = AutoModelForCausalLM.from_pretrained(wide_folders["llama"])
    assert table.parameters["m"] == plain.num_parameters()
    unembedding_bias = 4 * 512  # zeros, which the bridge adds
    assert table.bytes["m"] == plain.get_memory_footprint() + unembedding_bias
    assert list(table.dtype) == ["bfloat16", "float32"]  # the one used last comes last
    models.unload("m")
    assert alive() is None
    assert list(models.memory().models) == ["other"]
    assert torch.equal(models.switch("m")(tokens), logits)
