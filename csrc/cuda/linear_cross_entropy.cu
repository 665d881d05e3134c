// Cross-entropy of hidden @ head^T without the logits, and without a softmax pass over anything the size of the logits.
//
// Softmax is invariant to a shift of the row, and bf16 has the exponent range of fp32. So the epilogue of the logits GEMM
// writes e_j = exp(l_j - r) against a reference r that is known before the GEMM: the logit of the row's own label, a dot
// product per token. Then, with rest = sum of e_j over j != label,
//     nll = log1p(rest),     dlogits_j = e_j / (1 + rest),     dlogits_label = -rest / (1 + rest),
// which keeps its relative accuracy when the probability of the label goes to 1. The factor 1 / (1 + rest) is constant
// along a row, so it moves out of the two gradient GEMMs: dhidden = s (e @ head) and dhead = e^T @ (s hidden), with e = 0
// at the label, whose part the caller adds to both in fp32.
// Three GEMMs, each at the rate of a plain one, and one write and two reads of e per element of the logits.
//
// When rest overflows (a label 44 nats below the maximum), the blocks of rows concerned run again with the true row maximum
// as reference. The decision is made on the device, so there is no host synchronisation.
#include "cuda/linear_cross_entropy.h"

#include <cmath>
#include <type_traits>

#include "cuda/hopper.h"

namespace qwen3::cuda {
namespace {

constexpr int kTileM = 128, kTileN = 256, kTileK = 64, kStages = 4;  // 48 KB a stage
constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);
constexpr int kClusterRows = 2 * kTileM;  // a cluster of two CTAs shares the tile of the head
constexpr uint32_t kBytesA = kTileM * kTileK * 2, kBytesB = kTileN * kTileK * 2;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kOverflow = 1.8446744e19f;  // 2^64: leaves room for the products of the gradient GEMMs

struct Scratch {
  float *label_logit, *reference;  // [n]
  float *sums, *moments;           // [n, tiles]: sum of e; sum of e * log2 e (or maxima)
  int *redo_any, *redo_row, *redo_block;  // [1], [n], [blocks of kClusterRows]
};

__host__ __device__ inline int tiles_of(int64_t v) { return int((v + kTileN - 1) / kTileN); }
__host__ __device__ inline int blocks_of(int64_t n) { return int((n + kClusterRows - 1) / kClusterRows); }

Scratch carve(float* p, int64_t n, int64_t v) {
  const int64_t tiles = tiles_of(v);
  Scratch s;
  s.label_logit = p;
  s.reference = s.label_logit + n;
  s.sums = s.reference + n;
  s.moments = s.sums + n * tiles;
  s.redo_any = reinterpret_cast<int*>(s.moments + n * tiles);
  s.redo_row = s.redo_any + 1;
  s.redo_block = s.redo_row + n;
  return s;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}
__device__ inline const __nv_bfloat16* bf16_row(const Rows& r, int64_t i) {
  return static_cast<const __nv_bfloat16*>(r.data) + i * r.stride;
}

// A warp per token. Ignored rows get the reference +inf, which makes all their e_j zero; a label out of range gives NaN.
__global__ void label_logits(LinearCrossEntropy a, Scratch s) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (i >= a.n) return;
  const int lane = threadIdx.x % 32;
  const int64_t label = a.labels[i];
  float dot = 0;
  if (label >= 0 && label < a.v && label != a.ignore_index) {
    const __nv_bfloat16 *x = bf16_row(a.hidden, i), *w = bf16_row(a.head, label);
    for (int64_t j = lane * 8; j < a.h; j += 256) {
      const uint4 px = *reinterpret_cast<const uint4*>(x + j), pw = *reinterpret_cast<const uint4*>(w + j);
      const auto *bx = reinterpret_cast<const __nv_bfloat162*>(&px), *bw = reinterpret_cast<const __nv_bfloat162*>(&pw);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 fx = __bfloat1622float2(bx[e]), fw = __bfloat1622float2(bw[e]);
        dot = fmaf(fx.x, fw.x, fmaf(fx.y, fw.y, dot));
      }
    }
    dot = warp_sum(dot) * a.inverse_temperature;
  } else {
    dot = label == a.ignore_index ? INFINITY : NAN;
  }
  if (lane == 0) {
    s.label_logit[i] = s.reference[i] = dot;
    if (i % kClusterRows == 0) s.redo_block[i / kClusterRows] = 0;
    if (i == 0) *s.redo_any = 0;
  }
}

