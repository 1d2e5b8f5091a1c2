/* A stand-in of NVML that answers what a script says, through NVML's own C interface.

The script is the file named by FAKE_NVML, read at the first nvmlInit. A line is one of

    gpu UUID NAME                  a GPU; their order is NVML's
    mig UUID PARENT                a MIG slice of the GPU with UUID PARENT
    CALL UUID|* ANSWER...          answers of a call for a device (or any), one after the other

and the last answer stands for ever. An ANSWER is `error:CODE`, `hang` (until the file FAKE_NVML.free
exists; then the next answer is given), or the call's figures with commas between. A call without a line is NVML_ERROR_NOT_SUPPORTED.
Processes are PID:BYTES, where PID may be `self`; `none` is an empty list. */

#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS, INVALID_ARGUMENT = 2, NOT_SUPPORTED, NOT_FOUND = 6, INSUFFICIENT_SIZE };
enum { ARGUMENT_VERSION_MISMATCH = 25 };
enum { DEVICES = 16, LINES = 64, ANSWERS = 64, TEXT = 128 };

typedef unsigned long long u64;
typedef struct Device { char uuid[TEXT], name[TEXT]; struct Device *parent; } Device;
typedef struct { char call[TEXT], uuid[TEXT], answers[ANSWERS][TEXT]; int count, next; } Line;

static Device devices[DEVICES];
static Line lines[LINES];
static int device_count, line_count;
static char script[512];

static Device *find(const char *uuid) {
    for (int i = 0; i < device_count; i++)
        if (!strcmp(devices[i].uuid, uuid)) return &devices[i];
    return NULL;
}

static void read_line(char *text) {
    char *rest, *word = strtok_r(text, " \n", &rest);
    if (!word) return;
    if (!strcmp(word, "gpu") || !strcmp(word, "mig")) {
        Device *device = &devices[device_count++];
        strcpy(device->uuid, strtok_r(NULL, " \n", &rest));
        char *last = strtok_r(NULL, "\n", &rest);
        device->parent = *word == 'm' ? find(last) : NULL;
        strcpy(device->name, device->parent ? device->parent->name : last);
        return;
    }
    Line *line = &lines[line_count++];
    strcpy(line->call, word);
    strcpy(line->uuid, strtok_r(NULL, " \n", &rest));
    while ((word = strtok_r(NULL, " \n", &rest))) strcpy(line->answers[line->count++], word);
}

static void read_script(void) {
    const char *path = getenv("FAKE_NVML");
    if (!path) return;
    snprintf(script, sizeof script, "%s", path);
    FILE *file = fopen(path, "r");
    char text[4096];
    while (file && fgets(text, sizeof text, file)) read_line(text);
    if (file) fclose(file);
}

static void hang(void) {
    char free_file[600];
    struct timespec pause = {0, 5 * 1000 * 1000};
    snprintf(free_file, sizeof free_file, "%s.free", script);
    while (access(free_file, F_OK)) nanosleep(&pause, NULL);
}

/* The next answer of a call, or NULL with its error code. */
static const char *answer(const char *call, Device *device, int *code) {
    *code = NOT_SUPPORTED;
    for (int i = 0; i < line_count; i++) {
        Line *line = &lines[i];
        if (strcmp(line->call, call)) continue;
        if (strcmp(line->uuid, "*") && (!device || strcmp(line->uuid, device->uuid))) continue;
        const char *given = line->answers[line->next];
        if (line->next < line->count - 1) line->next++;
        if (!strcmp(given, "hang")) {
            hang();
            given = line->answers[line->next];
            if (!strcmp(given, "hang")) given = "error:10"; /* NVML_ERROR_TIMEOUT */
        }
        *code = !strncmp(given, "error:", 6) ? atoi(given + 6) : SUCCESS;
        return *code ? NULL : given;
    }
    return NULL;
}

static u64 number(const char *text, int index) {
    for (; index; index--) text = strchr(text, ',') + 1;
    return strtoull(text, NULL, 10);
}

/* A call that gives one unsigned int, for a whole GPU: a slice has none of these. */
static int board_number(const char *call, Device *device, unsigned *value) {
    int code;
    if (device->parent) return NOT_SUPPORTED;
    const char *given = answer(call, device, &code);
    if (given) *value = (unsigned)number(given, 0);
    return code;
}

int nvmlInitWithFlags(unsigned flags) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    (void)flags;
    int code;
    pthread_once(&once, read_script);
    return answer("nvmlInit", NULL, &code) || code == NOT_SUPPORTED ? SUCCESS : code;
}

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) { return code == 22 ? "vGPU ECC Not Supported" : "an error"; }

