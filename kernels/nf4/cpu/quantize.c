/* 4-bit block quantization:   absmax = max |w| of the block,  code = nearest(table, w / absmax)

   The bits are those of reference.py: w is multiplied by the float32 reciprocal of absmax, the ragged last block
   divides, and a code is the number of thresholds strictly below the result (then mapped: FP4's table is not in
   ascending order).

   Counting 15 thresholds takes 15 comparisons; finding the place among them takes 4, one per bit. The thresholds
   form a binary tree, and the path taken so far, at most 3 bits, is the index into a register that holds one level
   of it:

       level 0        t7                      path = x > level0[0]
       level 1     t3     t11                 path |= (x > level1[path]) << 1
       level 2   t1  t5  t9  t13              path |= (x > level2[path]) << 2
       level 3  t0 t2 t4 ...  t14             path |= (x > level3[path]) << 3      code = codes[path]

   The first decision is bit 0 of the path, so that no index exceeds the 8 lanes of AVX2. No branch, any table.

   Magnitudes are compared as integers, in which order is the same, infinity is above every number and every NaN is
   above infinity: so the largest of a tensor tells whether all of it is finite. */

typedef struct {
    const void *w;            /* [numel] */
    const float *thresholds;  /* [15], ascending */
    const uint8_t *codes;     /* [16], of the intervals between them */
    uint8_t *packed;          /* [ceil(numel / 2)] */
    float *absmax;            /* [ceil(numel / block_size)] */
    int64_t numel, block_size;
    int32_t dtype, isa, threads;
} quantize_args;

typedef struct {
    float level[4][16]; /* padded to a register */
    int32_t code[16];   /* of each path */
    uint8_t byte[16];   /* the same */
} decision_tree;

static decision_tree grow(const quantize_args *a) {
    decision_tree tree = {0};
    for (int path = 0; path < 16; path++) {
        const int place = (path & 1) << 3 | (path & 2) << 1 | (path & 4) >> 1 | (path & 8) >> 3; /* bits reversed */
        tree.code[path] = tree.byte[path] = a->codes[place];
        for (int l = 0; l < 4; l++) /* the first l bits of the path led here */
            if (path < 1 << l) tree.level[l][path] = a->thresholds[place + (8 >> l) - 1];
    }
    return tree;
}

static const float TINY = 1e-38f; /* reference.py */
static const uint32_t INFINITY_BITS = 0x7f800000, MAGNITUDE = 0x7fffffff;

INLINE uint32_t larger(uint32_t a, uint32_t b) {
    return a > b ? a : b;
}

/* What one block is multiplied by. Stores its absmax; `largest` is the bits of it. */
INLINE float begin_block(const quantize_args *a, int64_t block, uint32_t largest) {
    const float absmax = float_of(largest);
    a->absmax[block] = absmax;
    return 1.0f / (absmax < TINY ? TINY : absmax);
}

/* Scalar, and the ragged last block at every ISA. */

INLINE uint8_t code_of(const decision_tree *tree, float x) {
    int path = 0;
    for (int l = 0; l < 4; l++) path |= (x > tree->level[l][path]) << l;
    return tree->byte[path];
}

static uint32_t magnitude_of(const void *w, int64_t start, int64_t end, int32_t dtype) {
    uint32_t largest = 0;
    for (int64_t i = start; i < end; i++) largest = larger(largest, bits_of(load(w, i, dtype)) & MAGNITUDE);
    return largest;
}

static uint32_t quantize_scalar(const quantize_args *a, const decision_tree *tree, int64_t first, int64_t last) {
    uint32_t overall = 0;
    const int32_t dtype = a->dtype;
    for (int64_t block = first; block < last; block++) {
        const int64_t start = block * a->block_size, end = start + a->block_size;
        const uint32_t largest = magnitude_of(a->w, start, end, dtype);
        overall = larger(overall, largest);
        const float factor = begin_block(a, block, largest);
        for (int64_t i = start; i < end; i += 2) {
            const uint8_t high = code_of(tree, load(a->w, i, dtype) * factor);
            a->packed[i / 2] = (uint8_t)(high << 4 | code_of(tree, load(a->w, i + 1, dtype) * factor));
        }
    }
    return overall;
}

