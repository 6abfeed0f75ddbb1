// The few-row product: a tile's weights are made once from memory (then from L1) and multiplied with every row of x.
//
// Each (row, output) pair owns one accumulator that takes its inputs in order, so a row's result is the same bits
// whatever the number of rows beside it: a verification of k+1 rows answers exactly what k+1 single steps would.

#if defined(SPECL_ISA_AVX512)
constexpr int kAccumulators = 24;  // of 32 registers
constexpr int kMostRows = 6;
#else
constexpr int kAccumulators = 6;  // of 16 lanes each: 12 of AVX2's 16 registers, 24 of NEON's 32
constexpr int kMostRows = 6;
#endif

template <specl::Format F>
struct Rows {
  static constexpr int bits = specl::kShapes[F].bits, group = specl::kShapes[F].group;
  static constexpr int scale_bytes = specl::kShapes[F].scale_bytes;
  static constexpr size_t row = specl::row_bytes(F), block = specl::block_bytes(F);
  static constexpr int groups = group ? 64 / (group ? group : 64) : 0;  // of a row's block
};

// The four vectors of one row's block, each used at once: f(j, weights).
template <specl::Format F, class Fn>
SPECL_INLINE void each_vector(const uint8_t* p, const float* s, Fn&& f) {
  using R = Rows<F>;
  if constexpr (F == specl::kBf16) {
    const VI a = load_u32(p), b = load_u32(p + 64);
    f(0, bf16_low(a));
    f(1, bf16_high(a));
    f(2, bf16_low(b));
    f(3, bf16_high(b));
  } else if constexpr (R::bits == 4) {
    const VI w = load_u16(p);
    const Nibbles t = Nibbles::make(s[0], s[1]);
    f(0, t.template get<0>(w));
    f(1, t.template get<1>(w));
    if constexpr (R::groups == 1) {
      f(2, t.template get<2>(w));
      f(3, t.template get<3>(w));
    } else {
      const Nibbles u = Nibbles::make(s[2], s[3]);
      f(2, u.template get<2>(w));
      f(3, u.template get<3>(w));
    }
  } else {
    for (int j = 0; j < 4; ++j) {
      const float* t = s + 2 * (j * R::groups / 4);
      f(j, fma(set1(t[0]), to_float(load_u8(p + 16 * j)), set1(t[1])));
    }
  }
}

template <specl::Format F, int M, int RB>
SPECL_INLINE void tile_rows(const uint8_t* tile, size_t blocks, const float* x, size_t ldx, size_t r0, V (&acc)[4][M]) {
  using R = Rows<F>;
  for (size_t b = 0; b < blocks; ++b, tile += R::block, x += 64) {
    __builtin_prefetch(tile + 2048);  // past the page edges at which the hardware's own prefetch stops
    if constexpr (R::block >= 512) __builtin_prefetch(tile + 2048 + R::block / 2);
    float scales[specl::kMaxScales];
    const float* s = nullptr;
    if constexpr (R::groups > 0) {
      const uint8_t* p = tile + 4 * R::row;
      if constexpr (R::scale_bytes == 2) {
        // reads up to 16 bytes past the tile's own scales for long groups: the buffer ends in slack for it
        store(scales, load_half(p));
        s = scales;
      } else {
        s = reinterpret_cast<const float*>(p);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) {
      each_vector<F>(tile + (r0 + r) * R::row, s + (r0 + r) * 2 * R::groups, [&](int j, V w) __attribute__((always_inline)) {
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) acc[r][m] = fma(w, load(x + m * ldx + 16 * j), acc[r][m]);
      });
    }
  }
}

template <int M, int RB>
SPECL_INLINE void f32_rows(const float* const* w, size_t blocks, const float* x, size_t ldx, V (&acc)[4][M]) {
  for (size_t i = 0; i < blocks * 64; i += 16) {
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) {
      const V wv = load(w[r] + i);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) acc[r][m] = fma(wv, load(x + m * ldx + i), acc[r][m]);
    }
  }
}

template <specl::Format F, int M>
static void product(const specl::MatrixView& w, size_t tile, const float* x, size_t ldx, float* y, size_t ldy) {
  constexpr int fit = kAccumulators / M;
  constexpr int RB = fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
  const size_t n0 = tile * 4, left = w.n - n0 < 4 ? w.n - n0 : 4;
  for (size_t r0 = 0; r0 < left; r0 += RB) {
    V acc[4][M];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) acc[r][m] = zero();
    if constexpr (F == specl::kF32) {
      const float* rows[RB];
      for (int r = 0; r < RB; ++r) {
        const size_t n = n0 + r0 + r;
        rows[r] = static_cast<const float*>(w.data) + (n < w.n ? n : w.n - 1) * w.stride;
      }
      f32_rows<M, RB>(rows, w.blocks, x, ldx, acc);
    } else {
      const auto* base = static_cast<const uint8_t*>(w.data) + tile * w.blocks * Rows<F>::block;
      tile_rows<F, M, RB>(base, w.blocks, x, ldx, r0, acc);
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      float sums[4];
      reduce4(acc[0][m], acc[1][m], acc[2][m], acc[3][m], sums);
      for (size_t r = 0; r < (size_t)RB && r0 + r < left; ++r) y[m * ldy + n0 + r0 + r] = sums[r];
    }
  }
}

template <specl::Format F>
static void rows(const specl::MatrixView& w, const float* x, size_t ldx, size_t m, size_t first, size_t last, float* y,
                 size_t ldy) {
  // Passes of nearly equal width over one tile, so that only the first of them reads memory.
  const size_t passes = (m + kMostRows - 1) / kMostRows;
  for (size_t t = first; t < last; ++t) {
    size_t done = 0;
    for (size_t p = passes; p > 0; --p) {
      const size_t width = (m - done + p - 1) / p;
      const float* xs = x + done * ldx;
      float* ys = y + done * ldy;
      switch (width) {
        case 1: product<F, 1>(w, t, xs, ldx, ys, ldy); break;
        case 2: product<F, 2>(w, t, xs, ldx, ys, ldy); break;
        case 3: product<F, 3>(w, t, xs, ldx, ys, ldy); break;
        case 4: product<F, 4>(w, t, xs, ldx, ys, ldy); break;
        case 5: product<F, 5>(w, t, xs, ldx, ys, ldy); break;
        default: product<F, 6>(w, t, xs, ldx, ys, ldy); break;
      }
      done += width;
    }
  }
}
