// One loop over words, written for AVX-512, for AVX2 and for any processor, and chosen at run time.
#include "digest_words_cpu.hpp"

#include <cstring>

#include "../common/error.hpp"
#include "digest.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
#define PACKEDCOMM_X86
// g++ 12 takes its own header's deliberately undefined vectors for mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace packedcomm {
namespace {

using DigestBytes = std::uint64_t (*)(const char*, std::int64_t, std::uint64_t);

// What doesn't fill a vector, and all of it elsewhere. Independent sums hide the multiplications'
// latency.
std::uint64_t digest_portable(const char* from, std::int64_t bytes, std::uint64_t index) {
  std::uint64_t sums[4] = {0, 0, 0, 0};
  std::uint64_t key = digest_key(index);
  std::uint64_t word;
  for (; bytes >= 32; bytes -= 32, from += 32) {
    for (auto& sum : sums) {
      std::memcpy(&word, from + 8 * (&sum - sums), 8);
      sum += scrambled(word ^ key);
      key += kDigestStep;
    }
  }
  std::uint64_t sum = sums[0] + sums[1] + sums[2] + sums[3];
  for (; bytes > 0; bytes -= 8, from += 8, key += kDigestStep) {
    word = 0;
    std::memcpy(&word, from, static_cast<std::size_t>(bytes < 8 ? bytes : 8));
    sum += scrambled(word ^ key);
  }
  return sum;
}

#ifdef PACKEDCOMM_X86
constexpr auto kFirst = static_cast<long long>(kDigestFirstFactor);
constexpr auto kSecond = static_cast<long long>(kDigestSecondFactor);
constexpr auto kStep = static_cast<long long>(kDigestStep);

#define PACKEDCOMM_AVX512 __attribute__((target("avx512f,avx512dq"), always_inline)) inline

PACKEDCOMM_AVX512 __m512i scrambled_8(__m512i x) {
  x = _mm512_mullo_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 30)), _mm512_set1_epi64(kFirst));
  x = _mm512_mullo_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 27)), _mm512_set1_epi64(kSecond));
  return _mm512_xor_si512(x, _mm512_srli_epi64(x, 31));
}

__attribute__((target("avx512f,avx512dq"))) std::uint64_t digest_avx512(const char* from,
                                                                        std::int64_t bytes,
                                                                        std::uint64_t index) {
  constexpr int kVectors = 4;
  constexpr std::int64_t kBytes = 64 * kVectors;
  __m512i sums[kVectors];
  __m512i keys[kVectors];
  const __m512i lanes =
      _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(kStep));
  for (int v = 0; v < kVectors; ++v) {
    sums[v] = _mm512_setzero_si512();
    const std::uint64_t first = digest_key(index + static_cast<std::uint64_t>(8 * v));
    keys[v] = _mm512_add_epi64(lanes, _mm512_set1_epi64(static_cast<long long>(first)));
  }
  const __m512i step = _mm512_set1_epi64(
      static_cast<long long>(static_cast<std::uint64_t>(8 * kVectors) * kDigestStep));
  std::int64_t done = 0;
  for (; done + kBytes <= bytes; done += kBytes) {
    for (int v = 0; v < kVectors; ++v) {
      const __m512i words = _mm512_loadu_si512(from + done + 64 * v);
      sums[v] = _mm512_add_epi64(sums[v], scrambled_8(_mm512_xor_si512(words, keys[v])));
      keys[v] = _mm512_add_epi64(keys[v], step);
    }
  }
  std::uint64_t parts[8];
  _mm512_storeu_si512(parts, _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]),
                                              _mm512_add_epi64(sums[2], sums[3])));
  std::uint64_t sum = 0;
  for (const std::uint64_t part : parts) sum += part;
  return sum +
         digest_portable(from + done, bytes - done, index + static_cast<std::uint64_t>(done / 8));
}

