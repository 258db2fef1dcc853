"""The cost model of a step, by hand."""

import pytest

from handspun.decoding.step_budget import StepBudget


def test_prompt_tokens_fill_the_time_that_answers_leave() -> None:
    budget = StepBudget(0.1, answer_seconds=0.02, token_seconds=0.001)
    assert budget.prompt_tokens(are_answers_waiting=True) == 80
    assert budget.prompt_tokens(are_answers_waiting=False) == 400


def test_prompt_tokens_are_never_none() -> None:
    assert StepBudget(0.1, answer_seconds=0.5).prompt_tokens(are_answers_waiting=True) == 16


def test_measured_moves_towards_what_steps_took() -> None:
    budget = StepBudget(0.1, answer_seconds=0.01, token_seconds=0.001)
    budget.measured(answers=4, prompt_tokens=0, seconds=0.03)
    assert budget.answer_seconds == pytest.approx(0.01 + 0.3 * 0.02)
    budget.measured(answers=4, prompt_tokens=100, seconds=0.016 + 0.2)
    assert budget.token_seconds == pytest.approx(0.001 + 0.3 * 0.001)
    budget.measured(answers=0, prompt_tokens=0, seconds=9.0)
    assert budget == StepBudget(0.1, pytest.approx(0.016), pytest.approx(0.0013))  # type: ignore[arg-type]
