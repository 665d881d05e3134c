// RMSNorm with an optional residual add. A row lives in registers between the two passes over it, so each tensor crosses
// device memory once; weight gradients go through ordered partial sums, so results do not change from run to run.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/kernels.h"

namespace qwen3::cuda {
namespace {

constexpr int kMaxItems = 4;  // vectors that one thread keeps of a row
// Threads a row at the most: the backward kernel takes up to 128 registers with 16-byte vectors, 56 without.
constexpr int max_threads(int vec) { return vec == 1 ? 1024 : 512; }
constexpr int64_t max_width(int vec) { return int64_t(vec) * kMaxItems * max_threads(vec); }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void from_float(float& out, float x) { out = x; }
__device__ inline void from_float(__nv_bfloat16& out, float x) { out = __float2bfloat16_rn(x); }
__device__ inline void from_float(__half& out, float x) { out = __float2half_rn(x); }

template <class T, int N> struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// Reads and writes N values as fp32, 16 bytes at a time at the most.
template <int N, class T> __device__ inline void load(float (&out)[N], const T* p) {
  constexpr int kWidth = sizeof(T) * N > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int part = 0; part < N; part += kWidth) {
    const auto pack = *reinterpret_cast<const Pack<T, kWidth>*>(p + part);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[part + i] = to_float(pack.v[i]);
  }
}
template <int N, class T> __device__ inline void store(T* p, const float (&in)[N]) {
  constexpr int kWidth = sizeof(T) * N > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int part = 0; part < N; part += kWidth) {
    Pack<T, kWidth> pack;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) from_float(pack.v[i], in[part + i]);
    *reinterpret_cast<Pack<T, kWidth>*>(p + part) = pack;
  }
}
template <class T> __device__ inline T* at(const Rows& r, int64_t i) { return static_cast<T*>(r.data) + i * r.stride; }

// Sum over the blockDim.x threads of one row; blockDim.y rows share the block. Every thread must call it.
__device__ inline float row_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (blockDim.x == 32) return x;
  __shared__ float warps[32];
  const int per_row = blockDim.x / 32, first = threadIdx.y * per_row;
  __syncthreads();  // the previous row's values have been read
  if (threadIdx.x % 32 == 0) warps[first + threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < per_row; ++w) total += warps[first + w];
  return total;
}

template <class T, class W, int VEC, int ITEMS> __global__ void __launch_bounds__(max_threads(VEC)) forward(RmsNorm a) {
  for (int64_t base = int64_t(blockIdx.x) * blockDim.y; base < a.n; base += int64_t(gridDim.x) * blockDim.y) {
    const int64_t i = base + threadIdx.y;
    const bool live = i < a.n;
    float v[ITEMS][VEC] = {};
    float squares = 0;
    if (live) {
#pragma unroll
      for (int item = 0; item < ITEMS; ++item) {
        const int64_t j = (int64_t(item) * blockDim.x + threadIdx.x) * VEC;
        if (j < a.h) load(v[item], at<T>(a.x, i) + j);
      }
      if (a.residual.data) {
#pragma unroll
        for (int item = 0; item < ITEMS; ++item) {
          const int64_t j = (int64_t(item) * blockDim.x + threadIdx.x) * VEC;
          if (j >= a.h) continue;
          float r[VEC];
          load(r, at<T>(a.residual, i) + j);
#pragma unroll
          for (int e = 0; e < VEC; ++e) {
            T rounded;  // what is normalised is the rounded sum, as it is what the next layer sees
            from_float(rounded, v[item][e] + r[e]);
            v[item][e] = to_float(rounded);
          }
          store(at<T>(a.sum, i) + j, v[item]);
        }
      }
#pragma unroll
      for (int item = 0; item < ITEMS; ++item)
#pragma unroll
        for (int e = 0; e < VEC; ++e) squares += v[item][e] * v[item][e];
    }
    const float rstd = 1.f / sqrtf(row_sum(squares) / float(a.h) + a.eps);  // rsqrtf is off by up to 2 ulp
    if (!live) continue;
    if (threadIdx.x == 0) a.rstd[i] = rstd;
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
      const int64_t j = (int64_t(item) * blockDim.x + threadIdx.x) * VEC;
      if (j >= a.h) continue;
      float w[VEC];
      load(w, at<W>(a.weight, 0) + j);
#pragma unroll
      for (int e = 0; e < VEC; ++e) w[e] *= v[item][e] * rstd;
      store(at<T>(a.y, i) + j, w);
    }
  }
}

