/* stream.c with a CUDA driver whose calls cost nothing: what is left is our own work. It notes every call, for tests. */
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

static void *stub_symbol(const char *name);
#define dlopen(name, flags) ((void *)1)
#define dlsym(driver, name) stub_symbol(name)
#include "stream.c"

enum { MAX_CALLS = 4096, SHOWN = 64 };
enum { CALL_COPY, CALL_COPY_ROWS, CALL_WRITE, CALL_RECORD, CALL_AWAIT, CALL_ENCODE, CALL_LAUNCH, CALL_FLAGS };

int stub_count, stub_calls[MAX_CALLS];
int stub_refused = -1;        /* a kind of call that fails */
int stub_shown;               /* parameters of a launch to keep: their first 8 bytes, of a map its address */
uint64_t stub_parameters[SHOWN];

static int note(int kind) {
    stub_calls[stub_count++ % MAX_CALLS] = kind;
    return kind == stub_refused ? 700 : 0;
}
static int stub_copy(uint64_t dst, uint64_t src, size_t bytes, void *stream) { return note(CALL_COPY); }
static int stub_copy2d(const void *what, void *stream) { return note(CALL_COPY_ROWS); }
static int stub_write(void *stream, uint64_t address, uint32_t value, unsigned flags) { return note(CALL_WRITE); }
uint64_t stub_flags[2 * SHOWN]; /* address and value of each flag of the last call that sets several */
static int stub_batch(void *stream, unsigned count, const void *array, unsigned flags) {
    const struct operation *operations = array;
    for (unsigned i = 0; i < count && i < SHOWN; ++i) {
        if (operations[i].kind != WRITE_VALUE_32 || operations[i].flags) return 1 /* CUDA_ERROR_INVALID_VALUE */;
        stub_flags[2 * i] = operations[i].address;
        stub_flags[2 * i + 1] = operations[i].value;
    }
    return count < 2 ? 1 : note(CALL_FLAGS);
}
static int stub_record(void *event, void *stream) { return note(CALL_RECORD); }
static int stub_await(void *stream, void *event, unsigned flags) { return note(CALL_AWAIT); }
static int stub_create(void **event, unsigned flags) {
    static uintptr_t events;
    *event = (void *)++events;
    return 0;
}
static int stub_query(void *event) { return 0; }
static int stub_write64(void *stream, uint64_t address, uint64_t value, unsigned flags) { return note(CALL_WRITE); }
int stub_state_bytes;         /* of NVSHMEM's device state in the modules that are loaded */
static int stub_global(uint64_t *address, size_t *bytes, void *module, const char *name) {
    *bytes = (size_t)stub_state_bytes;
    return stub_state_bytes ? 0 : 500 /* CUDA_ERROR_NOT_FOUND */;
}
static int stub_nothing(void) { return 0; }
static int stub_encode(void *map, int dtype, uint32_t rank, uint64_t address, const uint64_t *dims, const uint64_t *strides,
                       const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill) {
    memset(map, 0, MAP_BYTES);
    memcpy(map, &address, sizeof address);
    memcpy((char *)map + 8, dims, rank * sizeof *dims);
    return note(CALL_ENCODE);
}
static int stub_launch(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                       unsigned block_z, unsigned shared, void *stream, void **parameters, void **extra) {
    for (int i = 0; i < stub_shown; ++i) memcpy(stub_parameters + i, parameters[i], 8);
    return note(CALL_LAUNCH);
}

static void *stub_symbol(const char *name) {
    static const struct { const char *name; void *function; } known[] = {
        {"cuMemcpyDtoDAsync_v2", stub_copy}, {"cuMemcpy2DAsync_v2", stub_copy2d}, {"cuStreamWriteValue32_v2", stub_write},
        {"cuStreamWriteValue64_v2", stub_write64}, {"cuModuleGetGlobal_v2", stub_global},
        {"cuStreamBatchMemOp_v2", stub_batch},
        {"cuEventRecord", stub_record}, {"cuStreamWaitEvent", stub_await}, {"cuEventCreate", stub_create},
        {"cuEventQuery", stub_query}, {"cuTensorMapEncodeTiled", stub_encode}, {"cuLaunchKernel", stub_launch},
    };
    for (unsigned i = 0; i < sizeof known / sizeof *known; ++i)
        if (!strcmp(known[i].name, name)) return known[i].function;
    return stub_nothing;
}
