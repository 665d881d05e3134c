// Blocked attention with the queries in the vector lanes: scores are kept transposed, [key, lane], so the running maximum
// and sum of the softmax are plain vectors, keys and values are read row by row as they lie, and a lane never meets another.
// Hence a query's result does not depend on which queries share its block: decoding gives the bits that a prefill gives.
//
// A lane is one (query, head) pair; the heads that share a key head are neighbours, so one pass over the keys serves all.
// All arithmetic is fp32.
#include <cfloat>
#include <memory>
#include <vector>

#include "cpu/attention.h"
#include "cpu/vec.h"

namespace qwen3 {
namespace QWEN3_ISA {
namespace {

constexpr int W = Vec::W;
constexpr int kLanes = 4 * W;
constexpr int kKeys = 64;                 // keys per block
constexpr int kRows = W == 16 ? 8 : 4;    // rows of a register tile; two vectors wide, it fills half the registers

// --- C[m, n] (+)= sum_k A[m, k] B[k, n]. A has any strides, rows of B and C are contiguous. The products of an
// element are one chain of fused multiply-adds in the order of k, whatever the tile that computes it. The chain starts at
// zero and is added to C at the end: long sums come in blocks, which halves their error.

struct Matrix {
  float* data;
  int64_t row, column = 1;  // strides
};

template <int ROWS, int VECS> void tile(int64_t depth, Matrix a, Matrix b, Matrix c, const int (&lanes)[2], bool accumulate) {
  Vec sum[ROWS][VECS];
  for (int m = 0; m < ROWS; ++m)
    for (int j = 0; j < VECS; ++j) sum[m][j] = Vec(0.f);
  const bool whole = lanes[VECS - 1] == W;
  const auto run = [&](auto load_b) {
    for (int64_t k = 0; k < depth; ++k) {
      Vec x[VECS];
      for (int j = 0; j < VECS; ++j) x[j] = load_b(b.data + k * b.row + j * W, lanes[j]);
      for (int m = 0; m < ROWS; ++m) {
        const Vec w(a.data[m * a.row + k * a.column]);
        for (int j = 0; j < VECS; ++j) sum[m][j] = fma(w, x[j], sum[m][j]);
      }
    }
  };
  if (whole)
    run([](const float* p, int) { return Vec::load(p); });
  else
    run([](const float* p, int n) { return Vec::load(p, n); });
  for (int m = 0; m < ROWS; ++m)
    for (int j = 0; j < VECS; ++j) {
      float* to = c.data + m * c.row + j * W;
      store(to, lanes[j], accumulate ? load(to, lanes[j]) + sum[m][j] : sum[m][j]);
    }
}

template <int ROWS> void row_tiles(int64_t& m, int64_t rows, int64_t columns, int64_t depth, Matrix a, Matrix b, Matrix c,
                                   bool accumulate) {
  for (; m + ROWS <= rows; m += ROWS) {
    const Matrix am{a.data + m * a.row, a.row, a.column};
    for (int64_t n = 0; n < columns; n += 2 * W) {
      const int64_t left = columns - n;
      const int lanes[2] = {int(std::min<int64_t>(left, W)), int(std::min<int64_t>(left - W, W))};
      const Matrix bn{b.data + n, b.row}, cmn{c.data + m * c.row + n, c.row};
      if (left > W)
        tile<ROWS, 2>(depth, am, bn, cmn, lanes, accumulate);
      else
        tile<ROWS, 1>(depth, am, bn, cmn, lanes, accumulate);
    }
  }
}

void gemm(int64_t rows, int64_t columns, int64_t depth, Matrix a, Matrix b, Matrix c, bool accumulate) {
  int64_t m = 0;
  row_tiles<kRows>(m, rows, columns, depth, a, b, c, accumulate);
  row_tiles<2>(m, rows, columns, depth, a, b, c, accumulate);
  row_tiles<1>(m, rows, columns, depth, a, b, c, accumulate);
}

// --- Memory

// Cache-line aligned floats, handed out in order; every piece is rounded up to whole lines.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(new float[floats + 16 * kPieces]) {
    next_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) / 64 * 64);
  }
  float* take(int64_t floats) {
    float* piece = next_;
    next_ += (floats + 15) / 16 * 16;
    return piece;
  }

 private:
  static constexpr int kPieces = 16;
  std::unique_ptr<float[]> memory_;
  float* next_;
};

template <class T> T* at(const Heads& x, int64_t batch, int64_t token, int64_t head) {
  return static_cast<T*>(x.data) + batch * x.batch + token * x.token + head * x.head;
}

