// Conversion of float values on a GPU: 16 bytes of the destination per thread and step.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "convert.hpp"
#include "words_cuda.cuh"

namespace packedcomm {

// The bits of a value. Values are loaded and stored as integers, and bytes are put together with
// shifts: ptxas 13.0 has got `memcpy` of a few bytes between registers and memory wrong.
template <typename Item>
struct BitsOf {
  using Type = std::uint16_t;
  static __device__ __forceinline__ Item value(Type bits) { return Item{bits}; }
  static __device__ __forceinline__ Type of(Item item) { return item.bits; }
};
template <>
struct BitsOf<float> {
  using Type = std::uint32_t;
  static __device__ __forceinline__ float value(Type bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ Type of(float item) { return __float_as_uint(item); }
};
template <>
struct BitsOf<double> {
  using Type = unsigned long long;
  static __device__ __forceinline__ double value(Type bits) {
    return __longlong_as_double(static_cast<long long>(bits));
  }
  static __device__ __forceinline__ Type of(double item) {
    return static_cast<Type>(__double_as_longlong(item));
  }
};

__device__ __forceinline__ bool is_aligned(const void* address, std::size_t bytes) {
  return (reinterpret_cast<std::uintptr_t>(address) & (bytes - 1)) == 0;
}

template <typename Item>
__device__ __forceinline__ Item load_item(const char* from, bool aligned) {
  using Bits = typename BitsOf<Item>::Type;
  if (aligned) return BitsOf<Item>::value(*reinterpret_cast<const Bits*>(from));
  const auto* bytes = reinterpret_cast<const volatile unsigned char*>(from);
  Bits bits = 0;
#pragma unroll
  for (int b = 0; b < static_cast<int>(sizeof(Bits)); ++b) {
    bits = static_cast<Bits>(bits | static_cast<Bits>(static_cast<Bits>(bytes[b]) << (8 * b)));
  }
  return BitsOf<Item>::value(bits);
}

template <typename Item>
__device__ __forceinline__ void store_item(char* to, Item item, bool aligned) {
  using Bits = typename BitsOf<Item>::Type;
  const Bits bits = BitsOf<Item>::of(item);
  if (aligned) {
    *reinterpret_cast<Bits*>(to) = bits;
    return;
  }
  auto* bytes = reinterpret_cast<volatile unsigned char*>(to);
#pragma unroll
  for (int b = 0; b < static_cast<int>(sizeof(Bits)); ++b) {
    bytes[b] = static_cast<unsigned char>(bits >> (8 * b));
  }
}

// One value at any alignment.
template <typename Source, typename Destination>
__device__ __forceinline__ void convert_item(char* to, const char* from,
                                             Arithmetic<Source, Destination> scale) {
  const Source value = load_item<Source>(from, is_aligned(from, sizeof(Source)));
  store_item<Destination>(to, converted<Destination>(value, scale),
                          is_aligned(to, sizeof(Destination)));
}

template <typename Source, typename Destination, int kWords>
__device__ __forceinline__ uint4 convert_words(const Words<kWords>& words,
                                               Arithmetic<Source, Destination> scale) {
  constexpr int kItems = 16 / sizeof(Destination);
  Source values[kItems];
  memcpy(values, words.at, sizeof values);
  Destination results[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) results[i] = converted<Destination>(values[i], scale);
  uint4 out;
  memcpy(&out, results, sizeof out);
  return out;
}

// Converts `items` contiguous values with `lanes` cooperating threads of which this is number
// `lane`. Correct for any alignment of either side; a destination that is aligned to its items is
// written in 16-byte words wherever a whole word is inside.
template <typename Source, typename Destination>
__device__ __forceinline__ void convert_span(char* to, const char* from, std::int64_t items,
                                             Arithmetic<Source, Destination> scale, int lane,
                                             int lanes) {
  constexpr int kTo = sizeof(Destination);
  constexpr int kFrom = sizeof(Source);
  constexpr int kItems = 16 / kTo;
  constexpr int kBytes = kItems * kFrom;
  constexpr int kWords = kBytes / 4;
  // Loads that a thread has in flight before its first store.
  constexpr int kSteps = kBytes >= 64 ? 1 : kBytes >= 32 ? 2 : 4;
  std::int64_t words = 0;
  const auto target_address = reinterpret_cast<std::uintptr_t>(to);
  if ((target_address & (kTo - 1)) == 0) {
    std::int64_t head = static_cast<std::int64_t>(-target_address & 15) / kTo;
    if (head > items) head = items;
    if (lane < head) convert_item<Source, Destination>(to + lane * kTo, from + lane * kFrom, scale);
    to += head * kTo;
    from += head * kFrom;
    items -= head;
    words = items / kItems;
    auto* target = reinterpret_cast<uint4*>(to);
    constexpr int kAlignment = kBytes < 16 ? kBytes : 16;
    if ((reinterpret_cast<std::uintptr_t>(from) & (kAlignment - 1)) == 0) {
      std::int64_t i = lane;
      for (; i + (kSteps - 1) * lanes < words; i += kSteps * lanes) {
        Words<kWords> held[kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          held[s] = load_aligned<kWords>(from + (i + s * lanes) * kBytes);
        }
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          target[i + s * lanes] = convert_words<Source, Destination>(held[s], scale);
        }
      }
      for (; i < words; i += lanes) {
        target[i] =
            convert_words<Source, Destination>(load_aligned<kWords>(from + i * kBytes), scale);
      }
    } else {
#pragma unroll 1
      for (std::int64_t i = lane; i < words; i += lanes) {
        target[i] =
            convert_words<Source, Destination>(load_shifted<kWords>(from + i * kBytes), scale);
      }
    }
  }
  for (std::int64_t i = words * kItems + lane; i < items; i += lanes) {
    convert_item<Source, Destination>(to + i * kTo, from + i * kFrom, scale);
  }
}

// Calls `body` with a value of the source's and one of the destination's type.
template <typename Body>
__device__ __forceinline__ void with_types(int conversion, const Body& body) {
  const auto with_source = [&](auto source) {
    switch ((conversion - 1) % kFloatTypes) {
      case 0:
        return body(source, FloatOf<0>{});
      case 1:
        return body(source, FloatOf<1>{});
      case 2:
        return body(source, FloatOf<2>{});
      default:
        return body(source, FloatOf<3>{});
    }
  };
  switch ((conversion - 1) / kFloatTypes) {
    case 0:
      return with_source(FloatOf<0>{});
    case 1:
      return with_source(FloatOf<1>{});
    case 2:
      return with_source(FloatOf<2>{});
    default:
      return with_source(FloatOf<3>{});
  }
}

}  // namespace packedcomm
