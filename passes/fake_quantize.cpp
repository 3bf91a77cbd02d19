// The fake-quantize kernel for the CPU: one pass forward, one pass backward, any granularity.
//
// A plain C interface without headers of PyTorch: it builds in seconds with GCC or Clang, whose
// vector extensions make the loops fast on any instruction set. `passes/kernel.py` has the
// definition in PyTorch; `tests/test_native.py` compares the two.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "fake_quantize.h"
#include "walk.h"

namespace {

template <class T, class W>
void forward_run(const T* x, T* y, int64_t n, const Place<W>& p) {
  const Ends<W> ends = p.ends;
  const auto step = p.grids.step;
  if (p.grids.pass[0]) {
    std::memcpy(y, x, n * sizeof(T));
    return;
  }
  each_vector<W>(0, n, [&](int64_t i, int64_t count) ALWAYS {
    store<W>(y + i, rounded<W>(load<W>(x + i, count), ends, step), count);
  });
}

// Of n values that share a range and have a gate each.
template <class T, class W>
void forward_gates(const T* x, T* y, const Gate* bits, int64_t n, W limit, bool is_signed) {
  using L = Vector<W>;
  const Ends<W> ends(typename L::V{} + limit, is_signed);
  const Steps<W> steps(limit, is_signed, {});
  each_vector<W>(0, n, [&](int64_t i, int64_t count) ALWAYS {
    const auto widths = widths_at<W>(bits + i, count);
    const auto v = load<W>(x + i, count);
    const auto pass = __builtin_convertvector(widths, typename L::M) >= kPassThrough;
    store<W>(y + i, pass ? v : rounded<W>(v, ends, steps.at(widths)), count);
  });
}

template <class T, class W>
void forward(const Inputs<W>& in, const T* x, T* y, int threads) {
  const Plan plan = plan_of(in.shape, threads);
  const auto table = table_of(in, plan);
  const int64_t lanes = Vector<W>::lanes;
  const auto runs = [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin, next; i < end; i = next) {
      next = std::min(end, (i / plan.run + 1) * plan.run);
      forward_run(x + i, y + i, next - i, table[i % plan.period / plan.run]);
    }
  };
  const auto columns = [&](int, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += plan.period)
      for (int64_t i = row, to = std::min(end, row + plan.period); i < to; i += lanes) {
        const int64_t n = std::min(lanes, to - i);
        store<W>(y + i, rounded_or_not<W>(load<W>(x + i, n), table[(i - row) / lanes]), n);
      }
  };
  const auto elements = [&](int, int64_t begin, int64_t end) {
    each_range(in, begin, end, [&](int64_t from, int64_t to, W limit) {
      if (own_gates(in))
        return forward_gates(x + from, y + from, in.bits + from, to - from, limit, in.is_signed);
      for (int64_t i = from; i < to; i += lanes) {
        const int64_t n = std::min(lanes, to - i);
        store<W>(y + i, rounded_or_not<W>(load<W>(x + i, n), place_from(in, i, n)), n);
      }
    });
  };
  if (plan.mode == Mode::kRuns) parallel(in.shape.size, kBlock, plan.threads, runs);
  if (plan.mode == Mode::kColumns) parallel(in.shape.size, plan.period, plan.threads, columns);
  if (plan.mode == Mode::kElements) parallel(in.shape.size, kBlock, plan.threads, elements);
}

// Sums of every part, added up at the end in the order of the parts: of the ranges, of the gates,
// and, where every value has a gate, of their highest codes.
struct Sums {
  int64_t ranges, gates;
  std::vector<std::vector<double>> rows;

  double* of(int thread) {
    rows[thread].resize(ranges + gates + 1);
    return rows[thread].data();
  }

  double at(int64_t i) const {
    double sum = 0;
    for (const auto& row : rows) sum += row.empty() ? 0 : row[i];
    return sum;
  }
};

// Whether the grids of a run allow `gradients_on_grids`.
template <class W>
bool plain(const Grids<W>& p) {
  const W step = p.step2[0];
  return !p.pass[0] && !p.pass2[0] && step > W(1e-30) && step < W(1e30);
}

// Adds the sums of a run to `range` and `change`.
template <class T, class W, bool kChange, bool kPlain>
void backward_run(const T* g, const T* x, T* out, int64_t n, const Place<W>& p, double& range,
                  double& change) {
  using V = typename Vector<W>::V;
  const Ends<W> ends = p.ends;
  const Grids<W> grids = p.grids;
  const V inverse2 = 1 / grids.step2;
  for (int64_t start = 0; start < n; start += kBlock) {
    V ranges{}, changes{};
    each_vector<W>(start, std::min(n, start + kBlock), [&](int64_t i, int64_t count) ALWAYS {
      const V up = load<W>(g + i, count), v = load<W>(x + i, count);
      if constexpr (kPlain)
        store<W>(out + i,
                 gradients_on_grids<W, kChange>(up, v, ends, grids, inverse2, ranges, changes),
                 count);
      else
        store<W>(out + i, gradients<W, kChange>(up, v, ends, grids, V{} + 1, ranges, changes), count);
    });
    range += total<W>(ranges) * grids.step[0];
    if (kChange) change += total<W>(changes);
  }
}

