/*
 * Six system calls of CRIU, done better. Loaded before the C library.
 *
 * PAGEMAP_SCAN: CRIU asks which pages are a file's, also where no file is mapped. That takes the kernel ten times as
 * long as all else that is asked (13 ms for 1 GiB, Linux 6.18), while the container stands still. And where
 * MIGRATOR_KNOWS_PAGES is in the environment, it is told that large mappings without a file hold nothing, since it would
 * go through their pages one by one (7 ms for 1 GiB): who has set that adds them to its images (migrator/pageless.py).
 *
 * lseek(2) with SEEK_DATA: with MIGRATOR_LEFT_OUT in the environment, a file of objects of shared memory, each of these
 * holds no data (migrator/shm/left_out.py). They were sent before, and CRIU would copy them.
 *
 * openat(2) of a process' smaps: with MIGRATOR_SMAPS in the environment, a folder, it gets the file there that has the
 * process' pid as its name, if there is one (migrator/smaps.py). In the real one the kernel goes through all pages.
 * fstatat(2) of its map_files: CRIU asks for each mapping how its file is open. That is in a second file there.
 *
 * prlimit(2): where root lacks CAP_SYS_RESOURCE, as in some sandboxes and nested virtual machines, the kernel
 * (kernel/sys.c, check_prlimit_permission, 6.18) lets a process read the limits only of processes that have its own real
 * ids: CRIU could not dump what runs as another user. It gets those ids for the length of the call. The effective ids,
 * and so the capabilities, stay.
 *
 * recv(2): with MIGRATOR_RESTORE in the environment, a folder, CRIU is started long before it is asked to restore
 * (agent/restorer.py). That it waits to be asked is told by a file there, "waits-" and its pid. What could not be had by
 * then it gets when the request comes: mounts of its own, which are seen nowhere else and go with it, and the open files
 * that are listed in "inherit" (migrator/shm/images.py).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* struct pm_scan_arg of linux/fs.h, which older headers do not have. */
struct scan {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t inverted, mask, any_of, returned;
};
enum { PAGE_IS_FILE = 1 << 2 };
static const unsigned long PAGEMAP_SCAN = 0xc0606610;
/* A shorter mapping is not worth looking at (LARGE_BYTES of migrator/pageless.py). CRIU asks for several mappings at
 * once only within 2 MiB. */
static const uint64_t LARGE = 4 << 20;

static long (*call)(long number, ...);
static int (*control)(int descriptor, unsigned long request, ...);
static int (*open_at)(int folder, const char *path, int flags, ...);
static int (*stat_at)(int folder, const char *path, struct stat64 *status, int flags);
static off64_t (*seek)(int descriptor, off64_t offset, int whence);
static ssize_t (*receive)(int descriptor, void *buffer, size_t length, int flags);

/* What CRIU starts is not to have it. */
__attribute__((constructor)) static void stay_here(void)
{
	unsetenv("LD_PRELOAD");
}

/* Not in a constructor: that of another library may be first to call one of them. */
static void find_calls(void)
{
	if (seek)
		return;
	call = dlsym(RTLD_NEXT, "syscall");
	control = dlsym(RTLD_NEXT, "ioctl");
	open_at = dlsym(RTLD_NEXT, "openat64");
	stat_at = dlsym(RTLD_NEXT, "fstatat64");
	receive = dlsym(RTLD_NEXT, "recv");
	seek = dlsym(RTLD_NEXT, "lseek64");
}

/* The process of which this is the pagemap or the folder in /proc, or 0. */
static long pid_of(int descriptor)
{
	char link[64], path[256], *name;
	long pid;
	ssize_t length;
	int end = 0;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", descriptor);
	length = readlink(link, path, sizeof(path) - 1);
	if (length <= 0)
		return 0;
	path[length] = 0;
	name = length > 8 ? path + length - 8 : path;
	if (!strcmp(name, "/pagemap"))
		*name = 0;
	/* By way of a /proc of CRIU's own the path does not begin with /proc. */
	name = strrchr(path, '/');
	return name && sscanf(name, "/%ld%n", &pid, &end) == 1 && !name[end] ? pid : 0;
}

