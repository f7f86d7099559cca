"""An OpenAI-compatible endpoint on 127.0.0.1 that misbehaves as a test demands."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-never-to-be-seen-0123456789"


@dataclass
class Answer:
    """One HTTP response; ``body`` may be anything, also what no endpoint should send."""

    body: Any
    status: int = 200
    content_type: str = "application/json"


@dataclass
class Endpoint:
    """``behave(request, number)`` gives the answer to the n-th request; ``None`` hangs up."""

    behave: Callable[[dict[str, Any], int], Answer | None]
    seconds: float = 0.0  # before each answer
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""


def completion(text: str | None, *, finish_reason: str = "stop") -> Answer:
    """A chat completion that says ``text``."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return Answer({"id": "0", "object": "chat.completion", "choices": [choice], "model": "m"})


@contextmanager
def serving(behave: Callable, *, seconds: float = 0.0) -> Iterator[Endpoint]:
    """The endpoint; it runs inside the context."""
    endpoint = Endpoint(behave, seconds=seconds)
    lock = threading.Lock()
    now = 0

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            nonlocal now
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                now += 1
                number = len(endpoint.requests)
                endpoint.requests.append(request)
                endpoint.headers.append({k.lower(): v for k, v in self.headers.items()})
                endpoint.most_at_once = max(endpoint.most_at_once, now)
            time.sleep(endpoint.seconds)
            answer = endpoint.behave(request, number)
            with lock:
                now -= 1
            if answer is None:
                return
            body = answer.body if isinstance(answer.body, str) else json.dumps(answer.body)
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.content_type)
            self.send_header("retry-after-ms", "1")  # the client's own waits are seconds
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, *_: Any) -> None:
            """Ignore a client that did not wait for its answer."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
