"""The engines: the fused one has transformers' logits, rows come and go in both, and int8 rows stand alone."""

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

import handspun
from backends import BACKENDS, NATIVE, chosen
from handspun.decoding.beam import CopyingBeamCache, TreeBeamCache
from handspun.decoding.engines.base import Engine, ModelInput
from handspun.decoding.engines.choose import make_engine
from handspun.decoding.engines.fused import FusedEngine
from handspun.decoding.engines.transformers import TransformersEngine
from handspun.decoding.request import Request
from handspun.decoding.scheduler import run
from handspun.display import captured_log
from handspun.errors import ModelError
from handspun.models.fused import FusedWeights, fused_weights, fusing_unsupported_reason
from handspun.models.load import ChatModel
from handspun.models.lora import add_lora
from handspun.models.save import save_model
from parity import requests_of
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.cpu
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SHAPES: dict[str, Any] = {
    "vocab_size": 330, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SHAPES, head_dim=8, attention_bias=True),
    "llama, tied": LlamaConfig(**SHAPES, head_dim=8, tie_word_embeddings=True),
    "llama, yarn": LlamaConfig(**SHAPES, head_dim=8, rope_parameters=YARN),
    "qwen2": Qwen2Config(**SHAPES),
    "qwen3": Qwen3Config(**SHAPES, head_dim=16),
    "llama, wide": LlamaConfig(**SHAPES, head_dim=16, attention_bias=True),
    "mistral": MistralConfig(**SHAPES, head_dim=8, sliding_window=None),
}
PROMPTS = [[5, 9, 13, 4], [7], [3, 300, 8, 8, 8, 21, 34, 5, 6], [250, 1]]


