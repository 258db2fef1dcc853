/* The few operations that differ between instruction sets. kernels.c is written with them, once for all CPUs.
 *
 * A `lanes` holds 16 float32 values on every CPU: one register of AVX-512, two of AVX2, four of NEON. Every sum over
 * a row runs over these 16 lanes, and `sum` adds them in one order. So results do not depend on the width of the CPU's
 * registers. Nothing is contracted (-ffp-contract=off): a fused multiply-add happens only where `fused` is written.
 */
#include <stdint.h>
#include <string.h>

#define LANES 16
#define EACH(i, count) _Pragma("GCC unroll 16") for (int i = 0; i < (count); i++)
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX2__)
#include <immintrin.h>
#if defined(__AVX512VNNI__)
#define WIDTH 16
#define MM(operation) _mm512_##operation
typedef __m512 floats;
typedef __m512i ints;
#else
#define WIDTH 8
#define MM(operation) _mm256_##operation
typedef __m256 floats;
typedef __m256i ints;
#endif
INLINE floats fused_one(floats a, floats b, floats c) { return MM(fmadd_ps)(a, b, c); }
INLINE floats larger_one(floats a, floats b) { return MM(max_ps)(a, b); }
INLINE floats smaller_one(floats a, floats b) { return MM(min_ps)(a, b); }
INLINE floats splat_one(float a) { return MM(set1_ps)(a); }
INLINE ints four_bytes(int32_t four) { return MM(set1_epi32)(four); }
#elif defined(__aarch64__)
#include <arm_neon.h>
#define WIDTH 4
typedef float32x4_t floats;
typedef int8x16_t ints;
INLINE floats fused_one(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }
/* As on x86: the second one if either is NaN. */
INLINE floats larger_one(floats a, floats b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE floats smaller_one(floats a, floats b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
INLINE floats splat_one(float a) { return vdupq_n_f32(a); }
INLINE ints four_bytes(int32_t four) { return vreinterpretq_s8_s32(vdupq_n_s32(four)); }
#else
#error "kernels.c needs AVX2, AVX-512 with VNNI, or 64-bit ARM"
#endif

/* Sums of products of bytes: sums[i] += x[4i] * w[4i] + ... + x[4i + 3] * w[4i + 3], exact for |w| <= 127. x86 multiplies
 * unsigned bytes with signed ones, so it takes x as `unsigned_x`: OF(x) for each byte.
 * SHIFTED: that is x + 128, and sums start at -128 times the sum of the weights.
 * SIGNED: that is |x|, `signs` is -1 for each x < 0 and 0 else, and sums start at the sum of the row's |x| for x < 0. */
#if defined(__AVX512VNNI__)
#define SHIFTED 1
#define SIGNED 0
typedef __m512i sums_of_four;
/* With its intrinsic, gcc 12 copies all sums, at half the speed. */
#define OF(x) ((x) ^ -128)
#define dot(sums, signs, unsigned_x, w) __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_x), "v"(w))
#elif defined(__AVXVNNI__)
#define SHIFTED 1
#define SIGNED 0
typedef __m256i sums_of_four;
#define OF(x) ((x) ^ -128)
#define dot(sums, signs, unsigned_x, w) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(unsigned_x), "x"(w))
#elif defined(__AVX2__)
#define SHIFTED 0
#define SIGNED 1
typedef __m256i sums_of_four;
/* Two products of at most 128 * 128 fit into 16 bits. Where x < 0, -w - 1 takes the place of -w, and the sum of the row's
 * |x| makes up for it: inverting bits runs on three ports, and negating (vpsignb) on the two that multiply. */
#define OF(x) ((x) < 0 ? -(x) : (x))
#define dot(sums, signs, unsigned_x, w)                                                                              \
    (sums) = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_x, _mm256_xor_si256(w, signs)), \
                                                      _mm256_set1_epi16(1)))
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#define SHIFTED 0
#define SIGNED 0
typedef int32x4_t sums_of_four;
#elif defined(__ARM_FEATURE_DOTPROD)
#define SHIFTED 0
#define SIGNED 0
typedef int32x4_t sums_of_four;
#define dot(sums, x, unsigned_x, w) (sums) = vdotq_s32(sums, x, w)
#else
#define SHIFTED 0
#define SIGNED 0
typedef int32x4_t sums_of_four;
/* Products of -128 * 127 fit into 16 bits, and so do their sums by two. */
#define dot(sums, x, unsigned_x, w)                                                                 \
    (sums) = vpadalq_s16(sums, vpaddq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(w)), vmull_high_s8(x, w)))