/* Of the process whose smaps CRIU is reading: its mappings in order, and with which mode map_files would show them. */
static FILE *modes;
static struct mapping {
	uint64_t start, end, mode;
} one;

int openat64(int folder, const char *path, int flags, ...)
{
	const char *ours = strcmp(path, "smaps") ? NULL : getenv("MIGRATOR_SMAPS");
	char name[512];
	va_list arguments;
	unsigned mode;
	int made;

	find_calls();
	va_start(arguments, flags);
	mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(arguments, unsigned) : 0;
	va_end(arguments);
	if (ours && (size_t)snprintf(name, sizeof(name), "%s/%ld", ours, pid_of(folder)) < sizeof(name)) {
		made = open_at(AT_FDCWD, name, flags);
		if (modes)
			fclose(modes);
		one = (struct mapping){ 0 };
		modes = made >= 0 && strlen(name) + sizeof(".modes") <= sizeof(name) ? fopen(strcat(name, ".modes"), "re") : NULL;
		if (made >= 0)
			return made;
	}
	return open_at(folder, path, flags, mode);
}

int fstatat64(int folder, const char *path, struct stat64 *status, int flags)
{
	uint64_t start, end;

	find_calls();
	if (modes && flags == AT_SYMLINK_NOFOLLOW && sscanf(path, "%lx-%lx", &start, &end) == 2) {
		do {
			if (one.start == start && one.end == end) {
				memset(status, 0, sizeof(*status));
				status->st_mode = S_IFLNK | one.mode;
				errno = ENOENT; /* what has no file */
				return one.mode ? 0 : -1;
			}
		} while (fread(&one, sizeof(one), 1, modes) == 1);
	}
	return stat_at(folder, path, status, flags);
}

/* Whether the range is within one mapping of no file. CRIU asks in order of address, and the process stands still. */
static int is_anonymous(long pid, uint64_t from, uint64_t to)
{
	static FILE *maps;
	static long owner;
	static uint64_t start, end;
	static int anonymous;
	char path[64], line[512];
	unsigned long inode;
	int named;

	if (!maps || owner != pid || start > from) {
		if (maps)
			fclose(maps);
		snprintf(path, sizeof(path), "/proc/%ld/maps", pid);
		maps = fopen(path, "re");
		owner = pid;
		start = end = 0;
	}
	while (maps && end <= from && fgets(line, sizeof(line), maps)) {
		named = 0;
		if (sscanf(line, "%lx-%lx %*s %*s %*s %lu %n", &start, &end, &inode, &named) != 3)
			return 0;
		anonymous = inode == 0 && named && (!line[named] || line[named] == '[');
		while (!strchr(line, '\n') && fgets(line, sizeof(line), maps))
			; /* the rest of a long name */
	}
	return anonymous && start <= from && to <= end;
}

int ioctl(int descriptor, unsigned long request, ...)
{
	struct scan *scan, changed;
	va_list arguments;
	void *argument;
	long pid;
	int result;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	scan = argument;
	find_calls();
	if (request != PAGEMAP_SCAN || scan->size != sizeof(*scan) || scan->end - scan->start < LARGE)
		return control(descriptor, request, argument);
	/* What is asked for is pages that are not a file's. */
	if (!(scan->mask & scan->inverted & PAGE_IS_FILE) || (scan->any_of | scan->returned) & PAGE_IS_FILE)
		return control(descriptor, request, argument);
	pid = pid_of(descriptor);
	if (!pid || !is_anonymous(pid, scan->start, scan->end))
		return control(descriptor, request, argument);
	if (getenv("MIGRATOR_KNOWS_PAGES")) {
		scan->walk_end = scan->end;
		return 0;
	}
	changed = *scan;
	changed.mask &= ~(uint64_t)PAGE_IS_FILE;
	changed.inverted &= ~(uint64_t)PAGE_IS_FILE;
	result = control(descriptor, request, &changed);
	scan->walk_end = changed.walk_end;
	return result;
}

