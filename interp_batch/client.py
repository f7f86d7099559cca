"""How the runner meets a kernel: as jupyter_client does, without .2 s of listening for silence."""

import time
from contextlib import suppress
from queue import Empty

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager
from traitlets import Type


class PromptClient(AsyncKernelClient):
    """Ready as soon as the kernel has answered and its output is heard.

    nbclient takes from that output only what answers its own requests; what a kernel said before
    them need not be waited out.
    """

    async def wait_for_ready(self, timeout: float | None = None) -> None:
        """Raises ``RuntimeError`` for a kernel that dies, or does not answer in ``timeout`` s."""
        started = time.monotonic()
        while timeout is None or time.monotonic() - started < timeout:
            self.kernel_info()
            with suppress(Empty):
                reply = await self.get_shell_msg(timeout=1)
                await self.get_iopub_msg(timeout=0.2)  # else its output is not connected yet
                self._handle_kernel_info_reply(reply)
                return
            if not await self.is_alive():
                raise RuntimeError("the kernel died before it answered")
        raise RuntimeError(f"the kernel did not answer in {timeout} seconds")


class PromptManager(AsyncKernelManager):
    """Starts kernels whose client is a ``PromptClient``."""

    client_factory = Type(PromptClient, klass=AsyncKernelClient)
