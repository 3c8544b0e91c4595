// A GPU's threads as fibers of one host thread: blocks and clusters with real barriers, in a random order of execution.
//
// A fiber runs until it waits. Whoever is ready then is resumed in an order drawn anew each round, and now and then a
// whole block sleeps while the others run ahead as far as the barriers let them: code that relies on an order it has
// not fenced goes wrong here sooner than on a device. Asynchronous copies happen at the issue or at the wait, drawn one
// by one: a slot read too early holds old bytes, a slot refilled too early loses them. Letters between blocks land some
// rounds after they are sent, in any order, and never in a block that has left.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

namespace device_on_host {

struct Barrier {
    int members = 0, arrived = 0;
    long long generation = 0;
};

struct Copy {
    void* to;
    const void* from;
};

struct Warp {
    Barrier barrier;
    std::uint64_t exchange[2][32] = {};
};

struct Block {
    int rank = 0;
    long long index = 0;
    Barrier barrier;
    int naps = 0;  // rounds it sleeps through
    int running = 0;
    std::vector<std::function<void()>> letters;  // on their way here
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
};

struct Fiber {
    ucontext_t context;
    Block* block = nullptr;
    int thread = 0;
    int exchanges = 0;
    bool done = false;
    Barrier* waits_at = nullptr;
    long long generation = 0;
    std::function<bool()> until;                                                // waits for this to be so
    std::vector<std::vector<Copy>> groups = std::vector<std::vector<Copy>>(1);  // the last one is still open
};

struct Cluster {
    std::vector<Block> blocks;
    std::vector<Fiber> fibers;
    Barrier barrier;
    int threads = 0;
    long long grid = 0;
    ucontext_t scheduler;
    Fiber* running = nullptr;
    std::function<void()> kernel;
    std::mt19937 random;
};

inline Cluster* current = nullptr;

constexpr std::size_t kStackBytes = 128 << 10;
inline std::vector<std::unique_ptr<char[]>> stacks;  // kept from cluster to cluster: most of each is never touched

inline Fiber& me() { return *current->running; }

inline void yield() { swapcontext(&me().context, &current->scheduler); }

inline void wait_at(Barrier& barrier) {
    if (++barrier.arrived == barrier.members) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    me().waits_at = &barrier;
    me().generation = barrier.generation;
    yield();
    me().waits_at = nullptr;
}

inline void wait_until(const std::function<bool()>& condition) {
    if (condition()) return;
    me().until = condition;
    yield();
    me().until = nullptr;
}

inline void post(Block& to, std::function<void()> letter) { to.letters.push_back(std::move(letter)); }

// Some of the letters on their way; whether any still are.
inline bool deliver(Block& block, std::mt19937& random) {
    for (auto letter = block.letters.begin(); letter != block.letters.end();) {
        if (random() % 4 != 0) {
            ++letter;
            continue;
        }
        if (block.running == 0) __builtin_trap();  // shared memory of a block that has left
        (*letter)();
        letter = block.letters.erase(letter);
    }
    return !block.letters.empty();
}

inline bool ready(const Fiber& fiber) {
    return !fiber.done && (fiber.until == nullptr || fiber.until()) &&
           (fiber.waits_at == nullptr || fiber.waits_at->generation != fiber.generation);
}

inline void enter() {
    current->kernel();
    me().done = true;
    --me().block->running;
    yield();
}

// Runs one cluster to its end. False: every thread waits for another.
inline bool run_cluster(Cluster& cluster) {
    current = &cluster;
    while (stacks.size() < cluster.fibers.size()) stacks.emplace_back(new char[kStackBytes]);
    auto stack = stacks.begin();
    for (Fiber& fiber : cluster.fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = (stack++)->get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    std::vector<Fiber*> order;
    for (Fiber& fiber : cluster.fibers) order.push_back(&fiber);
    while (!order.empty()) {
        std::shuffle(order.begin(), order.end(), cluster.random);
        bool moved = false, slept = false;
        for (Block& block : cluster.blocks) {
            slept |= deliver(block, cluster.random);
            block.naps = block.naps > 0               ? block.naps - 1
                         : cluster.random() % 16 == 0 ? static_cast<int>(cluster.random() % 64)
                                                      : 0;
        }
        for (Fiber* fiber : order) {
            if (!ready(*fiber)) continue;
            if (fiber->block->naps > 0) {
                slept = true;
                continue;
            }
            moved = true;
            cluster.running = fiber;
            swapcontext(&cluster.scheduler, &fiber->context);
        }
        if (!moved && !slept) return false;
        order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->done; }), order.end());
    }
    return true;
}

struct Shape {
    long long grid;  // blocks, a multiple of `cluster`
    int threads, shared_bytes, cluster;
};

// Runs `kernel` as every thread of the grid, cluster by cluster. Shared memory starts as 0xff bytes: NaN in every type.
inline bool run_grid(Shape shape, unsigned seed, const std::function<void()>& kernel) {
    for (long long first = 0; first < shape.grid; first += shape.cluster) {
        Cluster cluster;
        cluster.kernel = kernel;
        cluster.random.seed(seed + static_cast<unsigned>(first));
        cluster.threads = shape.threads;
        cluster.grid = shape.grid;
        cluster.barrier.members = shape.cluster * shape.threads;
        cluster.blocks.resize(static_cast<std::size_t>(shape.cluster));
        cluster.fibers.resize(static_cast<std::size_t>(shape.cluster * shape.threads));
        for (int rank = 0; rank < shape.cluster; ++rank) {
            Block& block = cluster.blocks[static_cast<std::size_t>(rank)];
            block.rank = rank;
            block.index = first + rank;
            block.barrier.members = block.running = shape.threads;
            block.warps.resize(static_cast<std::size_t>(shape.threads / 32));
            for (Warp& warp : block.warps) warp.barrier.members = 32;
            block.shared.assign(static_cast<std::size_t>(shape.shared_bytes) + 16, 0xff);
            for (int thread = 0; thread < shape.threads; ++thread) {
                Fiber& fiber = cluster.fibers[static_cast<std::size_t>(rank * shape.threads + thread)];
                fiber.block = &block;
                fiber.thread = thread;
            }
        }
        if (!run_cluster(cluster)) return false;
    }
    return true;
}

}  // namespace device_on_host