// The ring of stages between the thread that loads and the two warpgroups that multiply, in both CTAs of a cluster.
template <int STAGES> struct Ring {
  static constexpr int kBarriers = 2 * STAGES * 8;  // bytes
  uint64_t *const full, *const empty;
  int stage = 0, before = 0;
  uint32_t phase = 0;

  __device__ explicit Ring(uint8_t* barriers) : full(reinterpret_cast<uint64_t*>(barriers)), empty(full + STAGES) {}
  __device__ void init() const {  // by one thread; the cluster synchronises after it
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, 2 * kConsumers);
    }
    barrier_init_fence();
  }
  __device__ __forceinline__ void next() {
    before = stage;
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
  // The loading thread waits for the stage, into which so many bytes will come.
  __device__ __forceinline__ void expect(uint32_t bytes) const {
    barrier_wait(empty + stage, phase ^ 1);
    barrier_expect_bytes(full + stage, bytes);
  }
  // A multiplying warpgroup's step k of a tile. The products of the step before are done then: its stage goes back to both
  // producers, and that of the last by finish().
  template <class Products> __device__ __forceinline__ void multiply(int k, Products products) {
    barrier_wait(full + stage, phase);
    wgmma_fence();
    products();
    wgmma_commit();
    if (k > 0) {
      wgmma_wait<1>();
      release();
    }
    next();
  }
  __device__ __forceinline__ void finish() const {
    wgmma_wait<0>();
    release();
  }

 private:
  __device__ __forceinline__ void release() const {
    if (threadIdx.x % 128 < 2) barrier_arrive_in_cluster(empty + before, threadIdx.x % 128);
  }
};

constexpr int kShared = kStages * (kBytesA + kBytesB) + Ring<kStages>::kBarriers;

// The e of a tile, held back to be stored piece by piece between the products of the next tile: stored at once they keep the
// tensor cores waiting (at H 1024 and 2048 the kernel was at 83 and 92 % of the rate of a large product, and is at 88 and 96;
// without any stores 90 and 97). LATE: they change threads only then, too, for which the entropy leaves no registers.
template <bool LATE> struct Held {
  static constexpr int kSlots = 16;
  uint32_t packed[kSlots][4];  // slot 8 half + g: row + 8 half, columns 32 g to 32 g + 31 among the threads of a quad
  __nv_bfloat16* to[2] = {};   // column 8 q of those rows
  int columns = 0;             // from there on

  __device__ __forceinline__ void store(int slot) {
    const int half = slot / 8, column = slot % 8 * 32;
    auto& r = packed[slot];
    if (LATE) quad_transpose(r, threadIdx.x % 4);
    if (to[half] && column < columns) *reinterpret_cast<uint4*>(to[half] + column) = {r[0], r[1], r[2], r[3]};
  }
};

enum class Mode { exponentials, exponentials_and_entropy, maxima };

