/* Layers of bf16 differences (see differences.py) in AMX's tiles: attention, and what is before and after it.
 *
 * A block x is [1 + P, R, K] float32: R = N T rows of the reference, then those of P candidates. What is linear
 * acts on differences from the reference in bfloat16, sums are float32. Attention, with s for scores, p for
 * their softmax and a zero for the reference's, is made of differences as well:
 *   s - s0 = q (k - k0) + (q - q0) k0,   p v - p0 v0 = p (v - v0) + (p - p0) v0,
 * four products in bfloat16 whose error is a share of the *difference*, and one softmax in float32.
 *
 * Rows of a matrix that tiles read may be followed by 31 more, which are read and have no effect: callers leave
 * room for them. Sizes are multiples of 32, or functions return MP2_BAD_SIZE; so they do where this was not
 * compiled for AMX, which mp2_tiles_ready tells.
 */
#include "vector_math.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__linux__)
#include "tiles.h"
#include <omp.h>
#define TILES 1
#endif

enum { BLOCK = 64 }; /* rows that go through products together */

/* 1 where tiles can be used: the processor has them and the system lets this process */
int mp2_tiles_ready(void) {
#ifdef TILES
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
    return 0;
#endif
}

/* packed [n * k] bfloat16 from weight [n, k]; see tiles.h */
int mp2_tiles_pack(const float *weight, uint16_t *packed, long n, long k) {
    if (n % 32 || k % 32) return MP2_BAD_SIZE;
    for (long i = 0; i < n; i++)
        for (long j = 0; j < k; j++) {
            uint32_t bits = (uint32_t)to_bits(weight[i * k + j]);
            packed[((i / 16 * (k / 32) + j / 32) * 16 + j % 32 / 2) * 32 + i % 16 * 2 + j % 2] =
                (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        }
    return 0;
}

#ifdef TILES
#define ROOM_BYTES(bytes) (((bytes) + 4096) / 64 * 64)
struct room { char *at; };
static void *take(struct room *room, size_t bytes) { /* of a room that is large enough */
    void *found = room->at;
    room->at += (bytes + 127) / 64 * 64; /* an odd cache line between buffers */
    return found;
}
/* one for each thread, of which each clears its own */
static char *new_rooms(size_t bytes, int threads) { return aligned_alloc(64, ROOM_BYTES(bytes) * (size_t)threads); }
static struct room own_room(char *rooms, size_t bytes) {
    char *at = rooms + ROOM_BYTES(bytes) * (size_t)omp_get_thread_num();
    return (struct room){memset(at, 0, ROOM_BYTES(bytes))};
}
#endif

/* y [P R, n] in bfloat16: (x - reference) times packed weights [n, k], x [1 + P, R, k] */
int mp2_tiles_linear(const float *x, const uint16_t *packed, uint16_t *y, long p, long r, long n, long k, int threads) {
#ifdef TILES
    if (n % 32 || k % 32 || k > MP2_MAX_ROW) return MP2_BAD_SIZE;
    long blocks = (r + BLOCK - 1) / BLOCK;
    size_t bytes = (size_t)(BLOCK * (2 * k + 4 * 32 + 256));
    char *rooms = new_rooms(bytes, threads);
    if (!rooms) return MP2_NO_MEMORY;
#pragma omp parallel num_threads(threads)
    {
        struct room left = own_room(rooms, bytes);
        uint16_t *q = take(&left, sizeof(uint16_t) * BLOCK * (size_t)k);
        float *sums = take(&left, sizeof(float) * BLOCK * 32);
        tiles_on();
#pragma omp for schedule(static)
        for (long item = 0; item < blocks * p; item++) {
            long first = item / p * BLOCK, rows = r - first < BLOCK ? r - first : BLOCK, c = item % p;
            for (long i = 0; i < rows; i++)
                difference_row(x + ((1 + c) * r + first + i) * k, x + (first + i) * k, q + i * k, k);
            for (long j = 0; j < n; j += 32) {
                block_product(q, k, packed + j * k, k / 32, sums, 32, rows, 1);
                uint16_t *to = y + (c * r + first) * n + j;
                for (long i = 0; i < rows; i++)
                    store_bfloat16(to + i * n, _mm512_loadu_ps(sums + 32 * i), _mm512_loadu_ps(sums + 32 * i + 16));
            }
        }
        _tile_release();
    }
    free(rooms);
    return 0;
#else
    (void)x, (void)packed, (void)y, (void)p, (void)r, (void)n, (void)k, (void)threads;
    return MP2_BAD_SIZE;
#endif
}

#ifdef TILES
/* probability [rows, w] = softmax of sums * factor + score, row by row. Exponentials are relative to `top`, the
 * reference's largest score, which usually serves the candidates as well; where it does not, to their own. Of
 * one piece for reference and candidates: without a difference, they get the same bits. */
static __attribute__((noinline)) void softmax_rows(const float *sums, const float *score, const float *top, float factor,
                                                   float *probability, long rows, long w) {
    for (long i = 0; i < rows; i++) {
        const float *own = sums + i * w, *base = score + i * w;
        float *to = probability + i * w;
        v16 scale = _mm512_set1_ps(factor), shift = _mm512_set1_ps(top[i]), sum, most;
        for (int again = 0;; again = 1) {
            sum = _mm512_setzero_ps(), most = _mm512_set1_ps(-1e30f);
            for (long s = 0; s < w; s += 16) {
                v16 v = _mm512_fmadd_ps(_mm512_loadu_ps(own + s), scale, _mm512_loadu_ps(base + s));
                v = _mm512_sub_ps(v, shift);
                most = _mm512_max_ps(most, v);
                v = exponential(v);
                _mm512_storeu_ps(to + s, v);
                sum = _mm512_add_ps(sum, v);
            }
            if (again || !_mm512_cmp_ps_mask(most, _mm512_set1_ps(60.0f), _CMP_GT_OQ)) {
                float total = _mm512_reduce_add_ps(sum);
                if (again || total > 1e-20f) {
                    sum = _mm512_set1_ps(1.0f / total);
                    break;
                }
            }
            shift = _mm512_add_ps(shift, _mm512_set1_ps(_mm512_reduce_max_ps(most)));
        }
        for (long s = 0; s < w; s += 16) _mm512_storeu_ps(to + s, _mm512_mul_ps(_mm512_loadu_ps(to + s), sum));
    }
}

/* y [rows, w] = x [rows, k] z [k, w] in float32; w is a multiple of 16 */
static void plain_product(const float *x, long x_stride, const float *z, long z_stride, float *y, long y_stride, long rows,
                          long k, long w) {
    for (long i = 0; i < rows; i += 4) {
        const float *own[4];
        for (long r = 0; r < 4; r++) own[r] = x + (i + r < rows ? i + r : rows - 1) * x_stride;
        for (long c = 0; c < w; c += 16) {
            v16 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
            for (long j = 0; j < k; j++) {
                v16 b = _mm512_loadu_ps(z + j * z_stride + c);
                for (int r = 0; r < 4; r++) sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(own[r][j]), b, sum[r]);
            }
            for (long r = 0; r < 4 && i + r < rows; r++) _mm512_storeu_ps(y + (i + r) * y_stride + c, sum[r]);
        }
    }
}
#endif

