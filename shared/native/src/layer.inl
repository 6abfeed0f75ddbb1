// The parts of a decoder layer that are not products: norm, rotary positions, attention over the cache, SwiGLU; and the
// summary of a row of logits. Each row is computed alone and in one order, so its result does not depend on its company.

static void rmsnorm(const float* x, const float* w, float eps, size_t n, float* y) {
  V sum = zero();
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const V a = load(x + i);
    sum = fma(a, a, sum);
  }
  float total = reduce(sum);
  for (; i < n; ++i) total = __builtin_fmaf(x[i], x[i], total);
  const float inverse = 1.0f / __builtin_sqrtf(total / (float)n + eps);
  const V inv = set1(inverse);
  for (i = 0; i + 16 <= n; i += 16) store(y + i, mul(mul(load(x + i), inv), load(w + i)));
  for (; i < n; ++i) y[i] = x[i] * inverse * w[i];
}

// Halves, not pairs (mlx's traditional=False): (a, b) -> (a cos - b sin, a sin + b cos).
static void rope(float* v, const float* cos, const float* sin, size_t half) {
  size_t i = 0;
  for (; i + 16 <= half; i += 16) {
    const V a = load(v + i), b = load(v + half + i), c = load(cos + i), s = load(sin + i);
    store(v + i, sub(mul(a, c), mul(b, s)));
    store(v + half + i, add(mul(a, s), mul(b, c)));
  }
  for (; i < half; ++i) {
    const float a = v[i], b = v[half + i];
    v[i] = a * cos[i] - b * sin[i];
    v[half + i] = a * sin[i] + b * cos[i];
  }
}

#if defined(SPECL_ISA_AVX512)
constexpr int kQueries = 4;  // rows that share a load of keys or values
#else
constexpr int kQueries = 1;
#endif

// Scores of R queries against four keys.
template <int R>
SPECL_INLINE void score4(const specl::Attention& a, size_t r0, size_t t) {
  V acc[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = zero();
  const float *q = a.q + r0 * a.ldq, *k = a.k + t * a.dim;
  for (size_t i = 0; i < a.dim; i += 16) {
    const V k0 = load(k + i), k1 = load(k + a.dim + i), k2 = load(k + 2 * a.dim + i), k3 = load(k + 3 * a.dim + i);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) __builtin_prefetch(k + (8 + j) * a.dim + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V x = pinned(load(q + r * a.ldq + i));
      acc[r][0] = fma(x, k0, acc[r][0]);
      acc[r][1] = fma(x, k1, acc[r][1]);
      acc[r][2] = fma(x, k2, acc[r][2]);
      acc[r][3] = fma(x, k3, acc[r][3]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) reduce4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], a.scores + (r0 + r) * a.ld_scores + t);
}

