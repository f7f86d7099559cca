"""Adapters that are written, not trained: models of a base, as anybody's LoRA would be."""

from pathlib import Path

import numpy as np
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import save_file

from interp_kit import load_model


def random_adapters(base: str, folder: Path, *, n: int, seed: int = 0) -> list[str]:
    """Fine-tunes with a random LoRA of rank one in one writing projection, 1 % of its norm."""
    bridge, rng = load_model(base, device="cpu"), np.random.default_rng(seed)
    generator, names = torch.Generator().manual_seed(seed), []
    weights = dict(bridge.original_model.named_parameters())
    for number in range(n):
        layer = int(rng.integers(bridge.cfg.n_layers))
        module = f"model.layers.{layer}.{rng.choice(['self_attn.o_proj', 'mlp.down_proj'])}"
        weight = next(
            w
            for key, w in weights.items()
            if key.replace("._original_component", "") == f"{module}.weight"
        )
        a = torch.randn(1, weight.shape[1], generator=generator)
        b = torch.randn(weight.shape[0], 1, generator=generator)
        b *= 0.01 * float(weight.norm()) / float((b @ a).norm())
        names.append(str(folder / f"random-{number}"))
        write_adapter(Path(names[-1]), base, {module: (a, b)})
    return names


def write_adapter(
    folder: Path, base: str, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """A PEFT adapter of A [rank, in] and B [out, rank] by module, as a model of the base."""
    adapter, rank = folder / "adapter", max(len(a) for a, _ in factors.values())
    adapter.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(factors))
    config.save_pretrained(str(adapter))
    tensors = {
        f"base_model.model.{module}.{name}.weight": factor.contiguous()
        for module, both in factors.items()
        for name, factor in zip(("lora_A", "lora_B"), both)
    }
    save_file(tensors, adapter / "adapter_model.safetensors")
    spec = {"base": base, "adapter": "adapter", "label": folder.name}
    (folder / "model.yaml").write_text(yaml.safe_dump(spec))
