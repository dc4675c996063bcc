/* 4-bit block dequantization:   out[i] = round(table[code[i]] * absmax[i / block_size])

   One idea serves every output type and instruction set. A block has one scale and 16 codes, so it has only 16
   possible results. Multiply the 16 table entries by the block's absmax, round those 16 once to the output type,
   and what is left per element is a lookup in a register, with no arithmetic:

       float32           16 entries x 4 bytes = one 512-bit register      vpermps (AVX-512), 2 x vpermps (AVX2)
       float16, bfloat16 16 entries x 2 bytes                             vpermw  (AVX-512), 2 x vpshufb (AVX2)

   NEON has 128-bit registers and a lookup by bytes: 4 tables of 16 bytes for float32, 2 for the others.

   Rounding the entry is rounding the element, so the result is bit-equal to reference.py: the product is float32
   and is rounded once, to nearest even. This needs -ffp-contract=off, since a fused multiply-add in the decoding
   of double-quantized scales would have other bits.

   The vector loops run over whole 32 elements (16 bytes) and never read past a block; the rest of a ragged last
   block is scalar. */

typedef struct {
    packed_tensor q;
    void *out;                   /* [numel] */
    int32_t dtype, isa, threads;
    int32_t stream;              /* write past the caches: see STREAM_BYTES in calls.py */
} dequantize_args;

INLINE int64_t length_of(const dequantize_args *a, int64_t block) {
    return least(a->q.numel - block * a->q.block_size, a->q.block_size);
}

/* Scalar. */

static void lookup_32(const uint8_t *packed, const float *lut, float *out, int64_t n) {
    for (int64_t i = 0; i < n / 2; i++) {
        out[2 * i] = lut[packed[i] >> 4];
        out[2 * i + 1] = lut[packed[i] & 15];
    }
    if (n & 1) out[n - 1] = lut[packed[n / 2] >> 4];
}

static void lookup_16(const uint8_t *packed, const uint16_t *lut, uint16_t *out, int64_t n) {
    for (int64_t i = 0; i < n / 2; i++) {
        out[2 * i] = lut[packed[i] >> 4];
        out[2 * i + 1] = lut[packed[i] & 15];
    }
    if (n & 1) out[n - 1] = lut[packed[n / 2] >> 4];
}

/* n elements of one block from `start` on, which is even. */
static void lookup(const dequantize_args *a, float scale, int64_t start, int64_t n) {
    float entries[16];
    for (int c = 0; c < 16; c++) entries[c] = a->q.table[c] * scale;
    if (a->dtype == FLOAT32) {
        lookup_32(a->q.packed + start / 2, entries, (float *)a->out + start, n);
    } else {
        uint16_t halves[16];
        for (int c = 0; c < 16; c++) halves[c] = to_half(entries[c], a->dtype);
        lookup_16(a->q.packed + start / 2, halves, (uint16_t *)a->out + start, n);
    }
}

static void blocks_scalar(const dequantize_args *a, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++)
        lookup(a, scale_of(&a->q, block), block * a->q.block_size, length_of(a, block));
}

#ifdef X86

/* AVX2. */

/* 8 x float32 -> 8 x bfloat16 in the low half of each 32-bit lane */
TARGET_AVX2 static inline __m256i bfloat16_avx2(__m256 x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), even), 16);
}

TARGET_AVX2 static void blocks_32_avx2(const dequantize_args *a, int64_t first, int64_t last) {
    const __m256 table_low = _mm256_loadu_ps(a->q.table), table_high = _mm256_loadu_ps(a->q.table + 8);
    const __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24); /* of 8 nibbles in a dword, in order */
    for (int64_t block = first; block < last; block++) {
        const int64_t start = block * a->q.block_size, n = length_of(a, block), whole = n & ~(int64_t)31;
        const uint8_t *packed = a->q.packed + start / 2;
        float *out = (float *)a->out + start;
        const float scale = scale_of(&a->q, block);
        const __m256 low = _mm256_mul_ps(table_low, _mm256_set1_ps(scale));
        const __m256 high = _mm256_mul_ps(table_high, _mm256_set1_ps(scale));
        for (int64_t i = 0; i < whole; i += 8) {
            int32_t word;
            memcpy(&word, packed + i / 2, 4);
            const __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
            const __m256 in_high = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)); /* bit 3 becomes the sign */
            const __m256 from_low = _mm256_permutevar8x32_ps(low, code), from_high = _mm256_permutevar8x32_ps(high, code);
            const __m256 values = _mm256_blendv_ps(from_low, from_high, in_high);
            if (a->stream) _mm256_stream_ps(out + i, values);
            else _mm256_storeu_ps(out + i, values);
        }
        if (whole < n) lookup(a, scale, start + whole, n - whole);
    }
}