/* Attention of the reference, qkv [N, T, 3, h, d] float32, and of P candidates whose differences from it are
 * moved [P, N, T, 3, h, d] bfloat16. keys, values [1 + P or 1, N or 1, h, m, d] float32 are the prefixes (m may
 * be 0), mask [N, T] or NULL. Where candidates share the text, moved is NULL and the text's attention comes finished:
 * text [N, T, h, d], and text_lse [N, T, h], the log-sum-exp of its scores; it is one further key, of that score and
 * of one value a query. Contexts: reference [N, T, h, d] float32, the candidates' differences from it
 * out [P, N, T, h, d] bfloat16. */
int mp2_tiles_attend(const float *qkv, const uint16_t *moved, const float *keys, const float *values, int shared_p,
                     int shared_n, const uint8_t *mask, const float *text, const float *text_lse, float *context, uint16_t *out, long p, long n, long t, long h,
                     long d, long m, int threads) {
#ifdef TILES
    if (d < 32 || d % 32 || d > MP2_MAX_HEAD) return MP2_BAD_SIZE;
    long w = (m + (text ? 1 : t) + 31) / 32 * 32, row = 3 * h * d, steps = d / 32, key_steps = w / 32;
    long most_rows = (t + 15) / 16 * 16;
    float factor = 1.0f / sqrtf((float)d);
    static const uint16_t nothing[MP2_MAX_HEAD];
    size_t bytes = sizeof(float) * (size_t)(w * 2 * d + most_rows * (2 * w + d + 1) + 32 * (2 * w + d)) +
                   sizeof(uint16_t) * (size_t)(w * 2 * d * 2 + most_rows * 2 * d + 32 * 2 * w + 2 * (m + w) * d) +
                   sizeof(uint16_t *) * (size_t)(2 * w) + sizeof(long) * (size_t)t + 128 * 20;
    char *rooms = new_rooms(bytes, threads);
    if (!rooms) return MP2_NO_MEMORY;
#pragma omp parallel num_threads(threads)
    {
        struct room left = own_room(rooms, bytes);
        float *kt = take(&left, sizeof(float) * (size_t)(w * d)), *vs = take(&left, sizeof(float) * (size_t)(w * d));
        float *score = take(&left, sizeof(float) * (size_t)(most_rows * w));
        float *weight = take(&left, sizeof(float) * (size_t)(most_rows * w));
        float *query = take(&left, sizeof(float) * (size_t)(most_rows * d));
        float *top = take(&left, sizeof(float) * (size_t)most_rows);
        float *sums = take(&left, sizeof(float) * (size_t)(32 * w)), *own = take(&left, sizeof(float) * (size_t)(32 * w));
        float *mixed = take(&left, sizeof(float) * (size_t)(32 * d));
        uint16_t *key_panels = take(&left, sizeof(uint16_t) * (size_t)(w * 2 * d));
        uint16_t *value_panels = take(&left, sizeof(uint16_t) * (size_t)(w * 2 * d));
        uint16_t *asked = take(&left, sizeof(uint16_t) * (size_t)(most_rows * 2 * d));
        uint16_t *weights = take(&left, sizeof(uint16_t) * (size_t)(32 * 2 * w));
        uint16_t *k0 = take(&left, sizeof(uint16_t) * (size_t)(w * d)), *v0 = take(&left, sizeof(uint16_t) * (size_t)(w * d));
        uint16_t *km = take(&left, sizeof(uint16_t) * (size_t)(m * d)), *vm = take(&left, sizeof(uint16_t) * (size_t)(m * d));
        const uint16_t **key_rows = take(&left, sizeof(uint16_t *) * (size_t)w);
        const uint16_t **value_rows = take(&left, sizeof(uint16_t *) * (size_t)w);
        long *real = take(&left, sizeof(long) * (size_t)t);
        tiles_on();
#pragma omp for schedule(static)
        for (long item = 0; item < n * h; item++) {
            long in = item / h, ih = item % h;
            const float *q = qkv + in * t * row + ih * d, *k = q + h * d, *v = k + h * d;
            long prefix = ((shared_n ? 0 : in) * h + ih) * m * d, block = (shared_n ? 1 : n) * h * m * d;
            const float *pk = keys + prefix, *pv = values + prefix;
            long count = 0;
            for (long i = 0; i < t && !text; i++)
                if (!mask || mask[in * t + i]) real[count++] = i;
            const float *finished = text ? text + (in * t * h + ih) * d : NULL;
            /* the reference in float32 */
            for (long s = 0; s < w; s++) {
                const float *from_k = s < m ? pk + s * d : s < m + count ? k + real[s - m] * row : NULL;
                const float *from_v = s < m ? pv + s * d : s < m + count ? v + real[s - m] * row : NULL;
                for (long j = 0; j < d; j++) {
                    kt[j * w + s] = from_k ? from_k[j] : 0.0f;
                    vs[s * d + j] = from_v ? from_v[j] : 0.0f;
                }
                for (long j = 0; j < d; j += 32)
                    if (from_k) {
                        store_bfloat16(k0 + s * d + j, _mm512_loadu_ps(from_k + j), _mm512_loadu_ps(from_k + j + 16));
                        store_bfloat16(v0 + s * d + j, _mm512_loadu_ps(from_v + j), _mm512_loadu_ps(from_v + j + 16));
                    }
                key_rows[s] = from_k ? k0 + s * d : nothing;
                value_rows[s] = from_k ? v0 + s * d : nothing;
            }
            for (long i = 0; i < t; i++)
                for (long j = 0; j < d; j++) query[i * d + j] = q[i * row + j] * factor;
            plain_product(query, d, kt, w, score, w, t, d, w);
            for (long i = 0; i < t; i++) {
                for (long s = m + count; s < w; s++) score[i * w + s] = -1e30f;
                if (text) score[i * w + m] = text_lse[(in * t + i) * h + ih];
                v16 most = _mm512_loadu_ps(score + i * w);
                for (long s = 16; s < w; s += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(score + i * w + s));
                top[i] = _mm512_reduce_max_ps(most);
            }
            memset(sums, 0, sizeof(float) * (size_t)(32 * w));
            for (long i = 0; i < t; i += 32)
                softmax_rows(sums, score + i * w, top + i, factor, weight + i * w, t - i < 32 ? t - i : 32, w);
            float *to = context + (in * t * h + ih) * d;
            plain_product(weight, w, vs, d, to, h * d, t, w, d);
            for (long i = 0; i < t && text; i++)
                for (long j = 0; j < d; j++) to[i * h * d + j] += weight[i * w + m] * finished[i * h * d + j];
            for (long s = 0; s < w; s += 16)
                for (long e = 0; e < steps; e++)
                    transposed_step(key_rows + s, 32 * e, key_panels + (s / 16 * 2 * steps + steps + e) * STEP);
            for (long c = 0; c < d; c += 16)
                for (long e = 0; e < key_steps; e++)
                    paired_step(value_rows + 32 * e, c, value_panels + (c / 16 * 2 * key_steps + e) * STEP);

            for (long ip = 0; ip < p; ip++) {
                const uint16_t *dq = text ? nothing : moved + (ip * n + in) * t * row + ih * d;
                const uint16_t *dk = text ? nothing : dq + h * d, *dv = text ? nothing : dk + h * d;
                for (long s = 0; s < m && !shared_p; s++) {
                    const float *own_k = pk + (1 + ip) * block + s * d, *own_v = pv + (1 + ip) * block + s * d;
                    difference_row(own_k, pk + s * d, km + s * d, d);
                    difference_row(own_v, pv + s * d, vm + s * d, d);
                }
                for (long s = 0; s < m + count; s++) {
                    long at = s < m ? 0 : real[s - m] * row;
                    key_rows[s] = s >= m ? dk + at : shared_p ? nothing : km + s * d;
                    value_rows[s] = s >= m ? dv + at : shared_p ? nothing : vm + s * d;
                }
                for (long s = m + count; s < w; s++) key_rows[s] = value_rows[s] = nothing;
                for (long s = 0; s < w; s += 16)
                    for (long e = 0; e < steps; e++)
                        transposed_step(key_rows + s, 32 * e, key_panels + (s / 16 * 2 * steps + e) * STEP);
                for (long c = 0; c < d; c += 16)
                    for (long e = 0; e < key_steps; e++)
                        paired_step(value_rows + 32 * e, c, value_panels + (c / 16 * 2 * key_steps + key_steps + e) * STEP);
                for (long i = 0; i < t && (!text || ip == 0); i++)
                    for (long j = 0; j < d; j += 32) {
                        const uint16_t *from = text ? nothing : dq + i * row + j;
                        __m512i difference = _mm512_loadu_si512(from);
                        v16 low = of_bfloat16(from), high = of_bfloat16(from + 16);
                        low = _mm512_add_ps(low, _mm512_loadu_ps(q + i * row + j));
                        high = _mm512_add_ps(high, _mm512_loadu_ps(q + i * row + j + 16));
                        store_bfloat16(asked + i * 2 * d + j, low, high);
                        _mm512_storeu_si512(asked + i * 2 * d + d + j, difference);
                    }
                for (long first = 0; first < t; first += 32) {
                    long rows = t - first < 32 ? t - first : 32;
                    block_product(asked + first * 2 * d, 2 * d, key_panels, 2 * steps, sums, w, rows, w / 32);
                    softmax_rows(sums, score + first * w, top + first, factor, own, rows, w);
                    for (long i = 0; i < rows; i++)
                        for (long s = 0; s < w; s += 32) {
                            const float *mine = own + i * w + s, *its = weight + (first + i) * w + s;
                            v16 low = _mm512_loadu_ps(mine), high = _mm512_loadu_ps(mine + 16);
                            store_bfloat16(weights + i * 2 * w + w + s, low, high);
                            store_bfloat16(weights + i * 2 * w + s, _mm512_sub_ps(low, _mm512_loadu_ps(its)),
                                           _mm512_sub_ps(high, _mm512_loadu_ps(its + 16)));
                        }
                    block_product(weights, 2 * w, value_panels, 2 * key_steps, mixed, d, rows, steps);
                    for (long i = 0; i < rows && text; i++) {
                        v16 more = _mm512_set1_ps(own[i * w + m] - weight[(first + i) * w + m]);
                        for (long j = 0; j < d; j += 16) {
                            v16 value = _mm512_loadu_ps(finished + (first + i) * h * d + j);
                            _mm512_storeu_ps(mixed + i * d + j, _mm512_fmadd_ps(more, value, _mm512_loadu_ps(mixed + i * d + j)));
                        }
                    }
                    for (long i = 0; i < rows; i++)
                        for (long j = 0; j < d; j += 32)
                            store_bfloat16(out + (((ip * n + in) * t + first + i) * h + ih) * d + j,
                                           _mm512_loadu_ps(mixed + i * d + j), _mm512_loadu_ps(mixed + i * d + j + 16));
                }
            }
        }
        _tile_release();
    }
    free(rooms);
    return 0;
#else
    (void)qkv, (void)moved, (void)keys, (void)values, (void)shared_p, (void)shared_n, (void)mask, (void)text;
    (void)text_lse, (void)context, (void)out, (void)p, (void)n, (void)t, (void)h, (void)d, (void)m, (void)threads;
    return MP2_BAD_SIZE;
#endif
}

