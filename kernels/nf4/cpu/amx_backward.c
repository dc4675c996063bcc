/* dx = dy W in bfloat16 on the matrix unit; read amx_forward.c first.

   dx sums over the rows of W, so W is B, and two rows n, n + 1 have to be interleaved: their words are, before
   the shifts. Bit 4 of an index then says which row it belongs to, and the table register holds one table for each. dy is
   A as it lies in memory. */

#ifdef HAVE_AMX

enum { B_ROWS = 2 * TILE }; /* rows of W in one tile B */
enum { QUARTERS = 4 };      /* tiles that a unit of 16 pairs of rows gives: one for each nibble of a word */
enum { WIDE_UNITS = 8 };    /* a block of W is 64 x 8 columns */
enum { DEEP_TILES = 8 };    /* and 32 x 8 rows: 256 KiB when decoded */
enum { BACKWARD_ROWS = 512 }; /* of dy at a time: sums of 1 MiB, half of a second cache */

/* 32 rows of W (or fewer: the others count as zeros), `units` units of each: tiles [units][QUARTERS], `next` bytes apart. */
TARGET_AMX INLINE void decode_pairs(const uint8_t *packed, const float *scales, int64_t stride, int64_t rows, int64_t units,
                                    __m512 table, uint8_t *out, int64_t next) {
    const __m512i low = _mm512_set1_epi16(15), second = _mm512_set1_epi32(1 << 20);
    const int64_t bytes = stride * (UNIT / 2);
    for (int64_t r = 0; r < B_ROWS; r += 2, packed += 2 * bytes, scales += 2 * stride, out += 64) {
        if (r >= rows) {
            for (int64_t t = 0; t < units * QUARTERS; t++) _mm512_store_si512(out + t * next, _mm512_setzero_si512());
            continue;
        }
        const int64_t odd = r + 1 < rows; /* 0: the row itself, times 0 */
        for (int64_t u = 0; u < units; u++) {
            const uint8_t *const word = packed + u * (UNIT / 2);
            const __m512 scaled0 = _mm512_mul_ps(table, _mm512_set1_ps(scales[u]));
            const __m512 scaled1 = _mm512_mul_ps(table, _mm512_set1_ps(odd ? scales[stride + u] : 0.0f));
            const __m512i lut = (__m512i)_mm512_cvtne2ps_pbh(scaled1, scaled0);
            const __m512i word0 = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)word));
            const __m512i word1 = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(word + odd * bytes)));
            const __m512i words = _mm512_or_si512(word0, _mm512_slli_epi32(word1, 16));
            for (int q = 0; q < QUARTERS; q++) {
                /* (word & low) | second */
                const __m512i code = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4 * q), low, second, 0xea);
                _mm512_store_si512(out + (u * QUARTERS + q) * next, _mm512_permutexvar_epi16(code, lut));
            }
        }
    }
}

/* dy [rows][N] as tiles A: [ceil(rows / 16)][ceil(N / 32)][16][32], zeros where it ends. */
TARGET_AMX static void arrange_dy(const uint16_t *dy, int64_t rows, int64_t n, int32_t threads, uint16_t *out) {
    const int64_t deep = (n + B_ROWS - 1) / B_ROWS, lines = (rows + TILE - 1) / TILE * TILE;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < lines; m++) {
        uint16_t *to = out + (m / TILE * deep * TILE + m % TILE) * B_ROWS;
        for (int64_t t = 0; t < deep; t++, to += TILE * B_ROWS) {
            const int64_t count = m < rows ? least(n - t * B_ROWS, B_ROWS) : 0;
            if (count == B_ROWS) _mm512_store_si512(to, _mm512_loadu_si512(dy + m * n + t * B_ROWS));
            else {
                memset(to, 0, 2 * B_ROWS);
                if (count) memcpy(to, dy + m * n + t * B_ROWS, 2 * (size_t)count);
            }
        }
    }
}

