
// ---- teams: the ranks of a group meet, and count how often ------------------------------------------------------------------
// By one thread, warp or block of each rank, at a time. The turn is counted in the group's own memory, so that captured graphs can be
// replayed. Block scope uses __syncthreads: all threads of the block call. A flag holds the last turn that its writer was in.

enum TslScope { TSL_THREAD = 0, TSL_WARP = 1, TSL_BLOCK = 2 };

template <int SCOPE> TSL int tsl_scope_index() {
  if constexpr (SCOPE == TSL_THREAD) return 0;
  else if constexpr (SCOPE == TSL_WARP) return (int)tsl_lane();
  else return (int)(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}
template <int SCOPE> TSL int tsl_scope_size() {
  if constexpr (SCOPE == TSL_THREAD) return 1;
  else if constexpr (SCOPE == TSL_WARP) return 32;
  else return (int)(blockDim.x * blockDim.y * blockDim.z);
}
// Whether it holds for all threads of the scope; orders their memory accesses.
template <int SCOPE> TSL bool tsl_scope_all(bool ok) {
  if constexpr (SCOPE == TSL_WARP) {
    __syncwarp();
    ok = __all_sync(0xffffffffu, ok) != 0;
    __syncwarp();
  } else if constexpr (SCOPE == TSL_BLOCK) {
    ok = __syncthreads_and(ok) != 0;
  }
  return ok;
}

// A call that cannot be made ends the waits of all ranks, with a record that says why.
TSL int tsl_refuse(TslAddress context, uint64_t why, uint64_t seen) {
  const void *c = (const void *)context;
  tsl_give_up(c, (int)tsl_context(c)->rank, TSL_REFUSED, why, seen);
  return 0;
}

TSL uint64_t tsl_team_flag(const TslContext *c, int owner, int writer) {
  return c->team - c->control[c->rank] + c->control[owner] + offsetof(TslTeam, flags) + 8 * (uint64_t)writer;
}
TSL uint64_t tsl_team_turn(const TslContext *c) { return tsl_x_ld_relaxed_gpu_u64(c->team + offsetof(TslTeam, turn)) + 1; }

// Wait until `first` to `last` - 1 are in this turn, but for this rank itself; then the turn is over for this rank.
template <int SCOPE> TSL int tsl_team_end(TslAddress context, uint64_t turn, int first, int last, uint32_t site) {
  const TslContext *c = tsl_context((const void *)context);
  bool ok = true;
  #pragma unroll 1
  for (int r = first + tsl_scope_index<SCOPE>(); r < last; r += tsl_scope_size<SCOPE>())
    if (r != (int)c->rank)
      ok = tsl_wait_until<uint64_t>((const void *)context, (const void *)tsl_team_flag(c, (int)c->rank, r), TSL_EPOCH, turn, r, site) && ok;
  ok = tsl_scope_all<SCOPE>(ok);
  if (tsl_scope_index<SCOPE>() == 0) tsl_x_st_relaxed_gpu_u64(c->team + offsetof(TslTeam, turn), turn);
  tsl_scope_all<SCOPE>(true);
  return ok;
}

template <int SCOPE> TSL int tsl_team_meet(TslAddress context, uint32_t site) {
  const TslContext *c = tsl_context((const void *)context);
  if (c->team == 0) return tsl_refuse(context, TSL_NO_TEAM, 0);
  const uint64_t turn = tsl_team_turn(c);
  tsl_scope_all<SCOPE>(true);   // what the others of the scope wrote comes before the flags
  #pragma unroll 1
  for (int r = tsl_scope_index<SCOPE>(); r < (int)c->size; r += tsl_scope_size<SCOPE>())
    tsl_x_st_release_sys_u64(tsl_team_flag(c, r, (int)c->rank), turn);
  return tsl_team_end<SCOPE>(context, turn, 0, (int)c->size, site);
}

TSL int tsl_x_team_sync(TslAddress c, uint32_t site) { return tsl_team_meet<TSL_THREAD>(c, site); }
TSL int tsl_x_team_sync_warp(TslAddress c, uint32_t site) { return tsl_team_meet<TSL_WARP>(c, site); }
TSL int tsl_x_team_sync_block(TslAddress c, uint32_t site) { return tsl_team_meet<TSL_BLOCK>(c, site); }
