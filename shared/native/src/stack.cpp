// The layer loop; see stack.h.
#include "stack.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "pool.h"

namespace specl {
namespace {

size_t padded(size_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

void check(const Projection& p, size_t n, size_t k, const char* name) {
  if (!p.weight) throw std::invalid_argument(std::string(name) + " has no weights");
  if (p.weight->view().n != n || p.weight->view().k != k) {
    throw std::invalid_argument(std::string(name) + " has an unexpected shape");
  }
}

// Tiles a piece of a product has: eight pieces a thread, so that uneven threads even out, but never less than four tiles
// (sixteen outputs, a whole vector for the activation).
size_t piece_tiles(const Matrix& w, size_t threads) {
  return std::max<size_t>(4, w.tiles() / (threads * 8) / 4 * 4);
}

}  // namespace

void Stack::append(Layer layer) {
  const auto& s = shape_;
  const size_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
  if (s.head_dim % 16 || s.hidden % 16 || s.intermediate % 16 || s.kv_heads == 0 || s.heads % s.kv_heads) {
    throw std::invalid_argument("sizes are not multiples of sixteen, or heads not a multiple of kv heads");
  }
  check(layer.q, q, s.hidden, "q_proj");
  check(layer.k, kv, s.hidden, "k_proj");
  check(layer.v, kv, s.hidden, "v_proj");
  check(layer.o, s.hidden, q, "o_proj");
  check(layer.gate, s.intermediate, s.hidden, "gate_proj");
  check(layer.up, s.intermediate, s.hidden, "up_proj");
  check(layer.down, s.hidden, s.intermediate, "down_proj");
  layers_.push_back(std::move(layer));
}

// One step's sizes and buffers. Shared by the crew; what belongs to one thread is indexed by its rank.
struct Stack::Pass {
  const Kernels& kn;
  const StackShape& s;
  size_t width, offset, threads;
  size_t ld_scores, group_rows;
  float *hidden, *queries, *attn, *act;  // shared; attn and act packed as products want them
  float *normed, *piece, *scores;        // one part a thread
  size_t normed_size, piece_size, scores_size;
  const float *cos, *sin;

  void norm(size_t rank, const float* weight) const {
    float* row = piece + rank * piece_size;
    for (size_t m = 0; m < width; ++m) {
      kn.rmsnorm(hidden + m * s.hidden, weight, s.eps, s.hidden, row);
      place(normed + rank * normed_size, m, 0, row, s.hidden);
    }
  }

  // Row m, inputs k .. k+n-1 of a packed matrix of rows; k and n are multiples of sixteen.
  void place(float* packed, size_t m, size_t k, const float* from, size_t n) const {
    for (size_t i = 0; i < n; i += 16) std::memcpy(packed + packed_at(width, m, k + i), from + i, 16 * sizeof(float));
  }

  // One head's query, key or value rows, with bias and position, where attention will look for them.
  void project_head(size_t rank, const Layer& layer, const CacheView& cache, size_t item) const {
    const size_t dim = s.head_dim, repeat = s.heads / s.kv_heads;
    const Projection* p;
    float* y;
    size_t head, ld, kind = 0;
    if (item < s.heads) {
      p = &layer.q, head = item, ld = repeat * dim;
      y = queries + (head / repeat * width * repeat + head % repeat) * dim;
    } else {
      kind = item < s.heads + s.kv_heads ? 1 : 2;
      p = kind == 1 ? &layer.k : &layer.v, ld = dim;
      head = item - s.heads - (kind == 2 ? s.kv_heads : 0);
      y = (kind == 1 ? cache.keys : cache.values) + (head * cache.capacity + offset) * dim;
    }
    const auto& w = p->weight->view();
    // the product writes at output n of row m; a head's first output is head * dim
    kn.rows[w.format](w, normed + rank * normed_size, width, head * dim / 4, (head + 1) * dim / 4,
                      y - head * dim, ld);
    for (size_t m = 0; m < width; ++m) {
      float* row = y + m * ld;
      if (p->bias) kn.add(row, p->bias + head * dim, dim);
      if (kind < 2) kn.rope(row, cos + m * (dim / 2), sin + m * (dim / 2), dim / 2);
    }
  }

  // Rows `first` .. of the queries that share one key-value head.
  void attend(size_t rank, const CacheView& cache, size_t item, size_t items_per_head, float scale) const {
    const size_t dim = s.head_dim, repeat = s.heads / s.kv_heads, all = repeat * width;
    const size_t head = item / items_per_head, first = item % items_per_head * group_rows;
    const size_t rows = std::min(group_rows, all - first);
    float* q = queries + (head * all + first) * dim;
    for (size_t i = 0; i < rows * dim; ++i) q[i] *= scale;
    size_t length[kMaxWidth];
    for (size_t r = 0; r < rows; ++r) length[r] = offset + (first + r) / repeat + 1;
    float* out = piece + rank * piece_size;
    const size_t at = head * cache.capacity * dim;
    kn.attend({q, dim, cache.keys + at, cache.values + at, length, rows, dim, scores + rank * scores_size, ld_scores, out});
    for (size_t r = 0; r < rows; ++r) {
      place(attn, (first + r) / repeat, (head * repeat + (first + r) % repeat) * dim, out + r * dim, dim);
    }
  }

