"""Small tokenizers with chat templates of the kinds that there are, each with the tokens that its kind has."""

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from handspun.models.load import ChatModel
from tiny import tiny_model

_TEXTS = ["What is the sum of the first numbers? The answer is that the user and the assistant take turns."]


@dataclass(frozen=True)
class Kind:
    """A template; its special tokens, the first of them the end of an answer; those that an assistant may say."""

    template: str
    special: tuple[str, ...]
    said: tuple[str, ...] = ()
    bos: str | None = None


KINDS = {
    # The last answer gets an empty think block; enable_thinking=false writes it into the prompt.
    "thinking": Kind(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
        "{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
        "{% endif %}",
        ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
        ("<think>", "</think>"),
    ),
    # The same block as ordinary text.
    "thinking in text": Kind(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    ),
    # The generation prompt opens a think block, which the answer closes.
    "opens a think block": Kind(
        "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
        "<|Assistant|><think>\n</think>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        ("<|end|>", "<|User|>", "<|Assistant|>"),
        ("<think>", "</think>"),
    ),
    # A line break and a heading before the answer, a blank line after it.
    "heading": Kind(
        "{% for m in messages %}<|im_start|>{{ m.role }}:\n"
        "{% if m.role == 'assistant' %}\nAnswer: {{ m.content | trim }}\n\n{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:\n{% endif %}",
        ("<|im_end|>", "<|im_start|>"),
    ),
    # A token after the whole conversation, where no answer is asked for.
    "token at the end": Kind(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        ("<|end|>", "<|endoftext|>", "<|user|>", "<|assistant|>"),
    ),
    # Contents are trimmed; the template writes a bos, and so does the tokenizer.
    "bos": Kind(
        "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|header|>\n\n{{ m.content | trim }}<|eot|>"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|header|>\n\n{% endif %}",
        ("<|eot|>", "<|start|>", "<|header|>", "<|begin|>"),
        bos="<|begin|>",
    ),
    # Roles are ordinary text.
    "plain roles": Kind(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ("</s>", "<s>"),
    ),
    "named speakers": Kind(
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}"
        "ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        ("</s>", "<s>"),
    ),
}


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with the kind's template and tokens."""
    made = KINDS[kind]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        _TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in made.special])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in made.said])
    if made.bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{made.bos} $A", special_tokens=[(made.bos, backend.token_to_id(made.bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=made.special[0],
        bos_token=made.bos,
        pad_token=made.special[1],
        chat_template=made.template,
        clean_up_tokenization_spaces=False,
    )


def chat_of(kind: str, *, vocab_size: int = 320) -> ChatModel:
    """Return a tiny model with the kind's tokenizer."""
    return ChatModel(tiny_model("qwen2", vocab_size=vocab_size), tokenizer_of(kind), kind)
