/* What the kernels share: bits of floats and an exponential that compilers vectorise. */
#ifndef MP2_VECTOR_MATH_H
#define MP2_VECTOR_MATH_H
#include <math.h>
#include <stdint.h>
#include <string.h>

#define RESTRICT __restrict__

static inline float from_bits(int32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline int32_t to_bits(float x) { int32_t bits; memcpy(&bits, &x, 4); return bits; }

/* exp(x) for x <= 0, relative error 2e-7; underflows to 2^-126 */
static inline float exp_negative(float x) {
    float k = rintf(x * 1.44269504f);
    k = k < -126.0f ? -126.0f : k;
    float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    r = r < -1.0f ? -1.0f : r;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * from_bits(((int32_t)k + 127) << 23);
}
#endif
