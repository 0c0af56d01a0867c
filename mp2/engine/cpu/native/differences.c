/* The passes between the matrix products of differences (see differences.py), one row at a time in cache.
 *
 * A block x is [1 + P, R, K] float32: R rows of the reference, then those of P candidates. A candidate's row
 * is held as reference + scale * q, q [P * R, K] in int8 with one float scale a row, or in bfloat16, whose
 * scale is 1. The product y [P * R, N] of q and the weights is int32, or bfloat16; times the row's scale and
 * the output channel's scale (1) it is what the candidate adds to the reference's product.
 *
 * The functions return 0, or MP2_BAD_SIZE for a row longer than MP2_MAX_ROW.
 */
#include "vector_math.h"

/* int8: the largest magnitude of a row is taken over the bits of |x|, as integers: this vectorises without
 * -ffinite-math-only, and a NaN or infinity (all greater than any number there) becomes the row's scale, so
 * that it spoils the row's result instead of vanishing in a conversion. */
static inline float to_int8(const float *RESTRICT d, int8_t *RESTRICT q, long k) {
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

/* bfloat16: the upper half of a float32, rounded to nearest, ties to even; a NaN stays one */
static inline float to_bfloat16(const float *RESTRICT d, uint16_t *RESTRICT q, long k) {
    for (long j = 0; j < k; j++) {
        uint32_t bits = (uint32_t)to_bits(d[j]);
        uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        q[j] = (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : even);
    }
    return 1.0f;
}
static inline float from_bfloat16(uint16_t x) { return from_bits((int32_t)((uint32_t)x << 16)); }

#define PASS(name) mp2_int8_##name
#define rounded int8_t
#define summed int32_t
#define ADDED(s, channel, y) ((s) * (channel) * (float)(y))
#define ROUND to_int8
#include "difference_passes.h"
#undef PASS
#undef rounded
#undef summed
#undef ADDED
#undef ROUND

#define PASS(name) mp2_bf16_##name
#define rounded uint16_t
#define summed uint16_t
#define ADDED(s, channel, y) from_bfloat16(y)
#define ROUND to_bfloat16
#include "difference_passes.h"
