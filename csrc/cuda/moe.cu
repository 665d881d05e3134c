// The experts of a mixture of experts: grouped matrix products on rows sorted by expert, with the gather of tokens in
// their prologue and SwiGLU, forward and backward, in their epilogue (the decomposition of SonicMoE, arXiv 2512.14080,
// section 3).
//
// One GEMM does them all. A cluster of two CTAs works on a pair of tiles, 128 x 256 each: every CTA has 128 rows (or
// columns) of its "own" operand, both share 256 of the other, of which each loads one half for the two. Where own rows
// are gathered, the loading warpgroup copies them one by one with cp.async; all else comes by TMA. Two warpgroups
// multiply, 64 rows each (128 when the own operand is the right one), and run the epilogue of a tile piece by piece
// between the products of the next one; the second warpgroup trails a little, so that one changes tiles behind the
// other's products. Clusters stay and walk over a list of tiles which every thread derives from the plan's offsets,
// so the host needs to know nothing of the routing. A dense feed-forward block (DENSE) is one expert that has all tokens in
// their order: its own rows come by TMA, and there are no weights.
//
//     task            own operand               shared operand          contraction over
//     up              x[token]         (left)   gate and up, 128 each   d
//     down            a                (left)   down^T                  i
//     down_backward   grad[token]      (left)   down                    d
//     up_backward     dh               (left)   gate_up                 2 i
//     grad_left       left, gathered   (left)   right                   the expert's rows
//     grad_right      right, gathered  (right)  left                    the expert's rows
#include "cuda/moe.h"

#include <algorithm>
#include <type_traits>

#include "cuda/hopper.h"

namespace qwen3::cuda {
namespace {

using bf16 = __nv_bfloat16;

enum class Task { up, down, down_backward, up_backward, grad_left, grad_right };
constexpr bool is_gradient(Task t) { return t == Task::grad_left || t == Task::grad_right; }
constexpr bool is_gathered(Task t) { return t != Task::down && t != Task::up_backward; }
// Whether the contraction runs down the rows of the shared operand in memory (wgmma's MN-major) or along them.
constexpr bool is_transposed(Task t) { return t != Task::up && t != Task::down; }
constexpr int columns_of(Task t) { return t == Task::up ? 128 : 256; }  // of the result that a tile spans

constexpr int kOwn = 128, kShared = 256, kStep = 64, kStages = 4;  // 48 KB a stage
constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);
constexpr int kLead = 2;  // steps by which the second warpgroup starts after the first; the distance then lasts
constexpr int kSlab = 64 * kStep * 2;  // bytes of 64 rows x 64 elements, the unit that a transposed operand is made of
constexpr uint32_t kOwnBytes = kOwn * kStep * 2, kSharedBytes = kShared * kStep * 2;
constexpr uint32_t kStageBytes = kOwnBytes + kSharedBytes;
constexpr int kAhead = 2;  // slots of a deferred epilogue for which it has what it reads on its way
constexpr int kLanding = 128 * kConsumers * 16, kLandingBytes = (2 * kAhead + 2) * kLanding;  // 16 bytes a thread each
constexpr int kSharedMemory = kStages * kStageBytes + 2 * kStages * 8 + kLandingBytes;

struct Gemm {
  const int32_t *offsets, *slot;
  const int32_t* index;  // row r of the own operand is row index[r] in memory, where it is gathered
  int experts, depth;    // depth: length of the contraction (unused by the weight gradients)
  int rows;              // of a dense block
  int columns;           // width of the result (of a half in up); weight gradients: of the shared operand
  int own_columns;       // weight gradients: width of the own operand
  Rows own, shared;      // what cp.async reads
  Rows h;                // down_backward reads
  Rows out, second;      // up: h and a; down_backward: dh and scaled a
  const float* weights;
  float* partial;
  int64_t out_expert;
  bool accumulate;
};

struct Tile {
  int expert, begin, end;  // the expert's rows
  int own;                 // first row of the own operand; weight gradients: first column
  int column;              // first column of the shared operand
  bool paired;             // whether both CTAs of the cluster have the same expert and column
};

__device__ inline int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

// The tiles of this CTA's cluster. The columns of a pair of row tiles come one after another, so that what is in flight
// at a time are whole experts. Of an odd row tile, each CTA takes every second column and loads all it needs itself.
// WARPS: whole warps walk together.
template <Task TASK, bool DENSE, bool WARPS = false> class Walk {
 public:
  __device__ Walk(const Gemm& g, int rank) : g_(g), rank_(rank), item_(blockIdx.x / 2) {}

  __device__ bool next(Tile& t) {
    const int columns = tiles_of(g_.columns, columns_of(TASK));
    if constexpr (is_gradient(TASK)) {  // as many for every expert
      const int each = tiles_of(g_.own_columns, 2 * kOwn) * columns;
      for (; item_ < each * g_.experts; item_ += gridDim.x / 2) {
        const int expert = item_ / each, i = item_ % each;
        const int begin = __ldg(g_.offsets + expert), end = __ldg(g_.offsets + expert + 1);
        if (begin == end && g_.accumulate) continue;
        t = {expert, begin, end, (i / columns * 2 + rank_) * kOwn, i % columns * columns_of(TASK), true};
        item_ += gridDim.x / 2;
        return true;
      }
    } else if constexpr (DENSE) {
      return within(0, 0, known(g_.rows), columns, t);
    } else {
      for (; expert_ < g_.experts; ++expert_)
        if (within(expert_, known(__ldg(g_.offsets + expert_)), known(__ldg(g_.offsets + expert_ + 1)), columns, t)) return true;
    }
    return false;
  }

 private:
  // The next tile, if it is among those of this expert; else counts them.
  __device__ bool within(int expert, int begin, int end, int columns, Tile& t) {
    const int row_tiles = tiles_of(end - begin, kOwn);
    const int pairs = row_tiles / 2 * columns, single = row_tiles % 2 * tiles_of(columns, 2), i = item_ - before_;
    if (i >= pairs + single) {
      before_ += pairs + single;
      return false;
    }
    const bool paired = i < pairs;
    const int tile = paired ? i / columns * 2 + rank_ : row_tiles - 1;
    const int column = paired ? i % columns : (i - pairs) * 2 + rank_;
    t = {expert, begin, end, begin + tile * kOwn, column * columns_of(TASK), paired};
    item_ += gridDim.x / 2;
    return true;
  }
  static __device__ int known(int x) { return WARPS ? uniform(x) : x; }
  const Gemm& g_;
  const int rank_;
  int item_, expert_ = 0, before_ = 0;  // before_: items of the experts before expert_
};

// Steps of kStep along the contraction. An expert without rows has one step of zeros in the weight gradients.
template <Task TASK> __device__ inline int steps_of(const Gemm& g, const Tile& t) {
  return is_gradient(TASK) ? max(tiles_of(t.end - t.begin, kStep), 1) : tiles_of(g.depth, kStep);
}

// Where in the ring of stages a warpgroup is.
struct Turn {
  uint32_t steps = 0;  // of all tiles so far
  __device__ int stage() const { return steps % kStages; }
  __device__ int last() const { return (steps - 1) % kStages; }
  __device__ uint32_t phase() const { return steps / kStages & 1; }
};
static_assert((kStages & (kStages - 1)) == 0, "steps may go round");

// --- the loading warpgroup

// Its thread copies the 16 bytes `chunk` of rows line + 16 i, into the 128-byte swizzle that TMA writes.
struct Copier {
  const int line = threadIdx.x / 8, chunk = threadIdx.x % 8;
  const uint32_t offset = line * 128 + (chunk ^ line % 8) * 16;
};

// The numbers of its rows among the 64 from `row` on, -1 from `end` on.
struct RowNumbers {
  int at[kStep / 16];

