#include "parallel.h"

#include <stdlib.h>

namespace bi {
namespace {

// libgomp's entry behind `#pragma omp parallel`, as the process's torch exports it.
using Fork = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
Fork fork_join = nullptr;

struct Job {
  TaskBody body;
  void* context;
  i64 tasks;
  i64 next;
  i32 status;
};

#if defined(__x86_64__)
struct FloatEnvironment {
  u32 saved = __builtin_ia32_stmxcsr();
  FloatEnvironment() { __builtin_ia32_ldmxcsr(0x1f80); }
  ~FloatEnvironment() { __builtin_ia32_ldmxcsr(saved); }
};
#elif defined(__aarch64__)
struct FloatEnvironment {
  u64 saved;
  FloatEnvironment() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" : : "r"(u64{0}) : "memory");
  }
  ~FloatEnvironment() { __asm__ volatile("msr fpcr, %0" : : "r"(saved) : "memory"); }
};
#endif

void work(void* data) {
  Job& job = *static_cast<Job*>(data);
  FloatEnvironment environment;
  for (;;) {
    i64 task = __atomic_fetch_add(&job.next, 1, __ATOMIC_RELAXED);
    if (task >= job.tasks) return;
    Status status = job.body(job.context, task);
    if (status != OK) __atomic_store_n(&job.status, status, __ATOMIC_RELAXED);
  }
}

}  // namespace

Status run_tasks(int threads, i64 tasks, TaskBody body, void* context) {
  if (tasks <= 0) return OK;
  Job job{body, context, tasks, 0, OK};
  Fork fork = __atomic_load_n(&fork_join, __ATOMIC_RELAXED);
  i64 team = min(threads, tasks);
  if (fork == nullptr || team <= 1) {
    work(&job);
  } else {
    fork(work, &job, static_cast<unsigned>(team), 0);
  }
  return static_cast<Status>(job.status);
}

Scratch::Scratch(i64 bytes) {
  if (posix_memalign(&data, 64, static_cast<size_t>(max(bytes, 64))) != 0) data = nullptr;
}
Scratch::~Scratch() { free(data); }

}  // namespace bi

// `gomp_parallel` is the address of GOMP_parallel in the process's OpenMP runtime, or null for one
// thread. A forked child calls it with null: the pool's threads do not exist there, and waiting for
// them would hang.
BI_EXPORT void bi_init(void* gomp_parallel) {
  __atomic_store_n(&bi::fork_join, reinterpret_cast<bi::Fork>(gomp_parallel), __ATOMIC_RELAXED);
}
