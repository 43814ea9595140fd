// The Python class sr3rt._native.Network: checks the arrays, releases the GIL, calls network.cpp. Documented in sr3rt/_native.pyi.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "network.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Array = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Weights = std::tuple<Array, Array>;                 // weight and bias of a linear layer
using NormOptions = std::tuple<int, double, Array, Array>;  // groups, eps, weight, bias
using Encoding = std::tuple<bool, float, Array, std::vector<Weights>, bool>;

void expect(bool holds, const std::string& message) {
    if (!holds) throw nb::value_error(message.c_str());
}

std::vector<float> values(const Array& array) { return {array.data(), array.data() + array.size()}; }

sr3::Linear linear(const Weights& weights) {
    const auto& [weight, bias] = weights;
    expect(weight.ndim() == 2 && bias.ndim() == 1 && weight.shape(0) == bias.shape(0), "a linear layer has (outputs, inputs) and (outputs,)");
    return {weight.data(), bias.data(), weight.shape(0), weight.shape(1)};
}

sr3::Resample resample(const std::string& by) {
    expect(by == "none" || by == "up" || by == "down", "resample must be none, up or down; found " + by);
    return by == "up" ? sr3::Resample::up : by == "down" ? sr3::Resample::down : sr3::Resample::none;
}

sr3::LevelEncoding encoding(const Encoding& options) {
    const auto& [log_sigma, scale, frequencies, layers, silu] = options;
    sr3::LevelEncoding made{log_sigma, silu, scale, values(frequencies), {}};
    std::size_t inputs = 2 * frequencies.size();
    for (const Weights& one : layers) {
        made.layers.push_back(linear(one));
        expect(made.layers.back().inputs == inputs, "the level's layers do not fit one another");
        inputs = made.layers.back().outputs;
    }
    return made;
}

void build(sr3::Network* self, const std::string& instructions, int threads, std::size_t channels, const Encoding& level) {
    expect(threads >= 1 && channels >= 1, "threads and channels must be at least 1");
    const sr3::Kernels* kernels = sr3::kernels(instructions.c_str());
    expect(kernels != nullptr, "this processor does not have " + (instructions == "auto" ? "AVX2 and FMA" : instructions));
    new (self) sr3::Network(*kernels, static_cast<unsigned>(threads), channels, encoding(level));
}

int convolution(sr3::Network& self, std::vector<int> from, const Array& weight, const std::optional<Array>& bias, int stride,
                const std::optional<NormOptions>& norm, bool silu, const std::string& resampled, const std::optional<Weights>& level,
                bool scaled, bool after, int add, float gain, int like) {
    expect(weight.ndim() == 4 && weight.shape(2) == weight.shape(3), "weight must be (outputs, inputs, side, side)");
    sr3::ConvolutionOptions options;
    options.from = std::move(from);
    options.stride = stride, options.silu = silu, options.after = after, options.add = add, options.gain = gain;
    options.resample = resample(resampled);
    options.scaled = scaled;
    if (norm) {
        const auto& [groups, eps, scale, shift] = *norm;
        options.norm = {groups, eps, values(scale), values(shift)};
    }
    std::optional<sr3::Linear> projection;
    if (level) projection = linear(*level);
    const nb::gil_scoped_release released;
    return self.convolution(std::move(options), weight.data(), weight.shape(0), weight.shape(1), static_cast<int>(weight.shape(2)),
                            bias ? values(*bias) : std::vector<float>{}, projection ? &*projection : nullptr, like);
}

void run(sr3::Network& self, const Array& x, const Array& y, const Array& level, Output out) {
    expect(x.ndim() == 4 && x.shape(1) == self.channels(), "x must be (N, C, H, W) with the network's channels");
    for (std::size_t i = 0; i < 4; ++i)
        expect(y.ndim() == 4 && out.ndim() == 4 && y.shape(i) == x.shape(i) && out.shape(i) == x.shape(i),
               "y and out must have x's shape");
    expect(level.ndim() == 2 && level.shape(0) == x.shape(0) && level.shape(1) == 1, "level must be (N, 1)");
    const int height = static_cast<int>(x.shape(2)), width = static_cast<int>(x.shape(3));
    if (x.size() == 0) return;
    const sr3::Extent made = self.result_extent(height, width);
    expect(made.height == height && made.width == width,
           "the network's result is " + std::to_string(made.height) + "×" + std::to_string(made.width) + " where the picture is " +
               std::to_string(height) + "×" + std::to_string(width));
    const sr3::Planar planar{x.data(), y.data(), level.data(), out.data(), x.shape(1), x.shape(0), height, width};
    const nb::gil_scoped_release released;
    self.run(planar);
}

}  // namespace

void bind_network(nb::module_& module) {
    nb::set_leak_warnings(false);  // the models that `sr3rt.upscale` keeps are there when the interpreter ends
    const auto name_of = [](const char* wanted) -> std::optional<std::string> {
        const sr3::Kernels* found = sr3::kernels(wanted);
        return found == nullptr ? std::nullopt : std::optional<std::string>(found->name);
    };
    module.def("instructions", [name_of] { return name_of("auto"); });
    module.def("bfloat16", [name_of] { return name_of("bf16"); });
    module.def("has", [](const std::string& instructions) { return sr3::kernels(instructions.c_str()) != nullptr; }, "instructions"_a);
    nb::class_<sr3::Network>(module, "Network")
        .def("__init__", &build, "instructions"_a, "threads"_a, "channels"_a, "level"_a)
        .def("joined_planes", &sr3::Network::joined_planes)
        .def("unshuffled", &sr3::Network::unshuffled, "by"_a)
        .def("to_bands", &sr3::Network::to_bands, "mean"_a, "detail"_a)
        .def("convolution", &convolution, "sources"_a, "weight"_a, "bias"_a.none(), "stride"_a, "norm"_a.none(), "silu"_a, "resample"_a,
             "level"_a.none(), "scaled"_a, "after"_a, "add"_a, "gain"_a, "like"_a)
        .def("attention", &sr3::Network::attention, "source"_a)
        .def("resampling", [](sr3::Network& self, int from, const std::string& by) { return self.resampling(from, resample(by)); },
             "source"_a, "by"_a)
        .def("result", &sr3::Network::result, "source"_a)
        .def("from_bands", &sr3::Network::from_bands, "bands"_a, "mean"_a, "fine"_a, "detail"_a)
        .def("run", &run, "x"_a.noconvert(), "y"_a.noconvert(), "level"_a.noconvert(), "out"_a.noconvert())
        .def("forked", &sr3::Network::forked)
        .def("memory", &sr3::Network::memory_of, "count"_a, "height"_a, "width"_a)
        .def_prop_ro("instructions", [](const sr3::Network& self) { return self.kernels().name; });
}