// The GEMM. Each CTA of a cluster has its own 128 rows of hidden; both share a 256-row tile of the head, of which each
// loads one half for the two. Warpgroup 0 feeds the ring of stages, the other two multiply 64 rows each and run the
// epilogue; with four stages between them they drift apart, so one multiplies while the other exponentiates.
template <Mode MODE>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    logits_kernel(const __grid_constant__ CUtensorMap hidden_map, const __grid_constant__ CUtensorMap head_map,
                  LinearCrossEntropy a, Scratch s, bool only_redo) {
  if (only_redo && !*s.redo_any) return;
  extern __shared__ __align__(1024) uint8_t stages[];
  Ring<kStages> ring(stages + kStages * (kBytesA + kBytesB));
  const auto tile_a = [&](int stage) { return stages + stage * (kBytesA + kBytesB); };
  const auto tile_b = [&](int stage) { return tile_a(stage) + kBytesA; };

  const uint32_t rank = cluster_rank();
  const int group = uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    tma_prefetch_map(&hidden_map);
    tma_prefetch_map(&head_map);
    ring.init();
  }
  cluster_sync();

  const int blocks = blocks_of(a.n), tiles = tiles_of(a.v), steps = int((a.h + kTileK - 1) / kTileK);
  const int total = blocks * tiles, clusters = gridDim.x / 2;

  if (group == 0) {
    registers_release<40>();
    if (threadIdx.x == 0) {
      for (int t = blockIdx.x / 2; t < total; t += clusters) {
        const int block = t % blocks, tile = t / blocks;
        if (only_redo && !s.redo_block[block]) continue;
        for (int k = 0; k < steps; ++k) {
          ring.expect(kBytesA + kBytesB);
          uint64_t* const there = ring.full + ring.stage;
          tma_load(tile_a(ring.stage), &hidden_map, there, k * kTileK, block * kClusterRows + rank * kTileM);
          tma_load_multicast(tile_b(ring.stage) + rank * (kBytesB / 2), &head_map, there, k * kTileK,
                             tile * kTileN + rank * (kTileN / 2), 3);
          ring.next();
        }
      }
    }
  } else {
    registers_take<232>();
    const int consumer = group - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, q = lane % 4;
    constexpr bool kLate = MODE != Mode::exponentials_and_entropy;
    float acc[128];
    Held<kLate> held;
    for (int t = blockIdx.x / 2; t < total; t += clusters) {
      const int block = t % blocks, tile = t / blocks;
      if (only_redo && !uniform(s.redo_block[block])) continue;
      const int64_t first_row = int64_t(block) * kClusterRows + rank * kTileM + consumer * 64 + warp * 16 + lane / 4;
      const int64_t first_column = int64_t(tile) * kTileN;
      float reference[2];  // read before the products, which hide the latency
      int64_t label[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row + 8 * half;
        reference[half] = MODE != Mode::maxima && row < a.n ? s.reference[row] * kLog2e : INFINITY;
        label[half] = MODE != Mode::maxima && row < a.n ? a.labels[row] - first_column : -1;
      }
      int k = 0;
      const auto step = [&]() __attribute__((always_inline)) {
        ring.multiply(k, [&]() __attribute__((always_inline)) {
          const uint64_t da = matrix_descriptor(tile_a(ring.stage) + consumer * (kBytesA / 2));
          const uint64_t db = matrix_descriptor(tile_b(ring.stage));
#pragma unroll
          for (int i = 0; i < kTileK / 16; ++i) wgmma_m64n256k16(acc, da + 2 * i, db + 2 * i, k > 0 || i > 0);
        });
        ++k;
      };
      if (MODE != Mode::maxima) {
#pragma unroll
        for (int slot = 0; slot < held.kSlots; ++slot) {
#pragma unroll 1
          for (const int until = (steps * (slot + 1) + held.kSlots - 1) / held.kSlots; k < until;) step();
          held.store(slot);
        }
      } else {
        while (k < steps) step();
      }
      ring.finish();

      const int columns = int(min(int64_t(kTileN), a.v - first_column));
      if (columns < kTileN) {
#pragma unroll
        for (int i = 0; i < 128; ++i)
          if (i / 4 * 8 + 2 * q + i % 2 >= columns) acc[i] = -INFINITY;
      }
      const float scale = a.inverse_temperature * kLog2e;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row + 8 * half;
        const bool live = row < a.n;
        if constexpr (MODE == Mode::maxima) {
          float top = -INFINITY;
#pragma unroll
          for (int j = 0; j < 32; ++j) top = fmaxf(top, fmaxf(acc[4 * j + 2 * half], acc[4 * j + 2 * half + 1]));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
          top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
          if (live && q == 0) s.moments[row * tiles + tile] = top * a.inverse_temperature;
        } else {
          if (label[half] >= 0 && label[half] < kTileN) {  // rare: the label's own logit must not count in the sum
#pragma unroll
            for (int j = 0; j < 64; ++j)
              if (8 * (j / 2) + 2 * q + j % 2 == int(label[half])) acc[4 * (j / 2) + 2 * half + j % 2] = -INFINITY;
          }
          float sum = 0, moment = 0;
          held.to[half] = a.unnormalised.data && live
              ? static_cast<__nv_bfloat16*>(a.unnormalised.data) + row * a.unnormalised.stride + first_column + 8 * q : nullptr;
          held.columns = columns - 8 * q;
#pragma unroll
          for (int g = 0; g < 8; ++g) {
            auto& packed = held.packed[8 * half + g];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int j = 4 * g + i;
              float e[2];
#pragma unroll
              for (int c = 0; c < 2; ++c) {
                const float x = fmaf(acc[4 * j + 2 * half + c], scale, -reference[half]);
                e[c] = exp2_fast(x);
                sum += e[c];
                if (MODE == Mode::exponentials_and_entropy) moment += e[c] > 0 ? e[c] * x : 0;
              }
              packed[i] = pack_pair(e[0], e[1]);
            }
            if (!kLate) quad_transpose(packed, q);
          }
          sum += __shfl_xor_sync(~0u, sum, 1);
          sum += __shfl_xor_sync(~0u, sum, 2);
          if (live && q == 0) s.sums[row * tiles + tile] = sum;
          if constexpr (MODE == Mode::exponentials_and_entropy) {
            moment += __shfl_xor_sync(~0u, moment, 1);
            moment += __shfl_xor_sync(~0u, moment, 2);
            if (live && q == 0) s.moments[row * tiles + tile] = moment;
          }
        }
      }
    }
    if (MODE != Mode::maxima) {
#pragma unroll
      for (int slot = 0; slot < held.kSlots; ++slot) held.store(slot);
    }
  }
  cluster_sync();  // a CTA must not leave while its partner may still signal its barriers
}

