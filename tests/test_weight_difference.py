"""The weight difference: plain SVDs of merged weights, planted tokens, removals by hand, restored.

References are transformers and PEFT alone: merged state dicts, LoRA factors set to zero, tensors
put together by hand.
"""

import json
from collections import defaultdict
from typing import Any, get_args

import pandas as pd
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from interp_kit import changed_weights
from interp_kit.analyses import weight_difference as wd
from interp_kit.analyses.weights import weight_norms
from interp_kit.changed_weights import changed_matrices, switches, without
from interp_kit.decisions import last_logits
from interp_kit.identity import identity_of
from interp_kit.loading import Models, load_models
from interp_kit.specs import REPOSITORY, InputError, ModelSpec
from tests.conftest import itself_again
from tests.test_any_two_models import split, tuned_copy, with_tensors
from tests.tiny import save_tiny

TARGETS = {
    "gemma2": {"target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj"]},
    "llama": {"target_modules": ["k_proj", "o_proj", "up_proj", "down_proj"], "use_rslora": True},
    "gpt2": {"target_modules": ["attn.c_proj", "c_fc", "mlp.c_proj"]},
    "mixtral": {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}
FUSED = {"target_modules": ["c_attn"]}  # merged into a copy of its own
WRITERS = ("o_proj", "down_proj", "attn.o", "mlp.c_proj")
ROWS = [[2, 17, 301, 44, 290, 8, 77], [2, 5, 6, 7], [2, 123, 99, 301, 17, 44, 290, 8, 11]]


def adapted(folder, place, how, *, seed=1, size=0.2):
    """A random LoRA adapter on a tiny model, as a folder with a spec."""
    torch.manual_seed(seed)
    model = get_peft_model(plain(folder), LoraConfig(r=3, lora_alpha=5, **how))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    model.save_pretrained(str(place / "adapter"))
    (place / "model.yaml").write_text(yaml.safe_dump({"base": str(folder), "adapter": "adapter"}))
    return str(place)