#endif

#define PARTS (LANES / WIDTH)
typedef struct {
    floats part[PARTS];
} lanes;
typedef uint32_t bits_of_floats __attribute__((vector_size(4 * WIDTH)));

INLINE lanes load(const float *x) {
    lanes a;
    EACH(p, PARTS) memcpy(&a.part[p], x + p * WIDTH, sizeof(floats));
    return a;
}

INLINE void store(float *x, lanes a) { EACH(p, PARTS) memcpy(x + p * WIDTH, &a.part[p], sizeof(floats)); }

/* 16 integers as floats. */
INLINE lanes converted(const int32_t *x) {
    typedef int32_t whole __attribute__((vector_size(4 * WIDTH)));
    lanes a;
    EACH(p, PARTS) {
        whole some;
        memcpy(&some, x + p * WIDTH, sizeof some);
        a.part[p] = __builtin_convertvector(some, floats);
    }
    return a;
}

/* 16 bfloat16 values as floats: they are the upper halves. */
INLINE lanes widened(const uint16_t *x) {
    typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
    lanes a;
    EACH(p, PARTS) {
        halves some;
        memcpy(&some, x + p * WIDTH, sizeof some);
        a.part[p] = (floats)(__builtin_convertvector(some, bits_of_floats) << 16);
    }
    return a;
}

/* 16 float16 values as floats. */
INLINE lanes load_float16(const uint16_t *x) {
    lanes a;
#if WIDTH == 16
    a.part[0] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)x));
#elif WIDTH == 8
    EACH(p, PARTS) a.part[p] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + p * WIDTH)));
#else
    EACH(p, PARTS) a.part[p] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + p * WIDTH)));
#endif
    return a;
}

/* To the nearest; to infinity from 65,520 on. */
INLINE void store_float16(uint16_t *x, lanes a) {
#if WIDTH == 16
    _mm256_storeu_si256((__m256i *)x, _mm512_cvtps_ph(a.part[0], _MM_FROUND_TO_NEAREST_INT));
#elif WIDTH == 8
    EACH(p, PARTS)
    _mm_storeu_si128((__m128i *)(x + p * WIDTH), _mm256_cvtps_ph(a.part[p], _MM_FROUND_TO_NEAREST_INT));
#else
    EACH(p, PARTS) vst1_u16(x + p * WIDTH, vreinterpret_u16_f16(vcvt_f16_f32(a.part[p])));
#endif
}

/* 16 floats as bfloat16, rounded to the nearest one, or to the even one of two. */
INLINE void store_halves(uint16_t *x, lanes a) {
    EACH(p, PARTS) {
        typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
        bits_of_floats bits = (bits_of_floats)a.part[p], nan = (bits_of_floats)(a.part[p] != a.part[p]);
        bits_of_floats rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        halves some = __builtin_convertvector((rounded & ~nan) | (nan & 0x7FC0), halves);
        memcpy(x + p * WIDTH, &some, sizeof some);
    }
}

#if WIDTH == 8
/* -1 for the first `left` of 16 values, and 0 for the others: those of the part. */
INLINE __m256i first_ones(int64_t left, int part) {
    static const int32_t ones[2 * LANES] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i *)(ones + LANES - left + part * WIDTH));
}
#endif

/* The first `left` of 16 values; 0 for the others. */
INLINE lanes load_some(const float *x, int64_t left) {
    if (left >= LANES) return load(x);
#if WIDTH == 16
    return (lanes){{_mm512_maskz_loadu_ps((__mmask16)((1u << left) - 1), x)}};
#elif WIDTH == 8
    lanes a;
    EACH(p, PARTS) a.part[p] = _mm256_maskload_ps(x + p * WIDTH, first_ones(left, p));
    return a;
#else
    float some[LANES] = {0};
    memcpy(some, x, left * sizeof(float));
    return load(some);
#endif
}

