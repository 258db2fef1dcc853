"""Every kernel in PyTorch: the plain form, which the native kernels (kernels.c) equal bit for bit.

Integer sums are exact in any order. Sums of floats have one order, whatever the CPU: a row is added up in 16
lanes, one value of each 16 per lane, and then the lanes that are 8, 4, 2, and 1 apart. Attention multiplies and
adds in one rounding; nothing else does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handspun.kernels import packed_attention
from handspun.kernels.between_matmuls import PlainLayerKernels
from handspun.kernels.cpu import cpu_flags
from handspun.kernels.packed_attention import PackedHeads

LANES = 16
KEYS = 64
"""Keys whose values are added up at a time: KEYS in kernels.c."""
_LARGEST_BLOCK = 64
# A row of zeros must not divide by zero.
_SMALLEST_SCALE = 1e-12
_ROUNDING, _ROUNDING_BITS = 12582912.0, 0x4B400000


def block_of(width: int) -> int:
    """Return a Hadamard transform's block: the largest power of two, up to 64, that divides the width."""
    return min(width & -width, _LARGEST_BLOCK)


def hadamard(x: Tensor) -> Tensor:
    """Return the Hadamard transform, not normalized, of each block of each row. x: (rows, width), float32.

    A few values of a row are many times as large as the others, and take most of int8's 127 steps. The transform
    spreads them. It needs no calibration texts, changes no other layer, and consists of sums and differences only.
    Weights transformed before quantization undo it.
    """
    # The fast Walsh-Hadamard transform: log2(block) passes. The values of a block are width / block apart, so that
    # each pass reads and writes whole stretches of memory.
    width = x.shape[1]
    distance = width // block_of(width)
    while distance < width:
        low, high = x.reshape(len(x), -1, 2, distance).unbind(2)
        x = torch.stack([low + high, low - high], dim=2).view(len(x), width)
        distance *= 2
    return x


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (int8, (rows, width); float32 scales, (rows, 1)). values: (rows, width), float.

    values ≈ int8 * scale, with an error of at most scale / 2: 1/254 of the row's largest value. A row with a value
    that is not finite has the scale NaN, and zeros.
    """
    scale = values.abs().amax(1, keepdim=True).float().div_(127).clamp_min_(_SMALLEST_SCALE)
    finite = torch.isfinite(scale)
    rows = (values / scale).round_().masked_fill_(~finite, 0.0).to(torch.int8)
    return rows, scale.masked_fill_(~finite, torch.nan)


def exponential(x: Tensor) -> Tensor:
    """Return e^x, float32, with a relative error of 3e-7: Cephes' expf, rounded after every operation."""
    x = x.clamp(-87.3, 88.3)  # NaN stays NaN
    rounded = x * 1.44269504 + _ROUNDING
    n = rounded - _ROUNDING
    r = x - n * 0.693359375 - n * -2.12194440e-4
    p = torch.full_like(x, 1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + factor
    p = p * r * r + (r + 1.0)
    powers = (rounded.view(torch.int32) - _ROUNDING_BITS + 127) << 23  # 2^n, whose exponent is n + 127
    return p * powers.view(torch.float32)


def lane_sum(x: Tensor) -> Tensor:
    """Return the sum of the last axis as the kernels compute it. x: (..., width), float32."""
    lanes = x.new_zeros(*x.shape[:-1], LANES)
    for part in F.pad(x, (0, -x.shape[-1] % LANES)).split(LANES, dim=-1):
        lanes = lanes + part
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, -1)
        lanes = low + high
    return lanes[..., 0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x * (1 / sqrt(mean(x^2) + eps)) * weight. x: (..., width). weight: (width,)."""
    if x.device.type != "cpu":  # the same bits are promised for CPUs, and a GPU would need a hundred launches
        return F.rms_norm(x, weight.shape, weight, eps)
    mean = lane_sum(x * x) / x.shape[-1]
    # Through float64, whose root is rounded correctly: MKL's of float32 is off by one bit now and then.
    root = (mean + torch.tensor(eps)).double().sqrt().float()
    return x * (1.0 / root)[..., None] * weight


def swiglu(gate_up: Tensor) -> Tensor:
    """Return gate / (1 + e^-gate) * up. gate_up: (rows, 2 * width), gate, then up."""
    gate, up = gate_up.chunk(2, -1)
    return gate / (exponential(0.0 - gate) + 1.0) * up


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a * b + c in float32, rounded once."""
    # float64 holds the product. If it does not hold the sum, its last bit is set to 1 (rounding to odd: Boldo and
    # Melquiond 2008), so that the second rounding, to float32, sees on which side of a tie the sum lies.
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    bits = total.view(torch.int64)
    toward = torch.where((lost > 0) == (total > 0), 1, -1)
    inexact = (lost != 0) & torch.isfinite(total) & (bits & 1 == 0)
    return torch.where(inexact, bits + toward, bits).view(torch.float64).float()


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorms of each head's queries and keys: weights, (size,), or None for no norm. eps: their epsilon."""

    queries: Tensor | None
    keys: Tensor | None
    eps: float


@dataclass(frozen=True)
class Rotation:
    """Where tokens are: cosines and sines of their positions, (tokens, size), the first half of the sines negated.

    slot_mapping: (tokens,), each token's slot in the KV cache.
    """

    cosines: Tensor
    sines: Tensor
    slot_mapping: Tensor


@dataclass(frozen=True)
class AttendedSpan:
    """Consecutive tokens of one sequence, and the keys that they attend to.

    first, count: the queries. start: the first key's slot in the pool. length: the number of keys of the last
    query; each query before it has one less. mask: (count, length), bool; with it, each query attends to the keys
    of all `length` where it is true.
    """

    first: int
    count: int
    start: int
    length: int
    mask: Tensor | None


def _attend_span(queries: Tensor, pool: Tensor, span: AttendedSpan) -> Tensor:
    (count, heads, size), kv_heads = queries.shape, len(pool) // 2
    keys, values = pool[:, span.start : span.start + span.length].float().split(kv_heads)
    rows = queries.view(count, kv_heads, -1, size).transpose(0, 1).reshape(kv_heads, -1, size)
    scores = rows.new_zeros(kv_heads, rows.shape[1], span.length)
    for d in range(size):
        scores = fused_multiply_add(rows[:, :, d, None], keys[:, None, :, d], scores)
    seen = span.mask
    if seen is None:
        seen = torch.ones(count, span.length, dtype=torch.bool).tril(span.length - count)
    seen = seen.repeat_interleave(heads // kv_heads, 0)
    scores = torch.where(seen, scores * size**-0.5, -torch.inf)
    highest = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(-1, keepdim=True)
    weights = torch.where(seen, exponential(scores - highest), 0.0)
    factor = 1.0 / lane_sum(weights)
    # Values are added up by blocks of keys, and the blocks' sums then.
    more = -span.length % KEYS
    weights = F.pad(weights, (0, more)).unflatten(-1, (-1, KEYS))
    values = F.pad(values, (0, 0, 0, more)).unflatten(1, (-1, KEYS))
    sums = weights.new_zeros(*weights.shape[:-1], size)
    for i in range(KEYS):
        sums = fused_multiply_add(weights[..., i, None], values[:, None, :, i], sums)
    total = torch.zeros_like(sums[:, :, 0])
    for block in sums.unbind(2):
        total = total + block
    total = total * factor[..., None]
    return total.view(kv_heads, count, -1, size).transpose(0, 1).reshape(count, -1)


class ReferenceKernels(PlainLayerKernels):
    """The kernels in PyTorch, on any device."""

    name = "reference"

    def __init__(self, *, attends: bool = False) -> None:
        """Choose the attention. attends: use `attend`, whose order of sums costs seconds for a long prompt."""
        self._attends = attends

    def can_multiply_floats(self, width: int) -> bool:  # noqa: ARG002
        """Return False: PyTorch's own matmul is faster than this form of it."""
        return False

    def float_matmul(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x @ weight.T + bias: (rows, out). x: (rows, in), float32. weight: (out, in), any float type."""
        lanes = x.new_zeros(len(x), len(weight), LANES)
        for some, part in zip(x.split(LANES, dim=1), weight.float().split(LANES, dim=1), strict=True):
            lanes = fused_multiply_add(some[:, None], part[None], lanes)
        y = lane_sum(lanes)
        return y if bias is None else y + bias

    def can_attend(self, heads: int, kv_heads: int, head_size: int) -> bool:  # noqa: ARG002
        """Return whether `attend` is to be used."""
        return self._attends

    def hadamard(self, x: Tensor) -> Tensor:
        """Return the Hadamard transform of the rows. x: (rows, width), float32."""
        return hadamard(x)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the transformed rows in int8, and their scales, (rows, 1). x: (rows, width), float32."""
        return quantize_rows(hadamard(x))

    def scale_quantize(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return x * scale quantized as by `quantize`, but not transformed. scale: (width,)."""
        return quantize_rows(x * scale)

    def norm_quantize(self, x: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return `quantize` of RMSNorm(x). norm: (width,), the weights. eps: epsilon of the norm."""
        return self.quantize(rms_norm(x, norm, eps))

    def gate_quantize(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """Return `quantize` of SwiGLU. gate_up: (rows, 2 * width)."""
        return self.quantize(swiglu(gate_up))

    def int8_weight(self, weight: Tensor) -> "PlainInt8Weight":
        """Return the matrix, (out, in), int8, laid out for `matmul`."""
        return PlainInt8Weight(weight)

    def rotate(self, qkv: Tensor, norms: HeadNorms, rotation: Rotation, pool: Tensor) -> None:
        """Normalize queries and keys, rotate queries in place, and write rotated keys and values to the KV cache.

        Args:
            qkv: (tokens, heads + 2 * kv_heads, size); queries are overwritten.
            norms: the norms of queries and keys.
            rotation: where the tokens are.
            pool: the KV cache, (2 * kv_heads, slots, size), float32 or float16.
        """
        heads, kv_heads = qkv.shape[1] - len(pool), len(pool) // 2
        for norm, part in ((norms.queries, qkv[:, :heads]), (norms.keys, qkv[:, heads : heads + kv_heads])):
            if norm is not None:
                part.copy_(rms_norm(part, norm, norms.eps))
        both = qkv[:, : heads + kv_heads]
        turned = both.roll(qkv.shape[2] // 2, -1)
        both.copy_(both * rotation.cosines[:, None] + turned * rotation.sines[:, None])
        pool.index_copy_(1, rotation.slot_mapping, qkv[:, heads:].transpose(0, 1).to(pool.dtype))

    def attend(self, queries: Tensor, pool: Tensor, spans: Sequence[AttendedSpan]) -> Tensor:
        """Return attention, (tokens, heads * size), of queries, (tokens, heads, size), all float32.

        pool: the KV cache, (2 * kv_heads, slots, size), float32 or float16: keys, then values.
        """
        output = queries.new_empty(len(queries), queries.shape[1] * queries.shape[2])
        for span in spans:
            tokens = slice(span.first, span.first + span.count)
            output[tokens] = _attend_span(queries[tokens], pool, span)
        return output

    def can_attend_packs(self, heads: int, kv_heads: int, head_size: int) -> bool:  # noqa: ARG002
        """Return whether `attend_pack` is to be used: PyTorch's own attention is faster than this form of it."""
        return self._attends

    def attend_pack(self, heads: PackedHeads) -> tuple[Tensor, Tensor]:
        """Return `packed_attention.attend_pack(heads)`."""
        return packed_attention.attend_pack(heads)

    def attend_pack_backward(
        self, heads: PackedHeads, output: Tensor, log_sums: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return `packed_attention.attend_pack_backward(...)`."""
        return packed_attention.attend_pack_backward(heads, output, log_sums, gradient)

    def decoder(self, layers: Sequence[object], shape: object) -> None:
        """Return None: the engine's own loop over the layers is the reference."""


class PlainInt8Weight(nn.Module):
    """A frozen int8 matrix, (out, in), as PyTorch has it."""

    def __init__(self, weight: Tensor) -> None:
        """Keep the matrix. weight: (out, in), int8."""
        super().__init__()
        self.weight = nn.Buffer(weight)

    def rows(self, rows: Tensor) -> Tensor:
        """Return rows of the matrix, (count, in). rows: (count,)."""
        return self.weight[rows]

    def matmul(self, rows: Tensor, row_scale: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return row_scale * scale * (rows @ weight.T) + bias: (count, out), float32.

        Args:
            rows: (count, in), int8.
            row_scale: (count, 1).
            scale: (out,).
            bias: (out,), or None.
        """
        y = int_mm(rows, self.weight.t()).float().mul_(scale).mul_(row_scale)
        return y if bias is None else y.add_(bias)

    def transposed_matmul(self, rows: Tensor, row_scale: Tensor) -> Tensor:
        """Return row_scale * (rows @ weight): (count, in), float32. rows: (count, out), int8."""
        return int_mm(rows, self.weight).float().mul_(row_scale)


def int_mm(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return rows @ matrix as exact int32 sums. rows: (count, in), int8. matrix: (in, out), int8."""
    count = len(rows)
    # CUDA's matmul needs at least 17 rows.
    if rows.is_cuda and count < 17:
        rows = F.pad(rows, (0, 0, 0, 17 - count))
    # oneDNN returns 0 for a matrix with one row.
    if rows.device.type == "cpu" and (len(matrix) == 1 or not has_fast_int_mm()):
        return _int_mm_in_float(rows, matrix)
    return torch._int_mm(rows, matrix)[:count]


@cache
def has_fast_int_mm() -> bool:
    """Return whether PyTorch's `_int_mm` uses oneDNN here, not a plain loop, and is exact."""
    if "avx512_vnni" not in cpu_flags() or not hasattr(torch, "_int_mm"):
        return False
    return is_exact(lambda rows, weight: torch._int_mm(rows, weight.T))


# float32 holds all integers of up to 2^24.
_COLUMNS = 2**24 // 128**2


def _int_mm_in_float(rows: Tensor, matrix: Tensor) -> Tensor:
    sums = torch.zeros(len(rows), matrix.shape[1], dtype=torch.int32)
    # Under autocast it would be bfloat16, which holds integers only up to 256.
    with torch.autocast("cpu", enabled=False):
        for some, part in zip(rows.split(_COLUMNS, dim=1), matrix.split(_COLUMNS), strict=True):
            sums += (some.float() @ part.float()).int()
    return sums


TRIAL_SHAPES = ((1, 64, 32), (3, 33, 7), (1, 2048, 16), (32, 2048, 64), (100, 68, 20))
"""(rows, in, out) of trial matmuls: libraries use different kernels for few rows and for odd sizes."""


def exact_sums(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows @ weight.T as int64, computed in float64, which holds every sum.

    rows: (count, in), integers of any type. weight: (out, in), int8.
    """
    return (rows.double() @ weight.double().T).long()


def extremes(count: int, width: int, channels: int) -> tuple[Tensor, Tensor]:
    """Return int8 rows, (count, width), and weights, (channels, width), that give the largest sums.

    Rows are all 127, all -127, or a mixture, and so are weights.
    """
    generator = torch.Generator().manual_seed(width)
    rows, weight = (
        (torch.randint(2, (some, width), generator=generator) * 254 - 127).to(torch.int8)
        for some in (count, channels)
    )
    for matrix in (rows, weight):
        matrix[::3], matrix[1::3] = 127, -127
    return rows, weight


def is_exact(sums_of: Callable[[Tensor, Tensor], Tensor], device: torch.device | None = None) -> bool:
    """Return whether a matmul of int8 rows, (count, in), and weights, (out, in), is exact.

    Args:
        sums_of: takes both and returns rows @ weight.T in int32 or float32.
        device: where to run it.
    """
    for shape in TRIAL_SHAPES:
        rows, weight = extremes(*shape)
        found = sums_of(rows.to(device), weight.to(device)).cpu()
        if not torch.equal(found.float(), exact_sums(rows, weight).float()):
            return False
    return True