  __device__ RowNumbers(const int32_t* index, int row, int end) {
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
      const int r = row + Copier().line + 16 * i;
      at[i] = r >= end ? -1 : index ? __ldg(index + r) : r;
    }
  }
};

// Slabs of 64 columns of those rows, zeros for -1.
template <int SLABS>
__device__ inline void copy_slabs(uint8_t* dst, const Rows& from, const RowNumbers& rows, int column, int width) {
  const Copier c;
  column += c.chunk * 8;
  const uint32_t to = shared_address(dst) + c.offset;
  const bf16* const data = static_cast<const bf16*>(from.data);
#pragma unroll
  for (int i = 0; i < kStep / 16; ++i) {
    const bf16* const at = data + max(rows.at[i], 0) * from.stride + column;
#pragma unroll
    for (int s = 0; s < SLABS; ++s) {
      const bool live = rows.at[i] >= 0 && column + 64 * s < width;
      copy_async(to + s * kSlab + i * 2048, live ? at + 64 * s : data, live ? 16 : 0);
    }
  }
}

// --- the multiplying warpgroups

// One step of 64 along the contraction.
template <Task TASK>
__device__ inline void products(float (&acc)[128], const uint8_t* own, const uint8_t* shared, int consumer, bool add) {
  if constexpr (TASK == Task::grad_right) {
    auto& low = reinterpret_cast<float (&)[64]>(acc[0]);
    auto& high = reinterpret_cast<float (&)[64]>(acc[64]);
    const uint64_t a = matrix_descriptor_transposed(shared + 2 * consumer * kSlab, kSlab),
                   b = matrix_descriptor_transposed(own, kSlab);
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i) {
      wgmma_m64n128k16<1, 1>(low, a + 128 * i, b + 128 * i, add || i > 0);
      wgmma_m64n128k16<1, 1>(high, a + kSlab / 16 + 128 * i, b + 128 * i, add || i > 0);
    }
  } else {
    constexpr int kTransposedA = is_gradient(TASK), kTransposedB = is_transposed(TASK);
    const uint8_t* const own_half = own + consumer * (kOwnBytes / 2);
    const uint64_t a = kTransposedA ? matrix_descriptor_transposed(own_half, kSlab) : matrix_descriptor(own_half);
    const uint64_t b = kTransposedB ? matrix_descriptor_transposed(shared, kSlab) : matrix_descriptor(shared);
#pragma unroll
    for (int i = 0; i < kStep / 16; ++i)
      wgmma_m64n256k16<kTransposedA, kTransposedB>(acc, a + (kTransposedA ? 128 : 2) * i,
                                                   b + (kTransposedB ? 128 : 2) * i, add || i > 0);
  }
}

__device__ inline float2 unpack(uint32_t x) { return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000)}; }

