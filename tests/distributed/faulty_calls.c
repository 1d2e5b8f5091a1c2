/* LD_PRELOAD: a file system on which one call fails.

   Once a process has called faulty_calls_arm, each call by which it changes files below a folder is
   written to a log, one a line: the call, a tab, the path. One of them fails: the n-th of its kind
   on its path. Random parts of names are written as `*`, so that the same training makes the same
   calls. Built with: cc -shared -fPIC -pthread */

#define _GNU_SOURCE
#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NEVER = 0, SHORT = -1 };                      /* besides an errno: the fault */
enum { ONCE, DESCRIPTOR, DISK };                     /* how far it reaches */

static int armed, log_file, fault, reach, number, seen, failed_descriptor = -1, disk_failed;
static char folder[PATH_MAX], call[64], place[PATH_MAX];
static pthread_mutex_t alone = PTHREAD_MUTEX_INITIALIZER;

void faulty_calls_arm(const char *below, const char *log, const char *one_call, const char *one_place,
                      int nth, int which, int how_far) {
    snprintf(folder, sizeof folder, "%s/", below);
    snprintf(call, sizeof call, "%s", one_call);
    snprintf(place, sizeof place, "%s", one_place);
    number = nth, fault = which, reach = how_far;
    log_file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    armed = log_file >= 0;
}

static int is_random(const char *text, size_t length, int (*kind)(int)) {
    for (size_t i = 0; i < length; i++)
        if (!kind((unsigned char)text[i]) && text[i] != '_') return 0;
    return 1;
}

/* 32 hexadecimal digits of a uuid, and what Python's and Rust's tempfile put behind `tmp` */
static void mask(char *path) {
    char *to = path;
    for (char *from = path; *from;) {
        if (is_random(from, 32, isxdigit)) from += 32, *to++ = '*';
        else if (!strncmp(from, "/tmp", 4) && is_random(from + 4, 8, isalnum))
            memmove(to, "/tmp*", 5), from += 12, to += 5;
        else if (!strncmp(from, "/.tmp", 5) && is_random(from + 5, 6, isalnum))
            memmove(to, "/.tmp*", 6), from += 11, to += 6;
        else *to++ = *from++;
    }
    *to = 0;
}

static int of_descriptor(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    char *end = strstr(path, " (deleted)");
    if (end) *end = 0;
    return 1;
}

static int of_name(int directory, const char *name, char *path) {
    if (!name) return 0;
    if (*name == '/') return snprintf(path, PATH_MAX, "%s", name) < PATH_MAX;
    char base[PATH_MAX];
    if (directory == AT_FDCWD ? !getcwd(base, sizeof base) : !of_descriptor(directory, base)) return 0;
    return snprintf(path, PATH_MAX, "%s/%s", base, name) < PATH_MAX;
}

/* What becomes of a call: 0, an errno, or SHORT. */
static int judge(const char *name, int descriptor, char *path) {
    size_t length = strlen(folder);
    if (strncmp(path, folder, length)) return 0;
    mask(path + length - 1);
    char line[PATH_MAX + 80];
    int result = 0, size = snprintf(line, sizeof line, "%s\t%s\n", name, path + length);
    pthread_mutex_lock(&alone);
    syscall(SYS_write, log_file, line, size);
    int removes = !strcmp(name, "unlink") || !strcmp(name, "rmdir") || !strcmp(name, "close");
    if (disk_failed && !removes) result = fault;
    else if (descriptor >= 0 && descriptor == failed_descriptor) result = fault;
    else if (!strcmp(name, call) && !strcmp(path + length, place) && ++seen == number) {
        result = fault;
        if (reach == DESCRIPTOR) failed_descriptor = descriptor;
        if (reach == DISK) disk_failed = 1;
    }
    if (!strcmp(name, "close") && descriptor == failed_descriptor) failed_descriptor = -1;
    pthread_mutex_unlock(&alone);
    return result;
}

static int on_descriptor(const char *name, int descriptor) {
    char path[PATH_MAX];
    int before = errno, result = 0;
    if (armed && descriptor != log_file && of_descriptor(descriptor, path))
        result = judge(name, descriptor, path);
    errno = before;
    return result;
}

