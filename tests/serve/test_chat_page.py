"""The chat page in a real Chromium: against a tiny model, and against a handler that says what it is told."""

import asyncio
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.types import ASGIApp

import handspun
from chromium import Chromium
from handspun.cli.views.explain import _noise, _percent
from handspun.config.serving import ServeOptions
from handspun.models.load import ChatModel
from handspun.serve.app import Endpoint, Service, make_app
from handspun.serve.chat_page import FOLDER, HEADERS, page_files
from handspun.serve.guard import Keys
from handspun.serve.metrics import Metrics
from handspun.serve.routes import routes
from handspun.serve.schemas import ChatRequest
from handspun.serve.served import Context, ServedModel
from handspun.serve.worker import Worker, WorkerLimits
from report_in_a_browser import browser
from serving import ask, served

LOCK = json.loads((FOLDER / "vendor" / "lock.json").read_text(encoding="utf-8"))
needs_browser = pytest.mark.skipif(browser() is None, reason="there is no Chromium")

HOSTILE = [
    "<script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "<img src=http://evil.example/a.png>",
    "![a](http://evil.example/b.png)",
    "![a][r]\n\n[r]: http://evil.example/c.png",
    "[click](javascript:window.pwned=1)",
    "[click](JaVaScRiPt:window.pwned=1)",
    "[click](java\tscript:window.pwned=1)",
    "[click](&#106;avascript:window.pwned=1)",
    "[click](data:text/html,<script>window.pwned=1</script>)",
    "[click](vbscript:window.pwned=1)",
    "<javascript:window.pwned=1>",
    '[a](http://evil.example "x" onclick=window.pwned=1)',
    '[a](http://evil.example/"onmouseover="window.pwned=1)',
    "<svg onload=window.pwned=1>",
    "<svg><script>window.pwned=1</script></svg>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--><img src=x onerror=window.pwned=1>'>",
    "<iframe src=http://evil.example></iframe>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'>",
    "<link rel=stylesheet href=http://evil.example/d.css>",
    "<style>@import url(http://evil.example/e.css);</style>",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>",
    "<base href=http://evil.example>",
    "<form action=http://evil.example><button autofocus onfocus=window.pwned=1>",
    "<details open ontoggle=window.pwned=1>",
    "<body onload=window.pwned=1>",
    "<input id=prompt name=send><a id=body><a id=body name=dataset>",
    '```"><script>window.pwned=1</script>\nx\n```',
    "```html onload=window.pwned=1\n<script>window.pwned=1</script>\n```",
    "`<img src=x onerror=window.pwned=1>`",
    "| <img src=x onerror=window.pwned=1> |\n| --- |\n| <script>window.pwned=1</script> |",
    "<<script>script>window.pwned=1</script>",
    "\u202egnp.<script>window.pwned=1</script>",
    "</textarea><script>window.pwned=1</script>",
    "</title><script>window.pwned=1</script>",
    "{{constructor.constructor('window.pwned=1')()}}",
    "<noscript><p title='</noscript><img src=x onerror=window.pwned=1>'>",
    "http://evil.example/<script>window.pwned=1</script>",
]
"""Markdown and HTML that would run a script, load something, or take over the page's own elements."""


@dataclass
class Parrot:
    """Answers with the last message, a few characters at a time."""

    bodies: list[ChatRequest] = field(default_factory=list)
    is_endless: bool = False
    open: int = 0

    async def answer(self, _: Context, body: ChatRequest) -> AsyncIterator[dict[str, Any]]:
        """Answer a streamed chat request."""
        self.bodies.append(body)
        return self._events(str(body.messages[-1].content))

    async def _events(self, text: str) -> AsyncIterator[dict[str, Any]]:
        pieces = [text[start : start + 3] for start in range(0, len(text), 3)]
        self.open += 1
        try:
            while True:
                for number, piece in enumerate(pieces):
                    delta = {"content": piece}
                    choice = {
                        "index": 0,
                        "delta": delta,
                        "logprobs": None,
                        "finish_reason": None,
                        "token_ids": [number],
                    }
                    yield {"choices": [choice], "handspun": {"seed": 7}}
                    await asyncio.sleep(0.001)
                if not self.is_endless:
                    break
            yield {"choices": [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]}
            counts = {"prompt_tokens": 9, "completion_tokens": len(pieces), "total_tokens": 9 + len(pieces)}
            yield {"choices": [], "usage": {**counts, "prompt_tokens_details": {"cached_tokens": 4}}}
        finally:
            self.open -= 1


