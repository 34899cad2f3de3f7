// Tiles on CPU threads: memcpy for runs, typed loops for single elements and conversions, streaming
// stores for copies that no cache would hold.
#include "copy_cpu.hpp"

#include <cstring>

#include "convert_cpu.hpp"
#include "digest.hpp"
#include "digest_words_cpu.hpp"
#include "thread_pool.hpp"
#include "tiling.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace packedcomm {
namespace {

// Below this a copy is done before a sleeping thread wakes up.
constexpr std::int64_t kSerialBytes = 256 << 10;
// From this size on the destination won't be read from a cache, and writing around it saves reading
// every destination line first.
constexpr std::int64_t kStreamingBytes = 64 << 20;

// What is digested right after it was copied, while the first cache still holds it.
constexpr std::int64_t kDigestPieceBytes = 16 << 10;

using CopyRun = void (*)(char*, const char*, std::int64_t);

void copy_run_cached(char* to, const char* from, std::int64_t bytes) {
  std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

#if defined(__SSE2__)
void copy_run_streaming(char* to, const char* from, std::int64_t bytes) {
  const std::int64_t head = static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(to) & 63);
  if (bytes < head + 256) {
    copy_run_cached(to, from, bytes);
    return;
  }
  copy_run_cached(to, from, head);
  to += head;
  from += head;
  bytes -= head;
  for (; bytes >= 64; bytes -= 64, to += 64, from += 64) {
    const auto* source = reinterpret_cast<const __m128i*>(from);
    auto* target = reinterpret_cast<__m128i*>(to);
    const __m128i a = _mm_loadu_si128(source);
    const __m128i b = _mm_loadu_si128(source + 1);
    const __m128i c = _mm_loadu_si128(source + 2);
    const __m128i d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, a);
    _mm_stream_si128(target + 1, b);
    _mm_stream_si128(target + 2, c);
    _mm_stream_si128(target + 3, d);
  }
  copy_run_cached(to, from, bytes);
}
void finish_streaming() { _mm_sfence(); }
#else
void copy_run_streaming(char* to, const char* from, std::int64_t bytes) {
  copy_run_cached(to, from, bytes);
}
void finish_streaming() {}
#endif

template <std::size_t kBytes>
void copy_items(char* to, std::int64_t to_stride, const char* from, std::int64_t from_stride,
                std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * to_stride, from + i * from_stride, kBytes);
  }
}

void copy_row(char* to, std::int64_t to_stride, const char* from, std::int64_t from_stride,
              std::int64_t count, std::int64_t run_bytes, CopyRun copy_run) {
  switch (run_bytes) {
    case 1:
      return copy_items<1>(to, to_stride, from, from_stride, count);
    case 2:
      return copy_items<2>(to, to_stride, from, from_stride, count);
    case 4:
      return copy_items<4>(to, to_stride, from, from_stride, count);
    case 8:
      return copy_items<8>(to, to_stride, from, from_stride, count);
    case 16:
      return copy_items<16>(to, to_stride, from, from_stride, count);
    default:
      for (std::int64_t i = 0; i < count; ++i) {
        copy_run(to + i * to_stride, from + i * from_stride, run_bytes);
      }
  }
}

void copy_tile(const Segment& segment, const Bases& bases, std::int64_t tile_bytes,
               std::int64_t index, CopyRun copy_run) {
  const TileSpan span = locate_tile(segment, tile_bytes, index);
  const auto conversion = static_cast<int>(segment.conversion);
  const ConvertRow convert_row = conversion == kCopyBytes ? nullptr : convert_row_of(conversion);
  const std::int64_t items =
      convert_row == nullptr ? 0 : span.bytes / destination_item_bytes(conversion);
  if (segment.dims == 0 || span.runs == 1) {
    const RunAddress at = locate_run(segment, bases, span.first_run);
    auto* to = reinterpret_cast<char*>(at.destination) + span.offset;
    const auto* from =
        reinterpret_cast<const char*>(at.source) + source_bytes_of(conversion, span.offset);
    if (convert_row != nullptr) {
      convert_row(to, 0, from, 0, 1, items, segment.scale);
    } else {
      copy_run(to, from, span.bytes);
    }
    return;
  }
  // Whole runs: one row of the innermost dimension at a time.
  const auto last = static_cast<int>(segment.dims) - 1;
  const std::int64_t extent = segment.extent[last];
  std::int64_t run = span.first_run;
  const std::int64_t end = span.first_run + span.runs;
  while (run < end) {
    const RunAddress at = locate_run(segment, bases, run);
    auto* to = reinterpret_cast<char*>(at.destination);
    const auto* from = reinterpret_cast<const char*>(at.source);
    const std::int64_t left_in_row = extent - run % extent;
    const std::int64_t count = left_in_row < end - run ? left_in_row : end - run;
    if (convert_row != nullptr) {
      convert_row(to, segment.destination_stride[last], from, segment.source_stride[last], count,
                  items, segment.scale);
    } else {
      copy_row(to, segment.destination_stride[last], from, segment.source_stride[last], count,
               segment.run_bytes, copy_run);
    }
    run += count;
  }
}

