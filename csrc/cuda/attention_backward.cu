// Backward of csrc/cuda/attention.cu: deterministic, without buffers or atomics for the gradients of keys and values.
//
// A CTA owns 128 keys of one key head and walks over the queries that see them, of every query head of the group, 64 at a
// time; dK and dV stay in registers throughout. Each of its two multiplying warpgroups has 64 keys. A step is five products:
// S^T = K Q^T and dP^T = V dO^T; dV += P^T dO and dK += dS^T Q, with P^T and dS^T from registers; dQ = dS K, with dS through
// shared memory, which the warpgroups take by turns, so that each waits for the other only every second step and has the
// wide operand that spares shared memory: 112 bytes a cycle (of 128) at the tensor cores' full rate. dQ goes from registers
// straight to its sum in memory, in the registers' order; through shared memory it would be 137.
//
// dQ is a sum over CTAs, taken in a fixed order: every block of queries has a counter of the contributions that it has got,
// and a contribution waits for its turn. No one waits in practice, because of how the work is dealt. Even key heads go from
// the last block of keys (few queries see it) to the first, odd ones the other way, and the queries of a block of keys are
// walked so that the CTA before in the order is always a step ahead: upwards from the diagonal for even heads; down to it
// for odd ones, whose CTAs start one after another as the even heads' end. Both kinds together fill the processors evenly.
// A contribution waits only for work dealt before it, so there is always one that can run.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cuda/attention.h"
#include "cuda/hopper.h"

namespace qwen3::cuda {
namespace {

constexpr int kWidth = 128, kKeys = 128, kQueries = 64, kStages = 3;
constexpr int kAdders = 3;  // threads that add to dQ, a step each: a contribution takes longer than a step
constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);
constexpr int kSlab = 64 * 128;              // bytes of 64 elements of 64 rows; of 128 rows twice that, in one piece
constexpr int kKeyTile = 4 * kSlab, kQueryTile = 2 * kSlab;
constexpr int kRows = kQueries * 4;          // bytes of a number a query
constexpr int kSums = kQueries * kWidth * 4;  // bytes of a block of dQ
constexpr int kShared = 3 * kKeyTile + kSums + 2 * kStages * (kQueryTile + kRows) + (3 + kAdders + 4 * kStages) * 8 + (kStages + 1) * 4;
constexpr float kLog2e = 1.4426950408889634f;

__device__ inline int blocks_of(int length) { return (length + kKeys - 1) / kKeys; }

// The scratch is laid out by tiles of 128 tokens, of which every sequence has its own; packed documents leave gaps, so that
// where a document begins follows from its first token alone.
__device__ inline int first_tile(const AttentionBackward& a, int sequence) {
  return a.cu_seqlens ? a.cu_seqlens[sequence] / kKeys + sequence : sequence * blocks_of(int(a.length));
}

__device__ inline int sequence_at(const AttentionBackward& a, int tile) {
  if (a.cu_seqlens == nullptr) return tile / blocks_of(int(a.length));
  int low = 0, high = int(a.sequences) - 1;  // the last one that begins at or before the tile
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    first_tile(a, middle) <= tile ? low = middle : high = middle - 1;
  }
  return low;
}

struct Sequence {
  int batch, first_token, length;
  int64_t row;  // of the first token in out and the gradients
};

__device__ inline Sequence sequence(const AttentionBackward& a, int s) {
  if (a.cu_seqlens == nullptr) return {s, 0, int(a.length), s * a.length};
  const int begin = a.cu_seqlens[s];
  return {0, begin, a.cu_seqlens[s + 1] - begin, begin};
}

// What a CTA does: one or two blocks of keys of a head.
struct Work {
  int sequence, k_head, index;
};

// The ticket's work; false for a ticket too many.
__device__ inline bool deal(const AttentionBackward& a, bool paired, int ticket, Work& w) {
  const int s = a.cu_seqlens ? sequence_at(a, ticket / int(a.k_heads)) : 0;
  if (a.cu_seqlens) ticket -= first_tile(a, s) * int(a.k_heads);
  const int blocks = blocks_of(sequence(a, s).length), each = paired ? (blocks + 1) / 2 : blocks;
  if (each == 0) return false;
  const int head = ticket / each;
  w = {a.cu_seqlens ? s : head / int(a.k_heads), head % int(a.k_heads), ticket % each};
  return !a.cu_seqlens || head < int(a.k_heads);
}

