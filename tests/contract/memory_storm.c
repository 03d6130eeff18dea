/* A process that notices whatever a tracer might do to it: threads make system calls of all kinds that a stop can
 * interrupt, under an interval timer and signals to each other, and check every result. Says "ready", then on each line
 * of input how many rounds were made, or exits with 3 after saying what was wrong. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static atomic_long rounds, ticks, usr1_sent, usr1_seen;
static pthread_t worker;

#define CHECK(what) do { if (!(what)) { dprintf(1, "%s: line %d, errno %d\n", #what, __LINE__, errno); _exit(3); } } while (0)

static void on_tick(int signal) { (void)signal; ticks++; }
static void on_usr1(int signal) { (void)signal; usr1_seen++; }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void block_signals(void) {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
}

/* No signal reaches this thread: nothing may end with EINTR, and no time-out may come early. */
static void *undisturbed(void *unused) {
    int epoll = epoll_create1(0), pair[2], semaphore = semget(IPC_PRIVATE, 1, 0600), kind = 0;
    struct epoll_event event;
    struct timeval limit = {0, 3000};
    sigset_t usr2, all;
    (void)unused;
    block_signals();
    sigemptyset(&usr2), sigaddset(&usr2, SIGUSR2), sigfillset(&all);
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    CHECK(!setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit));
    CHECK(semaphore >= 0);
    for (;; rounds++) {
        struct timespec short_time = {0, 3000000}, left = {0, 0};
        struct sembuf down = {0, -1, 0};
        struct pollfd input = {pair[0], POLLIN, 0};
        double begin = now();
        char byte;
        errno = 0;
        switch (kind++ % 9) {
        case 0: CHECK(epoll_wait(epoll, &event, 1, 3) == 0); break;
        case 1: CHECK(epoll_pwait(epoll, &event, 1, 3, &all) == 0); break;
        case 2: CHECK(poll(&input, 1, 3) == 0); break;
        case 3: CHECK(ppoll(&input, 1, &short_time, NULL) == 0); break;
        case 4: CHECK(nanosleep(&short_time, &left) == 0); break;
        case 5: CHECK(semtimedop(semaphore, &down, 1, &short_time) == -1 && errno == EAGAIN); break;
        case 6: CHECK(sigtimedwait(&usr2, NULL, &short_time) == -1 && errno == EAGAIN); break;
        case 7: CHECK(recv(pair[0], &byte, 1, 0) == -1 && errno == EAGAIN); break;
        case 8: CHECK(clock_nanosleep(CLOCK_MONOTONIC, 0, &short_time, NULL) == 0); break;
        }
        CHECK(now() - begin >= 0.0029);
    }
}

/* Computes and makes short calls, with flags, SSE and all registers in use, and an interval timer's signals. */
static void *busy(void *unused) {
    int pipes[2];
    CHECK(!pipe(pipes));
    (void)unused;
    for (unsigned long round = 1;; round++) {
        unsigned long sum = 0, back = 0;
        double product = 1;
        for (unsigned long i = 1; i <= 400; i++) sum += i * round, product = product * 1.0001 + i;
        CHECK(sum == round * 80200);
        CHECK(write(pipes[1], &sum, sizeof sum) == sizeof sum);
        CHECK(read(pipes[0], &back, sizeof back) == sizeof back && back == sum);
        CHECK(getpid() == (pid_t)syscall(SYS_getpid));
        CHECK(syscall(SYS_lseek, -1, 0, 0) == -1 && errno == EBADF);
    }
}

/* Sends signals that must all arrive, each once, and hold up nothing. */
static void *sender(void *unused) {
    (void)unused;
    block_signals();
    for (;;) {
        usr1_sent++;
        CHECK(!pthread_kill(worker, SIGUSR1));
        double limit = now() + 5;
        while (usr1_seen != usr1_sent) { CHECK(now() < limit); sched_yield(); }
        usleep(200);
    }
}

static void *receiver(void *unused) {
    sigset_t none;
    (void)unused;
    sigemptyset(&none);
    for (;;) {
        CHECK(sigsuspend(&none) == -1 && errno == EINTR);
    }
}

static void *spawner(void *unused) {
    (void)unused;
    block_signals();
    for (;;) {
        int status, descriptor = open("/dev/null", O_RDONLY);
        pid_t child = fork();
        CHECK(child >= 0 && descriptor >= 0);
        if (!child) { /* has none but those that the parent opened, and at times ours */
            char path[64], link[64];
            int inherited = 7;
            for (int i = 3; i < 64; i++) {
                snprintf(path, sizeof path, "/proc/self/fd/%d", i);
                long length = readlink(path, link, sizeof link - 1);
                if (length > 0) link[length] = 0;
                if (length > 0 && strstr(link, "userfaultfd")) inherited = 8;
            }
            _exit(inherited);
        }
        CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && (WEXITSTATUS(status) == 7 || WEXITSTATUS(status) == 8));
        CHECK(!close(descriptor));
        usleep(3000);
    }
}

int main(int argc, char **argv) {
    struct itimerval interval = {{0, 700}, {0, 700}};
    struct sigaction tick = {.sa_handler = on_tick, .sa_flags = SA_RESTART}, usr1 = {.sa_handler = on_usr1};
    pthread_t thread;
    char line[16];
    CHECK(!unshare(CLONE_NEWIPC)); /* its semaphore goes with it */
    signal(SIGTRAP, SIG_IGN);
    sigaction(SIGALRM, &tick, NULL);
    sigaction(SIGUSR1, &usr1, NULL);
    block_signals();
    CHECK(!pthread_create(&thread, NULL, undisturbed, NULL));
    if (argc > 1 && strstr(argv[1], "fork")) CHECK(!pthread_create(&thread, NULL, spawner, NULL));
    sigset_t set;
    sigemptyset(&set), sigaddset(&set, SIGALRM);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    CHECK(!pthread_create(&thread, NULL, busy, NULL));
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    CHECK(!pthread_create(&worker, NULL, receiver, NULL));
    usleep(50000);
    CHECK(!pthread_create(&thread, NULL, sender, NULL));
    CHECK(!setitimer(ITIMER_REAL, &interval, NULL));
    CHECK(write(1, "ready\n", 6) == 6);
    while (fgets(line, sizeof line, stdin)) {
        struct sigaction trap;
        long before = ticks;
        double limit = now() + 5;
        while (ticks == before) { CHECK(now() < limit); usleep(100); }
        sigaction(SIGTRAP, NULL, &trap);
        CHECK(trap.sa_handler == SIG_IGN);
        dprintf(1, "%ld\n", rounds);
    }
    return 0;
}
