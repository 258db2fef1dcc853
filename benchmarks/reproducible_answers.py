"""Whether `handspun serve --weights int8` gives the same bytes whatever else it does, with a real model.

    python benchmarks/reproducible_answers.py --model smollm2-135m [--rounds 2]

32 recorded requests (greedy, sampled, beams, constrained, tools, drafts) are answered one after the other by a
server without a prompt cache. Then all at once, in random order, by a new process each for the prompt cache on and
off and steps of 20, 100 and 1,000 ms; at last one after the other again, in another process. It ends with 1 if a
byte differs. Requests that the model refuses, such as those with tools if its template has none, are left out.
"""

import argparse
import random
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from measurements import table
from recorded_requests import RECORDED
from serve import free_port, running

CELLS = [(cache, step) for cache in (0, 512) for step in (20, 100, 1000)]
"""Megabytes of the prompt cache, and milliseconds of a step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="of each cell; from the second on the cache is warm")
    parser.add_argument("--every", type=int, default=1, help="of the requests: 4 sends every fourth")
    arguments = parser.parse_args()
    with server(arguments, 0, 100) as client:
        found = {number: answer(client, number) for number in range(0, len(RECORDED), arguments.every)}
    alone = {number: text for number, text in found.items() if text is not None}
    print(f"{len(alone)} requests, {len(found) - len(alone)} left out", flush=True)
    rows, order = list[list[str]](), list(alone)
    for cache, step in CELLS:
        with server(arguments, cache, step) as client:
            for seed in range(arguments.rounds):
                random.Random(f"{cache} {step} {seed}").shuffle(order)
                began = time.perf_counter()
                wrong = differing(together(client, order), order, alone)
                seconds, known = time.perf_counter() - began, cached_tokens(client)
                rows.append([str(cache), str(step), str(seed + 1), str(known), f"{seconds:.1f}", listed(wrong)])
                print(" | ".join(rows[-1]), flush=True)
    with server(arguments, 0, 100) as client:
        again = [answer(client, number) for number in alone]
    rows.append(["0", "100", "alone again", "0", "", listed(differing(again, list(alone), alone))])
    titles = ["cache, MB", "step, ms", "round", "tokens from the cache", "seconds", "answers that differ"]
    print(table(titles, rows))
    sys.exit(any(row[-1] != "0" for row in rows))


@contextmanager
def server(arguments: argparse.Namespace, cache: int, step: int) -> Iterator[httpx.Client]:
    """A new process, and a client of it."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "handspun", "serve", "--model", f"model={arguments.model}", "--weights", "int8"),
        *("--port", str(port), "--threads", str(arguments.threads), "--no-log-requests", "--cache-mb", str(cache)),
        *("--target-step-ms", str(step)),
    ]
    limits = httpx.Limits(max_connections=None)
    with (
        running(command, port),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as client,
    ):
        yield client


def answer(client: httpx.Client, number: int) -> bytes | None:
    """An answer's bytes, without what is new each time: its id, when, its calls' ids, what the cache knew.

    None if the request is refused.
    """
    path, body = RECORDED[number]
    reply = client.post(path, json=body)
    if reply.status_code == 400:
        print(f"left out: {reply.json()['error']['message']}", flush=True)
        return None
    if reply.status_code != 200:
        raise SystemExit(f"{body}: {reply.text}")
    text = re.sub(rb'"(?:id|created)": (?:"[^"]*"|\d+|null),? ?', b"", reply.content)
    return re.sub(rb'"cached_tokens": \d+', b"", text)


def together(client: httpx.Client, order: Sequence[int]) -> list[bytes | None]:
    with ThreadPoolExecutor(len(order)) as pool:
        return list(pool.map(lambda number: answer(client, number), order))


def differing(found: Sequence[bytes | None], order: Sequence[int], expected: Mapping[int, bytes]) -> list[int]:
    return [number for number, text in zip(order, found, strict=True) if text != expected[number]]


def listed(numbers: Sequence[int]) -> str:
    """How many, and which of the recorded requests."""
    return f"{len(numbers)}{f' ({numbers})' if numbers else ''}"


def cached_tokens(client: httpx.Client) -> int:
    [value] = re.findall(r"^handspun_cached_tokens_total (\d+)", client.get("/metrics").text, flags=re.MULTILINE)
    return int(value)


if __name__ == "__main__":
    main()
