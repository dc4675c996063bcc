/* y = x Wᵀ for a few rows of bfloat16, in fixed point, straight from the packed W [N, K].

   The product of matmul.c looks up and multiplies numbers of 32 bits. Here both factors are whole numbers of 16 bits, so
   that an instruction multiplies twice as many and adds up pairs of products:

       w = scale * t / D            t = round(D table[code]), the same 16 numbers for all of W; D <= 2^14, see codebook.py
       x = 2^(e - 14) * n           n = round(x / 2^(e - 14)), where 2^e is above the 8 elements that share it
       y = sum over groups of 8:    scale * (2^(e - 14) / D) * (t0 n0 + ... + t7 n7)

   The sum of a group is exact: |t| <= 2^14 and |n| < 2^14, so it stays below 2^31. Sums are added in float32. What rounds:

       t / D    by less than 2^-15, of a weight that is 1 at most, and without a common sign, so that errors do not add up
       n        nothing, of a bfloat16, unless it is 2^-6 or less of the largest of its eight; then its lowest bits

   A unit is 64 elements of a row of W under one scale, and has 8 groups; a group is what falls into one of 8 sums of 32
   bits. Which elements those are follows from how codes come to the surface, so each instruction set has an order of its
   own, and x is brought into it once per call:

       AVX-512  words of 4 nibbles; vector j holds nibble j ^ 1 of each (the high nibble of a byte comes first)
       AVX2     no lookup of 16 bits: bytes, looked up twice and interleaved, 8 from each half of the register
       NEON     the same with whole registers of 16 bytes; also the order of the scalar path

   A row of x that does not suit this goes to matmul.c: one that is not finite, or far from 1 altogether, or has outliers that
   take too many bits from their neighbours (see suits). Other conditions are as there. Every y[m][n] is summed in an order
   that depends on K and that row of x alone: not on threads, nor on the other rows of x and W. */

/* Rows of x in fixed point. A row is brought into the order of an ISA once per call, each group of 8 elements with a power
   of two of its own, and it is told whether it suits. */

enum { VECTORS = 4, LANES = 16, GROUPS = 8 }; /* a unit of x: 4 vectors of 16 elements, two of each to a group */
enum { BITS = 14 };            /* of n and of t, their signs apart */
enum { LEAST_EXPONENT = -49 }; /* of e, so that the square of a step is still a normal number */

/* The order of an ISA: where in its unit element i of vector j stands; and which two elements of a vector belong to group
   g, namely one_of(g) and other_of(g). */

INLINE int element_of(int32_t isa, int j, int i) {
    const int low = j < 2; /* nibbles: first all low ones, then all high ones */
    if (isa == SCALAR || isa == NEON) return 2 * (i + 16 * (j % 2)) + low;
    if (isa == AVX2) return 2 * (i % 8 + 16 * (i / 8) + 8 * (j % 2)) + low;
    return 4 * i + (j ^ 1);
}

INLINE int one_of(int32_t isa, int g) {
    return isa == SCALAR || isa == NEON ? g : 2 * g;
}

INLINE int other_of(int32_t isa, int g) {
    return isa == SCALAR || isa == NEON ? g + GROUPS : 2 * g + 1;
}

/* Where in an arranged row of x unit u begins; its vectors are 2 * LANES apart. */
INLINE int64_t unit_of(int64_t u) {
    return u / 2 * 2 * UNIT + u % 2 * LANES;
}

/* The nearest whole number, ties to even, of |x| < 2^15: adding 1.5 * 2^23 leaves it in the low bits. */
INLINE int16_t nearest(float x) {
    return (int16_t)bits_of(x + 0x1.8p23f);
}

/* What decides whether a row suits fixed point. Small is what is less than 2^-4 of the power of two it shares. */
typedef struct {
    uint32_t largest; /* magnitude, as bits */
    float small;      /* sum of squares of what is small */
    float steps;      /* sum of squares of its steps, 2^(e - 14) */
} row_facts;

