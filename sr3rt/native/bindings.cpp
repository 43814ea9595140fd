// The Python module sr3rt._native: checks the arrays, releases the GIL, calls step.cpp. Documented in sr3rt/_native.pyi.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>

#include <array>
#include <functional>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "step.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Extents = std::vector<std::size_t>;
using Reading = nb::ndarray<nb::ro>;
using Writing = nb::ndarray<>;

std::string described(const Extents& extents) {
    std::string out;
    for (const std::size_t extent : extents) out += (out.empty() ? "" : ", ") + std::to_string(extent);
    return "(" + out + (extents.size() == 1 ? ",)" : ")");
}

// What an argument is: "float64 of shape (1, 3, 8, 8)", or its type where it is no array.
std::string described(nb::handle object) {
    if (!nb::hasattr(object, "dtype") || !nb::hasattr(object, "shape")) return nb::type_name(object.type()).c_str();
    const nb::object dtype = object.attr("dtype"), shape = object.attr("shape");
    return nb::str(dtype).c_str() + std::string(" of shape ") + nb::str(shape).c_str();
}

[[noreturn]] void refuse(const std::string& name, const std::string& expected, nb::handle object) {
    throw nb::type_error((name + " must be " + expected + "; found " + described(object)).c_str());
}

template <class Array>
Extents extents_of(const Array& array) {
    Extents extents(array.ndim());
    for (std::size_t i = 0; i < extents.size(); ++i) extents[i] = array.shape(i);
    return extents;
}

template <class Array>
bool is_contiguous(const Array& array) {
    std::int64_t expected = 1;
    for (std::size_t i = array.ndim(); i-- > 0;) {
        if (array.shape(i) > 1 && array.stride(i) != expected && array.size() > 0) return false;
        expected *= static_cast<std::int64_t>(array.shape(i));
    }
    return true;
}

template <class T>
std::string dtype_name() {
    if constexpr (std::is_same_v<T, float>) return "float32";
    return sizeof(T) == 8 ? "uint64" : "uint32";
}

// The data of an argument, which must be a C-contiguous CPU array of T with these extents (and writable if `Array` is Writing).
template <class T, class Array = Reading>
auto data(nb::handle object, const char* name, const Extents& extents) {
    Array array;
    Reading reading;
    if (!nb::try_cast(object, array, false)) {
        if (nb::try_cast(object, reading, false)) refuse(name, "writable", object);
        refuse(name, "a " + dtype_name<T>() + " array of shape " + described(extents), object);
    }
    if (array.dtype() != nb::dtype<T>() || extents_of(array) != extents || array.device_type() != nb::device::cpu::value)
        refuse(name, "a " + dtype_name<T>() + " array of shape " + described(extents), object);
    if (!is_contiguous(array)) refuse(name, "C-contiguous", object);
    using Pointer = std::conditional_t<std::is_same_v<Array, Writing>, T*, const T*>;
    return static_cast<Pointer>(array.data());
}

// The extents of the argument that all the others must match.
Extents picture_extents(nb::handle object, const char* name) {
    Reading array;
    if (!nb::try_cast(object, array, false) || array.ndim() != 4) refuse(name, "a float32 array of shape (N, C, H, W)", object);
    return extents_of(array);
}

sr3::Shape shape_of(const Extents& extents) { return {extents[0], extents[1], extents[2], extents[3]}; }

const sr3::Row* rows_of(nb::handle rows, std::size_t n) {
    return reinterpret_cast<const sr3::Row*>(data<float>(rows, "rows", {n, 7}));
}

// corners: (row, column) of each picture's corner, or None.
sr3::Noise noise_of(nb::handle seeds, nb::handle steps, nb::handle corners, const Extents& extents) {
    constexpr std::size_t places = std::size_t{1} << 32;
    const std::uint32_t* at = corners.is_none() ? nullptr : data<std::uint32_t>(corners, "corners", {extents[0], 2});
    for (std::size_t i = 0; i < 2 * extents[0]; ++i)
        if (extents[2 + i % 2] > places - (at == nullptr ? 0 : at[i]))
            throw nb::value_error("the array's last row and column must be below 2**32: give smaller corners");
    return {data<std::uint64_t>(seeds, "seeds", {extents[0]}), data<std::uint32_t>(steps, "steps", {extents[0]}), at};
}

unsigned counted(int threads) {
    if (threads < 1) throw nb::value_error(("threads must be at least 1; found " + std::to_string(threads)).c_str());
    return static_cast<unsigned>(threads);
}

