/* The first program of the emulated machine: it loads /modules/N, gives eth0 the address of the kernel's command line
 * (bench_address=A.B.C.D), and becomes the workload, whose arguments are what stands there behind "--". */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static void die(const char *what) {
    printf("guest: %s: %s\n", what, strerror(errno));
    for (;;) pause();
}

static void load_modules(void) {
    for (int number = 0;; number++) {
        char name[40];
        snprintf(name, sizeof name, "/modules/%d", number);
        int file = open(name, O_RDONLY | O_CLOEXEC);
        if (file < 0) return;
        if (syscall(SYS_finit_module, file, "", 0) != 0) die(name);
        close(file);
    }
}

static void bring_up(int control, const char *link, const char *address, const char *mask) {
    struct ifreq request = {0};
    struct sockaddr_in *in = (struct sockaddr_in *)&request.ifr_addr;
    strncpy(request.ifr_name, link, IFNAMSIZ - 1);
    in->sin_family = AF_INET;
    if (inet_pton(AF_INET, address, &in->sin_addr) != 1 || ioctl(control, SIOCSIFADDR, &request) != 0) die(link);
    inet_pton(AF_INET, mask, &in->sin_addr);
    if (ioctl(control, SIOCSIFNETMASK, &request) != 0) die("netmask");
    if (ioctl(control, SIOCGIFFLAGS, &request) != 0) die("flags");
    request.ifr_flags |= IFF_UP;
    if (ioctl(control, SIOCSIFFLAGS, &request) != 0) die("up");
}

int main(int count, char **words) {
    (void)count;
    load_modules();
    int control = socket(AF_INET, SOCK_DGRAM, 0);
    const char *address = getenv("bench_address");
    if (control < 0 || !address) die("bench_address");
    bring_up(control, "lo", "127.0.0.1", "255.0.0.0");
    bring_up(control, "eth0", address, "255.255.0.0");
    close(control);
    /* What the kernel does not know of its own command line comes first. */
    char **first = words + 1;
    while (*first && strncmp(*first, "--", 2) != 0) first++;
    first[-1] = "/bin/workload";
    execv("/bin/workload", first - 1);
    die("/bin/workload");
}
