// Work items over PyTorch's threads (torch.set_num_threads).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace adalora::cpu {

// Calls work(item, scratch) for every item in [0, items); each thread makes one scratch. Threads draw the items one by
// one, so that one that is held up delays nothing but its own; results must not depend on who does which.
template <typename MakeScratch, typename Work>
void for_each_item(int64_t items, bool threaded, const MakeScratch& make_scratch, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto draw = [&](int64_t, int64_t) {
    auto scratch = make_scratch();
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(item, scratch);
  };
  if (!threaded || items < 2) return draw(0, 1);
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, draw);
}

// The same with work(item, next, scratch), where `next` is the item that the same thread does after it. It is drawn
// ahead, so that it too is held up, as long as one is left for each of the others; then it is `items`.
template <typename MakeScratch, typename Work>
void for_each_item_and_next(int64_t items, bool threaded, const MakeScratch& make_scratch, const Work& work) {
  const int64_t threads = threaded ? torch::stable::get_num_threads() : 1;
  std::atomic<int64_t> undrawn{0};
  for_each_item(threads, threads > 1, make_scratch, [&](int64_t, auto& scratch) {
    const auto drawn = [&] { return std::min(undrawn.fetch_add(1, std::memory_order_relaxed), items); };
    for (int64_t item = drawn(), next; item < items; item = next < items ? next : drawn()) {
      next = undrawn.load(std::memory_order_relaxed) + threads <= items ? drawn() : items;
      work(item, next, scratch);
    }
  });
}

}  // namespace adalora::cpu
