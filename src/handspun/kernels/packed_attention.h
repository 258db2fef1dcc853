/* Attention of packed rows for training, forward and backward. Included by kernels.c.
 *
 * A pack is a prefix and then sequences, end to end. A token attends to the prefix and to its own sequence, up to itself.
 * So a key is seen from its own token on, to the end of its sequence, or of the pack if it belongs to the prefix.
 *
 * Scores are computed in tiles: some tokens' queries, of all heads that share a key head, by KEYS keys. Of each PRODUCT_ROWS
 * rows, only the keys that the last one sees are computed; weights of unseen keys are 0. Scores are in units of ln 2: queries are
 * multiplied by scaling / ln 2, and weights are powers of 2.
 *
 * Every output is written by one thread, in an order that depends on the pack alone: results do not depend on the number of
 * threads, and two passes over the same pack give the same bits.
 */

#define LOG2_E 1.44269504f
#define LN_2 0.693147181f
/* Keys whose scores are held at a time, and rows of queries at most. */
#define TILES_HELD 4
#define HELD (TILES_HELD * KEYS)
#define QUERY_ROWS 96
/* A sequence's keys go backward in blocks of at least KEY_BLOCK, which run in parallel, and in KEY_BLOCKS at most: each adds
 * gradients of queries that are held until all are there. */
#define KEY_BLOCK 256
#define KEY_BLOCKS 8

/* Some of (tokens, heads, size), with the number of floats from one token, and from one head, to the next. */
typedef struct {
    const float *at;
    int64_t token, head;
} heads_of;

/* edges: where the prefix ends, and then where each sequence ends, (sequences + 1). size: a multiple of LANES. */
typedef struct {
    heads_of queries, keys, values;
    int64_t kv_heads, group, size, sequences;
    const int64_t *edges;
    float scaling;
} pack;

/* Consecutive tokens whose queries are attended together. */
typedef struct {
    int64_t first, count;
} tokens_of;

/* Up to KEYS keys, from token `first`. turned: (size, KEYS). rows: (count, size). */
typedef struct {
    const float *turned, *rows;
    int64_t first, count;
} key_tile;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t rounded_up(int64_t a, int64_t multiple) { return (a + multiple - 1) / multiple * multiple; }
static float *new_floats(int64_t count) { return aligned_alloc(64, rounded_up(count * sizeof(float), 64)); }

/* The prefix is sequence 0. */
INLINE int64_t start_of(const pack *p, int64_t sequence) { return sequence ? p->edges[sequence - 1] : 0; }
INLINE int64_t length_of(const pack *p, int64_t sequence) { return p->edges[sequence] - start_of(p, sequence); }
INLINE int64_t tokens_in(const pack *p) { return p->edges[p->sequences]; }

/* The number of a tile's keys that a token sees. */
INLINE int64_t seen_by(key_tile tile, int64_t token) { return most(0, least(tile.count, token - tile.first + 1)); }

/* How many tokens are attended together: a multiple of PRODUCT_ROWS rows, if there is one. */
static int64_t tokens_together(int64_t group) {
    int64_t tokens = most(QUERY_ROWS / group, 1);
    while (tokens > 1 && tokens * group % PRODUCT_ROWS) tokens--;
    return tokens;
}

/* Return 2^x with a relative error of 2e-7 (Cephes' exp2f), for x up to 126, and at least 2^-126. NaN stays NaN. */
INLINE lanes power(lanes x) {
    x = smaller(splat(126.0f), larger(splat(-126.0f), x));
    lanes rounded = plus(x, splat(ROUNDING)), f = minus(x, minus(rounded, splat(ROUNDING)));
    lanes y = splat(1.535336188319500e-4f);
    y = fused(y, f, splat(1.339887440266574e-3f));
    y = fused(y, f, splat(9.618437357674640e-3f));
    y = fused(y, f, splat(5.550332471162809e-2f));
    y = fused(y, f, splat(2.402264791363012e-1f));
    y = fused(y, f, splat(6.931472028550421e-1f));
    y = fused(y, f, splat(1.0f));
    return times(y, power_of_two(rounded));
}

