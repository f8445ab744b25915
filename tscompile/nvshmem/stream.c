/* Sequences of work for CUDA streams, issued in one native call: copies, flags, events and kernels. From Python each step would cost
 * several microseconds.
 *
 * The CUDA driver is found at run time, so this builds without CUDA. stream.py mirrors the structs. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int (*copy_fn)(uint64_t dst, uint64_t src, size_t bytes, void *stream);
typedef int (*copy2d_fn)(const void *what, void *stream);
typedef int (*value_fn)(void *stream, uint64_t address, uint32_t value, unsigned flags);
typedef int (*value64_fn)(void *stream, uint64_t address, uint64_t value, unsigned flags);
typedef int (*batch_fn)(void *stream, unsigned count, const void *operations, unsigned flags);
typedef int (*record_fn)(void *event, void *stream);
typedef int (*wait_fn)(void *stream, void *event, unsigned flags);
typedef int (*create_fn)(void **event, unsigned flags);
typedef int (*query_fn)(void *event);
typedef int (*mode_fn)(int *mode);
typedef int (*module_fn)(void **module, const void *image);
typedef int (*global_fn)(uint64_t *address, size_t *bytes, void *module, const char *name);
typedef int (*function_fn)(void **function, void *module, const char *name);
typedef int (*attribute_fn)(void *function, int attribute, int value);
typedef int (*encode_fn)(void *map, int dtype, uint32_t rank, uint64_t address, const uint64_t *dims, const uint64_t *strides,
                         const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion, int fill);
typedef int (*launch_fn)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                         unsigned block_z, unsigned shared, void *stream, void **parameters, void **extra);

static copy_fn copy_async;
static copy2d_fn copy2d_async;
static value_fn write_value;
static value64_fn write_value64;
static batch_fn batch_operations;
static record_fn event_record;
static wait_fn stream_wait;
static create_fn event_create;
static query_fn event_query;
static mode_fn exchange_mode;
static module_fn module_load;
static global_fn module_global;
static function_fn module_function;
static attribute_fn function_attribute;
static encode_fn encode_map;
static launch_fn launch_kernel;

/* cuda.h's CUDA_MEMCPY2D */
struct copy2d {
    size_t src_x, src_y;
    int src_type;
    const void *src_host;
    uint64_t src_device;
    void *src_array;
    size_t src_pitch, dst_x, dst_y;
    int dst_type;
    void *dst_host;
    uint64_t dst_device;
    void *dst_array;
    size_t dst_pitch, width, height;
};
/* cuda.h's CUstreamBatchMemOpParams, of an operation that writes */
struct operation {
    int kind;
    uint64_t address, value;
    unsigned flags;
    uint64_t alias, unused;
};
enum { WRITE_VALUE_32 = 2, MAX_OPERATIONS = 64 };
enum { MEMORY_DEVICE = 2, DISABLE_TIMING = 2, MAX_DYNAMIC_SHARED = 8, CAPTURE_RELAXED = 2 };
enum { QUEUES = 3, MAX_RANK = 5, MAX_MAPS = 12, MAX_PARAMETERS = 64, MAP_BYTES = 128, BAD_STEP = -1, BAD_KERNEL = -2 };

/* Arguments of cuTensorMapEncodeTiled: `tensor` and `dims` are indices of values, innermost first; the stride of size d + 1 is the
 * product of the values at `strides[d]`, of which -1 ends the list, times the bytes of an item. */
struct map {
    int32_t dtype, rank, tensor, interleave, swizzle, promotion, fill;
    uint32_t item_bytes;
    int32_t dims[MAX_RANK];
    int32_t strides[MAX_RANK][MAX_RANK];
    uint32_t box[MAX_RANK];
};

/* A loaded kernel. A parameter is an index of a value, or -1 - i for map i. */
struct kernel {
    void *function;
    uint32_t grid, threads, shared;
    int32_t values, maps, parameters;
    int32_t parameter[MAX_PARAMETERS];
    struct map map[MAX_MAPS];
};

/* A map that a launch has made, and what it was made of. One for each map of the kernel stands behind its values, from the next multiple
 * of 64 bytes: weights and slots never move, and other operands often lie where they lay, so few maps are made anew. */
struct made {
    _Alignas(64) char map[MAP_BYTES];
    uint64_t address, dims[MAX_RANK], strides[MAX_RANK];
};

