/* Attention of text queries over a prefix and the text, or over a prefix and the text's finished attention.
 *
 * One item is one candidate, example and head. Its keys are packed, transposed and without padded positions,
 * then a few queries at a time are scored against all of them, so that nothing leaves the nearest cache: for
 * heads of 32 or 64 numbers and some hundred keys this is several times as fast as a general kernel.
 */
#include <stdlib.h>

#include "vector_math.h"

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define ROWS 6
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t lane_mask __attribute__((vector_size(4 * LANES), aligned(4)));
#define NOTHING -1e30f /* the score of a key that is not there */

struct heads { /* keys or values of one head: row r at at + r * stride */
    const float *at;
    long stride;
};

typedef float quad __attribute__((vector_size(16), aligned(4)));
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t quad_index __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (quad_index){i, j, k, l})
#endif

/* kt[j * width + r] = row[r][j] for four rows and all j < d; d must be a multiple of 4 */
static inline void transpose(const float *const *row, long d, long width, float *RESTRICT kt) {
    for (long j = 0; j < d; j += 4) {
        quad a = *(const quad *)(row[0] + j), b = *(const quad *)(row[1] + j);
        quad c = *(const quad *)(row[2] + j), e = *(const quad *)(row[3] + j);
        quad ab = SHUFFLE(a, b, 0, 4, 1, 5), ab2 = SHUFFLE(a, b, 2, 6, 3, 7);
        quad ce = SHUFFLE(c, e, 0, 4, 1, 5), ce2 = SHUFFLE(c, e, 2, 6, 3, 7);
        *(quad *)(kt + j * width) = SHUFFLE(ab, ce, 0, 1, 4, 5);
        *(quad *)(kt + (j + 1) * width) = SHUFFLE(ab, ce, 2, 3, 6, 7);
        *(quad *)(kt + (j + 2) * width) = SHUFFLE(ab2, ce2, 0, 1, 4, 5);
        *(quad *)(kt + (j + 3) * width) = SHUFFLE(ab2, ce2, 2, 3, 6, 7);
    }
}

/* kt [d, width] and v [n, dv] from n rows; returns the rows taken, which are those with mask[r] != 0 */
static long pack(struct heads k, struct heads v, const uint8_t *mask, long n, long first, long d, long dv,
                 long width, float *RESTRICT kt, float *RESTRICT vs) {
    long to = first, whole = d / 4 * 4;
    int held = 0;
    const float *row[4];
    for (long r = 0; r < n; r++) {
        if (mask && !mask[r]) continue;
        const float *RESTRICT value = v.at + r * v.stride;
        for (long j = 0; j < d; j++) vs[to * dv + j] = value[j];
        row[held++] = k.at + r * k.stride;
        to++;
        if (held < 4) continue;
        transpose(row, whole, width, kt + to - 4);
        for (long j = whole; j < d; j++)
            for (int i = 0; i < 4; i++) kt[j * width + to - 4 + i] = row[i][j];
        held = 0;
    }
    for (int i = 0; i < held; i++)
        for (long j = 0; j < d; j++) kt[j * width + to - held + i] = row[i][j];
    return to;
}

/* score[r][s] = query[r] . key[s] for ROWS queries and `wide` times LANES keys */
#define SCORES(wide)                                                                                        \
    {                                                                                                       \
        vec sum[ROWS][wide] = {{{0}}};                                                                      \
        for (long j = 0; j < d; j++)                                                                        \
            for (int w = 0; w < wide; w++) {                                                                \
                vec a = *(const vec *)(kt + j * width + s + w * LANES);                                     \
                for (int r = 0; r < ROWS; r++) sum[r][w] += query[r][j] * a;                                \
            }                                                                                               \
        for (int r = 0; r < ROWS; r++)                                                                      \
            for (int w = 0; w < wide; w++) *(vec *)(score + r * width + s + w * LANES) = sum[r][w];         \
    }
static inline void scores(const float (*RESTRICT query)[MP2_MAX_HEAD], const float *RESTRICT kt, long d, long count,
                          long width, float *RESTRICT score) {
    long s = 0;
    for (; s + 2 * LANES <= count; s += 2 * LANES) SCORES(2)
    for (; s < count; s += LANES) SCORES(1)
}

/* mixed[r] = sum over s of weight[r][s] value[s]; 2 * LANES columns at a time */
static inline void mix(const float *RESTRICT weight, const float *RESTRICT vs, long n, long width, long dv,
                       float (*RESTRICT mixed)[MP2_MAX_HEAD]) {
    for (long c = 0; c < dv; c += 2 * LANES) {
        vec sum[ROWS][2] = {{{0}}};
        for (long s = 0; s < n; s++) {
            vec a = *(const vec *)(vs + s * dv + c), b = *(const vec *)(vs + s * dv + c + LANES);
            for (int r = 0; r < ROWS; r++) {
                sum[r][0] += weight[r * width + s] * a;
                sum[r][1] += weight[r * width + s] * b;
            }
        }
        for (int r = 0; r < ROWS; r++) {
            *(vec *)(mixed[r] + c) = sum[r][0];
            *(vec *)(mixed[r] + c + LANES) = sum[r][1];
        }
    }
}

