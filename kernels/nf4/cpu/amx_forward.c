/* y = x Wᵀ in bfloat16 on the matrix unit of x86 processors (AMX), straight from the packed W [N, K].

   The unit multiplies tiles: 8 registers of 16 rows of 64 bytes each. One instruction adds to a tile C, 16 x 16 numbers of
   float32, the product of a tile A, 16 rows of 32 bfloat16, and a tile B, which is 32 x 16 with pairs of rows interleaved:

       C[i][j] += A[i][0] B[0][j] + ... + A[i][31] B[31][j]            16 cycles, 8192 multiplications

   No decoded weight exists outside of the caches. A block of W is decoded into tiles there, to the bits that dequantize
   gives in bfloat16, and multiplied at once; a dense weight would be read at 4 times the bytes, which at these speeds is
   what a product waits for.

   Forward. W is A: 16 rows of W, 32 codes of each, all under one scale. A unit of 64 codes is 16 words of 4 nibbles, as in
   matmul.c, and gives two tiles ("planes"), two nibbles of every word each:

       lane            0      1    ...    15       16     17   ...   31
       plane 0     word 0 >> 0    ...  15 >> 0   word 0 >> 4   ...  15 >> 4        elements 1, 5 ... 61, 0, 4 ... 60
       plane 1     word 0 >> 8    ...  15 >> 8   word 0 >> 12  ...  15 >> 12       elements 3, 7 ... 63, 2, 6 ... 62

   One load, which puts the 16 words into both halves of a register, one shift and one lookup (vpermw) per 32 weights. The
   lookup reads 5 bits; the scaled and rounded table stands in its register twice, so bit 4 may be anything. x is B, brought
   into the same order once per call.

   The backward is in amx_backward.c. Sums are float32, over K (backward: N) in one order, whatever the number of threads or
   of rows of x. Numbers smaller than 2^-126 count as 0, as in every product of this unit. */

#ifdef HAVE_AMX

#include <sys/syscall.h>
#include <unistd.h>

/* The compiler does not know that tile instructions read and write memory. */
#define TILES_SEE_MEMORY __asm__ volatile("" ::: "memory")

enum { TILE = 16, TILE_BYTES = 1024, PLANES = 2 };

/* Every tile 16 rows high, tiles A (4, 5) 64 bytes wide, B and C `columns` numbers. */
TARGET_AMX static void configure_tiles(int columns) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {1, 0, {0}, {0}, {0}};
    for (int t = 0; t < 8; t++) {
        config.bytes[t] = (uint16_t)(t == 4 || t == 5 ? 64 : 4 * columns);
        config.rows[t] = TILE;
    }
    TILES_SEE_MEMORY;
    _tile_loadconfig(&config);
}

/* Asks the system for the use of tiles, once per process; whether this processor has them. */
static int has_amx(void) {
    uint32_t a, b, c, d, low, high;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    if (!(d >> 22 & 1) || !(d >> 24 & 1)) return 0; /* AMX-BF16, AMX-TILE */
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
    if (!(a >> 5 & 1)) return 0; /* AVX512-BF16 */
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3) != 3) return 0; /* the system saves them */
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}

/* 16 x 16 numbers of 32 bits, rows to columns. */
TARGET_AMX INLINE void transpose(__m512i r[TILE]) {
    __m512i t[TILE];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    }
}

/* Forward. */

enum { STEP = 2 };         /* units decoded together: one line of the cache */
enum { FEW_TILES = 4 };    /* of 16 rows of W, if x has no more than 16 rows */
enum { FEW_BYTES = FEW_TILES * STEP * PLANES * TILE_BYTES };
enum { BLOCK_UNITS = 8 };  /* a block of W, if x has more, is 64 x 8 codes of up to */
enum { BLOCK_TILES = 16 }; /* 16 x 16 rows: 256 KiB when decoded */
enum { BLOCK_ROWS = 512 }; /* of x at a time, so that the sums of a block stay in the cache */
enum { AMX_ROWS = 5 };      /* of x, from which on this beats fixed.c */
enum { AMX_TASK = 1 << 23 }; /* multiplications: from about as many on a second thread pays */

