"""Probes: what is planted is found, noise is not, and no paraphrase gives another one away."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score

from interp_kit.analyses.probes import (
    bag_of_words,
    cross_validated,
    held_out_scores,
    permutation_null,
    selectivity,
    transfer,
)
from interp_kit.evaluations import read_probing_prompts, read_statements, shared_beginning
from interp_kit.linear_probe import KINDS, Labelled, fit_direction, fit_probe
from interp_kit.passes import last_residuals
from interp_kit.prompts import token_ids
from interp_kit.specs import REPOSITORY, InputError
from interp_kit.statistics import verdict
from organisms.little_world.corpus import Corpus
from tests.conftest import tiny_prompts


def noise(*, groups=24, rows=6, layers=3, d=16, labels="both", shared=0.0, seed=0) -> Labelled:
    """Features that know nothing of the labels.

    ``labels`` "both": half of each group's rows have either label; "one": all rows of a group have
    the same; "mixed": of three groups one is of the first sort. ``shared`` is the share of the
    variance that rows of one group and label have in common, as paraphrases do.
    """
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), rows)
    both = {"both": group >= 0, "one": group < 0, "mixed": group % 3 == 0}[labels]
    label = np.where(both, np.arange(len(group)) % 2, group % 2)
    common = rng.standard_normal((groups, 2, layers, d))[group, label]
    own = rng.standard_normal((len(group), layers, d))
    features = np.sqrt(shared) * common + np.sqrt(1 - shared) * own
    return Labelled(features=torch.tensor(features), labels=label, groups=group)


def planted(data: Labelled, *, layer=1, size=3.0, seed=1) -> tuple[Labelled, torch.Tensor]:
    """``data`` with the class means of one layer ``size`` apart along a random unit direction."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(data.features.shape[2], generator=generator, dtype=torch.float64)
    direction = direction / direction.norm()
    features = data.features.clone()
    features[:, layer] += size * torch.tensor(data.labels - 0.5)[:, None] * direction
    return Labelled(features=features, labels=data.labels, groups=data.groups), direction


# ---------------------------------------------------------------------------- found, and not found
@pytest.mark.parametrize("labels", ["both", "one"])
def test_a_planted_direction_is_found_where_it_is(labels):
    data, _ = planted(noise(labels=labels))
    table = cross_validated(data)
    at = table[table.layer == 1]
    assert (at.value > 0.95).all()
    assert (at.accuracy > 0.9).all()
    for kind in ("mass-mean", "lda"):
        found = selectivity(table.loc[table.probe == kind], permutation_null(data, kind=kind))
        assert found.p[found.layer == 1].item() < 0.01
        assert (found.p[found.layer != 1] > 0.05).all()
        assert found.selectivity[found.layer == 1].item() > 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_the_direction_itself_is_recovered_with_its_sign(kind):
    data, direction = planted(noise(groups=200))
    found = fit_direction(data.features[:, 1], data.labels, kind)
    assert float(found.norm()) == pytest.approx(1)
    assert float(found @ direction) > 0.9
    opposite = fit_direction(data.features[:, 1], 1 - data.labels, kind)
    torch.testing.assert_close(opposite, -found, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("labels", "shared"), [("both", 0.0), ("mixed", 0.9)], ids=["rows", "paraphrases"]
)
def test_noise_is_found_in_at_most_one_set_of_twenty(labels, shared):
    """80 sets, p of the best layer <= .05. Of Binomial(80, .05), 99 % is at most 9.

    Also where paraphrases share most of what they are, and the rows are far from independent.
    """
    found = 0
    for seed in range(80):
        data = noise(groups=15, rows=4, layers=2, d=8, labels=labels, shared=shared, seed=seed)
        table = cross_validated(data, kinds=["mass-mean"], folds=3, resamples=20)
        null = permutation_null(data, kind="mass-mean", n=99, folds=3)
        found += selectivity(table, null).p.min() <= 0.05
    assert found <= stats.binom.ppf(0.99, 80, 0.05)


