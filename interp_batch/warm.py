"""The kernel ``python3-warm``: forked from a process that has already imported the heavy libraries.

A ``jupyter_client`` kernel provisioner, so that papermill, nbval and Jupyter use it like any other
kernel. One zygote (``zygote.py``) serves all kernels of the process that asks for them, and ends
with it. It works on Linux only; elsewhere ``default_kernel`` is ``python3``.

``PromptManager`` is for kernels of either kind: it waits no longer than necessary for their start.
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
import time
from contextlib import suppress
from queue import Empty
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from traitlets import Type

WARM, STOCK = "python3-warm", "python3"

KERNELS = pathlib.Path(__file__).parent  # holds kernels/python3-warm
GPUS = pathlib.Path("/proc/driver/nvidia/gpus")
ANSWER_SECONDS = 300  # for a zygote to import everything and fork, on a busy machine
MEMORY_LIMIT = "INTERP_KIT_MEMORY_LIMIT"  # bytes, of the kernel's environment

_lock = threading.Lock()
_started = itertools.count()
# By process id: a forked process must not use its parent's zygote.
_zygotes: dict[int, subprocess.Popen[str]] = {}


def default_kernel() -> str:
    """``python3-warm`` on Linux, ``python3`` elsewhere."""
    return WARM if sys.platform == "linux" and hasattr(os, "pidfd_open") else STOCK


def find_kernels() -> None:
    """Let Jupyter find ``python3-warm``, in this process and in those that it starts."""
    known = [p for p in os.environ.get("JUPYTER_PATH", "").split(os.pathsep) if p]
    if str(KERNELS) not in known:
        os.environ["JUPYTER_PATH"] = os.pathsep.join([*known, str(KERNELS)])


def visible_gpus() -> list[str]:
    """The GPUs over which kernels are spread, found without loading CUDA."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in chosen.split(",") if gpu.strip() not in ("", "-1")]
    return [str(i) for i in range(len(list(GPUS.iterdir())))] if GPUS.is_dir() else []


def start_zygote() -> subprocess.Popen[str]:
    """This process' zygote; starts one if there is none. Its imports take some seconds."""
    zygote = _zygotes.get(os.getpid())
    if zygote is None or zygote.poll() is not None:
        zygote = _zygotes[os.getpid()] = subprocess.Popen(
            [sys.executable, "-m", "interp_batch.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the runner alone, which then ends its kernels
            env={"PYDEVD_DISABLE_FILE_VALIDATION": "1"}  # else importing it prints a warning
            | os.environ
            | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
    return zygote


def fork_kernel(request: dict[str, Any]) -> int:
    """Start a kernel with ``{"argv": ..., "env": ..., "cwd": ...}``; returns its process id.

    Raises ``RuntimeError`` if the zygote has ended or does not answer. After that, as after Ctrl-C
    in between, the next kernel is forked from a new one: an answer that comes late would be taken
    for that kernel's.
    """
    with _lock:
        zygote = start_zygote()
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        try:
            zygote.stdin.write(json.dumps(request) + "\n")
            zygote.stdin.flush()
            answers = select.poll()
            answers.register(zygote.stdout, select.POLLIN)
            if not answers.poll(1000 * ANSWER_SECONDS):
                raise TimeoutError
            return int(zygote.stdout.readline())
        except BaseException as error:
            zygote.kill()
            if not isinstance(error, (OSError, ValueError)):
                raise
            raise RuntimeError(
                "the process that starts warm kernels ended, or did not answer in "
                f"{ANSWER_SECONDS} s, before it could start this one; run again, or use the stock "
                "kernel (--kernel python3)"
            ) from None


class _ForkedProcess:
    """A process that is not our child, with the interface of ``subprocess.Popen``.

    It is watched and signalled by its pidfd, which never refers to a later process with the same
    process id.
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
        """0 once it has ended, ``None`` after ``timeout`` seconds; its parent alone knows how."""
        if self._fd is None:
            return 0
        ended = select.poll()  # select.select fails for file descriptors above 1023
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
            env["CUDA_VISIBLE_DEVICES"] = gpus[
                next(_started) % len(gpus)
            ]  # one GPU a kernel, in turn
        argv = cmd[cmd.index("ipykernel_launcher") + 1 :]
        self.pid = fork_kernel({"argv": argv, "env": env, "cwd": str(self.cwd)})
        self.process: Any = _ForkedProcess(self.pid)
        self.pgid = self.pid
        return self.connection_info

    async def kill(self, restart: bool = False) -> None:
        """Kill the kernel and wait until it has ended."""
        killed = self.process
        await super().kill(restart)
        if killed:
            await asyncio.to_thread(killed.wait, 5)


class PromptClient(AsyncKernelClient):
    """Ready as soon as the kernel has answered and its output is heard.

    The base class then listens until the kernel has said nothing for 0.2 s. nbclient needs no such
    silence: it uses only messages that answer its own requests.
    """

    async def wait_for_ready(self, timeout: float | None = None) -> None:
        """Raises ``RuntimeError`` for a kernel that dies, or does not answer in ``timeout`` s."""
        started = time.monotonic()
        while timeout is None or time.monotonic() - started < timeout:
            self.kernel_info()
            with suppress(Empty):
                await self.get_shell_msg(timeout=1)
                await self.get_iopub_msg(timeout=0.2)  # none: its output is not connected yet
                return
            if not await self.is_alive():
                raise RuntimeError("the kernel died before it answered")
        raise RuntimeError(f"the kernel did not answer in {timeout} seconds")


class PromptManager(AsyncKernelManager):
    """Starts kernels whose client is a ``PromptClient``."""

    client_factory = Type(PromptClient, klass=AsyncKernelClient)
