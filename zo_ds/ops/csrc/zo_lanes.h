// Lanes of one instruction set, chosen by ZO_LANES: 1 (plain C++), 8 (AVX2, F16C) or 16 (AVX-512 F/BW/VL/DQ).
// No include guard; see zo_core.h. GCC's vector types bring the arithmetic, intrinsics what has no operator.

#define ZO_FN static inline __attribute__((always_inline))
#if defined(__clang__)
#define ZO_UNROLL _Pragma("unroll")
#else
#define ZO_UNROLL _Pragma("GCC unroll 16")
#endif

enum { kLanes = ZO_LANES };

template <class U>
ZO_FN U zo_flip(U coefficient, U word, U shift);  // zo_core.h

#if ZO_LANES == 1
typedef uint32_t U32;
typedef float F32;
typedef uint64_t U64;
enum { kHalves = 1, kGroups = 1 };  // 64-bit registers for kLanes counters; times kLanes: blocks made at once

ZO_FN U64 zo_product(U64 x, uint32_t m) { return (uint64_t)(uint32_t)x * m; }
ZO_FN bool zo_above(U32 a, uint32_t b) { return a > b; }
ZO_FN U32 zo_select(bool condition, U32 yes, U32 no) { return condition ? yes : no; }
ZO_FN U32 zo_truncate(F32 x) { return x < 2147483648.0f ? (U32)x : 0u; }
ZO_FN U64 zo_counters(uint64_t first, int) { return first; }
ZO_FN U32 zo_pack(const U64 x[kHalves]) { return (U32)x[0]; }
ZO_FN F32 zo_float(U32 bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
ZO_FN U32 zo_bits(F32 x) { uint32_t bits; __builtin_memcpy(&bits, &x, 4); return bits; }

typedef uint16_t U16;
ZO_FN U16 zo_narrow(U32 low_halves) { return (uint16_t)low_halves; }
ZO_FN U32 zo_fp16_nearest(U32 bits) {
  const uint32_t sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return sign | 0x7e00u | ((size >> 13) & 0x1ffu);
  if (size >= 0x477ff000u) return sign | 0x7c00u;
  // Adding 0.5 puts the last place of a subnormal half into the last place of the sum.
  if (size < 0x38800000u) return sign | (zo_bits(zo_float(size) + 0.5f) - 0x3f000000u);
  return sign | ((size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13);
}

ZO_FN float zo_fp16_value(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, size = half & 0x7fffu;
  if (size >= 0x7c00u) return zo_float(sign | 0x7f800000u | ((size & 0x3ffu) << 13));
  if (size < 0x400u) return zo_float(zo_bits((float)size * 5.9604644775390625e-8f) | sign);
  return zo_float(sign | ((size << 13) + 0x38000000u));
}

ZO_FN F32 zo_load(const float* p) { return *p; }
ZO_FN F32 zo_load(const Bf16* p) { return zo_float((uint32_t)p->bits << 16); }
ZO_FN F32 zo_load(const Fp16* p) { return zo_fp16_value(p->bits); }
ZO_FN U32 zo_load_bits(const float* p) { return zo_bits(*p); }
ZO_FN U32 zo_load_bits(const uint16_t* p) { return *p; }
ZO_FN void zo_put(float* p, F32 x) { *p = x; }
ZO_FN void zo_put(uint16_t* p, U16 x) { *p = x; }
ZO_FN F32 zo_all(float c) { return c; }
ZO_FN F32 zo_pick(const float* table, U32 index) { return table[index]; }
ZO_FN U16 zo_fp16(F32 x) { return (uint16_t)zo_fp16_nearest(zo_bits(x)); }

// A coefficient in every lane, and sum - c u for the lanes' elements, whose packed signs begin at a byte boundary.
typedef float Coefficient;
ZO_FN Coefficient zo_coefficient(float c) { return c; }
ZO_FN F32 zo_minus(F32 sum, const Coefficient& c, const uint8_t* signs, int element) {
  const uint32_t byte = signs[element >> 3];
  return sum - zo_float(zo_flip<uint32_t>(zo_bits(c), byte, 31u - ((uint32_t)element & 7u)));
}

// Byte s of block `lane` goes where the signs of run 32 * s + lane belong.
ZO_FN void zo_put_signs(uint8_t* table, const U32 w[4], int lane) {
  for (int s = 0; s < 16; ++s) table[32 * s + lane] = (uint8_t)(w[s >> 2] >> (8 * (s & 3)));
}
ZO_FN void zo_put_words(uint16_t* out, const U32 w[4]) { __builtin_memcpy(out, w, 16); }
ZO_FN uint64_t zo_dot(U32 x, U32 weight) { return (uint64_t)x * weight; }
typedef uint64_t Sum;
ZO_FN uint64_t zo_total(Sum sum) { return sum; }

#else
typedef uint32_t U32 __attribute__((vector_size(4 * ZO_LANES)));
typedef int32_t I32 __attribute__((vector_size(4 * ZO_LANES)));
typedef float F32 __attribute__((vector_size(4 * ZO_LANES)));
typedef uint64_t U64 __attribute__((vector_size(4 * ZO_LANES)));
typedef uint16_t U16 __attribute__((vector_size(2 * ZO_LANES)));
enum { kHalves = 2, kGroups = ZO_LANES == 16 ? 2 : 1 };

ZO_FN F32 zo_float(U32 bits) { return (F32)bits; }
ZO_FN U32 zo_bits(F32 x) { return (U32)x; }
typedef U64 Sum;
ZO_FN uint64_t zo_total(Sum sum) {
  uint64_t total = 0;
  for (int i = 0; i < ZO_LANES / 2; ++i) total += sum[i];
  return total;
}
// Both sides below 2**31.
ZO_FN I32 zo_above(U32 a, uint32_t b) { return (I32)a > (int32_t)b; }
ZO_FN U32 zo_select(I32 condition, U32 yes, U32 no) { return condition ? yes : no; }
ZO_FN U32 zo_pack(const U64 x[kHalves]) { return (U32)((x[0] & 0xffffffffull) | (x[1] << 32)); }
ZO_FN U32 zo_load_bits(const float* p) { U32 x; __builtin_memcpy(&x, p, sizeof x); return x; }
ZO_FN U32 zo_load_bits(const uint16_t* p) {
  U16 x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, U32);
}
ZO_FN F32 zo_load(const float* p) { F32 x; __builtin_memcpy(&x, p, sizeof x); return x; }
ZO_FN F32 zo_load(const Bf16* p) { return (F32)(zo_load_bits(&p->bits) << 16); }
ZO_FN void zo_put(float* p, F32 x) { __builtin_memcpy(p, &x, sizeof x); }
ZO_FN void zo_put(uint16_t* p, U16 x) { __builtin_memcpy(p, &x, sizeof x); }
ZO_FN F32 zo_all(float c) { return c - (F32){}; }  // keeps -0
typedef U32 Coefficient;
ZO_FN Coefficient zo_coefficient(float c) { return (U32)zo_all(c); }
// Reads up to four bytes of signs; a mask register per vector (AVX-512) was measured to be no faster.
ZO_FN F32 zo_minus(F32 sum, const Coefficient& c, const uint8_t* signs, int element) {
#if ZO_LANES == 8
  const U32 shift = {31, 30, 29, 28, 27, 26, 25, 24};
#else
  const U32 shift = {31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16};
#endif
  uint32_t word;
  __builtin_memcpy(&word, signs + (element >> 3), 4);
  return sum - zo_float(zo_flip<U32>(c, (U32){} + word, shift));
}

#if ZO_LANES == 8
ZO_FN U64 zo_product(U64 x, uint32_t m) {
  return (U64)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi32((int)m));
}
ZO_FN U64 zo_counters(uint64_t first, int half) {
  const U64 even = {0, 2, 4, 6};
  return even + (first + (uint64_t)half);
}
ZO_FN U32 zo_truncate(F32 x) { return (U32)_mm256_cvttps_epi32((__m256)x); }
ZO_FN F32 zo_pick(const float* table, U32 index) { return (F32)_mm256_i32gather_ps(table, (__m256i)index, 4); }
ZO_FN U32 zo_fp16_nearest(U32 bits) {
  return (U32)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)bits, _MM_FROUND_TO_NEAREST_INT));
}
ZO_FN F32 zo_load(const Fp16* p) { return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
ZO_FN U16 zo_fp16(F32 x) { return (U16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
ZO_FN U16 zo_narrow(U32 low_halves) {
  const __m256i pairs = _mm256_packus_epi32((__m256i)low_halves, (__m256i)low_halves);
  return (U16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
}
ZO_FN void zo_put_signs(uint8_t* table, const U32 w[4], int lane) {
  const __m256i by_byte = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                           0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i together = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  ZO_UNROLL
  for (int q = 0; q < 4; ++q) {
    const U64 runs = (U64)_mm256_permutevar8x32_epi32(_mm256_shuffle_epi8((__m256i)w[q], by_byte), together);
    ZO_UNROLL
    for (int s = 0; s < 4; ++s) {
      const uint64_t bytes = runs[s];
      __builtin_memcpy(table + 32 * (4 * q + s) + lane, &bytes, 8);
    }
  }
}
ZO_FN void zo_put_words(uint16_t* out, const U32 w[4]) {
  const __m256i a = _mm256_unpacklo_epi32((__m256i)w[0], (__m256i)w[1]);
  const __m256i b = _mm256_unpackhi_epi32((__m256i)w[0], (__m256i)w[1]);
  const __m256i c = _mm256_unpacklo_epi32((__m256i)w[2], (__m256i)w[3]);
  const __m256i d = _mm256_unpackhi_epi32((__m256i)w[2], (__m256i)w[3]);
  const __m256i blocks[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c),  //
                             _mm256_unpacklo_epi64(b, d), _mm256_unpackhi_epi64(b, d)};
  ZO_UNROLL
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128((__m128i*)(out + 8 * i), _mm256_castsi256_si128(blocks[i]));
    _mm_storeu_si128((__m128i*)(out + 8 * (i + 4)), _mm256_extracti128_si256(blocks[i], 1));
  }
}
ZO_FN Sum zo_dot(U32 x, U32 weight) {
  return (U64)_mm256_mul_epu32((__m256i)x, (__m256i)weight) +
         (U64)_mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), _mm256_srli_epi64((__m256i)weight, 32));
}