/* One step. `stream` and `event` index the tables passed along with the steps. `word` is the address of a word that is added to `src`
 * (of a copy) or counts instead of `value`, 0 if there is none: one store changes many steps. */
struct step {
    int32_t kind, stream;
    uint64_t dst, src, bytes, rows, dst_pitch, src_pitch;
    uint32_t value, event;
    uint64_t word;
};
enum { COPY, COPY_ROWS, WRITE, RECORD, AWAIT, LAUNCH, WRITE64 };

/* The streams and events that steps name by number. */
struct queues {
    void *streams[QUEUES], *events[QUEUES];
};

/* 0 if the driver is there and complete. */
int tsc_stream_load(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (!driver) return 1;
    copy_async = (copy_fn)dlsym(driver, "cuMemcpyDtoDAsync_v2");
    copy2d_async = (copy2d_fn)dlsym(driver, "cuMemcpy2DAsync_v2");
    write_value = (value_fn)dlsym(driver, "cuStreamWriteValue32_v2");
    write_value64 = (value64_fn)dlsym(driver, "cuStreamWriteValue64_v2");
    batch_operations = (batch_fn)dlsym(driver, "cuStreamBatchMemOp_v2");
    event_record = (record_fn)dlsym(driver, "cuEventRecord");
    stream_wait = (wait_fn)dlsym(driver, "cuStreamWaitEvent");
    event_create = (create_fn)dlsym(driver, "cuEventCreate");
    event_query = (query_fn)dlsym(driver, "cuEventQuery");
    exchange_mode = (mode_fn)dlsym(driver, "cuThreadExchangeStreamCaptureMode");
    module_load = (module_fn)dlsym(driver, "cuModuleLoadData");
    module_global = (global_fn)dlsym(driver, "cuModuleGetGlobal_v2");
    module_function = (function_fn)dlsym(driver, "cuModuleGetFunction");
    function_attribute = (attribute_fn)dlsym(driver, "cuFuncSetAttribute");
    encode_map = (encode_fn)dlsym(driver, "cuTensorMapEncodeTiled");
    launch_kernel = (launch_fn)dlsym(driver, "cuLaunchKernel");
    return !(copy_async && copy2d_async && write_value && write_value64 && batch_operations && event_record && stream_wait &&
             event_create && event_query && exchange_mode && module_load && module_global && module_function && function_attribute &&
             encode_map && launch_kernel);
}

/* For the test that stream.py mirrors the structs. */
void tsc_stream_sizes(uint64_t sizes[6]) {
    sizes[0] = sizeof(struct step);
    sizes[1] = sizeof(struct map);
    sizes[2] = sizeof(struct kernel);
    sizes[3] = sizeof(struct made);
    sizes[4] = sizeof(struct queues);
    sizes[5] = sizeof(struct operation);
}

/* A new event without timing, 0 if there is no context or no memory. */
void *tsc_event(void) {
    void *event = 0;
    return event_create(&event, DISABLE_TIMING) ? 0 : event;
}
/* 1 unless work that the event was recorded behind is still to run. */
int tsc_event_done(void *event) { return event_query(event) != 600 /* CUDA_ERROR_NOT_READY */; }

/* From now on calls of this thread leave alone what other threads capture. Without, a look at an event would end any capture that is
 * going on in the process: cudaStreamCaptureModeGlobal, the default, forbids it to all threads. */
int tsc_relax_captures(void) {
    int mode = CAPTURE_RELAXED;
    return exchange_mode(&mode);
}

/* Whether a module holds NVSHMEM's device state, which must be initialised before its kernels are launched. */
int tsc_has_nvshmem(void *module) {
    uint64_t address = 0;
    size_t bytes = 0;
    return !module_global(&address, &bytes, module, "nvshmemi_device_state_d") && bytes;
}

/* Load a cubin into the current context, for good, and find its kernel; returns 0 or the CUresult. */
int tsc_load_kernel(const void *cubin, const char *name, uint32_t shared, void **function, void **module) {
    int rc = module_load(module, cubin);
    if (!rc) rc = module_function(function, *module, name);
    if (!rc && shared) rc = function_attribute(*function, MAX_DYNAMIC_SHARED, (int)shared);
    return rc;
}

