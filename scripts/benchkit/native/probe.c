/* The outside client: asks a service every 0.2 ms over and over, and writes down when each answer came.
 *
 * probe --out PREFIX [--every-us N] [--stall-us N --stall-every-ms N] FLOW...
 *
 * A FLOW is KIND:ADDRESS:PORT. tcp and udp speak to the workload beside this, redis sets one of 250,000 keys at random to
 * 1 KiB, postgres asks SELECT 1 as the user postgres. A stream has one question under way at most. Datagrams are sent
 * whatever came of the last one, at every fifth turn: they tell the network's part of a pause, and each costs the machine
 * as much as a question on a stream. It says "ready" on standard output when each flow has been answered, and ends on
 * SIGTERM or SIGINT. PREFIX.N is then a file of four u64 for each answer of flow N: when it came and how long it took, in
 * ns of CLOCK_MONOTONIC, and the workload's pages and blocks (0 for others). Standard output gets one line for each flow:
 * questions, answers, and an error or "-". With --stall-us the workload is asked now and then to stand still for so long;
 * PREFIX.stalls then lists when. Runs with real-time priority where it may: a busy machine shall not be read as a pause.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "protocol.h"

enum { FLOWS_MAX = 256, SENT_RING = 1 << 16, DATAGRAM_TURNS = 5, REDIS_KEYS = 250000, REDIS_VALUE = 1024 };
static const uint64_t READY_NS = 60000000000;
enum kind { TCP, UDP, REDIS, POSTGRES };
static const char *const kinds[] = {"tcp", "udp", "redis", "postgres"};

struct sample {
    uint64_t came_ns, took_ns, pages, blocks;
};

struct flow {
    enum kind kind;
    int socket, waiting;
    uint64_t asked, answered, asked_ns;
    uint64_t *sent_ns; /* of datagrams, by number */
    size_t have;
    char buffer[4096];
    FILE *samples;
    char error[200];
};

static struct flow flows[FLOWS_MAX];
static int flow_count;
static uint64_t stall_us;
static volatile sig_atomic_t stopped;

static void stop(int number) {
    (void)number;
    stopped = 1;
}

