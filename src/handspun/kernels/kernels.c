/* Kernels of decoding and of training, compiled once for each instruction set (simd.h, setup.py).
 *
 * Each function here computes what reference.py computes with PyTorch, bit for bit, on every CPU. Each row is computed
 * separately, in an order that depends on nothing else, so its result does not depend on the other rows, on the
 * number of threads, or on the CPU.
 */
#define _GNU_SOURCE
#if defined(__clang__) && defined(__linux__)
#error "clang would link an OpenMP runtime of its own beside the one that torch brings: compile with gcc"
#endif
#include "kernels.h"
#include "simd.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>

/* Adding this to a float of less than 2^22 rounds it to an integer (halves to even), which its last bits then hold. */
#define ROUNDING 12582912.0f
#define ROUNDING_BITS 0x4B400000
#define INFINITY_BITS 0x7F800000

INLINE int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* Return 2^n of `n + ROUNDING`: the float whose exponent is n + 127. */
INLINE lanes power_of_two(lanes rounded) {
    EACH(p, PARTS) {
        bits_of_floats bits = (bits_of_floats)rounded.part[p];
        rounded.part[p] = (floats)((bits - ROUNDING_BITS + 127) << 23);
    }
    return rounded;
}

/* Return e^x with a relative error of 3e-7: x = n ln 2 + r, and a polynomial in r (Cephes' expf). NaN stays NaN. */
INLINE lanes exponential(lanes x) {
    x = smaller(splat(88.3f), larger(splat(-87.3f), x));
    lanes rounded = plus(times(x, splat(1.44269504f)), splat(ROUNDING));
    lanes n = minus(rounded, splat(ROUNDING));
    lanes r = minus(minus(x, times(n, splat(0.693359375f))), times(n, splat(-2.12194440e-4f)));
    lanes p = splat(1.9875691500e-4f);
    p = plus(times(p, r), splat(1.3981999507e-3f));
    p = plus(times(p, r), splat(8.3334519073e-3f));
    p = plus(times(p, r), splat(4.1665795894e-2f));
    p = plus(times(p, r), splat(1.6666665459e-1f));
    p = plus(times(p, r), splat(5.0000001201e-1f));
    p = plus(times(times(p, r), r), plus(r, splat(1.0f)));
    return times(p, power_of_two(rounded));
}

/* Replace 8 vectors, in pairs that are `half` apart, with their sums and differences. */
INLINE void sums_and_differences(lanes *x, const int half) {
    EACH(i, 8) {
        if (i & half) continue;
        lanes low = x[i], high = x[i + half];
        x[i] = plus(low, high);
        x[i + half] = minus(low, high);
    }
}

/* Transform a row in place, by sums and differences of values that are width / block apart, then twice that, and so on
 * (see reference.py). Three such stages are done in registers: apart, they took 2 to 3 times as long. */
static void hadamard_row(float *x, int64_t width) {
    int64_t block = width & -width, distance = width / (block < 64 ? block : 64);
    for (; 8 * distance <= width; distance *= 8)
        for (int64_t first = 0; first < width; first += 8 * distance)
            for (int64_t i = 0; i < distance; i += LANES) {
                float *at = x + first + i;
                lanes values[8];
                EACH(j, 8) values[j] = load_some(at + j * distance, distance - i);
                sums_and_differences(values, 1);
                sums_and_differences(values, 2);
                sums_and_differences(values, 4);
                EACH(j, 8) store_some(at + j * distance, values[j], distance - i);
            }
    for (; distance < width; distance *= 2)
        for (int64_t first = 0; first < width; first += 2 * distance)
            for (int64_t i = 0; i < distance; i += LANES) {
                float *a = x + first + i, *b = a + distance;
                lanes low = load_some(a, distance - i), high = load_some(b, distance - i);
                store_some(a, plus(low, high), distance - i);
                store_some(b, minus(low, high), distance - i);
            }
}

/* Quantize a row to int8: value / scale, where the largest magnitude becomes 127. Return the scale. The row is filled
 * with zeros up to `padded`. If a value is not finite, the scale is NaN and all values are 0. */
static float quantize_row(const float *x, int8_t *out, int64_t width, int64_t padded) {
    int32_t largest = 0; /* the bits of positive floats are ordered as the floats are */
    for (int64_t i = 0; i < width; i++) {
        int32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
        largest = magnitude > largest ? magnitude : largest;
    }
    memset(out + width, 0, padded - width);
    if (largest >= INFINITY_BITS) {
        memset(out, 0, width);
        return NAN;
    }
    float scale;
    memcpy(&scale, &largest, sizeof scale);
    scale /= 127.0f;
    if (scale < 1e-12f) scale = 1e-12f;
    for (int64_t i = 0; i < width; i++) out[i] = (int8_t)(bits_of(x[i] / scale + ROUNDING) - ROUNDING_BITS);
    return scale;
}

