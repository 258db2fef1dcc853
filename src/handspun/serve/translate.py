"""Turn a request's body into decoding's requests: check values, resolve options, compile constraints.

Tokenizer, template and grammars work in threads, so that the event loop goes on.
"""

import asyncio
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from handspun.config import GenerationOptions
from handspun.config.serving import ServeOptions
from handspun.config.typed import load_json
from handspun.data.json_shapes import exceeds_depth
from handspun.decoding.constraint import Constraint, Grammar, grammar_of, tool_call_grammar
from handspun.decoding.engines.choose import drafting_unsupported_reason
from handspun.decoding.options import SamplingParams, resolve
from handspun.decoding.processors import make_processors
from handspun.decoding.request import Request
from handspun.errors import ConfigError, HandspunError
from handspun.serve.errors import ApiError
from handspun.serve.schemas import SamplingBody, at_most
from handspun.serve.served import Context, ServedModel, find_model

if TYPE_CHECKING:
    from handspun.serve.worker import Ticket

_MAX_SCHEMA_DEPTH = 32
_MAX_STOP_CHARACTERS = 256
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_SAME_NAME = (
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "length_penalty"),
    *("early_stopping", "prompt_lookup_num_tokens"),
)
"""Fields that are options of decoding under the same name. Others are translated one by one."""
_OPTIONS = {option.name for option in fields(GenerationOptions)}
_FIELD_OF = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "num_return_sequences": "n",
}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an endpoint asks for besides the fields that all share."""

    is_chat: bool
    max_tokens: int | None = None
    allows_none: bool = False
    """Whether max_tokens may be 0: the prompt is only scored."""
    called_tools: Sequence[dict[str, Any]] = ()
    """If there are any, the answer must be a call of one of them."""
    several_calls: bool = True
    more_stop_strings: tuple[str, ...] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    best_of: int = 1
    answer_token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Requests that are ready for the worker."""

    model: ServedModel
    requests: list[Request]
    seeds: list[int]
    """One per prompt."""
    choices: int = 1
    """Answers per prompt that the client gets."""
    computed: int = 1
    """Answers per prompt that are computed: more with best_of, and one if all would be the same."""
    namespace: str | None = ""
    """Whose cached prompts may be used. None: nobody's."""

    @property
    def copies(self) -> int:
        """How often each computed answer is given."""
        return self.choices if self.computed < self.choices else 1

    @property
    def seed(self) -> int | list[int]:
        """The seed as the client is told it: one, or one per prompt."""
        return self.seeds[0] if len(set(self.seeds)) == 1 else self.seeds

    def submit(self, context: Context) -> "Ticket":
        """Hand the requests to the worker. Raises ApiError."""
        return context.worker.submit(self.model.name, self.requests, namespace=self.namespace)


async def prepare(
    context: Context, body: SamplingBody, wanted: Wanted, encode: Callable[[ServedModel], list[list[int]]]
) -> Prepared:
    """Return the requests of a body. Raises ApiError.

    Args:
        context: The models and limits.
        body: The fields that all endpoints share.
        wanted: What this one asks for besides.
        encode: Returns the ids of the prompts. It runs in a thread, and no other uses the tokenizer meanwhile.
    """
    model = find_model(context, body.model)
    limits = context.limits
    _check_shared(body, wanted, limits)
    constraints = _constraint_options(body, wanted, limits)

    def resolve_and_encode() -> tuple[SamplingParams, Grammar | None, list[list[int]]]:
        with model.lock:
            with as_api_errors(next(iter(constraints), None)):
                params = _resolve(
                    model, body, wanted, limits, {name: one for name, _, one in constraints.values()}
                )
                grammar = _grammar(model, params, wanted)
            return params, grammar, encode(model)

    params, grammar, prompts = await asyncio.to_thread(resolve_and_encode)
    if grammar is None:
        constraint = None
    else:
        param = next(iter(constraints), "tools")
        constraint = await _compiled(context, model, grammar, params, param)
    context_limits = [_new_tokens(model, len(ids), wanted, limits) for ids in prompts]
    seeds = _seeds(body.seed, len(prompts))
    context.log["seed"] = seeds if len(seeds) > 1 else seeds[0]
    params, computed = _with_answers(_with_ends(params, model, body), body, wanted)
    params = replace(params, seed=tuple(seeds))
    processors = make_processors(params, (), constraint)
    requests = [
        Request(
            prompt_token_ids=ids,
            options=params,
            vocabulary=model.vocabulary,
            max_new_tokens=limit,
            prompt_index=index,
            processors=processors,
            answer_token_ids=wanted.answer_token_ids,
            logprobs=wanted.logprobs or wanted.best_of > 1,
            top_logprobs=wanted.top_logprobs,
            prompt_logprobs=wanted.prompt_logprobs,
            explain=bool(body.explain),
            show_tree=bool(body.show_tree),
        )
        for index, (ids, limit) in enumerate(zip(prompts, context_limits, strict=True))
    ]
    return Prepared(
        model=model,
        requests=requests,
        seeds=seeds,
        choices=body.n or 1,
        computed=computed,
        namespace=_namespace(context, body),
    )


