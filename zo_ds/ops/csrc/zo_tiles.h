// What a CPU thread does to a piece of a tensor with one instruction set. No include guard; see zo_core.h.
// A piece lies in one tile of 4096 elements of the parameter (dense and gaussian), or in one row and one tile of columns
// (factored).

enum { kUnroll = 8, kStep = kUnroll * kLanes, kBlocks = kGroups * kLanes };

ZO_FN U16 zo_nearest(const Bf16*, F32 x) { return zo_narrow(zo_bf16_nearest(zo_bits(x))); }
ZO_FN U16 zo_nearest(const Fp16*, F32 x) { return zo_fp16(x); }
ZO_FN U16 zo_stochastic(const Bf16*, F32 x, U32 random) { return zo_narrow(zo_bf16_stochastic(zo_bits(x), random)); }
ZO_FN U16 zo_stochastic(const Fp16*, F32 x, U32 random) { return zo_narrow(zo_fp16_stochastic(zo_bits(x), random)); }

// How results leave the registers; fp32 is rounded to nearest by its arithmetic.
template <Rounding kHow>
ZO_FN void zo_leave(float* to, const uint16_t*, F32 x) {
  zo_put(to, x);
}
template <Rounding kHow, class T>
ZO_FN void zo_leave(T* to, const uint16_t* random, F32 x) {
  if (kHow == kStochastic) zo_put(&to->bits, zo_stochastic(to, x, zo_load_bits(random)));
  else zo_put(&to->bits, zo_nearest(to, x));
}

// Terms of a sum: row t of the packed signs lies at signs + t * row and begins with the piece's tile.
struct Signs {
  const uint8_t* signs;
  size_t row;
  const float* coefficients;
  int count;
};

template <int kCount>
ZO_FN void zo_subtract(F32 sum[kCount], const Signs& terms, int element) {
  const uint8_t* row = terms.signs;
  for (int t = 0; t < terms.count; ++t, row += terms.row) {
    const Coefficient c = zo_coefficient(terms.coefficients[t]);
    ZO_UNROLL
    for (int u = 0; u < kCount; ++u) sum[u] = zo_minus(sum[u], c, row, element + u * kLanes);
  }
}

// The same of normals: row t of the half-words that name quantiles. Those of elements outside of the piece may be anything.
struct Normals {
  const uint16_t* words;
  size_t row;
  const float* coefficients;
  int count;
  const float* quantiles;
};

template <int kCount>
ZO_FN void zo_subtract(F32 sum[kCount], const Normals& terms, int element) {
  const uint16_t* row = terms.words + element;
  for (int t = 0; t < terms.count; ++t, row += terms.row) {
    const F32 c = zo_all(terms.coefficients[t]);
    ZO_UNROLL
    for (int u = 0; u < kCount; ++u) {
      const U32 word = zo_load_bits(row + u * kLanes);
      sum[u] = sum[u] - c * zo_float(zo_normal<U32>(zo_bits(zo_pick(terms.quantiles, word & 0x7fffu)), word));
    }
  }
}

// Fewer than kLanes elements that begin `skip` elements after a multiple of 8.
template <Rounding kHow, class From, class To, class Terms>
static void zo_sweep_part(const From* from, To* to, const uint16_t* random, int element, int skip, int count,
                          float shrink, const Terms& terms) {
  From in[kLanes] = {};
  To out[kLanes];
  uint16_t bits[kLanes] = {};
  __builtin_memcpy(in + skip, from, (size_t)count * sizeof(From));
  if (kHow == kStochastic) __builtin_memcpy(bits + skip, random, (size_t)count * sizeof(uint16_t));
  F32 sum[1] = {zo_load(in) * shrink};
  zo_subtract<1>(sum, terms, element);
  zo_leave<kHow>(out, bits, sum[0]);
  __builtin_memcpy(to, out + skip, (size_t)count * sizeof(To));
}

