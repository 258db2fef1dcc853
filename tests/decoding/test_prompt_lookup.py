"""Prompt-lookup speculation: drafts worked out by hand, and the very answers that there are without it."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MistralConfig
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

import handspun
from backends import BACKENDS, chosen
from handspun.decoding.engines.base import ModelInput
from handspun.decoding.engines.fused import FusedEngine
from handspun.decoding.engines.transformers import TransformersEngine
from handspun.decoding.generate import stream
from handspun.decoding.prompt_lookup import draft, lookup
from handspun.decoding.request import Completion
from handspun.decoding.results import GenerationResult
from handspun.decoding.scheduler import run
from handspun.display import captured_log
from handspun.errors import ConfigError
from handspun.models.fused import fused_weights
from handspun.models.load import ChatModel
from parity import answers_to, requests_of
from tiny import tiny_model, tiny_tokenizer

LOOP = [5, 9, 13, 4, 5, 9]
PROMPTS = [[5, 9, 13, 4, 5, 9, 7, 13, 4], [8], [11, 6, 17, 9, 10, 12, 11, 6, 17, 19], [3, 3, 3, 3]]


def looked_up(tokens: list[int], num_tokens: int = 4, max_ngram_size: int = 2) -> list[int]:
    return lookup(tokens, num_tokens=num_tokens, max_ngram_size=max_ngram_size)


def test_what_followed_the_last_tokens_is_drafted() -> None:
    #                1  2  7  8  9  3  2  6  1  2
    assert looked_up([1, 2, 7, 8, 9, 3, 2, 6, 1, 2]) == [7, 8, 9, 3]
    assert looked_up([1, 2, 7, 8, 9, 3, 2, 6, 1, 2], num_tokens=2) == [7, 8]
    assert looked_up([4, 2, 7, 8, 9, 3, 2, 6, 1, 2]) == [7, 8, 9, 3]  # the 2 alone, at its first place
    assert looked_up([1, 5, 1, 6, 5, 1, 7, 5, 1]) == [6, 5, 1, 7]  # not the first 1, but the first 5, 1
    assert looked_up([1, 5, 1, 6, 5, 1, 7, 5, 1], max_ngram_size=1) == [5, 1, 6, 5]
    assert looked_up([1, 2, 3]) == looked_up([1]) == looked_up([]) == []
    assert looked_up([6, 6]) == [6]  # no more is known than has been said


def test_drafts_are_those_of_transformers() -> None:
    dice = random.Random(0)
    for _ in range(300):
        tokens = [dice.randrange(5) for _ in range(dice.randint(2, 30))]
        num_tokens, size = dice.randint(1, 6), dice.randint(1, 4)
        theirs = PromptLookupCandidateGenerator(
            num_output_tokens=num_tokens, max_matching_ngram_size=size, max_length=1000
        )
        ids, _ = theirs.get_candidates(torch.LongTensor([tokens]))
        assert looked_up(tokens, num_tokens, size) == ids[0].tolist()[len(tokens) :]


def test_a_draft_leaves_room_for_a_token_and_ends_before_an_eos() -> None:
    chat = ChatModel(tiny_model("qwen2", eos_token_id=4), tiny_tokenizer(), "tiny")
    one, other = requests_of(chat, [LOOP, [5, 9, 13, 7, 5, 9]], prompt_lookup_num_tokens=9, max_new_tokens=4)
    assert draft(Completion.start(one)) == [13]
    answer = Completion.start(other)
    assert draft(answer) == [13, 7, 5]
    answer.add(13)
    assert draft(answer) == [7, 5]
    answer.add(7)
    answer.add(5)
    assert draft(answer) == []  # the last token is chosen anyway


# The same answers


@pytest.fixture(scope="module")
def chats() -> dict[str, ChatModel]:
    """Models with a small vocabulary, whose answers often repeat themselves, for both engines."""
    shape: dict[str, Any] = {"vocab_size": 24, "initializer_range": 0.2}
    fused = [tiny_model(family, **shape) for family in ("qwen2", "llama")]
    other = GPTNeoXConfig(
        vocab_size=24, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [*fused, AutoModelForCausalLM.from_config(other).eval()]
    rounded = tiny_model("qwen2", **shape, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    float_chats = [ChatModel(model, tiny_tokenizer(), "tiny") for model in models]
    int8 = ChatModel(rounded, tiny_tokenizer(), "tiny", fused_weights(rounded, int8=True))
    return dict(zip(NAMES, [*float_chats, int8], strict=True))


NAMES = ("qwen2", "llama", "gpt_neox", "int8")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 4, "min_new_tokens": 20},
    {"presence_penalty": 0.4, "frequency_penalty": 0.2, "stop_strings": ("$", "*.", "-)")},
    {"do_sample": True, "temperature": 0.4},
    {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "num_return_sequences": 3},
    {"do_sample": True, "top_k": 2, "min_new_tokens": 12, "stop_strings": ("$", ")")},
    {"do_sample": True, "typical_p": 0.5, "repetition_penalty": 0.8, "seed": (4, 7, 7, 1)},
]


def answers(chat: ChatModel, eos: list[int], **options: Any) -> list[GenerationResult]:
    chat.model.generation_config.eos_token_id = eos
    return answers_to(chat, PROMPTS, logprobs=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_without_speculation(
    name: str, options: dict[str, Any], chats: dict[str, ChatModel]
) -> None:
    """In batches of other sizes; under int8 bit for bit, with log-probabilities. Some drafts are wrong."""
    dice, drafted, accepted = random.Random(0), 0, 0
    for most, eos in ((40, [3, 7]), (21, [20]), (20, [3])):
        plain = answers(chats[name], eos, max_new_tokens=most, **options)
        for num_tokens, size in ((1, 1), (3, 2), (10, 3)):
            lookup = {"prompt_lookup_num_tokens": num_tokens, "max_matching_ngram_size": size}
            limits = {"max_new_tokens": most, "batch_size": dice.randint(1, 8)}
            found = answers(chats[name], eos, **options, **limits, **lookup)
            for one, other in zip(found, plain, strict=True):
                assert (one.text, one.token_ids) == (other.text, other.token_ids)
                assert (one.finish_reason, one.stop_string) == (other.finish_reason, other.stop_string)
                exact = one.logprobs if name == "int8" else pytest.approx(one.logprobs, abs=1e-4)
                assert other.logprobs == exact
            drafted += sum(one.drafted_tokens for one in found)
            accepted += sum(one.accepted_tokens for one in found)
    assert 0 < accepted < drafted


@pytest.mark.cpu
def test_explanations_are_those_without_speculation() -> None:
    options = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 30, "seed": 2}
    said: dict[str, Any] = {"chat": False, "explain": True, **options}
    plain, found = (
        handspun.generate(int8_speaker(), ["a a a a", "b"], **said, prompt_lookup_num_tokens=drafted)
        for drafted in (0, 5)
    )
    assert [answer.explanation for answer in found] == [answer.explanation for answer in plain]
    assert sum(answer.accepted_tokens for answer in found) > 0


def int8_speaker() -> ChatModel:
    """One with the whole of its tokenizer's vocabulary, that says few tokens again and again."""
    model = tiny_model("qwen2", hidden_size=64, num_attention_heads=2, num_key_value_heads=1, seed=1)
    return ChatModel(model, tiny_tokenizer(), "tiny", fused_weights(model, int8=True))


