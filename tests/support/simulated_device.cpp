// A device for machines that have none: PyTorch's "PrivateUse1", with memory of the host and kernels of the CPU.
//
// What makes it a test: a kernel that gets arrays of two devices raises, as on a GPU, and so does a generator of the
// other device. Numbers, also random ones under the same seed, are those of the CPU.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <cstdlib>

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

c10::Device only() { return c10::Device(KIND, 0); }

// --- Memory ---

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    return {data, data, &std::free, only()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;

// --- One device, one stream ---

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, only()); }
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return only(); }
  c10::Device getDevice() const override { return only(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// --- Random numbers ---

struct Generator final : at::CPUGeneratorImpl {
  Generator() {
    device_ = only();
    key_set_ = KEYS;
  }
};

const at::Generator& default_generator() {
  static const at::Generator generator = at::make_generator<Generator>();
  return generator;
}

at::Generator on_the_host(const at::Generator& generator) {
  at::Generator copy = at::make_generator<at::CPUGeneratorImpl>();
  copy.set_state(generator.get_state());
  return copy;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  at::Device getDeviceFromPtr(void*) const override { return only(); }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};
Hooks hooks;

// --- What a device has to bring along ---

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

at::Tensor seen_by_the_host(const at::Tensor& tensor) {
  if (tensor.device().type() != KIND) return tensor;
  char* data = static_cast<char*>(tensor.storage().mutable_data()) + tensor.storage_offset() * tensor.element_size();
  return at::from_blob(data, tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.dtype()));
}

at::Tensor here(const at::Tensor& tensor) { return tensor.defined() ? tensor.to(only()) : tensor; }

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  seen_by_the_host(to).copy_(seen_by_the_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& tensor) { return at::_local_scalar_dense(seen_by_the_host(tensor)); }

at::Tensor strided_view(const at::Tensor& tensor, at::IntArrayRef size, at::IntArrayRef stride,
                        std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(tensor, size, stride, offset);
}

at::Tensor reshape_alias(const at::Tensor& tensor, at::IntArrayRef size, at::IntArrayRef stride) {
  return strided_view(tensor, size, stride, tensor.storage_offset());
}

at::Tensor view(const at::Tensor& tensor, at::IntArrayRef size) { return at::native::view(tensor, size); }

const at::Tensor& resize(const at::Tensor& tensor, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  at::native::resize_impl_cpu_(tensor.unsafeGetTensorImpl(), size, std::nullopt);
  return tensor;
}

at::Tensor& set(at::Tensor& tensor, at::Storage storage, int64_t offset, at::IntArrayRef size,
                at::IntArrayRef stride) {
  auto* data = tensor.unsafeGetTensorImpl();
  data->set_storage_keep_dtype(storage);
  data->set_storage_offset(offset);
  data->set_sizes_and_strides(size, stride);
  return tensor;
}

// --- Convolutions, for which the fallback below would find no kernel ---

using Sizes = c10::SymIntArrayRef;

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       Sizes stride, Sizes padding, Sizes dilation, bool transposed, Sizes more, c10::SymInt groups) {
  TORCH_CHECK(x.device().type() == KIND && weight.device().type() == KIND, "a convolution of tensors on two devices");
  std::optional<at::Tensor> shift;
  if (bias && bias->defined()) shift = seen_by_the_host(*bias);
  return here(at::convolution_symint(seen_by_the_host(x), seen_by_the_host(weight), shift, stride, padding, dilation,
                                     transposed, more, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& g, const at::Tensor& x, const at::Tensor& weight, Sizes stride, Sizes padding, Sizes dilation,
    bool transposed, Sizes more, c10::SymInt groups, std::array<bool, 3> wanted) {
  std::vector<c10::SymInt> bias{weight.sym_size(transposed ? 1 : 0)};
  auto [to_x, to_weight, to_bias] =
      at::convolution_backward_symint(seen_by_the_host(g), seen_by_the_host(x), seen_by_the_host(weight),
                                      Sizes(bias), stride, padding, dilation, transposed, more, groups, wanted);
  return {here(to_x), here(to_weight), here(to_bias)};
}

// --- All other kernels: those of the CPU, if every array is on this device ---

void check_devices(const c10::OperatorHandle& op, const torch::jit::Stack& stack, size_t begin) {
  bool on_device = false, on_host = false;
  auto look = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return;
    (tensor.device().type() == KIND ? on_device : on_host) |= tensor.device().type() == KIND || tensor.dim() > 0;
  };
  for (size_t i = begin; i < stack.size(); i++) {
    if (stack[i].isTensor()) look(stack[i].toTensor());
    if (stack[i].isTensorList())
      for (const auto& tensor : stack[i].toTensorVector()) look(tensor);
  }
  TORCH_CHECK(!(on_device && on_host), op.schema().name(), ": expected all tensors on one device, found two");
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t begin = stack->size() - arguments.size();
  check_devices(op, *stack, begin);
  for (size_t i = 0; i < arguments.size(); i++) {
    if (arguments[i].name() != "generator") continue;
    auto& value = (*stack)[begin + i];
    at::Generator mine = value.isGenerator() ? value.toGenerator() : default_generator();
    TORCH_CHECK(mine.device().type() == KIND, op.schema().name(), ": a generator of another device");
    at::Generator copy = on_the_host(mine);
    value = copy;
    at::native::cpu_fallback(op, stack);
    mine.set_state(copy.get_state());
    return;
  }
  if (op.schema().name() == "aten::native_dropout") {  // draws from the default generator without an argument
    at::Generator host = at::detail::getDefaultCPUGenerator(), mine = default_generator();
    const auto before = host.get_state();
    host.set_state(mine.get_state());
    at::native::cpu_fallback(op, stack);
    mine.set_state(host.get_state());
    host.set_state(before);
    return;
  }
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(_, AutogradPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("as_strided", strided_view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("view", view);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", set);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(KIND, &memory);
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("default_generator", [] { return default_generator(); });
}
