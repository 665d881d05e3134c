// Causal or full attention forward for Hopper: TMA loads, wgmma products, a warpgroup that loads and two that multiply.
//
// A tile is 128 queries of one head; each multiplying warpgroup has 64 of them. It walks over blocks of 128 keys from the
// last visible one down, so that only the first block it meets needs a mask. While the products P V of one block run, the
// scores of the next are already there and their softmax is computed; and the two warpgroups take turns at the tensor cores,
// so that one's softmax also hides behind the other's products. CTAs stay and take one tile after another: the next tile's
// queries and keys arrive while this one's results are written.
#include "cuda/attention.h"

#include <algorithm>
#include <cmath>

#include "cuda/hopper.h"

namespace qwen3::cuda {
namespace {

constexpr int kWidth = 128, kQueries = 128, kKeys = 128, kStages = 2;
constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);
constexpr int kSlab = 128 * 64 * 2;        // bytes of 128 rows x 64 elements, the unit that TMA swizzles
constexpr int kTile = kWidth / 64 * kSlab;  // 128 rows of a head
constexpr int kShared = (1 + 2 * kStages) * kTile + (2 + 4 * kStages) * 8;
constexpr int64_t kCacheBytes = 32 << 20;  // keys and values that stay in L2 (50 MB)
constexpr float kLog2e = 1.4426950408889634f;

struct Work {
  int batch, first_token, length, block, head;  // first_token: of the sequence, in its batch
  int64_t row;                                  // of the sequence's first token in out and lse
};

// Deals the tiles to the CTAs in rounds, every second one backwards, so that all get about the same work. Sequences of one
// length go through in sections of heads whose keys and values fit in L2; packed documents one after another. The last section
// (document) begins with its longest tiles, the one before with its shortest, and so on in turns: at a jump from short to long
// a round is unfair to those that get the long ones (up to 9 % of the whole at B8 T4096 h16/8).
class Dealer {
 public:
  __device__ Dealer(const Attention& a, int tiles, int section) : a_(a), tiles_(tiles), section_(section) {}

