"""Which rows are scored in the time allowed, and which are asked."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import handspun
from handspun.config import TrainConfig
from handspun.data.dataset import Dataset, load_splits
from handspun.data.examples import Example
from handspun.data.preview import spread_order
from handspun.display import captured_log
from handspun.runs.artifacts import _LIMIT, _row_answers, length_histogram, rows_for_report
from handspun.runs.row_losses import hardest_of, losses_by_row, rows_csv
from handspun.runs.sample_answers import rows_to_ask, sample_prompts, short_questions


def test_spread_order_begins_evenly() -> None:
    assert spread_order(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    assert spread_order(5) == [0, 4, 2, 1, 3]
    assert [spread_order(count) for count in (0, 1, 2)] == [[], [0], [0, 1]]


class ByNumber:
    """A runner whose loss of a row is twice the row's number; each micro-batch takes a second of its clock."""

    def __init__(self) -> None:
        self.now = 0.0

    @property
    def batching(self) -> Any:
        return self

    def split(self, rows: Sequence[Example], _max_tokens: int) -> Iterator[list[Example]]:
        yield list(rows)

    def row_losses(self, rows: Sequence[Example]) -> list[float]:
        self.now += 1.0
        return [2.0 * row.row for row in rows]


EXAMPLES = [Example([1, 2, 3], [False, True, True], "a.csv", number) for number in range(64)]


def scored(seconds: float, most: int = 64) -> list[int]:
    runner: Any = ByNumber()
    found = losses_by_row(runner, EXAMPLES, most=most, max_tokens=8, seconds=seconds, clock=lambda: runner.now)
    assert [loss for _, loss in found] == [2.0 * row.row for row, _ in found]
    return [row.row for row, _ in found]


def test_losses_by_row_are_the_hardest_first_and_all_if_time_allows() -> None:
    assert scored(100) == list(range(63, -1, -1))
    assert scored(100, most=4) == [48, 32, 16, 0]


def test_losses_by_row_end_in_time_with_rows_that_are_evenly_spaced() -> None:
    """16 rows take a second: two blocks fit into 2.9 seconds, and one is always computed."""
    assert sorted(scored(2.9)) == list(range(0, 64, 2))
    assert sorted(scored(0.0)) == list(range(0, 64, 4))


def test_hardest_of_rows_is_a_fifth_within_limits() -> None:
    many = EXAMPLES * 10
    assert [len(hardest_of(many[:count])) for count in (4, 30, 100, 640)] == [4, 10, 20, 50]


@pytest.fixture
def datasets(tiny_chat: handspun.ChatModel, tmp_path: Path) -> tuple[TrainConfig, Dataset, Dataset]:
    """30 rows with short answers (the first of them long), ten of them held out."""
    data = tmp_path / "train.csv"
    rows = [f"Say {n}.,,{'It is so. ' * 20 if n == 0 else n}\n" for n in range(30)]
    data.write_text("instruction,input,output\n" + "".join(rows), encoding="utf-8")
    config = TrainConfig(data=str(data), eval_ratio=1 / 3, cache_examples=False)
    training, held_out = load_splits(config, tiny_chat.template, max_length=200, eval_ratio=1 / 3)
    assert held_out is not None
    return config, training, held_out


def test_sample_prompts_are_of_held_out_rows_else_of_training_rows(
    tiny_chat: handspun.ChatModel, datasets: tuple[TrainConfig, Dataset, Dataset]
) -> None:
    config, training, held_out = datasets
    for dataset, kind in ((held_out, "held out"), (None, "trained on")):
        prompts = sample_prompts(tiny_chat, config, training, dataset)
        assert len(prompts) == 3
        assert all(prompt.source is not None and prompt.source.endswith(f", {kind}") for prompt in prompts)
        assert all(prompt.messages[-1]["content"] == prompt.text for prompt in prompts)
    asked = handspun.TrainConfig(sample_prompts=("Hm?",))
    assert [prompt.text for prompt in sample_prompts(tiny_chat, asked, training, held_out)] == ["Hm?"]


def test_rows_that_are_kept_suffice_for_prompts_losses_and_files(
    tiny_chat: handspun.ChatModel, datasets: tuple[TrainConfig, Dataset, Dataset]
) -> None:
    config, training, held_out = datasets
    before = sample_prompts(tiny_chat, config, training, held_out)
    for dataset in (training, held_out):
        dataset.release_rows(rows_for_report(dataset, config, is_held_out=dataset is held_out))
    assert sample_prompts(tiny_chat, config, training, held_out) == before
    text, count = rows_csv([(row.file, row.number) for row in held_out.rows], held_out)
    assert count == 10
    assert text.splitlines()[0] == "instruction,input,output,file,row"


def test_short_questions_are_those_of_a_set_with_mostly_short_answers(
    tiny_chat: handspun.ChatModel, datasets: tuple[TrainConfig, Dataset, Dataset]
) -> None:
    config, training, _ = datasets
    numbers = {question.row for question in short_questions(tiny_chat, config, training)}
    assert numbers == {row for _, row in rows_to_ask(training)} - {1}
    training.release_rows({key for key in rows_to_ask(training) if key[1] == 1})
    assert len(training.rows) == 1
    assert short_questions(tiny_chat, config, training) == []
    assert short_questions(tiny_chat, config, None) == []


@pytest.mark.parametrize("seconds", [1e-9, 60.0])
def test_answers_that_are_not_complete_in_time_are_reported(
    seconds: float,
    tiny_chat: handspun.ChatModel,
    datasets: tuple[TrainConfig, Dataset, Dataset],
) -> None:
    config, _, held_out = datasets
    questions = short_questions(tiny_chat, config, held_out)
    log = SimpleNamespace(phase=lambda _: nullcontext())
    material: Any = SimpleNamespace(chat=tiny_chat, config=config, log=log)
    with captured_log() as lines:
        answers = _row_answers(material, questions, "after", seconds)
    expected = len(questions) if seconds > 1 else 0
    assert len(answers) == expected
    assert [line for line in lines if "answered" in line] == (
        [] if expected else [f"  0 of {len(questions)} answered: {_LIMIT}"]
    )


def test_length_histogram_has_bars_of_one_whole_width(datasets: tuple[TrainConfig, Dataset, Dataset]) -> None:
    found = length_histogram(datasets[1])
    widths = {high - low for low, high in zip(found["edges"], found["edges"][1:], strict=False)}
    assert len(widths) == 1
    assert all(isinstance(edge, int) for edge in found["edges"])
    assert sum(found["counts"]) == 20
    assert found["edges"][0] <= found["median"] <= found["most"] < found["edges"][-1]
