// Typed C++ errors; each kind maps to one class of packedcomm.errors.
#pragma once

#include <stdexcept>
#include <string>

namespace packedcomm {

enum class ErrorKind {
  kArgument,
  kTensor,
  kRendezvousTimeout,
  kDeadlineExceeded,
  kPeerLost,
  kVersionMismatch,
  kNccl,
  kCuda,
  kContextLost,
  kSessionState,
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace packedcomm
