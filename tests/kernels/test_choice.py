"""Which kernels are used: the CPU's fastest, what the user names, or none, which is said."""

import _ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backends import AVAILABLE, chosen, needs_kernels
from handspun.errors import ConfigError
from handspun.kernels import cpu, kernels_for, native, slower_without
from handspun.kernels.native import INSTRUCTION_SETS, supported_sets
from handspun.kernels.reference import ReferenceKernels

pytestmark = pytest.mark.cpu
CPU = torch.device("cpu")


@needs_kernels
def test_the_fastest_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HANDSPUN_KERNELS", raising=False)
    assert kernels_for(CPU).name == AVAILABLE[0]
    assert slower_without(CPU) is None


@pytest.mark.parametrize("name", [*INSTRUCTION_SETS, "reference"])
def test_the_user_may_name_one(name: str) -> None:
    with chosen(name):
        if name in (*AVAILABLE, "reference"):
            assert kernels_for(CPU).name == name
            assert slower_without(CPU) is None  # it is what the user wants
        else:
            with pytest.raises(ConfigError, match=f"^HANDSPUN_KERNELS={name}: "):
                kernels_for(CPU)
        assert kernels_for(torch.device("meta")).name == "reference"


def test_an_unknown_name_is_refused() -> None:
    names = ", ".join([*supported_sets(), "reference"])
    with chosen("avx3"), pytest.raises(ConfigError) as error:
        kernels_for(CPU)
    assert str(error.value) == (
        f"HANDSPUN_KERNELS=avx3: unknown (expected one of {names}). Set one of them, or unset it to use the "
        "fastest."
    )


def test_without_libraries_pytorch_computes_and_a_line_says_why() -> None:
    with chosen("none"):
        kernels = kernels_for(CPU)
        assert isinstance(kernels, ReferenceKernels)
        assert not kernels.can_attend(2, 1, 64)
        assert "for want of a C compiler" in str(slower_without(CPU)) or not supported_sets()
        assert slower_without(torch.device("cuda")) is None


def test_a_library_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.so").write_text("not a library")
    monkeypatch.setattr(native, "library_file", lambda _: tmp_path / "broken.so")
    native.native_kernels.cache_clear()
    try:
        assert str(native.native_kernels("avx2")).startswith(f"{tmp_path}/broken.so cannot be loaded (")
    finally:
        native.native_kernels.cache_clear()


def test_a_library_of_another_version_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path(_ctypes.__file__)  # a library that lacks the kernels' functions
    monkeypatch.setattr(native, "library_file", lambda _: other)
    native.native_kernels.cache_clear()
    try:
        said = str(native.native_kernels("avx2"))
    finally:
        native.native_kernels.cache_clear()
    assert said.startswith(f"{other} is of another version (")
    root = Path(__file__).parents[2]
    assert said.endswith(f"). Install the package again: pip install --no-deps -e {root}")


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_there_is_one_openmp_runtime() -> None:
    """The kernels share torch's threads: a second pool would compete with it for the cores."""
    assert kernels_for(CPU).quantize(torch.ones(2, 8))[0].tolist() != []
    maps = Path("/proc/self/maps").read_text()
    found = {line.split()[-1] for line in maps.splitlines() if re.search(r"/lib(gomp|omp|iomp)[^/]*\.so", line)}
    assert len(found) == 1, found
    assert any("torch" in path for path in found)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="builds with gcc on Linux")
def test_a_wheel_brings_the_kernels_and_needs_no_compiler(tmp_path: Path) -> None:
    """Built here; installed without its dependencies, which this environment lends; used with an empty PATH."""
    root = Path(__file__).parents[2]
    copy = tmp_path / "source"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, copy / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(copy)]
    subprocess.run(build, check=True)
    [wheel] = tmp_path.glob("handspun-*-py3-none-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "empty")], check=True)
    python = tmp_path / "empty" / "bin" / "python"
    [packages] = (tmp_path / "empty").glob("lib/python*/site-packages")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), str(wheel)],
        check=True,
    )
    (packages / "others.pth").write_text(str(Path(torch.__file__).parents[1]))
    code = (
        "import torch, handspun; from handspun.kernels import kernels_for;"
        "kernels = kernels_for(torch.device('cpu')); kernels.quantize(torch.ones(1, 8));"
        "print(handspun.__file__, kernels.name)"
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HANDSPUN", "PYTHON"))
    }
    done = subprocess.run(
        [str(python), "-c", code], env=environment | {"PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(packages / "handspun" / "__init__.py"), supported_sets()[0]]


def test_pytorchs_names_of_instruction_sets_are_linuxs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc/cpuinfo: an Apple CPU, as PyTorch describes it."""
    described = {"neon": True, "dot": True, "i8mm": False, "fma3": True, "avx512_f": True, "cpu_name": "M1"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: described, raising=False)
    monkeypatch.setattr(cpu, "_field", lambda *_: "")
    assert cpu._flags_of_the_cpu.__wrapped__() == {"asimd", "asimddp", "fma", "avx512f"}
