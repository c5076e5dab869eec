#pragma once

#include <cstdint>
#include <functional>

namespace mome {

// Threads this process may use: MOME_THREADS if set, else the cores it may run on (affinity mask
// and the container's CPU quota). Throws Error argument.threads if MOME_THREADS is not 1..1024.
int default_threads();

// Calls body(begin, end) for pieces that together cover [0, count) once, on up to `threads` threads
// (the caller is one of them; 0 means all) of the one pool of this process. The pool is made at the
// first call, with default_threads() threads. Returns when every piece is done; the first exception
// of a piece is thrown again here and the remaining pieces are skipped.
// Several threads may call at once, and a body may call again: a caller always works on its own
// pieces, so nobody waits for a free thread. After fork() the child makes a pool of its own.
// Which thread takes which piece is not fixed: bodies must write disjoint results.
void parallel_for(std::int64_t count, int threads,
                  const std::function<void(std::int64_t begin, std::int64_t end)>& body);

// The same for `count` tasks of unequal length, handed out one by one. body(task, worker) is told
// which of the `workers(threads)` workers it is: two tasks never run at once under the same number,
// and worker 0 is the caller.
void parallel_tasks(std::int64_t count, int threads,
                    const std::function<void(std::int64_t task, int worker)>& body);

// Most threads that a call with this limit uses (0: no limit).
int workers(int threads);

}  // namespace mome
