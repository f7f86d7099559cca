"""``python -m interp_batch.zygote``: imports once, then forks a kernel for every line on stdin.

A line is JSON, ``{"argv": [...], "env": {...}, "cwd": "..."}``; the answer is the kernel's process
id. It ends when its stdin closes, that is, with the process that started it, and every kernel ends
with it. Linux only. It must stay a single thread that has computed nothing: a fork copies no
threads, and a lock or an OpenMP pool that one of them held would hang the child. (PyArrow's
allocator has a thread of its own, and mends itself after a fork.) What libraries read from the
environment while they are imported is the zygote's, for every kernel.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import logging
import os
import random
import resource
import signal
import sys
import warnings
from typing import Any

# What notebooks import and what takes long; this project's own modules are quick, and left out so
# that a kernel always has them as they are on disk.
PRELOADED = (
    "torch",
    "transformer_lens.model_bridge",
    "transformer_lens.model_bridge.sources",
    "transformer_lens.tools.analysis",
    "transformers.models.gemma2.modeling_gemma2",
    "transformers.models.llama.modeling_llama",
    "peft",
    "peft.tuners.lora",
    "sklearn.decomposition",
    "sklearn.discriminant_analysis",
    "sklearn.linear_model",
    "scipy.stats",
    "pandas",
    "pyarrow.parquet",
    "plotly.express",
    "plotly.subplots",
    "nbformat.validator",  # by plotly, when it first shows a figure
    "circuitsvis.attention",
    "pydantic.types",
    "yaml",
    "joblib",
    "ipykernel.kernelapp",
    "ipykernel.debugger",
    "ipykernel.ipkernel",
    "IPython.core.interactiveshell",
)
PR_SET_PDEATHSIG = 1


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what an import prints is no answer
    preload()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended kernels leave no zombies
    for line in sys.stdin:
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            try:
                become_kernel(json.loads(line), zygote)
            finally:
                os._exit(1)
        os.write(answers, f"{pid}\n".encode())
    os._exit(0)  # the kernels go with it


def preload() -> None:
    """Import everything; what is missing is left to the notebook that needs it."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of faster ways it lacks
    show, warnings.showwarning = warnings.showwarning, lambda *_, **__: None
    gc.disable()  # nearly all that imports make stays; to look for garbage takes 1.7 s of 8
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        _use()
    gc.freeze()  # nor does a child look there, which would copy these pages
    gc.enable()
    warnings.showwarning = show  # what filters the imports have set stays, as in a fresh kernel
    sys.modules["pandas"].set_option("display.max_columns", 20)  # as pandas does in a kernel
    sys.modules["torch"].set_num_threads(1)


def _use() -> None:
    """What libraries build when they are first used, and keep: .3 s of every kernel.

    The figure is not shown: how to show one, plotly asks of the process that does.
    """
    from plotly import graph_objects as go
    from pydantic import create_model

    create_model("First")
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("")
    figure = go.Figure([go.Heatmap(), go.Scatter(), go.Bar()]).add_hline(y=0)
    figure.update_layout(title="", template="plotly").to_plotly_json()


def become_kernel(request: dict[str, Any], zygote: int) -> None:
    """The forked child's life: as a fresh interpreter would be, but for what is imported."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != zygote:
        return  # it ended in between
    os.setsid()  # a process group of its own: signals reach what the notebook starts, too
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the kernel's own for good
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path.pop(0)  # the zygote's folder; a kernel adds its own
    if limit := request["env"].get("INTERP_KIT_MEMORY_LIMIT"):
        limit_memory(int(limit))
    torch: Any = sys.modules["torch"]
    for seed in (random.seed, sys.modules["numpy"].random.seed, torch.seed):
        seed()  # else every kernel would draw the same
    threads = request["env"].get("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(threads) if threads.isdigit() else 1)
    sys.argv = ["ipykernel_launcher", *request["argv"]]
    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance(parent_handle=zygote)  # it ends with the zygote
    app.initialize(request["argv"])
    app.start()
    os._exit(0)


def limit_memory(size: int) -> None:
    """Let this process take ``size`` bytes more than the imports have taken, or reserved."""
    with open("/proc/self/statm") as pages:
        taken = int(pages.read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (taken + size, taken + size))


if __name__ == "__main__":
    main()