/* The first `left` lanes, up to 16 of them; `otherwise` in the others. */
INLINE lanes first_lanes(lanes x, int64_t left, float otherwise) {
    static const uint32_t ones[2 * LANES] = {[0 ... LANES - 1] = 0xFFFFFFFF};
    lanes mask, other = splat(otherwise);
    memcpy(&mask, ones + LANES - least(left, LANES), sizeof mask);
    EACH(i, PARTS) {
        bits_of_floats bits = (bits_of_floats)mask.part[i];
        x.part[i] = (floats)(((bits_of_floats)x.part[i] & bits) | ((bits_of_floats)other.part[i] & ~bits));
    }
    return x;
}

INLINE float highest(lanes a) {
    float x[LANES];
    store(x, a);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
}

/* Copy the rows of some tokens for one key head, (tokens * group, size), multiplied by `factor`. */
static void gather_rows(heads_of from, const pack *p, int64_t head, tokens_of some, float factor, float *out) {
    for (int64_t t = 0; t < some.count; t++)
        for (int64_t g = 0; g < p->group; g++, out += p->size) {
            const float *row = from.at + (some.first + t) * from.token + (head * p->group + g) * from.head;
            for (int64_t d = 0; d < p->size; d += LANES) store(out + d, times(load(row + d), splat(factor)));
        }
}

/* scores = x @ turned, as far as the rows see the tile's keys. x: (rows, size). scores: stride floats per row. */
static void score(const float *x, const float *turned, key_tile tile, tokens_of some, int64_t group, int64_t size,
                  float *scores, int64_t stride) {
    const int64_t rows = some.count * group;
    for (int64_t row = 0; row < rows; row += PRODUCT_ROWS) {
        int64_t count = least(PRODUCT_ROWS, rows - row);
        int64_t seen = seen_by(tile, some.first + (row + count - 1) / group);
        product one = {x + row * size, turned, scores + row * stride, size, KEYS, stride, size, 0, 0};
        if (seen) multiply_floats(one, count, rounded_up(seen, LANES));
    }
}

/* sums += weights @ tile.rows. weights: (rows, KEYS), stride floats per row. sums: (rows, size). */
static void add_weighted_keys(const float *weights, int64_t stride, key_tile tile, tokens_of some, int64_t group,
                              int64_t size, float *sums) {
    const int64_t rows = some.count * group;
    for (int64_t row = 0; row < rows; row += PRODUCT_ROWS) {
        int64_t count = least(PRODUCT_ROWS, rows - row);
        int64_t seen = seen_by(tile, some.first + (row + count - 1) / group);
        product one = {weights + row * stride, tile.rows, sums + row * size, stride, size, size, seen, 1, 0};
        if (seen) multiply_floats(one, count, size);
    }
}

/* sums += weights^T @ x, for the tile's keys. weights: (rows, KEYS). x: (rows, size). sums: (keys, size). */
static void add_weighted_queries(const float *weights, key_tile tile, tokens_of some, const float *x, int64_t group,
                                 int64_t size, float *sums) {
    const int64_t rows = some.count * group;
    for (int64_t key = 0; key < tile.count; key += PRODUCT_ROWS) {
        int64_t row = most(0, tile.first + key - some.first) * group; /* the first one that sees the key */
        if (row >= rows) break;
        const float *a = weights + row * KEYS + key;
        product one = {a, x + row * size, sums + key * size, KEYS, size, size, rows - row, 1, 1};
        multiply_floats(one, least(PRODUCT_ROWS, tile.count - key), size);
    }
}

/* Forward: softmax of the scores of some tiles, without its division, goes on from what was there before. */
typedef struct {
    float *scores, *sums;   /* (rows, HELD), (rows, size) */
    float *tops, *totals;   /* (rows): the highest score so far, and the sum of weights relative to it */
} softmax;