@dataclass
class Servers:
    """Addresses of three servers with the page, and the handler of the second."""

    real: str
    parrot: str
    locked: str
    handler: Parrot


@pytest.fixture(scope="module")
def servers(chat: ChatModel) -> Iterator[Servers]:
    models = {name: ServedModel.of(name, chat) for name in ("tuned", "base")}
    metrics, handler, options = Metrics(list(models)), Parrot(), ServeOptions(log_requests=False)
    worker = Worker({name: one.chat for name, one in models.items()}, WorkerLimits(kv_tokens=4096), metrics)
    worker.start()
    table = routes(options)
    repeating = [
        replace(one, handler=handler.answer) if one.path == "/v1/chat/completions" else one for one in table
    ]

    def app(keys: list[str], endpoints: Sequence[Endpoint]) -> ASGIApp:
        return make_app(Service(options, metrics, Keys(keys), models, worker), endpoints)

    with (
        served(app([], table), options) as first,
        served(app([], repeating), options) as second,
        served(app(["sesame"], repeating), options) as third,
    ):
        real, parrot, locked = (f"http://127.0.0.1:{port}/" for port in (first, second, third))
        yield Servers(real, parrot, locked, handler)
    worker.stop()


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Chromium]:
    """A browser that must have run nothing but the page, and asked nobody else."""
    with Chromium(tmp_path / "profile") as tab:
        yield tab
        assert tab.run("window.pwned === undefined")
        assert tab.run("violations") == []
        pages = {"/".join(url.split("/")[:3]) for url in tab.requests if not url.startswith(("about:", "blob:"))}
        assert len(pages) == 1
        assert pages.pop().startswith("http://127.0.0.1:")


def send(tab: Chromium, text: str) -> None:
    tab.run("document.querySelector('#prompt').focus()")
    tab.type(text)
    tab.press("Enter")


def last_answer(tab: Chromium) -> str:
    """The text of the last answer, once it is complete."""
    last = "document.querySelector('.assistant:last-child')"
    tab.until(f"document.querySelector('#stop').hidden && {last}?.querySelector('.facts').textContent")
    assert tab.run(f"{last}.querySelector('.error').textContent") == ""
    return str(tab.run("document.querySelector('.assistant:last-child .body').textContent")).strip()


def fill(tab: Chromium, name: str, value: str) -> None:
    tab.run(
        f"field = document.querySelector('#{name}'), field.value = {json.dumps(value)}, "
        "field.dispatchEvent(new Event('change'))"
    )


@needs_browser
def test_a_message_is_answered_by_the_model(tab: Chromium, servers: Servers, chat: ChatModel) -> None:
    tab.open(servers.real)
    fill(tab, "seed", "5")
    fill(tab, "max_tokens", "12")
    send(tab, "Say 3.")
    last_answer(tab)
    [expected] = handspun.generate(chat, ["Say 3."], do_sample=True, temperature=1.0, seed=5, max_new_tokens=12)
    [answer] = conversation_answers(tab)
    assert answer["content"] == expected.text
    assert answer["count"] == len(expected.token_ids)
    facts = tab.run("document.querySelector('.assistant .facts').textContent")
    assert f"{len(expected.token_ids)} tokens · prompt {len(expected.prompt_token_ids)} · seed 5" in facts.replace(
        "token ·", "tokens ·"
    )


