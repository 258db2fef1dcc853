"""An int8 model read straight from its folder, without transformers, for commands that only decode.

Importing transformers and its model classes takes longer than all else before SmolLM2's first token. Read here is
what needs no interpretation: a Llama-like model with plain rotary positions, all of whose settings are in
config.json, in one model.safetensors with exactly the expected weights, and a byte-level tokenizer.json. Anything
else, and anything wrong, is left to load.py, which reads every model and words every error. Both give the same
weights, ids, and prompts, to the bit (tests/models/test_direct.py).
"""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from jinja2 import Template
from jinja2 import TemplateError as JinjaError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, processors
from torch import nn

from handspun.data.rendering import variables_of
from handspun.files import read_json_object
from handspun.kernels.allocator import malloc_trim
from handspun.models.fused import FusedWeights, Int8Product, fused_weights
from handspun.models.load import ChatModel, ModelSource, check_int8, load_int8, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_int8_directly(source: ModelSource, device: torch.device) -> ChatModel:
    """Load an int8 model for decoding only: from its files if they are of the known kind, else as `load_int8`.

    The model and the tokenizer then have only what decoding uses.
    """
    return _read(source, device) or load_int8(source, device)


def _read(source: ModelSource, device: torch.device) -> ChatModel | None:
    folder = Path(source.location)
    if device.type != "cpu" or source.adapter is not None or source.gguf_file or not folder.is_dir():
        return None
    config, generation = read_config(folder), read_generation_config(folder)
    tokenizer = None if config is None else read_tokenizer(source)
    if config is None or generation is None or tokenizer is None:
        return None
    weights = read_weights(folder, config)
    if weights is None:
        return None
    check_int8(source.name, cast(Any, config), device)
    try:
        fused = fused_weights(weights, int8=True)  # reads layer by layer
    except (OSError, SafetensorError):
        return None
    malloc_trim(collect=False)  # which would take 0.1 s
    model: Any = DecodedModel(config, generation)
    return ChatModel(model, cast(Any, tokenizer), source.name, fused) if _is_finite(fused) else None


class Config(SimpleNamespace):
    """What transformers' config of the model says, as far as decoding asks."""

    def get_text_config(self) -> "Config":
        """Return itself."""
        return self


class DecodedModel(nn.Module):
    """What decoding asks of a model whose weights are in `FusedWeights`: its settings, and no weights."""

    def __init__(self, config: Config, generation_config: SimpleNamespace) -> None:
        super().__init__()
        self.config, self.generation_config = config, generation_config
        self.eval()

    def get_input_embeddings(self) -> SimpleNamespace:
        """Return the embedding, without values."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        return SimpleNamespace(weight=torch.empty(shape, device="meta"))


_FAMILIES = ("llama", "qwen2", "qwen3")
_NUMBERS = (
    *("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers"),
    *("num_key_value_heads", "rms_norm_eps", "vocab_size"),
)
_UNKNOWN = (
    *("attention_bias", "mlp_bias", "partial_rotary_factor", "quantization_config", "rope_scaling"),
    *("use_sliding_window",),
)
"""Settings of config.json that change what is read or computed."""


def read_config(folder: Path) -> Config | None:
    """Return the settings of config.json, or None if it leaves any to a default, or has one that is not known."""
    values = read_json_object(folder / "config.json") or {}
    rope = values.get("rope_parameters") or {"rope_theta": values.get("rope_theta")}
    known = (
        values.get("model_type") in _FAMILIES
        and all(isinstance(values.get(name), int | float) for name in _NUMBERS)
        and not any(values.get(name) for name in _UNKNOWN)
        and values.get("hidden_act") == "silu"
        and isinstance(values.get("tie_word_embeddings"), bool)
        and set(values.get("layer_types") or ["full_attention"]) == {"full_attention"}
        and rope.keys() <= {"rope_theta", "rope_type"}
        and rope.get("rope_type", "default") == "default"
        and isinstance(rope.get("rope_theta"), int | float)
        and isinstance(_dtype(values), torch.dtype)
    )
    return Config(**{**values, "rope_parameters": rope, "dtype": _dtype(values)}) if known else None


def _dtype(values: Mapping[str, Any]) -> Any:
    name = values.get("dtype") or values.get("torch_dtype")
    return getattr(torch, name, None) if name in ("float32", "bfloat16", "float16") else None


def read_generation_config(folder: Path) -> SimpleNamespace | None:
    """Return the settings of generation_config.json, or None if there are none, or some that need transformers."""
    values = read_json_object(folder / "generation_config.json")
    if values is None:
        return None
    flat = all(
        _is_plain(value) or (isinstance(value, list) and all(map(_is_plain, value))) for value in values.values()
    )
    return SimpleNamespace(**values) if flat else None


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


class _Part(SimpleNamespace):
    """A part of a model: weights and other parts by their names, as in transformers' modules."""

    def to(self, _: str) -> None:
        """Forget the weights."""
        self.__dict__.clear()


