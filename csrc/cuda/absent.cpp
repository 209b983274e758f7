// In place of the CUDA bodies, where the build found no CUDA compiler.
#include <stdexcept>

#include "../toca.h"

namespace toca::cuda {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error("toca_kernels._C was built without a CUDA compiler");
}

}  // namespace

void select_tokens(const SelectTokens&, const Stream&) { refuse(); }
void gather_modulate(const GatherModulate&, const Stream&) { refuse(); }
void scatter_residual(const ScatterResidual&, const Stream&) { refuse(); }
void store_rows(const StoreRows&, const Stream&) { refuse(); }
void read_rows(const ReadRows&, const Stream&) { refuse(); }
int64_t select_tokens_scratch(int64_t, int64_t) { return 0; }

int toolkit_version() { return 0; }
int driver_version() { return 0; }
int device_count(const char**) { return 0; }

}  // namespace toca::cuda
