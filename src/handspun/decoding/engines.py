"""Which engine decodes a model."""

from handspun.decoding.engine import Engine
from handspun.decoding.lean_engine import LeanEngine
from handspun.decoding.transformers_engine import TransformersEngine
from handspun.models.lean import cannot_be_lean, lean_model
from handspun.models.load import ChatModel


def make_engine(chat: ChatModel) -> Engine:
    """An engine without rows: the lean one where the model is of a kind that it knows."""
    assert not chat.model.training, "decoding needs a model in eval mode"
    if chat.lean is not None:
        return LeanEngine(chat.lean)
    if cannot_be_lean(chat.model.config) is None:
        return LeanEngine(lean_model(chat.model))
    return TransformersEngine(chat.model)


__all__ = ["make_engine"]
