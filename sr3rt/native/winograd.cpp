// 3×3 convolutions of stride 1, by the transforms of winograd.hpp. See `Winograd::run` for how the work is cut.

#include <algorithm>
#include <utility>

#include "convolution.hpp"

namespace sr3 {
namespace {

constexpr int BLOCK_ROWS = 4, BLOCK_COLUMNS = 8;             // tiles of a piece of work
constexpr std::size_t BLOCK = BLOCK_ROWS * BLOCK_COLUMNS;
constexpr std::size_t SMALL = 64;                            // tiles up to which pictures are transformed together
constexpr std::size_t KEPT = 256 * 128;                      // inputs · outputs up to which transformed weights, four or nine times as large, are kept
constexpr std::size_t ENOUGH = 16;                           // tiles of a map that is doubled from which on 81 transformed weights cost less than they save

int tiles(int pixels) { return (pixels + TILE - 1) / TILE; }
std::size_t tiles(int height, int width) { return static_cast<std::size_t>(tiles(height)) * tiles(width); }

// What tiles lie on: the output, or the map that is doubled.
struct Ground {
    int height, width;
    bool doubled;

    std::size_t tiles() const { return sr3::tiles(height, width); }
    int products() const { return doubled ? DOUBLED : POINTS; }  // of a tile
    int part() const { return doubled ? DOUBLED_PART : POINTS; }  // of them, whose weights are transformed at a time
    int point(int product) const { return doubled ? doubled_point(product) : product; }
    int step() const { return doubled ? 2 : 1; }
};

// Whether it is just what one register holds.
bool plain(const Input& in) { return in.count == 1 && in.sources[0].scale == nullptr && !in.silu && in.resample == Resample::none; }

class Winograd final : public Convolution {
   public:
    Winograd(const Kernels& kernels, const std::vector<Register>& registers, ConvolutionOptions options, const float* weight,
             std::size_t outputs, std::vector<float> bias)
        : Convolution(kernels, registers, std::move(options), outputs, 3, std::move(bias)),
          panel_(2 * kernels.lanes),
          all_(words(inputs_)),
          kept_(inputs_ * padded_ <= KEPT),
          depth_(std::min(kept_ ? 2 * DEPTH : DEPTH, all_)) {
        const auto* added = dynamic_cast<const Convolution*>(options_.added);
        if (added != nullptr && added->only_sums() && !options_.after && !doubles()) added_ = added;
        hold([&] {
            Floats taps = in_words(kernels, packed(kernels, registers, weight), panels(), 9 * panel_);
            if (!kept_) return taps;
            const Ground kind{0, 0, doubles()};
            const std::size_t size = kind.products() * weights_plane();
            Floats points = floats(panels() * size);
            for (std::size_t p = 0; p < panels(); ++p)
                for (int first = 0; first < kind.products(); first += kind.part())
                    transform(kernels, kind, taps.get() + p * all_ * 9 * panel_, all_, first, points.get() + p * size + first * weights_plane());
            return points;
        });
    }

    Scratch scratch(const std::vector<Extent>& registers, std::size_t count) const override {
        const Ground ground = this->ground(registers);
        const std::size_t norms = rounded_up(norms_size(count), 16), weights = transformed_size(ground), all = ground.tiles();
        if (!by_panels(all)) return {norms, strip() + points_size(BLOCK) + ground.products() * sums_plane(BLOCK) + weights + (added_ ? added_size() : 0)};
        const std::size_t together = all * std::min(count, at_once(all));
        const std::size_t chunk = static_cast<std::size_t>(tiles(ground.height) * TILE + 2) * (tiles(ground.width) * TILE + 2) * DEPTH * word_;
        return {norms + points_size(together), std::max(chunk, ground.products() * sums_plane(together) + weights)};
    }

    // Of small pictures one reading of the weights serves several; of large ones a few have not the blocks for many threads.
    bool shares(const std::vector<Extent>& registers, std::size_t threads) const override {
        const std::size_t all = ground(registers).tiles();
        return all <= SMALL ? at_once(all) > 1 : all < 4 * BLOCK * threads;
    }

    // Of large pictures a 1×1 convolution's sums are made block by block as they are added: they need not go to memory and come back.
    bool absorbs(const std::vector<Extent>& registers) const override {
        return added_ != nullptr && !by_panels(ground(registers).tiles());
    }

