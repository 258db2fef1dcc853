"""Loading a model by name: a hub id, a folder, a LoRA adapter's folder, a .gguf file, or the embedded model.

No code that comes with a model is ever run: weights are read from safetensors or GGUF files only, and
`trust_remote_code` stays off.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from handspun.config import TemplateArgs, Weights, read_template_args
from handspun.data.chat_template import ChatTemplate
from handspun.data.rendering import choose_template
from handspun.data.rows import stay_offline_if_unreachable
from handspun.display import logger, printable
from handspun.errors import ConfigError, ModelError
from handspun.kernels import slower_without
from handspun.kernels.allocator import disable_malloc_trim, malloc_trim
from handspun.kernels.onednn import limit_primitive_cache
from handspun.models.adapters import embedding_rows
from handspun.models.embedded import EMBEDDED_NAME, embedded_folder
from handspun.models.fused import FusedWeights, check_exact_decoding, fused_weights, fusing_unsupported_reason
from handspun.models.tokenizer_file import as_in_tokenizer_json, quiet

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_MAX_NAMED = 4


def nonfinite_weights(model: nn.Module) -> str:
    """Return the weights that hold NaN or infinity, as `norm.weight (1 of 32 values), head.weight (...)`.

    Returns "" if there are none. Skips meta tensors.
    """
    found = list(_nonfinite(model))
    more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
    return ", ".join(found[:_MAX_NAMED]) + more


@torch.no_grad()
def _nonfinite(model: nn.Module) -> Iterator[str]:
    for name, weight in model.named_parameters():
        # NaN is both the lowest and the highest value. Unlike a mask, finding them needs no memory.
        if weight.is_meta or not weight.numel() or all(map(torch.isfinite, weight.aminmax())):
            continue
        count = int((~torch.isfinite(weight)).sum())
        yield f"{name} ({count:,} of {weight.numel():,} values)"


_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_INDEX = "model.safetensors.index.json"
_HUB_WEIGHTS = ["model.safetensors", "model-*.safetensors", _INDEX]
"""What transformers reads of a repository; others of its files may hold the same weights once more."""
_CHECKPOINT = re.compile(r"checkpoint-(step|epoch|best)-?([0-9]*)")
_SIZES = ((1e9, 1, "B"), (1e6, 0, "M"), (1e3, 0, "K"))


@dataclass(eq=False, repr=False)
class ChatModel:
    """A causal language model in eval mode, its tokenizer, and the name it was loaded by.

    fused: int8 weights; `model` then holds only shapes (meta tensors) and configuration. in_training: the model is
    being trained, so decoding must not move or merge its weights.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    fused: FusedWeights | None = None
    in_training: bool = False
    template_args: dict[str, Any] = field(default_factory=dict)
    """Values for the chat template's variables, such as enable_thinking."""

    def __repr__(self) -> str:
        """Return one line: its name, size, type of weights, and device."""
        count = self.model.num_parameters()
        size = next(
            (f"{count / unit:.{digits}f}{sign}" for unit, digits, sign in _SIZES if count >= unit), str(count)
        )
        weights = "int8" if self.fused is not None else str(self.model.dtype).removeprefix("torch.")
        return f"ChatModel({self.name!r}, {size}, {weights}, {self.device})"

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template. Raises TemplateError if the tokenizer has none."""
        return ChatTemplate(self.tokenizer, self.template_args)

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return self.fused.device if self.fused is not None else self.model.device


def load(
    name: str,
    *,
    weights: Weights = "auto",
    device: str = "auto",
    chat_template: str | None = None,
    template_args: TemplateArgs | None = None,
    int8_loader: Callable[["ModelSource", torch.device], ChatModel] | None = None,
) -> ChatModel:
    """Load a chat model by name. `handspun.load` documents the arguments and errors.

    int8_loader: loads int8 weights in place of `load_int8`.
    """
    disable_malloc_trim()
    limit_primitive_cache()
    args, problems = read_template_args(template_args)
    if problems:
        raise ConfigError(problems)
    torch_device = resolve_device(device)
    source = model_source(name)
    if weights == "int8":
        return _with_template((int8_loader or load_int8)(source, torch_device), chat_template, args)
    model = _load_merged(source, resolve_dtype(weights, torch_device))
    model.to(torch_device)  # type: ignore[arg-type]  # transformers wraps it and loses its types
    return _with_template(ChatModel(model.eval(), load_tokenizer(source), name), chat_template, args)


def _with_template(chat: ChatModel, chat_template: str | None, template_args: dict[str, Any]) -> ChatModel:
    choose_template(chat.tokenizer, chat_template)
    chat.template_args = template_args
    if template_args:
        _ = chat.template  # raise now if the template does not read one of the variables
    return chat


@dataclass(frozen=True)
class ModelSource:
    """The location of a model's files, as arguments for transformers' `from_pretrained`."""

    name: str
    location: str
    gguf_file: str | None = None
    adapter: Path | None = None
    base: str | None = None
    """Of an adapter: its base, as its config names it."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for each `from_pretrained`."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


