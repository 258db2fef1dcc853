/* Kernels of a decoding step, for x86-64 CPUs with AVX-512 and its int8 dot product (VNNI): quantizing rows (also of
 * normalized and gated inputs), matmuls with int8 weights, and attention of single queries. Int8 layers in training use
 * `hadamard`, `quantize`, `scale_quantize`, and both matmuls.
 *
 * Each function computes what models/fused.py and decoding/engines/fused.py compute with PyTorch, without intermediate
 * arrays. Each row is computed separately, always by the same instructions, so its result does not depend on the other
 * rows or on the number of threads.
 */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 16 /* float32 values per register */

/* The mask of the lanes that hold one of the `left` remaining values. */
static inline __mmask16 lanes(int64_t left) {
    return left >= LANES ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
}

/* Return e^x with a relative error of 2e-7: x = n ln 2 + r, and a polynomial in r (Cephes' expf). */
static inline __m512 exp512(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.3f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* Transform a row in place, by sums and differences of values that are width / block apart, then twice that, and so on
 * (see kernels/int8_matmul.py). */
static void hadamard_row(float *x, int64_t width) {
    int64_t block = width & -width;
    for (int64_t distance = width / (block < 64 ? block : 64); distance < width; distance *= 2)
        for (int64_t first = 0; first < width; first += 2 * distance)
            for (int64_t i = 0; i < distance; i += LANES) {
                float *a = x + first + i, *b = a + distance;
                __mmask16 mask = lanes(distance - i);
                __m512 low = _mm512_maskz_loadu_ps(mask, a), high = _mm512_maskz_loadu_ps(mask, b);
                _mm512_mask_storeu_ps(a, mask, _mm512_add_ps(low, high));
                _mm512_mask_storeu_ps(b, mask, _mm512_sub_ps(low, high));
            }
}

/* Quantize a row to unsigned bytes: 128 + value / scale, where the largest magnitude becomes 127. Return the scale. */
static float quantize_row(const float *x, uint8_t *out, int64_t width) {
    __m512 largest = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += LANES)
        largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_maskz_loadu_ps(lanes(width - i), x + i)));
    float scale = _mm512_reduce_max_ps(largest) / 127.0f;
    if (scale < 1e-12f) scale = 1e-12f;
    __m512 divisor = _mm512_set1_ps(scale);
    __m512i middle = _mm512_set1_epi32(128);
    for (int64_t i = 0; i < width; i += LANES) {
        __mmask16 mask = lanes(width - i);
        __m512 steps = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), divisor);
        __m512i rounded = _mm512_add_epi32(_mm512_cvtps_epi32(steps), middle); /* halves to even */
        _mm512_mask_cvtepi32_storeu_epi8(out + i, mask, rounded);
    }
    return scale;
}

/* RMSNorm of a row: x * weight / sqrt(mean(x^2) + eps). */
static void norm_row(const float *x, const float *weight, float eps, float *out, int64_t width) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += LANES) {
        __m512 value = _mm512_maskz_loadu_ps(lanes(width - i), x + i);
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + eps));
    for (int64_t i = 0; i < width; i += LANES) {
        __mmask16 mask = lanes(width - i);
        __m512 normed = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factor);
        _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(normed, _mm512_maskz_loadu_ps(mask, weight + i)));
    }
}

/* SwiGLU of a row: silu(gate) * up. x: gate, then up. */
static void gate_row(const float *x, float *out, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) {
        __mmask16 mask = lanes(width - i);
        __m512 gate = _mm512_maskz_loadu_ps(mask, x + i), up = _mm512_maskz_loadu_ps(mask, x + width + i);
        __m512 one = _mm512_set1_ps(1.0f);
        __m512 below = _mm512_add_ps(one, exp512(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
        _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(_mm512_div_ps(gate, below), up));
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

/* Transform the rows of x, (rows, width), and quantize them. work: (rows, width). */
void quantize(const float *x, int64_t rows, int64_t width, float *work, uint8_t *out, float *scales, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        memcpy(work + row * width, x + row * width, width * sizeof(float));
        hadamard_row(work + row * width, width);
        scales[row] = quantize_row(work + row * width, out + row * width, width);
    }
}

/* Quantize x * weight, not transformed. x: (rows, width). weight: (width). */
void scale_quantize(const float *x, const float *weight, int64_t rows, int64_t width, float *work, uint8_t *out,
                    float *scales, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *values = x + row * width;
        float *scaled = work + row * width;
        for (int64_t i = 0; i < width; i++) scaled[i] = values[i] * weight[i];
        scales[row] = quantize_row(scaled, out + row * width, width);
    }
}

