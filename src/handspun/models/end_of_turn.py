"""The end of a turn: the token that the template writes there must be one that ends generation.

Qwen2.5-0.5B base has `<|endoftext|>` as its eos, while its template ends turns with `<|im_end|>`. After
tuning both are eos: in generation_config, config and tokenizer.
"""

from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from handspun.models.load import ChatModel


def eos_token_ids(model: PreTrainedModel) -> list[int]:
    """The ids that end generation: the generation_config's, else the config's."""
    return eos_token_ids_of(model.generation_config, model.config)


def eos_token_ids_of(*configs: GenerationConfig | PretrainedConfig | None) -> list[int]:
    """Those of the first config that has any."""
    for config in configs:
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return list(eos) if isinstance(eos, list | tuple) else [eos]
    return []


def end_of_turn_is_new(chat: ChatModel) -> bool:
    """Whether the template's end of turn is no eos of the model, whose embedding of it then may never have
    been trained."""
    return chat.template.end_of_turn_id not in eos_token_ids(chat.model)


def make_end_of_turn_eos(chat: ChatModel) -> None:
    """The template's end of turn becomes the first eos of the model and its tokenizer's eos; the others stay."""
    end_of_turn = chat.template.end_of_turn_id
    eos = [end_of_turn, *(id for id in eos_token_ids(chat.model) if id != end_of_turn)]
    eos_token_id = eos if len(eos) > 1 else eos[0]
    chat.model.config.eos_token_id = eos_token_id
    if chat.model.generation_config is not None:
        chat.model.generation_config.eos_token_id = eos_token_id
    chat.tokenizer.eos_token = chat.template.end_of_turn