// The steps of a CTA: for each of its blocks of keys the blocks of queries, and for each of these the heads of the group.
// The first block of keys sees the queries from the last to the first, the second one the other way round.
template <bool CAUSAL> struct Walk {
  static constexpr int kPer = kKeys / kQueries;
  int index, k_blocks, q_blocks, group;
  bool paired;
  int part = 0, key_block = 0, first = 0, block = 0, head = 0, step = 0;  // block, head: of the queries; head within the group

  __device__ Walk(int index, int length, int group, bool paired)
      : index(index), k_blocks(blocks_of(length)), q_blocks((length + kQueries - 1) / kQueries), group(group), paired(paired) {}
  __device__ int firsts() const { return paired ? (k_blocks + 1) / 2 : k_blocks; }  // blocks of keys that are some CTA's first
  __device__ int parts() const { return k_blocks - 1 - index >= firsts() ? 2 : 1; }
  __device__ void begin(int which) {
    part = which, head = 0;
    key_block = part ? k_blocks - 1 - index : index;
    first = CAUSAL ? key_block * kPer : 0;
    block = part ? first : q_blocks - 1;
  }
  __device__ int steps() const { return (q_blocks - first) * group; }
  __device__ bool more() const { return block >= first && block < q_blocks; }
  __device__ void next() {
    ++step;
    if (++head < group) return;
    head = 0;
    block += part ? 1 : -1;
  }
  // Contributions to this block's dQ that come before this one.
  __device__ int before() const { return part ? firsts() + (CAUSAL ? block / kPer : k_blocks - 1) - key_block : key_block; }
  // Which block of all that there are, in the scratch.
  __device__ int place(const Work& w, int first_tile, int q_heads) const {
    return ((first_tile + block / kPer) * q_heads + w.k_head * group + head) * kPer + block % kPer;
  }
};

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline uint32_t pack_pair(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline int load_acquire(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ inline void store_release(int* p, int x) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

// A thread's share of 64 rows x 128 columns, as wgmma leaves it, to rows of bf16.
__device__ inline void write_rows(const float (&x)[64], float scale, int first_row, int length, __nv_bfloat16* to, int64_t stride,
                                  int quarter) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + 8 * half;
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (4 * g + i) + 2 * half;
        packed[i] = pack_pair(x[at] * scale, x[at + 1] * scale);
      }
      quad_transpose(packed, quarter);
      if (row < length)
        *reinterpret_cast<uint4*>(to + row * stride + 8 * (4 * g + quarter)) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
  }
}

// delta = dO . O and the log-sum-exp in powers of two, by head; counters to zero. A CTA has 32 tokens and 8 heads.
__global__ void __launch_bounds__(256) prepare_kernel(const __grid_constant__ AttentionBackward a) {
  constexpr int kRowsHere = 32;
  const int tile = blockIdx.x, q_heads = int(a.q_heads), s = sequence_at(a, tile), lane = threadIdx.x % 32;
  const Sequence q = sequence(a, s);
  const int tile_row = (tile - first_tile(a, s)) * kKeys, first_row = tile_row + blockIdx.z * kRowsHere, first_head = blockIdx.y * 8, heads = min(8, q_heads - first_head);
  if (blockIdx.z == 0 && threadIdx.x < 2 * heads) a.turns[(int64_t(tile) * q_heads + first_head) * 2 + threadIdx.x] = 0;
  if (tile == 0 && blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x == 0) *a.ticket = 0;
  if (tile_row >= q.length) return;
  const auto* out = static_cast<const __nv_bfloat16*>(a.out);
  const auto* dout = static_cast<const __nv_bfloat16*>(a.dout.data) + q.batch * a.dout.batch;
#pragma unroll 4
  for (int i = threadIdx.x / 16; i < kRowsHere * 8; i += 16) {
    const int row = first_row + i / 8, head = first_head + i % 8;
    const bool live = row < q.length && i % 8 < heads;
    float sum = 0;
    if (live) {
      const int column = lane % 16 * 8;
      const uint4 x = *reinterpret_cast<const uint4*>(out + ((q.row + row) * q_heads + head) * kWidth + column);
      const uint4 y = *reinterpret_cast<const uint4*>(dout + (q.first_token + row) * a.dout.token + head * a.dout.head + column);
      const auto *xs = reinterpret_cast<const __nv_bfloat162*>(&x), *ys = reinterpret_cast<const __nv_bfloat162*>(&y);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 u = __bfloat1622float2(xs[j]), v = __bfloat1622float2(ys[j]);
        sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
      }
    }
#pragma unroll
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane % 16 == 0 && i % 8 < heads) {
      const int64_t at = (int64_t(tile) * q_heads + head) * kKeys + blockIdx.z * kRowsHere + i / 8;
      // Infinity makes the probabilities of rows beyond the sequence zero.
      a.lse_log2[at] = live ? a.lse[(q.row + row) * q_heads + head] * kLog2e : INFINITY;
      a.delta[at] = sum;
    }
  }
}

