"""Adapters from anywhere: on resized, moved, relative and other bases, with keys that nobody knows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import handspun
from handspun.display import captured_log
from handspun.errors import ModelError
from handspun.models.load import check_base_is_no_adapter, load_config, model_source, recorded_base

IDS = torch.tensor([[1, 2, 3, 320, 4]])


def randomize(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator)


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    """An adapter on a copy of the tiny model, as peft saves it."""
    shutil.copytree(tiny_folder, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    randomize(adapted)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`"
)
@pytest.mark.parametrize("saved_by", ["modules_to_save", "lora", "embedding_layers"])
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_load_of_an_adapter_with_added_tokens_enlarges_the_base(
    tiny_folder: Path, tmp_path: Path, saved_by: str, weights: Any
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens([f"<item {number}>" for number in range(12)])
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    chosen: dict[str, Any] = {"target_modules": "all-linear"}
    if saved_by == "modules_to_save":
        chosen["modules_to_save"] = ["embed_tokens", "lm_head"]
    elif saved_by == "lora":
        chosen["target_modules"] = ["q_proj", "embed_tokens"]
    adapted: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, **chosen))
    randomize(adapted)
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    chat = handspun.load(str(tmp_path / "adapter"), weights=weights)
    assert len(chat.tokenizer) == len(tokenizer)
    assert load_config(model_source(str(tmp_path / "adapter"))).vocab_size == len(tokenizer)
    if weights == "float32":
        torch.testing.assert_close(chat.model(IDS).logits, adapted.eval()(IDS).logits, rtol=1e-4, atol=1e-4)
    answer = handspun.generate(chat, "<item 3>", max_new_tokens=2, chat=False)[0]
    assert answer.prompt_token_ids == tokenizer("<item 3>")["input_ids"]


def test_load_finds_a_base_next_to_the_adapter(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = handspun.load(str(adapter)).model(IDS).logits
    change_config(adapter, base_model_name_or_path="../base")
    monkeypatch.chdir("/")
    torch.testing.assert_close(handspun.load(str(adapter)).model(IDS).logits, expected)


@pytest.mark.parametrize("named", ["base", "./base", "/nowhere/base", "~/nowhere/base", "some/where/base"])
def test_load_names_the_config_of_a_base_that_has_moved(adapter: Path, named: str) -> None:
    change_config(adapter, base_model_name_or_path=named)
    with pytest.raises(
        ModelError, match=r"its base model .*base does not exist\. Set .* in .*adapter_config\.json"
    ) as caught:
        handspun.load(str(adapter))
    assert named in str(caught.value)


def test_recorded_base_is_absolute_for_what_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert recorded_base("base") == str(tmp_path / "base")
    assert recorded_base("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert recorded_base("smollm2-135m") == "smollm2-135m"


def test_adapters_on_an_adapter_are_refused_before_training(adapter: Path) -> None:
    with pytest.raises(
        ModelError, match=r"is a LoRA adapter.*handspun export --model .* --merge --output-dir merged"
    ):
        check_base_is_no_adapter(model_source(str(adapter)))
    check_base_is_no_adapter(model_source(str(adapter.parent / "base")))


def test_load_of_an_adapter_on_an_adapter_says_what_to_merge(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "second")
    change_config(tmp_path / "second", base_model_name_or_path=str(adapter))
    with pytest.raises(
        ModelError, match=rf"an adapter itself. Merge that one first \(handspun export --model {adapter} "
    ):
        handspun.load(str(tmp_path / "second"))


def _drop(weights: dict[str, torch.Tensor]) -> None:
    del weights[min(name for name in weights if "lora_B" in name)]


def _rename(weights: dict[str, torch.Tensor]) -> None:
    name = min(weights)
    weights[name.replace("layers.0", "layers.7")] = weights[name].clone()


def _reshape(weights: dict[str, torch.Tensor]) -> None:
    name = min(name for name in weights if "lora_A" in name)
    weights[name] = torch.zeros(4, 48)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_drop, r"1 weights in its config that are missing from its file \(first .*lora_B"),
        (_rename, r"1 weights that neither its config nor the base uses \(first .*layers\.7"),
        (_reshape, r"1 weights whose shape does not fit the base \(first .* is \(4, 48\), expected \(4, "),
    ],
)
def test_load_refuses_an_adapter_that_does_not_fit(
    adapter: Path, change: Callable[[dict[str, torch.Tensor]], None], problem: str
) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    change(weights)
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=problem):
        handspun.load(str(adapter))


def test_load_names_settings_that_peft_does_not_know(adapter: Path) -> None:
    change_config(adapter, rotate_twice=True, not_used_yet=None)
    with captured_log() as log:
        handspun.load(str(adapter))
    assert len(log) == 1
    assert "ignores settings that it does not know: rotate_twice. " in log[0]


def test_load_of_an_adapter_whose_file_is_cut_short(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read as safetensors"):
        handspun.load(str(adapter))


def test_load_gives_pefts_own_logits(adapter: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    expected = PeftModel.from_pretrained(base, adapter).eval()(IDS).logits
    torch.testing.assert_close(handspun.load(str(adapter)).model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
