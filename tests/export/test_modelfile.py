"""A Modelfile's template says what the chat template says, or there is none."""

from pathlib import Path

import pytest

from handspun.config import ExportConfig
from handspun.display import captured_log
from handspun.exports.export import _is_our_modelfile, gguf_file
from handspun.exports.modelfile import modelfile, plain_template
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
)


def chat_of(template: str) -> ChatModel:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return ChatModel(tiny_model("qwen2"), tokenizer, "tiny")


def test_plain_template_chatml() -> None:
    found = plain_template(chat_of(CHATML))
    assert found.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    assert found.system is None
    assert found.in_go() == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )


def test_modelfile_default_system_and_parameters() -> None:
    with captured_log() as said:
        text = modelfile(chat_of(WITH_SYSTEM), Path("folder/m-q8_0.gguf"))
    assert said == []
    assert text.startswith('FROM ./m-q8_0.gguf\nTEMPLATE """{{ range')
    assert '\nSYSTEM """Be kind."""\n' in text
    assert '\nPARAMETER stop "<|im_end|>"\n' in text
    assert "\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\n" in text


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("m['content']", "m['content'] | trim"),
        CHATML.replace("m['content']", "(m['content'] if loop.last else 'earlier')"),
        CHATML.replace("<|im_end|>\n", "{{<|im_end|>\n"),
    ],
)
def test_modelfile_without_certainty_has_no_template_and_says_so(template: str) -> None:
    with captured_log() as said:
        assert "TEMPLATE" not in modelfile(chat_of(template), Path("m.gguf"))
    assert [line.partition(":")[0] for line in said] == ["the Modelfile has no TEMPLATE"]


def test_gguf_file_names_run_and_checkpoint(tmp_path: Path) -> None:
    def name(model: str) -> str:
        return gguf_file(ExportConfig(model=model, gguf="q4_0", output_dir="x"), Path("x")).name

    assert name(str(tmp_path / "My Run" / "checkpoint-best")) == "my-run-q4_0.gguf"
    assert name(str(tmp_path / "My Run" / "checkpoint-epoch-2")) == "my-run-epoch-2-q4_0.gguf"
    assert name("Qwen/Qwen2.5-0.5B") == "Qwen2.5-0.5B-q4_0.gguf"


def test_is_our_modelfile_edited(tmp_path: Path) -> None:
    path = tmp_path / "m.Modelfile"
    path.write_text("# mine\nFROM ./m.gguf\n")
    assert not _is_our_modelfile(path)


def test_plain_template_qwen() -> None:
    file = Path(__file__).parents[1] / "helpers" / "qwen2.5_chat_template.jinja"
    found = plain_template(chat_of(file.read_text(encoding="utf-8")))
    assert found.system == "You are a helpful assistant."
    assert found.around["system"] == ("<|im_start|>system\n", "<|im_end|>\n")
    assert found.render([("user", "Hi")]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