template <bool CAUSAL>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dout_map,
                    const __grid_constant__ AttentionBackward a, bool paired) {
  extern __shared__ __align__(1024) uint8_t k_tile[];
  uint8_t *const v_tile = k_tile + kKeyTile, *const ds_tiles = v_tile + kKeyTile, *const q_tiles = ds_tiles + kKeyTile;
  uint8_t *const dout_tiles = q_tiles + kStages * kQueryTile, *const dq_tile = dout_tiles + kStages * kQueryTile;
  float* const lse_rows = reinterpret_cast<float*>(dq_tile + kSums);
  float* const delta_rows = lse_rows + kStages * kQueries;
  uint64_t* const keys_full = reinterpret_cast<uint64_t*>(delta_rows + kStages * kQueries);
  uint64_t *const keys_empty = keys_full + 1, *const dq_full = keys_empty + 1, *const dq_empty = dq_full + kAdders, *const q_full = dq_empty + 1, *const q_empty = q_full + kStages;
  uint64_t *const dout_full = q_empty + kStages, *const dout_empty = dout_full + kStages;
  int *const visible = reinterpret_cast<int*>(dout_empty + kStages);  // keys that a stage's first query sees before its own
  int* const ticket = visible + kStages;

  if (threadIdx.x == 0) {
    tma_prefetch_map(&q_map), tma_prefetch_map(&k_map), tma_prefetch_map(&v_map), tma_prefetch_map(&dout_map);
    barrier_init(keys_full, 1), barrier_init(keys_empty, kConsumers), barrier_init(dq_empty, 1);
    for (int i = 0; i < kAdders; ++i) barrier_init(dq_full + i, 128);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(q_full + i, 1), barrier_init(dout_full + i, 1);
      barrier_init(q_empty + i, kConsumers), barrier_init(dout_empty + i, kConsumers);
    }
    barrier_init_fence();
    *ticket = atomicAdd(a.ticket, 1);  // CTAs start in the order in which work is dealt
  }
  __syncthreads();

  Work w;
  if (!deal(a, paired, *ticket, w)) return;
  const Sequence s = sequence(a, w.sequence);
  const int q_heads = int(a.q_heads), group = q_heads / int(a.k_heads);
  Walk<CAUSAL> walk(w.index, s.length, group, paired);
  const int parts = walk.parts();

  if (threadIdx.x < 128) {
    registers_release<24>();
    const int base = first_tile(a, w.sequence);
    if (threadIdx.x == 0) {
      const auto load = [&](uint8_t* tile, const CUtensorMap* map, uint64_t* full, int slab, int head, int row) {
        for (int i = 0; i < kWidth / 64; ++i) tma_load(tile + i * slab, map, full, i * 64, head, s.first_token + row, s.batch);
      };
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
        walk.begin(part);
        if (part) barrier_wait(keys_empty, 0);
        barrier_expect_bytes(keys_full, 2 * kKeyTile);
        load(k_tile, &k_map, keys_full, 2 * kSlab, w.k_head, walk.key_block * kKeys);
        load(v_tile, &v_map, keys_full, 2 * kSlab, w.k_head, walk.key_block * kKeys);
#pragma unroll 1
        for (; walk.more(); walk.next()) {
          const int stage = walk.step % kStages, head = w.k_head * group + walk.head, row = walk.block * kQueries;
          const uint32_t phase = walk.step / kStages % 2 ^ 1;
          const int64_t rows = int64_t(walk.place(w, base, q_heads)) * kQueries;
          barrier_wait(q_empty + stage, phase);
          visible[stage] = CAUSAL ? min(row - walk.key_block * kKeys, kKeys) : kKeys;
          barrier_expect_bytes(q_full + stage, kQueryTile + kRows);
          load(q_tiles + stage * kQueryTile, &q_map, q_full + stage, kSlab, head, row);
          bulk_load(lse_rows + stage * kQueries, a.lse_log2 + rows, q_full + stage, kRows);
          barrier_wait(dout_empty + stage, phase);
          barrier_expect_bytes(dout_full + stage, kQueryTile + kRows);
          load(dout_tiles + stage * kQueryTile, &dout_map, dout_full + stage, kSlab, head, row);
          bulk_load(delta_rows + stage * kQueries, a.delta + rows, dout_full + stage, kRows);
        }
      }
    } else if (threadIdx.x % 32 == 0) {  // adds to dQ when it is its turn
      const int adder = threadIdx.x / 32 - 1;
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
#pragma unroll 1
        for (walk.begin(part); walk.more(); walk.next()) {
          if (walk.step % kAdders != adder) continue;
          const int place = walk.place(w, base, q_heads), before = walk.before();
          while (!(a.variant & 2) && load_acquire(a.turns + place) != before) {}
          barrier_wait(dq_full + adder, walk.step / kAdders % 2);
          float* const to = a.dq_sum + int64_t(place) * kQueries * kWidth;
          before == 0 ? bulk_store(to, dq_tile, kSums) : bulk_add(to, dq_tile, kSums);
          bulk_commit();
          bulk_wait_read();
          barrier_arrive(dq_empty);
          bulk_wait();
          store_release(a.turns + place, before + 1);
        }
      }
    }
    return;
  }

  registers_take<240>();
  const int consumer = threadIdx.x / 128 - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, quarter = lane % 4;
  const int local_key = consumer * 64 + warp * 16 + lane / 4;
  // Where a lane's row of four 8 x 8 matrices of dS^T goes, but for the column: rows are keys.
  const uint32_t ds_row = shared_address(ds_tiles + (consumer * 64 + warp * 16 + lane % 16) * 128);
  const auto product = [](float (&x)[32], const uint8_t* keys, const uint8_t* queries) {  // x = keys queries^T, 64 of each
#pragma unroll
    for (int j = 0; j < kWidth / 16; ++j)
      wgmma_m64n64k16(x, matrix_descriptor(keys) + ((j / 4 * 2 * kSlab + j % 4 * 32) >> 4),
                      matrix_descriptor(queries) + ((j / 4 * kSlab + j % 4 * 32) >> 4), j > 0);
    wgmma_commit();
  };
  const auto sum = [](float (&x)[64], const uint32_t (&keys)[4][4], const uint8_t* queries, bool more) {
#pragma unroll
    for (int j = 0; j < kQueries / 16; ++j)
      wgmma_m64n128k16(x, keys[j], matrix_descriptor_transposed(queries, kSlab) + (j * 16 * 128 >> 4), more || j > 0);
    wgmma_commit();
  };

  float dk[64], dv[64];
  // Named barriers: 1 and 2, dS of an even or odd step is there; 3 and 4, it has been read by the warpgroup whose turn it is.
  named_arrive(3 + consumer, 256);
  int step = 0;
  for (int part = 0; part < parts; ++part) {
    walk.begin(part);
    const int live_keys = s.length - walk.key_block * kKeys, first_step = step;
    const bool lonely = walk.key_block == 0 && (CAUSAL || s.length == 1);  // the first query sees one key
    float p[32], dp[32];  // scores and then probabilities; dP

    const auto begin_scores = [&](int step) {
      barrier_wait(q_full + step % kStages, step / kStages % 2);
      wgmma_fence();
      product(p, k_tile + consumer * kSlab, q_tiles + step % kStages * kQueryTile);
    };
    const auto begin_dp = [&](int step) {
      barrier_wait(dout_full + step % kStages, step / kStages % 2);
      wgmma_fence();
      product(dp, v_tile + consumer * kSlab, dout_tiles + step % kStages * kQueryTile);
    };
    const auto release = [&](int step) {
      const int stage = step % kStages;
      if (threadIdx.x % 128 == 0) barrier_arrive(q_empty + stage), barrier_arrive(dout_empty + stage);
    };
    // A step whose first two products have begun. READS: it is this warpgroup that multiplies dS by the keys; then nothing is
    // on its way at the end. Else dK is.
    const auto finish = [&](auto reads) __attribute__((always_inline)) {
      constexpr bool READS = decltype(reads)::value;
      const int stage = step % kStages, reader = READS ? consumer : consumer ^ 1;
      const uint8_t *const q_tile = q_tiles + stage * kQueryTile, *const dout_tile = dout_tiles + stage * kQueryTile;
      uint32_t packed[4][4], ds[4][4];
      wgmma_wait<1>();
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 shift = reinterpret_cast<const float2*>(lse_rows + stage * kQueries)[quarter + 4 * j];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          p[4 * j + 2 * half] = exp2_fast(fmaf(p[4 * j + 2 * half], a.scale_log2, -shift.x));
          p[4 * j + 2 * half + 1] = exp2_fast(fmaf(p[4 * j + 2 * half + 1], a.scale_log2, -shift.y));
        }
      }
      const int before = visible[stage];
      if (live_keys < kKeys || before < kKeys) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const int query = i / 4 * 8 + 2 * quarter + i % 2, key = local_key + i / 2 % 2 * 8;
          if (key >= live_keys || key > query + before) p[i] = 0;
        }
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) packed[i / 4][i % 4] = pack_pair(p[2 * i], p[2 * i + 1]);
      wgmma_fence();
      sum(dv, packed, dout_tile, step > first_step);
      wgmma_wait<1>();
      if (lonely && (!CAUSAL || before == 0) && quarter == 0) dp[0] = dp[2] = delta_rows[stage * kQueries];  // exactly zero
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float2 shift = reinterpret_cast<const float2*>(delta_rows + stage * kQueries)[quarter + i / 2 * 4];
        ds[i / 4][i % 4] = pack_pair(p[2 * i] * (dp[2 * i] - shift.x), p[2 * i + 1] * (dp[2 * i + 1] - shift.y));
      }
      if (!READS) named_sync(3 + reader, 256);
