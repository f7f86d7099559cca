"""The kernel ``python3-warm``: forked from a process that has already imported the heavy libraries.

A ``jupyter_client`` kernel provisioner, so that papermill, nbval and Jupyter use it as any other
kernel. One zygote (``zygote.py``) serves all kernels of the process that asks for them, and ends
with it. Where it cannot work (not on Linux), ``default_kernel`` says ``python3``.
"""

import asyncio
import itertools
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

WARM, STOCK = "python3-warm", "python3"

KERNELS = pathlib.Path(__file__).parent  # holds kernels/python3-warm
GPUS = pathlib.Path("/proc/driver/nvidia/gpus")
MEMORY_LIMIT = "INTERP_KIT_MEMORY_LIMIT"  # bytes, of the kernel's environment

_lock = threading.Lock()
_started = itertools.count()
_zygotes: dict[int, subprocess.Popen[str]] = {}  # by process: a fork must not use its parent's


def default_kernel() -> str:
    """``python3-warm`` where it works, else ``python3``."""
    return WARM if sys.platform == "linux" and hasattr(os, "pidfd_open") else STOCK


def find_kernels() -> None:
    """Let Jupyter find ``python3-warm``, in this process and those that it starts."""
    known = [p for p in os.environ.get("JUPYTER_PATH", "").split(os.pathsep) if p]
    if str(KERNELS) not in known:
        os.environ["JUPYTER_PATH"] = os.pathsep.join([*known, str(KERNELS)])


def visible_gpus() -> list[str]:
    """The GPUs that kernels are spread over, found without loading CUDA."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in chosen.split(",") if gpu.strip() not in ("", "-1")]
    return [str(i) for i in range(len(list(GPUS.iterdir())))] if GPUS.is_dir() else []


def start_zygote() -> subprocess.Popen[str]:
    """This process' zygote, started if there is none: its imports take some seconds."""
    zygote = _zygotes.get(os.getpid())
    if zygote is None or zygote.poll() is not None:
        zygote = _zygotes[os.getpid()] = subprocess.Popen(
            [sys.executable, "-m", "interp_batch.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the runner, which then ends its kernels
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
    return zygote


def fork_kernel(request: dict[str, Any]) -> int:
    """The process id of a new kernel."""
    with _lock:
        zygote = start_zygote()
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        try:
            zygote.stdin.write(json.dumps(request) + "\n")
            zygote.stdin.flush()
            return int(zygote.stdout.readline())
        except (OSError, ValueError):
            zygote.kill()
            raise RuntimeError(
                "the warm kernel's process ended before it could start a kernel; "
                "run it again, or take the stock kernel (--kernel python3)"
            ) from None


class _Forked:
    """A process that is not our child, as ``subprocess.Popen`` would show it.

    Watched and signalled by its pidfd, which no later process of the same number inherits.
    """

    stdin = stdout = stderr = None

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._fd: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._fd = None

    def poll(self) -> int | None:
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> int | None:
        """0 once it has ended (how, only its parent learns), ``None`` after ``timeout`` seconds."""
        if self._fd is None:
            return 0
        ended = select.poll()  # select.select knows no file descriptor above 1023
        ended.register(self._fd, select.POLLIN)
        if not ended.poll(None if timeout is None else 1000 * timeout):
            return None
        os.close(self._fd)
        self._fd = None
        return 0

    def send_signal(self, number: int) -> None:
        if self._fd is not None:
            signal.pidfd_send_signal(self._fd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class WarmProvisioner(LocalProvisioner):
    """Starts kernels by ``fork_kernel`` rather than as new interpreters."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Fork the kernel that ``cmd`` (``python -m ipykernel_launcher ...``) would start."""
        self.cwd = kwargs.get("cwd") or pathlib.Path.cwd()
        env = dict(kwargs.get("env") or os.environ)
        if gpus := visible_gpus():
            env["CUDA_VISIBLE_DEVICES"] = gpus[next(_started) % len(gpus)]  # one each, in turn
        argv = cmd[cmd.index("ipykernel_launcher") + 1 :]
        self.pid = fork_kernel({"argv": argv, "env": env, "cwd": str(self.cwd)})
        self.process: Any = _Forked(self.pid)
        self.pgid = self.pid
        return self.connection_info

    async def kill(self, restart: bool = False) -> None:
        """Kill the kernel, and see it end: whoever asks next need not ask again."""
        killed = self.process
        await super().kill(restart)
        if killed:
            await asyncio.to_thread(killed.wait, 5)
