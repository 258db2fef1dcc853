"""Memory does not grow with time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_thousand_steps_and_generations_hold_no_more_memory_than_two_fifths_of_them() -> None:
    done = subprocess.run(
        [sys.executable, HELPERS / "soak.py", "1000"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        work, early, late = line.split()
        assert int(late) <= 1.05 * int(early), f"{work}: {early} bytes after two fifths, {late} at the end"
    assert done.stdout.count("\n") == 2