/* RMSNorm of a row: x * (1 / sqrt(mean(x^2) + eps)) * weight. */
static void norm_row(const float *x, const float *weight, float eps, float *out, int64_t width) {
    lanes squares = splat(0.0f);
    for (int64_t i = 0; i < width; i += LANES) {
        lanes value = load_some(x + i, width - i);
        squares = plus(squares, times(value, value));
    }
    float factor = 1.0f / sqrtf(sum(squares) / (float)width + eps);
    for (int64_t i = 0; i < width; i++) out[i] = x[i] * factor * weight[i];
}

/* SwiGLU of a row: gate / (1 + e^-gate) * up. x: gate, then up. */
static void gate_row(const float *x, float *out, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) {
        lanes gate = load_some(x + i, width - i), up = load_some(x + width + i, width - i);
        lanes below = plus(splat(1.0f), exponential(minus(splat(0.0f), gate)));
        store_some(out + i, times(over(gate, below), up), width - i);
    }
}

/* Transform the rows of x, (rows, width). */
void hadamard(const float *x, int64_t rows, int64_t width, float *out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        memcpy(out + row * width, x + row * width, width * sizeof(float));
        hadamard_row(out + row * width, width);
    }
}

/* The quantizing functions. out: (rows, padded), int8. scales: (rows). work: (rows, width). */

/* Transform the rows of x, (rows, width), and quantize them. */
void quantize(const float *x, int64_t rows, int64_t width, int64_t padded, float *work, int8_t *out, float *scales,
              int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        memcpy(work + row * width, x + row * width, width * sizeof(float));
        hadamard_row(work + row * width, width);
        scales[row] = quantize_row(work + row * width, out + row * padded, width, padded);
    }
}

/* Quantize x * weight, not transformed. x: (rows, width). weight: (width). */
void scale_quantize(const float *x, const float *weight, int64_t rows, int64_t width, int64_t padded, float *work,
                    int8_t *out, float *scales, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *values = x + row * width;
        float *scaled = work + row * width;
        for (int64_t i = 0; i < width; i++) scaled[i] = values[i] * weight[i];
        scales[row] = quantize_row(scaled, out + row * padded, width, padded);
    }
}

/* `quantize` of RMSNorm(x). */
void norm_quantize(const float *x, const float *weight, float eps, int64_t rows, int64_t width, int64_t padded,
                   float *work, int8_t *out, float *scales, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        norm_row(x + row * width, weight, eps, work + row * width, width);
        hadamard_row(work + row * width, width);
        scales[row] = quantize_row(work + row * width, out + row * padded, width, padded);
    }
}

/* `quantize` of SwiGLU(x). x: (rows, 2 * width). */
void gate_quantize(const float *x, int64_t rows, int64_t width, int64_t padded, float *work, int8_t *out,
                   float *scales, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        gate_row(x + row * 2 * width, work + row * width, width);
        hadamard_row(work + row * width, width);
        scales[row] = quantize_row(work + row * width, out + row * padded, width, padded);
    }
}

/* int8 matrices, (channels, depth), lie in tiles of TILE channels, so that memory is read sequentially: (tiles,
 * depth / GROUP, TILE, GROUP). Channels are filled with zeros up to a multiple of TILE, depth up to one of PAD.
 * `accumulate` sums up to ROWS rows with BLOCK channels of a tile. Its sums stay in registers, so it is inlined once
 * for each number of rows. */
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define GROUP 8
#else
#define GROUP 4
#endif
#if defined(__AVX512VNNI__)
#define TILE 64
#define ROWS 6
#define BLOCK_OF(rows) 64
#elif defined(__AVXVNNI__)
#define TILE 32
#define ROWS 6
#define BLOCK_OF(rows) ((rows) < 4 ? 32 : 16)
#elif defined(__AVX2__)
#define TILE 32
#define ROWS 4
#define BLOCK_OF(rows) ((rows) == 1 ? 32 : 16)
#else
#define TILE 32
#define ROWS 4
#define BLOCK_OF(rows) ((rows) == 1 && GROUP == 4 ? 32 : 16)
#endif
#define AHEAD 4096 /* bytes that are fetched ahead */
#if defined(__AMX_INT8__)
#define PAD 64
#else
#define PAD 8
#endif
/* A tile of TILE channels is finished at a time, for this many rows. */
#if defined(__AMX_INT8__)
#define MOST_ROWS 32
#else
#define MOST_ROWS ROWS
#endif

/* Return the layout: TILE, GROUP and PAD. */
void layout(int64_t *sizes) {
    sizes[0] = TILE;
    sizes[1] = GROUP;
    sizes[2] = PAD;
}

/* Lay out an int8 matrix, (channels, width), in tiles. base, filled up to TILE, and column_base, (depth) filled up to
 * TILE: -128 times the sums of the channels and of the columns, which `matmul` and its transpose need if SHIFTED. */
