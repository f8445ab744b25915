
// ---- loads and stores of one element, in all orders, scopes and widths -------------------------------------------------------
// "na" is .L1::no_allocate, "nc" is .nc. Only what PTX has is here: words.py refuses the rest.

#define TSL_LD(NAME, PTX, BITS, WORD, REG)                                                                             \
  TSL uint##BITS##_t tsl_x_ld_##NAME##_u##BITS(TslAddress p) {                                                         \
    WORD v;                                                                                                            \
    asm volatile("ld." PTX "u" #BITS " %0, [%1];" : "=" REG(v) : "l"(p) : "memory");                                   \
    return (uint##BITS##_t)v;                                                                                          \
  }
#define TSL_ST(NAME, PTX, BITS, WORD, REG)                                                                             \
  TSL int tsl_x_st_##NAME##_u##BITS(TslAddress p, uint##BITS##_t v) {                                                  \
    asm volatile("st." PTX "u" #BITS " [%0], %1;" ::"l"(p), REG((WORD)v) : "memory");                                  \
    return 0;                                                                                                          \
  }
// Four words at once, from or to memory of this thread: by memcpy, because a local array is aligned to its elements only.
#define TSL_LD128(NAME, PTX)                                                                                           \
  TSL int tsl_x_ld_##NAME##_u128(TslAddress to, TslAddress p) {                                                        \
    uint4 v;                                                                                                           \
    asm volatile("ld." PTX "v4.u32 {%0,%1,%2,%3}, [%4];"                                                               \
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");                                    \
    memcpy((void *)to, &v, 16);                                                                                        \
    return 0;                                                                                                          \
  }
#define TSL_ST128(NAME, PTX)                                                                                           \
  TSL int tsl_x_st_##NAME##_u128(TslAddress p, TslAddress from) {                                                      \
    uint4 v;                                                                                                           \
    memcpy(&v, (const void *)from, 16);                                                                                \
    asm volatile("st." PTX "v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory"); \
    return 0;                                                                                                          \
  }
#define TSL_WIDTHS(MACRO, NAME, PTX)                                                                                   \
  MACRO(NAME, PTX, 8, uint32_t, "r") MACRO(NAME, PTX, 16, uint16_t, "h")                                               \
  MACRO(NAME, PTX, 32, uint32_t, "r") MACRO(NAME, PTX, 64, uint64_t, "l")
#define TSL_ALLOCATE(MACRO, NAME, PTX)                                                                                 \
  TSL_WIDTHS(MACRO, NAME, PTX) TSL_WIDTHS(MACRO, NAME##_na, PTX "L1::no_allocate.")
#define TSL_ALLOCATE128(MACRO, NAME, PTX) MACRO(NAME, PTX) MACRO(NAME##_na, PTX "L1::no_allocate.")
#define TSL_WORDS_SCOPE(SCOPE)                                                                                         \
  TSL_ALLOCATE(TSL_LD, relaxed_##SCOPE, "relaxed." #SCOPE ".global.")                                                  \
  TSL_ALLOCATE(TSL_LD, acquire_##SCOPE, "acquire." #SCOPE ".global.")                                                  \
  TSL_ALLOCATE(TSL_ST, relaxed_##SCOPE, "relaxed." #SCOPE ".global.")                                                  \
  TSL_ALLOCATE(TSL_ST, release_##SCOPE, "release." #SCOPE ".global.")                                                  \
  TSL_ALLOCATE128(TSL_LD128, relaxed_##SCOPE, "relaxed." #SCOPE ".global.")                                            \
  TSL_ALLOCATE128(TSL_ST128, relaxed_##SCOPE, "relaxed." #SCOPE ".global.")
TSL_WORDS_SCOPE(cta)
TSL_WORDS_SCOPE(gpu)
TSL_WORDS_SCOPE(sys)
TSL_ALLOCATE(TSL_LD, weak, "weak.global.")
TSL_ALLOCATE(TSL_LD, weak_nc, "global.nc.")   // .weak may not be written beside .nc
TSL_ALLOCATE(TSL_ST, weak, "weak.global.")
TSL_WIDTHS(TSL_LD, volatile, "volatile.global.")
TSL_WIDTHS(TSL_ST, volatile, "volatile.global.")
TSL_ALLOCATE128(TSL_LD128, weak, "weak.global.")
TSL_ALLOCATE128(TSL_LD128, weak_nc, "global.nc.")
TSL_ALLOCATE128(TSL_ST128, weak, "weak.global.")
TSL_LD128(volatile, "volatile.global.")
TSL_ST128(volatile, "volatile.global.")

TSL uint32_t tsl_x_bits_f32(float v) { return __float_as_uint(v); }
TSL uint64_t tsl_x_bits_f64(double v) { return (uint64_t)__double_as_longlong(v); }
// Of float16, bfloat16 and the float8s, whose types TileLang's headers declare after this text.
template <typename T> TSL uint16_t tsl_x_bits_f16(T v) {
  uint16_t bits;
  static_assert(sizeof(v) == sizeof(bits), "a float of 16 bits");
  memcpy(&bits, &v, sizeof(bits));
  return bits;
}
template <typename T> TSL uint8_t tsl_x_bits_f8(T v) {
  uint8_t bits;
  static_assert(sizeof(v) == sizeof(bits), "a float of 8 bits");
  memcpy(&bits, &v, sizeof(bits));
  return bits;
}
