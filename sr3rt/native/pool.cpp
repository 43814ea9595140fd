#include "pool.hpp"

#include <unistd.h>

#include <chrono>
#include <system_error>
#include <utility>

namespace sr3 {
namespace {

constexpr std::uint64_t NEXT = 0xFFFFFFFF;
constexpr auto PATIENCE = std::chrono::microseconds(50);

void breathe() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Looks until `ready()`, for a short time only. Whether it was.
template <class Ready>
bool look(const Ready& ready) {
    const auto end = std::chrono::steady_clock::now() + PATIENCE;
    do {
        for (int i = 0; i < 64; ++i) {
            if (ready()) return true;
            breathe();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

}  // namespace

Pool::Pool(unsigned threads) : threads_(threads), process_(getpid()) {
    start();
    threads_ = static_cast<unsigned>(workers_.size()) + 1;
}

void Pool::start() {
    workers_.reserve(threads_ - 1);
    for (unsigned thread = 1; thread < threads_; ++thread) {
        try {
            workers_.emplace_back(&Pool::live, this, thread);
        } catch (const std::system_error&) {
            break;
        }
    }
}

// Threads that a fork left behind: their handles can be neither joined nor destroyed.
void Pool::abandon() {
    new std::vector<std::thread>(std::move(workers_));
    workers_.clear();
}

void Pool::forked() {
    abandon();
    state_ = 0;  // of work that the parent may have been in
    process_ = 0;
}

Pool::~Pool() {
    if (getpid() != process_) abandon();
    ending_ = true;
    ++generation_;
    generation_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::run(std::size_t pieces, const Work& work) {
    if (pieces == 0) return;
    if (process_ == 0) {
        process_ = getpid();
        start();
    }
    if (workers_.empty() || pieces == 1) {
        for (std::size_t piece = 0; piece < pieces; ++piece) work(piece, 0);
        return;
    }
    work_.store(&work, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    state_.store(std::uint64_t{pieces} << 32, std::memory_order_release);
    ++generation_;
    generation_.notify_all();
    while (take(0)) {
    }
    const auto finished = [&] { return done_.load(std::memory_order_acquire) == pieces; };
    while (!look(finished)) {
        const std::size_t done = done_.load(std::memory_order_acquire);
        if (done != pieces) done_.wait(done);
    }
    if (failed_.load(std::memory_order_relaxed)) std::rethrow_exception(std::exchange(failure_, nullptr));
}

// Does the next piece, if there is one.
bool Pool::take(unsigned thread) {
    const std::uint64_t state = state_.load(std::memory_order_relaxed);
    if ((state & NEXT) >= state >> 32) return false;  // without this, waiting threads would count on for ever
    const std::uint64_t mine = state_.fetch_add(1, std::memory_order_acquire);
    const std::size_t piece = mine & NEXT, pieces = mine >> 32;
    if (piece >= pieces) return false;
    try {
        (*work_.load(std::memory_order_relaxed))(piece, thread);
    } catch (...) {
        if (!failed_.exchange(true)) failure_ = std::current_exception();
    }
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces) done_.notify_all();
    return true;
}

void Pool::live(unsigned thread) {
    std::uint32_t seen = 0;
    while (!ending_) {
        const auto called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
        if (!look(called)) generation_.wait(seen);
        seen = generation_.load(std::memory_order_acquire);
        while (take(thread)) {
        }
    }
}

}  // namespace sr3
