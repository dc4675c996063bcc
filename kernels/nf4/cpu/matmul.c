/* y = x Wᵀ for a few rows of x in float32 or float16, straight from the packed W [N, K]: what writing a text, token by
   token, consists of. (For most of bfloat16 see fixed.c.)

   The weight is read once and used at once. A decoded copy of it would travel through memory at 4 to 8 times the bytes,
   and the speed of memory is the speed of this operation; so each code is looked up in a register and multiplied there.

   A unit is 64 elements of a row of W, 32 bytes, with one scale: as in dequantize.c, the 16 table entries are multiplied
   by it, and the lookup gives finished float32 weights, the bits that dequantize gives. The bytes are read as 16 words of
   4 nibbles and widened to 16 lanes of 32 bits. Nibble j of a word is its element j ^ 1, because the high nibble comes
   first. A shift by 4j brings it to the bottom of every lane, and vpermps looks at the lowest 4 bits only, so nothing is
   masked off:

       lane                0           1       ...       15
       elements          0 1 2 3     4 5 6 7         60 61 62 63
       word >> 0           1           5       ...       61          these 16 weights meet  x[1], x[5] ... x[61]
       word >> 4           0           4       ...       60                                 x[0], x[4] ... x[60]
       word >> 8           3           7       ...       63                                 x[3], x[7] ... x[63]
       word >> 12          2           6       ...       62                                 x[2], x[6] ... x[62]

   For that, x is permuted once per call, a fraction of the work of one row of W per row of x.

   Conditions, checked in eager.py: K is a multiple of 64, so that each row starts a unit, and block_size is at least 64, so
   that a unit has one scale. Blocks may end anywhere else, also in the middle of a row.

   Sums are float32. Every y[m][n] is summed in an order that depends on K alone: not on threads, nor on the other rows of
   x and W. */

enum { UNIT = 64 };
enum { ROWS = 4, WIDTH = 4 };           /* one pass: up to 4 rows of W times up to 4 rows of x */
enum { MAX_UNITS = 1024 };              /* in a row of W; calls.py: MAX_IN_FEATURES */

typedef struct {
    packed_tensor w;
    int64_t out_features, in_features;
    int32_t isa, denominator; /* of table entries in fixed point, for fixed.c */
} matmul_args;

typedef struct {
    const uint8_t *packed; /* [rows][units][32] */
    const float *scales;   /* [rows][units] */
    const float *table;    /* [16] */
    const float *x;        /* [units][width][4][16], permuted */
    int64_t units;
    float sums[ROWS][WIDTH];
} matmul_pass;

/* Scalar. */

static void pass_scalar(int rows, int width, matmul_pass *p) {
    for (int r = 0; r < rows; r++) {
        float total[WIDTH] = {0}, lut[16];
        for (int64_t u = 0; u < p->units; u++) {
            const uint8_t *bytes = p->packed + (r * p->units + u) * (UNIT / 2);
            for (int c = 0; c < 16; c++) lut[c] = p->table[c] * p->scales[r * p->units + u];
            for (int m = 0; m < width; m++) {
                const float *x = p->x + (u * width + m) * UNIT;
                float part[4] = {0}; /* short sums round less */
                for (int d = 0; d < 16; d++) {
                    part[0] += lut[bytes[2 * d] & 15] * x[d];
                    part[1] += lut[bytes[2 * d] >> 4] * x[16 + d];
                    part[2] += lut[bytes[2 * d + 1] & 15] * x[32 + d];
                    part[3] += lut[bytes[2 * d + 1] >> 4] * x[48 + d];
                }
                total[m] += (part[0] + part[1]) + (part[2] + part[3]);
            }
        }
        for (int m = 0; m < width; m++) p->sums[r][m] = total[m];
    }
}

#ifdef X86

/* AVX2: 8 of the 16 words at a time, each half with sums of its own, and a lookup in two halves of the table. */

TARGET_AVX2 INLINE float add_up_avx2(__m256 eight) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

