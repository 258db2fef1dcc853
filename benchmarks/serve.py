"""`handspun serve` against llama.cpp's server, over HTTP, both at the same requests on the same cores.

    python benchmarks/serve.py --model FOLDER --gguf FILE --llama-server PROGRAM [--clients 1 8 32] [--rounds 2]
        [--load-tool PROGRAM]

Each server runs alone, with two threads; the client runs on the same machine and takes part of it. Every client
sends one completion after the other, 128 tokens in and 128 out, greedy, no prompt twice. Measured:

* tokens per second, time to the first token and time between tokens, by clients;
* the longest gap in four streams while a prompt of 2,000 tokens comes in;
* the first token of a second turn behind 1,500 known tokens, against the same prompt when it is new;
* Handspun's `generate` with 32 rows of the same prompts, without a server;
* with --load-tool (the program of `pip install llama-benchy`, in an environment of its own): what a load tool of
  others measures, whose requests are chats of the same lengths.
"""

import argparse
import asyncio
import hashlib
import itertools
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

import handspun
from decode_prompts import QUESTIONS
from measurements import Results, model_folder, open_results, table

NEW_TOKENS = 128
PROMPT_WORDS = 90
"""About 120 tokens."""
WORDS = sorted({word for question in QUESTIONS for word in question.split()})
SERVER_STARTS = 180.0


@dataclass
class Answer:
    """When a stream's chunks came, in seconds since the request was sent."""

    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks."""
        return [later - earlier for earlier, later in itertools.pairwise(self.arrivals)]


_HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    "Content-Length: {length}\r\nConnection: close\r\n\r\n"
)


@dataclass
class Server:
    """A server that runs: where, and under which name its model answers.

    The client shares the cores with the server, so it is as lean as it can be: httpx takes some 0.3 ms for each
    chunk, which is time that the faster server lacks.
    """

    port: int
    model: str
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def prompt(self, words: int = PROMPT_WORDS) -> str:
        """A prompt that has not been sent before, from its first word on."""
        number = next(self.numbers)
        drawn = random.Random(number).choices(WORDS, k=words)
        return f"{number}: {' '.join(drawn)}"

    async def complete(self, prompt: str, new_tokens: int = NEW_TOKENS) -> Answer:
        """Stream one completion."""
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True,
            "ignore_eos": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        sent = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        answer, started = Answer(), time.perf_counter()
        writer.write(_HEAD.format(port=self.port, length=len(sent)).encode() + sent)
        status = await reader.readline()
        if b" 200 " not in status:
            raise SystemExit(f"{status.decode()}{(await reader.read()).decode()}")
        async for line in reader:  # pieces of HTTP's chunked encoding begin at a line's beginning
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                answer.tokens = event["usage"]["completion_tokens"]
            if event["choices"] and event["choices"][0].get("text"):
                answer.arrivals.append(time.perf_counter() - started)
        writer.close()
        return answer


def main() -> None:
    arguments = parse()
    settings = {"threads": arguments.threads, "new_tokens": NEW_TOKENS}
    results = open_results(
        f"serve-{arguments.results or Path(arguments.model).name}", settings, fresh=arguments.fresh
    )
    contenders: dict[str, Callable[[], object]] = {"Handspun": lambda: handspun_server(arguments)}
    if arguments.llama_server is not None:
        contenders["llama.cpp"] = lambda: llama_server(arguments)
    for _ in range(arguments.rounds):
        for name in contenders:
            asyncio.run(measure_server(results, name, arguments))
        results.add("generate, 32 rows", {"rate": offline_rate(arguments)})
    print(summary(results, list(contenders), arguments.clients))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf", type=Path, help="the same model as llama.cpp reads it")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's program; left out without it")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--load-tool", type=Path, help="llama-benchy's program, to measure with it too")
    parser.add_argument("--results", metavar="NAME", help="of the saved figures (default: the model's folder)")
    parser.add_argument("--fresh", action="store_true")
    return parser.parse_args()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def handspun_server(arguments: argparse.Namespace) -> Iterator[int]:
    """Run ours. Yields its port."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "handspun", "serve", "--model", f"model={arguments.model}", "--weights", "int8"),
        *("--port", str(port), "--threads", str(arguments.threads), "--no-log-requests"),
    ]
    with running(command, port):
        yield port


