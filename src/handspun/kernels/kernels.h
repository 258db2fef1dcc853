/* The functions of kernels.c that layers.c calls. */
#include <stdint.h>

/* A span of consecutive tokens of one sequence: `count` queries from `first`. The keys are at `start` of the pool. The
 * last query attends to `length` keys, and each query before it to one less; or all to those of `length` keys where
 * `seen`, (count, length), is not 0. */
typedef struct {
    int64_t first, count, start, length;
    const uint8_t *seen;
} span;

void quantize(const float *x, int64_t rows, int64_t width, int64_t padded, float *work, int8_t *out, float *scales,
              int threads);
void norm_quantize(const float *x, const float *weight, float eps, int64_t rows, int64_t width, int64_t padded,
                   float *work, int8_t *out, float *scales, int threads);
void gate_quantize(const float *x, int64_t rows, int64_t width, int64_t padded, float *work, int8_t *out,
                   float *scales, int threads);
void matmul(const int8_t *x, const float *row_scale, int64_t rows, int64_t depth, const int8_t *weight,
            const int32_t *base, const float *scale, const float *bias, int64_t channels, float *out, int threads);
void rotate_and_keep(float *qkv, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size, const float *q_norm,
                     const float *k_norm, float eps, const float *cosines, const float *sines, const int64_t *places,
                     void *pool, int halves, int64_t pool_tokens, int threads);
void attend(const float *queries, int64_t stride, const void *pool, int halves, int64_t pool_tokens,
            int64_t kv_heads, int64_t group, int64_t size, const span *spans, int64_t count, int64_t longest,
            float scaling, float *out, int threads);
