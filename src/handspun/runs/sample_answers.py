"""Greedy answers to a few prompts before, during, and after training, and exact matches on held-out rows."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from handspun.config import TrainConfig
from handspun.data.dataset import Dataset
from handspun.data.messages import Message
from handspun.data.preview import spread, spread_order
from handspun.decoding.generate import generate
from handspun.decoding.prompts import Prompt, encode_prompts
from handspun.display import captured_log
from handspun.errors import TemplateError
from handspun.evaluation.answers import Question, greedy_answers, is_right, question_of
from handspun.models.fused import unfuse_weights
from handspun.models.load import ChatModel
from handspun.training.loop import Event, Loop
from handspun.training.packed import attention_of

GREEDY_PROMPT = "Give me a brief introduction to Shanghai Jiao Tong University."
SAMPLING_PROMPT = "Tell me a joke about computers."
BEAM_PROMPT = "What is the sum of the first 100 natural numbers? Please think step by step."

MAX_NEW_TOKENS = 64
"""Of a sample answer."""
ROWS_SHOWN = 3
"""Rows whose prompts are the sample prompts, if the user gave none."""
MOST_ASKED = 200
"""Most held-out rows whose answers are compared with the expected ones: a share is then known to about 5 %."""
SHORT_ANSWER = 20
"""Most target tokens of an answer that a model can be expected to give word for word: a label, a name, a number.
Longer texts can be right in many words."""


@dataclass(frozen=True)
class SamplePrompt:
    """What is asked: a user's prompt, or a row's conversation up to its last answer.

    text: the last user message, which is shown. expected: the row's answer. source: what the row is.
    """

    text: str
    messages: list[Message]
    expected: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class SampleAnswer:
    """One answer. finish_reason is `generate`'s; "cancelled" if the time was up. expected: the row's answer."""

    prompt: str
    decoding: str
    text: str
    finish_reason: str
    expected: str | None = None


@dataclass(frozen=True)
class SampleAnswers:
    """Answers, prompt by prompt, and notes on defaults taken from generation_config."""

    answers: list[SampleAnswer]
    notes: list[str] = field(default_factory=list)


def sample_prompts(
    chat: ChatModel, config: TrainConfig, training: Dataset, held_out: Dataset | None
) -> list[SamplePrompt]:
    """Return the prompts that a run answers: the user's, or those of three held-out rows, else training rows."""
    if config.sample_prompts is not None:
        return [SamplePrompt(text, [{"role": "user", "content": text}]) for text in config.sample_prompts]
    for dataset, source in ((held_out, "held out"), (training, "trained on")):
        questions = questions_of(chat, config, dataset) if dataset is not None else []
        if questions:
            return [
                SamplePrompt(one.prompt, one.messages, one.expected, f"{one.file}, row {one.row}, {source}")
                for one in spread(questions, ROWS_SHOWN)
            ]
    return []


def rows_to_ask(dataset: Dataset) -> set[tuple[str, int]]:
    """Return at most 200 rows, evenly spaced, as (file, row number). Truncated rows are not among them."""
    truncated = {(note.file, note.row) for note in dataset.account.truncated}
    return {(one.file, one.row) for one in spread(dataset.examples, MOST_ASKED)} - truncated


def questions_of(chat: ChatModel, config: TrainConfig, dataset: Dataset) -> list[Question]:
    """Return the questions of the rows that may be asked. Tools, plain text and failures are left out."""
    asked, questions = rows_to_ask(dataset), list[Question]()
    how: dict[str, Any] = {"system_prompt": config.system_prompt, "role_map": config.roles, "chat": chat}
    for row in dataset.rows:
        if (row.file, row.number) in asked:
            # A template may render a conversation that is cut after its prompt in another way. Such a row can be
            # trained on, and not asked.
            with suppress(TemplateError, ValueError, IndexError):
                questions.append(question_of(row, dataset.account.formats, **how))
    return [question for question in questions if question.messages and not question.needs_tools]


def short_questions(chat: ChatModel, config: TrainConfig, held_out: Dataset | None) -> list[Question]:
    """Return held-out questions with short answers, to count exact matches on; none if most answers are longer.

    Each beginning of the list is evenly spaced, since time may not suffice for all.
    """
    questions = questions_of(chat, config, held_out) if held_out is not None else []
    short = [question for question in questions if question.trained_tokens <= SHORT_ANSWER]
    return [short[i] for i in spread_order(len(short))] if 2 * len(short) > len(questions) else []