int nvmlSystemGetDriverVersion(char *text, unsigned size) {
    int code;
    const char *given = answer("nvmlSystemGetDriverVersion", NULL, &code);
    if (given) snprintf(text, size, "%s", given);
    return code;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
    return (*device = find(uuid)) ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceGetUUID(Device *device, char *text, unsigned size) {
    snprintf(text, size, "%s", device->uuid);
    return SUCCESS;
}

int nvmlDeviceGetName(Device *device, char *text, unsigned size) {
    snprintf(text, size, "%s", device->name);
    return SUCCESS;
}

int nvmlDeviceIsMigDeviceHandle(Device *device, unsigned *is_slice) {
    *is_slice = device->parent != NULL;
    return SUCCESS;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(Device *slice, Device **device) {
    *device = slice->parent;
    return *device ? SUCCESS : INVALID_ARGUMENT;
}

static Device *slice_at(Device *device, unsigned index) {
    for (int i = 0; i < device_count; i++)
        if (devices[i].parent == device && !index--) return &devices[i];
    return NULL;
}

int nvmlDeviceGetMigMode(Device *device, unsigned *current, unsigned *pending) {
    *current = *pending = slice_at(device, 0) != NULL;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *count) {
    (void)device;
    *count = 7;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned index, Device **slice) {
    return (*slice = slice_at(device, index)) ? SUCCESS : NOT_FOUND;
}

typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned version; u64 total, reserved, free, used; } MemoryV2;

/* used,total,reserved */
int nvmlDeviceGetMemoryInfo_v2(Device *device, MemoryV2 *memory) {
    int code;
    const char *given = answer("nvmlDeviceGetMemoryInfo_v2", device, &code);
    if (memory->version != (sizeof *memory | 2 << 24)) return ARGUMENT_VERSION_MISMATCH;
    if (!given) return code;
    memory->used = number(given, 0);
    memory->total = number(given, 1);
    memory->reserved = number(given, 2);
    memory->free = memory->total - memory->used - memory->reserved;
    return SUCCESS;
}

/* used,total */
int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    int code;
    const char *given = answer("nvmlDeviceGetMemoryInfo", device, &code);
    if (!given) return code;
    memory->used = number(given, 0);
    memory->total = number(given, 1);
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } Process;

/* pid:bytes,pid:bytes,... ; asked twice, for the size and for the list, it gives one answer */
int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, Process *list) {
    static __thread const char *given;
    int code;
    if (!list) {
        given = answer("nvmlDeviceGetComputeRunningProcesses_v3", device, &code);
        if (!given) return code;
        if (!strcmp(given, "none")) return *count = 0, SUCCESS;
    }
    unsigned n = 0;
    for (const char *p = given; p; p = strchr(p, ',') ? strchr(p, ',') + 1 : NULL, n++)
        if (list && n < *count) {
            list[n].pid = !strncmp(p, "self", 4) ? (unsigned)getpid() : (unsigned)atoi(p);
            list[n].used = strtoull(strchr(p, ':') + 1, NULL, 10);
        }
    int fits = list && n <= *count;
    *count = n;
    return fits ? SUCCESS : INSUFFICIENT_SIZE;
}

/* gpu,memory in percent */
int nvmlDeviceGetUtilizationRates(Device *device, unsigned rates[2]) {
    int code;
    if (device->parent) return NOT_SUPPORTED;
    const char *given = answer("nvmlDeviceGetUtilizationRates", device, &code);
    if (given) rates[0] = (unsigned)number(given, 0), rates[1] = (unsigned)number(given, 1);
    return code;
}

int nvmlDeviceGetPowerUsage(Device *device, unsigned *milliwatts) {
    return board_number("nvmlDeviceGetPowerUsage", device, milliwatts);
}

int nvmlDeviceGetTemperature(Device *device, int sensor, unsigned *celsius) {
    (void)sensor;
    return board_number("nvmlDeviceGetTemperature", device, celsius);
}

int nvmlDeviceGetClockInfo(Device *device, int clock, unsigned *mhz) {
    int code;
    if (device->parent) return NOT_SUPPORTED;
    const char *given = answer("nvmlDeviceGetClockInfo", device, &code); /* sm,memory */
    if (given) *mhz = (unsigned)number(given, clock == 2);
    return code;
}

/* A driver from before its new name, nvmlDeviceGetCurrentClocksEventReasons. */
int nvmlDeviceGetCurrentClocksThrottleReasons(Device *device, u64 *reasons) {
    unsigned value = 0;
    int code = board_number("nvmlDeviceGetCurrentClocksThrottleReasons", device, &value);
    *reasons = value;
    return code;
}

int nvmlDeviceGetTotalEccErrors(Device *device, int kind, int counter, u64 *errors) {
    unsigned value = 0;
    if (kind != 1 || counter != 0) return INVALID_ARGUMENT; /* uncorrected, volatile */
    int code = board_number("nvmlDeviceGetTotalEccErrors", device, &value);
    *errors = value;
    return code;
}

/* sent,received in KB */
int nvmlDeviceGetPcieThroughput(Device *device, int counter, unsigned *kilobytes) {
    int code;
    if (device->parent) return NOT_SUPPORTED;
    const char *given = answer("nvmlDeviceGetPcieThroughput", device, &code);
    if (given) *kilobytes = (unsigned)number(given, counter);
    return code;
}

typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    int type, code;
    union { double d; unsigned ui; unsigned long ul; u64 ull; long long sll; } value;
} FieldValue;

/* sent,received in KiB: fields 138 and 139, of all links */
int nvmlDeviceGetFieldValues(Device *device, int count, FieldValue *values) {
    int code;
    const char *given = answer("nvmlDeviceGetFieldValues", device, &code);
    for (int i = 0; i < count; i++) {
        int known = values[i].scope == 0xFFFFFFFF && (values[i].field | 1) == 139;
        values[i].code = known ? code : INVALID_ARGUMENT;
        values[i].type = 3;
        if (given && known) values[i].value.ull = number(given, values[i].field == 139);
    }
    return SUCCESS;
}
