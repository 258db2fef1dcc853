"""Saved folders open in transformers 4 and 5: older keys next to the new ones, nothing of this machine."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Gemma3TextConfig,
    GenerationConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

import handspun
from handspun.models.save import _with_older_keys, save_model
from tiny import tiny_model, tiny_tokenizer

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
LINEAR = {"rope_type": "linear", "factor": 8.0}


def saved(tmp_path: Path, model: Any, tokenizer: Any) -> Path:
    folder = tmp_path / "saved"
    folder.mkdir()
    save_model(model, tokenizer, folder, dtype=torch.float32)
    return folder


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    ("config", "older"),
    [
        (
            LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e5}),
            {"rope_theta": 1e5, "rope_scaling": None},
        ),
        (
            LlamaConfig(rope_parameters={**LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 5e5}),
            {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}},
        ),
        (
            Qwen2Config(rope_parameters={**YARN, "rope_theta": 1e6}, max_position_embeddings=32768),
            {"rope_theta": 1e6, "rope_scaling": YARN},
        ),
        (
            GPTNeoXConfig(
                rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
            ),
            {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "rope_scaling": None},
        ),
        (
            Gemma3TextConfig(
                rope_parameters={
                    "full_attention": {**LINEAR, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            ),
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR},
        ),
    ],
    ids=["plain", "llama3", "yarn", "partial", "by-kind-of-layer"],
)
def test_with_older_keys_reads_the_same_in_both_versions(
    config: PretrainedConfig, older: dict[str, Any], tmp_path: Path
) -> None:
    before = {**config.to_dict(), "model_type": config.model_type, "dtype": "float32"}
    after = _with_older_keys(copy.deepcopy(before), config)
    assert after == before | older | {"torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(after), encoding="utf-8")
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


@pytest.mark.parametrize("template", ["{{ messages }}", {"default": "{{ messages }}", "tool_use": "{{ tools }}"}])
def test_save_model_leaves_a_tokenizer_config_that_version_4_reads(template: Any, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")  # as a run has it: with its place on this machine
    tokenizer.chat_template = template
    tokenizer.extra_special_tokens = ["<|im_start|>"]
    folder = saved(tmp_path, tiny_model("llama"), tokenizer)
    config = read(folder, "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|im_start|>"]
    assert not {"extra_special_tokens", "is_local", "local_files_only", "backend", "name_or_path"} & set(config)
    assert str(tmp_path) not in (folder / "tokenizer_config.json").read_text(encoding="utf-8")
    listed = (
        [{"name": name, "template": text} for name, text in template.items()] if template != str(template) else 0
    )
    assert config["chat_template"] == (listed or template)
    again = AutoTokenizer.from_pretrained(folder)
    assert again.chat_template == template
    assert again.extra_special_tokens == ["<|im_start|>"]
    assert again("<|im_start|>user 12")["input_ids"] == tokenizer("<|im_start|>user 12")["input_ids"]


@pytest.mark.parametrize("writes_bos", [True, False])
def test_save_model_says_whether_a_bos_is_written(writes_bos: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    if writes_bos:
        bos = ("<|endoftext|>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[bos]
        )
    folder = saved(tmp_path, tiny_model("llama"), tokenizer)
    assert read(folder, "tokenizer_config.json")["add_bos_token"] is writes_bos
    assert AutoTokenizer.from_pretrained(folder)("user")["input_ids"] == tokenizer("user")["input_ids"]


@pytest.mark.parametrize(
    "odd",
    [{"temperature": 0.3, "do_sample": False}, {"top_p": 0.5}, {"num_beams": 1, "length_penalty": 2.0}],
    ids=["temperature", "top_p", "length_penalty"],
)
def test_save_model_writes_generation_configs_that_transformers_refuses_to_save(
    odd: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(**odd, eos_token_id=[3, 4])
    own = model.generation_config
    folder = saved(tmp_path, model, tiny_tokenizer())
    assert model.generation_config is own
    assert read(folder, "generation_config.json") | odd == read(folder, "generation_config.json")
    assert handspun.load(str(folder)).model.generation_config.eos_token_id == [3, 4]
