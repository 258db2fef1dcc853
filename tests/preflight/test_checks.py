"""What is looked for in rows before a run, in rows that were counted by hand; the arithmetic of its time."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.models.int8 import quantize_base
from handspun.models.lora import add_lora
from handspun.preflight import time_estimate
from handspun.preflight.checks import (
    RowText,
    findings_in_answers,
    next_user,
    placeholder_answer,
    placeholder_prompt,
    unfilled_field,
)
from handspun.preflight.duplicates import Alike, most_in_common, near_duplicate_rows, words_of
from handspun.preflight.print import slow_lines
from handspun.preflight.time_estimate import Forecast, operations, predicted_seconds
from handspun.training.loop import EpochEnd, Step
from handspun.training.memory import make_plan
from tiny import tiny_model

TEN = "one two three four five six seven eight nine ten"
"""Eight 3-grams."""


def row_text(answer: str, prompt: str = "Go on.") -> RowText:
    return RowText("train.csv", 1, [prompt], [answer])


def test_the_same_words_are_the_same_text() -> None:
    texts = ["Name a river. The Rhine!", "Name a lake.", "name a  river:\nthe Rhine", "Name a river, the Rhone"]
    assert near_duplicate_rows(texts, 4) == [Alike(2, 0, same=True)]


def test_a_text_is_like_another_where_four_fifths_of_the_3_grams_are_in_both() -> None:
    words = " ".join(map(str, range(100, 120)))  # 18 3-grams
    assert near_duplicate_rows([words, f"{words} 7 8 9 5"], 2) == [Alike(1, 0, same=False)]  # 18 of 22: 0.818
    assert near_duplicate_rows([words, f"{words} 7 8 9 5 6"], 2) == []  # 18 of 23: 0.783
    assert near_duplicate_rows([TEN, f"{TEN} 7 8"], 2) == [Alike(1, 0, same=False)]  # 8 of 10, which is 0.8


def test_a_text_is_like_the_first_one_that_it_is_like() -> None:
    assert [one.earlier for one in near_duplicate_rows([TEN, "else", TEN, f"{TEN} 7", f"{TEN} 7"], 5)] == [0, 0, 3]


def test_held_out_texts_are_compared_with_training_texts_and_not_with_each_other() -> None:
    texts = [TEN, "something else altogether", "held out once", "held out once", TEN, f"{TEN} 7"]
    assert near_duplicate_rows(texts, 2) == [Alike(4, 0, same=True), Alike(5, 0, same=False)]


def test_one_sign_can_be_all_the_difference_and_punctuation_is_none() -> None:
    assert words_of("3 + 4 = 7.") == ["3", "+", "4", "=", "7"]
    assert near_duplicate_rows(["Is 3 + 4 odd? Yes", "Is 3 - 4 odd? Yes", 'Is 3 + 4 "odd"? Yes.'], 3) == [
        Alike(2, 0, same=True)
    ]


def test_chinese_is_compared_by_characters() -> None:
    assert words_of("介绍上海，and more") == ["介", "绍", "上", "海", "and", "more"]
    long = "请用简单的语言介绍一下上海交通大学的历史和它最有名的几位校友。"
    assert near_duplicate_rows([long, f"{long}谢谢"], 2) == [Alike(1, 0, same=False)]


def test_a_task_in_the_same_words_does_not_make_rows_alike() -> None:
    task = " ".join(f"word{i}" for i in range(200))
    texts = [f"{task} sentence{i} about{i} this{i}" for i in range(40)]
    assert most_in_common(40) == 5
    assert near_duplicate_rows(texts, 40) == []
    assert near_duplicate_rows(texts[:5], 5) == [Alike(i, 0, same=False) for i in range(1, 5)]
    assert (
        near_duplicate_rows([*texts, f"{texts[7]} 5"], 41) == []
    )  # 3 of their own 5 3-grams: what they share is the task
    own = " ".join(f"own{i}" for i in range(20))
    assert near_duplicate_rows([*texts, f"{task} {own}", f"{task} {own} 5"], 42) == [Alike(41, 40, same=False)]


def test_texts_of_few_words_or_none_are_met() -> None:
    assert near_duplicate_rows(["", "", "a", "b", "a b", "A.", "."], 7) == [
        Alike(1, 0, same=True),
        Alike(5, 2, same=True),
        Alike(6, 0, same=True),
    ]
    assert near_duplicate_rows([], 0) == []


def by_comparing_all(texts: list[str], known: int) -> list[Alike]:
    """The definition, plainly."""
    words = [words_of(text) for text in texts]
    firsts = [i for i, some in enumerate(words) if some and some not in words[: min(i, known)]]
    padded = {i: [*words[i], "", ""] if len(words[i]) < 3 else words[i] for i in firsts}
    grams = {i: {tuple(some[k : k + 3]) for k in range(len(some) - 2)} for i, some in padded.items()}
    if_short = {i: {tuple((words[i] + ["", ""])[:3])} for i in firsts if len(words[i]) < 3}
    grams |= if_short
    within = {gram: sum(gram in some for some in grams.values()) for some in grams.values() for gram in some}
    own = {i: {gram for gram in some if within[gram] <= most_in_common(len(grams))} for i, some in grams.items()}

    def similarity(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
        return len(a & b) / len(a | b) if a | b else 0.0

    found = []
    for i, some in enumerate(words):
        earlier = range(min(i, known))
        same = next((j for j in earlier if words[j] == some), None)
        near = next(
            (
                j
                for j in earlier
                if i in grams
                and j in grams
                and min(similarity(own[i], own[j]), similarity(grams[i], grams[j])) >= 0.8
            ),
            None,
        )
        if same is not None:
            found.append(Alike(i, same, same=True))
        elif near is not None:
            found.append(Alike(i, near, same=False))
    return found


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), planted=st.integers(0, 6), known=st.integers(0, 30))
def test_it_finds_what_comparing_all_with_all_finds(seed: int, planted: int, known: int) -> None:
    chance = random.Random(seed)
    texts = [" ".join(chance.choices("abcdefgh", k=chance.choice([0, 1, 2, 3, 9, 30, 60]))) for _ in range(24)]
    for _ in range(planted):
        words = chance.choice(texts).split()
        place = chance.randint(0, len(words))
        texts.insert(chance.randrange(len(texts)), " ".join([*words[:place], "new", *words[place:]]))
    assert near_duplicate_rows(texts, min(known, len(texts))) == by_comparing_all(texts, min(known, len(texts)))


@pytest.mark.parametrize(
    "answer", ["N/A", "<noinput>", " <No Output>.", "nan", "None", "null", "TODO", "...", "无"]
)
def test_a_placeholder_is_no_answer(answer: str) -> None:
    assert placeholder_answer(row_text(answer)) == answer


@pytest.mark.parametrize(
    "answer", ["No", "0", "Yes.", "Na", "None of them is.", "x", "[]", "negative", "没有", "An input"]
)
def test_a_short_answer_is_no_placeholder(answer: str) -> None:
    assert placeholder_answer(row_text(answer)) is None


def test_an_input_that_says_there_is_none_is_found_at_the_end_of_the_prompt() -> None:
    assert placeholder_prompt(row_text("Hi.", "Tell a story.\n< noinput >")) == "< noinput >"
    assert placeholder_prompt(row_text("Hi.", "What does N/A mean?")) is None


@pytest.mark.parametrize(
    "answer",
    [
        "Dear {{name}}, thank you.",
        "Dear {{ customer name }},\nwe are sorry.",
        "I live in {city} and work.",
        "{output}",
    ],
)
def test_a_field_that_nothing_was_put_in_is_found(answer: str) -> None:
    assert unfilled_field(row_text(answer)) is not None


@pytest.mark.parametrize(
    "answer",
    [
        "```html\n<p>{{ name }}</p>\n```",
        "<p>Hello {{ name }}</p>",
        "{% for x in xs %} {{ x }} {% endfor %}",
        'print(f"Hello {name}")',
        '"Hello {name}".format(name="Ada")',
        "const greet = (name) => `Hello ${name}`;",
        r"The solution is \frac{a}{bcd} and \text{speed}.",
        "The set {1, 2, 3} and the set {abc, def}.",
        "body {\n  color: red;\n}",
        'An object: {"name": "Ada"}',
        "Use ${HOME} in the shell.",
    ],
)
def test_braces_of_code_and_formulas_are_no_field(answer: str) -> None:
    assert unfilled_field(row_text(answer)) is None


def rows(count: int, length: int, target_tokens: int) -> list[Example]:
    ids = np.arange(count * length).reshape(count, length) % 300
    return [
        Example(some.tolist(), [False] * (length - target_tokens) + [True] * target_tokens, "a", i)
        for i, some in enumerate(ids)
    ]


def test_operations_are_those_of_products_and_attention() -> None:
    """Two layers of width 32, each with 32 x (32 + 16 + 16 + 32) of attention (grouped) and 3 x 32 x 64."""
    config = TrainConfig(batch_size=4, dtype="float32")
    model, examples = tiny_model("llama", tie_word_embeddings=True), rows(4, 10, 3)
    linear = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64)
    norms = 5 * 32
    attention = 6 * 2 * 32 * 4 * 10**2
    full = operations(model, make_plan(model, examples, config), examples, config)
    assert full == 40 * 6 * (linear + norms) + 12 * 6 * 330 * 32 + attention
    again = TrainConfig(batch_size=4, dtype="float32", activation_checkpointing=True)
    assert operations(model, make_plan(model, examples, again), examples, again) - full == 40 * 2 * (
        linear + norms
    )


def test_frozen_weights_have_no_gradient_of_their_own_and_int8_ones_count_too() -> None:
    config, examples = TrainConfig(batch_size=4, lora=True, dtype="float32"), rows(4, 10, 3)
    model = add_lora(tiny_model("llama", tie_word_embeddings=True), "tiny", rank=4, alpha=8, dropout=0.0)
    adapters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    linear, norms = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 64), 5 * 32
    expected = 40 * (4 * (linear + norms) + 6 * adapters) + 12 * 4 * 330 * 32 + 6 * 2 * 32 * 4 * 10**2
    assert operations(model, make_plan(model, examples, config), examples, config) == expected
    quantize_base(model)
    assert operations(model, make_plan(model, examples, config), examples, config) == expected


def test_the_time_is_operations_over_the_rate_of_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    config = TrainConfig()
    on_cpu: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    assert predicted_seconds(150e9, config, threads=1, **on_cpu) == 2.0
    assert predicted_seconds(150e9, config, threads=4, **on_cpu) == 0.5
    assert predicted_seconds(75e9, config, threads=1, dtype=torch.float32, device=torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("flags", "seconds"),
    [
        ({"avx512f", "avx512_bf16"}, 115.0),
        ({"avx512f", "avx512_bf16", "avx_vnni"}, 271.0),
        ({"avx512f", "avx512_bf16", "avx_vnni", "amx_bf16"}, 147.0),
        ({"avx2", "avx_vnni"}, 115.0),
    ],
)
def test_kinds_of_cpus_have_rates_of_their_own(
    flags: set[str], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes a second on one of them: full fine-tuning in bfloat16."""
    monkeypatch.setattr(time_estimate, "cpu_flags", lambda: frozenset(flags))
    on_cpu: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "threads": 1}
    assert predicted_seconds(seconds * 1e9, TrainConfig(), **on_cpu) == 1.0


