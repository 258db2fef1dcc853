"""Packed runner computes what padded runner computes, step by step."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.display import captured_log
from handspun.kernels import reference
from handspun.models.int8 import quantize_base
from handspun.models.lora import add_lora
from handspun.training import packed as packed_module
from handspun.training.batching import Batching, shared_prefix
from handspun.training.loop import Loop, Step, start, train
from handspun.training.objectives import PaddedRunner
from handspun.training.packed import Masks, Packed, masks_of, packed_attention, whole_mask
from handspun.training.runner import packing_unsupported_reason, select_runner
from tiny import tiny_model

CPU = torch.device("cpu")
SHARED = Batching("packed", share_prefix=True)
SMALL: dict[str, Any] = {
    "vocab_size": 330,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.05,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def model_of(family: str, *, head_size: int = 8) -> PreTrainedModel:
    """head_size: native kernels support multiples of 16."""
    torch.manual_seed(0)
    small, options = {**SMALL, "head_dim": head_size}, dict[str, Any](initializer_range=0.05, head_dim=head_size)
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**small))
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**small, sliding_window=None))
    if family == "tied":
        return tiny_model("llama", **options, tie_word_embeddings=True)
    if family == "padding":  # a token of the rows whose embedding is not trained
        return tiny_model("qwen2", **options, pad_token_id=12)
    return tiny_model(family, **options)  # type: ignore[arg-type]


def rows(count: int, *, prefix: int = 5, seed: int = 0) -> list[Example]:
    """Rows that begin with the same `prefix` tokens, of different lengths, the second half learned."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(count):
        length = int(torch.randint(6, 25, (1,), generator=generator))
        own = torch.randint(0, 300, (length,), generator=generator).tolist()
        ids = list(range(10, 10 + prefix)) + own
        made.append(Example(ids, [i >= prefix + length // 2 for i in range(len(ids))], "rows.csv", row + 1))
    return made


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "mistral", "tied", "padding"])
@pytest.mark.parametrize("head_size", [8, 16])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_loss_and_gradients_are_those_of_padded_rows(family: str, head_size: int, share_prefix: bool) -> None:
    model, batch = model_of(family, head_size=head_size), rows(6)
    expected = PaddedRunner(model, torch.float32, 0).backward(batch, 7)
    wanted = gradients(model)
    with packed_attention(model):
        packed = Packed(model, torch.float32, Batching("packed", share_prefix))
        assert packed.backward(batch, 7) == pytest.approx(expected, rel=1e-6)
        assert packed.loss(batch) == pytest.approx(expected, rel=1e-6)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("share_prefix", [True, False])
def test_row_losses_are_those_of_padded_rows(share_prefix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, although training is in bfloat16, and whatever chunks the head sees."""
    model, batch = model_of("qwen2"), rows(6)
    expected = PaddedRunner(model, torch.float32, 0).row_losses(batch)
    monkeypatch.setattr(packed_module, "LOGITS_CHUNK_BYTES", 4 * 330 * 16)
    with packed_attention(model):
        packed = Packed(model, torch.bfloat16, Batching("packed", share_prefix))
        assert packed.row_losses(batch) == pytest.approx(expected, rel=1e-5)
        assert packed.loss(batch) == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("head_size", [8, 16])
def test_all_sequences_at_once_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, family: str, head_size: int) -> None:
    model, batch, found = model_of(family, head_size=head_size), rows(6), []
    with packed_attention(model):
        for mask in (masks_of, lambda made, dtype: Masks(made, whole_mask(made, dtype))):
            monkeypatch.setattr(packed_module, "masks_of", mask)
            loss = Packed(model, torch.float32, SHARED).backward(batch, 7)
            found.append((loss, gradients(model)))
    (expected, wanted), (loss, made) = found
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(made[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_one_mask_for_all_sequences_by_hand() -> None:
    batch = [
        Example([1, 2, 3, 4], [False, False, False, True], "a", 1),
        Example([1, 5, 6], [False, False, True], "a", 2),
    ]
    made = SHARED.pack(batch, CPU)  # 1 | 2 3 4 | 5 6
    attends = (whole_mask(made, torch.float32) == 0).int().tolist()
    assert attends == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, 1, 1],
    ]


def test_afterwards_the_attention_is_as_it_was() -> None:
    model = model_of("llama")
    ids = torch.tensor([[1, 2, 3]])
    before, name = model(ids).logits, model.config._attn_implementation
    with packed_attention(model):
        assert model.config._attn_implementation != name
    assert model.config._attn_implementation == name
    assert torch.equal(model(ids).logits, before)


def test_a_pack_by_hand() -> None:
    batch = [
        Example([1, 2, 3, 4, 5], [False, False, False, True, True], "a", 1),
        Example([1, 2, 6, 7], [False, False, False, True], "a", 2),
    ]
    made = SHARED.pack(batch, CPU)
    assert made.shared_prefix_length == 2
    assert made.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert made.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert made.sequence_bounds == [(2, 5), (5, 7)]
    assert made.target_positions.tolist() == [2, 3, 5]
    assert made.targets.tolist() == [4, 5, 7]
    second = masks_of(made, torch.float32).per_sequence[1]
    assert second is not None
    assert second.tolist() == [[True, True, True, False], [True, True, True, True]]


def test_a_pack_of_which_nothing_is_learned_can_still_be_indexed() -> None:
    made = Batching("packed").pack([Example([1, 2], [False, False], "a", 1)], CPU)
    assert made.target_positions.dtype == made.targets.dtype == torch.long
    assert made.input_ids[0, made.target_positions].tolist() == made.targets.tolist() == []


def test_a_pack_filled_up_by_hand() -> None:
    batch = [Example([1, 2, 3, 4], [False, False, True, True], "a", 1), Example([1, 5], [False, True], "a", 2)]
    made = Batching("packed", multiple=8).pack(batch, CPU)
    assert made.input_ids.tolist() == [[1, 2, 3, 4, 1, 5, 1, 1]]
    assert made.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]
    assert made.sequence_bounds == [(0, 4), (4, 6), (6, 8)]
    assert made.target_positions.tolist() == [1, 2, 4]
    alone = Batching("packed", multiple=4).pack([Example([3, 4], [False, True], "a", 1)], CPU)
    assert alone.input_ids.tolist() == [[3, 4, 3, 3]]
    for multiple, tokens in ((6, 6), (7, 7), (8, 8), (4, 8)):
        assert Batching("packed", multiple=multiple).computed_tokens(batch) == tokens


@pytest.mark.parametrize("lora", [False, True])
def test_what_fills_a_pack_up_changes_nothing(lora: bool) -> None:
    model, batch = model_of("tied"), rows(5)
    model = add_lora(model, "tiny", rank=4, alpha=8, dropout=0.0) if lora else model
    found = []
    for multiple in (1, 64):
        with packed_attention(model):
            packed = Packed(model, torch.float32, replace(SHARED, multiple=multiple))
            loss = packed.backward(batch, 7)
            assert packed.loss(batch) == pytest.approx(loss, rel=1e-6)
            assert packed.batching.computed_tokens(batch) % multiple == 0
        found.append((loss, gradients(model)))
    (plain, wanted), (filled, gradients_filled) = found
    assert filled == pytest.approx(plain, rel=1e-6)
    for name, gradient in wanted.items():
        atol = 1e-6 * gradient.abs().max().item()
        torch.testing.assert_close(gradients_filled[name], gradient, rtol=1e-5, atol=atol)


def test_the_prefix_ends_before_what_predicts_a_learned_token() -> None:
    """Equal prompts: the last prompt token predicts each row's own first answer token, so it is not shared."""
    prompt = [1, 2, 3, 4]
    batch = [Example([*prompt, answer], [False] * 4 + [True], "a", answer) for answer in (7, 8)]
    assert shared_prefix(batch) == 3
    assert shared_prefix(batch[:1]) == 0
    assert shared_prefix([batch[0], batch[0]]) == 3


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6),
    st.booleans(),
)
def test_every_label_is_predicted_once_whatever_the_rows(
    shapes: list[tuple[int, int, int]], share_prefix: bool
) -> None:
    batch = []
    for row, (same, prompt, answer) in enumerate(shapes):
        ids = [9] * same + [row + 20] * prompt + [row + 50] * answer
        batch.append(Example(ids, [i >= same + prompt for i in range(len(ids))], "a", row))
    made = Batching("packed", share_prefix).pack(batch, CPU)
    assert sorted(made.targets.tolist()) == sorted(
        row + 50 for row, (*_, answer) in enumerate(shapes) for _ in range(answer)
    )
    assert len(set(made.target_positions.tolist())) == len(made.target_positions)
    for position, target in zip(made.target_positions.tolist(), made.targets.tolist(), strict=True):
        assert made.input_ids[0, position].item() in (target, target - 30)
    assert made.sequence_bounds[-1][1] == made.input_ids.shape[1]