TARGET_AVX2 static void blocks_16_avx2(const dequantize_args *a, int64_t first, int64_t last) {
    const __m256 table_low = _mm256_loadu_ps(a->q.table), table_high = _mm256_loadu_ps(a->q.table + 8);
    const __m128i bytes = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    for (int64_t block = first; block < last; block++) {
        const int64_t start = block * a->q.block_size, n = length_of(a, block), whole = n & ~(int64_t)31;
        const uint8_t *packed = a->q.packed + start / 2;
        uint16_t *out = (uint16_t *)a->out + start;
        const float scale = scale_of(&a->q, block);
        const __m256 low = _mm256_mul_ps(table_low, _mm256_set1_ps(scale));
        const __m256 high = _mm256_mul_ps(table_high, _mm256_set1_ps(scale));
        __m128i lut_low, lut_high; /* entries 0..7 and 8..15, 16 bits each */
        if (a->dtype == BFLOAT16) {
            const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(bfloat16_avx2(low), bfloat16_avx2(high)), 0xd8);
            lut_low = _mm256_castsi256_si128(both);
            lut_high = _mm256_extracti128_si256(both, 1);
        } else {
            lut_low = _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT);
            lut_high = _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT);
        }
        /* vpshufb looks up bytes: one table of the 16 low bytes, one of the 16 high bytes. */
        const __m128i split_low = _mm_shuffle_epi8(lut_low, bytes), split_high = _mm_shuffle_epi8(lut_high, bytes);
        const __m256i lut_byte0 = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(split_low, split_high));
        const __m256i lut_byte1 = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(split_low, split_high));
        for (int64_t i = 0; i < whole; i += 32) {
            const __m256i pair = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(packed + i / 2)));
            const __m256i code = /* 32 bytes, one code each, in order */
                _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(pair, 4), _mm256_slli_epi16(pair, 8)), _mm256_set1_epi8(15));
            const __m256i byte0 = _mm256_shuffle_epi8(lut_byte0, code), byte1 = _mm256_shuffle_epi8(lut_byte1, code);
            const __m256i a0 = _mm256_unpacklo_epi8(byte0, byte1), a1 = _mm256_unpackhi_epi8(byte0, byte1);
            const __m256i values0 = _mm256_permute2x128_si256(a0, a1, 0x20);
            const __m256i values1 = _mm256_permute2x128_si256(a0, a1, 0x31);
            if (a->stream) {
                _mm256_stream_si256((__m256i *)(out + i), values0);
                _mm256_stream_si256((__m256i *)(out + i + 16), values1);
            } else {
                _mm256_storeu_si256((__m256i *)(out + i), values0);
                _mm256_storeu_si256((__m256i *)(out + i + 16), values1);
            }
        }
        if (whole < n) lookup(a, scale, start + whole, n - whole);
    }
}

/* AVX-512 (F, BW, VL, DQ). */

enum { SCALES = 64 }; /* decoded at a time */

/* 16 x float32 -> 16 lanes of 32 bits, each holding its bfloat16 (or float16) in both halves */
TARGET_AVX512 static inline __m512i twice_bfloat16(__m512 x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), even);
    return _mm512_shuffle_epi8(rounded, _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15)));
}

TARGET_AVX512 static inline __m512i twice_float16(__m512 x) {
    const __m512i once = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
    return _mm512_or_si512(once, _mm512_slli_epi32(once, 16));
}

