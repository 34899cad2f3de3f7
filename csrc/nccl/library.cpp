// Finding and opening NCCL.
#include "library.hpp"

#include <dlfcn.h>
#include <link.h>
#include <sys/stat.h>

#include <cstdlib>
#include <set>
#include <type_traits>
#include <utility>

#include "../common/error.hpp"

namespace packedcomm::nccl {
namespace {

// The library itself is libnccl.so or libnccl.so.2...; libnccl-net.so and the like are plugins.
bool is_nccl(const std::string& path) {
  static const std::string stem = "libnccl.so";
  const std::string name = path.substr(path.rfind('/') + 1);
  return name.compare(0, stem.size(), stem) == 0 &&
         (name.size() == stem.size() || name[stem.size()] == '.');
}

int collect_path(dl_phdr_info* info, std::size_t, void* paths) {
  if (info->dlpi_name != nullptr && is_nccl(info->dlpi_name)) {
    static_cast<std::vector<std::string>*>(paths)->push_back(info->dlpi_name);
  }
  return 0;
}

std::string loader_error() {
  const char* text = dlerror();
  return text == nullptr ? "unknown error" : text;
}

std::string join(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : ", ") + part;
  return text;
}

std::string real_path(const std::string& path) {
  char* resolved = realpath(path.c_str(), nullptr);
  std::string result = resolved == nullptr ? path : resolved;
  std::free(resolved);
  return result;
}

std::string version_text(int code) {
  // Up to 2.8 the code was major * 1000 + minor * 100 + patch.
  const int scale = code < 10000 ? 1000 : 10000;
  return std::to_string(code / scale) + "." + std::to_string(code % scale / 100) + "." +
         std::to_string(code % 100);
}

}  // namespace

std::vector<std::string> Library::loaded() {
  std::vector<std::string> paths;
  dl_iterate_phdr(collect_path, &paths);
  std::vector<std::string> distinct;
  std::set<std::pair<dev_t, ino_t>> files;
  for (const std::string& path : paths) {
    struct stat status;
    const bool found = stat(path.c_str(), &status) == 0;
    if (!found || files.emplace(status.st_dev, status.st_ino).second) distinct.push_back(path);
  }
  return distinct;
}

std::shared_ptr<const Library> Library::open(const std::vector<std::string>& candidates,
                                             const std::string& named) {
  const auto make = [](void* handle, const std::string& name) {
    return std::shared_ptr<const Library>(new Library(handle, name));
  };
  if (!named.empty()) {
    void* handle = dlopen(named.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle != nullptr) return make(handle, named);
    throw Error(ErrorKind::kNccl, "can't open the NCCL library " + named + ": " + loader_error());
  }
  const std::vector<std::string> present = loaded();
  if (present.size() > 1) {
    throw Error(ErrorKind::kNccl, "the process has loaded " + std::to_string(present.size()) +
                                      " NCCL libraries, name the one to use: " + join(present));
  }
  if (!present.empty()) {
    const std::string& path = present.front();
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (handle != nullptr) return make(handle, path);
    // Opening another one now would give the process two.
    throw Error(ErrorKind::kNccl,
                "can't open the NCCL library that is loaded, " + path + ": " + loader_error());
  }
  std::vector<std::string> failures = {"what the process has loaded"};
  for (const std::string& candidate : candidates) {
    void* handle = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle != nullptr) return make(handle, candidate);
    failures.push_back(candidate + " (" + loader_error() + ")");
  }
  throw Error(ErrorKind::kNccl, "no NCCL library was found; looked at: " + join(failures));
}

Library::Library(void* handle, const std::string& name) : path_(name) {
  const auto resolve = [&](auto& function, const char* symbol) {
    void* address = dlsym(handle, symbol);
    if (address == nullptr) {
      throw Error(ErrorKind::kNccl, "the NCCL library " + name + " has no " + symbol);
    }
    function = reinterpret_cast<std::decay_t<decltype(function)>>(address);
  };
#define PACKEDCOMM_RESOLVE(symbol) resolve(functions_.symbol, #symbol)
  PACKEDCOMM_RESOLVE(ncclGetVersion);
  // The file that the symbol really comes from, whatever name it was opened by.
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(functions_.ncclGetVersion), &info) != 0) {
    path_ = real_path(info.dli_fname);
  }
  // The version comes first: an old library lacks symbols, and its age is the better explanation.
  if (functions_.ncclGetVersion(&version_) != Result::kSuccess) {
    throw Error(ErrorKind::kNccl, "the NCCL library " + path_ + " doesn't tell its version");
  }
  if (version_ < kOldestVersion) {
    throw Error(ErrorKind::kVersionMismatch, "NCCL " + version() + " from " + path_ +
                                                 " is too old, " + version_text(kOldestVersion) +
                                                 " is the oldest that works");
  }
  PACKEDCOMM_RESOLVE(ncclGetUniqueId);
  PACKEDCOMM_RESOLVE(ncclCommInitRankConfig);
  PACKEDCOMM_RESOLVE(ncclCommFinalize);
  PACKEDCOMM_RESOLVE(ncclCommDestroy);
  PACKEDCOMM_RESOLVE(ncclCommAbort);
  PACKEDCOMM_RESOLVE(ncclCommGetAsyncError);
  PACKEDCOMM_RESOLVE(ncclCommCount);
  PACKEDCOMM_RESOLVE(ncclCommCuDevice);
  PACKEDCOMM_RESOLVE(ncclCommUserRank);
  PACKEDCOMM_RESOLVE(ncclGetErrorString);
  PACKEDCOMM_RESOLVE(ncclGetLastError);
  PACKEDCOMM_RESOLVE(ncclGroupStart);
  PACKEDCOMM_RESOLVE(ncclGroupEnd);
  PACKEDCOMM_RESOLVE(ncclBroadcast);
  PACKEDCOMM_RESOLVE(ncclSend);
  PACKEDCOMM_RESOLVE(ncclRecv);
  PACKEDCOMM_RESOLVE(ncclAllReduce);
#undef PACKEDCOMM_RESOLVE
}

std::string Library::version() const { return version_text(version_); }

UniqueId Library::unique_id() const {
  UniqueId id;
  check(functions_.ncclGetUniqueId(&id), "ncclGetUniqueId", nullptr);
  return id;
}

std::string Library::describe(Result result, Comm comm) const {
  std::string text = functions_.ncclGetErrorString(result);
  const char* last = functions_.ncclGetLastError(comm);
  if (last != nullptr && *last != '\0') text += std::string(" (") + last + ")";
  return text + ", NCCL " + version() + " from " + path_;
}

void Library::check(Result result, const std::string& what, Comm comm) const {
  if (result == Result::kSuccess || result == Result::kInProgress) return;
  ErrorKind kind = ErrorKind::kNccl;
  if (result == Result::kUnhandledCudaError) kind = ErrorKind::kCuda;
  if (result == Result::kRemoteError) kind = ErrorKind::kPeerLost;
  throw Error(kind, what + ": " + describe(result, comm));
}

}  // namespace packedcomm::nccl
