// Convolutions in bfloat16 as sums of matrix products over taps, by tiles (tiles.hpp). These multiply so much faster than anything else
// that to save products, as winograd.cpp does, would cost more than it saves, in time and in rounding.

#include <algorithm>
#include <utility>

#include "convolution.hpp"
#include "tiles.hpp"

namespace sr3 {
namespace {

constexpr int BLOCK_ROWS = 16, BLOCK_COLUMNS = 32;  // pixels of a piece of work at most
constexpr int FILLED_ROWS = 2;                      // that are made at a time, before they are rounded
constexpr int ROWS_TOGETHER = 3;                    // of a small picture's input, made as a piece of work
constexpr std::size_t SMALL = 1024;                 // pixels of a picture up to which panels, not places, are shared out
constexpr std::size_t STRIP = 768 * 1024;           // bytes of a block's, about: it stays in the second-level cache

// What a piece of work reads, in pixels of its strip.
struct Layout {
    std::vector<std::size_t> tiles;
    std::size_t pitch;  // from row to row of the sums
};

class Tiled final : public Convolution {
   public:
    Tiled(const Kernels& kernels, const std::vector<Register>& registers, ConvolutionOptions options, const float* weight,
          std::size_t outputs, int side, std::vector<float> bias)
        : Convolution(kernels, registers, std::move(options), outputs, side, std::move(bias)),
          tiles_(*kernels.tiles),
          taps_(static_cast<std::size_t>(side) * side),
          chunks_(rounded_up(inputs_, TILE_DEPTH) / TILE_DEPTH) {
        hold([&] {
            const Floats matrices = in_matrices(packed(kernels, registers, weight));
            Floats rounded = floats(panels() * chunks_ * taps_ * TILE_MATRIX / sizeof(float));  // [panel][chunk][tap] of TILE_MATRIX bytes
            tiles_.round_weights(matrices.get(), panels() * chunks_ * taps_, bytes(rounded.get()));
            return rounded;
        });
    }

    Scratch scratch(const std::vector<Extent>& registers, std::size_t count) const override {
        const auto [height, width, units] = extent(registers, 0, 0);
        const bool small = is_small(height, width);
        const Cut cut = small ? Cut{height, width} : this->cut();
        const std::size_t together = small ? std::min(count, at_once(height, width)) : 1;
        const std::size_t norms = rounded_up(norms_size(count), 16), strip = strip_size(cut, together);
        const std::size_t sums = small ? sums_size(layout(cut)) * together : std::max(sums_size(layout(cut)), sums_size(layout(widest_odd())));
        const std::size_t own = std::max(sums, filled_size(cut));
        return small ? Scratch{norms + strip, own} : Scratch{norms, strip + own};
    }

    // Of small pictures one reading of the weights serves several; of large ones a few have not the blocks for many threads.
    bool shares(const std::vector<Extent>& registers, std::size_t threads) const override {
        const auto [height, width, units] = extent(registers, 0, 0);
        if (is_small(height, width)) return at_once(height, width) > 1;
        return units_of(height, width) < 4 * threads;
    }

    void run(const Run& run) const override {
        find_norms(run, run.shared);
        const View& out = run.views[to];
        if (!is_small(out.height, out.width)) {
            run_blocks(run);
            return;
        }
        const std::size_t some = at_once(out.height, out.width);
        for (std::size_t first = 0; first < run.planar.count; first += some)
            run_panels(run, first, std::min(run.planar.count - first, some));
    }

   protected:
    std::size_t units(int height, int width) const override { return is_small(height, width) ? 1 : units_of(height, width); }

   private:
    struct Cut {
        int rows, columns;
    };

    static std::byte* bytes(float* from) { return reinterpret_cast<std::byte*>(from); }
    static const std::byte* bytes(const float* from) { return reinterpret_cast<const std::byte*>(from); }
    static bool is_small(int height, int width) { return static_cast<std::size_t>(height) * width <= SMALL; }
    static std::size_t at_once(int height, int width) { return std::max<std::size_t>(1, SMALL / (static_cast<std::size_t>(height) * width)); }

    int read(int outputs) const { return (outputs - 1) * options_.stride + side_; }  // pixels that so many in a line are made of
    std::size_t pixels(const Cut& cut) const { return static_cast<std::size_t>(read(cut.rows)) * read(cut.columns); }

    // Bytes of a chunk of so many pictures: what the last tile reads beyond them too, and an odd number of lines, as in plane_of.
    std::size_t plane(const Cut& cut, std::size_t pictures) const {
        return TILE_LINE * ((pictures * pixels(cut) + 2 * TILE_ROWS * options_.stride) | 1);
    }

