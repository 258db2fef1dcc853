"""Fixtures: a tiny random model's folder, and the embedded model."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import handspun
from handspun.models.embedded import embedded_folder
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer

hypothesis.settings.register_profile("brief", max_examples=25)


def pytest_configure(config: pytest.Config) -> None:
    """Try fewer examples of properties while you work, where a test names no number itself."""
    if config.option.markexpr == "not slow":
        hypothesis.settings.load_profile("brief")


@pytest.fixture(autouse=True)
def without_pydantic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide pydantic from tests that run commands, as a process of their own would not have imported it yet.

    If the server's tests have imported it before, cyclopts checks values with it, in words of its own.
    """
    runs_commands = not vars(request.module).keys().isdisjoint({"main", "app", "fail"})
    if runs_commands and "serve" not in request.path.parts:
        monkeypatch.delitem(sys.modules, "pydantic", raising=False)


@pytest.fixture(scope="session", autouse=True)
def cache_folder_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No example that a test tokenizes stays in the user's cache; the embedded model there is used."""
    embedded, users = embedded_folder(), os.environ.get("XDG_CACHE_HOME")
    folder = tmp_path_factory.mktemp("cache")
    (folder / "handspun").mkdir()
    (folder / "handspun" / embedded.name).symlink_to(embedded)
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    if users is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = users


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder of a random Qwen2 that has <|endoftext|> as its eos, as Qwen2.5's base models have."""
    return _folder_of_tiny_qwen2(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with heads of 16, which the native kernels of training support."""
    return _folder_of_tiny_qwen2(tmp_path_factory.mktemp("kernel"), head_dim=16)


def _folder_of_tiny_qwen2(parent: Path, **config: Any) -> Path:
    folder, tokenizer = parent / "tiny-qwen2", tiny_tokenizer()
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model = tiny_model(
        "qwen2", initializer_range=0.02, eos_token_id=end_of_text, tie_word_embeddings=True, **config
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_chat() -> ChatModel:
    """The same model, in memory and fresh."""
    tokenizer = tiny_tokenizer()
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model = tiny_model("qwen2", initializer_range=0.02, eos_token_id=end_of_text, tie_word_embeddings=True)
    return ChatModel(model, tokenizer, "tiny")


@pytest.fixture(scope="session")
def smollm2() -> ChatModel:
    """The embedded model, in float32."""
    return handspun.load("smollm2-135m")