    // Large pictures are cut into blocks of tiles, each done whole by one thread, transforms and all. Of small ones there are too few
    // blocks to share out and too many weights to read for each: the input's transforms are made first, then the panels are shared.
    void run(const Run& run) const override {
        find_norms(run, run.shared);
        const std::size_t all = ground(run).tiles();
        if (!by_panels(all)) {
            run_blocks(run);
            return;
        }
        for (std::size_t first = 0; first < run.planar.count; first += at_once(all))
            run_panels(run, first, std::min(run.planar.count - first, at_once(all)));
    }

   protected:
    std::size_t units(int height, int width) const override {
        const Ground ground = this->ground(height, width);
        const std::size_t high = unit_rows(ground);
        return (tiles(ground.height) + high - 1) / high * segments(ground.width);
    }

   private:
    bool doubles() const { return options_.resample == Resample::up; }
    // Of an output of these extents.
    Ground ground(int height, int width) const {
        const bool doubled = doubles() && (kept_ || tiles(height / 2, width / 2) >= ENOUGH);
        return doubled ? Ground{height / 2, width / 2, true} : Ground{height, width, false};
    }
    Ground ground(const std::vector<Extent>& registers) const {
        const Extent out = extent(registers, 0, 0);
        return ground(out.height, out.width);
    }
    Ground ground(const Run& run) const { return ground(run.views[to].height, run.views[to].width); }
    Input input(const Run& run, const Ground& ground, std::size_t picture, const float* norms) const {
        Input in = Convolution::input(run, picture, norms);
        if (ground.doubled) in.resample = Resample::none;
        in.height = ground.height, in.width = ground.width;
        return in;
    }

