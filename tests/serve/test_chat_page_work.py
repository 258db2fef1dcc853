"""The chat page in a real Chromium: corrections, tools, exports, keyboard alone, and how much work drawing is."""

import gzip
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import handspun
from chat_page import LAST, Actor, acted, choose_file, fill, last_answer, saved_rows, say
from chromium import Chromium
from handspun.config.serving import ServeOptions
from handspun.models.load import ChatModel
from handspun.serve.app import takes_gzip
from handspun.serve.chat_page import FOLDER, page_files
from report_in_a_browser import browser
from serving import Client, ask

needs_browser = pytest.mark.skipif(browser() is None, reason="there is no Chromium")
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("weather", "time")
]
CLEAR = """
    indexedDB.databases().then((all) => Promise.all(all.map(({name}) => new Promise((resolve) => {
        const asked = indexedDB.deleteDatabase(name);
        asked.onsuccess = asked.onerror = asked.onblocked = resolve;
    })))).then(() => (localStorage.clear(), true))
"""


@pytest.fixture(scope="module")
def actor() -> Actor:
    return Actor()


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("collected") / "rows.jsonl"


@pytest.fixture(scope="module")
def url(chat: ChatModel, actor: Actor, collected: Path) -> Iterator[str]:
    with acted(chat, actor, ServeOptions(collect=str(collected), log_requests=False)) as url:
        yield url


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture
def tab(window: Chromium, url: str, actor: Actor, collected: Path, tmp_path: Path) -> Iterator[Chromium]:
    """The page as it is on the first visit. It must ask nobody else, and break no rule of its policy."""
    actor.bodies.clear()
    actor.text, actor.seconds = "", 0.0
    collected.unlink(missing_ok=True)
    window.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    window.look(width=1280)
    window.call("Page.navigate", url=f"{url}health")
    window.until("document.readyState === 'complete' && location.pathname === '/health'")
    assert window.run(CLEAR)
    window.requests.clear()
    window.open(url)
    yield window
    assert window.run("violations") == []
    others = [one for one in window.requests if not one.startswith((url, "about:", "blob:"))]
    assert others == []