#pragma unroll
      for (int j = 0; j < 4; ++j) store_matrices(ds_row + reader * 2 * kSlab + ((2 * j + lane / 16) ^ lane % 8) * 16, ds[j]);
      async_proxy_fence();
      wgmma_fence();
      sum(dk, ds, q_tile, step > first_step);
      if constexpr (!READS) {
        named_arrive(1 + reader, 256);
      } else {
        float dq[64];
        named_sync(1 + reader, 256);
        wgmma_wait<0>();  // dV and dK are done, and their operands' registers free for dQ
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < kKeys / 16; ++j)
          wgmma_m64n128k16<1, 1>(dq, matrix_descriptor_transposed(ds_tiles + reader * 2 * kSlab, 0) + (j * 16 * 128 >> 4),
                                 matrix_descriptor_transposed(k_tile, 2 * kSlab) + (j * 16 * 128 >> 4), j > 0);
        wgmma_commit();
        release(step);
        barrier_wait(dq_empty, step % 2 ^ 1);
        wgmma_wait<0>();
        named_arrive(3 + reader, 256);
        float4* const to = reinterpret_cast<float4*>(dq_tile) + threadIdx.x % 128;
#pragma unroll
        for (int j = 0; j < 16; ++j) to[j * 128] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
        async_proxy_fence();
        barrier_arrive(dq_full + step % kAdders);
      }
      ++step;
    };

    // The first warpgroup reads in the first step of every two, the second one in the second.
    int left = walk.steps();
    barrier_wait(keys_full, part);
    if (consumer == 0) begin_scores(step), begin_dp(step), finish(std::true_type()), --left;
    for (; left >= 2; left -= 2) {
      begin_scores(step), begin_dp(step), finish(std::false_type());
      begin_scores(step);
      wgmma_wait<1>();  // the operand of the last dK lies where dP will
      release(step - 1);
      begin_dp(step), finish(std::true_type());
    }
    if (left) {
      begin_scores(step), begin_dp(step), finish(std::false_type());
      wgmma_wait<0>();
      release(step - 1);
    }

    if (threadIdx.x % 128 == 0) barrier_arrive(keys_empty);
    const int64_t stride = a.k_heads * kWidth, at = (s.row * a.k_heads + w.k_head) * kWidth;
    const int first_row = walk.key_block * kKeys + local_key;
    write_rows(dk, a.scale, first_row, s.length, static_cast<__nv_bfloat16*>(a.dk) + at, stride, quarter);
    write_rows(dv, 1.f, first_row, s.length, static_cast<__nv_bfloat16*>(a.dv) + at, stride, quarter);
  }
}

