"""The panel as it is seen: in 80 columns and in fewer, without color, in ASCII; and lines without a terminal."""

import io
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from handspun.display import logger
from handspun.runs.live import LiveState, Trace, one_line, panel, sparkline, wrapped
from handspun.runs.log import RunLog
from handspun.runs.sample_answers import SampleAnswer, Samples
from handspun.training.loop import Evaluation, Step
from small_runs import printed_to

CURSOR = re.compile(r"\x1b\[\d*[A-HJKSTfsu]|\x1b\[\?25l")


def step(number: int, loss: float, *, learned: int = 100) -> Step:
    return Step(number, 10, 1 + number // 6, loss, 4.2e-05, 1.234, 8, 400, learned, 300, 2.0)


def seen(
    state: LiveState, *, width: int = 80, height: int = 24, encoding: str = "utf-8", color: bool = False
) -> list[str]:
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding=encoding)
    console = Console(
        file=file, width=width, height=height, force_terminal=color, legacy_windows=False, no_color=True
    )
    console.print(panel(state, width=width, height=height, encoding=encoding, elapsed=65))
    file.flush()
    return buffer.getvalue().decode(encoding).splitlines()


@pytest.fixture
def state() -> LiveState:
    made = LiveState(total_steps=10, num_epochs=2, held_out=True, prompts=("Who are you?", "Tell me a joke."))
    made.see(Evaluation(0, 0, 2.5, 50, True))
    made.see(step(1, 4.0), memory=3_100_000_000, seconds_left=18.0)
    made.see(step(2, 1.0, learned=200), memory=3_200_000_000, seconds_left=16.0)
    made.see(Evaluation(2, 1, 2.25, 50, True))
    answers = [SampleAnswer("Who are you?", "greedy", "I am\n Spindle. " + "And so on. " * 20, "length")]
    made.see(Samples(2, 1, [*answers, SampleAnswer("Tell me a joke.", "greedy", "\x1b[2JNo.", "eos")], 1.0))
    return made


def test_all_that_is_asked_for_is_seen_in_80_columns(state: LiveState) -> None:
    """The loss is a mean over tokens: (4 x 100 + 1 x 200) / 300."""
    lines = seen(state)
    text = "\n".join(lines)
    assert {cell_len(line) for line in lines} == {80}
    assert len(lines) == 10
    assert "step 2 of 10, epoch 1 of 2" in lines[0]
    assert "20% in 1m05s, 16s left" in lines[1]
    assert re.search(r"loss +2\.0000  █▁", lines[2])
    assert "2.2500 at step 2, the best so far; 2.5000 at step 0" in lines[3]
    assert re.search(r"learning rate +4\.20e-05 +tokens/s +200, 75 target", lines[4])
    assert re.search(r"gradient norm +1\.23 +memory +3\.2 GB", lines[5])
    assert re.search(r"at step 2 +Who are you\?", lines[6])
    assert re.search(r"I am Spindle\. And so on\.", lines[7])
    assert lines[8].rstrip(" │").endswith("...")
    assert "joke" not in text


def test_it_has_the_same_height_from_the_beginning(state: LiveState) -> None:
    new = LiveState(total_steps=10, num_epochs=2, held_out=True, prompts=state.prompts)
    for height in (8, 24, 40):
        assert len(seen(new, height=height)) == len(seen(state, height=height)) <= height - 4
    assert len(seen(state, height=40)) == 13  # both answers
    assert len(seen(state, height=8)) == 4


@pytest.mark.parametrize("width", [40, 60, 120])
def test_no_line_is_wider_than_the_terminal(state: LiveState, width: int) -> None:
    state.prompts = ("你好，" * 60, "x" * 300)
    assert {cell_len(line) for line in seen(state, width=width, height=40)} == {width}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_a_terminal_without_unicode_gets_signs_that_it_has(state: LiveState, encoding: str) -> None:
    state.prompts = ("Wer bist du? 你好",)
    text = "\n".join(seen(state, encoding=encoding))
    assert "#_" in text
    assert "Wer bist du? ??" in text
    assert not set(text) & set("█▁╭…")


def test_without_color_it_has_none(state: LiveState) -> None:
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", "\n".join(seen(state, color=True)))


def test_what_a_model_says_does_not_act_on_the_terminal(state: LiveState) -> None:
    assert "␛[2JNo." in "\n".join(seen(state, height=40))
    assert "?[2JNo." in "\n".join(seen(state, height=40, encoding="ascii"))
    assert one_line("a\x07\u202eb\r\nc") == "a␇[U+202E]b c"
    assert one_line(" \n") == "(nothing)"


