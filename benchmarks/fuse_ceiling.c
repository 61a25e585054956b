/* What a FUSE server in C reaches here that serves one complete file and does nothing else: the ceiling of not passing through.
 *
 *     cc -O2 -o fuse_ceiling fuse_ceiling.c -lpthread
 *     fuse_ceiling MOUNTPOINT FILE THREADS splice|write     serves FILE as MOUNTPOINT/file until it is unmounted; needs CAP_SYS_ADMIN
 *
 * `splice` moves the file's pages through a pipe, as lazyfs/mount/transports/raw.py does; `write` sends them out of a mapping of the file. One
 * line on stdout when it serves. Used by lazyfs.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PAGES = 255, PIPE = 1 << 20, BUFFER = 1 << 16, FILE_INODE = 2 };

static int connection, file, use_splice;
static uint64_t size;
static char *mapping;

static void die(const char *what) {
  perror(what);
  exit(1);
}

static void reply(int fd, uint64_t unique, int error, const void *body, size_t length) {
  struct fuse_out_header header = {sizeof header + length, -error, unique};
  struct iovec parts[] = {{&header, sizeof header}, {(void *)body, length}};
  if (writev(fd, parts, length ? 2 : 1) < 0 && errno != ENOENT && errno != ENODEV) perror("reply");
}

static struct fuse_attr attributes(uint64_t inode) {
  struct fuse_attr found = {.ino = inode, .nlink = 1, .blksize = 1 << 20};
  found.mode = inode == FUSE_ROOT_ID ? S_IFDIR | 0755 : S_IFREG | 0444;
  found.size = inode == FUSE_ROOT_ID ? 0 : size;
  return found;
}

static void answer_read(int fd, uint64_t unique, const struct fuse_read_in *wanted, int pipe_ends[2]) {
  loff_t offset = wanted->offset;
  size_t length = offset >= (loff_t)size ? 0 : wanted->size < size - offset ? wanted->size : size - offset;
  if (!use_splice || !length) {
    if (length) madvise(mapping + offset, length, MADV_POPULATE_READ);
    reply(fd, unique, 0, mapping + offset, length);
    if (length) madvise(mapping + offset, length, MADV_DONTNEED);
    return;
  }
  struct fuse_out_header header = {sizeof header + length, 0, unique};
  if (write(pipe_ends[1], &header, sizeof header) != sizeof header) die("pipe");
  for (size_t done = 0; done < length;) {
    ssize_t moved = splice(file, &offset, pipe_ends[1], NULL, length - done, 0);
    if (moved <= 0) die("splice from the file");
    done += moved;
  }
  if (splice(pipe_ends[0], NULL, fd, NULL, header.len, 0) < 0 && errno != ENOENT && errno != ENODEV) die("splice to the kernel");
}

static void *serve(void *argument) {
  int fd = (int)(long)argument, pipe_ends[2];
  char *buffer = aligned_alloc(4096, BUFFER);
  if (pipe(pipe_ends) || fcntl(pipe_ends[1], F_SETPIPE_SZ, PIPE) < PIPE) die("pipe");
  for (;;) {
    if (read(fd, buffer, BUFFER) < 0) {
      if (errno == EINTR || errno == EAGAIN || errno == ENOENT) continue;
      return NULL; /* unmounted */
    }
    struct fuse_in_header *in = (void *)buffer;
    void *body = in + 1;
    switch (in->opcode) {
    case FUSE_LOOKUP:
      if (strcmp(body, "file") || in->nodeid != FUSE_ROOT_ID) {
        reply(fd, in->unique, ENOENT, NULL, 0);
      } else {
        struct fuse_entry_out entry = {.nodeid = FILE_INODE, .entry_valid = 3600, .attr_valid = 3600, .attr = attributes(FILE_INODE)};
        reply(fd, in->unique, 0, &entry, sizeof entry);
      }
      break;
    case FUSE_GETATTR: {
      struct fuse_attr_out out = {.attr_valid = 3600, .attr = attributes(in->nodeid)};
      reply(fd, in->unique, 0, &out, sizeof out);
      break;
    }
    case FUSE_OPEN:
    case FUSE_OPENDIR: {
      struct fuse_open_out out = {.open_flags = FOPEN_KEEP_CACHE};
      reply(fd, in->unique, 0, &out, sizeof out);
      break;
    }
    case FUSE_READ:
      answer_read(fd, in->unique, body, pipe_ends);
      break;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
      break;
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
    case FUSE_FLUSH:
    case FUSE_ACCESS:
      reply(fd, in->unique, 0, NULL, 0);
      break;
    default:
      reply(fd, in->unique, ENOSYS, NULL, 0);
    }
  }
}

int main(int argc, char **argv) {
  if (argc != 5) {
    fprintf(stderr, "usage: %s MOUNTPOINT FILE THREADS splice|write\n", argv[0]);
    return 2;
  }
  int threads = atoi(argv[3]);
  use_splice = !strcmp(argv[4], "splice");
  struct stat facts;
  file = open(argv[2], O_RDONLY);
  if (file < 0 || fstat(file, &facts)) die(argv[2]);
  size = facts.st_size;
  mapping = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0);
  if (mapping == MAP_FAILED) die("mmap");
  connection = open("/dev/fuse", O_RDWR);
  if (connection < 0) die("/dev/fuse");
  char options[200];
  snprintf(options, sizeof options, "fd=%d,rootmode=40755,user_id=0,group_id=0,allow_other", connection);
  if (mount("ceiling", argv[1], "fuse.ceiling", MS_RDONLY | MS_NOSUID | MS_NODEV, options)) die("mount");

  char greeting[BUFFER];
  if (read(connection, greeting, sizeof greeting) < 0) die("greeting");
  struct fuse_in_header *in = (void *)greeting;
  struct fuse_init_in *offered = (void *)(in + 1);
  struct fuse_init_out out = {.major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION, .max_readahead = offered->max_readahead};
  if (out.minor > offered->minor) out.minor = offered->minor;
  out.flags = offered->flags & (FUSE_ASYNC_READ | FUSE_MAX_PAGES);
  out.max_background = 64, out.congestion_threshold = 48, out.max_write = 4096, out.time_gran = 1, out.max_pages = PAGES;
  reply(connection, in->unique, 0, &out, sizeof out);

  for (long number = 0; number < threads; number++) {
    int fd = connection;
    if (number) {
      fd = open("/dev/fuse", O_RDWR);
      if (fd < 0 || ioctl(fd, FUSE_DEV_IOC_CLONE, &connection)) die("clone");
    }
    pthread_t thread;
    if (pthread_create(&thread, NULL, serve, (void *)(long)fd)) die("thread");
    if (number == threads - 1) {
      puts("serving");
      fflush(stdout);
      pthread_join(thread, NULL);
    }
  }
  return 0;
}
