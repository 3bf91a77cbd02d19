// Grids of passes/grid.py on vectors of values: steps, rounding, gradients.

#pragma once

#include <limits>

#include "vectors.h"

namespace {

constexpr int32_t kPassThrough = 32;  // passes/grid.py
constexpr int32_t kMaxGridBits = 16;  // passes/grid.py

// The steps of ranges; at 0 bits so wide that every code is 0.
template <class W>
INLINE typename Vector<W>::V steps_of(typename Vector<W>::V limit, typename Vector<W>::Bits bits,
                                      bool is_signed) {
  using V = typename Vector<W>::V;
  using M = typename Vector<W>::M;
  const V width = is_signed ? 2 * limit : limit;
  const M wide = __builtin_convertvector(bits, M);
  const M codes = ((M{} + 1) << (wide > kMaxGridBits ? M{} + kMaxGridBits : wide)) - 1;
  const V step = width / __builtin_convertvector(codes > 1 ? codes : M{} + 1, V);
  return codes > 0 ? step : 4 * width;
}

// By bit-width: by how many intervals its step divides the width of a range, in 16 places. At 0
// bits so few that every code is 0; negative, so that the step is, where values pass through.
template <class W>
struct Intervals {
  W at[16] = {0.25, 65535, 3,    7,    15,   31,   63,    127,
              255,  511,   1023, 2047, 4095, 8191, 16383, 32767};  // 0, 16, 2 to 15 bits
  W passed = -1;                                                   // 32 bits

  // Those of the bit-widths that are adjacent to these.
  Intervals beside(const int32_t* adjacent) const {
    Intervals found;
    for (int32_t k = 0; k < 16; ++k) found.at[k] = of(adjacent[k == 1 ? 16 : k]);
    found.passed = of(adjacent[kPassThrough]);
    return found;
  }

  W of(int32_t bits) const { return bits >= kPassThrough ? passed : at[(bits + (bits >> 4)) & 15]; }

};

// The steps of one range at many bit-widths: looked up, where there is an instruction for it.
template <class W>
struct Steps {
  using V = typename Vector<W>::V;
  using Bits = typename Vector<W>::Bits;
  static constexpr int64_t lanes = Vector<W>::lanes;
  static constexpr bool kTable = WITH_AVX && sizeof(W) == 4;
  V table[16 / lanes];
  V passed;

  INLINE Steps(W limit, bool is_signed, const Intervals<W>& intervals) {
    const V width = V{} + (is_signed ? 2 * limit : limit);
    for (int64_t k = 0; k < 16 / lanes; ++k)
      table[k] = width / read<V>(intervals.at + k * lanes, lanes);
    passed = width / intervals.passed;
  }

  // Of at most 16 bits.
  INLINE V at(Bits bits) const {
    const Bits place = bits + (bits >> 4);  // of which the last four bits count
#if WITH_AVX
    if constexpr (kTable) {
#if defined(__AVX512F__)
      return (V)_mm512_permutexvar_ps((__m512i)place, (__m512)table[0]);
#else
      const auto few = _mm256_permutevar8x32_ps((__m256)table[0], (__m256i)place);
      const auto many = _mm256_permutevar8x32_ps((__m256)table[1], (__m256i)place);
      return (V)_mm256_blendv_ps(few, many, (__m256)(place << 28));
#endif
    }
#endif
    V found{};
    for (int64_t k = 0; k < lanes; ++k) found[k] = table[(place[k] & 15) / lanes][place[k] % lanes];
    return found;
  }
};

// Ends of the range of one vector of values. Beyond `bottom` and `top` all values have the last
// code, on every grid of the range: they lie just within its ends, as half a step beyond the last
// code of a signed grid lies the end of the range, and would round to the code behind it.
template <class W>
struct Ends {
  using V = typename Vector<W>::V;
  V low, high, bottom, top;