TARGET_AVX2 INLINE void row_avx2(int r, const int width, matmul_pass *p) {
    const __m256 table_low = _mm256_loadu_ps(p->table), table_high = _mm256_loadu_ps(p->table + 8);
    const uint8_t *packed = p->packed + r * p->units * (UNIT / 2);
    const float *x = p->x, *scales = p->scales + r * p->units;
    __m256 total[WIDTH][2];
    for (int m = 0; m < width; m++) total[m][0] = total[m][1] = _mm256_setzero_ps();
    for (int64_t u = 0; u < p->units; u++, packed += UNIT / 2, x += width * UNIT) {
        const __m256 scale = _mm256_set1_ps(scales[u]);
        const __m256 low = _mm256_mul_ps(table_low, scale), high = _mm256_mul_ps(table_high, scale);
        for (int half = 0; half < 2; half++) {
            const __m256i word = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(packed + 16 * half)));
            for (int j = 0; j < 4; j++) {
                const __m256i code = _mm256_srli_epi32(word, 4 * j);
                const __m256 in_high = _mm256_castsi256_ps(_mm256_slli_epi32(word, 28 - 4 * j)); /* bit 3 is the sign */
                const __m256 value = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code),
                                                      _mm256_permutevar8x32_ps(high, code), in_high);
                for (int m = 0; m < width; m++)
                    total[m][half] = _mm256_fmadd_ps(value, _mm256_load_ps(x + m * UNIT + 16 * j + 8 * half), total[m][half]);
            }
        }
    }
    for (int m = 0; m < width; m++) p->sums[r][m] = add_up_avx2(_mm256_add_ps(total[m][0], total[m][1]));
}

TARGET_AVX2 static void pass_avx2(int rows, int width, matmul_pass *p) { /* each call is inlined with its constant */
    for (int r = 0; r < rows; r++) {
        if (width == 1) row_avx2(r, 1, p);
        if (width == 2) row_avx2(r, 2, p);
        if (width == 3) row_avx2(r, 3, p);
        if (width == 4) row_avx2(r, 4, p);
    }
}

/* AVX-512: 4 rows of W at a time. Then at least 4 sums grow independently, which hides the latency of the addition. */

TARGET_AVX512 INLINE void rows_avx512(int first, const int rows, const int width, matmul_pass *p) {
    const __m512 table = _mm512_loadu_ps(p->table);
    const int64_t units = p->units;
    const uint8_t *packed = p->packed + first * units * (UNIT / 2);
    const float *x = p->x, *scales = p->scales + first * units;
    __m512 total[ROWS][WIDTH], lut[ROWS];
    __m512i word[ROWS];
    for (int r = 0; r < rows; r++)
        for (int m = 0; m < width; m++) total[r][m] = _mm512_setzero_ps();
    for (int64_t u = 0; u < units; u++, packed += UNIT / 2, x += width * UNIT) {
        for (int r = 0; r < rows; r++) {
            word[r] = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(packed + r * units * (UNIT / 2))));
            /* The next rows, which the hardware does not foresee while x streams by; a line is two units. */
            if (u % 2 == 0) PREFETCH(packed, (r + ROWS) * units * (UNIT / 2), _MM_HINT_T0);
            lut[r] = _mm512_mul_ps(table, _mm512_set1_ps(scales[r * units + u]));
        }
        for (int j = 0; j < 4; j++)
            for (int r = 0; r < rows; r++) {
                const __m512 value = _mm512_permutexvar_ps(_mm512_srli_epi32(word[r], 4 * j), lut[r]);
                for (int m = 0; m < width; m++)
                    total[r][m] = _mm512_fmadd_ps(value, _mm512_load_ps(x + m * UNIT + 16 * j), total[r][m]);
            }
    }
    for (int r = 0; r < rows; r++)
        for (int m = 0; m < width; m++) p->sums[first + r][m] = _mm512_reduce_add_ps(total[r][m]);
}

TARGET_AVX512 static void pass_avx512(int rows, int width, matmul_pass *p) {
    if (rows == ROWS) {
        if (width == 1) rows_avx512(0, ROWS, 1, p);
        if (width == 2) rows_avx512(0, ROWS, 2, p);
        if (width == 3) rows_avx512(0, ROWS, 3, p);
        if (width == 4) rows_avx512(0, ROWS, 4, p);
        return;
    }
    for (int r = 0; r < rows; r++) { /* the last rows of W */
        if (width == 1) rows_avx512(r, 1, 1, p);
        if (width == 2) rows_avx512(r, 1, 2, p);
        if (width == 3) rows_avx512(r, 1, 3, p);
        if (width == 4) rows_avx512(r, 1, 4, p);
    }
}

#endif /* X86 */

#ifdef ARM

/* NEON: the two bytes of all 16 words apart, so that a lookup by bytes takes the 16 lanes of one shift at once. Four
   sums per row of x, one for each 4 lanes. */

