// What bindings.cpp wants besides the kernels.
#include <stdexcept>

#include "toca.h"

namespace toca::cpu {

[[noreturn]] static void refuse() {
  throw std::runtime_error("only CUDA bodies are in this module");
}

void attention_scores(const AttentionScores&) { refuse(); }
void attention_entropy(const AttentionEntropy&) { refuse(); }
void select_tokens(const SelectTokens&) { refuse(); }
void gather_modulate(const GatherModulate&) { refuse(); }
void scatter_residual(const ScatterResidual&) { refuse(); }
void store_rows(const StoreRows&) { refuse(); }
void read_rows(const ReadRows&) { refuse(); }

const char* isa() { return "on_host"; }
int isas(const char**) { return 0; }
bool choose_isa(const char*) { return false; }

}  // namespace toca::cpu

namespace toca::cuda {

int toolkit_version() { return 13000; }
int driver_version() { return 13000; }
int device_count(const char**) { return 1; }

}  // namespace toca::cuda
