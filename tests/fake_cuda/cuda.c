/* CUDA without a GPU: what torch's CUDA wheel calls of NVIDIA's libraries, on this machine's memory.

Host code is real, and a kernel's launch is checked and recorded, but nothing computes: what a
kernel would have written reads as zeros. Device memory is address space, of which only what is
copied takes pages, so that a GPU of any size fits; copies between host and device are real.
Everything is done when its call returns. What is called and not here ends the process, with its
name (see runtime.py, which makes those functions).

    FAKE_CUDA_GPUS        how many there are (1)
    FAKE_CUDA_MEMORY      bytes of each (an A100's with 80 GB)
    FAKE_CUDA_OUTSIDE     of these, what the context has taken (600 MB)
    FAKE_CUDA_CAPABILITY  70, 75, 80, 89 or 90 (80)

Recorded is a line an event, with tabs between: kind, name, bytes or blocks, stream. Kinds are K a
kernel, N a collective, C a copy, Z a memset, M and F device memory taken and given back, P pinned
memory taken, S the host waits for the device, E an allocation that failed, and # a note. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef unsigned long long u64;
typedef struct { unsigned x, y, z; } Dim;
enum { OK, INVALID_VALUE, OUT_OF_MEMORY, INVALID_CONFIGURATION = 9, INVALID_DEVICE = 101 };
enum { HOST = 1, DEVICE = 2, DEVICES = 16, MEGABYTE = 1 << 20, PAGE = 4096 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int gpus = 1, capability = 80;
static size_t memory = 85028700160, outside = 600000000;
static size_t used[DEVICES];
static __thread int device;
static __thread int last_error;

static size_t number(const char *name, size_t otherwise) {
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 10) : otherwise;
}

__attribute__((constructor)) static void read_environment(void) {
    gpus = number("FAKE_CUDA_GPUS", gpus);
    memory = number("FAKE_CUDA_MEMORY", memory);
    outside = number("FAKE_CUDA_OUTSIDE", outside);
    capability = number("FAKE_CUDA_CAPABILITY", capability);
}

/* What differs between generations, from the CUDA programming guide's table of capabilities. */
typedef struct { const char *name; int multiprocessors, threads; size_t shared, shared_block, l2; } Model;

static Model model(void) {
    if (capability >= 90) return (Model){"Fake H100", 132, 2048, 228 << 10, 227 << 10, 50 << 20};
    if (capability >= 89) return (Model){"Fake L40", 142, 1536, 100 << 10, 99 << 10, 96 << 20};
    if (capability >= 80) return (Model){"Fake A100", 108, 2048, 164 << 10, 163 << 10, 40 << 20};
    if (capability >= 75) return (Model){"Fake T4", 40, 1024, 64 << 10, 64 << 10, 4 << 20};
    return (Model){"Fake V100", 80, 2048, 96 << 10, 96 << 10, 6 << 20};
}

static int fails(int error) {
    last_error = error;
    return error;
}

/* Recording */

typedef struct { char kind; char *name; size_t size; void *stream; } Event;
static Event *events;
static size_t event_count, event_room;
static int recording;
static void (*on_wait)(const char *);

static void record(char kind, const char *name, size_t size, void *stream) {
    pthread_mutex_lock(&lock);
    if (recording) {
        if (event_count == event_room) {
            event_room = event_room ? 2 * event_room : 1 << 14;
            events = realloc(events, event_room * sizeof *events);
        }
        events[event_count++] = (Event){kind, strdup(name), size, stream};
    }
    pthread_mutex_unlock(&lock);
}

static int waits(const char *name, void *stream) {
    record('S', name, 0, stream);
    if (recording && on_wait) on_wait(name);
    return OK;
}

void fake_cuda_record(int on) {
    pthread_mutex_lock(&lock);
    for (size_t i = 0; on && i < event_count; i++) free(events[i].name);
    if (on) event_count = 0;
    recording = on;
    pthread_mutex_unlock(&lock);
}

void fake_cuda_note(const char *text) { record('#', text, 0, NULL); }
void fake_cuda_on_wait(void (*call)(const char *)) { on_wait = call; }