/* One unit of a row of x. x: [UNIT]; n: VECTORS vectors, each 2 * LANES behind the one before. */
INLINE void to_fixed(const uint16_t *x, const int32_t isa, int16_t *n, float *scales, row_facts *facts) {
    float value[VECTORS][LANES], inverse[LANES] /* 2^(BITS - e) */, small[LANES] = {0}, count[LANES] = {0};
    uint32_t largest[LANES] = {0};
    for (int j = 0; j < VECTORS; j++)
        for (int i = 0; i < LANES; i++) value[j][i] = float_of((uint32_t)x[element_of(isa, j, i)] << 16);
    for (int j = 0; j < VECTORS; j++)
        for (int i = 0; i < LANES; i++) { /* of magnitudes that are not negative the bits have the same order */
            const uint32_t magnitude = bits_of(value[j][i]) & 0x7fffffff;
            largest[i] = magnitude > largest[i] ? magnitude : largest[i];
        }
    for (int g = 0; g < GROUPS; g++) {
        const int one = one_of(isa, g), other = other_of(isa, g);
        const uint32_t most = largest[one] > largest[other] ? largest[one] : largest[other];
        const int32_t above = (int32_t)(most >> 23) - 127 + 1, e = above > LEAST_EXPONENT ? above : LEAST_EXPONENT;
        inverse[one] = inverse[other] = power_of_two(BITS - e);
        scales[g] = power_of_two(e - BITS);
        facts->largest = most > facts->largest ? most : facts->largest;
    }
    for (int j = 0; j < VECTORS; j++)
        for (int i = 0; i < LANES; i++) {
            const float scaled = value[j][i] * inverse[i], square = scaled * scaled;
            const int is_small = square < (float)(1 << 2 * (BITS - 4));
            small[i] += is_small ? square : 0.0f;
            count[i] += is_small ? 1.0f : 0.0f;
            n[j * 2 * LANES + i] = nearest(scaled);
        }
    for (int g = 0; g < GROUPS; g++) {
        const int one = one_of(isa, g), other = other_of(isa, g);
        const float step = scales[g] * scales[g];
        facts->small += step * (small[one] + small[other]);
        facts->steps += step * (count[one] + count[other]);
    }
}

/* Whether rounding x to n loses no more than bfloat16 itself, 2^-9. The error, in the mean a twelfth of the step's square, is
   compared with the small elements alone: where a row of W is zero at the large ones, nothing else is left of the sum. (So a
   row of the identity matrix does not suit.) Magnitudes are such that every square here is a normal number. */
static int suits(const row_facts *f) {
    if (f->largest == 0) return 1;
    const int32_t exponent = (int32_t)(f->largest >> 23) - 127;
    return exponent >= -40 && exponent <= 40 && f->steps / 12.0f * 0x1p18f <= f->small;
}

/* A row of x, [units][UNIT], in fixed point. A missing last unit is zeros. Returns whether it suits. */
INLINE int arrange_row(const uint16_t *x, int64_t units, const int32_t isa, int16_t *fixed, float *scales) {
    row_facts facts = {0, 0, 0};
    for (int64_t u = 0; u < units; u++) to_fixed(x + u * UNIT, isa, fixed + unit_of(u), scales + u * GROUPS, &facts);
    if (units % 2) {
        for (int j = 0; j < VECTORS; j++) memset(fixed + unit_of(units) + j * 2 * LANES, 0, LANES * sizeof *fixed);
        memset(scales + units * GROUPS, 0, GROUPS * sizeof *scales);
    }
    return suits(&facts);
}

typedef int (*arrange_function)(const uint16_t *x, int64_t units, int16_t *fixed, float *scales);

static int arrange_plain(const uint16_t *x, int64_t units, int16_t *fixed, float *scales) {
    return arrange_row(x, units, SCALAR, fixed, scales); /* NEON's order too */
}

#ifdef X86

TARGET_AVX2 static int arrange_avx2(const uint16_t *x, int64_t units, int16_t *fixed, float *scales) {
    return arrange_row(x, units, AVX2, fixed, scales);
}

