"""The type of the matmuls: bfloat16 if the CPU has it and a clock says that it is clearly faster."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from handspun.files import cache_folder
from handspun.kernels import cpu
from handspun.training import dtype as dtype_module
from handspun.training.dtype import choose_dtype

pytestmark = pytest.mark.cpu
CPU = torch.device("cpu")
OLD = frozenset({"avx", "avx2", "fma"})
NEW = OLD | {"avx512f", "avx512_bf16", "amx_bf16"}


@pytest.fixture
def on_a_new_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A CPU with bfloat16 and an empty cache, whose folder this is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "cpu_flags", lambda: NEW)
    monkeypatch.setattr(dtype_module, "_onednn_has_bfloat16", lambda: True)
    return tmp_path


class Clock:
    """Each matmul takes as long as its type is told to take, times its number of values; counts the matmuls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, bfloat16: float, float32: float) -> None:
        self.now, self.timed = 0.0, list[tuple[int, torch.dtype]]()
        each = {torch.bfloat16: bfloat16, torch.float32: float32}

        def seconds(_device: Any, dtype: torch.dtype, tokens: int, width: int, _clock: Any) -> float:
            self.timed.append((tokens, dtype))
            taken = each[dtype] * tokens * width**2
            self.now += 4 * taken
            return taken

        monkeypatch.setattr(dtype_module, "_seconds", seconds)

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("bfloat16", "expected"),
    [
        (0.5, (torch.bfloat16, "bfloat16 matmuls are 2.0 times as fast as float32 here")),
        (0.9, (torch.float32, "bfloat16 matmuls are 1.1 times as fast as float32 here")),
        (1.6, (torch.float32, "bfloat16 matmuls are 0.6 times as fast as float32 here")),
    ],
)
@pytest.mark.usefixtures("on_a_new_cpu")
def test_a_cpu_takes_bfloat16_if_it_is_clearly_faster_and_says_so(
    bfloat16: float, expected: tuple[torch.dtype, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, bfloat16=bfloat16 * 1e-12, float32=1e-12)
    assert choose_dtype(CPU, clock) == expected
    assert {tokens for tokens, _ in clock.timed} == {8, 64, 256}


@pytest.mark.usefixtures("on_a_new_cpu")
def test_the_probe_ends_as_soon_as_float32_has_won(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times slower, as without instructions: only the smallest matmul is tried."""
    clock = Clock(monkeypatch, bfloat16=1e-8, float32=1e-10)
    assert choose_dtype(CPU, clock) == (torch.float32, "bfloat16 matmuls are 0.0 times as fast as float32 here")
    assert [tokens for tokens, _ in clock.timed] == [8, 8]


@pytest.mark.usefixtures("on_a_new_cpu")
def test_a_small_matmul_that_is_mostly_overhead_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured with AMX: 11 and 30 microseconds for 8 tokens, 13,130 and 780 for 256."""
    measured = {torch.float32: {8: 11e-6, 64: 198e-6, 256: 13130e-6}}
    measured[torch.bfloat16] = {8: 30e-6, 64: 76e-6, 256: 780e-6}
    monkeypatch.setattr(dtype_module, "_seconds", lambda _device, dtype, tokens, *_: measured[dtype][tokens])
    expected = (torch.bfloat16, "bfloat16 matmuls are 16.8 times as fast as float32 here")
    assert choose_dtype(CPU, lambda: 0.0) == expected


@pytest.mark.usefixtures("on_a_new_cpu")
def test_the_probe_ends_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, bfloat16=1e-8, float32=2e-8)
    assert choose_dtype(CPU, clock)[0] == torch.bfloat16
    assert [tokens for tokens, _ in clock.timed] == [8, 8, 64, 64]


@pytest.mark.usefixtures("on_a_new_cpu")
def test_the_probe_computes_on_one_thread_and_restores_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, set_threads = list[int](), torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.append(count) or set_threads(count))
    before = torch.get_num_threads()
    choose_dtype(CPU)
    assert threads == [1, before] * (len(threads) // 2)
    assert len(threads) in (4, 8, 12)
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("on_a_new_cpu")
def test_the_probe_times_real_products() -> None:
    """In at most a second, on a machine with other work; 0.1 seconds alone."""
    spent: list[float] = []
    dtype, reason = choose_dtype(CPU, lambda: spent.append(time.process_time()) or spent[-1])
    assert dtype in (torch.float32, torch.bfloat16)
    assert "times as fast" in reason
    assert spent[-1] - spent[0] < 1


@pytest.mark.parametrize(
    ("flags", "has_onednn", "expected"),
    [
        (OLD, True, "this CPU has no bfloat16 instructions"),
        (OLD | {"avx512f", "avx512_vnni"}, True, "this CPU has no bfloat16 instructions"),
        (NEW, False, "this CPU has no bfloat16 instructions"),
        (frozenset({"asimd", "bf16"}), True, "bfloat16 matmuls are 2.0 times as fast as float32 here"),
        (frozenset[str](), True, "this CPU has no bfloat16 instructions"),
    ],
)
def test_the_flags_are_asked_before_the_clock(
    on_a_new_cpu: Path, flags: frozenset[str], has_onednn: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "cpu_flags", lambda: flags)
    monkeypatch.setattr(dtype_module, "_onednn_has_bfloat16", lambda: has_onednn)
    clock = Clock(monkeypatch, bfloat16=1e-12, float32=2e-12)
    assert choose_dtype(CPU, clock)[1] == expected
    assert bool(clock.timed) == ("2.0 times" in expected)
    assert len(list(on_a_new_cpu.rglob("dtype-*.json"))) == bool(clock.timed)


def test_the_answer_is_remembered_for_the_same_cpu_threads_and_version(
    on_a_new_cpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = choose_dtype(CPU, Clock(monkeypatch, bfloat16=1e-12, float32=2e-12))
    again = Clock(monkeypatch, bfloat16=2e-12, float32=1e-12)
    assert choose_dtype(CPU, again) == first
    assert again.timed == []
    for name, value in (("get_num_threads", lambda: 77), ("__version__", "9.9")):
        with monkeypatch.context() as patch:
            patch.setattr(torch, name, value)
            other = Clock(monkeypatch, bfloat16=2e-12, float32=1e-12)
            assert choose_dtype(CPU, other)[0] == torch.float32
            assert other.timed
    assert len(list(on_a_new_cpu.rglob("dtype-*.json"))) == 3


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def write(file: Path) -> None:
        record = json.loads(file.read_text())
        change(record)
        file.write_text(json.dumps(record))

    return write


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text(""),
        lambda file: file.write_text("[1]"),
        lambda file: file.write_bytes(b"\xff\xfe"),
        lambda file: file.write_text(file.read_text()[:-9]),
        damaged(lambda record: record.pop("sha256")),
        damaged(lambda record: record.update(bfloat16_gain=7.5)),
        damaged(lambda record: record.update(bfloat16_gain="2.0")),
        damaged(lambda record: record.update(bfloat16_gain=float("nan"))),
        damaged(lambda record: record.update(bfloat16_gain=True)),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_an_answer_that_was_changed_is_measured_again(
    on_a_new_cpu: Path, damage: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_dtype(CPU, Clock(monkeypatch, bfloat16=1e-12, float32=2e-12))
    [file] = on_a_new_cpu.rglob("dtype-*.json")
    damage(file)
    again = Clock(monkeypatch, bfloat16=2e-12, float32=1e-12)
    assert choose_dtype(CPU, again)[0] == torch.float32
    assert again.timed


@pytest.mark.usefixtures("on_a_new_cpu")
def test_a_cache_that_cannot_be_written_costs_nothing_but_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    for _ in range(2):
        clock = Clock(monkeypatch, bfloat16=1e-12, float32=2e-12)
        assert choose_dtype(CPU, clock)[0] == torch.bfloat16
        assert clock.timed


@pytest.mark.parametrize(("gain", "expected"), [(2.0, torch.bfloat16), (1.1, torch.float32)])
def test_a_gpu_takes_bfloat16_if_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, gain: float, expected: torch.dtype
) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    clock = Clock(monkeypatch, bfloat16=1e-12, float32=gain * 1e-12)
    assert choose_dtype(torch.device("cuda"), clock)[0] == expected
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: False)
    assert choose_dtype(torch.device("cuda"), clock) == (torch.float32, "this GPU does not support bfloat16")


@pytest.mark.parametrize(
    ("variable", "value", "gone", "left"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", {"avx512f", "amx_bf16", "avx_vnni"}, {"avx2"}),
        ("ONEDNN_MAX_CPU_ISA", "avx2_vnni", {"avx512f", "amx_bf16"}, {"avx2", "avx_vnni"}),
        ("DNNL_MAX_CPU_ISA", "AVX512_CORE", {"avx512_vnni", "avx512_bf16", "amx_bf16"}, {"avx512f"}),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI", {"avx512_bf16", "amx_bf16"}, {"avx512_vnni"}),
        ("ATEN_CPU_CAPABILITY", "avx2", {"avx512f", "avx512_vnni", "amx_bf16"}, {"avx2", "avx_vnni"}),
        ("ATEN_CPU_CAPABILITY", "default", {"avx2", "avx512f"}, {"sse4_2"}),
        ("ONEDNN_MAX_CPU_ISA", "ALL", set(), {"amx_bf16"}),
    ],
)
def test_flags_that_the_environment_forbids_are_not_there(
    variable: str, value: str, gone: set[str], left: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_of_them = NEW | {"sse4_2", "avx_vnni", "avx512_vnni"}
    monkeypatch.setattr(cpu, "_flags_of_the_cpu", lambda: all_of_them)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    assert cpu.cpu_flags() == all_of_them
    monkeypatch.setenv(variable, value)
    assert not cpu.cpu_flags() & gone
    assert cpu.cpu_flags() >= left
    assert cache_folder().is_absolute()


def test_the_flags_of_cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first processor's, on x86 and on ARM; none where there is no such file, and PyTorch tells nothing."""
    texts = {
        "x86": (
            "processor\t: 0\nmodel name\t: Ryzen\nflags\t\t: avx avx2\n\nprocessor\t: 1\nflags\t\t: sse\n",
            "avx2",
        ),
        "arm": ("processor\t: 0\nFeatures\t: fp asimd bf16\n", "bf16"),
    }
    for name, (text, flag) in texts.items():
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / name)
        assert flag in cpu._field.__wrapped__("flags", "Features").split()
    monkeypatch.setattr(cpu, "_CPUINFO", tmp_path / "none")
    assert cpu._field.__wrapped__("flags") == ""


@pytest.mark.slow
def test_a_process_held_to_avx2_asks_no_clock(tmp_path: Path) -> None:
    code = (
        "import time, torch; from handspun.training.dtype import choose_dtype; began = time.process_time();"
        "print(choose_dtype(torch.device('cpu'))); assert time.process_time() - began < 0.3"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout == "(torch.float32, 'this CPU has no bfloat16 instructions')\n", done.stderr
    assert list(tmp_path.iterdir()) == []
