/* What the operations of this folder share: the packed tensor, the 16-bit floats, and the scales of blocks.

   Layout: byte i of `packed` holds element 2i in its high nibble and 2i + 1 in its low one. Blocks run over the
   flattened tensor, and their sizes are multiples of 32, so every block starts on a byte.

   Every table comes from codebook.py with each call; there is no second copy of them in C. Arguments are checked in
   checks.py. No operation keeps state, and each splits its work so that the number of threads cannot change a bit. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#define X86 1
#include <immintrin.h>
/* The address may lie beyond the buffer, where no pointer may point. */
#define PREFETCH(base, offset, hint) _mm_prefetch((const char *)((uintptr_t)(base) + (uintptr_t)(offset)), hint)
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#if defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>) /* GCC 11, clang 12 */
#define HAVE_AMX 1
#define TARGET_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))
#endif
#endif
#elif defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__)
#define ARM 1
#include <arm_neon.h> /* every AArch64 processor has it: no target attribute */
#endif
#define INLINE static inline __attribute__((always_inline))

#ifdef _OPENMP
#include <omp.h>
#define thread_number() omp_get_thread_num()
#else /* calls.py then asks for one thread */
#define thread_number() 0
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wunused-variable"
#endif

enum { SCALAR, AVX2, AVX512, VNNI, AMX, NEON }; /* native/isa.py: ISAS; each of x86 includes those before it */
enum { FLOAT32, FLOAT16, BFLOAT16 };   /* calls.py: DTYPES */
enum { NESTED_BLOCK_SIZE = 256 };      /* reference.py */
enum { TASK = 65536 };                 /* elements: enough work to be worth handing to a thread */

typedef struct {
    const uint8_t *packed;       /* [ceil(numel / 2)] */
    const void *absmax;          /* float [blocks], or uint8_t [blocks] if nested_absmax */
    const float *nested_absmax;  /* [ceil(blocks / 256)], or NULL */
    const float *nested_offset;  /* [1], or NULL */
    const float *dynamic;        /* [256] 8-bit table */
    const float *table;          /* [16] 4-bit table */
    int64_t numel, block_size;
} packed_tensor;

INLINE int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Float32 to 16 bits, to nearest even, and back. */

INLINE uint32_t bits_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

INLINE float float_of(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

INLINE float power_of_two(int32_t exponent) { /* -126 ... 127 */
    return float_of((uint32_t)(exponent + 127) << 23);
}

INLINE uint16_t to_bfloat16(float x) {
    const uint32_t u = bits_of(x == x ? x : NAN);
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

INLINE uint16_t to_float16(float x) {
    const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);  /* NaN */
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* rounds to 65536 or more: infinity */
    if (magnitude >= 0x38800000)                                   /* normal: move the exponent, drop 13 bits */
        return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
    /* Subnormal: adding 0.5 leaves exactly the bits that float16 keeps, rounded by the hardware. */
    return (uint16_t)(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000));
}

INLINE float from_float16(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13); /* infinity, NaN */
    /* Its bits as a float32 stand for 2^-112 of its value, subnormals included. */
    const float value = float_of(magnitude << 13) * 0x1p112f;
    return sign ? -value : value;
}

INLINE uint16_t to_half(float x, int32_t dtype) {
    return dtype == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
}

/* Element i of an array of any of the three types. */
INLINE float load(const void *x, int64_t i, int32_t dtype) {
    if (dtype == FLOAT32) return ((const float *)x)[i];
    const uint16_t half = ((const uint16_t *)x)[i];
    return dtype == BFLOAT16 ? float_of((uint32_t)half << 16) : from_float16(half);
}

#ifdef X86