int fake_cuda_write(const char *path) {
    FILE *file = fopen(path, "w");
    if (!file) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < event_count; i++) {
        Event *e = &events[i];
        fprintf(file, "%c\t%s\t%zu\t%zx\n", e->kind, e->name, e->size, (size_t)e->stream);
    }
    pthread_mutex_unlock(&lock);
    return fclose(file);
}

/* Memory: blocks of address space, by their beginnings */

typedef struct { char *start; size_t size; int kind, device; } Block;
static Block *blocks;
static size_t block_count, block_room;

static size_t whole(size_t size) { return (size + 2 * MEGABYTE - 1) / (2 * MEGABYTE) * (2 * MEGABYTE); }

static void *address_space(size_t size) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *start = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
    return start == MAP_FAILED ? NULL : start;
}

static void know(void *start, size_t size, int kind) {
    pthread_mutex_lock(&lock);
    if (block_count == block_room) {
        block_room = block_room ? 2 * block_room : 1024;
        blocks = realloc(blocks, block_room * sizeof *blocks);
    }
    blocks[block_count++] = (Block){start, size, kind, device};
    pthread_mutex_unlock(&lock);
}

/* The block that holds an address; kind 0 where there is none. */
static Block find(const void *address, int forget) {
    Block found = {0};
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < block_count && !found.kind; i++) {
        size_t offset = (const char *)address - blocks[i].start;
        if ((const char *)address < blocks[i].start || offset >= blocks[i].size) continue;
        found = blocks[i];
        if (forget) blocks[i] = blocks[--block_count];
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static int take(size_t size, const char *name) {
    if (outside + used[device] + whole(size) > memory) {
        record('E', name, size, NULL);
        return OUT_OF_MEMORY;
    }
    used[device] += whole(size);
    record('M', name, size, NULL);
    return OK;
}

static void give_back(Block block, const char *name) {
    used[block.device] -= whole(block.size);
    record('F', name, block.size, NULL);
}

static void forget_written(const char *start, size_t size);

int cudaMalloc(void **start, size_t size) {
    *start = NULL;
    if (take(size, "cudaMalloc")) return fails(OUT_OF_MEMORY);
    *start = address_space(size);
    know(*start, size ? size : 1, DEVICE);
    return OK;
}

int cudaFree(void *start) {
    Block block = find(start, 1);
    if (!block.kind) return OK;
    give_back(block, "cudaFree");
    pthread_mutex_lock(&lock);
    forget_written(block.start, block.size);
    pthread_mutex_unlock(&lock);
    munmap(block.start, block.size);
    return OK;
}

int cudaHostAlloc(void **start, size_t size, unsigned flags) {
    (void)flags;
    *start = address_space(size);
    know(*start, size ? size : 1, HOST);
    record('P', "cudaHostAlloc", size, NULL);
    return OK;
}

int cudaFreeHost(void *start) {
    Block block = find(start, 1);
    if (block.kind) munmap(block.start, block.size);
    return OK;
}

int cudaHostRegister(void *start, size_t size, unsigned flags) {
    (void)flags;
    know(start, size, HOST);
    record('P', "cudaHostRegister", size, NULL);
    return OK;
}

int cudaHostUnregister(void *start) {
    find(start, 1);
    return OK;
}

int cudaMemGetInfo(size_t *left, size_t *all) {
    *all = memory;
    *left = memory - outside - used[device];
    return OK;
}

typedef struct { int type, device; void *on_device, *on_host; long reserved[8]; } Attributes;

int cudaPointerGetAttributes(Attributes *attributes, const void *address) {
    Block block = find(address, 0);
    *attributes = (Attributes){.type = block.kind, .device = block.kind ? block.device : -1};
    if (block.kind) attributes->on_device = (void *)address;
    if (block.kind == HOST) attributes->on_host = (void *)address;
    return OK;
}

/* Virtual memory, of which the allocator makes segments that grow */

typedef struct { size_t size; } Chunk;

int cuMemAddressReserve(char **start, size_t size, size_t alignment, void *near, u64 flags) {
    (void)alignment, (void)near, (void)flags;
    char *space = address_space(size + 2 * MEGABYTE);
    if (!space) return OUT_OF_MEMORY;
    *start = (char *)whole((size_t)space);
    return OK;
}

int cuMemCreate(u64 *handle, size_t size, void *properties, u64 flags) {
    (void)properties, (void)flags;
    if (take(size, "cuMemCreate")) return OUT_OF_MEMORY;
    Chunk *chunk = malloc(sizeof *chunk);
    chunk->size = size;
    *handle = (u64)chunk;
    return OK;
}

int cuMemMap(void *start, size_t size, size_t offset, u64 handle, u64 flags) {
    (void)offset, (void)handle, (void)flags;
    know(start, size, DEVICE);
    return OK;
}

int cuMemUnmap(char *start, size_t size) {
    for (char *at = start; at < start + size;) {
        Block block = find(at, 1);
        if (!block.kind) break;
        give_back(block, "cuMemUnmap");
        at = block.start + block.size;
    }
    madvise(start, size, MADV_DONTNEED);
    return OK;
}

int cuMemAddressFree(void *start, size_t size) {
    munmap(start, size);
    return OK;
}

int cuMemRelease(u64 handle) {
    free((void *)handle); /* its bytes are given back with the mapping */
    return OK;
}

int cuMemGetAllocationGranularity(size_t *size, void *properties, int option) {
    (void)properties, (void)option;
    *size = 2 * MEGABYTE;
    return OK;
}

int cuPointerGetAttribute(void **value, int attribute, void *address) {
    (void)attribute;
    *value = address;
    return OK;
}

/* Copies */

enum { TO_DEVICE = 1, FROM_DEVICE, WITHIN_DEVICE };

static const char *copy_name(const void *to, const void *from, int kind) {
    if (kind == TO_DEVICE) return find(from, 0).kind ? "to device, pinned" : "to device";
    if (kind == FROM_DEVICE) return find(to, 0).kind ? "from device, pinned" : "from device";
    return kind == WITHIN_DEVICE ? "within device" : "other";
}

/* What was copied to the device can be read back; what kernels would have written is zeros. As device
   memory is used again and again, a read gets what was copied there only if it takes it whole. */

typedef struct { const char *start; size_t size; } Range;
static Range *written;
static size_t written_count, written_room;

static void forget_written(const char *start, size_t size) {
    for (size_t i = 0; i < written_count;) {
        Range *r = &written[i];
        if (r->start < start + size && start < r->start + r->size) *r = written[--written_count];
        else i++;
    }
}

static void note_written(const char *start, size_t size) {
    pthread_mutex_lock(&lock);
    forget_written(start, size);
    if (written_count == written_room) {
        written_room = written_room ? 2 * written_room : 1024;
        written = realloc(written, written_room * sizeof *written);
    }
    if (size) written[written_count++] = (Range){start, size};
    pthread_mutex_unlock(&lock);
}

static int is_written(const char *start, size_t size) {
    size_t found = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < written_count; i++)
        if (written[i].start >= start && written[i].start + written[i].size <= start + size)
            found += written[i].size;
    pthread_mutex_unlock(&lock);
    return found == size;
}