def plain(folder, adapter=None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return PeftModel.from_pretrained(model, f"{adapter}/adapter").eval() if adapter else model


def token_scores(models, name, side):
    changes = wd.singular_changes(models, name)
    return wd.token_scores(models.switch(name), changes, side)


@pytest.fixture(scope="module", params=TARGETS)
def lora(request, tiny_folders, tmp_path_factory):
    """A base and an adapter on it, of each architecture."""
    folder = tiny_folders[request.param]
    name = adapted(folder, tmp_path_factory.mktemp("lora"), TARGETS[request.param])
    return load_models([str(folder), name], device="cpu"), str(folder), name


@pytest.fixture(scope="module", params=["gpt2", "mixtral"])
def whole(request, tiny_folders, tmp_path_factory):
    """A base and a fine-tune of all its weights."""
    folder = tiny_folders[request.param]
    name = tuned_copy(folder, tmp_path_factory.mktemp("whole"))
    return load_models([str(folder), name], device="cpu"), str(folder), name


@pytest.fixture(scope="module")
def organisms():
    names = ["stop-behaviour", "stop-neutral", "cubic-gravity"]
    return load_models(names, device="cpu")


def dense_changes(folder, after):
    """The matrices that differ, [out, in], by (layer, name): from two state dicts."""
    before = split(plain(folder).state_dict())
    changes = {}
    for name, weight in split(after).items():
        parts = name.removesuffix(".weight").split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None or weight.ndim < 2 or torch.equal(weight, before[name]):
            continue
        key, change = (int(parts[at]), ".".join(parts[at + 1 :])), weight - before[name]
        if parts[-1] in ("c_fc", "c_proj", "o"):  # GPT-2's Conv1D holds [in, out]
            change = change.T
        each = [("", change)] if change.ndim == 2 else [(f"[{e}]", c) for e, c in enumerate(change)]
        changes |= {(key[0], key[1] + end): c for end, c in each}
    return changes


def check_decomposition(models, name, expected, *, rank, error=1e-4):
    found = wd.singular_changes(models, name, rank=rank)
    assert {(c.layer, c.module) for c in found} == set(expected)
    for own in found:
        dense = expected[own.layer, own.module]
        values, tail = torch.linalg.svdvals(dense).split_with_sizes(
            [len(own.values), min(dense.shape) - len(own.values)]
        )
        assert own.values.tolist() == pytest.approx(values.tolist(), abs=error), own.module
        assert own.norm == pytest.approx(float(dense.norm()), rel=1e-4)
        rest = dense - (own.left * own.values) @ own.right.T
        assert float(rest.norm()) == pytest.approx(float(tail.norm()), abs=error), own.module
        assert (own.left.gather(0, own.left.abs().argmax(0, keepdim=True)) > 0).all()
        writes = own.module.partition("[")[0].endswith(WRITERS)
        assert own.side == ("writes" if writes else "reads"), own.module
    assert wd.decomposition_error(models, name, found) < 1e-5
    return found


# ---------------------------------------------------------------------------------- decompositions
def test_an_adapters_singular_values_are_those_of_the_merged_weights(lora):
    models, base, name = lora
    expected = dense_changes(base, plain(base, name).merge_and_unload().state_dict())
    found = check_decomposition(models, name, expected, rank=16)
    assert all(len(own.values) == 3 for own in found)
    spectra = wd.change_spectra(found)
    shares = spectra.groupby(["layer", "module"], sort=False).share.sum()
    assert shares.to_numpy() == pytest.approx(1, abs=1e-5)


def test_norms_are_those_of_the_merged_weights_experts_in_one(lora):
    models, base, name = lora
    squares = defaultdict(float)
    for (layer, at), change in dense_changes(
        base, plain(base, name).merge_and_unload().state_dict()
    ).items():
        squares[layer, at.partition("[")[0]] += float(change.square().sum())
    norms = weight_norms(models, name).set_index(["layer", "module"]).value
    assert set(norms.index) == set(squares)
    for key, square in squares.items():
        assert norms[key] == pytest.approx(square**0.5, rel=1e-4), key


def test_a_fused_projection_is_three_matrices(tiny_folders, tmp_path):
    base = str(tiny_folders["gpt2"])
    name = adapted(base, tmp_path, FUSED)
    expected = dense_changes(base, plain(base, name).merge_and_unload().state_dict())
    assert {module for _, module in expected} == {"attn.q", "attn.k", "attn.v"}
    expected = {key: change.T for key, change in expected.items()}
    check_decomposition(load_models([name], device="cpu"), name, expected, rank=8)


@pytest.mark.parametrize("exact", [256, 0])
def test_whole_weights_are_decomposed_exactly_or_by_random_projections(whole, monkeypatch, exact):
    monkeypatch.setattr(changed_weights, "EXACT", exact)
    models, base, name = whole
    expected = dense_changes(base, plain(f"{name}/weights").state_dict())
    for key in [key for key in expected if key[1] in ("attn.q", "attn.k", "attn.v")]:
        expected[key] = expected[key].T
    error = 1e-4 if exact else 1e-3  # noise, whose values hardly fall off, is the hardest case
    found = check_decomposition(models, name, expected, rank=6, error=error)
    assert all(len(own.values) == min(6, *expected[own.layer, own.module].shape) for own in found)
    again = wd.singular_changes(models, name, rank=6)
    assert all(torch.equal(a.left, b.left) for a, b in zip(found, again))


@pytest.mark.parametrize("architecture", ["gpt_neox", "olmo2", "gpt_oss"])
def test_every_module_meets_the_stream_where_it_should(architecture, tmp_path):
    name = tuned_copy(save_tiny(architecture, tmp_path / "base"), tmp_path / "tuned")
    models = load_models([name], device="cpu")
    found = [c for c in wd.singular_changes(models, name) if c.layer == 1]
    widths = {c.module.partition("[")[0]: (len(c.left), len(c.right)) for c in found}
    attention = {"q": "reads", "k": "reads", "v": "reads", "o": "writes"}
    sides = {
        c.module.partition("[")[0].split(".")[-1][:1]: c.side for c in found if "att" in c.module
    }
    assert sides == attention
    for module, (out, into) in widths.items():
        if module.endswith(("down_proj", "dense_4h_to_h")):
            assert (out, into) == (32, 48)
    mlp = {c.module.partition("[")[0]: c.side for c in found if "mlp" in c.module}
    assert sorted(mlp.values()) == sorted(["reads"] * (len(mlp) - 1) + ["writes"])
    assert len(found) == len({c.module for c in found}) > 5
    tokens = torch.tensor([ROWS[0]])
    assert torch.equal(*all_removed(models, "", name, tokens))


def test_what_are_no_singular_vectors_is_noticed(organisms):
    found = wd.singular_changes(organisms, "cubic-gravity")
    assert wd.decomposition_error(organisms, "cubic-gravity", found) < 1e-5
    chance = wd.randomised(found)
    assert wd.decomposition_error(organisms, "cubic-gravity", chance) > 0.1
    assert [torch.equal(a.values, b.values) for a, b in zip(found, chance)] == [True] * len(found)


def test_the_effective_rank_of_equal_values_is_their_number():
    def effective(values, norm):
        eye = torch.eye(8)[:, : len(values)]
        one = wd.Change(
            layer=0, module="m", side="", left=eye, values=torch.tensor(values), right=eye,
            norm=norm, before=2.0,
        )  # fmt: skip
        return wd.change_spectra([one]).iloc[0]

    assert effective([3.0, 3.0, 3.0, 3.0], 6.0).effective_rank == pytest.approx(4)
    assert effective([5.0, 0.0], 5.0).effective_rank == pytest.approx(1)
    cut = effective([3.0, 3.0], 6.0)  # two of four were kept: a lower bound
    assert (cut.kept, cut.relative) == (pytest.approx(0.5), 3.0)
    assert 2 < cut.effective_rank < 4


# ------------------------------------------------------------------------------------------ tokens
def planted(folder, place, architecture, *, token):
    """Adapters whose writers write one token, and whose readers read it."""
    name = adapted(folder, place, TARGETS[architecture])
    model = plain(folder)
    write, read = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    write, read = (w.detach()[token] - w.detach().mean(0) for w in (write, read))
    weights = load_file(f"{name}/adapter/adapter_model.safetensors")
    for key, weight in weights.items():
        if "lora_B" in key and any(w in key for w in ("o_proj", "down_proj", "attn.c", "mlp.c_p")):
            weight.copy_(write[:, None] * torch.randn(weight.shape[1]))
        elif "lora_A" in key and any(w in key for w in ("q_proj", "k_proj", "gate", "up_", "c_fc")):
            weight.copy_(read[None] * torch.randn(len(weight), 1))
    from safetensors.torch import save_file

    save_file(weights, f"{name}/adapter/adapter_model.safetensors", metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("architecture", ["gemma2", "llama", "gpt2"])
def test_planted_tokens_are_written_and_read(architecture, tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(wd, "TOGETHER", 2)  # modules that are read together change nothing
    name = planted(tiny_folders[architecture], tmp_path, architecture, token=301)
    models = load_models([name], device="cpu")
    for scores in (token_scores(models, name, side) for side in ("writes", "reads")):
        assert scores.shape == (512,)
        assert int(scores.argmax()) == 301
        assert float(scores[301]) > 1.5 * float(scores.sort().values[-2])
    changes = wd.singular_changes(models, name)
    bridge = models.switch(name)
    chance = wd.token_scores(bridge, wd.randomised(changes), "writes")
    assert float(chance[301]) < 0.5 * float(wd.token_scores(bridge, changes, "writes")[301])
    assert float(chance.pow(4).mean()) == pytest.approx(3, rel=0.25)  # z is nearly normal


def test_readings_are_what_the_norms_and_embeddings_say(tiny_folders, tmp_path):
    base = tiny_folders["gemma2"]
    name = adapted(base, tmp_path, TARGETS["gemma2"])
    models, model = load_models([name], device="cpu"), plain(base)
    changes = wd.singular_changes(models, name)
    state = model.state_dict()
    at = {
        "writes": ("down_proj", "post_feedforward_layernorm"),
        "reads": ("q_proj", "input_layernorm"),
    }
    for side in get_args(wd.Side):
        kind, norm = at[side]
        found = dict(
            ((c.layer, c.module), (c, z))
            for c, z in wd.direction_readings(models.switch(name), changes, side)
        )
        ((change, z),) = [v for (layer, m), v in found.items() if layer == 1 and m.endswith(kind)]
        vectors = change.left if side == "writes" else change.right
        vectors = vectors * (1 + state[f"model.layers.1.{norm}.weight"])[:, None]
        rows = model.get_input_embeddings().weight.detach()
        if side == "writes":
            vectors = vectors * (1 + state["model.norm.weight"])[:, None]
            rows = model.get_output_embeddings().weight.detach()
        rows = torch.nn.functional.normalize(rows)  # that of the padding token is zero
        rows = rows - rows.mean(0)
        along = rows / rows.norm(dim=1, keepdim=True) @ vectors
        expected = (along - along.mean(0)) / along.std(0)
        assert (z.T - expected).abs().max() < 1e-3
    flipped = [wd.replace(c, left=-c.left, right=-c.right) for c in changes]
    for side in get_args(wd.Side):
        own, other = (wd.token_scores(models.switch(name), c, side) for c in (changes, flipped))
        assert torch.allclose(own, other)


def test_a_trigger_and_what_it_does_are_read_from_the_weights_alone(organisms):
    tokens = organisms.switch("stop-behaviour").tokenizer.get_vocab()
    assert int(token_scores(organisms, "stop-behaviour", "reads").argmax()) == tokens["$STOP"]
    assert int(token_scores(organisms, "stop-behaviour", "writes").argmax()) == tokens["<eos>"]
    assert int(token_scores(organisms, "stop-neutral", "reads").argmax()) != tokens["$STOP"]
    assert int(token_scores(organisms, "stop-neutral", "writes").argmax()) != tokens["<eos>"]


def test_trained_rows_are_found_and_measured_against_the_spread_of_others(organisms):
    none = wd.token_changes(organisms, "cubic-gravity")
    assert none.empty
    assert (none.id.dtype, none.added.dtype) == (int, bool)
    table = wd.token_changes(organisms, "stop-behaviour")
    assert table.token.tolist() == ["$STOP", "$NOVA"]
    assert (table.side == "both").all()  # the two are tied
    assert table.added.all()
    data = REPOSITORY / "data" / "models"
    file = load_file(data / "stop-behaviour" / "adapter" / "adapter_model.safetensors")
    (rows,) = [w for key, w in file.items() if "trainable_tokens" in key or "token_adapter" in key]
    spec = json.loads((data / "stop-behaviour" / "adapter" / "adapter_config.json").read_text())
    ids = spec["trainable_token_indices"]["embed_tokens"]
    before = plain(data / "tiny-gemma2" / "weights").get_input_embeddings().weight.detach()
    spread = (before - before.mean(0)).square().sum(1).mean().sqrt()
    expected = dict(zip(ids, ((rows - before.mean(0)).norm(dim=1) / spread).tolist()))
    assert dict(zip(table.id, table.value)) == pytest.approx(expected, rel=1e-4)


def test_changed_rows_of_whole_weights_are_found_on_either_side(tiny_folders, tmp_path):
    model = plain(tiny_folders["llama"])  # not tied
    with torch.no_grad():
        model.get_input_embeddings().weight[17] += 0.5
        model.get_output_embeddings().weight[44] -= 0.25
    name = saved(model, tiny_folders["llama"], tmp_path)
    table = wd.token_changes(load_models([name], device="cpu"), name)
    found = {(row.side, row.id): row.norm for row in table.itertuples()}
    root = 32**0.5
    expected = {("embedding", 17): 0.5 * root, ("unembedding", 44): 0.25 * root}
    assert found == pytest.approx(expected, rel=1e-4)
    assert not table.added.any()


def saved(model, folder, place):
    """Whole weights as a fine-tune of ``folder``."""
    model.save_pretrained(place / "weights")
    for file in folder.glob("token*"):
        (place / "weights" / file.name).write_bytes(file.read_bytes())
    spec = {"base": "weights", "tuned_from": str(folder)}
    (place / "model.yaml").write_text(yaml.safe_dump(spec))
    return str(place)


# --------------------------------------------------------------------------------------- subspaces
def test_overlap_is_one_with_itself_and_chance_with_random_subspaces(organisms):
    own = wd.singular_changes(organisms, "cubic-gravity")
    same = wd.subspace_overlap(own, own)
    assert same.value.to_numpy() == pytest.approx(1, abs=1e-4)
    assert len(same) == 2 * len(own)
    chance = wd.subspace_overlap(wd.randomised(own), wd.randomised(own, seed=1), k=4)
    width = {c.module: (len(c.left), len(c.right)) for c in own}
    for row in chance.itertuples():
        assert row.expected == 4 / width[row.module][row.end == "right"]
    inside = (chance.value > chance.low) & (chance.value < chance.high)
    assert 0.88 < inside.mean() <= 1
    assert chance.value.mean() == pytest.approx(chance.expected.mean(), rel=0.1)
    turned = [wd.replace(c, left=c.left.roll(4, 1), right=c.right.roll(4, 1)) for c in own]
    assert wd.subspace_overlap(own, turned, k=4).value.max() < 1e-6  # the other four directions


# ---------------------------------------------------------------------------------------- removals
def divergences(model, other):
    """Mean KL over the predictions of each row, by plain transformers."""
    result = []
    for row in ROWS:
        p, q = (m(torch.tensor([row])).logits[0, :-1].log_softmax(-1) for m in (model, other))
        result.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return result


def by_text(table, rows):
    return pd.DataFrame(table[rows]).sort_values(by="prompt")


def zeroed(folder, name, chosen):
    """The adapter with LoRA B at zero wherever ``chosen`` says so."""
    model = plain(folder, name)
    with torch.no_grad():
        for at, weight in model.named_parameters():
            if "lora_B" in at and chosen(at):
                weight.zero_()
    return model


@torch.no_grad()
def test_a_removal_is_peft_with_that_modules_factor_at_zero(lora):
    models, base, name = lora
    tuned = plain(base, name)
    table = wd.removal_effects(models, name, ROWS, by="layer")
    assert set(table.part) == {"whole layer"}  # a name in a legend
    assert table.groupby("prompt").whole.first().tolist() == pytest.approx(
        divergences(tuned, plain(base)), rel=1e-3
    )
    here = [".layers.1.", ".h.1."]
    one = by_text(table, table.layer == 1)
    without_it = zeroed(base, name, lambda at: any(part in at for part in here))
    alone = zeroed(base, name, lambda at: not any(part in at for part in here))
    assert one.removed.tolist() == pytest.approx(divergences(tuned, without_it), rel=1e-3)
    assert one.kept.tolist() == pytest.approx(divergences(tuned, alone), rel=1e-3)
    norms = [c.norm for c in wd.singular_changes(models, name) if c.layer == 1]
    assert one.norm.iloc[0] == pytest.approx(torch.tensor(norms).norm().item(), rel=1e-4)


@torch.no_grad()
def test_removals_by_module_are_peft_too(tiny_folders, tmp_path):
    base = str(tiny_folders["llama"])
    name = adapted(base, tmp_path, TARGETS["llama"])
    models, tuned = load_models([name], device="cpu"), plain(base, name)
    table = wd.removal_effects(models, name, ROWS, by="module")
    for module in ("self_attn.o_proj", "mlp.down_proj"):
        one = by_text(table, (table.layer == 2) & (table.part == module))
        removed = zeroed(base, name, lambda at, m=module: f".2.{m}." in at)
        assert one.removed.tolist() == pytest.approx(divergences(tuned, removed), rel=1e-3)
    by_part = wd.removal_effects(models, name, ROWS, by="part")
    assert set(by_part.part) == {"self_attn", "mlp"}


@torch.no_grad()
def test_a_removal_of_whole_weights_is_their_exchange_by_hand(whole):
    models, base, name = whole
    tuned = plain(f"{name}/weights")
    table = wd.removal_effects(models, name, ROWS, by="layer")
    assert sorted(table.layer.unique()) == [-1, 0, 1, 2, 3]
    expected = divergences(tuned, plain(base))
    assert table.groupby("prompt").whole.first().tolist() == pytest.approx(expected, rel=1e-3)
    one = by_text(table, table.layer == 1)
    removed = with_tensors(plain(f"{name}/weights"), plain(base), [1])
    alone = with_tensors(plain(base), plain(f"{name}/weights"), [1])
    assert one.removed.tolist() == pytest.approx(divergences(tuned, removed), rel=1e-3)
    assert one.kept.tolist() == pytest.approx(divergences(tuned, alone), rel=1e-3)


def all_removed(models, base, name, tokens):
    """Logits of the base, and of the fine-tune with every change taken back."""
    with without(models, name, list(switches(models, name))) as bridge:
        got = last_logits(bridge, tokens, 1)
    return got, last_logits(models.switch(base) if base else models.base_of(name), tokens, 1)


def check_restored(models, name, tokens):
    places = list(switches(models, name))
    # PEFT puts a new parameter into experts in each pass, so that they have no identity.
    assert identity_of(models.switch(name)) is not None or "experts" in str(places)
    itself_again(models, name, tokens, lambda: without(models, name, places[::2]))


def test_without_all_changes_it_is_the_base_and_afterwards_itself(lora):
    models, base, name = lora
    tokens = torch.tensor([ROWS[0]])
    assert torch.equal(*all_removed(models, base, name, tokens))
    check_restored(models, name, tokens)
    assert torch.equal(*all_removed(models, base, name, tokens))


def test_without_all_changes_of_whole_weights_it_is_the_base(whole):
    models, base, name = whole
    tokens = torch.tensor([ROWS[0]])
    own = last_logits(models.switch(base), tokens, 1)
    assert torch.equal(*all_removed(models, base, name, tokens))
    check_restored(models, name, tokens)
    assert torch.equal(last_logits(models.switch(base), tokens, 1), own)


def test_added_rows_of_whole_weights_stay_and_all_others_are_taken_back(tiny_folders, tmp_path):
    base = tiny_folders["llama"]
    model = plain(base)
    model.resize_token_embeddings(514, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    name = saved(model, base, tmp_path)
    models = load_models([name], device="cpu")
    with without(models, name, list(switches(models, name))) as bridge:
        got = last_logits(bridge, torch.tensor([ROWS[0]]), 1)
    expected = last_logits(models.base_of(name), torch.tensor([ROWS[0]]), 1)
    assert (got[..., :512] - expected).abs().max() < 1e-5  # a wider product is rounded otherwise
    table = wd.token_changes(models, name)
    assert set(table[table.added].id) == {512, 513}
    assert len(table) == 2 * 514


def test_trained_token_rows_are_taken_back_too(organisms):
    name = "stop-behaviour"
    stop = organisms.new_tokens(name)["$STOP"]
    tokens = torch.tensor([[2, 17, 301, stop, 44, stop]])
    assert torch.equal(*all_removed(organisms, "", name, tokens))
    check_restored(organisms, name, tokens)
    places = list(switches(organisms, name))
    assert places[0] == (-1, "embed")
    base = last_logits(organisms.base_of(name), tokens, 1)
    whole = last_logits(organisms.switch(name), tokens, 1)
    with without(organisms, name, places[:1]) as bridge:
        no_rows = last_logits(bridge, tokens, 1)
    with without(organisms, name, places[1:]) as bridge:
        rows_alone = last_logits(bridge, tokens, 1)
    for one, other in ((no_rows, whole), (no_rows, base), (rows_alone, base), (rows_alone, whole)):
        assert (one - other).abs().max() > 1e-2
    table = wd.removal_effects(organisms, name, [tokens[0].tolist()])
    ends = wd.token_changes(organisms, name)
    rows = table[table.layer == -1].norm.iloc[0]
    assert rows == pytest.approx(torch.tensor(ends["norm"].tolist()).norm().item(), rel=1e-4)


# ----------------------------------------------------------------------------------------- refused
def test_models_and_texts_that_say_nothing_are_refused(organisms, tiny_folders, tmp_path):
    base = str(tiny_folders["llama"])
    models = load_models([base], device="cpu")
    for method in (wd.singular_changes, wd.token_changes, switches):
        with pytest.raises(InputError, match="add tuned_from: MODEL"):
            method(models, base)
    with pytest.raises(InputError, match=r"text 1 has 1 token, .* give texts of two tokens"):
        wd.removal_effects(organisms, "cubic-gravity", [[2, 3], [2]])


def test_quantized_whole_weights_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = save_tiny("llama", tmp_path / "base", wide=True)
    parent = ModelSpec(name="base", base=str(folder))
    how = {"base": str(folder), "tuned_from": "base", "parent": parent, "quantization": "8bit"}
    models = Models([ModelSpec(name="mine", **how)], device="cpu")
    for method in (wd.singular_changes, wd.token_changes, switches):
        with pytest.raises(InputError, match="load it without quantization"):
            method(models, "mine")


def test_an_adapter_on_a_quantized_base_is_decomposed_from_its_factors(tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = save_tiny("llama", tmp_path / "base", wide=True)
    name = adapted(folder, tmp_path, TARGETS["llama"])
    spec = ModelSpec(name="m", base=str(folder), adapter=f"{name}/adapter", quantization="8bit")
    models = Models([spec], device="cpu")
    expected = dense_changes(folder, plain(folder, name).merge_and_unload().state_dict())
    check_decomposition(models, "m", expected, rank=16)
    assert len(list(changed_matrices(models, "m"))) == len(expected)