/* `quantize` of RMSNorm(x). */
void norm_quantize(const float *x, const float *weight, float eps, int64_t rows, int64_t width, float *work,
                   uint8_t *out, float *scales, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        norm_row(x + row * width, weight, eps, work + row * width, width);
        hadamard_row(work + row * width, width);
        scales[row] = quantize_row(work + row * width, out + row * width, width);
    }
}

/* `quantize` of SwiGLU(x). x: (rows, 2 * width). */
void gate_quantize(const float *x, int64_t rows, int64_t width, float *work, uint8_t *out, float *scales, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        gate_row(x + row * 2 * width, work + row * width, width);
        hadamard_row(work + row * width, width);
        scales[row] = quantize_row(work + row * width, out + row * width, width);
    }
}

/* Compute (base + x @ weight) * scale * row_scale + bias for up to ROWS rows of bytes and the TILE channels of a tile.
 * scale, bias: null for none. left: number of channels that exist. The sums must stay in registers. So all loops over
 * them are unrolled, and the instruction is written as inline assembly: with its intrinsic, gcc 12 copies all sums, at
 * half the speed. */
#define ROWS 6
#define TILE 64
#define QUARTERS (TILE / LANES)
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < (count); i++)

static inline __attribute__((always_inline)) void multiply(const uint8_t *x, const float *row_scale, const int rows,
                                                           int64_t width, const int8_t *weight, const int32_t *base,
                                                           const float *scale, const float *bias, int64_t left,
                                                           float *out, int64_t channels) {
    __m512i sums[ROWS][QUARTERS];
    EACH(r, rows) EACH(q, QUARTERS) sums[r][q] = _mm512_loadu_si512(base + q * LANES);
    for (int64_t k = 0; k < width; k += 4, weight += 4 * TILE) {
        __m512i weights[QUARTERS];
        EACH(q, QUARTERS) weights[q] = _mm512_loadu_si512(weight + 4 * LANES * q);
        EACH(r, rows) {
            int32_t four;
            memcpy(&four, x + r * width + k, 4);
            __m512i bytes = _mm512_set1_epi32(four);
            EACH(q, QUARTERS) __asm__("vpdpbusd %2, %1, %0" : "+v"(sums[r][q]) : "v"(bytes), "v"(weights[q]));
        }
    }
    EACH(q, QUARTERS) {
        __mmask16 mask = lanes(left - q * LANES);
        __m512 scales = scale ? _mm512_maskz_loadu_ps(mask, scale + q * LANES) : _mm512_set1_ps(1.0f);
        __m512 biases = bias ? _mm512_maskz_loadu_ps(mask, bias + q * LANES) : _mm512_setzero_ps();
        EACH(r, rows) {
            __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][q]), scales), _mm512_set1_ps(row_scale[r]));
            _mm512_mask_storeu_ps(out + r * channels + q * LANES, mask, _mm512_add_ps(y, biases));
        }
    }
}

/* Multiply all rows with one tile, in even groups of at most ROWS rows. */
static void multiply_tile(const uint8_t *x, const float *row_scale, int64_t rows, int64_t width, const int8_t *weight,
                          const int32_t *base, const float *scale, const float *bias, int64_t left, float *out,
                          int64_t channels) {
    int64_t parts = (rows + ROWS - 1) / ROWS;
    for (int64_t part = 0; part < parts; part++) {
        int64_t first = part * rows / parts, count = (part + 1) * rows / parts - first;
#define OF(n) multiply(x + first * width, row_scale + first, n, width, weight, base, scale, bias, left, \
                       out + first * channels, channels)
        if (count == 1) OF(1);
        else if (count == 2) OF(2);
        else if (count == 3) OF(3);
        else if (count == 4) OF(4);
        else if (count == 5) OF(5);
        else OF(ROWS);
    }
}

