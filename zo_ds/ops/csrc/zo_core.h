// Noise, accumulation and rounding, version 1 (docs/formats.md): the one definition behind every compiled op.
//
// Plain functions without torch types, templates over the lane type: U is uint32_t or a vector of them, W a 64-bit
// counter word or a vector of them. zo_lanes.h supplies the lanes on a CPU, zo_device.h on CUDA. There is no
// include guard: the CPU build includes this file once per instruction set, in a namespace of its own.

// A round of Philox4x32 (Salmon et al., SC 2011). Only the low half of each word counts; high halves carry leftovers.
template <class W>
ZO_FN void zo_philox_round(W x[4], uint32_t k0, uint32_t k1) {
  const W p0 = zo_product(x[0], 0xD2511F53u), p1 = zo_product(x[2], 0xCD9E8D57u);
  x[0] = (p1 >> 32) ^ x[1] ^ (uint64_t)k0;
  x[2] = (p0 >> 32) ^ x[3] ^ (uint64_t)k1;
  x[1] = p1;
  x[3] = p0;
}

ZO_FN void zo_philox_next(uint32_t& k0, uint32_t& k1) {
  k0 += 0x9E3779B9u;
  k1 += 0xBB67AE85u;
}

// Counter of a block of a stream: 0 dense, 1 left factor, 2 right factor, 3 rounding bits, 4 normals.
template <class W>
ZO_FN void zo_counter(W x[4], W block, uint32_t stream, uint32_t param, uint32_t direction) {
  x[0] = block;
  x[1] = ((block >> 32) & (uint64_t)0xffffffu) | (uint64_t)(stream << 24);
  x[2] = block * 0 + (uint64_t)param;
  x[3] = block * 0 + (uint64_t)direction;
}

// The coefficient with its sign turned where bit 31 of `word << shift` is set.
template <class U>
ZO_FN U zo_flip(U coefficient, U word, U shift) {
  return coefficient ^ ((word << shift) & 0x80000000u);
}

// Bits of the normal that a half-word stands for, from the bits of the quantile that its low 15 bits name. A product
// with it is rounded before it is added: no compiler may fuse the two.
template <class U>
ZO_FN U zo_normal(U quantile, U half_word) {
  return quantile ^ ((half_word & 0x8000u) << 16);
}

// fp32 bits -> bf16 bits in the low half, to nearest, ties to even. A NaN is cut off: one that arithmetic made is quiet,
// so something of it remains.
template <class U>
ZO_FN U zo_bf16_nearest(U bits) {
  const U half = ((bits >> 16) & 1u) + 0x7fffu;
  return (bits + zo_select(zo_above(bits & 0x7fffffffu, 0x7f800000u), bits & 0u, half)) >> 16;
}

// fp32 bits -> bf16 bits, away from zero if the cut fraction plus 16 random bits reaches 1. Not for inf and NaN.
template <class U>
ZO_FN U zo_bf16_stochastic(U bits, U random) {
  return (bits + zo_select(zo_above(bits & 0x7fffffffu, 0x7f7fffffu), bits & 0u, random)) >> 16;
}

// fp32 bits -> fp16 bits, as above; below the normal range the fraction of 2**-24 is floored to 16 binary places.
template <class U>
ZO_FN U zo_fp16_stochastic(U bits, U random) {
  const U size = bits & 0x7fffffffu;
  const U cut = zo_select(zo_above(size, 0x7f7fffffu), bits, (bits + (random >> 3)) & 0xffffe000u);
  const U tiny = ((zo_truncate(zo_float(size) * 1099511627776.0f) + random) >> 16) | ((bits >> 16) & 0x8000u);
  return zo_select(zo_above(size, 0x387fffffu), zo_fp16_nearest(cut), tiny);
}

// Weight of an element in the hash of its tile, and of a tile in the hash of its parameter: odd, so that no single
// changed bit can cancel.
ZO_FN uint32_t zo_hash_element(uint32_t index) {
  uint32_t x = index + 0x9E3779B9u;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return (x ^ (x >> 16)) | 1u;
}

ZO_FN uint64_t zo_mix(uint64_t x) {
  uint64_t z = x + 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

ZO_FN uint64_t zo_hash_tile(uint32_t param, uint64_t tile) { return zo_mix(zo_mix(param) + tile) | 1u; }