template <class T, class W, bool kChange>
struct Backward {
  using V = typename Vector<W>::V;
  const Inputs<W>& in;
  const T *g, *x;
  T* out;
  W* reported;  // written here where every value has a gate
  Sums& sums;
  Plan plan;
  std::vector<Place<W>> table;
  Intervals<W> beside;  // of the adjacent bit-widths

  static constexpr int64_t lanes = Vector<W>::lanes;

  void runs(int thread, int64_t begin, int64_t end) const {
    double* mine = sums.of(thread);
    for (int64_t i = begin, next; i < end; i = next) {
      next = std::min(end, (i / plan.run + 1) * plan.run);
      const Place<W>& p = table[i % plan.period / plan.run];
      double range = 0, change = 0;
      const auto run = plain(p.grids) ? backward_run<T, W, kChange, true>
                                : backward_run<T, W, kChange, false>;
      run(g + i, x + i, out + i, next - i, p, range, change);
      if (p.grids.ranged[0]) mine[in.shape.range(i)] += range;
      if (kChange) mine[sums.ranges + in.shape.gate(i)] += change;
    }
  }

  void columns(int thread, int64_t begin, int64_t end) const {
    double* mine = sums.of(thread);
    std::vector<V> range(table.size()), change(table.size());
    const int64_t stretch = kRows * plan.period;
    for (int64_t start = begin; start < end; start += stretch) {
      std::fill(range.begin(), range.end(), V{});
      std::fill(change.begin(), change.end(), V{});
      const int64_t stop = std::min(end, start + stretch);
      for (int64_t row = start; row < stop; row += plan.period)
        for (int64_t i = row, to = std::min(end, row + plan.period); i < to; i += lanes) {
          const int64_t k = (i - row) / lanes;
          one(i, std::min(lanes, to - i), table[k], range[k], change[k]);
        }
      for (int64_t i = 0; i < plan.period; ++i) add(mine, i, range, change);
    }
  }

  void add(double* mine, int64_t i, const std::vector<V>& range,
           const std::vector<V>& change) const {
    mine[in.shape.range(i)] += range[i / lanes][i % lanes];
    if (kChange) mine[sums.ranges + in.shape.gate(i)] += change[i / lanes][i % lanes];
  }

  void elements(int thread, int64_t begin, int64_t end) const {
    double* mine = sums.of(thread);
    each_range(in, begin, end, [&](int64_t from, int64_t to, W limit) {
      double* const sum = mine + in.shape.range(from);
      if (own_gates(in)) {
        mine[sums.ranges + sums.gates] += gates(from, to, limit, *sum);
      } else {
        V range{};
        for (int64_t i = from; i < to; i += lanes) {
          V change{};
          const int64_t n = std::min(lanes, to - i);
          one(i, n, place_from(in, i, n), range, change);
          for (int64_t k = 0; kChange && k < n; ++k)
            mine[sums.ranges + in.shape.gate(i + k)] += change[k];
        }
        *sum += total<W>(range);
      }
    });
  }

  // Of neighbours that share a range and have a gate each, at most a block; the sum of their
  // highest codes. Pointers are copied: for all the compiler knows, what is written might be them.
  double gates(int64_t from, int64_t to, W limit, double& sum) const {
    using Bits = typename Vector<W>::Bits;
    using M = typename Vector<W>::M;
    const Ends<W> ends(V{} + limit, in.is_signed);
    const Steps<W> steps(limit, in.is_signed, {}), others(limit, in.is_signed, beside);
    const T *const up = g, *const v = x;
    T* const gradient = out;
    W* const changes = reported;
    const Gate* const widths = in.bits;
    Bits codes{}, live{};  // beyond the end bits read as 0, which has no codes
    V range{};
    each_vector<W>(from, to, [&](int64_t i, int64_t n) ALWAYS {
      const Bits bits = widths_at<W>(widths + i, n);
      const M wide = __builtin_convertvector(bits, M);
      const V step2 = wide >= kPassThrough ? others.passed : others.at(bits);
      const Grids<W> grids(steps.at(bits), step2, wide, step2 < 0);
      const V value = load<W>(v + i, n);
      V change{};
      store<W>(gradient + i,
               gradients<W, kChange>(load<W>(up + i, n), value, ends, grids, grids.step, range,
                                     change),
               n);
      if (kChange) write(changes + i, change, n);
      codes += ((Bits{} + 1) << (bits > kMaxGridBits ? Bits{} + kMaxGridBits : bits)) - 1;
      live -= bits > 0;
    });
    sum += total<W>(range);
    double high = 0, signs = 0;
    for (int64_t k = 0; k < lanes; ++k) {
      high += codes[k];
      signs += live[k];
    }
    return in.is_signed ? (high - signs) / 2 : high;
  }

