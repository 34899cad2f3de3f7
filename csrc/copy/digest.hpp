// The digest of a tensor's bytes: a sum over words, so that any number of threads make the same
// one.
#pragma once

#include <cstdint>

#include "convert.hpp"

namespace packedcomm {

// Bytes that one tile digests, and the words in them.
constexpr std::int64_t kDigestTileBytes = 64 << 10;
constexpr std::int64_t kDigestTileWords = kDigestTileBytes / 8;

constexpr std::uint64_t kDigestFirstFactor = 0xbf58476d1ce4e5b9u;
constexpr std::uint64_t kDigestSecondFactor = 0x94d049bb133111ebu;
// 2^64 divided by the golden ratio, as in SplitMix64.
constexpr std::uint64_t kDigestStep = 0x9e3779b97f4a7c15u;

// A bijection of 64-bit numbers in which every bit of the input changes about half of those of the
// output: the output function of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom
// number generators", 2014).
PACKEDCOMM_HOST_DEVICE std::uint64_t scrambled(std::uint64_t x) {
  x = (x ^ (x >> 30)) * kDigestFirstFactor;
  x = (x ^ (x >> 27)) * kDigestSecondFactor;
  return x ^ (x >> 31);
}

// What word number `index`, counted from 0, is combined with; the next word's is kDigestStep more.
PACKEDCOMM_HOST_DEVICE std::uint64_t digest_key(std::uint64_t index) {
  return (index + 1) * kDigestStep;
}

// What word number `index` adds to the digest. A bijection of the word, so a change of one word is
// always seen; the position goes in before the scrambling, so words that change places are seen as
// well.
PACKEDCOMM_HOST_DEVICE std::uint64_t digest_of_word(std::uint64_t word, std::uint64_t index) {
  return scrambled(word ^ digest_key(index));
}

// What the number of bytes adds to the digest: zeros of different lengths differ.
PACKEDCOMM_HOST_DEVICE std::uint64_t digest_of_length(std::int64_t nbytes) {
  return scrambled(static_cast<std::uint64_t>(nbytes) + kDigestStep);
}

// One tensor: runs of `run_bytes` contiguous bytes, repeated over `dims` outer dimensions in
// row-major order. The layout is read by host and device alike.
struct DigestRow {
  std::uint64_t address;
  std::int64_t number;  // of the digest that it is added to
  std::int64_t nbytes;
  std::int64_t run_bytes;
  std::int64_t first_dim;  // where its dimensions begin among those of all rows
  std::int64_t dims;
};

struct DigestDim {
  std::int64_t extent;
  std::int64_t stride;  // in bytes
};

// a / b of numbers that aren't negative. A 32-bit division is several times cheaper on a GPU.
PACKEDCOMM_HOST_DEVICE std::int64_t quotient_of(std::int64_t a, std::int64_t b) {
  if (((a | b) >> 32) != 0) return a / b;
  return static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b);
}

// The address of the run-th run in row-major order.
PACKEDCOMM_HOST_DEVICE std::uint64_t locate_run(const DigestRow& row, const DigestDim* dims,
                                                std::int64_t run) {
  std::uint64_t address = row.address;
  for (std::int64_t d = row.dims - 1; d > 0; --d) {
    const DigestDim dim = dims[row.first_dim + d];
    const std::int64_t quotient = quotient_of(run, dim.extent);
    address += static_cast<std::uint64_t>((run - quotient * dim.extent) * dim.stride);
    run = quotient;
  }
  if (row.dims > 0) address += static_cast<std::uint64_t>(run * dims[row.first_dim].stride);
  return address;
}

}  // namespace packedcomm