TARGET_AVX2 INLINE __m256 load_avx2(const void *x, int64_t i, int32_t dtype) { /* elements i .. i + 7 */
    if (dtype == FLOAT32) return _mm256_loadu_ps((const float *)x + i);
    const __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + i));
    if (dtype == FLOAT16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

TARGET_AVX512 INLINE __m512 load_avx512(const void *x, int64_t i, int32_t dtype) { /* elements i .. i + 15 */
    if (dtype == FLOAT32) return _mm512_loadu_ps((const float *)x + i);
    const __m256i halves = _mm256_loadu_si256((const __m256i *)((const uint16_t *)x + i));
    if (dtype == FLOAT16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

#endif /* X86 */

#ifdef ARM

INLINE float32x4_t load_neon(const void *x, int64_t i, int32_t dtype) { /* elements i .. i + 3 */
    if (dtype == FLOAT32) return vld1q_f32((const float *)x + i);
    const uint16x4_t halves = vld1_u16((const uint16_t *)x + i);
    if (dtype == FLOAT16) return vcvt_f32_f16(vreinterpret_f16_u16(halves));
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(halves), 16));
}

/* NEON looks up bytes, 16 at once. A table of 16 float32 entries becomes four tables of bytes, from the lowest byte of
   each entry to the highest; what they give for 16 codes is put together the same way back. */

INLINE float32x4x4_t scale_neon(const float table[16], float scale) {
    float32x4x4_t entries;
    for (int v = 0; v < 4; v++) entries.val[v] = vmulq_n_f32(vld1q_f32(table + 4 * v), scale);
    return entries;
}

INLINE uint8x16x4_t split_neon(float32x4x4_t entries) {
    uint16x8_t half[4];
    for (int v = 0; v < 4; v++) half[v] = vreinterpretq_u16_f32(entries.val[v]);
    const uint16x8x2_t first = vuzpq_u16(half[0], half[1]), second = vuzpq_u16(half[2], half[3]);
    const uint8x16x2_t low = vuzpq_u8(vreinterpretq_u8_u16(first.val[0]), vreinterpretq_u8_u16(second.val[0]));
    const uint8x16x2_t high = vuzpq_u8(vreinterpretq_u8_u16(first.val[1]), vreinterpretq_u8_u16(second.val[1]));
    return (uint8x16x4_t){{low.val[0], low.val[1], high.val[0], high.val[1]}};
}

INLINE float32x4x4_t lookup_neon(uint8x16x4_t lut, uint8x16_t code) {
    uint8x16_t byte[4];
    for (int b = 0; b < 4; b++) byte[b] = vqtbl1q_u8(lut.val[b], code);
    const uint8x16x2_t low = vzipq_u8(byte[0], byte[1]), high = vzipq_u8(byte[2], byte[3]);
    float32x4x4_t values;
    for (int h = 0; h < 2; h++) {
        const uint16x8x2_t eight = vzipq_u16(vreinterpretq_u16_u8(low.val[h]), vreinterpretq_u16_u8(high.val[h]));
        for (int v = 0; v < 2; v++) values.val[2 * h + v] = vreinterpretq_f32_u16(eight.val[v]);
    }
    return values;
}

#endif /* ARM */

/* Scales, decoded: of a block, of many blocks, and of units, the 64 codes that a product takes at a time. A block is 2^shift
   units, and crosses any number of rows.

   Decoding one scale takes as long as multiplying some 16 codes, so it is worth vector instructions. */

/* The scale of one block; double-quantized scales are decoded here, two roundings as in the reference. Any NaN
   becomes the plain one, whose low bits are 0: then rounding by addition keeps it a NaN. */
INLINE float scale_of(const packed_tensor *q, int64_t block) {
    float scale;
    if (q->nested_absmax) {
        scale = q->dynamic[((const uint8_t *)q->absmax)[block]] * q->nested_absmax[block / NESTED_BLOCK_SIZE];
        scale += *q->nested_offset;
    } else {
        scale = ((const float *)q->absmax)[block];
    }
    return scale == scale ? scale : NAN;
}

/* The same of `count` blocks from `first` on. */
static void scales_of(const packed_tensor *q, int64_t first, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i++) out[i] = scale_of(q, first + i);
}

/* out holds the scales of the blocks from `block` on, and gets those of the units from `first` on. Right to left: what
   becomes out[u] stands there or further left. */
