"""`ServedModel`: names, defaults, constraints."""

import shutil
from pathlib import Path

import peft
import pytest

from asking import Asker, served, served_chat
from handspun.config.serving import ServeOptions
from handspun.decoding.constraint import grammar_of
from handspun.decoding.options import SamplingParams
from handspun.errors import ConfigError
from handspun.models.load import load
from handspun.serve.chat import chat_completions
from handspun.serve.completions import completions
from handspun.serve.errors import ApiError
from handspun.serve.schemas import ChatRequest, CompletionRequest
from handspun.serve.served import Context, ServedModel, find_model


def _context(*names: str) -> Context:
    chat = served_chat()
    models = {name: ServedModel.of(name, chat) for name in names}
    return Context(models, None, ServeOptions(), "test")


def test_find_model_takes_the_only_one_without_a_name() -> None:
    context = _context("tuned")
    assert find_model(context, None).name == find_model(context, "tuned").name == "tuned"
    assert context.log == {"model": "tuned"}


@pytest.mark.parametrize(
    ("name", "status", "code"), [(None, 400, "missing_required_parameter"), ("x", 404, "model_not_found")]
)
def test_find_model_names_those_that_are_served(name: str | None, status: int, code: str) -> None:
    with pytest.raises(ApiError, match="base, tuned") as caught:
        find_model(_context("base", "tuned"), name)
    assert (caught.value.status, caught.value.code, caught.value.param) == (status, code, "model")


def test_defaults_are_the_models_own() -> None:
    chat = served_chat()
    chat.model.generation_config.do_sample = True
    chat.model.generation_config.temperature = 0.7
    defaults = ServedModel.of("tiny", chat).describe()["defaults"]
    assert (defaults["do_sample"], defaults["temperature"], defaults["top_p"]) == (True, 0.7, 1.0)


def test_a_run_s_checkpoint_and_an_adapter_name_their_base(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "run" / "checkpoint-best")
    (tmp_path / "run" / "run.json").write_text('{"config": {"model": "Qwen/Qwen2.5-0.5B"}}')
    model = load(str(tiny_folder)).model
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    adapted.save_pretrained(tmp_path / "adapter")

    def told(path: Path) -> tuple[str | None, bool]:
        entry = ServedModel.of("tiny", load(str(path))).describe()
        return entry["base_model"], entry["adapter"]

    assert told(tiny_folder) == (None, False)
    assert told(tmp_path / "run" / "checkpoint-best") == ("Qwen/Qwen2.5-0.5B", False)
    assert told(tmp_path / "adapter") == ("tiny-qwen2", True)  # not where it lies


def test_settings_that_cannot_be_used_are_told_when_the_model_is_loaded() -> None:
    chat = served_chat()
    chat.model.generation_config.repetition_penalty = -1.0
    with pytest.raises(ConfigError, match="generation_config"):
        ServedModel.of("tiny", chat)


def test_a_grammar_is_compiled_once_and_shares_no_state() -> None:
    model = ServedModel.of("tiny", served_chat())
    params = SamplingParams(regex="ab*c", eos_token_ids=(322,))
    grammar = grammar_of(params)
    assert grammar is not None
    first, second = model.constraint(grammar, params), model.constraint(grammar, params)
    assert first is not second
    assert first._start is second._start
    assert first._states is not second._states


def test_a_model_without_a_template_continues_text() -> None:
    chat = served_chat()
    chat.tokenizer.chat_template = None
    with served(chat) as server:
        assert _answer(server).startswith("Hi")
        error = server.refused(chat_completions, ChatRequest, messages=[{"role": "user", "content": "Hi"}])
    assert error.status == 400
    assert "chat template" in error.message


def _answer(server: Asker) -> str:
    text: str = server.ask(completions, CompletionRequest, prompt="Hi", echo=True, max_tokens=2)["choices"][0][
        "text"
    ]
    return text
