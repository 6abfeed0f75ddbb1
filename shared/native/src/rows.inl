// The few-row product: a tile's weights are made once from memory (then from L1) and multiplied with every row of x.
//
// Each (row, output) pair owns one accumulator that takes its inputs in order, so a row's result is the same bits
// whatever the number of rows beside it: a verification of k+1 rows answers exactly what k+1 single steps would.

#if defined(SPECL_ISA_AVX512)
constexpr int kAccumulators = 24;  // of 32 registers
constexpr int kMostRows = 8;       // rows of x in one pass over a tile
#else
constexpr int kAccumulators = 6;  // of 16 lanes each: 12 of AVX2's 16 registers, 24 of NEON's 32
constexpr int kMostRows = 3;
#endif
constexpr size_t kAhead = 2048;  // bytes

template <specl::Format F>
struct Rows {
  static constexpr int bits = specl::kShapes[F].bits, group = specl::kShapes[F].group;
  static constexpr int scale_bytes = specl::kShapes[F].scale_bytes;
  static constexpr size_t row = specl::row_bytes(F), block = specl::block_bytes(F);
  static constexpr int groups = group ? 64 / (group ? group : 64) : 0;  // of a row's block
};

// Vector J (of four) of row `at + r` of a tile's block (r odd where `odd`), as fp32. `s`: that row's scales and offsets, a
// pair a group. Rows of 4 bits lie two and two in one word.
template <specl::Format F, int J, bool odd>
SPECL_INLINE V weights(const uint8_t* p, const float* s) {
  using R = Rows<F>;
  if constexpr (F == specl::kBf16) {
    const VI w = load_u32(p + 64 * (J / 2));
    return J % 2 ? bf16_high(w) : bf16_low(w);
  } else {
    const float* pair = s + 2 * (J * R::groups / 4);
    if constexpr (R::bits == 4) {
      return Nibbles::make(pair[0], pair[1]).template get<J + 4 * odd>(load_u32(odd ? p - R::row : p));
    } else {
      return fma(set1(pair[0]), to_float(load_u8(p + 16 * J)), set1(pair[1]));
    }
  }
}

// A column of weights of RB rows is made once and meets every row of x: one load for RB multiply-adds.
template <specl::Format F, int M, int RB, int J>
SPECL_INLINE void column(const uint8_t* p, const float* s, const float* x, V (&acc)[RB][M]) {
  using R = Rows<F>;
  V w[RB];
#pragma GCC unroll 2
  for (int r = 0; r < RB; r += 2) {
    w[r] = weights<F, J, false>(p + r * R::row, s + r * 2 * R::groups);
    w[r + 1] = weights<F, J, true>(p + (r + 1) * R::row, s + (r + 1) * 2 * R::groups);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const V xv = pinned(load(x + m * 64 + 16 * J));
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) acc[r][m] = fma(w[r], xv, acc[r][m]);
  }
}

template <specl::Format F, int M, int RB>
SPECL_INLINE void tile_rows(const uint8_t* tile, size_t blocks, const float* x, size_t step, size_t r0, V (&acc)[RB][M]) {
  using R = Rows<F>;
  constexpr bool half = R::groups > 0 && R::scale_bytes == 2;
  constexpr size_t pairs = 4 * R::groups * 2, run = 16;  // fp32 scales of a block; blocks at a time
  alignas(64) float scales[half ? run * pairs + 16 : 16];
  for (size_t b0 = 0; b0 < blocks; b0 += run) {
    const size_t b1 = b0 + run < blocks ? b0 + run : blocks;
    if constexpr (half) {
      // fp16 scales of a whole run first: loads that follow a store at once wait for it, and from a register each broadcast
      // would cost a shuffle. A vector may reach past a block's own scales (long groups): the buffer ends in slack for it.
      for (size_t b = b0; b < b1; ++b) store(scales + (b - b0) * pairs, load_half(tile + b * R::block + 4 * R::row));
      asm volatile("" : "+m"(scales));
    }
    for (size_t b = b0; b < b1; ++b, x += step) {
      const uint8_t* p = tile + b * R::block;
      // past the page edges at which the hardware's own prefetch stops
      for (size_t line = 0; line < R::block; line += 64) __builtin_prefetch(p + kAhead + line);
      const float* s = half ? scales + (b - b0) * pairs : reinterpret_cast<const float*>(p + 4 * R::row);
      p += r0 * R::row;
      s += r0 * 2 * R::groups;
      column<F, M, RB, 0>(p, s, x, acc);
      column<F, M, RB, 1>(p, s, x, acc);
      column<F, M, RB, 2>(p, s, x, acc);
      column<F, M, RB, 3>(p, s, x, acc);
    }
  }
}