static void copy(char *to, const char *from, size_t size, int kind) {
    int known = kind == TO_DEVICE || is_written(from, size);
    if (known) memmove(to, from, size);
    else if (kind == FROM_DEVICE) memset(to, 0, size);
    if (kind == FROM_DEVICE) return;
    if (known) return note_written(to, size);
    pthread_mutex_lock(&lock);
    forget_written(to, size);
    pthread_mutex_unlock(&lock);
}

int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    record('C', copy_name(to, from, kind), size, stream);
    copy(to, from, size, kind);
    return OK;
}

int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
    cudaMemcpyAsync(to, from, size, kind, NULL);
    return waits("cudaMemcpy", NULL);
}

int cudaMemcpy2DAsync(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width,
                      size_t height, int kind, void *stream) {
    record('C', copy_name(to, from, kind), width * height, stream);
    for (size_t row = 0; row < height; row++)
        copy(to + row * to_pitch, from + row * from_pitch, width, kind);
    return OK;
}

int cudaMemsetAsync(char *start, int value, size_t size, void *stream) {
    record('Z', "memset", size, stream);
    note_written(start, size);
    size_t first = (PAGE - (size_t)start % PAGE) % PAGE; /* bytes before the first whole page */
    size_t pages = size > first ? (size - first) / PAGE * PAGE : 0;
    if (value || !pages) {
        memset(start, value, size);
        return OK;
    }
    memset(start, 0, first);
    madvise(start + first, pages, MADV_DONTNEED); /* zeros, without taking the pages */
    memset(start + first + pages, 0, size - first - pages);
    return OK;
}

