/* Matrix products in AMX's tiles (bfloat16 in, float32 sums), and 512-bit pieces around them; see tiles.c.
 *
 * Tiles have 16 rows of 64 bytes. Weights [n, k] are packed in panels of 16 outputs, each of k / 32 steps of
 * 1 KiB: packed[panel][step][pair][output][2], pair of two neighbouring inputs.
 */
#ifndef MP2_TILES_H
#define MP2_TILES_H
#include <immintrin.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vector_math.h"

typedef __m512 v16;
#define INLINE static inline __attribute__((always_inline))
#define STEP 512 /* bfloat16 numbers of one step of a panel */

/* 64 bytes: every tile has 16 rows of 64 bytes */
INLINE void tiles_on(void) {
    struct { uint8_t palette, start, rest[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {0};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile("" ::: "memory");
    _tile_loadconfig(&config);
}

/* y [16 * tiles, 32] = x [16 * tiles, 32 * steps] times two neighbouring panels; tiles: 1 or 2. Strides of x
 * and y count numbers. Tile loads do not tell the compiler that they read memory: the barrier does. */
INLINE void tile_product(const uint16_t *x, long x_stride, const uint16_t *panel, long steps, float *y, long y_stride,
                         const int tiles) {
    const uint16_t *next = panel + steps * STEP;
    __asm__ volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    if (tiles > 1) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long s = 0; s < steps; s++) {
        _tile_loadd(4, x + 32 * s, 2 * x_stride);
        _tile_loadd(6, panel + STEP * s, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, next + STEP * s, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (tiles > 1) {
            _tile_loadd(5, x + 16 * x_stride + 32 * s, 2 * x_stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, y, 4 * y_stride);
    _tile_stored(1, y + 16, 4 * y_stride);
    if (tiles > 1) {
        _tile_stored(2, y + 16 * y_stride, 4 * y_stride);
        _tile_stored(3, y + 16 * y_stride + 16, 4 * y_stride);
    }
    __asm__ volatile("" ::: "memory");
}

/* y [rows, 32 * pairs] = x [rows, 32 * steps] times 2 * pairs panels; x and y have room for rows rounded up to 16 */
INLINE void block_product(const uint16_t *x, long x_stride, const uint16_t *panels, long steps, float *y,
                          long y_stride, long rows, long pairs) {
    for (long c = 0; c < pairs; c++) {
        const uint16_t *panel = panels + 2 * c * steps * STEP;
        long r = 0;
        for (; r + 16 < rows; r += 32)
            tile_product(x + r * x_stride, x_stride, panel, steps, y + r * y_stride + 32 * c, y_stride, 2);
        if (r < rows) tile_product(x + r * x_stride, x_stride, panel, steps, y + r * y_stride + 32 * c, y_stride, 1);
    }
}

INLINE v16 of_bfloat16(const uint16_t *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

/* 32 numbers, to nearest even */
INLINE void store_bfloat16(uint16_t *to, v16 low, v16 high) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* exp(x) for x <= 80: relative error at most 2e-7 + 6e-8 |x|; 0 far below */
INLINE v16 exponential(v16 x) {
    v16 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    v16 k = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    v16 f = _mm512_sub_ps(t, k); /* 2^f on [-1/2, 1/2] */
    v16 p = _mm512_set1_ps(1.3333558e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, k);
}

/* erf(x / sqrt(2)) as in gelu_erf of vector_math.h, the division by a reciprocal and one step of Newton's */
INLINE v16 erf16(v16 x) {
    v16 t = _mm512_mul_ps(x, _mm512_set1_ps(0.70710678f));
    t = _mm512_min_ps(_mm512_set1_ps(4.0f), _mm512_max_ps(_mm512_set1_ps(-4.0f), t)); /* a NaN stays one */
    v16 s = _mm512_mul_ps(t, t), p = _mm512_set1_ps(-2.72614225801306e-10f), q = _mm512_set1_ps(-1.45660718464996e-05f);
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(2.77068142495902e-08f));
    q = _mm512_fmadd_ps(q, s, _mm512_set1_ps(-2.13374055278905e-04f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-2.10102402082508e-06f));
    q = _mm512_fmadd_ps(q, s, _mm512_set1_ps(-1.68282697438203e-03f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-5.69250639462346e-05f));
    q = _mm512_fmadd_ps(q, s, _mm512_set1_ps(-7.37332916720468e-03f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-7.34990630326855e-04f));
    q = _mm512_fmadd_ps(q, s, _mm512_set1_ps(-1.42647390514189e-02f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-2.95459980854025e-03f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-1.60960333262415e-02f));
    v16 r = _mm512_rcp14_ps(q);
    r = _mm512_mul_ps(r, _mm512_fnmadd_ps(q, r, _mm512_set1_ps(2.0f)));
    return _mm512_mul_ps(_mm512_mul_ps(t, p), r);
}
INLINE v16 gelu16(v16 x) {
    v16 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
    return _mm512_fmadd_ps(half, erf16(x), half);
}

/* kind: MP2_GELU (erf), MP2_GELU_TANH or MP2_RELU */
INLINE v16 activation16(v16 x, const int kind) {
    if (kind == MP2_GELU) return gelu16(x);
    if (kind == MP2_RELU) return _mm512_max_ps(_mm512_setzero_ps(), x); /* a NaN stays one */
    float all[16];
    _mm512_storeu_ps(all, x);
    for (int i = 0; i < 16; i++) all[i] = gelu_tanh(all[i]);
    return _mm512_loadu_ps(all);
}

/* to [n] = LayerNorm(x + reference + rest) of one row; x is scratch */
INLINE void norm_row(float *x, const float *reference, const float *rest, const float *gamma, const float *beta,
                     float eps, float *to, long n) {
    v16 sum = _mm512_setzero_ps(), squares = sum;
    for (long j = 0; j < n; j += 16) {
        v16 v = _mm512_add_ps(_mm512_add_ps(_mm512_loadu_ps(reference + j), _mm512_loadu_ps(x + j)), _mm512_loadu_ps(rest + j));
        _mm512_storeu_ps(x + j, v);
        sum = _mm512_add_ps(sum, v);
    }
    v16 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)n);
    for (long j = 0; j < n; j += 16) {
        v16 v = _mm512_sub_ps(_mm512_loadu_ps(x + j), mean);
        _mm512_storeu_ps(x + j, v);
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    v16 inverse = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)n + eps));
    for (long j = 0; j < n; j += 16) {
        v16 v = _mm512_mul_ps(_mm512_loadu_ps(x + j), inverse);
        _mm512_storeu_ps(to + j, _mm512_fmadd_ps(v, _mm512_loadu_ps(gamma + j), _mm512_loadu_ps(beta + j)));
    }
}

