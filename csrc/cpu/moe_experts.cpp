// Products of few rows with each expert's matrix, where reading the matrix is all that counts: every weight is read once
// from memory, as it is stored, and meets up to four rows while it is in a register. A result is the sum of the lanes of
// one chain of fused multiply-adds, whichever rows and threads share the work.
#include <vector>

#include "cpu/moe_experts.h"
#include "cpu/vec.h"

namespace qwen3 {
namespace QWEN3_ISA {
namespace {

constexpr int kBlock = 64;  // weight rows of a piece of work

template <class T, int ROWS, int COLS> void tile(const MoeRows& m, const T* const* a, const T* w, int64_t j, int64_t r) {
  Vec sum[ROWS][COLS];
  for (auto& row : sum) std::fill(row, row + COLS, Vec(0.f));
  for_lanes(m.k, [&](int64_t i, int lanes) {
    Vec x[ROWS];
    for (int p = 0; p < ROWS; ++p) x[p] = load(a[p] + i, lanes);
    for (int q = 0; q < COLS; ++q) {
      const Vec v = load(w + q * m.weight.stride + i, lanes);
      for (int p = 0; p < ROWS; ++p) sum[p][q] = fma(x[p], v, sum[p][q]);
    }
  });
  for (int p = 0; p < ROWS; ++p)
    for (int q = 0; q < COLS; ++q) row<T>(m.out, r + p)[j + q] = from_float<T>(sum[p][q].sum());
}

template <class T, int ROWS> void columns(const MoeRows& m, int64_t e, int64_t begin, int64_t end, int64_t r) {
  const T* a[ROWS];
  for (int p = 0; p < ROWS; ++p) a[p] = row<T>(m.a, m.source ? m.source[r + p] : r + p);
  constexpr int kCols = ROWS == 4 ? 2 : 4;  // eight sums: with fewer, a multiply-add waits for the one before it
  int64_t j = begin;
  for (; j + kCols <= end; j += kCols) tile<T, ROWS, kCols>(m, a, row<T>(m.weight, e * m.n + j), j, r);
  for (; j < end; ++j) tile<T, ROWS, 1>(m, a, row<T>(m.weight, e * m.n + j), j, r);
}

template <class T> void run(const MoeRows& m) {
  std::vector<int64_t> experts;
  for (int64_t e = 0; e < m.experts; ++e) {
    const int64_t rows = m.offsets[e + 1] - m.offsets[e];
    if (rows > 0 && rows <= m.most) experts.push_back(e);
  }
  const int64_t blocks = (m.n + kBlock - 1) / kBlock, work = int64_t(experts.size()) * blocks;
#pragma omp parallel for schedule(dynamic) if (work > 1)
  for (int64_t i = 0; i < work; ++i) {
    const int64_t e = experts[i / blocks], begin = i % blocks * kBlock, end = std::min(begin + kBlock, m.n);
    int64_t r = m.offsets[e], last = m.offsets[e + 1];
    for (; r + 4 <= last; r += 4) columns<T, 4>(m, e, begin, end, r);
    for (; r + 2 <= last; r += 2) columns<T, 2>(m, e, begin, end, r);
    if (r < last) columns<T, 1>(m, e, begin, end, r);
  }
}

}  // namespace

void moe_rows(const MoeRows& m) {
  with_type(m.a.dtype, [&](auto t) { run<decltype(t)>(m); });
}

}  // namespace QWEN3_ISA
}  // namespace qwen3
