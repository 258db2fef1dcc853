/* All decoder layers of a model in one call: for one token, the calls from Python cost as much as their work does. */
#include "kernels.h"

#include <stdlib.h>

/* An int8 matrix in tiles, as `matmul` takes it, with the padded width of its rows. */
typedef struct {
    const int8_t *weight;
    const int32_t *base;
    const float *scale, *bias;
    int64_t width, depth, channels;
} linear;

typedef struct {
    const float *attention_norm, *q_norm, *k_norm, *mlp_norm;
    linear qkv, o, gate_up, down;
} layer;

/* The layers of a model. */
typedef struct {
    const layer *layers;
    int64_t count, heads, kv_heads, size;
    float eps, scaling;
} decoder;

/* What a step needs besides its tokens, for `rotate_and_keep` and `attend`. pool: the keys and values of all layers,
 * (layers, 2 * kv_heads, pool_tokens, size), float16. */
typedef struct {
    const float *cosines, *sines;
    const int64_t *places;
    const span *spans;
    int64_t span_count, longest;
    uint16_t *pool;
    int64_t pool_tokens;
} step;

/* Memory of one step, used again in every layer. */
typedef struct {
    float *qkv, *attended, *gate_up, *change, *work, *scales;
    int8_t *rows;
} scratch;

static void multiply(const linear *by, const scratch *s, int64_t tokens, float *out, int threads) {
    matmul(s->rows, s->scales, tokens, by->depth, by->weight, by->base, by->scale, by->bias, by->channels, out,
           threads);
}

static void add(float *x, const float *change, int64_t count) {
    for (int64_t i = 0; i < count; i++) x[i] += change[i];
}

static void run_layer(const decoder *d, const layer *l, uint16_t *pool, const step *now, const scratch *s, float *x,
                      int64_t tokens, int threads) {
    int64_t hidden = l->qkv.width;
    norm_quantize(x, l->attention_norm, d->eps, tokens, hidden, l->qkv.depth, s->work, s->rows, s->scales, threads);
    multiply(&l->qkv, s, tokens, s->qkv, threads);
    rotate_and_keep(s->qkv, tokens, d->heads, d->kv_heads, d->size, l->q_norm, l->k_norm, d->eps, now->cosines,
                    now->sines, now->places, pool, 1, now->pool_tokens, threads);
    attend(s->qkv, l->qkv.channels, pool, 1, now->pool_tokens, d->kv_heads, d->heads / d->kv_heads, d->size,
           now->spans, now->span_count, now->longest, d->scaling, s->attended, threads);
    quantize(s->attended, tokens, l->o.width, l->o.depth, s->work, s->rows, s->scales, threads);
    multiply(&l->o, s, tokens, s->change, threads);
    add(x, s->change, tokens * hidden);
    norm_quantize(x, l->mlp_norm, d->eps, tokens, hidden, l->gate_up.depth, s->work, s->rows, s->scales, threads);
    multiply(&l->gate_up, s, tokens, s->gate_up, threads);
    gate_quantize(s->gate_up, tokens, l->down.width, l->down.depth, s->work, s->rows, s->scales, threads);
    multiply(&l->down, s, tokens, s->change, threads);
    add(x, s->change, tokens * hidden);
}

/* Run the layers over x, (tokens, hidden), in place. Returns 0, or -1 for want of memory. */
int run_layers(const decoder *d, const step *now, float *x, int64_t tokens, int threads) {
    int64_t hidden = d->layers->qkv.width, qkv = d->layers->qkv.channels, attended = d->layers->o.width;
    int64_t gate_up = d->layers->gate_up.channels, widest = gate_up / 2 > attended ? gate_up / 2 : attended;
    if (widest < hidden) widest = hidden;
    int64_t padded = widest + 64; /* as much as a depth may exceed its width */
    int64_t floats = tokens * (qkv + attended + gate_up + hidden + widest + 1);
    float *memory = malloc(floats * sizeof(float) + tokens * padded);
    if (!memory) return -1;
    scratch s = {.qkv = memory};
    s.attended = s.qkv + tokens * qkv;
    s.gate_up = s.attended + tokens * attended;
    s.change = s.gate_up + tokens * gate_up;
    s.work = s.change + tokens * hidden;
    s.scales = s.work + tokens * widest;
    s.rows = (int8_t *)(s.scales + tokens);
    for (int64_t i = 0; i < d->count; i++) {
        uint16_t *pool = now->pool + i * 2 * d->kv_heads * now->pool_tokens * d->size;
        run_layer(d, d->layers + i, pool, now, &s, x, tokens, threads);
    }
    free(memory);
    return 0;
}