@needs_browser
def test_a_token_is_explained_as_by_the_command_line(tab: Chromium, servers: Servers, chat: ChatModel) -> None:
    """And the answer goes on from another token by ids, as if that one had been drawn."""
    sampling: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.2}
    tab.open(servers.real)
    for name, value in {**sampling, "seed": 5, "max_tokens": 12}.items():
        fill(tab, name, str(value))
    send(tab, "Say 3.")
    last_answer(tab)
    [told] = handspun.generate(
        chat, ["Say 3."], do_sample=True, top_p=1.0, seed=5, max_new_tokens=12, explain=True, **sampling
    )
    assert told.explanation is not None
    tab.click(".assistant [title^='Why these']")
    shown = tab.run("document.querySelectorAll('.token').length")
    assert shown > 4
    for index in range(shown):
        step = told.explanation[index]
        tab.run(f"document.querySelectorAll('.token')[{index}].click()")
        rows = tab.until(
            f"document.querySelector('.why h3')?.textContent.startsWith('Token {index + 1}:') && "
            "[...document.querySelectorAll('.why dd')].map((one) => one.textContent)"
        )
        assert rows[0] == f"{_percent(step.probability)}, rank {step.rank:,}"
        assert [row.split()[-1] for row in rows[1:-3]] == [_percent(one.probability) for one in step.effects]
        assert rows[-3] == f"{step.left:,} tokens, {_percent(step.left_mass)} of the probability"
        for row, one in zip(rows[-2:], (step.chosen, step.runner_up), strict=True):
            assert one is not None
            assert f"(id {one.token_id}), {_percent(one.probability)}, noise {_noise(one)}" in row
    tab.run("document.querySelectorAll('.token')[2].click()")
    tab.until("document.querySelector('.why h3')?.textContent.startsWith('Token 3:')")
    tab.click(".why td button")
    tab.until("document.querySelector('.branches')?.textContent.includes('2 of 2')")
    last_answer(tab)
    first, second = conversation_answers(tab)
    ids = [[token["id"] for token in answer["tokens"]] for answer in (first, second)]
    assert ids[0][:2] == ids[1][:2]
    assert ids[0][2] != ids[1][2]
    port = int(servers.real.split(":")[2].strip("/"))
    body = {"model": "tuned", "messages": [{"role": "user", "content": "Say 3."}], "seed": 5, "max_tokens": 12}
    again = ask(port, "/v1/chat/completions", {**body, **sampling, "answer_token_ids": ids[1][:3]}).json()
    assert second["content"] == again["choices"][0]["message"]["content"]


@needs_browser
def test_a_link_gives_the_same_answer_again(tab: Chromium, servers: Servers) -> None:
    tab.open(servers.real)
    fill(tab, "system", "Be brief.")
    fill(tab, "temperature", "1.3")
    fill(tab, "max_tokens", "12")
    send(tab, "Say 3. % # & 🙂")
    first = last_answer(tab)
    asked = len([url for url in tab.requests if url.endswith("completions")])
    [answer] = conversation_answers(tab)
    call = f"linkTo({json.dumps(answer)}, [{{role: 'user', content: 'Say 3. % # & 🙂'}}])"
    link = tab.run(f"import('/static/replay.js').then(({{linkTo}}) => {call})")
    assert link.startswith(servers.real + "#answer=")
    tab.call("Page.navigate", url="about:blank")
    tab.run("1")
    tab.open(link)
    tab.until("document.querySelector('.offer') !== null")
    assert len([url for url in tab.requests if url.endswith("completions")]) == asked
    assert tab.run("location.hash") == ""
    tab.click(".offer button")
    assert last_answer(tab) == first
    facts = tab.run("document.querySelector('.assistant .facts').textContent")
    assert f"seed {answer['seed']}" in facts
    assert "not the model" not in facts


@needs_browser
@pytest.mark.parametrize("told", ["{", "null", "{}", '{"messages": [{"role": "system", "content": "x"}]}'])
def test_a_damaged_link_is_told(tab: Chromium, servers: Servers, told: str) -> None:
    tab.open(servers.real + "#answer=" + quote(told))
    assert tab.until("document.querySelector('#notice').textContent") == "The link is damaged. Copy all of it."


def conversation_answers(tab: Chromium) -> list[dict[str, Any]]:
    """The answers of the only conversation, in order, as they are kept."""
    found = tab.run("import('/static/store.js').then(async (store) => (await store.open(), store.load()))")
    return [node for node in found[0]["nodes"].values() if node["role"] == "assistant"]


@needs_browser
def test_markdown_is_shown_while_it_comes(tab: Chromium, servers: Servers) -> None:
    tab.open(servers.parrot)
    send(
        tab,
        "# Title\n\nSome *words* and [a link](https://a.example/b).\n\n```python\nprint(1)\n```\n\n1. one\n2. two",
    )
    assert last_answer(tab).startswith("Title")
    body = "document.querySelector('.assistant .body')"
    assert tab.run(f"{body}.querySelector('pre').textContent") == "print(1)\n"
    assert tab.run(f"{body}.querySelector('.code span').textContent") == "python"
    assert tab.run(f"{body}.querySelectorAll('ol > li').length") == 2
    assert tab.run(f"{body}.querySelector('a').rel") == "noopener noreferrer"
    assert tab.run(f"{body}.querySelector('.target').textContent") == " (a.example)"
    facts = tab.run("document.querySelector('.assistant .facts').textContent")
    assert "tokens per second" in facts
    assert "prompt 9, 4 of them cached · seed 7" in facts


