/* The formulas of qsam/functional.py on a CPU, each in one sweep over memory. Plain C: addresses and sizes only.

     v = x / s,    level = round(clip(v - offset, low, high)) + offset,    Q(x) = level * s,    s = max(|scale|, floor)
     M = low < v < high + 2 offset

   The offset is 0 (levels at the integers) or 1/2 (levels half-way between them: then the outermost cells reach half a
   step beyond their levels).

   A tensor is `rows` rows of n entries, and each row has one scale. A kernel may write into what it reads, because it
   reads each entry before it writes that entry and no other. Every result is rounded as torch's eager operations round
   it: the file is compiled without fused multiply-adds and without unsafe mathematics. A row's sum is added up by blocks
   of fixed size, in the order of the blocks, so it does not depend on the number of threads.

   Every kernel returns the largest |Q(x) - y| that it was asked to look for, 0 otherwise, and -1 if memory ran out. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 8192
#define SCALE_FLOOR 1.17549435e-38f /* the smallest normal fp32 number */

static inline float positive(float scale) { /* a NaN stays one */
  const float magnitude = fabsf(scale);
  return magnitude < SCALE_FLOOR ? SCALE_FLOOR : magnitude;
}

/* How a number of each dtype is read and written; computing is in fp32, in fp64 for fp64. */
typedef uint16_t bf16;
static inline float load_bf16(bf16 x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
static inline bf16 store_bf16(float value) { /* to nearest, ties to even */
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return value != value ? 0x7fc0 : (bf16)rounded;
}
#define SAME(x) (x)

/* Runs EACH for every entry i of every row, in parallel over blocks. EACH sees v, level, q = Q(x[i]) and outside = 1 - M;
   it may add to `sum`, which becomes the row's ds, and raise `far`, whose largest value is returned. */
#define SWEEP(A, READ, ROUND, EACH)                                                                        \
  const A low = (A)quant_min, high = (A)quant_max, shift = (A)offset, end_of_grid = high + 2 * shift;      \
  const A back = 0 - shift; /* +0 where the offset is 0: subtracting it leaves -0 as it is */              \
  const int64_t per_row = (n + BLOCK - 1) / BLOCK, blocks = rows * per_row;                                \
  A *const sums = ds ? malloc((size_t)blocks * sizeof *sums) : NULL;                                       \
  A farthest = 0;                                                                                          \
  if (ds && !sums) return -1;                                                                              \
  _Pragma("omp parallel for schedule(static) num_threads(threads) reduction(max : farthest)")              \
  for (int64_t b = 0; b < blocks; b++) {                                                                   \
    const int64_t row = b / per_row, start = row * n + b % per_row * BLOCK, end = (row + 1) * n;           \
    const int64_t stop = start + BLOCK < end ? start + BLOCK : end;                                        \
    const A s = (A)positive(scale[row]);                                                                   \
    A sum = 0, far = 0;                                                                                    \
    _Pragma("omp simd reduction(+ : sum) reduction(max : far)")                                            \
    for (int64_t i = start; i < stop; i++) {                                                               \
      const A v = (A)READ(x[i]) / s, u = v - shift;                                                        \
      const A level = ROUND(u < low ? low : u > high ? high : u) - back, q = level * s;                    \
      const int outside = v <= low || v >= end_of_grid;                                                    \
      (void)q, (void)outside;                                                                              \
      EACH                                                                                                 \
    }                                                                                                      \
    if (ds) sums[b] = sum;                                                                                 \
    farthest = far > farthest ? far : farthest;                                                            \
  }                                                                                                        \
  for (int64_t row = 0; ds && row < rows; row++) {                                                         \
    double total = 0;                                                                                      \
    for (int64_t b = row * per_row; b < (row + 1) * per_row; b++) total += (double)sums[b];                \
    ds[row] = (A)(scale[row] < 0 ? -total : total); /* s enters as |scale| */                              \
  }                                                                                                        \
  free(sums);                                                                                              \
  return (double)farthest;

#define COMMON \
  const float *scale, int64_t rows, int64_t n, double quant_min, double quant_max, double offset, int threads
#define SLOPE(A) (level - (outside ? (A)0 : v)) /* dQ/ds: level - v inside, the outermost level outside */

/* write: out <- Q(x).    backward: out <- M g, and ds <- <g, dQ/ds> of each row. */
#define OF_ANY_DTYPE(T, A, READ, WRITE, ROUND)                                                             \
  double write_##T(const T *x, T *out, COMMON) {                                                           \
    A *const ds = NULL;                                                                                    \
    SWEEP(A, READ, ROUND, out[i] = WRITE(q);)                                                              \
  }                                                                                                        \
  double backward_##T(const T *x, const T *g, T *out, A *ds, COMMON) {                                     \
    SWEEP(A, READ, ROUND, sum += SLOPE(A) * (A)READ(g[i]); out[i] = outside ? (T)0 : g[i];)                \
  }