static uint32_t quantize_ragged(const quantize_args *a, const decision_tree *tree, int64_t block) {
    const int64_t start = block * a->block_size, end = a->numel;
    const uint32_t largest = magnitude_of(a->w, start, end, a->dtype);
    const float absmax = float_of(largest) < TINY ? TINY : float_of(largest);
    a->absmax[block] = absmax;
    for (int64_t i = start; i < end; i += 2) {
        const uint8_t high = code_of(tree, load(a->w, i, a->dtype) / absmax);
        const float second = i + 1 < end ? load(a->w, i + 1, a->dtype) / absmax : 0.0f; /* an odd count pads with 0 */
        a->packed[i / 2] = (uint8_t)(high << 4 | code_of(tree, second));
    }
    return largest;
}

#ifdef X86

/* AVX2. */

TARGET_AVX2 INLINE __m256i path_avx2(const decision_tree *tree, __m256 x) {
    const __m256 top = _mm256_set1_ps(tree->level[0][0]);
    __m256i path = _mm256_srli_epi32(_mm256_castps_si256(_mm256_cmp_ps(x, top, _CMP_GT_OQ)), 31);
    for (int l = 1; l < 4; l++) {
        const __m256 threshold = _mm256_permutevar8x32_ps(_mm256_loadu_ps(tree->level[l]), path);
        const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(x, threshold, _CMP_GT_OQ));
        path = _mm256_or_si256(path, _mm256_and_si256(above, _mm256_set1_epi32(1 << l)));
    }
    return path;
}

TARGET_AVX2 static uint32_t quantize_avx2(const quantize_args *a, const decision_tree *tree, int64_t first, int64_t last) {
    const int32_t dtype = a->dtype;
    const __m256i magnitude = _mm256_set1_epi32((int32_t)MAGNITUDE);
    const __m256i codes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)tree->byte));
    uint32_t overall = 0;
    for (int64_t block = first; block < last; block++) {
        const int64_t start = block * a->block_size, end = start + a->block_size;
        __m256i most = _mm256_setzero_si256();
        for (int64_t i = start; i < end; i += 8)
            most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(load_avx2(a->w, i, dtype)), magnitude));
        uint32_t lanes[8], largest = 0;
        _mm256_storeu_si256((__m256i *)lanes, most);
        for (int l = 0; l < 8; l++) largest = larger(largest, lanes[l]);
        overall = larger(overall, largest);
        const __m256 factor = _mm256_set1_ps(begin_block(a, block, largest));
        for (int64_t i = start; i < end; i += 32) {
            __m256i path[4];
            for (int p = 0; p < 4; p++) path[p] = path_avx2(tree, _mm256_mul_ps(load_avx2(a->w, i + 8 * p, dtype), factor));
            /* 32 paths to bytes; packing works within 128-bit halves, so 4-byte groups come out as 0 2 4 6 1 3 5 7 */
            const __m256i words0 = _mm256_packs_epi32(path[0], path[1]), words1 = _mm256_packs_epi32(path[2], path[3]);
            const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(words0, words1), order);
            const __m256i code = _mm256_shuffle_epi8(codes, bytes);
            const __m256i pairs = _mm256_maddubs_epi16(code, _mm256_set1_epi16(0x0110)); /* 16 * even + odd */
            const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
            _mm_storeu_si128((__m128i *)(a->packed + i / 2), _mm256_castsi256_si128(packed));
        }
    }
    return overall;
}

/* AVX-512. */