int cudaMemset(void *start, int value, size_t size) { return cudaMemsetAsync(start, value, size, NULL); }

int cudaGetSymbolAddress(void **address, const void *symbol) {
    static char anything[1 << 16];
    (void)symbol;
    *address = anything;
    return OK;
}

/* Kernels, by the address of their host function */

typedef struct { const void *host; const char *name; } Kernel;
static Kernel *kernels;
static size_t kernel_count, kernel_room;

static Kernel *slot(Kernel *table, size_t room, const void *host) {
    size_t i = ((size_t)host * 0x9E3779B97F4A7C15u >> 20) % room;
    while (table[i].host && table[i].host != host) i = (i + 1) % room;
    return &table[i];
}

static void grow(void) {
    size_t room = kernel_room ? 2 * kernel_room : 1 << 17;
    Kernel *larger = calloc(room, sizeof *larger);
    for (size_t i = 0; i < kernel_room; i++)
        if (kernels[i].host) *slot(larger, room, kernels[i].host) = kernels[i];
    free(kernels);
    kernels = larger;
    kernel_room = room;
}

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[4];
    (void)binary;
    return handle;
}

void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) { (void)handle; }
void __cudaRegisterVar(void) {}
char __cudaInitModule(void **handle) { return handle != NULL; }

void __cudaRegisterFunction(void **handle, const char *host, char *stub, const char *name) {
    (void)handle, (void)stub;
    pthread_mutex_lock(&lock);
    if (2 * kernel_count >= kernel_room) grow();
    *slot(kernels, kernel_room, host) = (Kernel){host, name};
    kernel_count++;
    pthread_mutex_unlock(&lock);
}

int __cudaGetKernel(const void **kernel, const void *host) {
    *kernel = host;
    return OK;
}

typedef struct { Dim grid, block; size_t shared; void *stream; } Configuration;
static __thread Configuration pushed[16];
static __thread unsigned depth;

int __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void *stream) {
    pushed[depth++ % 16] = (Configuration){grid, block, shared, stream};
    return OK;
}

int __cudaPopCallConfiguration(Dim *grid, Dim *block, size_t *shared, void **stream) {
    Configuration c = pushed[--depth % 16];
    *grid = c.grid, *block = c.block, *shared = c.shared, *stream = c.stream;
    return OK;
}

static int possible(Dim grid, Dim block, size_t shared) {
    size_t threads = (size_t)block.x * block.y * block.z, top = 65535;
    return grid.x && grid.y && grid.z && grid.x <= 0x7fffffff && grid.y <= top && grid.z <= top &&
           threads && threads <= 1024 && block.z <= 64 && shared <= model().shared_block;
}

