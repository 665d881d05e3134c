// RMSNorm with an optional residual add. Each row is read once from memory; the second pass over it hits L1.
#include <vector>

#include "cpu/rms_norm.h"
#include "cpu/vec.h"

namespace qwen3 {
namespace QWEN3_ISA {
namespace {

template <class T, class W> void forward(const RmsNorm& a) {
  const W* weight = row<W>(a.weight, 0);
  parallel_chunks(a.n, chunks_of(a.n), [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* x = row<T>(a.x, i);
      const T* residual = a.residual.data ? row<T>(a.residual, i) : nullptr;
      T* sum = residual ? row<T>(a.sum, i) : nullptr;
      T* y = row<T>(a.y, i);
      Vec squares(0.f);
      for_lanes(a.h, [&](int64_t j, int n) {
        Vec v = load(x + j, n);
        if (residual) {
          store(sum + j, n, v + load(residual + j, n));
          v = load(sum + j, n);  // what is normalised is the rounded sum, as it is what the next layer sees
        }
        squares = fma(v, v, squares);
      });
      const float rstd = 1.f / std::sqrt(squares.sum() / float(a.h) + a.eps);
      a.rstd[i] = rstd;
      const T* normed = residual ? sum : x;
      for_lanes(a.h, [&](int64_t j, int n) { store(y + j, n, load(normed + j, n) * Vec(rstd) * load(weight + j, n)); });
    }
  });
}

template <class T, class W> void backward(const RmsNormBackward& a) {
  const W* weight = row<W>(a.weight, 0);
  const int chunks = chunks_of(a.n);
  // dweight is summed over kRun rows in fp32, beyond that in fp64: one fp32 sum over a long batch would lose digits.
  constexpr int64_t kRun = 16;
  std::vector<double> partial(size_t(chunks) * a.h, 0.0);
  parallel_chunks(a.n, chunks, [&](int c, int64_t begin, int64_t end) {
    std::vector<float> run(a.h, 0.f);
    float* dweight = run.data();
    for (int64_t i = begin; i < end; ++i) {
      const T* dy = row<T>(a.dy, i);
      const T* x = row<T>(a.sum, i);
      const T* dsum = a.dsum.data ? row<T>(a.dsum, i) : nullptr;
      T* dx = row<T>(a.dx, i);
      const float rstd = a.rstd[i];
      Vec dot(0.f);
      for_lanes(a.h, [&](int64_t j, int n) {
        const Vec normed = load(x + j, n) * Vec(rstd), g = load(dy + j, n);
        dot = fma(normed, g * load(weight + j, n), dot);
        store(dweight + j, n, fma(g, normed, load(dweight + j, n)));
      });
      const Vec mean(dot.sum() / float(a.h));
      for_lanes(a.h, [&](int64_t j, int n) {
        const Vec normed = load(x + j, n) * Vec(rstd);
        Vec d = (load(dy + j, n) * load(weight + j, n) - normed * mean) * Vec(rstd);
        if (dsum) d = d + load(dsum + j, n);
        store(dx + j, n, d);
      });
      if ((i - begin) % kRun == kRun - 1 || i == end - 1) {
        for (int64_t j = 0; j < a.h; ++j) partial[c * a.h + j] += dweight[j];
        std::fill(run.begin(), run.end(), 0.f);
      }
    }
  });
  for (int64_t j = 0; j < a.h; ++j) {
    double total = 0;
    for (int c = 0; c < chunks; ++c) total += partial[c * a.h + j];
    a.dweight[j] = float(total);
  }
}

}  // namespace

void rms_norm(const RmsNorm& a) {
  with_type(a.x.dtype, [&](auto t) { with_type(a.weight.dtype, [&](auto w) { forward<decltype(t), decltype(w)>(a); }); });
}

void rms_norm_backward(const RmsNormBackward& a) {
  with_type(a.dy.dtype, [&](auto t) { with_type(a.weight.dtype, [&](auto w) { backward<decltype(t), decltype(w)>(a); }); });
}

}  // namespace QWEN3_ISA
}  // namespace qwen3
