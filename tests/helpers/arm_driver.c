/* Call kernels on inputs from standard input, and write what they compute to standard output: for an emulator, into
 * which Python does not go. A call is 12 int64 (the function, then its sizes), the number of arrays, and each array as
 * a number of bytes and the bytes. Outputs are written in the order of the kernel's arguments. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

void layout(int64_t *sizes);
int prepare(void);
void hadamard(const float *, int64_t, int64_t, float *, int);
void quantize(const float *, int64_t, int64_t, int64_t, float *, int8_t *, float *, int);
void scale_quantize(const float *, const float *, int64_t, int64_t, int64_t, float *, int8_t *, float *, int);
void norm_quantize(const float *, const float *, float, int64_t, int64_t, int64_t, float *, int8_t *, float *, int);
void gate_quantize(const float *, int64_t, int64_t, int64_t, float *, int8_t *, float *, int);
void tile(const int8_t *, int64_t, int64_t, int64_t, int8_t *, int32_t *, int32_t *, int);
void matmul(const int8_t *, const float *, int64_t, int64_t, const int8_t *, const int32_t *, const float *,
            const float *, int64_t, float *, int);
void transposed_matmul(const int8_t *, const float *, int64_t, int64_t, const int8_t *, const int32_t *, int64_t,
                       int64_t, float *, int);
void rotate_and_keep(float *, int64_t, int64_t, int64_t, int64_t, const float *, const float *, float, const float *,
                     const float *, const int64_t *, void *, int, int64_t, int);
void attend(const float *, int64_t, const void *, int, int64_t, int64_t, int64_t, int64_t, const void *, int64_t,
            int64_t, float, float *, int);

void add_norm(const float *, const void *, int, const float *, float, int64_t, int64_t, float *, void *, int, float *, int);
void add_norm_backward(const float *, const float *, const float *, const void *const *, int64_t, int, const float *,
                       int64_t, int64_t, float *, uint16_t *, float *, int);
void rotate_heads(const void *, int64_t, int64_t, int64_t, const float *, const float *, int, int, void *, int);
void swiglu(const void *, const void *, int, int64_t, int64_t, void *, int);
void swiglu_backward(const void *, const void *, const void *, int, int64_t, int64_t, void *, void *, int);

/* As in packed_attention.h. */
typedef struct {
    const float *at;
    int64_t token, head;
} heads_of;
typedef struct {
    heads_of queries, keys, values;
    int64_t kv_heads, group, size, sequences;
    const int64_t *edges;
    float scaling;
} pack;
void attend_pack(const pack *, float *, float *, int);
void attend_pack_backward(const pack *, const float *, const heads_of *, const float *, float *, float *, float *, int);

#define EPS 1e-6f

static void put(const void *values, size_t bytes) { fwrite(values, 1, bytes, stdout); }