INLINE void spread_one(float *out, int64_t u, int64_t first, int64_t block, int shift) {
    out[u] = out[((first + u) >> shift) - block];
}

static void spread_plain(float *out, int64_t count, int64_t first, int64_t block, int shift) {
    while (count-- > 0) spread_one(out, count, first, block, shift);
}

#ifdef X86

/* 8 (16) units in a row touch at most 8 (16) blocks in a row, from `left` on: one load has their scales, one permutation
   spreads them. */

TARGET_AVX2 static void spread_avx2(float *out, int64_t count, int64_t first, int64_t block, int shift) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (; count >= 8; count -= 8) {
        const int64_t unit = first + count - 8, left = unit >> shift;
        const __m256i units = _mm256_add_epi32(lanes, _mm256_set1_epi32((int32_t)(unit - (left << shift))));
        const __m256i which = _mm256_srl_epi32(units, _mm_cvtsi32_si128(shift));
        const __m256 scales = _mm256_loadu_ps(out + left - block);
        _mm256_storeu_ps(out + count - 8, _mm256_permutevar8x32_ps(scales, which));
    }
    while (count-- > 0) spread_one(out, count, first, block, shift);
}

TARGET_AVX512 static void spread_avx512(float *out, int64_t count, int64_t first, int64_t block, int shift) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; count >= 16; count -= 16) {
        const int64_t unit = first + count - 16, left = unit >> shift;
        const __m512i units = _mm512_add_epi32(lanes, _mm512_set1_epi32((int32_t)(unit - (left << shift))));
        const __m512i which = _mm512_srl_epi32(units, _mm_cvtsi32_si128(shift));
        const __m512 scales = _mm512_loadu_ps(out + left - block);
        _mm512_storeu_ps(out + count - 16, _mm512_permutexvar_ps(which, scales));
    }
    while (count-- > 0) spread_one(out, count, first, block, shift);
}

/* As scales_of, 16 at a time where 16 are left and share one nested scale. (No masked loads for the rest: the address
   sanitizer does not see them.) */
TARGET_AVX512 static void scales_avx512(const packed_tensor *q, int64_t first, int64_t count, float *out) {
    for (int64_t i = 0; i < count;) {
        const int64_t block = first + i;
        if (count - i < 16 || block % NESTED_BLOCK_SIZE > NESTED_BLOCK_SIZE - 16) {
            out[i++] = scale_of(q, block);
            continue;
        }
        __m512 scale;
        if (q->nested_absmax) {
            const __m128i codes = _mm_loadu_si128((const __m128i *)((const uint8_t *)q->absmax + block));
            scale = _mm512_i32gather_ps(_mm512_cvtepu8_epi32(codes), q->dynamic, 4);
            scale = _mm512_mul_ps(scale, _mm512_set1_ps(q->nested_absmax[block / NESTED_BLOCK_SIZE]));
            scale = _mm512_add_ps(scale, _mm512_set1_ps(*q->nested_offset));
        } else {
            scale = _mm512_loadu_ps((const float *)q->absmax + block);
        }
        scale = _mm512_mask_mov_ps(scale, _mm512_cmp_ps_mask(scale, scale, _CMP_UNORD_Q), _mm512_set1_ps(NAN));
        _mm512_storeu_ps(out + i, scale);
        i += 16;
    }
}

#endif /* X86 */

/* The scale of each of `count` units from `first` on. */
static void scales_of_units(const packed_tensor *q, int32_t isa, int64_t first, int64_t count, int shift, float *out) {
    const int64_t block = first >> shift, blocks = ((first + count - 1) >> shift) - block + 1;
#ifdef X86
    if (isa >= AVX512) {
        scales_avx512(q, block, blocks, out);
        if (shift) spread_avx512(out, count, first, block, shift);
        return;
    }
    if (isa == AVX2) {
        scales_of(q, block, blocks, out);
        if (shift) spread_avx2(out, count, first, block, shift);
        return;
    }
#endif
    (void)isa;
    scales_of(q, block, blocks, out);
    if (shift) spread_plain(out, count, first, block, shift);
}