__device__ inline float ordered_sum(const float* p, int count, int lane) {
  float sum = 0;
  for (int i = lane; i < count; i += 32) sum += p[i];
  return warp_sum(sum);
}

// Marks the rows, and their blocks, whose sum overflowed.
__global__ void find_overflow(LinearCrossEntropy a, Scratch s) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (i >= a.n) return;
  const int tiles = tiles_of(a.v), lane = threadIdx.x % 32;
  const float sum = ordered_sum(s.sums + i * tiles, tiles, lane), reference = s.reference[i];
  const bool redo = !(sum < kOverflow) && !isnan(reference) && reference != INFINITY;
  if (lane == 0) {
    s.redo_row[i] = redo;
    if (redo) s.redo_block[i / kClusterRows] = *s.redo_any = 1;
  }
}

__global__ void raise_references(LinearCrossEntropy a, Scratch s) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (i >= a.n || !s.redo_row[i]) return;
  const int tiles = tiles_of(a.v), lane = threadIdx.x % 32;
  float top = -INFINITY;
  for (int t = lane; t < tiles; t += 32) top = fmaxf(top, s.moments[i * tiles + t]);
  top = warp_max(top);
  if (lane == 0) s.reference[i] = fmaxf(top, s.label_logit[i]);
}

// The per-token results, and the factors of the gradient: of the row, and of its label's entry.
__global__ void finish(LinearCrossEntropy a, Scratch s) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (i >= a.n) return;
  const int tiles = tiles_of(a.v), lane = threadIdx.x % 32;
  const int64_t label = a.labels[i];
  const bool ignored = label == a.ignore_index;
  const float rest = ordered_sum(s.sums + i * tiles, tiles, lane);
  const float shift = s.label_logit[i] - s.reference[i];  // 0 unless the row ran again
  const float own = expf(shift), total = own + rest;
  const float log_total = shift == 0 ? log1pf(rest) : logf(total);
  const float lse = s.reference[i] + log_total;
  const float factor = ignored || !a.weight ? 0 : a.weight[i] * a.inverse_temperature / total;
  const float row_scale = ignored ? 0 : factor * (1 + 2 * a.z_loss * lse);
  if (lane == 0) {
    a.nll[i] = ignored ? 0 : log_total - shift;
    a.lse[i] = ignored ? 0 : lse;
  }
  if (a.entropy) {
    const float moment = ordered_sum(s.moments + i * tiles, tiles, lane) * kLn2 + (own > 0 ? own * shift : 0);
    if (lane == 0) a.entropy[i] = ignored ? 0 : log_total - moment / total;
  }
  if (!a.weight) return;
  if (lane == 0) {
    a.row_scale[i] = row_scale;
    a.label_factor[i] = ignored ? 0 : factor * (2 * a.z_loss * lse * own - rest);
  }
  const __nv_bfloat16* x = bf16_row(a.hidden, i);
  auto* out = static_cast<__nv_bfloat16*>(a.scaled_hidden.data) + i * a.scaled_hidden.stride;
  for (int64_t j = lane * 8; j < a.h; j += 256) {
    uint4 p = *reinterpret_cast<const uint4*>(x + j);
    auto* b = reinterpret_cast<__nv_bfloat162*>(&p);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 f = __bfloat1622float2(b[e]);
      b[e] = __floats2bfloat162_rn(f.x * row_scale, f.y * row_scale);
    }
    *reinterpret_cast<uint4*>(out + j) = p;
  }
}