@contextmanager
def llama_server(arguments: argparse.Namespace) -> Iterator[int]:
    """Run llama.cpp's: as many slots as clients, each with room for the longest prompt."""
    port, slots = free_port(), max(arguments.clients)
    command = [
        *(
            str(arguments.llama_server),
            "--model",
            str(arguments.gguf),
            "--port",
            str(port),
            "--parallel",
            str(slots),
        ),
        *("--threads", str(arguments.threads), "--threads-batch", str(arguments.threads)),
        *("--ctx-size", str(16384), "--kv-unified", "--log-disable"),
    ]
    with running(command, port):
        yield port


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """Run a server until the block ends. It has answered /health when the block begins."""
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"serve-{port}.log"
    with log.open("w") as lines, subprocess.Popen(command, stdout=lines, stderr=lines) as process:
        try:
            deadline = time.monotonic() + SERVER_STARTS
            while True:
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{command[0]} did not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            process.wait(30)
    log.unlink()


async def measure_server(results: Results, name: str, arguments: argparse.Namespace) -> None:
    """Start a server, warm it up, and measure it."""
    start = handspun_server if name == "Handspun" else llama_server
    with start(arguments) as port:
        server = Server(port, "model")
        await server.complete(server.prompt(), 8)
        for clients in arguments.clients:
            figures = results.add(f"{name}: {clients}", await load(server, clients, arguments.requests))
            print(f"{name}, {clients} clients: {figures['rate']:.1f} tokens/s", flush=True)
        print(f"{name}: {results.add(f'{name}: long prompt', await gap_beside_long_prompt(server))}", flush=True)
        print(f"{name}: {results.add(f'{name}: second turn', await second_turn(server))}", flush=True)
        if arguments.load_tool is not None:
            found = await asyncio.to_thread(llama_benchy, f"http://127.0.0.1:{port}", server.model, arguments)
            for clients, figures in found.items():
                results.add(f"{name}: {clients}, llama-benchy", figures)
                print(f"{name}, {clients} clients, llama-benchy: {figures['rate']:.1f} tokens/s", flush=True)


async def load(server: Server, clients: int, requests: int) -> dict[str, float]:
    """Send `requests` completions per client, all clients at once."""

    async def client() -> list[Answer]:
        return [await server.complete(server.prompt()) for _ in range(requests)]

    started = time.perf_counter()
    answers = list(itertools.chain(*await asyncio.gather(*(client() for _ in range(clients)))))
    seconds = time.perf_counter() - started
    gaps = sorted(gap for answer in answers for gap in answer.gaps)
    first = sorted(answer.arrivals[0] for answer in answers)
    return {
        "rate": sum(answer.tokens for answer in answers) / seconds,
        "first_p50": statistics.median(first),
        "first_p95": first[math.ceil(0.95 * len(first)) - 1],
        "gap_p50": statistics.median(gaps),
        "gap_p99": gaps[math.ceil(0.99 * len(gaps)) - 1],
    }


async def gap_beside_long_prompt(server: Server) -> dict[str, float]:
    """Four streams run; then a prompt of some 2,000 tokens comes in."""
    streams = [asyncio.create_task(server.complete(server.prompt(), 200)) for _ in range(4)]
    await asyncio.sleep(1.5)
    long = await server.complete(server.prompt(1600), 1)
    answers = await asyncio.gather(*streams)
    return {"worst_gap": max(max(answer.gaps) for answer in answers), "first_of_long": long.arrivals[0]}


async def second_turn(server: Server) -> dict[str, float]:
    """Some 1,500 tokens that are new, and the same with a few more behind them."""
    prompt = server.prompt(1180)
    cold = await server.complete(prompt, 1)
    warm = await server.complete(prompt + " and then?", 1)
    return {"cold": cold.arrivals[0], "warm": warm.arrivals[0]}


