"""The compiled kernels (kernels.c): found beside this file, chosen by the CPU's instructions, and called.

Each instruction set has a library of its own, compiled when the package is built (setup.py). All of them
return the same bits as reference.py.
"""

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from handspun.kernels.cpu import cpu_flags
from handspun.kernels.native_training import TRAINING_SIGNATURES, NativeTrainingKernels
from handspun.kernels.reference import LANES, AttendedSpan, HeadNorms, Rotation

_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma"}
INSTRUCTION_SETS = {
    "amx": {*_AVX512, "amx_tile", "amx_int8"},
    "avx512vnni": _AVX512,
    "avxvnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx2": {"avx2", "fma", "f16c"},
    "i8mm": {"asimd", "asimddp", "i8mm"},
    "dotprod": {"asimd", "asimddp"},
    "neon": {"asimd"},
}
"""The flags of the CPU, in Linux's spelling, that each library needs; the fastest first."""

_INT, _FLOAT, _ARRAY, _THREADS = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int
_QUANTIZED = (_ARRAY, _ARRAY, _ARRAY, _THREADS)
_SIGNATURES = {
    "layout": (_ARRAY,),
    "hadamard": (_ARRAY, _INT, _INT, _ARRAY, _THREADS),
    "quantize": (_ARRAY, _INT, _INT, _INT, *_QUANTIZED),
    "norm_quantize": (_ARRAY, _ARRAY, _FLOAT, _INT, _INT, _INT, *_QUANTIZED),
    "gate_quantize": (_ARRAY, _INT, _INT, _INT, *_QUANTIZED),
    "scale_quantize": (_ARRAY, _ARRAY, _INT, _INT, _INT, *_QUANTIZED),
    "tile": (_ARRAY, _INT, _INT, _INT, _ARRAY, _ARRAY, _ARRAY, _THREADS),
    "matmul": (_ARRAY, _ARRAY, _INT, _INT, _ARRAY, _ARRAY, _ARRAY, _ARRAY, _INT, _ARRAY, _THREADS),
    "transposed_matmul": (_ARRAY, _ARRAY, _INT, _INT, _ARRAY, _ARRAY, _INT, _INT, _ARRAY, _THREADS),
    "float_matmul": (_ARRAY, _INT, _INT, _ARRAY, ctypes.c_int, _ARRAY, _INT, _ARRAY, _THREADS),
    "rotate_and_keep": (
        *(_ARRAY, _INT, _INT, _INT, _INT, _ARRAY, _ARRAY, _FLOAT),
        *(_ARRAY, _ARRAY, _ARRAY, _ARRAY, ctypes.c_int, _INT, _THREADS),
    ),
    "attend": (
        *(_ARRAY, _INT, _ARRAY, ctypes.c_int, _INT, _INT, _INT, _INT),
        *(_ARRAY, _INT, _INT, _FLOAT, _ARRAY, _THREADS),
    ),
    "run_layers": (_ARRAY, _ARRAY, _ARRAY, _INT, _THREADS),
    **TRAINING_SIGNATURES,
}


class DecoderShape(NamedTuple):
    """What the layers of a model have in common. norm_eps: epsilon of all RMSNorms."""

    heads: int
    kv_heads: int
    head_size: int
    norm_eps: float


_LARGEST_GROUP = 48
"""Query heads per key head: TOGETHER in kernels.c."""


def library_file(name: str) -> Path:
    """Return the path of an instruction set's library, whether it exists or not."""
    return Path(__file__).with_name(f"kernels_{name}.{'dll' if sys.platform == 'win32' else 'so'}")


def supported_sets() -> list[str]:
    """Return the instruction sets that this CPU has and kernels exist for; the fastest first."""
    flags = cpu_flags()
    return [name for name, needed in INSTRUCTION_SETS.items() if needed <= flags]


@cache
def native_kernels(name: str) -> "NativeKernels | str":
    """Return the kernels of an instruction set that this CPU supports, or why they cannot be used."""
    file = library_file(name)
    if not file.is_file():
        reason = "they were not compiled when the package was installed, for want of a C compiler"
        return f"{reason}. Install one, such as gcc, and then the package again: {install_command()}"
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:  # for example, there is no OpenMP
        return f"{file} cannot be loaded ({error})"
    try:
        if not library.prepare():
            return "the system does not let this process use AMX"
        return NativeKernels(name, library)
    except AttributeError as error:
        return f"{file} is of another version ({error}). Install the package again: {install_command()}"