static void die(const char *what) {
    fprintf(stderr, "probe: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void broke(struct flow *flow, const char *what) {
    if (!flow->error[0]) snprintf(flow->error, sizeof flow->error, "%s", what);
}

/* SET of a key that `debug populate` may have made. */
static const void *redis_question(size_t *length) {
    static char text[REDIS_VALUE + 128];
    static uint32_t chance = 1;
    chance = chance * 1664525 + 1013904223;
    char key[16];
    int key_length = snprintf(key, sizeof key, "key:%u", (chance >> 8) % REDIS_KEYS);
    int head = snprintf(text, sizeof text, "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n", key_length, key, REDIS_VALUE);
    memset(text + head, 'a' + (chance >> 24) % 26, REDIS_VALUE);
    memcpy(text + head + REDIS_VALUE, "\r\n", 2);
    *length = (size_t)head + REDIS_VALUE + 2;
    return text;
}

static void ask(struct flow *flow) {
    uint64_t now = now_ns();
    struct question question = {flow->asked + 1, stall_us};
    const void *text = &question;
    size_t length = sizeof question;
    if (flow->kind == REDIS) text = redis_question(&length);
    if (flow->kind == POSTGRES) text = "Q\0\0\0\rSELECT 1", length = 14;
    if (flow->kind == UDP) flow->sent_ns[question.number % SENT_RING] = now;
    ssize_t sent = send(flow->socket, text, length, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent != (ssize_t)length && flow->kind != UDP) {
        broke(flow, sent < 0 ? strerror(errno) : "the question was cut short");
        return;
    }
    stall_us = 0;
    flow->asked++;
    flow->asked_ns = now;
    flow->waiting = flow->kind != UDP;
}

static void record(struct flow *flow, uint64_t asked_ns, uint64_t pages, uint64_t blocks) {
    uint64_t now = now_ns();
    struct sample sample = {now, now - asked_ns, pages, blocks};
    fwrite(&sample, sizeof sample, 1, flow->samples);
    flow->answered++;
    flow->waiting = 0;
}

/* How much of the buffer is one whole answer, or 0; with the workload's counters. */
static size_t whole_answer(struct flow *flow, uint64_t *pages, uint64_t *blocks) {
    if (flow->kind == TCP) {
        struct answer answer;
        if (flow->have < sizeof answer) return 0;
        memcpy(&answer, flow->buffer, sizeof answer);
        *pages = answer.pages, *blocks = answer.blocks;
        if (answer.number != flow->asked) broke(flow, "an answer to another question");
        return sizeof answer;
    }
    if (flow->kind == REDIS) {
        char *end = memchr(flow->buffer, '\n', flow->have);
        if (!end) return 0;
        if (flow->buffer[0] != '+') broke(flow, "redis answered with an error");
        return (size_t)(end - flow->buffer) + 1;
    }
    /* Messages of a type, a length that counts itself, and a body; Z ends an answer. */
    for (size_t at = 0; at + 5 <= flow->have;) {
        uint32_t length;
        memcpy(&length, flow->buffer + at + 1, 4);
        size_t next = at + 1 + ntohl(length);
        if (next > flow->have) return 0;
        if (flow->buffer[at] == 'E') broke(flow, "postgres answered with an error");
        if (flow->buffer[at] == 'Z') return next;
        at = next;
    }
    return 0;
}

static void receive(struct flow *flow) {
    if (flow->kind == UDP) {
        struct answer answer;
        while (recv(flow->socket, &answer, sizeof answer, MSG_DONTWAIT) == sizeof answer)
            record(flow, flow->sent_ns[answer.number % SENT_RING], answer.pages, answer.blocks);
        return;
    }
    ssize_t got = recv(flow->socket, flow->buffer + flow->have, sizeof flow->buffer - flow->have, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        broke(flow, got < 0 ? strerror(errno) : "the service closed the connection");
        return;
    }
    flow->have += (size_t)got;
    uint64_t pages = 0, blocks = 0;
    size_t length = whole_answer(flow, &pages, &blocks);
    if (!length) {
        if (flow->have == sizeof flow->buffer) broke(flow, "an answer that is too long");
        return;
    }
    record(flow, flow->asked_ns, pages, blocks);
    memmove(flow->buffer, flow->buffer + length, flow->have -= length);
}

static int connected(struct flow *flow, const struct sockaddr_in *address) {
    int on = 1;
    struct timeval second = {1, 0}; /* which connect() minds, too */
    flow->socket = socket(AF_INET, (flow->kind == UDP ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC, 0);
    if (flow->socket < 0) die("socket");
    setsockopt(flow->socket, SOL_SOCKET, SO_SNDTIMEO, &second, sizeof second);
    if (connect(flow->socket, (const struct sockaddr *)address, sizeof *address) != 0) {
        close(flow->socket);
        return 0;
    }
    if (flow->kind != UDP) setsockopt(flow->socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    return 1;
}

/* Whether the flow has had its first answer, within a second. */
static int greeted(struct flow *flow) {
    uint64_t answered = flow->answered, began = now_ns();
    flow->error[0] = 0;
    flow->have = 0;
    if (flow->kind == POSTGRES) {
        static const char hello[] = "\0\0\0\x29\0\3\0\0user\0postgres\0database\0postgres\0";
        if (send(flow->socket, hello, 41, MSG_NOSIGNAL) != 41) return 0;
        flow->asked_ns = began;
    } else {
        ask(flow);
    }
    while (flow->answered == answered && !flow->error[0] && now_ns() - began < 1000000000) {
        struct pollfd wait = {flow->socket, POLLIN, 0};
        poll(&wait, 1, 100);
        receive(flow);
    }
    return flow->answered > answered && !flow->error[0];
}

static void open_flow(char *text, const char *prefix) {
    struct flow *flow = &flows[flow_count];
    char *kind = strtok(text, ":"), *where = strtok(NULL, ":"), *port = strtok(NULL, ":"), name[4200];
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port ? (uint16_t)atoi(port) : 0)};
    int found = -1;
    for (int number = 0; kind && number < 4; number++)
        if (strcmp(kind, kinds[number]) == 0) found = number;
    if (found < 0 || !port || inet_pton(AF_INET, where, &address.sin_addr) != 1) {
        fprintf(stderr, "probe: not KIND:ADDRESS:PORT: %s\n", text);
        exit(2);
    }
    flow->kind = (enum kind)found;
    if (flow->kind == UDP) flow->sent_ns = calloc(SENT_RING, sizeof *flow->sent_ns);
    snprintf(name, sizeof name, "%s.%d", prefix, flow_count);
    if (!(flow->samples = fopen(name, "we"))) die(name);
    setvbuf(flow->samples, NULL, _IOFBF, 1 << 20);
    uint64_t began = now_ns();
    while (!stopped) {
        if (connected(flow, &address)) {
            if (greeted(flow)) break;
            close(flow->socket);
        }
        if (now_ns() - began > READY_NS) {
            fprintf(stderr, "probe: no answer from the service\n");
            exit(1);
        }
        usleep(50000);
    }
    flow->asked = flow->answered = 0;
    flow->waiting = 0;
    fseek(flow->samples, 0, SEEK_SET);
    if (ftruncate(fileno(flow->samples), 0) != 0) die("ftruncate");
    flow_count++;
}

static void run(uint64_t every_ns, uint64_t stall_length_us, uint64_t stall_every_ns, FILE *stalls) {
    struct pollfd waits[FLOWS_MAX];
    uint64_t turn = 0, next_ns = now_ns(), stall_ns = next_ns + stall_every_ns;
    for (int number = 0; number < flow_count; number++) waits[number] = (struct pollfd){flows[number].socket, POLLIN, 0};
    while (!stopped) {
        uint64_t now = now_ns();
        if (now >= next_ns) {
            if (stall_length_us && now >= stall_ns && !flows[0].waiting) {
                stall_us = stall_length_us;
                stall_ns = now + stall_every_ns;
                fwrite(&now, sizeof now, 1, stalls);
            }
            for (int number = 0; number < flow_count; number++) {
                struct flow *flow = &flows[number];
                if (flow->kind == UDP && turn % DATAGRAM_TURNS) continue;
                if (!flow->waiting && !flow->error[0]) ask(flow);
            }
            turn++;
            next_ns += every_ns;
            if (next_ns < now) next_ns = now + every_ns; /* what was missed is not made up for */
        }
        now = now_ns();
        struct timespec wait = {0, now < next_ns ? (long)(next_ns - now) : 0};
        int ready = ppoll(waits, (nfds_t)flow_count, &wait, NULL);
        for (int number = 0; ready > 0 && number < flow_count; number++) {
            if (!waits[number].revents) continue;
            receive(&flows[number]);
            if (flows[number].error[0]) waits[number].fd = -1;
        }
    }
}

int main(int count, char **words) {
    static const struct option known[] = {
        {"out", 1, 0, 'o'}, {"every-us", 1, 0, 'e'}, {"stall-us", 1, 0, 's'}, {"stall-every-ms", 1, 0, 'm'}, {0}};
    const char *prefix = NULL;
    uint64_t every_us = 200, stall_length_us = 0, stall_every_ms = 500;
    for (int found; (found = getopt_long(count, words, "", known, NULL)) != -1;) {
        switch (found) {
        case 'o': prefix = optarg; break;
        case 'e': every_us = strtoull(optarg, NULL, 10); break;
        case 's': stall_length_us = strtoull(optarg, NULL, 10); break;
        case 'm': stall_every_ms = strtoull(optarg, NULL, 10); break;
        default: return 2;
        }
    }
    if (!prefix || optind == count || count - optind > FLOWS_MAX) {
        fprintf(stderr, "usage: probe --out PREFIX [OPTION...] KIND:ADDRESS:PORT...\n");
        return 2;
    }
    struct sigaction act = {.sa_handler = stop};
    sigaction(SIGTERM, &act, NULL);
    sigaction(SIGINT, &act, NULL);
    while (optind < count) open_flow(words[optind++], prefix);

    char name[4200];
    snprintf(name, sizeof name, "%s.stalls", prefix);
    FILE *stalls = stall_length_us ? fopen(name, "we") : NULL;
    if (stall_length_us && !stalls) die(name);
    struct sched_param high = {.sched_priority = 50};
    if (mlockall(MCL_CURRENT) != 0 || sched_setscheduler(0, SCHED_FIFO, &high) != 0)
        fprintf(stderr, "probe: no real-time priority: %s\n", strerror(errno));
    puts("ready");
    fflush(stdout);
    run(every_us * 1000, stall_length_us, stall_every_ms * 1000000, stalls);
    for (int number = 0; number < flow_count; number++) {
        struct flow *flow = &flows[number];
        if (fclose(flow->samples) != 0) die("samples");
        printf("%lu %lu %s\n", flow->asked, flow->answered, flow->error[0] ? flow->error : "-");
    }
    if (stalls) fclose(stalls);
    return 0;
}
