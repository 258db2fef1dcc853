"""Fixtures: a tiny random model's folder, and the embedded model."""

from pathlib import Path

import pytest

import handspun
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
"""A folder of public sets that may lie beside the project; no test needs it to pass."""


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder of a random Qwen2 that has <|endoftext|> as its eos, as Qwen2.5's base models have."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-qwen2"
    tokenizer = tiny_tokenizer()
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model = tiny_model("qwen2", initializer_range=0.02, eos_token_id=end_of_text, tie_word_embeddings=True)
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