def install_command() -> str:
    """Return the command that compiles the kernels anew."""
    root = Path(__file__).parents[3]
    is_checkout = (root / "setup.py").is_file()
    return (
        f"pip install --no-deps -e {root}" if is_checkout else "pip install --force-reinstall --no-deps CHECKOUT"
    )


class NativeKernels(NativeTrainingKernels):
    """The kernels of one instruction set. Each returns what its namesake in reference.py does."""

    def __init__(self, name: str, library: ctypes.CDLL) -> None:
        """Declare the library's functions. name: the instruction set."""
        self.name, self._library = name, library
        for function, arguments in _SIGNATURES.items():
            getattr(library, function).argtypes = arguments
            getattr(library, function).restype = None
        sizes = (_INT * 3)()
        library.layout(sizes)
        self.tile, self.group, self.pad = sizes
        """Channels per tile, consecutive bytes of a channel, and what the rows' width is a multiple of."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or pickle the name: a library cannot be."""
        return native_kernels, (self.name,)

    def hadamard(self, x: Tensor) -> Tensor:
        """Return the Hadamard transform of the rows. x: (rows, width), float32."""
        x = x.contiguous()
        out = torch.empty_like(x)
        self._library.hadamard(x.data_ptr(), *x.shape, out.data_ptr(), torch.get_num_threads())
        return out

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the transformed rows in int8, (rows, padded width), and their scales, (rows, 1)."""
        x = x.contiguous()
        return self._quantized(self._library.quantize, (x.data_ptr(),), *x.shape)

    def scale_quantize(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return x * scale quantized as by `quantize`, but not transformed. scale: (width,)."""
        x = x.contiguous()
        return self._quantized(self._library.scale_quantize, (x.data_ptr(), scale.data_ptr()), *x.shape)

    def norm_quantize(self, x: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return `quantize` of RMSNorm(x). norm: (width,), the weights. eps: epsilon of the norm."""
        x = x.contiguous()
        return self._quantized(self._library.norm_quantize, (x.data_ptr(), norm.data_ptr(), eps), *x.shape)

    def gate_quantize(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """Return `quantize` of SwiGLU. gate_up: (rows, 2 * width)."""
        gate_up = gate_up.contiguous()
        rows, twice = gate_up.shape
        return self._quantized(self._library.gate_quantize, (gate_up.data_ptr(),), rows, twice // 2)

    def _quantized(self, function: Any, inputs: Sequence[Any], rows: int, width: int) -> tuple[Tensor, Tensor]:
        padded = width + -width % self.pad
        out, scale = torch.empty(rows, padded, dtype=torch.int8), torch.empty(rows, 1)
        work = torch.empty(rows, width)
        arrays = (work.data_ptr(), out.data_ptr(), scale.data_ptr())
        function(*inputs, rows, width, padded, *arrays, torch.get_num_threads())
        return out, scale

    def int8_weight(self, weight: Tensor) -> "TiledInt8Weight":
        """Return the matrix, (out, in), int8, in tiles."""
        return TiledInt8Weight(self, weight)

    def fill_tiles(self, weight: Tensor, tiles: "TiledInt8Weight") -> None:
        """Write the matrix, (out, in), int8, into the buffers of `tiles`."""
        depth = tiles.weight.shape[1] * self.group
        buffers = (tiles.weight, tiles.zero_point_correction, tiles.column_correction)
        self._library.tile(
            *(weight.data_ptr(), *weight.shape, depth, *(buffer.data_ptr() for buffer in buffers)),
            torch.get_num_threads(),
        )

    def matmul(
        self,
        matrix: "TiledInt8Weight",
        rows: Tensor,
        row_scale: Tensor,
        scale: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Return `matrix.matmul(...)`."""
        if more := -rows.shape[1] % self.pad:  # those of `quantize` are padded already
            rows = nn.functional.pad(rows, (0, more))
        out = torch.empty(len(rows), matrix.channels)
        weight = (matrix.weight.data_ptr(), matrix.zero_point_correction.data_ptr(), scale.data_ptr())
        self._library.matmul(
            *(rows.data_ptr(), row_scale.data_ptr(), *rows.shape, *weight),
            *(None if bias is None else bias.data_ptr(), matrix.channels, out.data_ptr(), torch.get_num_threads()),
        )
        return out

    def transposed_matmul(self, matrix: "TiledInt8Weight", rows: Tensor, row_scale: Tensor) -> Tensor:
        """Return `matrix.transposed_matmul(...)`."""
        tiles, groups = matrix.weight.shape[:2]
        if more := tiles * self.tile - rows.shape[1]:
            rows = nn.functional.pad(rows, (0, more))
        out = torch.empty(len(rows), matrix.width)
        self._library.transposed_matmul(
            *(rows.data_ptr(), row_scale.data_ptr(), *rows.shape, matrix.weight.data_ptr()),
            *(matrix.column_correction.data_ptr(), groups * self.group, matrix.width),
            *(out.data_ptr(), torch.get_num_threads()),
        )
        return out

    def can_multiply_floats(self, width: int) -> bool:
        """Return whether `float_matmul` supports rows of this width."""
        return width % LANES == 0

    def float_matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ weight.T + bias: (rows, out), float32.

        Args:
            x: (rows, in), float32; in: a multiple of 16.
            weight: (out, in), bfloat16 or float32.
            bias: (out,), float32, or None.
        """
        x = x.contiguous()
        assert weight.is_contiguous() and not x.shape[1] % LANES  # noqa: PT018
        out = torch.empty(len(x), len(weight))
        halves = weight.dtype == torch.bfloat16
        assert halves or weight.dtype == torch.float32
        self._library.float_matmul(
            *(x.data_ptr(), *x.shape, weight.data_ptr(), halves, None if bias is None else bias.data_ptr()),
            *(len(weight), out.data_ptr(), torch.get_num_threads()),
        )
        return out

    def can_attend(self, heads: int, kv_heads: int, head_size: int) -> bool:
        """Return whether `attend` supports such heads."""
        return head_size % LANES == 0 and heads // kv_heads <= _LARGEST_GROUP

    def rotate(self, qkv: Tensor, norms: HeadNorms, rotation: Rotation, pool: Tensor) -> None:
        """Rotate as the reference does."""
        assert qkv.is_contiguous() and pool.is_contiguous()  # noqa: PT018
        weights = (None if norm is None else norm.data_ptr() for norm in (norms.queries, norms.keys))
        self._library.rotate_and_keep(
            *(
                qkv.data_ptr(),
                len(qkv),
                qkv.shape[1] - len(pool),
                len(pool) // 2,
                qkv.shape[2],
                *weights,
                norms.eps,
            ),
            *(rotation.cosines.data_ptr(), rotation.sines.data_ptr(), rotation.slot_mapping.data_ptr()),
            *(pool.data_ptr(), _is_float16(pool), pool.shape[1], torch.get_num_threads()),
        )

    def attend(self, queries: Tensor, pool: Tensor, spans: Sequence[AttendedSpan]) -> Tensor:
        """Attend as the reference does. queries: contiguous per token."""
        (tokens, heads, size), kv_heads = queries.shape, len(pool) // 2
        assert queries.stride()[1:] == (size, 1) and pool.is_contiguous()  # noqa: PT018
        out, given = queries.new_empty(tokens, heads * size), _Spans(spans)
        self._library.attend(
            *(queries.data_ptr(), queries.stride(0), pool.data_ptr(), _is_float16(pool), pool.shape[1]),
            *(
                kv_heads,
                heads // kv_heads,
                size,
                given.array,
                len(spans),
                given.longest,
                size**-0.5,
                out.data_ptr(),
                torch.get_num_threads(),
            ),
        )
        return out

    def decoder(self, layers: Sequence[Any], shape: DecoderShape) -> "NativeDecoder":
        """Return what runs all decoder layers in one call."""
        return NativeDecoder(self._library, layers, shape)


class _Spans:
    """Spans as attend in kernels.c takes them. It keeps the masks alive."""

    def __init__(self, spans: Sequence[AttendedSpan]) -> None:
        self._masks = [None if span.mask is None else span.mask.contiguous() for span in spans]
        numbers = [
            number
            for span, mask in zip(spans, self._masks, strict=True)
            for number in (span.first, span.count, span.start, span.length, 0 if mask is None else mask.data_ptr())
        ]
        self.array = (_INT * len(numbers))(*numbers)
        self.longest = max(span.length for span in spans)


class _Linear(ctypes.Structure):
    """As in layers.c, like the next three."""

    _fields_ = (
        *((name, _ARRAY) for name in ("weight", "zero_point_correction", "scale", "bias")),
        *((name, _INT) for name in ("width", "depth", "channels")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _ARRAY) for name in ("attention_norm", "q_norm", "k_norm", "mlp_norm")),
        *((name, _Linear) for name in ("qkv", "o", "gate_up", "down")),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", _ARRAY),
        *((name, _INT) for name in ("count", "heads", "kv_heads", "size")),
        *((name, _FLOAT) for name in ("eps", "scaling")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _ARRAY) for name in ("cosines", "sines", "places", "spans")),
        *((name, _INT) for name in ("span_count", "longest")),
        *(("pool", _ARRAY), ("pool_tokens", _INT)),
    )


class NativeDecoder:
    """All decoder layers of a model. One token takes 30 layers of 12 calls, which cost as much as their work."""

    def __init__(self, library: ctypes.CDLL, layers: Sequence[Any], shape: DecoderShape) -> None:
        """Keep the layers and their addresses.

        layers: as `FusedLayer`, whose linear layers have `matrix` (a TiledInt8Weight), `scale`, and `bias`.
        """
        self._library, self._layers = library, layers
        self._array = (_Layer * len(layers))(*(_layer(layer) for layer in layers))
        self._decoder = _Decoder(
            *(ctypes.addressof(self._array), len(layers), shape.heads, shape.kv_heads, shape.head_size),
            *(shape.norm_eps, shape.head_size**-0.5),
        )

    def run(self, x: Tensor, pool: Tensor, rotation: Rotation, spans: Sequence[AttendedSpan]) -> Tensor:
        """Return x after all layers, (tokens, hidden), float32.

        pool: (layers, 2 * kv_heads, slots, size), float16.
        """
        assert _is_float16(pool)
        assert pool.is_contiguous() and all(part.is_contiguous() for part in (rotation.cosines, rotation.sines))  # noqa: PT018
        x, given = x.clone(memory_format=torch.contiguous_format), _Spans(spans)
        step = _Step(
            *(rotation.cosines.data_ptr(), rotation.sines.data_ptr(), rotation.slot_mapping.data_ptr()),
            *(ctypes.addressof(given.array), len(spans), given.longest, pool.data_ptr(), pool.shape[2]),
        )
        arrays = (ctypes.addressof(self._decoder), ctypes.addressof(step), x.data_ptr())
        if self._library.run_layers(*arrays, len(x), torch.get_num_threads()):
            raise MemoryError(f"no memory for the activations of {len(x):,} tokens")
        return x


def _layer(layer: Any) -> _Layer:
    norms = (layer.attention_norm, layer.q_norm, layer.k_norm, layer.mlp_norm)
    linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
    return _Layer(*(None if norm is None else norm.data_ptr() for norm in norms), *map(_linear, linears))


def _linear(linear: Any) -> _Linear:
    matrix = linear.matrix
    assert isinstance(matrix, TiledInt8Weight)
    tensors = (matrix.weight, matrix.zero_point_correction, linear.scale, linear.bias)
    depth = matrix.weight.shape[1] * matrix.weight.shape[3]
    return _Linear(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        matrix.width,
        depth,
        matrix.channels,
    )


def _is_float16(pool: Tensor) -> bool:
    assert pool.dtype in (torch.float16, torch.float32)
    return pool.dtype == torch.float16


class TiledInt8Weight(nn.Module):
    """A frozen int8 matrix, (out, in), in tiles of channels, which the kernels read sequentially.

    The same tiles serve matmuls with the matrix and with its transpose, which gradients need.
    """

    def __init__(self, kernels: NativeKernels, weight: Tensor) -> None:
        """Lay out the matrix. weight: (out, in), int8, without -128."""
        super().__init__()
        self._kernels = kernels
        self.channels, self.width = weight.shape
        depth, tiles = self.width + -self.width % kernels.pad, -(-self.channels // kernels.tile)
        self.weight = nn.Buffer(
            torch.empty(tiles, depth // kernels.group, kernels.tile, kernels.group, dtype=torch.int8)
        )
        """(tiles, padded width / group, tile, group)."""
        # Where rows are bytes with zero point 128, the corrections subtract what it adds to a sum.
        self.zero_point_correction = nn.Buffer(torch.empty(tiles * kernels.tile, dtype=torch.int32))
        self.column_correction = nn.Buffer(torch.empty(depth + -depth % kernels.tile, dtype=torch.int32))
        kernels.fill_tiles(weight.contiguous(), self)

    def rows(self, rows: Tensor) -> Tensor:
        """Return rows of the matrix, (count, in). rows: (count,)."""
        tile = self._kernels.tile
        found: Tensor = self.weight[rows // tile, :, rows % tile].flatten(1)
        return found[:, : self.width]

    def matmul(self, rows: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return row_scale * scale * (rows @ weight.T) + bias: (count, out), float32.

        Args:
            rows: (count, in), int8.
            row_scale: (count, 1).
            scale: (out,).
            bias: (out,), or None.
        """
        return self._kernels.matmul(self, rows, row_scale, scale, bias)

    def transposed_matmul(self, rows: Tensor, row_scale: Tensor) -> Tensor:
        """Return row_scale * (rows @ weight): (count, in), float32. rows: (count, out), int8."""
        return self._kernels.transposed_matmul(self, rows, row_scale)
