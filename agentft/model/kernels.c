/* Elementwise and row-wise parts of a transformer in bfloat16 on a CPU, each in one pass over memory.

   Numbers come in as bfloat16 (the upper half of a float), are computed in float, and are rounded once, to nearest even.
   Every function works on plain arrays and is thread-safe; results do not depend on the number of threads.
   Built by native.py with the machine's C compiler; what each one computes is tested against torch in test_native.py. */

#include <math.h>
#include <stdint.h>

typedef uint16_t bf16;

static inline float widen(bf16 value) {
    union { uint32_t bits; float number; } both = {.bits = (uint32_t)value << 16};
    return both.number;
}

static inline bf16 narrow(float number) {
    union { float number; uint32_t bits; } both = {.number = number};
    uint32_t rounded = both.bits + 0x7fffu + ((both.bits >> 16) & 1u);
    rounded = number != number ? 0x7fc00000u : rounded;
    return (bf16)(rounded >> 16);
}

/* e^x by 2^k e^r with |r| <= ln 2 / 2, r in two parts after Cody and Waite (1980); relative error below 1e-6. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float k = rintf(x * 1.44269504f);
    float r = x - k * 0.693359375f;
    r = r + k * 2.12194440e-4f;
    float p = 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union { int32_t bits; float number; } power = {.bits = ((int32_t)k + 127) << 23};
    return p * power.number;
}

#define ROWS_IN_PARALLEL _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")

/* y = w * round(x / sqrt(mean(x^2) + epsilon)); rate keeps the factor of each row. */
void rms_norm(const bf16 *x, const bf16 *w, bf16 *y, float *rate, long rows, long width, float epsilon, int threads) {
    ROWS_IN_PARALLEL
    for (long row = 0; row < rows; row++) {
        const bf16 *in = x + row * width;
        bf16 *out = y + row * width;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < width; i++) sum += widen(in[i]) * widen(in[i]);
        float factor = 1.0f / sqrtf(sum / (float)width + epsilon);
        rate[row] = factor;
#pragma omp simd
        for (long i = 0; i < width; i++) out[i] = narrow(widen(w[i]) * widen(narrow(widen(in[i]) * factor)));
    }
}

/* dx = rate (g w - n mean(g w n)) with n = x rate. */
void rms_norm_back(const bf16 *g, const bf16 *x, const bf16 *w, const float *rate, bf16 *dx, long rows, long width,
                   int threads) {
    ROWS_IN_PARALLEL
    for (long row = 0; row < rows; row++) {
        const bf16 *grad = g + row * width, *in = x + row * width;
        bf16 *out = dx + row * width;
        float factor = rate[row], shared = 0.0f;
#pragma omp simd reduction(+ : shared)
        for (long i = 0; i < width; i++) shared += widen(grad[i]) * widen(w[i]) * widen(in[i]);
        shared *= factor * factor / (float)width;
#pragma omp simd
        for (long i = 0; i < width; i++)
            out[i] = narrow(factor * (widen(grad[i]) * widen(w[i]) - widen(in[i]) * shared));
    }
}

/* y = gate sigmoid(gate) up. */
void gated_silu(const bf16 *gate, const bf16 *up, bf16 *y, long rows, long width, int threads) {
    ROWS_IN_PARALLEL
    for (long row = 0; row < rows; row++) {
#pragma omp simd
        for (long i = row * width; i < (row + 1) * width; i++) {
            float x = widen(gate[i]);
            float s = 1.0f / (1.0f + exponential(-x));
            y[i] = narrow(x * s * widen(up[i]));
        }
    }
}

/* With s = sigmoid(gate): dgate = g up s (1 + gate (1 - s)), dup = g gate s. */
void gated_silu_back(const bf16 *g, const bf16 *gate, const bf16 *up, bf16 *dgate, bf16 *dup, long rows, long width,
                     int threads) {
    ROWS_IN_PARALLEL
    for (long row = 0; row < rows; row++) {
#pragma omp simd
        for (long i = row * width; i < (row + 1) * width; i++) {
            float x = widen(gate[i]), grad = widen(g[i]);
            float s = 1.0f / (1.0f + exponential(-x));
            dgate[i] = narrow(grad * widen(up[i]) * s * (1.0f + x * (1.0f - s)));
            dup[i] = narrow(grad * x * s);
        }
    }
}

/* Rotary positions with a change of layout: each of heads x width numbers of a token is turned by its position's angles
   (direction 1) or back (direction -1) and scaled. Strides count numbers: batch, token, group; a group's heads lie side by
   side in both. A row of cos and sin may serve every batch (cos_batch 0). */