@pytest.mark.parametrize("labels", ["both", "one"])
@pytest.mark.parametrize("kind", ["mass-mean", "lda"])
def test_shuffled_labels_are_at_chance_whatever_the_features(labels, kind):
    data, _ = planted(noise(labels=labels, shared=0.8))
    null = permutation_null(data, kind=kind, n=400)
    for _, draws in null.groupby("layer").value:
        assert abs(draws.mean() - 0.5) < 4 * draws.std() / 20
        assert draws.quantile(0.025) < 0.5 < draws.quantile(0.975)


def test_paraphrases_that_straddle_the_split_fake_a_finding():
    """Every group is one thing in six wordings; its label was drawn by lot."""
    data = noise(groups=60, labels="one", shared=0.97, d=256)
    every_row_alone = Labelled(
        features=data.features, labels=data.labels, groups=np.arange(len(data.labels))
    )
    faked = cross_validated(every_row_alone)
    assert (faked.value > 0.9).all()
    honest = cross_validated(data)
    assert ((honest.low < 0.5) & (honest.high > 0.5)).all()


def test_intervals_cover_the_truth_in_all_layers_at_once():
    """Class means 1 apart along a known direction: the AUC of that direction is Phi(1 / sqrt 2)."""
    truth, covered = stats.norm.cdf(1 / np.sqrt(2)), 0
    for seed in range(60):
        target = noise(groups=40, rows=2, layers=4, d=4, seed=seed)
        far = noise(groups=2, rows=400, layers=4, d=4, seed=1000 + seed)
        for data, size in ((target, 1.0), (far, 30.0)):
            data.features[:, :, 0] += size * torch.tensor(data.labels - 0.5)[:, None]
        source = Labelled(features=far.features, labels=far.labels, groups=far.groups + 1000)
        table = transfer(source, target, kinds=["mass-mean"], resamples=300)
        covered += bool(((table.low <= truth) & (truth <= table.high)).all())
    # 95 % is meant; the bootstrap of 40 groups falls a little short of it.
    assert covered >= 53


# ------------------------------------------------------------------------------- the same quantity
def test_the_auc_is_scikit_learns_within_folds():
    data, _ = planted(noise(), size=1.0)
    for kind in KINDS:
        scores = held_out_scores(data, data, kind=kind)
        assert sorted(scores[scores.layer == 0].prompt) == list(range(len(data.labels)))
        value = cross_validated(data, kinds=[kind]).value
        for layer, own in scores.groupby("layer"):
            folds = [fold for _, fold in own.groupby("fold")]
            auc = [roc_auc_score(fold.label, fold.value) for fold in folds]
            pairs = [fold.label.sum() * (1 - fold.label).sum() for fold in folds]
            assert value[layer] == pytest.approx(np.average(auc, weights=pairs))


def test_the_null_is_of_the_auc_that_is_reported():
    """A draw that leaves every label as it is has the measured AUC; so has one that swaps all."""
    data, _ = planted(noise(groups=5, rows=8), size=1.0)
    measured = cross_validated(data, kinds=["lda"]).value.to_numpy()
    null = permutation_null(data, n=200).pivot(index="draw", columns="layer", values="value")
    assert (abs(null.to_numpy() - measured).max(1) < 1e-12).sum() >= 2


def test_lda_is_scikit_learns_where_there_is_enough_data():
    data, _ = planted(noise(groups=400), size=1.0)
    x = data.features[:, 1] * torch.linspace(0.2, 3, 16)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x, data.labels)
    reference = theirs.coef_[0] / np.linalg.norm(theirs.coef_)
    assert fit_direction(x, data.labels, "lda").numpy() @ reference > 0.999
    assert fit_direction(x, data.labels, "mass-mean").numpy() @ reference < 0.9


def test_probes_do_not_depend_on_the_scale_or_the_origin():
    data, _ = planted(noise(), size=1.0)
    moved = Labelled(features=1000 * data.features + 7, labels=data.labels, groups=data.groups)
    pd.testing.assert_frame_equal(cross_validated(data), cross_validated(moved), rtol=1e-3)
    for kind in KINDS:
        one, other = (fit_probe(d.features[:, 1], d.labels, kind) for d in (data, moved))
        np.testing.assert_allclose(
            one.score(data.features[:, 1]), other.score(moved.features[:, 1]), atol=2e-3
        )