#elif ZO_LANES == 16
ZO_FN U64 zo_product(U64 x, uint32_t m) {
  return (U64)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi32((int)m));
}
ZO_FN U64 zo_counters(uint64_t first, int half) {
  const U64 even = {0, 2, 4, 6, 8, 10, 12, 14};
  return even + (first + (uint64_t)half);
}
ZO_FN U32 zo_truncate(F32 x) { return (U32)_mm512_cvttps_epi32((__m512)x); }
ZO_FN F32 zo_pick(const float* table, U32 index) { return (F32)_mm512_i32gather_ps((__m512i)index, table, 4); }
ZO_FN U32 zo_fp16_nearest(U32 bits) {
  return (U32)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)bits, _MM_FROUND_TO_NEAREST_INT));
}
ZO_FN F32 zo_load(const Fp16* p) { return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
ZO_FN U16 zo_fp16(F32 x) { return (U16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
ZO_FN U16 zo_narrow(U32 low_halves) { return (U16)_mm512_cvtepi32_epi16((__m512i)low_halves); }
ZO_FN void zo_put_signs(uint8_t* table, const U32 w[4], int lane) {
  const __m512i by_byte = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i together = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  ZO_UNROLL
  for (int q = 0; q < 4; ++q) {
    const __m512i runs = _mm512_permutexvar_epi32(together, _mm512_shuffle_epi8((__m512i)w[q], by_byte));
    uint8_t* at = table + 32 * 4 * q + lane;
    _mm_storeu_si128((__m128i*)at, _mm512_castsi512_si128(runs));
    _mm_storeu_si128((__m128i*)(at + 32), _mm512_extracti32x4_epi32(runs, 1));
    _mm_storeu_si128((__m128i*)(at + 64), _mm512_extracti32x4_epi32(runs, 2));
    _mm_storeu_si128((__m128i*)(at + 96), _mm512_extracti32x4_epi32(runs, 3));
  }
}
ZO_FN void zo_put_words(uint16_t* out, const U32 w[4]) {
  const __m512i a = _mm512_unpacklo_epi32((__m512i)w[0], (__m512i)w[1]);
  const __m512i b = _mm512_unpackhi_epi32((__m512i)w[0], (__m512i)w[1]);
  const __m512i c = _mm512_unpacklo_epi32((__m512i)w[2], (__m512i)w[3]);
  const __m512i d = _mm512_unpackhi_epi32((__m512i)w[2], (__m512i)w[3]);
  const __m512i blocks[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c),  //
                             _mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)};
  ZO_UNROLL
  for (int i = 0; i < 4; ++i) {
    __m128i* at = (__m128i*)(out + 8 * i);
    _mm_storeu_si128(at, _mm512_castsi512_si128(blocks[i]));
    _mm_storeu_si128(at + 4, _mm512_extracti32x4_epi32(blocks[i], 1));
    _mm_storeu_si128(at + 8, _mm512_extracti32x4_epi32(blocks[i], 2));
    _mm_storeu_si128(at + 12, _mm512_extracti32x4_epi32(blocks[i], 3));
  }
}
ZO_FN Sum zo_dot(U32 x, U32 weight) {
  return (U64)_mm512_mul_epu32((__m512i)x, (__m512i)weight) +
         (U64)_mm512_mul_epu32(_mm512_srli_epi64((__m512i)x, 32), _mm512_srli_epi64((__m512i)weight, 32));
}
#endif
#endif
