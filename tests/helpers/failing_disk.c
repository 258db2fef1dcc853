/* A disk that fails: loaded before the C library, it counts the calls that change files below a folder, and lets one
   of them fail as the system would. ENOSPC stays until the disk is mended; a short write is a success of the half. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[4096];
static long calls, failing;
static int code; /* an errno; 0 for a short write */

/* The nth call from now on fails with the errno; 0 counts alone. */
void disk_fails(const char *folder, long nth, int error) {
    snprintf(below, sizeof below, "%s", folder);
    calls = 0, failing = nth, code = error;
}

void disk_is_mended(void) { below[0] = 0; }

long disk_calls(void) { return calls; }

static int is_below(const char *path) { return below[0] && !strncmp(path, below, strlen(below)); }

static int file_is_below(int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = below[0] ? readlink(link, path, sizeof path - 1) : -1;
    return length > 0 && (path[length] = 0, is_below(path));
}

/* Whether this call is to fail. */
static int fails(int counts) {
    if (!counts) return 0;
    calls++;
    return failing && (code == ENOSPC ? calls >= failing : calls == failing);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL_OR(counts, next) \
    if (fails(counts) && code) { errno = code; return -1; } \
    return next

ssize_t write(int file, const void *buffer, size_t size) {
    if (fails(file_is_below(file))) {
        if (code) { errno = code; return -1; }
        size = size > 1 ? size / 2 : size;
    }
    return NEXT(write)(file, buffer, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    FAIL_OR(file_is_below(file), NEXT(writev)(file, parts, count));
}

ssize_t pwrite64(int file, const void *buffer, size_t size, off_t offset) {
    FAIL_OR(file_is_below(file), NEXT(pwrite64)(file, buffer, size, offset));
}

int ftruncate64(int file, off_t size) { FAIL_OR(file_is_below(file), NEXT(ftruncate64)(file, size)); }

int fallocate64(int file, int mode, off_t offset, off_t size) {
    FAIL_OR(file_is_below(file), NEXT(fallocate64)(file, mode, offset, size));
}

int fsync(int file) { FAIL_OR(file_is_below(file), NEXT(fsync)(file)); }

int rename(const char *from, const char *to) { FAIL_OR(is_below(to), NEXT(rename)(from, to)); }

int mkdir(const char *path, mode_t mode) { FAIL_OR(is_below(path), NEXT(mkdir)(path, mode)); }

ssize_t copy_file_range(int in, off_t *in_at, int out, off_t *out_at, size_t size, unsigned flags) {
    FAIL_OR(file_is_below(out), NEXT(copy_file_range)(in, in_at, out, out_at, size, flags));
}

ssize_t sendfile64(int out, int in, off_t *offset, size_t size) {
    extern ssize_t sendfile64(int, int, off_t *, size_t);
    FAIL_OR(file_is_below(out), NEXT(sendfile64)(out, in, offset, size));
}
