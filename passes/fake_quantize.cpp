// The fake-quantize kernel for the CPU: one pass forward, one pass backward, any granularity.
//
// A plain C interface without headers of PyTorch: it builds in seconds with GCC or Clang, whose
// vector extensions make the loops fast on any instruction set. `passes/kernel.py` has the
// definition in PyTorch; `tests/test_native.py` compares the two.
//
// Values lie dense in memory. A range or a gate stands for `inner` neighbours and there are `count`
// of them, over and over: value i belongs to number (i / inner) % count. From both follow a `run`
// of neighbours that share everything, and the `period` of values after which it all repeats.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "fake_quantize.h"

#if defined(_OPENMP)
extern "C" int omp_get_thread_num();
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
  const int32_t* bits;
  const int32_t* adjacent;  // null: no statistic
  bool is_signed;
  Shape shape;
};

// Runs `body(thread, begin, end)` on stretches of [0, count), each a multiple of `unit` long.
template <class Body>
void parallel(int64_t count, int64_t unit, int threads, const Body& body) {
  const int64_t units = (count + unit - 1) / unit;
  const int64_t each = (units + threads - 1) / threads * unit;
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t begin = omp_get_thread_num() * each;
      if (begin < count) body(omp_get_thread_num(), begin, std::min(count, begin + each));
    }
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
Grids<W> grids_at(const Inputs<W>& in, int64_t i) {
  using L = Vector<W>;
  Grids<W> p;
  const int64_t gate = in.shape.gate(i);
  const int32_t adjacent = in.adjacent ? in.adjacent[gate] : in.bits[gate];
  p.set(typename L::V{} + in.limits[in.shape.range(i)], typename L::Bits{} + in.bits[gate],
        typename L::Bits{} + adjacent, in.is_signed);
  return p;
}

template <class W>
inline bool own_gates(const Inputs<W>& in) {
  return in.shape.gates == in.shape.size;
}

// Of n values from number i on.
template <class W>
Grids<W> grids_from(const Inputs<W>& in, int64_t i, int64_t n) {
  using L = Vector<W>;
  const Shape& s = in.shape;
  typename L::V limit = typename L::V{} + 1;
  typename L::Bits bits{}, adjacent{};
  for (int64_t k = 0; k < n; ++k) {
    const int64_t gate = s.gate(i + k);
    limit[k] = in.limits[s.range(i + k)];
    bits[k] = in.bits[gate];
    adjacent[k] = in.adjacent ? in.adjacent[gate] : bits[k];
  }
  Grids<W> p;
  p.set(limit, bits, adjacent, in.is_signed);
  return p;
}

// Of n values from number i on that have a gate each and share the range `limit`.
template <class W>
inline Grids<W> grids_within(const Inputs<W>& in, W limit, int64_t i, int64_t n) {
  using L = Vector<W>;
  const auto bits = read<typename L::Bits>(in.bits + i, n);
  const auto adjacent = in.adjacent ? read<typename L::Bits>(in.adjacent + i, n) : bits;
  Grids<W> p;
  p.set(typename L::V{} + limit, bits, adjacent, in.is_signed);
  return p;
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

// The grids of a period: one entry per run, or per vector of columns.
template <class W>
std::vector<Grids<W>> table_of(const Inputs<W>& in, const Plan& plan) {
  std::vector<Grids<W>> table;
  const int64_t lanes = Vector<W>::lanes;
  if (plan.mode == Mode::kRuns)
    for (int64_t i = 0; i < plan.period; i += plan.run) table.push_back(grids_at(in, i));
  if (plan.mode == Mode::kColumns)
    for (int64_t i = 0; i < plan.period; i += lanes)
      table.push_back(grids_from(in, i, std::min(lanes, plan.period - i)));
  return table;
}

template <class T, class W>
void forward_run(const T* x, T* y, int64_t n, const Grids<W>& p, bool is_signed) {
  const Grids<W> grids = p;
  const int64_t lanes = Vector<W>::lanes, whole = n - n % lanes;
  if (grids.pass[0]) {
    std::memcpy(y, x, n * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < whole; i += lanes)
    store<W>(y + i, rounded<W>(load<W>(x + i, lanes), grids, is_signed), lanes);
  if (whole < n)
    store<W>(y + whole, rounded<W>(load<W>(x + whole, n - whole), grids, is_signed), n - whole);
}

template <class T, class W>
void forward(const Inputs<W>& in, const T* x, T* y, int threads) {
  const Plan plan = plan_of(in.shape, threads);
  const auto table = table_of(in, plan);
  const int64_t lanes = Vector<W>::lanes;
  const auto runs = [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin, next; i < end; i = next) {
      next = std::min(end, (i / plan.run + 1) * plan.run);
      forward_run(x + i, y + i, next - i, table[i % plan.period / plan.run], in.is_signed);
    }
  };
  const auto columns = [&](int, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += plan.period)
      for (int64_t i = row, to = std::min(end, row + plan.period); i < to; i += lanes) {
        const int64_t n = std::min(lanes, to - i);
        const auto v = load<W>(x + i, n);
        store<W>(y + i, rounded<W>(v, table[(i - row) / lanes], in.is_signed), n);
      }
  };
  const auto elements = [&](int, int64_t begin, int64_t end) {
    each_range(in, begin, end, [&](int64_t from, int64_t to, W limit) {
      for (int64_t i = from; i < to; i += lanes) {
        const int64_t n = std::min(lanes, to - i);
        const auto grids = own_gates(in) ? grids_within(in, limit, i, n) : grids_from(in, i, n);
        store<W>(y + i, rounded<W>(load<W>(x + i, n), grids, in.is_signed), n);
      }
    });
  };
  if (plan.mode == Mode::kRuns) parallel(in.shape.size, kBlock, plan.threads, runs);
  if (plan.mode == Mode::kColumns) parallel(in.shape.size, plan.period, plan.threads, columns);
  if (plan.mode == Mode::kElements) parallel(in.shape.size, kBlock, plan.threads, elements);
}

