// Runs independent tasks on torch's own OpenMP pool, and gives each task scratch memory.
//
//   Status s = parallel_for(threads, tasks, [&](i64 task) -> Status { ...; return OK; });
//
// Tasks are handed out dynamically, so which thread runs a task is not fixed: a task's result must
// be a function of its index alone. The call returns when all tasks are done, with OK or the last
// error that a task returned. With threads <= 1, one task, no pool, or in a forked child,
// everything runs on the caller.
//
// Every task runs in the default floating-point environment (round to nearest, denormals kept),
// whatever the calling thread had set: torch.set_flush_denormal acts on one thread only and would
// otherwise make bits depend on which thread ran a task.
#pragma once
#include "types.h"

namespace bi {

using TaskBody = Status (*)(void* context, i64 task);
Status run_tasks(int threads, i64 tasks, TaskBody body, void* context);

template <class Body>
inline Status parallel_for(int threads, i64 tasks, Body&& body) {
  auto call = [](void* context, i64 task) -> Status {
    return (*static_cast<__remove_reference_t(Body)*>(context))(task);
  };
  return run_tasks(threads, tasks, call, const_cast<void*>(static_cast<const void*>(&body)));
}

// 64-byte aligned memory of one task, freed at the end of its scope; `data` is null if there is
// none left.
struct Scratch {
  void* data;
  explicit Scratch(i64 bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace bi
