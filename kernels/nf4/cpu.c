/* The C kernels of this folder as one source: one compilation, one library. Read common.c first. */

#include "common.c"

#include "dequantize.c"
#include "quantize.c"
#include "matmul.c"

/* The highest level this processor (and its operating system) can run. */
int32_t qlorag_nf4_best_level(void) {
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2; /* F16C is older than AVX2 */
#elif defined(ARM)
    return NEON;
#endif
    return SCALAR;
}
