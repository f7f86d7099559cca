"""Every kind of adapter on every architecture computes what PEFT computes, or is refused.

A model of each kind shares a study with its base and a plain LoRA sibling; all are visited in two
orders, and compared with ``PeftModel`` and transformers, each loaded alone.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config

from interp_kit.hub import ADAPTER_WEIGHTS, find_files
from interp_kit.loading import Models
from interp_kit.lora import own_copy
from interp_kit.pretrained import inspect_model
from interp_kit.specs import InputError, ModelSpec
from tests import tiny
from tests.tiny import SHAPE, save_tiny

TOKENS = torch.tensor([[2, 17, 301, 44, 290, 8, 77, 123, 5]])
MOST = 1e-4

# Linear modules that the bridge takes as they are, and those that it splits.
PLAIN = {
    "gemma2": ["q_proj", "v_proj", "down_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "mixtral": ["q_proj", "v_proj", "o_proj"],
    "gpt2": ["c_proj", "c_fc"],
    "gpt_neox": ["dense", "dense_4h_to_h"],
    "phi3": ["o_proj", "down_proj"],
}
FUSED = {
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "phi3": ["qkv_proj", "gate_up_proj"],
}
EMBEDDING = {"gpt2": "wte", "gpt_neox": "embed_in"}
MERGED_ALIKE = ("LoKr", "OFT", "VeRA")  # like LoHa: one architecture is enough


def lora(**how: Any) -> Callable[[str], Any]:
    return lambda arch: peft.LoraConfig(**{"r": 3, "target_modules": PLAIN[arch]} | how)


KINDS: dict[str, Callable[[str], Any]] = {
    "plain": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "bias": lora(bias="all"),
    "head saved": lora(modules_to_save=["lm_head"]),
    "all saved": lambda arch: lora(
        modules_to_save=["lm_head", EMBEDDING.get(arch, "embed_tokens")]
    )(arch),
    "head": lambda arch: lora(target_modules=[*PLAIN[arch], "lm_head"])(arch),
    "embedding": lambda arch: lora(
        target_modules=[*PLAIN[arch], EMBEDDING.get(arch, "embed_tokens")]
    )(arch),
    "whole embedding": lora(),
    "rank patterns": lambda arch: lora(
        rank_pattern={PLAIN[arch][0]: 5}, alpha_pattern={PLAIN[arch][1]: 20}
    )(arch),
    "fused": lambda arch: lora(target_modules=FUSED[arch])(arch),
    "experts": lora(target_parameters=["mlp.experts.gate_up_proj"]),
    "IA3": lambda arch: peft.IA3Config(
        target_modules=PLAIN[arch], feedforward_modules=[PLAIN[arch][1]]
    ),
    "LoHa": lambda arch: peft.LoHaConfig(r=2, target_modules=PLAIN[arch]),
    "LoKr": lambda arch: peft.LoKrConfig(r=2, target_modules=PLAIN[arch]),
    "OFT": lambda arch: peft.OFTConfig(r=0, oft_block_size=4, target_modules=PLAIN[arch]),
    "VeRA": lambda arch: peft.VeraConfig(r=4, target_modules=PLAIN[arch][:1]),
}


def is_possible(kind: str, arch: str) -> bool:
    """Which kinds PEFT itself can put on which architecture, and are worth the time."""
    if kind == "fused":
        return arch in FUSED
    if kind == "experts":
        return arch == "mixtral"
    if kind in MERGED_ALIKE:
        return arch == "llama"
    return not (arch == "gpt2" and kind == "LoHa")  # which needs nn.Linear


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def bases(place) -> Iterator[Callable[[str], Path]]:
    """The folder of a tiny base, by architecture."""
    with pytest.MonkeyPatch.context() as patched:
        phi3 = {"phi3": lambda: Phi3Config(**SHAPE)}
        patched.setattr(tiny, "PARALLEL", tiny.PARALLEL | phi3)
        yield cache(lambda arch: save_tiny(arch, place / arch))


def save_adapter(
    base: Path, config: Any, folder: Path, *, seed: int, whole_embedding: bool = False
) -> Path:
    """An adapter of this kind with random weights of a size that shows."""
    torch.manual_seed(seed)
    model: Any = peft.get_peft_model(plain(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
        if whole_embedding:
            embedding = model.get_input_embeddings().weight
            embedding.add_(0.2 * torch.randn_like(embedding))
    model.save_pretrained(folder, save_embedding_layers=whole_embedding)
    return folder


def plain(base: Path, adapter: Path | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    return peft.PeftModel.from_pretrained(model, str(adapter)).eval() if adapter else model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out = model(TOKENS)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("arch", PLAIN)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_computes_what_peft_computes(kind, arch, bases, place, capsys):
    if not is_possible(kind, arch):
        pytest.skip("PEFT has no such adapter for this architecture, or one like it is tested")
    base, folder = bases(arch), place / f"{kind} {arch}"
    own = save_adapter(
        base, KINDS[kind](arch), folder / "own", seed=1, whole_embedding=kind == "whole embedding"
    )
    sibling = save_adapter(base, KINDS["plain"](arch), folder / "sibling", seed=2)
    specs = [
        ModelSpec(name="base", base=str(base)),
        ModelSpec(name="own", base=str(base), adapter=str(own)),
        ModelSpec(name="sibling", base=str(base), adapter=str(sibling)),
    ]
    right = {s.name: logits(plain(base, Path(s.adapter) if s.adapter else None)) for s in specs}
    assert float((right["own"] - right["base"]).abs().max()) > 100 * MOST
    inspect_model(specs[1])
    errors = {name: 0.0 for name in right}
    for order in (["base", "own", "sibling", "base", "own"], ["own", "base", "sibling", "own"]):
        models = Models(specs, device="cpu")
        for name in order:
            error = float((logits(models.switch(name)) - right[name]).abs().max())
            errors[name] = max(errors[name], error)
        assert float((logits(models.base_of("own")) - right["base"]).abs().max()) <= MOST
    reason = own_copy(find_files(specs[1]))
    with capsys.disabled():
        shown = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
        print(f"\n{kind:14} {arch:9} {shown}  {'own copy' if reason else 'shared'}", end="")
    assert max(errors.values()) <= MOST


def test_a_kind_that_cannot_be_merged_is_refused_before_any_weight_is_read(bases, tmp_path):
    base = bases("llama")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapter = save_adapter(base, config, tmp_path / "prompt", seed=0)
    with pytest.raises(InputError, match="of the kind PROMPT_TUNING, which adds no weights"):
        inspect_model(ModelSpec(name="m", base=str(base), adapter=str(adapter)))


def test_an_own_copy_of_a_quantized_base_is_refused(bases, tmp_path):
    adapter = save_adapter(bases("llama"), KINDS["dora"]("llama"), tmp_path / "dora", seed=0)
    spec = ModelSpec(name="m", base=str(bases("llama")), adapter=str(adapter), quantization="8bit")
    with pytest.raises(InputError, match=r"is a DoRA adapter.*merge it before quantizing"):
        own_copy(find_files(spec))


@pytest.mark.parametrize("how", ["empty", "renamed", "missing"])
def test_tensors_that_are_not_used_or_missing_are_refused(bases, tmp_path, how):
    from safetensors.torch import load_file, save_file

    base = bases("llama")
    for kind in ("plain", "dora"):
        adapter = save_adapter(base, KINDS[kind]("llama"), tmp_path / kind, seed=0)
        weights = load_file(adapter / ADAPTER_WEIGHTS)
        first = min(weights)
        if how == "renamed":
            weights = {k.replace(".weight", ".default.weight"): w for k, w in weights.items()}
        elif how == "missing":
            del weights[first]
        else:
            weights = {}
        save_file(weights, adapter / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        spec = ModelSpec(name="m", base=str(base), adapter=str(adapter))
        with pytest.raises(InputError, match=r"has (no )?weights"):
            Models([spec], device="cpu").switch("m")