static void soften_tiles(softmax s, const key_tile *tiles, int64_t count, tokens_of some, int64_t group, int64_t size) {
    for (int64_t r = 0; r < some.count * group; r++) {
        float *row = s.scores + r * HELD;
        int64_t token = some.first + r / group;
        lanes high = splat(-INFINITY), total = splat(0.0f);
        for (int64_t t = 0; t < count; t++) {
            int64_t seen = seen_by(tiles[t], token), i = 0;
            for (; i + LANES <= seen; i += LANES) high = larger(load(row + t * KEYS + i), high);
            if (i < seen) high = larger(first_lanes(load(row + t * KEYS + i), seen - i, -INFINITY), high);
        }
        float top = highest(high);
        top = top > s.tops[r] ? top : s.tops[r];
        for (int64_t t = 0; t < count; t++) {
            int64_t seen = seen_by(tiles[t], token), all = rounded_up(tiles[t].count, LANES), i = 0;
            float *x = row + t * KEYS;
            for (; i < seen; i += LANES) {
                lanes weights = power(minus(load(x + i), splat(top)));
                if (seen - i < LANES) weights = first_lanes(weights, seen - i, 0.0f);
                store(x + i, weights);
                total = plus(total, weights);
            }
            for (; i < all; i += LANES) store(x + i, splat(0.0f));
        }
        if (top != s.tops[r] && s.totals[r] != 0.0f) {
            lanes factor = power(splat(s.tops[r] - top));
            for (int64_t d = 0; d < size; d += LANES)
                store(s.sums + r * size + d, times(load(s.sums + r * size + d), factor));
            s.totals[r] *= highest(factor);
        }
        s.tops[r] = top;
        s.totals[r] += sum(total);
    }
}

/* Attend some tokens of a sequence, for one key head. tiles: those of the prefix, and of the sequence up to its last token. */
static void attend_tokens_of_pack(const pack *p, int64_t head, tokens_of some, const key_tile *tiles, int64_t count,
                                  float *work, float *out, float *log_sums) {
    const int64_t group = p->group, size = p->size, rows = some.count * group, heads = p->kv_heads * group;
    float *queries = work, *scores = queries + rows * size, *sums = scores + rows * HELD;
    softmax s = {scores, sums, sums + rows * size, sums + rows * (size + 1)};
    gather_rows(p->queries, p, head, some, p->scaling * LOG2_E, queries);
    memset(sums, 0, rows * size * sizeof(float));
    for (int64_t r = 0; r < rows; r++) s.tops[r] = -INFINITY, s.totals[r] = 0.0f;
    for (int64_t first = 0; first < count; first += TILES_HELD, tiles += TILES_HELD) {
        int64_t held = least(TILES_HELD, count - first);
        for (int64_t t = 0; t < held; t++)
            score(queries, tiles[t].turned, tiles[t], some, group, size, scores + t * KEYS, HELD);
        soften_tiles(s, tiles, held, some, group, size);
        for (int64_t t = 0; t < held; t++)
            add_weighted_keys(scores + t * KEYS, HELD, tiles[t], some, group, size, sums);
    }
    for (int64_t r = 0; r < rows; r++) {
        int64_t to = (some.first + r / group) * heads + head * group + r % group;
        lanes factor = splat(1.0f / s.totals[r]);
        for (int64_t d = 0; d < size; d += LANES) store(out + to * size + d, times(load(sums + r * size + d), factor));
        log_sums[to] = s.tops[r] + log2f(s.totals[r]);
    }
}

/* Attention of a pack. out: (tokens, heads, size). log_sums, for the backward pass: (tokens, heads), log2 of the sum of each
 * row's powers. */
