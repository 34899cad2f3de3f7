// One loop per pair of float types, written so that the compiler vectorises it.
#include "convert_cpu.hpp"

#include <array>
#include <cstring>
#include <utility>

#include "convert.hpp"

namespace packedcomm {
namespace {

#define PACKEDCOMM_INLINE inline __attribute__((always_inline))

template <typename Source, typename Destination>
PACKEDCOMM_INLINE void convert_item(char* to, const char* from,
                                    Arithmetic<Source, Destination> scale) {
  Source value;
  std::memcpy(&value, from, sizeof value);
  const Destination result = converted<Destination>(value, scale);
  std::memcpy(to, &result, sizeof result);
}

template <typename Source, typename Destination>
PACKEDCOMM_INLINE void convert_run(char* __restrict to, const char* __restrict from,
                                   std::int64_t items, Arithmetic<Source, Destination> scale) {
  constexpr auto kTo = static_cast<std::int64_t>(sizeof(Destination));
  constexpr auto kFrom = static_cast<std::int64_t>(sizeof(Source));
  for (std::int64_t i = 0; i < items; ++i) {
    convert_item<Source, Destination>(to + i * kTo, from + i * kFrom, scale);
  }
}

template <typename Source, typename Destination>
PACKEDCOMM_INLINE void convert_row(char* to, std::int64_t to_stride, const char* from,
                                   std::int64_t from_stride, std::int64_t runs, std::int64_t items,
                                   double scale) {
  const auto factor = static_cast<Arithmetic<Source, Destination>>(scale);
  if (items == 1) {
    for (std::int64_t r = 0; r < runs; ++r) {
      convert_item<Source, Destination>(to + r * to_stride, from + r * from_stride, factor);
    }
    return;
  }
  for (std::int64_t r = 0; r < runs; ++r) {
    convert_run<Source, Destination>(to + r * to_stride, from + r * from_stride, items, factor);
  }
}

// The loops once for every processor and once for those with AVX2, where they are several times
// faster. AVX2 alone has no fused multiply-add, so the arithmetic is the same.
struct Portable {
  template <typename Source, typename Destination>
  static void row(char* to, std::int64_t to_stride, const char* from, std::int64_t from_stride,
                  std::int64_t runs, std::int64_t items, double scale) {
    convert_row<Source, Destination>(to, to_stride, from, from_stride, runs, items, scale);
  }
};

#if defined(__x86_64__)
struct Avx2 {
  template <typename Source, typename Destination>
  __attribute__((target("avx2"))) static void row(char* to, std::int64_t to_stride,
                                                  const char* from, std::int64_t from_stride,
                                                  std::int64_t runs, std::int64_t items,
                                                  double scale) {
    convert_row<Source, Destination>(to, to_stride, from, from_stride, runs, items, scale);
  }
};
bool has_avx2() { return __builtin_cpu_supports("avx2") != 0; }
#else
using Avx2 = Portable;
bool has_avx2() { return false; }
#endif

using Rows = std::array<ConvertRow, kFloatTypes * kFloatTypes>;

template <typename Processor, std::size_t... kPairs>
constexpr Rows all_rows(std::index_sequence<kPairs...>) {
  return {Processor::template row<FloatOf<kPairs / kFloatTypes>, FloatOf<kPairs % kFloatTypes>>...};
}

constexpr auto kPairs = std::make_index_sequence<kFloatTypes * kFloatTypes>();

const Rows& rows_for_this_processor() {
  static constexpr Rows kPortable = all_rows<Portable>(kPairs);
  static constexpr Rows kAvx2 = all_rows<Avx2>(kPairs);
  static const bool avx2 = has_avx2();
  return avx2 ? kAvx2 : kPortable;
}

}  // namespace

ConvertRow convert_row_of(int conversion) noexcept {
  return rows_for_this_processor()[static_cast<std::size_t>(conversion - 1)];
}

}  // namespace packedcomm