TARGET_AVX512 INLINE __m512i path_avx512(const decision_tree *tree, __m512 x) {
    __m512i path = _mm512_setzero_si512();
    for (int l = 0; l < 4; l++) {
        const __m512 threshold = _mm512_permutexvar_ps(path, _mm512_loadu_ps(tree->level[l]));
        const __mmask16 above = _mm512_cmp_ps_mask(x, threshold, _CMP_GT_OQ);
        path = _mm512_mask_or_epi32(path, above, path, _mm512_set1_epi32(1 << l));
    }
    return path;
}

TARGET_AVX512 static uint32_t quantize_avx512(const quantize_args *a, const decision_tree *tree, int64_t first, int64_t last) {
    const int32_t dtype = a->dtype;
    const __m512i magnitude = _mm512_set1_epi32((int32_t)MAGNITUDE), codes = _mm512_loadu_si512(tree->code);
    uint32_t overall = 0;
    for (int64_t block = first; block < last; block++) {
        const int64_t start = block * a->block_size, end = start + a->block_size;
        __m512i most = _mm512_setzero_si512();
        for (int64_t i = start; i < end; i += 16)
            most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(load_avx512(a->w, i, dtype)), magnitude));
        const uint32_t largest = (uint32_t)_mm512_reduce_max_epi32(most);
        overall = larger(overall, largest);
        const __m512 factor = _mm512_set1_ps(begin_block(a, block, largest));
        for (int64_t i = start; i < end; i += 16) {
            const __m512i path = path_avx512(tree, _mm512_mul_ps(load_avx512(a->w, i, dtype), factor));
            const __m512i code = _mm512_permutexvar_epi32(path, codes);
            /* A 64-bit lane holds an even element's code in its low half, the odd one's in its high half. */
            const __m512i pair = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
            _mm_storel_epi64((__m128i *)(a->packed + i / 2), _mm512_cvtepi64_epi8(pair));
        }
    }
    return overall;
}

#endif /* X86 */

#ifdef ARM

/* NEON. A 32-bit lane holds the places of the 4 bytes of level[path], which are 4 * path + 0, 1, 2 and 3. */

INLINE uint32x4_t places_neon(const decision_tree *tree, float32x4_t x) {
    uint32x4_t places = vdupq_n_u32(0x03020100), bit = vdupq_n_u32(0x04040404); /* bit 0 of the path, in each byte */
    for (int l = 0; l < 4; l++, bit = vshlq_n_u32(bit, 1)) {
        const uint8_t *const level = (const uint8_t *)tree->level[l];
        const uint8x16x2_t bytes = {{vld1q_u8(level), vld1q_u8(level + 16)}}; /* of its 8 entries or fewer */
        const float32x4_t threshold = vreinterpretq_f32_u8(vqtbl2q_u8(bytes, vreinterpretq_u8_u32(places)));
        places = vorrq_u32(places, vandq_u32(vcgtq_f32(x, threshold), bit));
    }
    return places;
}

INLINE uint8x16_t codes_neon(const decision_tree *tree, const void *w, int64_t i, int32_t dtype, float factor) { /* of 16 */
    uint16x8_t places[4];
    for (int p = 0; p < 4; p++)
        places[p] = vreinterpretq_u16_u32(places_neon(tree, vmulq_n_f32(load_neon(w, i + 4 * p, dtype), factor)));
    const uint8x16_t low = vreinterpretq_u8_u16(vuzp1q_u16(places[0], places[1]));
    const uint8x16_t high = vreinterpretq_u8_u16(vuzp1q_u16(places[2], places[3]));
    const uint8x16_t path = vshrq_n_u8(vuzp1q_u8(low, high), 2); /* the first byte of every lane was 4 * path */
    return vqtbl1q_u8(vld1q_u8(tree->byte), path);
}