#ifdef TILES
/* What a block of the reference's rows is at 32 columns of the feed-forward, [BLOCK, 32] each: x before and g(x)
 * after the activation; for GELU (erf) its slope g1 = g'(x), and g2 = g''(x) / 2 and g3 = g'''(x) / 6 in bfloat16
 * as halves of a word. */
struct raised { float *before, *active, *slope; uint32_t *curve; };
#define SMALL 0.125f /* up to there d g1 + d^2 g2 + d^3 g3 leaves out less than 2^-12 of a difference d */

INLINE void hold_raised(const float *x, long f, long rows, struct raised to, const int kind) {
    for (long i = 0; i < 32 * rows; i += 16) {
        v16 own = _mm512_loadu_ps(x + i / 32 * f + i % 32);
        _mm512_storeu_ps(to.before + i, own);
        _mm512_storeu_ps(to.active + i, activation16(own, kind));
        if (kind != MP2_GELU) continue;
        v16 half = _mm512_set1_ps(0.5f), square = _mm512_mul_ps(own, own);
        v16 exponent = _mm512_max_ps(_mm512_mul_ps(square, _mm512_set1_ps(-0.5f)), _mm512_set1_ps(-80.0f));
        v16 density = _mm512_mul_ps(exponential(exponent), _mm512_set1_ps(0.39894228f));
        v16 slope = _mm512_fmadd_ps(own, density, _mm512_fmadd_ps(half, erf16(own), half));
        v16 second = _mm512_mul_ps(density, _mm512_fnmadd_ps(square, half, _mm512_set1_ps(1.0f)));
        v16 third = _mm512_mul_ps(_mm512_mul_ps(density, own), _mm512_sub_ps(square, _mm512_set1_ps(4.0f)));
        third = _mm512_mul_ps(third, _mm512_set1_ps(1.0f / 6.0f));
        _mm512_storeu_ps(to.slope + i, slope);
        __m512i low = _mm512_srli_epi32(_mm512_castps_si512(third), 16);
        __m512i high = _mm512_and_si512(_mm512_castps_si512(second), _mm512_set1_epi32((int)0xffff0000));
        _mm512_storeu_si512(to.curve + i, _mm512_or_si512(low, high));
    }
}

