// The NCCL library of this process: found and opened at run time, never linked, never closed.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "abi.hpp"

namespace packedcomm::nccl {

// Immutable; may be shared by threads. No function here needs the GIL.
class Library {
 public:
  // With `named` not empty: that one. Else the one that the process has loaded already, so that
  // torch, cupy and this module talk to their peers through one NCCL. Else the first of
  // `candidates` (paths, or names for the system's loader) that opens.
  //
  // Throws Error: kNccl if none is found (the message says where it was looked for), if several are
  // loaded and none is named, or if symbols are missing; kVersionMismatch if it is older than 2.18.
  static std::shared_ptr<const Library> open(const std::vector<std::string>& candidates,
                                             const std::string& named);

  // Files of all NCCL libraries that the process has loaded, each once.
  static std::vector<std::string> loaded();

  const Functions& functions() const noexcept { return functions_; }
  const std::string& path() const noexcept { return path_; }
  int version_code() const noexcept { return version_; }
  // "2.28.9"
  std::string version() const;

  // A new id. NCCL listens for the other ranks in this process from then on. Throws Error.
  UniqueId unique_id() const;

  // Throws the typed error for anything but kSuccess and kInProgress. `what` names the call.
  void check(Result result, const std::string& what, Comm comm) const;
  // NCCL's text for a result, with the library's last error message if it has one.
  std::string describe(Result result, Comm comm) const;

 private:
  Library(void* handle, const std::string& name);

  Functions functions_;
  std::string path_;
  int version_ = 0;
};

}  // namespace packedcomm::nccl