// 32 columns of a row among the 4 threads of a quad: the products leave thread q the pairs of columns 8 i + 2 q (+ 1);
// to and from memory go the 8 columns from 8 q on.
__device__ inline void store8(bf16* to, const uint32_t (&pairs)[4], bool live) {
  if (live)  // spelled out, as the compiler likes to take a uint4 apart
    asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]),
                 "r"(pairs[3]) : "memory");
}
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ inline bf16* element(const Rows& r, int64_t row, int64_t column) {
  return static_cast<bf16*>(r.data) + row * r.stride + column;
}
__device__ inline float sigmoid(float x) {  // 1 / (1 + 2^(-x log2 e)); infinity's reciprocal is 0
  asm("{\n.reg .f32 t;\nmul.ftz.f32 t, %1, 0fBFB8AA3B;\nex2.approx.ftz.f32 t, t;\nadd.ftz.f32 t, t, 0f3F800000;\n"
      "rcp.approx.ftz.f32 %0, t;\n}" : "=f"(x) : "f"(x));
  return x;
}

// Where a thread's results lie: acc[16 g + 4 i + 2 half (+ 1)] is row + 8 half, column + 32 g + 8 i + 2 q (+ 1).
struct Place {
  int row, column, q;
};

// A weight gradient in float32: BLOCK columns by 64 rows of it, then the next 64 rows: 256 columns, or twice 128. What it is
// added to is read in four batches, so that latencies overlap.
template <int BLOCK>
__device__ inline void store_weight_grad(const Gemm& g, const Tile& t, const Place& p, int height, int width,
                                         const float (&acc)[128]) {
  float* const out = static_cast<float*>(g.out.data) + t.expert * g.out_expert;
  const auto place = [&](int half, int j, int i, bool& live) {  // i: piece of 8 columns, of which a thread has 2
    const int64_t row = p.row + 8 * half + j / (BLOCK / 32) * 64;
    const int column = p.column + j % (BLOCK / 32) * 32 + 8 * i;
    live = row < height && column < width;
    return out + row * g.out.stride + column + 2 * p.q;
  };
#pragma unroll
  for (int first = 0; first < 16; first += 4) {
    const int half = first / 8;
    bool live;
    float2 old[16] = {};
    if (g.accumulate) {
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        const float* const from = place(half, first % 8 + n / 4, n % 4, live);
        if (live) old[n] = *reinterpret_cast<const float2*>(from);
      }
    }
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const int j = first % 8 + n / 4, at = 16 * j + 4 * (n % 4) + 2 * half;
      float* const to = place(half, j, n % 4, live);
      if (live) *reinterpret_cast<float2*>(to) = make_float2(old[n].x + acc[at], old[n].y + acc[at + 1]);
    }
  }
}

__device__ inline uint4 load_shared(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
  return x;
}

// --- the epilogue of a tile between the products of the next one

// A tile's results, rounded to bf16 when its products are done. Its epilogue is kSlots pieces of work, which the
// warpgroup does one by one while later products run; what a slot reads comes by cp.async, asked for kAhead slots
// before and without costing registers: 32 bytes a thread, which nobody else touches. The slots come in groups of four:
// code for all sixteen would not stay in the instruction cache. What a slot stores is not read again before it has left
// L2, and says so.
template <Task TASK, bool DENSE> class Deferred {
 public:
  static constexpr int kGroup = 4, kGroups = TASK == Task::down_backward ? 4 : 2, kSlots = kGroup * kGroups;

  __device__ Deferred(const Gemm& g, uint8_t* landing)
      : g_(g), landing_(shared_address(landing) + (threadIdx.x - 128) * 16), packed_{} {}

  // acc: the products, done. Until the first call the slots find nothing to do.
  __device__ __forceinline__ void take(const float (&acc)[128], const Tile& t, const Place& p) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int from = 16 * j + 4 * i + 2 * half;  // volatile: neither before the wait for the products, nor late
          asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;"
                       : "=r"(packed_[4 * (8 * half + j) + i]) : "f"(acc[from + 1]), "f"(acc[from]));
        }
    const int rows = TASK == Task::grad_left ? g_.own_columns : TASK == Task::grad_right ? g_.columns : t.end;
    const int columns = TASK == Task::grad_right ? g_.own_columns : g_.columns;
    at_ = {element(g_.out, p.row, p.column) + 8 * p.q + (is_gradient(TASK) ? t.expert * g_.out_expert : 0), rows - p.row,
           columns - p.column - 8 * p.q};
    if (kTwo) keep<int64_t>(kSecond, element(g_.second, p.row, p.column) + 8 * p.q - static_cast<bf16*>(g_.second.data));
    if constexpr (TASK == Task::down_backward && !DENSE) {
      keep(kWeights, kept<float>(kNextWeights)), keep(kWeights + 4, kept<float>(kNextWeights + 4));
      keep(kPartial, int64_t(p.row) * tiles_of(g_.columns, columns_of(TASK)) + p.column / columns_of(TASK));
    }
    if (reads()) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load(i, at_);
    }
  }

  // All slots, with before(slot) before each, and after(group) after each group.
  template <class F, class G> __device__ __forceinline__ void run(F before, G after) {
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      // To the next group: 8 rows down, in down_backward after both halves of its columns.
      const bool down = TASK != Task::down_backward || group == 1;
      const int columns = TASK != Task::down_backward ? 0 : down ? -32 * kGroup : 32 * kGroup;
      const Cursor next{at_.out + (down ? 8 * g_.out.stride : 0) + columns, group + 1 < kGroups ? at_.rows - (down ? 8 : 0) : 0,
                       at_.columns - columns};
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        before(kGroup * group + i);
        slot(group, i, next);
      }
      after(group);
      at_ = next;
      if (kTwo) keep(kSecond, kept<int64_t>(kSecond) + (down ? 8 * g_.second.stride : 0) + columns);