static uint32_t quantize_neon(const quantize_args *a, const decision_tree *tree, int64_t first, int64_t last) {
    const int32_t dtype = a->dtype;
    uint32_t overall = 0;
    for (int64_t block = first; block < last; block++) {
        const int64_t start = block * a->block_size, end = start + a->block_size;
        uint32x4_t most = vdupq_n_u32(0);
        for (int64_t i = start; i < end; i += 4) {
            const uint32x4_t bits = vreinterpretq_u32_f32(load_neon(a->w, i, dtype));
            most = vmaxq_u32(most, vandq_u32(bits, vdupq_n_u32(MAGNITUDE)));
        }
        const uint32_t largest = vmaxvq_u32(most);
        overall = larger(overall, largest);
        const float factor = begin_block(a, block, largest);
        for (int64_t i = start; i < end; i += 32) {
            const uint8x16_t first16 = codes_neon(tree, a->w, i, dtype, factor);
            const uint8x16_t second16 = codes_neon(tree, a->w, i + 16, dtype, factor);
            const uint8x16_t even = vuzp1q_u8(first16, second16), odd = vuzp2q_u8(first16, second16);
            vst1q_u8(a->packed + i / 2, vsliq_n_u8(odd, even, 4)); /* 16 * even + odd */
        }
    }
    return overall;
}

#endif /* ARM */

typedef uint32_t (*quantize_blocks)(const quantize_args *, const decision_tree *, int64_t first, int64_t last);

static quantize_blocks choose_quantize(const quantize_args *a) {
#ifdef X86
    if (a->isa >= AVX512) return quantize_avx512;
    if (a->isa == AVX2) return quantize_avx2;
#endif
#ifdef ARM
    if (a->isa == NEON) return quantize_neon;
#endif
    return quantize_scalar;
}

/* Returns whether all of w is finite. */
int32_t qlorag_nf4_quantize(const quantize_args *a) {
    const quantize_blocks run = choose_quantize(a);
    const decision_tree tree = grow(a);
    const int64_t blocks = a->numel / a->block_size; /* whole ones */
    const int64_t step = TASK / a->block_size, tasks = (blocks + step - 1) / step;
    uint32_t largest = 0;
#pragma omp parallel for schedule(static) num_threads(a->threads) if (tasks > 1 && a->threads > 1) reduction(max : largest)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t first = task * step;
        largest = larger(largest, run(a, &tree, first, least(first + step, blocks)));
    }
    if (a->numel % a->block_size) largest = larger(largest, quantize_ragged(a, &tree, blocks));
    return largest < INFINITY_BITS;
}

/* Double quantization: 8-bit codes of absmax - offset, in blocks of 256, from the grid of codebook.dynamic_grid.
   Every operation rounds where the reference does. A 64th of the work of the above, so one thread and no intrinsics. */
void qlorag_nf4_quantize_absmax(const float *absmax, const float *offset, const uint8_t *grid, int64_t count, uint8_t *codes,
                                float *nested) {
    for (int64_t start = 0; start < count; start += NESTED_BLOCK_SIZE) {
        const int64_t n = least(count - start, NESTED_BLOCK_SIZE);
        float centred[NESTED_BLOCK_SIZE];
        uint32_t largest = 0;
        for (int64_t i = 0; i < n; i++) {
            centred[i] = absmax[start + i] - *offset;
            largest = larger(largest, bits_of(centred[i]) & MAGNITUDE);
        }
        nested[start / NESTED_BLOCK_SIZE] = float_of(largest);
        const float factor = 1.0f / float_of(largest);
        int32_t place[NESTED_BLOCK_SIZE];
        for (int64_t i = 0; i < n; i++) {
            float x = centred[i] * factor;
            x = x > -1.0f ? x : -1.0f; /* 0 * infinity, where all scales are equal, is NaN and goes to -1 too */
            x = x < 1.0f ? x : 1.0f;
            place[i] = (int32_t)((x + 1.0f) * 0.5f * 65535.0f + 0.5f);
        }
        for (int64_t i = 0; i < n; i++) codes[start + i] = grid[place[i]];
    }
}
