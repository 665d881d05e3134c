// Every CPU kernel exists once per instruction set, in its own namespace; the best one is picked at run time.
#pragma once
#include "common.h"

namespace qwen3 {

enum class Isa { scalar, avx2, avx512 };
Isa isa();  // the best that this binary holds and this processor runs, or QWEN3_CPU_ISA
const char* isa_name(Isa);

}  // namespace qwen3

#define QWEN3_DECLARE(kernel, Args) \
  namespace scalar { void kernel(const Args&); } \
  namespace avx2 { void kernel(const Args&); }   \
  namespace avx512 { void kernel(const Args&); }

#ifdef QWEN3_HAS_avx512
#define QWEN3_CALL(kernel, args)                                     \
  switch (::qwen3::isa()) {                                          \
    case ::qwen3::Isa::avx512: ::qwen3::avx512::kernel(args); break; \
    case ::qwen3::Isa::avx2: ::qwen3::avx2::kernel(args); break;     \
    case ::qwen3::Isa::scalar: ::qwen3::scalar::kernel(args); break; \
  }
#else
#define QWEN3_CALL(kernel, args) ::qwen3::scalar::kernel(args)
#endif
