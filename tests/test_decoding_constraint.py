"""Answers have the form that was asked for, whatever the model would rather say."""

import json
import re

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handspun.decoding.constraint import make_constraint
from handspun.decoding.generate import generate, stream
from handspun.decoding.options import ResolvedOptions
from handspun.errors import ConfigError
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer

_TOKENIZER = tiny_tokenizer()  # 325 tokens, of which a head of 330 rows has five more
_EOS = 322
_CHAT = ChatModel(tiny_model("qwen2", eos_token_id=_EOS), _TOKENIZER, "tiny")
_PROMPTS = ["Hi", "Tell me a joke.", "What is the sum of the first numbers?"]
_MODES = [{}, {"do_sample": True, "temperature": 3.0}, {"num_beams": 3, "num_return_sequences": 2}]


def _answers(prompts=_PROMPTS, **options):
    return generate(_CHAT, prompts, notice=str, **{"max_new_tokens": 200, **options})


@st.composite
def _schemas(draw: st.DrawFn, depth: int = 2) -> dict:
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
def test_answers_are_json_of_the_schema(schema, mode, seed):
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
def test_answers_match_the_regular_expression(regex, mode, seed):
    answers = _answers(_PROMPTS[:2], regex=regex, seed=seed, **mode)
    assert len(answers) >= 2
    for answer in answers:
        assert answer.finish_reason == "eos"
        assert re.fullmatch(regex, answer.text)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text("ab$^.*/\\\"' \n-#&~|{([", min_size=1, max_size=5), min_size=1, unique=True))
def test_answers_are_one_of_the_choices_whatever_these_hold(choices):
    for mode in ({}, {"num_beams": 2}):
        assert _answers(_PROMPTS[:1], choice=tuple(choices), **mode)[0].text in choices


def test_the_choice_is_the_most_probable_one_in_a_beam_search_over_all():
    choices = ("red", "blue", "green")
    [best, *_] = _answers(_PROMPTS[:1], choice=choices, num_beams=8, length_penalty=0.0, logprobs=True)
    prompt = best.prompt_token_ids
    scores = {}
    for text in choices:
        ids = [*_TOKENIZER(text)["input_ids"], _EOS]
        table = _CHAT.model(torch.tensor([prompt + ids])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        scores[text] = table.gather(1, torch.tensor(ids)[:, None]).sum().item()
    assert sum(best.logprobs) >= max(scores.values()) - 1e-4  # other ways to spell one may be as probable


def test_fewer_answers_than_beams_are_found_only_once():
    answers = _answers(_PROMPTS, choice=("yes", "no"), num_beams=6, num_return_sequences=4)
    for prompt in range(3):
        spelled = [tuple(answer.token_ids) for answer in answers if answer.prompt_index == prompt]
        assert len(spelled) == len(set(spelled)) >= 2
    assert {answer.text for answer in answers} == {"yes", "no"}


def test_an_answer_that_is_cut_off_says_so():
    [answer] = _answers(_PROMPTS[:1], regex="a{50}", max_new_tokens=5)
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 5)
    assert re.fullmatch("a+", answer.text)


def test_stop_strings_of_chats_do_not_cut_what_has_a_form():
    assert _answers(_PROMPTS[:1], choice=("x\nUser: y",))[0].text == "x\nUser: y"
    [cut] = _answers(_PROMPTS[:1], choice=("x\nUser: y",), stop_strings=("User",))
    assert (cut.text, cut.finish_reason) == ("x\n", "stop")


def test_rows_at_different_steps_have_their_own_states_and_lost_ones_are_made_again():
    constraint = make_constraint(ResolvedOptions(regex="ab*c", eos_token_ids=(_EOS,)), _TOKENIZER)
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


def test_an_eos_is_allowed_only_where_the_answer_is_complete():
    constraint = make_constraint(ResolvedOptions(regex="a|aba", eos_token_ids=(_EOS, 320)), _TOKENIZER)
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
        ({"json_schema": {"not": {}}}, "Unimplemented keys"),
        ({"json_schema": '{"type": '}, "--json-schema is not JSON"),
        ({"json_schema": "nowhere.json"}, "--json-schema nowhere.json cannot be read.*Expected a JSON schema"),
        ({"regex": "a(b"}, "--regex a.b cannot be used: .*unclosed group"),
        ({"regex": "(?=a)b"}, "look-around.* is not supported"),
        ({"regex": r"[^\s\S]"}, "no answer can match it"),
        ({"regex": "a", "choice": ("b",)}, "--regex and --choice exclude each other"),
        ({"regex": "a", "min_new_tokens": 9}, "--min-new-tokens, --regex leave no token"),
        ({"regex": "a", "min_new_tokens": 9, "num_beams": 2}, "--min-new-tokens, --regex leave no token"),
    ],
    ids=str,
)
def test_a_form_that_cannot_be_had_is_an_error_in_words(option, words):
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        _answers(_PROMPTS[:1], **option)


def test_a_schema_can_be_a_file(tmp_path):
    (tmp_path / "schema.json").write_text('{"enum": [7]}')
    assert _answers(_PROMPTS[:1], json_schema=str(tmp_path / "schema.json"))[0].text == "7"


def test_errors_of_a_stream_come_at_once():
    with pytest.raises(ConfigError, match="unclosed group"):
        stream(_CHAT, "Hi", regex="a(b", notice=str)


def test_without_an_eos_nothing_could_end_the_answer():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="--regex needs an end-of-sequence token"):
        generate(ChatModel(tiny_model("qwen2"), tokenizer, "tiny"), "a", chat=False, regex="a", notice=str)
