"""`kvtool serve-local` beside `transformers serve` and vLLM: tokens/s of concurrent clients, how
many requests fit into a memory, how long the turns of a conversation wait, what a decode step costs
outside the model, and a load with clients that leave.

    python benchmarks/serve.py smollm2 --plan half.plan -o benchmarks/results/serve.json
    python benchmarks/serve.py smollm2 --plan half.plan --only decode --vllm vllm-env/bin/python
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypedDict

import httpx
import psutil
import torch
import uvicorn

from kvtool.checkpoint import Checkpoint
from kvtool.evaluate.throughput import environment
from kvtool.plan import Plan
from kvtool.runtime import Engine
from kvtool.runtime.memory import RowMemory
from kvtool.runtime.requests import Request
from kvtool.runtime.scheduler import Scheduler
from kvtool.server.app import create_app
from kvtool.server.service import Service
from kvtool.server.worker import Worker

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--plan", action="append", default=[], help="for requests that fit")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per request")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--kv-memory", type=int, default=256 * 2**20)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--only", choices=["speed", "decode", "fit", "turns", "overhead", "load"])
    parser.add_argument("--vllm", help="the Python of an environment with vLLM, for decode")
    parser.add_argument("--latent", help="an MLA conversion of the model, for decode")
    parser.add_argument("--dtype", default="bfloat16", help="of decode")
    parser.add_argument("--processor", help="for ours in decode; vLLM takes the first by itself")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 4096], help="of decode")
    parser.add_argument("--seconds", type=int, default=300, help="of load, by 64 clients")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype) if options.only == "decode" else torch.float32
    result: dict[str, Any] = {
        "environment": environment(torch.device("cpu"), dtype),
        "settings": {k: v for k, v in vars(options).items() if k not in ("output", "only")},
    }
    checkpoint = Checkpoint.open(options.model)
    if options.only in (None, "speed"):
        result["tokens_per_second"] = speed(options, checkpoint)
    if options.only in (None, "decode"):
        result["decode_tokens_per_second"] = decode(options, checkpoint)
    if options.only in (None, "fit"):
        result["fit"] = fit(options, checkpoint)
    if options.only in (None, "turns"):
        result["seconds_to_first_token"] = turns(options, checkpoint)
    if options.only in (None, "overhead"):
        result["overhead"] = overhead(options, checkpoint)
    if options.only in (None, "load"):
        result["load"] = load(options, checkpoint)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------ speed


def speed(options: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, list[float]]:
    """Tokens/s of all clients together, prompts included; one server after the other."""
    folder = str(checkpoint.path)
    kvtool, theirs = (
        [sys.executable, "-m", "kvtool"],
        shutil.which("transformers") or "transformers",
    )
    serve = [theirs, "serve", folder, "--device", "cpu", "--dtype", "float32"]
    # By itself it would take most of the machine's memory for its cache.
    bounded = ["--cb-num-blocks", "256", "--cb-block-size", "32", "--cb-max-batch-tokens", "512"]
    servers = {
        "kvtool serve-local": [*kvtool, "serve-local", folder],
        "transformers serve": serve,
        "transformers serve --continuous-batching": [*serve, "--continuous-batching", *bounded],
    }
    found: dict[str, list[float]] = {name: [] for name in servers}
    for _ in range(options.repeats):
        for name, command in servers.items():
            with process(command) as server:
                try:
                    asyncio.run(ask(server.url, folder, 1, 8))
                    start = time.perf_counter()
                    clients, tokens = options.clients, options.tokens
                    drawn = sum(asyncio.run(ask(server.url, folder, clients, tokens)))
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    print(f"{name}: {error!r}", file=sys.stderr)
                    continue
                found[name].append(drawn / (time.perf_counter() - start))
            print(f"{name}: {found[name]}", file=sys.stderr)
    return found


class Server:
    """A process that listens, and those that it has started; stopped while others are measured."""

    def __init__(self, url: str, pid: int) -> None:
        self.url, self.pid = url, pid

    def pause(self) -> None:
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """Spent so far by all of its processes."""
        first = psutil.Process(self.pid)
        spent = [process.cpu_times() for process in (first, *first.children(recursive=True))]
        return sum(times.user + times.system for times in spent)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def process(
    command: list[str], environment: Mapping[str, str] | None = None, port: int | None = None
) -> Iterator[Server]:
    """A server, up and running, on a free port if none is said."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    quiet |= {"start_new_session": True, "env": {**os.environ, **(environment or {})}}
    with subprocess.Popen([*command, "--port", str(port)], **quiet) as running:
        server = Server(url, running.pid)
        try:
            for _ in range(600):
                time.sleep(0.5)
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    if running.poll() is not None:
                        raise
            yield server
        finally:
            if running.poll() is None:
                server.resume()
            running.terminate()


