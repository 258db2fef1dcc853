"""`torchrun several_runs.py configs.json`: the runs of a list of TrainConfigs, one by one, in one launch."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from handspun import TrainConfig, train

if __name__ == "__main__":
    dist.init_process_group("gloo")
    for options in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        train(TrainConfig(**options))
    dist.destroy_process_group()
