"""Control vectors, read by llama.cpp's rules and added to a plain transformers model.

llama.cpp (``src/llama-adapter.cpp``, ``common/common.cpp``): ``direction.N`` is one row of float32,
added as it is, times the scale, at every position to what block N writes, counted from 0; there is
none for block 0.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from interp_kit.analyses.steering import steered
from interp_kit.decisions import decide
from interp_kit.exports import save_control_vector
from interp_kit.interventions import intervene, shift
from interp_kit.loading import load_model
from tests.conftest import tiny_prompts
from tests.tiny import save_tiny

ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma2", "gpt_neox")


def control_vectors(file) -> dict[int, torch.Tensor]:
    """The file as llama.cpp loads it, by block."""
    read = GGUFReader(file)
    vectors = {}
    for tensor in read.tensors:
        name, number = tensor.name.split(".")
        assert (name, tensor.tensor_type.name) == ("direction", "F32")
        assert int(number) >= 1
        assert tensor.data.ndim == 1
        vectors[int(number)] = torch.tensor(np.array(tensor.data))
    return vectors


@contextmanager
def added(model, vectors, how=lambda h, v: h + v):
    """A plain hook on what each block returns: the stream, in a tuple or alone."""
    inner = model.base_model
    blocks = inner.h if hasattr(inner, "h") else inner.layers

    def hook(v):
        def write(module, given, result):
            alone = isinstance(result, torch.Tensor)
            moved = how(result if alone else result[0], v)
            return moved if alone else (moved, *result[1:])

        return write

    handles = [blocks[n].register_forward_hook(hook(v)) for n, v in vectors.items()]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(params=ARCHITECTURES)
def both(request, tmp_path):
    """A tiny model as a bridge, and plain."""
    folder = save_tiny(request.param, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return load_model(str(folder), device="cpu"), plain


@pytest.fixture
def exported(both, tmp_path):
    """A control vector for block 1 of the three, as notebook 12 writes it; and its direction."""
    v = torch.randn(both[0].cfg.d_model, generator=torch.Generator().manual_seed(3))
    dose = 4.0 * v / v.norm()
    save_control_vector(tmp_path / "v.gguf", dose.numpy(), layer=1, architecture="any")
    return v, dose, control_vectors(tmp_path / "v.gguf")


@torch.no_grad()
def test_the_file_does_to_a_plain_model_what_the_same_shift_does_here(both, exported):
    bridge, plain = both
    _, dose, vectors = exported
    assert list(vectors) == [1]
    for prompt in tiny_prompts(bridge):
        tokens = torch.tensor([prompt.tokens])
        with added(plain, vectors):
            expected = plain(tokens).logits
        with intervene(bridge, {1: shift(dose)}, at="all"):
            assert torch.allclose(bridge(tokens), expected, atol=1e-4)
        with intervene(bridge, {0: shift(dose)}, at="all"):  # the block before is another
            assert (bridge(tokens) - expected).abs().max() > 0.05


@torch.no_grad()
def test_the_files_direction_steers_as_the_notebook_does(both, exported):
    """In units of the stream's own norm, at every position but 0: the same logits and decisions."""
    bridge, plain = both
    v, _, vectors = exported

    def dose(h, v):
        own = h + 0.7 * h.norm(dim=-1, keepdim=True) * v / v.norm()
        return torch.cat([h[:, :1], own[:, 1:]], 1)

    prompts = tiny_prompts(bridge)
    one = next(p for p in prompts if len(p.positive) == len(p.negative) == 1)
    tokens = torch.tensor([one.tokens])
    with added(plain, vectors, dose):
        expected = plain(tokens).logits[0]
    with steered(bridge, v, layer=1, strength=0.7):
        assert torch.allclose(bridge(tokens)[0], expected, atol=1e-4)
        value = decide(bridge, [one]).value.item()
    difference = expected[-1, one.positive[0]] - expected[-1, one.negative[0]]
    assert value == pytest.approx(float(difference), abs=1e-4)
