// What Python sees of the extension. Thin: sizes and types are checked here or below, meaning lives in the Python face.
#include <mlx/mlx.h>
#include <mlx/version.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>

#include "decoder.h"
#include "pool.h"
#include "product.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

namespace specl {
namespace {

mx::array settled(mx::array a, mx::Dtype dtype, const char* what) {
  if (a.dtype() != dtype) throw std::invalid_argument(std::string(what) + " has the wrong type");
  a = mx::contiguous(a);
  a.eval();
  return a;
}

std::pair<size_t, size_t> sides(const mx::array& a) {
  if (a.ndim() != 2 || a.size() == 0) throw std::invalid_argument("a weight matrix has two sides");
  return {(size_t)a.shape(0), (size_t)a.shape(1)};
}

// What Python holds. Operations take the pointer inside: nanobind's own shared_ptr caster would tie them to the Python
// object, whose release needs the interpreter's lock on whatever thread MLX drops the operation, while the thread that
// waits for the result may hold it.
struct Weight {
  std::shared_ptr<Matrix> matrix;
};

Weight pack_float(const mx::array& dense, const std::string& format) {
  if (format != "f32" && format != "bf16") throw std::invalid_argument("format is f32 or bf16");
  const auto [n, k] = sides(dense);
  auto owner = std::make_shared<mx::array>(settled(dense, mx::float32, "the weight"));
  const float* rows = owner->data<float>();
  return {Matrix::from_float(format == "f32" ? kF32 : kBf16, rows, n, k, std::move(owner))};
}

Weight pack_affine(const mx::array& values, const mx::array& scales, const mx::array& offsets, int bits, int group) {
  const auto [n, k] = sides(values);
  if (bits != 4 && bits != 8) throw std::invalid_argument("4 or 8 bits");
  if (group < 1 || k % (size_t)group != 0) throw std::invalid_argument("inputs are not a whole number of groups");
  const auto v = settled(values, mx::uint8, "values");
  const auto s = settled(scales, mx::float32, "scales"), o = settled(offsets, mx::float32, "offsets");
  if (s.size() != n * k / (size_t)group || o.size() != s.size()) throw std::invalid_argument("scales do not fit");
  return {Matrix::from_affine(bits, (size_t)group, v.data<uint8_t>(), s.data<float>(), o.data<float>(), n, k)};
}

mx::array empty(mx::Shape shape, mx::Dtype dtype) {
  size_t n = 1;
  for (int d : shape) n *= (size_t)d;
  return mx::array(mx::allocator::malloc(n * mx::size_of(dtype)), std::move(shape), dtype);
}

mx::array unpack(const Matrix& w) {
  auto out = empty({(int)w.view().n, (int)w.view().k}, mx::float32);
  w.unpack(out.data<float>());
  return out;
}

std::tuple<mx::array, mx::array, mx::array, mx::array> stats(mx::array& logits, int k) {
  if (logits.dtype() != mx::float32 || logits.ndim() != 2) throw std::invalid_argument("logits are float32 [rows, vocabulary]");
  const auto rows = (size_t)logits.shape(0), n = (size_t)logits.shape(1);
  if (k < 1 || (size_t)k > n) throw std::invalid_argument("k is 1 to the size of the vocabulary");
  mx::array x = logits;
  {
    nb::gil_scoped_release release;
    if (!x.is_available() || !x.flags().row_contiguous) x = mx::contiguous(x);
    x.eval();
  }
  auto best = empty({(int)rows}, mx::int32), lse = empty({(int)rows}, mx::float32);
  auto ids = empty({(int)rows, k}, mx::int32), values = empty({(int)rows, k}, mx::float32);
  {
    nb::gil_scoped_release release;
    const auto row = [&](size_t r) {
      const auto s = kernels().row_stats(x.data<float>() + r * n, n, (size_t)k, ids.data<int32_t>() + r * (size_t)k,
                                         values.data<float>() + r * (size_t)k);
      best.data<int32_t>()[r] = s.argmax;
      lse.data<float>()[r] = s.logsumexp;
    };
    if (rows == 1) {
      row(0);
    } else {
      shared_pool()->run(1, [&](Crew& crew) { crew.phase(rows, row); });
    }
  }
  return {best, lse, ids, values};
}

std::vector<std::string> isas() {
  std::vector<std::string> out;
  for (const auto* k : {avx512_kernels(), avx2_kernels(), neon_kernels(), scalar_kernels()}) {
    if (k) out.emplace_back(k->name);
  }
  return out;
}

}  // namespace
}  // namespace specl