// dQ from its sums, which lie as the threads of two warpgroups hold them. A CTA has 128 tokens of a head.
__global__ void __launch_bounds__(256) finish_kernel(const __grid_constant__ AttentionBackward a) {
  const int tile = blockIdx.x, q_heads = int(a.q_heads), head = blockIdx.y, s = sequence_at(a, tile);
  const Sequence q = sequence(a, s);
  const int first_row = (tile - first_tile(a, s)) * kKeys;
  if (first_row >= q.length) return;
  const int thread = threadIdx.x % 128;
  const float* from = a.dq_sum + (int64_t(tile) * q_heads + head) * kKeys * kWidth + threadIdx.x / 128 * 64 * kWidth + thread * 4;
  float x[64];
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const float4 y = __ldcs(reinterpret_cast<const float4*>(from + j * 512));
    x[4 * j] = y.x, x[4 * j + 1] = y.y, x[4 * j + 2] = y.z, x[4 * j + 3] = y.w;
  }
  auto* to = static_cast<__nv_bfloat16*>(a.dq) + (q.row * q_heads + head) * kWidth;
  write_rows(x, a.scale, first_row + threadIdx.x / 128 * 64 + thread / 32 * 16 + thread % 32 / 4, q.length, to, a.q_heads * kWidth,
             thread % 4);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("attention_backward: ") + cudaGetErrorString(error));
}

