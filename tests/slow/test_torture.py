"""Deaths at random moments, and a disk that fails: short forms of what `make torture` does at length."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, HELPERS / "torture.py", "--kills", "16", "--replacing", "8", "--work", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "24 kills: " in done.stdout
    assert "5 --overwrite of a run" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
def test_whatever_call_of_a_save_fails_no_checkpoint_is_less_than_whole(tmp_path: Path) -> None:
    library = tmp_path / "failing_disk.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", library, HELPERS / "failing_disk.c", "-ldl"], check=True
    )
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, HELPERS / "failing_disk.py", library, tmp_path / "work"],
        capture_output=True,
        text=True,
        check=False,
        env={**ENVIRONMENT, "LD_PRELOAD": str(library)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    calls = int(done.stdout.split()[0])
    assert calls > 40, "calls of a save are missed"
