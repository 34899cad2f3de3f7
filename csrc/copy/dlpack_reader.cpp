// The part of DLPack's ABI that is needed, and the checks that DLPack leaves to its users.
#include "dlpack_reader.hpp"

#include <pybind11/gil_safe_call_once.h>

#include <string>

#include "../common/error.hpp"

namespace py = pybind11;

namespace packedcomm {
namespace {

// DLPack 1.x, C ABI: https://dmlc.github.io/dlpack/latest/c_api.html
struct DLDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};
struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct DLPackVersion {
  std::uint32_t major;
  std::uint32_t minor;
};
struct ExchangeHeader {
  DLPackVersion version;
  ExchangeHeader* previous;
};
struct ExchangeApi {
  ExchangeHeader header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*dltensor_from_object)(void* object, DLTensor* out);
  void* current_stream;
};

constexpr std::int32_t kDLCPU = 1;
constexpr std::int32_t kDLCUDA = 2;
constexpr std::int32_t kDLCUDAHost = 3;
constexpr std::int32_t kDLCUDAManaged = 13;
constexpr std::uint8_t kDLFloat = 2;
constexpr std::uint8_t kDLBfloat = 4;
constexpr std::uint8_t kDLComplex = 5;

[[noreturn]] void refuse(const std::string& why) { throw Error(ErrorKind::kTensor, why); }

// The first line of the pending Python error; torch appends a native backtrace to some.
std::string python_error_text() {
  const py::error_already_set error;
  const auto text = py::str(error.value()).cast<std::string>();
  return text.substr(0, text.find('\n'));
}

// What is known of the tensor types of the framework, looked up once and never destroyed.
struct TensorTypes {
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  py::object is_wrapper_subclass;
  py::object is_conj = py::str("is_conj");
  py::object is_neg = py::str("is_neg");
  const ExchangeApi* api = nullptr;

  TensorTypes() {
    const py::module_ torch = py::module_::import("torch");
    const py::object tensor_type = torch.attr("Tensor");
    tensor = reinterpret_cast<PyTypeObject*>(tensor_type.ptr());
    parameter =
        reinterpret_cast<PyTypeObject*>(py::module_::import("torch.nn").attr("Parameter").ptr());
    is_wrapper_subclass =
        py::module_::import("torch.utils._python_dispatch").attr("is_traceable_wrapper_subclass");
    const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
    auto* header =
        static_cast<ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (header == nullptr) throw py::error_already_set();
    while (header != nullptr && header->version.major != 1) header = header->previous;
    api = reinterpret_cast<const ExchangeApi*>(header);
    if (api == nullptr || api->dltensor_from_object == nullptr) {
      throw Error(ErrorKind::kVersionMismatch, "this torch offers no DLPack 1 exchange API");
    }
  }
};

// Not a plain static: its guard would be held while the import gives up the GIL.
const TensorTypes& tensor_types() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<TensorTypes> storage;
  return storage.call_once_and_store_result([] { return TensorTypes(); }).get_stored();
}

bool flag(py::handle tensor, const py::object& method) {
  PyObject* result = PyObject_CallMethodNoArgs(tensor.ptr(), method.ptr());
  if (result == nullptr) throw py::error_already_set();
  const bool value = result == Py_True;
  Py_DECREF(result);
  return value;
}

}  // namespace

std::optional<FloatType> ItemType::float_type() const noexcept {
  if (lanes != 1) return std::nullopt;
  if (code == kDLBfloat && bits == 16) return FloatType::kBfloat16;
  if (code != kDLFloat) return std::nullopt;
  if (bits == 16) return FloatType::kFloat16;
  if (bits == 32) return FloatType::kFloat32;
  if (bits == 64) return FloatType::kFloat64;
  return std::nullopt;
}

TensorView read_tensor(py::handle tensor) {
  const TensorTypes& types = tensor_types();
  PyTypeObject* type = Py_TYPE(tensor.ptr());
  if (type != types.tensor && type != types.parameter) {
    if (!PyObject_TypeCheck(tensor.ptr(), types.tensor)) {
      refuse(std::string("is a ") + type->tp_name + ", expected a torch.Tensor");
    }
    if (types.is_wrapper_subclass(tensor).cast<bool>()) {
      refuse(std::string("is a ") + type->tp_name +
             ", which wraps other tensors: pass the plain tensor that holds its data");
    }
  }
  DLTensor view{};
  if (types.api->dltensor_from_object(tensor.ptr(), &view) != 0) {
    refuse("has no dense memory: " + python_error_text());
  }
  if (view.dtype.code == kDLComplex && flag(tensor, types.is_conj)) {
    refuse("is a lazy conjugate: call resolve_conj() first");
  }
  // A negated view can only come from a complex tensor, so its type is one of these.
  if (view.dtype.code == kDLComplex || view.dtype.code == kDLFloat) {
    if (flag(tensor, types.is_neg)) refuse("is a lazy negation: call resolve_neg() first");
  }
  TensorView result;
  result.type = {view.dtype.code, view.dtype.bits, view.dtype.lanes};
  result.array.item_bytes = (static_cast<std::int64_t>(view.dtype.bits) * view.dtype.lanes + 7) / 8;
  result.array.address = reinterpret_cast<std::uint64_t>(view.data) + view.byte_offset;
  result.array.dims = static_cast<std::size_t>(view.ndim);
  result.array.shape = view.shape;
  result.array.strides = view.strides;
  if (view.data == nullptr && result.array.nbytes() > 0) refuse("has no storage");
  switch (view.device.device_type) {
    case kDLCPU:
    case kDLCUDAHost:
      result.device = {DeviceId::kHost, 0};
      break;
    case kDLCUDA:
    case kDLCUDAManaged:
      result.device = {DeviceId::kCuda, view.device.device_id};
      break;
    default:
      refuse("is on an unsupported device (DLPack type " + std::to_string(view.device.device_type) +
             ")");
  }
  return result;
}

}  // namespace packedcomm