void tile(const int8_t *weight, int64_t channels, int64_t width, int64_t depth, int8_t *out, int32_t *base,
          int32_t *column_base, int threads) {
    int64_t filled = (channels + TILE - 1) / TILE * TILE, columns = (depth + TILE - 1) / TILE * TILE;
    memset(out, 0, filled * depth);
    memset(base, 0, filled * sizeof(int32_t));
    memset(column_base, 0, columns * sizeof(int32_t));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < channels; c++) {
        const int8_t *row = weight + c * width;
        int8_t *to = out + c / TILE * TILE * depth + c % TILE * GROUP;
        int32_t total = 0;
        for (int64_t k = 0; k < width; k++) total += row[k];
        base[c] = -128 * total;
        int64_t k = 0;
        for (; k + GROUP <= width; k += GROUP) memcpy(to + k * TILE, row + k, GROUP);
        memcpy(to + k * TILE, row + k, width - k);
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < width; first += 64)
        for (int64_t c = 0; c < channels; c++)
            for (int64_t k = first; k < width && k < first + 64; k++) column_base[k] -= 128 * weight[c * width + k];
}

/* Rows as the instructions take them. values: their signs if SIGNED. unsigned_values: OF each value, or null. starts: of
 * each row's sums if SIGNED. */
typedef struct {
    const int8_t *values, *unsigned_values;
    const int32_t *starts;
    const float *scale;
    int64_t count, stride;
} quantized_rows;

INLINE quantized_rows rows_from(quantized_rows x, int64_t first) {
    x.values += first * x.stride;
    if (x.unsigned_values) x.unsigned_values += first * x.stride;
    if (x.starts) x.starts += first;
    x.scale += first;
    return x;
}

INLINE ints four_bytes_at(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, 4);
    return four_bytes(four);
}

/* sums: (rows, TILE), of which `block` channels are written. base: the sums' starts if SHIFTED. ahead, step: the weights
 * fetched into the cache meanwhile, and how far that advances for 4 of depth. */
#if GROUP == 4
INLINE void accumulate(quantized_rows x, const int rows, const int block, int64_t depth, const int8_t *weight,
                       const int32_t *base, const int8_t *ahead, int64_t step, int32_t *sums) {
    const int vectors = block / WIDTH;
    sums_of_four found[ROWS][TILE / WIDTH];
    EACH(r, rows) EACH(v, vectors) {
        if (SHIFTED) memcpy(&found[r][v], base + v * WIDTH, sizeof(sums_of_four));
        else if (SIGNED) found[r][v] = (sums_of_four)four_bytes(x.starts[r]);
        else memset(&found[r][v], 0, sizeof(sums_of_four));
    }
    for (int64_t k = 0; k < depth; k += 4, weight += 4 * TILE, ahead += step) {
        ints weights[TILE / WIDTH];
        EACH(v, vectors) memcpy(&weights[v], weight + 4 * WIDTH * v, sizeof(ints));
        for (int line = 0; line < GROUP * block; line += 64) __builtin_prefetch(ahead + line, 0, 2);
        EACH(r, rows) {
            ints bytes = four_bytes_at(x.values + r * x.stride + k);
#if defined(OF)
            ints unsigned_bytes = four_bytes_at(x.unsigned_values + r * x.stride + k);
#endif
            EACH(v, vectors) dot(found[r][v], bytes, unsigned_bytes, weights[v]);
            (void)bytes;
        }
    }
    EACH(r, rows) EACH(v, vectors) memcpy(sums + r * TILE + v * WIDTH, &found[r][v], sizeof(sums_of_four));
}
#else
/* i8mm multiplies 2 rows with 2 channels, 8 bytes of each, into 4 sums. A last single row is paired with itself. */
INLINE void accumulate(quantized_rows x, const int rows, const int block, int64_t depth, const int8_t *weight,
                       const int32_t *base, const int8_t *ahead, int64_t step, int32_t *sums) {
    const int pairs = (rows + 1) / 2, vectors = block / 2;
    (void)base, (void)ahead, (void)step;
    sums_of_four found[(ROWS + 1) / 2][TILE / 2];
    EACH(r, pairs) EACH(v, vectors) found[r][v] = vdupq_n_s32(0);
    for (int64_t k = 0; k < depth; k += 8, weight += 8 * TILE) {
        EACH(r, pairs) {
            const int8_t *first = x.values + 2 * r * x.stride + k;
            const int8_t *second = 2 * r + 1 < rows ? first + x.stride : first;
            int8x16_t bytes = vcombine_s8(vld1_s8(first), vld1_s8(second));
            EACH(v, vectors) found[r][v] = vmmlaq_s32(found[r][v], bytes, vld1q_s8(weight + 16 * v));
        }
    }
    EACH(r, pairs) EACH(v, vectors) {
        vst1_s32(sums + 2 * r * TILE + 2 * v, vget_low_s32(found[r][v]));
        if (2 * r + 1 < rows) vst1_s32(sums + (2 * r + 1) * TILE + 2 * v, vget_high_s32(found[r][v]));
    }
}
#endif