// n rows of a head in fp32: the memory itself when it holds floats, else a copy in `buffer`.
template <class T> Matrix widened(T* x, int64_t stride, int64_t n, int64_t width, float* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    return {x, stride};
  } else {
    for (int64_t i = 0; i < n; ++i)
      for_lanes(width, [&](int64_t d, int lanes) { store(buffer + i * width + d, lanes, load(x + i * stride + d, lanes)); });
    return {buffer, width};
  }
}

// --- Geometry

struct Sequence {
  int64_t batch, first_token, q_len, k_len, position;  // position of the first query
  int64_t lse_row;
};

Sequence sequence(const AttentionShape& s, int64_t b) {
  if (s.cu_seqlens) {
    const int64_t begin = s.cu_seqlens[b], length = s.cu_seqlens[b + 1] - begin;
    return {0, begin, length, length, 0, begin};
  }
  return {b, 0, s.q_len, s.k_len, s.q_start ? s.q_start[b] : s.k_len - s.q_len, b * s.q_len};
}

// The block of lanes that begins at row `first` of a sequence's (query, head of the group) pairs.
struct Block {
  int64_t first;
  int count;    // lanes in use
  int vectors;  // that hold them
  int64_t keys; // all that some lane sees lie before this one

  Block(const AttentionShape& s, const Sequence& q, int64_t first) : first(first) {
    const int64_t group = s.q_heads / s.k_heads;
    count = int(std::min<int64_t>(kLanes, q.q_len * group - first));
    vectors = (count + W - 1) / W;
    const int64_t last = q.position + (first + count - 1) / group;
    keys = s.causal ? std::clamp<int64_t>(last + 1, 0, q.k_len) : q.k_len;
  }
};

// Index of the last key of a block that each lane sees, as float: -1 for none, at least `keys` - 1 for all.
void visible(const AttentionShape& s, const Sequence& q, const Block& block, int64_t first_key, float* last) {
  const int64_t group = s.q_heads / s.k_heads;
  for (int l = 0; l < kLanes; ++l) {
    const int64_t position = q.position + (block.first + l) / group - first_key;
    last[l] = s.causal && l < block.count ? float(std::clamp<int64_t>(position, -1, kKeys)) : float(kKeys);
  }
}

// Whether every lane of the block sees all `n` keys from first_key on.
bool all_visible(const AttentionShape& s, const Sequence& q, const Block& block, int64_t first_key, int n) {
  return !s.causal || q.position + block.first / (s.q_heads / s.k_heads) >= first_key + n - 1;
}

// Scales the scores of n keys, [key, lane], hides those that a lane does not see and raises each lane's maximum.
void finish_scores(const AttentionShape& s, const Sequence& q, const Block& block, int64_t first_key, int n, float* scores,
                   float* peak) {
  alignas(64) float last[kLanes];
  const bool masked = !all_visible(s, q, block, first_key, n);
  if (masked) visible(s, q, block, first_key, last);
  for (int v = 0; v < block.vectors * W; v += W) {
    Vec top = Vec::load(peak + v);
    for (int j = 0; j < n; ++j) {
      Vec x = Vec::load(scores + j * kLanes + v) * Vec(s.scale);
      if (masked) x = select_le(Vec(float(j)), Vec::load(last + v), x, Vec(-INFINITY));
      x.store(scores + j * kLanes + v);
      top = max(top, x);
    }
    top.store(peak + v);
  }
}

struct Task {
  int64_t sequence, k_head, first;
};

// --- Forward

