"""Arguments and options that several commands take."""

import os
from pathlib import Path
from typing import Annotated

import typer

CORES = os.cpu_count() or 1

RunFile = Annotated[
    Path, typer.Argument(help="A run file (YAML), for example papermill_params/demo.yaml.")
]
RunFiles = Annotated[
    list[Path] | None,
    typer.Argument(
        help="One or several run files (YAML), for example papermill_params/demo.yaml. Without, "
        "in a study: all in papermill_params."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Your own data folder with models/ and scenarios/, such as a study. It is searched "
        "before the shipped data. Inside a study, the study is searched without it."
    ),
]
Outputs = Annotated[
    Path, typer.Option(help="Folder for results; each run file gets a subfolder of its name.")
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        help="Restrict to cells that match: a notebook, a model, a scenario, or "
        "notebook/model/scenario; * and ? are wildcards. `failed` selects the cells whose last run "
        "failed. May be given several times."
    ),
]
Workers = Annotated[
    int,
    typer.Option(min=1, help="How many notebooks run at once. They share the cores between them."),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Also run cells whose results are up to date.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="List the cells that would run, and run nothing.")
]
Kernel = Annotated[
    str | None,
    typer.Option(
        help="Jupyter kernel. python3-warm (default on Linux) starts in a fraction of a second, "
        "because its libraries are already imported; python3 is the standard kernel."
    ),
]
CellTimeout = Annotated[
    int, typer.Option("--timeout", min=1, help="Longest time for one code cell, in seconds.")
]
Memory = Annotated[
    float | None,
    typer.Option(min=0.1, help="Most memory for one notebook, in GiB (python3-warm only)."),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Run on the workers of a Dask cluster, given its scheduler's address (tcp://...)."
    ),
]