    // In floats.
    std::size_t strip_size(const Cut& cut, std::size_t pictures) const { return chunks_ * plane(cut, pictures) / sizeof(float); }
    std::size_t filled_size(const Cut& cut) const { return static_cast<std::size_t>(FILLED_ROWS) * read(cut.columns) * inputs_; }
    static std::size_t sums_size(const Layout& layout) { return layout.tiles.size() * TILE_ROWS * TILE_PANEL; }

    // The largest block whose strip stays near.
    Cut cut() const {
        Cut cut{BLOCK_ROWS, BLOCK_COLUMNS};
        while (cut.rows > 4 && chunks_ * pixels(cut) * TILE_LINE > STRIP) cut.rows /= 2;
        return cut;
    }

    // The block at a picture's edge whose tiles, running on from row to row, are the most.
    Cut widest_odd() const { return {cut().rows, BLOCK_COLUMNS - 1}; }

    std::size_t units_of(int height, int width) const {
        const Cut cut = this->cut();
        return static_cast<std::size_t>((height + cut.rows - 1) / cut.rows) * ((width + cut.columns - 1) / cut.columns);
    }

    // Tiles lie within rows where these are made of whole ones, and else run on from row to row, through what lies between.
    Layout layout(const Cut& cut) const {
        const std::size_t wide = read(cut.columns), stride = options_.stride, columns = cut.columns, rows = cut.rows;
        Layout made{{}, columns % TILE_ROWS == 0 ? columns : wide};
        const std::size_t lines = columns % TILE_ROWS == 0 ? rows : 1, length = lines == rows ? columns : (rows - 1) * wide + columns;
        for (std::size_t line = 0; line < lines; ++line)
            for (std::size_t at = 0; at < length; at += TILE_ROWS) made.tiles.push_back((line * wide + at) * stride);
        return made;
    }

    // [panel][input][tap][lane] -> [panel][chunk][tap][input][lane]
    Floats in_matrices(const Floats& packed) const {
        Floats out = floats(panels() * chunks_ * taps_ * TILE_DEPTH * TILE_PANEL);
        float* to = out.get();
        for (std::size_t panel = 0; panel < panels(); ++panel)
            for (std::size_t chunk = 0; chunk < chunks_; ++chunk)
                for (std::size_t tap = 0; tap < taps_; ++tap)
                    for (std::size_t input = chunk * TILE_DEPTH; input < (chunk + 1) * TILE_DEPTH; ++input, to += TILE_PANEL) {
                        if (input < inputs_) {
                            std::copy_n(packed.get() + ((panel * inputs_ + input) * taps_ + tap) * TILE_PANEL, TILE_PANEL, to);
                        } else {
                            std::fill_n(to, TILE_PANEL, 0.0f);
                        }
                    }
        return out;
    }

    // Rows of the input's pixels from (top, left) on. Two at a time that are made of the same, where pixels are doubled.
    void fill(const Run& run, const Input& in, int top, int left, int rows, int columns, std::byte* lines, std::size_t plane,
              float* filled) const {
        for (int row = 0, some = 0; row < rows; row += some) {
            some = std::min(FILLED_ROWS - ((top + row) & 1), rows - row);
            run.kernels.fill(in, top + row, left, some, columns, 0, inputs_, filled);
            tiles_.round_pixels(filled, static_cast<std::size_t>(some) * columns, inputs_, lines, plane);
            lines += static_cast<std::size_t>(some) * columns * TILE_LINE;
        }
    }

    // A panel's sums, of pixels that `end` will finish.
    void multiply(const Layout& layout, int wide, std::size_t panel, const std::byte* strip, std::size_t plane, float* sums,
                  const Epilogue& end, int rows, int columns) const {
        std::size_t taps[9];
        for (std::size_t tap = 0; tap < taps_; ++tap) taps[tap] = tap / side_ * wide + tap % side_;
        const Ahead ahead{end.out, end.add, static_cast<std::size_t>(rows), static_cast<std::size_t>(columns), end.row_stride, end.pixel_stride};
        tiles_.multiply({strip, plane, layout.tiles.data(), layout.tiles.size(), static_cast<std::size_t>(options_.stride), taps, taps_, chunks_,
                         bytes(weights_.get()) + panel * chunks_ * taps_ * TILE_MATRIX, end.vectors, sums, ahead});
    }

