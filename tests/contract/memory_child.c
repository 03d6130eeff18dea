/* A process whose memory the trackers' suite follows. It does what lines on its standard input say: an operation (one
 * letter) and four numbers, which are brought into range here, and answers each with an empty line. `R seed` does random
 * operations until a line comes; a forked child does the same, until it is killed, or some and then sleeps. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define SLOTS 8
#define MOST 1024
#define CHILDREN 3
#define GUARD_INSTALL 102
#define HALF 4

enum kind { ANONYMOUS, OF_FILE, SHARED, MEMFD, HUGE, SAME_PLACE, KINDS };
enum state { UNMAPPED, WRITABLE, CLOSED, GUARD };

static struct slot {
    char *at;
    unsigned long pages;
    enum kind kind;
    int fd;
    char state[MOST];
} slots[SLOTS];
static pid_t children[CHILDREN];
static int next_child;
static struct slot *joined;
static char *rest;
static const char *file;
static uint64_t seed;

static uint64_t random64(void) {
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return seed;
}

static void die(const char *what) {
    perror(what);
    _exit(3);
}

static void fill(char *at, uint64_t value) {
    for (unsigned long i = 0; i < PAGE; i += 8) *(volatile uint64_t *)(at + i) = value * (i + 1) + (uintptr_t)at;
}

static void unmap(struct slot *s) {
    if (!s->pages) return;
    for (unsigned long i = 0; i < s->pages; i++)
        if (s->state[i] != UNMAPPED) munmap(s->at + i * PAGE, PAGE);
    if (s->kind == MEMFD) close(s->fd);
    s->pages = 0;
}

static void map(struct slot *s, unsigned long pages, enum kind kind) {
    char *where = NULL;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS, fd = -1;
    if (kind == SAME_PLACE && s->pages) {
        for (unsigned long i = 0; i < s->pages; i++)
            if (s->state[i] == UNMAPPED) return; /* another mapping may be there by now */
        where = s->at, pages = s->pages, flags |= MAP_FIXED;
        if (s->kind == MEMFD) close(s->fd);
    } else {
        unmap(s);
    }
    if (kind == HUGE) pages = MOST;
    if (kind == OF_FILE) {
        fd = open(file, O_RDONLY), flags = MAP_PRIVATE;
    } else if (kind == SHARED) {
        flags = MAP_SHARED | MAP_ANONYMOUS;
    } else if (kind == MEMFD) {
        fd = memfd_create("child", 0), flags = MAP_SHARED;
        if (ftruncate(fd, pages * PAGE)) die("ftruncate");
    }
    s->at = mmap(where, pages * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (s->at == MAP_FAILED) die("mmap");
    if (kind == OF_FILE) close(fd);
    if (kind == HUGE) madvise(s->at, pages * PAGE, MADV_HUGEPAGE);
    s->fd = fd, s->pages = pages, s->kind = kind;
    memset(s->state, WRITABLE, pages);
}

static void grow_stack(unsigned long pages, uint64_t value) {
    char here[PAGE];
    fill(here, value);
    if (pages) grow_stack(pages - 1, value + 1);
    __asm__ volatile("" ::"r"(here) : "memory");
}

static void act(char what, uint64_t a, uint64_t b, uint64_t c, uint64_t d);

static void some(uint64_t new_seed, unsigned long count) {
    static const char all[] = "mwwwwwwwwuurrppddsbPPPhlgmwwjJ";
    seed = new_seed | 1;
    for (unsigned long i = 0; i < count; i++) {
        uint64_t a = random64(), b = random64(), c = random64(), d = random64();
        act(all[random64() % (sizeof all - 1)], a, b, c, d);
    }
}

static void be_child(uint64_t value, int forever) {
    memset(children, 0, sizeof children);
    some(value, 20);
    while (forever) some(random64(), 50), usleep(500);
    for (;;) pause();
}

static void kill_child(int i) {
    if (!children[i]) return;
    kill(children[i], SIGKILL);
    waitpid(children[i], NULL, 0);
    children[i] = 0;
}

