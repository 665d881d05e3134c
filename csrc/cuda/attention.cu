// Causal or full attention forward for Hopper: TMA loads, wgmma products, a warpgroup that loads and two that multiply.
//
// A CTA owns 128 queries of one head; each multiplying warpgroup has 64 of them. It walks over blocks of 128 keys from the
// last visible one down, so that only the first block it meets needs a mask. While the products P V of one block run, the
// scores of the next are already there and their softmax is computed; and the two warpgroups take turns at the tensor cores,
// so that one's softmax also hides behind the other's products.
#include "cuda/attention.h"

#include <cmath>

#include "cuda/hopper.h"

namespace qwen3::cuda {
namespace {

constexpr int kWidth = 128, kQueries = 128, kKeys = 128, kStages = 2;
constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);
constexpr int kSlab = 128 * 64 * 2;        // bytes of 128 rows x 64 elements, the unit that TMA swizzles
constexpr int kTile = kWidth / 64 * kSlab;  // 128 rows of a head
constexpr int kShared = (1 + 2 * kStages) * kTile + 1024 + (1 + 4 * kStages) * 8;
constexpr float kLog2e = 1.4426950408889634f;

struct Work {
  int batch, first_token, length, block, head;  // first_token: of the sequence, in its batch
  int64_t row;                                  // of the sequence's first token in out and lse
};

// Tiles in the order of their work, longest first; heads run fastest, so that those that share keys run together.
__device__ bool find_work(const Attention& a, int tile, Work& w) {
  w.head = tile % a.q_heads;
  tile /= int(a.q_heads);
  if (a.cu_seqlens == nullptr) {
    const int blocks = int((a.length + kQueries - 1) / kQueries);
    w.batch = tile % int(a.sequences);
    w.block = blocks - 1 - tile / int(a.sequences);
    w.first_token = 0;
    w.length = int(a.length);
    w.row = int64_t(w.batch) * a.length;
    return true;
  }
  w.batch = 0;
  for (int i = 0; i < int(a.sequences); ++i) {
    const int begin = a.cu_seqlens[i], length = a.cu_seqlens[i + 1] - begin, blocks = (length + kQueries - 1) / kQueries;
    if (tile < blocks) {
      w.block = blocks - 1 - tile;
      w.first_token = begin;
      w.length = length;
      w.row = begin;
      return true;
    }
    tile -= blocks;
  }
  return false;  // the grid is an upper bound
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The running softmax of a thread's two rows. `scores` become unnormalised probabilities, `keep` the factors of what was
// summed before.
struct Softmax {
  float peak[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  __device__ void step(float (&scores)[64], float scale_log2, float (&keep)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = peak[half];
#pragma unroll
      for (int j = 0; j < 16; ++j) top = fmaxf(top, fmaxf(scores[4 * j + 2 * half], scores[4 * j + 2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float shift = top == -INFINITY ? 0 : top * scale_log2;
      keep[half] = exp2_fast(peak[half] * scale_log2 - shift);
      peak[half] = top;
      float part = 0;
#pragma unroll
      for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = scores[4 * j + 2 * half + c];
          x = exp2_fast(fmaf(x, scale_log2, -shift));
          part += x;
        }
      sum[half] = fmaf(sum[half], keep[half], part);
    }
  }
};

__device__ inline void pack(const float (&p)[64], uint32_t (&packed)[8][4]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(p[2 * i], p[2 * i + 1]);
    packed[i / 4][i % 4] = reinterpret_cast<const uint32_t&>(pair);
  }
}

template <bool CAUSAL>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ CUtensorMap v_map, const __grid_constant__ Attention a) {
  extern __shared__ uint8_t raw[];
  uint8_t* const q_tile = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(raw) + 1023) / 1024 * 1024);
  uint8_t *const k_tiles = q_tile + kTile, *const v_tiles = k_tiles + kStages * kTile;
  uint64_t* const q_full = reinterpret_cast<uint64_t*>(v_tiles + kStages * kTile);
  uint64_t *const k_full = q_full + 1, *const k_empty = k_full + kStages;
  uint64_t *const v_full = k_empty + kStages, *const v_empty = v_full + kStages;

  Work w;
  if (!find_work(a, blockIdx.x, w)) return;
  const int visible = CAUSAL ? min(w.length, (w.block + 1) * kQueries) : w.length;
  const int blocks = (visible + kKeys - 1) / kKeys;
  const int k_head = w.head / int(a.q_heads / a.k_heads);

  if (threadIdx.x == 0) {
    tma_prefetch_map(&q_map), tma_prefetch_map(&k_map), tma_prefetch_map(&v_map);
    barrier_init(q_full, 1);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(k_full + i, 1), barrier_init(v_full + i, 1);
      barrier_init(k_empty + i, kConsumers), barrier_init(v_empty + i, kConsumers);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    registers_release<24>();
    if (threadIdx.x == 0) {
      const auto load = [&](uint8_t* tile, const CUtensorMap* map, uint64_t* full, int head, int token) {
        barrier_expect_bytes(full, kTile);
        for (int i = 0; i < kWidth / 64; ++i) tma_load(tile + i * kSlab, map, full, i * 64, head, token, w.batch);
      };
      load(q_tile, &q_map, q_full, w.head, w.first_token + w.block * kQueries);
      for (int i = 0; i <= blocks; ++i) {  // the values of a block are needed after the keys of the next
        if (i < blocks) {
          const int stage = i % kStages;
          barrier_wait(k_empty + stage, i / kStages % 2 ^ 1);
          load(k_tiles + stage * kTile, &k_map, k_full + stage, k_head, w.first_token + (blocks - 1 - i) * kKeys);
        }
        if (i > 0) {
          const int stage = (i - 1) % kStages;
          barrier_wait(v_empty + stage, (i - 1) / kStages % 2 ^ 1);
          load(v_tiles + stage * kTile, &v_map, v_full + stage, k_head, w.first_token + (blocks - i) * kKeys);
        }
      }
    }
    return;
  }