/* q [n] = x - reference, in bfloat16; n is a multiple of 32 */
INLINE void difference_row(const float *x, const float *reference, uint16_t *q, long n) {
    for (long j = 0; j < n; j += 32)
        store_bfloat16(q + j, _mm512_sub_ps(_mm512_loadu_ps(x + j), _mm512_loadu_ps(reference + j)),
                       _mm512_sub_ps(_mm512_loadu_ps(x + j + 16), _mm512_loadu_ps(reference + j + 16)));
}

/* 16 rows of 16 pairs of bfloat16 into a step of a panel: row r becomes column r */
INLINE void transposed_step(const uint16_t *const *rows, long first, uint16_t *to) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i] + first);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
        b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + 32 * i, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
        _mm512_storeu_si512(to + 32 * (8 + i), _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
        _mm512_storeu_si512(to + 32 * (4 + i), _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88));
        _mm512_storeu_si512(to + 32 * (12 + i), _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xdd));
    }
}

/* 32 rows, columns first to first + 16, into a step of a panel: rows 2 i and 2 i + 1 become its pair i */
INLINE void paired_step(const uint16_t *const *rows, long first, uint16_t *to) {
    for (int i = 0; i < 16; i++) {
        __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(rows[2 * i] + first)));
        __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(rows[2 * i + 1] + first)));
        _mm512_storeu_si512(to + 32 * i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}
#endif
