"""Saving models for transformers 4 and 5, peft, vLLM, CTranslate2, mlx-lm, and llama.cpp's converter."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from handspun.models.tokenizer_file import quiet

_AT_ONCE = 2**22
"""Values per piece of rounding: bounds its memory."""
_LARGEST = torch.finfo(torch.bfloat16).max


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 values as bfloat16, each rounded up or down at random, usually to the nearer one.

    The expected result is the value itself (Gupta et al. 2015, arXiv:1502.02551). Values that bfloat16 holds
    exactly stay, and finite values stay finite. generator: on the values' device.
    """
    rounded = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    for some, into in zip(values.flatten().split(_AT_ONCE), rounded.view(-1).split(_AT_ONCE), strict=True):
        # bfloat16 is float32's upper half: noise in the lower half may carry one unit into the upper half.
        noise = torch.randint(2**16, some.shape, dtype=torch.int32, device=some.device, generator=generator)
        up_or_down = ((some.contiguous().view(torch.int32) + noise) & -(2**16)).view(torch.float32)
        up_or_down.clamp_(-_LARGEST, _LARGEST)
        into.copy_(torch.where(some.isfinite(), up_or_down, some))
    return rounded


_MACHINE_KEYS = {
    *("backend", "is_local", "local_files_only", "name_or_path", "tokenizer_file", "special_tokens_map_file"),
    *("cache_dir", "token", "use_auth_token", "_commit_hash"),
}
"""Keys of tokenizer_config.json about how and where the base was loaded."""


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save weights as safetensors, config, generation_config, and the tokenizer with its template.

    A model with LoRA adapters gives a standard adapter folder, with the adapters only.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        folder: an existing folder.
        dtype: float32, or bfloat16 with stochastic rounding (the same each time).
        state: the weights, if not the model's own.
    """
    if hasattr(model, "peft_config"):
        with quiet():
            model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        # It is peft's template of a model card, with nothing filled in.
        (folder / "README.md").unlink(missing_ok=True)
    else:
        _save_weights(model, folder, dtype, model.state_dict() if state is None else state)
    if model.generation_config is not None:
        _save_generation_config(model.generation_config, folder)
    tokenizer.save_pretrained(folder)
    _rewrite(folder / "tokenizer_config.json", lambda config: _portable_tokenizer_config(config, tokenizer))


def _save_weights(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype, whole: dict[str, torch.Tensor]
) -> None:
    generator = torch.Generator(next(iter(whole.values())).device).manual_seed(0)
    # By address: tied weights are one tensor, and must stay so.
    cast: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in whole.items():
        # Models come with weights that bfloat16 holds, and a short training moves most of them by less than half a
        # step of bfloat16. Rounded to nearest, they would return to their old values. Held-out loss of SmolLM2
        # after an epoch over 1,000 rows: 1.7598 in float32, 1.7921 rounded to nearest, 1.7600 rounded
        # stochastically.
        if tensor.data_ptr() not in cast:
            rounds = dtype == torch.bfloat16 and tensor.dtype == torch.float32
            cast[tensor.data_ptr()] = round_stochastically(tensor, generator) if rounds else _cast(dtype, tensor)
        state[name] = cast[tensor.data_ptr()]
    generation_config = model.generation_config
    # `_save_generation_config` writes the model's own.
    model.generation_config = GenerationConfig()
    try:
        with quiet():
            model.save_pretrained(folder, state_dict=state)
    finally:
        model.generation_config = generation_config
    name = str(dtype).removeprefix("torch.")  # of the file, not of the model in memory
    _rewrite(folder / "config.json", lambda saved: _with_older_keys({**saved, "dtype": name}, model.config))


def _save_generation_config(config: GenerationConfig, folder: Path) -> None:
    """Write the generation_config as it is."""
    # Once an eos was added, `save_pretrained` rejects configs of published models (such as a temperature without
    # do_sample): a run would fail at its first checkpoint.
    config.to_json_file(folder / "generation_config.json", keys_to_pop=["compile_config"])


def _rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    config = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_older_keys(saved: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """Return a config.json with transformers 4's keys next to those of 5."""
    # Older versions of vLLM, CTranslate2, and mlx-lm read them, and silently take a rope_theta of 10,000 without
    # them.
    for name, part in saved.items():
        if name.endswith("_config") and isinstance(part, dict):  # text and vision parts
            saved[name] = _with_older_keys(part, getattr(config, name))
    if "dtype" in saved:
        saved["torch_dtype"] = saved["dtype"]
    rope = saved.get("rope_parameters")
    if not isinstance(rope, dict):
        return saved
    older = saved | _older_rope_keys(rope)
    # transformers 5 lets older keys override new ones. Keep them only if the result is the same.
    same = type(config).from_dict(copy.deepcopy(older)).to_dict()["rope_parameters"] == rope
    return older if same else saved


def _older_rope_keys(rope: dict[str, Any]) -> dict[str, Any]:
    """Return transformers 4's keys for `rope_parameters`, which are for all layers or per layer type."""
    if "rope_type" not in rope:  # per layer type: Gemma 3 has a second theta for its sliding windows
        whole, sliding = rope.get("full_attention"), rope.get("sliding_attention")
        local = {"rope_local_base_freq": sliding["rope_theta"]} if sliding else {}
        return {**(_older_rope_keys(whole) if whole else {}), **local}
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    keys: dict[str, Any] = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    return {**keys, "rope_scaling": None if rope["rope_type"] == "default" else scaling}


def _portable_tokenizer_config(saved: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a tokenizer_config.json that transformers 4 reads too, without keys about this machine."""
    config = {name: value for name, value in saved.items() if name not in _MACHINE_KEYS}
    # It is version 5's name, which version 4 rejects.
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.pop("extra_special_tokens", None)
    # Version 4 expects a dict under this name, and a list under the other.
    if isinstance(extra, list):
        config["additional_special_tokens"] = extra
    elif extra is not None:
        config["extra_special_tokens"] = extra
    encoded = tokenizer("a", verbose=False)["input_ids"]
    # Version 4's Llama class adds a bos token by default.
    if tokenizer.bos_token_id is not None:
        config["add_bos_token"] = encoded[0] == tokenizer.bos_token_id
    # Version 5 writes chat_template.jinja, which 4 reads since 4.51 only.
    template: Any = tokenizer.chat_template
    if isinstance(template, str):
        config["chat_template"] = template
    elif template:
        config["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
    return dict(sorted(config.items()))


def _cast(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
