// The part of NCCL's C interface that is used, so that building needs no NCCL header.
//
// Values and layouts are NCCL's own (nccl.h), as of 2.18 and unchanged since.
#pragma once

#include <climits>
#include <cstddef>

namespace packedcomm::nccl {

struct OpaqueComm;
using Comm = OpaqueComm*;
// cudaStream_t is a pointer; no CUDA header is needed either.
using Stream = void*;

struct UniqueId {
  char internal[128];
};

enum class Result : int {
  kSuccess = 0,
  kUnhandledCudaError = 1,
  kSystemError = 2,
  kInternalError = 3,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemoteError = 6,
  kInProgress = 7,
};

enum class DataType : int {
  kInt8 = 0,
  kUint8 = 1,
  kInt32 = 2,
  kUint32 = 3,
  kInt64 = 4,
  kUint64 = 5,
  kFloat16 = 6,
  kFloat32 = 7,
  kFloat64 = 8,
  kBfloat16 = 9,
};

enum class ReduceOp : int { kSum = 0 };

// ncclGetVersion's code for 2.18.0; the code is major * 10000 + minor * 100 + patch.
constexpr int kOldestVersion = 21800;

// ncclConfig_t as of 2.18. A newer library copies `size` bytes over its own defaults and, going by
// `version`, takes its defaults for everything added since.
struct Config {
  std::size_t size = sizeof(Config);
  unsigned int magic = 0xcafebeef;
  unsigned int version = kOldestVersion;
  int blocking = INT_MIN;
  int cga_cluster_size = INT_MIN;
  int min_ctas = INT_MIN;
  int max_ctas = INT_MIN;
  const char* net_name = nullptr;
  int split_share = INT_MIN;
  // Padding in 2.18, trafficClass from 2.26 on; 2.26 itself reads it without asking for `version`,
  // so it must hold "undefined" and not whatever padding holds.
  int traffic_class = INT_MIN;
};

static_assert(offsetof(Config, blocking) == 16 && offsetof(Config, net_name) == 32 &&
                  offsetof(Config, split_share) == 40 && sizeof(Config) == 48,
              "ncclConfig_t has another layout here");

// The functions, under their C names.
struct Functions {
  Result (*ncclGetVersion)(int*) = nullptr;
  Result (*ncclGetUniqueId)(UniqueId*) = nullptr;
  Result (*ncclCommInitRankConfig)(Comm*, int ranks, UniqueId, int rank, Config*) = nullptr;
  Result (*ncclCommFinalize)(Comm) = nullptr;
  Result (*ncclCommDestroy)(Comm) = nullptr;
  Result (*ncclCommAbort)(Comm) = nullptr;
  Result (*ncclCommGetAsyncError)(Comm, Result*) = nullptr;
  Result (*ncclCommCount)(Comm, int*) = nullptr;
  Result (*ncclCommCuDevice)(Comm, int*) = nullptr;
  Result (*ncclCommUserRank)(Comm, int*) = nullptr;
  const char* (*ncclGetErrorString)(Result) = nullptr;
  const char* (*ncclGetLastError)(Comm) = nullptr;
  Result (*ncclGroupStart)() = nullptr;
  Result (*ncclGroupEnd)() = nullptr;
  Result (*ncclBroadcast)(const void* source, void* destination, std::size_t count, DataType,
                          int root, Comm, Stream) = nullptr;
  Result (*ncclSend)(const void*, std::size_t count, DataType, int peer, Comm, Stream) = nullptr;
  Result (*ncclRecv)(void*, std::size_t count, DataType, int peer, Comm, Stream) = nullptr;
  Result (*ncclAllReduce)(const void* source, void* destination, std::size_t count, DataType,
                          ReduceOp, Comm, Stream) = nullptr;
};

}  // namespace packedcomm::nccl