// Sums of every thread, added up at the end in the order of the threads: of the ranges, of the
// gates, and, where every value has a gate, of their highest codes.
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

// Adds the sums of a run to `range` and `change`.
template <class T, class W, bool kChange>
void backward_run(const T* g, const T* x, T* out, int64_t n, const Grids<W>& p, bool is_signed,
                  double& range, double& change) {
  const Grids<W> grids = p;
  const int64_t lanes = Vector<W>::lanes;
  for (int64_t start = 0; start < n; start += kBlock) {
    typename Vector<W>::V ranges{}, changes{};
    const int64_t end = std::min(n, start + kBlock), whole = end - (end - start) % lanes;
    for (int64_t i = start; i < whole; i += lanes) {
      const auto found = gradients<W, kChange>(load<W>(g + i, lanes), load<W>(x + i, lanes), grids,
                                               is_signed);
      store<W>(out + i, found.x, lanes);
      ranges += found.range;
      changes += found.change;
    }
    if (whole < end) {
      const int64_t rest = end - whole;
      const auto found = gradients<W, kChange>(load<W>(g + whole, rest), load<W>(x + whole, rest),
                                               grids, is_signed);
      store<W>(out + whole, found.x, rest);
      ranges += found.range;
      changes += found.change;
    }
    range += total<W>(ranges) * grids.share[0];
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
  std::vector<Grids<W>> table;

  static constexpr int64_t lanes = Vector<W>::lanes;

  void runs(int thread, int64_t begin, int64_t end) const {
    double* mine = sums.of(thread);
    for (int64_t i = begin, next; i < end; i = next) {
      next = std::min(end, (i / plan.run + 1) * plan.run);
      const Grids<W>& p = table[i % plan.period / plan.run];
      double range = 0, change = 0;
      backward_run<T, W, kChange>(g + i, x + i, out + i, next - i, p, in.is_signed, range, change);
      if (p.share[0] != 0) mine[in.shape.range(i)] += range;
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
      V range{}, high{};
      for (int64_t i = from; i < to; i += lanes) {
        const int64_t n = std::min(lanes, to - i);
        V change{};
        if (own_gates(in)) {
          const auto grids = grids_within(in, limit, i, n);
          one(i, n, grids, range, change);
          high += grids.high;  // 0 beyond the end, where bits read as 0
          if (kChange) write(reported + i, change, n);
        } else {
          one(i, n, grids_from(in, i, n), range, change);
          for (int64_t k = 0; kChange && k < n; ++k)
            mine[sums.ranges + in.shape.gate(i + k)] += change[k];
        }
      }
      mine[in.shape.range(from)] += total<W>(range);
      mine[sums.ranges + sums.gates] += total<W>(high);
    });
  }

  INLINE void one(int64_t i, int64_t n, const Grids<W>& p, V& range, V& change) const {
    const auto found = gradients<W, kChange>(load<W>(g + i, n), load<W>(x + i, n), p, in.is_signed);
    store<W>(out + i, found.x, n);
    range += p.share != 0 ? found.range * p.share : V{};
    if (kChange) change += found.change;
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
  const Backward<T, W, kChange> work{in, g, x, out, reported, sums, plan, table_of(in, plan)};
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
  for (int64_t r = 0; r < s.ranges; ++r) range_grad[r] = W(sums.at(r) / std::sqrt(count));
  for (int64_t k = 0; summed && k < s.gates; ++k) reported[k] = W(sums.at(s.ranges + k));
}

template <class W>
Inputs<W> inputs(const void* limits, const int32_t* bits, const int32_t* adjacent, int is_signed,
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
                             const int32_t* bits, int is_signed, const int64_t* shape,
                             int threads) {
  const auto narrow = inputs<float>(limits, bits, nullptr, is_signed, shape);
  const auto wide = inputs<double>(limits, bits, nullptr, is_signed, shape);
  if (dtype == 0) forward(narrow, static_cast<const float*>(x), static_cast<float*>(y), threads);
  if (dtype == 1) forward(wide, static_cast<const double*>(x), static_cast<double*>(y), threads);
  if (dtype == 2)
    forward(narrow, static_cast<const BFloat16*>(x), static_cast<BFloat16*>(y), threads);
}

extern "C" void cgmq_backward(int dtype, const void* g, const void* x, void* out,
                              const void* limits, const int32_t* bits, const int32_t* adjacent,
                              int is_signed, const int64_t* shape, double share,
                              void* range_grad, void* reported, int threads) {
  const auto narrow = inputs<float>(limits, bits, adjacent, is_signed, shape);
  const auto wide = inputs<double>(limits, bits, adjacent, is_signed, shape);
  if (dtype == 0) start_backward<float>(narrow, g, x, out, share, range_grad, reported, threads);
  if (dtype == 1) start_backward<double>(wide, g, x, out, share, range_grad, reported, threads);
  if (dtype == 2) start_backward<BFloat16>(narrow, g, x, out, share, range_grad, reported, threads);
}
