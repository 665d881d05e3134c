// Hopper's building blocks in PTX: mbarriers, bulk tensor copies (TMA), warpgroup matrix products (wgmma), clusters.
// Semantics: PTX ISA 8.x, sections "mbarrier", "cp.async.bulk.tensor", "wgmma".
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "common.h"

namespace qwen3::cuda {

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// --- mbarriers. Their default scope is the CTA, on purpose: what they order here is shared memory read by wgmma and written
// by TMA. With cluster scope each wait invalidates L1 and each arrival is a fence of the whole GPU.
__device__ inline void barrier_init(uint64_t* bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals));
}
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_expect_bytes(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes) : "memory");
}
__device__ inline void barrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
__device__ inline void barrier_arrive_in_cluster(uint64_t* bar, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(bar)), "r"(rank) : "memory");
}
__device__ inline void barrier_wait(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nretry:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni over;\nbra.uni retry;\nover:\n}" ::"r"(shared_address(bar)), "r"(parity) : "memory");
}

// A number that is the same in all lanes, told to the compiler: what is derived from it stays in uniform registers, where
// wgmma wants its descriptors. Otherwise each product costs four moves across, which its issue waits for.
__device__ inline int uniform(int x) { return int(__reduce_or_sync(~0u, unsigned(x))); }

// --- named barriers of a CTA: `threads` in all arrive, those that sync also wait
__device__ inline void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ inline void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// --- clusters
__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// --- TMA: a box of a 2-d tensor to shared memory; x is the contiguous coordinate
__device__ inline void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(dst)), "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y) : "memory");
}
__device__ inline void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(dst)), "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y), "r"(z) : "memory");
}
__device__ inline void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          shared_address(dst)), "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
__device__ inline void tma_load_multicast(void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(dst)), "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y),
      "h"(ranks) : "memory");
}
// A run of bytes, a multiple of 16, between addresses that are multiples of 16.
__device__ inline void bulk_load(void* dst, const void* src, uint64_t* bar, uint32_t bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(dst)), "l"(src), "r"(bytes), "r"(shared_address(bar)) : "memory");
}
// From shared memory to global, or added to fp32 sums there; a thread's copies since its last commit are a group.
__device__ inline void bulk_store(void* dst, const void* src, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(shared_address(src)), "r"(bytes)
               : "memory");
}
__device__ inline void bulk_add(float* dst, const void* src, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst),
               "r"(shared_address(src)), "r"(bytes) : "memory");
}
__device__ inline void tma_prefetch(const CUtensorMap* map, int x, int y) {  // into L2
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map), "r"(x), "r"(y) : "memory");
}
// A box of a 2-d tensor from shared memory to global, or added to what is there, rounded to its dtype.
__device__ inline void tma_store(const CUtensorMap* map, const void* src, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(src)), "r"(x), "r"(y) : "memory");
}
__device__ inline void tma_add(const CUtensorMap* map, const void* src, int x, int y) {
  asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(src)), "r"(x), "r"(y) : "memory");
}
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ inline void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }  // the source is free
__device__ inline void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }            // and the results are there
__device__ inline void tma_load_multicast(void* dst, const CUtensorMap* map, uint64_t* bar, int x, int y, int z,
                                          uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(dst)), "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y),
      "r"(z), "h"(ranks) : "memory");
}
__device__ inline void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// --- cp.async: 16 bytes to shared memory, the first `bytes` of them from global memory, the others zero
__device__ inline void copy_async(uint32_t dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
// One of the arrivals that `bar` was initialised with, made when all copies that this thread has begun are there.
__device__ inline void copy_async_arrive(uint64_t* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
}
// What was written to shared memory by ordinary means, by this thread or before a barrier, wgmma and bulk copies see from here on.
__device__ inline void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// --- wgmma
// Shared-memory matrix descriptor of a K-major tile whose rows are 128 bytes, in the 128-byte swizzle that TMA writes.
__device__ inline uint64_t matrix_descriptor(const void* tile) {
  return uint64_t((shared_address(tile) & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// The same memory read the other way round: rows are the K dimension, a row's 64 elements the M or N dimension, of which the
// next 64 lie `next` bytes further on.
__device__ inline uint64_t matrix_descriptor_transposed(const void* tile, int next) {
  return uint64_t((shared_address(tile) & 0x3ffff) >> 4) | uint64_t(next >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define QWEN3_ACC8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define QWEN3_ACC32(d, i) QWEN3_ACC8(d, i), QWEN3_ACC8(d, i + 8), QWEN3_ACC8(d, i + 16), QWEN3_ACC8(d, i + 24)

// d[64 x 256] (+)= a[64 x 16] b[256 x 16]^T, bf16 to fp32. Thread t of the warpgroup holds rows 16 * (t / 32) + t % 32 / 4
// (+ 8) and columns 8 * j + 2 * (t % 4) (+ 1): d[4 * j + 2 * (row half) + column]. A_T, B_T: the descriptor is a transposed one.
template <int A_T = 0, int B_T = 0>
__device__ inline void wgmma_m64n256k16(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, p, 1, 1, %131, %132;\n}"
      : QWEN3_ACC32(d, 0), QWEN3_ACC32(d, 32), QWEN3_ACC32(d, 64), QWEN3_ACC32(d, 96)
      : "l"(a), "l"(b), "r"(int(accumulate)), "n"(A_T), "n"(B_T));
}

#define QWEN3_ACC64_NAMES \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
  "%25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d[64 x 128] (+)= a[64 x 16] b[128 x 16]^T; as above.
template <int A_T = 0, int B_T = 0>
__device__ inline void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" QWEN3_ACC64_NAMES "}, %64, %65, p, 1, 1, %67, %68;\n}"
      : QWEN3_ACC32(d, 0), QWEN3_ACC32(d, 32)
      : "l"(a), "l"(b), "r"(int(accumulate)), "n"(A_T), "n"(B_T));
}
// d[64 x 128] (+)= a[64 x 16] b[16 x 128], a in registers: rows t % 32 / 4 (+ 8) of 16 a warp, columns 2 * (t % 4) (+ 1) and
// those + 8, in the order of the accumulators; b's descriptor is a transposed one.
__device__ inline void wgmma_m64n128k16(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" QWEN3_ACC64_NAMES "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
      : QWEN3_ACC32(d, 0), QWEN3_ACC32(d, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
}

// d[64 x 64] (+)= a[64 x 16] b[64 x 16]^T; as above.
template <int A_T = 0, int B_T = 0>
__device__ inline void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, %35, %36;\n}"
      : QWEN3_ACC32(d, 0)
      : "l"(a), "l"(b), "r"(int(accumulate)), "n"(A_T), "n"(B_T));
}
// d[64 x 64] (+)= a[64 x 16] b[64 x 16]^T, a in registers.
__device__ inline void wgmma_m64n64k16(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
      : QWEN3_ACC32(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
}
// Four 8 x 8 matrices of 16 bits from the rows at whose addresses lanes 8 i to 8 i + 7 point for matrix i, held like a wgmma's a.
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
// Four 8 x 8 matrices of 16 bits, held like accumulators, to the rows of shared memory at whose addresses
// lanes 8 i to 8 i + 7 point for matrix i.
__device__ inline void store_matrices(uint32_t row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3]) : "memory");
}