template <class T> void forward_block(const Attention& a, const Task& task, float* memory_q, float* memory_o, float* scores,
                                      float* kv) {
  const AttentionShape& s = a.shape;
  const Sequence seq = sequence(s, task.sequence);
  const Block block(s, seq, task.first);
  const int64_t group = s.q_heads / s.k_heads, width = s.width;
  const auto head = [&](int l) { return task.k_head * group + (block.first + l) % group; };
  const auto token = [&](int l) { return (block.first + l) / group; };

  float* qt = memory_q;  // [width, lanes]
  float* ot = memory_o;
  const int used = block.vectors * W;
  for (int l = 0; l < used; ++l) {
    const T* q = at<T>(a.q, seq.batch, seq.first_token + token(std::min(l, block.count - 1)), head(std::min(l, block.count - 1)));
    for (int64_t d = 0; d < width; ++d) qt[d * kLanes + l] = to_float(q[d]);
  }
  std::fill(ot, ot + width * kLanes, 0.f);
  alignas(64) float peak[kLanes], before[kLanes], total[kLanes];
  std::fill(peak, peak + kLanes, -INFINITY);
  std::fill(total, total + kLanes, 0.f);

  for (int64_t first_key = 0; first_key < block.keys; first_key += kKeys) {
    const int n = int(std::min<int64_t>(kKeys, block.keys - first_key));
    const Matrix k = widened(at<T>(a.k, seq.batch, seq.first_token + first_key, task.k_head), a.k.token, n, width, kv);
    gemm(n, used, width, k, {qt, kLanes}, {scores, kLanes}, false);
    std::copy(peak, peak + kLanes, before);
    finish_scores(s, seq, block, first_key, n, scores, peak);
    for (int v = 0; v < used; v += W) {
      const Vec shift = max(Vec::load(peak + v), Vec(-FLT_MAX));  // no key seen yet: exp(-inf + FLT_MAX) = 0
      Vec sum(0.f);
      for (int j = 0; j < n; ++j) {
        const Vec p = exp(Vec::load(scores + j * kLanes + v) - shift);
        p.store(scores + j * kLanes + v);
        sum = sum + p;
      }
      const Vec keep = exp(max(Vec::load(before + v), Vec(-FLT_MAX)) - shift);
      fma(Vec::load(total + v), keep, sum).store(total + v);
      for (int64_t d = 0; d < width; ++d) (Vec::load(ot + d * kLanes + v) * keep).store(ot + d * kLanes + v);
    }
    const Matrix values = widened(at<T>(a.v, seq.batch, seq.first_token + first_key, task.k_head), a.v.token, n, width, kv);
    gemm(width, used, n, {values.data, 1, values.row}, {scores, kLanes}, {ot, kLanes}, true);
  }

  for (int l = 0; l < block.count; ++l) {
    T* out = at<T>(a.out, seq.batch, seq.first_token + token(l), head(l));
    const bool seen = total[l] != 0;  // NaN counts as seen
    for (int64_t d = 0; d < width; ++d) out[d] = from_float<T>(seen ? ot[d * kLanes + l] / total[l] : 0.f);
    a.lse[(seq.lse_row + token(l)) * s.q_heads + head(l)] = seen ? peak[l] + std::log(total[l]) : -INFINITY;
  }
}

template <class T> void forward(const Attention& a) {
  const AttentionShape& s = a.shape;
  std::vector<Task> tasks;
  for (int64_t b = 0; b < s.sequences; ++b) {
    const int64_t rows = sequence(s, b).q_len * (s.q_heads / s.k_heads);
    // From the end: later queries see more keys, and the longest work should start first.
    for (int64_t first = (rows - 1) / kLanes * kLanes; first >= 0 && rows > 0; first -= kLanes)
      for (int64_t h = 0; h < s.k_heads; ++h) tasks.push_back({b, h, first});
  }
#pragma omp parallel if (tasks.size() > 1)
  {
    Scratch scratch(s.width * (2 * kLanes + kKeys) + kKeys * kLanes);
    float *q = scratch.take(s.width * kLanes), *o = scratch.take(s.width * kLanes), *scores = scratch.take(kKeys * kLanes);
    float* kv = scratch.take(s.width * kKeys);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < int64_t(tasks.size()); ++i) forward_block<T>(a, tasks[i], q, o, scores, kv);
  }
}

// --- Backward. One task owns a key head of a sequence: dk and dv are summed in the order of the queries, without atomics
// or partial buffers, so the result does not depend on the number of threads. A block of queries keeps its scores and the
// products dout . v of all keys, [key, lane]: the softmax is then redone exactly, and delta = sum p (dout . v) is its own
// sum. The usual exp(score - lse) and delta = dout . out are cheaper in memory, but lse carries half an ulp of its size into
// every probability, and out its rounding to bf16: where one key has nearly all the probability, 9 to 70 times the error.

