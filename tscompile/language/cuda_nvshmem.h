
// ---- NVSHMEM ------------------------------------------------------------------------------------------------------------------
// What moves goes through NVSHMEM's device functions; what waits is ours, and bounded. A PE is a rank of the context's group here.

#if !__has_include(<nvshmem.h>)
#error "a kernel with NVSHMEM calls is compiled by tl.dialect('cuda', nvshmem='inline').compile, tl.compile_cuda or build_cubin"
#endif
#include <nvshmem.h>
#include <nvshmemx.h>

// Whether NVSHMEM calls can be made: the group's memory is NVSHMEM's, and whoever loaded this module initialised its state.
TSL bool tsl_nv_ready(TslAddress context) {
  const TslContext *c = tsl_context((const void *)context);
  const int why = c->team == 0                                                    ? TSL_NO_TEAM
                  : ((const TslTeam *)c->team)->pes == 0                          ? TSL_NO_NVSHMEM
                  : nvshmemi_device_state_d.peer_heap_base_p2p == nullptr         ? TSL_NO_STATE
                                                                                  : 0;
  if (why) tsl_refuse(context, why, 0);
  return why == 0;
}
TSL bool tsl_nv_is_pe(TslAddress context, int pe) {
  if ((unsigned)pe < (unsigned)tsl_context((const void *)context)->size) return true;
  tsl_refuse(context, TSL_NO_PE, (uint64_t)pe);
  return false;
}
// NVSHMEM's number of a rank.
TSL int tsl_nv_number(TslAddress context, int pe) {
  return (int)(((const TslTeam *)tsl_context((const void *)context)->team)->pes >> 8 * pe & 255) - 1;
}
TSL bool tsl_nv_can(TslAddress context, int pe) { return tsl_nv_ready(context) && tsl_nv_is_pe(context, pe); }

#define TSL_NV_MOVE(NAME, CALL)                                                                                        \
  TSL int tsl_x_nv_##NAME(TslAddress c, TslAddress dst, TslAddress src, uint64_t bytes, int pe) {                      \
    if (tsl_nv_can(c, pe)) CALL((void *)dst, (const void *)src, bytes, tsl_nv_number(c, pe));                          \
    return 0;                                                                                                          \
  }
