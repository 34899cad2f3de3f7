// The two functions of the CUDA driver that are needed, looked up in the library that is loaded.
#include "driver_context.hpp"

#include <dlfcn.h>

namespace packedcomm::nccl {
namespace {

// CUresult is an int, CUcontext a pointer; 0 is success.
struct Driver {
  int (*cuCtxGetCurrent)(void**) = nullptr;
  int (*cuCtxSetCurrent)(void*) = nullptr;
};

template <typename Function>
void look_up(void* library, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
}

// Not cached: the driver may be loaded later than the first call, and calls are rare.
Driver find_driver() {
  Driver driver;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) return driver;
  look_up(library, "cuCtxGetCurrent", driver.cuCtxGetCurrent);
  look_up(library, "cuCtxSetCurrent", driver.cuCtxSetCurrent);
  return driver;
}

}  // namespace

DriverContext DriverContext::current() noexcept {
  DriverContext result;
  const Driver driver = find_driver();
  if (driver.cuCtxGetCurrent == nullptr || driver.cuCtxGetCurrent(&result.context_) != 0) {
    result.context_ = nullptr;
  }
  return result;
}

void DriverContext::make_current() const noexcept {
  const Driver driver = find_driver();
  if (context_ != nullptr && driver.cuCtxSetCurrent != nullptr) driver.cuCtxSetCurrent(context_);
}

}  // namespace packedcomm::nccl