void attend_pack(const pack *p, float *out, float *log_sums, int threads) {
    const int64_t together = tokens_together(p->group), size = p->size;
    int64_t tiles = 0, blocks = 0;
    int64_t *tiles_to = malloc(2 * (p->sequences + 2) * sizeof(int64_t)), *blocks_to = tiles_to + p->sequences + 2;
    tiles_to[0] = blocks_to[0] = 0;
    for (int64_t s = 0; s <= p->sequences; s++) {
        tiles_to[s + 1] = tiles += rounded_up(length_of(p, s), KEYS) / KEYS;
        blocks_to[s + 1] = blocks += rounded_up(length_of(p, s), together) / together;
    }
    float *panels = new_floats(2 * p->kv_heads * tiles * KEYS * size);
    key_tile *all = malloc(p->kv_heads * tiles * sizeof(key_tile));
#pragma omp parallel num_threads(threads)
    {
        key_tile *seen = malloc(tiles * sizeof(key_tile));
        float *work = new_floats(together * p->group * (2 * size + HELD + 2));
#pragma omp for schedule(static)
        for (int64_t job = 0; job < p->kv_heads * tiles; job++) {
            int64_t head = job / tiles, tile = job % tiles, s = 0;
            while (tile >= tiles_to[s + 1]) s++;
            int64_t first = start_of(p, s) + (tile - tiles_to[s]) * KEYS, count = least(KEYS, p->edges[s] - first);
            float *turned = panels + 2 * job * KEYS * size, *rows = turned + KEYS * size;
            transpose_keys(p->keys.at + first * p->keys.token + head * p->keys.head, p->keys.token, count, size, turned);
            for (int64_t i = 0; i < count; i++)
                memcpy(rows + i * size, p->values.at + (first + i) * p->values.token + head * p->values.head,
                       size * sizeof(float));
            all[job] = (key_tile){turned, rows, first, count};
        }
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < p->kv_heads * blocks; job++) {
            int64_t head = job % p->kv_heads, block = job / p->kv_heads, s = 0;
            while (block >= blocks_to[s + 1]) s++;
            int64_t first = start_of(p, s) + (block - blocks_to[s]) * together;
            tokens_of some = {first, least(together, p->edges[s] - first)};
            int64_t prefix = s ? tiles_to[1] : 0, own = rounded_up(first + some.count - start_of(p, s), KEYS) / KEYS;
            memcpy(seen, all + head * tiles, prefix * sizeof(key_tile));
            memcpy(seen + prefix, all + head * tiles + tiles_to[s], own * sizeof(key_tile));
            attend_tokens_of_pack(p, head, some, seen, prefix + own, work, out, log_sums);
        }
        free(work), free(seen);
    }
    free(all), free(panels), free(tiles_to);
}

/* Keys of one sequence, from token `first`, which queries up to `reach` see. The gradients that they add to those of queries
 * go to rows of `partial`, from row `at` on. Where they are the first block of their sequence, those of its own queries, up to
 * `own`, go straight to their place instead. */
typedef struct {
    int64_t first, count, reach, own, at;
} key_block;

/* Cut a sequence into blocks of keys. Return their number. blocks: where to write them, or null. at: rows of `partial` so far. */
static int64_t cut_keys(const pack *p, int64_t s, key_block *blocks, int64_t *at) {
    int64_t length = length_of(p, s), count = most(KEY_BLOCK, rounded_up((length + KEY_BLOCKS - 1) / KEY_BLOCKS, KEYS));
    int64_t reach = s ? p->edges[s] : tokens_in(p), found = 0;
    for (int64_t i = 0; i < length; i += count, found++) {
        int64_t first = start_of(p, s) + i, own = i ? first : p->edges[s];
        if (blocks) blocks[found] = (key_block){first, least(count, length - i), reach, own, *at - own};
        *at += reach - own;
    }
    return found;
}

typedef struct {
    heads_of out;          /* the gradient of the output */
    const float *log_sums; /* (tokens, heads) */
    float *products;       /* (tokens, heads): of the output and its gradient */
    float *queries, *keys, *values, *partial;
} gradients;

/* scores -> weights, and their gradients before the softmax: weights * (gradient - product). Both: (rows, KEYS). */
static void weigh(float *scores, key_tile tile, tokens_of some, int64_t group, const float *log_sums) {
    for (int64_t r = 0; r < some.count * group; r++) {
        float *x = scores + r * KEYS;
        int64_t seen = seen_by(tile, some.first + r / group), all = rounded_up(tile.count, LANES), i = 0;
        for (; i < seen; i += LANES) {
            lanes weights = power(minus(load(x + i), splat(log_sums[r])));
            if (seen - i < LANES) weights = first_lanes(weights, seen - i, 0.0f);
            store(x + i, weights);
        }
        for (; i < all; i += LANES) store(x + i, splat(0.0f));
    }
}

