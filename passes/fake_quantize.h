// Grids of passes/grid.py on vectors of values: rounding, gradients, reading and writing.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#define INLINE __attribute__((always_inline)) inline  // a call would pass vectors through memory

namespace {

constexpr int32_t kPassThrough = 32;  // passes/grid.py
constexpr int32_t kMaxGridBits = 16;  // passes/grid.py

template <class W>
struct Vector {
  static constexpr int64_t lanes = 64 / sizeof(W);
  using Int = std::conditional_t<sizeof(W) == 4, int32_t, int64_t>;
  typedef W V __attribute__((vector_size(64)));
  typedef Int M __attribute__((vector_size(64)));  // also what comparisons give
  typedef int32_t Bits __attribute__((vector_size(4 * lanes)));
  typedef uint16_t Half __attribute__((vector_size(2 * lanes)));
  typedef uint32_t Word __attribute__((vector_size(4 * lanes)));
};

using BFloat16 = uint16_t;  // its bits

template <class V, class T>
inline V read(const T* from, int64_t n) {
  V v{};
  if (n == int64_t(sizeof(V) / sizeof(T)))
    std::memcpy(&v, from, sizeof(V));
  else
    std::memcpy(&v, from, n * sizeof(T));
  return v;
}

template <class W, class T>
inline typename Vector<W>::V load(const T* x, int64_t n) {
  using L = Vector<W>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const auto half = read<typename L::Half>(x, n);
    return (typename L::V)(__builtin_convertvector(half, typename L::Word) << 16);
  } else {
    return read<typename L::V>(x, n);
  }
}

template <class V, class T>
inline void write(T* to, const V& v, int64_t n) {
  if (n == int64_t(sizeof(V) / sizeof(T)))
    std::memcpy(to, &v, sizeof(V));
  else
    std::memcpy(to, &v, n * sizeof(T));
}

template <class W, class T>
inline void store(T* to, typename Vector<W>::V v, int64_t n) {
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

template <class W>
inline double total(typename Vector<W>::V v) {
  double sum = 0;
  for (int64_t k = 0; k < Vector<W>::lanes; ++k) sum += v[k];
  return sum;
}

// The grids of one vector of values.
template <class W>
struct Grids {
  using L = Vector<W>;
  using V = typename L::V;
  using M = typename L::M;
  V step, high, step2, high2;  // of the bit-width and of the adjacent one
  V limit, share;              // share: step / limit, or 0 where the value does not depend on it
  M pass, pass2;

  INLINE void set(V beta, typename L::Bits bits, typename L::Bits adjacent, bool is_signed) {
    limit = beta;
    grid(bits, is_signed, step, high, pass);
    grid(adjacent, is_signed, step2, high2, pass2);
    const M pruned = __builtin_convertvector(bits, M) == 0;
    share = (pass | pruned) ? V{} : step * (1 / limit);
  }

  INLINE void grid(typename L::Bits bits, bool is_signed, V& a_step, V& a_high, M& passes) const {
    const M wide = __builtin_convertvector(bits, M);
    passes = wide >= kPassThrough;
    const M shift = wide > kMaxGridBits ? M{} + kMaxGridBits : wide;
    const M codes = ((M{} + 1) << shift) - 1;
    const M least = codes > 1 ? codes : M{} + 1;
    const M top = is_signed ? (codes > 1 ? codes - 1 : M{}) >> 1 : codes;
    a_high = __builtin_convertvector(top, V);
    a_step = (is_signed ? 2 * limit : limit) / __builtin_convertvector(least, V);
  }
};

template <class W>
inline typename Vector<W>::V nearest(typename Vector<W>::V code, typename Vector<W>::V high,
                                     bool is_signed) {
  using V = typename Vector<W>::V;
  const W magic = sizeof(W) == 4 ? W(12582912) : W(6755399441055744);  // 1.5 * 2^(mantissa bits)
  const V low = is_signed ? -high : V{};
  code = code < low ? low : code;
  code = code > high ? high : code;
  return (code + magic) - magic;  // rounds ties to even; codes are small integers
}

template <class W>
inline typename Vector<W>::V rounded(typename Vector<W>::V v, const Grids<W>& p, bool is_signed) {
  return p.pass ? v : nearest<W>(v / p.step, p.high, is_signed) * p.step;
}

template <class W>
struct Gradients {
  typename Vector<W>::V x, range, change;  // `range` still lacks the factor `share`
};

template <class W, bool kChange>
inline Gradients<W> gradients(typename Vector<W>::V up, typename Vector<W>::V v,
                              const Grids<W>& p, bool is_signed) {
  using V = typename Vector<W>::V;
  const V code = v / p.step;
  const V near = nearest<W>(code, p.high, is_signed);
  const auto within = (v >= (is_signed ? -p.limit : V{})) & (v <= p.limit);
  const V inside = (within | p.pass) ? V{} + 1 : V{};
  Gradients<W> found{up * inside, up * (near - code * inside), V{}};
  if (kChange) {
    const V here = p.pass ? v : near * p.step;
    const V there = p.pass2 ? v : nearest<W>(v / p.step2, p.high2, is_signed) * p.step2;
    const V change = (there - here) * up;
    found.change = change * change;
  }
  return found;
}

}  // namespace
