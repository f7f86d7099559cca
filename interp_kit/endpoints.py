"""A chat model behind any OpenAI-compatible endpoint: bounded retries, replies kept and replayed.

The endpoint is ``OPENAI_BASE_URL``; the key is ``OPENROUTER_API_KEY`` or ``OPENAI_API_KEY``. Only
the environment ever holds the key: it is in no attribute of ``ChatClient``, file or message.
"""

import asyncio
import os
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from openai import APIConnectionError, APIStatusError, AsyncOpenAI

from interp_kit.files import append_line, digest, read_appended
from interp_kit.specs import InputError

OPENROUTER = "https://openrouter.ai/api/v1"
OPENROUTER_HEADERS = {
    "HTTP-Referer": "OPENROUTER_HTTP_REFERER",
    "X-Title": "OPENROUTER_X_TITLE",
}
T = TypeVar("T")


class BadReply(ValueError):
    """The endpoint answered, but not with anything of use: ask again, with another seed."""


class NoReply(InputError):
    """The endpoint was asked as often as allowed, and gave no answer."""


class ChatClient:
    """Asks one model, at most ``concurrency`` times at once.

    429, 5xx, timeouts and lost connections are tried ``attempts`` times, with the waits that the
    endpoint asks for or growing ones. Replies are appended to ``cache`` (JSON lines: the request
    and the reply) and the same request is not sent twice; ``replay`` never uses the network.

    Raises ``InputError`` without a key, or where ``replay`` has no cache.
    """

    def __init__(
        self,
        model: str,
        *,
        cache: Path | None = None,
        replay: bool = False,
        concurrency: int = 8,
        attempts: int = 4,
        temperature: float = 1.0,
        max_tokens: int = 2048,
        timeout: float = 120.0,
    ) -> None:
        if min(concurrency, attempts) < 1:
            raise InputError(
                f"expected concurrency and attempts of at least 1, got {concurrency} and {attempts}"
            )
        if replay and not (cache and cache.is_file()):
            raise InputError(
                f"replay needs a file of earlier replies, and there is none at {cache}; "
                "run once without replay"
            )
        if not replay:
            _address()
        self.model, self.cache, self.replay = model, cache, replay
        self.concurrency, self.attempts, self.timeout = concurrency, attempts, timeout
        self.sampling = {"temperature": temperature, "max_tokens": max_tokens}
        known = read_appended(cache) if cache else []
        self._replies = {digest(entry["request"]): entry["reply"] for entry in known}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def ask(self, system: str, user: str, *, seed: int) -> str:
        """The model's reply.

        Raises ``BadReply`` for one that is empty, cut off or no chat completion; ``NoReply`` after
        the last attempt; ``InputError`` if the endpoint refuses the request, or if it would have to
        be sent in ``replay``.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        request = {"model": self.model, "messages": messages, "seed": seed, **self.sampling}
        key = digest(request)
        if key not in self._replies:
            if self.replay:
                raise InputError(
                    f"{self.cache} has no reply of {self.model} to {user[:60]!r} (seed {seed}); "
                    "ask the endpoint once, without replay"
                )
            self._replies[key] = await self._send(request)
            if self.cache:
                append_line(self.cache, {"request": request, "reply": self._replies[key]})
        return self._replies[key]

    async def _send(self, request: dict[str, Any]) -> str:
        address, key = _address()
        client, limit = self._connection(address, key)
        try:
            async with limit:
                completion = await client.chat.completions.create(**request)
            choice = completion.choices[0]
            reply, ended = choice.message.content, choice.finish_reason
        except APIStatusError as error:
            raise self._refusal(error, key) from None
        except APIConnectionError as error:  # timeouts too
            what = type(error).__name__
            raise NoReply(f"{self.model}: no answer in {self.attempts} attempts ({what})") from None
        except (AttributeError, IndexError, TypeError, ValueError):
            raise BadReply("not a chat completion") from None
        if not isinstance(reply, str) or not reply.strip():
            raise BadReply("empty")
        if ended == "length":
            raise BadReply(f"cut off at {request['max_tokens']} tokens")
        if key in reply or not _is_unicode(reply):
            raise BadReply("not text that may be kept")
        return reply

    def _refusal(self, error: APIStatusError, key: str) -> InputError:
        status = error.status_code
        if status in (408, 409, 429) or status >= 500:
            return NoReply(
                f"{self.model}: the endpoint answered {status} in {self.attempts} attempts"
            )
        said = " ".join(error.message.replace(key, "***").split())[:200]
        return InputError(
            f"{self.model}: the endpoint refused the request ({said}); check the model's name, the "
            "key and OPENAI_BASE_URL"
        )

    def _connection(self, address: str | None, key: str) -> tuple[AsyncOpenAI, asyncio.Semaphore]:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # neither a client nor a semaphore outlives its event loop
            headers = {h: os.environ[v] for h, v in OPENROUTER_HEADERS.items() if v in os.environ}
            self._loop, self._limit = loop, asyncio.Semaphore(self.concurrency)
            self._client = AsyncOpenAI(
                api_key=key,
                base_url=address,
                max_retries=self.attempts - 1,
                timeout=self.timeout,
                default_headers={**headers, "Connection": "close"},  # nothing is left open
            )
        return self._client, self._limit


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, in a script and in Jupyter, where an event loop is running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    try:
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(loop.run_until_complete, task)
            try:
                return done.result()
            except KeyboardInterrupt:  # the pool waits for its thread
                loop.call_soon_threadsafe(task.cancel)
                raise
    finally:
        loop.close()


def _address() -> tuple[str | None, str]:
    """Base URL (None: OpenAI's own) and key. No key goes where it does not belong."""
    url = os.environ.get("OPENAI_BASE_URL") or None
    names = ["OPENROUTER_API_KEY", "OPENAI_API_KEY"]
    if url and "openrouter.ai" not in url:
        names.reverse()
    for name in names:
        if key := os.environ.get(name, "").strip():
            return (url or OPENROUTER if name == "OPENROUTER_API_KEY" else url), key
    raise InputError(
        "no key for the endpoint; set OPENROUTER_API_KEY or OPENAI_API_KEY in the environment "
        "(and OPENAI_BASE_URL for any other endpoint), or use the offline grammar"
    )


def _is_unicode(text: str) -> bool:
    """Whether it has no lone surrogates, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
