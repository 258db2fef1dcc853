"""A loss far above what is usual is a spike; an ordinary run has none."""

import json
from pathlib import Path

import pytest
import torch

from handspun.config import TrainConfig
from handspun.training.guards import WINDOW, Spike, spike_in
from handspun.training.loop import Loop, start, train
from handspun.training.runner import select_runner
from tiny import tiny_model

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def spike(losses: list[float], loss: float) -> Spike | None:
    return spike_in(losses, loss, step=len(losses) + 1, epoch=4, batch=[("a", 1)])


def test_by_hand() -> None:
    """1.9 and 2.1 by turns, and 2.0 in between: the median is 2.0, the median deviation is 0.1; fifteen times
    that is 1.5."""
    losses = [1.9, 2.1, 2.0, 1.9, 2.1] * 6
    assert spike(losses, 3.49) is None
    found = spike(losses, 3.51)
    assert found is not None
    assert (found.usual, found.limit) == (2.0, pytest.approx(3.5))
    assert (found.step, found.epoch, found.loss, found.batch) == (31, 4, 3.51, [("a", 1)])


def test_losses_near_zero_may_be_multiples_of_each_other() -> None:
    """The deviation is 0.001: what counts is the least distance of 0.5."""
    assert spike([0.010, 0.012, 0.011] * 10, 0.51) is None
    assert spike([0.010, 0.012, 0.011] * 10, 0.52) is not None


def test_a_loss_at_the_limit_is_no_spike() -> None:
    """Twenty times 1.0: the limit is 1.5."""
    assert spike([1.0] * 20, 1.5) is None
    found = spike([1.0] * 20, 1.5 + 2**-20)
    assert found is not None
    assert (found.usual, found.limit) == (1.0, 1.5)


def test_there_is_no_telling_with_fewer_than_twenty() -> None:
    assert spike([2.0] * 19, 100.0) is None
    assert spike([2.0] * 20, 100.0) is not None


def test_only_the_last_ones_count() -> None:
    assert spike([9.0] * 200 + [2.0] * WINDOW, 9.0) is not None


def test_spikes_among_the_losses_do_not_hide_the_next_one() -> None:
    assert spike([2.0, 2.1, 1.9, 2.0, 50.0] * 10, 50.0) is not None


def measured_curves() -> dict[str, list[list[float]]]:
    """The losses of all steps of each run in the results that hold them, by the name of the file."""
    curves: dict[str, list[list[float]]] = {}
    for file in sorted(RESULTS.glob("*.json")):
        for runs in json.loads(file.read_text(encoding="utf-8"))["runs"].values():
            for run in runs if isinstance(runs, list) else []:
                if isinstance(run, dict) and "losses" in run:
                    curves.setdefault(file.stem, []).append(run["losses"])
    return curves


CURVES = measured_curves()


def test_there_are_runs_that_were_measured() -> None:
    assert len(CURVES) >= 8
    assert sum(map(len, CURVES.values())) >= 80


@pytest.mark.parametrize("name", CURVES)
def test_no_alarm_on_the_runs_that_were_measured(name: str) -> None:
    """Alpaca rows, 8 to a batch: full and LoRA, learning rates from 5e-6 to 1e-3, and batches sorted by length."""
    alarms = [
        (number, i)
        for number, losses in enumerate(CURVES[name])
        for i in range(len(losses))
        if spike(losses[:i], losses[i])
    ]
    assert not alarms


def test_the_loop_names_the_rows_of_a_spike_and_a_state_carries_what_is_usual() -> None:
    """Two runs share a state: the second one's first step is seen as what it is."""
    from handspun.data.examples import Example

    model, config = tiny_model("qwen2"), TrainConfig(num_epochs=1, batch_size=1)
    examples = [Example([1, 2, 3], [False, True, True], "a.csv", 7)]
    with select_runner(model, config, examples, dtype=torch.float32, pad_token_id=0) as runner:
        state = start(model, config)
        state.losses = [0.1] * WINDOW
        made = list(train(Loop(config=config, examples=examples, runner=runner), state))
    (found,) = [event for event in made if isinstance(event, Spike)]
    assert found.batch == [("a.csv", 7)]
    assert (found.usual, found.limit, found.step) == (0.1, 0.6, 1)
    assert state.losses == [0.1] * (WINDOW - 1) + [found.loss]