#define PACKEDCOMM_AVX2 __attribute__((target("avx2"), always_inline)) inline

// There is no 64-bit multiplication: the low half of the product is put together from three 32-bit
// ones.
PACKEDCOMM_AVX2 __m256i multiplied_4(__m256i x, std::uint64_t factor) {
  const __m256i low = _mm256_set1_epi64x(static_cast<long long>(factor & 0xffffffffu));
  const __m256i high = _mm256_set1_epi64x(static_cast<long long>(factor >> 32));
  const __m256i crossed =
      _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(x, 32), low), _mm256_mul_epu32(x, high));
  return _mm256_add_epi64(_mm256_mul_epu32(x, low), _mm256_slli_epi64(crossed, 32));
}

PACKEDCOMM_AVX2 __m256i scrambled_4(__m256i x) {
  x = multiplied_4(_mm256_xor_si256(x, _mm256_srli_epi64(x, 30)), kDigestFirstFactor);
  x = multiplied_4(_mm256_xor_si256(x, _mm256_srli_epi64(x, 27)), kDigestSecondFactor);
  return _mm256_xor_si256(x, _mm256_srli_epi64(x, 31));
}

__attribute__((target("avx2"))) std::uint64_t digest_avx2(const char* from, std::int64_t bytes,
                                                          std::uint64_t index) {
  constexpr int kVectors = 4;
  constexpr std::int64_t kBytes = 32 * kVectors;
  __m256i sums[kVectors];
  __m256i keys[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    sums[v] = _mm256_setzero_si256();
    long long first[4];
    for (int lane = 0; lane < 4; ++lane) {
      first[lane] =
          static_cast<long long>(digest_key(index + static_cast<std::uint64_t>(4 * v + lane)));
    }
    keys[v] = _mm256_setr_epi64x(first[0], first[1], first[2], first[3]);
  }
  const __m256i step = _mm256_set1_epi64x(
      static_cast<long long>(static_cast<std::uint64_t>(4 * kVectors) * kDigestStep));
  std::int64_t done = 0;
  for (; done + kBytes <= bytes; done += kBytes) {
    for (int v = 0; v < kVectors; ++v) {
      const __m256i words =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + done + 32 * v));
      sums[v] = _mm256_add_epi64(sums[v], scrambled_4(_mm256_xor_si256(words, keys[v])));
      keys[v] = _mm256_add_epi64(keys[v], step);
    }
  }
  std::uint64_t parts[4];
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(parts),
      _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3])));
  const std::uint64_t sum = parts[0] + parts[1] + parts[2] + parts[3];
  return sum +
         digest_portable(from + done, bytes - done, index + static_cast<std::uint64_t>(done / 8));
}
#endif

struct Path {
  const char* name;
  DigestBytes digest;
};

// The fastest first.
std::vector<Path> available() {
  std::vector<Path> paths;
#ifdef PACKEDCOMM_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) {
    paths.push_back({"avx512", digest_avx512});
  }
  if (__builtin_cpu_supports("avx2")) paths.push_back({"avx2", digest_avx2});
#endif
  paths.push_back({"portable", digest_portable});
  return paths;
}

// At load time, so that nothing is decided, or can fail, while digests are computed.
const DigestBytes kFastest = available().front().digest;

}  // namespace

std::uint64_t digest_bytes(const char* from, std::int64_t bytes, std::uint64_t index) noexcept {
  return kFastest(from, bytes, index);
}

std::vector<std::string> digest_paths() {
  std::vector<std::string> names;
  for (const Path& path : available()) names.emplace_back(path.name);
  return names;
}

std::uint64_t digest_bytes_by(const std::string& path, const char* from, std::int64_t bytes,
                              std::uint64_t index) {
  for (const Path& each : available()) {
    if (path == each.name) return each.digest(from, bytes, index);
  }
  throw Error(ErrorKind::kArgument, "this processor can't digest by '" + path + "'");
}

}  // namespace packedcomm