/* Tiles of 16 rows of W: `units` units of each row, of which there are `rows`. out: [units][PLANES] tiles. */
TARGET_AMX INLINE void decode_rows(const uint8_t *packed, const float *scales, int64_t stride, int rows, int64_t units,
                                   __m512 table, uint8_t *out) {
    const __m512i shift0 = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    const __m512i shift1 = _mm512_add_epi16(shift0, _mm512_set1_epi16(8));
    for (int r = 0; r < rows; r++, packed += stride * (UNIT / 2), scales += stride) {
        for (int64_t u = 0; u < units; u++) {
            const __m256bh half = _mm512_cvtneps_pbh(_mm512_mul_ps(table, _mm512_set1_ps(scales[u])));
            const __m512i lut = _mm512_broadcast_i64x4((__m256i)half);
            const __m512i word = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(packed + u * (UNIT / 2))));
            uint8_t *const row = out + u * PLANES * TILE_BYTES + r * 64;
            _mm512_store_si512(row, _mm512_permutexvar_epi16(_mm512_srlv_epi16(word, shift0), lut));
            _mm512_store_si512(row + TILE_BYTES, _mm512_permutexvar_epi16(_mm512_srlv_epi16(word, shift1), lut));
        }
    }
}

/* x [rows][K] as tiles B: [ceil(rows / 16)][units][PLANES][16][columns] pairs. Columns past the rows are zeros. */
TARGET_AMX static void arrange_x(const uint16_t *x, int64_t rows, int columns, int64_t units, int32_t threads, uint32_t *out) {
    uint16_t order[PLANES][32];
    for (int p = 0; p < PLANES; p++)
        for (int lane = 0; lane < 32; lane++) order[p][lane] = (uint16_t)(4 * (lane % 16) + ((2 * p + lane / 16) ^ 1));
    const int64_t tiles = (rows + columns - 1) / columns;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t at = 0; at < tiles * units; at++) {
        const int64_t first = at / units * columns, u = at % units;
        uint32_t *const tile = out + at * PLANES * TILE * columns;
        for (int p = 0; p < PLANES; p++) {
            const __m512i pick = _mm512_loadu_si512(order[p]);
            __m512i lines[TILE];
            for (int m = 0; m < TILE; m++) {
                lines[m] = _mm512_setzero_si512();
                if (m >= columns || first + m >= rows) continue;
                const uint16_t *const row = x + ((first + m) * units + u) * UNIT;
                lines[m] = _mm512_permutex2var_epi16(_mm512_loadu_si512(row), pick, _mm512_loadu_si512(row + 32));
            }
            uint32_t *const plane = tile + p * TILE * columns;
            transpose(lines);
            const __mmask16 some = (__mmask16)((1 << columns) - 1);
            for (int k = 0; k < TILE; k++) _mm512_mask_storeu_epi32(plane + k * columns, some, lines[k]);
        }
    }
}

/* y[m][n] = c[n][m], rounded, for up to 16 m and up to 32 n; c: two tiles of `columns` numbers a row, `next` apart. */
TARGET_AMX INLINE void write_transposed(const float *c, int64_t next, int columns, uint16_t *y, int64_t stride, int64_t count_n,
                                        int64_t count_m) {
    __m512i low[TILE], high[TILE];
    const __mmask16 some = (__mmask16)((1 << columns) - 1);
    for (int i = 0; i < TILE; i++) {
        low[i] = _mm512_maskz_loadu_epi32(some, c + i * columns);
        high[i] = _mm512_maskz_loadu_epi32(some, c + next + i * columns);
    }
    transpose(low);
    transpose(high);
    const __mmask32 valid = (__mmask32)(((uint64_t)1 << count_n) - 1);
    for (int64_t m = 0; m < count_m; m++) {
        const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_castsi512_ps(high[m]), _mm512_castsi512_ps(low[m]));
        _mm512_mask_storeu_epi16(y + m * stride, valid, (__m512i)both);
    }
}

