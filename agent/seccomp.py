"""The default system call filter of containers, in the form of the OCI runtime specification (config-linux.md#seccomp).

A list of what is forbidden: calls that reach the whole host (modules, kexec, the clock, quotas, raw mounts), that have
been the way out of containers more than once (keys, BPF, userfaultfd), or that a checkpoint cannot hold (io_uring:
answered as unknown to the kernel, which programs know how to do without).
"""

import platform
from typing import Any

EPERM = 1
ENOSYS = 38

# Calls of any other, x32 among them, end the caller.
_ARCHITECTURES = {
    "x86_64": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
    "aarch64": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
}

_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET} of sched.h

# Free to a container that has been given the capability, else forbidden even where the kernel would not ask for one.
_BY_CAPABILITY = {
    "CAP_SYS_ADMIN": [
        "bpf", "fanotify_init", "fsconfig", "fsmount", "fsopen", "fspick", "lookup_dcookie", "mount", "mount_setattr",
        "move_mount", "open_tree", "perf_event_open", "pivot_root", "quotactl", "quotactl_fd", "setns", "umount",
        "umount2", "unshare",
    ],
    "CAP_SYS_MODULE": ["create_module", "delete_module", "finit_module", "init_module", "query_module"],
    "CAP_SYS_BOOT": ["kexec_file_load", "kexec_load", "reboot"],
    "CAP_SYS_TIME": ["clock_adjtime", "clock_settime", "settimeofday", "stime"],
    "CAP_SYS_RAWIO": ["ioperm", "iopl"],
    "CAP_SYS_PACCT": ["acct"],
    "CAP_DAC_READ_SEARCH": ["open_by_handle_at"],
    "CAP_SYSLOG": ["syslog"],
    "CAP_SYS_NICE": ["get_mempolicy", "mbind", "migrate_pages", "move_pages", "set_mempolicy",
                     "set_mempolicy_home_node"],
}  # fmt: skip
_ALWAYS = [
    "_sysctl", "add_key", "get_kernel_syms", "keyctl", "nfsservctl", "request_key", "swapoff", "swapon", "sysfs",
    "uselib", "userfaultfd", "ustat", "vm86", "vm86old",
]  # fmt: skip
_UNKNOWN = ["io_uring_enter", "io_uring_register", "io_uring_setup"]


def profile(capabilities: set[str]) -> dict[str, Any]:
    """The filter for a container with these capabilities (names with CAP_)."""
    forbidden = set(_ALWAYS)
    for capability, calls in _BY_CAPABILITY.items():
        if capability not in capabilities:
            forbidden.update(calls)
    rules: list[dict[str, Any]] = [_error(sorted(forbidden), EPERM), _error(_UNKNOWN, ENOSYS)]
    if "CAP_SYS_ADMIN" not in capabilities:
        rules += [_new_namespace(bit) for bit in range(32) if _NEW_NAMESPACES >> bit & 1]
        # Its flags are in memory, where a filter cannot look; the C library goes back to clone.
        rules.append(_error(["clone3"], ENOSYS))
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": _ARCHITECTURES[platform.machine()],
        "syscalls": rules,
    }


def _error(names: list[str], number: int) -> dict[str, Any]:
    return {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": number}


def _new_namespace(bit: int) -> dict[str, Any]:
    flag = 1 << bit
    argument = {"index": 0, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ"}
    return {**_error(["clone"], EPERM), "args": [argument]}
