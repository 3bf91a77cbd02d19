// How a tensor is walked: which range and which gate a value has, and which thread takes it.
//
// Values lie dense in memory. A range or a gate stands for `inner` neighbours and there are `count`
// of them, over and over: value i belongs to number (i / inner) % count. From both follow a `run`
// of neighbours that share everything, and the `period` of values after which it all repeats.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "fake_quantize.h"

#if defined(_OPENMP)
extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();
#endif

namespace {

constexpr int64_t kBlock = 2048;      // values summed in their own precision, then in doubles
constexpr int64_t kRows = 128;        // rows of columns likewise
constexpr int64_t kShortRun = 64;     // shorter runs are spread out into columns
constexpr int64_t kPeriod = 512;      // columns are repeated up to this period
constexpr int64_t kGrain = 32768;     // values for which one more thread pays

struct Shape {
  int64_t size, range_inner, ranges, gate_inner, gates;

  int64_t range(int64_t i) const { return (i / range_inner) % ranges; }
  int64_t gate(int64_t i) const { return (i / gate_inner) % gates; }
};

template <class W>
struct Inputs {
  const W* limits;
  const Gate* bits;
  const int32_t* adjacent;  // by bit-width, 0 to 32; null: no statistic
  bool is_signed;
  Shape shape;

  int32_t beside(int32_t bits) const { return adjacent ? adjacent[bits] : bits; }
};

// Runs `body(part, begin, end)` on stretches of [0, count), each a multiple of `unit` long. There
// may be fewer threads than asked for (OMP_THREAD_LIMIT, OMP_DYNAMIC): they take several parts then.
template <class Body>
void parallel(int64_t count, int64_t unit, int threads, const Body& body) {
  const int64_t units = (count + unit - 1) / unit;
  const int64_t each = (units + threads - 1) / threads * unit;
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    for (int t = omp_get_thread_num(); t * each < count; t += omp_get_num_threads())
      body(t, t * each, std::min(count, (t + 1) * each));
    return;
  }
#endif
  for (int t = 0; t * each < count; ++t) body(t, t * each, std::min(count, (t + 1) * each));
}

// RUNS: long runs that share everything. COLUMNS: short ones, repeated. ELEMENTS: no repetition.
enum class Mode { kRuns, kColumns, kElements };

struct Plan {
  Mode mode;
  int64_t run, period;
  int threads;
};

Plan plan_of(const Shape& s, int threads) {
  const int64_t range_span = s.ranges > 1 ? s.range_inner * s.ranges : 1;
  const int64_t gate_span = s.gates > 1 ? s.gate_inner * s.gates : 1;
  int64_t run = s.size, period = std::max(range_span, gate_span);
  if (s.ranges > 1) run = std::min(run, s.range_inner);
  if (s.gates > 1) run = std::min(run, s.gate_inner);
  Mode mode = Mode::kRuns;
  if (period > 1 && run < kShortRun) {
    mode = period == s.size ? Mode::kElements : Mode::kColumns;
    period *= std::max<int64_t>(1, kPeriod / period);
  }
  const int64_t useful = std::max<int64_t>(1, std::min<int64_t>(threads, s.size / kGrain));
  return {mode, run, std::max(period, run), static_cast<int>(useful)};
}

template <class W>
Place<W> place_of(const Inputs<W>& in, int64_t i) {
  using L = Vector<W>;
  const int32_t bits = in.bits[in.shape.gate(i)];
  return {typename L::V{} + in.limits[in.shape.range(i)], typename L::Bits{} + bits,
          typename L::Bits{} + in.beside(bits), in.is_signed};
}

template <class W>
inline bool own_gates(const Inputs<W>& in) {
  return in.shape.gates == in.shape.size;
}

// Of n values from number i on.
template <class W>
Place<W> place_from(const Inputs<W>& in, int64_t i, int64_t n) {
  using L = Vector<W>;
  const Shape& s = in.shape;
  typename L::V limit = typename L::V{} + 1;
  typename L::Bits bits{}, adjacent{};
  for (int64_t k = 0; k < n; ++k) {
    limit[k] = in.limits[s.range(i + k)];
    bits[k] = in.bits[s.gate(i + k)];
    adjacent[k] = in.beside(bits[k]);
  }
  return {limit, bits, adjacent, in.is_signed};
}

// Calls `body(begin, end, limit)` for neighbours that share a range, at most a block of them.
template <class W, class Body>
inline void each_range(const Inputs<W>& in, int64_t begin, int64_t end, const Body& body) {
  const Shape& s = in.shape;
  for (int64_t i = begin, stop; i < end; i = stop) {
    stop = std::min({end, i + kBlock, (i / s.range_inner + 1) * s.range_inner});
    body(i, stop, in.limits[s.range(i)]);
  }
}

template <class W>
INLINE typename Vector<W>::V rounded_or_not(typename Vector<W>::V v, const Place<W>& p) {
  return p.grids.pass ? v : rounded<W>(v, p.ends, p.grids.step);
}

// The grids of a period: one entry per run, or per vector of columns.
template <class W>
std::vector<Place<W>> table_of(const Inputs<W>& in, const Plan& plan) {
  std::vector<Place<W>> table;
  const int64_t lanes = Vector<W>::lanes;
  if (plan.mode == Mode::kRuns)
    for (int64_t i = 0; i < plan.period; i += plan.run) table.push_back(place_of(in, i));
  if (plan.mode == Mode::kColumns)
    for (int64_t i = 0; i < plan.period; i += lanes)
      table.push_back(place_from(in, i, std::min(lanes, plan.period - i)));
  return table;
}

}  // namespace
