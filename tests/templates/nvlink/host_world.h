// A group's GPUs on the host, as far as device code asks for them: it is compiled behind this as it stands.
//
// Each GPU thread is a coroutine. A scheduler with a seed says which one goes on wherever one touches memory that others see, so a run can
// be repeated, and one that hangs is known to. The memory model is PTX's where a store is concerned: a weak one is seen by peers at once, or
// only behind a fence of a thread that it comes before (its own, or one that has met it at a barrier since), as the dice have it. Time
// passes while nothing happens but polling, so that waits run out as soon as they are in vain.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#define TSL static inline
#define __device__
#define __forceinline__ inline
// What is __shared__ lies in a section of its own, which is exchanged where a thread of another block goes on. GCC ignores the section of
// variables in templates.
#define __shared__ static __attribute__((section("gpu_shared")))
extern "C" char __start_gpu_shared[], __stop_gpu_shared[];

namespace {   // static variables of inline functions could not share a section with others

using std::min;
struct Index { int x; };
struct uint4 { uint32_t x, y, z, w; };
Index threadIdx, blockIdx, gridDim;
__shared__ __attribute__((used)) uint64_t unused_word;

using Clock = std::vector<uint32_t>;   // for each thread of a block, how many of its stores come before
struct Store { uint32_t number; void *to; uint4 value; };
struct Block;
struct Thread {
  ucontext_t context;
  Block *block;
  int place, index;   // in the block, threadIdx.x
  bool polls = false, done = false;
  uint32_t stores = 0;
  std::vector<Store> held;   // not yet seen by peers
  std::shared_ptr<const Clock> seen;
};
using Barrier = std::vector<Thread *>;   // those that wait
struct Block {
  std::vector<int> indices;   // threadIdx.x of its threads
  int number, grid;
  std::function<void()> body;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<char> shared;
  std::unordered_map<const void *, std::pair<int, Store>> held;   // the last one to a place, and whose it is
  std::map<int, Barrier> barriers;   // by number; those of warps are below zero
  uint64_t words[32][32];            // of shuffles: of warps, of lanes
  size_t left = 0;
  int slow_from = 0, slow_to = 0;    // warps that are slow for a while
};
// What a GPU runs, launch after launch; of a launch at most `resident` CTAs at a time. Blocks that stand for copy engines have numbers below
// zero, and need no SM. It begins at step `late`, never if that is negative,
// or as soon as the other GPUs can do nothing without it.
struct Queue {
  int64_t late = 0;
  size_t resident = 1 << 20, running = 0, ended = 0;   // CTAs that run, blocks of the launch that have ended
  std::vector<std::vector<std::unique_ptr<Block>>> launches;
  size_t launch = 0, block = 0;
  bool done() const { return late < 0 || launch == launches.size(); }
};

struct World {
  static constexpr size_t STACK = 64 << 10;
  static constexpr int64_t MOST_STEPS = 4'000'000;
  std::mt19937 dice;
  std::vector<Queue> queues;
  std::vector<Thread *> ready;
  std::vector<Block *> blocks;   // that run
  std::vector<void *> stacks, free_stacks;
  std::map<Block *, Queue *> owners;
  std::vector<char> nothing;
  ucontext_t scheduler;
  Thread *current = nullptr;
  Block *loaded = nullptr;
  int64_t step = 0, next_change = 0, quiet = 0;   // quiet: steps of nothing but polling
  uint64_t now = 0;
  std::string why;               // it did not end

  World(int seed, int ranks) : dice(seed), queues(ranks) {}
  ~World() { for (void *stack : stacks) munmap(stack, STACK); }
  static void enter();