def _namespace(context: Context, body: SamplingBody) -> str | None:
    if body.cache_prompt is False:
        return None
    return f"{context.namespace}\n{body.cache_salt}" if body.cache_salt else context.namespace


def refuse(param: str, message: str) -> ApiError:
    """Return the error for a field's value. message: what is wrong, and what to do."""
    return ApiError(f"{param}: {message}", code="invalid_value", param=param)


@contextmanager
def as_api_errors(param: str | None) -> Iterator[None]:
    """Raise the errors of decoding as a client is told them. param: the field, if the message names no option."""
    try:
        yield
    except HandspunError as error:
        text = in_fields(str(error))
        first = re.match(r"\w+", text)
        is_field = first is not None and isinstance(error, ConfigError) and first[0] in _FIELDS
        raise ApiError(text, code="invalid_value", param=first[0] if first and is_field else param) from error


_OPTION = re.compile(r"(?<![\w-])(?:--)?([a-z]+(?:[_-][a-z]+)+|(?<=--)[a-z]+)(?![\w-])")
_FIELDS = {
    "logit_bias",
    "bad_words",
    "temperature",
    "max_tokens",
    "min_tokens",
    "stop",
    "n",
    *_SAMPLING,
    *_SAME_NAME,
}


def _field(option: str) -> str:
    name = option.replace("-", "_")
    return _FIELD_OF.get(name, name) if name in _OPTIONS else option


def in_fields(text: str) -> str:
    """Return a message about options, as the command line or Python spells them, in the fields of a request."""
    text = _OPTION.sub(lambda match: _field(match[1]), text)
    return re.sub(r"^prompt \d+(, message \d+)?(?= )", lambda match: (match[1] or ", the prompt")[2:], text)


def _check_shared(body: SamplingBody, wanted: Wanted, limits: ServeOptions) -> None:
    """Raise ApiError for values over the server's limits, and for fields that exclude each other."""
    most = min(limits.max_choices, limits.max_rows)
    at_most(body.n or 1, most, "n", "answers")
    at_most(wanted.best_of, most, "best_of", "answers")
    at_most(body.num_beams or 1, most, "num_beams", "beams")
    for text in _stop_strings(body):
        if not 1 <= len(text) <= _MAX_STOP_CHARACTERS:
            raise refuse("stop", f"a stop string has 1 to {_MAX_STOP_CHARACTERS} characters, got {len(text)}.")
    for key in body.logit_bias or ():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise refuse("logit_bias", 'its keys are token ids, as in {"42": -100}. Use /tokenize to find them.')
    if body.stream_options is not None and not body.stream:
        raise refuse("stream_options", "it needs stream: true.")
    beams = _beams(body)
    if body.explain and beams > 1:
        raise refuse("explain", "a beam search chooses among whole answers. Remove explain, or the beams.")
    if body.show_tree and beams == 1:
        raise refuse("show_tree", "it needs a beam search. Add num_beams.")
    sampling = [name for name in _SAMPLING if getattr(body, name) is not None]
    if beams > 1 and sampling and body.temperature != 0:
        raise refuse(
            sampling[0], "it only affects sampling, and a beam search does not sample. Remove one of them."
        )
    if beams > 1 and (body.n or 1) > beams:
        raise refuse("n", f"a beam search returns at most as many answers as it has beams ({beams}).")
    if body.use_beam_search and beams == 1:
        raise refuse("use_beam_search", "it needs num_beams (or n) of at least 2.")


def _beams(body: SamplingBody) -> int:
    return body.num_beams or ((body.n or 1) if body.use_beam_search else 1)


def _stop_strings(body: SamplingBody) -> list[str]:
    return [body.stop] if isinstance(body.stop, str) else body.stop or []


