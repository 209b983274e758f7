// Rows of a cache that is extrapolated to the step that reads it, from its finite differences.
#pragma once

#include "../toca.h"
#include "eight_bit.h"
#include "vec.h"

namespace toca::cpu::TOCA_ISA {

// A row to read: values + d * slope[0] + d^2 / 2 * slope[1], the first kOrder slopes only.
template <class T, int kOrder>
struct ForecastRow {
  const T* values;
  const T* slope[kOrder];
  float factor[kOrder];

  template <class Load>
  Vec operator()(Load load) const {
    Vec v = load(values) + factor[0] * load(slope[0]);
    if constexpr (kOrder > 1) v += factor[1] * load(slope[1]);
    return v;
  }
};

// Calls body with row `row` of a forecast cache.
template <class T, class Body>
inline void with_forecast(const void* values, const Forecast& f, int64_t row, int64_t C,
                          Body body) {
  const int64_t at = row * C;
  const T *v = (const T*)values + at, *first = (const T*)f.slope[0] + at;
  if (f.order == 0) return body(Row<T>{v, 1.f});
  const float d = f.distance[row];
  if (f.order == 1) return body(ForecastRow<T, 1>{v, {first}, {d}});
  body(ForecastRow<T, 2>{v, {first, (const T*)f.slope[1] + at}, {d, 0.5f * d * d}});
}

// Writes a fresh row to row `row` of a forecast cache: its differences, then the row bit by bit.
// What was never computed is not read: it may be anything.
template <class T>
inline void store_forecast(const T* fresh, void* values, const Forecast& f, int64_t row,
                           int64_t C) {
  const int64_t at = row * C;
  T *v = (T*)values + at, *first = (T*)f.slope[0] + at;
  T* second = f.slopes > 1 ? (T*)f.slope[1] + at : nullptr;
  const float d = f.distance[row];
  if (f.computed == 0) {
    std::memset(first, 0, C * sizeof(T));
  } else if (f.computed == 1 || !second) {
    for_row(C, [&](int64_t, auto load, auto put) { put(first, (load(fresh) - load(v)) / d); });
  } else {
    for_row(C, [&](int64_t, auto load, auto put) {
      const Vec slope = (load(fresh) - load(v)) / d;
      put(second, (slope - load(first)) / d);
      put(first, slope);
    });
  }
  if (second && f.computed <= 1) std::memset(second, 0, C * sizeof(T));
  std::memcpy(v, fresh, C * sizeof(T));
}

}  // namespace toca::cpu::TOCA_ISA
