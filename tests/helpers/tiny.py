"""Small random models and a small tokenizer, made in memory."""

from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

_CHATML = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "# Tools\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message.role != 'system' %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "\n<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What the tests train depends on these very texts.
_TEXTS = [
    "Give me a brief introduction to the city. What is the sum of the first numbers?",
    "The answer is that the system and the user take turns, and the assistant ends the turn.",
    "Tell me a joke about computers. Rewrite this sentence. List three colours: red, green, blue.",
    'user assistant system tool {"name": "weather", "arguments": {"city": "Shanghai"}}',
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template and Qwen's added tokens; 256 bytes, some merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained(backend, _CHATML)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2.5's rules, special tokens and chat template (Apache-2.0, Alibaba Cloud), and a small vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _trained(backend, Path(__file__).with_name("qwen2.5_chat_template.jinja").read_text(encoding="utf-8"))


def _trained(backend: Tokenizer, chat_template: str) -> PreTrainedTokenizerFast:
    """The backend with a vocabulary and Qwen's added tokens."""
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(_TEXTS, trainer)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in ("<tool_call>", "</tool_call>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    family: Literal["qwen2", "llama"], *, seed: int = 0, vocab_size: int = 330, **config: Any
) -> PreTrainedModel:
    """A random model in eval mode, float32: 2 layers, 4 heads (2 of keys), hidden size 32."""
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.5,  # peaked enough that no two tokens come out nearly equal
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **config,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "qwen2":
            model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**values))
        else:
            model = LlamaForCausalLM(LlamaConfig(**values))
    model.eval()
    return model
