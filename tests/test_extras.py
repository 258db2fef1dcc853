"""Without its extras the package works, and what needs one says how to install it."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"datasets": "hub", "matplotlib": "report", "llguidance": "constraints", "uvicorn": "serve"}


def run(arguments: list[str], folder: Path, *packages: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that has none of the packages."""
    finder = (
        "import sys\n"
        "class Hidden:\n"
        f"    def find_spec(self, name, *_):\n        if name.partition('.')[0] in {packages!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "import importlib.util as util\n"
        "real = util.find_spec\n"
        f"util.find_spec = lambda name, *more: None if name in {packages!r} else real(name, *more)\n"
        "from handspun.cli import main\n"
        f"sys.exit(main({arguments!r}))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", finder], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_all_holds_every_other_extra_that_is_not_a_tracker() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert extras["all"] == ["handspun[hub,report,constraints,serve]"]
    assert set(PACKAGES.values()) | {"all", "tensorboard", "trackio", "wandb"} == set(extras)


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("datasets", ["preview", "--model", "M", "--data", "somebody/rows"]),
        ("uvicorn", ["serve", "--model", "M"]),
        pytest.param("llguidance", ["generate", "--model", "M", "--choice", "yes", "Hi"], marks=pytest.mark.slow),
    ],
)
def test_an_absent_extra_is_one_error_with_the_install_line(
    tiny_folder: Path, tmp_path: Path, package: str, arguments: list[str]
) -> None:
    given = [str(tiny_folder) if argument == "M" else argument for argument in arguments]
    done = run(given, tmp_path, package)
    assert done.returncode == 2, done.stderr
    assert f"needs the package {package}, which is not installed" in done.stderr
    assert f"pip install 'handspun[{PACKAGES[package]}]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_without_any_extra_trains_and_says_that_it_has_no_report(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("instruction,output\n" + "Say hi.,Hi.\nSay no.,No.\n" * 4)
    options = ["--num-epochs", "1", "--no-sample-answers", "--output-dir", "output", "--dtype", "float32"]
    done = run(["train", "--model", str(tiny_folder), "--data", "train.csv", *options], tmp_path, *PACKAGES)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output" / "checkpoint-epoch-1" / "model.safetensors").exists()
    assert "no report: a report with pictures needs the package matplotlib" in done.stdout