static void weigh_backward(const float *weights, float *gradient, key_tile tile, tokens_of some, int64_t group,
                           const float *products) {
    for (int64_t r = 0; r < some.count * group; r++) {
        float *x = gradient + r * KEYS;
        int64_t seen = seen_by(tile, some.first + r / group), all = rounded_up(tile.count, LANES), i = 0;
        for (; i < seen; i += LANES)
            store(x + i, times(load(weights + r * KEYS + i), minus(load(x + i), splat(products[r]))));
        for (; i < all; i += LANES) store(x + i, splat(0.0f));
    }
}

/* The floats that `attend_backward` works with. */
static int64_t floats_of_work(const pack *p, int64_t keys) {
    int64_t rows = tokens_together(p->group) * p->group;
    return 5 * rounded_up(keys, KEYS) * p->size + rows * (3 * p->size + 2 * KEYS + 2);
}

/* Where a block's keys and values are copied to. Each: (count filled up to KEYS, size). */
typedef struct {
    float *turned_keys, *keys, *turned_values, *key_sums, *value_sums;
} panels_of_block;

static panels_of_block copy_block(const pack *p, int64_t head, key_block block, float *work) {
    const int64_t size = p->size, floats = rounded_up(block.count, KEYS) * size;
    panels_of_block to = {work, work + floats, work + 2 * floats, work + 3 * floats, work + 4 * floats};
    const float *keys = p->keys.at + block.first * p->keys.token + head * p->keys.head;
    const float *values = p->values.at + block.first * p->values.token + head * p->values.head;
    for (int64_t i = 0; i < block.count; i += KEYS) {
        int64_t count = least(KEYS, block.count - i);
        transpose_keys(keys + i * p->keys.token, p->keys.token, count, size, to.turned_keys + i * size);
        transpose_keys(values + i * p->values.token, p->values.token, count, size, to.turned_values + i * size);
    }
    for (int64_t i = 0; i < block.count; i++)
        memcpy(to.keys + i * size, keys + i * p->keys.token, size * sizeof(float));
    memset(to.key_sums, 0, 2 * floats * sizeof(float));
    return to;
}

/* Add what one block of keys, of one key head, contributes to all gradients. */
static void attend_backward(const pack *p, const gradients *g, int64_t head, key_block block, float *work) {
    const int64_t group = p->group, size = p->size, heads = p->kv_heads * group, together = tokens_together(group);
    const int64_t most_rows = together * group;
    panels_of_block panels = copy_block(p, head, block, work);
    float *queries = work + 5 * rounded_up(block.count, KEYS) * size, *out = queries + most_rows * size;
    float *sums = out + most_rows * size, *scores = sums + most_rows * size, *changes = scores + most_rows * KEYS;
    float *log_sums = changes + most_rows * KEYS, *products = log_sums + most_rows;
    for (int64_t first = block.first; first < block.reach; first += together) {
        tokens_of some = {first, least(together, block.reach - first)};
        const int64_t rows = some.count * group;
        gather_rows(p->queries, p, head, some, p->scaling * LOG2_E, queries);
        gather_rows(g->out, p, head, some, 1.0f, out);
        for (int64_t r = 0; r < rows; r++) {
            int64_t from = (first + r / group) * heads + head * group + r % group;
            log_sums[r] = g->log_sums[from], products[r] = g->products[from];
        }
        memset(sums, 0, rows * size * sizeof(float));
        for (int64_t i = 0; i < block.count && block.first + i < first + some.count; i += KEYS) {
            const int64_t at = i * size;
            key_tile tile = {panels.turned_keys + at, panels.keys + at, block.first + i, least(KEYS, block.count - i)};
            score(queries, tile.turned, tile, some, group, size, scores, KEYS);
            weigh(scores, tile, some, group, log_sums);
            add_weighted_queries(scores, tile, some, out, group, size, panels.value_sums + at);
            score(out, panels.turned_values + at, tile, some, group, size, changes, KEYS);
            weigh_backward(scores, changes, tile, some, group, products);
            add_weighted_queries(changes, tile, some, queries, group, size, panels.key_sums + at);
            add_weighted_keys(changes, KEYS, tile, some, group, size, sums);
        }
        for (int64_t r = 0; r < rows; r++) {
            int64_t token = first + r / group, column = (head * group + r % group) * size;
            float *to = (token < block.own ? g->queries + token * heads * size
                                           : g->partial + (block.at + token) * heads * size) + column;
            for (int64_t d = 0; d < size; d += LANES)
                store(to + d, times(load(sums + r * size + d), splat(p->scaling)));
        }
    }
    for (int64_t i = 0; i < block.count; i++) {
        int64_t to = ((block.first + i) * p->kv_heads + head) * size;
        for (int64_t d = 0; d < size; d += LANES)
            store(g->keys + to + d, times(load(panels.key_sums + i * size + d), splat(LN_2)));
        memcpy(g->values + to, panels.value_sums + i * size, size * sizeof(float));
    }
}

