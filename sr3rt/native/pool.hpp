// Threads that share out numbered pieces of work, one piece at a time, so that a thread whose core is taken away does less.
//
// Idle threads sleep: they look for work for some microseconds (the next layer is usually about to begin), then wait for the
// kernel. A piece never depends on which thread does it, so their number cannot change a result.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

namespace sr3 {

class Pool {
   public:
    // work(piece, thread): thread is 0 … threads()-1, for memory of its own.
    using Work = std::function<void(std::size_t piece, unsigned thread)>;

    // Of `threads` threads the caller is one. Where the system gives fewer, fewer work.
    explicit Pool(unsigned threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // Does pieces 0 … pieces-1 and returns when all are done. One caller at a time. What work throws, the first of it, is thrown then.
    void run(std::size_t pieces, const Work& work);

    // To be called in a process that was forked, which has none of the threads: the next `run` starts others.
    void forked();

    unsigned threads() const { return threads_; }

   private:
    void start();
    void abandon();
    bool take(unsigned thread);
    void live(unsigned thread);

    // Pieces in the upper half, the next one in the lower: in one word, so that a thread that comes late sees that none is left.
    std::atomic<std::uint64_t> state_{0};
    std::atomic<const Work*> work_{nullptr};
    std::atomic<std::size_t> done_{0};
    std::atomic<bool> failed_{false};
    std::exception_ptr failure_;                // set by whoever set failed_, before its piece is done
    std::atomic<std::uint32_t> generation_{0};  // what sleeping threads wait on
    std::atomic<bool> ending_{false};
    std::vector<std::thread> workers_;
    unsigned threads_;  // the caller's included
    int process_;       // whose threads they are
};

}  // namespace sr3