#pragma unroll
      for (int i = 0; i < 64 - 64 / kGroups; ++i) packed_[i] = packed_[i + 64 / kGroups];
    }
  }

  // The weights of rows row and row + 8 of the next tile, in two steps: copies of where they are, and later of them.
  __device__ __forceinline__ void find_weights(int row, int end, bool found) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int what = kNextWeights + 4 * half;
      const void* const from = found ? static_cast<const void*>(g_.weights + kept<int>(what)) : g_.slot + row + 8 * half;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(landing_ + 2 * kAhead * kLanding + what), "l"(from),
                   "r"(found || row + 8 * half < end ? 4 : 0) : "memory");
    }
  }

 private:
  static constexpr bool kTwo = TASK == Task::up || TASK == Task::down_backward;  // results beside each other
  // A thread's first 8 columns of a group's results, and how many rows and columns the whole result has from there on.
  struct Cursor {
    bf16* out = nullptr;
    int rows = 0, columns = 0;
  };

  __device__ bool reads() const { return TASK == Task::down_backward || (is_gradient(TASK) && g_.accumulate); }

  // Slot i of a group: 8 rows by 32 columns of down_backward, by 64 (two blocks) of the others. Only i is known to the
  // compiler; packed_ begins with what belongs to the group.
  __device__ __forceinline__ void slot(int group, int i, const Cursor& next) {
    uint4 read[2] = {};
    if (reads()) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kAhead - 1) : "memory");
      read[0] = load_shared(landing(i, 0)), read[1] = load_shared(landing(i, 1));
      // To where these were, and before the rest of the slot: after it, a dense model's down_backward took up to 14 % longer.
      if (i + kAhead < kGroup) load(i + kAhead, at_);
      else if (group + 1 < kGroups) load(i + kAhead - kGroup, next);
      else copy_async_commit();  // an empty group, so that groups can be counted
    }
    if constexpr (TASK == Task::up) up(i);
    else if constexpr (TASK == Task::down_backward) down_backward(group, i, read);
    else store(2 * i, read[0]), store(2 * i + 1, read[1]);
  }

  __device__ uint32_t landing(int i, int which) const { return landing_ + (i % kAhead * 2 + which) * kLanding; }
  // What a thread keeps in shared memory, as registers are dear: weights of row and row + 8, where row's share of the weight's
  // gradient goes, where the second result goes (elements from its beginning).
  enum Kept { kWeights = 0, kPartial = 8, kSecond = kLanding, kNextWeights = kLanding + 8 };
  template <class T> __device__ __forceinline__ void keep(int what, T x) {
    const uint32_t to = landing_ + 2 * kAhead * kLanding + what;
    if constexpr (sizeof(T) == 8) asm volatile("st.shared.u64 [%0], %1;" ::"r"(to), "l"(x) : "memory");
    else asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
  }
  template <class T> __device__ __forceinline__ T kept(int what) const {
    const uint32_t from = landing_ + 2 * kAhead * kLanding + what;
    T x;
    if constexpr (sizeof(T) == 8) asm volatile("ld.shared.u64 %0, [%1];" : "=l"(x) : "r"(from) : "memory");
    else if constexpr (std::is_same_v<T, int>) asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
    else asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
    return x;
  }

  // What slot i of the group `from` there on reads.
  __device__ __forceinline__ void load(int i, const Cursor& from) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      bool live;
      const bf16* x = block(from, TASK == Task::down_backward ? i : 2 * i + which, live);
      if (TASK == Task::down_backward)
        x += static_cast<bf16*>(g_.h.data) - static_cast<bf16*>(g_.out.data) + which * g_.columns;
      copy_async(landing(i, which), x, live ? 16 : 0);
    }
    copy_async_commit();
  }

  // This thread's 8 columns of block j, 8 rows by 32 columns, of the group `from` there on, if the result has them.
  __device__ __forceinline__ bf16* block(const Cursor& from, int j, bool& live) const {
    const int rows = TASK == Task::grad_right ? j / 4 * 64 : 0, columns = (TASK == Task::grad_right ? j % 4 : j) * 32;
    live = from.rows > rows && from.columns > columns;
    return from.out + rows * g_.out.stride + columns;
  }
  __device__ __forceinline__ void gather(int j, uint32_t (&pairs)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = packed_[4 * j + i];
    quad_transpose(pairs, threadIdx.x % 4);
  }

  __device__ __forceinline__ void store(int j, const uint4& old) {
    bool live;
    bf16* const to = block(at_, j, live);
    uint32_t pairs[4];
    gather(j, pairs);
    if (reads()) {
      const uint32_t before[4] = {old.x, old.y, old.z, old.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack(before[i]), y = unpack(pairs[i]);
        pairs[i] = pack_pair(x.x + y.x, x.y + y.y);
      }
    }
    store8(to, pairs, live);
  }
  __device__ __forceinline__ void store_two(int j, const uint32_t (&gate)[4], const uint32_t (&up)[4], const uint32_t (&a)[4]) {
    bool live;
    bf16* const to = block(at_, j, live);
    store8(to, gate, live);
    store8(to + g_.columns, up, live);
    store8(static_cast<bf16*>(g_.second.data) + kept<int64_t>(kSecond) + 32 * j, a, live);
  }

  __device__ __forceinline__ void up(int j) {
    uint32_t gate[4], up[4], product[4];
    gather(j, gate), gather(j + 4, up);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack(gate[i]), y = unpack(up[i]);
      product[i] = pack_pair(x.x * sigmoid(x.x) * y.x, x.y * sigmoid(x.y) * y.y);
    }
    store_two(j, gate, up, product);
  }

  __device__ __forceinline__ void down_backward(int group, int j, const uint4 (&h)[2]) {
    const float weight = DENSE ? 1 : kept<float>(kWeights + group / 2 * 4);
    uint32_t gate[4] = {h[0].x, h[0].y, h[0].z, h[0].w}, up[4] = {h[1].x, h[1].y, h[1].z, h[1].w}, da[4];
    gather(j, da);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack(gate[i]), y = unpack(up[i]), ds = unpack(da[i]);
      float dx[2], dy[2], a[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float v = c ? x.y : x.x, u = c ? y.y : y.x, d = c ? ds.y : ds.x;
        const float s = sigmoid(v), silu = v * s, product = silu * u, scaled_da = weight * d;
        if (!DENSE) sum_ = fmaf(d, product, sum_);
        a[c] = weight * product;
        dx[c] = scaled_da * u * fmaf(silu, 1 - s, s);  // silu' = s + v s (1 - s)
        dy[c] = scaled_da * silu;
      }
      da[i] = pack_pair(a[0], a[1]), gate[i] = pack_pair(dx[0], dx[1]), up[i] = pack_pair(dy[0], dy[1]);
    }
    store_two(j, gate, up, da);
    if (!DENSE && j == kGroup - 1 && group % 2 == 1) {  // a row's last block
      sum_ += __shfl_xor_sync(~0u, sum_, 1);
      sum_ += __shfl_xor_sync(~0u, sum_, 2);
      if (threadIdx.x % 4 == 0 && at_.rows > 0 && at_.columns > -32 * kGroup)  // of the tile's second half
        g_.partial[kept<int64_t>(kPartial) + group / 2 * 8 * tiles_of(g_.columns, columns_of(TASK))] = sum_;
      sum_ = 0;
    }
  }

  const Gemm& g_;
  const uint32_t landing_;
  uint32_t packed_[64];  // 4 (8 half + j) + i: the pair of columns 32 j + 8 i + 2 q of row + 8 half
  float sum_ = 0;
  Cursor at_;
};

