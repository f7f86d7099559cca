"""The matrix is checked before a kernel starts; cells are skipped, kept apart and reported."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
import yaml
from typer.testing import CliRunner

from interp_batch import matrix
from interp_batch.cli import app
from interp_batch.matrix import expand, matching
from interp_batch.results import read_status, stale, write_status
from interp_batch.runner import run_cells
from interp_kit.catalogue import read_run
from interp_kit.specs import REPOSITORY, InputError
from tests.study import BODY, PARAMETERS, cells_of, light_imports, make_study, write_notebook


@pytest.fixture
def study(tmp_path):
    """Two small notebooks, a run file, an output folder."""
    return make_study(tmp_path)


def test_a_notebook_runs_once_for_each_thing_that_it_takes_one_of(study):
    cells = cells_of(study, {"each": None, "all": None})
    assert [c.id for c in cells] == [
        "each/tiny-gemma2/CC_continue",
        "each/tiny-gemma2/CD_punished",
        "each/ipd-hybrid/CC_continue",
        "each/ipd-hybrid/CD_punished",
        "all/all-models/all-scenarios",
    ]
    assert cells[-1].parameters["models"] == ["tiny-gemma2", "ipd-hybrid"]
    assert all(str(c.folder).startswith(str(study / "outputs" / "trial")) for c in cells)


@pytest.mark.parametrize(
    ("notebooks", "expected"),
    [
        ({"eahc": None}, "did you mean 'each'?"),
        ({"../each": None}, "unknown notebook '../each'"),
        ({"each": {"time": 2}}, "unknown parameter of each 'time': did you mean 'times'?"),
        ({"each": {"times": "2"}}, "parameter 'times' (int): input should be a valid integer"),
        ({"each": {"times": 2.5}}, "got 2.5"),
        ({"each": {"model": "x"}}, "is set by the run file"),
    ],
)
def test_notebooks_and_parameters_are_checked_before_anything_runs(study, notebooks, expected):
    with pytest.raises(InputError) as error:
        cells_of(study, notebooks)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert not (study / "outputs").exists()


def test_a_notebook_without_parameters_is_refused(study):
    write_notebook(study / "notebooks", "bare", tag="other")
    with pytest.raises(InputError, match="no cell is tagged 'parameters'"):
        cells_of(study, {"bare": None})


def test_only_keeps_what_matches_and_refuses_what_matches_nothing(study):
    cells = cells_of(study, {"each": None, "all": None})
    kept = [c.id for c in matching(cells, ["each/*/CD_*"])]
    assert kept == ["each/tiny-gemma2/CD_punished", "each/ipd-hybrid/CD_punished"]
    assert matching(cells, []) == cells
    with pytest.raises(InputError, match="matches no cell"):
        matching(cells, ["nothing"])


def test_the_key_follows_parameters_and_sources_not_outputs(study):
    (first, *_) = cells_of(study, {"each": None})
    assert first.key == cells_of(study, {"each": None})[0].key
    assert first.key != cells_of(study, {"each": {"times": 2}})[0].key


def test_the_key_follows_named_models_and_evaluation_files(study):
    data = study / "data"
    (data / "evaluations" / "mine").mkdir(parents=True)
    questions = data / "evaluations" / "mine" / "mcqs.jsonl"
    questions.write_text("{}\n")
    named = (
        PARAMETERS + 'reference: str = ""  # model\nevaluation: str = "mine"  # evaluation set\n'
    )
    write_notebook(study / "notebooks", "named", named)
    given = {"named": {"reference": "ipd-hybrid"}}
    before = cells_of(study, given, data=data)
    assert (
        before[0].key != cells_of(study, {"named": {"reference": "tiny-gemma2"}}, data=data)[0].key
    )
    questions.write_text("{}\n{}\n")
    assert before[0].key != cells_of(study, given, data=data)[0].key
    with pytest.raises(InputError, match="did you mean 'ipd-hybrid'"):
        cells_of(study, {"named": {"reference": "ipd-hybird"}})


def test_the_key_follows_the_sources_that_compute_and_no_others(study, monkeypatch):
    for package in ("interp_kit", "organisms", "interp_batch"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / package, study / package, ignore=ignored)
    monkeypatch.setattr(matrix, "PACKAGES", study)
    assert matrix.COMPUTING == ("interp_kit", "organisms")
    edited = {
        "interp_kit/statistics.py": True,
        "organisms/little_world/grammar.py": True,
        "interp_batch/runner.py": False,
        "interp_batch/report/gallery.py": False,
    }
    for file, is_input in edited.items():
        before = cells_of(study, {"each": None})[0].key
        with (study / file).open("a") as source:
            source.write("# another line\n")
        assert (cells_of(study, {"each": None})[0].key != before) is is_input, file


def test_a_failed_cell_never_hides_the_others_and_is_run_again(study):
    given = {"each": {"fail_on": "CD_punished"}}
    cells = cells_of(study, given)
    outcomes = run_cells(cells, workers=2)
    assert [o.state for o in outcomes] == ["ok", "error", "ok", "error"]
    assert (cells[0].folder / "result.txt").read_text() == "tiny-gemma2"
    status = read_status(cells[1].failed_folder)
    assert status["error"].startswith("ValueError: made to fail")
    assert "\x1b" not in status["traceback"]
    # What is done is skipped; what failed is tried again, even after a half-written status.
    (cells[2].folder / "status.json").write_text('{"state": "ok", "key"')
    assert [c.id for c in stale(cells)] == [cells[1].id, cells[2].id, cells[3].id]
    again = run_cells(cells, workers=2)
    assert [o.state for o in again] == ["up to date", "error", "ok", "error"]


def test_every_output_folder_is_complete(study):
    (cell, *_) = cells_of(study, {"each": None})
    run_cells([cell], workers=1)
    assert {p.name for p in cell.folder.iterdir()} == {"run.ipynb", "status.json", "result.txt"}
    assert json.loads((cell.folder / "status.json").read_text())["key"] == cell.key


# ------------------------------------------------------------------------------ the command line
def run_file(folder, **changes):
    content = {
        "models": ["ipd-hybrid"],
        "scenarios": ["CC_continue"],
        "notebooks": {"01_logit_lens": {}},
    }
    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(content | changes))
    return file


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"models": ["ipd-hybird"]}, "unknown model 'ipd-hybird': did you mean 'ipd-hybrid'?"),
        ({"scenarios": ["CC"]}, "unknown scenario 'CC'"),
        ({"notebooks": {"01_logit_lens": {"topk": 1}}}, "did you mean 'top_k'?"),
        ({"notebooks": {"01_logit_lens": {"top_k": "3"}}}, "valid integer, got '3'"),
        (
            {"notebooks": {"04_cross_model_patching": {"pairs": [["ipd-hybrid", "ipd-hybird"]]}}},
            "'pairs': unknown model 'ipd-hybird': did you mean 'ipd-hybrid'?",
        ),
        (
            {"notebooks": {"05_circuits": {"pairs": [["ipd-hybrid"]]}}},
            "holds ['ipd-hybrid']; expected [source, target]",
        ),
        (
            {"notebooks": {"91_summary": {"reference": "ipd-strategic"}}},
            "its default names 'ipd-deontological', which is no model of this run",
        ),
    ],
)
def test_bad_run_files_end_with_one_line_and_exit_code_2(tmp_path, command, changes, expected):
    outputs = tmp_path / "outputs"
    code, _, error = command("run", run_file(tmp_path, **changes), "--outputs", outputs)
    assert code == 2
    assert expected in error
    assert len(error.strip().splitlines()) == 1
    assert not outputs.exists()


def test_a_shell_gets_one_line_and_exit_code_2(tmp_path):
    file = run_file(tmp_path, scenarios=["CC"])
    done = subprocess.run(
        [sys.executable, "-m", "interp_batch.cli", "run", str(file)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": light_imports(tmp_path)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("interp-kit: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("trouble", ["alike", "too long", "corrupt"])
def test_what_only_the_model_can_tell_is_found_before_anything_is_written(
    tmp_path, command, trouble
):
    scenario = yaml.safe_load((REPOSITORY / "data/scenarios/CC_continue.yaml").read_text())
    if trouble == "alike":
        scenario["decision"] |= {"negative": " action2.5", "positive": " action2"}
    elif trouble == "too long":
        scenario["prompts"][0]["text"] *= 20
        del scenario["prompts"][0]["segments"]
    (tmp_path / "scenarios").mkdir()
    (tmp_path / "scenarios" / "mine.yaml").write_text(yaml.safe_dump(scenario))
    shutil.copytree(REPOSITORY / "data/models/ipd-hybrid", tmp_path / "models" / "spoiled")
    weights = tmp_path / "models" / "spoiled" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    model = "spoiled" if trouble == "corrupt" else "ipd-hybrid"
    file = run_file(tmp_path, models=[model], scenarios=["mine"])
    outputs = tmp_path / "outputs"
    code, _, error = command("run", file, "--data", tmp_path, "--outputs", outputs)
    expected = {
        "alike": "is the beginning of the other",
        "too long": "context holds 512",
        "corrupt": "safetensors",
    }
    assert code == 2
    assert expected[trouble] in error
    assert not outputs.exists()


def test_check_runs_nothing(command):
    code, out, _ = command("check", REPOSITORY / "papermill_params" / "demo.yaml")
    assert code == 0
    assert "81 cells, all inputs are good" in out


def test_every_run_file_is_good():
    for file in (REPOSITORY / "papermill_params").glob("*.yaml"):
        assert expand(read_run(file), outputs=REPOSITORY / "outputs")


def test_list_and_help_name_everything():
    listed = CliRunner().invoke(app, ["list"]).output
    assert all(word in listed for word in ("ipd-hybrid", "CC_temptation", "01_logit_lens"))
    for name in ("run", "check", "report", "list", "train"):
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0


@pytest.fixture
def run_study(study, monkeypatch):
    """``interp-kit run`` on two cells of the study, of which one is made to fail."""
    write_notebook(study / "notebooks", "each", body=BODY.replace("fail_on", "'CC_continue'"))
    defaults = (matrix.expand.__kwdefaults__ or {}) | {"notebooks": study / "notebooks"}
    monkeypatch.setattr(matrix.expand, "__kwdefaults__", defaults)
    monkeypatch.setattr("interp_batch.cli.preflight", lambda cells, data: None)
    file = run_file(study, notebooks={"each": {}}, scenarios=["CC_continue", "CD_punished"])
    own = signal.getsignal(signal.SIGTERM)
    yield lambda *options: CliRunner().invoke(
        app, ["run", str(file), "--outputs", str(study / "outputs"), *options]
    )
    signal.signal(signal.SIGTERM, own)


def test_a_failed_cell_gives_exit_code_1_and_a_report_without_raw_html(study, run_study):
    result = run_study()
    assert result.exit_code == 1
    index = (study / "outputs" / "mine" / "index.html").read_text()
    assert "1 failed" in index
    assert "<script>alert" not in index
    assert "&lt;script&gt;alert" in index


def test_several_run_files_are_one_batch_with_a_report_each(study, run_study):
    other = study / "other.yaml"
    other.write_text((study / "mine.yaml").read_text())
    result = run_study(str(other))
    assert [line for line in result.output.splitlines() if line.startswith("1 ok")] == [
        "1 ok, 0 up to date, 1 failed"
    ] * 2
    for name in ("mine", "other"):
        assert f"Report: {study / 'outputs' / name / 'index.html'}" in result.output
        assert (study / "outputs" / name / "each/ipd-hybrid/CD_punished/result.txt").is_file()
    assert "0 ok, 1 up to date, 1 failed" in run_study(str(other), "--only", "*/*/*").output
    shutil.rmtree(study / "outputs" / "other")
    other.write_text(other.read_text().replace("CD_punished", "DC_exploited"))
    some = run_study(str(other), "--only", "*/*/CD_punished")
    assert some.output.count("Report: ") == 1  # nothing of the other was asked for
    twice = run_study(str(study / "mine.yaml"))
    assert "two run files have the same name" in str(twice.exception)


def test_what_failed_is_listed_and_run_alone_and_fresh_runs_all(study, run_study):
    nothing = run_study("--only", "failed")
    assert isinstance(nothing.exception, InputError)
    assert "has failed" in str(nothing.exception)
    assert run_study("--dry-run").output.splitlines() == [
        "to run      each/ipd-hybrid/CC_continue",
        "to run      each/ipd-hybrid/CD_punished",
        "2 of 2 cells to run",
    ]
    assert not (study / "outputs").exists()
    assert run_study().exit_code == 1
    made = study / "outputs" / "mine" / "each" / "ipd-hybrid" / "CD_punished" / "result.txt"
    first = made.stat().st_mtime_ns
    listed = run_study("--dry-run", "--only", "failed").output.splitlines()
    assert listed[0].startswith("to run      each/ipd-hybrid/CC_continue  ")
    assert listed[1:] == ["1 of 1 cells to run"]
    assert "0 ok, 0 up to date, 1 failed" in run_study("--only", "failed").output
    assert "0 ok, 1 up to date, 1 failed" in run_study().output
    assert made.stat().st_mtime_ns == first
    assert "1 ok, 0 up to date, 1 failed" in run_study("--fresh").output
    assert made.stat().st_mtime_ns > first


def test_results_of_another_version_are_named_and_run_again(study, run_study):
    """0.1 wrote its version to summary.json only; later versions write it to status.json, too."""

    def result(name: str, made_by: str, *, key: str, in_status: bool) -> None:
        folder = study / "outputs" / "mine" / "each" / "ipd-hybrid" / name
        folder.mkdir(parents=True)
        made = {"interp-kit": made_by} if in_status else {}
        write_status(folder, {"state": "ok", "key": key, "made": made, "files": {}})
        (folder / "summary.json").write_text(json.dumps({"versions": {"interp-kit": made_by}}))

    result("CC_continue", "0.1.0", key="old", in_status=False)
    result("CD_punished", "0.1.1", key="old", in_status=True)
    said = run_study("--dry-run").output.splitlines()
    assert said[0] == "1 result was made by interp-kit 0.1.0 and is run again"
    assert said[1] == "1 result was made by interp-kit 0.1.1 and is run again"
    assert said[-1] == "2 of 2 cells to run"
    shutil.rmtree(study / "outputs")
    for name in ("CC_continue", "CD_punished"):
        result(name, "0.1.0", key="old", in_status=False)
    said = run_study().output.splitlines()
    assert said[0] == "2 results were made by interp-kit 0.1.0 and are run again"
    shutil.rmtree(study / "outputs")
    result("CC_continue", version("interp-kit"), key="old", in_status=True)  # other inputs
    assert "made by" not in run_study("--dry-run").output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--kernel", "python3-wram"],
            "unknown kernel 'python3-wram': did you mean 'python3-warm'",
        ),
        (
            ["--kernel", "python3", "--memory", "1"],
            "--memory works with the kernel python3-warm only",
        ),
    ],
)
def test_a_kernel_that_cannot_do_it_is_refused(study, run_study, options, expected):
    result = run_study(*options)
    assert isinstance(result.exception, InputError)
    assert expected in str(result.exception)
    assert not list((study / "outputs").rglob("status.json"))
