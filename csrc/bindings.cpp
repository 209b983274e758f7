// The only file that knows Python: pointers and sizes in, params struct out, GIL released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "toca.h"

namespace py = pybind11;

namespace {

using Pointer = uintptr_t;

template <class T>
T* as(Pointer address) {
  return reinterpret_cast<T*>(address);
}

// A CUDA device and the address of a stream on it; none: the tensors are the CPU's.
using Where = std::optional<std::pair<int, Pointer>>;

template <class Params>
using OnCpu = void (*)(const Params&);
template <class Params>
using OnCuda = void (*)(const Params&, const toca::cuda::Stream&);

template <class Params>
void call(OnCpu<Params> cpu, OnCuda<Params> cuda, const Params& params, const Where& where,
          const char* argument) {
  try {
    py::gil_scoped_release release;
    if (where)
      cuda(params, {where->first, as<void>(where->second)});
    else
      cpu(params);
  } catch (const toca::cpu::OutOfRange& e) {
    throw py::value_error(std::string(argument) + ": expected values in [" + std::to_string(e.low) +
                          ", " + std::to_string(e.stop) + "), got " + std::to_string(e.value));
  }
}

// What the ops on queries and keys share.
template <class Params>
void set_heads(Params& p, const std::array<int64_t, 6>& stride, float scale, int dtype,
               int threads) {
  p.q_b = stride[0], p.q_h = stride[1], p.q_n = stride[2];
  p.k_b = stride[3], p.k_h = stride[4], p.k_n = stride[5];
  p.scale = scale;
  p.dtype = toca::DType(dtype);
  p.threads = threads;
}

void attention_scores(const std::array<Pointer, 5>& ptr, const std::array<int64_t, 5>& size,
                      const std::array<int64_t, 6>& stride, float scale, int dtype, int threads) {
  toca::AttentionScores p{};
  p.q = as<const void>(ptr[0]);
  p.k = as<const void>(ptr[1]);
  p.lse = as<const float>(ptr[2]);
  p.partial = as<float>(ptr[3]);
  p.out = as<float>(ptr[4]);
  p.B = size[0], p.H = size[1], p.Nq = size[2], p.N = size[3], p.D = size[4];
  set_heads(p, stride, scale, dtype, threads);
  py::gil_scoped_release release;
  toca::cpu::attention_scores(p);
}

void attention_entropy(const std::array<Pointer, 6>& ptr, const std::array<int64_t, 5>& size,
                       const std::array<int64_t, 6>& stride, float scale, int dtype, int threads) {
  toca::AttentionEntropy p{};
  p.q = as<const void>(ptr[0]);
  p.k = as<const void>(ptr[1]);
  p.lse = as<const float>(ptr[2]);
  p.mask = as<const uint8_t>(ptr[3]);
  p.packed = as<void>(ptr[4]);
  p.out = as<float>(ptr[5]);
  p.B = size[0], p.H = size[1], p.N = size[2], p.L = size[3], p.D = size[4];
  set_heads(p, stride, scale, dtype, threads);
  py::gil_scoped_release release;
  toca::cpu::attention_entropy(p);
}

void select_tokens(const std::array<Pointer, 7>& ptr, const std::array<int64_t, 7>& size,
                   float age_weight, float bonus, int threads, const Where& where) {
  toca::SelectTokens p{};
  p.score = as<const float>(ptr[0]);
  p.age = as<int32_t>(ptr[1]);
  p.offsets = as<const int64_t>(ptr[2]);
  p.index = as<int64_t>(ptr[3]);
  p.inverse = as<int32_t>(ptr[4]);
  p.nan = as<int32_t>(ptr[5]);
  p.scratch = as<uint32_t>(ptr[6]);
  p.R = size[0], p.N = size[1], p.k = size[2];
  p.frames = size[3], p.rows = size[4], p.cols = size[5], p.cell = size[6];
  p.age_weight = age_weight;
  p.bonus = bonus;
  p.threads = threads;
  call(toca::cpu::select_tokens, toca::cuda::select_tokens, p, where, "score");
}

// (first slope, second or 0, distance, how many slopes, how often all tokens have been computed)
using Forecast = std::optional<std::tuple<Pointer, Pointer, Pointer, int, int>>;

toca::Forecast forecast_of(const Forecast& given) {
  if (!given) return {};
  const auto& [first, second, distance, slopes, computed] = *given;
  const int order = computed <= 1 ? 0 : computed == 2 ? 1 : slopes;
  return {{as<void>(first), as<void>(second)}, as<const float>(distance), slopes, order, computed};
}

void gather_modulate(const std::array<Pointer, 10>& ptr, const std::array<int64_t, 4>& size,
                     const std::array<int64_t, 6>& stride, float eps, bool rms, int dtype,
                     int cache_dtype, int threads, const Where& where, const Forecast& forecast) {
  toca::GatherModulate p{};
  p.x = as<const void>(ptr[0]);
  p.index = as<const int64_t>(ptr[1]);
  p.shift = {as<const void>(ptr[2]), stride[0], stride[1]};
  p.scale = {as<const void>(ptr[3]), stride[2], stride[3]};
  p.gate = {as<const void>(ptr[4]), stride[4], stride[5]};
  p.cache = as<const void>(ptr[5]);
  p.cache_scale = as<const float>(ptr[6]);
  p.forecast = forecast_of(forecast);
  p.weight = as<const void>(ptr[7]);
  p.bias = as<const void>(ptr[8]);
  p.out = as<void>(ptr[9]);
  p.B = size[0], p.N = size[1], p.k = size[2], p.C = size[3];
  p.eps = eps;
  p.rms = rms;
  p.dtype = toca::DType(dtype);
  p.cache_dtype = toca::DType(cache_dtype);
  p.threads = threads;
  call(toca::cpu::gather_modulate, toca::cuda::gather_modulate, p, where, "index");
}

// (gate, its stride per sample, per token, cache, its scale, its dtype, fresh, inverse, k,
// forecast)
using Update = std::tuple<Pointer, int64_t, int64_t, Pointer, Pointer, int, Pointer, Pointer,
                          int64_t, Forecast>;

void scatter_residual(Pointer x, Pointer out, const std::array<int64_t, 3>& size,
                      const std::vector<Update>& updates, int dtype, int threads,
                      const Where& where) {
  if (updates.size() > toca::kMaxUpdates) throw py::value_error("updates: too many");
  toca::ScatterResidual p{};
  p.x = as<const void>(x);
  p.out = as<void>(out);
  p.B = size[0], p.N = size[1], p.C = size[2];
  for (const auto& [gate, stride_b, stride_n, cache, scale, cache_dtype, fresh, inverse, k,
                    forecast] : updates)
    p.update[p.updates++] = {{as<const void>(gate), stride_b, stride_n},
                             as<void>(cache),
                             as<float>(scale),
                             toca::DType(cache_dtype),
                             as<const void>(fresh),
                             as<const int32_t>(inverse),
                             k,
                             forecast_of(forecast)};
  p.dtype = toca::DType(dtype);
  p.threads = threads;
  call(toca::cpu::scatter_residual, toca::cuda::scatter_residual, p, where, "inverse");
}

void store_rows(const std::array<Pointer, 3>& ptr, const std::array<int64_t, 2>& size, int dtype,
                int cache_dtype, int threads, const Where& where, const Forecast& forecast) {
  toca::StoreRows p{};
  p.rows = as<const void>(ptr[0]);
  p.values = as<void>(ptr[1]);
  p.scale = as<float>(ptr[2]);
  p.forecast = forecast_of(forecast);
  p.R = size[0], p.C = size[1];
  p.dtype = toca::DType(dtype);
  p.cache_dtype = toca::DType(cache_dtype);
  p.threads = threads;
  call(toca::cpu::store_rows, toca::cuda::store_rows, p, where, "rows");
}

void read_rows(const std::array<Pointer, 4>& ptr, const std::array<int64_t, 4>& size, int dtype,
               int cache_dtype, int threads, const Where& where, const Forecast& forecast) {
  toca::ReadRows p{};
  p.cache = as<const void>(ptr[0]);
  p.cache_scale = as<const float>(ptr[1]);
  p.forecast = forecast_of(forecast);
  p.index = as<const int64_t>(ptr[2]);
  p.out = as<void>(ptr[3]);
  p.B = size[0], p.N = size[1], p.k = size[2], p.C = size[3];
  p.dtype = toca::DType(dtype);
  p.cache_dtype = toca::DType(cache_dtype);
  p.threads = threads;
  call(toca::cpu::read_rows, toca::cuda::read_rows, p, where, "index");
}

// How many devices there are, and why they could not be counted ("": they could).
std::pair<int, std::string> cuda_devices() {
  const char* error = "";
  const int count = toca::cuda::device_count(&error);
  return {count, error};
}

std::vector<std::string> isas() {
  const char* names[8];
  const int count = toca::cpu::isas(names);
  return {names, names + count};
}

void choose_isa(const std::string& name) {
  if (!toca::cpu::choose_isa(name.c_str()))
    throw py::value_error("isa: expected one of isas(), got " + name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native bodies of toca_kernels over raw pointers; call them through toca_kernels.ops";
  m.def("attention_scores", &attention_scores);
  m.def("attention_entropy", &attention_entropy);
  m.def("select_tokens", &select_tokens);
  m.def("gather_modulate", &gather_modulate);
  m.def("scatter_residual", &scatter_residual);
  m.def("store_rows", &store_rows);
  m.def("read_rows", &read_rows);
  m.def("isa", [] { return std::string(toca::cpu::isa()); });
  m.def("isas", &isas);
  m.def("choose_isa", &choose_isa);
  m.def("select_tokens_scratch", &toca::cuda::select_tokens_scratch);
  m.def("cuda_toolkit", &toca::cuda::toolkit_version);
  m.def("cuda_driver", &toca::cuda::driver_version);
  m.def("cuda_devices", &cuda_devices);
}
