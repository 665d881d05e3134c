// Per-head RMSNorm and rotary embedding. A head is read from memory once; what follows hits L1, as do cos and sin of
// its token. The backward recomputes the norm's scale rather than storing one per head.
#include <vector>

#include "cpu/qk_norm_rope.h"
#include "cpu/vec.h"

namespace qwen3 {
namespace QWEN3_ISA {
namespace {

template <class T> T* head(const Heads& x, int64_t token, int64_t h) {
  return static_cast<T*>(x.data) + token * x.token + h * x.head;
}

// The weight, read once per head of every token, is widened once.
std::vector<float> widened(const Rows& weight, int64_t d) {
  std::vector<float> w(d);
  with_type(weight.dtype, [&](auto t) {
    const auto* from = row<decltype(t)>(weight, 0);
    for_lanes(d, [&](int64_t j, int n) { store(w.data() + j, n, load(from + j, n)); });
  });
  return w;
}

// At least 8192 values a chunk.
int chunks_of_tokens(int64_t n, int64_t values_per_token) { return chunks_of(n, 1 + 8192 / values_per_token); }

template <class T> void forward(const NormRope& a) {
  const int64_t half = a.d / 2;
  const std::vector<float> weight = widened(a.weight, a.d);
  const float *w_a = weight.data(), *w_b = w_a + half;
  parallel_chunks(a.n, chunks_of_tokens(a.n, a.heads * a.d), [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float *cos = a.cos + i % a.r * half, *sin = a.sin + i % a.r * half;
      for (int64_t h = 0; h < a.heads; ++h) {
        const T* x = head<T>(a.x, i, h);
        T* out = head<T>(a.out, i, h);
        Vec squares(0.f);
        for_lanes(a.d, [&](int64_t j, int n) {
          const Vec v = load(x + j, n);
          squares = fma(v, v, squares);
        });
        const Vec rstd(1.f / std::sqrt(squares.sum() / float(a.d) + a.eps));
        for_lanes(half, [&](int64_t j, int n) {
          const Vec va = load(x + j, n) * rstd * load(w_a + j, n), vb = load(x + half + j, n) * rstd * load(w_b + j, n);
          const Vec c = load(cos + j, n), s = load(sin + j, n);
          store(out + j, n, va * c - vb * s);
          store(out + half + j, n, vb * c + va * s);
        });
      }
    }
  });
}

template <class T> void backward(const NormRopeBackward& a) {
  const int64_t half = a.d / 2;
  const std::vector<float> weight = widened(a.weight, a.d);
  const int chunks = chunks_of_tokens(a.n, a.heads * a.d);
  // dweight is summed over the heads of a token in fp32, over the tokens in fp64: one fp32 sum over all heads of a long
  // batch would lose digits.
  std::vector<double> partial(size_t(chunks) * a.d, 0.0);
  parallel_chunks(a.n, chunks, [&](int c, int64_t begin, int64_t end) {
    double* dweight = partial.data() + c * a.d;
    std::vector<float> of_token(a.d), turned(a.d);  // turned: the output's gradient, turned back to the normed head's
    const float* w = weight.data();
    float *dw = of_token.data(), *g = turned.data();
    for (int64_t i = begin; i < end; ++i) {
      const float *cos = a.cos + i % a.r * half, *sin = a.sin + i % a.r * half;
      std::fill(dw, dw + a.d, 0.f);
      for (int64_t h = 0; h < a.heads; ++h) {
        const T *dout = head<T>(a.dout, i, h), *x = head<T>(a.x, i, h);
        T* dx = head<T>(a.dx, i, h);
        Vec squares(0.f), dot(0.f);
        for_lanes(half, [&](int64_t j, int n) {
          const Vec da = load(dout + j, n), db = load(dout + half + j, n), c = load(cos + j, n), s = load(sin + j, n);
          const Vec ga = da * c + db * s, gb = db * c - da * s;
          const Vec xa = load(x + j, n), xb = load(x + half + j, n);
          store(g + j, n, ga);
          store(g + half + j, n, gb);
          squares = fma(xa, xa, fma(xb, xb, squares));
          dot = fma(ga * load(w + j, n), xa, fma(gb * load(w + half + j, n), xb, dot));
        });
        const float scale = 1.f / std::sqrt(squares.sum() / float(a.d) + a.eps);
        const Vec rstd(scale), mean(dot.sum() * scale / float(a.d));
        for_lanes(a.d, [&](int64_t j, int n) {
          const Vec normed = load(x + j, n) * rstd, gj = load(g + j, n);
          store(dw + j, n, fma(gj, normed, load(dw + j, n)));
          store(dx + j, n, (gj * load(w + j, n) - normed * mean) * rstd);
        });
      }
      for (int64_t j = 0; j < a.d; ++j) dweight[j] += dw[j];
    }
  });
  for (int64_t j = 0; j < a.d; ++j) {
    double total = 0;
    for (int c = 0; c < chunks; ++c) total += partial[c * a.d + j];
    a.dweight[j] = float(total);
  }
}

}  // namespace

void norm_rope(const NormRope& a) {
  with_type(a.x.dtype, [&](auto t) { forward<decltype(t)>(a); });
}

void norm_rope_backward(const NormRopeBackward& a) {
  with_type(a.x.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace QWEN3_ISA
}  // namespace qwen3