/* Multiply rows of bytes with zero point 128, (rows, width), with int8 weights, (channels, width). out: float32,
 * (rows, channels). weight: in tiles of 64 channels, each (width / 4, 64, 4), so memory is read sequentially; the last
 * one is padded with zeros. base: -128 times the sums of the channels, padded too. */
void matmul(const uint8_t *x, const float *row_scale, int64_t rows, int64_t width, const int8_t *weight,
             const int32_t *base, const float *scale, const float *bias, int64_t channels, float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < channels; c += TILE)
        multiply_tile(x, row_scale, rows, width, weight + c * width, base + c, scale + c, bias ? bias + c : NULL,
                      channels - c, out + c, channels);
}

/* Multiply with the transposed matrix: (rows, channels) to (rows, width). 64 columns at a time are rearranged as a
 * tile, 4 x 16 bytes per instruction, and used for all rows. base: -128 times the sums of the columns, padded.
 * work: (threads, padded channels, 64). */
void transposed_matmul(const uint8_t *x, const float *row_scale, int64_t rows, int64_t channels, const int8_t *weight,
                        const int32_t *base, int64_t width, float *out, int8_t *work, int threads) {
    const __m512i turned = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    int64_t filled = (channels + TILE - 1) / TILE * TILE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t c = 0; c < width; c += TILE) {
        int8_t *panel = work + omp_get_thread_num() * filled * TILE;
        int64_t groups = (width - c < TILE ? width - c : TILE) / 4;
        for (int64_t tile = 0; tile < filled; tile += TILE)
            for (int64_t group = 0; group < groups; group++)
                EACH(q, QUARTERS) {
                    const int8_t *four = weight + tile * width + (c / 4 + group) * 4 * TILE + q * 4 * LANES;
                    __m512i columns = _mm512_shuffle_epi8(_mm512_loadu_si512(four), turned);
                    __m128i *place = (__m128i *)(panel + (tile / 4 + q * 4) * 4 * TILE + group * 16);
                    _mm_storeu_si128(place, _mm512_extracti32x4_epi32(columns, 0));
                    _mm_storeu_si128(place + TILE / 4, _mm512_extracti32x4_epi32(columns, 1));
                    _mm_storeu_si128(place + TILE / 2, _mm512_extracti32x4_epi32(columns, 2));
                    _mm_storeu_si128(place + TILE / 4 * 3, _mm512_extracti32x4_epi32(columns, 3));
                }
        multiply_tile(x, row_scale, rows, channels, panel, base + c, NULL, NULL, width - c, out + c, width);
    }
}

/* Normalize (if q_norm or k_norm, (size), are given) and rotate the queries and keys of qkv,
 * (tokens, heads + 2 * kv_heads, size). Queries stay in place. Keys and values are written to `places` of the pool,
 * (2 * kv_heads, pool_tokens, size). cosines, sines: (tokens, size), the first half of the sines negated.
 * size: a multiple of 32. */
void rotate(float *qkv, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size, const float *q_norm,
            const float *k_norm, float eps, const float *cosines, const float *sines, const int64_t *places,
            float *pool, int64_t pool_tokens) {
    for (int64_t token = 0; token < tokens; token++, cosines += size, sines += size)
        for (int64_t head = 0; head < heads + 2 * kv_heads; head++, qkv += size) {
            int64_t kept = head - heads;
            const float *norm = kept < 0 ? q_norm : kept < kv_heads ? k_norm : NULL;
            if (norm) norm_row(qkv, norm, eps, qkv, size);
            float *out = kept < 0 ? qkv : pool + (kept * pool_tokens + places[token]) * size;
            for (int64_t i = 0; i < size / 2; i += LANES) {
                __m512 low = _mm512_loadu_ps(qkv + i), high = _mm512_loadu_ps(qkv + size / 2 + i);
                if (kept < kv_heads) {
                    __m512 turned = _mm512_add_ps(_mm512_mul_ps(low, _mm512_loadu_ps(cosines + i)),
                                                  _mm512_mul_ps(high, _mm512_loadu_ps(sines + i)));
                    high = _mm512_add_ps(_mm512_mul_ps(high, _mm512_loadu_ps(cosines + size / 2 + i)),
                                         _mm512_mul_ps(low, _mm512_loadu_ps(sines + size / 2 + i)));
                    low = turned;
                }
                _mm512_storeu_ps(out + i, low);
                _mm512_storeu_ps(out + size / 2 + i, high);
            }
        }
}

