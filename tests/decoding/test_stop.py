"""Text from tokens: unfinished characters, stop strings across boundaries, nothing held back needlessly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from handspun.decoding.text import ByteDetokenizer, StreamingText, Vocabulary, WindowDetokenizer, vocabulary
from tiny import tiny_tokenizer

_TOKENIZER = tiny_tokenizer()
_WORDS = vocabulary(_TOKENIZER)
_IM_END, _TOOL_CALL = 322, 323


def _ids(text: str) -> list[int]:
    ids: list[int] = _TOKENIZER(text)["input_ids"]
    return ids


def _written(pieces: list[str], stops: tuple[str, ...]) -> tuple[list[str], StreamingText]:
    """The deltas that pieces of text give, each as a token of its own."""
    table = [piece.encode() for piece in pieces]
    words = Vocabulary(lambda: ByteDetokenizer(table.__getitem__), {}, table.__getitem__)
    answer = StreamingText.start(words, stops)
    deltas = [answer.push(i) for i in range(len(pieces))]
    return [*deltas, answer.finish()], answer


@given(st.lists(st.integers(0, len(_TOKENIZER) - 1), max_size=30))
def test_streamed_text_is_the_decoded_text_for_any_tokens(ids: list[int]) -> None:
    answer = StreamingText.start(_WORDS, ())
    streamed = "".join([*map(answer.push, ids), answer.finish()])
    assert streamed == answer.text == _TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text(max_size=30))
def test_streamed_text_is_the_text_that_was_encoded(text: str) -> None:
    answer = StreamingText.start(_WORDS, ("never in it \x00",))
    assert "".join([*map(answer.push, _ids(text)), answer.finish()]) == _TOKENIZER.decode(_ids(text))


def test_an_unfinished_character_is_held_back_and_nothing_else() -> None:
    table = [b"a\xe4", b"\xbd", b"\xa0b", b"\xff", b"c"]  # 你 is e4 bd a0; ff is in no character
    detokenizer = ByteDetokenizer(table.__getitem__)
    assert [detokenizer.push(i) for i in range(5)] == ["a", "", "你b", "\ufffd", "c"]
    assert detokenizer.finish() == ""


def test_a_character_that_is_never_finished_is_shown_at_the_end() -> None:
    detokenizer = ByteDetokenizer([b"a\xe4\xbd"].__getitem__)
    assert (detokenizer.push(0), detokenizer.finish()) == ("a", "\ufffd")


def test_a_stop_string_fires_across_token_boundaries_and_is_cut() -> None:
    deltas, answer = _written(["Hello", "\nU", "se", "r: more"], ("\nUser:",))
    assert deltas == ["Hello", "", "", "", ""]
    assert (answer.text, answer.stop_string) == ("Hello", "\nUser:")


def test_a_stop_string_fires_inside_a_character_that_several_tokens_make() -> None:
    text = "好的。再见，朋友"
    answer = StreamingText.start(_WORDS, ("再见",))
    for token in _ids(text):
        answer.push(token)
        if answer.stop_string:
            break
    assert (answer.text, answer.stop_string) == ("好的。", "再见")


def test_only_a_partial_match_is_held_back() -> None:
    deltas, answer = _written(["one\n", "Us", "ual", "\n", "two"], ("\nUser:",))
    assert deltas == ["one", "", "\nUsual", "", "\ntwo", ""]
    assert answer.stop_string is None


def test_a_partial_match_at_the_end_is_shown_in_the_end() -> None:
    deltas, answer = _written(["one\nUse"], ("\nUser:",))
    assert (deltas, answer.stop_string) == (["one", "\nUse"], None)


def test_the_stop_string_that_is_complete_first_fires_and_of_those_the_longest() -> None:
    assert _written(["xabcd"], ("abcd", "b"))[1].stop_string == "b"
    assert _written(["xabcd"], ("bc", "abc"))[1].stop_string == "abc"


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_how_text_is_cut_into_tokens_changes_nothing(
    text: str, stops: tuple[str, ...], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    deltas, answer = _written(pieces, tuple(stops))
    _, whole = _written([text], tuple(stops))
    assert "".join(deltas) == answer.text == whole.text
    assert answer.stop_string == whole.stop_string
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert answer.text == text
    else:
        assert text.startswith(answer.text + answer.stop_string)
        assert len(answer.text + answer.stop_string) == min(ends)


def test_special_tokens_are_not_shown_but_stop_strings_see_them() -> None:
    answer = StreamingText.start(_WORDS, ("<|im_end|>\n",))
    shown = [answer.push(token) for token in [*_ids("Hi"), _IM_END, *_ids("\n")]]
    assert "".join(shown) == answer.text == "Hi"
    assert answer.stop_string == "<|im_end|>\n"


@pytest.mark.parametrize("stop", ["m", "<", "|>", "<|im_en", "im_end|>", "end|>b", "a<|i", "d|>b", "|><|im_end|>"])
def test_a_stop_string_never_begins_or_ends_inside_of_a_special_token(stop: str) -> None:
    answer = StreamingText.start(_WORDS, (stop,))
    ids = [*_ids("a"), _IM_END, *_ids("b")]
    assert "".join([*map(answer.push, ids), answer.finish()]) == "ab"
    assert answer.stop_string is None


@pytest.mark.parametrize(
    ("stop", "expected"), [("<|im_end|>", "xa"), ("a<|im_end|>", "x"), ("<|im_end|><|im_end|>", "xa")]
)
def test_a_stop_string_may_hold_special_tokens(stop: str, expected: str) -> None:
    answer = StreamingText.start(_WORDS, (stop,))
    ids = [*_ids("xa"), _IM_END, _IM_END, *_ids("b")]
    assert ("".join([*map(answer.push, ids), answer.finish()]), answer.stop_string) == (expected, stop)


@pytest.mark.parametrize(("stop", "expected"), [("ab", "x"), ("b", "xa"), ("xab", ""), ("bx", "xabc")])
def test_a_stop_string_does_not_see_what_is_hidden(stop: str, expected: str) -> None:
    answer = StreamingText.start(_WORDS, (stop,))
    ids = [*_ids("xa"), _IM_END, _IM_END, *_ids("bc")]
    assert "".join([*map(answer.push, ids), answer.finish()]) == answer.text == expected


def test_a_special_token_that_is_no_stop_leaves_no_trace() -> None:
    answer = StreamingText.start(_WORDS, ("<|im_end|>!",))
    ids = [*_ids("a"), _IM_END, *_ids("b")]
    assert "".join([*map(answer.push, ids), answer.finish()]) == "ab"


def test_added_tokens_that_are_not_special_are_shown() -> None:
    answer = StreamingText.start(_WORDS, ())
    assert answer.push(_TOOL_CALL) == "<tool_call>"


def test_the_template_s_end_typed_as_plain_text_is_a_stop_string() -> None:
    table = list("<|im_end|>")
    assert _written(["Hi", *table], ("<|im_end|>",))[1].text == "Hi"


def test_nothing_is_shown_behind_a_stop_string() -> None:
    _, answer = _written(["a.b", "c"], (".",))
    assert (answer.push(1), answer.finish(), answer.text) == ("", "", "a")


def test_a_copy_goes_its_own_way() -> None:
    answer = StreamingText.start(_WORDS, ("ab",))
    answer.push(_ids("a")[0])
    other = answer.copy()
    other.push(_ids("b")[0])
    assert (answer.stop_string, other.stop_string) == (None, "ab")
    assert answer.finish() == "a"


@pytest.fixture
def sentence_piece_like() -> PreTrainedTokenizerFast:
    """Words behind a meta space, and bytes for all else, as in Llama 2's vocabulary."""
    vocab = {"<unk>": 0, "▁Hi": 1, "▁there": 2, "!": 3, **{f"<0x{byte:02X}>": 4 + byte for byte in range(256)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_other_vocabularies_are_decoded_in_the_context_of_the_last_tokens(
    sentence_piece_like: PreTrainedTokenizerFast,
) -> None:
    answer = StreamingText.start(vocabulary(sentence_piece_like), ())
    assert isinstance(answer.detokenizer, WindowDetokenizer)
    ids = [1, 2, *(4 + byte for byte in "你".encode()), 3]
    assert [answer.push(i) for i in ids] == ["Hi", " there", "", "", "你", "!"]
    assert answer.text == sentence_piece_like.decode(ids)


def test_other_vocabularies_give_up_on_bytes_that_are_no_character(
    sentence_piece_like: PreTrainedTokenizerFast,
) -> None:
    answer = StreamingText.start(vocabulary(sentence_piece_like), ())
    deltas = [answer.push(4 + 0x80) for _ in range(6)]
    assert "".join([*deltas, answer.finish()]) == "\ufffd" * 6
    assert any(deltas)


def test_a_copy_of_another_vocabulary_s_text_goes_its_own_way(
    sentence_piece_like: PreTrainedTokenizerFast,
) -> None:
    answer = StreamingText.start(vocabulary(sentence_piece_like), ())
    answer.push(1)
    other = answer.copy()
    other.push(2)
    answer.push(3)
    assert (answer.text, other.text) == ("Hi!", "Hi there")


def test_text_of_a_token_by_itself() -> None:
    """A special token's is its name, and what is no whole character is U+FFFD."""
    assert [_WORDS.text_of(token) for token in [*_ids("Hi"), _IM_END]] == ["H", "i", "<|im_end|>"]
    assert _WORDS.text_of(_ids("好")[0]) == "\ufffd"


def test_bytes_of_a_token_may_be_a_part_of_a_character(sentence_piece_like: PreTrainedTokenizerFast) -> None:
    assert [_WORDS.bytes_of(token) for token in _ids("é")] == [b"\xc3", b"\xa9"]
    assert _WORDS.bytes_of(_IM_END) == b"<|im_end|>"
    other = vocabulary(sentence_piece_like)
    assert [other.bytes_of(token) for token in (1, 3, 4 + 0xC3, 9999)] == [b" Hi", b"!", b"\xc3", b""]


def test_byte_level_vocabularies_are_decoded_byte_by_byte() -> None:
    assert isinstance(_WORDS.detokenizer(), ByteDetokenizer)


def test_finish_a_second_time_adds_nothing() -> None:
    _, answer = _written(["one\nUse"], ("\nUser:",))
    assert answer.finish() == ""
    assert answer.text == "one\nUse"
