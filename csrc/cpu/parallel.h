// OpenMP with torch's thread count.  torch is imported first, so its OpenMP runtime serves both.
#pragma once

#include <algorithm>
#include <cstdint>

namespace toca::cpu {

// Calls body(begin, end) on contiguous shares of [0, total); shares smaller than `grain` are not
// worth a thread.
template <class Body>
void parallel_for(int64_t total, int64_t grain, int threads, Body body) {
  const int64_t shares =
      std::max<int64_t>(1, std::min<int64_t>(threads, total / std::max<int64_t>(grain, 1)));
  if (shares == 1) {
    body(int64_t{0}, total);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(int(shares))
  for (int64_t s = 0; s < shares; ++s) body(total * s / shares, total * (s + 1) / shares);
}

}  // namespace toca::cpu
