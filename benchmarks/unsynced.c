/* Keeps what writes to a gallery's database and its log replaced, until these files are synced.

   Each write appends to $UNSYNCED/NAME: place, length, size of the file before, length of what was
   there, and what was there. A sync empties that. Build it with -shared -fPIC, load it with
   LD_PRELOAD. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int undo_of(int file, int flags)
{
    char link[64], path[PATH_MAX], place[2 * PATH_MAX];
    const char *folder = getenv("UNSYNCED"), *name;
    ssize_t length;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (folder == NULL || (length = readlink(link, path, sizeof path - 1)) < 0)
        return -1;
    path[length] = 0;
    name = strrchr(path, '/');
    if (name == NULL
        || (strcmp(name, "/gallery.sqlite") != 0 && strcmp(name, "/gallery.sqlite-wal") != 0))
        return -1;
    snprintf(place, sizeof place, "%s%s", folder, name);
    return open(place, O_WRONLY | O_CREAT | O_CLOEXEC | flags, 0600);
}

static void keep(int file, off_t at, off_t length)
{
    int undo = undo_of(file, O_APPEND);
    struct stat before;
    if (undo < 0)
        return;
    char *old = malloc(length);
    if (old == NULL || fstat(file, &before) != 0)
        abort();
    ssize_t there = pread(file, old, length, at);
    int64_t head[4] = {at, length, before.st_size, there};
    struct iovec parts[2] = {{head, sizeof head}, {old, there}};
    if (there < 0 || writev(undo, parts, 2) != (ssize_t)sizeof head + there)
        abort();
    free(old);
    close(undo);
}

static int synced(int file, int failed)
{
    int undo = failed ? -1 : undo_of(file, O_TRUNC);
    if (undo >= 0)
        close(undo);
    return failed;
}

static void keep_cut(int file, off_t length)
{
    struct stat before;
    if (fstat(file, &before) == 0 && before.st_size > length)
        keep(file, length, before.st_size - length);
}

ssize_t pwrite(int file, const void *from, size_t length, off_t at)
{
    keep(file, at, length);
    return REAL(pwrite)(file, from, length, at);
}

ssize_t pwrite64(int file, const void *from, size_t length, off64_t at)
{
    keep(file, at, length);
    return REAL(pwrite64)(file, from, length, at);
}

int ftruncate(int file, off_t length)
{
    keep_cut(file, length);
    return REAL(ftruncate)(file, length);
}

int ftruncate64(int file, off64_t length)
{
    keep_cut(file, length);
    return REAL(ftruncate64)(file, length);
}

int fallocate64(int file, int mode, off64_t at, off64_t length)
{
    keep(file, at, length);
    return REAL(fallocate64)(file, mode, at, length);
}

int fallocate(int file, int mode, off_t at, off_t length)
{
    return fallocate64(file, mode, at, length);
}

int fsync(int file)
{
    return synced(file, REAL(fsync)(file));
}

int fdatasync(int file)
{
    return synced(file, REAL(fdatasync)(file));
}
