// One kernel for the whole table: a persistent grid walks the tiles, each block copies one at a
// time.
#include <cuda_runtime.h>

#include <cstdint>

#include "convert_cuda.cuh"
#include "copy_cuda.hpp"
#include "cuda_check.hpp"
#include "digest_cuda.cuh"
#include "tiling.hpp"

namespace packedcomm {
namespace {

constexpr int kThreads = kDigestThreads;
// Loads that a thread has in flight before its first store.
constexpr int kUnroll = 4;
// Runs at least this long are copied by a warp each, shorter ones by a thread each.
constexpr std::int64_t kWarpRunBytes = 256;
// The same for runs that are converted, in values: a thread takes these one by one.
constexpr std::int64_t kWarpRunItems = 32;

// Copies [from, from + bytes) with `lanes` cooperating threads of which this is number `lane`.
// Correct for any alignment of either side; destinations are written in 16-byte words wherever a
// whole word is inside. No byte outside the source range's own 4-byte words is read, and those are
// inside its allocation because allocations are aligned more coarsely.
__device__ __forceinline__ void copy_span(char* to, const char* from, std::int64_t bytes, int lane,
                                          int lanes) {
  std::int64_t head = static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(to) & 15);
  if (head > bytes) head = bytes;
  if (lane < head) to[lane] = from[lane];
  to += head;
  from += head;
  bytes -= head;
  auto* target = reinterpret_cast<uint4*>(to);
  std::int64_t words;
  const auto shift = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(from) & 3);
  if ((reinterpret_cast<std::uintptr_t>(from) & 15) == 0) {
    words = bytes >> 4;
    const auto* source = reinterpret_cast<const uint4*>(from);
    std::int64_t i = lane;
    for (; i + (kUnroll - 1) * lanes < words; i += kUnroll * lanes) {
      uint4 held[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) held[u] = source[i + u * lanes];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) target[i + u * lanes] = held[u];
    }
    for (; i < words; i += lanes) target[i] = source[i];
  } else if (shift == 0) {
    words = bytes >> 4;
    const auto* source = reinterpret_cast<const std::uint32_t*>(from);
#pragma unroll 2
    for (std::int64_t i = lane; i < words; i += lanes) {
      const std::uint32_t* at = source + 4 * i;
      target[i] = make_uint4(at[0], at[1], at[2], at[3]);
    }
  } else {
    // A 16-byte word of the destination straddles five aligned 4-byte words of the source; the last
    // of them must still hold a byte of the range.
    words = bytes + shift >= 20 ? (bytes + shift - 4) >> 4 : 0;
    const auto* source = reinterpret_cast<const std::uint32_t*>(from - shift);
    const unsigned bits = 8 * shift;
#pragma unroll 2
    for (std::int64_t i = lane; i < words; i += lanes) {
      const std::uint32_t* at = source + 4 * i;
      const std::uint32_t a = at[0], b = at[1], c = at[2], d = at[3], e = at[4];
      target[i] = make_uint4(__funnelshift_r(a, b, bits), __funnelshift_r(b, c, bits),
                             __funnelshift_r(c, d, bits), __funnelshift_r(d, e, bits));
    }
  }
  for (std::int64_t i = (words << 4) + lane; i < bytes; i += lanes) to[i] = from[i];
}

template <typename Word>
__device__ __forceinline__ void copy_words(std::uint64_t to, std::uint64_t from,
                                           std::int64_t bytes) {
  auto* target = reinterpret_cast<Word*>(to);
  const auto* source = reinterpret_cast<const Word*>(from);
  for (std::int64_t i = 0; i < bytes / static_cast<std::int64_t>(sizeof(Word)); ++i) {
    target[i] = source[i];
  }
}

// A short run by one thread, in the widest words that both addresses and the length allow.
__device__ __forceinline__ void copy_short_run(std::uint64_t to, std::uint64_t from,
                                               std::int64_t bytes) {
  const std::uint64_t bits = to | from | static_cast<std::uint64_t>(bytes);
  if ((bits & 15) == 0) {
    copy_words<uint4>(to, from, bytes);
  } else if ((bits & 7) == 0) {
    copy_words<uint2>(to, from, bytes);
  } else if ((bits & 3) == 0) {
    copy_words<std::uint32_t>(to, from, bytes);
  } else if ((bits & 1) == 0) {
    copy_words<std::uint16_t>(to, from, bytes);
  } else {
    copy_words<std::uint8_t>(to, from, bytes);
  }
}