// --- the head's gradient
//
// head_grad^T in tiles like those of the logits: each CTA of a cluster has its own 128 rows of the vocabulary, both share
// 256 columns of the hidden states. A chunk of few tokens is a short contraction for its results, so what matters is to keep
// these off the multiplying warpgroups: they leave them in shared memory, rounded, and go on. TMA adds them in L2, which has
// by then what they are added to: it was asked for bit by bit, not to hold up the operands (H 4096, chunks of 1,024 tokens:
// 2.00 ms; asked for at once 2.23, not at all 2.32, read into shared memory 2.18 to 2.30, by torch 2.11; stored 1.87).
constexpr int kGradStages = 3, kBox = 64 * 64 * 2;  // a box: 64 x 64 elements
constexpr int kBoxesA = kTileM / 64, kBoxesB = kTileN / 64, kGradStage = (kBoxesA + kBoxesB) * kBox;
constexpr int kGradShared = kGradStages * kGradStage + kConsumers * kBoxesB * kBox + Ring<kGradStages>::kBarriers;

template <bool ADD>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    head_gradient_kernel(const __grid_constant__ CUtensorMap e_map, const __grid_constant__ CUtensorMap hidden_map,
                         const __grid_constant__ CUtensorMap out_map, int n, int h, int v) {
  extern __shared__ __align__(1024) uint8_t stages[];
  uint8_t* const results = stages + kGradStages * kGradStage;
  Ring<kGradStages> ring(results + kConsumers * kBoxesB * kBox);
  const uint32_t rank = cluster_rank();
  const int group = uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    tma_prefetch_map(&e_map);
    tma_prefetch_map(&hidden_map);
    tma_prefetch_map(&out_map);
    ring.init();
  }
  cluster_sync();

  // The columns of a pair of row tiles come one after another: e, the larger operand, is read from memory but once.
  const int columns = (h + kTileN - 1) / kTileN, total = blocks_of(v) * columns, steps = (n + 63) / 64;
  if (group == 0) {
    registers_release<40>();
    if (threadIdx.x == 0) {
      for (int t = blockIdx.x / 2; t < total; t += gridDim.x / 2) {
        const int row = t / columns * kClusterRows + rank * kTileM, column = t % columns * kTileN;
        for (int k = 0, old = 0; k < steps; ++k) {
          if (ADD)
            for (; old * steps < (k + 1) * kBoxesA * kBoxesB; ++old)
              tma_prefetch(&out_map, column + old % kBoxesB * 64, row + old / kBoxesB * 64);
          uint8_t* const a = stages + ring.stage * kGradStage;
          uint8_t* const b = a + (kBoxesA + rank * (kBoxesB / 2)) * kBox;
          uint64_t* const there = ring.full + ring.stage;
          ring.expect(kGradStage);
#pragma unroll
          for (int i = 0; i < kBoxesA; ++i) tma_load(a + i * kBox, &e_map, there, row + 64 * i, k * 64);
#pragma unroll
          for (int i = 0; i < kBoxesB / 2; ++i)
            tma_load_multicast(b + i * kBox, &hidden_map, there, column + rank * (kTileN / 2) + 64 * i, k * 64, 3);
          ring.next();
        }
      }
    }
  } else {
    registers_take<232>();
    const int consumer = group - 1;
    uint8_t* const mine = results + consumer * kBoxesB * kBox;
    // Where the lane's row of a 16 x 16 block goes in a box, before the swizzle: lanes 0 to 15 point to the rows of its left
    // half, the others to those of its right one.
    const int line = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16, half = threadIdx.x % 32 / 16;
    const uint32_t place = shared_address(mine) + line * 128;
    float acc[128];
    for (int t = blockIdx.x / 2; t < total; t += gridDim.x / 2) {
      const int row = t / columns * kClusterRows + rank * kTileM + consumer * 64, column = t % columns * kTileN;
      for (int k = 0; k < steps; ++k) {
        ring.multiply(k, [&]() __attribute__((always_inline)) {
          const uint8_t* const a = stages + ring.stage * kGradStage;
          const uint64_t da = matrix_descriptor_transposed(a + consumer * kBox, kBox);
          const uint64_t db = matrix_descriptor_transposed(a + kBoxesA * kBox, kBox);
#pragma unroll
          for (int i = 0; i < 4; ++i) wgmma_m64n256k16<1, 1>(acc, da + 128 * i, db + 128 * i, k > 0 || i > 0);
        });
      }
      if (threadIdx.x % 128 == 0) bulk_wait_read();  // the results of the tile before have left
      named_sync(1 + consumer, 128);
      ring.finish();
#pragma unroll
      for (int i = 0; i < kTileN / 16; ++i) {
        uint32_t r[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) r[j] = pack_pair(acc[8 * i + 2 * j], acc[8 * i + 2 * j + 1]);
        store_matrices(place + i / 4 * kBox + ((i % 4 * 2 + half) ^ line % 8) * 16, r);
      }
      async_proxy_fence();
      named_sync(1 + consumer, 128);
      if (threadIdx.x % 128 == 0) {
#pragma unroll
        for (int i = 0; i < kBoxesB; ++i) {
          if (ADD) tma_add(&out_map, mine + i * kBox, column + 64 * i, row);
          else tma_store(&out_map, mine + i * kBox, column + 64 * i, row);
        }
        bulk_commit();
      }
    }
    if (threadIdx.x % 128 == 0) bulk_wait_read();
  }
  cluster_sync();  // a CTA must not leave while its partner may still signal its barriers
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("linear_cross_entropy: ") + cudaGetErrorString(error));
}

