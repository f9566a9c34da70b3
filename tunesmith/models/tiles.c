/* Tells a library that asks this processor for its AMX tiles (CPUID leaf 1DH) what a hypervisor left out.

   Between trap() and untrap() this thread's CPUID instruction is a fault (arch_prctl ARCH_SET_CPUID), whose handler
   asks the processor and fills in the tiles where it answers with nothing. Sizes are those of palette 1 in Intel's
   Architecture Instruction Set Extensions Programming Reference, chapter on AMX. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { SET_CPUID = 0x1012, TILE_LEAF = 0x1d };

static struct sigaction before;
static volatile int told;

static void on_fault(int number, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *code = (const uint8_t *)r[REG_RIP];
    (void)number, (void)info;
    if (code[0] != 0x0f || code[1] != 0xa2) { /* not CPUID: a fault of its own, met again without us */
        sigaction(SIGSEGV, &before, 0);
        return;
    }
    uint32_t leaf = (uint32_t)r[REG_RAX], sub = (uint32_t)r[REG_RCX], a, b, c, d;
    syscall(SYS_arch_prctl, SET_CPUID, 1);
    __cpuid_count(leaf, sub, a, b, c, d);
    syscall(SYS_arch_prctl, SET_CPUID, 0);
    if (leaf == TILE_LEAF && sub == 0 && a == 0) {
        a = 1; /* palettes */
        told++;
    } else if (leaf == TILE_LEAF && sub == 1 && a == 0) {
        a = 8192 | 1024 << 16; /* bytes of all tiles, of one */
        b = 64 | 8 << 16;      /* bytes in a row, tiles */
        c = 16;                /* rows */
    }
    r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d;
    r[REG_RIP] += 2;
}

/* 0, or -1 where this system has no such fault. */
int trap(void) {
    struct sigaction ours;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER;
    if (sigaction(SIGSEGV, &ours, &before))
        return -1;
    if (syscall(SYS_arch_prctl, SET_CPUID, 0)) {
        sigaction(SIGSEGV, &before, 0);
        return -1;
    }
    return 0;
}

/* How often the number of palettes was filled in. */
int untrap(void) {
    syscall(SYS_arch_prctl, SET_CPUID, 1);
    sigaction(SIGSEGV, &before, 0);
    return told;
}
