"""The record of a run that nobody made."""

from typing import Any

from handspun.data.examples import DataReport, RowIssue
from handspun.runs.record import Environment, RowSet, RowSets, RunRecord
from handspun.training.loop import Evaluation
from handspun.training.memory import Plan

_PLAN = Plan(
    batching="packed",
    examples=10,
    steps=12,
    micro_batches=3,
    tokens=500,
    learned_tokens=200,
    computed_tokens=400,
    parameters=494_000_000,
    trainable=8_000_000,
    peak_memory=10**9,
    checkpoint_size=10**6,
    training_state_size=10**6,
)


def record_of(**config: Any) -> RunRecord:
    dropped = [RowIssue("train.csv", row, "empty output") for row in (3, 4)]
    rows = RowSet(
        sha256="ab" * 32, examples=10, tokens=500, learned_tokens=200, rows=DataReport(12, 10, dropped=dropped)
    )
    return RunRecord(
        started="2026-11-25T12:00:00+00:00",
        config=config,
        data=RowSets(rows, rows),
        environment=Environment(
            machine="CPU",
            cores=2,
            system="Linux",
            python="3.11.9",
            command=["handspun", "train", "--data", "/home/me/private/train.csv"],
            versions={"handspun": "0.1.0", "torch": "2.13.0"},
        ),
        dtype="bfloat16",
        processes=1,
        threads=2,
        plan=_PLAN,
        evaluations=[Evaluation(0, 0, 2.0, 50, best=True), Evaluation(4, 1, 1.0, 50, best=True)],
    )
