/* A process that knows what every page of its memory has to hold, and says what it found wrong.
 * fill_victim OUT GO SCENARIO MIB: writes its pattern, a line "ready" to OUT, waits until the file GO is there, plays the
 * scenario and writes "bad N", N pages that were wrong, and what else the scenario tells; then it waits to be killed. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORDS (PAGE / 8)

static char *area;
static size_t pages;
static uint64_t *expected; /* of each page: what its words are made from; 0 is a page of zeros */
static long bad;
static FILE *out;
static uint64_t state = 88172645463325252ULL;

static uint64_t random64(void) { state ^= state << 13; state ^= state >> 7; state ^= state << 17; return state; }
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1e3 + t.tv_nsec / 1e6; }

static void fill_page(char *at, uint64_t id) {
    uint64_t *p = (uint64_t *)at;
    for (size_t i = 0; i < WORDS; i++) p[i] = id ? id * 0x9E3779B97F4A7C15ULL + i : 0;
}
static int wrong(const char *at, uint64_t id) {
    const uint64_t *p = (const uint64_t *)at;
    for (size_t i = 0; i < WORDS; i++) if (p[i] != (id ? id * 0x9E3779B97F4A7C15ULL + i : 0)) return 1;
    return 0;
}
static long check(size_t from, size_t to) {
    long n = 0;
    for (size_t i = from; i < to; i++) n += wrong(area + i * PAGE, expected[i]);
    return n;
}
static void expect(size_t from, size_t to, uint64_t id) { for (size_t i = from; i < to; i++) expected[i] = id; }
static void forked(void) {
    pid_t child = fork();
    if (child == 0) _exit(check(0, pages) ? 1 : 0);
    int status;
    waitpid(child, &status, 0);
    if (status) bad++;
}
static void *checker(void *argument) {
    size_t i = (size_t)argument;
    uint64_t s = 12345 + i;
    long n = 0;
    for (size_t k = 0; k < pages; k++) { s = s * 6364136223846793005ULL + 1; size_t at = (s >> 33) % pages; n += wrong(area + at * PAGE, expected[at]); }
    __sync_fetch_and_add(&bad, n);
    return 0;
}
static int by_value(const void *a, const void *b) { double d = *(double *)a - *(double *)b; return d < 0 ? -1 : d > 0; }

static void latency(void) {
    size_t n = pages < 20000 ? pages : 20000;
    double *took = mmap(0, n * 8, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0), start = now();
    for (size_t i = 0; i < n; i++) {
        size_t at = random64() % pages;
        double t = now();
        bad += wrong(area + at * PAGE, expected[at]);
        took[i] = now() - t;
    }
    double whole = now() - start;
    qsort(took, n, 8, by_value);
    fprintf(out, "touched %zu in %.1f ms: p50 %.3f p90 %.3f p99 %.3f p99.9 %.3f max %.3f ms\n", n, whole, took[n / 2], took[n * 9 / 10],
            took[n * 99 / 100], took[n * 999 / 1000], took[n - 1]);
}