def test_a_sparkline_is_the_run_from_its_least_to_its_largest() -> None:
    assert sparkline([4, 3, 2, 1, 0], 10) == "█▇▅▃▁"
    assert sparkline([8, 6, 1, 1, 0, 0], 3) == "█▂▁"  # 7, 1, 0
    assert sparkline([1, 1], 10) == "▁▁"
    assert sparkline([], 10) == sparkline([1, 2], 0) == ""


def test_a_trace_of_a_long_run_stays_short_and_true() -> None:
    trace = Trace()
    for value in range(100_000):
        trace.add(value)
    assert len(trace.cells) < 512
    assert trace.cells[0] == pytest.approx((trace.size - 1) / 2)
    assert trace.cells == sorted(trace.cells)


def test_lines_are_cut_between_words_by_their_columns() -> None:
    assert wrapped("one two three", 7, 3) == ["one two", "three"]
    assert wrapped("你好你好", 4, 2) == ["你好", "你好"]
    assert wrapped("one two three four", 9, 1) == ["one tw..."]


def test_on_a_terminal_lines_stand_above_the_panel_and_the_cursor_comes_back(tmp_path: Path) -> None:
    """Also where the run ends in an error."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, no_color=True)
    state = LiveState(total_steps=10, num_epochs=1)
    with suppress(KeyboardInterrupt), RunLog(tmp_path, console) as log, log.watched(state):
        log.event(step(1, 2.0))
        logger.info("saved output/checkpoint-epoch-1")
        raise KeyboardInterrupt
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert printed.index("saved output") < printed.rindex("step 1 of 10")
    assert "step  1/10" not in printed
    assert printed.rindex("\x1b[?25h") > printed.rindex("step 1 of 10")
    assert "step  1/10  epoch 1  loss 2.0000" in (tmp_path / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("how", ["file", "dumb", "quiet"])
def test_anywhere_else_there_are_lines_alone(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file, on a dumb terminal; another rank says nothing at all."""
    if how == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=how != "file", width=80, quiet=how == "quiet")
    with RunLog(tmp_path, console) as log, log.watched(LiveState(total_steps=10, num_epochs=1)):
        for number in range(1, 11):
            log.event(step(number, 12.5))
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert not CURSOR.search(printed)
    assert ("step 10/10  epoch 2  loss 12.5000" in printed) == (how != "quiet")
    assert max(map(len, (tmp_path / "train.log").read_text(encoding="utf-8").splitlines())) <= 110


def test_the_time_left_does_not_count_the_first_step(tmp_path: Path) -> None:
    """It took a minute, and the others two seconds each."""
    console = Console(file=io.StringIO(), width=120)
    with RunLog(tmp_path, console, clock=iter(range(0, 1000, 2)).__next__) as log:
        log.event(replace(step(1, 2.0), seconds=60.0))
        log.event(step(2, 2.0))
        log.event(step(3, 2.0))
    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert lines[0].endswith(" target)")
    assert [line.rpartition("  left ")[2] for line in lines[1:]] == ["16s", "14s"]


def test_a_phase_is_announced_before_it_begins_and_timed(tmp_path: Path) -> None:
    file = io.StringIO()
    times = iter([0.0, 10.0, 13.0, 20.0, 20.5])
    with RunLog(tmp_path, Console(file=file, width=80), clock=times.__next__) as log:
        with log.phase("answering 3 prompts"):
            assert file.getvalue() == "answering 3 prompts ...\n"
        with log.phase("answering more"):
            pass
    assert file.getvalue() == "answering 3 prompts ...\n  took 3s\nanswering more ...\n"


def test_on_a_terminal_a_spinner_runs_during_a_phase_and_the_cursor_comes_back(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, no_color=True)
    with RunLog(tmp_path, console) as log, suppress(KeyboardInterrupt), log.phase("answering 3 prompts"):
        raise KeyboardInterrupt
    printed = printed_to(console)
    assert printed.startswith("answering 3 prompts ...")
    assert "⠋" in printed
    assert printed.rindex("\x1b[?25h") > printed.rindex("⠋")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", printed)
    assert "⠋" not in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_a_resumed_run_shows_what_was_before_it(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    with RunLog(tmp_path, console) as log:
        for event in (Evaluation(0, 0, 2.5, 50, True), step(1, 4.0), step(2, 1.0)):
            log.event(event)
    state = LiveState(total_steps=10, num_epochs=1, held_out=True)
    with RunLog(tmp_path, console, resumed_at=1) as log, log.watched(state):
        assert (state.step, state.loss, len(state.evaluations)) == (1, 4.0, 1)