template <int M, int RB>
SPECL_INLINE void f32_rows(const float* const* w, size_t blocks, const float* x, size_t step, V (&acc)[RB][M]) {
  for (size_t i = 0; i < blocks * 64; i += 64, x += step) {
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r) {
      for (int line = 0; line < 64; line += 16) __builtin_prefetch(w[r] + i + line + kAhead / 4);
    }
    for (int j = 0; j < 64; j += 16) {
      V wv[RB];
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r) wv[r] = load(w[r] + i + j);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const V xv = pinned(load(x + m * 64 + j));
#pragma GCC unroll 4
        for (int r = 0; r < RB; ++r) acc[r][m] = fma(wv[r], xv, acc[r][m]);
      }
    }
  }
}

template <specl::Format F, int M>
static void product(const specl::MatrixView& w, size_t tile, const float* x, size_t step, float* y, size_t ldy) {
  constexpr int fit = kAccumulators / M;
  constexpr int RB = fit >= 4 ? 4 : 2;
  const size_t n0 = tile * 4, left = w.n - n0 < 4 ? w.n - n0 : 4;
  for (size_t r0 = 0; r0 < left; r0 += RB) {
    V acc[RB][M];
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[r][m] = zero();
    if constexpr (F == specl::kF32) {
      const float* rows[RB];
      for (int r = 0; r < RB; ++r) {
        const size_t n = n0 + r0 + r;
        rows[r] = static_cast<const float*>(w.data) + (n < w.n ? n : w.n - 1) * w.stride;
      }
      f32_rows<M, RB>(rows, w.blocks, x, step, acc);
    } else {
      const auto* base = static_cast<const uint8_t*>(w.data) + tile * w.blocks * Rows<F>::block;
      tile_rows<F, M, RB>(base, w.blocks, x, step, r0, acc);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      float sums[4];
      reduce4(acc[0][m], acc[1 % RB][m], acc[2 % RB][m], acc[3 % RB][m], sums);
      for (size_t r = 0; r < (size_t)RB && r0 + r < left; ++r) y[m * ldy + n0 + r0 + r] = sums[r];
    }
  }
}

template <specl::Format F, int M>
SPECL_INLINE void pick(size_t width, const specl::MatrixView& w, size_t t, const float* x, size_t step, float* y, size_t ldy) {
  if (width == M) {
    product<F, M>(w, t, x, step, y, ldy);
  } else if constexpr (M < kMostRows) {
    pick<F, M + 1>(width, w, t, x, step, y, ldy);
  }
}

template <specl::Format F>
static void rows(const specl::MatrixView& w, const float* x, size_t m, size_t first, size_t last, float* y, size_t ldy) {
  // Passes of nearly equal width over one tile, so that only the first of them reads memory.
  // Seven or eight rows at once meet only two rows of weights a load: that pays while x stays in L1.
  const size_t most = kMostRows > 6 && w.blocks * m > 144 ? 6 : kMostRows;
  const size_t passes = (m + most - 1) / most;
  for (size_t t = first; t < last; ++t) {
    size_t done = 0;
    for (size_t p = passes; p > 0; --p) {
      const size_t width = (m - done + p - 1) / p;
      const float* xs = x + done * 64;
      float* ys = y + done * ldy;
      pick<F, 1>(width, w, t, xs, m * 64, ys, ldy);
      done += width;
    }
  }
}