// C vectors of the output of R rows: sums over positions of weight * value, in order of position. Beyond a row's own
// length its weights are zero, which leaves its sums as they are.
template <int R, int C>
SPECL_INLINE void mix(const specl::Attention& a, size_t r0, size_t length, size_t i, const float* scale) {
  V acc[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = zero();
  const float *v = a.v + i, *p = a.scores + r0 * a.ld_scores;
  for (size_t t = 0; t < length; ++t, v += a.dim) {
    V x[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      x[c] = load(v + 16 * c);
      __builtin_prefetch(v + 12 * a.dim + 16 * c);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V w = set1(p[r * a.ld_scores + t]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = fma(w, x[c], acc[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(a.out + (r0 + r) * a.dim + i + 16 * c, mul(acc[r][c], set1(scale[r])));
}

// Scores become weights; answers one over their sum. Up to `end` (whole vectors) the row is filled with zeros.
SPECL_INLINE float soften(float* s, size_t length, size_t end) {
  for (size_t t = length; t < end; ++t) s[t] = -1e30f;
  const size_t padded = (length + 15) / 16 * 16;
  V top = set1(s[0]);
  for (size_t t = 0; t < padded; t += 16) top = max(top, load(s + t));
  const V most = set1(reduce_max(top));
  V sum = zero();
  for (size_t t = 0; t < padded; t += 16) {
    V e = exp(sub(load(s + t), most));
    store(s + t, e);
    if (t + 16 > length) {  // exp of the padding is tiny, not zero
      for (size_t u = length; u < padded; ++u) s[u] = 0.0f;
      e = load(s + t);
    }
    sum = add(sum, e);
  }
  for (size_t t = padded; t < end; ++t) s[t] = 0.0f;
  return 1.0f / reduce(sum);
}

template <int R>
static void attend_rows(const specl::Attention& a, size_t r0) {
  const size_t length = a.length[r0 + R - 1], whole = length / 4 * 4;  // the last row sees most
  for (size_t t = 0; t < whole; t += 4) score4<R>(a, r0, t);
  for (size_t t = whole; t < length; ++t) {
    for (int r = 0; r < R; ++r) {
      V sum = zero();
      for (size_t i = 0; i < a.dim; i += 16) sum = fma(load(a.q + (r0 + r) * a.ldq + i), load(a.k + t * a.dim + i), sum);
      a.scores[(r0 + r) * a.ld_scores + t] = reduce(sum);
    }
  }
  float scale[R];
  for (int r = 0; r < R; ++r) {
    scale[r] = soften(a.scores + (r0 + r) * a.ld_scores, a.length[r0 + r], (length + 15) / 16 * 16);
  }
  size_t i = 0;
  for (; i + 64 <= a.dim; i += 64) mix<R, 4>(a, r0, length, i, scale);
  for (; i < a.dim; i += 16) mix<R, 1>(a, r0, length, i, scale);
}

static void attend(const specl::Attention& a) {
  size_t r = 0;
  for (; r + kQueries <= a.rows; r += kQueries) attend_rows<kQueries>(a, r);
  if constexpr (kQueries > 1) {
    if (a.rows - r == 3) attend_rows<3>(a, r);
    if (a.rows - r == 2) attend_rows<2>(a, r);
    if (a.rows - r == 1) attend_rows<1>(a, r);
  }
}

static void silu_mul(float* gate, const float* up, size_t n) {  // n a multiple of 16
  const V one = set1(1.0f);
  for (size_t i = 0; i < n; i += 16) {
    const V g = load(gate + i);
    store(gate + i, mul(div(g, add(one, exp(sub(zero(), g)))), load(up + i)));
  }
}

static void add_into(float* a, const float* b, size_t n) {
  size_t i = 0;
  for (; i + 16 <= n; i += 16) store(a + i, add(load(a + i), load(b + i)));
  for (; i < n; ++i) a[i] += b[i];
}

// The k best are kept in a small sorted list; a vector is looked into only when one of its lanes beats the list's last.
// Log-sum-exp needs the maximum first, so the row (L2-sized) is read twice.
static specl::RowStats row_stats(const float* logits, size_t n, size_t k, int32_t* ids, float* values) {
  size_t kept = 0;
  float last = -__builtin_inff();
  const auto offer = [&](size_t id) {
    const float x = logits[id];
    if (kept == k && !(x > last)) return;
    size_t at = kept < k ? kept++ : k - 1;
    for (; at > 0 && values[at - 1] < x; --at) {
      values[at] = values[at - 1];
      ids[at] = ids[at - 1];
    }
    values[at] = x;
    ids[at] = (int32_t)id;
    if (kept == k) last = values[k - 1];
  };
  size_t i = 0;
  for (; i + 16 <= n; i += 16) {
    if (kept < k) {
      for (size_t j = i; j < i + 16; ++j) offer(j);
      continue;
    }
    for (unsigned mask = greater_mask(load(logits + i), set1(last)); mask; mask &= mask - 1) {
      offer(i + (size_t)__builtin_ctz(mask));
    }
  }
  for (; i < n; ++i) offer(i);
  const float most = values[0];
  V sum = zero();
  for (i = 0; i + 16 <= n; i += 16) sum = add(sum, exp(sub(load(logits + i), set1(most))));
  float total = reduce(sum);
  for (; i < n; ++i) total += __builtin_expf(logits[i] - most);
  return {ids[0], most + __builtin_logf(total)};
}

static const specl::Kernels* table(const char* name) {
  using namespace specl;
  static const Kernels kernels = {
      name,
      {rows<kF32>, rows<kBf16>, rows<kQ4G32H>, rows<kQ4G32F>, rows<kQ4G64H>, rows<kQ4G64F>, rows<kQ8G32H>,
       rows<kQ8G32F>, rows<kQ8G64H>, rows<kQ8G64F>, rows<kQ8G16F>},
      rmsnorm, rope, attend, silu_mul, add_into, row_stats,
  };
  return &kernels;
}