/* The distance of Q(w) and p. No comparison holds of a NaN, so a NaN is no distance. */
#define COMPARE(T, ABS) const T gap = ABS(q - p[i]); far = gap > far ? gap : far;

/* What an optimizer does to a weight: x is the latent w, and p holds Q(w) unless somebody else wrote into it.
   d is a direction and c its coefficient.
   pull_back: g <- M g, p <- w, ds.    scale_gradient: ds.    perturb: p <- Q(w) + c d. */
#define OF_WEIGHTS(T, ROUND, ABS)                                                                          \
  OF_ANY_DTYPE(T, T, SAME, SAME, ROUND)                                                                    \
  double pull_back_##T(const T *x, T *g, T *p, T *ds, COMMON) {                                            \
    SWEEP(T, SAME, ROUND, COMPARE(T, ABS) sum += SLOPE(T) * g[i]; g[i] = outside ? 0 : g[i]; p[i] = x[i];) \
  }                                                                                                        \
  double scale_gradient_##T(const T *x, const T *g, const T *p, T *ds, COMMON) {                           \
    SWEEP(T, SAME, ROUND, COMPARE(T, ABS) sum += SLOPE(T) * g[i];)                                         \
  }                                                                                                        \
  double perturb_##T(const T *x, T *p, const T *d, double c, COMMON) {                                     \
    T *const ds = NULL;                                                                                    \
    const T coefficient = (T)c;                                                                            \
    SWEEP(T, SAME, ROUND, COMPARE(T, ABS) p[i] = q + d[i] * coefficient;)                                  \
  }

OF_WEIGHTS(float, nearbyintf, fabsf)
OF_WEIGHTS(double, nearbyint, fabs)
OF_ANY_DTYPE(bf16, float, load_bf16, store_bf16, nearbyintf)
#ifdef __FLT16_MANT_DIG__ /* a compiler without _Float16 makes no kernels for fp16, which then runs eagerly */
typedef _Float16 fp16;
#define load_fp16(x) ((float)(x))
#define store_fp16(x) ((fp16)(x))
OF_ANY_DTYPE(fp16, float, load_fp16, store_fp16, nearbyintf)
#endif

/* For a Linear layer that multiplies integers. An unsigned 8-bit code does not fit int8 and is stored less 128.
   codes: the codes of Q(x); returns the largest |Q(x) - x|, infinity if there is a NaN, which has no code. */
double codes_float(const float *x, int8_t *codes, COMMON) {
  float *const ds = NULL;
  const int taken_off = quant_max > 127 ? 128 : 0;
  SWEEP(float, SAME, nearbyintf, const float gap = q == q ? fabsf(q - x[i]) : INFINITY;
        far = gap > far ? gap : far; codes[i] = (int8_t)((int)(v == v ? level : 0) - taken_off);)
}

/* product <- s_x s_w (integers + shift) + bias, in the memory of the integers: m rows of n columns. There is one s_w for
   all columns, or one for each; shift and bias may be null. */
double rescale_float(int32_t *product, const float *x_scale, const float *w_scale, int64_t w_scales,
                     const int32_t *shift, const float *bias, int64_t m, int64_t n, int threads) {
  const float s_x = positive(*x_scale);
  _Pragma("omp parallel for schedule(static) num_threads(threads)")
  for (int64_t row = 0; row < m; row++) {
    _Pragma("omp simd")
    for (int64_t j = 0; j < n; j++) {
      const int64_t i = row * n + j;
      const float s_w = positive(w_scale[w_scales == 1 ? 0 : j]);
      const float number = (float)(product[i] + (shift ? shift[j] : 0)) * s_x * s_w + (bias ? bias[j] : 0);
      memcpy(&product[i], &number, sizeof number);
    }
  }
  return 0;
}
