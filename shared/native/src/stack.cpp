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

void Stack::enter_through(Entrance entrance) {
  check(entrance.fc, shape_.hidden, 2 * shape_.hidden, "fc");
  entrance_ = std::move(entrance);
}

// Query rows of one head that are attended together: they belong to one lane.
struct Group {
  const Lane* lane;
  size_t first, rows;
};

// One step's sizes and buffers. Shared by the crew; what belongs to one thread is indexed by its rank.
struct Stack::Pass {
  const Kernels& kn;
  const StackShape& s;
  const Step& step;
  size_t width, threads;
  size_t ld_scores, group_rows;
  float *hidden, *queries, *attn, *act;  // shared; attn and act packed as products want them
  float *normed, *piece, *scores;        // one part a thread
  size_t normed_size, piece_size, scores_size;
  const Lane* lane_of[kMaxWidth];  // of each row
  size_t position[kMaxWidth];
  std::vector<Group> groups;

  void seat(size_t repeat) {
    for (size_t i = 0; i < step.lane_count; ++i) {
      const Lane& lane = step.lanes[i];
      for (size_t m = 0; m < lane.width; ++m) {
        lane_of[lane.first + m] = &lane;
        position[lane.first + m] = lane.offset + m;
      }
      for (size_t at = 0; at < lane.width * repeat; at += group_rows) {
        groups.push_back({&lane, lane.first * repeat + at, std::min(group_rows, lane.width * repeat - at)});
      }
    }
  }

  void norm(size_t rank, const float* weight) const {
    float* row = piece + rank * piece_size;
    for (size_t m = 0; m < width; ++m) {
      kn.rmsnorm(hidden + m * s.hidden, weight, s.eps, s.hidden, row);
      place(normed + rank * normed_size, m, 0, row, s.hidden);
    }
  }

  // The two inputs of a head draft side by side, as its fc reads them.
  void norm_inputs(size_t rank, const Entrance& entrance) const {
    float* row = piece + rank * piece_size;
    for (size_t m = 0; m < width; ++m) {
      kn.rmsnorm(step.rows + m * s.hidden, entrance.embedding_norm, s.eps, s.hidden, row);
      place(normed + rank * normed_size, m, 0, row, s.hidden);
      kn.rmsnorm(step.states + m * s.hidden, entrance.state_norm, s.eps, s.hidden, row);
      place(normed + rank * normed_size, m, s.hidden, row, s.hidden);
    }
  }

  // Scores of the last row, for some tiles of the scorer.
  void score(size_t rank, size_t first, size_t last) const {
    const auto& w = step.scorer->view();
    kn.rows[w.format](w, normed + rank * normed_size, 1, first, last, step.scores, w.n);
  }

  // The last row after the final norm, alone, as the scorer reads it.
  void norm_last(size_t rank, const float* weight) const {
    float *row = piece + rank * piece_size, *packed = normed + rank * normed_size;
    kn.rmsnorm(hidden + (width - 1) * s.hidden, weight, s.eps, s.hidden, row);
    for (size_t i = 0; i < s.hidden; i += 16) std::memcpy(packed + packed_at(1, 0, i), row + i, 16 * sizeof(float));
  }

  // Row m, inputs k .. k+n-1 of a packed matrix of rows; k and n are multiples of sixteen.
  void place(float* packed, size_t m, size_t k, const float* from, size_t n) const {
    for (size_t i = 0; i < n; i += 16) std::memcpy(packed + packed_at(width, m, k + i), from + i, 16 * sizeof(float));
  }

