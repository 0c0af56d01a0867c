/* What follows attention in a layer of a narrow encoder, a few rows at a time.
 *
 * Where hidden states have some hundred numbers, a general matrix product loses time at its edges and every
 * step after it (bias, GELU, residual, LayerNorm) reads and writes all rows once more. Here a block of rows
 * goes through the whole second half of a layer while it lies in the nearest caches.
 *
 * Weights [n, k] are packed in panels of WIDTH outputs: panel[j][c] = weight[c][j]. A row's result depends on
 * nothing but the row: not on the block it is in, nor on the number of threads.
 */
#include <stdlib.h>

#include "vector_math.h"

#ifdef __AVX512F__
#define LANES 16
#define ROWS 12 /* 24 sums, 2 weights and an input fill the 32 registers */
#else
#define LANES 8
#define ROWS 6
#endif
#define WIDTH (2 * LANES)
#define BLOCK (2 * ROWS)
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

long mp2_panel_width(void) { return WIDTH; }

/* packed [n / WIDTH, k, WIDTH] from weight [n, k]; here and below, sizes are multiples of WIDTH, or the
 * function returns MP2_BAD_SIZE */
int mp2_pack(const float *weight, float *packed, long n, long k) {
    if (n % WIDTH) return MP2_BAD_SIZE;
    for (long i = 0; i < n; i++)
        for (long j = 0; j < k; j++) packed[(i / WIDTH * k + j) * WIDTH + i % WIDTH] = weight[i * k + j];
    return 0;
}

/* n numbers on a cache line's boundary: sums over a row then never depend on where it lies */
static float *zeros(long n) {
    size_t size = ((size_t)n * sizeof(float) + 63) / 64 * 64;
    float *room = aligned_alloc(64, size);
    return room ? memset(room, 0, size) : NULL;
}

/* y[r][0..WIDTH) = bias + x[r] . panel for ROWS rows */
static inline void tile(const float *RESTRICT x, long x_stride, const float *RESTRICT panel,
                        const float *RESTRICT bias, long k, float *RESTRICT y, long y_stride) {
    vec sum[ROWS][2];
    for (int r = 0; r < ROWS; r++) {
        sum[r][0] = *(const vec *)bias;
        sum[r][1] = *(const vec *)(bias + LANES);
    }
    for (long j = 0; j < k; j++) {
        vec a = *(const vec *)(panel + j * WIDTH), b = *(const vec *)(panel + j * WIDTH + LANES);
        for (int r = 0; r < ROWS; r++) {
            float own = x[r * x_stride + j];
            sum[r][0] += own * a;
            sum[r][1] += own * b;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        *(vec *)(y + r * y_stride) = sum[r][0];
        *(vec *)(y + r * y_stride + LANES) = sum[r][1];
    }
}

/* y [n_tiles * ROWS, n] = x [n_tiles * ROWS, k] times packed weights, plus bias */
static void product(const float *RESTRICT x, long k, const float *RESTRICT packed, const float *RESTRICT bias,
                    float *RESTRICT y, long n, long n_tiles) {
    for (long c = 0; c < n; c += WIDTH)
        for (long i = 0; i < n_tiles; i++)
            tile(x + i * ROWS * k, k, packed + c * k, bias + c, k, y + i * ROWS * n + c, n);
}

/* x in place; kind: MP2_GELU (erf), MP2_GELU_TANH or MP2_RELU */
static inline void activate(float *RESTRICT x, long n, int kind) {
    if (kind == MP2_GELU)
        for (long j = 0; j < n; j++) x[j] = gelu_erf(x[j]);
    else if (kind == MP2_GELU_TANH)
        for (long j = 0; j < n; j++) x[j] = gelu_tanh(x[j]);
    else
        for (long j = 0; j < n; j++) x[j] = x[j] < 0.0f ? 0.0f : x[j]; /* a NaN stays one */
}

/* to = LayerNorm(x + residual) of one row; x is scratch */
static inline void add_norm(float *RESTRICT x, const float *RESTRICT residual, const float *RESTRICT gamma,
                            const float *RESTRICT beta, float eps, float *RESTRICT to, long n) {
    float sum = 0.0f, squares = 0.0f;
    for (long j = 0; j < n; j++) {
        x[j] += residual[j];
        sum += x[j];
    }
    float mean = sum / (float)n;
    for (long j = 0; j < n; j++) squares += (x[j] - mean) * (x[j] - mean);
    float inverse = 1.0f / sqrtf(squares / (float)n + eps);
    for (long j = 0; j < n; j++) to[j] = (x[j] - mean) * inverse * gamma[j] + beta[j];
}

struct half { /* the second half of a layer: packed weights, biases, LayerNorms */
    const float *attention, *attention_bias, *gamma1, *beta1;
    const float *up, *up_bias, *down, *down_bias, *gamma2, *beta2;
};

/* out [rows, h] from context [rows, h] and residual [residual_rows, h], which is repeated:
 *   y = LayerNorm(context A + a + residual), out = LayerNorm(activation(y U + u) D + d + y)
 * Returns 0, MP2_NO_MEMORY or MP2_BAD_SIZE. */
int mp2_second_half(const float *context, const float *residual, long residual_rows, const struct half *w, float eps,
                    int kind, float *out, long rows, long h, long f, int threads) {
    if (h % WIDTH || f % WIDTH || residual_rows < 1) return MP2_BAD_SIZE;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *room = zeros(BLOCK * (3 * h + f));
        if (!room) {
#pragma omp atomic write
            failed = MP2_NO_MEMORY;
        }
#pragma omp barrier
        if (!failed) {
            float *x = room, *y = x + BLOCK * h, *sum = y + BLOCK * h, *wide = sum + BLOCK * h;
#pragma omp for schedule(static)
            for (long first = 0; first < rows; first += BLOCK) {
                long count = rows - first < BLOCK ? rows - first : BLOCK, tiles = (count + ROWS - 1) / ROWS;
                memcpy(x, context + first * h, sizeof(float) * (size_t)(count * h));
                product(x, h, w->attention, w->attention_bias, sum, h, tiles);
                for (long r = 0; r < count; r++)
                    add_norm(sum + r * h, residual + (first + r) % residual_rows * h, w->gamma1, w->beta1, eps,
                             y + r * h, h);
                for (long c = 0; c < f; c += WIDTH)
                    for (long i = 0; i < tiles; i++) {
                        float *to = wide + i * ROWS * f + c;
                        tile(y + i * ROWS * h, h, w->up + c * h, w->up_bias + c, h, to, f);
                        for (long r = 0; r < ROWS; r++) activate(to + r * f, WIDTH, kind);
                    }
                product(wide, f, w->down, w->down_bias, sum, h, tiles);
                for (long r = 0; r < count; r++)
                    add_norm(sum + r * h, y + r * h, w->gamma2, w->beta2, eps, out + (first + r) * h, h);
            }
        }
        free(room);
    }
    return failed;
}
