// Cross-entropy: one row at a time, read once in the forward and once in the backward.
//
// The true class never meets a subtraction from 1. The forward sums the other classes apart from it and takes
// nll = log1p(sum_others / exp(x_true)); the backward gives it -dnll * sum_others / (sum_others + p_true). Both keep
// their relative accuracy as p_true -> 1, where lse - x_true and p_true - 1 cancel. What is done once a row is in fp64.
#include <limits>

#include "cpu/cross_entropy.h"
#include "cpu/vec.h"

namespace qwen3 {
namespace QWEN3_ISA {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kIgnored = -1;

// A row is walked in blocks that stay in L1; sums are per block first, so that they lose no accuracy in long rows.
constexpr int64_t kBlock = 2048;

template <class T> Vec patched(const T* x, int n, int64_t hole) {
  float lanes[Vec::W];
  for (int i = 0; i < Vec::W; ++i) lanes[i] = i < n && i != hole ? to_float(x[i]) : -kInf;
  return Vec::load(lanes);
}

// Runs body(j, n, x[j:j+n]) over [begin, end) with -inf in place of the true class and past the end.
template <class T, class F> void for_others(const T* x, int64_t begin, int64_t end, int64_t target, F body) {
  for (int64_t j = begin; j < end; j += Vec::W) {
    const int n = int(std::min<int64_t>(Vec::W, end - j));
    const bool plain = n == Vec::W && (target < j || target >= j + n);
    body(j, n, plain ? Vec::load(x + j) : patched(x + j, n, target - j));
  }
}

template <class T> void forward(const CrossEntropy& a) {
  parallel_chunks(a.n, chunks_of(a.n, 1), [&](int, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T* x = row<T>(a.logits, i);
      const int64_t target = a.labels[i] == a.ignore_index ? kIgnored : a.labels[i];
      float peak = -kInf, shift = 0;  // the shift is finite where only -inf has been seen: exp(-inf - shift) = 0
      double total = 0;
      for (int64_t begin = 0; begin < a.v; begin += kBlock) {
        const int64_t end = std::min(begin + kBlock, a.v);
        Vec highest(-kInf), sum(0.f);
        for_others(x, begin, end, target, [&](int64_t, int, Vec v) { highest = max(highest, v); });
        const float before = peak;
        peak = std::max(peak, highest.max());
        shift = peak == -kInf ? 0.f : peak;
        for_others(x, begin, end, target, [&](int64_t, int, Vec v) { sum = sum + exp(v - Vec(shift)); });
        total = total * std::exp(double(before) - shift) + sum.sum();
      }
      const double mass = std::log(total), truth = target == kIgnored ? -kInf : to_float(x[target]);
      const double gap = shift - truth + mass, tail = std::log1p(std::exp(-std::abs(gap)));
      a.nll[i] = target == kIgnored ? 0.f : float(std::max(gap, 0.0) + tail);
      a.lse[i] = float(std::max(shift + mass, truth) + tail);
    }
  });
}

template <class T> void backward(const CrossEntropyBackward& a) {
  parallel_chunks(a.n, chunks_of(a.n, 1), [&](int, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T* x = row<T>(a.logits, i);
      T* dx = row<T>(a.dlogits, i);
      const int64_t target = a.labels[i] == a.ignore_index ? kIgnored : a.labels[i];
      const float dnll = target == kIgnored ? 0.f : a.dnll[i], dlse = a.dlse ? a.dlse[i] : 0.f;
      if (dnll == 0 && dlse == 0) {  // rows without a gradient (prompts in fine-tuning) are not read
        std::memset(dx, 0, sizeof(T) * a.v);
        continue;
      }
      const Vec lse(a.lse[i]), scale(dnll + dlse);
      double others = 0;
      for (int64_t begin = 0; begin < a.v; begin += kBlock) {
        Vec sum(0.f);
        for_others(x, begin, std::min(begin + kBlock, a.v), target, [&](int64_t j, int n, Vec v) {
          const Vec p = exp(v - lse);
          sum = sum + p;
          store(dx + j, n, p * scale);
        });
        others += sum.sum();
      }
      if (target == kIgnored) continue;
      const double p = std::exp(double(to_float(x[target])) - a.lse[i]);
      dx[target] = from_float<T>(float(dlse * p - dnll * (others / (others + p))));
    }
  });
}

}  // namespace

void cross_entropy(const CrossEntropy& a) {
  with_type(a.logits.dtype, [&](auto t) { forward<decltype(t)>(a); });
}

void cross_entropy_backward(const CrossEntropyBackward& a) {
  with_type(a.logits.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace QWEN3_ISA
}  // namespace qwen3