/* C 0 .. 3 += A B over `parts` tiles of each of `tiles` rows of tiles of W, and of x. */
TARGET_AMX INLINE void multiply_few(const uint8_t *a, const uint8_t *x, int columns, int64_t parts, const int tiles) {
    enum { NEXT = STEP * PLANES * TILE_BYTES };
    for (int64_t part = 0; part < parts; part++, a += TILE_BYTES, x += TILE * 4 * columns) {
        _tile_loadd(6, x, 4 * columns);
        _tile_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (tiles > 1) {
            _tile_loadd(5, a + NEXT, 64);
            _tile_dpbf16ps(1, 5, 6);
        }
        if (tiles > 2) {
            _tile_loadd(4, a + 2 * NEXT, 64);
            _tile_dpbf16ps(2, 4, 6);
        }
        if (tiles > 3) {
            _tile_loadd(5, a + 3 * NEXT, 64);
            _tile_dpbf16ps(3, 5, 6);
        }
    }
}

/* Up to 16 rows of x, which is one tile wide: 4 tiles of W at a time, a line of codes of each row at a time. What has been
   decoded is multiplied one step later: a tile must not be loaded before its stores have reached the cache, which costs
   three times the product. */
TARGET_AMX INLINE void few_rows(const uint8_t *packed, const float *scales, int64_t units, int64_t rows, const int tiles,
                                __m512 table, const uint8_t *x, int columns, uint8_t *buffer) {
    int64_t ahead = FEW_TILES * TILE * units * (UNIT / 2); /* where in packed the next call begins */
    _tile_zero(0);
    if (tiles > 1) _tile_zero(1);
    if (tiles > 2) _tile_zero(2);
    if (tiles > 3) _tile_zero(3);
    int64_t before = 0; /* tiles that wait */
    for (int64_t u = 0; u < units; u += STEP) {
        uint8_t *const now = buffer + (u / STEP % 2) * FEW_BYTES, *const then = buffer + (1 - u / STEP % 2) * FEW_BYTES;
        const int64_t step = least(STEP, units - u);
        for (int t = 0; t < tiles; t++) {
            uint8_t *const tile = now + t * STEP * PLANES * TILE_BYTES;
            const int64_t from = t * TILE * units + u;
            const int count = (int)least(rows - t * TILE, TILE);
            for (int r = 0; r < TILE; r++, ahead += 64) PREFETCH(packed, ahead, _MM_HINT_T1);
            if (step == STEP) decode_rows(packed + from * (UNIT / 2), scales + from, units, count, STEP, table, tile);
            else decode_rows(packed + from * (UNIT / 2), scales + from, units, count, 1, table, tile);
        }
        TILES_SEE_MEMORY;
        multiply_few(then, x, columns, before, tiles);
        x += before * TILE * 4 * columns;
        before = step * PLANES;
    }
    multiply_few(buffer + ((units - 1) / STEP % 2) * FEW_BYTES, x, columns, before, tiles);
}

