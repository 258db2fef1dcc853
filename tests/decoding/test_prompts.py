"""Prompts: begun answers are continued and never get a second header; rendered ones hold no token twice."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

import handspun
from chat_templates import KINDS, chat_of
from handspun.cli import main
from handspun.data.chat_template import ChatTemplate
from handspun.decoding.prompts import plain_ids
from handspun.display import captured_log
from handspun.errors import ConfigError, DataError, TemplateError
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer

ASKED = [{"role": "user", "content": "Name three rivers."}]


def begun(text: str, **further: Any) -> list[dict[str, Any]]:
    return [*ASKED, {"role": "assistant", "content": text, **further}]


def prompt_of(model: ChatModel, prompt: Any, **options: Any) -> tuple[list[int], list[str]]:
    """The ids that the model reads, and what was said."""
    with captured_log() as notices:
        answers = handspun.generate(model, prompt, max_new_tokens=1, **options)
    return answers[0].prompt_token_ids, notices


@pytest.fixture(params=KINDS)
def chat(request: pytest.FixtureRequest) -> ChatModel:
    return chat_of(request.param)


def test_a_begun_answer_is_a_prefix_of_what_is_trained(chat: ChatModel) -> None:
    whole, start = "1. Rhine\n2. Elbe\n3. Oder", "1. Rhine\n2."
    ids, _ = prompt_of(chat, [begun(start)], continue_final_message=True)
    text = str(chat.tokenizer.decode(ids))
    trained = str(chat.tokenizer.decode(chat.template.encode(begun(whole))[-1].input_ids))
    assert text.endswith(start)
    assert trained.startswith(text)
    if KINDS[chat.name].bos:
        assert ids.count(chat.tokenizer.bos_token_id) == 1


def test_a_begun_answer_is_cut_into_tokens_as_a_trained_one_is() -> None:
    """The turn begins with a token of its own, where one text would merge over the edge."""
    model = ChatModel(tiny_model("qwen2"), tiny_tokenizer(), "tiny")
    messages = begun("\nthe answer")
    prompt = model.template.encode_prompt(ASKED)
    continued = model.template.encode_prompt(messages, continue_final_message=True)
    [trained] = model.template.encode(messages)
    assert continued[: len(prompt)] == prompt
    assert continued == trained.input_ids[: len(continued)]


@pytest.mark.parametrize(
    "content", ["1. Rhine\n2. ", "  1. Rhine", "a</think>", "<think>\nFirst", "a <|im_end|> b"]
)
def test_a_begun_answer_ends_where_it_ends(content: str) -> None:
    model = ChatModel(tiny_model("qwen2"), tiny_tokenizer(), "tiny")
    ids = model.template.encode_prompt(begun(content), continue_final_message=True)
    assert str(model.tokenizer.decode(ids)).endswith(f"<|im_start|>assistant\n{content}")
    assert ids.count(model.template.end_of_turn_id) == 1  # of the user's turn


def test_transformers_continues_with_the_same_text(chat: ChatModel) -> None:
    theirs = chat.tokenizer.apply_chat_template(begun("1. Rhine\n2."), tokenize=False, continue_final_message=True)
    ours = chat.template.encode_prompt(begun("1. Rhine\n2."), continue_final_message=True)
    assert chat.tokenizer.decode(ours) == theirs


def test_without_the_option_a_begun_answer_is_refused(chat: ChatModel) -> None:
    with pytest.raises(DataError, match=r"prompt 2 ends with an assistant message.*continue_final_message=True"):
        prompt_of(chat, [ASKED, begun("1.")])


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (ASKED, "ends with a user message"),
        ("Hi", "ends with a user message"),
        (begun(""), "cannot be continued"),
        (begun(" \n"), "cannot be continued"),
        (begun("x", tool_calls=[{"function": {"name": "f", "arguments": {}}}]), "cannot be continued"),
    ],
)
def test_what_cannot_be_continued_is_refused(prompt: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        prompt_of(ChatModel(tiny_model("qwen2"), tiny_tokenizer(), "tiny"), [prompt], continue_final_message=True)


def test_plain_text_is_always_continued() -> None:
    with pytest.raises(ConfigError, match="plain text is always continued"):
        prompt_of(chat_of("bos"), "Hi", chat=False, continue_final_message=True)


def test_a_template_that_leaves_the_begun_answer_out_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message.content }}", "{{ message.content if loop.index < 4 }}"
    )
    conversation = [*begun("1. Rhine"), *begun("2. Elbe")]
    with pytest.raises(TemplateError, match="leaves out the start of the answer"):
        ChatTemplate(tokenizer).encode_prompt(conversation, continue_final_message=True)


def test_the_answer_is_what_comes_after_the_begun_one(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "generate",
        "--model",
        str(tiny_folder),
        "--max-new-tokens",
        "3",
        "--json",
        "--prefill",
        "1. Rhine",
    ]
    assert main([*arguments, "Name three rivers."]) == 0
    record = json.loads(capsys.readouterr().out)
    model = handspun.load(str(tiny_folder))
    [answer] = handspun.generate(model, [begun("1. Rhine")], continue_final_message=True, max_new_tokens=3)
    assert record["prompt_token_ids"] == answer.prompt_token_ids
    assert record["token_ids"] == answer.token_ids
    assert record["text"] == answer.text


def test_the_repetition_penalty_counts_the_begun_answer() -> None:
    model = ChatModel(tiny_model("qwen2"), tiny_tokenizer(), "tiny")
    ids, _ = prompt_of(
        model, [begun("1. Rhine")], continue_final_message=True, repetition_penalty=1.3,
        repetition_penalty_exempt="template",
    )  # fmt: skip
    assert ids == model.template.encode_prompt(begun("1. Rhine"), continue_final_message=True)


def test_a_rendered_prompt_has_one_bos() -> None:
    model = chat_of("bos")
    rendered = model.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
    ids, notices = prompt_of(model, rendered, chat=False)
    assert ids == model.template.encode_prompt(ASKED)
    assert ids.count(model.tokenizer.bos_token_id) == 1
    assert any("prompt 1: begins with <|begin|> (bos)" in text for text in notices)
    plain, notices = prompt_of(model, "Hi", chat=False)
    assert plain.count(model.tokenizer.bos_token_id) == 1
    assert notices == []


def test_an_end_that_the_tokenizer_appends_is_left_out_of_plain_prompts() -> None:
    model = chat_of("bos")
    bos, eos = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|eot|>", special_tokens=[("<|begin|>", bos), ("<|eot|>", eos)]
    )
    ids, notices = prompt_of(model, "Hi", chat=False)
    assert ids == [bos, *model.tokenizer("Hi", add_special_tokens=False)["input_ids"]]
    assert any("appends <|eot|>" in text for text in notices)


@pytest.mark.parametrize("text", ["", "Hi", "<|begin|>", "Hi <|begin|> there", "<|begin|><|begin|>Hi"])
def test_plain_ids_are_the_tokenizers_but_for_a_doubled_bos(text: str) -> None:
    tokenizer = chat_of("bos").tokenizer
    expected = tokenizer(text)["input_ids"]
    assert plain_ids(tokenizer, text) == (expected[1:] if text.startswith("<|begin|>") else expected)


def rendered_prompts() -> Iterator[Any]:
    for kind in KINDS:
        tokenizer = chat_of(kind).tokenizer
        text = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
        yield pytest.param(kind, text, id=kind)


@pytest.mark.parametrize(("kind", "rendered"), [*rendered_prompts()])
def test_a_rendered_prompt_given_as_a_message_is_said(kind: str, rendered: str) -> None:
    model = chat_of(kind)
    _, notices = prompt_of(model, ["Hi", rendered])
    assert [text for text in notices if "prompt 2: contains" in text and "--no-chat" in text]
    assert prompt_of(model, "Hi")[1] == []


def test_markers_that_are_ordinary_text_are_found_and_protected_ones_are_not() -> None:
    markers = {kind: chat_of(kind).template.plain_markers for kind in KINDS}
    assert markers.pop("plain roles") == ["<|user|>", "<|assistant|>"]
    assert markers.pop("named speakers") == ["USER:", "ASSISTANT:"]
    assert all(found == [] for found in markers.values())
    assert len(markers) == 6