/* 64 numbers of one row of dx from its four tiles C, `next` numbers apart: plane q holds elements q ^ 1, q ^ 1 + 4 ... */
TARGET_AMX INLINE void write_row(const float *c, int64_t next, uint16_t *dx) {
    __m512i half[QUARTERS];
    for (int q = 0; q < QUARTERS; q++) half[q] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(c + q * next)));
    const __m512i first = _mm512_or_si512(half[1], _mm512_slli_epi32(half[0], 16));
    const __m512i last = _mm512_or_si512(half[3], _mm512_slli_epi32(half[2], 16));
    const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    _mm512_storeu_si512(dx, _mm512_permutex2var_epi32(first, order, last));
    _mm512_storeu_si512(dx + 32, _mm512_permutex2var_epi32(first, _mm512_add_epi32(order, _mm512_set1_epi32(8)), last));
}

/* dx = dy W; dy: [rows][N], dx: [rows][K], bfloat16. Returns whether there was memory. */
TARGET_AMX static int32_t backward_amx(const matmul_args *a, const uint16_t *dy, uint16_t *dx, int64_t rows, int32_t threads) {
    const int64_t n = a->out_features, k = a->in_features, units = k / UNIT;
    const int64_t deep = (n + B_ROWS - 1) / B_ROWS, dy_tiles = (rows + TILE - 1) / TILE, high = least(dy_tiles, BACKWARD_ROWS / TILE);
    if (rows * n * k < AMX_TASK) threads = 1;
    const int64_t wide = least(WIDE_UNITS, (units + 2 * threads - 1) / (2 * threads)), groups = (units + wide - 1) / wide;
    const int shift = shift_of(a);
    const int64_t parts[4] = {dy_tiles * deep * TILE_BYTES, n * units * 4, wide * QUARTERS * DEEP_TILES * TILE_BYTES,
                              wide * QUARTERS * high * TILE_BYTES};
    uint8_t *const memory = aligned_alloc(64, (size_t)(parts[0] + (parts[1] + 63) / 64 * 64 + threads * (parts[2] + parts[3])));
    if (!memory) return 0;
    uint8_t *const own = memory + parts[0];
    float *const scales = (float *)(own + threads * (parts[2] + parts[3]));
    arrange_dy(dy, rows, n, threads, (uint16_t *)memory);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < n; first += TILE)
        scales_of_units(&a->w, a->isa, first * units, least(n - first, TILE) * units, shift, scales + first * units);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        uint8_t *const block = own + thread_number() * (parts[2] + parts[3]);
        float *const sums = (float *)(block + parts[2]);
        const __m512 table = _mm512_loadu_ps(a->w.table);
        configure_tiles(TILE);
#pragma omp for schedule(dynamic)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t u = g * wide, here = least(units - u, wide);
            for (int64_t top = 0; top < dy_tiles; top += high) {
                const int64_t count = least(high, dy_tiles - top);
                for (int64_t t = 0; t < deep; t += DEEP_TILES) {
                    const int64_t depth = least(DEEP_TILES, deep - t), size = depth * TILE_BYTES;
                    for (int64_t i = 0; i < depth; i++) {
                        const int64_t row = (t + i) * B_ROWS, from = row * units + u;
                        decode_pairs(a->w.packed + from * (UNIT / 2), scales + from, units, n - row, here, table,
                                     block + i * TILE_BYTES, size);
                    }
                    TILES_SEE_MEMORY;
                    for (int64_t m = 0; m < count; m += 2) {
                        const uint8_t *const left = memory + ((top + m) * deep + t) * TILE_BYTES;
                        for (int64_t q = 0; q < here * QUARTERS; q += 2) {
                            float *const c = sums + (m * wide * QUARTERS + q) * TILE * TILE;
                            const int64_t next_a = deep * TILE_BYTES, next_c = wide * QUARTERS * TILE * TILE;
                            if (m + 1 < count) multiply(left, next_a, block + q * size, size, c, next_c, depth, 2, 2, t == 0);
                            else multiply(left, next_a, block + q * size, size, c, next_c, depth, 1, 2, t == 0);
                        }
                    }
                }
                TILES_SEE_MEMORY;
                for (int64_t m = 0; m < least(count * TILE, rows - top * TILE); m++)
                    for (int64_t i = 0; i < here; i++) {
                        const float *const c = sums + ((m / TILE * wide + i) * QUARTERS * TILE + m % TILE) * TILE;
                        write_row(c, TILE * TILE, dx + ((top * TILE + m) * units + u + i) * UNIT);
                    }
            }
        }
        _tile_release();
    }
    free(memory);
    return 1;
}

#endif /* HAVE_AMX */