  __device__ bool next(Work& w) {
    int tile = round_ * gridDim.x + (round_ % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    ++round_;
    if (tile >= tiles_) return false;
    const int q_heads = int(a_.q_heads);
    if (a_.cu_seqlens == nullptr) {
      const int blocks = blocks_of(int(a_.length)), all = int(a_.sequences) * q_heads, sections = (all + section_ - 1) / section_;
      const int section = tile / (section_ * blocks), first = section * section_, heads = min(section_, all - first);
      tile -= first * blocks;
      const int row = first + tile % heads, block = in_turn(tile / heads, blocks, sections - section);
      w = {row / q_heads, 0, int(a_.length), block, row % q_heads, row / q_heads * a_.length};
      return true;
    }
    w.head = tile % q_heads;
    tile /= q_heads;
    for (; document_ < int(a_.sequences); ++document_) {
      const int begin = a_.cu_seqlens[document_], length = a_.cu_seqlens[document_ + 1] - begin, blocks = blocks_of(length);
      if (tile < before_ + blocks) {
        w = {0, begin, length, in_turn(tile - before_, blocks, int(a_.sequences) - document_), w.head, begin};
        return true;
      }
      before_ += blocks;
    }
    return false;  // the number of tiles is an upper bound
  }

 private:
  static __device__ int blocks_of(int length) { return (length + kQueries - 1) / kQueries; }
  // The block at a place in the order; left: sections or documents to come, this one counted.
  static __device__ int in_turn(int place, int blocks, int left) { return left % 2 ? blocks - 1 - place : place; }
  const Attention& a_;
  const int tiles_, section_;
  int round_ = 0, document_ = 0, before_ = 0;  // before_: blocks of the documents before document_
};

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
  for (int i = 0; i < 32; ++i) packed[i / 4][i % 4] = pack_pair(p[2 * i], p[2 * i + 1]);
}

template <bool CAUSAL>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ CUtensorMap v_map, const __grid_constant__ Attention a, int tiles, int section) {
  extern __shared__ __align__(1024) uint8_t q_tile[];
  uint8_t *const k_tiles = q_tile + kTile, *const v_tiles = k_tiles + kStages * kTile;
  uint64_t* const q_full = reinterpret_cast<uint64_t*>(v_tiles + kStages * kTile);
  uint64_t *const q_empty = q_full + 1, *const k_full = q_empty + 1, *const k_empty = k_full + kStages;
  uint64_t *const v_full = k_empty + kStages, *const v_empty = v_full + kStages;

  if (threadIdx.x == 0) {
    tma_prefetch_map(&q_map), tma_prefetch_map(&k_map), tma_prefetch_map(&v_map);
    barrier_init(q_full, 1), barrier_init(q_empty, kConsumers);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(k_full + i, 1), barrier_init(v_full + i, 1);
      barrier_init(k_empty + i, kConsumers), barrier_init(v_empty + i, kConsumers);
    }
    barrier_init_fence();
  }
  __syncthreads();

  Dealer dealer(a, tiles, section);
  Work w{};
  int done = 0;  // blocks of keys before this tile's: block i of the tile is in stage (done + i) % kStages
  const auto stage = [&](int i) { return (done + i) % kStages; };
  const auto phase = [&](int i) { return uint32_t(done + i) / kStages % 2; };
  const auto blocks_of = [&] {
    return ((CAUSAL ? min(w.length, (w.block + 1) * kQueries) : w.length) + kKeys - 1) / kKeys;
  };

  if (threadIdx.x < 128) {
    registers_release<24>();
    if (threadIdx.x == 0) {
      for (uint32_t turn = 0; dealer.next(w); ++turn) {
        const int blocks = blocks_of(), k_head = w.head / int(a.q_heads / a.k_heads);
        const auto load = [&](uint8_t* tile, const CUtensorMap* map, uint64_t* full, int head, int token) {
          barrier_expect_bytes(full, kTile);
          for (int i = 0; i < kWidth / 64; ++i) tma_load(tile + i * kSlab, map, full, i * 64, head, token, w.batch);
        };
        barrier_wait(q_empty, turn % 2 ^ 1);
        load(q_tile, &q_map, q_full, w.head, w.first_token + w.block * kQueries);
        for (int i = 0; i <= blocks; ++i) {  // the values of a block are needed after the keys of the next
          if (i < blocks) {
            barrier_wait(k_empty + stage(i), phase(i) ^ 1);
            load(k_tiles + stage(i) * kTile, &k_map, k_full + stage(i), k_head, w.first_token + (blocks - 1 - i) * kKeys);
          }
          if (i > 0) {
            barrier_wait(v_empty + stage(i - 1), phase(i - 1) ^ 1);
            load(v_tiles + stage(i - 1) * kTile, &v_map, v_full + stage(i - 1), k_head, w.first_token + (blocks - i) * kKeys);
          }
        }
        done += blocks;
      }
    }
    return;
  }

  registers_take<240>();
  const int consumer = uniform(threadIdx.x / 128 - 1), warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, q = lane % 4;
  const bool elected = threadIdx.x % 128 == 0;
  const float scale_log2 = a.scale * kLog2e;
  const uint64_t q_descriptor = matrix_descriptor(q_tile + consumer * 64 * 128);
  if (consumer == 1) named_arrive(1, 256);  // the first warpgroup goes first

  for (uint32_t turn = 0; dealer.next(w); ++turn) {
    const int blocks = uniform(blocks_of());
    const int first_row = w.block * kQueries + consumer * 64 + warp * 16 + lane / 4;
    float scores[64], out[64], keep[2];
    uint32_t probs[8][4];
    Softmax softmax;
    const auto score_products = [&](int i) {
      const uint64_t k_descriptor = matrix_descriptor(k_tiles + stage(i) * kTile);
#pragma unroll
      for (int j = 0; j < kWidth / 16; ++j) {
        const int offset = (j / 4 * kSlab + j % 4 * 32) >> 4;
        wgmma_m64n128k16(scores, q_descriptor + offset, k_descriptor + offset, j > 0);
      }
      wgmma_commit();
    };
    const auto value_products = [&](int i) {
      const uint64_t v_descriptor = matrix_descriptor_transposed(v_tiles + stage(i) * kTile, kSlab);
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) wgmma_m64n128k16(out, probs[j], v_descriptor + (j * 16 * 128 >> 4), i > 0 || j > 0);
      wgmma_commit();
    };
    const auto release_keys = [&](int i) {
      if (!elected) return;
      barrier_arrive(k_empty + stage(i));
      if (i == blocks - 1) barrier_arrive(q_empty);
    };

    barrier_wait(q_full, turn % 2);
    barrier_wait(k_full + stage(0), phase(0));
    wgmma_fence();
    score_products(0);
    wgmma_wait<0>();
    release_keys(0);
    const int first_key = (blocks - 1) * kKeys;
    if (CAUSAL || first_key + kKeys > w.length) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const int key = first_key + i / 4 * 8 + 2 * q + i % 2, row = first_row + i / 2 % 2 * 8;
        if (CAUSAL ? key > row : key >= w.length) scores[i] = -INFINITY;
      }
    }
    softmax.step(scores, scale_log2, keep);
    pack(scores, probs);

    for (int i = 1; i < blocks; ++i) {
      barrier_wait(k_full + stage(i), phase(i));
      named_sync(1 + consumer, 256);
      wgmma_fence();
      score_products(i);
      barrier_wait(v_full + stage(i - 1), phase(i - 1));
      value_products(i - 1);
      named_arrive(2 - consumer, 256);
      wgmma_wait<1>();
      release_keys(i);
      softmax.step(scores, scale_log2, keep);
      wgmma_wait<0>();
      if (elected) barrier_arrive(v_empty + stage(i - 1));
#pragma unroll
      for (int j = 0; j < 64; ++j) out[j] *= keep[j / 2 % 2];
      pack(scores, probs);
    }
    barrier_wait(v_full + stage(blocks - 1), phase(blocks - 1));
    wgmma_fence();
    value_products(blocks - 1);
    wgmma_wait<0>();
    if (elected) barrier_arrive(v_empty + stage(blocks - 1));
    done += blocks;

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
          packed[i] = pack_pair(out[4 * j + 2 * half] * share, out[4 * j + 2 * half + 1] * share);
        }
        quad_transpose(packed, q);
        if (live) *reinterpret_cast<uint4*>(to + 8 * (4 * g + q)) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
    }
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("attention: ") + cudaGetErrorString(error));
}

