/* The C kernels without Python around them: calls come from a file, what they wrote goes to another. For processors
   that are emulated, and to see one byte too many. Each buffer has its exact size. With -DHEAP it is a heap allocation,
   of which AddressSanitizer sees both ends; otherwise it ends where a page begins that may not be touched, which also
   stops instructions that the sanitizer does not know, such as streaming stores.

   usage: driver CALLS RESULTS

   CALLS    per call: a `call`, then its buffers, each as int64 size and int64 kind, then the bytes if it is INPUT
   RESULTS  int64 best isa; per call: int64 returned, then the bytes of each OUTPUT */

#define _DEFAULT_SOURCE /* mmap, posix_memalign */

#include "cpu.c"

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

enum { DEQUANTIZE, QUANTIZE, QUANTIZE_ABSMAX, MATMUL, MATMUL_BACKWARD }; /* conftest.py: OPERATIONS */
enum { ABSENT, INPUT, OUTPUT };
enum { BUFFERS = 8 };

typedef struct {
    int64_t operation, isa, dtype, threads, stream, block_size, numel, out_features, in_features, rows, denominator;
} call;

static void stop(const char *why) {
    fprintf(stderr, "driver: %s\n", why);
    exit(2);
}

static void get(void *to, int64_t size, FILE *file) {
    if (fread(to, 1, (size_t)size, file) != (size_t)size) stop("the calls end too early");
}

static void put(const void *from, int64_t size, FILE *file) {
    if (fwrite(from, 1, (size_t)size, file) != (size_t)size) stop("the results cannot be written");
}

#ifdef HEAP

static void *new_buffer(size_t size) {
    void *start;
    if (posix_memalign(&start, 64, size)) stop("no memory"); /* aligned like a tensor, and of any size */
    return start;
}

static void free_buffer(void *start, size_t size) {
    (void)size;
    free(start);
}

#else

static size_t whole_pages(size_t size) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (size + page - 1) / page * page;
}

static void *new_buffer(size_t size) {
    const size_t pages = whole_pages(size);
    const int access = PROT_READ | PROT_WRITE, kind = MAP_PRIVATE | MAP_ANONYMOUS;
    uint8_t *const start = mmap(NULL, pages + whole_pages(1), access, kind, -1, 0);
    if (start == MAP_FAILED || mprotect(start + pages, whole_pages(1), PROT_NONE)) stop("no memory");
    return start + pages - size;
}

static void free_buffer(void *start, size_t size) {
    const size_t pages = whole_pages(size);
    munmap((uint8_t *)start + size - pages, pages + whole_pages(1));
}

#endif

static int64_t run(const call *c, void *const *b) {
    const int32_t dtype = (int32_t)c->dtype, isa = (int32_t)c->isa, threads = (int32_t)c->threads;
    const packed_tensor q = {b[0], b[1], b[2], b[3], b[4], b[5], c->numel, c->block_size}; /* if it is one */
    if (c->operation == DEQUANTIZE) {
        const int stream = c->stream && (uintptr_t)b[6] % 64 == 0; /* as in calls.py */
        const dequantize_args args = {q, b[6], dtype, isa, threads, stream};
        qlorag_nf4_dequantize(&args);
        return 0;
    }
    if (c->operation == QUANTIZE) {
        const quantize_args args = {b[0], b[1], b[2], b[3], b[4], c->numel, c->block_size, dtype, isa, threads};
        return qlorag_nf4_quantize(&args);
    }
    if (c->operation == QUANTIZE_ABSMAX) {
        qlorag_nf4_quantize_absmax(b[0], b[1], b[2], c->numel, b[3], b[4]);
        return 0;
    }
    const matmul_args args = {q, c->out_features, c->in_features, isa, (int32_t)c->denominator};
    if (c->operation == MATMUL_BACKWARD) return qlorag_nf4_matmul_backward(&args, b[6], b[7], c->rows, threads);
    if (c->operation != MATMUL) stop("no such operation");
    return qlorag_nf4_matmul(&args, b[6], b[7], c->rows, dtype, threads);
}

int main(int count, char **names) {
    if (count != 3) stop("usage: driver CALLS RESULTS");
    FILE *const calls = fopen(names[1], "rb"), *const results = fopen(names[2], "wb");
    if (!calls || !results) stop("a file cannot be opened");
    const int64_t best = qlorag_nf4_best_isa();
    put(&best, sizeof best, results);
    call c;
    while (fread(&c, sizeof c, 1, calls) == 1) {
        void *buffers[BUFFERS] = {0};
        int64_t sizes[BUFFERS][2];
        for (int i = 0; i < BUFFERS; i++) {
            get(sizes[i], sizeof sizes[i], calls);
            if (sizes[i][1] == ABSENT) continue;
            buffers[i] = new_buffer((size_t)sizes[i][0]);
            if (sizes[i][1] == INPUT) get(buffers[i], sizes[i][0], calls);
            else memset(buffers[i], 0xff, (size_t)sizes[i][0]); /* NaN, if it is left like that */
        }
        const int64_t returned = run(&c, buffers);
        put(&returned, sizeof returned, results);
        for (int i = 0; i < BUFFERS; i++) {
            if (sizes[i][1] == OUTPUT) put(buffers[i], sizes[i][0], results);
            if (buffers[i]) free_buffer(buffers[i], (size_t)sizes[i][0]);
        }
    }
    fclose(calls);
    if (fclose(results)) stop("the results cannot be written");
    return 0;
}
