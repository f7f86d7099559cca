"""``python -m interp_batch.zygote``: imports once, then forks a kernel for every line on stdin.

A line is JSON, ``{"argv": [...], "env": {...}, "cwd": "..."}``; the answer is the kernel's process
id. The zygote ends when its stdin closes, that is, with the process that started it, and every
kernel ends with the zygote. Linux only.

The zygote must have a single thread and must not have computed anything: a fork copies no threads,
so a lock or an OpenMP pool held by another thread would hang the child. (PyArrow's allocator has a
thread of its own, which it restarts after a fork.) Variables that libraries read when they are
imported have the zygote's values in every kernel.

``multiprocessing``'s forkserver could do the importing and the forking. It would replace ``main``
only; all that makes a forked process a fresh kernel would remain.
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

# The slow imports of notebooks. This project's own modules are quick to import, and are left out so
# that every kernel reads them from disk as they are.
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
    "nbformat.validator",  # plotly imports it when it first shows a figure
    "circuitsvis.attention",
    "pydantic.types",
    "yaml",
    "ipykernel.kernelapp",
    "ipykernel.debugger",
    "ipykernel.ipkernel",
    "IPython.core.interactiveshell",
)
PR_SET_PDEATHSIG = 1


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what an import prints must not be taken for an answer
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
    os._exit(0)  # and the kernels with it


def preload() -> None:
    """Import everything; a module that is not installed fails in the notebook that needs it."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of missing GPUs
    show, warnings.showwarning = warnings.showwarning, lambda *_, **__: None
    gc.disable()  # imports leave hardly any garbage; collecting it takes 1.7 s of 8
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        _build_what_libraries_keep()
    gc.freeze()  # a child that collected garbage among these objects would copy their pages
    gc.enable()
    warnings.showwarning = show  # filters set by imports stay, as in a fresh kernel
    sys.modules["pandas"].set_option("display.max_columns", 20)  # as pandas does in a kernel
    sys.modules["torch"].set_num_threads(1)


def _build_what_libraries_keep() -> None:
    """Let libraries build what they build on first use and keep; it takes 0.3 s in every kernel.

    The figure is not shown, because plotly decides on first display how this process shows figures.
    """
    from plotly import graph_objects as go
    from pydantic import create_model

    create_model("First")
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("")
    figure = go.Figure([go.Heatmap(), go.Scatter(), go.Bar()]).add_hline(y=0)
    figure.update_layout(title="", template="plotly").to_plotly_json()


def become_kernel(request: dict[str, Any], zygote: int) -> None:
    """Turn the forked child into what a fresh interpreter would be, with its imports done."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != zygote:
        return  # the zygote ended in between
    os.setsid()  # a process group of its own: signals also reach what the notebook starts
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - stays open for the kernel's life
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path.pop(0)  # the zygote's entry; a kernel adds its own
    if limit := request["env"].get("INTERP_KIT_MEMORY_LIMIT"):
        limit_memory(int(limit))
    torch: Any = sys.modules["torch"]
    for seed in (random.seed, sys.modules["numpy"].random.seed, torch.seed):
        seed()  # without this, all kernels would draw the same numbers
    threads = request["env"].get("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(threads) if threads.isdigit() else 1)
    sys.argv = ["ipykernel_launcher", *request["argv"]]
    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance(parent_handle=zygote)  # the kernel ends with the zygote
    app.initialize(request["argv"])
    app.start()
    os._exit(0)


def limit_memory(size: int) -> None:
    """Let this process allocate ``size`` bytes beyond what imports have allocated or reserved."""
    with open("/proc/self/statm") as pages:
        taken = int(pages.read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (taken + size, taken + size))


if __name__ == "__main__":
    main()