TARGET_AVX512 static int arrange_avx512(const uint16_t *x, int64_t units, int16_t *fixed, float *scales) {
    return arrange_row(x, units, AVX512, fixed, scales);
}

#endif /* X86 */

static arrange_function choose_arrange(int32_t isa) {
#ifdef X86
    if (isa >= AVX512) return arrange_avx512;
    if (isa == AVX2) return arrange_avx2;
#else
    (void)isa;
#endif
    return arrange_plain;
}

/* The product. */

enum { X_BYTES = 512 * 1024 }; /* of x in fixed point at a time: half of a small second cache */

typedef struct {
    const uint8_t *packed;  /* [rows][units][32] */
    const float *scales;    /* [rows][units] */
    const int16_t *table;   /* [32]: the 16 entries twice */
    const int16_t *const *x;      /* rows, each [pairs][VECTORS][2][LANES]: two units, one above the other, for AVX-512 */
    const float *const *x_scales; /* each [pairs][2][GROUPS]: 2^(e - 14) */
    int64_t units;
    float sums[ROWS][WIDTH];
} fixed_pass;

/* Scalar. */

static void fixed_scalar(int rows, int width, fixed_pass *p) {
    for (int r = 0; r < rows; r++) {
        for (int m = 0; m < width; m++) {
            float total[GROUPS] = {0};
            for (int64_t u = 0; u < p->units; u++) {
                const uint8_t *bytes = p->packed + (r * p->units + u) * (UNIT / 2);
                const int16_t *x = p->x[m] + unit_of(u);
                const float *x_scales = p->x_scales[m] + u * GROUPS;
                int32_t sum[GROUPS] = {0};
                for (int i = 0; i < LANES; i++)
                    for (int half = 0; half < 2; half++) {
                        const uint8_t byte = bytes[16 * half + i];
                        sum[i % GROUPS] += p->table[byte & 15] * x[half * 2 * LANES + i];
                        sum[i % GROUPS] += p->table[byte >> 4] * x[(2 + half) * 2 * LANES + i];
                    }
                for (int g = 0; g < GROUPS; g++) total[g] += (float)sum[g] * (p->scales[r * p->units + u] * x_scales[g]);
            }
            p->sums[r][m] = ((total[0] + total[1]) + (total[2] + total[3])) + ((total[4] + total[5]) + (total[6] + total[7]));
        }
    }
}

#ifdef X86

/* AVX2. */

TARGET_AVX2 INLINE void fixed_row_avx2(int r, const int width, fixed_pass *p) {
    const __m256i entries = _mm256_loadu_si256((const __m256i *)p->table);
    /* The low bytes of the 16 entries, and the high ones, in both halves of a register. */
    const __m256i bytes_apart = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,
                                                 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m256i apart = _mm256_shuffle_epi8(entries, bytes_apart);
    const __m256i low = _mm256_permute4x64_epi64(apart, 0x88), high = _mm256_permute4x64_epi64(apart, 0xdd);
    const __m256i nibble = _mm256_set1_epi8(15);
    const uint8_t *packed = p->packed + r * p->units * (UNIT / 2);
    const float *scales = p->scales + r * p->units;
    __m256 total[WIDTH];
    for (int m = 0; m < width; m++) total[m] = _mm256_setzero_ps();
    for (int64_t u = 0; u < p->units; u++, packed += UNIT / 2) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i *)packed);
        const __m256i code[2] = {_mm256_and_si256(bytes, nibble), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble)};
        const __m256 scale = _mm256_set1_ps(scales[u]);
        __m256i w[VECTORS];
        for (int j = 0; j < 2; j++) {
            const __m256i first = _mm256_shuffle_epi8(low, code[j]), second = _mm256_shuffle_epi8(high, code[j]);
            w[2 * j] = _mm256_unpacklo_epi8(first, second);
            w[2 * j + 1] = _mm256_unpackhi_epi8(first, second);
        }
        for (int m = 0; m < width; m++) {
            __m256i sum = _mm256_setzero_si256();
            for (int j = 0; j < VECTORS; j++) {
                const __m256i *const n = (const __m256i *)(p->x[m] + unit_of(u) + j * 2 * LANES);
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(w[j], _mm256_load_si256(n)));
            }
            const __m256 both = _mm256_mul_ps(scale, _mm256_load_ps(p->x_scales[m] + u * GROUPS));
            total[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), both, total[m]);
        }
    }
    for (int m = 0; m < width; m++) p->sums[r][m] = add_up_avx2(total[m]);
}

