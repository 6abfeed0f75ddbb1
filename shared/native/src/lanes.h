// Sixteen fp32 lanes, whatever the machine: one AVX-512 register, two AVX2, four NEON, or a plain array.
//
// Knows: loads, fused multiply-add, the order in which lanes are summed, exp. Included once by each isa_*.cpp, inside
// its own anonymous namespace and under its own target pragma.
// Promises: every operation rounds the same on every instruction set (FMA everywhere, one order of summation), so a
// result does not depend on the machine it was computed on. Does not know matrices or models.

#if defined(SPECL_SANITIZED)  // inlined everywhere and instrumented, the kernels would compile for ten minutes
#define SPECL_INLINE static
#define SPECL_METHOD
#else
#define SPECL_INLINE static inline __attribute__((always_inline))
#define SPECL_METHOD inline __attribute__((always_inline))
#endif

#if defined(SPECL_ISA_AVX512)

struct V {
  __m512 v;
};
struct VI {
  __m512i v;
};
SPECL_INLINE V zero() { return {_mm512_setzero_ps()}; }
SPECL_INLINE V set1(float x) { return {_mm512_set1_ps(x)}; }
SPECL_INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
SPECL_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
SPECL_INLINE V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SPECL_INLINE V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
SPECL_INLINE V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
SPECL_INLINE V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
SPECL_INLINE V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
SPECL_INLINE V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
SPECL_INLINE V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
SPECL_INLINE V round_even(V a) { return {_mm512_roundscale_ps(a.v, 0)}; }
SPECL_INLINE V pow2(V n) {  // n whole and within the exponent's range
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
SPECL_INLINE unsigned greater_mask(V a, V b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
SPECL_INLINE __m256 fold(V a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a.v),
                       _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1)));
}
SPECL_INLINE VI load_u32(const void* p) { return {_mm512_loadu_si512(p)}; }
SPECL_INLINE VI load_u8(const void* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
// Keeps a loaded value in a register: folded into each of its uses, the load would be made again for every one of them.
SPECL_INLINE V pinned(V a) {
  asm("" : "+v"(a.v));
  return a;
}
SPECL_INLINE V to_float(VI a) { return {_mm512_cvtepi32_ps(a.v)}; }
SPECL_INLINE V bf16_low(VI a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
SPECL_INLINE V bf16_high(VI a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32((int)0xffff0000u)))};
}
SPECL_INLINE V load_half(const void* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }

// The sixteen values d*0+m ... d*15+m: a permute by the low four bits of each lane then dequantises in one step.
struct Nibbles {
  V table;
  SPECL_INLINE Nibbles make(float d, float m) {
    const V iota = {_mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)};
    return {fma(set1(d), iota, set1(m))};
  }
  template <int J>
  SPECL_METHOD V get(VI words) const {
    return {_mm512_permutexvar_ps(J ? _mm512_srli_epi32(words.v, 4 * J) : words.v, table.v)};
  }
};

#elif defined(SPECL_ISA_AVX2)

struct V {
  __m256 a, b;
};
struct VI {
  __m256i a, b;
};