/* y [rows][N] for up to 16 rows; scales: 64 rows of W for each thread. */
TARGET_AMX static void forward_few(const matmul_args *a, int shift, const uint8_t *x, int columns, uint16_t *y, int32_t threads,
                                   float *own_scales) {
    const int64_t units = a->in_features / UNIT, n = a->out_features, group = FEW_TILES * TILE, groups = (n + group - 1) / group;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        _Alignas(64) uint8_t buffer[2 * FEW_BYTES];
        _Alignas(64) float c[FEW_TILES][TILE * TILE];
        float *const scales = own_scales + thread_number() * group * units;
        const __m512 table = _mm512_loadu_ps(a->w.table);
        configure_tiles(columns);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t first = g * group, rows = least(n - first, group);
            const int tiles = (int)((rows + TILE - 1) / TILE);
            scales_of_units(&a->w, a->isa, first * units, rows * units, shift, scales);
            const uint8_t *const packed = a->w.packed + first * units * (UNIT / 2);
            if (tiles == 4) few_rows(packed, scales, units, rows, 4, table, x, columns, buffer);
            if (tiles == 3) few_rows(packed, scales, units, rows, 3, table, x, columns, buffer);
            if (tiles == 2) few_rows(packed, scales, units, rows, 2, table, x, columns, buffer);
            if (tiles == 1) few_rows(packed, scales, units, rows, 1, table, x, columns, buffer);
            _tile_stored(0, c[0], 4 * columns); /* beyond `tiles` they hold sums of the rows before, which nobody reads */
            _tile_stored(1, c[1], 4 * columns);
            _tile_stored(2, c[2], 4 * columns);
            _tile_stored(3, c[3], 4 * columns);
            TILES_SEE_MEMORY;
            for (int64_t r = 0; r < rows; r += 2 * TILE)
                write_transposed(c[r / TILE], TILE * TILE, columns, y + first + r, n, least(rows - r, 2 * TILE), columns);
        }
        _tile_release();
    }
}

/* C += A B over `parts` tiles each: `height` rows of tiles A, which lie next_a apart, times `width` columns of tiles B.
   c: [height][width] tiles, rows of them next_c apart, columns one after the other. */
