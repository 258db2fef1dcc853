"""Write a byte-level BPE tokenizer to GGUF, as llama.cpp reads it.

The names are those of llama.cpp's convert_hf_to_gguf.py. That script recognizes a tokenizer by a hash of its
output on a sample text, with one table entry per model. Here, the rules of the pre-tokenizer decide, and unknown
rules are rejected.
"""

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from handspun.errors import ModelError
from handspun.models.end_of_turn import eos_token_ids
from handspun.models.load import ChatModel

ANOTHER_WAY = (
    "Run llama.cpp's convert_hf_to_gguf.py, which supports more models, on the folder that --merge writes."
)
_SAMPLING = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "num_beams"),
    *("repetition_penalty", "no_repeat_ngram_size", "length_penalty", "max_new_tokens", "max_length"),
)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS: dict[tuple[str | None, ...], str] = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_WORDS % "", "bytes"): "qwen2",
    (_WORDS % "{1,3}", "bytes"): "llama-bpe",
}
"""llama.cpp's name for each known list of pre-tokenizer parts: splitting by a regular expression ("ByteLevel" has
that of GPT-2), splitting single digits, and mapping bytes to characters."""


def write_tokenizer(writer: GGUFWriter, chat: ChatModel, vocab_size: int) -> None:
    """Write tokens, merges, special ids and the chat template.

    vocab_size: rows of the embedding; ids without a token are padding. Raises ModelError for a tokenizer that is
    not byte-level BPE.
    """
    tokenizer = chat.tokenizer
    spec = _specification(tokenizer, chat.name)
    tokens, types = _tokens(tokenizer, vocab_size, chat.name)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer_name(spec["pre_tokenizer"], chat.name))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = spec["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    _write_special_ids(writer, chat)
    template: Any = tokenizer.chat_template
    if isinstance(template, str):
        writer.add_chat_template(template)
    elif template:  # several, by name
        writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])


def left_out(chat: ChatModel) -> list[str]:
    """Return notes about what a GGUF file cannot express, one per setting of the model's folder."""
    tokenizer = chat.tokenizer
    notes = []
    if not tokenizer.chat_template:
        notes.append("no chat template: the model has none, so llama.cpp uses its default")
    normalizer = json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"]
    if normalizer is not None:
        kinds = [part["type"] for part in normalizer.get("normalizers", [normalizer])]
        notes.append(
            f"its tokenizer normalizes text first ({', '.join(kinds)}), which llama.cpp does not do: such texts "
            "may get different tokens there"
        )
    written = {tokenizer.eos_token_id, chat.template.end_of_turn_id if tokenizer.chat_template else None}
    if others := [id for id in eos_token_ids(chat.model) if id not in written]:
        texts = ", ".join(str(text) for text in tokenizer.convert_ids_to_tokens(others))
        notes.append(f"a GGUF file names one end and one end of turn, but here {texts} ends generation too")
    if chat.model.generation_config is not None:
        config = chat.model.generation_config.to_diff_dict()
        if defaults := [f"{name} {config[name]}" for name in _SAMPLING if name in config]:
            notes.append(f"generation_config's defaults: {', '.join(defaults)}. Set them where you run the file")
    return notes


def _specification(tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    model = spec.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback") or not spec.get("pre_tokenizer"):
        kind = model.get("type", type(tokenizer).__name__)
        raise ModelError(
            f"{name} has a tokenizer that --gguf does not support (expected byte-level BPE, as in Llama 3, Qwen "
            f"and SmolLM, got {kind}). {ANOTHER_WAY}"
        )
    return spec


def _pre_tokenizer_name(spec: dict[str, Any], name: str) -> str:
    parts = spec["pretokenizers"] if spec["type"] == "Sequence" else [spec]
    found = _PRE_TOKENIZERS.get(tuple(_part(part) for part in parts))
    if found is None:
        kinds = " and ".join(part["type"] for part in parts)
        raise ModelError(
            f"{name} splits text by rules that --gguf does not support (expected those of GPT-2, SmolLM, Qwen or "
            f"Llama 3, got {kinds}). {ANOTHER_WAY}"
        )
    return found


def _part(part: dict[str, Any]) -> str | None:
    if part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
        return "ByteLevel" if part.get("use_regex", True) else "bytes"
    if part["type"] == "Digits" and part.get("individual_digits"):
        return "Digits"
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
        pattern: str | None = part["pattern"].get("Regex")
        return pattern
    return None


def _tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int, name: str) -> tuple[list[str], list[TokenType]]:
    """Return the text and type of every id. An id without a token becomes an unused padding token."""
    of_id = {id: text for text, id in tokenizer.get_vocab().items()}
    if max(of_id) >= vocab_size:
        raise ModelError(
            f"{name} is incomplete: its tokenizer has {max(of_id) + 1} tokens, but its embedding has "
            f"{vocab_size} rows. Download or save it again."
        )
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for id in range(vocab_size):
        tokens.append(of_id.get(id, f"[PAD{id}]"))
        if id not in of_id:
            types.append(TokenType.UNUSED)
        elif id in added:
            types.append(TokenType.CONTROL if added[id].special else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    return tokens, types


def _write_special_ids(writer: GGUFWriter, chat: ChatModel) -> None:
    """Write the ids of bos, eos, pad, unk and end of turn, and whether the tokenizer adds bos and eos."""
    tokenizer = chat.tokenizer
    eos = eos_token_ids(chat.model)
    eos_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(eos), None)
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": eos_token_id,
        "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
        "eot": chat.template.end_of_turn_id if tokenizer.chat_template else None,
    }
    for kind, id in ids.items():
        if id is not None:
            writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", id)
    encoded = tokenizer("a", verbose=False)["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and encoded[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(eos_token_id is not None and encoded[-1] == eos_token_id)