async def ask(url: str, model: str, clients: int, tokens: int) -> list[int]:
    """Greedy chats at the same time, none of which ends early; the tokens that each got."""

    async def one(client: httpx.AsyncClient, number: int) -> int:
        topic = ["rivers", "bridges", "clocks", "bread", "ships", "maps", "glass", "paper"]
        said = f"Write a long essay about the history of {topic[number % len(topic)]}."
        body = {
            "model": model, "messages": [{"role": "user", "content": said}],
            "max_tokens": tokens, "temperature": 0.0,
        }  # fmt: skip
        answer = (await client.post(CHAT, json=body)).raise_for_status().json()
        return int(answer["usage"]["completion_tokens"])

    async with httpx.AsyncClient(base_url=url, timeout=180) as client:
        return await asyncio.gather(*(one(client, n) for n in range(clients)))


# ----------------------------------------------------------------------------------- decode


def decode(options: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Tokens/s of all clients together while all of them decode, by prompt length and server.

    All servers are up; those whose turn it is not are stopped. Prompts are the same for all, and
    the same in every round, so that a server with a prefix cache reads them once. Where other work
    takes processors away, tokens per second of processor time are the better comparison.
    """
    folder, dtype = str(checkpoint.path), ["--dtype", options.dtype]
    bound = ["taskset", "-c", options.processor] if options.processor else []
    ours = [*bound, sys.executable, "-m", "kvtool", "serve-local"]
    servers = {"kvtool": [*ours, folder, *dtype]}
    for plan in options.plan:
        servers[f"kvtool, {Path(plan).stem}"] = [*ours, folder, *dtype, "--plan", plan]
    if options.latent:
        servers["kvtool, latent"] = [*ours, options.latent, *dtype]
    if options.vllm:
        serve = [options.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        servers["vllm"] = [*serve, *dtype, "--max-model-len", "8192"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "3", "HF_HUB_OFFLINE": "1"}
    clients, found = options.clients, dict[str, dict[str, Any]]()
    with ExitStack() as stack:
        running = {
            name: stack.enter_context(process(command, environment))
            for name, command in servers.items()
        }
        for server in running.values():
            server.pause()
        for length in options.prompts:
            rounds: list[dict[str, Rate]] = []
            for _ in range(options.repeats):
                rounds.append({})
                for name, server in running.items():
                    server.resume()
                    rate = asyncio.run(together(server, clients, length, options.tokens))
                    time.sleep(1)  # until it has noticed that all have left
                    server.pause()
                    rounds[-1][name] = rate
                    print(f"{length} tokens, {name}: {rate}", file=sys.stderr)
            found[str(length)] = {"rounds": rounds} | {
                key: {name: statistics.median(r[name][key] for r in rounds) for name in running}
                for key in ("per_second", "per_cpu_second")
            }
    return found


class Rate(TypedDict):
    """Tokens of all clients per second, and per second of processor time of the whole server."""

    per_second: float
    per_cpu_second: float


async def together(server: Server, clients: int, length: int, tokens: int) -> Rate:
    """From when the last of the clients has its first token, until each has some `tokens` more."""
    came: list[float] = []
    waiting = set(range(clients))
    begun, cpu = 0, 0.0

    async def one(client: httpx.AsyncClient, number: int) -> None:
        nonlocal begun, cpu
        chance = random.Random(f"{length} {number}")
        body = {
            "model": model, "prompt": [chance.randrange(100, 20_000) for _ in range(length)],
            "max_tokens": 2048, "temperature": 0.0, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        async with client.stream("POST", TEXT, json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                came.append(time.perf_counter())
                if number in waiting:
                    waiting.remove(number)
                    begun, cpu = len(came), server.cpu_seconds()
                if not waiting and len(came) >= begun + clients * tokens:
                    return

    async with httpx.AsyncClient(base_url=server.url, timeout=1800) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        asking = [asyncio.create_task(one(client, n)) for n in range(clients)]
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        cpu = server.cpu_seconds() - cpu
        for task in asking:
            task.cancel()
        for outcome in await asyncio.gather(*asking, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
    drawn = len(came) - begun
    return {"per_second": drawn / (came[-1] - came[begun - 1]), "per_cpu_second": drawn / cpu}


# ---------------------------------------------------------------------------------- memory


def fit(options: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Requests of one length that are in memory together, the last one while it is read."""
    plans = {"all keys and values": None} | {name: Plan.read(Path(name)) for name in options.plan}
    counts: dict[str, dict[str, int]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, plan in plans.items():
            engine = Engine.load(checkpoint, dtype=dtype, plan=plan)
            memory, prompt = RowMemory(engine), options.length - options.tokens
            each = memory.holding(options.length, prompt)
            last = max(each, memory.reading(prompt))
            count = max(0, 1 + (options.kv_memory - last) // each)
            counts.setdefault(str(dtype).removeprefix("torch."), {})[name] = count
    return counts


# ----------------------------------------------------------------------------------- turns


def turns(options: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, list[float]]:
    """Of a conversation: the first prompt takes up half of the length, then a fifth of that comes
    with every turn, the last answer included.
    """
    plans = {"all keys and values": None} | {name: Plan.read(Path(name)) for name in options.plan}
    schedulers = {
        name: Scheduler(Engine.load(checkpoint, plan=plan), 2**32) for name, plan in plans.items()
    }
    found: dict[str, list[float]] = {name: [] for name in plans}
    first, more = options.length // 2, options.length // 10
    for turn in range(-1, 5):  # one to warm up, of another text
        begin = 1000 if turn >= 0 else 999
        ids = list(range(begin, begin + first + max(0, turn) * more))
        for name, scheduler in schedulers.items():
            request = Request(ids, 1, ignore_eos=True)
            start = time.perf_counter()
            scheduler.add(request)
            while not scheduler.idle:
                scheduler.step()
            if turn >= 0:
                found[name].append(round(time.perf_counter() - start, 3))
    return found


# -------------------------------------------------------------------------------- overhead


def overhead(options: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, float]:
    """Share of a step with all clients that is not spent in the model; clients are a process."""
    engine = Engine.load(checkpoint)
    scheduler = Scheduler(engine, 2**30)
    steps: list[tuple[float, float, float]] = []  # start and end of the model's part, rows
    decode = engine.decode_rows

    def timed(caches: Any, ids: Any) -> Any:
        start = time.perf_counter()
        logits = decode(caches, ids)
        steps.append((start, time.perf_counter(), len(ids)))
        return logits

    engine.decode_rows = timed  # type: ignore[method-assign]
    worker = Worker(
        scheduler, model="overhead", max_waiting=64, native_bytes_per_token=1.0, weight_bytes=0
    )
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(Service(worker, "overhead", "all keys and values"))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}{CHAT}"
    body = {
        "messages": [{"role": "user", "content": "Write a long essay."}], "stream": True,
        "max_tokens": 2 * options.tokens, "ignore_eos": True, "temperature": 0.0,
    }  # fmt: skip
    arguments = ["curl", "-sN", url, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    clients = [
        subprocess.Popen(arguments, stdout=subprocess.DEVNULL) for _ in range(options.clients)
    ]
    for client in clients:
        client.wait()
    server.should_exit = True
    thread.join()
    full = [step for step in steps if step[2] == options.clients]
    wall = full[-1][1] - full[0][1]
    model = sum(end - start for start, end, _ in full[1:])
    return {
        "steps": len(full) - 1,
        "step_ms": 1e3 * wall / (len(full) - 1),
        "model_ms": 1e3 * model / (len(full) - 1),
        "share_outside_model": 1 - model / wall,
    }


# ------------------------------------------------------------------------------------- load


def load(options: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """64 clients, of whom some leave in the middle; then the server is killed and started again."""
    folder, port = str(checkpoint.path), free_port()
    command = [sys.executable, "-m", "kvtool", "serve-local", folder, "--no-prefix-cache"]
    command += ["--kv-memory", str(options.kv_memory)]
    found: dict[str, Any] = {}
    with process(command, port=port) as server:
        asyncio.run(ask(server.url, folder, 8, 8))
        found["resident_at_start"] = resident(server)
        # Until most shapes have been seen: oneDNN keeps a kernel for each.
        asyncio.run(crowd(server, 64, options.seconds // 4))
        time.sleep(3)  # an idle server returns what it has freed
        found["resident_before"] = resident(server)
        found |= asyncio.run(crowd(server, 64, options.seconds))
        time.sleep(3)
        found["resident_after"] = resident(server)
        found["kv"] = httpx.get(f"{server.url}/kv").json()
        threading.Timer(5, os.killpg, (server.pid, signal.SIGKILL)).start()
        killed = asyncio.run(crowd(server, 64, 5))
        found["killed"] = {name: killed[name] for name in ("complete", "left", "wrong")}
    start = time.perf_counter()
    with process(command, port=port) as server:
        found["seconds_to_restart"] = time.perf_counter() - start
        found["tokens_after_restart"] = asyncio.run(ask(server.url, folder, 8, 8))
    return found


async def crowd(server: Server, clients: int, seconds: int) -> dict[str, Any]:
    """Clients that ask, read, and sometimes leave, again and again; memory every ten seconds."""
    counts = {"seconds": seconds, "complete": 0, "left": 0, "wrong": 0}
    end = time.monotonic() + seconds

    async def one(client: httpx.AsyncClient, number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            tokens = chance.randrange(1, 40)
            body = {
                "messages": [{"role": "user", "content": "word " * chance.randrange(1, 200)}],
                "max_tokens": tokens, "seed": number, "stream": True,
                "stream_options": {"include_usage": True},
            }  # fmt: skip
            leave = chance.randrange(1, 20) if chance.random() < 0.3 else None
            lines = []
            try:
                async with client.stream("POST", CHAT, json=body) as response:
                    async for line in response.aiter_lines():
                        lines += [line] if line else []
                        if len(lines) == leave:
                            break
            except httpx.HTTPError as error:
                print(repr(error), file=sys.stderr)
                await asyncio.sleep(0.1)
            if len(lines) == leave:
                counts["left"] += 1
            elif is_complete(lines, tokens):
                counts["complete"] += 1
            else:
                counts["wrong"] += 1

    async def watch() -> list[int]:
        sizes = []
        while time.monotonic() < end:
            sizes.append(resident(server))
            await asyncio.sleep(min(10, seconds))
        return sizes

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        sizes, *_ = await asyncio.gather(watch(), *(one(client, n) for n in range(clients)))
    return {**counts, "resident": sizes}


def is_complete(lines: list[str], tokens: int) -> bool:
    """Whether a stream says how it ended, and has all its tokens unless it ended by itself."""
    if len(lines) < 3 or lines[-1] != "data: [DONE]":
        return False
    last, usage = (json.loads(line.removeprefix("data: ")) for line in lines[-3:-1])
    finish, drawn = last["choices"][0]["finish_reason"], usage["usage"]["completion_tokens"]
    return drawn == tokens if finish == "length" else finish == "stop" and drawn <= tokens


def resident(server: Server) -> int:
    """Bytes of memory of a server that is one process."""
    return int(psutil.Process(server.pid).memory_info().rss)


if __name__ == "__main__":
    main()
