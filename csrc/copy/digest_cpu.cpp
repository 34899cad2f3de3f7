// Tiles on CPU threads; strided tensors are made contiguous a few kilobytes at a time.
#include "digest_cpu.hpp"

#include <algorithm>
#include <cstring>

#include "digest_words_cpu.hpp"
#include "thread_pool.hpp"
#include "tiling.hpp"

namespace packedcomm {
namespace {

// Below this the work is done before a sleeping thread wakes up.
constexpr std::int64_t kSerialBytes = 256 << 10;
constexpr std::int64_t kPieceBytes = 8 << 10;
static_assert(kDigestTileBytes % kPieceBytes == 0, "pieces begin at whole words");

template <std::size_t kBytes>
void gather_items(char* to, const char* from, std::int64_t stride, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * static_cast<std::int64_t>(kBytes), from + i * stride, kBytes);
  }
}

// `count` whole runs of one innermost dimension.
void gather_runs(char* to, const char* from, std::int64_t stride, std::int64_t run_bytes,
                 std::int64_t count) {
  switch (run_bytes) {
    case 1:
      return gather_items<1>(to, from, stride, count);
    case 2:
      return gather_items<2>(to, from, stride, count);
    case 4:
      return gather_items<4>(to, from, stride, count);
    case 8:
      return gather_items<8>(to, from, stride, count);
    default:
      for (std::int64_t i = 0; i < count; ++i) {
        std::memcpy(to + i * run_bytes, from + i * stride, static_cast<std::size_t>(run_bytes));
      }
  }
}

// Copies `bytes` bytes, from byte number `begin` of the row on.
void gather(const DigestRow& row, const DigestDim* dims, std::int64_t begin, std::int64_t bytes,
            char* to) {
  const DigestDim inner = dims[row.first_dim + row.dims - 1];
  while (bytes > 0) {
    const std::int64_t run = begin / row.run_bytes;
    const std::int64_t offset = begin - run * row.run_bytes;
    const auto* from = reinterpret_cast<const char*>(locate_run(row, dims, run));
    std::int64_t taken;
    if (offset != 0 || bytes < row.run_bytes) {
      taken = std::min(row.run_bytes - offset, bytes);
      std::memcpy(to, from + offset, static_cast<std::size_t>(taken));
    } else {
      const std::int64_t runs = std::min(inner.extent - run % inner.extent, bytes / row.run_bytes);
      gather_runs(to, from, inner.stride, row.run_bytes, runs);
      taken = runs * row.run_bytes;
    }
    to += taken;
    begin += taken;
    bytes -= taken;
  }
}

std::uint64_t digest_tile(const DigestRow& row, const DigestDim* dims, std::int64_t tile) {
  std::int64_t begin = tile * kDigestTileBytes;
  const std::int64_t end = std::min(begin + kDigestTileBytes, row.nbytes);
  std::uint64_t sum = tile == 0 ? digest_of_length(row.nbytes) : 0;
  if (row.dims == 0) {
    return sum + digest_bytes(reinterpret_cast<const char*>(row.address) + begin, end - begin,
                              static_cast<std::uint64_t>(begin / 8));
  }
  char piece[kPieceBytes];
  for (; begin < end; begin += kPieceBytes) {
    const std::int64_t bytes = std::min(kPieceBytes, end - begin);
    gather(row, dims, begin, bytes, piece);
    sum += digest_bytes(piece, bytes, static_cast<std::uint64_t>(begin / 8));
  }
  return sum;
}

}  // namespace

void digest_on_cpu(const DigestTable& table, std::uint64_t* digests, int threads) noexcept {
  const auto& first_tiles = table.first_tiles();
  const auto rows = static_cast<std::int64_t>(table.rows().size());
  // Neighbouring tiles are taken together: a task should be worth handing out.
  constexpr std::int64_t kTilesPerTask = 8;
  const std::int64_t tasks = (table.tiles() + kTilesPerTask - 1) / kTilesPerTask;
  parallel_for(tasks, table.nbytes() < kSerialBytes ? 1 : threads, [&](std::int64_t task) {
    const std::int64_t end = std::min((task + 1) * kTilesPerTask, table.tiles());
    for (std::int64_t tile = task * kTilesPerTask; tile < end; ++tile) {
      const auto found = static_cast<std::size_t>(find_segment(first_tiles.data(), rows, tile));
      const DigestRow& row = table.rows()[found];
      const std::uint64_t sum = digest_tile(row, table.dims().data(), tile - first_tiles[found]);
      __atomic_fetch_add(&digests[row.number], sum, __ATOMIC_RELAXED);
    }
  });
}

}  // namespace packedcomm
