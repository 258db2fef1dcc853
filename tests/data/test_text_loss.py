"""What a tokenizer does not keep is said, row by row and prompt by prompt."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import handspun
from chat_templates import KINDS, chat_of
from handspun.config import DataConfig
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import load_splits
from handspun.data.text_loss import TextLoss
from handspun.display import captured_log
from handspun.models.load import ChatModel
from tiny import tiny_model

_WITHOUT_ACCENTS = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
_SPACES = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])


def byte_level(normalizer: Any) -> Tokenizer:
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


@pytest.mark.parametrize(
    ("normalizer", "kept", "changed", "name"),
    [
        (normalizers.NFC(), "caf\u00e9", "cafe\u0301", "NFC"),
        (normalizers.NFKC(), "fine", "\ufb01ne", "NFKC"),
        (normalizers.Lowercase(), "red", "Red", "Lowercase"),
        (_WITHOUT_ACCENTS, "cafe", "caf\u00e9", "NFD, StripAccents"),
        (normalizers.Replace(Regex(" {2,}"), " "), "a b", "a  b", "Replace"),
        (normalizers.Strip(), "a", " a", "Strip"),
        (normalizers.BertNormalizer(), "a", "A", "BERT's rules"),
    ],
)  # fmt: skip
def test_a_normalizer_that_changes_a_text_is_named(normalizer: Any, kept: str, changed: str, name: str) -> None:
    loss = TextLoss(byte_level(normalizer))
    assert loss.notes([kept]) == []
    assert loss.notes([kept, changed]) == [f"the tokenizer changes the text before it tokenizes it ({name})"]


@pytest.mark.parametrize("normalizer", [None, _SPACES, normalizers.Sequence([])])
def test_what_decoding_takes_back_is_no_change(normalizer: Any) -> None:
    assert TextLoss(byte_level(normalizer)).notes(["Two  words\n\n and \tcafe\u0301 \ufb01ne"]) == []


def words() -> PreTrainedTokenizerFast:
    """A vocabulary of words, as of a model that was made for one task."""
    vocab = {word: i for i, word in enumerate(["<unk>", "user", "assistant", "<|", "|>", "a", "b"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", chat_template=KINDS["plain roles"].template
    )


def test_unknown_words_and_lost_line_breaks_are_noted_for_each_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": text} for text in ("b", "quux", "b b")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(data=str(tmp_path / "rows.jsonl"), cache_examples=False)
    made, _ = load_splits(config, ChatTemplate(words()), max_length=100)
    unknown = [note.row for note in made.account.notes if "reads them as unknown" in note.text]
    breaks = [note.row for note in made.account.notes if "does not keep line breaks" in note.text]
    assert unknown == [2]
    assert breaks == [1, 2, 3]  # the template's own


def test_prompts_whose_text_is_changed_are_named() -> None:
    model = chat_of("plain roles")
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with captured_log() as notices:
        handspun.generate(model, ["red", "Red", "RED"], chat=False, max_new_tokens=1)
    assert "prompts 2, 3: the tokenizer changes the text before it tokenizes it (Lowercase)" in notices
    model = ChatModel(tiny_model("qwen2", vocab_size=12), words(), "words")
    with captured_log() as unknown:
        handspun.generate(model, ["a", "quux"], chat=False, max_new_tokens=1)
    assert any("prompt 2: " in text and "as unknown" in text for text in unknown)