// Launches a persistent kernel of clusters of two.
template <auto KERNEL, class... Args> void launch(int shared, cudaStream_t stream, const Args&... args) {
  const int sms = multiprocessors_for<KERNEL>(shared);
  KERNEL<<<sms / 2 * 2, kThreads, shared, stream>>>(args...);
  check(cudaGetLastError());
}

template <Mode MODE> void launch_logits(const LinearCrossEntropy& a, const Scratch& s, bool only_redo, cudaStream_t stream) {
  const CUtensorMap hidden = tensor_map(a.hidden.data, a.n, a.h, a.hidden.stride, kTileM);
  const CUtensorMap head = tensor_map(a.head.data, a.v, a.h, a.head.stride, kTileN / 2);
  launch<logits_kernel<MODE>>(kShared, stream, hidden, head, a, s, only_redo);
}

void launch_exponentials(const LinearCrossEntropy& a, const Scratch& s, bool only_redo, cudaStream_t stream) {
  a.entropy ? launch_logits<Mode::exponentials_and_entropy>(a, s, only_redo, stream)
            : launch_logits<Mode::exponentials>(a, s, only_redo, stream);
}

}  // namespace

int64_t linear_cross_entropy_scratch(int64_t n, int64_t v) { return 3 * n + 2 * n * tiles_of(v) + blocks_of(n) + 1; }

void linear_cross_entropy(const LinearCrossEntropy& a, uintptr_t stream_handle) {
  if (a.h % 8 != 0 || a.v % 8 != 0)
    throw std::invalid_argument("linear_cross_entropy: the hidden size and the vocabulary must be multiples of 8");
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  const Scratch s = carve(a.scratch, a.n, a.v);
  const int grid = int((a.n * 32 + 255) / 256);
  label_logits<<<grid, 256, 0, stream>>>(a, s);
  launch_exponentials(a, s, false, stream);
  find_overflow<<<grid, 256, 0, stream>>>(a, s);
  launch_logits<Mode::maxima>(a, s, true, stream);
  raise_references<<<grid, 256, 0, stream>>>(a, s);
  launch_exponentials(a, s, true, stream);
  finish<<<grid, 256, 0, stream>>>(a, s);
  check(cudaGetLastError());
}

void head_gradient(int64_t n, int64_t h, int64_t v, Rows unnormalised, Rows scaled_hidden, Rows head_grad, bool add,
                   uintptr_t stream) {
  if (h % 8 != 0 || v % 8 != 0)
    throw std::invalid_argument("head_gradient: the hidden size and the vocabulary must be multiples of 8");
  const CUtensorMap e = tensor_map(unnormalised.data, n, v, unnormalised.stride, 64);
  const CUtensorMap x = tensor_map(scaled_hidden.data, n, h, scaled_hidden.stride, 64);
  const CUtensorMap out = tensor_map(head_grad.data, v, h, head_grad.stride, 64);
  const auto run = [&](auto adds) {
    launch<head_gradient_kernel<adds.value>>(kGradShared, reinterpret_cast<cudaStream_t>(stream), e, x, out, int(n), int(h),
                                             int(v));
  };
  add ? run(std::true_type()) : run(std::false_type());
}

}  // namespace qwen3::cuda
