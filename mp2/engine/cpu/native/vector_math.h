/* What the kernels share: bits of floats, an exponential and GELU that compilers vectorise. */
#ifndef MP2_VECTOR_MATH_H
#define MP2_VECTOR_MATH_H
#include <math.h>
#include <stdint.h>
#include <string.h>

#define RESTRICT __restrict__

#ifndef MP2_MAX_HEAD
#error "compile through mp2.engine.cpu.native: the MP2_ macros are defined in interface.py"
#endif

static inline float from_bits(int32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline int32_t to_bits(float x) { int32_t bits; memcpy(&bits, &x, 4); return bits; }

/* exp(x) for x <= 0, relative error at most 1e-7 + 6e-8 |x|; underflows to 2^-126. In full precision the two
 * steps of the range reduction would keep it below 1e-7 everywhere, but -fassociative-math lets a compiler merge
 * them; what is so small that it shows adds nothing to a softmax. */
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
/* x Phi(x); erf as a rational function on [-4, 4]; error at most 4e-7 max(1, |x|) */
static inline float gelu_erf(float x) {
    float t = x * 0.70710678f;
    t = t > 4.0f ? 4.0f : t;
    t = t < -4.0f ? -4.0f : t;
    float s = t * t;
    float p = -2.72614225801306e-10f;
    p = p * s + 2.77068142495902e-08f;
    p = p * s - 2.10102402082508e-06f;
    p = p * s - 5.69250639462346e-05f;
    p = p * s - 7.34990630326855e-04f;
    p = p * s - 2.95459980854025e-03f;
    p = p * s - 1.60960333262415e-02f;
    float q = -1.45660718464996e-05f;
    q = q * s - 2.13374055278905e-04f;
    q = q * s - 1.68282697438203e-03f;
    q = q * s - 7.37332916720468e-03f;
    q = q * s - 1.42647390514189e-02f;
    float half = 0.5f * x;
    return half + half * (t * p / q);
}

/* error at most 4e-7 max(1, |x|), too */
static inline float gelu_tanh(float x) {
    float u = 0.79788456f * (x + 0.044715f * x * x * x);
    float e = exp_negative(-2.0f * fabsf(u)); /* tanh|u| = (1 - e) / (1 + e) */
    float tanh_u = (1.0f - e) / (1.0f + e);
    return 0.5f * x * (1.0f + (u < 0.0f ? -tanh_u : tanh_u));
}
#endif