#define SUM(n)                                                                                                        \
    for (int block = 0; block < TILE; block += BLOCK_OF(n), ahead += depth / GROUP * step)                            \
    accumulate(x, n, BLOCK_OF(n), depth, weight + block * GROUP, SHIFTED ? base + block : NULL, ahead, step, sums + block)
/* part: one of `parts` calls for the tile. They read it several times, and fetch the next one meanwhile, each an equal
 * share, into the second cache: 1.2 to 1.4 times as fast as what the CPU fetches by itself, for 2 to 32 rows. Where the
 * tile is read once, weights that follow soon are fetched. */
static void sum_rows(quantized_rows x, int64_t rows, int64_t depth, const int8_t *weight, const int32_t *base,
                     int64_t part, int64_t parts, int32_t *sums) {
    int64_t step = GROUP * BLOCK_OF(rows) / parts, times = parts * TILE / BLOCK_OF(rows);
    const int8_t *ahead = weight + (times == 1 ? AHEAD : depth * TILE + depth / GROUP * step * part * (TILE / BLOCK_OF(rows)));
    if (rows == 1) SUM(1);
    else if (rows == 2) SUM(2);
    else if (rows == 3) SUM(3);
    else if (rows == 4) SUM(4);
#if ROWS > 4
    else if (rows == 5) SUM(5);
    else SUM(6);
#endif
}

#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>

/* Ask Linux for the registers of AMX. Return whether this process has them. */
int prepare(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; } /* ARCH_REQ_XCOMP_PERM, XTILEDATA */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} tile_shapes;

/* Registers 0 to 3: sums of 2 x 16 rows and 2 x 16 channels. 4 and 5: rows. 6 and 7: weights. */
static void shape_tiles(int64_t rows) {
    tile_shapes shapes = {.palette = 1};
    uint8_t upper = rows > 16 ? 16 : rows, lower = rows > 16 ? rows - 16 : 1;
    const uint8_t counts[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    EACH(i, 8) {
        shapes.bytes_per_row[i] = 64;
        shapes.rows[i] = counts[i];
    }
    _tile_loadconfig(&shapes);
}

/* Sum up to 32 rows with a whole tile. `shape_tiles` was called with the same number of rows. next: the tile that comes
 * into the cache meanwhile: two passes over half a tile each defeat the CPU's own prefetching. */
static void sum_many(quantized_rows x, int64_t rows, int64_t depth, const int8_t *weight, const int8_t *next,
                     int32_t *sums) {
    for (int block = 0; block < TILE; block += 32) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < depth; k += 64) {
            const int8_t *some = weight + k * TILE + block * GROUP;
            for (int line = 0; next && line < 32 * TILE; line += 64, next += 64) __builtin_prefetch(next, 0, 2);
            _tile_loadd(6, some, GROUP * TILE);
            _tile_loadd(7, some + 16 * GROUP, GROUP * TILE);
            _tile_loadd(4, x.values + k, x.stride);
            _tile_dpbssd(0, 4, 6);
            _tile_dpbssd(1, 4, 7);
            if (rows > 16) {
                _tile_loadd(5, x.values + 16 * x.stride + k, x.stride);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
        }
        _tile_stored(0, sums + block, TILE * sizeof(int32_t));
        _tile_stored(1, sums + block + 16, TILE * sizeof(int32_t));
        if (rows > 16) {
            _tile_stored(2, sums + 16 * TILE + block, TILE * sizeof(int32_t));
            _tile_stored(3, sums + 16 * TILE + block + 16, TILE * sizeof(int32_t));
        }
    }
}
#else
int prepare(void) { return 1; }
#endif

/* Write sums * scale * row_scale + bias for the `left` channels of a tile that exist. scale, bias: null for none. */
static void finish(const int32_t *sums, const float *row_scale, int64_t rows, const float *scale, const float *bias,
                   int64_t left, float *out, int64_t channels) {
    for (int64_t c = 0; c < TILE && c < left; c += LANES) {
        lanes scales = scale ? load_some(scale + c, left - c) : splat(1.0f);
        lanes biases = bias ? load_some(bias + c, left - c) : splat(0.0f);
        for (int64_t r = 0; r < rows; r++) {
            lanes y = times(times(converted(sums + r * TILE + c), scales), splat(row_scale[r]));
            store_some(out + r * channels + c, bias ? plus(y, biases) : y, left - c);
        }
    }
}

