"""Which engine decodes a model."""

from handspun.decoding.engines.base import Engine
from handspun.decoding.engines.fused import FusedEngine
from handspun.decoding.engines.transformers import TransformersEngine, truncation_unsupported_reason
from handspun.models.fused import fused_weights, fusing_unsupported_reason
from handspun.models.int8 import Int8Linear
from handspun.models.load import ChatModel


def fused_decoding_unsupported_reason(chat: ChatModel) -> str | None:
    """Why a model is decoded through transformers' own forward; None if it need not be."""
    if chat.in_training:
        return "its weights are being trained, and stay where they are"
    if chat.fused is None and any(isinstance(module, Int8Linear) for module in chat.model.modules()):
        return "its frozen layers are int8, and with adapters merged into them they would be float copies"
    return fusing_unsupported_reason(chat.model.config)


def make_engine(chat: ChatModel) -> Engine:
    """An engine without rows: the fused one where the model is of a kind that it knows."""
    assert not chat.model.training, "decoding needs a model in eval mode"
    if chat.fused is not None:
        return FusedEngine(chat.fused)
    if fused_decoding_unsupported_reason(chat) is None:
        return FusedEngine(fused_weights(chat.model))
    return TransformersEngine(chat.model)


def drafting_unsupported_reason(chat: ChatModel) -> str | None:
    """Why a draft could not be taken back from the model, or None if it could."""
    return (
        None
        if fused_decoding_unsupported_reason(chat) is None
        else truncation_unsupported_reason(chat.model.config)
    )
