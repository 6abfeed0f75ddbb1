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

struct Fetched {
  nb::object cache, keys, values;  // keys and values may be None
};

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

nb::object Decoder::step(nb::handle model, mx::array& ids, nb::handle cache) {
  const auto& s = stack_.shape();
  const size_t layers = stack_.layers();
  if (ids.is_tracer() || ids.ndim() != 2 || ids.shape(0) != 1 || ids.shape(1) < 1 || (size_t)ids.shape(1) > kMaxWidth ||
      (ids.dtype() != mx::int32 && ids.dtype() != mx::uint32 && ids.dtype() != mx::int64) || !PyList_Check(cache.ptr()) ||
      (size_t)PyList_GET_SIZE(cache.ptr()) != layers || !intact(model)) {
    return nb::none();
  }
  const size_t width = (size_t)ids.shape(1);
  std::vector<Fetched> fetched(layers);
  std::vector<mx::array> pending;
  size_t offset = 0;
  for (size_t l = 0; l < layers; ++l) {
    Fetched& f = fetched[l];
    f.cache = nb::borrow(PyList_GET_ITEM(cache.ptr(), (Py_ssize_t)l));
    if ((PyObject*)Py_TYPE(f.cache.ptr()) != cache_type_.ptr()) return nb::none();
    const size_t here = nb::cast<size_t>(f.cache.attr("offset"));
    if (l == 0) offset = here;
    f.keys = f.cache.attr("keys");
    f.values = f.cache.attr("values");
    if (here != offset || f.keys.is_none() != f.values.is_none() || (f.keys.is_none() && here > 0)) return nb::none();
    for (nb::handle h : {nb::handle(f.keys), nb::handle(f.values)}) {
      if (h.is_none()) continue;
      if (!nb::isinstance<mx::array>(h)) return nb::none();
      auto* a = nb::inst_ptr<mx::array>(h);
      if (!a->is_available()) pending.push_back(*a);
    }
  }
  if ((size_t)cos_.shape(0) < offset + width) return nb::int_(offset + width);
  if (!ids.is_available()) pending.push_back(ids);
  if (!pending.empty()) {
    nb::gil_scoped_release release;
    mx::eval(pending);
    for (auto& a : pending) a.wait();
  }
  pending.clear();
  for (const Fetched& f : fetched) {
    if (f.keys.is_none()) continue;
    for (nb::handle h : {nb::handle(f.keys), nb::handle(f.values)}) {
      if (!fits(*nb::inst_ptr<mx::array>(h), s.kv_heads, s.head_dim, offset)) return nb::none();
    }
  }
  mx::array rows(mx::allocator::malloc(width * s.hidden * sizeof(float)), {(int)width, (int)s.hidden}, mx::float32);
  const size_t vocabulary = (size_t)embedding_.shape(0);
  for (size_t m = 0; m < width; ++m) {
    const int64_t at = (int64_t)m * ids.strides(1);
    // int32 and uint32 read alike below 2^31; a negative id is out of range here
    const size_t id = ids.dtype() == mx::int64 ? (size_t)ids.data<int64_t>()[at] : (size_t)ids.data<uint32_t>()[at];
    if (id >= vocabulary) return nb::none();
    std::memcpy(rows.data<float>() + m * s.hidden, embedding_.data<float>() + id * s.hidden, s.hidden * sizeof(float));
  }
  std::vector<CacheView> views;
  std::vector<mx::array> held;  // keeps the buffers through the step; taken after they were found unshared
  views.reserve(layers);
  held.reserve(2 * layers);
  for (Fetched& f : fetched) {
    Buffer k = writable(f.keys, s.kv_heads, s.head_dim, offset, offset + width);
    Buffer v = writable(f.values, s.kv_heads, s.head_dim, offset, offset + width);
    if (k.array.shape(2) != v.array.shape(2)) return nb::none();
    if (k.replaced) f.cache.attr("keys") = nb::cast(k.array);
    if (v.replaced) f.cache.attr("values") = nb::cast(v.array);
    views.push_back({k.array.data<float>(), v.array.data<float>(), (size_t)k.array.shape(2)});
    held.push_back(std::move(k.array));
    held.push_back(std::move(v.array));
  }
  mx::array out(mx::allocator::malloc(width * s.hidden * sizeof(float)), {1, (int)width, (int)s.hidden}, mx::float32);
  const size_t half = s.head_dim / 2;
  {
    nb::gil_scoped_release release;
    stack_.step(kernels(), rows.data<float>(), width, offset, views.data(), cos_.data<float>() + offset * half,
                sin_.data<float>() + offset * half, out.data<float>());
  }
  const nb::int_ after(offset + width);
  for (Fetched& f : fetched) f.cache.attr("offset") = after;
  return nb::cast(std::move(out));
}

}  // namespace specl
