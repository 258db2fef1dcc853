"""Compare a run that is killed and resumed with an uninterrupted one, on the user's own setup."""

import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from handspun.config import TrainConfig
from handspun.data.rows import read_sources
from handspun.display import logger
from handspun.errors import TrainingError
from handspun.files import read_json_object, sha256_of


@dataclass(frozen=True)
class Comparison:
    """The steps after which the run was killed, and the sha256 of each weights file, by checkpoint and name."""

    kills: list[int]
    undisturbed: dict[str, str]
    killed: dict[str, str]

    @property
    def same(self) -> bool:
        """True if all weights are bit-identical."""
        return self.undisturbed == self.killed


def kill_and_compare(config: TrainConfig, *, steps: int, kills: int, rng: random.Random) -> Comparison:
    """Train `steps` optimizer steps on the first rows twice: uninterrupted, and killed `kills` times and resumed.

    A run has two epochs and its own process. It is killed by SIGKILL at random moments and restarted with the same
    command. Raises TrainingError, with the run's last output, if a run fails by itself.

    Args:
        config: Options of the run.
        steps: Optimizer steps.
        kills: Number of kills.
        rng: Chooses the moments of the kills.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made = _config(config, work, steps)
        logger.info(f"uninterrupted run: {steps} steps")
        _train(replace(made, output_dir=str(work / "undisturbed")), work)
        again = replace(made, output_dir=str(work / "killed"))
        seconds = _seconds_of_a_step(work / "undisturbed")
        found = []
        for after in sorted(rng.sample(range(1, steps), min(kills, steps - 1))):
            code = _train(again, work, kill_after=(after, rng.uniform(0, 2 * seconds)))
            if not code or _has_finished(work / "killed"):  # a kill may come while it writes its report
                logger.info("the run finished before the next kill")
                break
            found.append(_last_step(work / "killed"))
            logger.info(f"killed after step {found[-1]}")
        else:
            _train(again, work)
        return Comparison(found, _weights(work / "undisturbed"), _weights(work / "killed"))


def _config(config: TrainConfig, work: Path, steps: int) -> TrainConfig:
    """Return options for two epochs of half the steps each, on just enough rows, with frequent checkpoints."""
    rows = read_sources(config.sources, None, config.column_names, config.limit)[
        : max(steps // 2, 1) * config.batch_size
    ]
    data = work / "rows.jsonl"
    data.write_text("".join(json.dumps(row.values, default=str) + "\n" for row in rows), encoding="utf-8")
    return replace(
        config,
        data=str(data),
        columns=None,  # the rows have the formats' names now
        limit=None,
        eval_ratio=config.eval_ratio or 0.0,
        num_epochs=2,
        max_steps=None,
        save_steps=config.save_steps or max(steps // 5, 1),
        sample_answers=False,
        report_rows=0,
        overwrite=False,
        resume=None,
        dry_run=False,
    )


def _train(config: TrainConfig, work: Path, *, kill_after: tuple[int, float] | None = None) -> int:
    """Run `handspun train` in its own process and return its exit code.

    kill_after: (step, seconds); kill the process that many seconds after the step, during later steps or a save.
    """
    options = work / "options.yaml"
    given = {name: value for name, value in asdict(config).items() if value is not None}
    options.write_text(yaml.safe_dump(given), encoding="utf-8")
    log = work / "output.txt"
    with log.open("w", encoding="utf-8") as output:
        command = [sys.executable, "-m", "handspun", "train", "--config", str(options)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            if kill_after is not None:
                step, seconds = kill_after
                _wait_for_step(Path(config.output_dir), step, process)
                time.sleep(seconds)
                process.send_signal(signal.SIGKILL)
            code = process.wait()
        finally:
            process.kill()
    if code and code != -signal.SIGKILL:
        last = "\n".join(log.read_text(encoding="utf-8").splitlines()[-5:])
        raise TrainingError(f"the run failed by itself with exit code {code}. Its last output:\n{last}")
    return code


def _wait_for_step(output: Path, step: int, process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None and _last_step(output) < step:
        time.sleep(0.01)


def _has_finished(output: Path) -> bool:
    return (read_json_object(output / "run.json") or {}).get("status") == "finished"


def _last_step(output: Path) -> int:
    return max((int(event["step"]) for event in _events(output)), default=0)


def _seconds_of_a_step(output: Path) -> float:
    return float(statistics.median(event["seconds"] for event in _events(output) if event["event"] == "step"))


def _events(output: Path) -> list[dict[str, Any]]:
    file = output / "metrics.jsonl"
    events = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError):  # a line truncated by the kill
            events.append(json.loads(line))
    return events


def _weights(output: Path) -> dict[str, str]:
    files: list[Path] = sorted(output.glob("checkpoint-[eb]*/*.safetensors"))
    return {f"{file.parent.name}/{file.name}": sha256_of(file) for file in files}