void rotate(const bf16 *x, const long *from, const bf16 *cos, const bf16 *sin, long cos_batch, bf16 *y, const long *to,
            long batches, long tokens, long groups, long heads, long width, float scale, float direction, int threads) {
    long half = width / 2;
    ROWS_IN_PARALLEL
    for (long row = 0; row < batches * tokens; row++) {
        long batch = row / tokens, token = row % tokens;
        const bf16 *c = cos + batch * cos_batch + token * width, *s = sin + batch * cos_batch + token * width;
        for (long group = 0; group < groups; group++)
            for (long head = 0; head < heads; head++) {
                const bf16 *in = x + batch * from[0] + token * from[1] + group * from[2] + head * width;
                bf16 *out = y + batch * to[0] + token * to[1] + group * to[2] + head * width;
#pragma omp simd
                for (long i = 0; i < half; i++) {
                    float a = widen(in[i]), b = widen(in[i + half]), turn = direction * widen(s[i]);
                    out[i] = narrow(scale * (a * widen(c[i]) - b * turn));
                    out[i + half] = narrow(scale * (b * widen(c[i]) + a * turn));
                }
            }
    }
}

/* Keys of a row whose powers are kept between the two passes; those of further keys are computed twice. */
#define POWERS 4096

/* Softmax in place of a tile of scores [groups, queries x heads, keys]; query q sees the first keys - queries + q + 1. */
void causal_softmax(bf16 *scores, long groups, long queries, long heads, long keys, int threads) {
    ROWS_IN_PARALLEL
    for (long row = 0; row < groups * queries * heads; row++) {
        long seen = keys - queries + (row / heads) % queries + 1;
        bf16 *x = scores + row * keys;
        float highest = -3.4e38f, sum = 0.0f;
#pragma omp simd reduction(max : highest)
        for (long i = 0; i < seen; i++) highest = widen(x[i]) > highest ? widen(x[i]) : highest;
        float powers[POWERS];
        long kept = seen < POWERS ? seen : POWERS;
#pragma omp simd
        for (long i = 0; i < kept; i++) powers[i] = exponential(widen(x[i]) - highest);
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < kept; i++) sum += powers[i];
#pragma omp simd reduction(+ : sum)
        for (long i = kept; i < seen; i++) sum += exponential(widen(x[i]) - highest);
        float share = 1.0f / sum;
#pragma omp simd
        for (long i = 0; i < kept; i++) x[i] = narrow(powers[i] * share);
#pragma omp simd
        for (long i = kept; i < seen; i++) x[i] = narrow(exponential(widen(x[i]) - highest) * share);
        for (long i = seen; i < keys; i++) x[i] = 0;
    }
}

/* In place of the gradient of softmax's weights p, that of its scores: p (g - sum(p g)). */
void softmax_back(bf16 *g, const bf16 *p, long rows, long keys, int threads) {
    ROWS_IN_PARALLEL
    for (long row = 0; row < rows; row++) {
        bf16 *grad = g + row * keys;
        const bf16 *weight = p + row * keys;
        float shared = 0.0f;
#pragma omp simd reduction(+ : shared)
        for (long i = 0; i < keys; i++) shared += widen(grad[i]) * widen(weight[i]);
#pragma omp simd
        for (long i = 0; i < keys; i++) grad[i] = narrow(widen(weight[i]) * (widen(grad[i]) - shared));
    }
}

/* sum += x for each of some blocks that lie `sum_stride` apart in sum and side by side in x. */
void accumulate(float *sum, long sum_stride, const bf16 *x, long blocks, long count, int threads) {
    ROWS_IN_PARALLEL
    for (long block = 0; block < blocks; block++) {
        float *out = sum + block * sum_stride;
        const bf16 *in = x + block * count;
#pragma omp simd
        for (long i = 0; i < count; i++) out[i] += widen(in[i]);
    }
}

/* Weighted cross-entropy of each row of logits, which are replaced by its gradient. */
void cross_entropy(bf16 *logits, const int64_t *targets, const float *weights, float *losses, long rows, long classes,
                   int threads) {
    ROWS_IN_PARALLEL
    for (long row = 0; row < rows; row++) {
        bf16 *x = logits + row * classes;
        float weight = weights ? weights[row] : 1.0f, highest = -3.4e38f, sum = 0.0f;
        float right = widen(x[targets[row]]);
#pragma omp simd reduction(max : highest)
        for (long i = 0; i < classes; i++) highest = widen(x[i]) > highest ? widen(x[i]) : highest;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < classes; i++) sum += exponential(widen(x[i]) - highest);
        losses[row] = weight * (logf(sum) + highest - right);
        float share = weight / sum, chosen = exponential(right - highest) * share;
#pragma omp simd
        for (long i = 0; i < classes; i++) x[i] = narrow(exponential(widen(x[i]) - highest) * share);
        x[targets[row]] = narrow(chosen - weight);
    }
}

/* A mixing of bits after the finaliser of MurmurHash3 (Appleby, public domain). */
static inline uint32_t mix(uint32_t h) {
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    return h ^ (h >> 16);
}

/* Sets numbers to 0 where a hash of two seeds and the place is below the threshold: the same places for the same seeds. */
void dropout(const bf16 *x, bf16 *y, long rows, long width, uint32_t seed, uint32_t more_seed, uint32_t threshold,
             int threads) {
    ROWS_IN_PARALLEL
    for (long row = 0; row < rows; row++) {
#pragma omp simd
        for (long i = row * width; i < (row + 1) * width; i++) {
            uint32_t h = mix(mix((uint32_t)i ^ seed) + more_seed);
            y[i] = h >= threshold ? x[i] : 0;
        }
    }
}