@given(st.lists(st.integers(2, 40), min_size=1, max_size=20), st.integers(1, 100))
def test_micro_batches_keep_order_and_max_tokens(lengths: list[int], max_tokens: int) -> None:
    batch = [Example([1] * n, [False] + [True] * (n - 1), "a", i) for i, n in enumerate(lengths)]
    parts = list(SHARED.split(batch, max_tokens))
    assert [e.row for part in parts for e in part] == list(range(len(batch)))
    assert all(len(part) == 1 or sum(map(len, part)) <= max_tokens for part in parts)


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "parts"),
    [
        ([3, 4], 7, [[3, 4]]),
        ([3, 4], 6, [[3], [4]]),
        ([9, 2, 5, 2], 11, [[9, 2], [5, 2]]),
        ([9, 2, 5, 2], 9, [[9], [2, 5, 2]]),
        ([20, 2], 5, [[20], [2]]),
    ],
)
def test_packed_micro_batches_by_hand(lengths: list[int], max_tokens: int, parts: list[list[int]]) -> None:
    batch = [Example([1] * n, [False] + [True] * (n - 1), "a", i) for i, n in enumerate(lengths)]
    assert [[len(e) for e in part] for part in SHARED.split(batch, max_tokens)] == parts


RUNNER: dict[str, Any] = {"dtype": torch.float32, "pad_token_id": 0}


