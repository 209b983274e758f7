// The scheduler of cuda_runtime.h.
#include <ucontext.h>

#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"

namespace on_host {

dim3 thread, block, block_size, grid_size;

namespace {

constexpr size_t kStack = 64 * 1024;

// Those who wait for each other: a CTA at a barrier, a warp at a collective.
struct Meeting {
  unsigned members = 0, arrived = 0, passed = 0;
  int kind = 0;  // line of the barrier, or the collective
  uint64_t given[32], values[32];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  const Meeting* waits_for = nullptr;
  unsigned passed = 0;  // of that meeting, when it began to wait
  bool done = false;

  bool ready() const { return !done && !(waits_for && waits_for->passed == passed); }
};

std::mt19937 random_order{12345};
std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch
std::vector<Meeting> warps;
Meeting cta;
ucontext_t scheduler;
Fiber* current = nullptr;
const std::function<void()>* running = nullptr;
bool failed = false;

void switch_to_scheduler() {
  Fiber* me = current;
  swapcontext(&me->context, &scheduler);
}

void arrive(Meeting& meeting, int kind) {
  if (meeting.arrived && meeting.kind != kind) failed = true;  // they are at different places
  meeting.kind = kind;
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    ++meeting.passed;
    std::copy(meeting.given, meeting.given + 32, meeting.values);
    return;
  }
  current->waits_for = &meeting;
  current->passed = meeting.passed;
  switch_to_scheduler();
  current->waits_for = nullptr;
}

void body() {
  (*running)();
  current->done = true;
  switch_to_scheduler();
}

void start(Fiber& fiber, unsigned id) {
  fiber.thread =
      dim3(id % block_size.x, id / block_size.x % block_size.y, id / block_size.x / block_size.y);
  fiber.done = false;
  fiber.waits_for = nullptr;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, body, 0);
}

bool run_cta(unsigned threads) {
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned id = 0; id < threads; ++id) start(*fibers[id], id);
  cta = {};
  cta.members = threads;
  warps.assign((threads + 31) / 32, {});
  for (Meeting& warp : warps) warp.members = 32;

  for (bool moved = true; moved;) {
    moved = false;
    std::shuffle(order.begin(), order.end(), random_order);
    for (unsigned id : order) {
      if (failed) return false;
      if (!fibers[id]->ready()) continue;
      moved = true;
      current = fibers[id].get();
      thread = current->thread;
      swapcontext(&scheduler, &current->context);
    }
  }
  return std::all_of(order.begin(), order.end(), [](unsigned id) { return fibers[id]->done; });
}

}  // namespace

void barrier(int line) { arrive(cta, line); }

const uint64_t* exchange(Collective kind, unsigned mask, uint64_t value) {
  const unsigned id = (thread.z * block_size.y + thread.y) * block_size.x + thread.x;
  Meeting& warp = warps[id / 32];
  if (mask != 0xffffffffu) failed = true;
  warp.given[id % 32] = value;
  arrive(warp, int(kind));
  return warp.values;
}

int add(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

bool run(const dim3& grid, const dim3& size, const Shared& shared,
         const std::function<void()>& kernel) {
  grid_size = grid;
  block_size = size;
  running = &kernel;
  failed = false;
  const unsigned threads = size.x * size.y * size.z;
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  std::vector<uint64_t> ctas(uint64_t(grid.x) * grid.y * grid.z);
  std::iota(ctas.begin(), ctas.end(), uint64_t{0});
  std::shuffle(ctas.begin(), ctas.end(), random_order);
  for (uint64_t id : ctas) {
    block =
        dim3(unsigned(id % grid.x), unsigned(id / grid.x % grid.y), unsigned(id / grid.x / grid.y));
    std::memset(shared.bytes, 0xab, shared.size);  // a CTA finds no zeros
    if (!run_cta(threads)) return false;
  }
  return true;
}

}  // namespace on_host
