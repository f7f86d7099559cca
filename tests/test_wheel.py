"""From the wheel alone to a report: `pip install`, `interp-kit new`, `interp-kit run`.

Dependencies come from the packages that run this test, and the code under test from the wheel.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from interp_kit.specs import REPOSITORY
from tests.test_study import files_of

LARGEST = 40e6  # bytes of the wheel
BUILD = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
OURS = ("PYTHON", "JUPYTER", "INTERP_KIT", "IPYTHON")


@contextmanager
def timed(step: str) -> Iterator[None]:
    """Print the seconds that a step took (`pytest -s` shows them)."""
    started = time.monotonic()
    yield
    print(f"{step:<32}{time.monotonic() - started:6.1f} s")


def run(command: list, cwd: Path) -> str:
    """What a command prints; it sees neither this checkout nor this environment's settings."""
    clean = {name: v for name, v in os.environ.items() if not name.startswith(OURS)}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the source distribution of what git has, apart from the checkout."""
    root = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True)
    if tracked.returncode:
        pytest.skip("needs a git checkout")
    for name in tracked.stdout.decode().split("\0"):
        if (REPOSITORY / name).is_file() and not name.startswith(("tests/", "benchmarks/")):
            (root / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, root / "source" / name)
    with timed("source distribution"):
        run([sys.executable, "-c", BUILD, "build_sdist", root], root / "source")
    (packed,) = root.glob("*.tar.gz")
    shutil.unpack_archive(packed, root / "unpacked", filter="data")
    (unpacked,) = (root / "unpacked").iterdir()
    with timed("wheel"):
        run([sys.executable, "-c", BUILD, "build_wheel", root], unpacked)
    (built,) = root.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of a virtual environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    with timed("empty environment"):
        run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    with timed("pip install"):
        run([*pip, "install", "-q", "--no-deps", "--no-index", wheel], folder.parent)
    return folder


def test_the_wheel_is_small_and_holds_what_a_study_needs(wheel):
    assert wheel.stat().st_size < LARGEST
    held = set(zipfile.ZipFile(wheel).namelist())
    inside = {name.partition("interp_kit/shipped/")[2] for name in held}
    tracked = subprocess.run(
        ["git", "ls-files", "notebooks/*.ipynb", "papermill_params", "data"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    left_out = set(tracked) - inside
    assert {Path(name).suffix for name in left_out} == {".safetensors"}
    assert all(name.startswith("data/models/smollm2-") for name in left_out)
    assert inside - set(tracked) == {""}
    assert not {name.split("/")[0] for name in held} & {"tests", "benchmarks", "docs", "notebooks"}


def test_from_the_wheel_to_a_report(installed, tmp_path):
    python, interp_kit = installed / "bin" / "python", installed / "bin" / "interp-kit"
    code = "import interp_kit, interp_batch, organisms; from interp_kit import specs\n"
    code += "print(*[m.__file__ for m in (interp_kit, interp_batch, organisms)], specs.REPOSITORY)"
    *modules, data = run([python, "-c", code], tmp_path).split()
    assert all(Path(found).is_relative_to(installed) for found in (*modules, data))
    packages = Path(data).parents[1]
    before = files_of(packages / "interp_kit" / "shipped")

    with timed("interp-kit new my_study"):
        run([interp_kit, "new", "my_study"], tmp_path)
    study = tmp_path / "my_study"
    with timed("interp-kit run"):
        out = run([interp_kit, "run", "--workers", os.cpu_count() or 1], study)
    assert "9 ok, 0 up to date, 0 failed" in out
    results = study / "outputs" / "first"
    page = (results / "index.html").read_text(encoding="utf-8")
    statuses = [json.loads(file.read_text()) for file in results.glob("*/*/*/status.json")]
    assert len(statuses) == 9
    for status in statuses:
        assert status["id"] in page
        assert status["made"]["commit"] == ""  # not from a checkout
        assert any(name.startswith("figures/") for name in status["files"])
        cell = (results / status["id"] / "index.html").read_text(encoding="utf-8")
        assert 'class="plot"' in cell
    with timed("interp-kit run, again"):
        assert "0 ok, 9 up to date, 0 failed" in run([interp_kit, "run"], study)
    assert files_of(packages / "interp_kit" / "shipped") == before
    assert len([p for p in packages.iterdir() if p.name.startswith("interp_kit")]) == 2


def test_what_is_left_out_is_said(installed, tmp_path):
    interp_kit = installed / "bin" / "interp-kit"
    listed = run([interp_kit, "list"], tmp_path)
    apart = [line.split()[0] for line in listed.splitlines() if "come with a clone" in line]
    assert {"smollm2-cubic", "smollm2-deontological-plain", "smollm2-stop"} <= set(apart)
    assert all(name.startswith("smollm2-") for name in apart)
    assert "[not on this machine: google/gemma-2-2b-it]" in listed
    code = "from interp_kit import load_model; load_model('smollm2-cubic')"
    done = subprocess.run(
        [installed / "bin" / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1].startswith(
        "interp_kit.specs.InputError: model 'smollm2-cubic': the weights of its adapter are not in "
    )
