"""Answer prompts: `generate` returns the answers, `stream` yields them as they grow.

Both check their arguments, make a `Request` per prompt, and hand these to the `Scheduler`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Unpack

from handspun.config import GenerationOptions, TemplateArgs, read_template_args
from handspun.decoding.arguments import CallOptions, GenerateArguments, read_arguments
from handspun.decoding.constraint import make_constraint
from handspun.decoding.engines.choose import drafting_unsupported_reason, fused_decoding_unsupported_reason
from handspun.decoding.options import SamplingParams, resolve
from handspun.decoding.processors import make_processors
from handspun.decoding.prompts import (
    Prompt,
    as_prompts,
    context_length,
    encode_prompts,
    rendered_already,
    said_in,
    unencodable_notice,
)
from handspun.decoding.request import Request
from handspun.decoding.results import GenerationChunk, GenerationResult
from handspun.decoding.scheduler import DEFAULT_LIMITS, BatchLimits, run
from handspun.decoding.text import vocabulary
from handspun.display import logger
from handspun.errors import ConfigError
from handspun.models.load import ChatModel

_SECONDS_BETWEEN_NOTICES = 10.0


def generate(
    model: ChatModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    options: GenerationOptions | None = None,
    **arguments: Unpack[GenerateArguments],
) -> list[GenerationResult]:
    """Return the answers to the prompts, in order. `handspun.generate` documents the arguments and errors."""
    chunks = stream(model, prompts, options=options, **arguments)
    return _in_order([chunk.result for chunk in chunks if chunk.result])


def stream(
    model: ChatModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    options: GenerationOptions | None = None,
    **arguments: Unpack[GenerateArguments],
) -> Iterator[GenerationChunk]:
    """Yield every answer's text as it grows. `handspun.stream` documents the arguments and errors."""
    call, own = read_arguments(options, arguments)
    requests = make_requests(model, prompts, own, call)
    limits = BatchLimits(rows=call.batch_size, tokens=call.max_batch_tokens)
    chunks = run(model, requests, limits, should_stop=call.should_stop)
    is_drafting = any(request.options.prompt_lookup_num_tokens for request in requests)
    return _with_draft_summary(chunks) if is_drafting else chunks


def make_requests(
    model: ChatModel, prompts: Prompt | Sequence[Prompt], options: GenerationOptions, call: CallOptions
) -> list[Request]:
    """Return a request per prompt. Raises ConfigError, DataError, TemplateError."""
    model = _with_template_args(model, call.template_args)
    resolved, notices = resolve(options, model, chat=call.chat)
    _check_supported(model, resolved, call)
    prompt_list = as_prompts(prompts)
    _check_seeds(resolved, len(prompt_list))
    encoded = encode_prompts(
        model, prompt_list, chat=call.chat, system_prompt=call.system_prompt, tools=call.tools,
        continue_final_message=call.continue_final_message,
    )  # fmt: skip
    notices += unencodable_notice(model, prompt_list, encoded, system_prompt=call.system_prompt)
    notices += rendered_already(model, prompt_list, chat=call.chat)
    limits = _new_token_limits(model, encoded, resolved.max_new_tokens, notices)
    constraint = make_constraint(resolved, model.tokenizer)
    common = Request(
        prompt_token_ids=[],
        options=resolved,
        vocabulary=vocabulary(model.tokenizer),
        max_new_tokens=resolved.max_new_tokens,
        processors=make_processors(resolved, tuple(call.processors), constraint),
        logprobs=call.logprobs,
        explain=call.explain,
        show_tree=call.show_tree,
        with_tools=bool(call.tools),
        on_prompt=prompt_progress(),
    )
    penalized = _penalized_ids(model, prompt_list, resolved, call)
    if reason := fused_decoding_unsupported_reason(model):
        notices.append(f"decoding with transformers' forward, which is slower: {reason}")
    for text in notices:
        logger.info(text)
    return [
        replace(common, prompt_token_ids=ids, max_new_tokens=limit, prompt_index=i, penalized_token_ids=counted)
        for i, (ids, limit, counted) in enumerate(zip(encoded, limits, penalized, strict=True))
    ]


