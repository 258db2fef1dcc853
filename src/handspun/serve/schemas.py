"""Bodies of requests, as pydantic models: every field, its range, and the reason why some are refused.

A field that is not there is an error, which names the nearest one. Of the limits that are options of the server,
those of many members (messages, stop strings...) are checked before a body is read, others where it is translated.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from handspun.config.serving import ServeOptions
from handspun.config.typed import short
from handspun.serve.errors import ApiError

_MOST_NAMED = 5
_MOST_EXPLAINED = 200
"""Each error of a body takes a while to put into words, and one body can have a hundred thousand."""
_MOST = 10**9


def _whole(value: Any) -> Any:
    # JSON has one kind of number: 8.0 is as whole as 8.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole)]
Probability = Annotated[float, Field(gt=0, le=1)]
Ignored = Annotated[Any, Field(description="Accepted, and without effect.")]
TokenId = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=_MOST)]
Name = Annotated[str, Field(min_length=1, max_length=128)]


class Body(BaseModel):
    """A JSON object without unknown members."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextPart(Body):
    """A part of a message's content. Only text is understood."""

    type: Literal["text"]
    text: str


class RefusalPart(Body):
    """A refusal in an assistant's message, as OpenAI's clients send it back."""

    type: Literal["refusal"]
    refusal: str


class CalledFunction(Body):
    """The function of a tool call."""

    name: Name
    arguments: str = Field(description="JSON text of an object.")
    parsed_arguments: Ignored = None


class ToolCall(Body):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Ignored = None


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | RefusalPart] | None = None
    tool_calls: list[ToolCall] | None = Field(None, description="Of an assistant's message.")
    tool_call_id: str | None = Field(None, description="Of a tool's message.")
    name: str | None = Field(None, description="Of a tool's message: the function. Otherwise without effect.")
    reasoning_content: str | None = Field(None, description="Of an assistant's message.")
    refusal: str | None = None
    annotations: Ignored = None
    parsed: Ignored = None
    audio: None = None
    function_call: None = None


class Function(Body):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of its arguments.")
    strict: Ignored = None


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """The name of a function."""

    name: Name


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: FunctionName


class JsonSchema(Body):
    """A JSON schema that answers are held to, strict or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: Ignored = None


class ResponseFormat(Body):
    """The form of answers."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """One of several constraints on the whole answer."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema, or its text.")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None


class StreamOptions(Body):
    """What a stream contains besides the answers."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class SamplingBody(Body):
    """The fields that chat and plain completions share."""

    model: str | None = Field(None, description="A served model. It may be left out if there is only one.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[Int, Field(ge=-1, le=_MOST)] | None = Field(None, description="0 or -1: off.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    no_repeat_ngram_size: Annotated[Int, Field(ge=0, le=_MOST)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="By token id."
    )
    bad_words: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=1024)] | None
    ) = None
    seed: Annotated[Int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="If not given, one is drawn and told in the answer."
    )
    n: Annotated[Int, Field(ge=1)] | None = None
    max_tokens: Annotated[Int, Field(ge=0)] | None = None
    min_tokens: Annotated[Int, Field(ge=0, le=_MOST)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    num_beams: Annotated[Int, Field(ge=1)] | None = None
    use_beam_search: bool | None = None
    length_penalty: Annotated[float, Field(ge=-50, le=50)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    prompt_lookup_num_tokens: Annotated[Int, Field(ge=0, le=64)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    explain: bool | None = Field(None, description="Also say how each token was chosen.")
    show_tree: bool | None = Field(None, description="Also return the tree of the beam search.")
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="Only prompts with the same salt share what is cached."
    )
    cache_prompt: bool | None = Field(
        None, description="false: neither use nor keep anything in the prompt cache."
    )
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None


class PromptFields(Body):
    """What a chat prompt is made of."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: Annotated[list[Tool], Field(min_length=1)] | None = None
    continue_final_message: bool | None = Field(None, description="Go on with the last message, an assistant's.")
    add_generation_prompt: bool | None = None