static int launch(const char *name, Dim grid, Dim block, size_t shared, void *stream) {
    if (!possible(grid, block, shared)) {
        fprintf(stderr, "fake CUDA: no GPU could launch %s: grid %u %u %u, block %u %u %u, shared %zu\n",
                name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
        return fails(INVALID_CONFIGURATION);
    }
    record('K', name, (size_t)grid.x * grid.y * grid.z, stream);
    return OK;
}

static const char *kernel_name(const void *host) {
    const char *name = kernel_room ? slot(kernels, kernel_room, host)->name : NULL;
    return name ? name : "unknown";
}

int cudaLaunchKernel(const void *host, Dim grid, Dim block, void **given, size_t shared, void *stream) {
    (void)given;
    return launch(kernel_name(host), grid, block, shared, stream);
}

int __cudaLaunchKernel(const void *host, Dim grid, Dim block, void **given, size_t shared, void *stream) {
    return cudaLaunchKernel(host, grid, block, given, shared, stream);
}

int cudaLaunchCooperativeKernel(const void *host, Dim grid, Dim block, void **given, size_t shared,
                                void *stream) {
    return cudaLaunchKernel(host, grid, block, given, shared, stream);
}

int cudaLaunchKernelExC(const Configuration *c, const void *host, void **given) {
    return cudaLaunchKernel(host, c->grid, c->block, given, c->shared, c->stream);
}

int cudaLaunchHostFunc(void *stream, void (*call)(void *), void *given) {
    (void)stream;
    call(given);
    return OK;
}

/* Kernels that were compiled at run time; a function is its own name */

int cuModuleLoad(const void **module, const char *path) {
    *module = path;
    return OK;
}

int cuModuleLoadData(const void **module, const void *image) {
    *module = image;
    return OK;
}

int cuModuleGetFunction(char **function, void *module, const char *name) {
    (void)module;
    *function = strdup(name);
    return OK;
}

int cuLaunchKernel(const char *name, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream) {
    return launch(name, (Dim){gx, gy, gz}, (Dim){bx, by, bz}, shared, stream);
}

typedef struct { Dim grid, block; unsigned shared; void *stream; } DriverConfiguration;

int cuLaunchKernelEx(const DriverConfiguration *c, const char *name) {
    return launch(name, c->grid, c->block, c->shared, c->stream);
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
    enum { MOST_THREADS = 0, REGISTERS = 4 };
    (void)function;
    *value = attribute == MOST_THREADS ? 1024 : attribute == REGISTERS ? 64 : 0;
    return OK;
}

int cuOccupancyMaxActiveClusters(int *count, void *function, void *configuration) {
    (void)function, (void)configuration;
    *count = 1;
    return OK;
}

/* Devices */

int cudaGetDeviceCount(int *count) {
    *count = gpus;
    return OK;
}

int cudaGetDevice(int *current) {
    *current = device;
    return OK;
}

int cudaSetDevice(int wanted) {
    if (wanted < 0 || wanted >= gpus) return fails(INVALID_DEVICE);
    device = wanted;
    return OK;
}

int cudaDriverGetVersion(int *version) {
    *version = 13000;
    return OK;
}

int cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
int cuDriverGetVersion(int *version) { return cudaDriverGetVersion(version); }

int cudaDeviceGetPCIBusId(char *text, int room, int of) {
    snprintf(text, room, "0000:%02x:00.0", of + 1);
    return OK;
}

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0, *greatest = -5;
    return OK;
}

int cudaDeviceCanAccessPeer(int *can, int from, int to) {
    *can = from != to;
    return OK;
}

/* Offsets in CUDA 13's cudaDeviceProp, which has 1,008 bytes. */
int cudaGetDeviceProperties(char *properties, int of) {
    Model m = model();
    struct { int offset, value; } ints[] = {
        {304, 65536}, {308, 32}, {320, 1024}, {324, 1024}, {328, 1024}, {332, 64},
        {336, 0x7fffffff}, {340, 65535}, {344, 65535}, /* registers, warp, block, grid */
        {360, capability / 10}, {364, capability % 10}, {384, m.multiprocessors}, {392, 1},
        {560, 1}, {568, of + 1}, {588, 1}, {596, m.l2}, {604, m.threads}, {608, 1},
        {632, 65536}, {668, 1}, {688, 32},
    };
    struct { int offset; size_t value; } sizes[] = {
        {288, memory}, {296, 48 << 10}, {352, 65536}, {624, m.shared}, {672, m.shared_block},
    };
    memset(properties, 0, 1008);
    strcpy(properties, m.name);
    memset(properties + 256, of + 1, 16); /* the UUID */
    for (size_t i = 0; i < sizeof ints / sizeof *ints; i++)
        memcpy(properties + ints[i].offset, &ints[i].value, sizeof(int));
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        memcpy(properties + sizes[i].offset, &sizes[i].value, sizeof(size_t));
    return OK;
}