def sample_answers(
    model: ChatModel,
    prompts: Sequence[SamplePrompt],
    *,
    system_prompt: str | None = None,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> SampleAnswers:
    """Return greedy answers of at most 64 tokens. What is not complete after `seconds` is "cancelled".

    Afterwards the model's weights are as before, in their own memory. Raises what `generate` raises.
    """
    end = clock() + seconds
    with captured_log() as lines:
        answers = _answers(model, prompts, system_prompt, should_stop=lambda: clock() > end)
    unfuse_weights(model.model)
    return SampleAnswers(answers, list(dict.fromkeys(lines)))


def _answers(
    model: ChatModel,
    prompts: Sequence[SamplePrompt],
    system_prompt: str | None,
    *,
    should_stop: Callable[[], bool],
) -> list[SampleAnswer]:
    results = generate(
        model,
        [prompt.messages for prompt in prompts],
        system_prompt=system_prompt,
        max_new_tokens=MAX_NEW_TOKENS,
        should_stop=should_stop,
        do_sample=False,
    )
    return [
        SampleAnswer(prompt.text, "greedy", result.text, result.finish_reason, prompt.expected)
        for prompt, result in zip(prompts, results, strict=True)
    ]


@dataclass(frozen=True)
class RowAnswer:
    """The answer to a row's prompt, and whether it matches what the row expects."""

    file: str
    row: int
    prompt: str
    expected: str
    text: str
    is_right: bool


def row_answers(
    model: ChatModel,
    questions: Sequence[Question],
    *,
    system_prompt: str | None = None,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[RowAnswer]:
    """Return the answers to short questions that are complete after `seconds`; weights as in `sample_answers`."""
    end = clock() + seconds
    with captured_log():
        results = greedy_answers(
            model,
            questions,
            system_prompt=system_prompt,
            max_new_tokens=max(question.trained_tokens for question in questions) + 1,
            batch_size=32,  # a step over 32 short answers takes little longer than one over 8
            should_stop=lambda: clock() > end,
        )
    unfuse_weights(model.model)
    return [
        RowAnswer(one.file, one.row, one.prompt, one.expected, result.text, is_right(one, result.text))
        for one, result in zip(questions, results, strict=True)
        if result.finish_reason != "cancelled"
    ]


_SECONDS = 30.0
"""Time limit for all answers after one step."""


@dataclass(frozen=True)
class Samples:
    """Greedy answers by the weights after a step, prompt by prompt."""

    step: int
    epoch: int
    answers: list[SampleAnswer]
    seconds: float


@dataclass(frozen=True)
class Sampler:
    """Answers prompts during a run, and leaves the model as it was: weights, mode, and attention.

    attention: the model's own, which a packed runner replaces.
    """

    chat: ChatModel
    prompts: list[SamplePrompt]
    system_prompt: str | None
    every: int
    attention: str
    clock: Callable[[], float] = time.perf_counter

    def is_due(self, event: Event, loop: Loop) -> bool:
        """Return whether the event is the last one of a step after which answers are wanted."""
        return loop.ends_step(event) and event.step > 0 and event.step % self.every == 0

    def after(self, event: Event) -> Samples:
        """Return answers of at most 64 tokens; "cancelled" after half a minute."""
        model, began = self.chat.model, self.clock()
        was_training = model.training
        model.eval()
        with captured_log(), attention_of(model, self.attention):
            answers = _answers(
                self.chat,
                self.prompts,
                self.system_prompt,
                should_stop=lambda: self.clock() - began > _SECONDS,
            )
        model.train(was_training)
        return Samples(event.step, event.epoch, answers, self.clock() - began)


def sampler_of(chat: ChatModel, config: TrainConfig, prompts: list[SamplePrompt]) -> Sampler | None:
    """Return the sampler that the config asks for.

    It is made before the runner, which changes the model's attention. Raises DataError or TemplateError for a
    prompt that cannot be answered.
    """
    if config.sample_every is None or not prompts:
        return None
    messages: list[Prompt] = [prompt.messages for prompt in prompts]
    encode_prompts(chat, messages, chat=True, system_prompt=config.system_prompt, tools=None)
    chat = replace(chat, in_training=True)
    return Sampler(
        chat, prompts, config.system_prompt, config.sample_every, chat.model.config._attn_implementation
    )