def model_source(name: str) -> ModelSource:
    """Locate a model's files, without downloading anything yet. Raises ModelError."""
    # Not Path.expanduser, which raises if there is no such user.
    path = Path(os.path.expanduser(name))
    if name == EMBEDDED_NAME:
        return ModelSource(name, str(embedded_folder()))
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name, str(path.parent), gguf_file=path.name)
    if path.is_dir():
        if (checkpoint := checkpoint_of_run(path)) is not None:
            logger.info(f"{name}: {checkpoint.name} of this run")
            return _folder_source(str(checkpoint), checkpoint)
        return _folder_source(name, path)
    if path.exists():
        raise ModelError(
            f"{name}: this file is not a model (expected a model folder, a .gguf file, or a hub id such as "
            "Qwen/Qwen2.5-0.5B)."
        )
    if not _looks_like_hub_id(name):
        near = difflib.get_close_matches(path.name, _sibling_names(path), 1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        if path.parent != path and (there := _checkpoints(path.parent)):
            raise ModelError(
                f"{name}: no such folder or file (expected one of the checkpoints in {path.parent}: "
                f"{', '.join(there)}). Name one of them.{hint}"
            )
        raise ModelError(
            f"there is no model {name}: no such folder or file, and not a hub id (such as Qwen/Qwen2.5-0.5B). "
            f"Check the path, or use {EMBEDDED_NAME}, which needs no hub.{hint}"
        )
    stay_offline_if_unreachable(name)
    logger.info(f"loading {name} from the hub, or its cache")
    return ModelSource(name, name)


def is_on_disk(name: str) -> bool:
    """Return whether a model of this name needs no hub."""
    return name == EMBEDDED_NAME or os.path.lexists(os.path.expanduser(name))


def checkpoint_of_run(folder: Path) -> Path | None:
    """Return the checkpoint that stands for a run: checkpoint-best, or the last epoch's, or the last step's.

    None if it is not such a folder, or holds none.
    """
    if (folder / "config.json").exists() or not (folder / "run.json").exists():
        return None
    found: list[tuple[int, int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        name = _CHECKPOINT.fullmatch(path.name)
        if name and ((path / "config.json").exists() or (path / "adapter_config.json").exists()):
            found.append((("step", "epoch", "best").index(name[1]), int(name[2] or 0), path))
    return max(found)[2] if found else None


def load_trainable(source: ModelSource, template: ChatTemplate, device: torch.device) -> ChatModel:
    """Load a model's weights in float32, with the given template and its tokenizer."""
    model = _load_merged(source, torch.float32)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it and loses its types
    chat = ChatModel(model.eval(), template.tokenizer, source.name, template_args=template.template_args)
    chat.template = template
    return chat


def load_tokenizer(source: ModelSource, *, warn: bool = False) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of the model, or of an adapter's folder, with the ids of its tokenizer.json.

    warn: log it if AutoTokenizer would have given other ids.
    """
    if source.adapter is not None and (source.adapter / "tokenizer.json").exists():
        source = ModelSource(source.name, str(source.adapter))
    from transformers import AutoTokenizer

    found: PreTrainedTokenizerBase
    found = _from_pretrained(AutoTokenizer, source.name, source.location, **source.arguments)
    if source.gguf_file:
        return found
    return as_in_tokenizer_json(found, source.name, source.location, warn=warn)


def load_config(source: ModelSource) -> "PretrainedConfig":
    """Return the model's config, without reading its weights."""
    from transformers import AutoConfig

    config: PretrainedConfig = _from_pretrained(AutoConfig, source.name, source.location, **source.arguments)
    # It names the folder's own code, which must never run.
    config.__dict__.pop("auto_map", None)
    if source.adapter is not None and (rows := embedding_rows(source.adapter)):
        config.get_text_config().vocab_size = rows  # the adapter adds tokens that its base lacks
    return config


def load_generation_config(source: ModelSource) -> "GenerationConfig | None":
    """Return the adapter's generation_config, else the model's; None if there is none."""
    from transformers import GenerationConfig

    for place in (source.adapter, source.location) if source.adapter is not None else (source.location,):
        with suppress(OSError):
            return GenerationConfig.from_pretrained(str(place))
    return None


_DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
_OTHER_NAMES = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "hip": "cuda", "amd": "cuda", "metal": "mps"}
"""PyTorch calls AMD's GPUs cuda too."""


def resolve_device(device: str) -> torch.device:
    """Return the named device, or a GPU (if there is one) for "auto". Raises ModelError if it is not available."""
    if device == "auto":
        if torch.backends.mps.is_available():
            _log_untried_gpu()
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        kind = device.partition(":")[0]
        if kind not in _DEVICES:
            meant = _OTHER_NAMES.get(kind.lower()) or next(
                iter(difflib.get_close_matches(kind.lower(), _DEVICES)), None
            )
            hint = f" Did you mean {meant}?" if meant else ""
            expected = "auto, cpu, cuda, cuda:1, or mps"
            raise ModelError(
                f"--device {printable(device)}: no such device (expected {expected}).{hint}"
            ) from error
        reason = str(error).splitlines()[0]
        raise ModelError(f"--device {device} is not available here ({reason}). Use cpu or auto.") from error
    return found


@cache
def _log_untried_gpu() -> None:
    """Log, once per process, that a Mac's GPU is left alone."""
    logger.info("running on the CPU: this Mac's GPU has not been tried (--device mps takes it)")


def resolve_dtype(dtype: Weights, device: torch.device) -> torch.dtype:
    """Return the torch type. "auto" is float32 on a CPU and bfloat16 on a GPU that supports it. Not for int8."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def context_length(config: "PretrainedConfig") -> int | None:
    """Return the model's context length in tokens, if its config has one."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def _folder_source(name: str, path: Path) -> ModelSource:
    if (path / "adapter_config.json").exists():
        return _adapter_source(name, path)
    if not (path / "config.json").exists():
        raise ModelError(
            f"{name}: this is a folder without config.json (expected a transformers model folder with "
            f"config.json, model.safetensors, and tokenizer.json; found {_listing(path)})."
        )
    if not any(path.glob("*.safetensors")):
        _check_no_pickles(name, path, "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)")
        raise ModelError(
            f"{name}: this is a model folder without weights (expected *.safetensors, found {_listing(path)})."
        )
    if (path / _INDEX).exists():
        weight_map = _json_object(path / _INDEX).get("weight_map")
        files = {str(file) for file in weight_map.values()} if isinstance(weight_map, dict) else {"nothing"}
        if strange := sorted(f for f in files if not f.endswith(".safetensors") or Path(f).name != f):
            raise ModelError(
                f"{name}: {_INDEX} names {strange[0]!r} (expected *.safetensors files in the same folder)."
            )
    return ModelSource(name, str(path))


def _adapter_source(name: str, path: Path) -> ModelSource:
    config = _json_object(path / "adapter_config.json")
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    if not isinstance(base, str) or kind != "LORA" or config.get("megatron_config"):
        raise ModelError(
            f"{name}: not a LoRA adapter that can be merged (expected an adapter_config.json with peft_type LORA "
            f"and the name of a base model, found {kind!r} and {base!r})."
        )
    if not (path / "adapter_model.safetensors").exists():
        _check_no_pickles(name, path, "PeftModel.from_pretrained(base, folder).save_pretrained(folder)")
        raise ModelError(
            f"{name}: the adapter's weights are missing (expected adapter_model.safetensors, found "
            f"{_listing(path)})."
        )
    from handspun.models.lora import unknown_settings

    if unknown := unknown_settings(config):
        logger.warning(
            f"{path / 'adapter_config.json'}: this version of peft ignores settings that it does not know: "
            f"{', '.join(unknown)}. A newer version may read them."
        )
    place = _base_of(name, path, base)
    if (Path(place) / "adapter_config.json").exists():
        raise ModelError(
            f"{name} is an adapter whose base, {place}, is an adapter itself. Merge that one first (handspun "
            f"export --model {place} --merge --output-dir merged). Then set base_model_name_or_path in "
            f"{path / 'adapter_config.json'} to the merged folder's path."
        )
    found = model_source(place)
    return ModelSource(name, found.location, found.gguf_file, adapter=path, base=base)


def _base_of(name: str, adapter: Path, base: str) -> str:
    """Return the base's name, resolved."""
    # A relative path is tried from the working folder, as peft does, and then from the adapter's folder.
    for candidate in (Path(os.path.expanduser(base)), adapter / base):
        if candidate.exists():
            return str(candidate)
    if base == EMBEDDED_NAME or _looks_like_hub_id(base):
        return base
    raise ModelError(
        f"{name}: its base model {base} does not exist. Set base_model_name_or_path in "
        f"{adapter / 'adapter_config.json'} to the base's current folder or hub id."
    )


def recorded_base(name: str) -> str:
    """Return the base's name for an adapter's config."""
    # A path on this disk is made absolute, so that it is found from any working folder.
    path = Path(os.path.expanduser(name))
    return str(path.resolve()) if name != EMBEDDED_NAME and path.exists() else name


def check_base_is_no_adapter(source: ModelSource) -> None:
    """Raise ModelError if the base of new adapters is an adapter itself, which no tool could open afterwards."""
    if source.adapter is not None:
        raise ModelError(
            f"{source.name} is a LoRA adapter, and no tool can open --lora adapters on top of it. Merge it first: "
            f"handspun export --model {source.name} --merge --output-dir merged, and then --model merged. "
            "(Without --lora, training starts from the merged weights.)"
        )


def _check_no_pickles(name: str, path: Path, remedy: str) -> None:
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise ModelError(
            f"{name} has its weights only as pickles ({', '.join(pickles[:3])}), which can run code when loaded. "
            f"If you trust them, convert them to safetensors: {remedy}."
        )


def _json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a JSON object.")
    return value


def _load_merged(source: ModelSource, dtype: torch.dtype | str) -> "PreTrainedModel":
    model = _load_weights(source, dtype)
    if source.adapter is None:
        return model
    from handspun.models.lora import merge_adapter

    merged = merge_adapter(model, source.adapter, base_name=source.location)
    if (source.adapter / "generation_config.json").exists():
        from transformers import GenerationConfig

        merged.generation_config = GenerationConfig.from_pretrained(source.adapter)
    return merged


def check_int8(name: str, config: "PretrainedConfig", device: torch.device) -> None:
    """Raise ModelError if a model cannot be decoded in int8. Log it if the device has no kernels for it."""
    if reason := fusing_unsupported_reason(config):
        raise ModelError(f"{name} does not support int8 decoding: {reason}. Use --weights float32.")
    check_exact_decoding(device)
    if slower := slower_without(device):
        logger.warning(slower)


def load_int8(source: ModelSource, device: torch.device) -> ChatModel:
    """Load a model and round its weights to int8."""
    check_int8(source.name, load_config(source), device)
    model = _load_merged(source, "auto")  # the type of the files
    # Rounding to int8 would turn them into wrong but finite numbers.
    if found := nonfinite_weights(model):
        raise ModelError(
            f"{source.name} cannot be rounded to int8: these weights hold NaN or infinity: {found}. Use an "
            "earlier checkpoint, or download the model again."
        )
    model.to(device)  # type: ignore[arg-type]
    chat = ChatModel(model.eval(), load_tokenizer(source), source.name, fused_weights(model, int8=True))
    for weight in model.parameters():  # what is left: norms, as views of the file, which would stay in memory
        weight.data = weight.data.clone()
    malloc_trim()
    return chat


def _load_weights(source: ModelSource, dtype: torch.dtype | str) -> "PreTrainedModel":
    """Load the model's weights. Raises ModelError if some are missing."""
    from transformers import AutoModelForCausalLM, GgufConfig

    quantization = {}
    if source.gguf_file:
        quantization = {"quantization_config": GgufConfig(dequantize=True)}
    _download_weights(source)
    model, info = _from_pretrained(
        AutoModelForCausalLM,
        source.name,
        source.location,
        dtype=dtype,
        output_loading_info=True,
        **({} if source.gguf_file else {"use_safetensors": True}),
        **quantization,
        **source.arguments,
    )
    # transformers fills in random weights for missing ones, with a warning at most.
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{source.name} lacks {len(missing)} of its weights (first {missing[0]}), which would be random. Its "
            "files are incomplete, or belong to another architecture than config.json names. Download the model "
            "again."
        )
    return model  # type: ignore[no-any-return]


def _download_weights(source: ModelSource) -> None:
    """Download the weights of a hub model with a progress bar, unless they are in the cache."""
    if Path(source.location).exists():
        return
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return
    try:
        snapshot_download(source.location, allow_patterns=[*_HUB_WEIGHTS, "config.json"])
    except Exception as error:  # the network, the hub and a full disk raise many types
        raise _model_error(error, source.name, source.location) from error


def _from_pretrained(auto: Any, name: str, location: str, **arguments: Any) -> Any:
    """Call `auto.from_pretrained` quietly. Raises ModelError with a readable reason."""
    try:
        # Without trust_remote_code=False, transformers asks on the terminal.
        with quiet():
            return auto.from_pretrained(location, trust_remote_code=False, **arguments)
    # transformers, tokenizers, and safetensors raise anything for malformed files.
    except Exception as error:
        raise _model_error(error, name, location) from error


def _model_error(error: Exception, name: str, location: str) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{name} needs its own Python code to be run (auto_map in its configuration), which Handspun "
            "never does. Use a model whose architecture is in transformers."
        )
    if Path(location).exists():
        return ModelError(f"{name} cannot be read as a model: {reason}")
    what = name if name == location else f"{location}, the base that {name}'s adapter_config.json names,"
    return ModelError(
        f"{what} cannot be downloaded from the hub: {reason}\nCheck its spelling and the network. Without "
        f"the hub, use a folder that holds it, or the embedded model: --model {EMBEDDED_NAME}"
    )


def _looks_like_hub_id(name: str) -> bool:
    """Return whether a name that is no path here may be asked of the hub."""
    if name.count("/") != 1 or name.startswith(("/", ".", "~")) or name.endswith((".gguf", "/")):
        return False
    first, last = name.split("/")
    return not Path(first).is_dir() and not _CHECKPOINT.fullmatch(last)


def _checkpoints(folder: Path) -> list[str]:
    """Return the checkpoints' names in a folder, by kind and number."""
    names = _sibling_names(folder / "any")
    found = [(match[1], int(match[2] or 0), name) for name in names if (match := _CHECKPOINT.fullmatch(name))]
    return [name for *_, name in sorted(found)]


def _sibling_names(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []


def _listing(path: Path) -> str:
    names = sorted(file.name for file in path.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"