SPECL_INLINE V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
SPECL_INLINE V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
SPECL_INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SPECL_INLINE void store(float* p, V x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
SPECL_INLINE V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
SPECL_INLINE V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
SPECL_INLINE V sub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
SPECL_INLINE V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
SPECL_INLINE V div(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
SPECL_INLINE V max(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
SPECL_INLINE V min(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
SPECL_INLINE V round_even(V x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
SPECL_INLINE __m256 pow2_half(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
SPECL_INLINE V pow2(V n) { return {pow2_half(n.a), pow2_half(n.b)}; }
SPECL_INLINE unsigned greater_mask(V x, V y) {
  return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ)) |
         ((unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)) << 8);
}
SPECL_INLINE __m256 fold(V x) { return _mm256_add_ps(x.a, x.b); }
SPECL_INLINE VI load_u32(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
SPECL_INLINE VI load_u8(const void* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)((const char*)p + 8)))};
}
SPECL_INLINE V pinned(V x) {
  asm("" : "+x"(x.a), "+x"(x.b));
  return x;
}
SPECL_INLINE V to_float(VI x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
SPECL_INLINE V bf16_low(VI x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
}
SPECL_INLINE V bf16_high(VI x) {
  const __m256i high = _mm256_set1_epi32((int)0xffff0000u);
  return {_mm256_castsi256_ps(_mm256_and_si256(x.a, high)), _mm256_castsi256_ps(_mm256_and_si256(x.b, high))};
}
SPECL_INLINE V load_half(const void* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
struct Nibbles {
  V d, m;
  SPECL_INLINE Nibbles make(float d, float m) { return {set1(d), set1(m)}; }
  template <int J>
  SPECL_METHOD V get(VI w) const {
    const __m256i low = _mm256_set1_epi32(15);
    const VI q = {_mm256_and_si256(_mm256_srli_epi32(w.a, 4 * J), low),
                  _mm256_and_si256(_mm256_srli_epi32(w.b, 4 * J), low)};
    return fma(d, to_float(q), m);
  }
};

#else  // NEON through the compiler's vector types, and plain C++: sixteen lanes in an array the compiler vectorises

struct V {
  float f[16];
};
struct VI {
  uint32_t u[16];
};
#define SPECL_EACH for (int i = 0; i < 16; ++i)
SPECL_INLINE V set1(float x) {
  V r;
  SPECL_EACH r.f[i] = x;
  return r;
}
SPECL_INLINE V zero() { return set1(0.0f); }
SPECL_INLINE V load(const float* p) {
  V r;
  std::memcpy(r.f, p, 64);
  return r;
}
SPECL_INLINE void store(float* p, V a) { std::memcpy(p, a.f, 64); }
SPECL_INLINE V fma(V a, V b, V c) {
  V r;
  SPECL_EACH r.f[i] = __builtin_fmaf(a.f[i], b.f[i], c.f[i]);
  return r;
}
#define SPECL_LANEWISE(name, expr)  \
  SPECL_INLINE V name(V a, V b) {   \
    V r;                            \
    SPECL_EACH r.f[i] = expr;       \
    return r;                       \
  }
SPECL_LANEWISE(add, a.f[i] + b.f[i])
SPECL_LANEWISE(sub, a.f[i] - b.f[i])
SPECL_LANEWISE(mul, a.f[i] * b.f[i])
SPECL_LANEWISE(div, a.f[i] / b.f[i])
SPECL_LANEWISE(max, a.f[i] > b.f[i] ? a.f[i] : b.f[i])
SPECL_LANEWISE(min, a.f[i] < b.f[i] ? a.f[i] : b.f[i])
SPECL_INLINE V round_even(V a) {
  V r;
  SPECL_EACH r.f[i] = __builtin_rintf(a.f[i]);
  return r;
}
SPECL_INLINE V bits(VI a) {
  V r;
  std::memcpy(r.f, a.u, 64);
  return r;
}
SPECL_INLINE V pow2(V n) {
  VI r;
  SPECL_EACH r.u[i] = (uint32_t)((int32_t)n.f[i] + 127) << 23;
  return bits(r);
}
SPECL_INLINE unsigned greater_mask(V a, V b) {
  unsigned r = 0;
  SPECL_EACH r |= (unsigned)(a.f[i] > b.f[i]) << i;
  return r;
}
SPECL_INLINE VI load_u32(const void* p) {
  VI r;
  std::memcpy(r.u, p, 64);
  return r;
}
SPECL_INLINE VI load_u8(const void* p) {
  uint8_t t[16];
  std::memcpy(t, p, 16);
  VI r;
  SPECL_EACH r.u[i] = t[i];
  return r;
}
SPECL_INLINE V pinned(V a) { return a; }
SPECL_INLINE V to_float(VI a) {
  V r;
  SPECL_EACH r.f[i] = (float)(int32_t)a.u[i];
  return r;
}
SPECL_INLINE V bf16_low(VI a) {
  SPECL_EACH a.u[i] <<= 16;
  return bits(a);
}
SPECL_INLINE V bf16_high(VI a) {
  SPECL_EACH a.u[i] &= 0xffff0000u;
  return bits(a);
}
#if defined(SPECL_ISA_NEON)
SPECL_INLINE V load_half(const void* p) {
  V r;
  for (int i = 0; i < 4; ++i) {
    uint16x4_t h;
    std::memcpy(&h, (const char*)p + 8 * i, 8);
    vst1q_f32(r.f + 4 * i, vcvt_f32_f16(vreinterpret_f16_u16(h)));
  }
  return r;
}
#else
SPECL_INLINE V load_half(const void* p) {
  uint16_t t[16];
  std::memcpy(t, p, 32);
  V r;
  SPECL_EACH r.f[i] = specl::half_to_float(t[i]);
  return r;
}
#endif
struct Nibbles {
  V d, m;
  SPECL_INLINE Nibbles make(float d, float m) { return {set1(d), set1(m)}; }
  template <int J>
  SPECL_METHOD V get(VI w) const {
    SPECL_EACH w.u[i] = (w.u[i] >> (4 * J)) & 15u;
    return fma(d, to_float(w), m);
  }
};

#endif

// Sums of four accumulators. The order is part of the promise: lane i with i+8, then neighbours, then neighbours, then
// the two halves.
#if defined(SPECL_ISA_AVX512) || defined(SPECL_ISA_AVX2)
SPECL_INLINE void reduce4(V a, V b, V c, V d, float* out) {
  const __m256 ab = _mm256_hadd_ps(fold(a), fold(b)), cd = _mm256_hadd_ps(fold(c), fold(d));
  const __m256 t = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
}
#else
SPECL_INLINE float reduce_lanes(V a) {
  float g[8];
  for (int i = 0; i < 8; ++i) g[i] = a.f[i] + a.f[i + 8];
  return ((g[0] + g[1]) + (g[2] + g[3])) + ((g[4] + g[5]) + (g[6] + g[7]));
}
SPECL_INLINE void reduce4(V a, V b, V c, V d, float* out) {
  out[0] = reduce_lanes(a);
  out[1] = reduce_lanes(b);
  out[2] = reduce_lanes(c);
  out[3] = reduce_lanes(d);
}
#endif
SPECL_INLINE float reduce(V a) {
  float out[4];
  reduce4(a, a, a, a, out);
  return out[0];
}
SPECL_INLINE float reduce_max(V a) {
  float t[16];
  store(t, a);
  float best = t[0];
  for (int i = 1; i < 16; ++i) best = t[i] > best ? t[i] : best;
  return best;
}

// exp to about 1 ulp (Cephes' polynomial after reduction by ln 2 in two parts); below -87.3 it answers 0 or a denormal's
// neighbour, which is what a softmax wants.
SPECL_INLINE V exp(V x) {
  x = max(min(x, set1(88.3762626647949f)), set1(-87.3365478515625f));
  const V n = round_even(mul(x, set1(1.44269504088896341f)));
  V r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), r);
  return mul(add(p, set1(1.0f)), pow2(n));
}