def model_of(name: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases that are not ones and zeros
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


def expected(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("name", CONFIGS)
def test_lean_logits_are_transformers(name: str) -> None:
    """Prompts of several lengths, then a token each, then several at once."""
    model = model_of(name)
    engine = FusedEngine(fused_weights(model_of(name)))
    rows = [engine.add() for _ in PROMPTS]
    found = engine.forward([ModelInput(row, ids) for row, ids in zip(rows, PROMPTS, strict=True)])
    for logits, ids in zip(found, PROMPTS, strict=True):
        torch.testing.assert_close(logits, expected(model, ids)[-1], rtol=1e-4, atol=1e-4)
    more = [[17], [4, 4, 4], [9], [2, 100]]
    found = engine.forward([ModelInput(row, ids, all_logits=True) for row, ids in zip(rows, more, strict=True)])
    wanted = [expected(model, [*a, *b])[-len(b) :] for a, b in zip(PROMPTS, more, strict=True)]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2", "llama, yarn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_attended_in_one_call_as_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """Prompts, tokens, a few tokens at once, a tree of tokens, and what no kernel may read: NaN in the pool."""
    mask = torch.ones(3, len(PROMPTS[0]) + 1 + 3, dtype=torch.bool)
    mask[1, -3:], mask[2, -3:] = torch.tensor([[False, True, False], [True, False, True]])
    weights: Any = model_of(name)
    model, found = fused_weights(weights.to(dtype)), []
    for gathers in (False, True):
        engine = FusedEngine(model)
        monkeypatch.setattr(engine, "_gathers", gathers)
        rows = [engine.add() for _ in PROMPTS]
        logits = [engine.forward([ModelInput(row, ids) for row, ids in zip(rows, PROMPTS, strict=True)])]
        for row in rows:  # behind each row's tokens
            end = engine.cache.start(row) + engine.cache.length(row)
            with torch.inference_mode():
                engine.cache.pool[:, :, end : end + 10] = torch.nan
        logits += [engine.forward([ModelInput(row, [17 + row]) for row in rows])]
        late = engine.add()
        tree = ModelInput(rows[0], [4, 9, 30], positions=[5, 5, 6], mask=mask, all_logits=True)
        long = ModelInput(rows[3], list(range(40, 70)))
        logits += [
            engine.forward(
                [ModelInput(late, [8, 8]), tree, ModelInput(rows[1], [3]), ModelInput(rows[2], [1, 2, 3]), long]
            )
        ]
        found.append(torch.cat(logits))
    near = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(found[1], found[0], rtol=near, atol=near)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("name", ["qwen3", "llama, wide"])
def test_layers_in_one_call_equal_the_loop_over_layers(backend: str, name: str) -> None:
    """Prompts, tokens, a late row's prompt beside a tree of tokens; with norms of heads, and with biases."""
    mask = torch.ones(3, len(PROMPTS[0]) + 1 + 3, dtype=torch.bool)
    mask[1, -3:], mask[2, -3:] = torch.tensor([[False, True, False], [True, False, True]])
    found = []
    for one in ("reference", backend):
        with chosen(one):
            engine = FusedEngine(fused_weights(model_of(name), int8=True))
        assert (engine.decoder is None) == (one == "reference")
        rows = [engine.add() for _ in PROMPTS]
        logits = [engine.forward([ModelInput(row, ids) for row, ids in zip(rows, PROMPTS, strict=True)])]
        logits += [engine.forward([ModelInput(row, [17 + row]) for row in rows])]
        late = ModelInput(engine.add(), list(range(40, 110)))
        tree = ModelInput(rows[0], [4, 9, 30], positions=[5, 5, 6], mask=mask, all_logits=True)
        logits += [engine.forward([late, tree, ModelInput(rows[1], [3])])]
        found.append(torch.cat(logits))
    assert torch.equal(*found)


def engines(model: PreTrainedModel) -> list[Engine]:
    return [FusedEngine(fused_weights(model)), TransformersEngine(model)]


@pytest.mark.parametrize("kind", [0, 1], ids=["fused", "transformers"])
def test_rows_come_fork_and_go(kind: int) -> None:
    """A fork goes its own way; rows that join later and leave earlier change nothing for the others."""
    model = model_of("qwen2")
    engine = engines(model_of("qwen2"))[kind]
    texts = {engine.add(): list(ids) for ids in PROMPTS}
    engine.forward([ModelInput(row, ids) for row, ids in texts.items()])
    first, second, *_ = texts
    texts[engine.fork(first)] = list(texts[first])
    engine.free(second)
    del texts[second]
    late = engine.add()
    near = []
    for step in range(70):  # past the first region of the cache
        new = {row: [(7 * step + 31 * row) % 330] for row in texts}
        if step == 2:
            texts[late] = []
            new[late] = [11, 12, 13]
        found = engine.forward([ModelInput(row, tokens) for row, tokens in new.items()])
        for row, tokens in new.items():
            texts[row] += tokens
        if step in (0, 2, 69):
            wanted = torch.stack([expected(model, texts[row])[-1] for row in new])
            near.append(torch.allclose(found, wanted, rtol=1e-4, atol=1e-4))
    assert near == [True] * 3


def test_fused_weights_are_still_the_models_own(tmp_path: Any) -> None:
    """They are views: trained, they change in the engine too, and they are saved as ever."""
    model, untouched = model_of("qwen2"), model_of("qwen2")
    engine = FusedEngine(fused_weights(model))
    torch.testing.assert_close(expected(model, PROMPTS[0]), expected(untouched, PROMPTS[0]))
    model(torch.tensor([PROMPTS[0]])).logits.sum().backward()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(2)
        untouched.model.layers[0].self_attn.k_proj.weight.mul_(2)
    found = engine.forward([ModelInput(engine.add(), PROMPTS[0])])
    torch.testing.assert_close(found[0], expected(untouched, PROMPTS[0])[-1], rtol=1e-4, atol=1e-4)
    before = model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    fused_weights(model)
    assert model.model.layers[0].self_attn.q_proj.weight.data_ptr() == before  # not copied again
    save_model(model, tiny_tokenizer(), tmp_path, dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(expected(again, PROMPTS[0]), expected(untouched, PROMPTS[0]))


def test_adapters_are_merged_into_copies() -> None:
    adapted: Any = add_lora(model_of("qwen2"), "tiny", rank=2, alpha=4, dropout=0.0, new_token_ids=[5, 7])
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
            assert "lora" in name or "token" in name
    wanted = expected(adapted.eval(), PROMPTS[2])
    engine = FusedEngine(fused_weights(adapted))
    found = engine.forward([ModelInput(engine.add(), PROMPTS[2], all_logits=True)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expected(adapted, PROMPTS[2]), wanted)


def test_what_is_not_llamas_kind_goes_through_transformers() -> None:
    window = MistralConfig(**SHAPES, head_dim=8, sliding_window=16)
    assert fusing_unsupported_reason(window) == "it has a sliding window of 16 tokens"
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    assert (
        fusing_unsupported_reason(LlamaConfig(**SHAPES, rope_parameters=dynamic))
        == "its rotary positions are of type dynamic"
    )
    assert fusing_unsupported_reason(LlamaConfig(**SHAPES, hidden_act="gelu")) == "its activation is gelu"
    model = AutoModelForCausalLM.from_config(window).eval()
    chat = ChatModel(model, tiny_tokenizer(), "window")
    assert isinstance(make_engine(chat), TransformersEngine)
    with captured_log() as log:
        handspun.generate(chat, "Say 3.", max_new_tokens=2)
    assert "decoding with transformers' forward, which is slower: it has a sliding window of 16 tokens" in log


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_beams": 3, "repetition_penalty": 1.3}])
def test_a_tree_of_beams_gives_what_rows_of_beams_give(family: Any, options: dict[str, Any]) -> None:
    """Sixty steps, so that the tree is compacted many times; three prompts of different lengths."""
    chat: Any = ChatModel(tiny_model(family), tiny_tokenizer(), "tiny")
    requests = requests_of(chat, PROMPTS[:3], max_new_tokens=60, num_return_sequences=2, **options)
    tree, plain = found_by(chat, requests, TreeBeamCache), found_by(chat, requests, CopyingBeamCache)
    assert tree == plain
    chat.model.config.model_type = "other"
    assert found_by(chat, requests) == plain


def found_by(chat: ChatModel, requests: list[Request], make_beams: Any = None) -> list[list[int]]:
    return [chunk.result.token_ids for chunk in run(chat, requests, make_beams=make_beams) if chunk.result]


def int8_chat() -> ChatModel:
    """With heads of 32, so that the native kernels take part where they can be had."""
    model = tiny_model(
        "qwen2", initializer_range=0.1, hidden_size=64, num_attention_heads=2, num_key_value_heads=1
    )
    return ChatModel(model, tiny_tokenizer(), "tiny", fused_weights(model, int8=True))


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["fastest", "none"])
def test_int8_answers_do_not_depend_on_batch_mates(kernels: str) -> None:
    """40 batches, of any answers in any order, that join and leave as they may: the same text, bit for bit."""
    with chosen(kernels) if kernels == "none" else nullcontext():
        answers_stay_the_same(int8_chat())


def answers_stay_the_same(chat: ChatModel) -> None:
    choose = random.Random(0)
    prompts = [f"{'Tell me more. ' * (n % 4)}Say {n}." for n in range(12)]
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12, "stop_strings": ()}

    def answers(chosen: list[int], **more: Any) -> dict[int, tuple[list[int], list[float] | None]]:
        seeds = tuple(100 + n for n in chosen)
        texts = [prompts[n] for n in chosen]
        found = handspun.generate(chat, texts, seed=seeds, logprobs=True, **options, **more)
        return {n: (answer.token_ids, answer.logprobs) for n, answer in zip(chosen, found, strict=True)}

    alone = {n: answers([n])[n] for n in range(12)}
    for _ in range(40):
        chosen = choose.sample(range(12), choose.randint(2, 6))
        limits = {"batch_size": choose.randint(1, 5), "max_batch_tokens": choose.choice([60, 200, 10_000])}
        assert answers(chosen, **limits) == {n: alone[n] for n in chosen}


def fed(engine: FusedEngine) -> list[Tensor]:
    """Logits of prompts, of single tokens beside a new prompt, and of two branches of a tree."""
    rows = [engine.add() for _ in PROMPTS]
    found = [engine.forward([ModelInput(row, ids) for row, ids in zip(rows, PROMPTS, strict=True)])]
    late = engine.add()
    found.append(engine.forward([ModelInput(rows[0], [9]), ModelInput(late, [4, 4, 4]), ModelInput(rows[2], [8])]))
    branches = torch.ones(2, 7, dtype=torch.bool)
    branches[0, 6] = branches[1, 5] = False
    found.append(
        engine.forward([ModelInput(rows[0], [11, 12], [5, 5], branches, all_logits=True), ModelInput(late, [1])])
    )
    return found


def int8_lean(name: str) -> FusedWeights:
    """With heads of 32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        shapes = SHAPES | sizes | {"initializer_range": 0.1}
        config = Qwen3Config(**shapes, head_dim=32) if name == "qwen3" else Qwen2Config(**shapes)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return fused_weights(model, int8=True)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_logits_are_the_same_with_all_kernels(name: str, kernels: str) -> None:
    """Qwen3 norms queries and keys. Where PyTorch attends, a value between two integers may go either way."""
    engines = []
    for one in (kernels, "reference"):
        with chosen(one):
            engines.append(FusedEngine(int8_lean(name)))
    assert engines[0]._attends is (kernels != "none")
    for logits, expected in zip(*map(fed, engines), strict=True):
        assert (logits - expected).norm() < 0.02 * expected.norm()
        assert kernels == "none" or torch.equal(logits, expected)


def test_int8_weights_take_the_place_of_the_float_ones() -> None:
    chat = int8_chat()
    assert {parameter.device.type for name, parameter in chat.model.named_parameters() if "proj" in name} == {
        "meta"
    }
    assert chat.device.type == "cpu"
    assert handspun.generate(chat, "Say 3.", max_new_tokens=3)[0].token_ids


def test_int8_is_near_float(tiny_folder: Any) -> None:
    exact, rounded = (handspun.load(str(tiny_folder), weights=weights) for weights in ("float32", "int8"))
    ids = [5, 9, 13, 4, 7, 7, 100]
    logits = [_logits(chat, ids) for chat in (exact, rounded)]
    difference = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert 0 < difference < 0.03


def _logits(chat: ChatModel, ids: list[int]) -> Tensor:
    engine = make_engine(chat)
    return engine.forward([ModelInput(engine.add(), ids, all_logits=True)])


def test_int8_of_another_kind_of_model_is_refused(tmp_path: Any) -> None:
    model = AutoModelForCausalLM.from_config(MistralConfig(**SHAPES, head_dim=8, sliding_window=16))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"does not support int8 decoding: .* Use weights=\"float32\"\."):
        handspun.load(str(tmp_path), weights="int8")