INLINE void store_some(float *x, lanes a, int64_t left) {
    if (left >= LANES) {
        store(x, a);
        return;
    }
#if WIDTH == 16
    _mm512_mask_storeu_ps(x, (__mmask16)((1u << left) - 1), a.part[0]);
#elif WIDTH == 8
    EACH(p, PARTS) _mm256_maskstore_ps(x + p * WIDTH, first_ones(left, p), a.part[p]);
#else
    float some[LANES];
    store(some, a);
    memcpy(x, some, left * sizeof(float));
#endif
}

#define OF_EACH_PART(name, arguments, value) \
    INLINE lanes name arguments {            \
        lanes y;                             \
        EACH(p, PARTS) y.part[p] = value;    \
        return y;                            \
    }
OF_EACH_PART(splat, (float a), splat_one(a))
OF_EACH_PART(plus, (lanes a, lanes b), a.part[p] + b.part[p])
OF_EACH_PART(minus, (lanes a, lanes b), a.part[p] - b.part[p])
OF_EACH_PART(times, (lanes a, lanes b), a.part[p] * b.part[p])
OF_EACH_PART(over, (lanes a, lanes b), a.part[p] / b.part[p])
OF_EACH_PART(fused, (lanes a, lanes b, lanes c), fused_one(a.part[p], b.part[p], c.part[p]))
OF_EACH_PART(larger, (lanes a, lanes b), larger_one(a.part[p], b.part[p]))   /* a > b ? a : b */
OF_EACH_PART(smaller, (lanes a, lanes b), smaller_one(a.part[p], b.part[p])) /* a < b ? a : b */

/* The sum of 16 lanes: those 8 apart first, then 4, 2 and 1. */
INLINE float sum(lanes a) {
    float x[LANES];
    store(x, a);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

/* Four values each from WIDTH places, transposed: y[i] has the i-th of each place, in order. */
INLINE void transpose_four(const float *const *from, floats *y) {
    floats x[4], low[2], high[2]; /* x[i]: places i, 4 + i, ..., four values each */
#if WIDTH == 4
    EACH(i, 4) x[i] = vld1q_f32(from[i]);
    EACH(i, 2) low[i] = vzip1q_f32(x[2 * i], x[2 * i + 1]);
    EACH(i, 2) high[i] = vzip2q_f32(x[2 * i], x[2 * i + 1]);
#define PAIRS_OF(half, a, b) (floats) vzip##half##q_f64((float64x2_t)(a), (float64x2_t)(b))
    y[0] = PAIRS_OF(1, low[0], low[1]), y[1] = PAIRS_OF(2, low[0], low[1]);
    y[2] = PAIRS_OF(1, high[0], high[1]), y[3] = PAIRS_OF(2, high[0], high[1]);
#else
    EACH(i, 4) {
#if WIDTH == 16
        __m512 four = _mm512_castps128_ps512(_mm_loadu_ps(from[i]));
        four = _mm512_insertf32x4(four, _mm_loadu_ps(from[4 + i]), 1);
        four = _mm512_insertf32x4(four, _mm_loadu_ps(from[8 + i]), 2);
        x[i] = _mm512_insertf32x4(four, _mm_loadu_ps(from[12 + i]), 3);
#else
        x[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from[i])), _mm_loadu_ps(from[4 + i]), 1);
#endif
    }
    EACH(i, 2) low[i] = MM(unpacklo_ps)(x[2 * i], x[2 * i + 1]);
    EACH(i, 2) high[i] = MM(unpackhi_ps)(x[2 * i], x[2 * i + 1]);
#define PAIRS_OF(half, a, b) MM(castpd_ps)(MM(unpack##half##_pd)(MM(castps_pd)(a), MM(castps_pd)(b)))
    y[0] = PAIRS_OF(lo, low[0], low[1]), y[1] = PAIRS_OF(hi, low[0], low[1]);
    y[2] = PAIRS_OF(lo, high[0], high[1]), y[3] = PAIRS_OF(hi, high[0], high[1]);
#endif
}
