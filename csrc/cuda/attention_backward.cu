// Backward of csrc/cuda/attention.cu: deterministic, without buffers or atomics for the gradients of keys and values.
//
// A CTA owns 128 keys of one key head and walks over the queries that see them, of every query head of the group, 64 at a
// time; dK and dV stay in registers throughout. Each of its two multiplying warpgroups has 64 keys. A step is five products:
// S^T = K Q^T and dP^T = V dO^T; dV += P^T dO and dK += dS^T Q, with P^T and dS^T from registers; dQ = dS K, with dS through
// shared memory. The warpgroups take dQ by turns: each waits for the other only every second step, and has the wide operand
// that spares shared memory.
//
// dQ is a sum over CTAs, taken in a fixed order: every block of queries has a counter of the contributions that it has got,
// and a contribution waits for its turn. The order is about the one in which they come, and CTAs have the same amount of
// work: two blocks of keys, one from the front, which many queries see, and one from the back.
#include <algorithm>
#include <cmath>

#include "cuda/attention.h"
#include "cuda/hopper.h"

namespace qwen3::cuda {
namespace {

constexpr int kWidth = 128, kKeys = 128, kQueries = 64, kStages = 3;
constexpr int kHeld = 5;     // of the 8 pieces of 16 columns of V, in registers: 20 KB a step less to read; a sixth one spills
constexpr int kAdders = 3;  // threads that add to dQ, a step each: a contribution takes longer than a step
constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);
constexpr int kSlab = 64 * 128;              // bytes of 64 elements of 64 rows; of 128 rows twice that, in one piece
constexpr int kKeyTile = 4 * kSlab, kQueryTile = 2 * kSlab;
constexpr int kRows = kQueries * 4;          // bytes of a number a query
constexpr int kSums = kQueries * kWidth * 4;  // bytes of a block of dQ
constexpr int kShared = 3 * kKeyTile + kSums + 2 * kStages * (kQueryTile + kRows) + (3 + kAdders + 3 * kStages) * 8 + (kStages + 1) * 4;
constexpr int kFinishHeads = 4;  // of a CTA of the last pass
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

// Whether CTAs have two blocks of keys: only if all those of a head can run at once, since then they wait for one another.
__device__ inline bool pairs_up(int blocks, int processors) { return (blocks + 1) / 2 <= processors; }

// The ticket's work; false for a ticket too many.
__device__ inline bool deal(const AttentionBackward& a, int processors, int ticket, Work& w) {
  const int k_heads = int(a.k_heads), s = a.cu_seqlens ? sequence_at(a, ticket / k_heads) : 0;
  if (a.cu_seqlens) ticket -= first_tile(a, s) * k_heads;
  const int blocks = blocks_of(sequence(a, s).length), each = pairs_up(blocks, processors) ? (blocks + 1) / 2 : blocks;
  const int heads = a.cu_seqlens ? k_heads : k_heads * int(a.sequences);
  if (ticket >= each * heads) return false;
  const int head = ticket / each;
  w = {a.cu_seqlens ? s : head / k_heads, head % k_heads, ticket % each};
  return true;
}

// The steps of a CTA: for each of its blocks of keys the blocks of queries, and for each of these the heads of the group.
//
// The CTAs of a head go over the same queries at the same time, the first block of keys from the last query to the first and the
// second one back, in the order of the CTAs. They have to wait for one another at the start (2 to 5 %), but what they share
// is in L2: when each starts at its own diagonal nobody waits, and it takes 3 to 50 % longer.
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

__device__ inline int load_acquire(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ inline void store_release(int* p, int x) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

// A thread's 32 numbers of a row, columns 8 j + 2 quarter (+ 1), to bf16.
__device__ inline void write_row(const float (&x)[32], __nv_bfloat16* to, int quarter, bool live) {
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) packed[i] = pack_pair(x[8 * g + 2 * i], x[8 * g + 2 * i + 1]);
    quad_transpose(packed, quarter);
    if (live) *reinterpret_cast<uint4*>(to + 8 * (4 * g + quarter)) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}

// Its share of 64 rows x 128 columns, as wgmma leaves it.
__device__ inline void write_rows(const float (&x)[64], float scale, int first_row, int length, __nv_bfloat16* to, int64_t stride,
                                  int quarter) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + 8 * half;
    float y[32];
#pragma unroll
    for (int j = 0; j < 32; ++j) y[j] = x[j / 2 * 4 + 2 * half + j % 2] * scale;
    write_row(y, to + row * stride, quarter, row < length);
  }
}

