"""The server's life: load the models, answer one request of each, serve, and on a signal finish and leave."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import copy_context
from pathlib import Path
from types import FrameType
from typing import TypeVar, cast

import torch
import uvicorn

from handspun.config.serving import ServeOptions, served_models
from handspun.display import count_of, logger
from handspun.errors import ConfigError
from handspun.models.load import ChatModel
from handspun.runs.record import current_memory
from handspun.serve.app import Service, make_app
from handspun.serve.collect import check_collect_file
from handspun.serve.completions import completions
from handspun.serve.connection import HttpConfig, listen
from handspun.serve.guard import Keys
from handspun.serve.metrics import Metrics
from handspun.serve.routes import routes
from handspun.serve.schemas import CompletionRequest, read
from handspun.serve.served import Context, ServedModel
from handspun.serve.worker import Worker, WorkerLimits
from handspun.training.memory import available_memory

Result = TypeVar("Result")

_CONTEXT = 4096
"""Tokens of context that a model is given memory for, if its config does not say how many it has."""
_LAST_WORDS_SECONDS = 1.0
"""How long the last errors may take to be written once the drain is over."""


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def serve(options: ServeOptions, load: Callable[[str], ChatModel]) -> None:
    """Serve models until Ctrl-C or SIGTERM. Raises HandspunError if something cannot be loaded or opened.

    Args:
        options: what is served, to whom, and within which limits.
        load: loads a model by its path or hub id.
    """
    paths, keys = served_models(options.model), Keys.read(options.api_key_file)
    if options.collect is not None:
        check_collect_file(Path(options.collect))
    sock = listen(options.host, options.port)
    service = Service(options, Metrics(list(paths)), keys)
    try:
        asyncio.run(_Life(service, sock, lambda: _load_all(paths, load)).run())
    finally:
        sock.close()


def _load_all(paths: Mapping[str, str], load: Callable[[str], ChatModel]) -> dict[str, ServedModel]:
    found = {}
    for name, path in paths.items():
        logger.info(f"loading {name} ...")
        found[name] = ServedModel.of(name, load(path))
    return found


class _Life:
    """One run of the server, in the event loop of the main thread."""

    def __init__(self, service: Service, sock: socket.socket, load: Callable[[], dict[str, ServedModel]]) -> None:
        self._service, self._sock, self._load = service, sock, load
        app = make_app(service, routes(service.options))
        self._server = _Server(HttpConfig(app, service.options))
        self._signals = 0

    async def run(self) -> None:
        """Answer from the first moment: with status 503 while the models are loaded."""
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        with self._signal_handlers():
            serving = asyncio.create_task(self._server.serve(sockets=[self._sock]))
            starting = asyncio.create_task(self._start())
            stop = asyncio.create_task(self._stop.wait())
            try:
                await asyncio.wait({serving, starting, stop}, return_when=asyncio.FIRST_COMPLETED)
                if starting.done():
                    starting.result()
                    await asyncio.wait({serving, stop}, return_when=asyncio.FIRST_COMPLETED)
                await self._drain()
            finally:
                starting.cancel()
                stop.cancel()
                self._service.is_draining = True
                self._server.should_exit = True
                await serving
                if self._service.worker is not None:
                    await asyncio.to_thread(self._service.worker.stop)

    async def _start(self) -> None:
        service = self._service
        models = await _in_thread(self._load)
        service.models = models
        worker = await _in_thread(lambda: _start_worker(service))
        await _warm_up(service, worker)
        service.worker = worker
        host, port = self._sock.getsockname()[:2]
        _print_ready(service, f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def _drain(self) -> None:
        """Refuse new requests, let running ones end, and then tell the rest that they have to."""
        service = self._service
        service.is_draining = True
        if service.worker is not None:
            service.worker.drain()
        if service.answering:
            logger.info(
                f"finishing {count_of(len(service.answering), 'request')}, {service.options.drain_seconds:g} "
                "seconds at most; a second Ctrl-C or SIGTERM leaves at once"
            )
        for seconds in (service.options.drain_seconds, _LAST_WORDS_SECONDS):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while service.answering:
                        await asyncio.sleep(0.02)
            service.stop_answers()

    @contextlib.contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Python takes signals in no other
            yield
            return
        handlers: dict[int, Callable[[int, FrameType | None], None]]
        handlers = {signal.SIGINT: self._on_signal, signal.SIGTERM: self._on_signal}
        if self._service.options.api_key_file is not None and hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = self._on_hangup
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1 or self._service.worker is None:  # a thread that loads weights cannot be told to stop
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(0 if self._signals == 1 else 128 + number)
        self._loop.call_soon_threadsafe(self._stop.set)

    def _on_hangup(self, _number: int, _frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._read_keys)

    def _read_keys(self) -> None:
        """Read the file of keys again. One that cannot be used changes nothing."""
        try:
            self._service.keys = Keys.read(self._service.options.api_key_file)
        except ConfigError as error:
            logger.error(f"{error} The keys stay as they were.")
        else:
            logger.info(f"the API keys were read again: {count_of(self._service.keys.count, 'key')}")


async def _in_thread(work: Callable[[], Result]) -> Result:
    """Run work in a thread that ends with the process, and return its result.

    asyncio's own threads would keep the process alive until they are done.
    """
    loop, context = asyncio.get_running_loop(), copy_context()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(Result, result))

    def run() -> None:
        try:
            result, error = context.run(work), None
        except BaseException as caught:
            result, error = None, caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="loading", daemon=True).start()
    return await future


def _start_worker(service: Service) -> Worker:
    """Return the engine's thread, started."""
    options = service.options
    limits = WorkerLimits(
        rows=options.max_rows,
        kv_tokens=options.kv_tokens or _kv_tokens(list(service.models.values()), options.max_rows),
        cache_bytes=options.cache_mb * 2**20,
        queue=options.max_queue,
        queue_seconds=options.queue_seconds,
        request_seconds=options.request_seconds,
        step_seconds=options.target_step_ms / 1000,
    )
    worker = Worker({name: served.chat for name, served in service.models.items()}, limits, service.metrics)
    worker.start()
    return worker