CUtensorMap heads_map(const Attention& a, const Heads& x, int64_t heads) {
  return tensor_map(x, a.cu_seqlens ? 1 : a.sequences, a.length, heads, kWidth, kKeys);
}

template <bool CAUSAL> void launch(const Attention& a, cudaStream_t stream) {
  const int sms = multiprocessors_for<forward_kernel<CAUSAL>>(kShared);
  const int64_t blocks = (a.length + kQueries - 1) / kQueries;
  const int64_t tiles = (a.cu_seqlens ? a.length / kQueries + a.sequences : blocks * a.sequences) * a.q_heads;
  if (tiles > INT32_MAX) throw std::invalid_argument("attention: more than 2^31 tiles of 128 queries and a head");
  // CTAs that stay: 633 against 565 TFLOP/s of a CTA per tile at B4 T4096 h32/8, 624 against 616 at T16384, 470 against 375 at
  // B16 T1024. How much of L2 a section may take (16 to 48 MB) makes less than 1 %.
  const int64_t all_heads = a.sequences * a.q_heads, k_heads = std::max<int64_t>(kCacheBytes / (a.length * 4 * kWidth), 1);
  const int64_t section = std::min(k_heads * (a.q_heads / a.k_heads), all_heads);
  const CUtensorMap q = heads_map(a, a.q, a.q_heads), k = heads_map(a, a.k, a.k_heads), v = heads_map(a, a.v, a.k_heads);
  forward_kernel<CAUSAL><<<unsigned(std::min<int64_t>(tiles, sms)), kThreads, kShared, stream>>>(q, k, v, a, int(tiles), int(section));
  check(cudaGetLastError());
}

}  // namespace

void attention(const Attention& a, uintptr_t stream) {
  if (!(a.scale > 0)) throw std::invalid_argument("attention: the scale must be above 0");
  a.causal ? launch<true>(a, reinterpret_cast<cudaStream_t>(stream)) : launch<false>(a, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace qwen3::cuda
