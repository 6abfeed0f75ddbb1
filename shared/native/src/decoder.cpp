// Guards, cache buffers and the call of the stack; see decoder.h.
#include "decoder.h"

#include <mlx/ops.h>
#include <mlx/transforms.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "product.h"

namespace mx = mlx::core;
namespace nb = nanobind;

namespace specl {
namespace {

constexpr size_t kCacheStep = 256;  // mlx-lm's KVCache.step

mx::array settled(mx::array a) {
  if (a.dtype() != mx::float32) throw std::invalid_argument("norms, biases and embeddings must be float32");
  a = mx::contiguous(a);
  a.eval();
  return a;
}

bool plain(const mx::array& a) { return a.flags().row_contiguous && a.data_size() == a.size(); }

// A buffer that this call may write to: [1, heads, capacity, dim] with room for `need` positions, holding the first
// `have`. It is the cache's own when nothing else refers to it, otherwise a copy takes its place.
struct Buffer {
  mx::array array;
  bool replaced;
};
Buffer writable(nb::handle object, size_t heads, size_t dim, size_t have, size_t need) {
  const mx::array* old = object.is_none() ? nullptr : nb::inst_ptr<mx::array>(object);
  const size_t capacity = old ? (size_t)old->shape(2) : 0;
  // one reference is the cache's attribute, the other this call's
  const bool ours = old && Py_REFCNT(object.ptr()) == 2 && old->is_donatable() && plain(*old);
  if (ours && capacity >= need) return {*old, false};
  const size_t room = capacity >= need ? capacity : (need + kCacheStep - 1) / kCacheStep * kCacheStep;
  mx::array fresh(mx::allocator::malloc(heads * room * dim * sizeof(float)),
                  {1, (int)heads, (int)room, (int)dim}, mx::float32);
  float* out = fresh.data<float>();
  for (size_t h = 0; h < heads; ++h, out += room * dim) {
    if (have) {
      const float* from = old->data<float>() + (int64_t)h * old->strides(1);
      for (size_t t = 0; t < have; ++t, from += old->strides(2)) std::memcpy(out + t * dim, from, dim * sizeof(float));
    }
    std::memset(out + have * dim, 0, (room - have) * dim * sizeof(float));
  }
  return {std::move(fresh), true};
}

bool fits(const mx::array& a, size_t heads, size_t dim, size_t offset) {
  return a.dtype() == mx::float32 && a.ndim() == 4 && a.shape(0) == 1 && (size_t)a.shape(1) == heads &&
         (size_t)a.shape(3) == dim && (size_t)a.shape(2) >= offset && (dim == 1 || a.strides(3) == 1) && !a.is_tracer();
}

}  // namespace

Decoder::Decoder(StackShape shape, mx::array final_norm, mx::array embedding, nb::object cache_type)
    : stack_(shape, keep(settled(final_norm))),
      embedding_(settled(embedding)),
      cos_(mx::zeros({0})),
      sin_(mx::zeros({0})),
      cache_type_(std::move(cache_type)) {
  if (embedding_.ndim() != 2 || (size_t)embedding_.shape(1) != shape.hidden) {
    throw std::invalid_argument("the embedding does not fit the hidden size");
  }
}

const float* Decoder::keep(const mx::array& a) {
  kept_.push_back(a);
  return kept_.back().data<float>();
}

void Decoder::append(const std::vector<std::shared_ptr<Matrix>>& weights,
                     const std::vector<std::optional<mx::array>>& biases, mx::array input_norm, mx::array post_norm) {
  if (weights.size() != 7 || biases.size() != 7) throw std::invalid_argument("a layer has seven projections");
  Layer layer{keep(settled(input_norm)), keep(settled(post_norm)), {}, {}, {}, {}, {}, {}, {}};
  Projection* parts[] = {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down};
  for (size_t i = 0; i < 7; ++i) {
    parts[i]->weight = weights[i];
    if (!biases[i]) continue;
    if (biases[i]->size() != weights[i]->view().n) throw std::invalid_argument("a bias does not fit its weight");
    parts[i]->bias = keep(settled(*biases[i]));
  }
  stack_.append(std::move(layer));
}

void Decoder::enter_through(mx::array embedding_norm, mx::array state_norm, std::shared_ptr<Matrix> fc) {
  stack_.enter_through({keep(settled(embedding_norm)), keep(settled(state_norm)), {std::move(fc), nullptr}});
}

void Decoder::guard(int parent, nb::object key, nb::object expected) {
  std::uintptr_t id = 0;
  if (nb::isinstance<mx::array>(expected)) {
    const auto* a = nb::inst_ptr<mx::array>(expected);
    kept_.push_back(*a);
    id = a->id();
  }
  guards_.push_back({parent, std::move(key), expected.ptr(), id});
}

void Decoder::set_positions(mx::array cos, mx::array sin) {
  cos_ = settled(cos);
  sin_ = settled(sin);
  const int half = (int)stack_.shape().head_dim / 2;
  if (cos_.ndim() != 2 || cos_.shape(1) != half || cos_.shape() != sin_.shape()) {
    throw std::invalid_argument("the positions do not fit the heads");
  }
}

bool Decoder::intact(nb::handle model) const {
  for (const Guard& g : guards_) {
    PyObject* from = g.parent < 0 ? model.ptr() : guards_[g.parent].expected;
    PyObject* found;
    if (PyLong_Check(g.key.ptr())) {
      const Py_ssize_t at = PyLong_AsSsize_t(g.key.ptr());
      found = PyList_Check(from) && at < PyList_GET_SIZE(from) ? PyList_GET_ITEM(from, at) : nullptr;
    } else {
      found = PyDict_Check(from) ? PyDict_GetItem(from, g.key.ptr()) : nullptr;
    }
    if (found != g.expected) return false;
    if (g.array && nb::inst_ptr<mx::array>(found)->id() != g.array) return false;
  }
  return true;
}

// Whether `cache` is a list of plain caches in step with each other.
bool Decoder::look(nb::handle cache, Borrowed& lane) const {
  const size_t layers = stack_.layers();
  if (!PyList_Check(cache.ptr()) || (size_t)PyList_GET_SIZE(cache.ptr()) != layers) return false;
  lane.layers.resize(layers);
  for (size_t l = 0; l < layers; ++l) {
    Fetched& f = lane.layers[l];
    f.cache = nb::borrow(PyList_GET_ITEM(cache.ptr(), (Py_ssize_t)l));
    if ((PyObject*)Py_TYPE(f.cache.ptr()) != cache_type_.ptr()) return false;
    const size_t here = nb::cast<size_t>(f.cache.attr("offset"));
    if (l == 0) lane.offset = here;
    f.keys = f.cache.attr("keys");
    f.values = f.cache.attr("values");
    if (here != lane.offset || f.keys.is_none() != f.values.is_none() || (f.keys.is_none() && here > 0)) return false;
    for (nb::handle h : {nb::handle(f.keys), nb::handle(f.values)}) {
      if (!h.is_none() && !nb::isinstance<mx::array>(h)) return false;
    }
  }
  return true;
}

// Makes the caches' buffers writable for the lane's rows. Every buffer is evaluated and fits by now.
bool Decoder::open(Borrowed& lane, std::vector<mx::array>& held) const {
  const auto& s = stack_.shape();
  for (Fetched& f : lane.layers) {
    Buffer k = writable(f.keys, s.kv_heads, s.head_dim, lane.offset, lane.offset + lane.width);
    Buffer v = writable(f.values, s.kv_heads, s.head_dim, lane.offset, lane.offset + lane.width);
    if (k.array.shape(2) != v.array.shape(2)) return false;
    if (k.replaced) f.cache.attr("keys") = nb::cast(k.array);
    if (v.replaced) f.cache.attr("values") = nb::cast(v.array);
    lane.views.push_back({k.array.data<float>(), v.array.data<float>(), (size_t)k.array.shape(2)});
    held.push_back(std::move(k.array));
    held.push_back(std::move(v.array));
  }
  return true;
}

Decoder::Ready Decoder::prepare(nb::handle model, const std::vector<std::vector<int64_t>>& ids,
                                const std::vector<nb::handle>& caches) const {
  const auto& s = stack_.shape();
  Ready ready;
  ready.refusal = nb::none();
  if (ids.empty() || ids.size() != caches.size() || !intact(model)) return ready;
  size_t longest = 0;
  std::vector<mx::array> pending;
  for (size_t i = 0; i < ids.size(); ++i) {
    Borrowed& lane = ready.lanes.emplace_back();
    if (ids[i].empty() || !look(caches[i], lane)) return ready;
    for (size_t j = 0; j < i; ++j) {
      if (lane.layers[0].cache.ptr() == ready.lanes[j].layers[0].cache.ptr()) return ready;  // one sequence twice
    }
    lane.width = ids[i].size();
    ready.width += lane.width;
    longest = std::max(longest, lane.offset + lane.width);
    for (const Fetched& f : lane.layers) {
      for (nb::handle h : {nb::handle(f.keys), nb::handle(f.values)}) {
        if (!h.is_none() && !nb::inst_ptr<mx::array>(h)->is_available()) pending.push_back(*nb::inst_ptr<mx::array>(h));
      }
    }
  }
  if (ready.width > kMaxWidth) return ready;
  if ((size_t)cos_.shape(0) < longest) {
    ready.refusal = nb::int_(longest);
    return ready;
  }
  if (!pending.empty()) {
    nb::gil_scoped_release release;
    mx::eval(pending);
    for (auto& a : pending) a.wait();
  }
  pending.clear();
  for (const Borrowed& lane : ready.lanes) {
    for (const Fetched& f : lane.layers) {
      for (nb::handle h : {nb::handle(f.keys), nb::handle(f.values)}) {
        if (!h.is_none() && !fits(*nb::inst_ptr<mx::array>(h), s.kv_heads, s.head_dim, lane.offset)) return ready;
      }
    }
  }
  mx::array rows(mx::allocator::malloc(ready.width * s.hidden * sizeof(float)), {(int)ready.width, (int)s.hidden}, mx::float32);
  float* row = rows.data<float>();
  for (const auto& lane : ids) {
    for (const int64_t id : lane) {
      if (id < 0 || id >= embedding_.shape(0)) return ready;
      std::memcpy(row, embedding_.data<float>() + id * (int64_t)s.hidden, s.hidden * sizeof(float));
      row += s.hidden;
    }
  }
  for (Borrowed& lane : ready.lanes) {
    if (!open(lane, ready.held)) return ready;
  }
  ready.rows = std::move(rows);
  return ready;
}

void Decoder::run(Ready& ready, Step step) {
  std::vector<Lane> lanes;
  size_t first = 0;
  for (const Borrowed& lane : ready.lanes) {
    lanes.push_back({first, lane.width, lane.offset, lane.views.data()});
    first += lane.width;
  }
  step.rows = ready.rows->data<float>();
  step.width = ready.width;
  step.lanes = lanes.data();
  step.lane_count = lanes.size();
  step.cos = cos_.data<float>();
  step.sin = sin_.data<float>();
  {
    nb::gil_scoped_release release;
    stack_.step(kernels(), step);
  }
  for (Borrowed& lane : ready.lanes) {
    const nb::int_ after(lane.offset + lane.width);
    for (Fetched& f : lane.layers) f.cache.attr("offset") = after;
  }
}

nb::object Decoder::step(nb::handle model, mx::array& ids, nb::handle cache) {
  if (ids.is_tracer() || ids.ndim() != 2 || ids.shape(0) != 1 || ids.shape(1) < 1 || (size_t)ids.shape(1) > kMaxWidth ||
      (ids.dtype() != mx::int32 && ids.dtype() != mx::uint32 && ids.dtype() != mx::int64)) {
    return nb::none();
  }
  if (!ids.is_available()) {
    nb::gil_scoped_release release;
    ids.eval();
    ids.wait();
  }
  std::vector<int64_t> tokens;
  for (int m = 0; m < ids.shape(1); ++m) {
    const int64_t at = (int64_t)m * ids.strides(1);
    // a negative int32 is out of range as it is as uint32
    tokens.push_back(ids.dtype() == mx::int64 ? ids.data<int64_t>()[at] : (int64_t)ids.data<uint32_t>()[at]);
  }
  Ready ready = prepare(model, {tokens}, {cache});
  if (!ready.rows) return ready.refusal;
  const int hidden = (int)stack_.shape().hidden;
  mx::array out(mx::allocator::malloc(tokens.size() * hidden * sizeof(float)), {1, (int)tokens.size(), hidden}, mx::float32);
  Step wanted{};
  wanted.out = out.data<float>();
  run(ready, wanted);
  return nb::cast(std::move(out));
}

nb::object Decoder::step_lanes(nb::handle model, const std::vector<std::vector<int64_t>>& ids, nb::list caches) {
  std::vector<nb::handle> handles;
  for (nb::handle cache : caches) handles.push_back(cache);
  Ready ready = prepare(model, ids, handles);
  if (!ready.rows) return ready.refusal;
  const int hidden = (int)stack_.shape().hidden;
  mx::array out(mx::allocator::malloc(ready.width * hidden * sizeof(float)), {(int)ready.width, hidden}, mx::float32);
  Step wanted{};
  wanted.out = out.data<float>();
  run(ready, wanted);
  return nb::cast(std::move(out));
}

nb::object Decoder::draft(nb::handle model, mx::array& states, const std::vector<int64_t>& ids, nb::handle cache,
                          const std::shared_ptr<Matrix>& scorer) {
  const size_t hidden = stack_.shape().hidden;
  if (!stack_.has_entrance() || states.is_tracer() || states.dtype() != mx::float32 || states.size() != ids.size() * hidden ||
      scorer->view().k != hidden) {
    return nb::none();
  }
  Ready ready = prepare(model, {ids}, {cache});
  if (!ready.rows) return ready.refusal;
  mx::array from = states;
  if (!from.is_available() || !plain(from)) {
    nb::gil_scoped_release release;
    from = mx::contiguous(from);
    from.eval();
    from.wait();
  }
  const size_t n = scorer->view().n;
  mx::array out(mx::allocator::malloc(ids.size() * hidden * sizeof(float)), {(int)ids.size(), (int)hidden}, mx::float32);
  mx::array last(mx::allocator::malloc(hidden * sizeof(float)), {1, (int)hidden}, mx::float32);
  mx::array scores(mx::allocator::malloc(n * sizeof(float)), {(int)n}, mx::float32);
  Step wanted{};
  wanted.states = from.data<float>();
  wanted.out = out.data<float>();
  wanted.scorer = scorer.get();
  wanted.scores = scores.data<float>();
  run(ready, wanted);
  std::memcpy(last.data<float>(), out.data<float>() + (ids.size() - 1) * hidden, hidden * sizeof(float));
  int32_t best;
  float top;
  const RowStats stats = kernels().row_stats(scores.data<float>(), n, 1, &best, &top);
  return nb::make_tuple(std::move(last), std::move(scores), stats.argmax, stats.logsumexp);
}

}  // namespace specl