/* exp(score - top) into score, returns the sum; a NaN spoils it. Here and below n is a multiple of LANES. */
static inline float exponentials(float *RESTRICT score, long n, float top) {
    float sum = 0.0f;
    for (long s = 0; s < n; s++) {
        score[s] = exp_negative(score[s] - top);
        sum += score[s];
    }
    return sum;
}

static inline float largest(const float *RESTRICT score, long n) {
    float lanes[LANES];
    vec top = *(const vec *)score;
    for (long s = LANES; s < n; s += LANES) {
        vec next = *(const vec *)(score + s);
        lane_mask larger = next > top;
        top = (vec)((larger & (lane_mask)next) | (~larger & (lane_mask)top));
    }
    *(vec *)lanes = top;
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) lanes[j] = lanes[j] > lanes[j + half] ? lanes[j] : lanes[j + half];
    return lanes[0];
}

/* qkv [P or 1, N, T, 3, h, d]; keys, values [P or 1, N or 1, h, m, d] (m may be 0); mask [N, T] or NULL;
 * out [P, N, T, h, d]. With lse_out [N, T, h] (P = 1), also the log-sum-exp of every query's scores. With
 * text [N, T, h, d] and text_lse [N, T, h], the text's keys are not read: what they come to is that.
 * Returns 0, MP2_NO_MEMORY or, where d is not 1 to MP2_MAX_HEAD, MP2_BAD_SIZE. */
int mp2_attend(const float *qkv, int shared_qkv, const float *keys, const float *values, int shared_p, int shared_n,
               const uint8_t *mask, const float *text, const float *text_lse, float *out, float *lse_out, long p,
               long n, long t, long h, long d, long m, int threads) {
    if (d < 1 || d > MP2_MAX_HEAD) return MP2_BAD_SIZE;
    /* an odd number of cache lines: columns of keys then lie in different sets of the nearest cache */
    long most = m + (text ? 0 : t), width = ((most + 15) / 16 | 1) * 16;
    long dv = (d + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
    float factor = 1.0f / sqrtf((float)d);
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *room = calloc((size_t)(width * (d + dv + ROWS)), sizeof(float));
        if (!room) {
#pragma omp atomic write
            failed = MP2_NO_MEMORY;
        }
#pragma omp barrier
        if (!failed) {
            float *kt = room, *vs = kt + width * d, *score = vs + width * dv;
            long packed = -1;
#pragma omp for schedule(static)
            for (long item = 0; item < p * n * h; item++) { /* neighbours share their prefix, which stays packed */
                long ih = item / (p * n), ip = item / n % p, in = item % n;
                long row = 3 * h * d, prefix = (((shared_p ? 0 : ip) * (shared_n ? 1 : n) + (shared_n ? 0 : in)) * h + ih) * m * d;
                const float *q = qkv + ((shared_qkv ? 0 : ip) * n + in) * t * row + ih * d;
                struct heads pk = {keys + prefix, d}, pv = {values + prefix, d};
                struct heads tk = {q + h * d, row}, tv = {q + 2 * h * d, row};
                if (prefix != packed) pack(pk, pv, NULL, m, 0, d, dv, width, kt, vs);
                packed = prefix;
                long count = m;
                if (!text) count = pack(tk, tv, mask ? mask + in * t : NULL, t, count, d, dv, width, kt, vs);
                long padded = (count + LANES - 1) / LANES * LANES;
                for (long first = 0; first < t; first += ROWS) {
                    float query[ROWS][MP2_MAX_HEAD], mixed[ROWS][MP2_MAX_HEAD];
                    long rows = t - first < ROWS ? t - first : ROWS;
                    for (long r = 0; r < ROWS; r++) { /* the last block repeats its last query */
                        const float *RESTRICT from = q + (first + (r < rows ? r : rows - 1)) * row;
                        for (long j = 0; j < d; j++) query[r][j] = from[j] * factor;
                    }
                    scores((const float(*)[MP2_MAX_HEAD])query, kt, d, padded, width, score);
                    for (long r = 0; r < rows; r++)
                        for (long s = count; s < padded; s++) score[r * width + s] = NOTHING;
                    float inverse[ROWS], rest[ROWS];
                    for (long r = 0; r < rows; r++) {
                        long at = (in * t + first + r) * h + ih;
                        float top = padded ? largest(score + r * width, padded) : NOTHING;
                        if (text && text_lse[at] > top) top = text_lse[at];
                        float sum = exponentials(score + r * width, padded, top);
                        rest[r] = text ? expf(text_lse[at] - top) : 0.0f;
                        sum += rest[r];
                        inverse[r] = 1.0f / sum;
                        if (lse_out) lse_out[at] = top + logf(sum);
                    }
                    mix(score, vs, count, width, dv, mixed);
                    for (long r = 0; r < rows; r++) {
                        float *RESTRICT to = out + (((ip * n + in) * t + first + r) * h + ih) * d;
                        const float *RESTRICT shared = text ? text + ((in * t + first + r) * h + ih) * d : NULL;
                        if (shared)
                            for (long j = 0; j < d; j++)
                                to[j] = (mixed[r][j] + rest[r] * shared[j]) * inverse[r];
                        else
                            for (long j = 0; j < d; j++) to[j] = mixed[r][j] * inverse[r];
                    }
                }
            }
        }
        free(room);
    }
    return failed;
}
