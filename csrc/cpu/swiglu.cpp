// SwiGLU: silu(gate) * up. The sigmoid goes through e^-|g|, which cannot overflow: both of its tails, and the distance
// to 1, keep their relative accuracy.
#include "cpu/swiglu.h"
#include "cpu/vec.h"

namespace qwen3 {
namespace QWEN3_ISA {
namespace {

Vec exp_minus_abs(Vec g) { return exp(min(g, -g)); }

// At least 16384 values a chunk, some microseconds of work, or the threads cost more than they bring.
int chunks_of_rows(int64_t n, int64_t width) { return chunks_of(n, 1 + 16384 / width); }

template <class T> void forward(const Swiglu& a) {
  parallel_chunks(a.n, chunks_of_rows(a.n, a.width), [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T *gate = row<T>(a.gate, i), *up = row<T>(a.up, i);
      T* y = row<T>(a.y, i);
      for_lanes(a.width, [&](int64_t j, int n) {
        const Vec g = load(gate + j, n), e = exp_minus_abs(g);
        store(y + j, n, select_le(g, Vec(0.f), g * e, g) / (Vec(1.f) + e) * load(up + j, n));
      });
    }
  });
}

template <class T> void backward(const SwigluBackward& a) {
  parallel_chunks(a.n, chunks_of_rows(a.n, a.width), [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T *dy = row<T>(a.dy, i), *gate = row<T>(a.gate, i), *up = row<T>(a.up, i);
      T *dgate = row<T>(a.dgate, i), *dup = row<T>(a.dup, i);
      for_lanes(a.width, [&](int64_t j, int n) {
        const Vec g = load(gate + j, n), d = load(dy + j, n), e = exp_minus_abs(g);
        const Vec larger = Vec(1.f) / (Vec(1.f) + e), smaller = e * larger;  // sigmoids of |g| and -|g|
        const Vec s = select_le(g, Vec(0.f), smaller, larger), rest = select_le(g, Vec(0.f), larger, smaller);
        const Vec slope = s * fma(g, rest, Vec(1.f));
        store(dup + j, n, d * (g * s));
        store(dgate + j, n, d * load(up + j, n) * slope);
      });
    }
  });
}

}  // namespace

void swiglu(const Swiglu& a) {
  with_type(a.y.dtype, [&](auto t) { forward<decltype(t)>(a); });
}

void swiglu_backward(const SwigluBackward& a) {
  with_type(a.dy.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace QWEN3_ISA
}  // namespace qwen3
