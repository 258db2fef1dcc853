"""The server under the options and paths of llama.cpp's, for benchmarks/llama_cpp_server_tests.py.

It passes requests on and answers back, and translates what is only spelled differently: options, paths without
/v1, `/completion`, defaults of the command line, and names of models, which llama.cpp's server does not look at.
"""

import argparse
import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from asking import served_chat
from handspun.config.serving import ServeOptions
from handspun.data.rendering import choose_template
from live import live
from serving import served

OF_V1 = ("/chat/completions", "/completions", "/models", "/responses")
ANSWERS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
IGNORED = ("id_slot", "return_tokens", "timings_per_token")
"""Fields that choose how llama.cpp's server works, and not what it answers."""


class ServerInThreads:
    """Stands for the process that `subprocess.Popen` would start: a small random model behind the shim."""

    def __init__(self, words: list[str], **_: Any) -> None:
        options = parse(words[1:])
        slots = 1 if options.kv_unified else options.parallel
        chat = served_chat(max_position_embeddings=options.ctx_size // slots)
        if options.chat_template_file is not None:
            chat.tokenizer.add_special_tokens(
                {"additional_special_tokens": ["<|eot_id|>"]}
            )  # Llama's end of a turn
            choose_template(chat.tokenizer, options.chat_template_file)
        limits = ServeOptions(
            log_requests=False, page=not options.no_ui, max_tokens=max(options.n_predict, 0) or 4096
        )
        keys = [options.api_key] if options.api_key else []
        self.pid = os.getpid()
        self._stack = ExitStack()
        inner = self._stack.enter_context(live(chat, limits, keys=keys, names=(options.alias,)))
        shim = Shim(options, f"http://127.0.0.1:{inner.port}")
        self._stack.enter_context(served(shim.app(), limits, options.port))

    def poll(self) -> None:
        """It runs."""

    def terminate(self) -> None:
        """Stop it."""
        self._stack.close()

    def wait(self, timeout: float) -> int:  # noqa: ARG002  (Popen's)
        """Return how it ended."""
        return 0


def parse(words: list[str]) -> argparse.Namespace:
    """llama.cpp's options that mean something here. The others are taken and left alone."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--temp", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ctx-size", type=int, default=4096)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--n-predict", type=int, default=-1)
    parser.add_argument("--kv-unified", action="store_true")
    parser.add_argument("--alias", default="tinyllama-2")
    parser.add_argument("--api-key")
    parser.add_argument("--no-ui", action="store_true")
    parser.add_argument("--chat-template-file")
    return parser.parse_known_args(words)[0]


class Shim:
    """Passes requests on, and answers back."""

    def __init__(self, options: argparse.Namespace, url: str) -> None:
        self._options = options
        self._client = httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None))

    def app(self) -> Starlette:
        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            async with self._client:
                yield

        everything = [Route("/{path:path}", self._answer, methods=["GET", "POST", "OPTIONS"])]
        return Starlette(routes=[Route("/slots", self._slots), *everything], lifespan=lifespan)

    async def _answer(self, request: Request) -> Response:
        path, data = request.url.path, await request.body()
        path = f"/v1{path}" if path in OF_V1 else path
        is_own = path in ("/completion", "/v1/completions") and request.url.path != "/v1/completions"
        if data and isinstance(body := json.loads(data), dict):
            data = json.dumps(self._translated(body, "/v1/completions" if is_own else path)).encode()
        headers = {
            name: value
            for name, value in request.headers.items()
            if name in ("authorization", "x-api-key", "content-type")
        }
        asked = self._client.build_request(
            request.method, "/v1/completions" if is_own else path, content=data, headers=headers
        )
        # A client that leaves leaves our server too.
        sending, left = (
            asyncio.create_task(self._client.send(asked, stream=True)),
            asyncio.create_task(gone(request)),
        )
        await asyncio.wait({sending, left}, return_when=asyncio.FIRST_COMPLETED)
        left.cancel()
        if not sending.done():
            sending.cancel()
            return Response(status_code=499)
        answer = sending.result()
        kind = answer.headers.get("content-type", "")
        if kind.startswith("text/event-stream"):
            pieces = own_events(answer) if is_own else answer.aiter_bytes()
            return StreamingResponse(closing(answer, pieces), media_type="text/event-stream")
        text = await answer.aread()
        await answer.aclose()
        if is_own and answer.status_code == 200:
            return JSONResponse(own_answer(json.loads(text)))
        # The body has been unpacked.
        kept = {name: value for name, value in answer.headers.items() if name.split("-")[0] != "content"}
        kept["content-type"] = kind
        return Response(text, answer.status_code, kept)

    async def _slots(self, _: Request) -> Response:
        text = (await self._client.get("/metrics")).text
        [busy] = [line.split()[1] for line in text.splitlines() if line.startswith("handspun_running ")]
        return JSONResponse([{"is_processing": int(busy) > slot} for slot in range(self._options.parallel)])

    def _translated(self, body: dict[str, Any], path: str) -> dict[str, Any]:
        """The request in our names, with the defaults of llama.cpp's command line."""
        found = {name: value for name, value in body.items() if name not in IGNORED and value is not None}
        if not found.get("tools", True):
            del found["tools"]  # an empty list, which OpenAI refuses
        if path in ANSWERS:
            if "n_predict" in found and (most := found.pop("n_predict")) > 0:
                found["max_tokens"] = most
            if isinstance(bias := found.get("logit_bias"), list):
                found["logit_bias"] = {str(token): value for token, value in bias}
            found = {"temperature": self._options.temp, "seed": self._options.seed, **found}
        if "model" in found:
            found["model"] = self._options.alias
        return found


async def gone(request: Request) -> None:
    """Wait until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def closing(answer: httpx.Response, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces of a stream. A client that leaves leaves our server too."""
    try:
        async for piece in pieces:
            yield piece
    finally:
        await answer.aclose()


def own_answer(answer: dict[str, Any]) -> Any:
    """A completion as llama.cpp's /completion gives it: a list, if there were several prompts."""
    found = [
        {"content": choice["text"], "stop": True, "tokens_evaluated": answer["usage"]["prompt_tokens"]}
        for choice in answer["choices"]
    ]
    return found[0] if len(found) == 1 else found


async def own_events(answer: httpx.Response) -> AsyncIterator[bytes]:
    """A stream as llama.cpp's /completion gives it."""
    async for line in answer.aiter_lines():
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            own = event
            if event.get("choices"):
                [choice] = event["choices"]
                own = {"content": choice["text"], "stop": choice["finish_reason"] is not None}
            yield b"data: " + json.dumps(own).encode() + b"\n\n"