// 16 bytes that nothing writes meanwhile, so that what a thread stores does not hold up what it loads next.
__device__ inline uint4 load16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }

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
#pragma unroll 2  // 110 us; 4 take registers from the number of CTAs at a time: 124
  for (int i = threadIdx.x / 16; i < kRowsHere * 8; i += 16) {
    const int row = first_row + i / 8, head = first_head + i % 8;
    const bool live = row < q.length && i % 8 < heads;
    float sum = 0, lse = INFINITY;  // infinity makes the probabilities of rows beyond the sequence zero
    if (live) {
      const int column = lane % 16 * 8;
      const uint4 x = load16(out + ((q.row + row) * q_heads + head) * kWidth + column);
      const uint4 y = load16(dout + (q.first_token + row) * a.dout.token + head * a.dout.head + column);
      lse = __ldg(a.lse + (q.row + row) * q_heads + head) * kLog2e;
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
      a.lse_log2[at] = lse;
      a.delta[at] = sum;
    }
  }
}

template <bool CAUSAL>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dout_map,
                    const __grid_constant__ AttentionBackward a, float scale_log2, int processors) {
  extern __shared__ __align__(1024) uint8_t k_tile[];
  uint8_t *const v_tile = k_tile + kKeyTile, *const ds_tiles = v_tile + kKeyTile, *const q_tiles = ds_tiles + kKeyTile;
  uint8_t *const dout_tiles = q_tiles + kStages * kQueryTile, *const dq_tile = dout_tiles + kStages * kQueryTile;
  float* const lse_rows = reinterpret_cast<float*>(dq_tile + kSums);
  float* const delta_rows = lse_rows + kStages * kQueries;
  uint64_t* const keys_full = reinterpret_cast<uint64_t*>(delta_rows + kStages * kQueries);
  uint64_t *const keys_empty = keys_full + 1, *const dq_full = keys_empty + 1, *const dq_empty = dq_full + kAdders, *const q_full = dq_empty + 1, *const dout_full = q_full + kStages;
  uint64_t* const empty = dout_full + kStages;
  int* const visible = reinterpret_cast<int*>(empty + kStages);  // keys that a stage's first query sees before its own
  int* const ticket = visible + kStages;

  if (threadIdx.x == 0) {
    tma_prefetch_map(&q_map), tma_prefetch_map(&k_map), tma_prefetch_map(&v_map), tma_prefetch_map(&dout_map);
    barrier_init(keys_full, 1), barrier_init(keys_empty, kConsumers), barrier_init(dq_empty, 1);
    for (int i = 0; i < kAdders; ++i) barrier_init(dq_full + i, 4);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(q_full + i, 1), barrier_init(dout_full + i, 1);
      barrier_init(empty + i, 128 * kConsumers);  // all threads: an arrival vouches for what its own thread has read
    }
    barrier_init_fence();
    *ticket = atomicAdd(a.ticket, 1);  // CTAs start in the order in which work is dealt
  }
  __syncthreads();

  Work w;
  if (!deal(a, processors, *ticket, w)) return;
  const Sequence s = sequence(a, w.sequence);
  const int q_heads = int(a.q_heads), group = q_heads / int(a.k_heads);
  Walk<CAUSAL> walk(w.index, s.length, group, pairs_up(blocks_of(s.length), processors));
  const int parts = uniform(walk.parts());

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
          barrier_wait(empty + stage, phase);
          visible[stage] = CAUSAL ? min(row - walk.key_block * kKeys, kKeys) : kKeys;
          barrier_expect_bytes(q_full + stage, kQueryTile + kRows);
          load(q_tiles + stage * kQueryTile, &q_map, q_full + stage, kSlab, head, row);
          bulk_load(lse_rows + stage * kQueries, a.lse_log2 + rows, q_full + stage, kRows);
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
          while (load_acquire(a.turns + place) != before) {}
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
  const int consumer = uniform(threadIdx.x / 128 - 1), warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, quarter = lane % 4;
  const int local_key = consumer * 64 + warp * 16 + lane / 4;
  // Where a lane's row of four 8 x 8 matrices of dS^T goes, but for the column: rows are keys.
  const uint32_t ds_row = shared_address(ds_tiles + (consumer * 64 + warp * 16 + lane % 16) * 128);
  // 16 columns of this warpgroup's 64 keys (or values), and of the queries (or dO).
  const auto keys_piece = [&](const uint8_t* tile, int j) {
    return matrix_descriptor(tile + consumer * kSlab) + ((j / 4 * 2 * kSlab + j % 4 * 32) >> 4);
  };
  const auto queries_piece = [](const uint8_t* tile, int j) { return matrix_descriptor(tile) + ((j / 4 * kSlab + j % 4 * 32) >> 4); };
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
    barrier_wait(keys_full, part);
    uint32_t values[kHeld][4];
    const uint32_t value_row = shared_address(v_tile) + (consumer * 64 + warp * 16 + lane % 16) * 128;
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
      load_matrices(values[j], value_row + j / 4 * 2 * kSlab + ((j % 4 * 2 + lane / 16) ^ lane % 8) * 16);

    for (int left = uniform(walk.steps()); left > 0; --left, ++step) {
      const int stage = step % kStages, reader = step % 2;  // the warpgroup that multiplies this step's dS by the keys
      const uint8_t *const q_tile = q_tiles + stage * kQueryTile, *const dout_tile = dout_tiles + stage * kQueryTile;
      const uint32_t phase = step / kStages % 2;
      float p[32], dp[32];  // scores and then probabilities; dP
      uint32_t packed[4][4], ds[4][4];

      barrier_wait(q_full + stage, phase);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < kWidth / 16; ++j)
        wgmma_m64n64k16(p, keys_piece(k_tile, j), queries_piece(q_tile, j), j > 0);
      wgmma_commit();
      barrier_wait(dout_full + stage, phase);
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < kWidth / 16; ++j) {
        if (j < kHeld) wgmma_m64n64k16(dp, values[j % kHeld], queries_piece(dout_tile, j), j > 0);
        else wgmma_m64n64k16(dp, keys_piece(v_tile, j), queries_piece(dout_tile, j), true);
      }
      wgmma_commit();
      wgmma_wait<1>();
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 shift = reinterpret_cast<const float2*>(lse_rows + stage * kQueries)[quarter + 4 * j];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          p[4 * j + 2 * half] = exp2_fast(fmaf(p[4 * j + 2 * half], scale_log2, -shift.x));
          p[4 * j + 2 * half + 1] = exp2_fast(fmaf(p[4 * j + 2 * half + 1], scale_log2, -shift.y));
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
      wgmma_wait<0>();
      if (lonely && (!CAUSAL || before == 0) && quarter == 0) dp[0] = dp[2] = delta_rows[stage * kQueries];  // exactly zero
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float2 shift = reinterpret_cast<const float2*>(delta_rows + stage * kQueries)[quarter + i / 2 * 4];
        packed[i / 4][i % 4] = pack_pair(p[2 * i], p[2 * i + 1]);
        ds[i / 4][i % 4] = pack_pair(p[2 * i] * (dp[2 * i] - shift.x), p[2 * i + 1] * (dp[2 * i + 1] - shift.y));
      }
      wgmma_fence();
      sum(dv, packed, dout_tile, step > first_step);
      if (reader != consumer) named_sync(3 + reader, 256);