@pytest.mark.slow
@pytest.mark.parametrize("form", [{"regex": "(ab|ac){3,9}"}, {"choice": ("abcabcabcabc", "abcabd")}], ids=str)
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True}], ids=str)
def test_constrained_answers_are_those_without_speculation(form: Any, sampling: Any) -> None:
    """A draft that leaves the form is no error: nothing is asked of the constraint behind a wrong token."""
    said: dict[str, Any] = {"chat": False, "max_new_tokens": 40, **form, **sampling}
    prompts = ["abacabacacab", "abcabcabd", "abab"]
    plain, found = (
        handspun.generate(int8_speaker(), prompts, **said, prompt_lookup_num_tokens=drafted) for drafted in (0, 4)
    )
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in plain]
    assert sum(answer.accepted_tokens for answer in found) > 0


def test_steps_are_saved_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, forward = list[int](), FusedEngine.forward

    def counted(engine: FusedEngine, feeds: Sequence[ModelInput]) -> Tensor:
        steps.append(sum(len(feed.token_ids) for feed in feeds))
        return forward(engine, feeds)

    monkeypatch.setattr(FusedEngine, "forward", counted)
    [answer] = answers_to(endless(), [LOOP], prompt_lookup_num_tokens=4, max_new_tokens=60)
    assert len(answer.token_ids) == 60
    assert len(steps) == 60 - answer.accepted_tokens < 40
    assert sum(steps) == len(LOOP) + len(steps) - 1 + answer.drafted_tokens


def endless() -> ChatModel:
    """One that says few tokens again and again, without an end."""
    return ChatModel(tiny_model("qwen2", vocab_size=24, initializer_range=0.2), tiny_tokenizer(), "tiny")


def test_streamed_chunks_are_those_without_speculation(tiny_chat: ChatModel) -> None:
    """A token each, in order; the last one of an answer holds its result."""

    def chunks(**more: Any) -> dict[int, list[tuple[str, list[int], bool]]]:
        found: dict[int, list[tuple[str, list[int], bool]]] = {}
        options = {"do_sample": True, "temperature": 0.2, "max_new_tokens": 30, "stop_strings": ("z",), **more}
        for chunk in stream(tiny_chat, ["the the the the", "Hi"], chat=False, **options):
            shown = (chunk.text, chunk.token_ids, chunk.result is not None)
            found.setdefault(chunk.prompt_index, []).append(shown)
        return found

    assert chunks(prompt_lookup_num_tokens=6, max_matching_ngram_size=1) == chunks()


