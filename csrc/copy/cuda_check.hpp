// Errors of the CUDA runtime as typed errors, and how many blocks fill a device.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "../common/error.hpp"

namespace packedcomm {

inline void check_cuda(cudaError_t status, const char* operation) {
  if (status == cudaSuccess) return;
  throw Error(ErrorKind::kCuda, std::string(operation) + " failed: " + cudaGetErrorName(status) +
                                    ": " + cudaGetErrorString(status));
}

// Blocks of `threads` threads of this kernel that the current device runs at once.
inline int blocks_that_fill_device(const void* kernel, int threads) {
  int device = 0;
  int processors = 0;
  int per_processor = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return processors * per_processor;
}

}  // namespace packedcomm