/* Multiply all rows with one tile, in even groups. */
static void multiply_tile(quantized_rows x, int64_t depth, const int8_t *weight, const int32_t *base,
                          const float *scale, const float *bias, int64_t left, float *out, int64_t channels) {
    int32_t sums[MOST_ROWS * TILE];
    int64_t most = MOST_ROWS > ROWS && x.count > ROWS ? MOST_ROWS : ROWS, parts = (x.count + most - 1) / most;
#if defined(__AMX_INT8__)
    int64_t shaped = 0;
#endif
    for (int64_t part = 0; part < parts; part++) {
        int64_t first = part * x.count / parts, count = (part + 1) * x.count / parts - first;
#if defined(__AMX_INT8__)
        if (x.count > ROWS) {
            if (count != shaped) shape_tiles(shaped = count);
            sum_many(rows_from(x, first), count, depth, weight, part ? NULL : weight + TILE * depth, sums);
        } else
#endif
            sum_rows(rows_from(x, first), count, depth, weight, base, part, parts, sums);
        finish(sums, x.scale + first, count, scale, bias, left, out + first * channels, channels);
    }
}

/* Return the rows for `multiply_tile`, and what the caller frees after it. */
static quantized_rows prepared(const int8_t *values, const float *scale, int64_t count, int64_t stride,
                               void **memory) {
    quantized_rows x = {values, NULL, NULL, scale, count, stride};
    *memory = NULL;
#if defined(OF)
    if (MOST_ROWS > ROWS && count > ROWS) return x;
    int8_t *copy = *memory = malloc(count * (SIGNED ? 2 * stride + 4 : stride));
    for (int64_t i = 0; i < count * stride; i++) copy[i] = OF(values[i]);
    x.unsigned_values = copy;
#if SIGNED
    int8_t *signs = copy + count * stride;
    int32_t *starts = (int32_t *)(signs + count * stride);
    for (int64_t row = 0; row < count; row++) {
        int32_t start = 0;
        for (int64_t i = row * stride; i < (row + 1) * stride; i++) {
            signs[i] = values[i] >> 7;
            start -= values[i] & signs[i];
        }
        starts[row] = start;
    }
    x.values = signs, x.starts = starts;
#endif
#endif
    return x;
}

/* Multiply rows of int8, (rows, depth), with an int8 matrix in tiles. out: float32, (rows, channels).
 * base: -128 times the sums of the channels, filled up to a multiple of TILE. */
void matmul(const int8_t *x, const float *row_scale, int64_t rows, int64_t depth, const int8_t *weight,
            const int32_t *base, const float *scale, const float *bias, int64_t channels, float *out, int threads) {
    void *memory;
    quantized_rows all = prepared(x, row_scale, rows, depth, &memory);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < channels; c += TILE)
        multiply_tile(all, depth, weight + c * depth, base + c, scale + c, bias ? bias + c : NULL, channels - c,
                      out + c, channels);
    free(memory);
}

/* Multiply with the transposed matrix: (rows, filled) to (rows, width). TILE columns at a time are rearranged as a
 * tile, and used for all rows. x: (rows, x_stride), of which the matrix's channels, filled up to TILE, are read.
 * depth: of the tiles. base: -128 times the sums of the columns, filled up to TILE. */
void transposed_matmul(const int8_t *x, const float *row_scale, int64_t rows, int64_t filled, const int8_t *weight,
                       const int32_t *base, int64_t depth, int64_t width, float *out, int threads) {
    void *memory;
    quantized_rows all = prepared(x, row_scale, rows, filled, &memory);
#pragma omp parallel num_threads(threads)
    {
        int8_t *panel = calloc(filled, TILE); /* (filled / GROUP, TILE, GROUP) */
#pragma omp for schedule(static)
        for (int64_t c = 0; c < width; c += TILE) {
            int64_t columns = depth - c < TILE ? depth - c : TILE;
            for (int64_t tile = 0; tile < filled; tile += TILE)
                for (int64_t k = 0; k < columns; k += GROUP) {
                    const int8_t *from = weight + tile * depth + (c + k) * TILE; /* (TILE, GROUP) */
                    int8_t *to = panel + tile * TILE + k * GROUP;
                    for (int64_t i = 0; i < TILE; i += GROUP, from += GROUP * GROUP, to += TILE * GROUP) {
                        int8_t some[GROUP * GROUP];
                        EACH(a, GROUP) EACH(b, GROUP) some[b * GROUP + a] = from[a * GROUP + b];
                        memcpy(to, some, sizeof some);
                    }
                }
            multiply_tile(all, filled, panel, base + c, NULL, NULL, width - c, out + c, width);
        }
        free(panel);
    }
    free(memory);
}

/* The address of an element of a bfloat16 (`halves`) or float32 matrix. */
INLINE const void *element(const void *weight, const int halves, int64_t i) {
    return (const char *)weight + (halves ? 2 : 4) * i;
}