__device__ __forceinline__ void copy_tile(const Segment& segment, const Bases& bases,
                                          const TileSpan& span) {
  if (span.runs == 1) {
    const RunAddress at = locate_run(segment, bases, span.first_run);
    copy_span(reinterpret_cast<char*>(at.destination + span.offset),
              reinterpret_cast<const char*>(at.source + span.offset), span.bytes,
              static_cast<int>(threadIdx.x), kThreads);
  } else if (span.bytes >= kWarpRunBytes) {
    const int lane = static_cast<int>(threadIdx.x) & 31;
    for (std::int64_t r = threadIdx.x >> 5; r < span.runs; r += kThreads / 32) {
      const RunAddress at = locate_run(segment, bases, span.first_run + r);
      copy_span(reinterpret_cast<char*>(at.destination), reinterpret_cast<const char*>(at.source),
                span.bytes, lane, 32);
    }
  } else {
    for (std::int64_t r = threadIdx.x; r < span.runs; r += kThreads) {
      const RunAddress at = locate_run(segment, bases, span.first_run + r);
      copy_short_run(at.destination, at.source, span.bytes);
    }
  }
}

template <typename Source, typename Destination>
__device__ __forceinline__ void convert_tile(const Segment& segment, const Bases& bases,
                                             const TileSpan& span) {
  constexpr auto kTo = static_cast<std::int64_t>(sizeof(Destination));
  constexpr auto kFrom = static_cast<std::int64_t>(sizeof(Source));
  const auto scale = static_cast<Arithmetic<Source, Destination>>(segment.scale);
  const std::int64_t items = span.bytes / kTo;
  if (span.runs == 1) {
    const RunAddress at = locate_run(segment, bases, span.first_run);
    convert_span<Source, Destination>(
        reinterpret_cast<char*>(at.destination + span.offset),
        reinterpret_cast<const char*>(at.source + span.offset / kTo * kFrom), items, scale,
        static_cast<int>(threadIdx.x), kThreads);
  } else if (items >= kWarpRunItems) {
    const int lane = static_cast<int>(threadIdx.x) & 31;
    for (std::int64_t r = threadIdx.x >> 5; r < span.runs; r += kThreads / 32) {
      const RunAddress at = locate_run(segment, bases, span.first_run + r);
      convert_span<Source, Destination>(reinterpret_cast<char*>(at.destination),
                                        reinterpret_cast<const char*>(at.source), items, scale,
                                        lane, 32);
    }
  } else {
    for (std::int64_t r = threadIdx.x; r < span.runs; r += kThreads) {
      const RunAddress at = locate_run(segment, bases, span.first_run + r);
      auto* to = reinterpret_cast<char*>(at.destination);
      const auto* from = reinterpret_cast<const char*>(at.source);
      for (std::int64_t i = 0; i < items; ++i) {
        convert_item<Source, Destination>(to + i * kTo, from + i * kFrom, scale);
      }
    }
  }
}

template <bool kConverts>
__device__ __forceinline__ void apply_tile(const Segment& segment, const Bases& bases,
                                           const TileSpan& span) {
  if constexpr (kConverts) {
    const auto conversion = static_cast<int>(segment.conversion);
    if (conversion != kCopyBytes) {
      with_types(conversion, [&](auto source, auto destination) {
        convert_tile<decltype(source), decltype(destination)>(segment, bases, span);
      });
      return;
    }
  }
  copy_tile(segment, bases, span);
}