TSL_NV_MOVE(putmem, nvshmem_putmem)
TSL_NV_MOVE(putmem_nbi, nvshmem_putmem_nbi)
TSL_NV_MOVE(getmem, nvshmem_getmem)
TSL_NV_MOVE(getmem_nbi, nvshmem_getmem_nbi)
#define TSL_NV_MOVES(SCOPE)                                                                                            \
  TSL_NV_MOVE(putmem_##SCOPE, nvshmemx_putmem_##SCOPE) TSL_NV_MOVE(putmem_nbi_##SCOPE, nvshmemx_putmem_nbi_##SCOPE)    \
  TSL_NV_MOVE(getmem_##SCOPE, nvshmemx_getmem_##SCOPE) TSL_NV_MOVE(getmem_nbi_##SCOPE, nvshmemx_getmem_nbi_##SCOPE)
TSL_NV_MOVES(warp)
TSL_NV_MOVES(block)

#define TSL_NV_PUT_SIGNAL(NAME, CALL)                                                                                  \
  TSL int tsl_x_nv_##NAME(TslAddress c, TslAddress dst, TslAddress src, uint64_t bytes, TslAddress flag, uint64_t value, int op, int pe) { \
    if (tsl_nv_can(c, pe)) CALL((void *)dst, (const void *)src, bytes, (uint64_t *)flag, value, op, tsl_nv_number(c, pe)); \
    return 0;                                                                                                          \
  }
TSL_NV_PUT_SIGNAL(putmem_signal, nvshmem_putmem_signal)
TSL_NV_PUT_SIGNAL(putmem_signal_nbi, nvshmem_putmem_signal_nbi)
TSL_NV_PUT_SIGNAL(putmem_signal_warp, nvshmemx_putmem_signal_warp)
TSL_NV_PUT_SIGNAL(putmem_signal_nbi_warp, nvshmemx_putmem_signal_nbi_warp)
TSL_NV_PUT_SIGNAL(putmem_signal_block, nvshmemx_putmem_signal_block)
TSL_NV_PUT_SIGNAL(putmem_signal_nbi_block, nvshmemx_putmem_signal_nbi_block)

TSL int tsl_x_nv_int_p(TslAddress c, TslAddress dst, int value, int pe) {
  if (tsl_nv_can(c, pe)) nvshmem_int_p((int *)dst, value, tsl_nv_number(c, pe));
  return 0;
}
TSL int tsl_x_nv_signal_op(TslAddress c, TslAddress flag, uint64_t value, int op, int pe) {
  if (tsl_nv_can(c, pe)) nvshmemx_signal_op((uint64_t *)flag, value, op, tsl_nv_number(c, pe));
  return 0;
}
TSL int tsl_x_nv_fence(TslAddress c) {
  if (tsl_nv_ready(c)) nvshmem_fence();
  return 0;
}
TSL int tsl_x_nv_quiet(TslAddress c) {
  if (tsl_nv_ready(c)) nvshmem_quiet();
  return 0;
}

// Each thread's own puts are complete before the ranks meet.
template <int SCOPE> TSL int tsl_nv_barrier(TslAddress c, uint32_t site) {
  if (!tsl_nv_ready(c)) return 0;
  nvshmem_quiet();
  return tsl_team_meet<SCOPE>(c, site);
}

// This rank's part of a collective for one PE: the payload, then the flag that says so.
template <int SCOPE> TSL void tsl_nv_send(TslAddress context, TslAddress dst, TslAddress src, uint64_t bytes, uint64_t turn, int pe) {
  const TslContext *c = tsl_context((const void *)context);
  uint64_t *flag = (uint64_t *)tsl_team_flag(c, (int)c->rank, (int)c->rank);   // NVSHMEM finds the other PE's
  const int number = tsl_nv_number(context, pe);
  if (pe == (int)c->rank && dst == src) return;
  if constexpr (SCOPE == TSL_THREAD)
    nvshmem_putmem_signal((void *)dst, (const void *)src, bytes, flag, turn, NVSHMEM_SIGNAL_SET, number);
  else if constexpr (SCOPE == TSL_WARP)
    nvshmemx_putmem_signal_warp((void *)dst, (const void *)src, bytes, flag, turn, NVSHMEM_SIGNAL_SET, number);
  else
    nvshmemx_putmem_signal_block((void *)dst, (const void *)src, bytes, flag, turn, NVSHMEM_SIGNAL_SET, number);
}
template <int SCOPE> TSL int tsl_nv_broadcast(TslAddress context, TslAddress dst, TslAddress src, uint64_t bytes, int root, uint32_t site) {
  if (!tsl_nv_can(context, root)) return 0;
  const TslContext *c = tsl_context((const void *)context);
  const uint64_t turn = tsl_team_turn(c);
  const int rank = (int)c->rank, size = (int)c->size;
  if (rank == root)
    for (int i = 1; i <= size; ++i) tsl_nv_send<SCOPE>(context, dst, src, bytes, turn, (rank + i) % size);
  return tsl_team_end<SCOPE>(context, turn, root, root + 1, site);
}
template <int SCOPE> TSL int tsl_nv_fcollect(TslAddress context, TslAddress dst, TslAddress src, uint64_t bytes, uint32_t site) {
  if (!tsl_nv_ready(context)) return 0;
  const TslContext *c = tsl_context((const void *)context);
  const uint64_t turn = tsl_team_turn(c);
  const int rank = (int)c->rank, size = (int)c->size;
  for (int i = 1; i <= size; ++i) tsl_nv_send<SCOPE>(context, dst + (uint64_t)rank * bytes, src, bytes, turn, (rank + i) % size);
  return tsl_team_end<SCOPE>(context, turn, 0, size, site);
}
#define TSL_NV_COLLECTIVES(SUFFIX, SCOPE)                                                                              \
  TSL int tsl_x_nv_barrier##SUFFIX(TslAddress c, uint32_t site) { return tsl_nv_barrier<SCOPE>(c, site); }             \
  TSL int tsl_x_nv_broadcast##SUFFIX(TslAddress c, TslAddress dst, TslAddress src, uint64_t bytes, int root, uint32_t site) { \
    return tsl_nv_broadcast<SCOPE>(c, dst, src, bytes, root, site);                                                    \
  }                                                                                                                    \
  TSL int tsl_x_nv_fcollect##SUFFIX(TslAddress c, TslAddress dst, TslAddress src, uint64_t bytes, uint32_t site) {     \
    return tsl_nv_fcollect<SCOPE>(c, dst, src, bytes, site);                                                           \
  }
TSL_NV_COLLECTIVES(, TSL_THREAD)
TSL_NV_COLLECTIVES(_warp, TSL_WARP)
TSL_NV_COLLECTIVES(_block, TSL_BLOCK)