// to[i] = round(from[i] * shrink - sum_t c_t u_t) for i < count; element 0 has index `first` in its tile.
template <Rounding kHow, class From, class To, class Terms>
static void zo_sweep(const From* from, To* to, const uint16_t* random, int first, int count, float shrink,
                     const Terms& terms) {
  int i = 0;
  // In place, the next tile is fetched ahead: the pauses for new signs would stop the hardware from doing it.
  const int ahead = (const void*)from == (const void*)to ? kTile : 0;
  // Vectors begin at multiples of 8 elements of the tile.
  const int skip = kLanes == 1 ? 0 : first & 7;
  if (skip) {
    i = count < 8 - skip ? count : 8 - skip;
    zo_sweep_part<kHow>(from, to, random, first - skip, skip, i, shrink, terms);
  }
  for (; i + kStep <= count; i += kStep) {
    F32 sum[kUnroll];
    ZO_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      __builtin_prefetch(from + ahead + i + u * kLanes);
      sum[u] = zo_load(from + i + u * kLanes) * shrink;
    }
    zo_subtract<kUnroll>(sum, terms, first + i);
    ZO_UNROLL
    for (int u = 0; u < kUnroll; ++u) zo_leave<kHow>(to + i + u * kLanes, random + i + u * kLanes, sum[u]);
  }
  for (; i + kLanes <= count; i += kLanes) {
    F32 sum[1] = {zo_load(from + i) * shrink};
    zo_subtract<1>(sum, terms, first + i);
    zo_leave<kHow>(to + i, random + i, sum[0]);
  }
  if (i < count) zo_sweep_part<kHow>(from + i, to + i, random + i, first + i, 0, count - i, shrink, terms);
}

// Words of kBlocks consecutive blocks, a group of kLanes after the other.
ZO_FN void zo_blocks(U32 words[kGroups][4], uint64_t block, uint32_t stream, uint64_t seed, uint32_t param,
                     uint32_t direction) {
  enum { kChains = kGroups * kHalves };
  U64 x[kChains][4];
  ZO_UNROLL
  for (int h = 0; h < kChains; ++h)
    zo_counter(x[h], zo_counters(block + (uint64_t)(h / kHalves * kLanes), h % kHalves), stream, param, direction);
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  ZO_UNROLL
  for (int round = 0; round < 10; ++round) {
    ZO_UNROLL
    for (int h = 0; h < kChains; ++h) zo_philox_round(x[h], k0, k1);
    zo_philox_next(k0, k1);
  }
  ZO_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    ZO_UNROLL
    for (int q = 0; q < 4; ++q) {
      U64 halves[kHalves];
      for (int h = 0; h < kHalves; ++h) halves[h] = x[g * kHalves + h][q];
      words[g][q] = zo_pack(halves);
    }
  }
}

// Signs of elements first .. first + count - 1 of a tile, and perhaps more of it: byte k of the table (512 bytes) holds
// elements 8k .. 8k + 7.
static void zo_fill_signs(uint8_t* table, uint64_t tile, int first, int count, uint32_t stream, uint64_t seed,
                          uint32_t param, uint32_t direction) {
  const int run = first >> 3, last = (first + count - 1) >> 3;
  // Block l serves runs l, l + 32, l + 64, ...
  const bool few = (run >> 5) == (last >> 5);
  const int from = few ? (run & 31) / kBlocks * kBlocks : 0, to = few ? last & 31 : 31;
  for (int lane = from; lane <= to; lane += kBlocks) {
    U32 words[kGroups][4];
    zo_blocks(words, tile * 32 + (uint64_t)lane, stream, seed, param, direction);
    ZO_UNROLL
    for (int g = 0; g < kGroups; ++g) zo_put_signs(table, words[g], lane + g * kLanes);
  }
}

// Half-words of `count` elements from `element` on; returns where the first one's lie in the buffer, which has room for
// kBlocks blocks more.
static const uint16_t* zo_fill_words(uint16_t* buffer, uint64_t element, int count, uint32_t stream, uint64_t seed,
                                     uint32_t param, uint32_t direction) {
  const uint64_t first = element >> 3;
  const int blocks = (int)(((element + (uint64_t)count + 7) >> 3) - first);
  for (int at = 0; at < blocks; at += kBlocks) {
    U32 words[kGroups][4];
    zo_blocks(words, first + (uint64_t)at, stream, seed, param, direction);
    ZO_UNROLL
    for (int g = 0; g < kGroups; ++g) zo_put_words(buffer + 8 * (at + g * kLanes), words[g]);
  }
  return buffer + (element & 7);
}

// Sum of element bits times the weights of their places in the tile, modulo 2**64.
template <class Bits>
static uint64_t zo_hash_piece(const Bits* bits, int first, int count, const uint32_t* weights) {
  Sum sums[4] = {};
  int i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    ZO_UNROLL
    for (int u = 0; u < 4; ++u) {
      const int at = i + u * kLanes;
      __builtin_prefetch(bits + at + kTile);
      sums[u] += zo_dot(zo_load_bits(bits + at), zo_load_bits((const float*)(weights + first + at)));
    }
  }
  uint64_t total = zo_total(sums[0] + sums[1] + sums[2] + sums[3]);
  for (; i < count; ++i) total += (uint64_t)zo_word(bits[i]) * weights[first + i];
  return total;
}
