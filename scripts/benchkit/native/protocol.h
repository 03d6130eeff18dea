/* What the probe asks and the workload answers, on TCP and UDP alike; native byte order, the machine is one. */
#pragma once
#include <stdint.h>

struct question {
    uint64_t number;
    uint64_t stall_us; /* stand still for so long before the answer: an artificial pause */
};

struct answer {
    uint64_t number;
    uint64_t pages;  /* of memory written so far by the page writer */
    uint64_t blocks; /* of 4 KiB written so far by the disk writer */
};
