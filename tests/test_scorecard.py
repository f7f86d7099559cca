"""The scorecard: what is pooled, what is missing, and where a report shows it."""

import pandas as pd
import pytest

from interp_kit.scorecard import COLUMNS, METHODS, YES, known_cases, read_scorecard, sentence
from interp_kit.specs import REPOSITORY, InputError

ROWS = [
    ("plants", "head, 0.5 nats", "cross-model patching", "hit@1", 0.75, 8),
    ("plants", "mlp, 0.5 nats", "cross-model patching", "hit@1", 1.0, 2),
    ("nulls", YES, "cross-model patching", "false alarms", 0.01, 200),
    ("nulls", "any component", "cross-model patching", "false alarms", 0.5, 200),
    ("probe", "seed, word in the text", "probe", "right", 0.0, 20),
]


@pytest.fixture
def scores():
    table = pd.DataFrame(ROWS, columns=["case", "kind", "method", "score", "value", "n"])
    return table.assign(low=float("nan"), high=float("nan"))[COLUMNS]


def test_cases_are_pooled_by_counts_and_nulls_are_those_of_the_notebooks_rule(scores):
    known = known_cases(scores).set_index("method").loc["cross-model patching"]
    assert (known.hits, known.cases) == (pytest.approx(0.8), 10)
    assert (known.alarms, known.nulls) == (pytest.approx(0.01), 200)
    assert known.low_alarms == pytest.approx(0.0012, abs=1e-4)
    assert known.high_alarms == pytest.approx(0.0357, abs=1e-4)
    said = sentence(known.rename("x").to_frame().T.assign(method="patching").iloc[0])
    assert said == ("patching: right in 8 of 10, 2 of 200 false alarms (95 %: 0.001 to 0.036)")


def test_what_no_case_supports_is_missing_and_not_zero(scores):
    known = known_cases(scores)
    assert list(known.method) == list(dict.fromkeys(METHODS.values()))
    probe = known.set_index("method").loc["probe"]
    assert (probe.cases, probe.nulls) == (0, 0)  # a reading without a control is not the method's
    assert pd.isna(probe.hits)
    assert pd.isna(probe.alarms)
    row = known[known.method == "probe"].iloc[0]
    assert sentence(row) == "probe: no case whose truth is known"


def test_a_file_that_is_no_scorecard_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    for file in (tmp_path / "other.csv", tmp_path / "missing.csv"):
        with pytest.raises(InputError, match="expected"):
            read_scorecard(file)


def test_the_shipped_scorecard_knows_every_notebook_that_has_a_method():
    table = read_scorecard()
    names = {file.stem for file in (REPOSITORY / "notebooks").glob("*.ipynb")}
    assert set(METHODS) <= names
    known = known_cases(table).set_index("method")
    known = known[known.nulls > 0]
    assert (known.nulls >= 200).all(), known.nulls
    assert (known.low_alarms <= 0.05).all(), known.alarms
    assert set(METHODS.values()) <= set(table.method)


def test_exact_methods_are_exact_on_the_shipped_cases():
    table = read_scorecard()
    programs = table[table.case.str.startswith("program/") & (table.score == "AUROC")]
    exact = programs.method.isin(["zero ablation", "mean ablation", "activation patching"])
    assert exact.sum() == 7 * 3
    assert (programs.value[exact] == 1).all()
    moved = table[table.method.str.startswith("cross-model patching")]
    assert (moved.value[moved.score == "forbidden effect"] == 0).all()
    own = moved[(moved.method == "cross-model patching, own weights") & (moved.score == "hit@1")]
    single = own[own.kind.str.contains("^(head|mlp)")]
    assert (single.value * single.n).sum() >= 0.95 * single.n.sum()
