// A persistent pool of threads for the CPU kernels.
//
// Not OpenMP: torch brings an OpenMP runtime of its own, a second one in the process would keep a second set of
// spinning threads, and GNU's hangs in a child forked after its first use.
#pragma once

#include <cstdint>

namespace signadam::cpu {

using Task = void (*)(void* context, int64_t index);

// Runs task(context, i) for each i in [0, count) on up to `threads` threads, the caller among them, and returns when
// all are done. When another thread is using the pool the caller does the work alone. Tasks must not throw.
void parallel_for(int64_t count, int threads, Task task, void* context);

template <class Body>
void parallel_for(int64_t count, int threads, Body body) {
  parallel_for(count, threads, [](void* context, int64_t i) { (*static_cast<Body*>(context))(i); }, &body);
}

}  // namespace signadam::cpu