static void act(char what, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    struct slot *s = &slots[a % SLOTS];
    unsigned long first = s->pages ? b % s->pages : 0, count = s->pages ? 1 + c % (s->pages - first) : 0, i;
    if (what != 'm' && what != 'u' && count > 40) count = 40;
    switch (what) {
    case 'm':
        map(s, 1 + b % 64, c % KINDS);
        break;
    case 'w':
        for (i = first; i < first + count; i++)
            if (s->state[i] == WRITABLE) fill(s->at + i * PAGE, d);
        break;
    case 'u':
        if (count > 3 && d % 4) count = 3;
        for (i = first; i < first + count; i++)
            if (s->state[i] != UNMAPPED) munmap(s->at + i * PAGE, PAGE), s->state[i] = UNMAPPED;
        break;
    case 'r': {
        unsigned long pages = d % 3 == 0 ? s->pages : 1 + b % 128;
        char *to, *place = NULL;
        for (i = 0; i < s->pages; i++)
            if (s->state[i] != s->state[0] || s->state[i] == UNMAPPED) return;
        if (!s->pages || s->kind == MEMFD || s->kind == SHARED || s->kind == OF_FILE) pages = s->pages;
        if (!pages || s->kind == HUGE) return;
        if (d % 2) { /* to another place for certain */
            place = mmap(NULL, pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            to = mremap(s->at, s->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place);
        } else {
            to = mremap(s->at, s->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
        }
        if (to == MAP_FAILED) { /* from Linux 6.17 on a part may have moved (several mappings, some of a userfaultfd) */
            if (place) munmap(place, pages * PAGE);
            unmap(s);
            return;
        }
        for (i = s->pages; i < pages; i++) s->state[i] = s->state[0];
        s->at = to, s->pages = pages;
        break;
    }
    case 'p': {
        int closed = d % 3;
        for (i = first; i < first + count; i++) {
            if (s->state[i] == UNMAPPED || s->state[i] == GUARD) continue;
            if (mprotect(s->at + i * PAGE, PAGE, closed == 0 ? PROT_READ | PROT_WRITE : closed == 1 ? PROT_READ : PROT_NONE))
                continue;
            s->state[i] = closed ? CLOSED : WRITABLE;
        }
        break;
    }
    case 'd':
        for (i = first; i < first + count; i++)
            if (s->state[i] != UNMAPPED) madvise(s->at + i * PAGE, PAGE, MADV_DONTNEED);
        break;
    case 'g': /* fails on kernels without it, and in shared memory */
        if (s->pages && s->kind == ANONYMOUS && s->state[first] == WRITABLE)
            if (!madvise(s->at + first * PAGE, PAGE, GUARD_INSTALL)) s->state[first] = GUARD;
        break;
    case 'j': { /* a mapping, and the rest of it elsewhere, which nobody has touched yet */
        char *room = mmap(NULL, 5 * HALF * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
        if (room == MAP_FAILED) die("mmap");
        if (joined) munmap(rest, HALF * PAGE);
        unmap(s);
        s->at = mmap(room + HALF * PAGE, HALF * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
        rest = mmap(room + 3 * HALF * PAGE, HALF * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
        s->pages = HALF, s->kind = ANONYMOUS, joined = s;
        memset(s->state, WRITABLE, HALF);
        for (i = 0; i < HALF; i++) fill(s->at + i * PAGE, d);
        break;
    }
    case 'J': /* joins them: the kernel makes one mapping of both */
        if (!joined) return;
        s = joined, joined = NULL;
        if (s->at + 2 * HALF * PAGE != rest || s->pages != HALF ||
            /* fails while only a part of it is registered with a userfaultfd */
            mremap(rest, HALF * PAGE, HALF * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, s->at + HALF * PAGE) == MAP_FAILED) {
            munmap(rest, HALF * PAGE);
            return;
        }
        memset(s->state + HALF, WRITABLE, HALF), s->pages = 2 * HALF;
        break;
    case 's':
        grow_stack(b % 64, d);
        break;
    case 'b': {
        static unsigned long held;
        if (d % 3 && held < 256) {
            char *at = sbrk((1 + b % 16) * PAGE);
            if (at == (void *)-1) die("sbrk");
            held += 1 + b % 16;
            fill((char *)(((uintptr_t)at + PAGE - 1) & ~(PAGE - 1)), d);
        } else if (held >= 16) {
            /* what malloc holds is below: nothing allocates while this runs */
            sbrk(-(long)(8 * PAGE)), held -= 8;
        }
        break;
    }
    case 'P':
        if (s->pages && s->kind == MEMFD) {
            char page[PAGE];
            for (i = first; i < first + count && i < first + 4; i++) {
                memset(page, (int)d + i, PAGE);
                if (pwrite(s->fd, page, PAGE, i * PAGE) != (long)PAGE) die("pwrite");
            }
        }
        break;
    case 'h':
        if (s->pages && s->kind == MEMFD)
            fallocate(s->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, first * PAGE, count * PAGE);
        break;
    case 'l':
        if (s->pages && s->state[first] == WRITABLE) (d % 2 ? mlock : munlock)(s->at + first * PAGE, PAGE);
        break;
    case 'f':
        kill_child(next_child);
        if (!(children[next_child] = fork())) be_child(d, c % 2);
        next_child = (next_child + 1) % CHILDREN;
        break;
    case 'k':
        kill_child(a % CHILDREN);
        break;
    case 'x': {
        char *arguments[] = {"child", (char *)file, "again", NULL};
        for (i = 0; i < CHILDREN; i++) kill_child(i);
        execv("/proc/self/exe", arguments);
        die("execv");
    }
    }
}

int main(int argc, char **argv) {
    char line[256];
    file = argv[1];
    setvbuf(stdin, NULL, _IONBF, 0);
    if (argc > 2) write(1, "\n", 1);
    while (fgets(line, sizeof line, stdin)) {
        char what;
        unsigned long a = 0, b = 0, c = 0, d = 0;
        if (sscanf(line, "%c %lu %lu %lu %lu", &what, &a, &b, &c, &d) < 1) return 2;
        if (what == 'R') {
            struct pollfd input = {0, POLLIN, 0};
            seed = a | 1;
            write(1, "\n", 1);
            for (unsigned long n = 0; !poll(&input, 1, 0); n++) {
                some(random64(), 20);
                if (n % 64 == 63) act('f', 0, 0, random64(), random64());
            }
        } else {
            act(what, a, b, c, d);
            write(1, "\n", 1);
        }
    }
    for (int i = 0; i < CHILDREN; i++) kill_child(i);
    return 0;
}