template <class T, class W, int VEC, int ITEMS> __global__ void __launch_bounds__(max_threads(VEC)) backward(RmsNormBackward a) {
  float dweight[ITEMS][VEC] = {};
  for (int64_t base = int64_t(blockIdx.x) * blockDim.y; base < a.n; base += int64_t(gridDim.x) * blockDim.y) {
    const int64_t i = base + threadIdx.y;
    const bool live = i < a.n;
    float normed[ITEMS][VEC] = {}, g[ITEMS][VEC] = {};  // g: gradient of the normed row, dy * weight
    const float rstd = live ? a.rstd[i] : 0;
    float dot = 0;
    if (live) {
#pragma unroll
      for (int item = 0; item < ITEMS; ++item) {
        const int64_t j = (int64_t(item) * blockDim.x + threadIdx.x) * VEC;
        if (j >= a.h) continue;
        load(normed[item], at<T>(a.sum, i) + j);
        load(g[item], at<T>(a.dy, i) + j);
      }
#pragma unroll
      for (int item = 0; item < ITEMS; ++item) {
        const int64_t j = (int64_t(item) * blockDim.x + threadIdx.x) * VEC;
        if (j >= a.h) continue;
        float w[VEC];
        load(w, at<W>(a.weight, 0) + j);
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
          normed[item][e] *= rstd;
          dweight[item][e] += g[item][e] * normed[item][e];
          g[item][e] *= w[e];
          dot += g[item][e] * normed[item][e];
        }
      }
    }
    const float mean = row_sum(dot) / float(a.h);
    if (!live) continue;
#pragma unroll
    for (int item = 0; item < ITEMS; ++item) {
      const int64_t j = (int64_t(item) * blockDim.x + threadIdx.x) * VEC;
      if (j >= a.h) continue;
      float d[VEC] = {};
      if (a.dsum.data) load(d, at<T>(a.dsum, i) + j);
#pragma unroll
      for (int e = 0; e < VEC; ++e) d[e] += (g[item][e] - normed[item][e] * mean) * rstd;
      store(at<T>(a.dx, i) + j, d);
    }
  }
  float* partial = a.partial + (int64_t(blockIdx.x) * blockDim.y + threadIdx.y) * a.h;
#pragma unroll
  for (int item = 0; item < ITEMS; ++item) {
    const int64_t j = (int64_t(item) * blockDim.x + threadIdx.x) * VEC;
    if (j < a.h) store(partial + j, dweight[item]);
  }
}

// dweight[j] = sum over partials, in order. 32 columns a block; 8 rows of threads each take a contiguous run of partials.
template <class W> __global__ void reduce_partials(const float* partial, int partials, int64_t h, W* dweight) {
  __shared__ double sums[8][33];  // a line of a hundred floats would have twice the error of torch's tree
  const int64_t j = int64_t(blockIdx.x) * 32 + threadIdx.x;
  const int begin = partials * threadIdx.y / 8, end = partials * (threadIdx.y + 1) / 8;
  double sum = 0;
  if (j < h)
    for (int p = begin; p < end; ++p) sum += partial[p * h + j];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || j >= h) return;
  double total = 0;
  for (int r = 0; r < 8; ++r) total += sums[r][threadIdx.x];
  from_float(dweight[j], float(total));
}

int multiprocessors() {
  static const int count = [] {
    int device = 0, n = 0;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
      throw std::runtime_error("rms_norm: no CUDA device answers");
    return n;
  }();
  return count;
}

struct Layout {
  int items, threads, rows, blocks;  // vectors a thread, threads a row, rows a block, blocks
};

// 4 vectors a thread keep enough loads in flight; rows are stacked until a block has 128 threads, and the grid is capped at
// 1024 threads a multiprocessor, since every block row of the backward costs a row of partial sums.
Layout layout(int64_t n, int64_t h, int vec) {
  if (h > max_width(vec))
    throw std::invalid_argument("rms_norm: width " + std::to_string(h) + " is over " + std::to_string(max_width(vec)) +
                                ", the most that the CUDA kernel keeps in registers; use the Triton backend");
  const int64_t vectors = (h + vec - 1) / vec;
  const int items = vectors >= 128 ? 4 : vectors >= 64 ? 2 : 1;
  const int threads = int((vectors + items * 32 - 1) / (items * 32) * 32);
  const int rows = threads >= 128 ? 1 : 128 / threads;
  const int64_t wanted = (n + rows - 1) / rows, most = int64_t(multiprocessors()) * (1024 / (threads * rows));
  return {items, threads, rows, int(wanted < most ? wanted : most)};
}

