"""Answers have the form that was asked for, whatever the model would rather say."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handspun.config import GenerationOptions
from handspun.decoding.constraint import make_constraint
from handspun.decoding.generate import generate, stream
from handspun.decoding.options import SamplingParams, resolve
from handspun.decoding.results import GenerationResult
from handspun.errors import ConfigError
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer

_TOKENIZER = tiny_tokenizer()  # 325 tokens, of which a head of 330 rows has five more
_EOS = 322
_CHAT = ChatModel(tiny_model("qwen2", eos_token_id=_EOS), _TOKENIZER, "tiny")
_PROMPTS = ["Hi", "Tell me a joke.", "What is the sum of the first numbers?"]
_MODES: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 3.0},
    {"num_beams": 3, "num_return_sequences": 2},
]


def _answers(prompts: Any = _PROMPTS, **options: Any) -> list[GenerationResult]:
    return generate(_CHAT, prompts, **{"max_new_tokens": 200, **options})


@st.composite
def _schemas(draw: st.DrawFn, depth: int = 2) -> dict[str, Any]:
    """Schemas whose every answer is short."""
    kinds = ["boolean", "null", "integer", "string", "enum"] + (["array", "object"] if depth else [])
    kind = draw(st.sampled_from(kinds))
    if kind == "integer":
        low = draw(st.integers(-50, 50))
        return {"type": "integer", "minimum": low, "maximum": low + draw(st.integers(0, 500))}
    if kind == "string":
        return {"type": "string", "maxLength": draw(st.integers(0, 5))}
    if kind == "enum":
        return {"enum": draw(st.lists(st.sampled_from(["red", 'a"b', 7, None, "色"]), min_size=1, unique=True))}
    if kind == "array":
        return {"type": "array", "items": draw(_schemas(depth - 1)), "maxItems": draw(st.integers(0, 2))}
    if kind == "object":
        properties = draw(st.dictionaries(st.sampled_from(["a", "b c", "ü"]), _schemas(depth - 1), max_size=2))
        return {
            "type": "object",
            "properties": properties,
            "required": sorted(properties),
            "additionalProperties": False,
        }
    return {"type": kind}


@settings(max_examples=25, deadline=None)
@given(_schemas(), st.sampled_from(_MODES), st.integers(0, 100))
def test_answers_are_json_of_the_schema(schema: Any, mode: dict[str, Any], seed: int) -> None:
    answers = _answers(json_schema=schema, seed=seed, max_new_tokens=400, **mode)
    assert answers
    for answer in answers:
        assert answer.finish_reason == "eos"
        jsonschema.validate(json.loads(answer.text), schema)


# No \s: it holds U+001C to U+001F for Python, and does not for llguidance, whose regular expressions are Rust's.
_REGEXES = st.recursive(
    st.sampled_from(["a", "joke", "[0-9]", "[a-f]", "你", r"\.", "[^ \\t\\n]", "\\n"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["?", "{1,3}", "{2}"])).map(lambda two: f"({two[0]}){two[1]}"),
    ),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(_REGEXES, st.sampled_from(_MODES), st.integers(0, 100))
def test_answers_match_the_regular_expression(regex: str, mode: dict[str, Any], seed: int) -> None:
    answers = _answers(_PROMPTS[:2], regex=regex, seed=seed, **mode)
    assert len(answers) >= 2
    for answer in answers:
        assert answer.finish_reason == "eos"
        assert re.fullmatch(regex, answer.text)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("ab$^.*/\\\"' \n-#&~|{([", min_size=1, max_size=5), min_size=1, unique=True))
def test_answers_are_one_of_the_choices_whatever_these_hold(choices: list[str]) -> None:
    for mode in ({}, {"num_beams": 2}):
        assert _answers(_PROMPTS[:1], choice=tuple(choices), **mode)[0].text in choices


def test_the_choice_is_the_most_probable_one_in_a_beam_search_over_all() -> None:
    choices = ("red", "blue", "green")
    [best, *_] = _answers(_PROMPTS[:1], choice=choices, num_beams=8, length_penalty=0.0, logprobs=True)
    prompt = best.prompt_token_ids
    scores = {}
    for text in choices:
        ids = [*_TOKENIZER(text)["input_ids"], _EOS]
        table = _CHAT.model(torch.tensor([prompt + ids])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        scores[text] = table.gather(1, torch.tensor(ids)[:, None]).sum().item()
    assert sum(best.logprobs) >= max(scores.values()) - 1e-4  # other ways to spell one may be as probable


def test_fewer_answers_than_beams_are_found_only_once() -> None:
    answers = _answers(_PROMPTS, choice=("yes", "no"), num_beams=6, num_return_sequences=4)
    for prompt in range(3):
        spelled = [tuple(answer.token_ids) for answer in answers if answer.prompt_index == prompt]
        assert len(spelled) == len(set(spelled)) >= 2
    assert {answer.text for answer in answers} == {"yes", "no"}


def test_an_answer_that_is_cut_off_says_so() -> None:
    [answer] = _answers(_PROMPTS[:1], regex="a{50}", max_new_tokens=5)
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 5)
    assert re.fullmatch("a+", answer.text)


def test_stop_strings_of_chats_do_not_cut_what_has_a_form() -> None:
    assert _answers(_PROMPTS[:1], choice=("x\nUser: y",))[0].text == "x\nUser: y"
    [cut] = _answers(_PROMPTS[:1], choice=("x\nUser: y",), stop_strings=("User",))
    assert (cut.text, cut.finish_reason) == ("x\n", "stop")


def test_rows_at_different_steps_have_their_own_states_and_lost_ones_are_made_again() -> None:
    constraint = make_constraint(SamplingParams(regex="ab*c", eos_token_ids=(_EOS,)), _TOKENIZER)
    a, b, c = (_TOKENIZER(letter)["input_ids"][0] for letter in "abc")
    logits = torch.zeros(4, 330)
    histories = [[], [a], [a, b, b], [a, b, c]]
    for rows in ([0, 1, 2, 3], [3, 0], [2], [2, 1, 0, 3]):
        allowed = constraint.apply(logits[: len(rows)], [histories[row] for row in rows]) == 0
        expected = {0: {a}, 1: {b, c}, 2: {b, c}, 3: {_EOS}}
        for row, mask in zip(rows, allowed, strict=True):
            assert {b, c, a, _EOS} & set(mask.nonzero()[:, 0].tolist()) == expected[row]
    assert not (constraint.apply(logits[:1], [[c]]) == 0).any()  # not a way to begin: no way on
    assert constraint.apply(torch.zeros(1, 300), [[a]]).shape == (1, 300)  # a head smaller than the vocabulary


def test_an_eos_is_allowed_only_where_the_answer_is_complete() -> None:
    constraint = make_constraint(SamplingParams(regex="a|aba", eos_token_ids=(_EOS, 320)), _TOKENIZER)
    a, b = (_TOKENIZER(letter)["input_ids"][0] for letter in "ab")
    for tokens, complete in ([], False), ([a], True), ([a, b], False), ([a, b, a], True):
        logits = constraint.apply(torch.zeros(1, 330), [tokens])[0]
        assert (logits[[_EOS, 320]] == 0).tolist() == [complete] * 2


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"json_schema": {"type": "intger"}}, "--json-schema .* cannot be used: Invalid type: intger"),
        ({"json_schema": {"type": "string", "minLength": 5, "maxLength": 2}}, "Unsatisfiable schema: minLength"),
        ({"json_schema": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "Unsatisfiable schema: incompat"),
        ({"json_schema": {"not": {}}}, "# has 'not', which is not enforced here"),
        ({"json_schema": '{"type": '}, "--json-schema is not JSON"),
        ({"json_schema": "nowhere.json"}, "--json-schema nowhere.json cannot be read.*Give a JSON schema"),
        ({"regex": "a(b"}, "--regex a.b cannot be used: .*unclosed group"),
        ({"regex": "(?=a)b"}, "look-around.* is not supported"),
        ({"regex": r"[^\s\S]"}, "no answer can match it"),
        ({"regex": "a", "choice": ("b",)}, "regex and choice exclude each other"),
        ({"regex": "a", "min_new_tokens": 9}, "--min-new-tokens, --regex together exclude every next token"),
        ({"regex": "a", "min_new_tokens": 9, "num_beams": 2}, "--min-new-tokens, --regex together exclude every"),
    ],
    ids=str,
)
def test_a_form_that_cannot_be_had_is_an_error_in_words(option: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        _answers(_PROMPTS[:1], **option)


def test_a_schema_can_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"enum": [7]}')
    assert _answers(_PROMPTS[:1], json_schema=str(tmp_path / "schema.json"))[0].text == "7"


def test_errors_of_a_stream_come_at_once() -> None:
    with pytest.raises(ConfigError, match="unclosed group"):
        stream(_CHAT, "Hi", regex="a(b")


def test_without_an_eos_nothing_could_end_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="--regex needs an end-of-sequence token"):
        generate(ChatModel(tiny_model("qwen2"), tokenizer, "tiny"), "a", chat=False, regex="a")


def _allows(schema: Any, text: str) -> bool:
    """Whether an answer may be this text, token by token."""
    options, _ = resolve(GenerationOptions(json_schema=schema), _CHAT, chat=False)
    constraint = make_constraint(options, _TOKENIZER)
    ids = [*_TOKENIZER(text)["input_ids"], _EOS]
    prefixes = [ids[:n] for n in range(len(ids))]
    rows = (constraint.apply(torch.zeros(1, 330), [prefix])[0] for prefix in prefixes)
    return all(float(row[token]) == 0 for row, token in zip(rows, ids, strict=True))


_HELD = [
    ({"type": "integer"}, "7", "1.5"),
    ({"type": ["integer", "null"]}, "null", '"x"'),
    ({"const": {"a": 1}}, '{"a":1}', '{"a":2}'),
    ({"enum": ["no", 7]}, '"no"', "false"),
    ({"enum": [1, 2], "minimum": 2}, "2", "1"),
    ({"type": "integer", "minimum": 3, "maximum": 12}, "10", "2"),
    ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, "0.5", "0.0"),
    ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, "4", "3"),
    ({"type": "integer", "multipleOf": 3}, "9", "4"),
    ({"type": "number", "multipleOf": 0.5}, "1.5", "0.3"),
    ({"type": "string", "minLength": 2, "maxLength": 3}, '"abc"', '"a"'),
    ({"type": "string", "maxLength": 1}, '"色"', '"ab"'),
    ({"type": "string", "pattern": "^a"}, '"ab"', '"ba"'),
    ({"type": "string", "pattern": "a$"}, '"ba"', '"ab"'),
    ({"type": "string", "pattern": "b", "minLength": 3}, '"abc"', '"ab"'),
    ({"type": "string", "pattern": "^(a|b)$"}, '"b"', '"ab"'),
    ({"type": "string", "format": "date"}, '"2024-02-29"', '"2024-02-31"'),
    ({"type": "string", "format": "time"}, '"12:00:00Z"', '"25:00:00Z"'),
    ({"type": "string", "format": "date-time"}, '"2024-01-31T12:00:00Z"', '"2024-01-31"'),
    ({"type": "string", "format": "uuid"}, '"12345678-1234-1234-1234-123456789abc"', '"123"'),
    ({"type": "string", "format": "email"}, '"a@b.de"', '"a.b.de"'),
    ({"type": "string", "format": "ipv4"}, '"1.2.3.4"', '"999.2.3.4"'),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2}, "[1,2]", "[]"),
    ({"type": "array", "prefixItems": [{"type": "integer"}], "items": False}, "[1]", "[1,2]"),
    ({"type": "array", "items": [{"type": "integer"}], "additionalItems": {"type": "null"}}, "[1,null]", "[1,2]"),
    ({"properties": {"a": {"type": "integer"}}}, '{"a":1}', '{"a":"x"}'),
    ({"properties": {"a": {"type": "integer"}}, "type": "object"}, '{"b":"x"}', '{"\\u0061":"x"}'),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, '{"a":1}', '{"a":"x"}'),
    ({"type": "object", "additionalProperties": False, "properties": {"a": True}}, '{"a":1}', '{"b":1}'),
    ({"type": "object", "required": ["a"]}, '{"a":1}', "{}"),
    ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}}, '{"xa":1}', '{"xa":"s"}'),
    ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}}, '{"xa":1}', '{"\\u0078a":"s"}'),
    ({"type": "object", "minProperties": 1}, '{"a":1}', "{}"),
    ({"type": "object", "maxProperties": 1}, '{"a":1}', '{"a":1,"b":2}'),
    ({"anyOf": [{"minimum": 3, "type": "integer"}, {"type": "null"}]}, "4", "1"),
    ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, "4", '"x"'),
    ({"allOf": [{"minimum": 3}, {"maximum": 5}], "type": "integer"}, "4", "6"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}, "[[],[]]", "[1]"),
    ({"$ref": "#/$defs/a", "minimum": 5, "$defs": {"a": {"type": "integer"}}}, "5", "4"),
    ({"properties": {"not": {"type": "integer"}}, "required": ["not"]}, '{"not":1}', '{"not":"x"}'),
    ({"title": "t", "x-order": 1, "$comment": "c", "default": {"if": 1}, "type": "null"}, "null", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "right", "wrong"), _HELD, ids=lambda value: json.dumps(value)[:60])
def test_a_keyword_that_is_taken_is_held_to(schema: Any, right: str, wrong: str) -> None:
    assert _allows(schema, right)
    assert not _allows(schema, wrong)


_NOT_HELD = [
    ({"not": {"type": "string"}}, "'not'"),
    ({"type": "object", "if": {}, "then": {}, "else": {}}, "'if'"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "'dependentRequired'"),
    ({"type": "object", "dependentSchemas": {"a": {}}}, "'dependentSchemas'"),
    ({"type": "object", "dependencies": {"a": ["b"]}}, "'dependencies'"),
    ({"type": "object", "propertyNames": {"pattern": "^x"}}, "'propertyNames'"),
    ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
    ({"type": "array", "contains": {"const": 1}, "minContains": 2}, "'contains'"),
    ({"type": "object", "unevaluatedProperties": False}, "'unevaluatedProperties'"),
    ({"$dynamicRef": "#a"}, "'\\$dynamicRef'"),
    ({"type": "string", "contentEncoding": "base64"}, "'contentEncoding'"),
    ({"type": "string", "nullable": True}, "'nullable'"),
    ({"type": "object", "x-guidance": {"lenient": True}, "not": {}}, "'x-guidance'"),
    ({"typ": "integer"}, "the keyword 'typ'.*Did you mean type"),
    ({"type": "integer", "Minimum": 3}, "the keyword 'Minimum'.*Did you mean minimum"),
    ({"properties": {"a": {"items": {"maxLenght": 3}}}}, "#/properties/a/items has the keyword 'maxLenght'"),
    ({"anyOf": [{}, {"enumm": []}]}, "#/anyOf/1 has the keyword 'enumm'"),
    ({"$defs": {"a": {"requird": []}}, "type": "null"}, "#/\\$defs/a has the keyword 'requird'"),
    ({"name": "n", "strict": True, "schema": {"type": "null"}}, 'Give the value of its "schema" key'),
    ({"type": "integer", "format": "int32"}, "on a type that is not a string"),
    ({"type": "string", "format": "regex"}, "Unknown format: regex"),
    ({"type": "object", "minProperties": 2}, "minProperties 2"),
    ({"type": "array", "items": {}, "additionalItems": False}, "additionalItems without a list of items"),
    ({"$schema": "http://json-schema.org/draft-04/schema#", "const": 3}, "const, which draft 4"),
    ({"$schema": "http://json-schema.org/draft-07/schema#", "prefixItems": [{}]}, "prefixItems, which its"),
    ({"$schema": "http://json-schema.org/draft-99/schema#"}, "is not a known draft"),
    ({"$ref": "http://example.com/a.json"}, "cannot be used"),
    ({"$ref": "#/$defs/none"}, "does not exist"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"enum": ["a\u0001b"]}, "with a control character, which answers cannot contain"),
    ({"type": "string", "pattern": "(a)\\1"}, "backreferences are not supported"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"properties": []}, "properties must be an object"),
    ({"type": "string", "minLength": "5"}, "minLength"),
    ({"enum": []}, "Unsatisfiable"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "words"), _NOT_HELD, ids=lambda value: json.dumps(value)[:60])
def test_a_keyword_that_would_not_be_held_to_is_refused_by_name(schema: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)--json-schema .*{words}"):
        _answers(_PROMPTS[:1], json_schema=schema)


def _nested(levels: int, kind: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema} if kind == "array" else {"enum": [[schema]]}
    return schema


@pytest.mark.parametrize("levels", [100, 300, 5_000])
@pytest.mark.parametrize("kind", ["array", "enum"])
def test_schemas_that_are_nested_deeply_are_one_error_or_held_to(levels: int, kind: str) -> None:
    schema = _nested(levels, kind)
    texts = [schema] if levels == 5_000 else [schema, json.dumps(schema)]
    for form in texts:
        try:
            assert _allows(form, "[" * levels + "1" + "]" * levels)
        except ConfigError as error:
            assert re.search("recursion limit|nested too deeply", str(error))  # noqa: PT017
        else:
            assert levels == 100


@pytest.mark.parametrize(
    "schema",
    [
        {"const": float("nan")},
        {"maximum": float("inf")},
        {"enum": ["\ud800"]},
        {"properties": {"\ud800": {}}},
        pytest.param({"const": {1, 2}}, id="a set"),
        {"const": b"x"},
        pytest.param({"description": object()}, id="an object of Python"),
        '{"const": NaN}',
        '{"const": 1e999}',
        '{"enum": ["\\ud800"]}',
        '{"a": 1, "a": 2}',
        "{",
        "[1]",
        "true",
    ],
    ids=str,
)
def test_schemas_that_are_no_json_are_one_error(schema: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--json-schema"):
        _answers(_PROMPTS[:1], json_schema=schema)
    if isinstance(schema, str):
        (tmp_path / "schema.json").write_text(schema)
        with pytest.raises(ConfigError, match=r"--json-schema .*schema\.json"):
            _answers(_PROMPTS[:1], json_schema=str(tmp_path / "schema.json"))


@pytest.mark.parametrize(
    ("regex", "words"),
    [
        ("a(?!b)", "look-around"),
        ("(?<=a)b", "look-around"),
        (r"(a)\1", "backreferences"),
        (r"\bfoo", "lookarounds not supported"),
        ("a^b", "lookarounds not supported"),
        ("(?>a)b", "unrecognized flag"),
        ("a{,3}", "repetition"),
        ("[z-a]", "invalid"),
        ("*a", "repetition"),
        ("a\ud800", "expected text that UTF-8 can encode"),
    ],
)
def test_what_regular_expressions_cannot_have_here_is_refused(regex: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)regex .*{words}"):
        _answers(_PROMPTS[:1], regex=regex)


@pytest.mark.parametrize(
    ("regex", "right"),
    [("^a$", "a"), ("a+?", "aa"), (r"\d{2}", "07"), (r"\p{Han}", "色"), ("(?i)yes", "YES"), (r"\Aab\z", "ab")],
)
def test_what_regular_expressions_may_have(regex: str, right: str) -> None:
    constraint = make_constraint(SamplingParams(regex=regex, eos_token_ids=(_EOS,)), _TOKENIZER)
    ids = [*_TOKENIZER(right)["input_ids"], _EOS]
    for place, token in enumerate(ids):
        assert constraint.apply(torch.zeros(1, 330), [ids[:place]])[0, token] == 0
