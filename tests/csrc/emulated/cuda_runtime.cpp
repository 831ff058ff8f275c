// Threads as fibres: each runs until it waits or ends, then the next one in the block's order that need not wait. Now
// and then it is another block's turn, or a block's order is drawn anew: so some threads get far ahead of others.
#include "cuda_runtime.h"

#include <ucontext.h>

#include <list>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

// The section of __shared__ variables: one copy, which each block finds as it left it.
extern "C" __attribute__((visibility("hidden"))) unsigned char __start_emulated_shared[], __stop_emulated_shared[];

namespace emulated {

dim3 thread_index, block_index;

namespace {

constexpr size_t kStack = 1 << 16;
constexpr unsigned kWarp = 32;
constexpr size_t kResident = 3;      // blocks that are under way at a time
constexpr unsigned kPatience = 16;   // threads, on average, before it is another block's turn
constexpr unsigned kConstancy = 8;   // turns, on average, before a block's order is drawn anew

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

std::mt19937_64 generator;
bool shuffled = false;

// Whether what happens once in so many times happens now.
bool now(unsigned times) { return shuffled && generator() % times == 0; }

std::vector<unsigned> order_of(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (shuffled) std::shuffle(order.begin(), order.end(), generator);
  return order;
}

std::vector<std::unique_ptr<char[]>> spare_stacks;

std::unique_ptr<char[]> take_stack() {
  if (spare_stacks.empty()) return std::make_unique_for_overwrite<char[]>(kStack);
  std::unique_ptr<char[]> stack = std::move(spare_stacks.back());
  spare_stacks.pop_back();
  return stack;
}

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack = take_stack();
  const Meeting* awaited = nullptr;
  unsigned round = 0;
  bool ended = false;

  Fibre() = default;
  ~Fibre() { spare_stacks.push_back(std::move(stack)); }

  bool may_run() const { return !ended && (awaited == nullptr || awaited->round != round); }
};

struct Block {
  unsigned index;
  std::vector<unsigned> order;
  std::vector<Fibre> fibres;
  std::vector<Meeting> warps;
  Meeting whole;
  std::vector<unsigned char> shared;

  Block(unsigned index, unsigned threads);
  bool ended() const {
    return std::all_of(fibres.begin(), fibres.end(), [](const Fibre& fibre) { return fibre.ended; });
  }
};

bool misused = false;
Block* running;
ucontext_t scheduler;
const std::function<void()>* kernel;

Fibre& current() { return running->fibres[thread_index.x]; }
Meeting& warp() { return running->warps[thread_index.x / kWarp]; }

void yield() { swapcontext(&current().context, &scheduler); }

void meet(Meeting& meeting) {
  Fibre& fibre = current();
  fibre.awaited = &meeting;
  fibre.round = meeting.round;
  ++meeting.arrived;
  meeting.complete_if_all_came();
  while (!fibre.may_run()) yield();
  fibre.awaited = nullptr;
}

void live() {
  (*kernel)();
  current().ended = true;
  for (Meeting* meeting : {&running->whole, &warp()}) {
    --meeting->expected;
    meeting->complete_if_all_came();
  }
}

Block::Block(unsigned index, unsigned threads)
    : index(index),
      order(order_of(threads)),
      fibres(threads),
      warps((threads + kWarp - 1) / kWarp),
      shared(__stop_emulated_shared - __start_emulated_shared, now(2) ? 0 : 0xff) {
  whole.expected = threads;
  for (unsigned i = 0; i < threads; ++i) {
    ++warps[i / kWarp].expected;
    ucontext_t& context = fibres[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = fibres[i].stack.get();
    context.uc_stack.ss_size = kStack;
    context.uc_link = &scheduler;
    makecontext(&context, live, 0);
  }
}

// Some of the threads of a block that may run, or all; whether there was any.
bool take_turns(Block& block) {
  running = &block;
  block_index.x = block.index;
  std::copy(block.shared.begin(), block.shared.end(), __start_emulated_shared);
  if (now(kConstancy)) block.order = order_of(static_cast<unsigned>(block.order.size()));
  bool ran = false;
  for (size_t at = 0; at < block.order.size();) {
    thread_index.x = block.order[at];
    if (!current().may_run()) {
      ++at;
      continue;
    }
    swapcontext(&scheduler, &current().context);
    ran = true;
    if (now(kPatience)) break;
  }
  std::copy(__start_emulated_shared, __stop_emulated_shared, block.shared.begin());
  return ran;
}

}  // namespace

bool synchronize(Barrier barrier, bool value) {
  Meeting& block = running->whole;
  const unsigned place = block.round % 2;
  if (block.arrived == 0) block.barrier = barrier;
  misused |= block.barrier != barrier;
  block.all[place] &= value;
  meet(block);
  return block.all[place];
}

uint64_t exchange(uint32_t mask, uint64_t value, uint32_t source) {
  Meeting& meeting = warp();
  const unsigned place = meeting.round % 2;
  meeting.values[place][thread_index.x % kWarp] = value;
  meeting.lanes[place] |= 1u << thread_index.x % kWarp;
  meet(meeting);
  misused |= (meeting.lanes[place] & mask) != mask;
  return meeting.values[place][source];
}

void pause() {
  if (shuffled) yield();
}

cudaError_t run(dim3 grid, dim3 threads, const std::function<void()>& body) {
  if (grid.x == 0 || threads.x == 0) return cudaErrorLaunchFailure;
  kernel = &body;
  misused = false;
  std::list<Block> under_way;
  const std::vector<unsigned> order = order_of(grid.x);
  for (auto next = order.begin(); next != order.end() || !under_way.empty();) {
    while (next != order.end() && under_way.size() < (shuffled ? kResident : 1))
      under_way.emplace_back(*next++, threads.x);
    const auto block = std::next(under_way.begin(), shuffled ? generator() % under_way.size() : 0);
    if (take_turns(*block)) continue;
    if (!block->ended() || misused) return cudaErrorLaunchFailure;
    under_way.erase(block);
  }
  return cudaSuccess;
}

}  // namespace emulated

// From now on blocks and threads take their turns in an order that is drawn anew; 0: in the order of their numbers.
extern "C" void draw_orders(uint64_t seed) {
  emulated::shuffled = seed != 0;
  emulated::generator.seed(seed);
}