static int on_name(const char *name, int directory, const char *file) {
    char path[PATH_MAX];
    int before = errno, result = 0;
    if (armed && of_name(directory, file, path)) result = judge(name, -1, path);
    errno = before;
    return result;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define FAIL_IF(result, how) \
    do { int code = how; if (code > 0) { errno = code; return result; } } while (0)

/* Opening for writing */

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC); }

#define OPEN(function) \
    int function(const char *file, int flags, ...) { \
        va_list more; va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        REAL(int, #function, const char *, int, ...); \
        if (writes(flags)) FAIL_IF(-1, on_name("open", AT_FDCWD, file)); \
        return real(file, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(function) \
    int function(int directory, const char *file, int flags, ...) { \
        va_list more; va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        REAL(int, #function, int, const char *, int, ...); \
        if (writes(flags)) FAIL_IF(-1, on_name("open", directory, file)); \
        return real(directory, file, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define CREAT(function) \
    int function(const char *file, mode_t mode) { \
        REAL(int, #function, const char *, mode_t); \
        FAIL_IF(-1, on_name("open", AT_FDCWD, file)); \
        return real(file, mode); \
    }
CREAT(creat)
CREAT(creat64)

#define FOPEN(function) \
    FILE *function(const char *file, const char *mode) { \
        REAL(FILE *, #function, const char *, const char *); \
        if (strpbrk(mode, "wa+")) FAIL_IF(NULL, on_name("open", AT_FDCWD, file)); \
        return real(file, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

int close(int descriptor) {
    REAL(int, "close", int);
    int flags = armed ? (int)syscall(SYS_fcntl, descriptor, F_GETFL) : 0;
    int how = flags > 0 && (flags & O_ACCMODE) != O_RDONLY ? on_descriptor("close", descriptor) : 0;
    int result = real(descriptor); /* it is closed all the same */
    FAIL_IF(-1, how);
    return result;
}

/* Writing */

#define WRITE(function, name, arguments, types, ...) \
    ssize_t function arguments { \
        REAL(ssize_t, #function, __VA_ARGS__); \
        int how = on_descriptor(name, descriptor); \
        FAIL_IF(-1, how); \
        if (how == SHORT && size > 1) size /= 2; \
        return real types; \
    }
WRITE(write, "write", (int descriptor, const void *from, size_t size), (descriptor, from, size),
      int, const void *, size_t)
WRITE(pwrite, "write", (int descriptor, const void *from, size_t size, off_t at),
      (descriptor, from, size, at), int, const void *, size_t, off_t)
WRITE(pwrite64, "write", (int descriptor, const void *from, size_t size, off64_t at),
      (descriptor, from, size, at), int, const void *, size_t, off64_t)
WRITE(writev, "write", (int descriptor, const struct iovec *from, int size), (descriptor, from, size),
      int, const struct iovec *, int)
WRITE(pwritev, "write", (int descriptor, const struct iovec *from, int size, off_t at),
      (descriptor, from, size, at), int, const struct iovec *, int, off_t)
WRITE(pwritev64, "write", (int descriptor, const struct iovec *from, int size, off64_t at),
      (descriptor, from, size, at), int, const struct iovec *, int, off64_t)
WRITE(sendfile, "sendfile", (int descriptor, int from, off_t *at, size_t size),
      (descriptor, from, at, size), int, int, off_t *, size_t)
WRITE(sendfile64, "sendfile", (int descriptor, int from, off64_t *at, size_t size),
      (descriptor, from, at, size), int, int, off64_t *, size_t)

ssize_t copy_file_range(int from, off64_t *at, int descriptor, off64_t *to, size_t size, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    int how = on_descriptor("copy_file_range", descriptor);
    FAIL_IF(-1, how);
    return real(from, at, descriptor, to, how == SHORT && size > 1 ? size / 2 : size, flags);
}

/* What changes an open file otherwise */

#define ON_DESCRIPTOR(function, name, arguments, types, ...) \
    int function arguments { \
        REAL(int, #function, __VA_ARGS__); \
        FAIL_IF(-1, on_descriptor(name, descriptor)); \
        return real types; \
    }
ON_DESCRIPTOR(fsync, "fsync", (int descriptor), (descriptor), int)
ON_DESCRIPTOR(fdatasync, "fsync", (int descriptor), (descriptor), int)
ON_DESCRIPTOR(ftruncate, "truncate", (int descriptor, off_t size), (descriptor, size), int, off_t)
ON_DESCRIPTOR(ftruncate64, "truncate", (int descriptor, off64_t size), (descriptor, size), int, off64_t)
ON_DESCRIPTOR(flock, "lock", (int descriptor, int how), (descriptor, how), int, int)
ON_DESCRIPTOR(fchmod, "chmod", (int descriptor, mode_t mode), (descriptor, mode), int, mode_t)
ON_DESCRIPTOR(fallocate, "fallocate", (int descriptor, int mode, off_t at, off_t size),
              (descriptor, mode, at, size), int, int, off_t, off_t)
ON_DESCRIPTOR(fallocate64, "fallocate", (int descriptor, int mode, off64_t at, off64_t size),
              (descriptor, mode, at, size), int, int, off64_t, off64_t)

#define ALLOCATE(function, offset) \
    int function(int descriptor, offset at, offset size) { \
        REAL(int, #function, int, offset, offset); \
        int how = on_descriptor("fallocate", descriptor); \
        return how > 0 ? how : real(descriptor, at, size); /* an errno is returned */ \
    }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

#define CONTROL(function) \
    int function(int descriptor, int command, ...) { \
        va_list more; va_start(more, command); \
        void *argument = va_arg(more, void *); \
        va_end(more); \
        REAL(int, #function, int, int, ...); \
        int locks = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || \
                    command == F_OFD_SETLKW; \
        if (locks) FAIL_IF(-1, on_descriptor("lock", descriptor)); \
        return real(descriptor, command, argument); \
    }
CONTROL(fcntl)
CONTROL(fcntl64)

/* Names */

#define ON_NAME(function, name, directory, arguments, types, ...) \
    int function arguments { \
        REAL(int, #function, __VA_ARGS__); \
        FAIL_IF(-1, on_name(name, directory, file)); \
        return real types; \
    }
ON_NAME(mkdir, "mkdir", AT_FDCWD, (const char *file, mode_t mode), (file, mode), const char *, mode_t)
ON_NAME(mkdirat, "mkdir", at, (int at, const char *file, mode_t mode), (at, file, mode),
        int, const char *, mode_t)
ON_NAME(rmdir, "rmdir", AT_FDCWD, (const char *file), (file), const char *)
ON_NAME(unlink, "unlink", AT_FDCWD, (const char *file), (file), const char *)
ON_NAME(unlinkat, flags & AT_REMOVEDIR ? "rmdir" : "unlink", at, (int at, const char *file, int flags),
        (at, file, flags), int, const char *, int)
ON_NAME(rename, "rename", AT_FDCWD, (const char *file, const char *to), (file, to),
        const char *, const char *)
ON_NAME(renameat, "rename", at, (int at, const char *file, int there, const char *to),
        (at, file, there, to), int, const char *, int, const char *)
ON_NAME(renameat2, "rename", at, (int at, const char *file, int there, const char *to, unsigned flags),
        (at, file, there, to, flags), int, const char *, int, const char *, unsigned)
ON_NAME(link, "link", AT_FDCWD, (const char *old, const char *file), (old, file),
        const char *, const char *)
ON_NAME(linkat, "link", there, (int at, const char *old, int there, const char *file, int flags),
        (at, old, there, file, flags), int, const char *, int, const char *, int)
ON_NAME(symlink, "link", AT_FDCWD, (const char *old, const char *file), (old, file),
        const char *, const char *)
ON_NAME(truncate, "truncate", AT_FDCWD, (const char *file, off_t size), (file, size),
        const char *, off_t)
ON_NAME(truncate64, "truncate", AT_FDCWD, (const char *file, off64_t size), (file, size),
        const char *, off64_t)
ON_NAME(chmod, "chmod", AT_FDCWD, (const char *file, mode_t mode), (file, mode), const char *, mode_t)
ON_NAME(fchmodat, "chmod", at, (int at, const char *file, mode_t mode, int flags),
        (at, file, mode, flags), int, const char *, mode_t, int)