def test_a_cancelled_answer_has_all_tokens_that_were_checked() -> None:
    calls: Iterator[bool] = iter([False] * 4)
    chat = endless()
    requests = requests_of(chat, [LOOP], prompt_lookup_num_tokens=4, max_new_tokens=60)
    *_, last = run(chat, requests, should_stop=lambda: next(calls, True))
    answer = last.result
    assert answer is not None
    assert answer.finish_reason == "cancelled"
    assert len(answer.token_ids) == 4 + answer.accepted_tokens


# The engines


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("heads", [(2, 1), (1, 1)], ids=str)
def test_int8_logits_of_a_draft_are_those_of_its_tokens_alone(kernels: str, heads: tuple[int, int]) -> None:
    """Bit for bit, behind prompts of several lengths; heads of 40 have no kernel."""
    width = 64 if heads == (2, 1) else 40
    model = tiny_model("qwen2", hidden_size=width, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    dice = random.Random(0)
    with chosen(kernels):
        fused = fused_weights(model, int8=True)
        engines = iter([FusedEngine(fused) for _ in range(8)])
    for length in (1, 7, 70, 300):
        prompt, new = ([dice.randrange(330) for _ in range(count)] for count in (length, 9))
        one, many = next(engines), next(engines)
        assert (
            one.forward([ModelInput(one.add(), prompt)]) == many.forward([ModelInput(many.add(), prompt)])
        ).all()
        mate = many.add()
        apart = torch.cat([one.forward([ModelInput(0, [token])]) for token in new])
        assert torch.equal(
            many.forward([ModelInput(0, new, all_logits=True), ModelInput(mate, [5, 6, 7])])[:-1], apart
        )


def test_float_logits_of_a_draft_are_near_those_of_its_tokens_alone(smollm2: ChatModel) -> None:
    prompt, new = smollm2.tokenizer("Rewrite this: the cat sat on the mat.")["input_ids"], [253, 2644, 3424, 335]
    fused = fused_weights(smollm2.model)
    one, many = FusedEngine(fused), FusedEngine(fused)
    one.forward([ModelInput(one.add(), prompt)])
    many.forward([ModelInput(many.add(), prompt)])
    apart = torch.cat([one.forward([ModelInput(0, [token])]) for token in new])
    torch.testing.assert_close(many.forward([ModelInput(0, new, all_logits=True)]), apart, rtol=0, atol=1e-3)


def test_rows_of_transformers_forget_what_they_took_back(chats: dict[str, ChatModel]) -> None:
    """Drafts of several lengths, cut to several lengths; what no row has kept leaves the cache."""
    model = chats["gpt_neox"].model
    engine = TransformersEngine(model)
    texts = {engine.add(): list(ids) for ids in PROMPTS}
    engine.forward([ModelInput(row, ids) for row, ids in texts.items()])
    dice = random.Random(0)
    for _ in range(12):
        drafts = {row: [dice.randrange(24) for _ in range(dice.randint(1, 5))] for row in texts}
        found = engine.forward([ModelInput(row, tokens, all_logits=True) for row, tokens in drafts.items()])
        wanted = [model(torch.tensor([texts[row] + new])).logits[0, -len(new) :] for row, new in drafts.items()]
        torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-4)
        for row, tokens in drafts.items():
            texts[row] += tokens[: dice.randint(1, len(tokens))]
            engine.truncate(row, len(texts[row]))
    batch = engine._rows[0].batch
    assert batch is not None
    assert batch.cache.get_seq_length() == batch.attention_mask.shape[1] < 10 + 12 * 5


# What is said


def test_what_cannot_be_speculated_is_refused_with_a_remedy(tiny_chat: ChatModel) -> None:
    with pytest.raises(ConfigError, match=r"num_beams=3\)\. Remove it, or use num_beams=1"):
        handspun.generate(tiny_chat, "Hi", num_beams=3, prompt_lookup_num_tokens=5)
    with pytest.raises(ConfigError, match="for example prompt_lookup_num_tokens=10"):
        handspun.generate(tiny_chat, "Hi", max_matching_ngram_size=3)
    with pytest.raises(ConfigError, match="max_matching_ngram_size is 0: expected at least 1"):
        handspun.generate(tiny_chat, "Hi", max_matching_ngram_size=0, prompt_lookup_num_tokens=5)
    window = MistralConfig(vocab_size=330, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                           num_attention_heads=4, num_key_value_heads=2, sliding_window=16)  # fmt: skip
    chat = ChatModel(AutoModelForCausalLM.from_config(window).eval(), tiny_tokenizer(), "window")
    with pytest.raises(ConfigError, match="keep a DynamicSlidingWindowLayer instead of all .* Remove the option"):
        handspun.generate(chat, "Hi", prompt_lookup_num_tokens=5)


def test_how_many_were_accepted_is_said() -> None:
    options: dict[str, Any] = {"chat": False, "prompt_lookup_num_tokens": 3, "max_new_tokens": 30}
    with captured_log() as said:
        [answer] = handspun.generate(int8_speaker(), "a a a", **options)
    accepted, drafted, generated = answer.accepted_tokens, answer.drafted_tokens, len(answer.token_ids)
    assert said[-1] == (
        f"prompt lookup: {accepted} of {drafted} draft tokens were accepted; {generated} tokens were generated"
    )