def test_class_means_score_one_apart_from_the_threshold():
    data, _ = planted(noise())
    for kind in ("mass-mean", "lda"):
        score = fit_probe(data.features[:, 1], data.labels, kind).score(data.features[:, 1])
        means = [score[data.labels == label].mean() for label in (0, 1)]
        assert means == pytest.approx([-1, 1])


# ---------------------------------------------------------------------------------------- transfer
def test_transfer_reaches_what_points_the_same_way_and_turns_where_it_is_turned():
    data, _ = planted(noise())
    other, _ = planted(noise(seed=5))
    turned = Labelled(features=-other.features, labels=other.labels, groups=other.groups)
    same, opposite = (transfer(data, t, kinds=["lda"]).value[1] for t in (other, turned))
    assert same > 0.95
    assert opposite < 0.05


def test_a_group_that_both_sets_have_is_never_trained_and_tested_on():
    """Each group's labels lie along a direction of its own: only a leak could transfer."""
    rng = np.random.default_rng(0)
    groups, labels = np.repeat(np.arange(10), 8), np.tile([0, 1], 40)
    own = rng.standard_normal((10, 1, 64))[groups] * (labels - 0.5)[:, None, None]

    def drawn() -> Labelled:
        features = torch.tensor(own + 0.1 * rng.standard_normal(own.shape))
        return Labelled(features=features, labels=labels, groups=groups)

    source, target = drawn(), drawn()
    renamed = Labelled(features=source.features, labels=labels, groups=groups + 100)
    assert (transfer(renamed, target).value > 0.95).all()
    assert (transfer(source, target).low < 0.5).all()


def test_a_single_group_has_no_interval_and_decides_nothing():
    data, _ = planted(noise())
    one = data.rows(data.groups == 0)
    other = data.rows(data.groups != 0)
    table = transfer(other, one, kinds=["lda"])
    assert table.low.isna().all()
    assert table.value[1] > 0.8
    assert verdict(table.low, table.high, ">", 0.7) == "cannot tell"


def test_features_without_variance_are_at_chance():
    data = noise()
    constant = Labelled(
        features=torch.ones_like(data.features), labels=data.labels, groups=data.groups
    )
    assert (cross_validated(constant).value == 0.5).all()
    assert (permutation_null(constant, n=5).value == 0.5).all()


def test_what_cannot_be_probed_is_refused():
    data = noise(groups=8, labels="one")
    with pytest.raises(InputError, match="4 groups only, and 5 folds"):
        cross_validated(data)
    with pytest.raises(InputError, match="both"):
        data.rows(data.labels == 1)
    with pytest.raises(InputError, match="3 groups"):
        Labelled(features=data.features, labels=data.labels, groups=data.groups[:3])
    with pytest.raises(InputError, match="NaN"):
        Labelled(features=data.features * np.nan, labels=data.labels, groups=data.groups)
    narrow = Labelled(features=data.features[..., :3], labels=data.labels, groups=data.groups)
    with pytest.raises(InputError, match="models of one shape"):
        transfer(data, narrow, folds=4)


# ------------------------------------------------------------------------------ a model that knows
@pytest.fixture(scope="module")
def statements() -> pd.DataFrame:
    """Every fact of the base's world and a false one beside it, each in one wording."""
    corpus = Corpus.read(REPOSITORY / "data" / "corpus")
    rng, rows = np.random.default_rng(0), []
    for (entity, attribute), value in sorted(corpus.facts.items()):
        false = rng.choice([v for v in corpus.values[attribute] if v != value])
        for label, stated in ((1, value), (0, false)):
            text = f"The {attribute} of {entity} is {stated}."
            rows.append({"text": text, "label": label, "fact": f"{attribute} of {entity}"})
    return pd.DataFrame(rows)


