"""A server on a socket of this process, and what its clients say to it."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import uvicorn

from kvtool.runtime import Engine
from kvtool.runtime.scheduler import Scheduler
from kvtool.server.app import create_app
from kvtool.server.service import Service
from kvtool.server.worker import Worker

HELLO = [{"role": "user", "content": "The quick brown"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | length }} tools\n{% endif %}{% for m in messages %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
)


class Running:
    """A server on a free port of this process."""

    def __init__(self, app: Any, worker: Worker) -> None:
        self.worker = worker
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        wait_until(lambda: self.server.started)

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": "x", "max_retries": 0} | options
        )

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=30, **options)

    def kv(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/kv").json()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        assert not self.worker.is_alive()


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def serving(engine: Engine, memory: int = 2**24, **options: Any) -> Iterator[Running]:
    limits = {name: options.pop(name) for name in ("api_key", "max_body") if name in options}
    defaults = options.pop("defaults", None)
    waiting, prefixes = options.pop("max_waiting", 64), options.pop("metric_prefixes", ("kvtool",))
    worker = Worker(
        Scheduler(engine, memory, piece=16, **options),
        model="tiny",
        max_waiting=waiting,
        native_bytes_per_token=1536,
        weight_bytes=1000,
        metric_prefixes=prefixes,
    )
    service = Service(worker, "tiny", "<all of it>", defaults)
    running = Running(create_app(service, **limits), worker)
    try:
        yield running
    finally:
        running.stop()