// A tile of a run that is part of a digest: of the bytes that are copied, as they are read; of
// converted ones as they are written, since that is what is sent or held.
void copy_digested_tile(const Segment& segment, const Bases& bases, std::int64_t tile_bytes,
                        std::int64_t index, CopyRun copy_run, std::uint64_t* digests) {
  const TileSpan span = locate_tile(segment, tile_bytes, index);
  const auto conversion = static_cast<int>(segment.conversion);
  const ConvertRow convert_row = conversion == kCopyBytes ? nullptr : convert_row_of(conversion);
  auto* to = reinterpret_cast<char*>(segment.destination + bases.destination) + span.offset;
  const auto* from = reinterpret_cast<const char*>(segment.source + bases.source) +
                     source_bytes_of(conversion, span.offset);
  auto word = static_cast<std::uint64_t>(segment.extent[kDigestWord] + span.offset / 8);
  std::uint64_t sum = word == 0 ? digest_of_length(segment.extent[kDigestBytes]) : 0;
  for (std::int64_t left = span.bytes; left > 0; left -= kDigestPieceBytes) {
    const std::int64_t bytes = left < kDigestPieceBytes ? left : kDigestPieceBytes;
    if (convert_row != nullptr) {
      convert_row(to, 0, from, 0, 1, bytes / destination_item_bytes(conversion), segment.scale);
      sum += digest_bytes(to, bytes, word);
    } else {
      copy_run(to, from, bytes);
      sum += digest_bytes(from, bytes, word);
    }
    to += bytes;
    from += source_bytes_of(conversion, bytes);
    word += kDigestPieceBytes / 8;
  }
  __atomic_fetch_add(&digests[segment.extent[kDigestNumber] - 1], sum, __ATOMIC_RELAXED);
}

}  // namespace

void copy_on_cpu(const CopyTable& table, std::uint64_t buffer, std::uint64_t* digests,
                 int threads) noexcept {
  const Bases bases = table.bases(buffer);
  const bool streaming = table.nbytes() >= kStreamingBytes;
  const CopyRun copy_run = streaming ? copy_run_streaming : copy_run_cached;
  const auto& segments = table.segments();
  const auto& first_tiles = table.first_tiles();
  // Neighbouring tiles are taken together: a task should be worth handing out even when the
  // tensors are tiny.
  constexpr std::int64_t kTilesPerTask = 4;
  const std::int64_t count = table.tiles();
  const std::int64_t tasks = (count + kTilesPerTask - 1) / kTilesPerTask;
  parallel_for(tasks, table.nbytes() < kSerialBytes ? 1 : threads, [&](std::int64_t task) {
    std::int64_t tile = task * kTilesPerTask;
    const std::int64_t end = tile + kTilesPerTask < count ? tile + kTilesPerTask : count;
    auto row = static_cast<std::size_t>(
        find_segment(first_tiles.data(), static_cast<std::int64_t>(segments.size()), tile));
    for (; tile < end; ++tile) {
      if (row + 1 < segments.size() && first_tiles[row + 1] <= tile) ++row;
      const Segment& segment = segments[row];
      const std::int64_t index = tile - first_tiles[row];
      if (digests != nullptr && segment.dims == 0 && segment.extent[kDigestNumber] != 0) {
        copy_digested_tile(segment, bases, table.tile_bytes(), index, copy_run, digests);
      } else {
        copy_tile(segment, bases, table.tile_bytes(), index, copy_run);
      }
    }
    // Streaming stores are weakly ordered: they must be visible before another thread is told.
    if (streaming) finish_streaming();
  });
}

}  // namespace packedcomm
