// Threads as fibres: each runs until it waits or ends, then another one that need not wait is drawn.
#include "cuda_runtime.h"

#include <ucontext.h>

#include <numeric>
#include <random>
#include <vector>

namespace emulated {

dim3 thread_index, block_index;

namespace {

constexpr size_t kStack = 1 << 16;
constexpr unsigned kWarp = 32;

// Where threads meet, again and again. What they bring alternates between two places, since who leaves early may be
// back before the last has read.
struct Meeting {
  unsigned expected = 0, arrived = 0, round = 0;
  uint32_t lanes[2] = {};
  bool all[2] = {true, true};
  Barrier barrier = Barrier::kPlain;
  uint64_t values[2][kWarp] = {};

  void complete_if_all_came() {
    if (arrived == 0 || arrived < expected) return;
    arrived = 0;
    ++round;
    all[round % 2] = true;
    lanes[round % 2] = 0;
  }
};

struct Fibre {
  ucontext_t context;
  const Meeting* awaited = nullptr;
  unsigned round = 0;
  bool ended = false;

  bool may_run() const { return !ended && (awaited == nullptr || awaited->round != round); }
};

std::mt19937_64 generator;
bool shuffled = false, misused = false;
std::vector<std::vector<char>> stacks;
std::vector<Fibre> fibres;
std::vector<Meeting> warps;
Meeting block;
ucontext_t scheduler;
const std::function<void()>* kernel;

Fibre& current() { return fibres[thread_index.x]; }

void meet(Meeting& meeting) {
  Fibre& fibre = current();
  fibre.awaited = &meeting;
  fibre.round = meeting.round;
  ++meeting.arrived;
  meeting.complete_if_all_came();
  while (!fibre.may_run()) swapcontext(&fibre.context, &scheduler);
  fibre.awaited = nullptr;
}

void live() {
  (*kernel)();
  current().ended = true;
  for (Meeting* meeting : {&block, &warps[thread_index.x / kWarp]}) {
    --meeting->expected;
    meeting->complete_if_all_came();
  }
}

std::vector<unsigned> order_of(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (shuffled) std::shuffle(order.begin(), order.end(), generator);
  return order;
}

bool run_block(unsigned threads) {
  block = Meeting{};
  block.expected = threads;
  warps.assign((threads + kWarp - 1) / kWarp, Meeting{});
  fibres.assign(threads, Fibre{});
  stacks.resize(std::max<size_t>(stacks.size(), threads), std::vector<char>(kStack));
  for (unsigned i = 0; i < threads; ++i) {
    ++warps[i / kWarp].expected;
    ucontext_t& context = fibres[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[i].data();
    context.uc_stack.ss_size = kStack;
    context.uc_link = &scheduler;
    makecontext(&context, live, 0);
  }
  for (bool ran = true; ran;) {
    ran = false;
    for (unsigned i : order_of(threads)) {
      if (!fibres[i].may_run()) continue;
      thread_index.x = i;
      swapcontext(&scheduler, &fibres[i].context);
      ran = true;
    }
  }
  return std::all_of(fibres.begin(), fibres.end(), [](const Fibre& fibre) { return fibre.ended; });
}

}  // namespace

bool synchronize(Barrier barrier, bool value) {
  const unsigned place = block.round % 2;
  if (block.arrived == 0) block.barrier = barrier;
  misused |= block.barrier != barrier;
  block.all[place] &= value;
  meet(block);
  return block.all[place];
}

uint64_t exchange(uint32_t mask, uint64_t value, uint32_t source) {
  Meeting& warp = warps[thread_index.x / kWarp];
  const unsigned place = warp.round % 2;
  warp.values[place][thread_index.x % kWarp] = value;
  warp.lanes[place] |= 1u << thread_index.x % kWarp;
  meet(warp);
  misused |= (warp.lanes[place] & mask) != mask;
  return warp.values[place][source];
}

cudaError_t run(dim3 grid, dim3 threads, const std::function<void()>& body) {
  if (grid.x == 0 || threads.x == 0) return cudaErrorLaunchFailure;
  kernel = &body;
  misused = false;
  for (unsigned i : order_of(grid.x)) {
    block_index.x = i;
    if (!run_block(threads.x) || misused) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace emulated

// From now on blocks and threads take their turns in an order that is drawn anew; 0: in the order of their numbers.
extern "C" void draw_orders(uint64_t seed) {
  emulated::shuffled = seed != 0;
  emulated::generator.seed(seed);
}
