/* What cuda.h is for CUDA, for TileLang's C target: the same struct, and the entry points tsl_x_* with the same names and types.
 * A "block" and a "warp" are one thread here, and memory scopes are all one.
 */
#pragma once
#include <stdint.h>

#define TSL_MAX_RANKS 8

typedef struct {
  uint64_t rank;
  uint64_t size;
  uint64_t timeout_ns;
  uint64_t epoch_cell;
  uint64_t abort_word;
  uint64_t abort_offset;
  uint64_t record;
  uint64_t team;
  uint64_t data[TSL_MAX_RANKS];
  uint64_t flags[TSL_MAX_RANKS];
  uint64_t control[TSL_MAX_RANKS];
} TslContext;

typedef struct {
  uint64_t turn;
  uint64_t pes;
  uint64_t flags[TSL_MAX_RANKS];
} TslTeam;

typedef uint64_t TslAddress;

enum { TSL_EQ = 0, TSL_NE = 1, TSL_GE = 2, TSL_GT = 3, TSL_LE = 4, TSL_LT = 5, TSL_EPOCH = 6 };
enum { TSL_REFUSED = 0xffffffff, TSL_NO_TEAM = 1, TSL_NO_NVSHMEM = 2, TSL_NO_STATE = 3, TSL_NO_PE = 4 };
