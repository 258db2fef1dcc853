"""Decoding with transformers' own forward and cache: works for every architecture, slower than the fused engine.

Rows that are first fed together stay one left-padded batch, since a transformers cache has one length for all of
its rows. Drafts are padded on the right. Rejected draft tokens are masked. They leave the cache once no row of the
batch keeps a token in their positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from handspun.decoding.engines.base import ModelInput
from handspun.errors import ModelError


@dataclass
class Batch:
    """Rows that were first fed together."""

    cache: DynamicCache
    attention_mask: Tensor
    """(rows, length), 0 where padded."""


@dataclass
class Row:
    """A row's batch and its index there, once it has been fed."""

    batch: Batch | None = None
    place: int = 0


@dataclass
class TransformersEngine:
    """An `Engine` around a transformers model. A call feeds either all remaining rows of a batch or none."""

    model: PreTrainedModel
    _rows: dict[int, Row] = field(default_factory=dict)
    _next_row: int = 0

    def add(self, tokens: int = 0) -> int:  # noqa: ARG002  # its cache reserves nothing
        """Add an empty row and return its id."""
        return self._register(Row())

    def fork(self, row: int, tokens: int = 0) -> int:  # noqa: ARG002
        """Add a row that continues from this one's tokens and return its id."""
        return self._register(Row(self._rows[row].batch, self._rows[row].place))

    @torch.inference_mode()
    def truncate(self, row: int, length: int) -> None:
        """Mask all but the row's first `length` tokens."""
        batch, place = self._rows[row].batch, self._rows[row].place
        assert batch is not None
        mask = batch.attention_mask[place]
        mask[mask.cumsum(-1) > length] = 0

    def free(self, row: int) -> None:
        """Delete the row."""
        del self._rows[row]

    @torch.inference_mode()
    def forward(self, feeds: Sequence[ModelInput]) -> Tensor:
        """Append tokens to rows. Return logits, (tokens requested, vocab), float32, in the order of feeds."""
        assert not any(feed.mask is not None or feed.positions is not None for feed in feeds)
        logits: dict[int, Tensor] = {}

        def batch_of(feed: ModelInput) -> tuple[int, bool]:
            batch = self._rows[feed.row].batch
            return id(batch), batch is None and feed.all_logits  # new rows that differ in this are two batches

        for _, some in groupby(sorted(feeds, key=batch_of), key=batch_of):
            together = list(some)
            logits |= zip((feed.row for feed in together), self._feed(together), strict=True)
        return torch.cat([logits[feed.row] for feed in feeds])

    def _register(self, row: Row) -> int:
        number, self._next_row = self._next_row, self._next_row + 1
        self._rows[number] = row
        return number

    def _feed(self, feeds: Sequence[ModelInput]) -> list[Tensor]:
        """Feed rows of one batch, or new rows. Return each row's logits, (tokens requested, vocab)."""
        rows = [self._rows[feed.row] for feed in feeds]
        batch = rows[0].batch
        if batch is None:
            batch = Batch(DynamicCache(config=self.model.config), self._padding_mask(feeds)[:, :0])
        else:
            self._crop_unused(batch)
            self._arrange(batch, [row.place for row in rows])
        for place, row in enumerate(rows):
            row.batch, row.place = batch, place
        return self._forward(batch, feeds)

    def _crop_unused(self, batch: Batch) -> None:
        """Crop the last positions of the cache if no row keeps a token there."""
        unused = batch.attention_mask.shape[1] - (int(batch.attention_mask.any(0).nonzero()[-1]) + 1)
        if unused:
            batch.cache.crop(-unused)
            batch.attention_mask = batch.attention_mask[:, :-unused]

    def _arrange(self, batch: Batch, places: list[int]) -> None:
        """Make the batch these of its rows, in this order. A row may occur several times."""
        if places != list(range(len(batch.attention_mask))):
            chosen = torch.tensor(places, device=self.model.device)
            batch.cache.reorder_cache(chosen)  # type: ignore[arg-type]
            batch.attention_mask = batch.attention_mask[chosen]

    def _forward(self, batch: Batch, feeds: Sequence[ModelInput]) -> list[Tensor]:
        mask = self._padding_mask(feeds)
        before, longest = batch.attention_mask.shape[1], mask.shape[1]
        ids = torch.zeros_like(mask)
        ids[mask.bool()] = torch.tensor([token for feed in feeds for token in feed.token_ids], device=ids.device)
        batch.attention_mask = torch.cat([batch.attention_mask, mask], dim=1)
        positions = (batch.attention_mask.cumsum(-1) - 1).clamp_min(0)[:, before:]
        logits: Tensor = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=batch.attention_mask,
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=longest if feeds[0].all_logits else 1,
        ).logits
        if batch.cache.get_seq_length() != before + longest:
            raise ModelError(
                f"{type(self.model).__name__} does not store its keys and values in the cache passed to it, so it "
                "cannot be decoded. Use a decoder-only model such as Qwen2.5, Llama or SmolLM2."
            )
        counts = [len(feed.token_ids) if feed.all_logits else 1 for feed in feeds]
        return [row[:count].float() for row, count in zip(logits, counts, strict=True)]

    def _padding_mask(self, feeds: Sequence[ModelInput]) -> Tensor:
        """Return a mask, (rows, longest), 0 where an input is padded: on the left, or on the right for drafts."""
        counts = torch.tensor([len(feed.token_ids) for feed in feeds], device=self.model.device)
        places = torch.arange(int(counts.max()), device=self.model.device)
        mask = (places < counts[:, None]).long()
        return mask if feeds[0].all_logits else mask.flip(-1)


def truncation_unsupported_reason(config: PretrainedConfig) -> str | None:
    """Return why a model's rows cannot be truncated, or None if they can."""
    layers = DynamicCache(config=config).layers
    other = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    return f"some of its layers keep a {', '.join(other)} instead of all keys and values" if other else None