def _constraint_options(
    body: SamplingBody, wanted: Wanted, limits: ServeOptions
) -> dict[str, tuple[str, str, Any]]:
    """Return the constraint that a body asks for, by its field: the option, the field, and the option's value.

    There is at most one. Raises ApiError.
    """
    found: dict[str, tuple[str, str, Any]] = {}

    def add(param: str, option: str, value: Any) -> None:
        if value is not None:
            if option == "json_schema":
                value = _schema(value, param, limits)
            if option == "regex":
                at_most(len(value.encode()), 1024 * limits.max_regex_kb, param, "bytes")
            found[param] = (option, param, value)

    form = body.response_format
    if form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise ApiError(
                "response_format.json_schema is missing.",
                code="missing_required_parameter",
                param="response_format.json_schema",
            )
        add("response_format", "json_schema", form.json_schema.schema_)
    if form is not None and form.type == "json_object":
        add("response_format", "json_schema", {"type": "object"})
    outputs = body.structured_outputs
    if outputs is not None:
        for name, value in (("json", outputs.json_), ("regex", outputs.regex), ("choice", outputs.choice)):
            add(f"structured_outputs.{name}", "json_schema" if name == "json" else name, value)
    add("guided_json", "json_schema", body.guided_json)
    add("guided_regex", "regex", body.guided_regex)
    add("guided_choice", "choice", body.guided_choice)
    if len(found) + bool(wanted.called_tools) > 1:
        names = [*found, *(["tool_choice"] if wanted.called_tools else [])]
        raise refuse(names[0], f"{' and '.join(names)} exclude each other: each constrains the whole answer.")
    return found


def _schema(value: Any, param: str, limits: ServeOptions) -> dict[str, Any]:
    """Return a schema as an object, never as text: the text of an option may be the name of a file."""
    if isinstance(value, str):
        at_most(len(value.encode()), 1024 * limits.max_schema_kb, param, "bytes of a schema")
        try:
            value = load_json(value)
        except (ValueError, RecursionError):
            raise refuse(param, "the schema is not JSON.") from None
    if not isinstance(value, dict):
        raise refuse(param, "the schema is no object.")
    if exceeds_depth(value, _MAX_SCHEMA_DEPTH):
        raise refuse(param, f"the schema is nested more than {_MAX_SCHEMA_DEPTH} levels deep. Use $ref.")
    at_most(len(json.dumps(value).encode()), 1024 * limits.max_schema_kb, param, "bytes of a schema")
    return value


def _resolve(
    model: ServedModel, body: SamplingBody, wanted: Wanted, limits: ServeOptions, constraints: dict[str, Any]
) -> SamplingParams:
    """Return the options of one answer per prompt, before the client's own end tokens. Raises ConfigError."""
    values: dict[str, Any] = {name: getattr(body, name) for name in _SAME_NAME}
    # A model's settings never decide how many answers there are, or where they end.
    values |= {
        "max_new_tokens": max(1, min(wanted.max_tokens or limits.max_tokens, limits.max_tokens)),
        "min_new_tokens": body.min_tokens,
        "num_return_sequences": 1,
        "stop_strings": tuple(_stop_strings(body)) + wanted.more_stop_strings,
        "logit_bias": body.logit_bias,
        "bad_words": tuple(body.bad_words) if body.bad_words else None,
        **constraints,
    }
    if "choice" in constraints:
        values["choice"] = tuple(constraints["choice"])
    if wanted.max_tokens is not None and body.min_tokens is not None and body.min_tokens > wanted.max_tokens > 0:
        raise refuse("min_tokens", f"{body.min_tokens} is more than max_tokens {wanted.max_tokens}.")
    values |= _strategy(model, body)
    if values["prompt_lookup_num_tokens"] and (reason := drafting_unsupported_reason(model.chat)):
        raise refuse("prompt_lookup_num_tokens", f"this model cannot undo draft tokens: {reason}.")
    given = {name: value for name, value in values.items() if value is not None}
    if (body.min_tokens or 0) > given["max_new_tokens"]:
        given["min_new_tokens"] = given["max_new_tokens"]  # the server's limit ends the answer first
    params, _ = resolve(GenerationOptions(**given), model.chat, chat=wanted.is_chat)
    ends_freely = not (constraints or wanted.called_tools or body.ignore_eos)
    if wanted.is_chat and ends_freely:
        params = replace(params, stop_strings=(*params.stop_strings, model.chat.template.end_of_turn))
    return params


