// One lane on a CUDA device; see zo_core.h. No CUDA headers: NVRTC finds none on a user's machine.
#pragma once

#if defined(__CUDACC_RTC__)
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#else
#include <stdint.h>
#endif

#define ZO_FN static __device__ __forceinline__
#define ZO_UNROLL _Pragma("unroll")

struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };
enum Stream : uint32_t { kDense, kLeft, kRight, kRandom, kGaussian };
enum { kTile = 4096 };

ZO_FN uint64_t zo_product(uint64_t x, uint32_t m) { return (uint64_t)(uint32_t)x * m; }
ZO_FN bool zo_above(uint32_t a, uint32_t b) { return a > b; }
ZO_FN uint32_t zo_select(bool condition, uint32_t yes, uint32_t no) { return condition ? yes : no; }
ZO_FN uint32_t zo_truncate(float x) { return (uint32_t)x; }
ZO_FN float zo_float(uint32_t bits) { return __uint_as_float(bits); }
ZO_FN uint32_t zo_bits(float x) { return __float_as_uint(x); }
ZO_FN uint32_t zo_fp16_nearest(uint32_t bits) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(zo_float(bits)));
  return half;
}
ZO_FN float zo_fp16_value(uint32_t half) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((uint16_t)half));
  return x;
}
