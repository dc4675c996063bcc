/* Rows of x in fixed point, as fixed.c multiplies them; read its head first. A row is brought into the order of an instruction
   set once per call, each group of 8 elements with a power of two of its own, and it is told whether it suits. */

enum { VECTORS = 4, LANES = 16, GROUPS = 8 }; /* a unit of x: 4 vectors of 16 elements, two of each to a group */
enum { BITS = 14 };            /* of n and of t, their signs apart */
enum { LEAST_EXPONENT = -49 }; /* of e, so that the square of a step is still a normal number */

/* The order of a level: where in its unit element i of vector j stands; and which two elements of a vector belong to group
   g, namely one_of(g) and other_of(g). */

INLINE int element_of(int32_t level, int j, int i) {
    const int low = j < 2; /* nibbles: first all low ones, then all high ones */
    if (level == SCALAR || level == NEON) return 2 * (i + 16 * (j % 2)) + low;
    if (level == AVX2) return 2 * (i % 8 + 16 * (i / 8) + 8 * (j % 2)) + low;
    return 4 * i + (j ^ 1);
}

INLINE int one_of(int32_t level, int g) {
    return level == SCALAR || level == NEON ? g : 2 * g;
}

INLINE int other_of(int32_t level, int g) {
    return level == SCALAR || level == NEON ? g + GROUPS : 2 * g + 1;
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
INLINE void to_fixed(const uint16_t *x, const int32_t level, int16_t *n, float *scales, row_facts *facts) {
    float value[VECTORS][LANES], inverse[LANES] /* 2^(BITS - e) */, small[LANES] = {0}, count[LANES] = {0};
    uint32_t largest[LANES] = {0};
    for (int j = 0; j < VECTORS; j++)
        for (int i = 0; i < LANES; i++) value[j][i] = float_of((uint32_t)x[element_of(level, j, i)] << 16);
    for (int j = 0; j < VECTORS; j++)
        for (int i = 0; i < LANES; i++) { /* of magnitudes that are not negative the bits have the same order */
            const uint32_t magnitude = bits_of(value[j][i]) & 0x7fffffff;
            largest[i] = magnitude > largest[i] ? magnitude : largest[i];
        }
    for (int g = 0; g < GROUPS; g++) {
        const int one = one_of(level, g), other = other_of(level, g);
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
        const int one = one_of(level, g), other = other_of(level, g);
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
INLINE int arrange_row(const uint16_t *x, int64_t units, const int32_t level, int16_t *fixed, float *scales) {
    row_facts facts = {0, 0, 0};
    for (int64_t u = 0; u < units; u++) to_fixed(x + u * UNIT, level, fixed + unit_of(u), scales + u * GROUPS, &facts);
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

static arrange_function choose_arrange(int32_t level) {
#ifdef X86
    if (level >= AVX512) return arrange_avx512;
    if (level == AVX2) return arrange_avx2;
#else
    (void)level;
#endif
    return arrange_plain;
}