  INLINE void one(int64_t i, int64_t n, const Place<W>& p, V& range, V& change) const {
    const V up = load<W>(g + i, n), v = load<W>(x + i, n);
    store<W>(out + i,
             gradients<W, kChange>(up, v, p.ends, p.grids, p.grids.step, range, change), n);
  }
};

double highest(int32_t bits, bool is_signed) {
  const int32_t codes = (1 << std::min(bits, kMaxGridBits)) - 1;
  return is_signed ? std::max(codes - 1, 0) / 2 : codes;
}

template <class T, class W, bool kChange>
void backward(const Inputs<W>& in, const T* g, const T* x, T* out, double per_range, W* range_grad,
              W* reported, int threads) {
  const Shape& s = in.shape;
  const Plan plan = plan_of(s, threads);
  const bool summed = kChange && !(plan.mode == Mode::kElements && own_gates(in));
  Sums sums{s.ranges, summed ? s.gates : 0, std::vector<std::vector<double>>(plan.threads)};
  const Intervals<W> beside = kChange ? Intervals<W>().beside(in.adjacent) : Intervals<W>();
  const Backward<T, W, kChange> work{in, g, x, out, reported, sums, plan, table_of(in, plan), beside};
  parallel(s.size, plan.mode == Mode::kColumns ? plan.period : kBlock, plan.threads,
           [&](int thread, int64_t begin, int64_t end) {
             if (plan.mode == Mode::kRuns) work.runs(thread, begin, end);
             if (plan.mode == Mode::kColumns) work.columns(thread, begin, end);
             if (plan.mode == Mode::kElements) work.elements(thread, begin, end);
           });
  const bool counted = plan.mode == Mode::kElements && own_gates(in);
  double high = counted ? sums.at(sums.ranges + sums.gates) : 0;
  for (int64_t k = 0; k < s.gates && !counted; ++k) high += highest(in.bits[k], in.is_signed);
  const double count = per_range * std::max(high / s.gates, 1.0);
  for (int64_t r = 0; r < s.ranges; ++r) range_grad[r] = W(sums.at(r) / in.limits[r] / std::sqrt(count));
  for (int64_t k = 0; summed && k < s.gates; ++k) reported[k] = W(sums.at(s.ranges + k));
}

template <class W>
Inputs<W> inputs(const void* limits, const Gate* bits, const int32_t* adjacent, int is_signed,
                 const int64_t* shape) {
  return {static_cast<const W*>(limits), bits, adjacent, is_signed != 0,
          {shape[0], shape[1], shape[2], shape[3], shape[4]}};
}

template <class T, class W>
void start_backward(const Inputs<W>& in, const void* g, const void* x, void* out, double per_range,
                    void* range_grad, void* reported, int threads) {
  const auto call = in.adjacent ? backward<T, W, true> : backward<T, W, false>;
  call(in, static_cast<const T*>(g), static_cast<const T*>(x), static_cast<T*>(out), per_range,
       static_cast<W*>(range_grad), static_cast<W*>(reported), threads);
}

}  // namespace

// dtype: 0 float32, 1 float64, 2 bfloat16. shape: the fields of `Shape`. Limits are of the dtype,
// or float32 for bfloat16; so are the two results. share: `per_range` of placement.py.
extern "C" void cgmq_forward(int dtype, const void* x, void* y, const void* limits,
                             const Gate* bits, int is_signed, const int64_t* shape,
                             int threads) {
  const auto narrow = inputs<float>(limits, bits, nullptr, is_signed, shape);
  const auto wide = inputs<double>(limits, bits, nullptr, is_signed, shape);
  if (dtype == 0) forward(narrow, static_cast<const float*>(x), static_cast<float*>(y), threads);
  if (dtype == 1) forward(wide, static_cast<const double*>(x), static_cast<double*>(y), threads);
  if (dtype == 2)
    forward(narrow, static_cast<const BFloat16*>(x), static_cast<BFloat16*>(y), threads);
}

extern "C" void cgmq_backward(int dtype, const void* g, const void* x, void* out,
                              const void* limits, const Gate* bits, const int32_t* adjacent,
                              int is_signed, const int64_t* shape, double share,
                              void* range_grad, void* reported, int threads) {
  const auto narrow = inputs<float>(limits, bits, adjacent, is_signed, shape);
  const auto wide = inputs<double>(limits, bits, adjacent, is_signed, shape);
  if (dtype == 0) start_backward<float>(narrow, g, x, out, share, range_grad, reported, threads);
  if (dtype == 1) start_backward<double>(wide, g, x, out, share, range_grad, reported, threads);
  if (dtype == 2) start_backward<BFloat16>(narrow, g, x, out, share, range_grad, reported, threads);
}
