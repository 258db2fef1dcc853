/* What a decoder layer does between its matmuls, for training: norms, rotations and gates, forward and backward. Included by
 * kernels.c.
 *
 * Everything is computed in float32. Arrays that come from matmuls, or go to them, may be bfloat16 (`halves`). Each row is
 * computed by itself, and sums over rows are added in blocks of a fixed size: results do not depend on the number of threads.
 */

/* Rows whose gradients of a norm's weights are added up by one thread. */
#define ROWS_PER_SUM 32
/* Consumers of a norm's output, at most: the matmuls of queries, keys and values. */
#define MOST_GRADIENTS 3

/* 16 values from `i` on, or the first `left` of them; 0 for the others. */
INLINE lanes get(const void *x, const int halves, int64_t i, int64_t left) {
    if (!halves) return load_some((const float *)x + i, left);
    if (left >= LANES) return widened((const uint16_t *)x + i);
    uint16_t some[LANES] = {0};
    memcpy(some, (const uint16_t *)x + i, left * sizeof *some);
    return widened(some);
}

INLINE void put(void *x, const int halves, int64_t i, lanes y, int64_t left) {
    if (!halves) store_some((float *)x + i, y, left);
    else if (left >= LANES) store_halves((uint16_t *)x + i, y);
    else {
        uint16_t some[LANES];
        store_halves(some, y);
        memcpy((uint16_t *)x + i, some, left * sizeof *some);
    }
}

/* The address of a row. */
INLINE void *row_of(const void *x, const int halves, int64_t row, int64_t width) {
    return (char *)x + row * width * (halves ? sizeof(uint16_t) : sizeof(float));
}

INLINE float add_norm_row(const float *x, const void *change, const int change_halves, const float *weight, float eps,
                          int64_t width, float *total, void *out, const int halves) {
    lanes squares = splat(0.0f);
    for (int64_t i = 0; i < width; i += LANES) {
        lanes value = load_some(x + i, width - i);
        if (change) {
            value = plus(value, get(change, change_halves, i, width - i));
            store_some(total + i, value, width - i);
        }
        squares = fused(value, value, squares);
    }
    if (change) x = total;
    float factor = 1.0f / sqrtf(sum(squares) / (float)width + eps);
    for (int64_t i = 0; i < width; i += LANES) {
        lanes value = times(load_some(x + i, width - i), splat(factor));
        put(out, halves, i, times(value, load_some(weight + i, width - i)), width - i);
    }
    return factor;
}

/* total = x + change, and out = RMSNorm(total). x, total: (rows, width). change: null for none; `total` is not written then.
 * factors, for the backward pass: (rows), 1 / sqrt(mean(total^2) + eps). */
void add_norm(const float *x, const void *change, int change_halves, const float *weight, float eps, int64_t rows,
              int64_t width, float *total, void *out, int halves, float *factors, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const void *added = change ? row_of(change, change_halves, row, width) : NULL;
        float *to = total + row * width;
        void *normed = row_of(out, halves, row, width);
#define FOR(a, b) factors[row] = add_norm_row(x + row * width, added, a, weight, eps, width, to, normed, b)
        if (change_halves && halves) FOR(1, 1);
        else if (change_halves) FOR(1, 0);
        else if (halves) FOR(0, 1);
        else FOR(0, 0);
#undef FOR
    }
}

/* of_x = the gradient of x. of_weight: what the row adds to that of the weights, or null. */
INLINE void norm_row_backward(const float *x, float factor, const float *weight, const void *const *gradients,
                              int64_t count, const int halves, const float *of_total, int64_t width, float *of_x,
                              uint16_t *of_change, float *of_weight) {
    lanes products = splat(0.0f);
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t left = width - i;
        lanes gradient = get(gradients[0], halves, i, left), normed = times(load_some(x + i, left), splat(factor));
        for (int64_t g = 1; g < count; g++) gradient = plus(gradient, get(gradients[g], halves, i, left));
        if (of_weight) store_some(of_weight + i, fused(gradient, normed, load_some(of_weight + i, left)), left);
        gradient = times(gradient, load_some(weight + i, left));
        store_some(of_x + i, gradient, left);
        products = fused(gradient, normed, products);
    }
    lanes mean = splat(sum(products) / (float)width);
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t left = width - i;
        lanes normed = times(load_some(x + i, left), splat(factor));
        lanes gradient = times(minus(load_some(of_x + i, left), times(normed, mean)), splat(factor));
        if (of_total) gradient = plus(gradient, load_some(of_total + i, left));
        store_some(of_x + i, gradient, left);
        if (of_change) put(of_change, 1, i, gradient, left);
    }
}

/* Gradients of `add_norm`. total, factors: its own. gradients: `count` arrays, (rows, width), to be added. of_total: the
 * gradient of `total`, or null. of_x: also that of the change; of_change: the same in bfloat16, or null. of_weight: (width),
 * or null. */
