// Tensors and devices as arguments of bound functions.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <string>

#include "../common/error.hpp"
#include "dlpack_reader.hpp"

namespace packedcomm {

inline std::string device_name(const DeviceId& device) {
  return device.type == DeviceId::kHost ? "cpu" : "cuda:" + std::to_string(device.index);
}

inline DeviceId device_id(const std::string& type, std::int32_t index) {
  if (type == "cpu") return {DeviceId::kHost, 0};
  if (type == "cuda") return {DeviceId::kCuda, index};
  throw Error(ErrorKind::kTensor, "unsupported device type '" + type + "'");
}

// As read_tensor, for a tensor that must be on this device if it has any bytes.
inline TensorView read_tensor_on(const DeviceId& device, pybind11::handle tensor) {
  const TensorView view = read_tensor(tensor);
  if (!(view.device == device) && view.array.nbytes() > 0) {
    throw Error(ErrorKind::kTensor,
                "is on " + device_name(view.device) + ", expected " + device_name(device));
  }
  return view;
}

// Calls `body` for one tensor; an error leaves with the tensor's name, or its position, in front.
template <typename Body>
void for_tensor(const pybind11::object& names, std::size_t i, const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    const std::string name = names.is_none() ? "#" + std::to_string(i)
                                             : std::string(pybind11::str(names[pybind11::int_(i)]));
    throw Error(error.kind(), "tensor '" + name + "': " + error.what());
  }
}

}  // namespace packedcomm
