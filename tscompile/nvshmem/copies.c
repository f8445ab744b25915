/* Sequences of copy-engine work on CUDA streams, issued in one native call: from Python each step would cost several microseconds.
 *
 * The CUDA driver is found at run time, so this builds without CUDA. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>

typedef int (*copy_fn)(uint64_t dst, uint64_t src, size_t bytes, void *stream);
typedef int (*copy2d_fn)(const void *what, void *stream);
typedef int (*value_fn)(void *stream, uint64_t address, uint32_t value, unsigned flags);
typedef int (*record_fn)(void *event, void *stream);
typedef int (*wait_fn)(void *stream, void *event, unsigned flags);
typedef int (*create_fn)(void **event, unsigned flags);
typedef int (*query_fn)(void *event);

static copy_fn copy_async;
static copy2d_fn copy2d_async;
static value_fn write_value;
static record_fn event_record;
static wait_fn stream_wait;
static create_fn event_create;
static query_fn event_query;

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
enum { MEMORY_DEVICE = 2, DISABLE_TIMING = 2 };

/* One step; copies.py mirrors it. `stream` and `event` index the tables passed along with the steps. */
struct step {
    int32_t kind, stream;
    uint64_t dst, src, bytes, rows, dst_pitch, src_pitch;
    uint32_t value, event;
};
enum { COPY, COPY_ROWS, WRITE, RECORD, AWAIT };

/* 0 if the driver is there and complete. */
int tsc_copies_load(void) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (!driver) return 1;
    copy_async = (copy_fn)dlsym(driver, "cuMemcpyDtoDAsync_v2");
    copy2d_async = (copy2d_fn)dlsym(driver, "cuMemcpy2DAsync_v2");
    write_value = (value_fn)dlsym(driver, "cuStreamWriteValue32_v2");
    event_record = (record_fn)dlsym(driver, "cuEventRecord");
    stream_wait = (wait_fn)dlsym(driver, "cuStreamWaitEvent");
    event_create = (create_fn)dlsym(driver, "cuEventCreate");
    event_query = (query_fn)dlsym(driver, "cuEventQuery");
    return !(event_query && copy_async && copy2d_async && write_value && event_record && stream_wait && event_create);
}

/* A new event without timing, 0 if there is no context or no memory. */
void *tsc_event(void) {
    void *event = 0;
    return event_create(&event, DISABLE_TIMING) ? 0 : event;
}
/* 1 unless work that the event was recorded behind is still to run. */
int tsc_event_done(void *event) { return event_query(event) != 600 /* CUDA_ERROR_NOT_READY */; }

/* Issue n steps in order; returns 0, or the CUresult of the step whose index is left in *failed. */
int tsc_issue(const struct step *steps, int n, void *const *streams, void *const *events, int *failed) {
    for (int i = 0; i < n; ++i) {
        const struct step *s = steps + i;
        void *stream = streams[s->stream];
        int rc = 0;
        switch (s->kind) {
        case COPY:
            rc = copy_async(s->dst, s->src, s->bytes, stream);
            break;
        case COPY_ROWS: {
            struct copy2d c = {0};
            c.src_type = c.dst_type = MEMORY_DEVICE;
            c.src_device = s->src;
            c.dst_device = s->dst;
            c.src_pitch = s->src_pitch;
            c.dst_pitch = s->dst_pitch;
            c.width = s->bytes;
            c.height = s->rows;
            rc = copy2d_async(&c, stream);
            break;
        }
        case WRITE:
            rc = write_value(stream, s->dst, s->value, 0);
            break;
        case RECORD:
            rc = event_record(events[s->event], stream);
            break;
        case AWAIT:
            rc = stream_wait(stream, events[s->event], 0);
            break;
        default:
            rc = -1;
        }
        if (rc) {
            *failed = i;
            return rc;
        }
    }
    return 0;
}