def _strategy(model: ServedModel, body: SamplingBody) -> dict[str, Any]:
    """Return the options that say how tokens are chosen."""
    if (beams := _beams(body)) > 1:
        return {"num_beams": beams}
    if body.temperature == 0:
        return {"temperature": 0.0}
    chosen = {name: getattr(body, name) for name in _SAMPLING}
    if chosen["top_k"] == -1:  # vLLM's spelling of off
        chosen["top_k"] = 0
    if all(value is None for value in chosen.values()):
        return {"do_sample": True if model.samples_by_default else None}
    return {**chosen, "do_sample": True}


def _grammar(model: ServedModel, params: SamplingParams, wanted: Wanted) -> Grammar | None:
    if wanted.called_tools:
        return tool_call_grammar(wanted.called_tools, model.chat.tokenizer, several=wanted.several_calls)
    return grammar_of(params)


async def _compiled(
    context: Context, model: ServedModel, grammar: Grammar, params: SamplingParams, param: str
) -> Constraint:
    """Return the constraint of a grammar. Raises ApiError, after a while too."""
    began = time.monotonic()

    def make() -> Constraint:
        with as_api_errors(param):
            return model.constraint(grammar, params)

    try:
        # The thread cannot be stopped, but the library's own limits end it soon.
        made = await asyncio.wait_for(asyncio.to_thread(make), context.limits.grammar_seconds)
    except TimeoutError:
        raise refuse(
            param, f"the constraint takes more than {context.limits.grammar_seconds:g} seconds to prepare."
        ) from None
    if context.metrics is not None:
        context.metrics.grammar_compiled(time.monotonic() - began)
    return made


def _with_ends(params: SamplingParams, model: ServedModel, body: SamplingBody) -> SamplingParams:
    """Return the options with the client's own end tokens, or without any."""
    beyond = [token for token in body.stop_token_ids or () if token >= model.token_ids]
    if beyond:
        raise refuse(
            "stop_token_ids", f"{beyond[0]} is beyond the model's token ids, which end at {model.token_ids - 1}."
        )
    eos = () if body.ignore_eos else params.eos_token_ids
    if body.ignore_eos and (params.json_schema or params.regex or params.choice):
        raise refuse("ignore_eos", "a constrained answer ends where its constraint does. Remove one of them.")
    return replace(params, eos_token_ids=tuple(dict.fromkeys((*eos, *(body.stop_token_ids or ())))))


def _with_answers(params: SamplingParams, body: SamplingBody, wanted: Wanted) -> tuple[SamplingParams, int]:
    """Return the options with the number of answers to compute, and that number."""
    choices = body.n or 1
    if params.num_beams > 1 and choices > params.num_beams:
        raise refuse(
            "n", f"the model's settings ask for a beam search of {params.num_beams} beams. Add num_beams."
        )
    is_one = params.num_beams == 1 and not params.do_sample  # all greedy answers are the same
    computed = 1 if is_one else max(choices, wanted.best_of)
    return replace(params, num_return_sequences=computed), computed


def _seeds(seed: int | None, prompts: int) -> list[int]:
    """Return a seed per prompt. One that is given counts for each prompt as if it were alone."""
    if seed is not None:
        return [seed % 2**64] * prompts
    return [secrets.randbits(53) for _ in range(prompts)]  # JavaScript's numbers hold 53 bits


def _new_tokens(model: ServedModel, prompt_tokens: int, wanted: Wanted, limits: ServeOptions) -> int:
    """Return the most tokens of an answer. Raises ApiError if the context is too short for one."""
    if wanted.max_tokens == 0 and not wanted.allows_none:
        raise refuse("max_tokens", "an answer has at least 1 token. Only echo goes without one.")
    limit = limits.max_tokens if wanted.max_tokens is None else min(wanted.max_tokens, limits.max_tokens)
    if model.context is None:
        return limit
    used = prompt_tokens + len(wanted.answer_token_ids)
    if used + min(limit, 1) > model.context:
        raise ApiError(
            f"the prompt has {used:,} tokens, and the model's context is {model.context:,} tokens for prompt and "
            f"answer together. Shorten it to at most {model.context - 1:,} tokens.",
            code="context_length_exceeded",
            param="prompt" if not wanted.is_chat else "messages",
            details={"n_prompt_tokens": used, "n_ctx": model.context},
        )
    return min(limit, model.context - prompt_tokens)