TARGET_AVX2 static void fixed_avx2(int rows, int width, fixed_pass *p) { /* each call is inlined with its constant */
    for (int r = 0; r < rows; r++) {
        if (width == 1) fixed_row_avx2(r, 1, p);
        if (width == 2) fixed_row_avx2(r, 2, p);
        if (width == 3) fixed_row_avx2(r, 3, p);
        if (width == 4) fixed_row_avx2(r, 4, p);
    }
}

/* AVX-512: two units of a row of W to a register, 4 rows of W at a time. */

/* sum + pairs of products. With VNNI it is one instruction, which the compiler may only use if told so for the whole
   function; the two give the same bits. */
TARGET_AVX512 INLINE __m512i add_products(__m512i sum, __m512i w, __m512i n, const int vnni) {
    if (!vnni) return _mm512_add_epi32(sum, _mm512_madd_epi16(w, n));
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "vm"(n));
    return sum;
}

TARGET_AVX512 INLINE void fixed_rows_avx512(int first, const int rows, const int width, const int vnni, fixed_pass *p) {
    const __m512i table = _mm512_loadu_si512(p->table);
    const int64_t units = p->units, stride = units * (UNIT / 2);
    const uint8_t *packed = p->packed + first * stride;
    const float *scales = p->scales + first * units;
    const int16_t *x[WIDTH];
    const float *x_scales[WIDTH];
    for (int m = 0; m < width; m++) x[m] = p->x[m], x_scales[m] = p->x_scales[m];
    __m512 total[ROWS][WIDTH];
    for (int r = 0; r < rows; r++)
        for (int m = 0; m < width; m++) total[r][m] = _mm512_setzero_ps();
    for (int64_t u = 0; u < units; u += 2, packed += UNIT) {
        const int single = u + 1 == units; /* the upper half of x is then zeros, and so is its scale */
#pragma GCC unroll 4 /* the sums must stay in registers */
        for (int r = 0; r < rows; r++) {
            __m512i words;
            __m512 scale = _mm512_set1_ps(scales[r * units + u]);
            if (single) {
                words = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(packed + r * stride)));
                scale = _mm512_maskz_mov_ps(0x00ff, scale);
            } else {
                words = _mm512_loadu_si512(packed + r * stride);
                scale = _mm512_mask_mov_ps(scale, 0xff00, _mm512_set1_ps(scales[r * units + u + 1]));
            }
            /* The next rows, which the hardware does not foresee while x streams by. */
            PREFETCH(packed, (r + ROWS) * stride, _MM_HINT_T0);
            __m512i w[VECTORS]; /* the lookup reads 5 bits, and the table stands there twice: nothing is masked off */
            for (int j = 0; j < VECTORS; j++) w[j] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * j), table);
#pragma GCC unroll 4
            for (int m = 0; m < width; m++) {
                const int16_t *const n = x[m] + u * UNIT;
                __m512i sum = _mm512_madd_epi16(w[0], _mm512_load_si512(n));
                for (int j = 1; j < VECTORS; j++) sum = add_products(sum, w[j], _mm512_load_si512(n + j * 2 * LANES), vnni);
                const __m512 both = _mm512_mul_ps(scale, _mm512_load_ps(x_scales[m] + u * GROUPS));
                total[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, total[r][m]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int m = 0; m < width; m++) p->sums[first + r][m] = _mm512_reduce_add_ps(total[r][m]);
}