  // Threads of `indices` in each of `grid` blocks, behind earlier launches of the queue.
  void launch(int queue, int grid, const std::vector<int> &indices, std::function<void()> body) {
    queues[queue].launches.emplace_back();
    for (int number = 0; number < grid; ++number) add(queue, number, grid, indices, body);
  }
  // A copy engine beside the last launch.
  void beside(int queue, std::function<void()> body) {
    add(queue, -1, 1, {0}, std::move(body));
    auto &launch = queues[queue].launches.back();
    std::rotate(launch.begin(), launch.end() - 1, launch.end());
  }
  void add(int queue, int number, int grid, const std::vector<int> &indices, std::function<void()> body) {
    auto made = std::make_unique<Block>();
    made->indices = indices;
    made->number = number;
    made->grid = grid;
    made->body = std::move(body);
    owners[made.get()] = &queues[queue];
    queues[queue].launches.back().push_back(std::move(made));
  }
  void begin(Block &block) {
    block.shared.assign(__stop_gpu_shared - __start_gpu_shared, (char)0xff);   // nobody may rely on it
    block.left = block.indices.size();
    const auto seen = std::make_shared<const Clock>(block.left, 0);
    for (int index : block.indices) {
      if (free_stacks.empty()) {
        stacks.push_back(mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        free_stacks.push_back(stacks.back());
      }
      auto thread = std::make_unique<Thread>();
      thread->block = &block;
      thread->place = (int)block.threads.size();
      thread->index = index;
      thread->seen = seen;
      getcontext(&thread->context);
      thread->context.uc_stack.ss_sp = free_stacks.back();
      thread->context.uc_stack.ss_size = STACK;
      thread->context.uc_link = nullptr;
      free_stacks.pop_back();
      makecontext(&thread->context, &World::enter, 0);
      ready.push_back(thread.get());
      block.threads.push_back(std::move(thread));
    }
    blocks.push_back(&block);
  }
  void admit(Queue &queue) {
    if (queue.done() || queue.late > step) return;
    auto &launch = queue.launches[queue.launch];
    for (; queue.block < launch.size(); ++queue.block) {
      Block &next = *launch[queue.block];
      if (next.number >= 0 && queue.running++ == queue.resident) { --queue.running; break; }
      begin(next);
    }
  }
  void end(Thread &thread) {
    Block &block = *thread.block;
    free_stacks.push_back(thread.context.uc_stack.ss_sp);
    if (--block.left) return;
    blocks.erase(std::find(blocks.begin(), blocks.end(), &block));
    block.threads.clear();
    if (loaded == &block) loaded = nullptr;
    Queue &queue = *owners[&block];
    if (block.number >= 0) --queue.running;
    if (++queue.ended == queue.launches[queue.launch].size()) { ++queue.launch; queue.block = queue.ended = 0; }
    admit(queue);
  }
  bool begin_late() {   // the one that is due first
    Queue *next = nullptr;
    for (Queue &queue : queues) if (!queue.done() && queue.late > step && (!next || queue.late < next->late)) next = &queue;
    if (next) { next->late = step; admit(*next); }
    return next;
  }
  bool is_quiet() const { return quiet > 2000 + 4 * (int64_t)ready.size(); }
  Thread *pick() {
    if (step >= next_change) {
      next_change = step + (256 << dice() % 8);
      for (Block *block : blocks) {
        const int first = dice() % 17, end = dice() % 17;
        block->slow_from = std::min(first, end);
        block->slow_to = std::max(first, end);
      }
    }
    size_t at = 0;
    for (int tries = 0; tries < (quiet < 300 ? 6 : 1); ++tries) {   // nothing waits for ever for what is slow
      at = dice() % ready.size();
      const int warp = ready[at]->index / 32;
      if (warp < ready[at]->block->slow_from || warp >= ready[at]->block->slow_to) break;
    }
    Thread *found = ready[at];
    ready[at] = ready.back();
    ready.pop_back();
    return found;
  }
  // Returns false if it does not end; `why` says where it stands.
  bool run() {
    for (Queue &queue : queues) admit(queue);
    while (true) {
      if ((ready.empty() || is_quiet()) && begin_late()) { quiet = 0; continue; }
      if (ready.empty()) break;
      now += is_quiet();
      if (++step > MOST_STEPS) { why = "it does not end"; return false; }
      for (Queue &queue : queues) if (queue.late == step) admit(queue);
      current = pick();
      quiet = current->polls ? quiet + 1 : 0;
      Block &block = *current->block;
      if (loaded != &block) {
        if (loaded) memcpy(loaded->shared.data(), __start_gpu_shared, loaded->shared.size());
        loaded = &block;
        memcpy(__start_gpu_shared, block.shared.data(), block.shared.size());
      }
      threadIdx.x = current->index;
      blockIdx.x = block.number;
      gridDim.x = block.grid;
      swapcontext(&scheduler, &current->context);
      if (current->done) end(*current);
      current = nullptr;
    }
    for (size_t rank = 0; rank < queues.size(); ++rank) if (!queues[rank].done()) {
      why += "rank " + std::to_string(rank) + " hangs:";
      for (Block *block : blocks) if (owners[block] == &queues[rank])
        for (auto &[number, waiting] : block->barriers) if (!waiting.empty())
          why += " " + std::to_string(waiting.size()) + " threads of CTA " + std::to_string(block->number) + " wait at barrier " + std::to_string(number) + ";";
    }
    return why.empty();
  }

  // ---- what a thread does ----
  void leave() { swapcontext(&current->context, &scheduler); }
  void poll() {
    current->polls = true;
    ready.push_back(current);
    leave();
    current->polls = false;
  }
  void act() {   // something that others may see
    if (dice() % 4 == 0) { ready.push_back(current); leave(); }
  }
  void meet(int number, size_t count) {
    Barrier &waiting = current->block->barriers[number];
    waiting.push_back(current);
    if (waiting.size() < count) return leave();
    auto all = std::make_shared<Clock>(*current->seen);
    const Clock *last = current->seen.get();
    for (Thread *thread : waiting) if (thread->seen.get() != last) {
      last = thread->seen.get();
      for (size_t i = 0; i < all->size(); ++i) (*all)[i] = std::max((*all)[i], (*last)[i]);
    }
    for (Thread *thread : waiting) (*all)[thread->place] = thread->stores;
    for (Thread *thread : waiting) {
      thread->seen = all;
      if (thread != current) ready.push_back(thread);
    }
    waiting.clear();
    act();
  }
  void store(void *to, uint4 value) {
    ++current->stores;
    if (dice() % 2) {
      memcpy(to, &value, 16);
      current->block->held.erase(to);
      return;
    }
    const Store made = {current->stores, to, value};
    current->held.push_back(made);
    current->block->held[to] = {current->place, made};
  }
  uint4 load(const void *from) {
    const auto found = current->block->held.find(from);
    if (found != current->block->held.end()) {
      const auto &[place, made] = found->second;
      if (place == current->place || made.number <= (*current->seen)[place]) return made.value;
    }
    uint4 value;
    memcpy(&value, from, 16);
    return value;
  }
  void release(Thread &thread, uint32_t stores) {
    auto &known = thread.block->held;
    size_t count = 0;
    for (; count < thread.held.size() && thread.held[count].number <= stores; ++count) {
      const Store &made = thread.held[count];
      const auto found = known.find(made.to);
      if (found == known.end() || found->second.first != thread.place || found->second.second.number != made.number) continue;   // another one came since
      memcpy(made.to, &made.value, 16);
      known.erase(found);
    }
    thread.held.erase(thread.held.begin(), thread.held.begin() + count);
  }
  void fence() {
    for (auto &thread : current->block->threads) release(*thread, thread.get() == current ? thread->stores : (*current->seen)[thread->place]);
  }
};
World *world;
void World::enter() {
  world->current->block->body();
  world->release(*world->current, world->current->stores);
  world->current->done = true;
  world->leave();
}

// ---- what runs device code ----------------------------------------------------------------------------------------------------

// Indices of threads, from ranges.
std::vector<int> threads_of(std::initializer_list<std::pair<int, int>> ranges) {
  std::vector<int> found;
  for (const auto &[first, end] : ranges) for (int i = first; i < end; ++i) found.push_back(i);
  return found;
}
// Runs what `fill` launches for each rank. Returns why it did not end, or null.
const char *in_world(int seed, int ranks, const std::function<void(World &, int)> &fill) {
  static std::string why;
  World all(seed, ranks);
  world = &all;
  for (int rank = 0; rank < ranks; ++rank) fill(all, rank);
  const bool ended = all.run();
  why = all.why;
  return ended ? nullptr : why.c_str();
}