def llama_benchy(address: str, model: str, arguments: argparse.Namespace) -> dict[int, dict[str, float]]:
    """llama-benchy's figures, by clients: tokens per second of all, and the mean time to the first token.

    It takes its prompts from a book that it downloads. Here it finds one of our words where it keeps books.
    """
    with tempfile.TemporaryDirectory() as home:
        book, result = "https://book.example/", Path(home) / "result.json"
        kept = Path(home) / ".cache" / "llama-benchy" / f"{hashlib.md5(book.encode()).hexdigest()}.txt"
        kept.parent.mkdir(parents=True)
        kept.write_text(" ".join(random.Random(0).choices(WORDS, k=50_000)))
        command = [
            *(str(arguments.load_tool), "--base-url", f"{address}/v1", "--model", model, "--book-url", book),
            *("--tokenizer", model_folder(arguments.model), "--pp", "128", "--tg", str(NEW_TOKENS), "--exact-tg"),
            *("--concurrency", *map(str, arguments.clients), "--runs", str(arguments.requests), "--no-cache"),
            *("--latency-mode", "none", "--skip-coherence", "--format", "json", "--save-result", str(result)),
        ]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            command, env={**environment, "HOME": home}, capture_output=True, text=True, check=False
        )
        if done.returncode or not result.exists():
            raise SystemExit(f"{arguments.load_tool} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        report = json.loads(result.read_text())
    return {
        run["concurrency"]: {"rate": run["tg_throughput"]["mean"], "first": run["e2e_ttft"]["mean"] / 1000}
        for run in report["benchmarks"]
    }


def offline_rate(arguments: argparse.Namespace) -> float:
    """New tokens per second of `handspun.generate` over 32 prompts like the clients', in a process of its own."""
    program = f"""
import time, handspun, torch
from serve import NEW_TOKENS, Server
torch.set_num_threads({arguments.threads})
chat = handspun.load({arguments.model!r}, weights="int8", device="cpu")
server = Server(0, "")
def run(count, tokens):
    prompts = [server.prompt() for _ in range(count)]
    options = dict(chat=False, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, stop_strings=())
    return sum(len(answer.token_ids) for answer in handspun.generate(chat, prompts, batch_size=32, **options))
run(1, 4)
started = time.perf_counter()
print(run(32, NEW_TOKENS) / (time.perf_counter() - started))
"""
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment
    )
    return float(done.stdout.split()[-1])


def summary(results: Results, names: list[str], clients: list[int]) -> str:
    """The tables."""

    def median(name: str, what: str, key: str) -> float:
        return statistics.median(run[key] for run in results.of(f"{name}: {what}"))

    rows = []
    for count in clients:
        for name in names:
            figures = [
                median(name, str(count), key) for key in ("rate", "first_p50", "first_p95", "gap_p50", "gap_p99")
            ]
            rows.append([str(count), name, f"{figures[0]:.1f}", *(f"{1000 * value:.0f}" for value in figures[1:])])
    titles = ["clients", "server", "tokens/s", "first token, ms: p50", "p95", "between tokens, ms: p50", "p99"]
    more = []
    for name in names:
        warm, cold = median(name, "second turn", "warm"), median(name, "second turn", "cold")
        gap = median(name, "long prompt", "worst_gap")
        more.append([name, f"{gap:.2f}", f"{cold:.2f}", f"{warm:.2f}", f"{warm / cold:.2f}"])
    behind = ["server", "worst gap beside a long prompt, s", "1,500 new tokens, s", "known, s", "ratio"]
    offline = statistics.median(run["rate"] for run in results.of("generate, 32 rows"))
    version = f"Handspun {handspun.__version__}"
    tables = [table(titles, rows), table(behind, more)]
    if theirs := [
        [str(count), name, f"{median(name, what, 'rate'):.1f}", f"{1000 * median(name, what, 'first'):.0f}"]
        for count in clients
        for name in names
        if results.of(f"{name}: {(what := f'{count}, llama-benchy')}")
    ]:
        tables.append(table(["clients", "server", "tokens/s by llama-benchy", "first token, ms: mean"], theirs))
    return "\n\n".join([*tables, f"{version}, generate with 32 rows: {offline:.1f} tokens/s"])


if __name__ == "__main__":
    main()
