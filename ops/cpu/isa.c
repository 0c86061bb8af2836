/* Whether this processor has what the library was compiled for. */
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* By cpuid, and by xgetbv: whether the system keeps the registers. It runs on any processor of the architecture. */
int runs_here(void)
{
#if defined(__AMX_BF16__)
    /* Linux gives a process the registers of the matrix unit when it asks for them. */
    if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */)) return 0;
#endif
#if defined(__x86_64__)
    __builtin_cpu_init();
#if defined(__AVX512BF16__)
    if (!__builtin_cpu_supports("avx512bf16")) return 0;
#endif
#if defined(__AVX512VNNI__)
    if (!__builtin_cpu_supports("avx512vnni")) return 0;
#elif defined(__AVXVNNI__)
    if (!__builtin_cpu_supports("avxvnni")) return 0;
#endif
#if defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#endif
    return 1;
}