NB_MODULE(_native, m) {
  using namespace specl;
  m.attr("mlx_version") = std::to_string(MLX_VERSION_MAJOR) + "." + std::to_string(MLX_VERSION_MINOR) + "." +
                          std::to_string(MLX_VERSION_PATCH);
  m.attr("max_width") = kMaxWidth;
  m.def("isas", &isas);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("use_isa", &use, "name"_a);
  m.def("set_threads", &set_threads, "n"_a);
  m.def("threads", &threads);

  nb::class_<Weight>(m, "Matrix")
      .def_prop_ro("format", [](const Weight& w) { return std::string(kShapes[w.matrix->view().format].name); })
      .def_prop_ro("shape", [](const Weight& w) { return nb::make_tuple(w.matrix->view().n, w.matrix->view().k); })
      .def_prop_ro("nbytes", [](const Weight& w) { return w.matrix->bytes(); })
      .def("unpack", [](const Weight& w) { return unpack(*w.matrix); });
  m.def("pack_float", &pack_float, "dense"_a, "format"_a);
  m.def("pack_affine", &pack_affine, "values"_a, "scales"_a, "offsets"_a, "bits"_a, "group"_a);
  m.def(
      "linear",
      [](const mx::array& x, const Weight& w, const std::optional<mx::array>& bias) { return linear(x, w.matrix, bias); },
      "x"_a, "weight"_a, "bias"_a = nb::none(), nb::call_guard<nb::gil_scoped_release>());
  m.def("row_stats", &stats, "logits"_a, "k"_a);
  m.def("is_tracer", [](const mx::array& a) { return a.is_tracer(); });
  m.def("array_id", [](const mx::array& a) { return a.id(); });

  nb::class_<Decoder>(m, "Decoder")
      .def("__init__",
           [](Decoder* self, size_t hidden, size_t heads, size_t kv_heads, size_t head_dim, size_t intermediate, float eps,
              mx::array norm, mx::array embedding, nb::object cache_type) {
             new (self) Decoder({hidden, heads, kv_heads, head_dim, intermediate, eps}, norm, embedding, cache_type);
           },
           nb::kw_only(), "hidden"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "intermediate"_a, "eps"_a, "norm"_a,
           "embedding"_a, "cache_type"_a)
      .def(
          "append",
          [](Decoder& self, const std::vector<const Weight*>& weights, const std::vector<std::optional<mx::array>>& biases,
             const mx::array& input_norm, const mx::array& post_norm) {
            std::vector<std::shared_ptr<Matrix>> matrices;
            for (const auto* w : weights) matrices.push_back(w->matrix);
            self.append(matrices, biases, input_norm, post_norm);
          },
          "weights"_a, "biases"_a, "input_norm"_a, "post_norm"_a)
      .def("guard", &Decoder::guard, "parent"_a, "key"_a, "expected"_a)
      .def("set_positions", &Decoder::set_positions, "cos"_a, "sin"_a)
      .def("intact", &Decoder::intact, "model"_a)
      .def("step", &Decoder::step, "model"_a, "ids"_a, "cache"_a)
      .def("step_lanes", &Decoder::step_lanes, "model"_a, "ids"_a, "caches"_a)
      .def("enter_through",
           [](Decoder& self, const mx::array& embedding_norm, const mx::array& state_norm, const Weight& fc) {
             self.enter_through(embedding_norm, state_norm, fc.matrix);
           },
           "embedding_norm"_a, "state_norm"_a, "fc"_a)
      .def(
          "draft",
          [](Decoder& self, nb::handle model, mx::array& states, const std::vector<int64_t>& ids, nb::handle cache,
             const Weight& scorer) { return self.draft(model, states, ids, cache, scorer.matrix); },
          "model"_a, "states"_a, "ids"_a, "cache"_a, "scorer"_a);
}