int cudaDeviceGetAttribute(int *value, int attribute, int of) {
    Model m = model();
    (void)of;
    switch (attribute) {
    case 1: case 2: case 3: *value = 1024; break; /* threads of a block, along x, along y */
    case 4: *value = 64; break;
    case 5: *value = 0x7fffffff; break;
    case 6: case 7: *value = 65535; break;
    case 8: *value = 48 << 10; break; /* shared memory of a block, unless asked for */
    case 10: *value = 32; break;
    case 12: case 82: *value = 65536; break; /* registers */
    case 16: *value = m.multiprocessors; break;
    case 38: *value = m.l2; break;
    case 39: *value = m.threads; break;
    case 75: *value = capability / 10; break;
    case 76: *value = capability % 10; break;
    case 81: *value = m.shared; break;
    case 97: *value = m.shared_block; break;
    case 106: *value = 32; break; /* blocks of a multiprocessor */
    default: *value = 1; /* whether it can do something */
    }
    return OK;
}

typedef struct { size_t shared, constant, local; int most_threads, registers, ptx, binary, cache; int most_shared; } Function;

int cudaFuncGetAttributes(Function *f, const void *kernel) {
    (void)kernel;
    *f = (Function){.most_threads = 1024, .registers = 64, .ptx = capability, .binary = capability};
    f->most_shared = model().shared_block;
    return OK;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *kernel, int threads, size_t shared) {
    (void)kernel, (void)shared;
    *count = threads > 0 && threads < model().threads ? model().threads / threads : 1;
    return OK;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *kernel, int threads,
                                                           size_t shared, unsigned flags) {
    (void)flags;
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(count, kernel, threads, shared);
}

int cuInit(unsigned flags) { return (int)flags; }

int cuDeviceGetCount(int *count) { return cudaGetDeviceCount(count); }
int cuDeviceGetAttribute(int *value, int attribute, int of) { return cudaDeviceGetAttribute(value, attribute, of); }

int cuDeviceGet(int *handle, int number_of) {
    *handle = number_of;
    return OK;
}

int cuDevicePrimaryCtxGetState(int of, unsigned *flags, int *active) {
    (void)of;
    *flags = 0, *active = 1;
    return OK;
}

static int context;

int cuCtxGetCurrent(int **current) {
    *current = &context;
    return OK;
}

int cuDevicePrimaryCtxRetain(int **retained, int of) {
    (void)of;
    return cuCtxGetCurrent(retained);
}

int cuCtxGetLimit(size_t *value, int limit) {
    (void)limit;
    *value = 0;
    return OK;
}

int cuCtxGetDevice(int *current) { return cudaGetDevice(current); }

/* Errors */

const char *cudaGetErrorName(int error) {
    return error == OUT_OF_MEMORY ? "cudaErrorMemoryAllocation" : "cudaErrorOfFakeCuda";
}

const char *cudaGetErrorString(int error) {
    if (error == OK) return "no error";
    if (error == OUT_OF_MEMORY) return "out of memory";
    return error == INVALID_CONFIGURATION ? "invalid configuration argument" : "error of fake CUDA";
}

int cuGetErrorString(int error, const char **text) {
    *text = cudaGetErrorString(error);
    return OK;
}

int cudaPeekAtLastError(void) { return last_error; }

int cudaGetLastError(void) {
    int error = last_error;
    last_error = OK;
    return error;
}

/* Streams and events: all is done at once */

static int new_handle(void **handle) {
    static size_t next = 0x1000;
    *handle = (void *)__sync_add_and_fetch(&next, 16);
    return OK;
}

int cudaStreamCreate(void **stream) { return new_handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return (void)flags, new_handle(stream); }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    (void)flags, (void)priority;
    return new_handle(stream);
}

int cudaStreamGetPriority(void *stream, int *priority) {
    (void)stream;
    *priority = 0;
    return OK;
}

int cudaStreamSynchronize(void *stream) { return waits("cudaStreamSynchronize", stream); }
int cudaDeviceSynchronize(void) { return waits("cudaDeviceSynchronize", NULL); }

int cudaStreamIsCapturing(void *stream, int *status) {
    (void)stream;
    *status = 0;
    return OK;
}

int cudaStreamGetCaptureInfo(void *stream, int *status, u64 *id, void **graph, void **dependencies,
                             void **edges, size_t *count) {
    (void)stream, (void)dependencies, (void)edges;
    *status = 0;
    if (id) *id = 0;
    if (graph) *graph = NULL;
    if (count) *count = 0;
    return OK;
}

