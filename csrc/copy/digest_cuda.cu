// One kernel for all tensors: a persistent grid walks the tiles, and each block adds the sum of one
// to its tensor's digest.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_check.hpp"
#include "digest_cuda.hpp"
#include "tiling.hpp"
#include "words_cuda.cuh"

namespace packedcomm {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 4;

__device__ __forceinline__ std::uint64_t digest_of_pair(const Words<4>& words,
                                                        std::uint64_t index) {
  const std::uint64_t low = words.at[0] | static_cast<std::uint64_t>(words.at[1]) << 32;
  const std::uint64_t high = words.at[2] | static_cast<std::uint64_t>(words.at[3]) << 32;
  return digest_of_word(low, index) + digest_of_word(high, index + 1);
}

// `bytes` bytes, 8 at most, as the low bytes of a word.
__device__ __forceinline__ std::uint64_t load_bytes(const char* from, std::int64_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(from);
  if (bytes == 8 && (address & 7) == 0) return *reinterpret_cast<const std::uint64_t*>(from);
  if (bytes == 4 && (address & 3) == 0) return *reinterpret_cast<const std::uint32_t*>(from);
  if (bytes == 2 && (address & 1) == 0) return *reinterpret_cast<const std::uint16_t*>(from);
  std::uint64_t word = 0;
  for (std::int64_t b = 0; b < bytes; ++b) {
    word |= static_cast<std::uint64_t>(static_cast<std::uint8_t>(from[b])) << (8 * b);
  }
  return word;
}

// This thread's share of contiguous bytes, of which the first word is number `index`.
__device__ __forceinline__ std::uint64_t digest_bytes(const char* from, std::int64_t bytes,
                                                      std::uint64_t index) {
  const auto thread = static_cast<std::int64_t>(threadIdx.x);
  const std::int64_t pairs = bytes >> 4;
  std::uint64_t sum = 0;
  std::int64_t i = thread;
  if ((reinterpret_cast<std::uintptr_t>(from) & 15) == 0) {
    for (; i + (kUnroll - 1) * kThreads < pairs; i += kUnroll * kThreads) {
      Words<4> held[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) held[u] = load_aligned<4>(from + (i + u * kThreads) * 16);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        sum += digest_of_pair(held[u], index + static_cast<std::uint64_t>(i + u * kThreads) * 2);
      }
    }
    for (; i < pairs; i += kThreads) {
      sum +=
          digest_of_pair(load_aligned<4>(from + i * 16), index + static_cast<std::uint64_t>(i) * 2);
    }
  } else {
#pragma unroll 2
    for (; i < pairs; i += kThreads) {
      sum +=
          digest_of_pair(load_shifted<4>(from + i * 16), index + static_cast<std::uint64_t>(i) * 2);
    }
  }
  // What is left of the last 16 bytes: a word for each of two threads.
  const std::int64_t begin = pairs * 16 + thread * 8;
  if (begin < bytes) {
    const std::int64_t left = bytes - begin < 8 ? bytes - begin : 8;
    sum += digest_of_word(load_bytes(from + begin, left),
                          index + static_cast<std::uint64_t>(begin / 8));
  }
  return sum;
}

// A word of a strided row, whose bytes may come from several runs.
__device__ __forceinline__ std::uint64_t gather_word(const DigestRow& row, const DigestDim* dims,
                                                     std::int64_t index) {
  const std::int64_t begin = index * 8;
  const std::int64_t bytes = row.nbytes - begin < 8 ? row.nbytes - begin : 8;
  std::int64_t run = begin / row.run_bytes;
  std::int64_t offset = begin - run * row.run_bytes;
  std::uint64_t word = 0;
  for (std::int64_t done = 0; done < bytes; ++run, offset = 0) {
    const std::int64_t in_run = row.run_bytes - offset;
    const std::int64_t taken = in_run < bytes - done ? in_run : bytes - done;
    const auto* from = reinterpret_cast<const char*>(locate_run(row, dims, run)) + offset;
    word |= load_bytes(from, taken) << (8 * done);
    done += taken;
  }
  return word;
}

__global__ void __launch_bounds__(kThreads, 2)
    digest_tiles(const DigestRow* __restrict__ rows, const std::int64_t* __restrict__ first_tiles,
                 const DigestDim* __restrict__ dims, std::int64_t count, std::int64_t tiles,
                 unsigned long long* __restrict__ digests) {
  __shared__ std::uint64_t of_warp[kThreads / 32];
  for (std::int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const std::int64_t number = find_segment(first_tiles, count, t);
    const DigestRow row = rows[number];
    const std::int64_t begin = (t - first_tiles[number]) * kDigestTileBytes;
    const std::int64_t left = row.nbytes - begin;
    const std::int64_t bytes = left < kDigestTileBytes ? left : kDigestTileBytes;
    std::uint64_t sum = 0;
    if (row.dims == 0) {
      sum = digest_bytes(reinterpret_cast<const char*>(row.address) + begin, bytes,
                         static_cast<std::uint64_t>(begin / 8));
    } else {
      const std::int64_t end = (begin + bytes + 7) / 8;
      for (std::int64_t i = begin / 8 + threadIdx.x; i < end; i += kThreads) {
        sum += digest_of_word(gather_word(row, dims, i), static_cast<std::uint64_t>(i));
      }
    }
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, step);
    if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
      sum = threadIdx.x < kThreads / 32 ? of_warp[threadIdx.x] : 0;
      for (int step = 16; step > 0; step >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, step);
      if (threadIdx.x == 0) atomicAdd(digests + number, static_cast<unsigned long long>(sum));
    }
    __syncthreads();  // of_warp is written again in the next round
  }
}

}  // namespace

void digest_on_cuda(const DigestTable& table, std::uint64_t uploaded, std::uint64_t digests,
                    std::uint64_t stream) {
  const auto count = static_cast<std::int64_t>(table.rows().size());
  if (count == 0) return;
  // Errors of earlier, unrelated calls must not be reported as these.
  (void)cudaGetLastError();
  const auto* rows = reinterpret_cast<const DigestRow*>(uploaded);
  const auto* first_tiles = reinterpret_cast<const std::int64_t*>(rows + count);
  const auto* initial = reinterpret_cast<const std::uint64_t*>(first_tiles + count);
  const auto* dims = reinterpret_cast<const DigestDim*>(initial + count);
  auto* target = reinterpret_cast<unsigned long long*>(digests);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  check_cuda(cudaMemcpyAsync(target, initial, static_cast<std::size_t>(count) * sizeof *initial,
                             cudaMemcpyDeviceToDevice, queue),
             "cudaMemcpyAsync");
  if (table.tiles() == 0) return;
  std::int64_t grid =
      blocks_that_fill_device(reinterpret_cast<const void*>(digest_tiles), kThreads);
  if (grid > table.tiles()) grid = table.tiles();
  digest_tiles<<<static_cast<unsigned>(grid), kThreads, 0, queue>>>(rows, first_tiles, dims, count,
                                                                    table.tiles(), target);
  check_cuda(cudaGetLastError(), "launch of the digest kernel");
}

}  // namespace packedcomm
