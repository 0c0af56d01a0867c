/* The passes between the matrix products of precision "int8" (see int8_runtime.py), one row at a time in cache.
 *
 * A block x is [1 + P, R, K] float32: R rows of the reference, then those of P candidates. A candidate's row
 * is held as reference + scale * q with q int8 [P * R, K] and one float scale a row. A product of q with int8
 * weights arrives as int32 y [P * R, N]; with the row's scale and the output channel's scale it is what the
 * candidate adds to the reference's product.
 *
 * The largest magnitude of a row is taken over the bits of |x|, as integers: this vectorises without
 * -ffinite-math-only, and a NaN or infinity (all greater than any number there) becomes the row's scale, so
 * that it spoils the row's result instead of vanishing in a conversion.
 *
 * The functions return 0, or MP2_BAD_SIZE for a row longer than MP2_MAX_ROW.
 */
#include "vector_math.h"

/* q, scale of row d [k]; d is scratch */
static inline float quantise(const float *RESTRICT d, int8_t *RESTRICT q, long k) {
    int32_t largest = 0;
    for (long j = 0; j < k; j++) {
        int32_t bits = to_bits(d[j]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float top = from_bits(largest);
    float inverse = top > 1e-30f ? 127.0f / top : 0.0f;
    for (long j = 0; j < k; j++) q[j] = (int8_t)(int32_t)rintf(d[j] * inverse);
    return top / 127.0f;
}

int mp2_difference(const float *x, int8_t *q, float *scale, long p, long r, long k, int threads) {
    if (k > MP2_MAX_ROW) return MP2_BAD_SIZE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < p * r; i++) {
        float d[MP2_MAX_ROW];
        const float *RESTRICT own = x + (r + i) * k, *RESTRICT ref = x + (i % r) * k;
        for (long j = 0; j < k; j++) d[j] = own[j] - ref[j];
        scale[i] = quantise(d, q + i * k, k);
    }
    return 0;
}

/* out [1 + P, R, N]: rows of the candidates = rows of the reference, which are there, + y */
int mp2_add(const int32_t *y, const float *row_scale, const float *channel, float *out, long p, long r, long n,
            int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < p * r; i++) {
        float scale = row_scale[i];
        const int32_t *RESTRICT from = y + i * n;
        const float *RESTRICT ref = out + (i % r) * n;
        float *RESTRICT to = out + (r + i) * n;
        for (long j = 0; j < n; j++) to[j] = ref[j] + scale * channel[j] * (float)from[j];
    }
    return 0;
}

/* out [1 + P, R, N]: rows of the candidates = LayerNorm(product [R, N] + y + residual [1 + P or 1, R, N]);
 * with q, also their difference from the reference's rows of out, which are there */
int mp2_add_norm(const int32_t *y, const float *row_scale, const float *channel, const float *product,
                 const float *residual, int shared_residual, const float *gamma, const float *beta, float eps,
                 float *out, int8_t *q, float *scale, long p, long r, long n, int threads) {
    if (n > MP2_MAX_ROW) return MP2_BAD_SIZE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < p * r; i++) {
        float v[MP2_MAX_ROW];
        float s = row_scale[i], sum = 0.0f, squares = 0.0f;
        const int32_t *RESTRICT from = y + i * n;
        const float *RESTRICT ref = product + (i % r) * n;
        const float *RESTRICT rest = residual + (shared_residual ? i % r : r + i) * n;
        const float *RESTRICT ref_out = out + (i % r) * n;
        float *RESTRICT to = out + (r + i) * n;
        for (long j = 0; j < n; j++) {
            v[j] = ref[j] + s * channel[j] * (float)from[j] + rest[j];
            sum += v[j];
        }
        float mean = sum / (float)n;
        for (long j = 0; j < n; j++) squares += (v[j] - mean) * (v[j] - mean);
        float inverse = 1.0f / sqrtf(squares / (float)n + eps);
        for (long j = 0; j < n; j++) to[j] = (v[j] - mean) * inverse * gamma[j] + beta[j];
        if (q) {
            for (long j = 0; j < n; j++) v[j] = to[j] - ref_out[j];
            scale[i] = quantise(v, q + i * n, n);
        }
    }
    return 0;
}

/* q, scale: activation(product [R, N] + y) - active [R, N]; kind: MP2_GELU (erf), MP2_GELU_TANH or MP2_RELU */
int mp2_add_activate(const int32_t *y, const float *row_scale, const float *channel, const float *product,
                     const float *active, int kind, int8_t *q, float *scale, long p, long r, long n,
                     int threads) {
    if (n > MP2_MAX_ROW) return MP2_BAD_SIZE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < p * r; i++) {
        float v[MP2_MAX_ROW];
        float s = row_scale[i];
        const int32_t *RESTRICT from = y + i * n;
        const float *RESTRICT ref = product + (i % r) * n, *RESTRICT ref_out = active + (i % r) * n;
        if (kind == MP2_GELU)
            for (long j = 0; j < n; j++)
                v[j] = gelu_erf(ref[j] + s * channel[j] * (float)from[j]) - ref_out[j];
        else if (kind == MP2_GELU_TANH)
            for (long j = 0; j < n; j++)
                v[j] = gelu_tanh(ref[j] + s * channel[j] * (float)from[j]) - ref_out[j];
        else
            for (long j = 0; j < n; j++) {
                float x = ref[j] + s * channel[j] * (float)from[j];
                v[j] = (x < 0.0f ? 0.0f : x) - ref_out[j]; /* a NaN stays one */
            }
        scale[i] = quantise(v, q + i * n, n);
    }
    return 0;
}
