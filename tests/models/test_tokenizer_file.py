"""Token ids are those of the folder's own tokenizer.json, whatever class transformers makes of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import handspun
from handspun.display import captured_log
from handspun.models.load import load_tokenizer, model_source
from handspun.models.save import save_model
from handspun.models.tokenizer_file import PROBES, as_in_tokenizer_json, text_with_other_ids
from tiny import tiny_model

_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def digits_apart() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\d| ?\p{L}+|\s+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return backend


def lower_case() -> Tokenizer:
    backend = byte_level()
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return backend


def drops_merges() -> Tokenizer:
    backend = Tokenizer(models.BPE(dropout=0.5))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


KINDS = [byte_level, digits_apart, lower_case, drops_merges]


def saved(backend: Tokenizer, folder: Path, **of_file: object) -> Path:
    """Train the backend on a few texts and write it with a tiny model."""
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=460, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["In 2023 and 2023 there were 650841823 of them, don't stop now."] * 3, trainer)
    backend.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=_CHATML
    )
    save_model(tiny_model("qwen2", vocab_size=480), tokenizer, folder, dtype=torch.float32)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | of_file))
    return folder


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer", "GPT2Tokenizer"])
@pytest.mark.parametrize("kind", KINDS)
def test_load_tokenizer_gives_the_ids_of_tokenizer_json(
    kind: Callable[[], Tokenizer], name: str, tmp_path: Path
) -> None:
    folder = saved(kind(), tmp_path / "model", tokenizer_class=name)
    tokenizer = load_tokenizer(model_source(str(folder)))
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if kind is drops_merges:
        raw.model.dropout = None
    for text in (*PROBES, "In 2023", "650841823", "cafe\u0301", "What's  two\n\n spaces"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == raw.encode(text).ids, text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.chat_template == _CHATML


def test_load_tokenizer_says_that_transformers_would_give_other_ids(tmp_path: Path) -> None:
    folder = saved(byte_level(), tmp_path / "model")
    with captured_log() as notices:
        load_tokenizer(model_source(str(folder)), warn=True)
    assert len(notices) == 1
    assert "tokenizer.json is used as is" in notices[0]
    assert "Qwen2Tokenizer" in notices[0]


def test_load_tokenizer_says_nothing_where_transformers_gives_the_same_ids(tmp_path: Path) -> None:
    folder = saved(byte_level(), tmp_path / "llama", tokenizer_class="PreTrainedTokenizerFast")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("qwen2", "llama").replace("Qwen2", "Llama"))
    with captured_log() as notices:
        load_tokenizer(model_source(str(folder)), warn=True)
    assert notices == []


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_saved_tokenizer_gives_the_same_ids_when_it_is_loaded_again(
    kind: Callable[[], Tokenizer], tmp_path: Path
) -> None:
    first = handspun.load(str(saved(kind(), tmp_path / "model")))
    save_model(first.model, first.tokenizer, tmp_path / "again", dtype=torch.float32)
    again = handspun.load(str(tmp_path / "again"))
    assert again.tokenizer(list(PROBES))["input_ids"] == first.tokenizer(list(PROBES))["input_ids"]


def test_special_tokens_of_the_rebuilt_class_are_kept_where_the_file_knows_them(tmp_path: Path) -> None:
    folder = saved(byte_level(), tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]  # the class's own default then holds
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(model_source(str(folder)))
    assert tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) == Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def test_a_folder_without_tokenizer_json_keeps_the_tokenizer_of_transformers(tmp_path: Path) -> None:
    folder = saved(byte_level(), tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    (tmp_path / "none").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "none")
    assert as_in_tokenizer_json(tokenizer, "none", str(tmp_path / "none")) is tokenizer


def test_the_probes_tell_the_kinds_apart(tmp_path: Path) -> None:
    files = [saved(kind(), tmp_path / kind.__name__) / "tokenizer.json" for kind in KINDS[:3]]
    first, digits, lower = (Tokenizer.from_file(str(file)) for file in files)
    assert text_with_other_ids(first, first) is None
    assert text_with_other_ids(first, digits) is not None
    assert text_with_other_ids(first, lower) is not None