// --- the kernel

template <Task TASK, class Out, bool DENSE>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap own_map, const __grid_constant__ CUtensorMap shared_map,
                const __grid_constant__ CUtensorMap second_map, const __grid_constant__ Gemm g) {
  constexpr bool kGathered = is_gathered(TASK) && !DENSE, kGradient = is_gradient(TASK);
  constexpr bool kTwoMaps = DENSE && TASK == Task::up;  // gate and up are tensors of their own
  constexpr bool kDeferred = sizeof(Out) == 2;  // 3 to 25 % faster than at once, where products stand still meanwhile
  // As the compiler allots them without a spill: a loader that copies rows needs 40, most others 56.
  constexpr int kRegisters = kDeferred && (kGathered || TASK == Task::up_backward || TASK == Task::down_backward) ? 232 : 224;
  constexpr int kLoaderRegisters = 3 * 168 - 2 * kRegisters;  // a thread of three warpgroups starts with 168
  extern __shared__ __align__(1024) uint8_t stages[];
  uint64_t* const full = reinterpret_cast<uint64_t*>(stages + kStages * kStageBytes);
  uint64_t* const empty = full + kStages;
  uint8_t* const landing = reinterpret_cast<uint8_t*>(empty + kStages);
  const auto own_tile = [&](int stage) { return stages + stage * kStageBytes; };
  const auto shared_tile = [&](int stage) { return own_tile(stage) + kOwnBytes; };

  if (threadIdx.x == 0) {
    if (!kGathered) tma_prefetch_map(&own_map);
    tma_prefetch_map(&shared_map);
    if (kTwoMaps) tma_prefetch_map(&second_map);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + i, kGathered ? 129 : 1);
      barrier_init(empty + i, 2 * kConsumers);
    }
    barrier_init_fence();
  }
  cluster_sync();

  if (threadIdx.x < 128) {
    registers_release<kLoaderRegisters>();
    const uint32_t rank = cluster_rank();
    Walk<TASK, DENSE> walk(g, rank);
    Tile t{};
    Turn turn;
    const auto load_shared_half = [&](int half, int k, auto load) {  // load: of a box of a map, at (x, y, z)
      const CUtensorMap* const map = kTwoMaps && half ? &second_map : &shared_map;
      if constexpr (is_transposed(TASK)) {
        for (int slab = 2 * half; slab < 2 * half + 2; ++slab)
          load(map, shared_tile(turn.stage()) + slab * kSlab, t.column + 64 * slab, (kGradient ? t.begin : 0) + k * kStep,
               kGradient ? 0 : t.expert);
      } else {
        load(map, shared_tile(turn.stage()) + half * (kSharedBytes / 2), k * kStep,
             t.column + (kTwoMaps ? 0 : half * (TASK == Task::up ? g.columns : kShared / 2)), t.expert);
      }
    };
    const auto load_by_tma = [&](int k) {
      barrier_expect_bytes(full + turn.stage(), kSharedBytes + (kGathered ? 0 : kOwnBytes));
      if (!kGathered) tma_load(own_tile(turn.stage()), &own_map, full + turn.stage(), k * kStep, t.own, 0);
      if (t.paired) {
        load_shared_half(rank, k, [&](const CUtensorMap* map, uint8_t* dst, int x, int y, int z) {
          tma_load_multicast(dst, map, full + turn.stage(), x, y, z, 3);
        });
      } else {
        for (int half = 0; half < 2; ++half) {
          load_shared_half(half, k, [&](const CUtensorMap* map, uint8_t* dst, int x, int y, int z) {
            tma_load(dst, map, full + turn.stage(), x, y, z);
          });
        }
      }
    };

    while ((kGathered || threadIdx.x == 0) && walk.next(t)) {
      const int steps = steps_of<TASK>(g, t);
      if constexpr (kGradient) {
        RowNumbers next(g.index, t.begin, t.end);
        for (int k = 0; k < steps; ++k) {
          const int row = t.begin + k * kStep;
          const bool whole = row + kStep <= t.end;
          const RowNumbers rows = next;
          next = RowNumbers(g.index, row + kStep, t.end);  // on their way while this step waits for its stage
          barrier_wait(empty + turn.stage(), turn.phase() ^ 1);
          if (whole && threadIdx.x == 0) load_by_tma(k);
          copy_slabs<2>(own_tile(turn.stage()), g.own, rows, t.own, g.own_columns);
          if (!whole) {  // beyond the expert's rows lie those of the next, or nothing: both operands must be zero there
            copy_slabs<4>(shared_tile(turn.stage()), g.shared, RowNumbers(nullptr, row, t.end), t.column, g.columns);
            if (threadIdx.x == 0) barrier_arrive(full + turn.stage());
          }
          copy_async_arrive(full + turn.stage());
          ++turn.steps;
        }
      } else if constexpr (kGathered) {
        const Copier c;
        const bf16* rows[kOwn / 16];
#pragma unroll
        for (int i = 0; i < kOwn / 16; ++i) {
          const int row = t.own + c.line + 16 * i;
          rows[i] = row < t.end ? element(g.own, __ldg(g.index + row), c.chunk * 8) : nullptr;
        }
        for (int k = 0; k < steps; ++k) {
          barrier_wait(empty + turn.stage(), turn.phase() ^ 1);
          if (threadIdx.x == 0) load_by_tma(k);
          const uint32_t to = shared_address(own_tile(turn.stage())) + c.offset;
          const bool inside = k * kStep + c.chunk * 8 < g.depth;
#pragma unroll
          for (int i = 0; i < kOwn / 16; ++i) {
            const bool live = inside && rows[i];
            copy_async(to + i * 2048, live ? rows[i] + k * kStep : g.own.data, live ? 16 : 0);
          }
          copy_async_arrive(full + turn.stage());
          ++turn.steps;
        }
      } else {
        for (int k = 0; k < steps; ++k) {
          barrier_wait(empty + turn.stage(), turn.phase() ^ 1);
          load_by_tma(k);
          ++turn.steps;
        }
      }
    }
  } else {
    registers_take<kRegisters>();
    Walk<TASK, DENSE, true> walk(g, cluster_rank());
    Tile t{};
    Turn turn;
    const int consumer = uniform(threadIdx.x / 128 - 1), warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, q = lane % 4;
    const auto release = [&](int s) {
      if (threadIdx.x % 128 < 2) barrier_arrive_in_cluster(empty + s, threadIdx.x % 128);
    };
    float acc[128];
    Deferred<TASK, DENSE> last(g, landing);
    const int all_steps = kGradient ? 0 : uniform(steps_of<TASK>(g, t));  // of every tile
    for (bool first = true; walk.next(t); first = false) {
      t.end = uniform(t.end), t.own = uniform(t.own), t.column = uniform(t.column);  // each a register that others need
      const int steps = kGradient ? uniform(steps_of<TASK>(g, t)) : all_steps;
      const int lead = uniform(first && consumer == 0 ? min(kLead, steps) - 1 : -1);
      if (first && consumer == 1) named_sync(1, 256);
      // Nothing but padding: no products, and the other warpgroup has the tensor cores for itself. A deferred epilogue
      // waits for the next tile with products.
      if (!kGradient && uniform(t.own + consumer * 64 >= t.end)) {
        // One warp for all: without products to keep them together, one that is late from the last epilogue could find
        // that a barrier has gone round twice.
        if (warp == 0)
          for (Turn there = turn; there.steps < turn.steps + steps; ++there.steps)
            barrier_wait(full + there.stage(), there.phase()), release(there.stage());
        turn.steps += steps;
        named_sync(2 + consumer, 128);
        continue;
      }
      const Place own{t.own + consumer * 64 + warp * 16 + lane / 4, t.column, q};
      const Place place = TASK == Task::grad_right
                              ? Place{t.column + consumer * 128 + warp * 16 + lane / 4, t.own, q} : own;
      int k = 0;
      const auto arrived = [&]() __attribute__((always_inline)) {
        barrier_wait(full + turn.stage(), turn.phase());
        if (kGathered) async_proxy_fence();
      };
      // Ends with the wait for the next step's operands, so that their fence has no stores and copies of a deferred
      // epilogue right before it, for which it would wait as well.
      const auto step = [&]() __attribute__((always_inline)) {
        wgmma_fence();
        products<TASK>(acc, own_tile(turn.stage()), shared_tile(turn.stage()), consumer, k > 0);
        wgmma_commit();
        if (k == lead) named_arrive(1, 256);
        wgmma_wait<1>();
        if (k > 0) release(turn.last());  // the step before is done: its stage goes back to both producers
        ++turn.steps;
        if (++k < steps) arrived();
      };
      arrived();
      if constexpr (kDeferred) {
        const auto products_before = [&](int slot) __attribute__((always_inline)) {
          constexpr int kSlots = Deferred<TASK, DENSE>::kSlots;  // the first has steps to hide behind, and so has the last
#pragma unroll 1
          for (const int until = (steps * (slot + 1) + kSlots - 1) / kSlots; k < until;) step();
        };
        const auto weights_after = [&](int group) __attribute__((always_inline)) {
          if (TASK == Task::down_backward && !DENSE && group % 2 == 0) last.find_weights(own.row, t.end, group > 0);
        };
        last.run(products_before, weights_after);
        wgmma_wait<0>();
        release(turn.last());
        last.take(acc, t, place);
      } else {
        while (k < steps) step();
        wgmma_wait<0>();
        release(turn.last());
        if constexpr (TASK == Task::grad_left) store_weight_grad<256>(g, t, place, g.own_columns, g.columns, acc);
        else store_weight_grad<128>(g, t, place, g.columns, g.own_columns, acc);
      }
    }
    if constexpr (kDeferred) last.run([](int) {}, [](int) {});
  }
  cluster_sync();  // a CTA must not leave while its partner may still signal its barriers
}