/* Add the gradients of a token's queries that blocks of keys have put aside. */
static void add_partial(const key_block *blocks, int64_t count, int64_t token, int64_t width, const gradients *g) {
    float *to = g->queries + token * width;
    for (int64_t b = 0; b < count; b++) {
        if (token < blocks[b].own) continue; /* went straight to its place, or sees no key of the block */
        const float *from = g->partial + (blocks[b].at + token) * width;
        for (int64_t d = 0; d < width; d += LANES) store(to + d, plus(load(to + d), load(from + d)));
    }
}

/* Gradients of `attend_pack`. out: its output, (tokens, heads, size). of_out: that one's gradient. queries: (tokens, heads,
 * size). keys, values: (tokens, kv_heads, size). */
void attend_pack_backward(const pack *p, const float *out, const heads_of *of_out, const float *log_sums,
                          float *queries, float *keys, float *values, int threads) {
    const int64_t heads = p->kv_heads * p->group, size = p->size, tokens = tokens_in(p);
    int64_t count = 0, rows = 0, largest = 0, *cuts = malloc((p->sequences + 2) * sizeof(int64_t));
    cuts[0] = 0;
    for (int64_t s = 0; s <= p->sequences; s++) cuts[s + 1] = count += cut_keys(p, s, NULL, &rows);
    key_block *blocks = malloc(count * sizeof(key_block));
    rows = 0;
    for (int64_t s = 0; s <= p->sequences; s++) cut_keys(p, s, blocks + cuts[s], &rows);
    for (int64_t b = 0; b < count; b++) largest = most(largest, blocks[b].count);
    gradients g = {*of_out, log_sums, malloc(tokens * heads * sizeof(float)), queries, keys, values,
                   new_floats(rows * heads * size)};
#pragma omp parallel num_threads(threads)
    {
        float *work = new_floats(floats_of_work(p, largest));
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++)
            for (int64_t h = 0; h < heads; h++) {
                const float *x = out + (token * heads + h) * size, *y = g.out.at + token * g.out.token + h * g.out.head;
                lanes total = splat(0.0f);
                for (int64_t d = 0; d < size; d += LANES) total = fused(load(x + d), load(y + d), total);
                g.products[token * heads + h] = sum(total);
            }
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < p->kv_heads * count; job++)
            attend_backward(p, &g, job % p->kv_heads, blocks[job / p->kv_heads], work);
#pragma omp for schedule(static)
        for (int64_t token = 0; token < tokens; token++) {
            int64_t s = 0;
            while (token >= p->edges[s]) s++;
            if (s) add_partial(blocks, cuts[1], token, heads * size, &g);
            add_partial(blocks + cuts[s], cuts[s + 1] - cuts[s], token, heads * size, &g);
        }
        free(work);
    }
    free(g.partial), free(g.products), free(blocks), free(cuts);
}