struct object {
	uint64_t device, inode;
	int64_t seconds, nanoseconds;
};

/* By device, inode number and ctime: the number of System V memory is its id, which may be a memfd's, too. */
static int is_left_out(int descriptor)
{
	const char *path = getenv("MIGRATOR_LEFT_OUT");
	FILE *file = path ? fopen(path, "re") : NULL;
	struct stat64 status;
	struct object one;
	int found = 0;

	if (!file)
		return 0;
	if (fstat64(descriptor, &status) == 0)
		while (!found && fread(&one, sizeof(one), 1, file) == 1)
			found = one.device == status.st_dev && one.inode == status.st_ino &&
				one.seconds == status.st_ctim.tv_sec && one.nanoseconds == status.st_ctim.tv_nsec;
	fclose(file);
	return found;
}

off64_t lseek64(int descriptor, off64_t offset, int whence)
{
	find_calls();
	if (whence == SEEK_DATA && is_left_out(descriptor)) {
		errno = ENXIO;
		return -1;
	}
	return seek(descriptor, offset, whence);
}

/* Of a process that stands still. CRIU asks for 16 limits of each. */
static int real_ids(long pid, unsigned *uid, unsigned *gid)
{
	static long known;
	static unsigned known_uid, known_gid;
	char path[64], line[256];
	FILE *status;
	int found = 0;

	if (known != pid) {
		snprintf(path, sizeof(path), "/proc/%ld/status", pid);
		status = fopen(path, "re");
		if (!status)
			return -1;
		while (fgets(line, sizeof(line), status))
			found += sscanf(line, "Uid:\t%u", &known_uid) == 1 || sscanf(line, "Gid:\t%u", &known_gid) == 1;
		fclose(status);
		known = found == 2 ? pid : 0;
	}
	*uid = known_uid;
	*gid = known_gid;
	return known == pid ? 0 : -1;
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
	find_calls();
	result = call(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	if (number == SYS_prlimit64 && result == -1 && errno == EPERM && !a[2])
		return prlimit_as_owner(a[0], a[1], a[3]);
	return result;
}

static int is_restoring;

static void end_if(int failed, const char *what)
{
	if (failed) {
		fprintf(stderr, "criu-shim: %s: %s\n", what, strerror(errno));
		_exit(1);
	}
}

/* A line for each: the number, O_RDWR or O_RDONLY, the position, the path. */
static void inherit(const char *list)
{
	FILE *file = fopen(list, "re");
	long long position;
	int number, flags, opened;
	char path[512];

	if (!file)
		return;
	while (fscanf(file, "%d %d %lld %511[^\n]", &number, &flags, &position, path) == 4) {
		opened = open(path, flags);
		end_if(opened < 0 || lseek(opened, position, SEEK_SET) < 0, path);
		if (opened == number)
			continue;
		end_if(fcntl(number, F_GETFD) >= 0, "a descriptor to inherit is taken");
		end_if(dup2(opened, number) < 0 || close(opened) < 0, path);
	}
	fclose(file);
}

ssize_t recv(int descriptor, void *buffer, size_t length, int flags)
{
	const char *folder = getenv("MIGRATOR_RESTORE");
	char name[512];
	ssize_t result;

	find_calls();
	if (!folder || is_restoring)
		return receive(descriptor, buffer, length, flags);
	snprintf(name, sizeof(name), "%s/waits-%d", folder, getpid());
	end_if(close(open(name, O_WRONLY | O_CREAT | O_CLOEXEC, 0600)) < 0, name);
	result = receive(descriptor, buffer, length, flags);
	if (result > 0) {
		is_restoring = 1;
		end_if(unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_SLAVE | MS_REC, NULL) < 0, "mounts of its own");
		snprintf(name, sizeof(name), "%s/inherit", folder);
		inherit(name);
	}
	return result;
}
