// Float values of one type as values of another: the types, the arithmetic and the rounding, shared
// by host and device.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define PACKEDCOMM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PACKEDCOMM_HOST_DEVICE inline
#endif

namespace packedcomm {

// The types that values can be cast between.
enum class FloatType : std::uint8_t { kFloat64, kFloat32, kFloat16, kBfloat16 };

constexpr int kFloatTypes = 4;

// A segment's conversion is one number: 0 copies bytes, others name both types.
constexpr int kCopyBytes = 0;
constexpr int kConversions = 1 + kFloatTypes * kFloatTypes;

constexpr int conversion_of(FloatType source, FloatType destination) {
  return 1 + kFloatTypes * static_cast<int>(source) + static_cast<int>(destination);
}

PACKEDCOMM_HOST_DEVICE std::int64_t source_item_bytes(int conversion) {
  const int type = (conversion - 1) / kFloatTypes;
  return type == 0 ? 8 : type == 1 ? 4 : 2;
}

PACKEDCOMM_HOST_DEVICE std::int64_t destination_item_bytes(int conversion) {
  const int type = (conversion - 1) % kFloatTypes;
  return type == 0 ? 8 : type == 1 ? 4 : 2;
}

// How many bytes of a source make `bytes` bytes of its destination.
PACKEDCOMM_HOST_DEVICE std::int64_t source_bytes_of(int conversion, std::int64_t bytes) {
  if (conversion == kCopyBytes) return bytes;
  return bytes / destination_item_bytes(conversion) * source_item_bytes(conversion);
}

struct Float16 {
  std::uint16_t bits;
};
struct Bfloat16 {
  std::uint16_t bits;
};

// The C++ type of the FloatType with this number.
template <int kType>
using FloatOf = std::conditional_t<
    kType == 0, double,
    std::conditional_t<kType == 1, float, std::conditional_t<kType == 2, Float16, Bfloat16>>>;

// The scale is applied in float32, or in float64 if either side has its precision.
template <typename Source, typename Destination>
using Arithmetic =
    std::conditional_t<std::is_same_v<Source, double> || std::is_same_v<Destination, double>,
                       double, float>;

PACKEDCOMM_HOST_DEVICE std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

PACKEDCOMM_HOST_DEVICE float float_of(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

PACKEDCOMM_HOST_DEVICE double widened(double value) { return value; }
PACKEDCOMM_HOST_DEVICE float widened(float value) { return value; }
PACKEDCOMM_HOST_DEVICE float widened(Bfloat16 value) {
  return float_of(static_cast<std::uint32_t>(value.bits) << 16);
}
PACKEDCOMM_HOST_DEVICE float widened(Float16 value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  // Selects instead of branches: the loop around this is vectorised.
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = value.bits & 0x7fffu;
  const std::uint32_t exponent_shift = magnitude >= 0x7c00u ? 224u << 23 : 112u << 23;
  const std::uint32_t normal = (magnitude << 13) + exponent_shift;
  // A denormal is its mantissa times 2^-24.
  const std::uint32_t denormal =
      bits_of(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
  return float_of(sign | (magnitude < 0x400u ? denormal : normal));
#endif
}

// Rounds to nearest, ties to even; NaN stays NaN. From float64 to a 16-bit type it rounds twice, by
// way of float32, as torch does.
template <typename Destination>
struct Rounded;

template <>
struct Rounded<double> {
  static PACKEDCOMM_HOST_DEVICE double of(double value) { return value; }
};
template <>
struct Rounded<float> {
  static PACKEDCOMM_HOST_DEVICE float of(float value) { return value; }
  static PACKEDCOMM_HOST_DEVICE float of(double value) { return static_cast<float>(value); }
};
template <>
struct Rounded<Bfloat16> {
  static PACKEDCOMM_HOST_DEVICE Bfloat16 of(float value) {
#ifdef __CUDA_ARCH__
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t nan = (bits >> 16) | 0x40u;
    return {static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
#endif
  }
  static PACKEDCOMM_HOST_DEVICE Bfloat16 of(double value) { return of(static_cast<float>(value)); }
};
template <>
struct Rounded<Float16> {
  static PACKEDCOMM_HOST_DEVICE Float16 of(float value) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    // Rounding up may carry into the exponent, and from the largest one into infinity.
    const std::uint32_t normal =
        (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    // The last bit of a number just above 0.5 is worth 2^-24, as in a denormal: the sum rounds.
    const std::uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const std::uint32_t huge = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const std::uint32_t finite = magnitude < 0x38800000u ? denormal : normal;
    return {static_cast<std::uint16_t>(sign | (magnitude >= 0x47800000u ? huge : finite))};
#endif
  }
  static PACKEDCOMM_HOST_DEVICE Float16 of(double value) { return of(static_cast<float>(value)); }
};

template <typename Destination, typename Source>
PACKEDCOMM_HOST_DEVICE Destination converted(Source value, Arithmetic<Source, Destination> scale) {
  const Arithmetic<Source, Destination> wide = widened(value);
  return Rounded<Destination>::of(wide * scale);
}

}  // namespace packedcomm