    void run_blocks(const Run& run) const {
        const View& out = run.views[to];
        const Cut whole = cut();
        const std::size_t down = (out.height + whole.rows - 1) / whole.rows, across = (out.width + whole.columns - 1) / whole.columns;
        run.pool.run(run.planar.count * down * across, [&](std::size_t piece, unsigned thread) {
            const int column = static_cast<int>(piece % across) * whole.columns, row = static_cast<int>(piece / across % down) * whole.rows;
            const Cut cut{std::min(whole.rows, out.height - row), std::min(whole.columns, out.width - column)};
            block(run, piece / across / down, piece % (across * down), row, column, cut, run.own + thread * run.own_size);
        });
    }

    void block(const Run& run, std::size_t picture, std::size_t unit, int row, int column, const Cut& cut, float* own) const {
        const std::size_t plane = this->plane(cut, 1);
        const int wide = read(cut.columns), edge = side_ / 2;
        const Layout layout = this->layout(cut);
        const Input in = input(run, picture, run.shared);
        std::byte* strip = bytes(own);
        float* sums = own + strip_size(cut, 1);  // before there are any, filled rows
        fill(run, in, row * options_.stride - edge, column * options_.stride - edge, read(cut.rows), wide, strip, plane, sums);
        for (std::size_t panel = 0; panel < panels(); ++panel) {
            const Epilogue end = epilogue(run, picture, panel, unit, row, column);
            multiply(layout, wide, panel, strip, plane, sums, end, cut.rows, cut.columns);
            write(run, end, cut, sums, layout.pitch);
        }
    }

    // For the panel's channels from (row, column) on.
    Epilogue epilogue(const Run& run, std::size_t picture, std::size_t panel, std::size_t unit, int row, int column) const {
        Epilogue end = Convolution::epilogue(run, picture, panel);
        const std::size_t at = row * end.row_stride + column * end.pixel_stride;
        end.out += at;
        if (end.add != nullptr) end.add += at;
        if (end.sums != nullptr) end.sums += unit * 2 * run.views[to].padded;
        return end;
    }

    static void write(const Run& run, Epilogue end, const Cut& cut, const float* sums, std::size_t pitch) {
        for (int y = 0; y < cut.rows; ++y, sums += pitch * TILE_PANEL) {
            run.kernels.finish_row(sums, cut.columns, end);
            end.out += end.row_stride;
            if (end.add != nullptr) end.add += end.row_stride;
        }
    }

    void run_panels(const Run& run, std::size_t first, std::size_t pictures) const {
        const View& out = run.views[to];
        const Cut cut{out.height, out.width};
        const int edge = side_ / 2, wide = read(cut.columns);
        const std::size_t plane = this->plane(cut, pictures);
        std::byte* strip = bytes(run.shared + rounded_up(norms_size(run.planar.count), 16));
        const int high = read(cut.rows);
        const std::size_t pieces = (high + ROWS_TOGETHER - 1) / ROWS_TOGETHER;
        run.pool.run(pictures * pieces, [&](std::size_t piece, unsigned thread) {
            const std::size_t picture = piece / pieces;
            const int row = static_cast<int>(piece % pieces) * ROWS_TOGETHER;
            std::byte* lines = strip + (picture * pixels(cut) + static_cast<std::size_t>(row) * wide) * TILE_LINE;
            fill(run, input(run, first + picture, run.shared), row - edge, -edge, std::min(ROWS_TOGETHER, high - row), wide, lines, plane,
                 run.own + thread * run.own_size);
        });
        const Layout one = layout(cut);
        Layout all{{}, one.pitch};
        for (std::size_t picture = 0; picture < pictures; ++picture)
            for (const std::size_t tile : one.tiles) all.tiles.push_back(picture * pixels(cut) + tile);
        run.pool.run(panels(), [&](std::size_t panel, unsigned thread) {
            float* sums = run.own + thread * run.own_size;
            const int rows = static_cast<int>(pictures) * cut.rows;  // a picture's follow those of the one before
            multiply(all, wide, panel, strip, plane, sums, epilogue(run, first, panel, 0, 0, 0), rows, cut.columns);
            for (std::size_t picture = 0; picture < pictures; ++picture)
                write(run, epilogue(run, first + picture, panel, 0, 0, 0), cut, sums + picture * sums_size(one), one.pitch);
        });
    }

    const Tiles& tiles_;
    std::size_t taps_, chunks_;
};

}  // namespace

std::unique_ptr<Layer> tiled(const Kernels& kernels, const std::vector<Register>& registers, ConvolutionOptions options, const float* weight,
                             std::size_t outputs, int side, std::vector<float> bias) {
    return std::make_unique<Tiled>(kernels, registers, std::move(options), weight, outputs, side, std::move(bias));
}

}  // namespace sr3
