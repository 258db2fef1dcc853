"""Compile the native kernels: one library per instruction set, from one source. All else is in pyproject.toml.

The libraries are called through ctypes, so they know no Python: their names carry no Python version, and neither
does the wheel's. Each is optional. Without a compiler, or where one fails, the package installs without it.
"""

import os
import platform
import shutil
import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# Beyond these, a fused multiply-add happens only where the source says so: that keeps results equal on all CPUs.
FLAGS = ["-O3", "-g0", "-ffp-contract=off"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma"]
ARM = "-march=armv8-a"
INSTRUCTIONS = {
    "x86_64": {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avxvnni": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
        "avx512vnni": AVX512,
        "amx": [*AVX512, "-mamx-tile", "-mamx-int8"],
    },
    "aarch64": {
        "neon": [ARM],
        "dotprod": ["-march=armv8.2-a+dotprod"],
        "i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
    },
}
MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
FOLDER = "src/handspun/kernels/"


def openmp() -> tuple[list[str], list[str]]:
    """Return flags for the compiler and the linker. The runtime is the one that torch brings, never another."""
    if sys.platform == "darwin":  # torch's libomp is in the process already
        return ["-Xclang", "-fopenmp"], ["-Wl,-undefined,dynamic_lookup"]
    # torch's libgomp has the name that gcc links. Functions of the same names elsewhere are not called.
    return ["-fopenmp"], ["-fopenmp", "-Wl,-Bsymbolic"]


def extensions() -> list[Extension]:
    """Return the libraries for this machine. Windows has none: its compiler does not know our flags."""
    if sys.platform == "win32":
        return []
    compiling, linking = openmp()
    return [
        Extension(
            f"handspun.kernels.kernels_{name}",
            [f"{FOLDER}{file}" for file in ("kernels.c", "layers.c")],
            depends=[
                f"{FOLDER}{file}" for file in ("between_matmuls.h", "kernels.h", "packed_attention.h", "simd.h")
            ],
            extra_compile_args=[*FLAGS, *compiling, *flags],
            extra_link_args=linking,
            libraries=["m"],
            optional=True,
        )
        for name, flags in INSTRUCTIONS.get(MACHINE, {}).items()
    ]


class BuildLibraries(build_ext):
    """Names libraries without a Python version."""

    def get_ext_filename(self, ext_name: str) -> str:
        """Return the library's path."""
        return os.path.join(*ext_name.split(".")) + ".so"


class PlatformWheel(bdist_wheel):
    """Tags wheels py3-none: one serves every Python on a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, its ABI, and the platform."""
        return ("py3", "none", super().get_tag()[2])


# With clang, the kernels would bring a second OpenMP runtime into the process.
if sys.platform == "linux" and shutil.which("gcc"):
    os.environ.setdefault("CC", "gcc")
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel})