def step(number: int, seconds: float, total: int = 10) -> Step:
    return Step(number, total, 1, 2.0, 1e-4, 1.0, 4, 50, 12, 40, seconds)


def test_the_faster_one_of_two_steps_says_how_long_the_rest_takes() -> None:
    """4 examples of 10 tokens in one batch, 10 epochs: 40 tokens a step, and 8 steps are left after two."""
    config = TrainConfig(batch_size=4, num_epochs=10)
    plan = make_plan(tiny_model("llama"), rows(4, 10, 3), config)
    forecast = Forecast(plan, 10)
    assert forecast.after(step(1, 4.0)) is None
    assert forecast.after(EpochEnd(1, 1)) is None
    assert forecast.after(step(2, 2.0)) == 16.0
    assert forecast.after(step(3, 1.0)) is None
    resumed = Forecast(plan, 10)
    assert resumed.after(step(8, 4.0)) is None
    assert resumed.after(step(9, 2.0)) == 2.0
    short = Forecast(plan, 10)
    assert [short.after(step(1, 4.0, total=2)), short.after(step(2, 2.0, total=2))] == [None, None]
    assert short.times_predicted is None


def test_steps_far_slower_than_predicted_are_a_warning_with_a_remedy() -> None:
    """10 steps of 0.5 s each were predicted, and the faster of the first two takes 2 s."""
    config = TrainConfig(batch_size=4, num_epochs=10)
    forecast = Forecast(make_plan(tiny_model("llama"), rows(4, 10, 3), config), 10, predicted_seconds=5.0)
    forecast.after(step(1, 4.0))
    assert forecast.times_predicted is None
    forecast.after(step(2, 2.0))
    assert forecast.times_predicted == 4.0
    first, *others = slow_lines(4.0, config, torch.float32)
    assert first == "warning: steps take 4 times as long as predicted"
    assert "other programs use the CPU" in " ".join(others)
    assert "or --lora" in " ".join(others)
    assert "or --lora" not in " ".join(slow_lines(4.0, TrainConfig(lora=True), torch.float32))
    assert max(map(len, others)) <= 80
    bfloat16 = TrainConfig(dtype="bfloat16")
    assert "--dtype float32" in " ".join(slow_lines(9.0, bfloat16, torch.bfloat16))
    # A probe has shown that bfloat16 is the faster one.
    assert "other programs use the CPU" in " ".join(slow_lines(9.0, config, torch.bfloat16))
    int8 = TrainConfig(lora=True, base_weights="int8")
    assert "without --base-weights int8" in " ".join(slow_lines(9.0, int8, torch.float32))
    assert list(slow_lines(3.9, config, torch.float32)) == []


def test_an_answer_that_decoding_would_cut_is_found() -> None:
    assert next_user(row_text("Scene one.\nUser: Hello?\nBot: Hi.\nUser: Bye.")) == "User: Hello?"
    for whole in ("User: Hello", "A User: line", "Say\n User: x", "", "\nuser: x"):
        assert next_user(row_text(whole)) is None
    rows = [row_text("Yes."), row_text("Scene.\nUser: Hello?"), row_text("Scene.\nUser: Bye.")]
    (found,) = findings_in_answers(rows)
    assert found.what == 'answers with a line "User:", which is a stop string of chats'
    assert (found.count, found.of, found.rows[0].text) == (2, 3, "User: Hello?")
    assert "--no-stop-strings" in found.remedy