/* Multiply up to 2 rows of floats with 4 channels: one lane sum each. width: a multiple of 16. */
INLINE void multiply_channels(const float *x, const int rows, int64_t width, const void *w, const int halves,
                              const int channels, const float *bias, float *out, int64_t out_stride) {
    lanes sums[2][4];
    EACH(r, rows) EACH(c, channels) sums[r][c] = splat(0.0f);
    for (int64_t k = 0; k < width; k += LANES) {
        lanes some[2];
        EACH(r, rows) some[r] = load(x + r * width + k);
        EACH(c, channels) {
            const void *at = element(w, halves, c * width + k);
            lanes y = halves ? widened(at) : load(at);
            __builtin_prefetch(element(w, halves, (c + 4) * width + k)); /* the next 4 channels: 1.5 times as fast */
            EACH(r, rows) sums[r][c] = fused(some[r], y, sums[r][c]);
        }
    }
    EACH(r, rows) EACH(c, channels) {
        float y = sum(sums[r][c]);
        out[r * out_stride + c] = bias ? y + bias[c] : y;
    }
}

INLINE void multiply_float_rows(const float *x, int64_t rows, int64_t width, const void *w, const int halves,
                                const float *bias, int64_t channels, float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < channels; c += 4)
        for (int64_t r = 0; r < rows; r += 2)
            for (int64_t one = c; one < c + 4 && one < channels; one += channels - c < 4 ? 1 : 4) {
                const void *some = element(w, halves, one * width);
#define FOR(n, m) multiply_channels(x + r * width, n, width, some, halves, m, bias ? bias + one : NULL, \
                                    out + r * channels + one, channels)
                if (rows - r == 1) {
                    if (channels - c < 4) FOR(1, 1);
                    else FOR(1, 4);
                } else if (channels - c < 4) FOR(2, 1);
                else FOR(2, 4);
#undef FOR
            }
}

/* Multiply rows of floats, (rows, width), with a float matrix, (channels, width). width: a multiple of 16. halves:
 * whether the matrix is bfloat16, else float32. Each weight is read once for two rows, and nothing is rounded to
 * bfloat16. */
void float_matmul(const float *x, int64_t rows, int64_t width, const void *weight, int halves, const float *bias,
                  int64_t channels, float *out, int threads) {
    if (halves) multiply_float_rows(x, rows, width, weight, 1, bias, channels, out, threads);
    else multiply_float_rows(x, rows, width, weight, 0, bias, channels, out, threads);
}

/* Values of a KV cache, of which `halves` are float16, else float32. */
typedef struct {
    void *at;
    int halves;
} cached;

INLINE void keep(cached to, int64_t at, const float *x, int64_t size) {
    if (!to.halves) memcpy((float *)to.at + at, x, size * sizeof(float));
    else
        for (int64_t i = 0; i < size; i += LANES) store_float16((uint16_t *)to.at + at + i, load(x + i));
}

/* The address of `count` of them as floats. They are written to `wide` where they are halves. */
static const float *as_floats(cached from, int64_t at, int64_t count, float *wide) {
    if (!from.halves) return (const float *)from.at + at;
    const uint16_t *x = (const uint16_t *)from.at + at;
    for (int64_t i = 0; i < count; i += LANES) {
        __builtin_prefetch((const char *)(x + i) + AHEAD); /* 1.15 times as fast for long rows */
        store(wide + i, load_float16(x + i));
    }
    return wide;
}

/* Normalize (if q_norm or k_norm, (size), are given) and rotate the queries and keys of qkv,
 * (tokens, heads + 2 * kv_heads, size), in place. Keys and values are written to `places` of the pool,
 * (2 * kv_heads, pool_tokens, size), in float16 if `halves`. cosines, sines: (tokens, size), the first half of the
 * sines negated. size: a multiple of 16. */
void rotate_and_keep(float *qkv, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size, const float *q_norm,
                     const float *k_norm, float eps, const float *cosines, const float *sines, const int64_t *places,
                     void *pool, int halves, int64_t pool_tokens, int threads) {
    const int64_t all = heads + 2 * kv_heads;
#pragma omp parallel for num_threads(threads) if (tokens > 16)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < all; head++) {
            float *x = qkv + (token * all + head) * size;
            int64_t kept = head - heads, half = size / 2;
            const float *norm = kept < 0 ? q_norm : kept < kv_heads ? k_norm : NULL;
            const float *cosine = cosines + token * size, *sine = sines + token * size;
            if (norm) norm_row(x, norm, eps, x, size);
            if (kept < kv_heads)
                for (int64_t i = 0; i < half; i++) {
                    float low = x[i], high = x[half + i];
                    x[i] = low * cosine[i] + high * sine[i];
                    x[half + i] = high * cosine[half + i] + low * sine[half + i];
                }
            if (kept >= 0) keep((cached){pool, halves}, (kept * pool_tokens + places[token]) * size, x, size);
        }
}

