"""What a beam search can show before it has ended: that with which every answer that it may still return begins.

Beams go on from beams, so what all of them begin with stays; a text that has been shown is never taken back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from handspun.decoding.answer import Answer, Job
from handspun.decoding.results import GenerationChunk, GenerationResult

_NEVER_EXCLUDE = {"repetition_penalty", "presence_penalty", "frequency_penalty", "min_new_tokens"}
"""Processors that leave every token, but for an eos, a finite logit."""


def agreed(answers: Sequence[Answer]) -> tuple[str, list[int]]:
    """The text and the tokens with which all of the answers begin. Texts may agree where tokens do not."""
    texts, ids = [answer.text.text for answer in answers], [answer.token_ids for answer in answers]
    return texts[0][: _shared_length(texts)], ids[0][: _shared_length(ids)]


def _shared_length(sequences: Sequence[Sequence[Any]]) -> int:
    """Of what all begin with: it is what the first and the last of them in order begin with."""
    first, last = min(sequences), max(sequences)  # type: ignore[type-var]
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


@dataclass
class BeamStream:
    """What has been streamed of one search's answers: the same of each that is streamed before the end."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    answers: int = 0
    """Of which it has been streamed: those with a return index below."""

    def grow(self, possible: Sequence[Answer]) -> list[GenerationChunk]:
        """What is new, for each answer that is sure to be returned. possible: all that may still be returned."""
        text, token_ids = agreed(possible)
        assert text.startswith(self.text), "what was shown is taken back"
        more, tokens = text[len(self.text) :], token_ids[len(self.token_ids) :]
        if not (more or tokens):
            return []
        prompt = possible[0].prompt_index
        self.text, self.token_ids, self.answers = text, token_ids, sure_answers(possible[0].job)
        return [
            GenerationChunk(prompt_index=prompt, return_index=number, text=more, token_ids=tokens)
            for number in range(self.answers)
        ]

    def finish(self, results: Sequence[GenerationResult]) -> list[GenerationChunk]:
        """The last chunk of each answer."""
        assert len(results) >= self.answers, "an answer was shown that there is not"
        return [self._last(result) for result in results]

    def _last(self, result: GenerationResult) -> GenerationChunk:
        text, tokens = (self.text, len(self.token_ids)) if result.return_index < self.answers else ("", 0)
        assert result.text.startswith(text), "what was shown is taken back"
        return GenerationChunk(
            prompt_index=result.prompt_index,
            return_index=result.return_index,
            text=result.text[len(text) :],
            token_ids=result.token_ids[tokens:],
            finish_reason=result.finish_reason,
            result=result,
        )


def sure_answers(job: Job) -> int:
    """How many answers to a prompt a search is sure to return. All that are asked for, if every beam has at least
    num_beams tokens to go on with; where tokens are excluded there may be fewer, but one."""
    vocabulary = job.model.model.config.get_text_config().vocab_size - len(job.options.eos_token_ids)
    is_sure = all(processor.name in _NEVER_EXCLUDE for processor in job.processors)
    return job.options.num_return_sequences if is_sure and vocabulary >= job.options.num_beams else 1


__all__ = ["BeamStream", "agreed", "sure_answers"]
