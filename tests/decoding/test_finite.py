"""NaN and infinity in a model, or from a processor, are one error that names the token and what to look at."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import handspun
from handspun.decoding.generate import generate, stream
from handspun.errors import ConfigError, ModelError
from handspun.models.load import ChatModel, nonfinite_weights
from tiny import tiny_model, tiny_tokenizer

_MODES = [
    {},
    {"do_sample": True, "top_p": 0.9},
    {"num_beams": 3},
    {"logprobs": True},
    {"explain": True},
    {"choice": ("yes", "no")},
    {"prompt_lookup_num_tokens": 3},
]


def _broken(
    name: str, value: float, *, dtype: torch.dtype = torch.float32, in_training: bool = False
) -> ChatModel:
    model: Any = tiny_model("qwen2", eos_token_id=322)
    model.to(dtype)
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight.view(-1)[1] = value
    return ChatModel(model, tiny_tokenizer(), "tiny", in_training=in_training)


@pytest.mark.parametrize("mode", _MODES, ids=str)
@pytest.mark.parametrize("in_training", [False, True], ids=["fused engine", "transformers engine"])
def test_a_model_of_nan_is_an_error_in_every_way_of_decoding(mode: dict[str, Any], in_training: bool) -> None:
    model = _broken("model.norm.weight", math.nan, in_training=in_training)
    message = (
        r"tiny: 330 of the model's 330 logits are NaN or infinite, at token 1 of the answer to prompt 1. These "
        r"weights contain NaN or infinity: model.norm.weight \(1 of 32 values\)"
    )
    with pytest.raises(ModelError, match=message):
        generate(model, ["Hi", "Tell me a joke."], max_new_tokens=4, **mode)
    with pytest.raises(ModelError, match=message):
        list(stream(model, "Hi", max_new_tokens=4, **mode))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.v_proj.bias"],
)
def test_a_single_value_that_is_no_number_is_named(name: str, dtype: torch.dtype, value: float) -> None:
    model = _broken(name, value, dtype=dtype)
    with pytest.raises(ModelError, match=rf"NaN or infinite.*{name} \(1 of"):
        generate(model, "Hi", max_new_tokens=4)


def test_the_token_and_the_prompt_are_those_that_meet_it() -> None:
    """The embedding of one token: a prompt without it is answered until the model says it."""
    model: Any = _broken("model.norm.weight", 1.0)
    [answer] = generate(model, "Hi", chat=False, max_new_tokens=6)  # its weights are not looked at again
    third = answer.token_ids[2]
    assert third not in answer.token_ids[:2] + answer.prompt_token_ids
    with torch.no_grad():
        model.model.get_input_embeddings().weight[third] = math.nan
    with pytest.raises(ModelError, match=r"at token 4 of the answer to prompt 1\. These weights.*\(32 of 10,560"):
        generate(model, "Hi", chat=False, max_new_tokens=6)
    with torch.no_grad():
        model.model.get_input_embeddings().weight[third] = 1.0
        model.model.get_input_embeddings().weight[68] = math.nan
    with pytest.raises(ModelError, match="at token 1 of the answer to prompt 2"):  # 68 is "e"
        generate(model, ["Hi", "e"], chat=False, max_new_tokens=2)


def test_weights_that_attention_hides_are_found_at_the_first_token() -> None:
    for name in ("q_proj", "k_proj"):
        model = _broken(f"model.layers.0.self_attn.{name}.weight", math.nan)
        with pytest.raises(ModelError, match=rf"token 1 of the answer to prompt 1.*{name}.weight \(1 of"):
            generate(model, "Hi", max_new_tokens=4)


def test_an_overflow_of_finite_weights_is_told_from_them() -> None:
    model = _broken("model.norm.weight", 1.0, dtype=torch.float16)
    with torch.no_grad():
        model.model.lm_head.weight.fill_(6e4)
    with pytest.raises(ModelError, match="All weights are finite, so a computation overflowed"):
        generate(model, "Hi", max_new_tokens=4)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_int8_weights_are_not_made_of_what_is_no_number(tmp_path: Path, name: str, value: float) -> None:
    broken = _broken(name, value)
    broken.model.save_pretrained(tmp_path)
    broken.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"cannot be rounded to int8: these weights.*{name} \(1 of"):
        handspun.load(str(tmp_path), weights="int8")


def test_infinities_and_nans_are_counted_and_large_sums_are_not() -> None:
    module = torch.nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3e38, 3e38, 1, 1], [1, 1, 1, 1]]))
        assert nonfinite_weights(module) == ""
        module.weight[1, :2] = torch.tensor([math.inf, math.nan])
    assert nonfinite_weights(module) == "weight (2 of 8 values)"


def _returns(value: float, where: slice) -> Callable[[torch.Tensor, list[int]], torch.Tensor]:
    def spoil(logits: torch.Tensor, _: list[int]) -> torch.Tensor:
        logits[where] = value
        return logits

    return spoil


@pytest.mark.parametrize(
    ("value", "where", "words"),
    [
        (math.nan, slice(5, 7), "returned 2 logits that are NaN or infinite"),
        (math.inf, slice(5, 6), "returned 1 logits that are NaN or infinite"),
        (-math.inf, slice(None), "excluded every next token"),
    ],
)
@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_a_processor_of_the_user_s_that_spoils_logits_is_named(
    mode: dict[str, Any], value: float, where: slice, words: str
) -> None:
    model = _broken("model.norm.weight", 1.0)
    with pytest.raises(ConfigError, match=f"the processor spoil {words}"):
        generate(model, "Hi", processors=[_returns(value, where)], max_new_tokens=3, **mode)