// A tile of a run that is part of a digest; returns this thread's share of what it adds. Copied
// bytes are digested as they are read, from registers where both sides are aligned; converted ones
// as they were written, since that is what is sent or held.
template <bool kConverts>
__device__ __forceinline__ std::uint64_t apply_and_digest_tile(const Segment& segment,
                                                               const Bases& bases,
                                                               const TileSpan& span) {
  const auto word = static_cast<std::uint64_t>(segment.extent[kDigestWord] + span.offset / 8);
  const bool first = word == 0 && threadIdx.x == 0;
  std::uint64_t sum = first ? digest_of_length(segment.extent[kDigestBytes]) : 0;
  auto* to = reinterpret_cast<char*>(segment.destination + bases.destination + span.offset);
  if (kConverts && segment.conversion != kCopyBytes) {
    apply_tile<kConverts>(segment, bases, span);
    __syncthreads();  // other threads wrote what this one reads now
    return sum + digest_span(to, span.bytes, word);
  }
  const auto* from = reinterpret_cast<const char*>(segment.source + bases.source + span.offset);
  if (is_aligned(to, 16) && is_aligned(from, 16)) {
    return sum + digest_aligned<true>(from, to, span.bytes, word);
  }
  copy_span(to, from, span.bytes, static_cast<int>(threadIdx.x), kThreads);
  return sum + digest_span(from, span.bytes, word);
}

// With both conversions and digests there is no room for two blocks without spilling; beside NCCL,
// where that kernel mostly runs, there are fewer blocks than multiprocessors anyway.
template <bool kConverts, bool kDigests>
constexpr int kBlocksPerProcessor = (kConverts ? 1 : 0) + (kDigests ? 1 : 0) == 2 ? 1 : 2;

// Tables without conversions and runs without digests have kernels of their own, which need fewer
// registers.
template <bool kConverts, bool kDigests>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<kConverts, kDigests>)
    run_tiles(const Segment* __restrict__ segments, const std::int64_t* __restrict__ first_tiles,
              std::int64_t rows, std::int64_t tiles, std::int64_t tile_bytes, Bases bases,
              unsigned long long* digests) {
  for (std::int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const std::int64_t row = find_segment(first_tiles, rows, t);
    const Segment& segment = segments[row];
    const TileSpan span = locate_tile(segment, tile_bytes, t - first_tiles[row]);
    if constexpr (kDigests) {
      // The same for all threads of the block, which meet at barriers in there.
      if (segment.dims == 0 && segment.extent[kDigestNumber] != 0) {
        const std::uint64_t sum = apply_and_digest_tile<kConverts>(segment, bases, span);
        add_to_digest(sum, digests + segment.extent[kDigestNumber] - 1);
        continue;
      }
    }
    apply_tile<kConverts>(segment, bases, span);
  }
}

using Kernel = void (*)(const Segment*, const std::int64_t*, std::int64_t, std::int64_t,
                        std::int64_t, Bases, unsigned long long*);

Kernel kernel_of(bool converts, bool digests) {
  if (digests) return converts ? run_tiles<true, true> : run_tiles<false, true>;
  return converts ? run_tiles<true, false> : run_tiles<false, false>;
}

}  // namespace

void copy_on_cuda(const CopyTable& table, std::uint64_t uploaded, std::uint64_t buffer,
                  std::uint64_t digests, std::uint64_t stream, int blocks) {
  if (table.tiles() == 0) return;
  // Errors of earlier, unrelated calls must not be reported as this launch's.
  (void)cudaGetLastError();
  const Kernel kernel = kernel_of(table.converts(), digests != 0);
  std::int64_t grid =
      blocks > 0 ? blocks
                 : blocks_that_fill_device(reinterpret_cast<const void*>(kernel), kThreads);
  if (grid > table.tiles()) grid = table.tiles();
  const auto segments = static_cast<std::int64_t>(table.segments().size());
  const auto* rows = reinterpret_cast<const Segment*>(uploaded);
  const auto* first_tiles = reinterpret_cast<const std::int64_t*>(rows + segments);
  kernel<<<static_cast<unsigned>(grid), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      rows, first_tiles, segments, table.tiles(), table.tile_bytes(), table.bases(buffer),
      reinterpret_cast<unsigned long long*>(digests));
  check_cuda(cudaGetLastError(), "launch of the copy kernel");
}

}  // namespace packedcomm
