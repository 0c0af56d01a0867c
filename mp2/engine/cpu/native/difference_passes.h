/* The passes of differences.c for one type; included once for each, with these macros:
 *   PASS(name)              the function's name
 *   rounded, summed         types of a difference and of its product with weights
 *   ADDED(s, channel, y)    what y adds to the reference's product
 *   ROUND(d, q, k)          q from the row d [k], which is scratch; its value is the row's scale */

int PASS(difference)(const float *x, rounded *q, float *scale, long p, long r, long k, int threads) {
    if (k > MP2_MAX_ROW) return MP2_BAD_SIZE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < p * r; i++) {
        float d[MP2_MAX_ROW];
        const float *RESTRICT own = x + (r + i) * k, *RESTRICT ref = x + (i % r) * k;
        for (long j = 0; j < k; j++) d[j] = own[j] - ref[j];
        scale[i] = ROUND(d, q + i * k, k);
    }
    return 0;
}

/* out [1 + P, R, N]: rows of the candidates = rows of the reference, which are there, + y */
int PASS(add)(const summed *y, const float *row_scale, const float *channel, float *out, long p, long r, long n,
              int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < p * r; i++) {
        float s = row_scale[i];
        const summed *RESTRICT from = y + i * n;
        const float *RESTRICT ref = out + (i % r) * n;
        float *RESTRICT to = out + (r + i) * n;
        for (long j = 0; j < n; j++) to[j] = ref[j] + ADDED(s, channel[j], from[j]);
    }
    return 0;
}

/* out [1 + P, R, N]: rows of the candidates = LayerNorm(product [R, N] + y + residual [1 + P or 1, R, N]);
 * with q, also their difference from the reference's rows of out, which are there */
int PASS(add_norm)(const summed *y, const float *row_scale, const float *channel, const float *product,
                   const float *residual, int shared_residual, const float *gamma, const float *beta, float eps,
                   float *out, rounded *q, float *scale, long p, long r, long n, int threads) {
    if (n > MP2_MAX_ROW) return MP2_BAD_SIZE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < p * r; i++) {
        float v[MP2_MAX_ROW];
        float s = row_scale[i], sum = 0.0f, squares = 0.0f;
        const summed *RESTRICT from = y + i * n;
        const float *RESTRICT ref = product + (i % r) * n;
        const float *RESTRICT rest = residual + (shared_residual ? i % r : r + i) * n;
        const float *RESTRICT ref_out = out + (i % r) * n;
        float *RESTRICT to = out + (r + i) * n;
        for (long j = 0; j < n; j++) {
            v[j] = ref[j] + ADDED(s, channel[j], from[j]) + rest[j];
            sum += v[j];
        }
        float mean = sum / (float)n;
        for (long j = 0; j < n; j++) squares += (v[j] - mean) * (v[j] - mean);
        float inverse = 1.0f / sqrtf(squares / (float)n + eps);
        for (long j = 0; j < n; j++) to[j] = (v[j] - mean) * inverse * gamma[j] + beta[j];
        if (q) {
            for (long j = 0; j < n; j++) v[j] = to[j] - ref_out[j];
            scale[i] = ROUND(v, q + i * n, n);
        }
    }
    return 0;
}

/* q, scale: activation(product [R, N] + y) - active [R, N]; kind: MP2_GELU (erf), MP2_GELU_TANH or MP2_RELU */
int PASS(add_activate)(const summed *y, const float *row_scale, const float *channel, const float *product,
                       const float *active, int kind, rounded *q, float *scale, long p, long r, long n,
                       int threads) {
    if (n > MP2_MAX_ROW) return MP2_BAD_SIZE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < p * r; i++) {
        float v[MP2_MAX_ROW];
        float s = row_scale[i];
        const summed *RESTRICT from = y + i * n;
        const float *RESTRICT ref = product + (i % r) * n, *RESTRICT ref_out = active + (i % r) * n;
        if (kind == MP2_GELU)
            for (long j = 0; j < n; j++) v[j] = gelu_erf(ref[j] + ADDED(s, channel[j], from[j])) - ref_out[j];
        else if (kind == MP2_GELU_TANH)
            for (long j = 0; j < n; j++) v[j] = gelu_tanh(ref[j] + ADDED(s, channel[j], from[j])) - ref_out[j];
        else
            for (long j = 0; j < n; j++) {
                float x = ref[j] + ADDED(s, channel[j], from[j]);
                v[j] = (x < 0.0f ? 0.0f : x) - ref_out[j]; /* a NaN stays one */
            }
        scale[i] = ROUND(v, q + i * n, n);
    }
    return 0;
}
