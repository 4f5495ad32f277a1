// Threads that share pieces of work.
#pragma once

#include <cstdint>
#include <functional>

namespace qjax {

// Runs `work(0)` to `work(count - 1)` in up to `threads` threads, this one among them.
//
// Pieces are claimed one by one. This thread waits for what others have claimed and for
// nothing else: helpers that the system does not run cost nothing. Idle helpers sleep.
// What the first failing piece throws is thrown here.
void share(int64_t count, int threads, const std::function<void(int64_t)>& work);

}  // namespace qjax
