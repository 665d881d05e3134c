// One vector of floats, with the same interface on AVX-512, AVX2 and plain C++. Kernels are written once on it.
// Loads and stores convert bfloat16 and float; arithmetic is fp32. `n` limits a load or store to the first n lanes.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(QWEN3_ISA_avx512) || defined(QWEN3_ISA_avx2)
#include <immintrin.h>
#endif

namespace qwen3 {
namespace QWEN3_ISA {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline bf16 round_bf16(float f) {  // to nearest even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40)};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <class T> T from_float(float f);
template <> inline float from_float<float>(float f) { return f; }
template <> inline bf16 from_float<bf16>(float f) { return round_bf16(f); }

#if defined(QWEN3_ISA_avx512)

struct Vec {
  static constexpr int W = 16;
  __m512 v;
  Vec() = default;
  Vec(__m512 x) : v(x) {}
  Vec(float x) : v(_mm512_set1_ps(x)) {}
  static __mmask16 mask(int n) { return __mmask16((1u << n) - 1); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static Vec widen(__m256i b) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16)); }
  static Vec load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(mask(n), p)); }
  // Integer rounding, not vcvtneps2bf16: that instruction flushes denormals.
  __m256i narrow() const {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  void store(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, mask(n), narrow()); }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float max() const { return _mm512_reduce_max_ps(v); }
};
inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }  // a * b + c
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec pow2(Vec n) {  // 2^n for integral n in [-127, 128], 0 at -127
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23));
}
inline Vec select_le(Vec a, Vec b, Vec x, Vec y) {  // a <= b ? x : y
  return _mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ), x.v);
}
inline Vec keep_nan(Vec x, Vec y) { return _mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), x.v); }

#elif defined(QWEN3_ISA_avx2)

struct Vec {
  static constexpr int W = 8;
  __m256 v;
  Vec() = default;
  Vec(__m256 x) : v(x) {}
  Vec(float x) : v(_mm256_set1_ps(x)) {}
  static __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load(const float* p, int n) { return _mm256_maskload_ps(p, mask(n)); }
  static Vec widen(__m128i b) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16)); }
  static Vec load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Vec load(const bf16* p, int n) {
    alignas(16) uint16_t t[8] = {0};
    std::memcpy(t, p, 2 * n);
    return widen(_mm_load_si128(reinterpret_cast<const __m128i*>(t)));
  }
  __m128i narrow() const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
    const __m256i top = _mm256_srli_epi32(kept, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int n) const { _mm256_maskstore_ps(p, mask(n), v); }
  void store(bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow()); }
  void store(bf16* p, int n) const {
    alignas(16) uint16_t t[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(t), narrow());
    std::memcpy(p, t, 2 * n);
  }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  float max() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
};
inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
inline Vec round(Vec a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec pow2(Vec n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23));
}
inline Vec select_le(Vec a, Vec b, Vec x, Vec y) { return _mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)); }
inline Vec keep_nan(Vec x, Vec y) { return _mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q)); }

#else

struct Vec {
  static constexpr int W = 8;  // arrays of 8 let the compiler use what the baseline has
  float v[W];
  Vec() = default;
  Vec(float x) { std::fill(v, v + W, x); }
  template <class T> static Vec load(const T* p, int n = W) {
    Vec r(0.f);
    for (int i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  template <class T> void store(T* p, int n = W) const {
    for (int i = 0; i < n; ++i) p[i] = from_float<T>(v[i]);
  }
  float sum() const { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
  float max() const { return *std::max_element(v, v + W); }
};
template <class F> inline Vec lanes(F f) {
  Vec r;
  for (int i = 0; i < Vec::W; ++i) r.v[i] = f(i);
  return r;
}
inline Vec operator+(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] + b.v[i]; }); }
inline Vec operator-(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] - b.v[i]; }); }
inline Vec operator*(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] * b.v[i]; }); }
inline Vec operator/(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] / b.v[i]; }); }
inline Vec fma(Vec a, Vec b, Vec c) { return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline Vec max(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Vec min(Vec a, Vec b) { return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline Vec round(Vec a) { return lanes([&](int i) { return std::nearbyint(a.v[i]); }); }
inline Vec pow2(Vec n) { return lanes([&](int i) { return std::ldexp(1.f, int(n.v[i])); }); }
inline Vec select_le(Vec a, Vec b, Vec x, Vec y) { return lanes([&](int i) { return a.v[i] <= b.v[i] ? x.v[i] : y.v[i]; }); }
inline Vec keep_nan(Vec x, Vec y) { return lanes([&](int i) { return x.v[i] != x.v[i] ? x.v[i] : y.v[i]; }); }

#endif

inline Vec operator-(Vec a) { return Vec(0.f) - a; }

// e^x with a relative error below 8e-8 (1e-7 without FMA): Cody-Waite reduction and the degree-6 polynomial with the
// least maximal relative error on |r| <= ln(2)/2, 3e-9; Taylor's has 1e-7 there. -inf (and all below -87.3) gives 0,
// NaN gives NaN, and all above 88.37 the 2.4e38 of 88.37.
inline Vec exp(Vec x) {
  const Vec clamped = min(max(x, Vec(-88.f)), Vec(88.3762626f));
  const Vec n = round(clamped * Vec(1.44269504f));
  Vec r = fma(n, Vec(-0.693359375f), clamped);
  r = fma(n, Vec(2.12194440e-4f), r);
  Vec p = Vec(1.3820662e-3f);
  for (float c : {8.368675e-3f, 4.1668266e-2f, 0.16666521f, 0.49999994f, 1.f, 1.f}) p = fma(p, r, Vec(c));
  return keep_nan(x, p * pow2(n));
}

// Runs body(i, n) over [0, size) in steps of the vector width; n is the width but for the last step.
template <class F> inline void for_lanes(int64_t size, F body) {
  int64_t i = 0;
  for (; i + Vec::W <= size; i += Vec::W) body(i, Vec::W);
  if (i < size) body(i, int(size - i));
}
template <class T> inline Vec load(const T* p, int n) { return n == Vec::W ? Vec::load(p) : Vec::load(p, n); }
template <class T> inline void store(T* p, int n, Vec v) { n == Vec::W ? v.store(p) : v.store(p, n); }

// Calls f(T()) with the C++ type of a dtype.
template <class F> inline void with_type(DType t, F f) { t == DType::bf16 ? f(bf16()) : f(float()); }
template <class T> inline T* row(const Rows& r, int64_t i) { return static_cast<T*>(r.data) + i * r.stride; }

// Splits n rows into at most 64 chunks that do not depend on the number of threads, so that sums over rows come out
// the same on every machine; runs body(chunk, begin, end).
constexpr int kMaxChunks = 64;
inline int chunks_of(int64_t n, int64_t rows_per_chunk = 16) {
  return int(std::clamp<int64_t>((n + rows_per_chunk - 1) / rows_per_chunk, 1, kMaxChunks));
}
template <class F> inline void parallel_chunks(int64_t n, int chunks, F body) {
#pragma omp parallel for schedule(static) if (chunks > 1)
  for (int c = 0; c < chunks; ++c) body(c, n * c / chunks, n * (c + 1) / chunks);
}

}  // namespace QWEN3_ISA
}  // namespace qwen3