@needs_browser
def test_a_growing_text_looks_as_the_whole_one(tab: Chromium, servers: Servers) -> None:
    blocks = [
        "# T",
        "* a\n* b\n\n  c",
        "> q\n> r",
        "```js\nlet a\n\nlet b\n```",
        "| a | b |\n| - | - |\n| 1 | 2 |",
        "end",
    ]
    text = "\n\n".join(blocks) + "\n"
    tab.open(servers.parrot)
    same = tab.run(
        "import('/static/markdown.js').then(({GrowingMarkdown, render}) => {"
        " const [growing, whole] = [document.createElement('div'), document.createElement('div')];"
        f" const view = new GrowingMarkdown(growing), text = {json.dumps(text)};"
        " for (let end = 1; end <= text.length; end++) view.update(text.slice(0, end));"
        " whole.append(render(text)); const plain = (one) => one.innerHTML.replace(/\\s+/g, '');"
        " return [plain(growing), plain(whole)]; })"
    )
    assert same[0] == same[1]
    assert "<table>" in same[0]


@needs_browser
def test_stop_ends_the_request(tab: Chromium, servers: Servers) -> None:
    tab.open(servers.parrot)
    servers.handler.is_endless = True
    try:
        send(tab, "On and on. ")
        tab.until("document.querySelector('.assistant .body').textContent.length > 40")
        tab.click("#stop")
        assert last_answer(tab).startswith("On and on.")
    finally:
        servers.handler.is_endless = False
    assert "stopped" in tab.run("document.querySelector('.assistant .facts').textContent")
    end = time.monotonic() + 5
    while servers.handler.open:
        assert time.monotonic() < end, "the server goes on"
        time.sleep(0.01)


@needs_browser
def test_an_edited_message_begins_a_branch(tab: Chromium, servers: Servers) -> None:
    tab.open(servers.parrot)
    send(tab, "first")
    assert last_answer(tab) == "first"
    tab.press("ArrowUp")
    tab.run("document.activeElement.select()")
    tab.type("second")
    tab.press("Enter")
    tab.until("document.querySelector('.user .body').textContent === 'second'")
    assert last_answer(tab) == "second"
    assert "2 of 2" in tab.run("document.querySelector('.user .branches').textContent")
    tab.click(".user .branches button")
    assert tab.run("document.querySelector('.assistant .body').textContent").strip() == "first"
    tab.press("r", code="KeyR", modifiers=1)
    tab.until("document.querySelector('.assistant .branches')?.textContent.includes('2 of 2')")
    assert last_answer(tab) == "first"
    tab.call("Page.reload")
    tab.until("document.querySelector('#conversations .title') !== null")
    tab.click("#conversations .title")
    assert "2 of 2" in tab.run("document.querySelector('.assistant .branches').textContent")


@needs_browser
def test_settings_are_in_the_request(tab: Chromium, servers: Servers) -> None:
    tab.open(servers.parrot)
    tab.press("s", code="KeyS", modifiers=1)
    tab.type("Be brief.")
    for name, value in {"temperature": "0.5", "top_k": "40", "stop_strings": "a\nb", "choices": "yes\nno"}.items():
        fill(tab, name, value)
    tab.run("document.querySelector('#system').dispatchEvent(new Event('change'))")
    fill(tab, "model", "base")
    send(tab, "Well?")
    last_answer(tab)
    body = servers.handler.bodies[-1]
    assert [(one.role, one.content) for one in body.messages] == [("system", "Be brief."), ("user", "Well?")]
    assert (body.model, body.temperature, body.top_k, body.stop) == ("base", 0.5, 40, ["a", "b"])
    assert body.structured_outputs is not None
    assert body.structured_outputs.choice == ["yes", "no"]
    assert body.seed is None
    fill(tab, "temperature", "3")
    send(tab, "Well?")
    error = tab.until("document.querySelector('.assistant:last-child .error:not([hidden])')?.textContent")
    assert error == "temperature: 3 is out of range (expected 0 to 2). Change it in the settings."


