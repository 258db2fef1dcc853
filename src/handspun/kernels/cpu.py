"""The CPU's instruction sets that libraries may use.

oneDNN and PyTorch can be restricted to older instructions (`ONEDNN_MAX_CPU_ISA=AVX2`, `ATEN_CPU_CAPABILITY=avx2`).
A restricted process must behave as on an older CPU, so that tests on a new machine cover old ones.
"""

import os
from functools import cache
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")

_AVX512 = ("avx512", "amx", "avx10")
_FORBIDDEN_BY_ONEDNN = {
    "SSE41": ("avx", "amx"),
    "AVX": ("avx2", "avx_", *_AVX512),
    "AVX2": ("avx_", *_AVX512),
    "AVX2_VNNI": ("avx_ne", *_AVX512),
    "AVX2_VNNI_2": _AVX512,
    "AVX512_CORE": ("avx_", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx", "avx10"),
    "AVX512_CORE_VNNI": ("avx512_bf16", "avx512_fp16", "amx", "avx10"),
    "AVX512_CORE_BF16": ("avx512_fp16", "amx", "avx10"),
    "AVX512_CORE_FP16": ("amx",),
    "AVX10_1_512": ("amx",),
}
"""Prefixes of the flags that each value of ONEDNN_MAX_CPU_ISA forbids. Other values forbid none."""

_FORBIDDEN_BY_PYTORCH = {"default": ("avx2", "avx_", *_AVX512), "avx2": _AVX512}
"""The same for ATEN_CPU_CAPABILITY. It does not affect oneDNN; our own kernels obey both."""


def cpu_flags() -> frozenset[str]:
    """Return the CPU's instruction sets, in Linux's spelling, without those that the environment forbids.

    Returns an empty set if they are unknown.
    """
    onednn = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return _allowed(_flags_of_the_cpu(), onednn.upper(), os.environ.get("ATEN_CPU_CAPABILITY", "").lower())


@cache
def _allowed(flags: frozenset[str], onednn: str, pytorch: str) -> frozenset[str]:
    forbidden = _FORBIDDEN_BY_ONEDNN.get(onednn, ()) + _FORBIDDEN_BY_PYTORCH.get(pytorch, ())
    return frozenset(flag for flag in flags if not flag.startswith(forbidden))


_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "svebf16")
"""Linux's CPU flags for bfloat16 dot products, on x86 and ARM."""


def has_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16 dot products."""
    return not cpu_flags().isdisjoint(_BFLOAT16)


def cpu_model() -> str:
    """Return the CPU's name and flags, as a key for cached measurements."""
    return f"{_field('model name', 'CPU implementer')}, {' '.join(sorted(cpu_flags()))}"


def is_amd() -> bool:
    """Return whether the CPU is AMD's."""
    return _field("vendor_id") == "AuthenticAMD"


@cache
def _flags_of_the_cpu() -> frozenset[str]:
    flags = _field("flags", "Features").split()
    if flags or not hasattr(torch.cpu, "get_capabilities"):
        return frozenset(flags)
    return frozenset(
        _as_linux_spells(name) for name, there in torch.cpu.get_capabilities().items() if there is True
    )


def _as_linux_spells(name: str) -> str:
    """Return a flag in Linux's spelling."""
    # PyTorch writes avx512_f for avx512f, but both write avx512_vnni, avx512_bf16, and amx_bf16.
    short = {"avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_cd"}
    others = {"fma3": "fma", "neon": "asimd", "dot": "asimddp", "neon_dot": "asimddp"}
    return name.replace("_", "") if name in short else others.get(name, name)


@cache
def _field(*names: str) -> str:
    """Return the first processor's value of the first of these fields that exists, or ""."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    return next((values[name] for name in names if name in values), "")