INLINE void row_neon(int r, const int width, matmul_pass *p) {
    const uint8_t *packed = p->packed + r * p->units * (UNIT / 2);
    const float *x = p->x, *scales = p->scales + r * p->units;
    float32x4_t total[WIDTH][4];
    for (int m = 0; m < width; m++)
        for (int v = 0; v < 4; v++) total[m][v] = vdupq_n_f32(0.0f);
    for (int64_t u = 0; u < p->units; u++, packed += UNIT / 2, x += width * UNIT) {
        const uint8x16x4_t lut = split_neon(scale_neon(p->table, scales[u]));
        const uint8x16x2_t word = vld2q_u8(packed);
        for (int j = 0; j < 4; j++) {
            const uint8x16_t byte = word.val[j / 2], code = j & 1 ? vshrq_n_u8(byte, 4) : vandq_u8(byte, vdupq_n_u8(15));
            const float32x4x4_t value = lookup_neon(lut, code);
            for (int m = 0; m < width; m++)
                for (int v = 0; v < 4; v++)
                    total[m][v] = vfmaq_f32(total[m][v], value.val[v], vld1q_f32(x + m * UNIT + 16 * j + 4 * v));
        }
    }
    for (int m = 0; m < width; m++)
        p->sums[r][m] = vaddvq_f32(vaddq_f32(vaddq_f32(total[m][0], total[m][1]), vaddq_f32(total[m][2], total[m][3])));
}

static void pass_neon(int rows, int width, matmul_pass *p) { /* each call is inlined with its constant */
    for (int r = 0; r < rows; r++) {
        if (width == 1) row_neon(r, 1, p);
        if (width == 2) row_neon(r, 2, p);
        if (width == 3) row_neon(r, 3, p);
        if (width == 4) row_neon(r, 4, p);
    }
}

#endif /* ARM */

/* A block is 2^shift units. */
static int shift_of(const matmul_args *a) {
    int shift = 0;
    while (UNIT << shift < a->w.block_size) shift++;
    return shift;
}

static void store(void *y, int64_t i, float value, int32_t dtype) {
    if (dtype == FLOAT32) ((float *)y)[i] = value;
    else ((uint16_t *)y)[i] = to_half(value, dtype);
}

/* x [rows][K] as the passes read it: for each 4 rows, [units][width][4][16]. */
static void permute(const void *x, int64_t rows, int64_t units, int32_t dtype, float *out) {
    for (int64_t first = 0; first < rows; first += WIDTH) {
        const int64_t width = least(rows - first, WIDTH);
        for (int64_t u = 0; u < units; u++)
            for (int64_t m = 0; m < width; m++, out += UNIT)
                for (int j = 0; j < 4; j++)
                    for (int d = 0; d < 16; d++)
                        out[16 * j + d] = load(x, ((first + m) * units + u) * UNIT + 4 * d + (j ^ 1), dtype);
    }
}

typedef void (*pass_function)(int rows, int width, matmul_pass *);

static pass_function choose_pass(const matmul_args *a) {
#ifdef X86
    if (a->isa >= AVX512) return pass_avx512;
    if (a->isa == AVX2) return pass_avx2;
#endif
#ifdef ARM
    if (a->isa == NEON) return pass_neon;
#endif
    return pass_scalar;
}

/* Products are cheaper by far than waking a thread: 8 tasks are about 30 microseconds on one. */
static int is_worth_threads(const matmul_args *a, int64_t rows, int32_t threads) {
    return threads > 1 && rows * a->out_features * a->in_features >= 8 * TASK;
}

/* x: [rows][K], y: [rows][N], both of dtype. Returns whether there was memory for the permuted x. */
static int32_t matmul_fused(const matmul_args *a, const void *x, void *y, int64_t rows, int32_t dtype, int32_t threads) {
    const int64_t units = a->in_features / UNIT, n = a->out_features, groups = (n + ROWS - 1) / ROWS;
    const pass_function run = choose_pass(a);
    const int shift = shift_of(a);
    float *const permuted = aligned_alloc(64, (size_t)(rows * units * UNIT) * sizeof(float));
    if (!permuted) return 0;
    permute(x, rows, units, dtype, permuted);
    const int parallel = is_worth_threads(a, rows, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
    for (int64_t group = 0; group < groups; group++) {
        const int64_t row = group * ROWS;
        const int count = (int)least(n - row, ROWS);
        float scales[ROWS * MAX_UNITS];
        scales_of_units(&a->w, a->isa, row * units, count * units, shift, scales);
        matmul_pass pass = {a->w.packed + row * units * (UNIT / 2), scales, a->w.table, permuted, units, {{0}}};
        for (int64_t first = 0; first < rows; first += WIDTH) {
            const int width = (int)least(rows - first, WIDTH);
            run(count, width, &pass);
            for (int r = 0; r < count; r++)
                for (int m = 0; m < width; m++) store(y, (first + m) * n + row + r, pass.sums[r][m], dtype);
            pass.x += width * units * UNIT;
        }
    }
    free(permuted);
    return 1;
}