void add_norm_backward(const float *total, const float *factors, const float *weight, const void *const *gradients,
                       int64_t count, int halves, const float *of_total, int64_t rows, int64_t width, float *of_x,
                       uint16_t *of_change, float *of_weight, int threads) {
    const int64_t blocks = (rows + ROWS_PER_SUM - 1) / ROWS_PER_SUM;
    float *partial = of_weight ? calloc(blocks * width, sizeof(float)) : NULL;
#pragma omp parallel num_threads(threads) if (rows > 1)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t last = (block + 1) * ROWS_PER_SUM;
            for (int64_t row = block * ROWS_PER_SUM; row < (last < rows ? last : rows); row++) {
                const int64_t at = row * width;
                const void *of_row[MOST_GRADIENTS];
                for (int64_t g = 0; g < count; g++) of_row[g] = row_of(gradients[g], halves, row, width);
                const float *rest = of_total ? of_total + at : NULL;
                uint16_t *change = of_change ? of_change + at : NULL;
                float *sums = partial ? partial + block * width : NULL;
#define FOR(h) norm_row_backward(total + at, factors[row], weight, of_row, count, h, rest, width, of_x + at, change, sums)
                if (halves) FOR(1);
                else FOR(0);
#undef FOR
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < (of_weight ? width : 0); i += LANES) {
            lanes all = splat(0.0f);
            for (int64_t block = 0; block < blocks; block++)
                all = plus(all, load_some(partial + block * width + i, width - i));
            store_some(of_weight + i, all, width - i);
        }
    }
    free(partial);
}

INLINE void rotate_head(const void *x, const int halves, const float *cosines, const float *sines, int64_t size,
                        void *out, const int out_halves, const int backward) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        const int64_t left = half - i, j = half + i;
        lanes low = get(x, halves, i, left), high = get(x, halves, j, left);
        lanes sine_low = load_some(sines + i, left), sine_high = load_some(sines + j, left);
        lanes first = times(low, load_some(cosines + i, left)), second = times(high, load_some(cosines + j, left));
        if (backward) first = plus(first, times(high, sine_high)), second = minus(second, times(low, sine_low));
        else first = minus(first, times(high, sine_low)), second = plus(second, times(low, sine_high));
        put(out, out_halves, i, first, left);
        put(out, out_halves, j, second, left);
    }
}

/* Rotate heads, (tokens, heads, size), or, with `backward`, their gradients the other way. cosines, sines: (tokens, size).
 * halves: whether the array on the side of the matmul is bfloat16: `x`, or `out` if backward. The other is float32. */
void rotate_heads(const void *x, int64_t tokens, int64_t heads, int64_t size, const float *cosines, const float *sines,
                  int halves, int backward, void *out, int threads) {
    const int x_halves = halves && !backward, out_halves = halves && backward;
#pragma omp parallel for num_threads(threads) if (tokens > 1)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < heads; head++) {
            const float *cosine = cosines + token * size, *sine = sines + token * size;
            const void *from = row_of(x, x_halves, token * heads + head, size);
            void *to = row_of(out, out_halves, token * heads + head, size);
            if (x_halves) rotate_head(from, 1, cosine, sine, size, to, 0, 0);
            else if (out_halves) rotate_head(from, 0, cosine, sine, size, to, 1, 1);
            else if (backward) rotate_head(from, 0, cosine, sine, size, to, 0, 1);
            else rotate_head(from, 0, cosine, sine, size, to, 0, 0);
        }
}

/* 1 / (1 + e^-x) */
INLINE lanes sigmoid(lanes x) {
    return over(splat(1.0f), plus(splat(1.0f), exponential(minus(splat(0.0f), x))));
}

INLINE void swiglu_row(const void *gate, const void *up, const int halves, int64_t width, void *out) {
    for (int64_t i = 0; i < width; i += LANES) {
        lanes x = get(gate, halves, i, width - i);
        put(out, halves, i, times(times(x, sigmoid(x)), get(up, halves, i, width - i)), width - i);
    }
}

/* SwiGLU: gate / (1 + e^-gate) * up. All: (rows, width). */
void swiglu(const void *gate, const void *up, int halves, int64_t rows, int64_t width, void *out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const void *x = row_of(gate, halves, row, width), *y = row_of(up, halves, row, width);
        if (halves) swiglu_row(x, y, 1, width, row_of(out, 1, row, width));
        else swiglu_row(x, y, 0, width, row_of(out, 0, row, width));
    }
}

INLINE void swiglu_row_backward(const void *gate, const void *up, const void *gradient, const int halves,
                                int64_t width, void *of_gate, void *of_up) {
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t left = width - i;
        lanes x = get(gate, halves, i, left), g = get(gradient, halves, i, left), s = sigmoid(x);
        lanes silu = times(x, s), slope = fused(silu, minus(splat(1.0f), s), s);
        put(of_gate, halves, i, times(times(g, get(up, halves, i, left)), slope), left);
        put(of_up, halves, i, times(g, silu), left);
    }
}

/* Gradients of `swiglu`. */
void swiglu_backward(const void *gate, const void *up, const void *gradient, int halves, int64_t rows, int64_t width,
                     void *of_gate, void *of_up, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const void *x = row_of(gate, halves, row, width), *y = row_of(up, halves, row, width);
        const void *g = row_of(gradient, halves, row, width);
        void *of_x = row_of(of_gate, halves, row, width), *of_y = row_of(of_up, halves, row, width);
        if (halves) swiglu_row_backward(x, y, g, 1, width, of_x, of_y);
        else swiglu_row_backward(x, y, g, 0, width, of_x, of_y);
    }
}