/* Attention of the `group` queries that share one key head, over the same keys. size: 16 * chunks. */
static inline __attribute__((always_inline)) void attend_head(const float *queries, const float *keys,
                                                              const float *values, int64_t length, int64_t group,
                                                              int chunks, const uint8_t *seen, float scaling,
                                                              float *scores, float *out) {
    const int64_t size = chunks * LANES;
    for (int64_t g = 0; g < group; g++, queries += size, out += size) {
        float highest = -INFINITY;
        for (int64_t i = 0; i < length; i++) {
            __m512 sum = _mm512_setzero_ps();
            for (int c = 0; c < chunks; c++)
                sum = _mm512_fmadd_ps(_mm512_loadu_ps(queries + c * LANES),
                                      _mm512_loadu_ps(keys + i * size + c * LANES), sum);
            scores[i] = seen && !seen[i] ? -INFINITY : _mm512_reduce_add_ps(sum) * scaling;
            if (scores[i] > highest) highest = scores[i];
        }
        __m512 total = _mm512_setzero_ps(), minus = _mm512_set1_ps(-INFINITY);
        for (int64_t i = 0; i < length; i += LANES) {
            __mmask16 mask = lanes(length - i);
            __m512 score = _mm512_mask_loadu_ps(minus, mask, scores + i);
            __mmask16 is_seen = _mm512_cmp_ps_mask(score, minus, _CMP_NEQ_OQ);
            __m512 weight = _mm512_maskz_mov_ps(is_seen, exp512(_mm512_sub_ps(score, _mm512_set1_ps(highest))));
            _mm512_mask_storeu_ps(scores + i, mask, weight);
            total = _mm512_add_ps(total, weight);
        }
        __m512 sums[8], share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
        for (int c = 0; c < chunks; c++) sums[c] = _mm512_setzero_ps();
        for (int64_t i = 0; i < length; i++)
            for (int c = 0; c < chunks; c++)
                sums[c] = _mm512_fmadd_ps(_mm512_set1_ps(scores[i]), _mm512_loadu_ps(values + i * size + c * LANES),
                                          sums[c]);
        for (int c = 0; c < chunks; c++) _mm512_storeu_ps(out + c * LANES, _mm512_mul_ps(sums[c], share));
    }
}

/* Attention of single queries, each over its sequence's keys. A job is a query token. Its keys are at starts[job] to
 * starts[job] + lengths[job] of the pool, (2 * kv_heads, pool_tokens, size), keys first, then values. masks[job] has
 * one byte per key, or is null to attend to all. stride: floats from one token's queries to the next.
 * out: (jobs, kv_heads * group, size). work: (jobs * kv_heads, longest). size: 32, 64, 96 or 128. */
void attend(const float *queries, int64_t stride, const float *pool, int64_t pool_tokens, int64_t kv_heads,
            int64_t group, int64_t size, int64_t jobs, const int64_t *starts, const int64_t *lengths,
            const uint8_t *const *masks, float scaling, float *work, int64_t longest, float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t one = 0; one < jobs * kv_heads; one++) {
        int64_t job = one / kv_heads, head = one % kv_heads;
        const float *query = queries + job * stride + head * group * size;
        const float *keys = pool + (head * pool_tokens + starts[job]) * size;
        const float *values = keys + kv_heads * pool_tokens * size;
        float *scores = work + one * longest, *result = out + one * group * size;
        if (size == 64) attend_head(query, keys, values, lengths[job], group, 4, masks[job], scaling, scores, result);
        else if (size == 128)
            attend_head(query, keys, values, lengths[job], group, 8, masks[job], scaling, scores, result);
        else if (size == 96)
            attend_head(query, keys, values, lengths[job], group, 6, masks[job], scaling, scores, result);
        else attend_head(query, keys, values, lengths[job], group, 2, masks[job], scaling, scores, result);
    }
}