TARGET_AVX512 static void blocks_32_avx512(const dequantize_args *a, int64_t first, int64_t last) {
    const __m512 table = _mm512_loadu_ps(a->q.table);
    const __m512i shifts = _mm512_broadcast_i64x4(_mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24)); /* of nibbles, in order */
    float scales[SCALES];
    for (int64_t block = first; block < last; block++) {
        const int64_t start = block * a->q.block_size, n = length_of(a, block), whole = n & ~(int64_t)31;
        const uint8_t *packed = a->q.packed + start / 2;
        float *out = (float *)a->out + start;
        const int64_t ahead = (block - first) % SCALES;
        if (ahead == 0) scales_avx512(&a->q, block, least(last - block, SCALES), scales);
        const float scale = scales[ahead];
        const __m512 lut = _mm512_mul_ps(table, _mm512_set1_ps(scale));
        for (int64_t i = 0; i < whole; i += 16) {
            /* 8 lanes of one dword, 8 of the next; each shifts its own nibble down. vpermps reads the lowest 4 bits. */
            int32_t words[2];
            memcpy(words, packed + i / 2, 8);
            const __m512i word = _mm512_mask_set1_epi32(_mm512_set1_epi32(words[0]), 0xff00, words[1]);
            const __m512i code = _mm512_srlv_epi32(word, shifts);
            const __m512 values = _mm512_permutexvar_ps(code, lut);
            if (a->stream) _mm512_stream_ps(out + i, values);
            else _mm512_storeu_ps(out + i, values);
        }
        if (whole < n) lookup(a, scale, start + whole, n - whole);
    }
}

TARGET_AVX512 static void blocks_16_avx512(const dequantize_args *a, int64_t first, int64_t last) {
    const __m512 table = _mm512_loadu_ps(a->q.table);
    const __m512i shifts = _mm512_set1_epi32(7 << 16 | 11);
    /* 128-bit part p of the register takes bytes 4p .. 4p + 3, each four times: two lanes, both halves. */
    const __m512i four = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
    const __m512i part = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_inserti128_si256(_mm256_setzero_si256(), _mm_set1_epi8(4), 1)),
                                            _mm256_inserti128_si256(_mm256_set1_epi8(8), _mm_set1_epi8(12), 1), 1);
    const __m512i twice = _mm512_add_epi8(four, part);
    float scales[SCALES];
    for (int64_t block = first; block < last; block++) {
        const int64_t start = block * a->q.block_size, n = length_of(a, block), whole = n & ~(int64_t)31;
        const uint8_t *packed = a->q.packed + start / 2;
        uint16_t *out = (uint16_t *)a->out + start;
        const int64_t ahead = (block - first) % SCALES;
        if (ahead == 0) scales_avx512(&a->q, block, least(last - block, SCALES), scales);
        const float scale = scales[ahead];
        const __m512 scaled = _mm512_mul_ps(table, _mm512_set1_ps(scale));
        const __m512i lut = a->dtype == BFLOAT16 ? twice_bfloat16(scaled) : twice_float16(scaled);
        for (int64_t i = 0; i < whole; i += 32) {
            /* Byte b goes to the high half of two 16-bit lanes, which shift their own nibble down to bits 1 to 4.
               vpermw reads 5 bits; bit 0 may be anything, because every entry stands twice. */
            const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(packed + i / 2)));
            const __m512i code = _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, twice), shifts);
            const __m512i values = _mm512_permutexvar_epi16(code, lut);
            if (a->stream) _mm512_stream_si512((__m512i *)(out + i), values);
            else _mm512_storeu_si512(out + i, values);
        }
        if (whole < n) lookup(a, scale, start + whole, n - whole);
    }
}

#endif /* X86 */

#ifdef ARM

/* NEON. Nothing is streamed: the processors that have it see long runs of stores by themselves. */