@needs_browser
def test_conversations_are_found_renamed_and_deleted(tab: Chromium, servers: Servers) -> None:
    tab.open(servers.parrot)
    for text in ("about apples", "about pears"):
        send(tab, text)
        last_answer(tab)
        tab.press("n", code="KeyN", modifiers=1)
    titles = "[...document.querySelectorAll('#conversations .title')].map((one) => one.textContent)"
    assert tab.run(titles) == ["about pears", "about apples"]
    tab.run("document.querySelector('#search').focus()")
    tab.type("apple")
    assert tab.run(titles) == ["about apples"]
    tab.click("#conversations [title^=Rename]")
    tab.type("Fruit")
    tab.press("Enter")
    assert tab.until(f"{titles}.includes('Fruit')")
    tab.click("#conversations [title^=Delete]")
    tab.click("#conversations [title^=Delete]")
    fill(tab, "search", "")
    tab.run("document.querySelector('#search').dispatchEvent(new Event('input'))")
    assert tab.until(f"{titles}.length === 1 && {titles}") == ["about pears"]


@needs_browser
def test_exported_conversations_are_rows_to_train_on(
    tab: Chromium, servers: Servers, tiny_folder: Path, tmp_path: Path
) -> None:
    tab.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.open(servers.parrot)
    fill(tab, "system", "Be brief.")
    text = 'Two lines:\n"a" <b> \\ \u2028 🙂'
    tab.run(f"prompt = document.querySelector('#prompt'), prompt.value = {json.dumps(text)}")
    tab.press("Enter")
    last_answer(tab)
    tab.click("#export")
    tab.click("#export-shown")
    file, end = tmp_path / "conversations.jsonl", time.monotonic() + 10
    while not file.exists():
        assert time.monotonic() < end, "nothing was saved"
        time.sleep(0.02)
    [row] = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    roles = ("system", "user", "assistant")
    assert row == {
        "messages": [
            {"role": role, "content": said} for role, said in zip(roles, ("Be brief.", text, text), strict=True)
        ]
    }
    preview = handspun.preview(str(file), tiny_folder)
    assert text.split("\n", maxsplit=1)[0] in str(preview)


@needs_browser
def test_no_script_of_a_text_runs(tab: Chromium, servers: Servers) -> None:
    """In a message, an answer that streams, a name, and imported files."""
    tab.open(servers.parrot)
    send_text = "\n\n".join(HOSTILE)
    tab.run(f"prompt = document.querySelector('#prompt'), prompt.value = {json.dumps(send_text)}")
    send(tab, " ")
    last_answer(tab)
    roles = ("system", "user", "assistant")
    rows = [{"messages": [{"role": role, "content": text} for role in roles]} for text in HOSTILE]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    tab.run(
        "files = new DataTransfer(), files.items.add(new File([" + json.dumps(lines) + "], 'rows.jsonl')),"
        "field = document.querySelector('#import-file'), field.files = files.files,"
        "field.dispatchEvent(new Event('change'))"
    )
    tab.until(f"document.querySelectorAll('#conversations .title').length === {len(HOSTILE) + 1}")
    for number in range(len(HOSTILE)):
        tab.run(f"document.querySelectorAll('#conversations .title')[{number}].click()")
        tab.run("document.querySelectorAll('.body a').forEach((one) => one.removeAttribute('target'))")
        assert tab.run(
            "[...document.querySelectorAll('.body a')].every((one) => /^(https?|mailto):/.test(one.href))"
        )
        assert not tab.run(
            "document.querySelector('.body :is(img, script, style, svg, iframe, form, input, [id], [style])')"
        )


@needs_browser
@pytest.mark.parametrize("wrong", ["{", '{"rows": []}', '{"messages": [{"role": "tool", "content": "x"}]}'])
def test_a_file_that_holds_no_conversations_is_told(tab: Chromium, servers: Servers, wrong: str) -> None:
    tab.open(servers.parrot)
    tab.run(
        f"files = new DataTransfer(), files.items.add(new File([{json.dumps(wrong)}], 'rows.jsonl')),"
        "field = document.querySelector('#import-file'), field.files = files.files,"
        "field.dispatchEvent(new Event('change'))"
    )
    assert tab.until("document.querySelector('#notice').textContent").startswith("rows.jsonl: line 1")