CUtensorMap heads_map(const AttentionBackward& a, const Heads& x, int64_t heads, int tokens) {
  const int64_t batches = a.cu_seqlens ? 1 : a.sequences;
  // A batch of one may have any stride; TMA wants a multiple of 16 bytes.
  const int64_t batch = batches == 1 ? a.length * x.token : x.batch;
  return tensor_map<4>(x.data, {kWidth, heads, a.length, batches}, {x.head, x.token, batch}, {64, 1, tokens, 1});
}

template <bool CAUSAL> void launch(AttentionBackward a, cudaStream_t stream) {
  static const int sms = [] {
    int device = 0, count = 0;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    check(cudaFuncSetAttribute(backward_kernel<CAUSAL>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    return count;
  }();
  a.scale_log2 = a.scale * kLog2e;
  a.variant = getenv("V") ? atoi(getenv("V")) : 0;
  const int64_t tiles = attention_backward_tiles(a.cu_seqlens != nullptr, a.sequences, a.length);
  if (tiles * a.q_heads > INT32_MAX / 2) throw std::invalid_argument("attention: more than 2^30 tiles of 128 queries and a head");
  const int64_t blocks = (a.length + kKeys - 1) / kKeys;
  const bool paired = (blocks + 1) / 2 <= sms && !(a.variant & 4);  // all CTAs of a head must run at once
  const int64_t ctas = a.cu_seqlens ? tiles * a.k_heads : a.sequences * a.k_heads * (paired ? (blocks + 1) / 2 : blocks);
  prepare_kernel<<<dim3(unsigned(tiles), unsigned((a.q_heads + 7) / 8), 4), 256, 0, stream>>>(a);
  backward_kernel<CAUSAL><<<unsigned(ctas), kThreads, kShared, stream>>>(
      heads_map(a, a.q, a.q_heads, kQueries), heads_map(a, a.k, a.k_heads, kKeys), heads_map(a, a.v, a.k_heads, kKeys),
      heads_map(a, a.dout, a.q_heads, kQueries), a, paired);
  finish_kernel<<<dim3(unsigned(tiles), unsigned(a.q_heads)), 256, 0, stream>>>(a);
  check(cudaGetLastError());
}

}  // namespace

int64_t attention_backward_tiles(bool packed, int64_t sequences, int64_t length) {
  return packed ? length / kKeys + sequences : (length + kKeys - 1) / kKeys * sequences;
}

void attention_backward(const AttentionBackward& a, uintptr_t stream) {
  if (!(a.scale > 0)) throw std::invalid_argument("attention: the scale must be above 0");
  a.causal ? launch<true>(a, reinterpret_cast<cudaStream_t>(stream)) : launch<false>(a, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace qwen3::cuda