class ChatRequest(SamplingBody, PromptFields):
    """Body of POST /v1/chat/completions."""

    max_completion_tokens: Annotated[Int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    answer_token_ids: list[TokenId] = Field(
        default_factory=list, description="The answer's first tokens: it goes on behind them."
    )
    modalities: list[Literal["text"]] | None = None
    return_progress: bool | None = Field(None, description="In a stream: tell how far a long prompt is read.")


class RowMessage(ChatMessage):
    """One message of a row."""

    weight: Annotated[int, BeforeValidator(_whole), Field(ge=0, le=1)] | None = Field(
        None, description="Of an assistant's message. 0: it is context, and not trained on."
    )


class RowRequest(Body):
    """A body of /collect: a row to train on, in the format `messages`."""

    messages: Annotated[list[RowMessage], Field(min_length=1)]
    tools: Annotated[list[Tool], Field(min_length=1)] | None = None


class CompletionRequest(SamplingBody):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    echo: bool | None = Field(None, description="Put the prompt in front of the answers.")
    logprobs: Annotated[Int, Field(ge=0)] | None = None
    best_of: Annotated[Int, Field(ge=1)] | None = None
    suffix: None = None


class ExplainRequest(SamplingBody):
    """Body of POST /v1/explain: how the next token of an answer was, or would be, chosen."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None
    prompt: str | list[TokenId] | None = Field(None, description="Instead of messages: a text, or token ids.")
    answer_token_ids: list[TokenId] = Field(
        default_factory=list, description="The answer's tokens before the one to explain."
    )
    index: Annotated[Int, Field(ge=0, le=15)] = Field(0, description="Index of the answer among its choices.")
    is_chat: bool | None = Field(
        None, description="With token ids: whether they are a conversation (default: yes)."
    )


class ScoreRequest(PromptFields):
    """Body of POST /v1/score: how probable the tokens of an answer are, whoever wrote it."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None  # type: ignore[assignment]
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    prompt: str | list[TokenId] | None = Field(None, description="Instead of messages: a text, or token ids.")
    answer_token_ids: Annotated[list[TokenId], Field(min_length=1)]
    top_logprobs: Annotated[Int, Field(ge=0)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None


class TokenizeRequest(PromptFields):
    """Body of POST /tokenize."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None  # type: ignore[assignment]
    content: str | None = None
    add_special: bool | None = Field(None, description="With content: add what the tokenizer puts around a text.")
    with_pieces: bool | None = None


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000)]


class TemplateRequest(PromptFields):
    """Body of POST /apply-template."""

    model: str | None = None


class ResponseText(Body):
    """A part of an item's content."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Ignored = None
    logprobs: Ignored = None
    parsed: Ignored = None


class ResponseItem(Body):
    """An item of the conversation: a message, a function call, or its output."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    id: str | None = None
    status: Ignored = None
    phase: Ignored = None
    caller: Ignored = None
    namespace: Ignored = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ResponseText] | None = None
    call_id: str | None = None
    name: Name | None = None
    arguments: str | None = None
    parsed_arguments: Ignored = None
    output: str | list[ResponseText] | None = None


class ResponseTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Ignored = None


class ResponseToolName(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: Name


class ResponseTextFormat(Body):
    """The form of answers."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Ignored = None


class ResponseTextOptions(Body):
    """What is asked of an answer's text."""

    format: ResponseTextFormat | None = None
    verbosity: Ignored = None


class ResponsesRequest(Body):
    """Body of POST /v1/responses. Nothing is stored, so each request holds its whole conversation."""

    model: str | None = None
    input: str | Annotated[list[ResponseItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[Int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[Int, Field(ge=-1, le=_MOST)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[Int, Field(ge=-(2**63), lt=2**63)] | None = None
    top_logprobs: Annotated[Int, Field(ge=0)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolName | None = None
    parallel_tool_calls: bool | None = None
    text: ResponseTextOptions | None = None
    stream: bool | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    store: Ignored = None
    stream_options: Ignored = None
    reasoning: Ignored = None
    metadata: dict[str, str] | None = None
    user: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None


_NOT_SUPPORTED = {
    "chat_template": "a template from a request is never used. The model's own is.",
    "chat_template_kwargs": "variables of the template are set when the server starts.",
    "functions": "it has been replaced by tools.",
    "function_call": "it has been replaced by tool_choice and tool_calls.",
    "audio": "only text is understood.",
    "modalities": "only text is understood.",
    "web_search_options": "there is no web search.",
    "grammar": "use json, regex or choice.",
    "guided_grammar": "use guided_json, guided_regex or guided_choice.",
    "prediction": "use prompt_lookup_num_tokens.",
    "previous_response_id": "nothing is stored. Send the whole conversation as input.",
    "conversation": "nothing is stored. Send the whole conversation as input.",
    "background": "nothing is stored. Use stream.",
    "truncation": "prompts are never cut. Shorten the input.",
    "suffix": "text between a prompt and a suffix cannot be written.",
}
"""Fields of OpenAI's or vLLM's that are refused, with the reason."""

_MEDIA = ("image_url", "input_image", "image", "input_audio", "audio", "video_url", "file", "input_file")

_COUNTED = {
    "messages": ("max_messages", "messages"),
    "input": ("max_messages", "items"),
    "tools": ("max_tools", "tools"),
    "stop": ("max_stop_strings", "stop strings"),
    "logit_bias": ("max_logit_bias", "token ids"),
}
"""Fields with many members: the limit of each, an option of the server, and what is counted."""

Model = TypeVar("Model", bound=BaseModel)


def check_counts(value: Mapping[str, Any], limits: ServeOptions) -> None:
    """Raise ApiError for a field of more members than the server takes, before any of them is read."""
    for name, (option, what) in _COUNTED.items():
        if isinstance(found := value.get(name), list | dict):
            at_most(len(found), getattr(limits, option), name, what)


def at_most(value: int, most: int, param: str, what: str) -> None:
    """Raise ApiError if a value is over a limit of the server. what: is counted, as in "3 messages"."""
    if value > most:
        raise ApiError(
            f"{param}: {value:,} {what} are more than this server takes (expected at most {most:,}).",
            code="invalid_value",
            param=param,
        )


def read(model: type[Model], value: Any) -> Model:
    """Return a request's body. Raises ApiError, which names the wrong fields."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    problems = _most_specific([_problem(model, value, one) for one in errors[:_MOST_EXPLAINED]])
    path, _, code = problems[0]
    least = "at least " if len(errors) > _MOST_EXPLAINED else ""
    more = f" ({least}{len(problems) - _MOST_NAMED} more)" if len(problems) > _MOST_NAMED else ""
    message = " ".join(text for _, text, _ in problems[:_MOST_NAMED]) + more
    raise ApiError(message, code=code, param=path or None)


_Problem = tuple[str, str, str]
"""The field's path, what is wrong, and a code."""


def _problem(model: type[BaseModel], value: Any, error: ErrorDetails) -> _Problem:
    path = _path(value, error)
    name = str(error["loc"][-1]) if error["loc"] else ""
    if name in _NOT_SUPPORTED and error["type"] != "missing":
        return path, f"{path} is not supported: {_NOT_SUPPORTED[name]}", "unsupported_parameter"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, _names(model) if path == name else _all_names(model), 1)
        hint = f"Did you mean {near[0]}?" if near else "Remove it."
        return path, f"{path}: there is no such field. {hint}", "unknown_parameter"
    if name == "type" and error["input"] in _MEDIA:
        return path, f"{path}: only text is understood, and nothing is fetched. Remove the part.", "invalid_value"
    if error["type"] == "missing":
        return path, f"{path} is missing.", "missing_required_parameter"
    wanted = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    wanted = re.sub("^(?=greater|less)", "a value ", wanted)
    got = error["input"]
    found = f", got {short(got)}" if isinstance(got, bool | int | float) or got is None else ""
    return path, f"{path or 'the body'}: expected {wanted}{found}.", "invalid_value"


def _path(value: Any, error: ErrorDetails) -> str:
    """Return where the error is, as in messages[0].content. pydantic also names the members of unions."""
    path, has_ended = "", False
    for step in error["loc"]:
        is_last = step is error["loc"][-1] and error["type"] in ("missing", "extra_forbidden")
        if isinstance(value, Mapping) and not has_ended and (step in value or is_last):
            path += f".{step}" if path else str(step)
        elif isinstance(value, list) and isinstance(step, int):
            path += f"[{step}]"
        else:
            continue
        has_ended = is_last
        value = None if has_ended else value[step]
    return path


def _most_specific(problems: list[_Problem]) -> list[_Problem]:
    """Return a problem per field: of a union's members, those that fit best got furthest into the value."""
    deepest: dict[str, list[_Problem]] = {}
    for problem in problems:
        deepest.setdefault(problem[0].split(".")[0].split("[")[0], []).append(problem)
    found: list[_Problem] = []
    for several in deepest.values():
        longest = max(path.count(".") + path.count("[") for path, _, _ in several)
        best = [one for one in several if one[0].count(".") + one[0].count("[") == longest]
        by_path: dict[str, list[_Problem]] = {}
        for one in best:
            by_path.setdefault(one[0], []).append(one)
        found += [_joined(some) for some in by_path.values()]
    return found


def _joined(problems: list[_Problem]) -> _Problem:
    """Return one problem for the members of a union: expected X or Y."""
    path, _, code = problems[0]
    parts = [one[1].partition(": expected ") for one in problems]
    if len(problems) == 1 or any(not wanted for _, _, wanted in parts):
        return problems[0]
    wanted = [part[2].rpartition(", got")[0] or part[2].rstrip(".") for part in parts]
    got = parts[0][2].rpartition(", got")
    return path, f"{parts[0][0]}: expected {' or '.join(dict.fromkeys(wanted))}{''.join(got[1:]) or '.'}", code


def _names(model: type[BaseModel]) -> Iterable[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _all_names(model: type[BaseModel]) -> Iterable[str]:
    """Return the names of a body's fields and of those of the objects in it."""
    schema = model.model_json_schema()
    return {name for one in schema.get("$defs", {}).values() for name in one.get("properties", {})}