  // hidden += x W^T + bias for some tiles.
  void add_product(size_t rank, const Projection& p, const float* x, size_t first, size_t last) const {
    const auto& w = p.weight->view();
    const size_t n0 = first * kTileRows, n1 = std::min(last * kTileRows, w.n), n = n1 - n0;
    float* y = piece + rank * piece_size;
    kn.rows[w.format](w, x, width, first, last, y - n0, n);
    for (size_t m = 0; m < width; ++m) {
      if (p.bias) kn.add(y + m * n, p.bias + n0, n);
      kn.add(hidden + m * s.hidden + n0, y + m * n, n);
    }
  }

  void gate_up(size_t rank, const Layer& layer, size_t first, size_t last) const {
    const auto &g = layer.gate.weight->view(), &u = layer.up.weight->view();
    const size_t n0 = first * kTileRows, n1 = std::min(last * kTileRows, g.n), n = n1 - n0;
    const float* x = normed + rank * normed_size;
    float *gate = piece + rank * piece_size, *up = gate + width * n;
    kn.rows[g.format](g, x, width, first, last, gate - n0, n);
    kn.rows[u.format](u, x, width, first, last, up - n0, n);
    for (size_t m = 0; m < width; ++m) {
      if (layer.gate.bias) kn.add(gate + m * n, layer.gate.bias + n0, n);
      if (layer.up.bias) kn.add(up + m * n, layer.up.bias + n0, n);
      kn.silu_mul(gate + m * n, up + m * n, n);
      place(act, m, n0, gate + m * n, n);
    }
  }
};

void Stack::step(const Kernels& kernels, const float* hidden, size_t width, size_t offset, const CacheView* cache,
                 const float* cos, const float* sin, float* out) {
  const auto& s = shape_;
  if (width == 0 || width > kMaxWidth) throw std::invalid_argument("a step takes 1 to 16 rows");
  const auto pool = shared_pool();
  const size_t repeat = s.heads / s.kv_heads, threads = pool->size();
  Pass p{kernels, s, width, offset, threads};
  p.ld_scores = (offset + width + 15) / 16 * 16;
  // Rows that share keys go together where there are enough of them to keep every thread busy.
  p.group_rows = s.heads * width < 6 * threads && offset < 256 ? 1 : std::min<size_t>(repeat * width, 4);
  p.normed_size = width * padded(s.hidden);
  p.scores_size = p.group_rows * p.ld_scores;
  // a thread's small buffer serves a normed row, a product's piece (gate and up: two) or attention's rows in turn
  p.piece_size = std::max(padded(s.hidden), p.group_rows * s.head_dim);
  for (const auto& l : layers_) {
    for (const auto* w : {&l.o, &l.down, &l.up}) {
      p.piece_size = std::max(p.piece_size, 2 * width * kTileRows * piece_tiles(*w->weight, threads));
    }
  }
  p.piece_size = padded(p.piece_size);
  const size_t hidden_size = padded(width * s.hidden), queries_size = padded(width * s.heads * s.head_dim);
  const size_t attn_size = width * padded(s.heads * s.head_dim), act_size = width * padded(s.intermediate);
  float* at = scratch_.zeroed(hidden_size + queries_size + attn_size + act_size +
                              threads * (p.normed_size + p.piece_size + p.scores_size));
  const auto take = [&](size_t n) { return std::exchange(at, at + n); };
  p.hidden = take(hidden_size);
  p.queries = take(queries_size);
  p.attn = take(attn_size);
  p.act = take(act_size);
  p.normed = take(threads * p.normed_size);
  p.piece = take(threads * p.piece_size);
  p.scores = take(threads * p.scores_size);
  p.cos = cos;
  p.sin = sin;
  std::memcpy(p.hidden, hidden, width * s.hidden * sizeof(float));

  const float scale = 1.0f / std::sqrt((float)s.head_dim);
  const size_t items_per_head = (repeat * width + p.group_rows - 1) / p.group_rows;
  pool->run(5 * layers_.size(), [&](Crew& crew) {
    const size_t rank = crew.rank();
    size_t normed_by = 0;  // which norm this thread's buffer holds: 1 + twice the layer, or one more
    const auto tiles = [&](const Matrix& w, auto&& f) {
      const size_t size = piece_tiles(w, threads), count = w.tiles();
      crew.phase((count + size - 1) / size, [&](size_t i) { f(i * size, std::min(count, (i + 1) * size)); });
    };
    for (size_t l = 0; l < layers_.size(); ++l) {
      const Layer& layer = layers_[l];
      // Each thread norms for itself, once it has a piece: only then is `hidden` sure to stand still.
      const auto norm = [&](size_t which, const float* weight) {
        if (normed_by != which) p.norm(rank, weight);
        normed_by = which;
      };
      crew.phase(s.heads + 2 * s.kv_heads, [&](size_t i) {
        norm(2 * l + 1, layer.input_norm);
        p.project_head(rank, layer, cache[l], i);
      });
      crew.phase(s.kv_heads * items_per_head, [&](size_t i) { p.attend(rank, cache[l], i, items_per_head, scale); });
      tiles(*layer.o.weight, [&](size_t a, size_t b) { p.add_product(rank, layer.o, p.attn, a, b); });
      tiles(*layer.gate.weight, [&](size_t a, size_t b) {
        norm(2 * l + 2, layer.post_norm);
        p.gate_up(rank, layer, a, b);
      });
      tiles(*layer.down.weight, [&](size_t a, size_t b) { p.add_product(rank, layer.down, p.act, a, b); });
    }
  });
  for (size_t m = 0; m < width; ++m) {
    kernels.rmsnorm(p.hidden + m * s.hidden, final_norm_, s.eps, s.hidden, out + m * s.hidden);
  }
}

}  // namespace specl
