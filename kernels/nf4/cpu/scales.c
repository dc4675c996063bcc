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
static void scales_of_units(const packed_tensor *q, int32_t level, int64_t first, int64_t count, int shift, float *out) {
    const int64_t block = first >> shift, blocks = ((first + count - 1) >> shift) - block + 1;
#ifdef X86
    if (level >= AVX512) {
        scales_avx512(q, block, blocks, out);
        if (shift) spread_avx512(out, count, first, block, shift);
        return;
    }
    if (level == AVX2) {
        scales_of(q, block, blocks, out);
        if (shift) spread_avx2(out, count, first, block, shift);
        return;
    }
#endif
    (void)level;
    scales_of(q, block, blocks, out);
    if (shift) spread_plain(out, count, first, block, shift);
}
