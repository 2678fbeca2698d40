// Threads for the CPU kernels: those that torch already has, otherwise a small pool of our own.
//
// torch's CPU operators run on an OpenMP runtime that it loads for all to see. Its threads go on spinning for some
// milliseconds after each operator, so a second set of threads would have to share the cores with them; and a second
// OpenMP runtime would bring just that. So the runtime is looked up when it is first needed, and none is linked. Where
// there is none, and in a forked child, where GNU's would wait for threads that did not come along, a pool of plain
// threads does the work.
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