TARGET_AVX512 INLINE void fixed_width_avx512(int rows, int width, const int vnni, fixed_pass *p) {
    if (rows == ROWS) {
        if (width == 1) fixed_rows_avx512(0, ROWS, 1, vnni, p);
        if (width == 2) fixed_rows_avx512(0, ROWS, 2, vnni, p);
        if (width == 3) fixed_rows_avx512(0, ROWS, 3, vnni, p);
        if (width == 4) fixed_rows_avx512(0, ROWS, 4, vnni, p);
        return;
    }
    for (int r = 0; r < rows; r++) { /* the last rows of W */
        if (width == 1) fixed_rows_avx512(r, 1, 1, vnni, p);
        if (width == 2) fixed_rows_avx512(r, 1, 2, vnni, p);
        if (width == 3) fixed_rows_avx512(r, 1, 3, vnni, p);
        if (width == 4) fixed_rows_avx512(r, 1, 4, vnni, p);
    }
}

TARGET_AVX512 static void fixed_avx512(int rows, int width, fixed_pass *p) {
    fixed_width_avx512(rows, width, 0, p);
}

TARGET_AVX512 static void fixed_vnni(int rows, int width, fixed_pass *p) {
    fixed_width_avx512(rows, width, 1, p);
}

#endif /* X86 */

#ifdef ARM

/* NEON: 16 bytes at a time, low nibbles and high ones; sums of groups 0 to 3 and 4 to 7. */

INLINE void fixed_row_neon(int r, const int width, fixed_pass *p) {
    const int8x16x2_t entries = vld2q_s8((const int8_t *)p->table); /* their low bytes, their high bytes */
    const uint8_t *packed = p->packed + r * p->units * (UNIT / 2);
    const float *scales = p->scales + r * p->units;
    float32x4_t total[WIDTH][2];
    for (int m = 0; m < width; m++) total[m][0] = total[m][1] = vdupq_n_f32(0.0f);
    for (int64_t u = 0; u < p->units; u++, packed += UNIT / 2) {
        int16x8_t w[VECTORS][2];
        for (int j = 0; j < VECTORS; j++) {
            const uint8x16_t byte = vld1q_u8(packed + 16 * (j % 2));
            const uint8x16_t code = j < 2 ? vandq_u8(byte, vdupq_n_u8(15)) : vshrq_n_u8(byte, 4);
            const int8x16x2_t pair = vzipq_s8(vqtbl1q_s8(entries.val[0], code), vqtbl1q_s8(entries.val[1], code));
            for (int h = 0; h < 2; h++) w[j][h] = vreinterpretq_s16_s8(pair.val[h]);
        }
        for (int m = 0; m < width; m++) {
            int32x4_t sum[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
            for (int j = 0; j < VECTORS; j++)
                for (int h = 0; h < 2; h++) {
                    const int16x8_t n = vld1q_s16(p->x[m] + unit_of(u) + j * 2 * LANES + 8 * h);
                    sum[0] = vmlal_s16(sum[0], vget_low_s16(w[j][h]), vget_low_s16(n));
                    sum[1] = vmlal_high_s16(sum[1], w[j][h], n);
                }
            for (int h = 0; h < 2; h++) {
                const float32x4_t both = vmulq_n_f32(vld1q_f32(p->x_scales[m] + u * GROUPS + 4 * h), scales[u]);
                total[m][h] = vfmaq_f32(total[m][h], vcvtq_f32_s32(sum[h]), both);
            }
        }
    }
    for (int m = 0; m < width; m++) p->sums[r][m] = vaddvq_f32(vaddq_f32(total[m][0], total[m][1]));
}

static void fixed_neon(int rows, int width, fixed_pass *p) { /* each call is inlined with its constant */
    for (int r = 0; r < rows; r++) {
        if (width == 1) fixed_row_neon(r, 1, p);
        if (width == 2) fixed_row_neon(r, 2, p);
        if (width == 3) fixed_row_neon(r, 3, p);
        if (width == 4) fixed_row_neon(r, 4, p);
    }
}

#endif /* ARM */

typedef void (*fixed_function)(int rows, int width, fixed_pass *);

static fixed_function choose_fixed(int32_t isa) {
#ifdef X86
    if (isa >= VNNI) return fixed_vnni;
    if (isa == AVX512) return fixed_avx512;
    if (isa == AVX2) return fixed_avx2;
#endif
#ifdef ARM
    if (isa == NEON) return fixed_neon;
#endif
    return fixed_scalar;
}

/* Rows of x in fixed point, and where their results go. */
enum { MAX_ROWS = 256 };
typedef struct {
    int64_t count;
    const int16_t *x[MAX_ROWS];
    const float *x_scales[MAX_ROWS];
    uint16_t *y[MAX_ROWS];
} suited_rows;

static void matmul_of_suited(const matmul_args *a, const suited_rows *rows, int32_t threads) {
    const int64_t units = a->in_features / UNIT, n = a->out_features, groups = (n + ROWS - 1) / ROWS;
    const fixed_function run = choose_fixed(a->isa);
    const int shift = shift_of(a), parallel = is_worth_threads(a, rows->count, threads);
    const float denominator = (float)a->denominator, inverse = 1 / denominator;
    int16_t table[32];
    for (int c = 0; c < 32; c++) table[c] = nearest(a->w.table[c % 16] * denominator);
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel)
    for (int64_t group = 0; group < groups; group++) {
        const int64_t row = group * ROWS;
        const int count = (int)least(n - row, ROWS);
        float scales[ROWS * MAX_UNITS];
        scales_of_units(&a->w, a->isa, row * units, count * units, shift, scales);
        fixed_pass pass;
        pass.packed = a->w.packed + row * units * (UNIT / 2);
        pass.scales = scales;
        pass.table = table;
        pass.units = units;
        for (int64_t first = 0; first < rows->count; first += WIDTH) {
            const int width = (int)least(rows->count - first, WIDTH);
            pass.x = rows->x + first;
            pass.x_scales = rows->x_scales + first;
            run(count, width, &pass);
            for (int m = 0; m < width; m++)
                for (int r = 0; r < count; r++) rows->y[first + m][row + r] = to_bfloat16(pass.sums[r][m] * inverse);
        }
    }
}