/* g(x + d) - g(x) of 16 small numbers d */
INLINE v16 series16(v16 d, const struct raised *at, long i) {
    __m512i curve = _mm512_loadu_si512(at->curve + i);
    v16 second = _mm512_castsi512_ps(_mm512_and_si512(curve, _mm512_set1_epi32((int)0xffff0000)));
    v16 third = _mm512_castsi512_ps(_mm512_slli_epi32(curve, 16));
    v16 sum = _mm512_fmadd_ps(_mm512_fmadd_ps(third, d, second), d, _mm512_loadu_ps(at->slope + i));
    return _mm512_mul_ps(sum, d);
}

/* to [rows, 32] in bfloat16 = g(x + d) - g(x) for the sums d [rows, 32] */
INLINE void activate_block(const float *d, struct raised at, uint16_t *to, long stride, long rows, const int kind) {
    __mmask16 large = 0;
    if (kind == MP2_GELU)
        for (long i = 0; i < 32 * rows; i += 16) /* a NaN is not small */
            large |= _mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_loadu_ps(d + i)), _mm512_set1_ps(SMALL), _CMP_NLE_UQ);
    if (kind == MP2_GELU && !large) {
        for (long i = 0; i < rows; i++)
            store_bfloat16(to + i * stride, series16(_mm512_loadu_ps(d + 32 * i), &at, 32 * i),
                           series16(_mm512_loadu_ps(d + 32 * i + 16), &at, 32 * i + 16));
        return;
    }
    for (long i = 0; i < rows; i++) {
        v16 pair[2];
        for (int half = 0; half < 2; half++) {
            long j = 32 * i + 16 * half;
            pair[half] = activation16(_mm512_add_ps(_mm512_loadu_ps(d + j), _mm512_loadu_ps(at.before + j)), kind);
            pair[half] = _mm512_sub_ps(pair[half], _mm512_loadu_ps(at.active + j));
        }
        store_bfloat16(to + i * stride, pair[0], pair[1]);
    }
}

