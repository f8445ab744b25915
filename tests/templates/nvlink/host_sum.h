// Stands for the parts of tile.h that are assembly; sum_push.h follows as it stands.

static uint32_t __shfl_xor_sync(unsigned mask, uint32_t value, int lanes) { return __shfl_sync(mask, value, (threadIdx.x & 31) ^ lanes); }

enum { TSK_BF16 = 0 };
static uint32_t rounded(float f) {   // to bfloat16, ties to even
  uint32_t x;
  memcpy(&x, &f, 4);
  return (x + 0x7fff + (x >> 16 & 1)) >> 16;
}
static float widened(uint32_t x) {
  float f;
  x <<= 16;
  memcpy(&f, &x, 4);
  return f;
}
template <int DT> TSL uint32_t tsk_pack(float a, float b) { return rounded(a) | rounded(b) << 16; }
template <int DT> TSL float tsk_low(uint32_t x) { return widened(x & 0xffff); }
template <int DT> TSL float tsk_high(uint32_t x) { return widened(x >> 16); }