// Transposes a 4 x 4 of registers among the four threads of a quad: thread q ends with the q-th register of all, so that
// what was two columns a thread becomes eight in a row.
template <class T> __device__ inline void quad_transpose(T (&r)[4], int q) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const T got = __shfl_xor_sync(~0u, q & 2 ? r[i] : r[i + 2], 2);
    (q & 2 ? r[i] : r[i + 2]) = got;
  }
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const T got = __shfl_xor_sync(~0u, q & 1 ? r[i] : r[i + 1], 1);
    (q & 1 ? r[i] : r[i + 1]) = got;
  }
}

// --- numbers
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline uint32_t pack_pair(float a, float b) {  // bf16, a in the lower half
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<const uint32_t&>(pair);
}

// --- registers: a warpgroup gives some up, others take them
template <int N> __device__ inline void registers_release() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ inline void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// --- host side: launches

// The current device's multiprocessors. KERNEL may use `shared` bytes there from here on: that is said to every device once.
template <auto KERNEL> int multiprocessors_for(int shared) {
  static std::mutex lock;
  static std::map<int, int> known;
  const auto check = [](cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  };
  int device = 0, count = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> guard(lock);
  if (const auto at = known.find(device); at != known.end()) return at->second;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  check(cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  return known[device] = count;
}

// --- host side: maps of row-major bf16 tensors, read in boxes 64 elements wide with the 128-byte swizzle

// Sizes and strides (in elements, of all dimensions but the first) from the contiguous dimension outwards.
template <int DIMS>
CUtensorMap tensor_map(const void* data, const int64_t (&size)[DIMS], const int64_t (&stride)[DIMS - 1], const int (&box)[DIMS]) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled; it needs to be 12.0 or newer");
    return reinterpret_cast<Encode>(f);
  }();
  CUtensorMap map;
  cuuint64_t sizes[DIMS], strides[DIMS - 1];
  cuuint32_t boxes[DIMS], steps[DIMS];
  std::string text;
  for (int i = 0; i < DIMS; ++i) {
    sizes[i] = cuuint64_t(size[i]), boxes[i] = cuuint32_t(box[i]), steps[i] = 1;
    if (i > 0) strides[i - 1] = cuuint64_t(stride[i - 1]) * 2;
    text += (i ? " x " : "") + std::to_string(size[i]);
  }
  const CUresult r = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, DIMS, const_cast<void*>(data), sizes, strides, boxes, steps,
                            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (r != CUDA_SUCCESS)
    throw std::invalid_argument("a tensor of " + text + " cannot be read by TMA: rows must start on 16-byte boundaries");
  return map;
}
// Of heads: boxes of `rows` tokens of one.
inline CUtensorMap tensor_map(const Heads& x, int64_t batches, int64_t tokens, int64_t heads, int width, int rows) {
  // A batch of one may have any stride; TMA wants a multiple of 16 bytes.
  const int64_t batch = batches == 1 ? tokens * x.token : x.batch;
  return tensor_map<4>(x.data, {width, heads, tokens, batches}, {x.head, x.token, batch}, {64, 1, rows, 1});
}
inline CUtensorMap tensor_map(const void* data, int64_t rows, int64_t columns, int64_t row_stride, int box_rows) {
  return tensor_map<2>(data, {columns, rows}, {row_stride}, {64, box_rows});
}

}  // namespace qwen3::cuda