template <class T> void backward_head(const AttentionBackward& a, int64_t b, int64_t k_head) {
  const AttentionShape& s = a.shape;
  const Sequence seq = sequence(s, b);
  const int64_t group = s.q_heads / s.k_heads, width = s.width, rows = seq.q_len * group;
  Scratch scratch(2 * seq.k_len * (width + kLanes) + width * (5 * kLanes + kKeys));
  float *dk = scratch.take(seq.k_len * width), *dv = scratch.take(seq.k_len * width);
  float *p = scratch.take(seq.k_len * kLanes), *ds = scratch.take(seq.k_len * kLanes);  // [key, lane]
  float *q = scratch.take(width * kLanes), *dout = scratch.take(width * kLanes), *dq = scratch.take(width * kLanes);
  float *qt = scratch.take(width * kLanes), *doutt = scratch.take(width * kLanes);  // [width, lane], those above [lane, width]
  float* kv = scratch.take(width * kKeys);
  std::fill(dk, dk + seq.k_len * width, 0.f);
  std::fill(dv, dv + seq.k_len * width, 0.f);

  for (int64_t first = 0; first < rows; first += kLanes) {
    const Block block(s, seq, first);
    const auto head = [&](int l) { return k_head * group + (first + l) % group; };
    const auto token = [&](int l) { return seq.first_token + (first + l) / group; };
    const int used = block.vectors * W;
    for (int l = 0; l < used; ++l) {
      if (l < block.count) {
        const T *x = at<T>(a.q, seq.batch, token(l), head(l)), *g = at<T>(a.dout, seq.batch, token(l), head(l));
        for_lanes(width, [&](int64_t d, int n) {
          store(q + l * width + d, n, load(x + d, n));
          store(dout + l * width + d, n, load(g + d, n));
        });
      } else {
        std::fill(q + l * width, q + (l + 1) * width, 0.f);
        std::fill(dout + l * width, dout + (l + 1) * width, 0.f);
      }
      for (int64_t d = 0; d < width; ++d) {
        qt[d * kLanes + l] = q[l * width + d];
        doutt[d * kLanes + l] = dout[l * width + d];
      }
    }

    alignas(64) float peak[kLanes];
    std::fill(peak, peak + kLanes, -FLT_MAX);  // of a query without keys: exp(-inf + FLT_MAX) = 0
    const auto keys = [&](const Heads& x, int64_t first_key, int n) {
      return widened(at<T>(x, seq.batch, seq.first_token + first_key, k_head), x.token, n, width, kv);
    };
    for (int64_t first_key = 0; first_key < block.keys; first_key += kKeys) {
      const int n = int(std::min<int64_t>(kKeys, block.keys - first_key));
      float *scores = p + first_key * kLanes, *dp = ds + first_key * kLanes;
      gemm(n, used, width, keys(a.k, first_key, n), {qt, kLanes}, {scores, kLanes}, false);
      gemm(n, used, width, keys(a.v, first_key, n), {doutt, kLanes}, {dp, kLanes}, false);
      finish_scores(s, seq, block, first_key, n, scores, peak);
    }
    for (int i = 0; i < used; i += W) {
      const Vec shift = Vec::load(peak + i);
      Vec total(0.f), delta(0.f);
      for (int64_t j = 0; j < block.keys; ++j) {
        const Vec e = exp(Vec::load(p + j * kLanes + i) - shift);
        e.store(p + j * kLanes + i);
        total = total + e;
        delta = fma(e, Vec::load(ds + j * kLanes + i), delta);
      }
      const Vec share = Vec(1.f) / select_le(total, Vec(0.f), Vec(1.f), total);  // 0 only for a query without keys
      delta = delta * share;
      for (int64_t j = 0; j < block.keys; ++j) {
        const Vec prob = Vec::load(p + j * kLanes + i) * share;
        prob.store(p + j * kLanes + i);
        (prob * (Vec::load(ds + j * kLanes + i) - delta) * Vec(s.scale)).store(ds + j * kLanes + i);
      }
    }
    std::fill(dq, dq + width * kLanes, 0.f);
    for (int64_t first_key = 0; first_key < block.keys; first_key += kKeys) {
      const int n = int(std::min<int64_t>(kKeys, block.keys - first_key));
      float *prob = p + first_key * kLanes, *dscore = ds + first_key * kLanes;
      gemm(n, width, block.count, {prob, kLanes}, {dout, width}, {dv + first_key * width, width}, true);
      gemm(n, width, block.count, {dscore, kLanes}, {q, width}, {dk + first_key * width, width}, true);
      gemm(block.count, width, n, {dscore, 1, kLanes}, keys(a.k, first_key, n), {dq, width}, true);
    }
    for (int l = 0; l < block.count; ++l) {
      T* to = at<T>(a.dq, seq.batch, token(l), head(l));
      for_lanes(width, [&](int64_t d, int n) { store(to + d, n, load(dq + l * width + d, n)); });
    }
  }
  for (int64_t j = 0; j < seq.k_len; ++j) {
    T *to_k = at<T>(a.dk, seq.batch, seq.first_token + j, k_head), *to_v = at<T>(a.dv, seq.batch, seq.first_token + j, k_head);
    for_lanes(width, [&](int64_t d, int n) {
      store(to_k + d, n, load(dk + j * width + d, n));
      store(to_v + d, n, load(dv + j * width + d, n));
    });
  }
}

template <class T> void backward(const AttentionBackward& a) {
  const int64_t tasks = a.shape.sequences * a.shape.k_heads;
#pragma omp parallel for schedule(dynamic) if (tasks > 1)
  for (int64_t i = 0; i < tasks; ++i) backward_head<T>(a, i / a.shape.k_heads, i % a.shape.k_heads);
}

}  // namespace

void attention(const Attention& a) {
  with_type(a.q.dtype, [&](auto t) { forward<decltype(t)>(a); });
}

void attention_backward(const AttentionBackward& a) {
  with_type(a.q.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace QWEN3_ISA
}  // namespace qwen3
