// One kernel for all tensors: a persistent grid walks the tiles, and each block adds the sum of one
// to its tensor's digest.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_check.hpp"
#include "digest_cuda.cuh"
#include "digest_cuda.hpp"
#include "tiling.hpp"

namespace packedcomm {
namespace {

// A word of a strided row, whose bytes may come from several runs.
__device__ __forceinline__ std::uint64_t gather_word(const DigestRow& row, const DigestDim* dims,
                                                     std::int64_t index) {
  const std::int64_t begin = index * 8;
  const std::int64_t bytes = row.nbytes - begin < 8 ? row.nbytes - begin : 8;
  std::int64_t run = quotient_of(begin, row.run_bytes);
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

// This thread's share of a tile of a strided row.
__device__ __forceinline__ std::uint64_t digest_strided(const DigestRow& row, const DigestDim* dims,
                                                        std::int64_t begin, std::int64_t bytes) {
  std::uint64_t sum = 0;
  if (row.run_bytes % 16 != 0) {
    const std::int64_t end = (begin + bytes + 7) / 8;
    for (std::int64_t i = begin / 8 + threadIdx.x; i < end; i += kDigestThreads) {
      sum += digest_of_word(gather_word(row, dims, i), static_cast<std::uint64_t>(i));
    }
    return sum;
  }
  // Neither a tile nor a run ends inside of 16 bytes.
  for (std::int64_t at = begin + 16 * static_cast<std::int64_t>(threadIdx.x); at < begin + bytes;
       at += 16 * kDigestThreads) {
    const std::int64_t run = quotient_of(at, row.run_bytes);
    const auto* from =
        reinterpret_cast<const char*>(locate_run(row, dims, run)) + (at - run * row.run_bytes);
    const bool aligned = (reinterpret_cast<std::uintptr_t>(from) & 15) == 0;
    const Words<4> words = aligned ? load_aligned<4>(from) : load_shifted<4>(from);
    sum += digest_of_pair(words, digest_key(static_cast<std::uint64_t>(at / 8)));
  }
  return sum;
}

__global__ void __launch_bounds__(kDigestThreads, 2)
    digest_tiles(const DigestRow* __restrict__ rows, const std::int64_t* __restrict__ first_tiles,
                 const DigestDim* __restrict__ dims, std::int64_t count, std::int64_t tiles,
                 unsigned long long* __restrict__ digests) {
  for (std::int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const std::int64_t found = find_segment(first_tiles, count, t);
    const DigestRow& row = rows[found];
    const std::int64_t begin = (t - first_tiles[found]) * kDigestTileBytes;
    const std::int64_t left = row.nbytes - begin;
    const std::int64_t bytes = left < kDigestTileBytes ? left : kDigestTileBytes;
    std::uint64_t sum = begin == 0 && threadIdx.x == 0 ? digest_of_length(row.nbytes) : 0;
    if (row.dims == 0) {
      sum += digest_span(reinterpret_cast<const char*>(row.address) + begin, bytes,
                         static_cast<std::uint64_t>(begin / 8));
    } else {
      sum += digest_strided(row, dims, begin, bytes);
    }
    add_to_digest(sum, digests + row.number);
  }
}

}  // namespace

void digest_on_cuda(const DigestTable& table, std::uint64_t uploaded, std::uint64_t digests,
                    std::uint64_t stream, int blocks) {
  const auto count = static_cast<std::int64_t>(table.rows().size());
  if (count == 0) return;
  // Errors of earlier, unrelated calls must not be reported as this launch's.
  (void)cudaGetLastError();
  const auto* rows = reinterpret_cast<const DigestRow*>(uploaded);
  const auto* first_tiles = reinterpret_cast<const std::int64_t*>(rows + count);
  const auto* dims = reinterpret_cast<const DigestDim*>(first_tiles + count);
  std::int64_t grid = blocks > 0 ? blocks
                                 : blocks_that_fill_device(
                                       reinterpret_cast<const void*>(digest_tiles), kDigestThreads);
  if (grid > table.tiles()) grid = table.tiles();
  digest_tiles<<<static_cast<unsigned>(grid), kDigestThreads, 0,
                 reinterpret_cast<cudaStream_t>(stream)>>>(
      rows, first_tiles, dims, count, table.tiles(),
      reinterpret_cast<unsigned long long*>(digests));
  check_cuda(cudaGetLastError(), "launch of the digest kernel");
}

}  // namespace packedcomm