    // Rows of tiles whose outputs are summed in one place for the next norm: a block's, which one thread makes.
    std::size_t unit_rows(const Ground& ground) const { return by_panels(ground.tiles()) ? 1 : BLOCK_ROWS; }
    static std::size_t segments(int width) { return (tiles(width) + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS; }
    // Whether panels, not places, are shared out: also where each block would transform the weights anew, if there are as many panels as blocks.
    bool by_panels(std::size_t all) const { return all <= SMALL || (!kept_ && all <= panels() * BLOCK && all <= 4 * SMALL); }
    static std::size_t at_once(std::size_t all) { return std::max<std::size_t>(1, SMALL / all); }  // pictures
    std::size_t weights_plane() const { return plane_of((kept_ ? all_ : depth_) * panel_); }
    std::size_t transformed_size(const Ground& ground) const { return kept_ ? 0 : ground.part() * weights_plane(); }
    std::size_t points_plane(std::size_t count) const { return plane_of(count * depth_); }
    std::size_t points_size(std::size_t count) const { return (all_ + depth_ - 1) / depth_ * POINTS * points_plane(count); }
    // Where a word of the points of the first tile lies: what is multiplied at a time lies together.
    std::size_t points_at(std::size_t word, std::size_t plane) const { return word / depth_ * POINTS * plane + word % depth_; }
    std::size_t sums_plane(std::size_t count) const { return plane_of(count * panel_); }
    // Of a block: the sums of what it adds, their inputs in words, and a row of these.
    std::size_t added_words() const { return word_ == 1 ? 0 : BLOCK * TILE * TILE * added_->inputs() / word_; }
    std::size_t added_size() const {
        return BLOCK * TILE * TILE * panel_ + rounded_up(added_words(), 16) + (word_ == 1 ? 0 : BLOCK_COLUMNS * TILE * added_->inputs());
    }
    std::size_t strip() const { return rounded_up((BLOCK_ROWS * TILE + 2) * (BLOCK_COLUMNS * TILE + 2) * inputs_, 16); }

    // The weights of ground.part() products from `first` on.
    void transform(const Kernels& kernels, const Ground& ground, const float* packed, std::size_t words, int first, float* to) const {
        if (ground.doubled) return kernels.doubled_weights(packed, words, first / DOUBLED_PART, to, weights_plane());
        kernels.transform_weights(packed, words, to, weights_plane());
    }

    // The products of a panel: points [part of the depth][36 planes of [tile][word]] -> sums [plane of [tile][lane] for each product]. The calling
    // thread multiplies the panel `step` further on next, as a rule.
    void multiply(const Run& run, const Ground& ground, std::size_t panel, std::size_t step, std::size_t count, const float* points,
                  std::size_t plane, float* sums, float* transformed) const {
        for (std::size_t first = 0; first < all_; first += depth_) {
            const std::size_t depth = std::min(depth_, all_ - first);
            const auto packed = [&](std::size_t which, std::size_t word) { return weights_.get() + (which * all_ + word) * 9 * panel_; };
            const float* soon = first + depth < all_ ? packed(panel, first + depth) : packed(panel + step, 0);
            for (int product = 0; product < ground.products(); ++product) {
                const int before = product % ground.part(), point = ground.point(product);
                if (!kept_ && before == 0) transform(run.kernels, ground, packed(panel, first), depth, product, transformed);
                const float* kept = weights_.get() + (panel * ground.products() + product) * weights_plane() + first * panel_;
                const float *here = kept_ ? kept : transformed + before * weights_plane(), *in = points + points_at(first, plane) + point * plane;
                // Meanwhile come near the next point's weights; or a 36th of those that are transformed next, and the next point's inputs.
                const Coming coming = kept_ ? Coming{here + weights_plane()} : Coming{soon + product * depth * panel_ * 9 / ground.products(), in + plane};
                run.kernels.multiply(count, depth, in, depth_, here, panel_, coming, sums + product * sums_plane(count), panel_, first > 0);
            }
        }
    }

    void run_blocks(const Run& run) const {
        const Ground ground = this->ground(run);
        const std::size_t down = (tiles(ground.height) + BLOCK_ROWS - 1) / BLOCK_ROWS, across = segments(ground.width);
        const float* norms = run.shared;
        run.pool.run(run.planar.count * down * across, [&](std::size_t piece, unsigned thread) {
            const int column = static_cast<int>(piece % across) * BLOCK_COLUMNS;
            const int row = static_cast<int>(piece / across % down) * BLOCK_ROWS;
            block(run, ground, piece / across / down, row, column, norms, run.own + thread * run.own_size);
        });
    }

    void block(const Run& run, const Ground& ground, std::size_t picture, int row, int column, const float* norms, float* own) const {
        const auto [height, width, doubled] = ground;
        const int rows = std::min(BLOCK_ROWS, tiles(height) - row), columns = std::min(BLOCK_COLUMNS, tiles(width) - column);
        const std::size_t count = static_cast<std::size_t>(rows) * columns, plane = points_plane(count);
        float *points = own + strip(), *sums = points + points_size(count), *transformed = sums + ground.products() * sums_plane(count);
        const int top = row * TILE - 1, left = column * TILE - 1, high = rows * TILE + 2, wide = columns * TILE + 2;
        const Input in = input(run, ground, picture, norms);
        if (plain(in) && top >= 0 && left >= 0 && top + high <= height && left + wide <= width) {
            const std::size_t pixel = in.sources[0].channels, line = pixel * width;
            make_points(run, ground, in.sources[0].data + top * line + left * pixel, line, pixel, rows, columns, points, plane);
        } else {
            run.kernels.fill(in, top, left, high, wide, 0, inputs_, own);
            make_points(run, ground, own, wide * inputs_, inputs_, rows, columns, points, plane);
        }
        const bool absorbs = added_ != nullptr && run.views[options_.add].data == nullptr;
        const Area area{row * TILE, column * TILE, std::min(rows * TILE, height - row * TILE), std::min(columns * TILE, width - column * TILE)};
        float *added = transformed + transformed_size(ground), *words = added + BLOCK * TILE * TILE * panel_;
        if (word_ == 1) words = nullptr;
        if (absorbs && word_ != 1) added_->gather(run, picture, area, words, words + rounded_up(added_words(), 16));
        for (std::size_t panel = 0; panel < panels(); ++panel) {
            multiply(run, ground, panel, 1, count, points, plane, sums, transformed);
            if (absorbs) added_->sums_of(run, picture, area, panel, words, added);
            write(run, ground, picture, panel, row, column, rows, columns, sums, sums_plane(count), columns, absorbs ? added : nullptr);
        }
    }

    // The points of rows × columns tiles whose first pixel is at `in`; the next line and the next pixel are so many floats away.
    void make_points(const Run& run, const Ground& ground, const float* in, std::size_t line, std::size_t pixel, int rows, int columns,
                     float* points, std::size_t plane) const {
        const auto transform = ground.doubled ? run.kernels.doubled_input : run.kernels.transform_input;
        for (std::size_t first = 0; first < all_; first += depth_)
            transform(in + first * word_, line, pixel, rows, columns, std::min(depth_, all_ - first) * word_, points + points_at(first, plane),
                      plane, depth_);
    }

    // Tiles of one segment, their sums [tile][lane] with rows of tiles `tile_row_stride` apart, to the output. added: what to add to them and to
    // the bias, [pixel][lane], or null.
    void write(const Run& run, const Ground& ground, std::size_t picture, std::size_t panel, int row, int column, int rows, int columns,
               const float* sums, std::size_t plane, std::size_t tile_row_stride, const float* added = nullptr) const {
        const auto [height, width, doubled] = ground;
        Epilogue end = epilogue(run, picture, panel);
        const std::size_t at = ground.step() * TILE * (row * end.row_stride + column * end.pixel_stride), across = segments(width);
        end.out += at;
        if (end.add != nullptr) end.add += at;
        float shift[2 * 16];
        if (added != nullptr) {
            for (std::size_t lane = 0; lane < panel_; ++lane) shift[lane] = end.shift[lane] + added_->bias(panel)[lane];
            end.shift = shift;
            end.add = added;
            end.add_pixel_stride = panel_, end.add_row_stride = std::min(columns * TILE, width - column * TILE) * panel_;
        }
        const std::size_t unit = 2 * end.sums_stride, high = unit_rows(ground);
        end.unit_stride = high == 1 ? across * unit : 0;
        if (end.sums != nullptr) end.sums += (row / high * across + column / BLOCK_COLUMNS) * unit;
        const auto transform = doubled ? run.kernels.doubled_output : run.kernels.transform_output;
        transform(sums, plane, tile_row_stride, std::min(rows * TILE, height - row * TILE), std::min(columns * TILE, width - column * TILE), end);
    }

    void run_panels(const Run& run, std::size_t first, std::size_t pictures) const {
        const Ground ground = this->ground(run);
        const int down = tiles(ground.height), across = tiles(ground.width);
        const std::size_t all = static_cast<std::size_t>(down) * across, count = all * pictures, plane = points_plane(count);
        const std::size_t width = DEPTH * word_, chunks = (inputs_ + width - 1) / width;
        const float* norms = run.shared;
        float* points = run.shared + rounded_up(norms_size(run.planar.count), 16);
        run.pool.run(pictures * chunks, [&](std::size_t piece, unsigned thread) {
            const std::size_t picture = piece / chunks, begin = piece % chunks * width, end = std::min(inputs_, begin + width);
            float* own = run.own + thread * run.own_size;
            const int wide = across * TILE + 2;
            run.kernels.fill(input(run, ground, first + picture, norms), -1, -1, down * TILE + 2, wide, begin, end, own);
            const auto transform = ground.doubled ? run.kernels.doubled_input : run.kernels.transform_input;
            transform(own, wide * (end - begin), end - begin, down, across, end - begin,
                      points + picture * all * depth_ + points_at(words(begin), plane), plane, depth_);
        });
        run.pool.run(panels(), [&](std::size_t panel, unsigned thread) {
            float *sums = run.own + thread * run.own_size, *transformed = sums + ground.products() * sums_plane(count);
            multiply(run, ground, panel, run.pool.threads(), count, points, plane, sums, transformed);
            for (std::size_t picture = 0; picture < pictures; ++picture)
                for (int column = 0; column < across; column += BLOCK_COLUMNS)
                    write(run, ground, first + picture, panel, 0, column, down, std::min(BLOCK_COLUMNS, across - column),
                          sums + (picture * all + column) * panel_, sums_plane(count), across);
        });
    }

    // Weights: packed, or, where kept_, their transforms: [panel][product][word][lane], in planes. depth_: words multiplied at a time.
    std::size_t panel_, all_;  // all_: words of the inputs
    bool kept_;
    std::size_t depth_;
    const Convolution* added_ = nullptr;  // what writes what it adds, where that is a 1×1 convolution and no more
};

}  // namespace

std::unique_ptr<Layer> winograd(const Kernels& kernels, const std::vector<Register>& registers, ConvolutionOptions options,
                                const float* weight, std::size_t outputs, std::vector<float> bias) {
    return std::make_unique<Winograd>(kernels, registers, std::move(options), weight, outputs, std::move(bias));
}

}  // namespace sr3
