// What a block of threads adds to a digest: shared by the digest kernel and the copy kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "digest.hpp"
#include "words_cuda.cuh"

namespace packedcomm {

// Threads of every block that digests.
constexpr int kDigestThreads = 512;

__device__ __forceinline__ std::uint64_t digest_of_pair(const Words<4>& words, std::uint64_t key) {
  const std::uint64_t low = words.at[0] | static_cast<std::uint64_t>(words.at[1]) << 32;
  const std::uint64_t high = words.at[2] | static_cast<std::uint64_t>(words.at[3]) << 32;
  return scrambled(low ^ key) + scrambled(high ^ (key + kDigestStep));
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

// This thread's share of the last bytes behind `pairs` whole 16-byte words: a word for each of two
// threads.
__device__ __forceinline__ std::uint64_t digest_of_rest(const char* from, std::int64_t bytes,
                                                        std::int64_t pairs, std::uint64_t index) {
  const std::int64_t begin = pairs * 16 + static_cast<std::int64_t>(threadIdx.x) * 8;
  if (begin >= bytes) return 0;
  const std::int64_t left = bytes - begin < 8 ? bytes - begin : 8;
  return digest_of_word(load_bytes(from + begin, left),
                        index + static_cast<std::uint64_t>(begin / 8));
}

// This thread's share of contiguous bytes at a multiple of 16, of which the first word is number
// `index`. With `kCopies` the bytes are written to `to` as well, a multiple of 16 too, from the
// registers that they are digested in.
template <bool kCopies>
__device__ __forceinline__ std::uint64_t digest_aligned(const char* from, char* to,
                                                        std::int64_t bytes, std::uint64_t index) {
  // Loads that a thread has in flight.
  constexpr int kUnroll = 4;
  constexpr std::uint64_t kPairStep = 2 * kDigestStep;
  constexpr std::uint64_t kRowStep = kDigestThreads * kPairStep;
  const std::int64_t pairs = bytes >> 4;
  std::int64_t i = threadIdx.x;
  std::uint64_t key = digest_key(index + 2 * static_cast<std::uint64_t>(i));
  std::uint64_t sum = 0;
  for (; i + (kUnroll - 1) * kDigestThreads < pairs; i += kUnroll * kDigestThreads) {
    Words<4> held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      held[u] = load_aligned<4>(from + (i + u * kDigestThreads) * 16);
    }
    if constexpr (kCopies) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) store_aligned(to + (i + u * kDigestThreads) * 16, held[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      sum += digest_of_pair(held[u], key);
      key += kRowStep;
    }
  }
  for (; i < pairs; i += kDigestThreads, key += kRowStep) {
    const Words<4> held = load_aligned<4>(from + i * 16);
    if constexpr (kCopies) store_aligned(to + i * 16, held);
    sum += digest_of_pair(held, key);
  }
  if constexpr (kCopies) {
    // At most 15 bytes are left, one for each thread.
    const std::int64_t rest = pairs * 16 + static_cast<std::int64_t>(threadIdx.x);
    if (rest < bytes) to[rest] = from[rest];
  }
  return sum + digest_of_rest(from, bytes, pairs, index);
}

// The same without a copy, from any address.
__device__ __forceinline__ std::uint64_t digest_span(const char* from, std::int64_t bytes,
                                                     std::uint64_t index) {
  if ((reinterpret_cast<std::uintptr_t>(from) & 15) == 0) {
    return digest_aligned<false>(from, nullptr, bytes, index);
  }
  const std::int64_t pairs = bytes >> 4;
  std::uint64_t sum = 0;
#pragma unroll 2
  for (std::int64_t i = threadIdx.x; i < pairs; i += kDigestThreads) {
    sum += digest_of_pair(load_shifted<4>(from + i * 16),
                          digest_key(index + 2 * static_cast<std::uint64_t>(i)));
  }
  return sum + digest_of_rest(from, bytes, pairs, index);
}

// Adds the sum over the block's threads to a digest. All threads of the block must call it; at its
// end they have all passed a barrier.
__device__ __forceinline__ void add_to_digest(std::uint64_t sum, unsigned long long* digest) {
  __shared__ std::uint64_t of_warp[kDigestThreads / 32];
  for (int step = 16; step > 0; step >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < kDigestThreads / 32 ? of_warp[threadIdx.x] : 0;
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, step);
    if (threadIdx.x == 0) atomicAdd(digest, static_cast<unsigned long long>(sum));
  }
  __syncthreads();  // of_warp is written again in the next round
}

}  // namespace packedcomm
