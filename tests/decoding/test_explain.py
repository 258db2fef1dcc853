"""What is said about a token is what happened."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from handspun.cli.views.explain import explanation_table
from handspun.decoding.explain import Candidate, Effect, Explanation, explain
from handspun.decoding.generate import generate, stream
from handspun.decoding.options import SamplingParams
from handspun.decoding.processors import History, make_processors
from handspun.decoding.results import GenerationResult
from handspun.decoding.sampling import gumbel_noise
from handspun.errors import ConfigError
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer

_CHAT = ChatModel(tiny_model("qwen2"), tiny_tokenizer(), "tiny")
_SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1.5,
    "top_k": 40,
    "repetition_penalty": 1.2,
    "seed": 3,
}


def _answer(**options: Any) -> GenerationResult:
    [answer] = generate(_CHAT, "Tell me a joke.", explain=True, **{"max_new_tokens": 8, **options})
    return answer


def _explained(
    logits: Tensor,
    options: SamplingParams,
    token: int,
    noise: Tensor | None = None,
    history: Sequence[int] = (),
) -> Explanation:
    [step] = explain(
        logits,
        [History([0], list(history))],
        make_processors(options),
        tokens=torch.tensor([token]),
        noise=noise,
        text_of=str,
    )
    return step


def test_the_numbers_of_a_step_worked_out_by_hand() -> None:
    """Probabilities .5 .3 .2; 0 is suppressed, so 1 and 2 have .6 and .4; of these, top_k 1 keeps 1."""
    options = SamplingParams(do_sample=True, suppress_tokens=(0,), top_k=1)
    step = _explained(torch.tensor([[0.5, 0.3, 0.2]]).log(), options, 1, noise=torch.tensor([[1.0, -2.0, 3.0]]))
    assert (step.rank, step.left, step.runner_up) == (2, 1, None)
    assert (step.probability, step.left_mass) == pytest.approx((0.3, 0.3))
    assert step.chosen == Candidate(token_id=1, text="1", probability=1.0, noise=-2.0)
    assert [(e.processor, e.removed, e.changed) for e in step.effects] == [
        ("suppress_tokens", 1, 0),
        ("top_k", 1, 0),
    ]
    assert [(e.removed_mass, e.probability) for e in step.effects] == [
        pytest.approx((0.5, 0.6)),
        pytest.approx((0.4, 1)),
    ]


@pytest.mark.parametrize(("token", "rank"), [(0, 3), (1, 1), (2, 2)])
def test_the_rank_of_a_token_by_hand(token: int, rank: int) -> None:
    assert _explained(torch.tensor([[0.2, 0.5, 0.3]]).log(), SamplingParams(), token).rank == rank


def test_the_runner_up_of_a_draw_is_the_next_in_logit_and_noise() -> None:
    logits, noise = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.0, 9.0, 5.0]])
    assert _explained(logits, SamplingParams(do_sample=True), 1, noise=noise).runner_up.token_id == 2
    greedy = _explained(logits, SamplingParams(), 0)
    assert (greedy.runner_up.token_id, greedy.runner_up.noise, greedy.chosen.noise) == (1, None, None)


def test_a_processor_that_changes_a_logit_and_one_that_does_nothing() -> None:
    options = SamplingParams(presence_penalty=math.log(2), min_new_tokens=1, eos_token_ids=(2,))
    step = _explained(torch.tensor([[0.5, 0.25, 0.25]]).log(), options, 1, history=[0])
    [effect] = step.effects  # the answer has a token already
    assert asdict(effect) == pytest.approx(
        asdict(Effect(processor="presence_penalty", removed=0, removed_mass=0.0, changed=1, probability=1 / 3))
    )


def test_explaining_changes_no_answer_and_explains_every_token_of_it() -> None:
    for options in ({}, _SAMPLING, {"regex": "(ab)+"}):
        answer = _answer(**options)
        [plain] = generate(_CHAT, "Tell me a joke.", max_new_tokens=8, **options)
        assert plain.explanation is None
        assert [step.chosen.token_id for step in answer.explanation] == answer.token_ids == plain.token_ids


def test_an_explained_draw_is_the_one_that_was_made() -> None:
    answer = _answer(logprobs=True, **_SAMPLING)
    assert len(answer.explanation) == len(answer.token_ids) > 0
    for number, step in enumerate(answer.explanation):
        noise = gumbel_noise((3, 0, 0), number, 330)
        assert step.chosen.noise == noise[step.chosen.token_id].item()
        margin = math.log(step.chosen.probability / step.runner_up.probability)
        assert margin + step.chosen.noise - step.runner_up.noise > 0
        assert math.log(step.probability) == pytest.approx(answer.logprobs[number], abs=1e-4)
        assert (step.left, [effect.processor for effect in step.effects]) == (
            40,
            ["repetition_penalty", "temperature", "top_k"],
        )


def test_rows_of_a_batch_have_their_own_explanations() -> None:
    prompts = ["Hi", "Tell me a joke.", "a"]
    options = {"max_new_tokens": 5, "explain": True, **_SAMPLING, "seed": (1, 2, 3)}
    together = generate(_CHAT, prompts, **options)
    for prompt, seed, answer in zip(prompts, (1, 2, 3), together, strict=True):
        [alone] = generate(_CHAT, prompt, **{**options, "seed": seed})
        assert len(answer.explanation) == len(answer.token_ids) > 0
        for one, other in zip(alone.explanation, answer.explanation, strict=True):
            assert (one.rank, one.left, one.chosen.noise) == (other.rank, other.left, other.chosen.noise)
            assert one.probability == pytest.approx(other.probability, abs=1e-5)


def test_a_streamed_answer_has_its_explanation_at_the_end() -> None:
    *_, last = stream(_CHAT, "Hi", max_new_tokens=3, explain=True)
    assert len(last.result.explanation) == 3
    assert json.loads(json.dumps(asdict(last.result)))["explanation"][0]["rank"] == 1


def test_beams_are_not_explained_and_that_is_said() -> None:
    with pytest.raises(ConfigError, match="--explain .* --num-beams 2 chooses among whole answers"):
        _answer(num_beams=2)


@pytest.mark.parametrize("options", [{}, {**_SAMPLING, "no_repeat_ngram_size": 1, "top_p": 0.9}], ids=str)
def test_the_table_keeps_to_80_columns_and_shows_each_token(options: dict[str, Any]) -> None:
    answer = _answer(**options)
    console = Console(width=80, record=True, force_terminal=False)
    with console.capture() as captured:
        console.print(explanation_table(answer.explanation))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    for number, step in enumerate(answer.explanation, start=1):
        [line] = [line for line in lines if line.startswith(f"{number} ")]
        assert f"{100 * step.probability:.1f}%" in line or "<0.1%" in line
    assert ("draw" in lines[0]) == bool(options)