#pragma unroll
      for (int j = 0; j < 4; ++j) store_matrices(ds_row + reader * 2 * kSlab + ((2 * j + lane / 16) ^ lane % 8) * 16, ds[j]);
      async_proxy_fence();
      wgmma_fence();
      sum(dk, ds, q_tile, step > first_step);
      if (reader != consumer) {
        named_arrive(1 + reader, 256);
        wgmma_wait<0>();
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
        barrier_wait(dq_empty, step % 2 ^ 1);
        wgmma_wait<0>();
        named_arrive(3 + reader, 256);
        float4* const to = reinterpret_cast<float4*>(dq_tile) + threadIdx.x % 128;
#pragma unroll
        for (int j = 0; j < 16; ++j) to[j * 128] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
        async_proxy_fence();
        __syncwarp();
        if (lane == 0) barrier_arrive(dq_full + step % kAdders);
      }
      barrier_arrive(empty + stage);
    }

    if (threadIdx.x % 128 == 0) barrier_arrive(keys_empty);
    const auto gradient = [&](const Heads& x) { return static_cast<__nv_bfloat16*>(x.data) + s.row * x.token + w.k_head * x.head; };
    const int first_row = walk.key_block * kKeys + local_key;
    if (a.dk_sum != nullptr) {
      const int64_t place = ((int64_t(first_tile(a, w.sequence)) + walk.key_block) * a.k_heads + w.k_head) * 2 + consumer;
      float4* const to = reinterpret_cast<float4*>(a.dk_sum + place * 64 * kWidth) + threadIdx.x % 128;
#pragma unroll
      for (int j = 0; j < 16; ++j) to[j * 128] = make_float4(dk[4 * j], dk[4 * j + 1], dk[4 * j + 2], dk[4 * j + 3]);
    } else {
      write_rows(dk, a.scale, first_row, s.length, gradient(a.dk), a.dk.token, quarter);
    }
    write_rows(dv, 1.f, first_row, s.length, gradient(a.dv), a.dv.token, quarter);
  }
}

