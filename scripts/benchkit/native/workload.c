/* What runs in a container of the benchmark: it answers, and meanwhile writes memory and disk at set rates.
 *
 * workload --port P [--memory MIB] [--rate MB/S] [--share PERCENT] [--seed N] [--processes N] [--realtime]
 *          [--disk FILE --span MIB [--disk-rate MB/S]]
 *
 * It has MIB of private anonymous memory with content that does not compress, of which the first PERCENT are written a
 * word at a time in pages chosen at random, so many megabytes of pages a second. What could not be written in time is
 * not made up for. The disk writer does the same with blocks of 4 KiB in SPAN of FILE and syncs ten times a second.
 * N processes in all: the others hold 256 KiB each and wait.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "protocol.h"

enum { PAGE = 4096, CHILD_BYTES = 256 << 10, CONNECTIONS_MAX = 1024 };

static struct {
    long port, memory_mib, rate, share, seed, processes, span_mib, disk_rate;
    const char *disk;
    int realtime;
} options = {.share = 100, .seed = 1, .processes = 1};

static _Atomic uint64_t pages_written, blocks_written;

static void die(const char *what) {
    fprintf(stderr, "workload: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* xorshift64*: fast, and zstd finds nothing in it. */
static uint64_t next(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 2685821657736338717ULL;
}

static void fill(void *at, size_t bytes, uint64_t seed) {
    uint64_t state = seed * 0x9E3779B97F4A7C15ULL + 1;
    for (uint64_t *word = at, *end = word + bytes / sizeof *word; word < end; word++) *word = next(&state);
}

static void *memory(size_t bytes, uint64_t seed) {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) die("mmap");
    fill(at, bytes, seed);
    return at;
}

/* Calls one() so often that `per_second` is kept over time, in slices of a millisecond. */
static void paced(double per_second, void (*one)(void *), void (*slice_end)(void *), void *context) {
    struct timespec slice;
    clock_gettime(CLOCK_MONOTONIC, &slice);
    for (double owed = 0;;) {
        for (owed += per_second / 1000; owed >= 1; owed--) one(context);
        if (slice_end) slice_end(context);
        slice.tv_nsec += 1000000;
        if (slice.tv_nsec >= 1000000000) slice.tv_nsec -= 1000000000, slice.tv_sec++;
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec > slice.tv_sec || (now.tv_sec == slice.tv_sec && now.tv_nsec > slice.tv_nsec))
            slice = now;
        else
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &slice, NULL);
    }
}

struct page_writer {
    char *at;
    uint64_t pages, state;
};

static void write_page(void *context) {
    struct page_writer *writer = context;
    uint64_t value = next(&writer->state);
    volatile uint64_t *word = (uint64_t *)(writer->at + value % writer->pages * PAGE);
    *word = value;
    atomic_fetch_add_explicit(&pages_written, 1, memory_order_relaxed);
}

static void *write_pages(void *context) {
    paced((double)options.rate * 1e6 / PAGE, write_page, NULL, context);
    return NULL;
}

struct disk_writer {
    int file, slices;
    uint64_t blocks, state;
    char block[PAGE];
};

static void write_block(void *context) {
    struct disk_writer *writer = context;
    uint64_t value = next(&writer->state);
    memcpy(writer->block, &value, sizeof value);
    if (pwrite(writer->file, writer->block, PAGE, (off_t)(value % writer->blocks * PAGE)) != PAGE) die("pwrite");
    atomic_fetch_add_explicit(&blocks_written, 1, memory_order_relaxed);
}

static void sync_sometimes(void *context) {
    struct disk_writer *writer = context;
    if (++writer->slices % 100 == 0 && fdatasync(writer->file) != 0) die("fdatasync");
}

static void *write_blocks(void *context) {
    paced((double)options.disk_rate * 1e6 / PAGE, write_block, sync_sometimes, context);
    return NULL;
}

static struct disk_writer *open_disk(void) {
    struct disk_writer *writer = calloc(1, sizeof *writer);
    writer->file = open(options.disk, O_RDWR | O_CREAT, 0600);
    if (writer->file < 0) die(options.disk);
    writer->blocks = (uint64_t)options.span_mib << 8;
    writer->state = options.seed + 2;
    char *mebibyte = malloc(1 << 20);
    for (long number = 0; number < options.span_mib; number++) {
        fill(mebibyte, 1 << 20, options.seed + number);
        if (pwrite(writer->file, mebibyte, 1 << 20, (off_t)number << 20) != 1 << 20) die("pwrite");
    }
    free(mebibyte);
    if (fsync(writer->file) != 0) die("fsync");
    return writer;
}

static void start(void *(*run)(void *), void *context) {
    pthread_t thread;
    if ((errno = pthread_create(&thread, NULL, run, context)) != 0) die("pthread_create");
}

static struct answer answer_to(const struct question *question) {
    if (question->stall_us) {
        struct timespec length = {question->stall_us / 1000000, question->stall_us % 1000000 * 1000};
        while (clock_nanosleep(CLOCK_MONOTONIC, 0, &length, &length) == EINTR) {
        }
    }
    return (struct answer){question->number, atomic_load(&pages_written), atomic_load(&blocks_written)};
}

struct connection {
    int socket;
    size_t have;
    struct question question;
};

