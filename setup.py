"""Puts what a study needs besides the packages into the wheel: notebooks, run files and data."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("notebooks/*.ipynb", "papermill_params/*.yaml", "data/**/*")
LEFT_OUT = "data/models/smollm2-*/adapter/*.safetensors"  # 28 MB, which a clone has


class BuildWithData(build_py):
    """Copies them to ``interp_kit/shipped``; an editable installation uses those of the clone."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        shipped = Path(self.build_lib, "interp_kit", "shipped")
        shutil.rmtree(shipped, ignore_errors=True)  # of an earlier build
        left_out = set(Path().glob(LEFT_OUT))
        for file in (f for pattern in SHIPPED for f in Path().glob(pattern)):
            if file.is_file() and file not in left_out:
                (shipped / file.parent).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, shipped / file)


setup(cmdclass={"build_py": BuildWithData})
