// Picks the best instruction set that was compiled in and that this CPU has, once.
#include <cstring>

#include "../toca.h"

namespace toca::cpu {

#define TOCA_DECLARE(name)                           \
  namespace name {                                   \
  void attention_scores(const AttentionScores& p);   \
  void attention_entropy(const AttentionEntropy& p); \
  void select_tokens(const SelectTokens& p);         \
  void gather_modulate(const GatherModulate& p);     \
  void scatter_residual(const ScatterResidual& p);   \
  void store_rows(const StoreRows& p);               \
  void read_rows(const ReadRows& p);                 \
  }
#define TOCA_BODIES(name, supported) \
  {#name,                            \
   supported,                        \
   name::attention_scores,           \
   name::attention_entropy,          \
   name::select_tokens,              \
   name::gather_modulate,            \
   name::scatter_residual,           \
   name::store_rows,                 \
   name::read_rows}

TOCA_DECLARE(baseline)
#if defined(__x86_64__)
TOCA_DECLARE(avx2)
TOCA_DECLARE(avx512)
TOCA_DECLARE(avx512_bf16)
#endif

namespace {

struct Bodies {
  const char* name;
  bool (*supported)();
  void (*attention_scores)(const AttentionScores&);
  void (*attention_entropy)(const AttentionEntropy&);
  void (*select_tokens)(const SelectTokens&);
  void (*gather_modulate)(const GatherModulate&);
  void (*scatter_residual)(const ScatterResidual&);
  void (*store_rows)(const StoreRows&);
  void (*read_rows)(const ReadRows&);
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Bodies kBodies[] = {
#if defined(__x86_64__)
    TOCA_BODIES(avx512_bf16, has_avx512_bf16),
    TOCA_BODIES(avx512, has_avx512),
    TOCA_BODIES(avx2, has_avx2),
#endif
    TOCA_BODIES(baseline, always),
};

const Bodies* best() {
  for (const Bodies& bodies : kBodies)
    if (bodies.supported()) return &bodies;
  return nullptr;  // not reached: baseline always runs
}

const Bodies* chosen = best();

}  // namespace

void attention_scores(const AttentionScores& p) { chosen->attention_scores(p); }
void attention_entropy(const AttentionEntropy& p) { chosen->attention_entropy(p); }
void select_tokens(const SelectTokens& p) { chosen->select_tokens(p); }
void gather_modulate(const GatherModulate& p) { chosen->gather_modulate(p); }
void scatter_residual(const ScatterResidual& p) { chosen->scatter_residual(p); }
void store_rows(const StoreRows& p) { chosen->store_rows(p); }
void read_rows(const ReadRows& p) { chosen->read_rows(p); }

const char* isa() { return chosen->name; }

int isas(const char** names) {
  int count = 0;
  for (const Bodies& bodies : kBodies)
    if (bodies.supported()) names[count++] = bodies.name;
  return count;
}

bool choose_isa(const char* name) {
  for (const Bodies& bodies : kBodies)
    if (std::strcmp(bodies.name, name) == 0 && bodies.supported()) {
      chosen = &bodies;
      return true;
    }
  return false;
}

}  // namespace toca::cpu