typedef struct { double seconds; } Moment;

int cudaEventCreate(Moment **event) {
    *event = calloc(1, sizeof **event);
    return OK;
}

int cudaEventCreateWithFlags(Moment **event, unsigned flags) { return (void)flags, cudaEventCreate(event); }

int cudaEventDestroy(Moment *event) {
    free(event);
    return OK;
}

int cudaEventRecord(Moment *event, void *stream) {
    struct timespec now;
    (void)stream;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->seconds = now.tv_sec + 1e-9 * now.tv_nsec;
    return OK;
}

int cudaEventRecordWithFlags(Moment *event, void *stream, unsigned flags) {
    return (void)flags, cudaEventRecord(event, stream);
}

int cudaEventElapsedTime(float *milliseconds, const Moment *began, const Moment *ended) {
    *milliseconds = 1e3 * (ended->seconds - began->seconds);
    return OK;
}

int cudaEventSynchronize(Moment *event) { return (void)event, waits("cudaEventSynchronize", NULL); }

/* cuBLAS and cuBLASLt: handles that say nothing, products that are recorded */

static int handle;

#define GIVES_A_HANDLE(name)                                                                           \
    int name(int **given) {                                                                            \
        *given = &handle;                                                                              \
        return OK;                                                                                     \
    }
#define IS_A_PRODUCT(name)                                                                             \
    int name(void) {                                                                                   \
        record('K', #name, 0, NULL);                                                                   \
        return OK;                                                                                     \
    }

GIVES_A_HANDLE(cublasCreate_v2)
GIVES_A_HANDLE(cublasLtMatmulDescCreate)
GIVES_A_HANDLE(cublasLtMatrixLayoutCreate)
GIVES_A_HANDLE(cublasLtMatmulPreferenceCreate)
IS_A_PRODUCT(cublasGemmEx)
IS_A_PRODUCT(cublasSgemm_v2)
IS_A_PRODUCT(cublasDgemm_v2)
IS_A_PRODUCT(cublasSgemv_v2)
IS_A_PRODUCT(cublasGemmStridedBatchedEx)
IS_A_PRODUCT(cublasSgemmStridedBatched)
IS_A_PRODUCT(cublasDgemmStridedBatched)
IS_A_PRODUCT(cublasSdot_v2)
IS_A_PRODUCT(cublasDotEx)
IS_A_PRODUCT(cublasLtMatmul)

static int zero(void *unused, int *value) {
    (void)unused;
    *value = 0;
    return OK;
}

int cublasGetMathMode(void *of, int *mode) { return zero(of, mode); }
int cublasGetPointerMode_v2(void *of, int *mode) { return zero(of, mode); }
const char *cublasGetStatusString(int status) { return status ? "error of fake CUDA" : "success"; }
size_t cublasLtGetVersion(void) { return 130100; }

int cublasLtMatmulAlgoGetHeuristic(void *lt, void *d, void *a, void *b, void *c, void *e, void *preference,
                                   int wanted, void *results, int *found) {
    enum { RESULT = 96 }; /* bytes of an algorithm with its workspace, of which this one needs none */
    (void)lt, (void)d, (void)a, (void)b, (void)c, (void)e, (void)preference;
    *found = wanted > 0;
    if (*found) memset(results, 0, RESULT);
    return OK;
}

/* cuDNN, which torch only asks for its version */

size_t cudnnGetVersion(void) { return 92000; }

/* NCCL: ranks that agree by themselves; nothing is sent */

#define IS_A_COLLECTIVE(name)                                                                          \
    int name(void) {                                                                                   \
        record('N', #name, 0, NULL);                                                                   \
        return OK;                                                                                     \
    }

IS_A_COLLECTIVE(ncclAllGather)
IS_A_COLLECTIVE(ncclAllReduce)
IS_A_COLLECTIVE(ncclBroadcast)
IS_A_COLLECTIVE(ncclReduce)
IS_A_COLLECTIVE(ncclReduceScatter)
IS_A_COLLECTIVE(ncclSend)
IS_A_COLLECTIVE(ncclRecv)

int ncclGetVersion(int *version) {
    *version = 22907;
    return OK;
}

int ncclGetUniqueId(char *id) {
    memset(id, 7, 128);
    return OK;
}

GIVES_A_HANDLE(ncclCommInitRank)
GIVES_A_HANDLE(ncclCommInitRankConfig)
GIVES_A_HANDLE(ncclCommInitRankScalable)

int ncclCommSplit(void *from, int color, int key, int **made) {
    (void)from, (void)color, (void)key;
    *made = &handle;
    return OK;
}

int ncclCommGetAsyncError(void *of, int *error) { return zero(of, error); }
const char *ncclGetErrorString(int error) { return error ? "error of fake NCCL" : "no error"; }
const char *ncclGetLastError(void *of) { return (void)of, ""; }

/* What may be asked for and changes nothing here */

#define DOES_NOTHING(name) int name(void) { return OK; }

DOES_NOTHING(cudaDeviceEnablePeerAccess)
DOES_NOTHING(cudaEventQuery)
DOES_NOTHING(cudaFuncSetAttribute)
DOES_NOTHING(cudaProfilerStart)
DOES_NOTHING(cudaProfilerStop)
DOES_NOTHING(cudaStreamDestroy)
DOES_NOTHING(cudaStreamQuery)
DOES_NOTHING(cudaStreamWaitEvent)
DOES_NOTHING(cudaThreadExchangeStreamCaptureMode)
DOES_NOTHING(cublasDestroy_v2)
DOES_NOTHING(cublasSetMathMode)
DOES_NOTHING(cublasSetPointerMode_v2)
DOES_NOTHING(cublasSetStream_v2)
DOES_NOTHING(cublasSetWorkspace_v2)
DOES_NOTHING(cublasLtMatmulDescDestroy)
DOES_NOTHING(cublasLtMatmulDescSetAttribute)
DOES_NOTHING(cublasLtMatmulPreferenceDestroy)
DOES_NOTHING(cublasLtMatmulPreferenceSetAttribute)
DOES_NOTHING(cublasLtMatrixLayoutDestroy)
DOES_NOTHING(cublasLtMatrixLayoutSetAttribute)
DOES_NOTHING(cuCtxSetCurrent)
DOES_NOTHING(cuCtxSetLimit)
DOES_NOTHING(cuFuncSetAttribute)
DOES_NOTHING(cuFuncSetCacheConfig)
DOES_NOTHING(cuMemSetAccess)
DOES_NOTHING(cuModuleUnload)
DOES_NOTHING(ncclCommAbort)
DOES_NOTHING(ncclCommDestroy)
DOES_NOTHING(ncclCommFinalize)
DOES_NOTHING(ncclGroupEnd)
DOES_NOTHING(ncclGroupStart)

/* CUPTI: a profile in which nothing ran */

DOES_NOTHING(cuptiActivityDisable)
DOES_NOTHING(cuptiActivityEnable)
DOES_NOTHING(cuptiActivityEnableCudaEventDeviceTimestamps)
DOES_NOTHING(cuptiActivityEnableDriverApi)
DOES_NOTHING(cuptiActivityEnableRuntimeApi)
DOES_NOTHING(cuptiActivityFlushAll)
DOES_NOTHING(cuptiActivityPopExternalCorrelationId)
DOES_NOTHING(cuptiActivityPushExternalCorrelationId)
DOES_NOTHING(cuptiActivityRegisterCallbacks)
DOES_NOTHING(cuptiActivityRegisterTimestampCallback)
DOES_NOTHING(cuptiActivitySetAttribute)
DOES_NOTHING(cuptiEnableCallback)
DOES_NOTHING(cuptiEnableDomain)
DOES_NOTHING(cuptiFinalize)
DOES_NOTHING(cuptiSubscribe)
DOES_NOTHING(cuptiUnsubscribe)

int cuptiGetVersion(unsigned *version) {
    *version = 26;
    return OK;
}

/* torch asks for the driver's functions by name, also for those it never calls. */
static int missing(void) {
    fputs("fake CUDA: a function of the driver was called that is not in cuda.c\n", stderr);
    abort();
}

int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, u64 flags, int *status) {
    (void)version, (void)flags;
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) *function = (void *)missing;
    if (status) *status = 0;
    return OK;
}