/* Zero when the connection has ended. */
static int serve_stream(struct connection *one) {
    for (;;) {
        ssize_t got = read(one->socket, (char *)&one->question + one->have, sizeof one->question - one->have);
        if (got < 0 && errno == EAGAIN) return 1;
        if (got <= 0) return 0;
        if ((one->have += (size_t)got) < sizeof one->question) continue;
        one->have = 0;
        struct answer answer = answer_to(&one->question);
        if (write(one->socket, &answer, sizeof answer) != sizeof answer) return 0;
    }
}

/* The answer leaves from the address that was asked: a host has several. */
static void serve_datagrams(int socket) {
    struct question question;
    struct answer answer;
    struct sockaddr_in from;
    union {
        char bytes[CMSG_SPACE(sizeof(struct in_pktinfo))];
        struct cmsghdr aligned;
    } control;
    for (;;) {
        struct iovec in = {&question, sizeof question}, out = {&answer, sizeof answer};
        struct msghdr message = {&from, sizeof from, &in, 1, &control, sizeof control, 0};
        if (recvmsg(socket, &message, 0) != sizeof question) return;
        answer = answer_to(&question);
        message.msg_iov = &out;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        if (header) ((struct in_pktinfo *)CMSG_DATA(header))->ipi_ifindex = 0;
        sendmsg(socket, &message, 0);
    }
}

static int bound(int type) {
    int one = 1, made = socket(AF_INET, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)options.port)};
    if (made < 0) die("socket");
    setsockopt(made, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(made, (struct sockaddr *)&address, sizeof address) != 0) die("bind");
    return made;
}

static void serve(void) {
    int listener = bound(SOCK_STREAM), datagrams = bound(SOCK_DGRAM), poll = epoll_create1(EPOLL_CLOEXEC), one = 1;
    setsockopt(datagrams, IPPROTO_IP, IP_PKTINFO, &one, sizeof one);
    if (listen(listener, 512) != 0 || poll < 0) die("listen");
    static struct connection first, second;
    first.socket = listener, second.socket = datagrams;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = &first};
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    event.data.ptr = &second;
    epoll_ctl(poll, EPOLL_CTL_ADD, datagrams, &event);
    for (;;) {
        struct epoll_event events[64];
        int count = epoll_wait(poll, events, 64, -1);
        if (count < 0 && errno != EINTR) die("epoll_wait");
        for (int number = 0; number < count; number++) {
            struct connection *one = events[number].data.ptr;
            if (one == &second) {
                serve_datagrams(datagrams);
            } else if (one != &first) {
                if (serve_stream(one)) continue;
                close(one->socket);
                free(one);
            } else {
                int on = 1, made = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                if (made < 0) continue;
                setsockopt(made, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                struct connection *new = calloc(1, sizeof *new);
                new->socket = made;
                event.data.ptr = new;
                epoll_ctl(poll, EPOLL_CTL_ADD, made, &event);
            }
        }
    }
}

static void parse(int count, char **words) {
    static const struct option known[] = {
        {"port", 1, 0, 'p'}, {"memory", 1, 0, 'm'}, {"rate", 1, 0, 'r'}, {"share", 1, 0, 's'}, {"seed", 1, 0, 'e'},
        {"processes", 1, 0, 'n'}, {"disk", 1, 0, 'd'}, {"span", 1, 0, 'S'}, {"disk-rate", 1, 0, 'R'},
        {"realtime", 0, 0, 't'}, {0},
    };
    for (int found; (found = getopt_long(count, words, "", known, NULL)) != -1;) {
        long number = optarg ? atol(optarg) : 0;
        switch (found) {
        case 'p': options.port = number; break;
        case 'm': options.memory_mib = number; break;
        case 'r': options.rate = number; break;
        case 's': options.share = number; break;
        case 'e': options.seed = number; break;
        case 'n': options.processes = number; break;
        case 'd': options.disk = optarg; break;
        case 'S': options.span_mib = number; break;
        case 'R': options.disk_rate = number; break;
        case 't': options.realtime = 1; break;
        default: exit(2);
        }
    }
    if (options.port <= 0 || optind != count) {
        fprintf(stderr, "usage: workload --port P [OPTION...], see the source\n");
        exit(2);
    }
}

int main(int count, char **words) {
    parse(count, words);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_IGN);
    for (long number = 1; number < options.processes; number++) {
        pid_t child = fork();
        if (child < 0) die("fork");
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            memory(CHILD_BYTES, (uint64_t)(options.seed + number));
            for (;;) pause();
        }
    }
    if (options.realtime) {
        struct sched_param high = {.sched_priority = 40};
        if (mlockall(MCL_CURRENT | MCL_FUTURE) != 0 || sched_setscheduler(0, SCHED_FIFO, &high) != 0) die("realtime");
    }
    if (options.memory_mib) {
        size_t bytes = (size_t)options.memory_mib << 20;
        struct page_writer *writer = calloc(1, sizeof *writer);
        *writer = (struct page_writer){memory(bytes, options.seed), bytes / PAGE * options.share / 100, options.seed};
        if (options.rate && writer->pages) start(write_pages, writer);
    }
    if (options.disk) {
        struct disk_writer *writer = open_disk();
        if (options.disk_rate) start(write_blocks, writer);
    }
    serve();
}
