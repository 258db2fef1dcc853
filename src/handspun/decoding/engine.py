"""The model as decoding sees it: a prefill, then one step after another, over rows that may come and go.

This one runs through transformers' own forward and its DynamicCache, so it serves every architecture.
"""

from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from handspun.errors import ModelError


class Engine:
    """Rows of tokens with their cache. `input_ids` and `attention_mask` hold all that was fed so far."""

    def __init__(self, model: PreTrainedModel) -> None:
        assert not model.training, "decoding needs a model in eval mode"
        self.model = model
        self.input_ids = torch.empty(0, 0, dtype=torch.long)  # (rows, length), left-padded
        self.attention_mask = torch.empty(0, 0, dtype=torch.long)  # (rows, length), 0 where padded
        self._cache = DynamicCache()

    def prefill(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Starts anew with these prompts, left-padded: (rows, length). Returns the last position's logits:
        (rows, vocab), float32."""
        self.input_ids, self.attention_mask = input_ids, attention_mask
        self._cache = DynamicCache(config=self.model.config)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)
        logits = self._forward(input_ids, position_ids)
        if self._cache.get_seq_length() != input_ids.shape[1]:
            raise ModelError(
                f"{type(self.model).__name__} does not keep its keys and values in the cache that it is "
                "given, so it cannot be decoded from. Use a decoder-only model such as Qwen2.5, Llama or SmolLM2."
            )
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Feeds one token a row: (rows,). Returns the next logits: (rows, vocab), float32."""
        ones = torch.ones_like(tokens)[:, None]
        self.input_ids = torch.cat([self.input_ids, tokens[:, None]], dim=-1)
        self.attention_mask = torch.cat([self.attention_mask, ones], dim=-1)
        position_ids = self.attention_mask.sum(-1, keepdim=True) - 1
        return self._forward(tokens[:, None], position_ids)

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from row rows[i]. A row may be named several times, or left out and so dropped."""
        self.input_ids = self.input_ids[rows]
        self.attention_mask = self.attention_mask[rows]
        self._cache.reorder_cache(cast(torch.LongTensor, rows))

    @torch.inference_mode()
    def _forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=self.attention_mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1].float()


__all__ = ["Engine"]
