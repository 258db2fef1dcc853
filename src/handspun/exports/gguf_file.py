"""Write a model as a GGUF file, which llama.cpp and the tools built on it open.

Names of tensors and metadata come from llama.cpp's own package `gguf`. For Llama, rows of q and k are reordered:
llama.cpp rotates adjacent pairs, while transformers rotates the first half of a head with the second.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from handspun import __version__
from handspun.config import GgufType
from handspun.display import logger
from handspun.errors import ModelError
from handspun.exports.gguf_tokenizer import ANOTHER_WAY, left_out, write_tokenizer
from handspun.models.load import ChatModel

_ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
_WRITTEN_BY = "handspun.version"
"""The metadata key by which `is_written_here` recognizes our files."""
_BLOCK = 32
"""Number of values that share a scale in q8_0, q5_0 and q4_0."""
_QUANTIZED = (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q4_0)


def write_gguf(chat: ChatModel, path: Path, kind: GgufType) -> None:
    """Write the file, with matrices in the given type and vectors in float32.

    Tensors are converted one at a time, so memory holds the model and one extra tensor.

    Args:
        chat: The model, in float32.
        path: File to write.
        kind: Type of the matrices.

    Raises ModelError for a model that llama.cpp would compute differently.
    """
    architecture = _architecture(chat)
    tensors = list(_tensors(chat, architecture, kind))
    writer = GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture])
    _write_config(writer, chat, kind)
    write_tokenizer(writer, chat, _vocab_size(chat))
    for note in left_out(chat):
        logger.warning(f"not in the file: {note}")
    for name, tensor, dtype in tensors:
        shape, numpy_dtype = _layout(tensor, dtype)
        size = int(np.prod(shape)) * np.dtype(numpy_dtype).itemsize
        writer.add_tensor_info(name, shape, np.dtype(numpy_dtype), size, raw_dtype=dtype)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor, dtype in tensors:
            writer.write_tensor_data(_values(name, _reorder(name, tensor, chat), dtype))
    finally:
        writer.close()


def is_written_here(path: Path) -> bool:
    """Return whether a file's metadata says that `write_gguf` wrote it."""
    try:
        return path.is_file() and not path.is_symlink() and _WRITTEN_BY in gguf.GGUFReader(path).fields
    except Exception:  # the reader may raise anything on a file of another kind
        return False


def _architecture(chat: ChatModel) -> MODEL_ARCH:
    """Return llama.cpp's architecture. Raises ModelError for a model that llama.cpp may compute differently."""
    config = chat.model.config
    rope = getattr(config, "rope_parameters", None) or {}
    reason = None
    if config.model_type not in _ARCHITECTURES:
        reason = f"its architecture is {config.model_type}; --gguf writes {', '.join(_ARCHITECTURES)}"
    elif rope.get("rope_type", "default") != "default":
        reason = f"its rotary embedding is scaled ({rope['rope_type']})"
    elif set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"} or (
        config.model_type == "mistral" and config.sliding_window is not None
    ):
        reason = "it has sliding windows"
    elif config.hidden_act != "silu":
        reason = f"its activation is {config.hidden_act}"
    if reason:
        raise ModelError(f"{chat.name} cannot be exported as GGUF: {reason}. {ANOTHER_WAY}")
    return _ARCHITECTURES[config.model_type]


def _write_config(writer: GGUFWriter, chat: ChatModel, kind: GgufType) -> None:
    config = chat.model.config
    head_size = _head_size(chat)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(chat.name).name)
    writer.add_string(_WRITTEN_BY, __version__)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(_vocab_size(chat))
    writer.add_file_type(_FILE_TYPES[kind])
    if kind.startswith("q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


_Written = tuple[str, Tensor, GGMLQuantizationType]


def _tensors(chat: ChatModel, architecture: MODEL_ARCH, kind: GgufType) -> Iterator[_Written]:
    """Yield each tensor's GGUF name, the model's tensor, and the type to write."""
    names = gguf.get_tensor_name_map(architecture, chat.model.config.num_hidden_layers)
    not_cut = []
    for name, tensor in chat.model.state_dict().items():
        if name == "lm_head.weight" and chat.model.config.tie_word_embeddings:
            continue
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None:
            raise ModelError(f"{chat.name} has a tensor that llama.cpp does not know: {name}. {ANOTHER_WAY}")
        dtype = GGMLQuantizationType.F32 if tensor.dim() == 1 else GGMLQuantizationType[kind.upper()]
        # The embedding, which often is the head too, suffers most from few bits.
        if written in ("token_embd.weight", "output.weight") and dtype in _QUANTIZED:
            dtype = GGMLQuantizationType.Q8_0
        if dtype in _QUANTIZED and tensor.shape[-1] % _BLOCK:
            dtype = GGMLQuantizationType.F16
            not_cut.append(written)
        yield written, tensor, dtype
    if not_cut:
        logger.warning(
            f"f16 instead of {kind}, since row lengths are not multiples of {_BLOCK}: {', '.join(not_cut)}"
        )


def _layout(tensor: Tensor, dtype: GGMLQuantizationType) -> tuple[tuple[int, ...], Any]:
    """Return shape and type of the written array."""
    if dtype in _QUANTIZED:
        return tuple(gguf.quant_shape_to_byte_shape(tuple(tensor.shape), dtype)), np.uint8
    return tuple(tensor.shape), np.float16 if dtype == GGMLQuantizationType.F16 else np.float32


def _values(name: str, tensor: Tensor, dtype: GGMLQuantizationType) -> Any:
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    if dtype in _QUANTIZED:
        return gguf.quants.quantize(values, dtype)
    if dtype == GGMLQuantizationType.F16:
        if np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
            raise ModelError(f"{name} has values beyond float16's range. Use --gguf f32.")
        return values.astype(np.float16)
    return values


def _reorder(name: str, tensor: Tensor, chat: ChatModel) -> Tensor:
    """Return Llama's q and k with each head's halves interleaved, and any other tensor unchanged."""
    config = chat.model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or _ARCHITECTURES[config.model_type] != MODEL_ARCH.LLAMA:
        return tensor
    halves = tensor.view(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _head_size(chat: ChatModel) -> int:
    config = chat.model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _vocab_size(chat: ChatModel) -> int:
    embedding: Any = chat.model.get_input_embeddings()
    return int(embedding.weight.shape[0])