bool aligned(const Rows& r, int vec) {
  const int64_t bytes = r.dtype == DType::f32 ? 4 : 2;
  return r.data == nullptr || (reinterpret_cast<uintptr_t>(r.data) % 16 == 0 && r.stride % vec == 0 && (vec * bytes) % 16 == 0);
}

// Values a vector: 16 bytes of the activations where width, strides and addresses allow it, else 1.
template <class... R> int vector_width(int64_t h, DType t, const R&... tensors) {
  const int vec = t == DType::f32 ? 4 : 8;
  return h % vec == 0 && (aligned(tensors, vec) && ...) ? vec : 1;
}

template <class F> void with_type(DType t, F f) {
  switch (t) {
    case DType::f32: f(float()); break;
    case DType::bf16: f(__nv_bfloat16()); break;
    case DType::f16: f(__half()); break;
  }
}

template <class F> void with_items(int items, F f) {
  switch (items) {
    case 1: f(std::integral_constant<int, 1>()); break;
    case 2: f(std::integral_constant<int, 2>()); break;
    default: f(std::integral_constant<int, kMaxItems>()); break;
  }
}

// Calls f(T(), W(), vec, items) with the types of activations and weight and the sizes as compile-time constants.
template <class F> void specialise(DType t, DType w, int vec, int items, F f) {
  if (w != DType::f32 && w != t) throw std::invalid_argument("rms_norm: weight must be float32 or of x's dtype");
  with_type(t, [&](auto T) {
    with_items(items, [&](auto I) {
      constexpr int kVec = 16 / sizeof(T);
      const auto vectors = [&](auto W) {
        vec == 1 ? f(T, W, std::integral_constant<int, 1>(), I) : f(T, W, std::integral_constant<int, kVec>(), I);
      };
      w == DType::f32 ? vectors(float()) : vectors(T);
    });
  });
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("rms_norm: ") + cudaGetErrorString(error));
}

}  // namespace

void rms_norm(const RmsNorm& a, uintptr_t stream) {
  const int vec = vector_width(a.h, a.x.dtype, a.x, a.residual, a.y, a.sum);
  const Layout l = layout(a.n, a.h, vec);
  specialise(a.x.dtype, a.weight.dtype, vec, l.items, [&](auto T, auto W, auto V, auto I) {
    forward<decltype(T), decltype(W), V.value, I.value>
        <<<l.blocks, dim3(l.threads, l.rows), 0, reinterpret_cast<cudaStream_t>(stream)>>>(a);
  });
  check_launch();
}

int rms_norm_partials(int64_t n, int64_t h) {  // enough for whatever vector width the addresses allow
  int most = 0;
  for (int vec : {1, 4, 8}) {
    if (h % vec != 0 || h > max_width(vec)) continue;
    const Layout l = layout(n, h, vec);
    most = l.blocks * l.rows > most ? l.blocks * l.rows : most;
  }
  return most;
}

void rms_norm_backward(const RmsNormBackward& a, uintptr_t stream) {
  const auto s = reinterpret_cast<cudaStream_t>(stream);
  const int vec = vector_width(a.h, a.dy.dtype, a.dy, a.dsum, a.sum, a.dx);
  const Layout l = layout(a.n, a.h, vec);
  specialise(a.dy.dtype, a.weight.dtype, vec, l.items, [&](auto T, auto W, auto V, auto I) {
    backward<decltype(T), decltype(W), V.value, I.value><<<l.blocks, dim3(l.threads, l.rows), 0, s>>>(a);
  });
  with_type(a.dweight.dtype, [&](auto W) {
    reduce_partials<<<int((a.h + 31) / 32), dim3(32, 8), 0, s>>>(a.partial, l.blocks * l.rows, a.h,
                                                                   static_cast<decltype(W)*>(a.dweight.data));
  });
  check_launch();
}

}  // namespace qwen3::cuda