def answer_all(
    model: ChatModel, requests: Sequence[Request], limits: BatchLimits = DEFAULT_LIMITS
) -> list[GenerationResult]:
    """Return the answers to requests: request by request, num_return_sequences per request."""
    return _in_order([chunk.result for chunk in run(model, requests, limits) if chunk.result])


def _in_order(results: list[GenerationResult]) -> list[GenerationResult]:
    return sorted(results, key=lambda result: (result.prompt_index, result.return_index))


def prompt_progress(clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """Return a `Request.on_prompt` that logs progress on a long prompt every ten seconds."""
    logged_at = clock()

    def on_prompt(done: int, total: int) -> None:
        nonlocal logged_at
        if clock() - logged_at >= _SECONDS_BETWEEN_NOTICES:
            logged_at = clock()
            logger.info(f"prefill: {done:,} of {total:,} prompt tokens")

    return on_prompt


def _check_supported(model: ChatModel, options: SamplingParams, call: CallOptions) -> None:
    """Raise ConfigError for options that exclude each other, or that the model does not support."""
    if call.explain and options.num_beams > 1:
        raise ConfigError(
            f"--explain shows how each token was chosen, but --num-beams {options.num_beams} chooses among whole "
            "answers. Remove one of the two options."
        )
    if call.show_tree and options.num_beams == 1:
        raise ConfigError("--show-tree needs a beam search: add --num-beams 2 or more.")
    if options.prompt_lookup_num_tokens and (reason := drafting_unsupported_reason(model)):
        raise ConfigError(
            f"--prompt-lookup-num-tokens must undo rejected draft tokens, which this model does not support: "
            f"{reason}. Remove the option."
        )


def _penalized_ids(
    model: ChatModel, prompts: list[Prompt], options: SamplingParams, call: CallOptions
) -> Sequence[list[int] | None]:
    """Return the tokens of each prompt that the repetition penalty counts; None counts all."""
    if not call.chat or options.repetition_penalty_exempt != "template":
        return [None] * len(prompts)
    return said_in(
        model, prompts, system_prompt=call.system_prompt, tools=call.tools,
        continue_final_message=call.continue_final_message,
    )  # fmt: skip


def _with_template_args(model: ChatModel, given: TemplateArgs | None) -> ChatModel:
    """Return the model with these template variables added to its own. Raises ConfigError."""
    args, problems = read_template_args(given)
    if problems:
        raise ConfigError(problems)
    return replace(model, template_args={**model.template_args, **args}) if args else model


def _with_draft_summary(chunks: Iterator[GenerationChunk]) -> Iterator[GenerationChunk]:
    """Yield the chunks, and say at the end how many draft tokens were accepted."""
    drafted = accepted = tokens = 0
    for chunk in chunks:
        if chunk.result is not None:
            drafted += chunk.result.drafted_tokens
            accepted += chunk.result.accepted_tokens
            tokens += len(chunk.result.token_ids)
        yield chunk
    logger.info(
        f"prompt lookup: {accepted:,} of {drafted:,} draft tokens were accepted; {tokens:,} tokens were generated"
    )


def _check_seeds(options: SamplingParams, prompts: int) -> None:
    if isinstance(options.seed, tuple) and len(options.seed) != prompts:
        raise ConfigError(
            f"--seed has {len(options.seed)} seeds for {prompts} prompts. Give one seed, or one per prompt."
        )


def _new_token_limits(
    model: ChatModel, prompts: list[list[int]], max_new_tokens: int, notices: list[str]
) -> list[int]:
    """Return the maximum number of new tokens per prompt. Adds a notice if the context limits it."""
    context = context_length(model)
    if context is None:
        return [max_new_tokens] * len(prompts)
    limits = [min(max_new_tokens, context - len(ids)) for ids in prompts]
    if limits and min(limits) < max_new_tokens:
        notices.append(
            f"max_new_tokens {max_new_tokens} is reduced to {min(limits)}: prompt and answer must fit into the "
            f"model's context of {context} tokens"
        )
    return limits