static void must(int so) { if (!so) { fprintf(out, "bad call: %s\n", strerror(errno)); fflush(out); _exit(1); } }
static void renew(char *p, size_t n) { must(mmap(p, n * PAGE, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p); }

/* One random change of mappings, mirrored in `expected`. */
static void change(void) {
    size_t n = 1 + random64() % 512, at = random64() % (pages - n);
    char *p = area + at * PAGE;
    switch (random64() % 8) {
    case 0: must(munmap(p, n * PAGE) == 0); renew(p, n); expect(at, at + n, 0); break;
    case 1: madvise(p, n * PAGE, MADV_DONTNEED); expect(at, at + n, 0); break;
    case 2: {
        size_t to = random64() % (pages - n);
        if (to < at + n && at < to + n) break;
        if (mremap(p, n * PAGE, n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, area + to * PAGE) == MAP_FAILED) {
            /* More than one mapping: what was there is gone all the same, and part of it may have been moved. */
            must(errno == EFAULT);
            renew(area + to * PAGE, n);
            renew(p, n);
            expect(to, to + n, 0);
            expect(at, at + n, 0);
            break;
        }
        memcpy(expected + to, expected + at, n * 8);
        renew(p, n);
        expect(at, at + n, 0);
        break;
    }
    case 3: mprotect(p, n * PAGE, PROT_READ); bad += check(at, at + n); mprotect(p, n * PAGE, 3); break;
    case 4: for (size_t i = at; i < at + n; i++) { uint64_t id = random64() | 1; fill_page(area + i * PAGE, id); expected[i] = id; } break;
    case 5: if (random64() % 8 == 0) forked(); break;
    default: bad += check(at, at + n);
    }
}

/* Tells how far it is by one line in OUT, which is written anew. */
static void tell(long rounds) {
    char line[64];
    int length = snprintf(line, sizeof line, "rounds %-12ld bad %-12ld\n", rounds, bad);
    must(pwrite(fileno(out), line, length, 0) == length);
}
static void endless(void) {
    for (long rounds = 0;; rounds++) { for (int i = 0; i < 50; i++) change(); bad += check(0, pages); tell(rounds); }
}
/* Some 100 MB/s when it has a processor of its own, by work rather than by the clock. */
static void writer(void) {
    long loops = 1 << 20;
    double start = now();
    for (volatile long i = 0; i < loops; i++) {}
    loops = loops / (now() - start) / 25;
    for (long i = 0;; i++) {
        *(volatile long *)(area + i % pages * PAGE) = i;
        for (volatile long j = 0; j < loops; j++) {}
        if (i % 4096 == 0) tell(i);
    }
}

static void play(const char *scenario) {
    size_t third = pages / 3;
    if (!strcmp(scenario, "latency")) latency();
    else if (!strcmp(scenario, "fork")) for (int i = 0; i < 3; i++) forked();
    else if (!strcmp(scenario, "grandchildren")) {
        pid_t child = fork();
        if (child == 0) { forked(); if (fork() == 0) { bad += check(0, pages); _exit(bad != 0); } int s; wait(&s); _exit(bad || s || check(0, pages)); }
        int status;
        waitpid(child, &status, 0);
        bad += status != 0;
    } else if (!strcmp(scenario, "exit")) {
        for (int i = 0; i < 20; i++) { pid_t child = fork(); if (child == 0) { check(i * 10, i * 10 + 10); _exit(0); } waitpid(child, 0, 0); }
    } else if (!strcmp(scenario, "exec")) {
        for (int i = 0; i < 5; i++) { pid_t child = fork(); if (child == 0) { execl("/bin/true", "true", (char *)0); _exit(1); } waitpid(child, 0, 0); }
        bad += check(0, pages / 4);
        fprintf(out, "bad %ld\n", bad);
        fflush(out);
        execl("/bin/sleep", "sleep", "1000", (char *)0);
    } else if (!strcmp(scenario, "munmap")) {
        munmap(area + third * PAGE, third * PAGE);
        mmap(area + third * PAGE, third * PAGE, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        expect(third, 2 * third, 0);
    } else if (!strcmp(scenario, "madvise")) {
        for (size_t i = third; i < 2 * third; i += 64) { madvise(area + i * PAGE, 32 * PAGE, MADV_DONTNEED); expect(i, i + 32, 0); }
    } else if (!strcmp(scenario, "mremap")) {
        char *to = mremap(area, pages * PAGE, (pages + third) * PAGE, MREMAP_MAYMOVE);
        char *new = mmap(0, (pages + third) * PAGE, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        area = mremap(to, (pages + third) * PAGE, (pages + third) * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, new);
        for (size_t i = pages; i < pages + third; i++) bad += wrong(area + i * PAGE, 0);
    } else if (!strcmp(scenario, "threads")) {
        pthread_t threads[8];
        for (size_t i = 0; i < 8; i++) pthread_create(&threads[i], 0, checker, (void *)i);
        for (size_t i = 0; i < 8; i++) pthread_join(threads[i], 0);
    } else if (!strcmp(scenario, "mixed")) {
        double end = now() + 1500;
        while (now() < end) change();
    } else if (!strcmp(scenario, "endless")) endless();
    else if (!strcmp(scenario, "writer")) writer();
    else if (!strcmp(scenario, "slow")) {
        for (size_t i = 0; i < pages; i += pages / 200) { bad += wrong(area + i * PAGE, expected[i]); usleep(2000); }
    }
}

int main(int c, char **v) {
    (void)c;
    out = fopen(v[1], strcmp(v[3], "endless") && strcmp(v[3], "writer") ? "a" : "w");
    pages = ((size_t)atoi(v[4]) << 20) / PAGE;
    expected = mmap(0, pages * 8, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    /* Room above, so that it is one mapping whatever lies around it. */
    char *all = mmap(0, pages * PAGE + (4 << 20), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    area = (char *)(((uintptr_t)all + (2 << 20)) & ~((2UL << 20) - 1));
    mprotect(area, pages * PAGE, 3);
    if (getenv("HUGE")) madvise(area, pages * PAGE, MADV_HUGEPAGE);
    if (getenv("LOCKED")) mlock(area, pages * PAGE);
    for (int i = 0; i < (getenv("PROCESSES") ? atoi(getenv("PROCESSES")) - 1 : 0); i++)
        if (fork() == 0) { state += 1 + i; break; }
    int sparse = getenv("SPARSE") != 0;
    for (size_t i = 0; i < pages; i++) {
        if (sparse && random64() % 4 == 0) continue;                                  /* never touched */
        if (sparse && random64() % 4 == 0) { *(volatile char *)(area + i * PAGE) = 0; continue; }   /* touched, zeros */
        expected[i] = random64() | 1;
        fill_page(area + i * PAGE, expected[i]);
    }
    fprintf(out, "ready\n");
    fflush(out);
    while (access(v[2], F_OK)) usleep(1000);
    play(v[3]);
    bad += check(0, pages);
    fprintf(out, "bad %ld\n", bad);
    fflush(out);
    for (;;) pause();
}