def read_weights(folder: Path, config: Config) -> Any:
    """Return the weights of model.safetensors as `fused_weights` takes them: as the parts of transformers' model.

    Layers are read as they are asked for, once.
    None if the file does not hold exactly those expected.
    """
    if (folder / "model.safetensors.index.json").exists():
        return None
    path, (ends, layers) = folder / "model.safetensors", _shapes(config)
    shapes = ends | {f"{prefix}{name}": shape for prefix, layer in layers.items() for name, shape in layer.items()}
    try:
        with safe_open(path, framework="pt") as file:
            if {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} != shapes:  # noqa: SIM118
                return None
        embedding = _read_part(path, ["weight"], config, "model.embed_tokens.")
        norm = _read_part(path, ["weight"], config, "model.norm.")
        head = _Part() if config.tie_word_embeddings else _read_part(path, ["weight"], config, "lm_head.")
    except (OSError, SafetensorError):
        return None
    dim = _head_size(config)
    theta = config.rope_parameters["rope_theta"]
    frequencies = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
    model = _Part(
        embed_tokens=embedding,
        norm=norm,
        layers=(_read_part(path, names, config, prefix) for prefix, names in layers.items()),
        rotary_emb=_Part(inv_freq=frequencies, attention_scaling=1.0),
    )
    return _Part(model=model, lm_head=head, config=config, device=torch.device("cpu"), dtype=config.dtype)


def _read_part(path: Path, names: Iterable[str], config: Config, prefix: str) -> Any:
    """Return weights by their names behind the prefix, as the parts of a module.

    They are views of the file as it is opened here: its pages leave memory with the last of them.
    """
    root = _Part()
    with safe_open(path, framework="pt") as file:
        for name in names:
            *steps, last = name.split(".")
            part = root
            for step in steps:
                part = vars(part).setdefault(step, _Part())
            setattr(part, last, file.get_tensor(prefix + name).to(config.dtype))
    return root


def _shapes(config: Config) -> tuple[dict[str, tuple[int, ...]], dict[str, dict[str, tuple[int, ...]]]]:
    """Return the shapes of all weights: those outside of layers by name, and each layer's by its prefix."""
    hidden, inner, size = config.hidden_size, config.intermediate_size, _head_size(config)
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.model_type == "qwen2":
        layer |= {f"self_attn.{name}_proj.bias": (queries if name == "q" else keys,) for name in "qkv"}
    if config.model_type == "qwen3":
        layer |= {f"self_attn.{name}_norm.weight": (size,) for name in "qk"}
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        ends["lm_head.weight"] = (config.vocab_size, hidden)
    return ends, {f"model.layers.{number}.": layer for number in range(config.num_hidden_layers)}


def _head_size(config: Config) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def _is_finite(fused: FusedWeights) -> bool:
    """Return whether all weights are finite. A row of int8 that holds another value has NaN as its scale."""
    floats = [fused.norm]
    products = [fused.head]
    for layer in fused.layers:
        floats += [
            norm for norm in (layer.attention_norm, layer.q_norm, layer.k_norm, layer.mlp_norm) if norm is not None
        ]
        products += [layer.qkv, layer.o, layer.gate_up, layer.down]
    for product in products:
        assert isinstance(product, Int8Product)
        floats += [product.scale] if product.bias is None else [product.scale, product.bias]
    return all(bool(torch.isfinite(values).all()) for values in floats)


_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_HARMLESS = {
    *("backend", "chat_template", "clean_up_tokenization_spaces", "errors", "is_local", "local_files_only"),
    *("model_max_length", "tokenizer_class", *_SPECIAL),
}
"""Settings of tokenizer_config.json that change no ids, or that are read below. Others must be off."""