def run(config: TrainConfig, examples: list[Example], head_size: int = 8) -> list[Step]:
    model = model_of("qwen2", head_size=head_size)
    if config.lora:
        torch.manual_seed(0)
        model = add_lora(model, "tiny", rank=4, alpha=8, dropout=config.lora_dropout)
    with select_runner(model, config, examples, dtype=torch.float32, pad_token_id=0) as runner:
        loop = Loop(config=config, examples=examples, runner=runner)
        return [event for event in train(loop, start(model, config)) if isinstance(event, Step)]


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "head_size"), [(False, 8), (False, 16), (True, 16)])
def test_fifty_steps_agree_whatever_the_batching_and_the_cut(lora: bool, head_size: int) -> None:
    config = TrainConfig(num_epochs=5, batch_size=6, learning_rate=1e-3, lora=lora)
    examples = rows(60)
    reference = run(replace(config, batching="padded"), examples, head_size)
    assert len(reference) == 50
    for max_tokens in (2048, 60, 1):
        found = run(replace(config, max_tokens=max_tokens), examples, head_size)
        assert [s.loss for s in found] == pytest.approx([s.loss for s in reference], rel=1e-5)
        assert [s.grad_norm for s in found] == pytest.approx([s.grad_norm for s in reference], rel=1e-5)


def test_chunks_of_the_head_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("llama"), rows(8)
    with packed_attention(model):
        packed = Packed(model, torch.float32, SHARED)
        whole = packed.backward(batch, 5)
        wanted = gradients(model)
        monkeypatch.setattr(packed_module, "LOGITS_CHUNK_BYTES", 4 * 330 * 16)
        assert packed.backward(batch, 5) == pytest.approx(whole, rel=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5 * wanted[name].abs().max().item())


@pytest.mark.parametrize("family", ["llama", "tied"])
def test_gradients_of_head_and_embedding_are_added_where_they_are(family: str) -> None:
    """Nothing of the size of the vocabulary is made for a micro-batch once there is a gradient to add to."""
    model = model_of(family)
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    with packed_attention(model):
        packed = Packed(model, torch.float32, SHARED)
        packed.backward(rows(4), 5)
        before = [(table.grad, table.grad.layout) for table in tables]
        packed.backward(rows(4, seed=1), 5)
    assert all(table.grad is grad for table, (grad, _) in zip(tables, before, strict=True))
    assert all(layout == torch.strided for _, layout in before)


