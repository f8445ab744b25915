/* Flags and control words in memory that several processes map. Loaded by ctypes, which releases the GIL during a call.
 *
 * A flag is one cache line: word 0 the epoch, word 1 the site, word 2 the payload. One rank writes it, one rank reads it.
 */
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

enum { ARRIVED = 0, TICK = 1, DOWNGRADED = 2, ABORTED = 3, MISMATCH = 4 };

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

int64_t tsc_load(const int64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

void tsc_store(int64_t *word, int64_t value) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

/* What tsc_enter takes: an epoch, and the words that hold the epoch entered last, the abort, and the first epoch of the original ops. */
struct entry {
  int64_t epoch, *entered;
  const int64_t *abort_word, *downgrade;
};

/* Say that this rank has entered the epoch; returns 1 if the group was aborted, or runs the original ops from that epoch on. */
int tsc_enter(const struct entry *e) {
  tsc_store(e->entered, e->epoch);
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  return __atomic_load_n(e->abort_word, __ATOMIC_ACQUIRE) != 0 || __atomic_load_n(e->downgrade, __ATOMIC_ACQUIRE) <= e->epoch;
}

/* The full fence orders non-temporal stores of memcpy and matmul kernels before the flag. */
void tsc_signal(int64_t *flag, int64_t epoch, int64_t site, int64_t payload) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  __atomic_store_n(flag + 1, site, __ATOMIC_RELAXED);
  __atomic_store_n(flag + 2, payload, __ATOMIC_RELAXED);
  __atomic_store_n(flag, epoch, __ATOMIC_RELEASE);
}

/* Wait until *flag >= epoch, until *downgrade <= epoch or *abort_word != 0, or for budget_ns. It spins for spin_ns, then gives up
 * its time slice, then sleeps, because there may be more ranks than cores. */
int tsc_wait(const int64_t *flag, const int64_t *downgrade, const int64_t *abort_word, int64_t epoch, int64_t site,
             int64_t payload, int64_t spin_ns, int64_t budget_ns) {
  int64_t start = 0, waited = 0;
  for (;;) {
    if (__atomic_load_n(flag, __ATOMIC_ACQUIRE) >= epoch)
      return __atomic_load_n(flag + 1, __ATOMIC_RELAXED) == site && __atomic_load_n(flag + 2, __ATOMIC_RELAXED) == payload
                 ? ARRIVED
                 : MISMATCH;
    if (__atomic_load_n(abort_word, __ATOMIC_ACQUIRE) != 0) return ABORTED;
    if (__atomic_load_n(downgrade, __ATOMIC_ACQUIRE) <= epoch) return DOWNGRADED;
    if (budget_ns <= 0) return TICK;
    if (!start) start = now_ns();
    waited = now_ns() - start;
    if (waited >= budget_ns) return TICK;
    if (waited < spin_ns) {
      for (int i = 0; i < 32; i++) relax();
    } else if (waited < spin_ns + 500000) {
      sched_yield();
    } else {
      struct timespec nap = {0, waited < 5000000 ? 20000 : 200000};
      nanosleep(&nap, 0);
    }
  }
}

/* *word = min(*word, value) */
void tsc_lower(int64_t *word, int64_t value) {
  int64_t seen = __atomic_load_n(word, __ATOMIC_ACQUIRE);
  while (seen > value)
    if (__atomic_compare_exchange_n(word, &seen, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE)) return;
}

/* Set *word from 0 to value; a word that is set already stays. */
void tsc_claim(int64_t *word, int64_t value) {
  int64_t expected = 0;
  __atomic_compare_exchange_n(word, &expected, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE);
}