  registers_take<240>();
  const int consumer = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, q = lane % 4;
  const bool elected = threadIdx.x % 128 == 0;
  const float scale_log2 = a.scale * kLog2e;
  const int first_row = w.block * kQueries + consumer * 64 + warp * 16 + lane / 4;
  float scores[64], out[64];
  uint32_t probs[8][4];
  Softmax softmax;
  float keep[2];

  const uint64_t q_descriptor = matrix_descriptor(q_tile + consumer * 64 * 128);
  const auto score_products = [&](int stage) {
    const uint64_t k_descriptor = matrix_descriptor(k_tiles + stage * kTile);
#pragma unroll
    for (int i = 0; i < kWidth / 16; ++i) {
      const int offset = (i / 4 * kSlab + i % 4 * 32) >> 4;
      wgmma_m64n128k16(scores, q_descriptor + offset, k_descriptor + offset, i > 0);
    }
    wgmma_commit();
  };
  const auto value_products = [&](int stage, bool accumulate) {
    const uint64_t v_descriptor = matrix_descriptor_transposed(v_tiles + stage * kTile, kSlab);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i)
      wgmma_m64n128k16(out, probs[i], v_descriptor + (i * 16 * 128 >> 4), accumulate || i > 0);
    wgmma_commit();
  };

  if (consumer == 1) named_arrive(1, 256);  // the first warpgroup goes first
  barrier_wait(q_full, 0);
  barrier_wait(k_full, 0);
  wgmma_fence();
  score_products(0);
  wgmma_wait<0>();
  if (elected) barrier_arrive(k_empty);
  {
    const int first_key = (blocks - 1) * kKeys;
    if (CAUSAL || first_key + kKeys > w.length) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const int key = first_key + i / 4 * 8 + 2 * q + i % 2, row = first_row + i / 2 % 2 * 8;
        if (CAUSAL ? key > row : key >= w.length) scores[i] = -INFINITY;
      }
    }
  }
  softmax.step(scores, scale_log2, keep);
  pack(scores, probs);

  for (int i = 1; i < blocks; ++i) {
    const int stage = i % kStages, before = (i - 1) % kStages;
    barrier_wait(k_full + stage, i / kStages % 2);
    named_sync(1 + consumer, 256);
    wgmma_fence();
    score_products(stage);
    barrier_wait(v_full + before, (i - 1) / kStages % 2);
    value_products(before, i > 1);
    named_arrive(2 - consumer, 256);
    wgmma_wait<1>();
    if (elected) barrier_arrive(k_empty + stage);
    softmax.step(scores, scale_log2, keep);
    wgmma_wait<0>();
    if (elected) barrier_arrive(v_empty + before);
#pragma unroll
    for (int j = 0; j < 64; ++j) out[j] *= keep[j / 2 % 2];
    pack(scores, probs);
  }
  const int last = (blocks - 1) % kStages;
  barrier_wait(v_full + last, (blocks - 1) / kStages % 2);
  wgmma_fence();
  value_products(last, blocks > 1);
  wgmma_wait<0>();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = softmax.sum[half];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const float share = 1.f / total;
    const int row = first_row + 8 * half;
    const bool live = row < w.length;
    const int64_t at = (w.row + row) * a.q_heads + w.head;
    if (live && q == 0) a.lse[at] = softmax.peak[half] * a.scale + logf(total);
    auto* to = static_cast<__nv_bfloat16*>(a.out) + at * kWidth;
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 4 * g + i;
        const __nv_bfloat162 pair = __floats2bfloat162_rn(out[4 * j + 2 * half] * share, out[4 * j + 2 * half + 1] * share);
        packed[i] = reinterpret_cast<const uint32_t&>(pair);
      }
      quad_transpose(packed, q);
      if (live) *reinterpret_cast<uint4*>(to + 8 * (4 * g + q)) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("attention: ") + cudaGetErrorString(error));
}

CUtensorMap heads_map(const Attention& a, const Heads& x, int64_t heads) {
  const int64_t batches = a.cu_seqlens ? 1 : a.sequences;
  // A batch of one may have any stride; TMA wants a multiple of 16 bytes.
  const int64_t batch = batches == 1 ? a.length * x.token : x.batch;
  return tensor_map<4>(x.data, {kWidth, heads, a.length, batches}, {x.head, x.token, batch}, {64, 1, 128, 1});
}

template <bool CAUSAL> void launch(const Attention& a, cudaStream_t stream) {
  static const bool ready = [] {
    check(cudaFuncSetAttribute(forward_kernel<CAUSAL>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    return true;
  }();
  (void)ready;
  const int64_t per_head = a.cu_seqlens ? a.length / kQueries + a.sequences : (a.length + kQueries - 1) / kQueries * a.sequences;
  const CUtensorMap q = heads_map(a, a.q, a.q_heads), k = heads_map(a, a.k, a.k_heads), v = heads_map(a, a.v, a.k_heads);
  forward_kernel<CAUSAL><<<unsigned(per_head * a.q_heads), kThreads, kShared, stream>>>(q, k, v, a);
  check(cudaGetLastError());
}

}  // namespace

void attention(const Attention& a, uintptr_t stream) {
  if (!(a.scale > 0)) throw std::invalid_argument("attention: the scale must be above 0");
  a.causal ? launch<true>(a, reinterpret_cast<cudaStream_t>(stream)) : launch<false>(a, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace qwen3::cuda
