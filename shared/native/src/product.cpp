// The product as an MLX operation; see product.h.
#include "product.h"

#include <mlx/backend/cpu/encoder.h>
#include <mlx/ops.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace mx = mlx::core;

namespace specl {
namespace {

std::atomic<const Kernels*> chosen{nullptr};

const Kernels* best() {
  for (const auto* k : {avx512_kernels(), avx2_kernels(), neon_kernels()}) {
    if (k) return k;
  }
  return scalar_kernels();
}

class Product : public mx::Primitive {
 public:
  Product(mx::Stream stream, std::shared_ptr<Matrix> w) : Primitive(stream), w_(std::move(w)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    const float* x = inputs[0].data<float>();
    const float* bias = inputs.size() > 1 ? inputs[1].data<float>() : nullptr;
    float* y = out.data<float>();
    const size_t m = inputs[0].size() / w_->view().k;
    // the encoder keeps the buffers of inputs and outputs until the task is done
    mx::cpu::get_command_encoder(stream()).dispatch(
        [w = w_, x, bias, y, m] { multiply(kernels(), *w, x, m, bias, y); });
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("the few-row product runs on the CPU only");
  }
  const char* name() const override { return "SpecloraProduct"; }
  bool is_equivalent(const Primitive& other) const override {
    return w_ == static_cast<const Product&>(other).w_;
  }

 private:
  std::shared_ptr<Matrix> w_;
};

bool settled(const mx::array& a) { return a.is_available() && a.flags().row_contiguous && !a.is_tracer(); }

mx::array rows_in_order(const mx::array& x, mx::Stream stream) {
  return settled(x) ? x : mx::contiguous(x, false, stream);
}

}  // namespace

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_relaxed);
  if (!k) chosen.store(k = best(), std::memory_order_relaxed);
  return *k;
}

bool use(const std::string& name) {
  for (const auto* k : {avx512_kernels(), avx2_kernels(), neon_kernels(), scalar_kernels()}) {
    if (k && name == k->name) {
      chosen.store(k, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

mx::array linear(const mx::array& x, std::shared_ptr<Matrix> w, const std::optional<mx::array>& bias) {
  const auto& v = w->view();
  if (x.dtype() != mx::float32) throw std::invalid_argument("the few-row product takes float32 rows");
  if (x.ndim() == 0 || (size_t)x.shape(-1) != v.k) throw std::invalid_argument("the rows' length is not the matrix's");
  auto shape = x.shape();
  shape.back() = (mx::ShapeElem)v.n;
  if (settled(x) && (!bias || settled(*bias)) && (!bias || (bias->dtype() == mx::float32 && bias->size() == v.n))) {
    // nothing to wait for: without the graph and the hand-over to the stream's thread
    mx::array out(mx::allocator::malloc(x.size() / v.k * v.n * sizeof(float)), std::move(shape), mx::float32);
    multiply(kernels(), *w, x.data<float>(), x.size() / v.k, bias ? bias->data<float>() : nullptr, out.data<float>());
    return out;
  }
  const auto stream = mx::default_stream(mx::Device(mx::Device::cpu));
  std::vector<mx::array> inputs = {rows_in_order(x, stream)};
  if (bias) {
    if (bias->dtype() != mx::float32 || bias->size() != v.n) throw std::invalid_argument("the bias does not fit");
    inputs.push_back(rows_in_order(*bias, stream));
  }
  return mx::array(std::move(shape), mx::float32, std::make_shared<Product>(stream, std::move(w)), std::move(inputs));
}

}  // namespace specl
