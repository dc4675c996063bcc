/* The C kernels of this folder as one source: one compilation, one library. Read common.c first. */

#define _GNU_SOURCE /* syscall, in amx_forward.c */

#include "common.c"

#include "dequantize.c"
#include "quantize.c"
#include "matmul.c"
#include "fixed.c"
#include "amx_forward.c"
#include "amx_backward.c"

#ifdef X86
/* The AVX2 path converts float16 with it; every such processor has it, but a virtual machine may hide it. */
static int has_f16c(void) {
    uint32_t a, b, c, d;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(1), "c"(0));
    return c >> 29 & 1;
}
#endif

/* The best ISA that this processor (and its operating system) can run. */
int32_t qlorag_nf4_best_isa(void) {
#ifdef X86
    __builtin_cpu_init();
    const int vnni = __builtin_cpu_supports("avx512vnni");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
#ifdef HAVE_AMX
        if (vnni && has_amx()) return AMX;
#endif
        return vnni ? VNNI : AVX512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) return AVX2;
#elif defined(ARM)
    return NEON;
#endif
    return SCALAR;
}

/* y = x Wᵀ; x: [rows][K], y: [rows][N], both of dtype. Returns whether there was memory for a copy of x. */
int32_t qlorag_nf4_matmul(const matmul_args *a, const void *x, void *y, int64_t rows, int32_t dtype, int32_t threads) {
    if (rows == 0) return 1;
#ifdef HAVE_AMX
    if (a->isa == AMX && dtype == BFLOAT16 && rows >= AMX_ROWS) return forward_amx(a, x, y, rows, threads);
#endif
    if (dtype == BFLOAT16) return matmul_fixed(a, x, y, rows, threads);
    return matmul_fused(a, x, y, rows, dtype, threads);
}

/* dx = dy W in bfloat16, for AMX alone; dy: [rows][N], dx: [rows][K]. Returns whether there was memory. */
int32_t qlorag_nf4_matmul_backward(const matmul_args *a, const void *dy, void *dx, int64_t rows, int32_t threads) {
#ifdef HAVE_AMX
    return rows == 0 || backward_amx(a, dy, dx, rows, threads);
#else
    return (void)a, (void)dy, (void)dx, (void)rows, (void)threads, 0;
#endif
}

/* How large this library's structures are, for compiled.py to compare with its own. */
void qlorag_nf4_sizes(int64_t sizes[4]) {
    sizes[0] = sizeof(packed_tensor);
    sizes[1] = sizeof(dequantize_args);
    sizes[2] = sizeof(quantize_args);
    sizes[3] = sizeof(matmul_args);
}
