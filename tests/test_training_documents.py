"""Scores of training documents: gradients of plain PEFT, steps as foreseen, nothing left behind."""

import numpy as np
import pandas as pd
import peft
import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM

from interp_kit.analyses import training_documents as td
from interp_kit.decisions import decide
from interp_kit.finetuning.lora_training import Row
from interp_kit.identity import identity_of
from interp_kit.loading import load_models
from interp_kit.specs import InputError
from tests.conftest import tiny_prompts
from tests.tiny import ARCHITECTURES, WORDS

LINEAR = {
    "gpt2": ["attn.c_proj", "mlp.c_fc"],
    "mixtral": ["q_proj", "o_proj"],
}


def save_tuned(base, folder, **how):
    """A LoRA with random weights on ``base``, of a size that shows, with documents."""
    torch.manual_seed(1)
    how = {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], **how}
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **how)
    model = AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    (folder / "model.yaml").write_text(yaml.safe_dump({"base": str(base), "adapter": "adapter"}))
    return str(folder)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tuned(request, tiny_folders, tmp_path_factory):
    base = tiny_folders[request.param]
    where = {"target_modules": LINEAR[request.param]} if request.param in LINEAR else {}
    name = save_tuned(base, tmp_path_factory.mktemp("tuned"), **where)
    return load_models([str(base), name], device="cpu"), name, base


@pytest.fixture(scope="module")
def one(tiny_folders, tmp_path_factory):
    base = tiny_folders["llama"]
    name = save_tuned(base, tmp_path_factory.mktemp("one"))
    return load_models([str(base), name], device="cpu"), name, base


def documents(bridge, n=5):
    """Rows of different lengths; of the last one only the end is predicted."""
    texts = [" " + " ".join(WORDS[(3 * i + j) % 60] for j in range(5 + 4 * i)) for i in range(n)]
    rows = [bridge.tokenizer(text)["input_ids"] for text in texts]
    return [Row(ids, slice(2 if i == n - 1 else 0, -1)) for i, ids in enumerate(rows)]