def test_frozen_weights_get_no_gradient() -> None:
    model = add_lora(model_of("qwen2"), "tiny", rank=4, alpha=8, dropout=0.0)
    with packed_attention(model):
        Packed(model, torch.float32, SHARED).backward(rows(4), 3)
    frozen = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
    assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} < frozen.keys()
    assert not [name for name, weight in frozen.items() if weight.grad is not None]


def test_neighbors_do_not_see_each_other() -> None:
    """Changing one row changes nothing of another's loss."""
    model, batch = model_of("llama"), rows(3)
    with packed_attention(model):
        packed = Packed(model, torch.float32, SHARED)
        alone = [packed.loss([example]) for example in batch]
        assert packed.loss(batch) == pytest.approx(sum(alone), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MistralConfig(**SMALL, sliding_window=16), "mistral has a sliding window of 16 tokens"),
        (
            Qwen3Config(**SMALL, layer_types=["full_attention", "sliding_attention"], use_sliding_window=True),
            "qwen3 has sliding_attention layers",
        ),
    ],
)
def test_sliding_windows_run_padded_and_the_log_says_so(config: Any, reason: str) -> None:
    assert packing_unsupported_reason(config) == reason


def test_a_model_that_scales_its_logits_runs_padded_and_the_log_says_so() -> None:
    """Whatever a model does behind its head is seen by trying both."""
    model, examples = model_of("llama"), rows(8)
    forward = type(model).forward

    def scaled(self: PreTrainedModel, *arguments: Any, **options: Any) -> Any:
        output = forward(self, *arguments, **options)
        output.logits = output.logits * 3
        return output

    model.forward = scaled.__get__(model)
    config = TrainConfig(num_epochs=1, batch_size=8)
    with captured_log() as log, select_runner(model, config, examples, **RUNNER) as runner:
        assert isinstance(runner, PaddedRunner)
    assert log[0].startswith("batching: padded (llama has another loss when packed")


def test_noise_of_an_int8_base_is_not_taken_for_another_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded coarsely, sums in another order make another loss; unrounded, they do not."""
    model: Any = add_lora(tiny_model("qwen2"), "tiny", rank=2, alpha=4, dropout=0.0)
    quantize_base(model)
    monkeypatch.setenv("HANDSPUN_KERNELS", "reference")
    monkeypatch.setattr(reference, "quantize_rows", coarsely_quantized)
    config = TrainConfig(num_epochs=1, lora=True, base_weights="int8")
    with captured_log() as log, select_runner(model, config, rows(8), **RUNNER) as runner:
        assert isinstance(runner, Packed)
    assert log == ["batching: packed"]


def coarsely_quantized(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """To 3 steps, at random where to: as if each sum had another order."""
    scale = values.abs().amax(1, keepdim=True) / 3
    return (values / scale + torch.rand(values.shape) - 0.5).round().to(torch.int8), scale


def test_padded_on_request_and_dropout_are_said() -> None:
    with captured_log() as log:
        run(TrainConfig(num_epochs=1, batching="padded"), rows(4))
        run(TrainConfig(num_epochs=1), rows(4))
        steps = run(TrainConfig(num_epochs=1, lora=True, lora_dropout=0.5), rows(4))
    assert log == [
        "batching: padded (as requested)",
        "batching: packed",
        "batching: packed; prefixes are not shared, because of dropout",
    ]
    assert math.isfinite(steps[-1].loss)


def test_held_out_loss_is_computed_in_float32_whatever_the_products_of_training_are() -> None:
    model, batch = model_of("llama"), rows(4)
    with packed_attention(model):
        losses = [Packed(model, dtype, SHARED).loss(batch) for dtype in (torch.float32, torch.bfloat16)]
    padded = [PaddedRunner(model, dtype, pad_token_id=0).loss(batch) for dtype in (torch.float32, torch.bfloat16)]
    assert losses[0] == losses[1]
    assert padded[0] == padded[1]


@pytest.mark.parametrize("head_size", [8, 16])
def test_bfloat16_products_stay_near_float32(head_size: int) -> None:
    model, batch = model_of("llama", head_size=head_size), rows(8)
    with packed_attention(model):
        exact = Packed(model, torch.float32, SHARED).backward(batch, 5)
        wanted = gradients(model)
        rounded = Packed(model, torch.bfloat16, SHARED).backward(batch, 5)
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert rounded != exact
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        assert (gradient - wanted[name]).norm() < 0.02 * wanted[name].norm(), name
