"""`kvtool serve-local`: the API of OpenAI's clients, from the compressed cache."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvtool.cli import _options as options
from kvtool.cli._console import counted, err
from kvtool.errors import KvtoolError, ResourceError, UsageError
from kvtool.sizes import bytes_of

if TYPE_CHECKING:
    from kvtool.checkpoint import Checkpoint
    from kvtool.runtime import Engine
    from kvtool.runtime.scheduler import Scheduler
    from kvtool.server.worker import Worker

_SERVER, _MEMORY = "Server", "Memory"
_NEEDED = ("fastapi", "llguidance", "prometheus_client", "uvicorn")
_UNREAD_SECONDS = 5  # for clients that do not read the end of what was cut off


def serve_local(
    model: options.Model,
    plan: options.PlanFile = None,
    kv_memory: Annotated[
        str,
        typer.Option(
            help="Memory that the caches of all requests may take together.",
            rich_help_panel=_MEMORY,
        ),
    ] = "4GiB",
    max_running: Annotated[
        int,
        typer.Option(
            min=1, help="The most requests that are decoded together.", rich_help_panel=_MEMORY
        ),
    ] = 64,
    max_waiting: Annotated[
        int,
        typer.Option(
            min=0,
            help="The most requests that wait; further ones get status 429.",
            rich_help_panel=_MEMORY,
        ),
    ] = 256,
    prefill_chunk: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens of a prompt that are read between two decode steps.",
            rich_help_panel=_MEMORY,
        ),
    ] = 128,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Keep what was read of a prompt, while there is memory, for others that start "
            "alike.",
            rich_help_panel=_MEMORY,
        ),
    ] = True,
    host: Annotated[
        str, typer.Option(help="Address to listen on.", rich_help_panel=_SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="Port to listen on; 0: any free one.", rich_help_panel=_SERVER
        ),
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="KVTOOL_API_KEY",
            help="Key that clients must send, on every route but /health.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="What clients call the model; default: MODEL.", rich_help_panel=_SERVER),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            help="A Jinja file to use instead of the model's own template.", rich_help_panel=_SERVER
        ),
    ] = None,
    generation_config: Annotated[
        Literal["auto", "none"],
        typer.Option(
            help="auto: what the model's generation_config.json recommends holds where a request "
            "does not say how to draw.",
            rich_help_panel=_SERVER,
        ),
    ] = "auto",
    max_body: Annotated[
        str, typer.Option(help="Largest request body.", rich_help_panel=_SERVER)
    ] = "8MiB",
    drain: Annotated[
        int,
        typer.Option(
            min=0,
            help="Seconds that running requests get to end after SIGTERM or Ctrl-C.",
            rich_help_panel=_SERVER,
        ),
    ] = 60,
    metrics_compat: Annotated[
        Literal["none", "vllm"],
        typer.Option(help="vllm: /metrics also under the names of vLLM.", rich_help_panel=_SERVER),
    ] = "none",
    quiet: options.Quiet = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    offline: options.Offline = False,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Serve MODEL to OpenAI clients; SIGTERM lets running requests end."""
    memory, body = _size(kv_memory, "--kv-memory"), _size(max_body, "--max-body")
    if api_key == "":
        raise UsageError("the API key is empty, so that anybody would have it")
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise UsageError(
            f"serving needs packages that are not installed: {', '.join(missing)}",
            hint="pip install 'kvtool[serve]'",
        )
    from kvtool.chat_template import take_text
    from kvtool.checkpoint import Checkpoint
    from kvtool.evaluate.throughput import weight_bytes
    from kvtool.runtime import Engine
    from kvtool.runtime.scheduler import Scheduler
    from kvtool.server import defaults
    from kvtool.server.app import create_app
    from kvtool.server.service import Service
    from kvtool.server.worker import Worker

    checkpoint = Checkpoint.open(
        model, revision=revision, offline=offline, trust_remote_code=trust_remote_code
    )
    kept = options.read_plan(plan, checkpoint)
    template = None if chat_template is None else _read(chat_template)
    followed = generation_config == "auto"
    said, beyond = defaults.defaults_of(checkpoint) if followed else (None, [])
    listener = _listen(host, port)
    device = options.resolve_device(device)
    precision = options.resolve_dtype(dtype, device)
    engine = Engine.load(checkpoint, dtype=precision, device=device, plan=kept)
    if template is not None:
        engine.tokenizer.chat_template = template
        take_text(engine.tokenizer)
    weights = weight_bytes(engine)  # before they are packed
    scheduler = Scheduler(
        engine, memory, max_running=max_running, piece=prefill_chunk, share_prefixes=prefix_cache
    )
    if scheduler.room(1) < 1:
        needed = scheduler.memory.reading(1)
        raise ResourceError(
            f"--kv-memory {kv_memory} does not hold a single token: the smallest cache takes "
            f"{needed:,} bytes"
        )
    _warm_up(scheduler)
    native = native_bytes_per_token(scheduler, checkpoint)
    worker = Worker(
        scheduler,
        model=served_model_name or model,
        max_waiting=max_waiting,
        native_bytes_per_token=native,
        weight_bytes=weights,
        metric_prefixes=("kvtool",) if metrics_compat == "none" else ("kvtool", "vllm"),
    )
    kind = caches(engine, plan)
    precise = str(precision).removeprefix("torch.")
    description = f"{kind}, {precise} on {device}"
    service = Service(worker, served_model_name or model, description, said)
    if not quiet:
        address, bound = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        err.print(f"http://{shown}:{bound} serves {service.name}: {service.description}")
        err.print(f"{kv_memory} of caches hold {room(scheduler)} (uncompressed {native:,.0f})")
        if kept is not None and not kept.keeps_prefixes:
            why = "has token budgets" if kept.policy else "was made with --prefill dense"
            err.print(f"every prompt is read from its start: {plan} {why}")
        if values := service.defaults.model_dump(exclude_none=True):
            listed = ", ".join(f"{name} {value}" for name, value in values.items())
            err.print(f"defaults of requests: {listed} ({defaults.FILE})")
        if beyond:
            err.print(f"{defaults.FILE} also says {', '.join(beyond)}, which is not followed")
        if api_key is None and not _is_local(address):
            err.print("warning: other machines can reach it, and no --api-key is asked for")
    _run(create_app(service, api_key=api_key, max_body=body), worker, listener, drain)