/* As qlorag_nf4_matmul, for bfloat16. W is read once for as many rows of x as suit and stay in a cache. */
static int32_t matmul_fixed(const matmul_args *a, const uint16_t *x, uint16_t *y, int64_t rows, int32_t threads) {
    const int64_t k = a->in_features, n = a->out_features, units = k / UNIT;
    const int64_t length = (units + 1) / 2 * 2 * UNIT, scales = (units + 1) / 2 * 2 * GROUPS; /* numbers of a row in fixed point */
    const int64_t bytes = length * (int64_t)sizeof(int16_t) + scales * (int64_t)sizeof(float); /* both multiples of 64 */
    const int64_t at_once = least(rows, least(MAX_ROWS, WIDTH * (X_BYTES / bytes / WIDTH + 1)));
    uint8_t *const memory = aligned_alloc(64, (size_t)(at_once * bytes));
    if (!memory) return 0;
    const arrange_function arrange = choose_arrange(a->isa);
    int32_t had_memory = 1;
    for (int64_t first = 0; first < rows && had_memory; first += at_once) {
        suited_rows suited;
        suited.count = 0;
        const int64_t end = least(rows, first + at_once);
        int64_t others = 0; /* the last rows, if they do not suit; together, since W is then read once for four of them */
        for (int64_t m = first; m < end; m++) {
            int16_t *const fixed = (int16_t *)(memory + (m - first) * bytes);
            float *const x_scales = (float *)(fixed + length);
            const int fits = arrange(x + m * k, units, fixed, x_scales);
            if (fits) {
                suited.x[suited.count] = fixed;
                suited.x_scales[suited.count] = x_scales;
                suited.y[suited.count++] = y + m * n;
            }
            others += !fits;
            if (others && (fits || m + 1 == end)) {
                const int64_t from = m + 1 - fits - others;
                had_memory &= matmul_fused(a, x + from * k, y + from * n, others, BFLOAT16, threads);
                others = 0;
            }
        }
        if (suited.count) matmul_of_suited(a, &suited, threads);
    }
    free(memory);
    return had_memory;
}