/* out = a @ b, or out += a @ b, for a few rows and a multiple of 16 columns. Each sum is a chain of fused multiply-adds
 * over `depth`, from 0. Strides are in floats. transposed: a is given as its transpose. */
typedef struct {
    const float *a, *b;
    float *out;
    int64_t a_stride, b_stride, out_stride, depth;
    int adds, transposed;
} product;

#if WIDTH == 16
#define PRODUCT_ROWS 6
#define PRODUCT_VECTORS 4
#define PRODUCT_PAIR 2
#elif WIDTH == 8
#define PRODUCT_ROWS 6
#define PRODUCT_VECTORS 1
#define PRODUCT_PAIR 1
#else
#define PRODUCT_ROWS 4
#define PRODUCT_VECTORS 1
#define PRODUCT_PAIR 1
#endif

INLINE void product_block(product p, const int rows, const int vectors) {
    lanes sums[PRODUCT_ROWS][PRODUCT_VECTORS];
    const int64_t row = p.transposed ? 1 : p.a_stride, step = p.transposed ? p.a_stride : 1;
    EACH(r, rows) EACH(v, vectors) sums[r][v] = splat(0.0f);
    for (int64_t k = 0; k < p.depth; k++) {
        lanes b[PRODUCT_VECTORS];
        EACH(v, vectors) b[v] = load(p.b + k * p.b_stride + v * LANES);
        EACH(r, rows) {
            lanes a = splat(p.a[r * row + k * step]);
            EACH(v, vectors) sums[r][v] = fused(a, b[v], sums[r][v]);
        }
    }
    EACH(r, rows) EACH(v, vectors) {
        float *out = p.out + r * p.out_stride + v * LANES;
        store(out, p.adds ? plus(load(out), sums[r][v]) : sums[r][v]);
    }
}

#define PRODUCT_OF(n)                                                     \
    case n:                                                               \
        if (vectors == PRODUCT_VECTORS) product_block(p, n, PRODUCT_VECTORS); \
        else if (vectors == 2) product_block(p, n, PRODUCT_PAIR);             \
        else product_block(p, n, 1);                                          \
        break;
static void multiply_floats(product all, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; row += PRODUCT_ROWS)
        for (int64_t c = 0; c < columns;) {
            int64_t left = (columns - c) / LANES;
            int vectors = left >= PRODUCT_VECTORS ? PRODUCT_VECTORS : left >= PRODUCT_PAIR ? PRODUCT_PAIR : 1;
            product p = all;
            p.a += row * (p.transposed ? 1 : p.a_stride), p.b += c, p.out += row * p.out_stride + c;
            switch (rows - row < PRODUCT_ROWS ? rows - row : PRODUCT_ROWS) {
                PRODUCT_OF(1) PRODUCT_OF(2) PRODUCT_OF(3) PRODUCT_OF(4)
#if PRODUCT_ROWS > 4
                PRODUCT_OF(5) PRODUCT_OF(6)
#endif
            }
            c += vectors * LANES;
        }
}

/* Transpose up to KEYS keys, (count, size), to (size, KEYS): those of the others that fill 16 become 0, the rest is not
 * written. size: a multiple of 4. stride: floats from one key to the next. */
#define KEYS 64
static void transpose_keys(const float *keys, int64_t stride, int64_t count, int64_t size, float *out) {
    static const float none[4];
    for (int64_t key = 0; key < (count + LANES - 1) / LANES * LANES; key += WIDTH)
        for (int64_t d = 0; d < size; d += 4) {
            const float *from[WIDTH];
            EACH(i, WIDTH) from[i] = key + i < count ? keys + (key + i) * stride + d : none;
            floats turned[4];
            transpose_four(from, turned);
            EACH(i, 4) memcpy(out + (d + i) * KEYS + key, &turned[i], sizeof(floats));
        }
}

/* Softmax of the first `length` scores, in place, without its division. Return the factor that is left. What is not
 * seen, and what follows up to `padded`, a multiple of 16, becomes 0. seen: a byte per key, or null for all. */
static float soften(float *scores, int64_t length, int64_t padded, const uint8_t *seen, float scaling) {
    for (int64_t i = 0; seen && i < length; i++) scores[i] = seen[i] ? scores[i] : -INFINITY;
    lanes tops = splat(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) {
        lanes scaled = times(load(scores + i), splat(scaling));
        store(scores + i, scaled);
        tops = larger(scaled, tops);
    }
    float top[LANES], highest = -INFINITY;
    store(top, tops);
    for (int j = 0; j < LANES; j++) highest = top[j] > highest ? top[j] : highest;
    for (; i < length; i++) {
        scores[i] *= scaling;
        highest = scores[i] > highest ? scores[i] : highest;
    }
    lanes total = splat(0.0f);
    for (i = 0; i < length; i += LANES) {
        lanes weights = exponential(minus(load(scores + i), splat(highest)));
        if (length - i < LANES || seen) {
            float some[LANES];
            store(some, weights);
            for (int64_t j = 0; j < LANES; j++) some[j] = i + j < length && (!seen || seen[i + j]) ? some[j] : 0.0f;
            weights = load(some);
        }
        store(scores + i, weights);
        total = plus(total, weights);
    }
    for (; i < padded; i++) scores[i] = 0.0f;
    return 1.0f / sum(total);
}

