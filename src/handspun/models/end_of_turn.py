"""The end of a turn: the token that the template writes there must also end generation.

The base model Qwen2.5-0.5B has `<|endoftext|>` as its eos, while its template ends turns with `<|im_end|>`. After
fine-tuning, both are eos in generation_config, config, and tokenizer.
"""

from typing import TYPE_CHECKING

from handspun.models.load import ChatModel

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel


def eos_token_ids(model: "PreTrainedModel") -> list[int]:
    """Return the ids that end generation, from the generation_config, else from the config."""
    return eos_token_ids_of(model.generation_config, model.config)


def eos_token_ids_of(*configs: "GenerationConfig | PretrainedConfig | None") -> list[int]:
    """Return the eos ids of the first config that has any."""
    for config in configs:
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return list(eos) if isinstance(eos, list | tuple) else [eos]
    return []


def end_of_turn_is_new(chat: ChatModel) -> bool:
    """Return whether the template's end of turn is no eos of the model; its embedding may then be untrained."""
    return chat.template.end_of_turn_id not in eos_token_ids(chat.model)


def make_end_of_turn_eos(chat: ChatModel) -> None:
    """Make the template's end of turn the model's first eos and the tokenizer's eos. Other eos ids stay."""
    end_of_turn = chat.template.end_of_turn_id
    eos = [end_of_turn, *(id for id in eos_token_ids(chat.model) if id != end_of_turn)]
    eos_token_id = eos if len(eos) > 1 else eos[0]
    chat.model.config.eos_token_id = eos_token_id
    if chat.model.generation_config is not None:
        chat.model.generation_config.eos_token_id = eos_token_id
    chat.tokenizer.eos_token = chat.template.end_of_turn
