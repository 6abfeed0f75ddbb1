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

// Scores of four keys against one query.
SPECL_INLINE void score4(const float* q, const float* k, size_t dim, float* out) {
  V a = zero(), b = zero(), c = zero(), d = zero();
  for (size_t i = 0; i < dim; i += 16) {
    const V x = load(q + i);
    a = fma(x, load(k + i), a);
    b = fma(x, load(k + dim + i), b);
    c = fma(x, load(k + 2 * dim + i), c);
    d = fma(x, load(k + 3 * dim + i), d);
  }
  reduce4(a, b, c, d, out);
}

// C vectors of the output of one row: sum over positions of p * v, in order of position.
template <int C>
SPECL_INLINE void mix(const float* p, size_t length, const float* v, size_t dim, float scale, float* out) {
  V acc[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) acc[c] = zero();
  for (size_t t = 0; t < length; ++t) {
    const V w = set1(p[t]);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[c] = fma(w, load(v + t * dim + 16 * c), acc[c]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) store(out + 16 * c, mul(acc[c], set1(scale)));
}

static void attend(const specl::Attention& a) {
  size_t longest = 0;
  for (size_t r = 0; r < a.rows; ++r) longest = a.length[r] > longest ? a.length[r] : longest;
  for (size_t t = 0; t < longest; t += 64) {  // keys of a block stay in L1 while every row passes over them
    for (size_t r = 0; r < a.rows; ++r) {
      const size_t end = a.length[r] < t + 64 ? a.length[r] : t + 64;
      float* s = a.scores + r * a.ld_scores;
      size_t u = t;
      for (; u + 4 <= end; u += 4) score4(a.q + r * a.ldq, a.k + u * a.dim, a.dim, s + u);
      for (; u < end; ++u) {
        V sum = zero();
        for (size_t i = 0; i < a.dim; i += 16) sum = fma(load(a.q + r * a.ldq + i), load(a.k + u * a.dim + i), sum);
        s[u] = reduce(sum);
      }
    }
  }
  for (size_t r = 0; r < a.rows; ++r) {
    float* s = a.scores + r * a.ld_scores;
    const size_t length = a.length[r], padded = (length + 15) / 16 * 16;
    for (size_t t = length; t < padded; ++t) s[t] = -1e30f;
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
    const float scale = 1.0f / reduce(sum);
    float* out = a.out + r * a.dim;
    size_t i = 0;
    for (; i + 64 <= a.dim; i += 64) mix<4>(s, length, a.v + i, a.dim, scale, out + i);
    for (; i < a.dim; i += 16) mix<1>(s, length, a.v + i, a.dim, scale, out + i);
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
