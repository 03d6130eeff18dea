/*
 * prlimit(2) for a CRIU whose root lacks CAP_SYS_RESOURCE, as in some sandboxes and nested virtual machines.
 *
 * Without it the kernel (kernel/sys.c, check_prlimit_permission, 6.18) lets a process read the limits only of processes
 * that have its own real ids: CRIU could not dump what runs as another user. This library, loaded before the C library,
 * takes those ids for the length of the call. The effective ids, and so the capabilities, stay.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

static long (*call)(long number, ...);

__attribute__((constructor)) static void find_call(void)
{
	call = dlsym(RTLD_NEXT, "syscall");
}

static int real_ids(long pid, unsigned *uid, unsigned *gid)
{
	char path[64], line[256];
	FILE *status;
	int found = 0;

	snprintf(path, sizeof(path), "/proc/%ld/status", pid);
	status = fopen(path, "re");
	if (!status)
		return -1;
	while (fgets(line, sizeof(line), status))
		found += sscanf(line, "Uid:\t%u", uid) == 1 || sscanf(line, "Gid:\t%u", gid) == 1;
	fclose(status);
	return found == 2 ? 0 : -1;
}

static long prlimit_as_owner(long pid, long resource, long old)
{
	unsigned uid, gid, own_uid = getuid(), own_gid = getgid();
	long result = -1;
	int error = EPERM;

	if (real_ids(pid, &uid, &gid) == 0) {
		/* Not by the C library, which would change every thread of the process. */
		if (call(SYS_setregid, gid, -1) == 0 && call(SYS_setreuid, uid, -1) == 0) {
			result = call(SYS_prlimit64, pid, resource, NULL, old);
			error = errno;
		}
		if (call(SYS_setreuid, own_uid, -1) != 0 || call(SYS_setregid, own_gid, -1) != 0)
			_exit(1);
	}
	errno = error;
	return result;
}

/* CRIU reads the limits by syscall(2), not by the C library's prlimit. */
long syscall(long number, ...)
{
	long a[6], result;
	va_list arguments;

	va_start(arguments, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(arguments, long);
	va_end(arguments);
	result = call(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	if (number == SYS_prlimit64 && result == -1 && errno == EPERM && !a[2])
		return prlimit_as_owner(a[0], a[1], a[3]);
	return result;
}