  // One head's query, key or value rows, with bias and position, where attention will look for them.
  void project_head(size_t rank, const Layer& layer, size_t index, size_t item) const {
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
      y = piece + rank * piece_size;
    }
    const auto& w = p->weight->view();
    // the product writes at output n of row m; a head's first output is head * dim
    kn.rows[w.format](w, normed + rank * normed_size, width, head * dim / 4, (head + 1) * dim / 4,
                      y - head * dim, ld);
    for (size_t m = 0; m < width; ++m) {
      float* row = y + m * ld;
      if (p->bias) kn.add(row, p->bias + head * dim, dim);
      const size_t at = position[m];
      if (kind < 2) kn.rope(row, step.cos + at * (dim / 2), step.sin + at * (dim / 2), dim / 2);
      if (kind == 0) continue;
      const CacheView& cache = lane_of[m]->cache[index];
      std::memcpy((kind == 1 ? cache.keys : cache.values) + (head * cache.capacity + at) * dim, row, dim * sizeof(float));
    }
  }

  // One group of query rows of one key-value head.
  void attend(size_t rank, size_t index, size_t item, float scale) const {
    const size_t dim = s.head_dim, repeat = s.heads / s.kv_heads, head = item / groups.size();
    const Group& group = groups[item % groups.size()];
    const CacheView& cache = group.lane->cache[index];
    float* q = queries + (head * repeat * width + group.first) * dim;
    for (size_t i = 0; i < group.rows * dim; ++i) q[i] *= scale;
    size_t length[kMaxWidth];
    for (size_t r = 0; r < group.rows; ++r) length[r] = position[(group.first + r) / repeat] + 1;
    float* out = piece + rank * piece_size;
    const size_t at = head * cache.capacity * dim;
    kn.attend({q, dim, cache.keys + at, cache.values + at, length, group.rows, dim, scores + rank * scores_size, ld_scores,
               out});
    for (size_t r = 0; r < group.rows; ++r) {
      const size_t row = group.first + r;
      place(attn, row / repeat, (head * repeat + row % repeat) * dim, out + r * dim, dim);
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

void Stack::step(const Kernels& kernels, const Step& step) {
  const auto& s = shape_;
  const size_t width = step.width;
  if (width == 0 || width > kMaxWidth) throw std::invalid_argument("a step takes 1 to 16 rows");
  if (has_entrance() != (step.states != nullptr)) throw std::invalid_argument("states go with an entrance");
  const auto pool = shared_pool();
  const size_t repeat = s.heads / s.kv_heads, threads = pool->size();
  size_t longest = 0, widest = 0;
  for (size_t i = 0; i < step.lane_count; ++i) {
    longest = std::max(longest, step.lanes[i].offset + step.lanes[i].width);
    widest = std::max(widest, step.lanes[i].width);
  }
  Pass p{kernels, s, step, width, threads};
  p.ld_scores = (longest + 15) / 16 * 16;
  // Rows that share keys go together where there are enough of them to keep every thread busy.
  p.group_rows = s.heads * width < 6 * threads && longest < 256 ? 1 : std::min<size_t>(repeat * widest, 4);
  p.seat(repeat);
  p.normed_size = width * padded((has_entrance() ? 2 : 1) * s.hidden);
  p.scores_size = p.group_rows * p.ld_scores;
  // a thread's small buffer serves a normed row, a product's piece (gate and up: two), a head's keys or attention's rows
  p.piece_size = std::max(padded(s.hidden), std::max(p.group_rows, width) * s.head_dim);
  for (const auto& l : layers_) {
    for (const auto* w : {&l.o, &l.down, &l.up}) {
      p.piece_size = std::max(p.piece_size, 2 * width * kTileRows * piece_tiles(*w->weight, threads));
    }
  }
  if (has_entrance()) {
    p.piece_size = std::max(p.piece_size, width * kTileRows * piece_tiles(*entrance_.fc.weight, threads));
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
  // with an entrance the residual stream starts at zero and the fc is added to it
  if (!has_entrance()) std::memcpy(p.hidden, step.rows, width * s.hidden * sizeof(float));

  const float scale = 1.0f / std::sqrt((float)s.head_dim);
  pool->run(5 * layers_.size() + 2, [&](Crew& crew) {
    const size_t rank = crew.rank();
    size_t normed_by = 0;  // what this thread's buffer holds: 1 + twice the layer, or one more
    // Each thread norms for itself, once it has a piece: only then is `hidden` sure to stand still.
    const auto once = [&](size_t which, auto&& norm) {
      if (normed_by != which) norm();
      normed_by = which;
    };
    const auto tiles = [&](const Matrix& w, auto&& f) {
      const size_t size = piece_tiles(w, threads), count = w.tiles();
      crew.phase((count + size - 1) / size, [&](size_t i) { f(i * size, std::min(count, (i + 1) * size)); });
    };
    const size_t entering = 2 * layers_.size() + 1, scoring = entering + 1;
    if (has_entrance()) {
      tiles(*entrance_.fc.weight, [&](size_t a, size_t b) {
        once(entering, [&] { p.norm_inputs(rank, entrance_); });
        p.add_product(rank, entrance_.fc, p.normed + rank * p.normed_size, a, b);
      });
    }
    for (size_t l = 0; l < layers_.size(); ++l) {
      const Layer& layer = layers_[l];
      crew.phase(s.heads + 2 * s.kv_heads, [&](size_t i) {
        once(2 * l + 1, [&] { p.norm(rank, layer.input_norm); });
        p.project_head(rank, layer, l, i);
      });
      crew.phase(s.kv_heads * p.groups.size(), [&](size_t i) { p.attend(rank, l, i, scale); });
      tiles(*layer.o.weight, [&](size_t a, size_t b) { p.add_product(rank, layer.o, p.attn, a, b); });
      tiles(*layer.gate.weight, [&](size_t a, size_t b) {
        once(2 * l + 2, [&] { p.norm(rank, layer.post_norm); });
        p.gate_up(rank, layer, a, b);
      });
      tiles(*layer.down.weight, [&](size_t a, size_t b) { p.add_product(rank, layer.down, p.act, a, b); });
    }
    if (step.scorer) {
      tiles(*step.scorer, [&](size_t a, size_t b) {
        once(scoring, [&] { p.norm_last(rank, final_norm_); });
        p.score(rank, a, b);
      });
    }
  });
  for (size_t m = 0; m < width; ++m) {
    kernels.rmsnorm(p.hidden + m * s.hidden, final_norm_, s.eps, s.hidden, step.out + m * s.hidden);
  }
}

}  // namespace specl
