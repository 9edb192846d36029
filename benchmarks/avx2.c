/* Preloaded into Python: the CPUID instruction tells of no AVX-512, VNNI and AMX.
 *
 * Linux can let CPUID fail (arch_prctl, ARCH_SET_CPUID); the handler runs it, takes the newer sets
 * out of the answer and goes on. All other instructions run as ever, at the processor's own speed.
 */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

/* Intel SDM, volume 2, CPUID: bits of leaf 7, subleaf 0 that are newer than AVX2. */
static const unsigned NEWER_EBX = 1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31;
static const unsigned NEWER_ECX = 1u << 1 | 1u << 6 | 1u << 8 | 1u << 9 | 1u << 10 | 1u << 11 | 1u << 12 | 1u << 14;
static const unsigned NEWER_EDX = 1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25;

static int hides; /* Whether this process is one of Python. */

static long let_cpuid_run(unsigned long runs) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, runs); }

static int set_handler(int number, const struct sigaction *new, struct sigaction *old) {
    int (*real)(int, const struct sigaction *, struct sigaction *) = dlsym(RTLD_NEXT, "sigaction");
    return real(number, new, old);
}

static void on_fault(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)registers[REG_RIP];
    if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {
        struct sigaction fatal = {.sa_handler = SIG_DFL};
        set_handler(number, &fatal, NULL); /* It fails again, and then for good; */
        if (info->si_code <= 0) raise(number); /* or somebody sent it. */
        return;
    }
    int error = errno;
    unsigned leaf = registers[REG_RAX], subleaf = registers[REG_RCX], a, b, c, d;
    let_cpuid_run(1);
    __cpuid_count(leaf, subleaf, a, b, c, d);
    let_cpuid_run(0);
    if (leaf == 7 && subleaf == 0) {
        a = 0; /* No further subleaves: AVX-VNNI and bf16 are in the next. */
        b &= ~NEWER_EBX, c &= ~NEWER_ECX, d &= ~NEWER_EDX;
    } else if (leaf == 7) {
        a = b = c = d = 0;
    }
    registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
    errno = error;
}

/* Python's faulthandler, or a library, would take the signal away. */
int sigaction(int number, const struct sigaction *new, struct sigaction *old) {
    if (hides && number == SIGSEGV && new) {
        if (old) memset(old, 0, sizeof *old);
        return 0;
    }
    return set_handler(number, new, old);
}

__attribute__((constructor)) static void begin(void) {
    if (strncmp(program_invocation_short_name, "python", 6)) return;
    struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    set_handler(SIGSEGV, &ours, NULL);
    hides = 1;
    if (let_cpuid_run(0)) {
        dprintf(STDERR_FILENO, "error: the system does not let CPUID fail: %s\n", strerror(errno));
        _exit(1);
    }
}