// --- without tensor cores

__global__ void sum_partials(MoePlan p, int tiles, const float* partial, float* dweights) {
  const int64_t r = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (r >= p.rows) return;
  float sum = 0;
  if (r < p.offsets[p.experts])
    for (int i = 0; i < tiles; ++i) sum += partial[r * tiles + i];
  dweights[p.slot[r]] = sum;
}

// A thread per 8 columns of a token. Eight rows at a time come by cp.async, all under way before the first is used: of
// ordinary loads the compiler leaves only one or two, to save registers.
template <bool WEIGHTED>
__global__ void __launch_bounds__(256) combine_kernel(MoePlan p, int64_t tokens, int k, int chunks, Rows y,
                                                      const int32_t* inverse, const float* weights, Rows out) {
  constexpr int kBatch = 8;
  __shared__ uint4 landing[kBatch][256];
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, token = thread / chunks;
  const int column = int(thread % chunks) * 8;
  if (token >= tokens) return;
  const int rows = __ldg(p.offsets + p.experts);
  float sum[8] = {};
  for (int64_t slot = token * k, end = slot + k; slot < end; slot += kBatch) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = slot + i < end ? __ldg(inverse + slot + i) : rows;
      copy_async(shared_address(&landing[i][threadIdx.x]), row < rows ? element(y, row, column) : y.data,
                 row < rows ? 16 : 0);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint4 x = landing[i][threadIdx.x];
      const float weight = slot + i >= end ? 0 : WEIGHTED ? __ldg(weights + slot + i) : 1;
      const float2 pairs[4] = {unpack(x.x), unpack(x.y), unpack(x.z), unpack(x.w)};
#pragma unroll
      for (int j = 0; j < 4; ++j)
        sum[2 * j] = fmaf(weight, pairs[j].x, sum[2 * j]), sum[2 * j + 1] = fmaf(weight, pairs[j].y, sum[2 * j + 1]);
    }
  }
  *reinterpret_cast<uint4*>(element(out, token, column)) = {pack_pair(sum[0], sum[1]), pack_pair(sum[2], sum[3]),
                                                            pack_pair(sum[4], sum[5]), pack_pair(sum[6], sum[7])};
}