TARGET_AMX INLINE void multiply(const uint8_t *a, int64_t next_a, const uint8_t *b, int64_t next_b, float *c, int64_t next_c,
                                int64_t parts, const int height, const int width, int begin) {
    float *const c2 = c + next_c;
    if (begin) {
        _tile_zero(0);
        if (height == 2) _tile_zero(1);
        if (width == 2) _tile_zero(2);
        if (height == 2 && width == 2) _tile_zero(3);
    } else {
        _tile_loadd(0, c, 64);
        if (height == 2) _tile_loadd(1, c2, 64);
        if (width == 2) _tile_loadd(2, c + TILE * TILE, 64);
        if (height == 2 && width == 2) _tile_loadd(3, c2 + TILE * TILE, 64);
    }
    for (int64_t part = 0; part < parts; part++, a += TILE_BYTES, b += TILE_BYTES) {
        _tile_loadd(4, a, 64);
        if (height == 2) _tile_loadd(5, a + next_a, 64);
        _tile_loadd(6, b, 64);
        if (width == 2) _tile_loadd(7, b + next_b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (height == 2) _tile_dpbf16ps(1, 5, 6);
        if (width == 2) _tile_dpbf16ps(2, 4, 7);
        if (height == 2 && width == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 64);
    if (height == 2) _tile_stored(1, c2, 64);
    if (width == 2) _tile_stored(2, c + TILE * TILE, 64);
    if (height == 2 && width == 2) _tile_stored(3, c2 + TILE * TILE, 64);
}

/* How forward_many cuts its work, and the memory of each thread. */
typedef struct {
    int64_t tiles;  /* a block of W has 16 x tiles rows; even */
    int64_t wide;   /* tiles of x at a time */
    int64_t block, sums, scales; /* bytes */
} forward_plan;

static forward_plan plan_forward(const matmul_args *a, int64_t rows, int32_t threads) {
    const int64_t pair = 2 * TILE, pairs = (a->out_features + pair - 1) / pair;
    forward_plan p;
    p.tiles = least(BLOCK_TILES, 2 * ((pairs + 2 * threads - 1) / (2 * threads))); /* at least two blocks for a thread */
    p.wide = least((rows + TILE - 1) / TILE, BLOCK_ROWS / TILE);
    p.block = p.tiles * BLOCK_UNITS * PLANES * TILE_BYTES;
    p.sums = p.tiles * p.wide * TILE_BYTES;
    p.scales = p.tiles * TILE * (a->in_features / UNIT) * 4;
    return p;
}

/* y [rows][N] for any number of rows: W in blocks of 16 x tiles rows and 64 x BLOCK_UNITS columns. */
TARGET_AMX static void forward_many(const matmul_args *a, int shift, const uint8_t *x, int64_t rows, uint16_t *y, int32_t threads,
                                    forward_plan p, uint8_t *memory) {
    const int64_t units = a->in_features / UNIT, n = a->out_features, group = p.tiles * TILE, groups = (n + group - 1) / group;
    const int64_t x_tiles = (rows + TILE - 1) / TILE, strip = units * PLANES * TILE_BYTES, next_c = p.wide * TILE * TILE;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint8_t *const block = memory + thread_number() * (p.block + p.sums + p.scales);
        float *const sums = (float *)(block + p.block), *const scales = (float *)(block + p.block + p.sums);
        const __m512 table = _mm512_loadu_ps(a->w.table);
        configure_tiles(TILE);
#pragma omp for schedule(dynamic)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t first = g * group, here = least(n - first, group), w_tiles = (here + TILE - 1) / TILE;
            scales_of_units(&a->w, a->isa, first * units, here * units, shift, scales);
            for (int64_t top = 0; top < x_tiles; top += p.wide) {
                const int64_t count = least(p.wide, x_tiles - top);
                for (int64_t u = 0; u < units; u += BLOCK_UNITS) {
                    const int64_t depth = least(BLOCK_UNITS, units - u), parts = depth * PLANES, size = parts * TILE_BYTES;
                    for (int64_t t = 0; t < w_tiles; t++) {
                        const int64_t own = t * TILE * units + u, from = first * units + own;
                        const int valid = (int)least(here - t * TILE, TILE);
                        decode_rows(a->w.packed + from * (UNIT / 2), scales + own, units, valid, depth, table, block + t * size);
                    }
                    TILES_SEE_MEMORY;
                    for (int64_t m = 0; m < count; m += 2) {
                        const uint8_t *const b = x + (top + m) * strip + u * PLANES * TILE_BYTES;
                        for (int64_t t = 0; t < w_tiles; t += 2) {
                            float *const c = sums + (t * p.wide + m) * TILE * TILE;
                            const uint8_t *const w = block + t * size;
                            if (m + 1 < count) multiply(w, size, b, strip, c, next_c, parts, 2, 2, u == 0);
                            else multiply(w, size, b, strip, c, next_c, parts, 2, 1, u == 0);
                        }
                    }
                }
                TILES_SEE_MEMORY;
                for (int64_t m = 0; m < count; m++)
                    for (int64_t r = 0; r < here; r += 2 * TILE)
                        write_transposed(sums + (r / TILE * p.wide + m) * TILE * TILE, next_c, TILE, y + (top + m) * TILE * n + first + r,
                                         n, least(here - r, 2 * TILE), least(rows - (top + m) * TILE, TILE));
            }
        }
        _tile_release();
    }
}

/* As qlorag_nf4_matmul, for bfloat16. */
static int32_t forward_amx(const matmul_args *a, const void *x, void *y, int64_t rows, int32_t threads) {
    const int64_t units = a->in_features / UNIT, tiles = (rows + TILE - 1) / TILE;
    const int columns = (int)least(rows, TILE), shift = shift_of(a), parallel = rows * a->out_features * a->in_features >= AMX_TASK;
    if (!parallel) threads = 1;
    const forward_plan plan = plan_forward(a, rows, threads);
    const int64_t few = FEW_TILES * TILE * units * 4, own = tiles == 1 ? few : plan.block + plan.sums + plan.scales;
    const int64_t arranged = tiles * units * PLANES * TILE * columns * 4;
    uint8_t *const memory = aligned_alloc(64, (size_t)(arranged + threads * own));
    if (!memory) return 0;
    arrange_x(x, rows, columns, units, threads, (uint32_t *)memory);
    if (tiles == 1) forward_few(a, shift, memory, columns, y, threads, (float *)(memory + arranged));
    else forward_many(a, shift, memory, rows, y, threads, plan, memory + arranged);
    free(memory);
    return 1;
}

#endif /* HAVE_AMX */