// The loops assume that no array lies over one that they write.
void check_apart(const Extents& extents, std::initializer_list<const float*> written, std::initializer_list<const float*> read) {
    const std::size_t size = extents[0] * extents[1] * extents[2] * extents[3];
    const std::less<> before;
    const auto overlap = [&](const float* a, const float* b) { return before(a, b + size) && before(b, a + size); };
    for (auto w = written.begin(); w != written.end(); ++w) {
        bool clash = false;
        for (auto other = w + 1; other != written.end(); ++other) clash |= overlap(*w, *other);
        for (const float* other : read) clash |= other != nullptr && overlap(*w, other);
        if (clash) throw nb::value_error("an array that is written shares memory with another: give each its own memory");
    }
}

void normals(nb::handle out, nb::handle seeds, nb::handle steps, int threads, nb::handle corners) {
    const Extents extents = picture_extents(out, "out");
    float* out_data = data<float, Writing>(out, "out", extents);
    const sr3::Noise noise = noise_of(seeds, steps, corners, extents);
    const unsigned count = counted(threads);
    const nb::gil_scoped_release released;
    sr3::normals(out_data, shape_of(extents), noise, count);
}

bool step(nb::handle y, nb::handle net, nb::handle x0, nb::handle rows, nb::handle seeds, nb::handle steps, bool clip,
          int threads, nb::handle corners) {
    const Extents extents = picture_extents(y, "y");
    float* y_data = data<float, Writing>(y, "y", extents);
    const float* net_data = data<float>(net, "net", extents);
    float* x0_data = data<float, Writing>(x0, "x0", extents);
    check_apart(extents, {y_data, x0_data}, {net_data});
    const sr3::Row* table = rows_of(rows, extents[0]);
    const sr3::Noise noise = noise_of(seeds, steps, corners, extents);
    const unsigned count = counted(threads);
    const nb::gil_scoped_release released;
    return sr3::step(y_data, net_data, x0_data, table, shape_of(extents), noise, clip, count);
}

bool predict(nb::handle y, nb::handle net, nb::handle x0_new, nb::handle rows, bool clip, int threads) {
    const Extents extents = picture_extents(y, "y");
    const float* y_data = data<float>(y, "y", extents);
    const float* net_data = data<float>(net, "net", extents);
    float* x0_new_data = data<float, Writing>(x0_new, "x0_new", extents);
    check_apart(extents, {x0_new_data}, {y_data, net_data});
    const sr3::Row* table = rows_of(rows, extents[0]);
    const unsigned count = counted(threads);
    const nb::gil_scoped_release released;
    return sr3::predict(y_data, net_data, x0_new_data, table, shape_of(extents), clip, count);
}

bool advance(nb::handle y, nb::handle x0_new, nb::handle x0, nb::handle rows, nb::handle seeds, nb::handle steps, nb::handle z,
             int threads, nb::handle corners) {
    const Extents extents = picture_extents(y, "y");
    float* y_data = data<float, Writing>(y, "y", extents);
    const float* x0_new_data = data<float>(x0_new, "x0_new", extents);
    float* x0_data = data<float, Writing>(x0, "x0", extents);
    const float* z_data = z.is_none() ? nullptr : data<float>(z, "z", extents);
    check_apart(extents, {y_data, x0_data}, {x0_new_data, z_data});
    const sr3::Row* table = rows_of(rows, extents[0]);
    const sr3::Noise noise = noise_of(seeds, steps, corners, extents);
    const unsigned count = counted(threads);
    const nb::gil_scoped_release released;
    return sr3::advance(y_data, x0_new_data, x0_data, table, shape_of(extents), noise, z_data, count);
}

std::array<std::uint32_t, 4> philox(const std::array<std::uint32_t, 4>& counter, const std::array<std::uint32_t, 2>& key) {
    const sr3::Words words = sr3::philox({counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]});
    return {words.w0, words.w1, words.w2, words.w3};
}

}  // namespace

void bind_network(nb::module_& module);  // network_bindings.cpp

NB_MODULE(_native, module) {
    module.def("philox", &philox, "counter"_a, "key"_a);
    module.def("normals", &normals, "out"_a, "seeds"_a, "steps"_a, "threads"_a = 1, "corners"_a.none() = nb::none());
    module.def("step", &step, "y"_a, "net"_a, "x0"_a, "rows"_a, "seeds"_a, "steps"_a, "clip"_a, "threads"_a,
               "corners"_a.none() = nb::none());
    module.def("predict", &predict, "y"_a, "net"_a, "x0_new"_a, "rows"_a, "clip"_a, "threads"_a);
    module.def("advance", &advance, "y"_a, "x0_new"_a, "x0"_a, "rows"_a, "seeds"_a, "steps"_a, "z"_a.none(), "threads"_a,
               "corners"_a.none() = nb::none());
    bind_network(module);
}