static void blocks_32_neon(const dequantize_args *a, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) {
        const int64_t start = block * a->q.block_size, n = length_of(a, block), whole = n & ~(int64_t)31;
        const uint8_t *packed = a->q.packed + start / 2;
        float *out = (float *)a->out + start;
        const float scale = scale_of(&a->q, block);
        const uint8x16x4_t lut = split_neon(scale_neon(a->q.table, scale));
        for (int64_t i = 0; i < whole; i += 32) {
            const uint8x16_t pair = vld1q_u8(packed + i / 2);
            const uint8x16x2_t code = vzipq_u8(vshrq_n_u8(pair, 4), vandq_u8(pair, vdupq_n_u8(15))); /* in order */
            for (int h = 0; h < 2; h++) {
                const float32x4x4_t values = lookup_neon(lut, code.val[h]);
                for (int v = 0; v < 4; v++) vst1q_f32(out + i + 16 * h + 4 * v, values.val[v]);
            }
        }
        if (whole < n) lookup(a, scale, start + whole, n - whole);
    }
}

/* 4 x float32 -> 4 x bfloat16 (or float16) */
INLINE uint16x4_t half_neon(float32x4_t x, int32_t dtype) {
    if (dtype == FLOAT16) return vreinterpret_u16_f16(vcvt_f16_f32(x));
    const uint32x4_t u = vreinterpretq_u32_f32(x);
    const uint32x4_t even = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    return vaddhn_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), even); /* the high halves of the sums */
}

static void blocks_16_neon(const dequantize_args *a, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) {
        const int64_t start = block * a->q.block_size, n = length_of(a, block), whole = n & ~(int64_t)31;
        const uint8_t *packed = a->q.packed + start / 2;
        uint16_t *out = (uint16_t *)a->out + start;
        const float scale = scale_of(&a->q, block);
        const float32x4x4_t scaled = scale_neon(a->q.table, scale);
        uint16x4_t half[4];
        for (int v = 0; v < 4; v++) half[v] = half_neon(scaled.val[v], a->dtype);
        const uint8x16_t entries0 = vreinterpretq_u8_u16(vcombine_u16(half[0], half[1]));
        const uint8x16_t entries1 = vreinterpretq_u8_u16(vcombine_u16(half[2], half[3]));
        const uint8x16x2_t lut = vuzpq_u8(entries0, entries1); /* the low bytes, the high bytes */
        for (int64_t i = 0; i < whole; i += 32) {
            const uint8x16_t pair = vld1q_u8(packed + i / 2);
            const uint8x16_t even = vshrq_n_u8(pair, 4), odd = vandq_u8(pair, vdupq_n_u8(15));
            const uint8x16x4_t values = {{vqtbl1q_u8(lut.val[0], even), vqtbl1q_u8(lut.val[1], even),
                                          vqtbl1q_u8(lut.val[0], odd), vqtbl1q_u8(lut.val[1], odd)}};
            vst4q_u8((uint8_t *)(out + i), values); /* one byte of each in turn */
        }
        if (whole < n) lookup(a, scale, start + whole, n - whole);
    }
}

#endif /* ARM */

typedef void (*dequantize_blocks)(const dequantize_args *, int64_t first, int64_t last);

static dequantize_blocks choose_dequantize(const dequantize_args *a) {
#ifdef X86
    if (a->isa >= AVX512) return a->dtype == FLOAT32 ? blocks_32_avx512 : blocks_16_avx512;
    if (a->isa == AVX2) return a->dtype == FLOAT32 ? blocks_32_avx2 : blocks_16_avx2;
#endif
#ifdef ARM
    if (a->isa == NEON) return a->dtype == FLOAT32 ? blocks_32_neon : blocks_16_neon;
#endif
    return blocks_scalar;
}

void qlorag_nf4_dequantize(const dequantize_args *a) {
    const dequantize_blocks run = choose_dequantize(a);
    const int64_t blocks = (a->q.numel + a->q.block_size - 1) / a->q.block_size;
    const int64_t step = TASK / a->q.block_size;
    const int64_t tasks = (blocks + step - 1) / step;
#pragma omp parallel for schedule(static) num_threads(a->threads) if (tasks > 1 && a->threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t first = task * step;
        run(a, first, least(first + step, blocks));
#ifdef X86
        if (a->stream) _mm_sfence(); /* streamed stores become visible before the threads meet */
#endif
    }
}
