"""Greedy decoding with llama.cpp, timed. Argument: a job (decoding.py) whose converted model is a GGUF file.

The prompts are read together, up to 512 tokens a call; then every call reads one token of each row.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp as llama
import numpy as np

from decoding import DecodingJob, Prompt, job_of_this_process, measure

TOKENS_A_CALL = 512


class Token(NamedTuple):
    """One that is to be read; the logits after it are computed only where they are wanted."""

    id: int
    position: int
    row: int
    logits: bool


class Reader:
    """A context of llama.cpp, and the batch that its calls are given."""

    def __init__(self, job: DecodingJob) -> None:
        self.job = job
        self.model = llama.llama_model_load_from_file(job.converted.encode(), llama.llama_model_default_params())
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.context = llama.llama_init_from_model(self.model, self._parameters())
        self.batch = llama.llama_batch_init(TOKENS_A_CALL, 0, 1)

    def _parameters(self) -> Any:
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = max(
            sum(len(prompt.ids) + self.job.new_tokens for prompt in batch) for batch in self.job.batches
        )
        parameters.n_batch = parameters.n_ubatch = TOKENS_A_CALL
        parameters.n_threads = parameters.n_threads_batch = self.job.threads
        parameters.n_seq_max = max(len(batch) for batch in self.job.batches)
        parameters.kv_unified = True
        return parameters

    def forget(self) -> None:
        """The next tokens are those of new rows."""
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def read(self, tokens: list[Token]) -> list[int]:
        """The most probable next token wherever logits are wanted, in the order of the tokens."""
        chosen = []
        for start in range(0, len(tokens), TOKENS_A_CALL):
            part = tokens[start : start + TOKENS_A_CALL]
            self._fill(part)
            if llama.llama_decode(self.context, self.batch):
                raise SystemExit(f"llama.cpp could not read {len(part)} tokens")
            chosen += [self._next_token(place) for place, token in enumerate(part) if token.logits]
        return chosen

    def _fill(self, tokens: list[Token]) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token.id, token.position, token.logits
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, token.row

    def _next_token(self, place: int) -> int:
        logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(self.context, place), (self.vocabulary,))
        logits[self.job.end_ids] = -np.inf
        return int(logits.argmax())


def main() -> None:
    job = job_of_this_process()
    reader = Reader(job)
    measure(
        job,
        lambda batch: decode(reader, batch, job),
        lambda prompt, came: decode(reader, [prompt], job, came),
        engine=f"llama.cpp (llama-cpp-python {llama.__version__})",
        weights=Path(job.converted).name,
        bytes_a_token=Path(job.converted).stat().st_size,
    )


def decode(
    reader: Reader, batch: list[Prompt], job: DecodingJob, came: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """Greedy. came: called at every step."""
    assert job.beams == 1
    reader.forget()
    chosen = reader.read([token for row, prompt in enumerate(batch) for token in tokens_of(prompt, row)])
    came()
    answers = [[token] for token in chosen]
    for step in range(job.new_tokens - 1):
        chosen = reader.read(
            [Token(answer[-1], len(batch[row].ids) + step, row, True) for row, answer in enumerate(answers)]
        )
        came()
        for answer, token in zip(answers, chosen, strict=True):
            answer.append(token)
    return answers


def tokens_of(prompt: Prompt, row: int) -> list[Token]:
    """Only after the last one are logits wanted."""
    last = len(prompt.ids) - 1
    return [Token(token, position, row, position == last) for position, token in enumerate(prompt.ids)]


if __name__ == "__main__":
    main()
