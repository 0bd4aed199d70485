/* Attention of one token over memories and context, as `__init__.py` says it: softmax(q K^T * scale
 * + mask) V for a few queries and many keys.
 *
 * With so few queries all waits for keys and values. Each is read once, for all query heads of its
 * head; and while keys are read, the processor is told to fetch the values, and the other way round.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#define FOR_AVX2 __attribute__((target("avx2,fma")))
#else
#define FOR_AVX2
#endif
#define PART static inline FOR_AVX2 __attribute__((always_inline))

#define LANES 8
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t bits __attribute__((vector_size(4 * LANES)));
typedef float four __attribute__((vector_size(16)));
typedef vec anywhere __attribute__((aligned(4), may_alias));

PART vec load(const float *at) { return *(const anywhere *)at; }
PART void store(float *at, vec x) { *(anywhere *)at = x; }

PART float total(vec x) {
  union { vec whole; four half[2]; } parts = {x};
  four sum = parts.half[0] + parts.half[1];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

PART float largest(const float *x, int64_t n) { /* n: whole vectors */
  vec most = load(x);
  for (int64_t i = LANES; i < n; i += LANES) {
    vec y = load(x + i);
    bits more = y > most;
    most = (vec)(((bits)y & more) | ((bits)most & ~more));
  }
  float found = most[0];
  for (int i = 1; i < LANES; i++) found = most[i] > found ? most[i] : found;
  return found;
}

/* exp(x) for x <= 0, to about 1e-7 of it (Cephes' polynomial); below -87 it is next to nothing. */
PART vec exponential(vec x) {
  const vec least = (vec){0} - 87.0f;
  bits low = x < least;
  x = (vec)(((bits)x & ~low) | ((bits)least & low));
  vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: what is behind it is whole */
  bits power = (bits)shifted - 0x4B400000;
  vec whole = shifted - 12582912.0f;
  vec rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  vec p = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * rest * rest + rest + 1.0f;
  return p * (vec)((power + 127) << 23);
}

/* scores[g][s] = q[g] . keys[s] * scale + mask[s], `KEYS` keys at a time. */
#define SCORES(G, KEYS)                                                                           \
  PART int64_t scores_of_##G##_by_##KEYS(const float *q, const float *keys, const float *soon,    \
                                         const float *mask, int64_t s, int64_t n, int64_t d,      \
                                         float scale, float *scores, int64_t row) {               \
    for (; s + KEYS <= n; s += KEYS) {                                                            \
      vec sum[KEYS][G] = {0};                                                                     \
      for (int64_t i = 0; i < d; i += LANES)                                                      \
        for (int k = 0; k < KEYS; k++) {                                                          \
          vec key = load(keys + (s + k) * d + i);                                                 \
          if (i % (2 * LANES) == 0) __builtin_prefetch(soon + (s + k) * d + i);                   \
          for (int g = 0; g < G; g++) sum[k][g] += load(q + g * d + i) * key;                     \
        }                                                                                         \
      for (int k = 0; k < KEYS; k++)                                                              \
        for (int g = 0; g < G; g++)                                                               \
          scores[g * row + s + k] = total(sum[k][g]) * scale + mask[s + k];                       \
    }                                                                                             \
    return s;                                                                                     \
  }

/* out[g] += weights[g][s] * values[s] for s in from..to, `VECS` vectors of a value at a time. */
#define MIX(G, VECS)                                                                              \
  PART int64_t mix_of_##G##_by_##VECS(const float *weights, int64_t row, const float *values,     \
                                      const float *soon, int64_t from, int64_t to, int64_t i,     \
                                      int64_t d, float *out) {                                    \
    for (; i + VECS * LANES <= d; i += VECS * LANES) {                                            \
      vec sum[G][VECS];                                                                           \
      for (int g = 0; g < G; g++)                                                                 \
        for (int v = 0; v < VECS; v++) sum[g][v] = load(out + g * d + i + v * LANES);             \
      for (int64_t s = from; s < to; s++)                                                         \
        for (int v = 0; v < VECS; v++) {                                                          \
          vec value = load(values + s * d + i + v * LANES);                                       \
          if (v % 2 == 0) __builtin_prefetch(soon + s * d + i + v * LANES);                       \
          for (int g = 0; g < G; g++) sum[g][v] += weights[g * row + s] * value;                  \
        }                                                                                         \
      for (int g = 0; g < G; g++)                                                                 \
        for (int v = 0; v < VECS; v++) store(out + g * d + i + v * LANES, sum[g][v]);             \
    }                                                                                             \
    return i;                                                                                     \
  }