def _kv_tokens(models: list[ServedModel], rows: int) -> int:
    """Return how many tokens' keys and values each model may keep: half of the free memory, shared by all.

    More than every row's whole context is never needed.
    """
    sizes = []
    for served in models:
        room = available_memory(served.chat.device)
        config = served.chat.model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dtype = torch.float32 if served.chat.fused is None else served.chat.fused.cache_dtype
        bytes_per_token = 2 * dtype.itemsize * config.num_hidden_layers * heads * size
        most = (served.context or _CONTEXT) * rows
        sizes.append(most if room is None else min(most, room.available // 2 // len(models) // bytes_per_token))
    return max(1, min(sizes))


async def _warm_up(service: Service, worker: Worker) -> None:
    """Have each model answer once: what is made on first use is then there, and a broken model is known."""
    for name in service.models:
        context = Context(
            models=service.models,
            worker=worker,
            limits=service.options,
            request_id="warm-up",
            namespace="",
            log={},
        )
        await completions(context, read(CompletionRequest, {"model": name, "prompt": "Hi", "max_tokens": 1}))


def _print_ready(service: Service, url: str) -> None:
    """Print what is served, where, and within which limits, on one line."""
    options = service.options
    names = ", ".join(f"{name} ({served.describe()['weights']})" for name, served in service.models.items())
    key = "with an API key" if service.keys.are_needed else "without an API key"
    logger.info(
        f"ready: {url}/v1 ({key}), models: {names}, memory {(current_memory() or 0) / 1e9:.1f} GB, up to "
        f"{options.max_rows} answers at a time and {options.max_queue} requests waiting"
        f"{f'; chat page: {url}/' if options.page else ''}"
    )