/* Query rows that are attended together. */
#define TOGETHER 48

/* Attend the tokens from `first` to `first + count` of a span, for the `group` query heads of one key head, whose keys
 * and values begin at `keys` and `values` of the pool.
 * queries, out: of the span's first token. scores: (TOGETHER, padded longest). */
static void attend_tokens(const float *queries, int64_t stride, cached pool, int64_t keys, int64_t values, span all,
                          int64_t first, int64_t count, int64_t group, int64_t size, float scaling, float *scores,
                          float *work, float *out, int64_t out_stride) {
    int64_t rows = count * group, last = all.seen ? all.length : all.length - all.count + first + count;
    int64_t padded = (last + KEYS - 1) / KEYS * KEYS;
    float *gathered = work, *sums = gathered + TOGETHER * size, *turned = sums + TOGETHER * size;
    float *wide = turned + size * KEYS;
    for (int64_t r = 0; r < rows; r++)
        memcpy(gathered + r * size, queries + (first + r / group) * stride + r % group * size, size * sizeof(float));
    for (int64_t key = 0; key < last; key += KEYS) {
        int64_t some = last - key < KEYS ? last - key : KEYS;
        transpose_keys(as_floats(pool, keys + key * size, some * size, wide), size, some, size, turned);
        product p = {gathered, turned, scores + key, size, KEYS, padded, size, 0, 0};
        multiply_floats(p, rows, (some + LANES - 1) / LANES * LANES);
    }
    float factors[TOGETHER];
    for (int64_t r = 0; r < rows; r++) {
        int64_t token = first + r / group, length = all.seen ? all.length : all.length - all.count + token + 1;
        const uint8_t *seen = all.seen ? all.seen + token * all.length : NULL;
        factors[r] = soften(scores + r * padded, length, padded, seen, scaling);
    }
    memset(sums, 0, rows * size * sizeof(float));
    for (int64_t key = 0; key < last; key += KEYS) {
        int64_t some = last - key < KEYS ? last - key : KEYS;
        const float *block = as_floats(pool, values + key * size, some * size, wide);
        product p = {scores + key, block, sums, padded, size, size, some, 1, 0};
        multiply_floats(p, rows, size);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < size; d++)
            out[(first + r / group) * out_stride + r % group * size + d] = sums[r * size + d] * factors[r];
}

/* Attention of the tokens of some spans. stride: floats from one token's queries to the next. pool: keys, then values,
 * (2 * kv_heads, pool_tokens, size), in float16 if `halves`. out: (tokens, kv_heads * group, size). size: a multiple of 16.
 * group: at most TOGETHER. longest: of the spans' lengths. */
void attend(const float *queries, int64_t stride, const void *pool, int halves, int64_t pool_tokens,
            int64_t kv_heads, int64_t group, int64_t size, const span *spans, int64_t count, int64_t longest,
            float scaling, float *out, int threads) {
    int64_t tokens = TOGETHER / group, jobs = 0, *ends = malloc((count + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < count; i++) ends[i] = jobs += (spans[i].count + tokens - 1) / tokens;
#pragma omp parallel num_threads(threads) if (jobs * kv_heads > 1)
    {
        int64_t padded = (longest + KEYS - 1) / KEYS * KEYS;
        float *scores = malloc((TOGETHER * padded + 2 * (TOGETHER + KEYS) * size) * sizeof(float));
#pragma omp for schedule(dynamic)
        for (int64_t one = 0; one < jobs * kv_heads; one++) {
            int64_t head = one % kv_heads, job = one / kv_heads, i = 0;
            while (job >= ends[i]) i++;
            span all = spans[i];
            int64_t first = (job - (i ? ends[i - 1] : 0)) * tokens;
            int64_t keys = (head * pool_tokens + all.start) * size;
            attend_tokens(queries + all.first * stride + head * group * size, stride, (cached){(void *)pool, halves},
                          keys, keys + kv_heads * pool_tokens * size, all, first,
                          all.count - first < tokens ? all.count - first : tokens, group, size, scaling, scores,
                          scores + TOGETHER * padded, out + (all.first * kv_heads + head) * group * size,
                          kv_heads * group * size);
        }
        free(scores);
    }
    free(ends);
}

#include "between_matmuls.h"
#include "packed_attention.h"