_CLASSES = ("GPT2Tokenizer", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "TokenizersBackend")
"""Classes whose ids are those of tokenizer.json."""


def read_tokenizer(source: ModelSource) -> "FileTokenizer | None":
    """Return the tokenizer of a folder's tokenizer.json, or None if its ids may depend on more than this file."""
    folder = Path(source.location)
    settings = read_json_object(folder / "tokenizer_config.json") or {}
    if not _is_known(settings) or any(
        (folder / name).exists()
        for name in ("added_tokens.json", "special_tokens_map.json", "additional_chat_templates")
    ):
        return None
    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # it raises no class of its own
        return None
    special = {name: settings[name] for name in _SPECIAL if settings.get(name) is not None}
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    if (
        not isinstance(backend.decoder, decoders.ByteLevel)
        or backend.truncation is not None
        or backend.padding is not None
        or getattr(backend.model, "dropout", None)
        or not all(text in added and _is_literal(added[text]) for text in special.values())
    ):
        return None
    if "add_bos_token" in settings or "add_eos_token" in settings:  # transformers then replaces the file's own
        backend.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    found, template = folder / "chat_template.jinja", settings.get("chat_template")
    if found.is_file():
        text = found.read_text(encoding="utf-8")
        if template not in (None, text):
            return None
        template = text
    return FileTokenizer(backend, special, template, lambda: load_tokenizer(source))


def _is_known(settings: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer_config.json only adds the special tokens' roles to tokenizer.json."""
    return (
        settings.get("tokenizer_class") in _CLASSES
        # Where a role is not named, transformers may take the class's own token.
        and settings.keys() >= {*_SPECIAL}
        and not any(value for name, value in settings.items() if name not in _HARMLESS)
        and all(isinstance(settings.get(name), str | None) for name in (*_SPECIAL, "chat_template"))
    )


def _is_literal(token: Any) -> bool:
    return token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)


class FileTokenizer:
    """A tokenizer read from tokenizer.json alone. What it cannot do, transformers' tokenizer does."""

    def __init__(
        self,
        backend: Tokenizer,
        special: Mapping[str, str],
        chat_template: str | None,
        load_whole: "Callable[[], PreTrainedTokenizerBase]",
    ) -> None:
        """Keep the parts. special: special tokens by their roles. load_whole: loads transformers' tokenizer."""
        self.backend_tokenizer, self.special_tokens_map, self.chat_template = backend, dict(special), chat_template
        for role in _SPECIAL:
            text = special.get(role)
            setattr(self, role, text)
            setattr(self, f"{role}_id", None if text is None else backend.token_to_id(text))
        self._load_whole = cache(load_whole)

    @property
    def whole(self) -> "PreTrainedTokenizerBase":
        """The same tokenizer as transformers has it."""
        found = self._load_whole()
        found.chat_template = self.chat_template
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask for what may be missing
            raise AttributeError(name)
        return getattr(self.whole, name)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        """Return the ids of a text."""
        return {"input_ids": self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens by id."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None, **variables: Any
    ) -> str:
        """Return the conversation as the chat template renders it. variables: more that the template may read."""
        template = _compiled(self.chat_template) if isinstance(self.chat_template, str) else None
        if template is None or any(message.keys() & _REASONING for message in messages):
            return cast(str, self.whole.apply_chat_template(messages, tools=cast(Any, tools), **variables))
        present = [{name: value for name, value in message.items() if value is not None} for message in messages]
        given = {**self.special_tokens_map, "documents": None, **variables}
        return template.render(messages=present, tools=tools, **given)


_REASONING = {"reasoning_content", "thinking", "reasoning"}
"""Parts of a message that transformers gives to templates under several names."""
_OTHER_GLOBALS = {"cycler", "dict", "joiner", "lipsum", "namespace", "strftime_now"}


@cache
def _compiled(source: str) -> Template | None:
    """Return the template, or None if it uses what only transformers' sandbox has."""
    if variables_of(source) & _OTHER_GLOBALS:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals = {"range": environment.globals["range"], "raise_exception": _raise_exception}
    try:
        return environment.from_string(source)
    except (JinjaError, RecursionError):  # such as transformers' own tag
        return None


def _to_json(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    """Return JSON as transformers' filter does: Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def _raise_exception(message: str) -> None:
    raise JinjaError(message)
