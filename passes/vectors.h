// Vectors of values: reading, writing, rounding, and what compilers do not find on their own.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define WITH_AVX 1
#else
#define WITH_AVX 0
#endif

#define ALWAYS __attribute__((always_inline))  // a call would pass vectors through memory
#define INLINE ALWAYS inline

namespace {

// As long as a register: what is longer, compilers take to pieces, which is ten times slower.
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif WITH_AVX
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

template <class W>
struct Vector {
  static constexpr int64_t lanes = kBytes / sizeof(W);
  using Int = std::conditional_t<sizeof(W) == 4, int32_t, int64_t>;
  typedef W V __attribute__((vector_size(kBytes)));
  typedef Int M __attribute__((vector_size(kBytes)));  // also what comparisons give
  typedef int32_t Bits __attribute__((vector_size(4 * lanes)));
  typedef uint16_t Half __attribute__((vector_size(2 * lanes)));
  typedef uint32_t Word __attribute__((vector_size(4 * lanes)));
};

using BFloat16 = uint16_t;  // its bits
using Gate = int8_t;        // a bit-width

template <class V, class T>
INLINE V read(const T* from, int64_t n) {
  V v{};
  if (n == int64_t(sizeof(V) / sizeof(T)))
    std::memcpy(&v, from, sizeof(V));
  else
    std::memcpy(&v, from, n * sizeof(T));
  return v;
}

template <class W, class T>
INLINE typename Vector<W>::V load(const T* x, int64_t n) {
  using L = Vector<W>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const auto half = read<typename L::Half>(x, n);
    return (typename L::V)(__builtin_convertvector(half, typename L::Word) << 16);
  } else {
    return read<typename L::V>(x, n);
  }
}

// Bit-widths from bytes; beyond the end they are 0.
template <class W>
INLINE typename Vector<W>::Bits widths_at(const Gate* from, int64_t n) {
  using Bits = typename Vector<W>::Bits;
  constexpr int64_t lanes = Vector<W>::lanes;
#if WITH_AVX
  if (sizeof(W) == 4 && n == lanes) {
#if defined(__AVX512F__)
    if constexpr (lanes == 16)
      return (Bits)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#else
    if constexpr (lanes == 8)
      return (Bits)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#endif
  }
#endif
  Bits found{};
  for (int64_t k = 0; k < n; ++k) found[k] = from[k];
  return found;
}

template <class V, class T>
INLINE void write(T* to, const V& v, int64_t n) {
  if (n == int64_t(sizeof(V) / sizeof(T)))
    std::memcpy(to, &v, sizeof(V));
  else
    std::memcpy(to, &v, n * sizeof(T));
}

template <class W, class T>
INLINE void store(T* to, typename Vector<W>::V v, int64_t n) {
  using L = Vector<W>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const auto wide = (typename L::Word)v;
    auto nearest = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    nearest = (typename L::Word)(v != v) ? typename L::Word{} + 0x7fc0 : nearest;
    write(to, __builtin_convertvector(nearest, typename L::Half), n);
  } else {
    write(to, v, n);
  }
}

// Calls `body(i, n)` for the vectors of [begin, end): n values from number i on.
template <class W, class Body>
INLINE void each_vector(int64_t begin, int64_t end, const Body& body) {
  const int64_t lanes = Vector<W>::lanes, whole = end - (end - begin) % lanes;
  for (int64_t i = begin; i < whole; i += lanes) body(i, lanes);
  if (whole < end) body(whole, end - whole);
}

template <class W>
INLINE double total(typename Vector<W>::V v) {
  double sum = 0;
  for (int64_t k = 0; k < Vector<W>::lanes; ++k) sum += v[k];
  return sum;
}

// `v` where `mask` is set, else 0.
template <class V, class M>
INLINE V where(M mask, V v) {
  return (V)(mask & (M)v);
}

// Within `low` and `high`; what is not a number stays so.
template <class V>
INLINE V clamped(V v, V low, V high) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vector<float>::V>)
    return (V)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)v));
  else
    return (V)_mm512_min_pd((__m512d)high, _mm512_max_pd((__m512d)low, (__m512d)v));
#elif WITH_AVX
  if constexpr (std::is_same_v<V, Vector<float>::V>)
    return (V)_mm256_min_ps((__m256)high, _mm256_max_ps((__m256)low, (__m256)v));
  else
    return (V)_mm256_min_pd((__m256d)high, _mm256_max_pd((__m256d)low, (__m256d)v));
#else
  v = v < low ? low : v;
  return v > high ? high : v;
#endif
}

constexpr bool kFused = WITH_AVX;

// a * b + c, rounded once if `kFused`.
template <class V>
INLINE V multiply_add(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vector<float>::V>)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else
    return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif WITH_AVX
  if constexpr (std::is_same_v<V, Vector<float>::V>)
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else
    return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

}  // namespace
