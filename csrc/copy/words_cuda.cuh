// Loading a few 4-byte words at once, from any address, and storing them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace packedcomm {

template <int kWords>
struct alignas(16) Words {
  std::uint32_t at[kWords];
};

template <int kWords>
__device__ __forceinline__ Words<kWords> load_aligned(const char* from) {
  Words<kWords> words;
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      const uint4 part = *reinterpret_cast<const uint4*>(from + 4 * w);
      words.at[w] = part.x;
      words.at[w + 1] = part.y;
      words.at[w + 2] = part.z;
      words.at[w + 3] = part.w;
    }
  } else if constexpr (kWords == 2) {
    const uint2 part = *reinterpret_cast<const uint2*>(from);
    words.at[0] = part.x;
    words.at[1] = part.y;
  } else {
    static_assert(kWords == 1, "no pair of types has such a step");
    words.at[0] = *reinterpret_cast<const std::uint32_t*>(from);
  }
  return words;
}

// To a multiple of 16.
__device__ __forceinline__ void store_aligned(char* to, const Words<4>& words) {
  *reinterpret_cast<uint4*>(to) = make_uint4(words.at[0], words.at[1], words.at[2], words.at[3]);
}

// From any address. The last 4-byte word that is read holds a byte of the range, and so is inside
// its allocation.
template <int kWords>
__device__ __forceinline__ Words<kWords> load_shifted(const char* from) {
  const auto shift = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(from) & 3);
  const auto* source = reinterpret_cast<const std::uint32_t*>(from - shift);
  Words<kWords> words;
  std::uint32_t low = source[0];
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const std::uint32_t high = w + 1 < kWords || shift != 0 ? source[w + 1] : 0;
    words.at[w] = __funnelshift_r(low, high, 8 * shift);
    low = high;
  }
  return words;
}

}  // namespace packedcomm
