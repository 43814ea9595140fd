// The loops of step.hpp on the host. Every loop is over a block of consecutive pixels of one picture, so that its noise and its
// prediction stay in the first-level cache; blocks do not depend on one another, so threads cannot change a bit.

#include "step.hpp"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "clones.hpp"

static_assert(sizeof(sr3::Row) == 7 * sizeof(float));

namespace sr3 {
namespace {

constexpr std::size_t BLOCK = 512;              // pixels
constexpr std::size_t BLOCKS_PER_THREAD = 8;    // less is done sooner than a thread is started
constexpr std::uint32_t NOT_FINITE = 1u << 31;  // see not_finite

struct Block {
    std::size_t picture, pixel, count;
};

// Where the pixels of a block lie in their picture.
struct Places {
    std::uint32_t column[BLOCK], row[BLOCK];
};

struct Group {
    float z[4][BLOCK];
};

Places places(const Block& block, const Shape& shape, const Noise& noise) {
    Places where;
    std::size_t row = block.pixel / shape.w, column = block.pixel % shape.w;
    const std::uint32_t top = noise.corners == nullptr ? 0 : noise.corners[2 * block.picture];
    const std::uint32_t left = noise.corners == nullptr ? 0 : noise.corners[2 * block.picture + 1];
    for (std::size_t i = 0; i < block.count; ++i) {
        where.row[i] = top + static_cast<std::uint32_t>(row);
        where.column[i] = left + static_cast<std::uint32_t>(column);
        if (++column == shape.w) column = 0, ++row;
    }
    return where;
}

SR3_CLONES void make_normals(Group& group, const Places& where, std::size_t count, std::uint32_t step, std::uint32_t index,
                             Key key) {
    for (std::size_t i = 0; i < count; ++i) {
        const Normals z = normals_at(where.column[i], where.row[i], step, index, key);
        group.z[0][i] = z.z0;
        group.z[1][i] = z.z1;
        group.z[2][i] = z.z2;
        group.z[3][i] = z.z3;
    }
}

SR3_CLONES std::uint32_t predict_run(const float* __restrict__ y, const float* __restrict__ net, float* __restrict__ x0_new,
                                     std::size_t count, Row row, bool clip) {
    std::uint32_t seen = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const float x0 = predicted(row, y[i], net[i]);
        seen |= not_finite(x0);
        x0_new[i] = clip ? clipped(x0) : x0;
    }
    return seen;
}

SR3_CLONES std::uint32_t advance_run(float* __restrict__ y, const float* __restrict__ x0_new, float* __restrict__ x0,
                                     const float* __restrict__ z, std::size_t count, Row row) {
    std::uint32_t seen = 0;
    for (std::size_t i = 0; i < count; ++i) {
        float next = carried(row, y[i], x0_new[i]);
        if (row.c != 0.0f) next = add_product(next, row.c, x0[i]);
        if (row.s != 0.0f) next = add_product(next, row.s, z[i]);
        seen |= not_finite(next);
        y[i] = next;
        x0[i] = x0_new[i];
    }
    return seen;
}

// Calls work(Block) for every block of every picture; the OR of what it returns.
template <class Work>
std::uint32_t over_blocks(const Shape& shape, unsigned threads, const Work& work) {
    const std::size_t plane = shape.h * shape.w;
    const std::size_t per_picture = (plane + BLOCK - 1) / BLOCK;
    const std::size_t total = shape.c == 0 ? 0 : shape.n * per_picture;
    std::atomic<std::uint32_t> seen{0};
    const auto part = [&](std::size_t first, std::size_t last) {
        std::uint32_t mine = 0;
        for (std::size_t i = first; i < last; ++i) {
            const std::size_t pixel = i % per_picture * BLOCK;
            mine |= work(Block{i / per_picture, pixel, std::min(BLOCK, plane - pixel)});
        }
        seen |= mine;
    };
    const std::size_t parts = std::clamp<std::size_t>(total / BLOCKS_PER_THREAD, 1, threads);
    std::vector<std::thread> others;
    others.reserve(parts - 1);
    std::size_t first = 0;
    for (std::size_t i = 1; i < parts; ++i) {
        const std::size_t last = total * i / parts;
        try {
            others.emplace_back(part, first, last);
        } catch (const std::system_error&) {
            break;  // no more threads to be had: the rest is done here
        }
        first = last;
    }
    part(first, total);
    for (std::thread& other : others) other.join();
    return seen;
}

// Calls work(offset, z) for every channel of a block, z being its normals (null where the row has s = 0).
template <class Work>
std::uint32_t over_channels(const Block& block, const Shape& shape, const Noise& noise, bool noisy, const Work& work) {
    const std::size_t plane = shape.h * shape.w;
    const std::size_t start = block.picture * shape.c * plane + block.pixel;
    Group group;
    Places where;
    if (noisy) where = places(block, shape, noise);
    std::uint32_t seen = 0;
    for (std::size_t channel = 0; channel < shape.c; ++channel) {
        if (noisy && channel % 4 == 0) {
            make_normals(group, where, block.count, noise.steps[block.picture], static_cast<std::uint32_t>(channel / 4),
                         key_of(noise.seeds[block.picture]));
        }
        seen |= work(start + channel * plane, noisy ? group.z[channel % 4] : nullptr);
    }
    return seen;
}

}  // namespace

void normals(float* out, const Shape& shape, const Noise& noise, unsigned threads) {
    over_blocks(shape, threads, [&](const Block& block) {
        return over_channels(block, shape, noise, true, [&](std::size_t at, const float* z) {
            std::copy_n(z, block.count, out + at);
            return 0u;
        });
    });
}

bool predict(const float* y, const float* net, float* x0_new, const Row* rows, const Shape& shape, bool clip, unsigned threads) {
    const std::uint32_t seen = over_blocks(shape, threads, [&](const Block& block) {
        return over_channels(block, shape, {}, false, [&](std::size_t at, const float*) {
            return predict_run(y + at, net + at, x0_new + at, block.count, rows[block.picture], clip);
        });
    });
    return (seen & NOT_FINITE) == 0;
}

bool advance(float* y, const float* x0_new, float* x0, const Row* rows, const Shape& shape, const Noise& noise, const float* z,
             unsigned threads) {
    const std::uint32_t seen = over_blocks(shape, threads, [&](const Block& block) {
        const Row& row = rows[block.picture];
        return over_channels(block, shape, noise, z == nullptr && row.s != 0.0f, [&](std::size_t at, const float* made) {
            return advance_run(y + at, x0_new + at, x0 + at, z == nullptr ? made : z + at, block.count, row);
        });
    });
    return (seen & NOT_FINITE) == 0;
}

bool step(float* y, const float* net, float* x0, const Row* rows, const Shape& shape, const Noise& noise, bool clip,
          unsigned threads) {
    const std::uint32_t seen = over_blocks(shape, threads, [&](const Block& block) {
        const Row& row = rows[block.picture];
        return over_channels(block, shape, noise, row.s != 0.0f, [&](std::size_t at, const float* z) {
            float x0_new[BLOCK];
            const std::uint32_t first = predict_run(y + at, net + at, x0_new, block.count, row, clip);
            return first | advance_run(y + at, x0_new, x0 + at, z, block.count, row);
        });
    });
    return (seen & NOT_FINITE) == 0;
}

}  // namespace sr3