INLINE struct raised at_column(struct raised all, long j) {
    return (struct raised){all.before + j * BLOCK, all.active + j * BLOCK, all.slope + j * BLOCK, all.curve + j * BLOCK};
}

/* a kind that the compiler knows */
#define OF_KIND(kind, call)                                  \
    {                                                        \
        if (kind == MP2_GELU) { enum { KIND = MP2_GELU }; call; } \
        else if (kind == MP2_RELU) { enum { KIND = MP2_RELU }; call; } \
        else { enum { KIND = MP2_GELU_TANH }; call; }        \
    }
#endif

/* The rest of a layer after attention. context [P R, h] bfloat16 are differences, residual [1 + P or 1, R, h] is
 * the layer's input. Of the reference, bias included: attended [R, h], the output projection; normed [R, h], the
 * LayerNorm over it and the residual; raised [R, f], the feed-forward's first product; lowered [R, h], its
 * second. Its rows of out [1 + P, R, h] are there. attention [h, h], up [f, h] and down [h, f] are packed. */
int mp2_tiles_second_half(const uint16_t *context, const float *residual, int shared_residual, const float *attended,
                          const float *normed, const float *raised, const float *lowered, const uint16_t *attention,
                          const uint16_t *up, const uint16_t *down, const float *gamma1, const float *beta1,
                          const float *gamma2, const float *beta2, float eps, int kind, float *out, long p, long r,
                          long h, long f, int threads) {
#ifdef TILES
    if (h % 32 || f % 32 || h > MP2_MAX_ROW || f > MP2_MAX_ROW) return MP2_BAD_SIZE;
    long blocks = (r + BLOCK - 1) / BLOCK;
    long wide_stride = f + 32; /* rows whose distance is a power of two fall into few sets of a cache */
    size_t bytes = (size_t)(BLOCK * (4 * (2 * h + 4 * f + 32) + 2 * (h + wide_stride)) + 128 * 8);
    char *rooms = new_rooms(bytes, threads);
    if (!rooms) return MP2_NO_MEMORY;
#pragma omp parallel num_threads(threads)
    {
        struct room left = own_room(rooms, bytes);
        float *sums = take(&left, sizeof(float) * BLOCK * (size_t)h), *y = take(&left, sizeof(float) * BLOCK * (size_t)h);
        size_t all = sizeof(float) * BLOCK * (size_t)f;
        struct raised held_rows = {take(&left, all), take(&left, all), take(&left, all), take(&left, all)};
        float *stage = take(&left, sizeof(float) * BLOCK * 32);
        uint16_t *q = take(&left, sizeof(uint16_t) * BLOCK * (size_t)h), *wide = take(&left, sizeof(uint16_t) * BLOCK * (size_t)wide_stride);
        long held = -1;
        tiles_on();
#pragma omp for schedule(static)
        for (long item = 0; item < blocks * p; item++) { /* neighbours share the reference's rows */
            long first = item / p * BLOCK, rows = r - first < BLOCK ? r - first : BLOCK, c = item % p;
            for (long j = 0; j < f && first != held; j += 32)
                OF_KIND(kind, hold_raised(raised + first * f + j, f, rows, at_column(held_rows, j), KIND))
            held = first;
            block_product(context + (c * r + first) * h, h, attention, h / 32, sums, h, rows, h / 32);
            for (long i = 0; i < rows; i++) {
                const float *rest = residual + ((shared_residual ? 0 : (1 + c) * r) + first + i) * h;
                norm_row(sums + i * h, attended + (first + i) * h, rest, gamma1, beta1, eps, y + i * h, h);
                difference_row(y + i * h, normed + (first + i) * h, q + i * h, h);
            }
            for (long j = 0; j < f; j += 32) {
                block_product(q, h, up + j * h, h / 32, stage, 32, rows, 1);
                OF_KIND(kind, activate_block(stage, at_column(held_rows, j), wide + j, wide_stride, rows, KIND))
            }
            block_product(wide, wide_stride, down, f / 32, sums, h, rows, h / 32);
            for (long i = 0; i < rows; i++)
                norm_row(sums + i * h, lowered + (first + i) * h, y + i * h, gamma2, beta2, eps,
                         out + ((1 + c) * r + first + i) * h, h);
        }
        _tile_release();
    }
    free(rooms);
    return 0;
#else
    (void)context, (void)residual, (void)shared_residual, (void)attended, (void)normed, (void)raised, (void)lowered;
    (void)attention, (void)up, (void)down, (void)gamma1, (void)beta1, (void)gamma2, (void)beta2, (void)eps, (void)kind;
    (void)out, (void)p, (void)r, (void)h, (void)f, (void)threads;
    return MP2_BAD_SIZE;
#endif
}
