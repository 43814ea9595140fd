// The pool of threads: every piece is done once, and what work throws reaches the caller once all are done. Ends with the number of
// rounds in which that was not so.

#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "pool.hpp"

namespace {

constexpr std::size_t PIECES = 50;

bool does_all(sr3::Pool& pool) {
    std::vector<int> done(PIECES);
    pool.run(PIECES, [&](std::size_t piece, unsigned) { ++done[piece]; });
    return std::ranges::count(done, 1) == PIECES;
}

bool tells(sr3::Pool& pool) {
    std::vector<int> done(PIECES);
    try {
        pool.run(PIECES, [&](std::size_t piece, unsigned) {
            if (piece % 17 == 3) throw std::runtime_error("piece");
            ++done[piece];
        });
    } catch (const std::runtime_error&) {
        return pool.threads() == 1 || std::ranges::count(done, 1) == PIECES - 3;  // alone, the caller stops at once
    }
    return false;
}

}  // namespace

int main() {
    int wrong = 0;
    for (const unsigned threads : {1u, 2u, 5u}) {
        sr3::Pool pool(threads);
        for (int round = 0; round < 300; ++round) wrong += !does_all(pool) + !tells(pool);
    }
    std::printf("%d rounds wrong\n", wrong);
    return std::min(wrong, 100);
}