// What a CTA's heads share: the cosines and sines of its 64 tokens, and the norm's weights. A row has 8 numbers more, so that the
// rows of half a warp lie in different banks.
struct Turns {
  float cos[64][kWidth / 2 + 8], sin[64][kWidth / 2 + 8], weight[kWidth];
};

// The gradient before norm and RoPE from that after them, of a thread's 32 columns of a row: RoPE pairs a column with the one
// 64 further on, which is the same thread's. Adds to dweight's shares of these columns.
__device__ inline void norm_rope_backward(float (&g)[32], const Turns& turns, int row, const __nv_bfloat16* from, float eps, int quarter,
                                          float (&dweight)[32]) {
  uint32_t x[16];  // columns 8 j + 2 quarter (+ 1); as they are, since there are no registers for 32 numbers more
  float sum = 0, dot = 0;
  const auto value = [&](int i) { return __uint_as_float(i % 2 ? x[i / 2] & 0xffff0000 : x[i / 2] << 16); };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 eight = load16(from + 32 * i + 8 * quarter);
    uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
    quad_transpose(pairs, quarter);
#pragma unroll
    for (int j = 0; j < 4; ++j) x[4 * i + j] = pairs[j];
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) sum = fmaf(value(i), value(i), sum);
  sum += __shfl_xor_sync(~0u, sum, 1), sum += __shfl_xor_sync(~0u, sum, 2);
  const float rstd = 1.f / sqrtf(sum / kWidth + eps);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const auto pair = [&](const float* p) { return *reinterpret_cast<const float2*>(p + 8 * j + 2 * quarter); };
    const float2 c = pair(turns.cos[row]), s = pair(turns.sin[row]), low = pair(turns.weight), high = pair(turns.weight + 64);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float &a = g[2 * j + i], &b = g[2 * j + 16 + i], &da = dweight[2 * j + i], &db = dweight[2 * j + 16 + i];
      const float cosine = i ? c.y : c.x, sine = i ? s.y : s.x, u = fmaf(a, cosine, b * sine), v = fmaf(b, cosine, -a * sine);
      const float xa = value(2 * j + i) * rstd, xb = value(2 * j + 16 + i) * rstd;
      da = fmaf(u, xa, da), db = fmaf(v, xb, db);
      a = u * (i ? low.y : low.x), b = v * (i ? high.y : high.x);
      dot = fmaf(a, xa, fmaf(b, xb, dot));
    }
  }
  dot += __shfl_xor_sync(~0u, dot, 1), dot += __shfl_xor_sync(~0u, dot, 2);
  const float mean = dot / kWidth;
