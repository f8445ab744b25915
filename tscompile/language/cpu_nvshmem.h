/* What cuda_team.h and cuda_nvshmem.h are for CUDA, for ranks that are processes of one host; a part of cpu.c. A thread, a warp and a block
 * are one here, and a transfer is over when its call returns, so that "nbi" changes nothing. */

static int refuse(TslAddress c, uint64_t why, uint64_t seen) { return give_up(c, (int)context(c)->rank, TSL_REFUSED, why, seen), 0; }

static TslTeam *team_of(const TslContext *c, int rank) { return (TslTeam *)(c->team - c->control[c->rank] + c->control[rank]); }

static int can(TslAddress address, int pe) {
  const TslContext *c = context(address);
  if (!c->team) return refuse(address, TSL_NO_TEAM, 0);
  if (!team_of(c, (int)c->rank)->pes) return refuse(address, TSL_NO_NVSHMEM, 0);
  if (pe < 0 || (uint64_t)pe >= c->size) return refuse(address, TSL_NO_PE, (uint64_t)pe);
  return 1;
}

/* Where a PE keeps what this rank keeps at `p`. */
static void *at(TslAddress address, TslAddress p, int pe) {
  const TslContext *c = context(address);
  return (void *)(p - c->control[c->rank] + c->control[pe]);
}

static void tell(uint64_t *flag, uint64_t value, int op) {
  if (op == 9) __atomic_store_n(flag, value, __ATOMIC_RELEASE);   /* NVSHMEM_SIGNAL_SET */
  else __atomic_fetch_add(flag, value, __ATOMIC_ACQ_REL);
}

/* ---- teams ---- */

static int team_end(TslAddress address, uint64_t turn, int first, int last, uint32_t site) {
  const TslContext *c = context(address);
  TslTeam *own = team_of(c, (int)c->rank);
  int ok = 1;
  for (int r = first; r < last; r++)
    if (r != (int)c->rank) ok = tsl_x_wait_u64(address, (TslAddress)&own->flags[r], TSL_EPOCH, turn, r, site) && ok;
  own->turn = turn;
  return ok;
}

static int team_meet(TslAddress address, uint32_t site) {
  const TslContext *c = context(address);
  if (!c->team) return refuse(address, TSL_NO_TEAM, 0);
  const uint64_t turn = team_of(c, (int)c->rank)->turn + 1;
  for (uint64_t r = 0; r < c->size; r++) __atomic_store_n(&team_of(c, (int)r)->flags[c->rank], turn, __ATOMIC_RELEASE);
  return team_end(address, turn, 0, (int)c->size, site);
}

/* ---- transfers and signals ---- */

static int put(TslAddress c, TslAddress dst, TslAddress src, uint64_t bytes, int pe) {
  return can(c, pe) ? memmove(at(c, dst, pe), (const void *)src, (size_t)bytes), 1 : 0;
}
static int get(TslAddress c, TslAddress dst, TslAddress src, uint64_t bytes, int pe) {
  return can(c, pe) ? memmove((void *)dst, at(c, src, pe), (size_t)bytes), 1 : 0;
}
static int put_signal(TslAddress c, TslAddress dst, TslAddress src, uint64_t bytes, TslAddress flag, uint64_t value, int op, int pe) {
  if (put(c, dst, src, bytes, pe)) tell((uint64_t *)at(c, flag, pe), value, op);
  return 0;
}
int tsl_x_nv_int_p(TslAddress c, TslAddress dst, int value, int pe) { return put(c, dst, (TslAddress)&value, sizeof value, pe), 0; }
int tsl_x_nv_signal_op(TslAddress c, TslAddress flag, uint64_t value, int op, int pe) {
  if (can(c, pe)) tell((uint64_t *)at(c, flag, pe), value, op);
  return 0;
}
int tsl_x_nv_fence(TslAddress c) { return can(c, 0) ? __atomic_thread_fence(__ATOMIC_SEQ_CST), 0 : 0; }
int tsl_x_nv_quiet(TslAddress c) { return tsl_x_nv_fence(c); }

/* ---- collectives ---- */

static int broadcast(TslAddress address, TslAddress dst, TslAddress src, uint64_t bytes, int root, uint32_t site) {
  const TslContext *c = context(address);
  if (!can(address, root)) return 0;
  const uint64_t turn = team_of(c, (int)c->rank)->turn + 1;
  for (uint64_t r = 0; c->rank == (uint64_t)root && r < c->size; r++)
    put_signal(address, dst, src, bytes, (TslAddress)&team_of(c, root)->flags[root], turn, 9, (int)r);
  return team_end(address, turn, root, root + 1, site);
}
static int fcollect(TslAddress address, TslAddress dst, TslAddress src, uint64_t bytes, uint32_t site) {
  const TslContext *c = context(address);
  if (!can(address, 0)) return 0;
  const uint64_t turn = team_of(c, (int)c->rank)->turn + 1;
  for (uint64_t r = 0; r < c->size; r++)
    put_signal(address, dst + c->rank * bytes, src, bytes, (TslAddress)&team_of(c, (int)c->rank)->flags[c->rank], turn, 9, (int)r);
  return team_end(address, turn, 0, (int)c->size, site);
}

#define FOR_SCOPES(SUFFIX)                                                                                           \
  int tsl_x_team_sync##SUFFIX(TslAddress c, uint32_t site) { return team_meet(c, site); }                            \
  int tsl_x_nv_barrier##SUFFIX(TslAddress c, uint32_t site) { return can(c, 0) && team_meet(c, site); }              \
  int tsl_x_nv_putmem##SUFFIX(TslAddress c, TslAddress d, TslAddress s, uint64_t n, int pe) { return put(c, d, s, n, pe), 0; } \
  int tsl_x_nv_putmem_nbi##SUFFIX(TslAddress c, TslAddress d, TslAddress s, uint64_t n, int pe) { return put(c, d, s, n, pe), 0; } \
  int tsl_x_nv_getmem##SUFFIX(TslAddress c, TslAddress d, TslAddress s, uint64_t n, int pe) { return get(c, d, s, n, pe), 0; } \
  int tsl_x_nv_getmem_nbi##SUFFIX(TslAddress c, TslAddress d, TslAddress s, uint64_t n, int pe) { return get(c, d, s, n, pe), 0; } \
  int tsl_x_nv_putmem_signal##SUFFIX(TslAddress c, TslAddress d, TslAddress s, uint64_t n, TslAddress f, uint64_t v, int op, int pe) { \
    return put_signal(c, d, s, n, f, v, op, pe);                                                                     \
  }                                                                                                                  \
  int tsl_x_nv_putmem_signal_nbi##SUFFIX(TslAddress c, TslAddress d, TslAddress s, uint64_t n, TslAddress f, uint64_t v, int op, int pe) { \
    return put_signal(c, d, s, n, f, v, op, pe);                                                                     \
  }                                                                                                                  \
  int tsl_x_nv_broadcast##SUFFIX(TslAddress c, TslAddress d, TslAddress s, uint64_t n, int root, uint32_t site) {    \
    return broadcast(c, d, s, n, root, site);                                                                        \
  }                                                                                                                  \
  int tsl_x_nv_fcollect##SUFFIX(TslAddress c, TslAddress d, TslAddress s, uint64_t n, uint32_t site) {               \
    return fcollect(c, d, s, n, site);                                                                               \
  }
FOR_SCOPES()
FOR_SCOPES(_warp)
FOR_SCOPES(_block)
