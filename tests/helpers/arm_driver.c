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
        free(out), free(work), free(scales), free(quantized);
        for (int64_t i = 0; i < arrays; i++) free(a[i]);
    }
    return 0;
}