def export(tab: Chromium, which: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of one of the files that can be saved."""
    tab.click("#export")
    tab.click(f"#export-{which}")
    name = "corrections" if which == "corrected" else "conversations"
    return saved_rows(folder / f"{name}.jsonl")


def correct(tab: Chromium, text: str) -> None:
    """Correct the last answer."""
    tab.press("c", code="KeyC", modifiers=1)
    tab.until("document.activeElement.closest('.correction') !== null")
    tab.run("document.activeElement.select()")
    tab.type(text)
    tab.press("Enter", modifiers=2)
    tab.until("document.querySelector('.correction') === null")


# Corrections


@needs_browser
def test_a_correction_is_a_branch_and_a_row(
    tab: Chromium, actor: Actor, collected: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    fill(tab, "system", "Count.")
    say(tab, "one")
    last_answer(tab)
    say(tab, "two")
    last_answer(tab)
    correct(tab, "two, <b>corrected</b>\n\nand & more")
    facts = tab.until(f"{LAST}.querySelector('.facts').textContent.includes('file') && {LAST}.textContent")
    assert "a row to train on · in the server's file" in facts
    assert "2 of 2" in facts
    expected: dict[str, Any] = {
        "messages": [
            {"role": "system", "content": "Count."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "one", "weight": 0},
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "two, <b>corrected</b>\n\nand & more"},
        ]
    }
    assert [json.loads(line) for line in collected.read_text().splitlines()] == [expected]
    assert export(tab, "corrected", tmp_path) == [expected]
    assert handspun.preview(str(collected), tiny_folder).report.kept == 1
    say(tab, "three")  # the conversation goes on from the correction
    last_answer(tab)
    assert [one.content for one in actor.bodies[-1].messages][4] == "two, <b>corrected</b>\n\nand & more"


@needs_browser
def test_an_answer_is_kept_as_it_is_and_let_go_again(tab: Chromium, tmp_path: Path) -> None:
    say(tab, "right")
    last_answer(tab)
    tab.press("c", code="KeyC", modifiers=1)
    tab.click(".correction .primary")
    tab.until(f"{LAST}.querySelector('.facts').textContent.includes('a row to train on')")
    assert tab.run("document.querySelector('.branches')") is None
    assert [row["messages"][-1]["content"] for row in export(tab, "corrected", tmp_path)] == ["right"]
    tab.call("Page.reload")
    tab.until(
        "document.body?.dataset.ready === 'true' && document.querySelector('#conversations .title') !== null"
    )
    tab.click("#conversations .title")
    tab.press("c", code="KeyC", modifiers=1)
    tab.click(".correction [aria-label='Do not train on this answer']")
    tab.until(f"!{LAST}.querySelector('.facts').textContent.includes('a row to train on')")
    tab.click("#export")
    assert tab.run("document.querySelector('#export-corrected').disabled")
    tab.press("Escape")


@needs_browser
def test_a_row_that_the_server_does_not_take_stays_in_the_browser(
    tab: Chromium, collected: Path, tmp_path: Path
) -> None:
    collected.mkdir()
    try:
        say(tab, "hello")
        last_answer(tab)
        correct(tab, "better")
        facts = tab.until(f"/not in/.test({LAST}.querySelector('.facts').textContent) && {LAST}.textContent")
    finally:
        collected.rmdir()
    assert "not in the server's file: the row was not saved: Is a directory" in facts
    assert len(export(tab, "corrected", tmp_path)) == 1


@needs_browser
def test_an_empty_correction_is_refused(tab: Chromium, collected: Path) -> None:
    say(tab, "hello")
    last_answer(tab)
    tab.press("c", code="KeyC", modifiers=1)
    tab.run("document.activeElement.value = ' '")
    tab.click(".correction .primary")
    assert tab.until("document.querySelector('.correction .error:not([hidden])')?.textContent").startswith(
        "The answer"
    )
    tab.press("Escape")
    assert tab.run(f"{LAST}.querySelector('.body').textContent").strip() == "hello"
    assert not collected.exists()


# Tools


@needs_browser
def test_calls_of_tools_are_shown_and_their_results_given_back(
    tab: Chromium, actor: Actor, tmp_path: Path, tiny_folder: Path
) -> None:
    fill(tab, "tools", json.dumps(TOOLS))
    say(tab, "call weather time")
    tab.until(f"document.querySelector('#stop').hidden && {LAST}?.querySelector('.results') != null")
    assert actor.bodies[-1].model_dump(exclude_unset=True)["tools"] == TOOLS
    shown = tab.run("[...document.querySelectorAll('.call')].map((one) => one.textContent)")
    assert shown == [f'calls {name}{{\n  "city": "Oslo"\n}}' for name in ("weather", "time")]
    tab.run("document.querySelector('.results textarea').focus()")
    tab.type('{"degrees": 3}')
    tab.press("Tab")
    tab.type("noon")
    tab.press("Enter")
    assert last_answer(tab) == "noon"
    messages = [one.model_dump(exclude_unset=True) for one in actor.bodies[-1].messages]
    calls = [
        {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": '{"city": "Oslo"}'}}
        for index, name in enumerate(("weather", "time"))
    ]
    assert messages == [
        {"role": "user", "content": "call weather time"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_0", "name": "weather", "content": '{"degrees": 3}'},
        {"role": "tool", "tool_call_id": "call_1", "name": "time", "content": "noon"},
    ]
    assert tab.run("document.querySelector('.results')") is None
    [row] = export(tab, "shown", tmp_path)
    assert row == {"messages": [*messages, {"role": "assistant", "content": "noon"}], "tools": TOOLS}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert handspun.preview(str(tmp_path / "rows.jsonl"), tiny_folder).report.kept == 1
    tab.click(".tool [title^=Edit]")  # another result is a branch
    tab.type("!")
    tab.press("Enter")
    tab.until("document.querySelector('.tool .branches')?.textContent.includes('2 of 2')")
    assert last_answer(tab) == "noon"
    assert len(export(tab, "branches", tmp_path)) == 2


@needs_browser
def test_a_call_is_corrected_too(tab: Chromium, tmp_path: Path, tiny_folder: Path) -> None:
    fill(tab, "tools", json.dumps([tool["function"] for tool in TOOLS]))
    say(tab, "call weather")
    tab.until("document.querySelector('.results') !== null")
    tab.press("c", code="KeyC", modifiers=1)
    tab.run("calls = document.querySelectorAll('.correction textarea')[1], calls.focus(), calls.select()")
    tab.type("[{")
    tab.click(".correction .primary")
    assert "no JSON list" in tab.until("document.querySelector('.correction .error:not([hidden])')?.textContent")
    tab.run("calls.focus(), calls.select()")
    tab.type('[{"name": "time", "arguments": {"zone": "CET"}}]')
    tab.press("Enter", modifiers=2)
    tab.until("document.querySelector('.branches') !== null")
    [row] = export(tab, "corrected", tmp_path)
    [call] = row["messages"][-1]["tool_calls"]
    assert call["function"] == {"name": "time", "arguments": '{"zone":"CET"}'}
    assert row["tools"] == TOOLS
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert handspun.preview(str(tmp_path / "rows.jsonl"), tiny_folder).report.kept == 1


@needs_browser
@pytest.mark.parametrize("wrong", ["{", "[1]", '[{"type": "function"}]'])
def test_tools_that_are_none_are_told(tab: Chromium, wrong: str) -> None:
    fill(tab, "tools", wrong)
    say(tab, "hello")
    error = tab.until("document.querySelector('.assistant .error:not([hidden])')?.textContent")
    assert error.startswith("tools: ")
    assert error.endswith("Change it in the settings.")


# Files


@needs_browser
def test_all_branches_are_exported_and_come_back(tab: Chromium, tmp_path: Path, tiny_folder: Path) -> None:
    say(tab, "one")
    last_answer(tab)
    say(tab, "two")
    last_answer(tab)
    tab.press("ArrowUp")
    tab.run("document.activeElement.select()")
    tab.type("other")
    tab.press("Enter")
    tab.until("document.querySelectorAll('.user')[1].textContent.includes('other')")
    last_answer(tab)
    tab.press(",", code="Comma", modifiers=1)  # the answer has one branch only: nothing changes
    tab.click(".user .branches button")
    assert [row["messages"][2]["content"] for row in export(tab, "shown", tmp_path)] == ["two"]
    rows = export(tab, "branches", tmp_path)
    said = [[(one["content"], one.get("weight")) for one in row["messages"]] for row in rows]
    one = [("one", None), ("one", None)]
    assert said == [
        [*one, ("other", None), ("other", None)],
        [("one", None), ("one", 0), ("two", None), ("two", None)],
    ]
    assert rows[0]["id"] == rows[1]["id"]
    assert [row["title"] for row in rows] == ["one", "one"]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    assert handspun.preview(str(tmp_path / "rows.jsonl"), tiny_folder).report.kept == 2
    choose_file(tab, text)
    tab.until("document.querySelectorAll('#conversations .title').length === 2")
    shown = "[...document.querySelectorAll('.message .body')].map((one) => one.textContent.trim())"
    tab.until("document.querySelectorAll('.user')[1].querySelector('.branches').textContent.includes('2 of 2')")
    assert tab.run(shown) == ["one", "one", "two", "two"]
    tab.click(".user .branches button")
    assert tab.run(shown) == ["one", "one", "other", "other"]


@needs_browser
def test_tokens_are_kept_as_one_text_and_read_again(tab: Chromium) -> None:
    say(tab, "some words")
    last_answer(tab)
    raw = tab.run(
        "new Promise((resolve) => { const asked = indexedDB.open('handspun'); asked.onsuccess = () => {"
        " const all = asked.result.transaction('conversations').objectStore('conversations').getAll();"
        " all.onsuccess = () => { asked.result.close();"
        " resolve(Object.values(all.result[0].nodes).map((one) => typeof one.tokens)); } } })"
    )
    assert raw == ["undefined", "string"]
    tab.call("Page.reload")
    tab.until(
        "document.body?.dataset.ready === 'true' && document.querySelector('#conversations .title') !== null"
    )
    tab.click("#conversations .title")
    tab.click(".assistant [title^='Why these']")
    tokens = "[...document.querySelectorAll('.token')].map((one) => one.textContent)"
    assert tab.run(tokens) == ["some", " wor", "ds"]


# Keyboard


def tab_to(tab: Chromium, selector: str, *, back: bool = False) -> None:
    """Press Tab until an element has the focus; each on the way there must show that it has it."""
    for _ in range(80):
        if tab.run(f"document.activeElement.matches({json.dumps(selector)})"):
            return
        tab.press("Tab", modifiers=8 if back else 0)
        seen = tab.run(
            "[getComputedStyle(document.activeElement).outlineStyle, document.activeElement.checkVisibility(),"
            " document.activeElement.outerHTML.slice(0, 90)]"
        )
        if "<body" not in seen[2]:  # the end of the page: the next Tab begins it again
            assert seen[0] != "none", seen
            assert seen[1], seen
    raise AssertionError(f"Tab never reaches {selector}")


@needs_browser
def test_everything_is_done_by_keyboard_alone(
    tab: Chromium, actor: Actor, collected: Path, tmp_path: Path
) -> None:
    """Send, stop, edit, branches, options, tokens, correct, export. No mouse, and no script puts a focus."""
    tab.type("first")
    tab.press("Enter")
    assert last_answer(tab) == "first"
    assert tab.run("document.activeElement.id") == "prompt"
    actor.text, actor.seconds = "word " * 4000, 0.005
    tab.type("go")
    tab.press("Enter")
    tab.until(f"{LAST}.querySelector('.body').textContent.length > 40")
    tab.press("Escape")
    last_answer(tab)
    assert "stopped" in tab.run(f"{LAST}.querySelector('.facts').textContent")
    tab.press("ArrowUp")
    tab.press("a", code="KeyA", modifiers=2)
    tab.type("second")
    tab.press("Enter")
    tab.until("document.querySelectorAll('.user')[1]?.querySelector('.branches') != null")
    assert last_answer(tab) == "second"
    tab.press("r", code="KeyR", modifiers=1)
    tab.until(f"{LAST}.querySelector('.branches')?.textContent.includes('2 of 2')")
    last_answer(tab)
    tab.press(",", code="Comma", modifiers=1)
    assert "1 of 2" in tab.run(f"{LAST}.querySelector('.branches').textContent")
    assert tab.run("document.activeElement.textContent") == "›"  # ‹ is disabled now
    tab.press("Enter")
    assert "2 of 2" in tab.run(f"{LAST}.querySelector('.branches').textContent")
    tab.press("s", code="KeyS", modifiers=1)
    assert tab.run("document.activeElement.id") == "system"
    tab_to(tab, "#temperature")
    tab.type("0.5")
    tab.press("Escape")
    assert tab.run("document.querySelector('#settings').hidden && document.activeElement.id") == "settings-button"
    tab.press("w", code="KeyW", modifiers=1)
    assert tab.run("document.activeElement.matches('.token')")
    tab.press("ArrowRight")
    assert tab.run("document.activeElement.textContent") == "nd"
    tab.press("w", code="KeyW", modifiers=1)
    tab.press("c", code="KeyC", modifiers=1)
    tab.press("a", code="KeyA", modifiers=2)
    tab.type("corrected")
    tab_to(tab, ".correction .primary")
    tab.press("Enter")
    tab.until(f"{LAST}.querySelector('.facts').textContent.includes('a row to train on')")
    assert json.loads(collected.read_text())["messages"][-1] == {"role": "assistant", "content": "corrected"}
    tab_to(tab, "#export", back=True)
    tab.press("Enter")
    tab_to(tab, "#export-corrected")
    tab.press("Enter")
    assert len(saved_rows(tmp_path / "corrections.jsonl")) == 1
    assert tab.run("document.activeElement.id") == "export"
    assert actor.bodies[-1].temperature is None
    tab_to(tab, "#prompt")
    tab.type("third")
    tab.press("Enter")
    assert last_answer(tab) == "third"
    assert actor.bodies[-1].temperature == 0.5


@needs_browser
def test_an_answer_is_spoken_by_sentences(tab: Chromium, actor: Actor) -> None:
    actor.text = "One two. Three four five! And\na line"
    tab.run(
        "spoken = [], new MutationObserver(() => spoken.push(document.querySelector('#spoken').textContent))"
        ".observe(document.querySelector('#spoken'), {childList: true, characterData: true, subtree: true})"
    )
    actor.seconds = 0.05
    say(tab, "go")
    last_answer(tab)
    spoken = [text for text in tab.run("spoken") if text]
    assert "".join(spoken) == actor.text
    assert all(re.search(r"[.!?]$|\n$", text.rstrip(" ")) for text in spoken[:-1])
    assert len(spoken) >= 2


# Work


BLOCKS = {
    "paragraphs": "Some *words* and `code` in a line that is long.\n\n" * 160,
    "one list": "".join(f"{number}. an item with **some** words\n" for number in range(1, 240)),
    "loose list": "".join(f"* an item\n\n  and its second paragraph, {number}\n\n" for number in range(120)),
    "one block of code": "```python\n" + "print(1)  # a line of code\n" * 300 + "```\n",
    "a nested list": "".join(f"- item {number}\n  - one below\n  - another\n" for number in range(120)),
}


@needs_browser
@pytest.mark.parametrize("kind", BLOCKS)
def test_drawing_a_token_does_not_depend_on_the_length_of_the_answer(tab: Chromium, kind: str) -> None:
    """Counts the nodes that are added per token. A second half costs no more than a first one."""
    first, second, same = tab.run(
        "import('/static/markdown.js').then(async ({GrowingMarkdown, render}) => {"
        f" const text = {json.dumps(BLOCKS[kind])}, one = document.createElement('div');"
        " const view = new GrowingMarkdown(one), added = [0, 0];"
        " const watch = new MutationObserver(() => 0);"
        " watch.observe(one, {childList: true, subtree: true, characterData: true});"
        " const size = (node) => node.nodeType === 3 ? node.length"
        "   : [...node.childNodes].reduce((sum, child) => sum + size(child), 1);"
        " for (let end = 7; end < text.length + 7; end += 7) {"
        "   view.update(text.slice(0, end));"
        "   for (const {addedNodes} of watch.takeRecords())"
        "     for (const node of addedNodes) added[end < text.length / 2 ? 0 : 1] += size(node);"
        " }"
        " view.finish(text);"
        " const whole = document.createElement('div'); whole.append(render(text));"
        " const plain = (node) => node.innerHTML.replace(/\\s+/g, '');"
        " return [...added, plain(one) === plain(whole)]; })"
    )
    assert same
    # The end of a block of code is seen late, and has it drawn once more.
    assert second < 1.3 * first + 2 * len(BLOCKS[kind])
    assert 0 < first + second < 60 * len(BLOCKS[kind])


@needs_browser
def test_texts_look_as_whole_ones_wherever_a_token_ends(tab: Chromium) -> None:
    """Whatever a line might still have become: an item, a heading, a line of the paragraph before."""
    texts = [
        "- a\n--x\n", "- a\n- b\n\nc\n", "1. a\n2.x\n3. b\n", "para\n#x\n", "* a\n* * *\n* b\n",
        "- a\n\n  b\n- c\n+ d\n", "- [x]\n- y\n\n[x]: https://a.example\n", "a\n===\nb\n---\n",
        "```\na\n``\n```\nb\n", "~~~ js\na\n", "> - a\n> - b\nc\n", "1. a\n\n   ```\n   code\n   ```\n2. b\n",
        "| a |\n| - |\n| 1 |\nb\n", " - a\n  - b\n   - c\n", "- a\n\n\n- b\n    - c\n", "-\n- b\n",
        "10) a\n11) b\n",
        "1. a\n2. b\n\nThen\n\n3. c\n\nlast line", "a\n\n# b\n\nc\n\n    d\n\n    e\n\nf",
        "a\n\n1\n\n1. b\n\n   c",
        "- a\nlazy\n- b\n", "a\n- b\n1. c\n", "    code\n\n- a\n\n      code in it\n- b\n",
    ]  # fmt: skip
    different = tab.run(
        "import('/static/markdown.js').then(({GrowingMarkdown, render}) => {"
        f" const different = [], texts = {json.dumps(texts)};"
        " const plain = (node) => node.innerHTML.replace(/\\s+/g, '');"
        " for (const step of [1, 2, 3, 5]) for (const text of texts) {"
        "   const [one, whole] = [document.createElement('div'), document.createElement('div')];"
        "   const view = new GrowingMarkdown(one);"
        "   for (let end = 1; end <= text.length; end += step) view.update(text.slice(0, end));"
        "   view.finish(text); whole.append(render(text));"
        "   if (plain(one) !== plain(whole)) different.push([text, plain(one), plain(whole)]);"
        " } return different; })"
    )
    assert different == []


@needs_browser
def test_a_long_conversation_is_filled_where_it_is_looked_at(tab: Chromium) -> None:
    turns = [
        {"role": role, "content": f"{role} **{number}**"}
        for number in range(500)
        for role in ("user", "assistant")
    ]
    choose_file(tab, json.dumps({"messages": turns}) + "\n")
    tab.until("document.querySelectorAll('.message').length === 1000")
    filled = "document.querySelectorAll('.message:has(.under)').length"
    assert 20 <= tab.run(filled) < 120
    assert tab.run("document.querySelector('.assistant .body').textContent") == "assistant **0**"
    assert tab.run(f"{LAST}.querySelector('strong').textContent") == "499"
    tab.run("document.querySelector('#scroller').scrollTop = 0")
    assert tab.until(
        "document.querySelector('.assistant .under') && document.querySelector('.assistant strong').textContent"
    )
    assert tab.run(filled) < 240
    tab.run(
        "kept = document.querySelectorAll('.message')[500], added = 0,"
        "new MutationObserver((all) => all.forEach((one) => added += one.addedNodes.length))"
        ".observe(document.querySelector('#messages'), {childList: true})"
    )
    say(tab, "more")
    assert last_answer(tab) == "more"
    assert tab.run("added === 2 && kept === document.querySelectorAll('.message')[500]")


# Bytes


def test_files_are_sent_packed_and_only_once(url: str) -> None:
    port = int(url.split(":")[2].strip("/"))
    total = 0
    for name, page in page_files().items():
        packed = ask(port, f"/static/{name}", None, ("Accept-Encoding", "br, gzip"))
        assert packed.headers["content-encoding"] == "gzip"
        assert gzip.decompress(packed.body).decode() == page.value
        plain = ask(port, f"/static/{name}", None, ("Accept-Encoding", "br, gzip;q=0"))
        assert "content-encoding" not in plain.headers
        assert plain.body.decode() == page.value
        with Client(port) as client:
            client.send(client.head("GET", f"/static/{name}", None, [("If-None-Match", packed.headers["etag"])]))
            assert client.reply(has_body=False).status == 304
        total += len(packed.body) if name.endswith(("js", "mjs")) else 0
    assert 50_000 < total < 150_000


@pytest.mark.parametrize(
    ("accepted", "takes"),
    [("gzip", True), ("br, GZIP ; q=0.5", True), ("gzip;q=0", False), ("gzip; q=0.00", False), ("", False),
     ("br", False), ("xgzip", False)],
)  # fmt: skip
def test_takes_gzip(accepted: str, takes: bool) -> None:
    assert takes_gzip(accepted) is takes


def test_no_module_is_found_late() -> None:
    """A module that only another one names would be asked for once that one has come."""
    index = (FOLDER / "index.html").read_text(encoding="utf-8")
    named = set(re.findall(r'<link rel="modulepreload" href="/static/([^"]+)">', index)) | {"app.js"}
    assert named == {name for name in page_files() if name.endswith(("js", "mjs"))}


# Access


@needs_browser
@pytest.mark.skipif("AXE" not in os.environ, reason="needs $AXE: axe.min.js of the npm package axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing_in_what_can_be_opened(tab: Chromium, scheme: str, width: int) -> None:
    tab.look(width=width, scheme=scheme)
    fill(tab, "tools", json.dumps(TOOLS))
    say(tab, "words")
    last_answer(tab)
    correct(tab, "better")
    say(tab, "call weather")
    tab.until("document.querySelector('.results') !== null")
    tab.run(Path(os.environ["AXE"]).read_text(encoding="utf-8"))
    found = "axe.run(document).then((found) => found.violations.map((one) => [one.id, one.nodes[0].html]))"
    assert tab.run(found) == []
    tab.press("c", code="KeyC", modifiers=1)
    tab.until("document.querySelector('.correction') !== null")
    assert tab.run(found) == []
    tab.press("Escape")
    tab.run("document.querySelector('#export').click()")
    assert tab.run(found) == []
    tab.press("Escape")