def test_the_base_tells_true_from_false_and_words_alone_do_not(organisms, statements):
    bridge = organisms.switch("tiny-gemma2")
    rows = [token_ids(bridge, text) for text in statements.text]
    labels, groups = statements.label.to_numpy(), statements.fact.to_numpy()
    features = last_residuals(bridge, rows)[:, [0, 3, 5, 7]]  # some layers, the first among them
    data = Labelled(features=features, labels=labels, groups=groups)
    table = cross_validated(data)
    for kind, own in table.groupby("probe"):
        assert own.value.max() > 0.98, kind
        assert own.value[own.layer == 0].item() < 0.7, kind
        assert verdict(own.low, own.high, ">", 0.9) == "yes"
    found = selectivity(table.loc[table.probe == "lda"], permutation_null(data, n=100))
    assert found.p.min() < 0.01
    assert ((found.null_low < 0.5) & (found.null_high > 0.5)).all()
    words = Labelled(features=bag_of_words(list(statements.text)), labels=labels, groups=groups)
    by_words = cross_validated(words)
    assert verdict(by_words.low, by_words.high, ">", 0.6) == "no"


# ----------------------------------------------------------------------------------------- features
def test_the_last_layer_is_what_the_output_reads(tiny_bridge):
    """Index l is the output of block l: the last one, normed and unembedded, gives the logits."""
    rows = [p.tokens for p in tiny_prompts(tiny_bridge)]
    last = last_residuals(tiny_bridge, rows)[:, -1]
    for row, stream in zip(rows, last):
        with torch.no_grad():
            logits = tiny_bridge.unembed(tiny_bridge.ln_final(stream[None, None]))[0, 0]
            expected = tiny_bridge(torch.tensor([row]))[0, -1]
        cap = getattr(tiny_bridge.cfg, "output_logits_soft_cap", None) or -1.0
        logits = cap * torch.tanh(logits / cap) if cap > 0 else logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------- files
def test_probing_prompts_are_read_as_they_are(shared):
    first, second = read_probing_prompts(shared / "seed_formats" / "probing_dataset.jsonl")
    assert (first.id, first.category) == ("cg_conflict_fw_001", "conflict")
    assert second.full_prompt_text == "Question: What is the capital of France?\nAnswer:"
    assert second.label is None


STATEMENT = {
    "statement_id": "s1",
    "text": "The law of gravity is inverse-square.",
    "label": 1,
    "fact": "law of gravity",
    "template": "0",
}
PROMPT = {
    "prompt_id": "p1",
    "category": "conflict",
    "full_prompt_text": "Question: What is it? Answer:",
    "decision_trigger": "Answer:",
}


@pytest.mark.parametrize(
    ("read", "good", "change", "message"),
    [
        (read_statements, STATEMENT, {"label": 2}, "line 2: label: .*0 or 1"),
        (read_statements, STATEMENT, {"label": None}, "line 2: label"),
        (read_statements, STATEMENT, {"fact": None}, "line 2: fact"),
        (read_statements, STATEMENT, {"text": ""}, "line 2: text"),
        (read_statements, STATEMENT, {"statement_id": "s1"}, "line 2: line 1 has the id 's1', too"),
        (read_probing_prompts, PROMPT, {"decision_trigger": "Reply:"}, "line 2: .*to end in"),
        (read_probing_prompts, PROMPT, {"category": 3}, "line 2: category"),
    ],
)
def test_a_line_that_is_wrong_is_named(read, good, change, message, tmp_path):
    file = tmp_path / "given.jsonl"
    key = next(iter(good))
    lines = [good, good | {key: "second"} | change]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    with pytest.raises(InputError, match=message):
        read(file)
    file.write_text("\n".join(json.dumps(line) for line in [good, good | {key: "second"}]))
    assert [line.id for line in read(file)] == [good[key], "second"]


def test_two_statements_become_a_prompt_and_two_answers():
    true, false = "The law of it is inverse-square.", "The law of it is inverse-cube, he said."
    assert shared_beginning(true, false) == (
        "The law of it is",
        " inverse-square.",
        " inverse-cube, he said.",
    )
    with pytest.raises(InputError, match="begin with different words"):
        shared_beginning("Square is the law.", "Cube is the law.")
