"""Values for a template's variables: the same in training, decoding, evaluation, and in what is saved."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import handspun
from chat_templates import KINDS, chat_of, tokenizer_of
from handspun.cli import main
from handspun.config import DataConfig, TrainConfig, read_template_args
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import key_of
from handspun.data.rendering import choose_template, variables_of, with_defaults
from handspun.data.rows import Row
from handspun.errors import ConfigError
from tiny import tiny_model

NO_THINKING: dict[str, Any] = {"enable_thinking": False}
ASKED = [{"role": "user", "content": "3 and 3?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "6"}]
OWN = KINDS["thinking"].template


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {}),
        (("enable_thinking=false",), {"enable_thinking": False}),
        (("enable_thinking=False", "level=3"), {"enable_thinking": False, "level": 3}),
        (("a=true", "b=null", "c=None"), {"a": True, "b": None, "c": None}),
        (
            ("effort=high", 'yes_text="yes"', "date=2024-05-01"),
            {"effort": "high", "yes_text": "yes", "date": "2024-05-01"},
        ),
        (("x=", "y=a=b"), {"x": "", "y": "a=b"}),
        (('{"enable_thinking": false, "names": ["a", "b"]}',), {"enable_thinking": False, "names": ["a", "b"]}),
        ({"enable_thinking": False, "scale": 0.5}, {"enable_thinking": False, "scale": 0.5}),
        ("enable_thinking=false", {"enable_thinking": False}),
    ],
)
def test_read_template_args(given: Any, expected: dict[str, Any]) -> None:
    assert read_template_args(given) == (expected, [])


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("enable_thinking",), "a name and a value"),
        (("enable_thinking=no",), "true, false or a number"),
        (("messages=1",), "sets this variable itself"),
        (("add_generation_prompt=true",), "itself"),
        (("bos_token=x",), "itself"),
        (("chat_template=x",), "itself"),
        (("not-a-name=1",), "is not a variable name"),
        (("a=1", "a=2"), "twice"),
        (("{broken",), "not JSON"),
        ({"x": math.nan}, "x"),
        ({"x": object()}, "x"),
        ({"x": "\ud800"}, "x"),
        ({3: "x"}, "is not a variable name"),
        ({"x": "\ue000"}, "U\\+E000"),
    ],
)
def test_template_args_that_cannot_be_are_refused_by_name(given: Any, reason: str) -> None:
    assert len(read_template_args(given)[1]) == 1
    with pytest.raises(ConfigError, match=reason):
        DataConfig(template_args=given)
    with pytest.raises(ConfigError, match=reason):
        handspun.generate(chat_of("thinking"), "Hi", template_args=given)


def test_a_config_holds_what_was_given_as_a_dict() -> None:
    assert TrainConfig(template_args=("enable_thinking=false",)).template_args == NO_THINKING
    assert TrainConfig(template_args=NO_THINKING).template_values == NO_THINKING
    assert TrainConfig().template_args is None


def test_training_and_prompting_read_the_same_values() -> None:
    tokenizer = tokenizer_of("thinking")
    with_block, without = ChatTemplate(tokenizer), ChatTemplate(tokenizer, NO_THINKING)
    [default], [closed] = with_block.encode(ANSWERED), without.encode(ANSWERED)
    target_ids = [
        [id for id, is_target in zip(e.input_ids, e.loss_mask, strict=True) if is_target]
        for e in (default, closed)
    ]
    assert tokenizer.decode(target_ids[0]) == "<think>\n\n</think>\n\n6<|im_end|>"
    assert tokenizer.decode(target_ids[1]) == "6<|im_end|>"
    for template, example in ((with_block, default), (without, closed)):
        prompt = template.encode_prompt(ASKED)
        assert example.input_ids[: len(prompt)] == prompt
        assert not any(example.loss_mask[: len(prompt)])
        assert example.loss_mask[len(prompt)]
    expected = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False, **NO_THINKING)
    assert without.encode_prompt(ASKED) == expected


def test_generate_reads_them_beside_those_of_the_model() -> None:
    model = chat_of("thinking")
    plain, closed = (
        handspun.generate(model, "3 and 3?", max_new_tokens=1, template_args=args)[0].prompt_token_ids
        for args in (None, NO_THINKING)
    )
    decode: Any = model.tokenizer.decode
    assert decode(closed) == decode(plain) + "<think>\n\n</think>\n\n"
    model.template_args = dict(NO_THINKING)
    del model.__dict__["template"]
    assert handspun.generate(model, "3 and 3?", max_new_tokens=1)[0].prompt_token_ids == closed
    again = handspun.generate(model, "3 and 3?", max_new_tokens=1, template_args=("enable_thinking=true",))
    assert again[0].prompt_token_ids == plain


def test_a_variable_that_the_template_does_not_read_is_refused_with_those_that_it_reads() -> None:
    with pytest.raises(ConfigError, match=r"thinking_budget.*reads no such variable.*enable_thinking"):
        ChatTemplate(tokenizer_of("thinking"), {"thinking_budget": 3})
    with pytest.raises(ConfigError, match=r"\(none\)"):
        handspun.generate(chat_of("plain roles"), "Hi", template_args=NO_THINKING)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ a }}{% set b = 1 %}{{ b }}", {"a"}),
        ("{% if x is defined and x %}{% endif %}{% for m in messages %}{{ m.y }}{% endfor %}", {"x", "messages"}),
        ("{% set t = t | default(true) %}{{ t }}", {"t"}),
        ("{% generation %}{{ a }}{% endgeneration %}", {"a"}),
        ("{% for m in messages %}{% if m.x %}{% continue %}{% endif %}{% endfor %}", {"messages"}),
    ],
)
def test_variables_of(source: str, expected: set[str]) -> None:
    assert variables_of(source) == expected


@pytest.mark.parametrize(
    "value", [False, True, None, 3, 0.5, "a 'quoted' \"text\" \U0001f600\n\\", [1, "b"], {"k": None}]
)
def test_a_template_with_defaults_renders_as_with_the_values_given(value: Any) -> None:
    tokenizer: Any = tokenizer_of("thinking")
    source = "\n{% if x is defined %}[{{ x | tojson }}]{% else %}unset{% endif %}\n" + OWN
    for template in (source, source.lstrip("\n"), "  " + source, "{%- if x %}{% endif %}" + source):
        given, saved = (
            tokenizer.apply_chat_template(ANSWERED, tokenize=False, chat_template=text, **args)
            for text, args in ((template, {"x": value}), (with_defaults(template, {"x": value}), {}))
        )
        assert saved == given
        other = tokenizer.apply_chat_template(
            ANSWERED, tokenize=False, chat_template=with_defaults(template, {"x": value}), x="other"
        )
        assert other == tokenizer.apply_chat_template(ANSWERED, tokenize=False, chat_template=template, x="other")


def test_with_defaults_is_written_once_and_to_every_named_template() -> None:
    once = with_defaults(OWN, NO_THINKING)
    assert with_defaults(once, NO_THINKING) == once
    assert with_defaults(OWN, {}) == OWN
    assert with_defaults({"default": OWN, "tool_use": OWN}, NO_THINKING) == {"default": once, "tool_use": once}


def test_examples_are_cached_under_their_values() -> None:
    tokenizer, rows = tokenizer_of("thinking"), [Row("a.jsonl", 1, {"prompt": "a", "completion": "b"})]
    keys = {
        key_of(rows, ChatTemplate(tokenizer, args), {}) for args in (None, NO_THINKING, {"enable_thinking": True})
    }
    assert len(keys) == 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("thinking")
    tiny_model("qwen2", vocab_size=320, tie_word_embeddings=True).save_pretrained(place / "model")
    tokenizer_of("thinking").save_pretrained(place / "model")
    rows = [{"prompt": f"{i} and {i}?", "completion": f"{2 * i}"} for i in range(6)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.mark.slow
def test_every_command_takes_them_and_a_checkpoint_keeps_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "options.yaml").write_text("template_args:\n  enable_thinking: false\nnum_epochs: 1\n")
    data = ["--data", str(folder / "rows.jsonl")]
    common = ["--model", str(folder / "model")]
    out = tmp_path / "out"
    train = ["--output-dir", str(out), "--dtype", "float32", "--no-sample-answers", "--no-cache-examples"]
    assert main(["train", *common, *data, *train, "--config", str(tmp_path / "options.yaml")]) == 0
    assert json.loads((out / "run.json").read_text())["config"]["template_args"] == NO_THINKING
    trained = handspun.load(str(out / "checkpoint-epoch-1"))
    prompt = str(trained.tokenizer.decode(trained.template.encode_prompt(ASKED)))
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    given = ["--template-args", "enable_thinking=false"]
    capsys.readouterr()
    assert main(["preview", *common, *data, *given, "--no-cache-examples", "--plain"]) == 0
    assert "</think>" in (printed := capsys.readouterr().out)
    assert "⟦<think>" not in printed
    assert main(["generate", *common, *given, "--json", "--max-new-tokens", "2", "3 and 3?"]) == 0
    ids = json.loads(capsys.readouterr().out)["prompt_token_ids"]
    assert ids == trained.template.encode_prompt(ASKED)
    assert main(["eval", *common, *data, *given, "--json", "--no-cache-examples"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["learned_tokens"] == 6 * 2 + 1  # a digit and the end of turn each; 10 has two digits
    assert main(["generate", *common, "--template-args", "enable_thinkin=false", "Hi"]) == 2
    assert "enable_thinking" in capsys.readouterr().err


def test_load_refuses_what_the_template_does_not_read(folder: Path) -> None:
    with pytest.raises(ConfigError, match="reads no such variable"):
        handspun.load(str(folder / "model"), template_args={"nothing": 1})
    model = handspun.load(str(folder / "model"), template_args=NO_THINKING)
    assert str(model.tokenizer.decode(model.template.encode_prompt(ASKED))).endswith("</think>\n\n")


def test_choose_template_by_name_and_by_file(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("thinking")
    tokenizer.chat_template = {"default": OWN, "brief": OWN.replace("<think>", "<t>")}
    choose_template(tokenizer, None)
    assert isinstance(tokenizer.chat_template, dict)
    choose_template(tokenizer, "brief")
    assert tokenizer.chat_template == OWN.replace("<think>", "<t>")
    file = tmp_path / "own.jinja"
    file.write_text("\ufeff" + OWN, encoding="utf-8")
    choose_template(tokenizer, str(file))
    assert tokenizer.chat_template == OWN


def test_choose_template_names_what_there_is(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("thinking")
    tokenizer.chat_template = {"default": OWN, "rag": OWN}
    with pytest.raises(ConfigError, match=r"--chat-template brief.*default, rag"):
        choose_template(tokenizer, "brief")
    for content in (b"", b"\xff\xfe\x00", b" \n"):
        (tmp_path / "bad.jinja").write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.jinja"):
            choose_template(tokenizer, str(tmp_path / "bad.jinja"))


def test_several_templates_without_a_default_are_one_error_that_names_them() -> None:
    tokenizer = tokenizer_of("thinking")
    tokenizer.chat_template = {"brief": OWN, "rag": OWN}
    with pytest.raises(handspun.HandspunError, match=r"--chat-template.*brief, rag"):
        ChatTemplate(tokenizer)


def test_a_variable_given_as_an_option_names_template_args() -> None:
    with pytest.raises(ConfigError, match=r"template_args=dict\(enable_thinking=False\)"):
        handspun.generate(chat_of("thinking"), "Hi", enable_thinking=False)  # type: ignore[call-arg]


def test_rows_with_tools_use_the_template_for_tools() -> None:
    tokenizer: Any = tokenizer_of("thinking")
    with_tools = "{% if tools %}[{{ tools | tojson }}]{% endif %}" + OWN
    tokenizer.chat_template = {"default": OWN, "tool_use": with_tools}
    template, tools = (
        ChatTemplate(tokenizer),
        [{"type": "function", "function": {"name": "sum", "parameters": {}}}],
    )
    assert tokenizer.decode(template.encode_prompt(ASKED, tools)).startswith('[[{"type"')
    assert tokenizer.decode(template.encode_prompt(ASKED)).startswith("<|im_start|>user")
