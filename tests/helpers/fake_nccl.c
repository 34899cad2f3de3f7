/* A libnccl that moves nothing: it answers as it is told and counts how it is called. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
  char internal[128];
} UniqueId;
typedef struct {
  size_t size;
  unsigned int magic, version;
  int blocking, cga_cluster_size, min_ctas, max_ctas;
  const char *net_name;
  int split_share, traffic_class;
} Config;

enum { kSuccess = 0, kInProgress = 7 };

/* What to do; set through ctypes. A negative number of polls means for ever. */
int fake_version = 22809;
int fake_init_polls = 0;
int fake_launch_polls = 0;
int fake_finalize_polls = 0;
int fake_result = kSuccess;        /* what work in progress ends with */
int fake_broadcast_result = kSuccess;
int fake_abort_hangs = 0;
int fake_abort_result = kSuccess;
int fake_blocking = 0;             /* work is done when the call returns */

/* What happened. */
int fake_aborts, fake_destroys, fake_finalizes, fake_groups, fake_calls, fake_depth;
int fake_aborted_under_a_thread;
int fake_config_blocking, fake_config_version, fake_config_traffic_class;
int fake_last_peer;
size_t fake_last_count;
void *fake_last_stream;

static int polls_left;
static int inside;

static int enter(void) { return __atomic_add_fetch(&inside, 1, __ATOMIC_SEQ_CST); }
static int leave(int result) {
  __atomic_sub_fetch(&inside, 1, __ATOMIC_SEQ_CST);
  return result;
}

static int begin(int polls) {
  if (fake_blocking) return fake_result;
  polls_left = polls;
  return kInProgress;
}

int ncclGetVersion(int *version) {
  *version = fake_version;
  return kSuccess;
}

int ncclGetUniqueId(UniqueId *id) {
  memset(id->internal, 42, sizeof id->internal);
  return kSuccess;
}

int ncclCommInitRankConfig(void **comm, int ranks, UniqueId id, int rank, Config *config) {
  fake_config_blocking = config->blocking;
  fake_config_version = (int)config->version;
  fake_config_traffic_class = config->traffic_class;
  int *made = malloc(3 * sizeof(int));
  made[0] = ranks;
  made[1] = rank;
  made[2] = id.internal[127] == 42 ? 0 : -1;
  *comm = made;
  return begin(fake_init_polls);
}

int ncclCommGetAsyncError(void *comm, int *result) {
  (void)comm;
  enter();
  if (polls_left > 0) polls_left--;
  *result = polls_left == 0 ? fake_result : kInProgress;
  usleep(100);
  return leave(kSuccess);
}

int ncclCommFinalize(void *comm) {
  (void)comm;
  fake_finalizes++;
  return begin(fake_finalize_polls);
}

int ncclCommDestroy(void *comm) {
  fake_destroys++;
  free(comm);
  return kSuccess;
}

int ncclCommAbort(void *comm) {
  (void)comm;
  if (inside) fake_aborted_under_a_thread++;
  __atomic_add_fetch(&fake_aborts, 1, __ATOMIC_SEQ_CST);
  while (__atomic_load_n(&fake_abort_hangs, __ATOMIC_SEQ_CST)) usleep(1000);
  return fake_abort_result;
}

int ncclCommCount(void *comm, int *count) {
  *count = ((int *)comm)[0];
  return kSuccess;
}

int ncclCommUserRank(void *comm, int *rank) {
  *rank = ((int *)comm)[1];
  return kSuccess;
}

int ncclCommCuDevice(void *comm, int *device) {
  *device = ((int *)comm)[2];
  return kSuccess;
}

const char *ncclGetErrorString(int result) { return result == 6 ? "remote error" : "fake error"; }

const char *ncclGetLastError(void *comm) {
  (void)comm;
  return "last words";
}

int ncclGroupStart(void) {
  fake_groups++;
  fake_depth++;
  return kSuccess;
}

int ncclGroupEnd(void) {
  fake_depth--;
  return begin(fake_launch_polls);
}

static int operation(size_t count, int peer, void *stream) {
  fake_calls++;
  fake_last_count = count;
  fake_last_peer = peer;
  fake_last_stream = stream;
  if (fake_broadcast_result != kSuccess) return fake_broadcast_result;
  return fake_depth ? kSuccess : begin(fake_launch_polls);
}

int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, void *comm,
                  void *stream) {
  (void)from, (void)to, (void)type, (void)comm;
  return operation(count, root, stream);
}

int ncclSend(const void *from, size_t count, int type, int peer, void *comm, void *stream) {
  (void)from, (void)type, (void)comm;
  return operation(count, peer, stream);
}

int ncclRecv(void *to, size_t count, int type, int peer, void *comm, void *stream) {
  (void)to, (void)type, (void)comm;
  return operation(count, peer, stream);
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, void *comm,
                  void *stream) {
  (void)from, (void)to, (void)op, (void)comm;
  return operation(count, type, stream);
}
