"""Choose the engine that decodes a model."""

from handspun.decoding.engines.base import Engine
from handspun.decoding.engines.fused import FusedEngine
from handspun.models.fused import fused_weights, fusing_unsupported_reason
from handspun.models.int8 import Int8Linear
from handspun.models.load import ChatModel


def fused_decoding_unsupported_reason(chat: ChatModel) -> str | None:
    """Return why the fused engine cannot decode a model, or None if it can."""
    # Fusing moves weights into larger arrays, which would disturb the training that owns them.
    if chat.in_training:
        return "its weights are being trained and must not be moved"
    if chat.fused is None and any(isinstance(module, Int8Linear) for module in chat.model.modules()):
        return "its frozen layers are int8; merging adapters into them would need float copies"
    return fusing_unsupported_reason(chat.model.config)


def make_engine(chat: ChatModel, kv_tokens: int | None = None) -> Engine:
    """Return an engine without rows: the fused one if it supports the model.

    kv_tokens: the fixed size of the fused engine's KV cache; None for one that grows.
    """
    assert not chat.model.training, "decoding needs a model in eval mode"
    if chat.fused is not None:
        return FusedEngine(chat.fused, kv_tokens)
    if fused_decoding_unsupported_reason(chat) is None:
        return FusedEngine(fused_weights(chat.model), kv_tokens)
    from handspun.decoding.engines.transformers import TransformersEngine  # imports transformers

    return TransformersEngine(chat.model)


def drafting_unsupported_reason(chat: ChatModel) -> str | None:
    """Return why rejected draft tokens cannot be removed from the KV cache, or None if they can."""
    if fused_decoding_unsupported_reason(chat) is None:
        return None
    from handspun.decoding.engines.transformers import truncation_unsupported_reason  # imports transformers

    return truncation_unsupported_reason(chat.model.config)