#define NEAR 32 /* values that stay close while all of their parts are mixed */

/* All for G query heads of one head. `coming`: the keys that are read next. */
#define HEADS(G, KEYS, VECS)                                                                      \
  SCORES(G, KEYS)                                                                                 \
  MIX(G, VECS)                                                                                    \
  PART void heads_##G(const float *q, const float *keys, const float *values, const float *mask,  \
                      const float *coming, int64_t n, int64_t d, float scale, float *scores,      \
                      int64_t row, float *out) {                                                  \
    int64_t s = scores_of_##G##_by_##KEYS(q, keys, values, mask, 0, n, d, scale, scores, row);    \
    for (; s < n; s++)                                                                            \
      for (int g = 0; g < G; g++) {                                                               \
        vec sum = {0};                                                                            \
        for (int64_t i = 0; i < d; i += LANES) sum += load(q + g * d + i) * load(keys + s * d + i); \
        scores[g * row + s] = total(sum) * scale + mask[s];                                       \
      }                                                                                           \
    for (int g = 0; g < G; g++) softmax(scores + g * row, n, row);                                \
    memset(out, 0, sizeof(float) * G * d);                                                        \
    for (int64_t from = 0; from < n; from += NEAR) {                                              \
      int64_t to = from + NEAR < n ? from + NEAR : n;                                             \
      int64_t i = mix_of_##G##_by_##VECS(scores, row, values, coming, from, to, 0, d, out);       \
      for (; i < d; i += LANES)                                                                   \
        for (int g = 0; g < G; g++) {                                                             \
          vec sum = load(out + g * d + i);                                                        \
          for (int64_t k = from; k < to; k++)                                                     \
            sum += scores[g * row + k] * load(values + k * d + i);                                \
          store(out + g * d + i, sum);                                                            \
        }                                                                                         \
    }                                                                                             \
  }

PART void softmax(float *scores, int64_t n, int64_t row) {
  for (int64_t i = n; i < row; i++) scores[i] = -INFINITY;
  float most = largest(scores, row);
  vec sum = {0};
  for (int64_t i = 0; i < row; i += LANES) {
    vec e = exponential(load(scores + i) - most);
    store(scores + i, e);
    sum += e;
  }
  float inverse = 1 / total(sum);
  for (int64_t i = 0; i < row; i += LANES) store(scores + i, load(scores + i) * inverse);
}

/* As many sums at a time as there are registers for. */
HEADS(1, 8, 8)
HEADS(2, 4, 4)
HEADS(3, 3, 4)
HEADS(4, 2, 2)
HEADS(5, 2, 2)
HEADS(6, 2, 2)
HEADS(7, 1, 1)
HEADS(8, 1, 1)

int attend_supported(void) {
#if defined(__x86_64__) || defined(__i386__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

/* Returns 0; or 1: there was no memory for the scores. */
FOR_AVX2 int attend(const float *query, const float *keys, const float *values, const float *mask,
                    const int64_t *filled, int64_t rows, int64_t group, int64_t d, int64_t size,
                    int64_t begin, int64_t end, float scale, float *out) {
  int64_t most = (end + LANES - 1) / LANES * LANES;
  float *scores = malloc(sizeof(float) * most * (group < 8 ? group : 8));
  if (!scores) return 1;
  for (int64_t r = 0; r < rows; r++) {
    int64_t first = begin - (filled ? filled[r] : 0), n = end - first;
    int64_t row = (n + LANES - 1) / LANES * LANES;
    int64_t next = r + 1 < rows ? r + 1 : r;
    int64_t at = (r * size + first) * d;
    int64_t after = (next * size + begin - (filled ? filled[next] : 0)) * d;
    for (int64_t g = 0; g < group; g += 8) {
      int64_t heads = group - g < 8 ? group - g : 8;
      const float *q = query + (r * group + g) * d;
      float *o = out + (r * group + g) * d;
#define OF(G)                                                                                     \
  case G:                                                                                         \
    heads_##G(q, keys + at, values + at, mask + r * size + first, keys + after, n, d, scale,      \
              scores, row, o);                                                                   \
    break;
      switch (heads) { OF(1) OF(2) OF(3) OF(4) OF(5) OF(6) OF(7) OF(8) }
    }
  }
  free(scores);
  return 0;
}
