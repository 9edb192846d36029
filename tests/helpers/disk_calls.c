/* Tells a listener about every call that syncs files or changes names, and waits for its answer
   before the call is made.

   A message is the name of the call, a folder's descriptor, a path, and the same again for calls
   that have two: joined by zero bytes. The answer is one byte. Build it with -shared -fPIC, load it
   with LD_PRELOAD, and name the listener's socket (SOCK_SEQPACKET) in DISK_CALLS. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
static int listener = -1;
static pid_t connected_by;

static int connected(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *name = getenv("DISK_CALLS");
    if (name == NULL || strlen(name) >= sizeof address.sun_path)
        return 0;
    if (connected_by == getpid()) /* Children get a connection of their own. */
        return 1;
    strcpy(address.sun_path, name);
    listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (listener < 0 || connect(listener, (struct sockaddr *)&address, sizeof address) != 0)
        abort();
    connected_by = getpid();
    return 1;
}

static void tell(const char *call, int at, const char *path, int to_at, const char *to)
{
    char message[9000], answer;
    int before = errno, length;
    pthread_mutex_lock(&one_at_a_time);
    if (connected()) {
        length = snprintf(message, sizeof message, "%s%c%d%c%s%c%d%c%s", call, 0, at, 0, path, 0,
                          to_at, 0, to);
        if (length >= (int)sizeof message || send(listener, message, length, 0) != length
            || recv(listener, &answer, 1, 0) != 1)
            abort();
    }
    pthread_mutex_unlock(&one_at_a_time);
    errno = before;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int fsync(int file)
{
    tell("fsync", file, "", -1, "");
    return REAL(fsync)(file);
}

int fdatasync(int file)
{
    tell("fsync", file, "", -1, "");
    return REAL(fdatasync)(file);
}

int rename(const char *from, const char *to)
{
    tell("rename", AT_FDCWD, from, AT_FDCWD, to);
    return REAL(rename)(from, to);
}

int renameat(int at, const char *from, int to_at, const char *to)
{
    tell("rename", at, from, to_at, to);
    return REAL(renameat)(at, from, to_at, to);
}

int renameat2(int at, const char *from, int to_at, const char *to, unsigned int flags)
{
    tell(flags & RENAME_EXCHANGE ? "exchange" : "rename", at, from, to_at, to);
    return REAL(renameat2)(at, from, to_at, to, flags);
}

int unlink(const char *path)
{
    tell("unlink", AT_FDCWD, path, -1, "");
    return REAL(unlink)(path);
}

int unlinkat(int at, const char *path, int flags)
{
    tell("unlink", at, path, -1, "");
    return REAL(unlinkat)(at, path, flags);
}

int rmdir(const char *path)
{
    tell("unlink", AT_FDCWD, path, -1, "");
    return REAL(rmdir)(path);
}

int mkdir(const char *path, mode_t mode)
{
    tell("mkdir", AT_FDCWD, path, -1, "");
    return REAL(mkdir)(path, mode);
}

int link(const char *from, const char *to)
{
    tell("link", AT_FDCWD, from, AT_FDCWD, to);
    return REAL(link)(from, to);
}

int linkat(int at, const char *from, int to_at, const char *to, int flags)
{
    tell("link", at, from, to_at, to);
    return REAL(linkat)(at, from, to_at, to, flags);
}