@needs_browser
def test_a_key_is_asked_for(tab: Chromium, servers: Servers) -> None:
    tab.call("Page.navigate", url=servers.locked)
    tab.until("document.querySelector('#key-dialog')?.open")
    tab.run("document.querySelector('#key').focus()")
    tab.type("wrong")
    tab.press("Enter")
    tab.until("document.querySelector('#key-text').textContent.startsWith('The key is wrong')")
    tab.run("document.querySelector('#key').select()")
    tab.type("sesame")
    tab.press("Enter")
    tab.until("document.body.dataset.ready === 'true'")
    send(tab, "hello")
    assert last_answer(tab) == "hello"


@needs_browser
@pytest.mark.parametrize("width", [360, 768, 1280, 3840])
def test_the_page_fits_the_window(tab: Chromium, servers: Servers, width: int) -> None:
    tab.look(width=width)
    tab.open(servers.parrot)
    send(tab, "word" * 200 + "\n\n```\n" + "code " * 100 + "\n```\n\n| a |\n| - |\n| " + "cell" * 80 + " |")
    last_answer(tab)
    for settings in (False, True):
        if settings:
            tab.click("#settings-button")
        assert tab.run("document.documentElement.scrollWidth") <= width
        assert tab.run(
            "document.querySelector('#scroller').scrollWidth <= document.querySelector('#scroller').clientWidth"
        )


@needs_browser
@pytest.mark.skipif("AXE" not in os.environ, reason="needs $AXE: axe.min.js of the npm package axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing(tab: Chromium, servers: Servers, scheme: str, width: int) -> None:
    tab.look(width=width, scheme=scheme)
    tab.open(servers.parrot)
    send(tab, "Some [link](https://a.example) and\n\n```python\ncode\n```\n\n| a |\n| - |\n| b |")
    last_answer(tab)
    tab.run(Path(os.environ["AXE"]).read_text(encoding="utf-8"))
    for _ in range(2):
        found = tab.run(
            "axe.run(document).then((found) => found.violations.map((one) => [one.id, one.nodes[0].html]))"
        )
        assert found == []
        tab.press("s", code="KeyS", modifiers=1)


def test_every_file_of_the_page_has_its_headers(servers: Servers) -> None:
    port = int(servers.real.split(":")[2].strip("/"))
    for path in ("", *(f"static/{name}" for name in page_files())):
        reply = ask(port, f"/{path}")
        assert reply.status == 200
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert {name: reply.headers[name.lower()] for name in HEADERS} == HEADERS
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


@pytest.mark.parametrize(
    "name", ["", "../chat_page.py", "%2e%2e/chat_page.py", "vendor", "vendor/lock.json", "x.js"]
)
def test_nothing_else_is_served(servers: Servers, name: str) -> None:
    port = int(servers.real.split(":")[2].strip("/"))
    reply = ask(port, f"/static/{name}")
    assert reply.status == 404
    assert reply.json()["error"]["type"] == "not_found_error"


def test_the_page_can_be_left_out() -> None:
    paths = {one.path for one in routes(ServeOptions())} - {one.path for one in routes(ServeOptions(page=False))}
    assert paths == {"/", "/static/{name:path}"}


def test_vendored_files_are_those_of_the_lock() -> None:
    assert {row["file"] for row in LOCK} == {
        path.name for path in (FOLDER / "vendor").iterdir() if path.name != "lock.json"
    }
    for row in LOCK:
        assert hashlib.sha256((FOLDER / "vendor" / row["file"]).read_bytes()).hexdigest() == row["sha256"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm")
def test_vendored_files_are_what_npm_has(tmp_path: Path) -> None:
    packages = {(row["package"], row["version"]) for row in LOCK}
    assert len(packages) == 2
    for name, version in packages:
        packed = subprocess.run(
            ["npm", "pack", f"{name}@{version}"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        with tarfile.open(tmp_path / packed.stdout.split()[-1]) as archive:
            archive.extractall(tmp_path / name, filter="data")
        about = json.loads((tmp_path / name / "package" / "package.json").read_text(encoding="utf-8"))
        for row in (row for row in LOCK if row["package"] == name):
            data = (tmp_path / name / row["path_in_package"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == row["sha256"]
            assert about["license"] == row["license"]


def test_scripts_are_small() -> None:
    scripts = b"".join(page.value.encode() for name, page in page_files().items() if name.endswith(("js", "mjs")))
    assert len(gzip.compress(scripts)) < 150_000