#pragma unroll
  for (int i = 0; i < 32; ++i) g[i] = rstd * (g[i] - value(i) * rstd * mean);
}

int64_t finish_groups(int64_t heads) { return (heads + kFinishHeads - 1) / kFinishHeads; }  // of heads, a CTA each

// A gradient from its sums, which lie as the threads of a warpgroup held them: of a thread's two rows, the first 128 threads here
// have the first and the others the second. A CTA has 64 tokens and up to kFinishHeads heads, which share cosines and sines.
template <bool PROLOGUE>
__global__ void __launch_bounds__(256, 2) finish_kernel(const __grid_constant__ AttentionBackward a, const float* sums, int heads,
                                                     const __grid_constant__ Heads grad, const __grid_constant__ NormRope before) {
  __shared__ Turns turns;
  const int tile = blockIdx.x / 2, block = blockIdx.x % 2, s = sequence_at(a, tile), half = threadIdx.x / 128;
  const int thread = threadIdx.x % 128, quarter = thread % 4, row = thread / 32 * 16 + thread % 32 / 4 + 8 * half;
  const Sequence q = sequence(a, s);
  const int top = (tile - first_tile(a, s)) * kKeys + block * 64;
  float* const share = PROLOGUE ? before.dweight + ((int64_t(tile) * gridDim.y + blockIdx.y) * 2 + block) * kWidth : nullptr;
  if (top >= q.length) {
    if (PROLOGUE && half == 0) share[thread] = 0;
    return;
  }
  const int last = q.length - 1 - top;  // rows beyond the sequence read the last one's x, to no effect
  if constexpr (PROLOGUE) {
#pragma unroll 4
    for (int i = threadIdx.x; i < 64 * 16; i += 256) {
      const int64_t from = (q.row + top + min(i / 16, last)) % before.rows * (kWidth / 2) + i % 16 * 4;
      *reinterpret_cast<uint4*>(&turns.cos[i / 16][i % 16 * 4]) = load16(before.cos + from);
      *reinterpret_cast<uint4*>(&turns.sin[i / 16][i % 16 * 4]) = load16(before.sin + from);
    }
    if (half == 0) turns.weight[thread] = before.weight[thread];
    __syncthreads();
  }
  float dweight[32] = {};
  const bool live = row <= last;
  const int first = blockIdx.y * kFinishHeads;
#pragma unroll 1
  for (int head = first; head < min(first + kFinishHeads, heads); ++head) {
    asm volatile("" ::: "memory");  // or all that is shared is kept in registers, which are spilled
    const float* const from = sums + ((int64_t(tile) * heads + head) * 2 + block) * 64 * kWidth + thread * 4 + 2 * half;
    float g[32];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 y = __ldg(reinterpret_cast<const float2*>(from + j * 512));
      g[2 * j] = live ? y.x * a.scale : 0, g[2 * j + 1] = live ? y.y * a.scale : 0;
    }
    if constexpr (PROLOGUE) {
      const auto* const x = static_cast<const __nv_bfloat16*>(before.x.data) + q.batch * before.x.batch +
                            (q.first_token + top + min(row, last)) * before.x.token + head * before.x.head;
      norm_rope_backward(g, turns, row, x, before.eps, quarter, dweight);
    }
    write_row(g, static_cast<__nv_bfloat16*>(grad.data) + (q.row + top + row) * grad.token + head * grad.head, quarter, live);
  }
  if constexpr (PROLOGUE) {  // over the rows: of a warp by exchange, of the warps in their order
    __shared__ float shares[8][kWidth];
#pragma unroll
    for (int j = 0; j < 32; ++j) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) dweight[j] += __shfl_xor_sync(~0u, dweight[j], step);
      if (thread % 32 < 4) shares[threadIdx.x / 32][j / 2 * 8 + 2 * quarter + j % 2] = dweight[j];
    }
    __syncthreads();
    if (half == 1) return;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += shares[i][thread];
    share[thread] = sum;
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("attention_backward: ") + cudaGetErrorString(error));
}

