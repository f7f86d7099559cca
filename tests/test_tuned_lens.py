"""The tuned lens: its identity is the logit lens, what is planted is recovered, files hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from interp_kit import layer_readout
from interp_kit.analyses import tuned_lens as tl
from interp_kit.analyses import tuned_lens_training as training
from interp_kit.analyses.lens import logit_lens, trajectory_statistics
from interp_kit.decisions import decide, last_logits, losses
from interp_kit.layer_readout import top_tokens
from interp_kit.loading import load_model
from interp_kit.passes import residual_stream
from interp_kit.prompts import Prompt, encode
from interp_kit.specs import InputError
from interp_kit.texts import own_texts
from interp_kit.translators import TunedLens
from tests.conftest import tiny_prompts
from tests.tiny import WORDS

SHORT = training.LensRecipe(steps=6, rows=4)


def tiny_rows(bridge, n: int = 12) -> list[tuple[int, ...]]:
    """Rows of different length."""
    texts = [
        " " + " ".join(WORDS[(11 * i + 7 * j) % 60] for j in range(6 + i % 5)) for i in range(n)
    ]
    return tl.text_rows(bridge, texts)


def random_lens(bridge, *, size: float = 0.1) -> TunedLens:
    lens, generator = TunedLens.identity(bridge, model="tiny"), torch.Generator().manual_seed(0)
    weight = size * torch.randn(lens.weight.shape, generator=generator)
    return replace(
        lens, weight=weight, bias=size * torch.randn(lens.bias.shape, generator=generator)
    )


def prompt_of(bridge, tokens: tuple[int, ...]) -> Prompt:
    """A prompt of these tokens whose answers part at their first one."""
    prompt = encode(bridge, "The color of salt is", positive=" white", negative=" green")
    return replace(prompt, tokens=tokens)


@pytest.fixture(scope="module")
def llama(tiny_folders):
    return load_model(str(tiny_folders["llama"]), device="cpu")


@pytest.fixture(scope="module")
def base(organisms):
    """The shipped base with its training and held-out texts, and a lens trained for 20 steps."""
    bridge = organisms.switch("tiny-gemma2")
    lines = Path(organisms.specs["tiny-gemma2"].documents).read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    rows, held_out = training.split(tl.text_rows(bridge, texts))
    lens = training.train_tuned_lens(bridge, rows, recipe=training.LensRecipe(steps=20))
    return bridge, rows, held_out[:24], lens


# -------------------------------------------------------------------------------------- identities
def test_the_identity_is_exactly_the_logit_lens(tiny_bridge):
    prompts = tiny_prompts(tiny_bridge)
    tuned = tl.tuned_lens(tiny_bridge, prompts, TunedLens.identity(tiny_bridge))
    expected = logit_lens(tiny_bridge, prompts)
    pd.testing.assert_frame_equal(tuned, expected, check_exact=True)
    assert expected.value.abs().max() > 0.1


def test_after_the_last_block_every_lens_is_the_model(tiny_bridge):
    prompts, lens = tiny_prompts(tiny_bridge), random_lens(tiny_bridge)
    table = tl.tuned_lens(tiny_bridge, prompts, lens)
    last = table[table.layer == tiny_bridge.cfg.n_layers - 1].value.to_numpy()
    assert abs(last - decide(tiny_bridge, prompts).value.to_numpy()).max() <= 1e-4
    assert not table.value.equals(logit_lens(tiny_bridge, prompts).value)  # the lens does something
    rows = tiny_rows(tiny_bridge)
    divergence = tl.lens_divergence(tiny_bridge, rows, {"random": lens})
    final = divergence[divergence.layer == tiny_bridge.cfg.n_layers - 1]
    assert (final.kl == 0).all()
    assert divergence.kl.max() > 0.1


def test_the_two_options_differ_by_the_decision(tiny_bridge):
    prompts, lens = tiny_prompts(tiny_bridge), random_lens(tiny_bridge)
    options = tl.option_trajectories(tiny_bridge, prompts, lens)
    by_option = options.pivot(index=["prompt", "layer"], columns="option", values="value")
    decision = tl.tuned_lens(tiny_bridge, prompts, lens).set_index(["prompt", "layer"]).value
    assert (by_option.positive - by_option.negative - decision).abs().max() <= 1e-5
    assert (by_option < 0).all().all()


def test_cross_entropy_after_the_last_block_is_the_models_loss(llama):
    rows = tiny_rows(llama)
    table = tl.lens_divergence(llama, rows, {"logit lens": TunedLens.identity(llama)})
    final = table[table.layer == llama.cfg.n_layers - 1].set_index("prompt")
    for i, row in enumerate(rows):
        log_p = llama(torch.tensor([row]))[0].log_softmax(-1)
        read = range(1, len(row) - 1)
        expected = -torch.stack([log_p[pos, row[pos + 1]] for pos in read]).mean()
        assert abs(final.cross_entropy[i] - float(expected)) <= 1e-4
        assert final.bits[i] == pytest.approx(final.cross_entropy[i] / 0.6931471805599453)


def test_a_text_is_measured_alike_alone_and_among_others(llama, monkeypatch):
    rows, lens = tiny_rows(llama), random_lens(llama)
    together = tl.lens_divergence(llama, rows, {"lens": lens}).set_index(["prompt", "layer"])
    alone = tl.lens_divergence(llama, rows[3:4], {"lens": lens}).set_index("layer")
    assert (together.loc[3][["kl", "bits"]] - alone[["kl", "bits"]]).abs().max().max() <= 1e-4
    monkeypatch.setattr(layer_readout, "READ_AT_ONCE", 1)  # one position at a time
    parts = tl.lens_divergence(llama, rows, {"lens": lens}).set_index(["prompt", "layer"])
    assert (parts[["kl", "bits"]] - together[["kl", "bits"]]).abs().max().max() <= 1e-4


def test_gradients_do_not_depend_on_how_much_is_read_at_once(llama, monkeypatch):
    rows = tiny_rows(llama)
    whole = training.train_tuned_lens(llama, rows, recipe=SHORT)
    monkeypatch.setattr(layer_readout, "READ_AT_ONCE", 5 * 512 * 4)
    parts = training.train_tuned_lens(llama, rows, recipe=SHORT)
    assert whole.weight.abs().max() > 0.01
    assert torch.allclose(whole.weight, parts.weight, atol=1e-5)


# -------------------------------------------------------------------------------------- training
def test_a_planted_offset_is_recovered(tiny_folders):
    """The last block only adds a constant: its translator is that constant, and the KL is zero."""
    bridge = load_model(str(tiny_folders["gpt2"]), device="cpu")
    block = cast(Any, bridge.original_model).transformer.h[-1]
    offset = 2 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        block.attn.c_proj.weight.zero_()
        block.attn.c_proj.bias.zero_()
        block.mlp.c_proj.weight.zero_()
        block.mlp.c_proj.bias.copy_(offset)
    rows = tiny_rows(bridge, 60)
    lens = training.train_tuned_lens(bridge, rows[:48], recipe=training.LensRecipe(steps=80))
    lenses = {"tuned": lens, "logit": TunedLens.identity(bridge)}
    kl = tl.lens_divergence(bridge, rows[48:], lenses).groupby(["lens", "layer"]).kl.mean()
    print(
        f"KL before the planted block: {kl['logit', 1]:.3f}, translated {kl['tuned', 1]:.4f} nats"
    )
    assert kl["logit", 1] > 0.3
    assert kl["tuned", 1] < 0.02 * kl["logit", 1]
    stream = residual_stream(bridge, [rows[-1]], 4)
    written = (lens.translate(stream) - stream)[2].mean((0, 1))
    parts = written - written.mean(), offset - offset.mean()  # LayerNorm does not see the mean
    assert torch.cosine_similarity(*parts, dim=0) > 0.9


def test_training_lowers_the_divergence_on_held_out_texts(base):
    bridge, rows, held_out, lens = base
    lenses = {"tuned": lens, "logit": TunedLens.identity(bridge), "permuted": lens.permuted()}
    kl = tl.lens_divergence(bridge, held_out, lenses).groupby(["layer", "lens"]).kl.mean().unstack()
    assert (kl.tuned[:-1] < 0.7 * kl.logit[:-1]).all()
    assert (kl.tuned[:-1] < 0.7 * kl.permuted[:-1]).all()
    frequencies = tl.frequency_divergence(bridge, rows[:100], held_out).groupby("layer").kl.mean()
    assert frequencies.nunique() == 1
    middle = list(tl.middle_layers(bridge.cfg.n_layers))
    assert kl.tuned[middle].mean() < 0.5 * frequencies[middle].mean()  # more than frequencies


def test_a_lens_for_text_that_the_model_wrote_itself(shared):
    bridge = load_model(str(shared / "models" / "stories260K"), device="cpu")
    rows, held_out = training.split(own_texts(bridge, 96, length=32))
    lens = training.train_tuned_lens(bridge, rows, recipe=training.LensRecipe(steps=30))
    lenses = {"tuned": lens, "logit": TunedLens.identity(bridge)}
    kl = tl.lens_divergence(bridge, held_out, lenses).groupby(["layer", "lens"]).kl.mean().unstack()
    middle = kl.loc[list(tl.middle_layers(bridge.cfg.n_layers))].mean()
    print(f"stories260K, middle layers: {middle.logit:.2f} -> {middle.tuned:.2f} nats")
    assert middle.tuned < 0.7 * middle.logit


def test_no_constant_prediction_is_better_than_the_mean_prediction(llama):
    rows = tiny_rows(llama)
    best = tl.frequency_divergence(llama, rows, rows)
    weights = [len(row) - 2 for row in rows]  # the mean is over positions
    best = best[best.layer == -1].set_index("prompt").kl

    log_p = torch.cat([llama(torch.tensor([row]))[0, 1:-1].log_softmax(-1) for row in rows])
    mean = log_p.exp().mean(0)
    for other in (torch.full_like(mean, 1 / len(mean)), 0.9 * mean + 0.1 * mean.roll(1)):
        kl = (log_p.exp() * (log_p - other.log())).sum(-1).mean()
        assert (best * weights).sum() / sum(weights) < float(kl)


def test_an_interrupted_training_goes_on_to_the_same_lens(llama, tmp_path, monkeypatch):
    rows = tiny_rows(llama)
    whole = training.train_tuned_lens(llama, rows, recipe=SHORT, model="tiny")
    given, left = layer_readout.residual_stream, [5]

    def interrupted(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return given(*args)

    how: dict[str, Any] = {"recipe": SHORT, "model": "tiny", "checkpoint": tmp_path, "every": 2}
    monkeypatch.setattr(layer_readout, "residual_stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.train_tuned_lens(llama, rows, **how)
    left[0] = 2  # two of six steps are left after the checkpoint at four
    resumed = training.train_tuned_lens(llama, rows, **how)
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)
    left[0] = 0  # done: nothing is computed again
    assert torch.equal(training.train_tuned_lens(llama, rows, **how).weight, whole.weight)
    others: list[dict[str, Any]] = [{"model": "another"}, {"recipe": replace(SHORT, steps=7)}]
    for other in others:
        with pytest.raises(InputError, match="another"):
            training.train_tuned_lens(llama, rows, **how | other)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="not readable"):
        training.train_tuned_lens(llama, rows, **how)


# ------------------------------------------------------------------------------------------ texts
def test_own_texts_are_the_seeds_and_end_once(base):
    bridge = base[0]
    state = torch.get_rng_state()
    rows = own_texts(bridge, 6, length=32, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert own_texts(bridge, 6, length=32, seed=3) == rows
    assert own_texts(bridge, 6, length=8, seed=4) != [row[:8] for row in rows]
    end = bridge.tokenizer.eos_token_id
    for row in rows:
        assert row[0] == bridge.tokenizer.bos_token_id
        assert len(row) <= 32
        assert end not in row[:-1]
    assert any(row[-1] == end for row in rows)
    assert losses(bridge, rows).mean() < 2  # in its own words, it is not surprised


def test_no_text_is_on_both_sides_of_the_split():
    rows = [(1, 2, i % 7) for i in range(40)]
    train, held_out = training.split(rows, held_out=0.3)
    assert sorted(train + held_out) == sorted(set(rows))
    with pytest.raises(InputError, match="1 different texts"):
        training.split(rows[:1])


def test_texts_too_short_to_read_are_refused(llama):
    with pytest.raises(InputError, match="three tokens"):
        training.train_tuned_lens(llama, [(2, 5)], recipe=SHORT)


# ---------------------------------------------------------------------------------------- reading
def test_top_tokens_end_with_the_models_own(base):
    bridge, _, held_out, lens = base
    prompt = prompt_of(bridge, held_out[0][:-2])
    table = top_tokens(bridge, [prompt], translate=lens.translate, k=4)
    best = last_logits(bridge, torch.tensor([prompt.branch]), 1)[0, 0].topk(4)
    last = table[table.layer == bridge.cfg.n_layers - 1]
    assert last.token.tolist() == [bridge.tokenizer.decode([i]) for i in best.indices.tolist()]
    assert last.logit.tolist() == pytest.approx(best.values.tolist(), abs=1e-4)
    records = tl.top_token_records(table)
    assert [r["layer"] for r in records] == list(range(-1, bridge.cfg.n_layers))
    assert set(records[0]) == {"layer", "prompt_id", "top_tokens", "top_probs", "top_logits"}
    assert records[-1]["top_tokens"] == last.token.tolist()
    assert records[-1]["top_probs"] == sorted(records[-1]["top_probs"], reverse=True)


def test_prediction_depth_is_where_the_likeliest_token_stays(base):
    bridge, _, held_out, lens = base
    rows = [row[:-1] for row in held_out[:5]]
    depth = tl.prediction_depth(bridge, rows, lens).set_index(["prompt", "pos"]).value
    assert len(depth) == sum(map(len, rows))
    for i, row in enumerate(rows):
        prompt = prompt_of(bridge, row)
        best = top_tokens(bridge, [prompt], translate=lens.translate, k=1).set_index("layer").token
        first = int(depth[i, len(row) - 1]) - 1  # the layer: after n blocks, n - 1
        assert (best.loc[first:] == best.iloc[-1]).all()
        assert first == -1 or best[first - 1] != best.iloc[-1]
    assert depth.between(0, bridge.cfg.n_layers).all()
    assert depth.nunique() > 2


def test_settling_is_read_off_a_tuned_table_as_off_the_logit_lens(llama):
    table = tl.tuned_lens(llama, tiny_prompts(llama), random_lens(llama))
    for row in trajectory_statistics(table).itertuples():
        own = table[(table.prompt == row.prompt) & (table.layer >= row.settled_layer)]
        assert ((own.value > 0) == (row.final > 0)).all()


# ------------------------------------------------------------------------------------------ files
def test_a_saved_lens_is_read_back_exactly(llama, tmp_path):
    lens = random_lens(llama)
    lens.save(tmp_path / "lens")
    read = TunedLens.load(tmp_path / "lens", bridge=llama)
    assert torch.equal(read.weight, lens.weight)
    assert torch.equal(read.bias, lens.bias)
    assert read.config == lens.config
    # The public package's format, but for the pickle.
    tensors = load_file(tmp_path / "lens" / "params.safetensors")
    assert set(tensors) == {f"{i}.{part}" for i in range(3) for part in ("weight", "bias")}
    config = json.loads((tmp_path / "lens" / "config.json").read_text())
    assert set(config) == {
        "base_model_name_or_path", "d_model", "num_hidden_layers", "bias", "base_model_revision",
        "unembed_hash", "lens_type",
    }  # fmt: skip
    translator = torch.nn.Linear(32, 32)  # as which that package holds it
    translator.load_state_dict({"weight": tensors["1.weight"], "bias": tensors["1.bias"]})
    h = torch.randn(3 + 1, 5, 32)
    assert torch.allclose(h[1] + translator(h[1]), lens.translate(h)[1], atol=1e-6)


def test_a_lens_for_something_else_is_refused(llama, base, tiny_folders, tmp_path):
    lens = random_lens(llama)
    lens.save(tmp_path)
    with pytest.raises(
        InputError, match="3 translators of width 32, the model 8 layers of width 128"
    ):
        TunedLens.load(tmp_path, bridge=base[0])
    with pytest.raises(InputError, match="3 translators"):
        tl.tuned_lens(base[0], [prompt_of(base[0], (2, 5, 6))], lens)
    with pytest.raises(InputError, match="unembedding is not this model's"):
        TunedLens.load(tmp_path, bridge=load_model(str(tiny_folders["gpt2"]), device="cpu"))
    tensors = load_file(tmp_path / "params.safetensors")
    save_file(tensors | {"1.bias": torch.zeros(7)}, tmp_path / "params.safetensors")
    with pytest.raises(
        InputError, match=r"tensor 1.bias has shape \(7,\), config.json says \(32,\)"
    ):
        TunedLens.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"lens_type": "other"}))
    with pytest.raises(InputError, match="lens_type"):
        TunedLens.load(tmp_path)


def test_a_pickle_is_refused_with_how_to_convert_it(tmp_path):
    with pytest.raises(InputError, match="holds no tuned lens"):
        TunedLens.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "params.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match="weights_only=True"):
        TunedLens.load(tmp_path)
