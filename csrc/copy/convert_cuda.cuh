// Conversion of float values on a GPU: 16 bytes of the destination per thread and step.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "convert.hpp"
#include "words_cuda.cuh"

namespace packedcomm {

// One value at any alignment.
template <typename Item>
__device__ __forceinline__ Item load_item(const char* from) {
  if ((reinterpret_cast<std::uintptr_t>(from) & (sizeof(Item) - 1)) == 0) {
    return *reinterpret_cast<const Item*>(from);
  }
  Item item;
  memcpy(&item, from, sizeof item);
  return item;
}

template <typename Item>
__device__ __forceinline__ void store_item(char* to, Item item) {
  if ((reinterpret_cast<std::uintptr_t>(to) & (sizeof(Item) - 1)) == 0) {
    *reinterpret_cast<Item*>(to) = item;
  } else {
    memcpy(to, &item, sizeof item);
  }
}

template <typename Source, typename Destination>
__device__ __forceinline__ void convert_item(char* to, const char* from,
                                             Arithmetic<Source, Destination> scale) {
  store_item<Destination>(to, converted<Destination>(load_item<Source>(from), scale));
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