// --- host side

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("moe: ") + cudaGetErrorString(error));
}

void check_width(const char* name, int64_t width) {
  if (width <= 0 || width % 8 != 0 || width > 1 << 30)
    throw std::invalid_argument(std::string("moe: ") + name + " is " + std::to_string(width) +
                                "; expected a positive multiple of 8");
}

template <Task TASK, class Out = bf16, bool DENSE = false>
void launch(const CUtensorMap& own, const CUtensorMap& shared, const Gemm& g, uintptr_t stream, const CUtensorMap& second = {}) {
  constexpr auto kernel = gemm_kernel<TASK, Out, DENSE>;
  const int sms = multiprocessors_for<kernel>(kSharedMemory);
  kernel<<<sms / 2 * 2, kThreads, kSharedMemory, reinterpret_cast<cudaStream_t>(stream)>>>(own, shared, second, g);
  check(cudaGetLastError());
}

// Boxes of `box` rows x 64 elements.
CUtensorMap map_of(const Rows& x, int64_t rows, int64_t width, int box) {
  return tensor_map<3>(x.data, {width, rows, 1}, {x.stride, x.stride * rows}, {64, box, 1});
}
CUtensorMap map_of(const Experts& w, int64_t experts, int64_t rows, int64_t width, int box) {
  return tensor_map<3>(w.data, {width, rows, experts}, {w.row, w.expert}, {64, box, 1});
}

