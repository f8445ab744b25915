// Exchanges of several ranks on the host, call after call; follows exchange.h and the kernel as TileLang writes it, in several versions.

struct Exchanges { int seed, version, ranks, calls, ctas, resident; };
// By a copy engine, with a flag behind it.
struct Copy { const char *from; char *to; int64_t bytes; uint32_t *flag; int64_t epoch; };
struct Call { const int64_t *parameters; const Copy *copies; int64_t count; };

static void copy_all(const Call &call) {
  for (int64_t i = 0; i < call.count; ++i) {
    const Copy &copy = call.copies[i];
    for (int64_t at = 0; at < copy.bytes; at += 16) {
      world->act();
      memcpy(copy.to + at, copy.from + at, 16);
    }
    tsl_st_relaxed_sys(copy.flag, (uint32_t)copy.epoch);
  }
}

// late: step at which a rank begins, negative if it stays away. calls: [ranks, calls].
extern "C" const char *run_exchanges(const Exchanges *e, const int64_t *late, const Call *calls) {
  return in_world(e->seed, e->ranks, [=](World &all, int rank) {
    all.queues[rank].late = late[rank];
    all.queues[rank].resident = e->resident;
    for (int i = 0; i < e->calls; ++i) {
      const Call *call = calls + rank * e->calls + i;
      all.launch(rank, e->ctas, threads_of({{0, 512}}), [=] { versions[e->version](call->parameters); });
      if (call->count) all.beside(rank, [=] { copy_all(*call); });
    }
  });
}