int main(void) {
    int64_t n[12];
    if (!prepare()) return 1;
    while (fread(n, 8, 12, stdin) == 12) {
        int64_t arrays, bytes;
        void *a[8] = {0};
        if (fread(&arrays, 8, 1, stdin) != 1) return 2;
        for (int64_t i = 0; i < arrays; i++) {
            if (fread(&bytes, 8, 1, stdin) != 1) return 2;
            a[i] = bytes ? malloc(bytes) : NULL;
            if (bytes && fread(a[i], 1, bytes, stdin) != (size_t)bytes) return 2;
        }
        int64_t rows = n[1], width = n[2], padded = n[3];
        float *out = malloc(8 << 20), *work = malloc(8 << 20), *scales = malloc(1 << 16);
        int8_t *quantized = malloc(8 << 20);
        if (n[0] == 0) layout((int64_t *)out), put(out, 24);
        else if (n[0] == 1) hadamard(a[0], rows, width, out, 2), put(out, rows * width * 4);
        else if (n[0] <= 5) {
            if (n[0] == 2) quantize(a[0], rows, width, padded, work, quantized, scales, 2);
            if (n[0] == 3) scale_quantize(a[0], a[1], rows, width, padded, work, quantized, scales, 2);
            if (n[0] == 4) norm_quantize(a[0], a[1], EPS, rows, width, padded, work, quantized, scales, 2);
            if (n[0] == 5) gate_quantize(a[0], rows, width, padded, work, quantized, scales, 2);
            put(quantized, rows * padded), put(scales, rows * 4);
        } else if (n[0] == 6) {
            matmul(a[0], a[1], rows, padded, a[2], a[3], a[4], a[5], n[4], out, 2);
            put(out, rows * n[4] * 4);
        } else if (n[0] == 7) {
            transposed_matmul(a[0], a[1], rows, n[4], a[2], a[3], padded, width, out, 2);
            put(out, rows * width * 4);
        } else if (n[0] == 8) {
            /* rows: tokens; then heads, key heads, size, slots, float16 */
            rotate_and_keep(a[0], rows, n[4], n[5], n[6], a[1], a[2], EPS, a[3], a[4], a[5], a[6], n[8], n[7], 2);
            for (int64_t i = 0; i < rows; i++) put((float *)a[0] + i * (n[4] + 2 * n[5]) * n[6], n[4] * n[6] * 4);
            put(a[6], 2 * n[5] * n[7] * n[6] * (n[8] ? 2 : 4));
        } else if (n[0] == 9) {
            /* spans without masks: tokens, queries per key head, key heads, size, slots, float16, spans, the longest */
            attend(a[0], n[4] * n[5] * n[6], a[1], n[8], n[7], n[5], n[4], n[6], a[2], n[9], n[10], *(float *)a[3],
                   out, 2);
            put(out, rows * n[4] * n[5] * n[6] * 4);
        }
        else if (n[0] == 10) {
            tile(a[0], n[4], width, padded, quantized, (int32_t *)out, (int32_t *)work, 2);
            put(quantized, n[5] * padded), put(out, n[5] * 4), put(work, (padded + 31) / 32 * 32 * 4); /* TILE is 32 */
        }
        /* Training. rows, width; then whether arrays at the matmuls are bfloat16. */
        const int halves = n[3], bytes_each = halves ? 2 : 4;
        if (n[0] == 11) {
            add_norm(a[0], a[1], halves, a[2], EPS, rows, width, out, work, halves, scales, 2);
            put(out, rows * width * 4), put(work, rows * width * bytes_each), put(scales, rows * 4);
        } else if (n[0] == 12) {
            const void *gradients[] = {a[3], a[4]};
            add_norm_backward(a[0], a[1], a[2], gradients, 2, halves, a[5], rows, width, out,
                              halves ? (uint16_t *)quantized : NULL, work, 2);
            put(out, rows * width * 4), put(halves ? (void *)quantized : out, rows * width * bytes_each);
            put(work, width * 4);
        } else if (n[0] == 13) {
            rotate_heads(a[0], rows, n[4], width, a[1], a[2], halves, n[5], out, 2);
            put(out, rows * n[4] * width * (n[5] ? bytes_each : 4));
        } else if (n[0] == 14) {
            swiglu(a[0], a[1], halves, rows, width, out, 2), put(out, rows * width * bytes_each);
        } else if (n[0] == 15) {
            swiglu_backward(a[0], a[1], a[2], halves, rows, width, out, work, 2);
            put(out, rows * width * bytes_each), put(work, rows * width * bytes_each);
        } else if (n[0] == 16) {
            /* tokens, size; key heads, queries per key head, sequences */
            int64_t size = width, kv_heads = n[4], group = n[5], heads = kv_heads * group;
            float *queries = malloc(8 << 20), *keys = malloc(8 << 20), *values = malloc(8 << 20);
            pack p = {{a[0], heads * size, size}, {a[1], kv_heads * size, size}, {a[2], kv_heads * size, size},
                      kv_heads, group, size, n[6], a[3], *(float *)a[4]};
            heads_of gradient = {a[5], heads * size, size};
            attend_pack(&p, out, work, 2);
            attend_pack_backward(&p, out, &gradient, work, queries, keys, values, 2);
            put(out, rows * heads * size * 4), put(queries, rows * heads * size * 4);
            put(keys, rows * kv_heads * size * 4), put(values, rows * kv_heads * size * 4);
            free(queries), free(keys), free(values);
        }
        free(out), free(work), free(scales), free(quantized);
        for (int64_t i = 0; i < arrays; i++) free(a[i]);
    }
    return 0;
}