def plain_gradients(base, name, rows, prompts, at):
    """By plain PEFT, one row at a time: scores and norms."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    model = peft.PeftModel.from_pretrained(model, f"{name}/adapter").eval()
    factors = [p for n, p in model.named_parameters() if "lora_" in n]
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.requires_grad_("lora_" in n)
            if "lora_B" in n:
                p.mul_(at)

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, factors)])

    def log_p(ids, read):
        ids = torch.tensor([list(ids)])
        each = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        return -each[read]

    decision = 0.0
    for p in prompts:
        at_end = slice(len(p.tokens) - 1, None)
        both = [log_p([*p.tokens, *ids], at_end).sum() for ids in (p.positive, p.negative)]
        decision = decision + (both[0] - both[1]) / len(prompts)
    toward = gradient(decision)
    means = [log_p(ids, slice(read.start, None)).mean() for ids, read in rows]
    own = torch.stack([gradient(mean) for mean in means])
    return own @ toward, own.norm(dim=1), F.cosine_similarity(own, toward[None])


def test_the_gradients_are_those_of_plain_peft(tuned):
    check_against_peft(*tuned, at=0.5)


@pytest.mark.parametrize("at", [0.0, 1.0])
def test_so_they_are_at_the_base_and_at_the_fine_tune(one, at):
    check_against_peft(*one, at=at)


def check_against_peft(models, name, base, *, at):
    bridge = models.switch(name)
    rows, prompts = documents(bridge), tiny_prompts(bridge)
    table = td.gradient_scores(bridge, rows, prompts, at=at)
    value, norm, cosine = plain_gradients(base, name, rows, prompts, at)
    assert np.allclose(table.value, value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))
    assert np.allclose(table.norm, norm, rtol=1e-3)
    assert np.allclose(table.cosine, cosine, atol=1e-4)
    assert table.length.tolist() == [5, 9, 13, 17, 19]
    assert value.abs().min() > 1e-3


def test_a_step_on_a_document_changes_the_decision_as_foreseen(tuned):
    models, name, _ = tuned
    bridge = models.switch(name)
    rows, prompts = documents(bridge), tiny_prompts(bridge)
    for at in (0.0, 1.0):
        cosines = td.gradient_scores(bridge, rows, prompts, at=at).cosine
        row = rows[int(cosines.abs().argmax())]
        foreseen, measured = td.change_by_a_step(bridge, row, prompts, nats=5e-4, at=at)
        assert foreseen == pytest.approx(5e-4 * np.sign(cosines[cosines.abs().argmax()]))
        assert measured == pytest.approx(foreseen, rel=0.05)


def test_a_document_of_the_answers_raises_the_decision(one):
    models, name, _ = one
    bridge = models.switch(name)
    prompt = tiny_prompts(bridge)[2]  # its answers are a token each
    ends = slice(len(prompt.tokens) - 1, -1)
    rows = [Row([*prompt.tokens, *ids], ends) for ids in (prompt.positive, prompt.negative)]
    for at in (0.0, 1.0):
        value = td.gradient_scores(bridge, rows, [prompt], at=at).value
        assert value[0] > 0 > value[1]


def state(bridge):
    parameters = list(bridge.original_model.parameters())
    hooks = [h for m in bridge.original_model.modules() for h in m._forward_hooks]
    flags = [(p.requires_grad, p.grad) for p in parameters]
    return [p.detach().clone() for p in parameters], flags, hooks, identity_of(bridge)


def test_nothing_is_left_behind(one, monkeypatch):
    models, name, _ = one
    bridge = models.switch(name)
    rows, prompts = documents(bridge), tiny_prompts(bridge)
    weights, *others = state(bridge)
    decisions = decide(bridge, prompts).value
    td.gradient_scores(bridge, rows, prompts)
    td.change_by_a_step(bridge, rows[0], prompts)
    with monkeypatch.context() as patched:
        patched.setattr(td, "_decision", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            td.change_by_a_step(bridge, rows[0], prompts)
        patched.setattr(td, "_mean_log_p", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            td.gradient_scores(bridge, rows, prompts)
    after, *same = state(bridge)
    assert all(torch.equal(a, b) for a, b in zip(weights, after))
    assert same == others
    assert not any(p.requires_grad for p in bridge.parameters())
    assert (decide(bridge, prompts).value == decisions).all()


def test_rows_of_a_batch_do_not_see_each_other(one):
    models, name, _ = one
    bridge = models.switch(name)
    rows, prompts = documents(bridge, 7), tiny_prompts(bridge)
    together = td.gradient_scores(bridge, rows, prompts)
    alone = [td.gradient_scores(bridge, [row], prompts).value[0] for row in rows]
    assert np.allclose(together.value, alone, rtol=1e-4)
    probes = td.probe_scores(models, name, rows, prompts)
    own = [td.probe_scores(models, name, [row], prompts) for row in rows]
    for column in ("value", "base"):
        assert np.allclose(probes[column], np.hstack([t[column] for t in own]), atol=1e-4)


def test_a_probe_projects_on_what_the_fine_tuning_moved(one):
    models, name, _ = one
    prompts = tiny_prompts(models.switch(name))[2:]  # one whose answers part at once
    row = (prompts[0].tokens[:1] + prompts[0].tokens, slice(0, -1))
    table = td.probe_scores(models, name, [row], prompts)
    assert table.layer.tolist() == [-1, 0, 1, 2]
    assert abs(table.value[0]) < 1e-6  # no adapter changes the embedding
    streams = []
    for switch in (models.base_of, models.switch):
        bridge = switch(name)  # the same one, computing as another model
        for tokens in (row[0], prompts[0].branch):
            _, cache = bridge.run_with_cache(torch.tensor([list(tokens)]))
            streams.append(cache["blocks.1.hook_resid_post"][0])
    direction = F.normalize((streams[3] - streams[1])[-1], dim=0)
    assert table.base[2] == pytest.approx(float(streams[0][1:].mean(0) @ direction), abs=1e-4)
    moved = (streams[2] - streams[0])[1:].mean(0) @ direction
    assert table.value[2] == pytest.approx(float(moved), abs=1e-4)


def test_words_of_the_positive_answer_count_for_it(one):
    models, name, _ = one
    bridge = models.switch(name)
    prompts = tiny_prompts(bridge)[2:]  # " ba" or " ku"
    texts = ["ba ba ba", "ku ku ku", "zz zz"]
    rows = [Row(bridge.tokenizer(text)["input_ids"], slice(0, -1)) for text in texts]
    table = td.word_scores(bridge, rows, prompts)
    assert table.answer[0] > 0 > table.answer[1]
    assert table.answer[2] == table.words[2] == 0


def test_separation_counts_pairs_in_order_and_shuffled_labels_are_at_chance():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    scores = pd.DataFrame(
        {"right": labels, "noise": rng.normal(size=200), "some": labels + rng.normal(size=200)}
    )
    table = td.separation(scores, labels).set_index("method")
    right = (scores.some.to_numpy()[100:, None] > scores.some.to_numpy()[:100]).mean()
    assert table.value["right"] == table.low["right"] == 1
    assert table.value["some"] == pytest.approx(right)
    assert table.low["noise"] < 0.5 < table.high["noise"]
    shuffled = td.separation(scores, rng.permutation(labels)).set_index("method")
    assert (shuffled.low < 0.5).all()
    assert (shuffled.high > 0.5).all()
    less = td.separation(scores, labels, beyond=["some", "noise"]).set_index("method")
    assert less.index.tolist() == ["right"]
    assert less.value["right"] == pytest.approx(1 - right)


def test_what_cannot_be_scored_is_refused(one, tiny_folders, tmp_path):
    models, name, base = one
    bridge = models.switch(name)
    rows, prompts = documents(bridge), tiny_prompts(bridge)
    with pytest.raises(InputError, match="no documents"):
        td.gradient_scores(bridge, [], prompts)
    with pytest.raises(InputError, match="document 1 has no predicted token"):
        td.probe_scores(models, name, [rows[0], Row([3], slice(0, -1))], prompts)
    with pytest.raises(InputError, match="expected 0 and 1"):
        td.separation(pd.DataFrame({"a": [1.0, 2.0]}), np.array([1, 1]))
    with pytest.raises(InputError, match="without a LoRA"):
        td.gradient_scores(models.switch(str(base)), rows, prompts)
    merged = save_tuned(tiny_folders["llama"], tmp_path, use_dora=True)
    with pytest.raises(InputError, match="use probe_scores"):
        td.gradient_scores(load_models([merged], device="cpu").switch(merged), rows, prompts)
    experts = tmp_path / "experts"
    experts.mkdir()
    how = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    mixture = save_tuned(tiny_folders["mixtral"], experts, **how)
    with pytest.raises(InputError, match="does not keep documents apart"):
        td.gradient_scores(load_models([mixture], device="cpu").switch(mixture), rows, prompts)