Gemm rows_gemm(const MoePlan& p, int64_t depth, int64_t columns, const Rows& out) {
  check_width("a width", depth), check_width("a width", columns);
  if (p.rows > INT32_MAX - kOwn * 2) throw std::invalid_argument("moe: more than 2^31 rows");
  Gemm g{};
  g.offsets = p.offsets, g.slot = p.slot, g.experts = int(p.experts);
  g.depth = int(depth), g.columns = int(columns), g.out = out;
  return g;
}

}  // namespace

void moe_up(const MoePlan& p, int64_t d, int64_t i, Rows x, Experts gate_up, Rows h, Rows a, uintptr_t stream) {
  Gemm g = rows_gemm(p, d, i, h);
  if (p.rows == 0) return;
  g.index = p.token, g.own = x, g.second = a;
  launch<Task::up>({}, map_of(gate_up, p.experts, 2 * i, d, kShared / 2), g, stream);
}

void moe_down(const MoePlan& p, int64_t d, int64_t i, Rows a, Experts down, Rows y, uintptr_t stream) {
  const Gemm g = rows_gemm(p, i, d, y);
  if (p.rows == 0) return;
  launch<Task::down>(map_of(a, p.rows, i, kOwn), map_of(down, p.experts, d, i, kShared / 2), g, stream);
}

void moe_down_backward(const MoePlan& p, int64_t d, int64_t i, Rows grad, Experts down, Rows h, const float* weights,
                       float* dweights, Rows dh, Rows scaled, float* partial, uintptr_t stream) {
  Gemm g = rows_gemm(p, d, i, dh);
  if (p.rows == 0) return;
  if (h.stride != dh.stride) throw std::invalid_argument("moe: h and its gradient have rows of different strides");
  g.index = p.token, g.own = grad, g.h = h, g.second = scaled, g.weights = weights, g.partial = partial;
  launch<Task::down_backward>({}, map_of(down, p.experts, d, i, kStep), g, stream);
  sum_partials<<<unsigned((p.rows + 255) / 256), 256, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      p, int(moe_partials(1, i)), partial, dweights);
  check(cudaGetLastError());
}

void swiglu_up(int64_t n, int64_t d, int64_t i, Rows x, Rows gate, Rows up, Rows h, Rows a, uintptr_t stream) {
  Gemm g = rows_gemm({1, n}, d, i, h);
  if (n == 0) return;
  g.rows = int(n), g.second = a;
  launch<Task::up, bf16, true>(map_of(x, n, d, kOwn), map_of(gate, i, d, kShared / 2), g, stream, map_of(up, i, d, kShared / 2));
}

void swiglu_down_backward(int64_t n, int64_t d, int64_t i, Rows dy, Rows down, Rows h, Rows dh, Rows a, uintptr_t stream) {
  Gemm g = rows_gemm({1, n}, d, i, dh);
  if (n == 0) return;
  if (h.stride != dh.stride) throw std::invalid_argument("swiglu_mlp: h and its gradient have rows of different strides");
  g.rows = int(n), g.h = h, g.second = a;
  launch<Task::down_backward, bf16, true>(map_of(dy, n, d, kOwn), map_of(down, d, i, kStep), g, stream);
}

int64_t moe_partials(int64_t rows, int64_t i) {
  return rows * ((i + columns_of(Task::down_backward) - 1) / columns_of(Task::down_backward));
}

void moe_up_backward(const MoePlan& p, int64_t d, int64_t i, Rows dh, Experts gate_up, Rows dx, uintptr_t stream) {
  const Gemm g = rows_gemm(p, 2 * i, d, dx);
  if (p.rows == 0) return;
  launch<Task::up_backward>(map_of(dh, p.rows, 2 * i, kOwn), map_of(gate_up, p.experts, 2 * i, d, kStep), g, stream);
}

void moe_weight_grad(const MoePlan& p, int64_t left_width, Rows left, int64_t right_width, Rows right, bool gather_left,
                     Experts out, bool accumulate, uintptr_t stream) {
  Gemm g = rows_gemm(p, left_width, right_width, {out.data, out.dtype, out.row});
  g.out_expert = out.expert, g.accumulate = accumulate, g.index = p.token;
  g.own = gather_left ? left : right, g.own_columns = int(gather_left ? left_width : right_width);
  g.shared = gather_left ? right : left, g.columns = int(gather_left ? right_width : left_width);
  // Without rows the map is never read, but a map has no empty dimensions.
  const CUtensorMap shared = p.rows ? map_of(g.shared, p.rows, g.columns, kStep) : CUtensorMap{};
  const auto run = [&](auto zero) {
    using Out = decltype(zero);
    gather_left ? launch<Task::grad_left, Out>({}, shared, g, stream)
                : launch<Task::grad_right, Out>({}, shared, g, stream);
  };
  out.dtype == DType::f32 ? run(float()) : run(bf16());
}

void moe_combine(const MoePlan& p, int64_t tokens, int64_t k, int64_t d, Rows y, const int32_t* inverse,
                 const float* weights, Rows out, uintptr_t stream) {
  check_width("a width", d);
  if (tokens == 0) return;
  const int chunks = int(d / 8);
  const int64_t blocks = (tokens * chunks + 255) / 256;
  if (blocks > INT32_MAX) throw std::invalid_argument("moe: more than 2^31 blocks of 2,048 elements");
  const auto kernel = weights ? combine_kernel<true> : combine_kernel<false>;
  kernel<<<unsigned(blocks), 256, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      p, tokens, int(k), chunks, y, inverse, weights, out);
  check(cudaGetLastError());
}

}  // namespace qwen3::cuda