  INLINE Ends(V limit, bool is_signed) : low(V{}), high(limit), bottom(V{}), top(limit) {
    if (!is_signed) return;
    low = -limit;
    top = limit * (1 - 4 * std::numeric_limits<W>::epsilon());  // quotients err by less
    bottom = -top;
  }
};

// The grids of one vector of values: of the bit-widths and of the adjacent ones.
template <class W>
struct Grids {
  using L = Vector<W>;
  using V = typename L::V;
  using M = typename L::M;
  V step, step2;
  M pass, pass2, ranged;  // `ranged`: the rounded value depends on the range

  INLINE Grids(V step, V step2, M widths, M pass2) : step(step), step2(step2), pass2(pass2) {
    pass = widths >= kPassThrough;
    ranged = (widths > 0) & ~pass;
  }
};

// A range and its grids.
template <class W>
struct Place {
  using L = Vector<W>;
  Ends<W> ends;
  Grids<W> grids;

  INLINE Place(typename L::V limit, typename L::Bits bits, typename L::Bits adjacent,
               bool is_signed)
      : ends(limit, is_signed),
        grids(steps_of<W>(limit, bits, is_signed), steps_of<W>(limit, adjacent, is_signed),
              __builtin_convertvector(bits, typename L::M),
              __builtin_convertvector(adjacent, typename L::M) >= kPassThrough) {}
};

template <class W>
INLINE typename Vector<W>::V nearest(typename Vector<W>::V code) {
  const W magic = sizeof(W) == 4 ? W(12582912) : W(6755399441055744);  // 1.5 * 2^(mantissa bits)
  return (code + magic) - magic;  // rounds ties to even; codes are small integers
}

template <class W>
INLINE typename Vector<W>::V rounded(typename Vector<W>::V v, const Ends<W>& ends,
                                     typename Vector<W>::V step) {
  return nearest<W>(clamped(v, ends.bottom, ends.top) / step) * step;
}

// What one vector of values gives: its gradient, and what it adds to the sums of ranges, times
// `weight`, and of gates.
template <class W, bool kChange>
INLINE typename Vector<W>::V gradients(typename Vector<W>::V up, typename Vector<W>::V v,
                                       const Ends<W>& ends, const Grids<W>& p,
                                       typename Vector<W>::V weight,
                                       typename Vector<W>::V& range,
                                       typename Vector<W>::V& change) {
  using V = typename Vector<W>::V;
  const V bound = clamped(v, ends.bottom, ends.top);
  const V code = bound / p.step, near = nearest<W>(code);
  const auto inside = ((v >= ends.low) & (v <= ends.high)) | p.pass;
  range = multiply_add(up, where(p.ranged, (near - where(inside, code)) * weight), range);
  if (kChange) {
    const V here = p.pass ? v : near * p.step;
    const V there = p.pass2 ? v : nearest<W>(bound / p.step2) * p.step2;
    const V moved = (there - here) * up;
    change = multiply_add(moved, moved, change);
  }
  return where(inside, up);
}

// The same with weight 1 where nothing passes through. The codes only go into sums here, so that of
// the adjacent grid is found without a second division: by a product with the reciprocal of the
// step, corrected by what it leaves over.
template <class W, bool kChange>
INLINE typename Vector<W>::V gradients_on_grids(typename Vector<W>::V up, typename Vector<W>::V v,
                                                const Ends<W>& ends, const Grids<W>& p,
                                                typename Vector<W>::V inverse2,
                                                typename Vector<W>::V& range,
                                                typename Vector<W>::V& change) {
  using V = typename Vector<W>::V;
  const V bound = clamped(v, ends.bottom, ends.top);
  const V code = bound / p.step, near = nearest<W>(code);
  const auto inside = (v >= ends.low) & (v <= ends.high);
  range = multiply_add(up, near - where(inside, code), range);
  if (kChange) {
    V code2 = bound * inverse2;
    code2 = kFused ? multiply_add(multiply_add(-code2, p.step2, bound), inverse2, code2)
                   : bound / p.step2;
    const V moved = multiply_add(nearest<W>(code2), p.step2, -near * p.step) * up;
    change = multiply_add(moved, moved, change);
  }
  return where(inside, up);
}

}  // namespace