/* The map `m` of what `values` hold, in `made`; returns 0 or the CUresult. */
static int make_map(const struct map *m, const uint64_t *values, struct made *made) {
    static const uint32_t dense[MAX_RANK] = {1, 1, 1, 1, 1};
    uint64_t address = values[m->tensor], dims[MAX_RANK] = {0}, strides[MAX_RANK] = {0};
    for (int d = 0; d < m->rank; ++d) {
        dims[d] = values[m->dims[d]];
        strides[d] = m->item_bytes;
        for (int f = 0; f < MAX_RANK && m->strides[d][f] >= 0; ++f) strides[d] *= values[m->strides[d][f]];
    }
    if (made->address && made->address == address && !memcmp(made->dims, dims, sizeof dims) &&
        !memcmp(made->strides, strides, sizeof strides))
        return 0;
    made->address = 0;
    int rc = encode_map(made->map, m->dtype, (uint32_t)m->rank, address, dims, strides, m->box, dense, m->interleave, m->swizzle,
                        m->promotion, m->fill);
    if (rc) return rc;
    made->address = address;
    memcpy(made->dims, dims, sizeof dims);
    memcpy(made->strides, strides, sizeof strides);
    return 0;
}

static int launch(const struct kernel *k, uint64_t *values, void *stream) {
    const uintptr_t align = _Alignof(struct made);
    struct made *made = (struct made *)(((uintptr_t)(values + k->values) + align - 1) / align * align);
    void *parameters[MAX_PARAMETERS];
    if (k->maps > MAX_MAPS || k->parameters > MAX_PARAMETERS) return BAD_KERNEL;
    for (int i = 0; i < k->maps; ++i) {
        int rc = make_map(k->map + i, values, made + i);
        if (rc) return rc;
    }
    for (int i = 0; i < k->parameters; ++i)
        parameters[i] = k->parameter[i] < 0 ? (void *)made[-1 - k->parameter[i]].map : (void *)(values + k->parameter[i]);
    return launch_kernel(k->function, k->grid, 1, 1, k->threads, 1, 1, k->shared, stream, parameters, 0);
}

static uint32_t written(const struct step *s) { return s->word ? (uint32_t)*(const uint64_t *)s->word : s->value; }

/* Issue the flags at the head of n steps that are of one stream, in one call, and set `count` to how many; returns 0 or the CUresult.
 * Operations are enqueued in the order of the array, and each writes behind a fence for all work before it, as it would on its own. */
static int write_flags(const struct step *s, int n, void *stream, int *count) {
    struct operation operations[MAX_OPERATIONS];
    int i = 0;
    for (; i < n && i < MAX_OPERATIONS && s[i].kind == WRITE && s[i].stream == s->stream; ++i)
        operations[i] = (struct operation){.kind = WRITE_VALUE_32, .address = s[i].dst, .value = written(s + i)};
    *count = i;
    return i == 1 ? write_value(stream, s->dst, written(s), 0) : batch_operations(stream, (unsigned)i, operations, 0);
}

/* Issue n steps in order; returns 0, or the number of the step that failed, from 1, above the 32 bits of its CUresult. */
int64_t tsc_issue(const struct step *steps, int n, const struct queues *queues) {
    for (int i = 0, count = 1; i < n; i += count, count = 1) {
        const struct step *s = steps + i;
        void *stream = queues->streams[s->stream];
        const uint64_t *word = (const uint64_t *)s->word;
        int rc = 0;
        switch (s->kind) {
        case COPY:
            rc = copy_async(s->dst, word ? s->src + *word : s->src, s->bytes, stream);
            break;
        case COPY_ROWS: {
            struct copy2d c = {0};
            c.src_type = c.dst_type = MEMORY_DEVICE;
            c.src_device = word ? s->src + *word : s->src;
            c.dst_device = s->dst;
            c.src_pitch = s->src_pitch;
            c.dst_pitch = s->dst_pitch;
            c.width = s->bytes;
            c.height = s->rows;
            rc = copy2d_async(&c, stream);
            break;
        }
        case WRITE:
            rc = write_flags(s, n - i, stream, &count);
            break;
        case WRITE64:
            rc = write_value64(stream, s->dst, s->src, 0);
            break;
        case RECORD:
            rc = event_record(queues->events[s->event], stream);
            break;
        case AWAIT:
            rc = stream_wait(stream, queues->events[s->event], 0);
            break;
        case LAUNCH:
            rc = launch((const struct kernel *)s->src, (uint64_t *)s->dst, stream);
            break;
        default:
            rc = BAD_STEP;
        }
        if (rc) return (int64_t)(i + 1) << 32 | (uint32_t)rc;
    }
    return 0;
}
