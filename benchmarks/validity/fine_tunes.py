"""Fine-tunes that were trained in one place only: a head, an MLP or a layer of the base.

Twenty steps on the prompts' positive answers, with every other weight frozen: as LoRA, and as whole
weights. So where the change *is* is known, while its direction is whatever training found. *hit@1*
and *AUROC* of the trained components, as in ``plant_cases``.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.validity.methods import COMPONENTS, LAYERS
from benchmarks.validity.plant_cases import RANKED, component_rows, prompts_of
from benchmarks.validity.plants import layer_of
from benchmarks.validity.rows import Row, row
from benchmarks.validity.scores import check_truth, hit_at_1
from interp_kit import load_model
from interp_kit.catalogue import find_model
from interp_kit.loading import load_models
from interp_kit.passes import shared_passes
from interp_kit.pretrained import load_huggingface
from interp_kit.prompts import Prompt

STEPS, RATE = 20, 5e-3
EACH = 4  # fine-tunes of a head, an MLP and a layer, each as LoRA and whole
METHODS = (*RANKED, "circuit")


def confined(base: str) -> Iterator[Row]:
    bridge, prompts = load_model(base, device="cpu"), prompts_of(base)
    n_layers, n_heads = bridge.cfg.n_layers, bridge.cfg.n_heads
    rng, trained = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(EACH):
            layer, head = int(rng.integers(n_layers - 1)), int(rng.integers(n_heads))
            for kind in ("head", "mlp", "layer"):
                for whole in (False, True):
                    name = str(Path(folder) / f"{kind}-{number}-{'whole' if whole else 'lora'}")
                    _train(base, prompts, Path(name), kind, layer, head, n_heads, whole=whole)
                    trained[name] = kind, layer, head, whole
        models = load_models([base, *trained], device="cpu")
        for name, (kind, layer, head, whole) in tqdm(trained.items(), desc="confined"):
            truth = {
                "head": {f"L{layer}H{head}"},
                "mlp": {f"L{layer}_MLP"},
                "layer": {f"L{layer}_MLP", *(f"L{layer}H{h}" for h in range(n_heads))},
            }[kind]
            about = f"{kind}, {'whole weights' if whole else 'LoRA'}"
            with shared_passes():
                for method in METHODS:
                    found = COMPONENTS[method](models, base, name, prompts)
                    check_truth(found, truth, case=name)
                    before = {node for node in found if layer_of(node) < layer}
                    yield from component_rows(method, found, truth, before, kind=about)
                for method, rank in LAYERS.items():
                    found = rank(models, base, name, prompts)
                    yield row(method, "hit@1", hit_at_1(found, {f"L{layer}"}), kind=about)


# ------------------------------------------------------------------------------------- internals
def _train(
    base: str,
    prompts: list[Prompt],
    folder: Path,
    kind: str,
    layer: int,
    head: int,
    n_heads: int,
    *,
    whole: bool,
) -> None:
    """Fine-tune one part of ``base`` on the positive answers, and save it as a model of the kit."""
    torch.manual_seed(layer)
    plain: Any = load_huggingface(find_model(base), device="cpu")
    modules = {"head": ["self_attn.o_proj"], "mlp": ["mlp.down_proj"]}.get(
        kind, ["self_attn.o_proj", "self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]
    )
    targets = [f"model.layers.{layer}.{module}" for module in modules]
    model: Any = plain
    if whole:
        for name, weight in plain.named_parameters():
            weight.requires_grad_(name.removesuffix(".weight") in targets)
    else:
        model = get_peft_model(plain, LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    own = [weight for weight in model.parameters() if weight.requires_grad]
    if kind == "head":  # inputs of the output projection are the heads' z, one after another
        for weight in own:
            if weight.shape[1] % n_heads == 0 and weight.shape[1] > 4:
                size = weight.shape[1] // n_heads
                mask = torch.zeros(weight.shape[1])
                mask[head * size : (head + 1) * size] = 1
                if not whole:
                    weight.data *= mask
                weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    optimizer = torch.optim.Adam(own, lr=RATE if not whole else RATE / 10)
    for _ in range(STEPS):
        loss: Tensor = -torch.stack([_decision(model, prompt) for prompt in prompts]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir(parents=True)
    spec = {"base": base, "adapter": "weights", "label": folder.name}
    if whole:
        spec = {"base": "weights", "tuned_from": base, "label": folder.name}
        AutoTokenizer.from_pretrained(find_model(base).base).save_pretrained(folder / "weights")
    model.save_pretrained(folder / "weights")
    (folder / "model.yaml").write_text(yaml.safe_dump(spec))


def _decision(model: nn.Module, prompt: Prompt) -> Tensor:
    logits = model(torch.tensor([prompt.branch])).logits[0, -1]
    positive, negative = prompt.branch_ids
    return logits[positive] - logits[negative]
