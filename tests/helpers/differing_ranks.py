"""`differing_ranks.py cases.json`, as one of two ranks: runs whose options, files or switches are not alike.

A case is {"options", "of_rank_1", "switches_of_rank_1"}. For each, a JSON line has its error's type and message.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from handspun import HandspunError, TrainConfig, train
from handspun.config.spelling import command_line


def outcome(case: dict[str, Any], rank: int) -> dict[str, Any]:
    """Run this rank's side of a case."""
    options = dict(case["options"])
    if rank == 1:
        options |= case.get("of_rank_1", {})
        os.environ.update(case.get("switches_of_rank_1", {}))
    try:
        with command_line():  # as torchrun starts it
            train(TrainConfig(**options))
        error: dict[str, Any] = {"type": None, "message": ""}
    except HandspunError as caught:
        error = {"type": type(caught).__name__, "message": str(caught)}
    if rank == 1:
        for name in case.get("switches_of_rank_1", {}):
            del os.environ[name]
    return {**error, "faults": faults()}


def faults() -> int:
    """Return how many new pages of memory 20 tensors of the same size take: none, where freed memory is kept."""
    for _ in range(3):
        torch.ones(16_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(json.dumps(outcome(case, dist.get_rank())), flush=True)
    dist.destroy_process_group()