CUtensorMap heads_map(const AttentionBackward& a, const Heads& x, int64_t heads, int tokens) {
  return tensor_map(x, a.cu_seqlens ? 1 : a.sequences, a.length, heads, kWidth, tokens);
}

template <bool CAUSAL> void launch(const AttentionBackward& a, cudaStream_t stream) {
  const int sms = multiprocessors_for<backward_kernel<CAUSAL>>(kShared);
  const int64_t tiles = attention_backward_tiles(a.cu_seqlens != nullptr, a.sequences, a.length);
  if (tiles * a.q_heads > INT32_MAX / 2) throw std::invalid_argument("attention: more than 2^30 tiles of 128 queries and a head");
  const int64_t blocks = (a.length + kKeys - 1) / kKeys, half = (blocks + 1) / 2;
  const int64_t ctas = a.k_heads * (a.cu_seqlens ? tiles : a.sequences * (half <= sms ? half : blocks));
  prepare_kernel<<<dim3(unsigned(tiles), unsigned((a.q_heads + 7) / 8), 4), 256, 0, stream>>>(a);
  backward_kernel<CAUSAL><<<unsigned(ctas), kThreads, kShared, stream>>>(
      heads_map(a, a.q, a.q_heads, kQueries), heads_map(a, a.k, a.k_heads, kKeys), heads_map(a, a.v, a.k_heads, kKeys),
      heads_map(a, a.dout, a.q_heads, kQueries), a, a.scale * kLog2e, sms);
  const auto finish = [&](auto kernel, const float* sums, int64_t heads, const Heads& grad, const NormRope& before) {
    kernel<<<dim3(unsigned(2 * tiles), unsigned(finish_groups(heads))), 256, 0, stream>>>(a, sums, int(heads), grad, before);
  };
  if (a.prologue == nullptr) {
    finish(finish_kernel<false>, a.dq_sum, a.q_heads, a.dq, {});
  } else {
    finish(finish_kernel<true>, a.dq_sum, a.q_heads, a.dq, a.prologue[0]);
    finish(finish_kernel<true>, a.dk_sum, a.k_heads, a.dk, a.prologue[1]);
  }
  check(cudaGetLastError());
}

}  // namespace

int64_t attention_backward_tiles(bool packed, int64_t sequences, int64_t length) {
  return packed ? length / kKeys + sequences : (length + kKeys - 1) / kKeys * sequences;
}

int64_t attention_backward_shares(int64_t tiles, int64_t heads) {
  return 2 * tiles * finish_groups(heads);
}

void attention_backward(const AttentionBackward& a, uintptr_t stream) {
  if (!(a.scale > 0)) throw std::invalid_argument("attention: the scale must be above 0");
  if ((a.prologue == nullptr) != (a.dk_sum == nullptr))
    throw std::invalid_argument("attention: sums of dK and a prologue belong together");
  a.causal ? launch<true>(a, reinterpret_cast<cudaStream_t>(stream)) : launch<false>(a, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace qwen3::cuda
