// The CUDA context that is current on a thread, carried to another, without linking CUDA.
#pragma once

namespace packedcomm::nccl {

// NCCL asks for the calling thread's device and sets it back. On a new thread that is device 0, and
// setting it would create a context there: half a gigabyte on a GPU that the process doesn't use.
//
// Does nothing where no CUDA driver is loaded. Never throws, takes no lock, needs no GIL.
class DriverContext {
 public:
  // The calling thread's context.
  static DriverContext current() noexcept;

  void make_current() const noexcept;

 private:
  void* context_ = nullptr;
};

}  // namespace packedcomm::nccl
