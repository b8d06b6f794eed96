// Tensors as Python hands them over. No torch header is included, so everything is read through the attributes of the
// Python object: data_ptr(), dtype, device, shape, stride(). The arguments of the call keep the memory alive.
//
// Nothing is taken on trust: a tensor of another dtype, shape, layout or device is a std::invalid_argument (ValueError
// in Python) that names the argument, what it was and what it must be.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace em3 {

template <class T>
constexpr const char* kDtype = nullptr;
template <class T>
constexpr const char* kDtype<const T> = kDtype<T>;
template <>
inline constexpr const char* kDtype<float> = "torch.float32";
template <>
inline constexpr const char* kDtype<double> = "torch.float64";
template <>
inline constexpr const char* kDtype<std::int64_t> = "torch.int64";
template <>
inline constexpr const char* kDtype<std::uint8_t> = "torch.bool";

using Sizes = std::vector<std::int64_t>;

class Tensor {
 public:
  Tensor(const pybind11::handle& tensor, std::string name) : name_(std::move(name)) {
    if (!attribute<0>(tensor, "is_cpu").cast<bool>()) {
      fail("on " + pybind11::str(tensor.attr("device")).cast<std::string>(), "on cpu");
    }
    dtype_ = &text_of(attribute<1>(tensor, "dtype"));
    shape_ = numbers_of(attribute<2>(tensor, "shape"));
    strides_ = numbers_of(attribute<3>(tensor, "stride")());
    address_ = attribute<4>(tensor, "data_ptr")().cast<std::uintptr_t>();
    const bool holds_none = std::find(shape_.begin(), shape_.end(), 0) != shape_.end();
    if (address_ == 0 && !holds_none) fail("without memory, as some of PyTorch's zeros are", "a tensor that has some (clone it)");
  }

  const Sizes& shape() const { return shape_; }
  const std::string& dtype() const { return *dtype_; }

  // The stride of a dimension in elements. That of a dimension of size 1 or 0 says nothing, and is 0 here.
  std::int64_t stride(std::size_t dim) const { return shape_[dim] > 1 ? strides_[dim] : 0; }

  // -1 in `shape` is any size.
  void require_shape(const Sizes& shape) const {
    bool fits = shape.size() == shape_.size();
    for (std::size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || shape[i] == shape_[i];
    if (!fits) fail(list(shape_), list(shape));
  }

  // The first element of a tensor of this shape whose innermost elements lie side by side.
  template <class T>
  T* rows(const Sizes& shape) const {
    static_assert(kDtype<T> != nullptr, "a dtype that no kernel takes");
    if (*dtype_ != kDtype<T>) fail(*dtype_, kDtype<T>);
    return static_cast<T*>(rows_of_any(shape));
  }

  // The same, whatever its dtype.
  void* rows_of_any(const Sizes& shape) const {
    require_shape(shape);
    const bool holds_none = std::find(shape_.begin(), shape_.end(), 0) != shape_.end();  // then strides say nothing
    if (!holds_none && !shape_.empty() && shape_.back() > 1 && strides_.back() != 1) {
      fail("of strides " + list(strides_), "of stride 1 in its last dimension");
    }
    return reinterpret_cast<void*>(address_);
  }

  // The same of a tensor that is one block.
  template <class T>
  T* block(const Sizes& shape) const {
    rows<T>(shape);
    return static_cast<T*>(block_of_any(shape));
  }

  void* block_of_any(const Sizes& shape) const {
    void* const first = rows_of_any(shape);
    if (std::find(shape_.begin(), shape_.end(), 0) != shape_.end()) return first;
    std::int64_t step = 1;
    for (std::size_t i = shape_.size(); i-- > 0; step *= shape_[i]) {
      if (shape_[i] > 1 && strides_[i] != step) fail("of strides " + list(strides_), "contiguous");
    }
    return first;
  }

  [[noreturn]] void fail(const std::string& was, const std::string& must) const {
    throw std::invalid_argument(name_ + ": was " + was + ", must be " + must);
  }

 private:
  static std::string list(const Sizes& numbers) {
    std::string text = "[";
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      text += (i == 0 ? "" : ", ") + (numbers[i] < 0 ? std::string("any") : std::to_string(numbers[i]));
    }
    return text + "]";
  }

  // By a name that is kept from the first call on, and not made again each time.
  template <int Id>
  static pybind11::object attribute(const pybind11::handle& of, const char* name) {
    static PyObject* const kept = PyUnicode_InternFromString(name);
    PyObject* const found = PyObject_GetAttr(of.ptr(), kept);
    if (found == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(found);
  }

  static Sizes numbers_of(const pybind11::object& given) {
    if (!PyTuple_Check(given.ptr())) return given.cast<Sizes>();
    Sizes numbers(static_cast<std::size_t>(PyTuple_GET_SIZE(given.ptr())));
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      numbers[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(given.ptr(), static_cast<Py_ssize_t>(i)));
    }
    if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
    return numbers;
  }

  // Of the few objects that torch has for dtypes, remembered: to have each tensor's written out took a third of the time of
  // a call of few small ones. Under the GIL.
  static const std::string& text_of(const pybind11::object& dtype) {
    static auto& known = *new std::deque<std::pair<pybind11::object, std::string>>();  // never freed: Python may be gone
    for (const auto& entry : known) {
      if (entry.first.is(dtype)) return entry.second;
    }
    known.emplace_back(dtype, pybind11::str(dtype).cast<std::string>());
    return known.back().second;
  }

  std::string name_;
  const std::string* dtype_ = nullptr;
  Sizes shape_, strides_;
  std::uintptr_t address_ = 0;
};

}  // namespace em3