def caches(engine: Engine, plan: Path | None) -> str:
    """What is kept of the past, in words."""
    from kvtool.runtime.layers import LatentRuntimeAttention
    from kvtool.runtime.recurrent import RuntimeMixer

    if plan is not None:
        return f"plan {plan}"
    if isinstance(engine.attentions[0], LatentRuntimeAttention):
        return "latents (MLA)"
    states = sum(isinstance(attention, RuntimeMixer) for attention in engine.attentions)
    more = f", but states in {counted(states, 'layer')}" if states else ""
    return f"all keys and values{more}"


def room(scheduler: Scheduler) -> str:
    """What the caches have room for, in words: whole sequences, as long as one alone may become."""
    memory, prompt, longest = scheduler.memory, scheduler.roomiest, scheduler.longest
    each = memory.holding(longest, prompt)  # nothing where rows have rings alone
    # The last of them has its prompt to read beside the others.
    others = scheduler.budget - max(each, memory.reading(prompt))
    count = 1 + others // each if each else scheduler.max_running
    sequences = f"{counted(count, 'sequence')} of up to {counted(longest, 'token')}"
    further = f"{memory.bytes_per_token:,.0f} bytes per token"
    if prompt > 1:
        sequences += f", {prompt:,} of them a prompt"
        return f"{sequences}: each takes {each:,} bytes, of which {further} behind the prompt"
    constant = f"{memory.constant_bytes:,} bytes and " if memory.constant_bytes else ""
    return f"{sequences}: each takes {constant}{further}"


def native_bytes_per_token(scheduler: Scheduler, checkpoint: Checkpoint) -> float:
    """Bytes that a further token of a long text costs in the cache that this one is smaller than,
    in the same precision.
    """
    from kvtool.convert.artifact import read_manifest

    engine, itemsize = scheduler.engine, scheduler.engine.dtype.itemsize
    if engine.plan is not None:
        return engine.plan.native_bytes_per_token(itemsize)
    if checkpoint.manifest is not None:
        before = read_manifest(checkpoint.path)["plan"]["bytes_per_token_before"]
        return float(before) / 2 * itemsize  # the manifest counts bf16
    return scheduler.memory.bytes_per_token


def _size(text: str, flag: str) -> int:
    if (size := bytes_of(text)) is None:
        raise UsageError(f"{flag} '{text}' is not a size such as 4GiB or 300MB")
    return size


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat-template {file} cannot be read: {error}") from error


def _listen(host: str, port: int) -> socket.socket:
    """Bound before any weights are loaded: a port that is taken is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        raise KvtoolError(
            f"cannot listen on {host} port {port}: {error}",
            hint="--port 0 takes a free one" if taken else None,
        ) from error


def _is_local(address: str) -> bool:
    import ipaddress

    return ipaddress.ip_address(address).is_loopback


def _warm_up(scheduler: Scheduler) -> None:
    """The first call of every operation is slow; no client should wait for it."""
    from kvtool.runtime.requests import Request
    from kvtool.runtime.scheduler import Counters

    scheduler.add(Request([0], min(2, scheduler.room(1)), ignore_eos=True))
    while not scheduler.idle:
        scheduler.step()
    scheduler.counters = Counters()


def _run(app: Any, worker: Worker, listener: socket.socket, drain: int) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Says what it waits for before it ends. uvicorn would cut requests off by cancelling
        them, which logs tracebacks and leaves the engine's thread running; here they end.
        """

        cut_off = False

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            first = not self.should_exit
            if first or self.cut_off or sig != signal.SIGINT:
                super().handle_exit(sig, frame)
            else:
                self.cut_off = True
                worker.cut_off()
            if first:
                late = threading.Timer(drain, worker.cut_off)
                late.daemon = True
                late.start()
                # Whatever became of stderr, what runs goes on: rich ends a process whose reader
                # has gone, and a handler may have come between the parts of another line.
                with contextlib.suppress(OSError, RuntimeError, SystemExit):
                    if drain and (running := len(self.server_state.tasks)):
                        requests = counted(running, "running request")
                        err.print(f"waiting up to {drain} s for {requests}; Ctrl-C cuts them off")

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=drain + _UNREAD_SECONDS,
    )  # fmt: skip
    # uvicorn hands the signal on when everything has ended: a drained server has succeeded.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    Server(config).run(sockets=[listener])
