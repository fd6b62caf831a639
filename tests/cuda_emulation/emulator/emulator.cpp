// Blocks run one after another, a block's threads as fibers: one runs until it comes to a barrier or an operation of
// its warp. Every access to memory is seen through the calls that GCC's -fsanitize=thread puts before it.

#include "cuda_runtime.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <sys/mman.h>

// of libasan, where it is loaded: it knows where tensors end
extern "C" void* __asan_region_is_poisoned(void* begin, size_t size) __attribute__((weak));

namespace emulation {
namespace {

constexpr unsigned WARP = 32, MOST_THREADS = 1024;
constexpr size_t STACK = 128 << 10, WITHOUT_ASKING = 48 << 10;  // bytes; the latter of shared memory

unsigned seed;
std::mt19937 random_number;
struct {
    size_t shared = 232448;  // bytes of a block
    bool has_code = true;
} card;
cudaError_t last_error;
std::unordered_map<const void*, size_t> allowed;  // shared memory of a kernel that asked

cudaError_t remembered(cudaError_t error) { return error == cudaSuccess ? error : last_error = error; }

// ---- fibers

struct Fiber {
    Thread thread;
    void* top;  // of its stack, with what it needs to go on
    enum { READY, AT_WARP, AT_BARRIER, DONE } state;
    Place place;
    uint64_t word;
    std::vector<std::vector<std::pair<void*, const void*>>> copies = {{}};  // that have not been waited for, by commits
};

std::vector<Fiber> fibers;
std::vector<uint64_t> words;
Fiber* running;
void* scheduler;
const std::function<void()>* body;
std::string error;

// Leaves what the ABI preserves on this stack, and goes on where another one was left.
[[gnu::naked, gnu::noinline]] void go_on(void** /*from*/, void* /*to*/) {
    asm(R"(
        pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
        movq %rsp, (%rdi)
        movq %rsi, %rsp
        popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
        ret
    )");
}

void leave(decltype(Fiber::state) state, Place place = nullptr) {
    running->state = state, running->place = place;
    go_on(&running->top, scheduler);
}

void begin() {
    (*body)();
    leave(Fiber::DONE);
}

char* stacks() {
    static void* const memory = mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(memory);
}

void prepare(unsigned i, const Launch& launch, dim3 block) {
    auto* top = reinterpret_cast<void**>(stacks() + (i + 1) * STACK);
    *--top = nullptr;  // `begin` returns nowhere
    *--top = reinterpret_cast<void*>(&begin);
    top -= 6;  // six registers, of any value
    fibers[i] = {{dim3(i % launch.block.x, i / launch.block.x % launch.block.y, i / launch.block.x / launch.block.y),
                  block, launch.block, launch.grid},
                 top, Fiber::READY, nullptr, 0};
}

std::string where(const Thread& t) {
    return "thread " + std::to_string(t.index.x) + " of block (" + std::to_string(t.block.x) + ", " +
           std::to_string(t.block.y) + ")";
}

// The kernel ends here.
void fail(const std::string& what) {
    if (error.empty()) error = thread ? what + ", by " + where(*thread) : what;
    if (thread) leave(Fiber::DONE);
}

// ---- memory

// The last write and the last read of a byte: an interval between two barriers, and a thread. Intervals are counted
// over all blocks.
constexpr uint32_t SEVERAL = ~0u;
struct Byte {
    uint32_t written = 0, writer = 0, read = 0, reader = 0;
};
constexpr size_t PAGE = 4096;
struct Page {
    Byte at[PAGE];
};
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uint32_t interval, first_of_launch, first_of_block;

Page& page_of(uintptr_t number) {
    static uintptr_t last = 0;
    static Page* found = nullptr;
    if (pages.empty() || number != last) {
        auto& page = pages[number];
        if (!page) page = std::make_unique<Page>();
        last = number, found = page.get();
    }
    return *found;
}

alignas(256) char shared_bytes[1 << 20];
struct Array {
    Place place;
    char *begin, *end;
};
std::vector<Array> arrays;  // in shared memory, with gaps between them
size_t most_shared;  // bytes that the kernel may use

Array add_array(Place place, size_t bytes) {
    char* const begin = arrays.empty() ? shared_bytes : arrays.back().end + 256 - (arrays.back().end - shared_bytes) % 256;
    arrays.push_back({place, begin, begin + bytes});
    size_t all = 0;
    for (const Array& a : arrays) all += a.end - a.begin;
    if (all > most_shared)
        fail(std::to_string(all) + " bytes of shared memory, more than the " + std::to_string(most_shared) + " of the kernel");
    return arrays.back();
}

// Whether no barrier of this block, and no end of a launch, lies between an access and this one by another thread.
bool races(uint32_t when, uint32_t who, uint32_t me, bool shared) {
    return who != me && (when == interval || (!shared && when >= first_of_launch && when < first_of_block));
}

void see(void* pointer, size_t size, bool write, bool whole) {
    const auto at = reinterpret_cast<uintptr_t>(pointer);
    if (!thread || at - reinterpret_cast<uintptr_t>(stacks()) < MOST_THREADS * STACK) return;
    const auto failed = [&](const char* why) {
        fail((write ? "a write of " : "a read of ") + std::to_string(size) + " bytes " + why);
    };
    if (whole && at % size) failed("at an address that is no multiple of it");
    const bool shared = at - reinterpret_cast<uintptr_t>(shared_bytes) < sizeof(shared_bytes);
    if (shared) {
        const auto* p = static_cast<char*>(pointer);
        if (std::none_of(arrays.begin(), arrays.end(), [&](const Array& a) { return a.begin <= p && p + size <= a.end; }))
            failed("of shared memory outside of every array");
    } else if (at < PAGE || (__asan_region_is_poisoned && __asan_region_is_poisoned(pointer, size))) {
        failed("outside of every tensor");
    }
    const Thread& t = *thread;
    const uint32_t block = (t.block.z * t.blocks.y + t.block.y) * t.blocks.x + t.block.x;
    const uint32_t me = block * MOST_THREADS + uint32_t(running - fibers.data());
    Page* page = nullptr;
    for (uintptr_t i = at; i < at + size; ++i) {
        if (i == at || i % PAGE == 0) page = &page_of(i / PAGE);
        Byte& b = page->at[i % PAGE];
        if (shared && !write && b.written < first_of_block) failed("of shared memory that no thread has written");
        if (races(b.written, b.writer, me, shared)) failed("that another thread writes, with no barrier between");
        if (write && races(b.read, b.reader, me, shared)) failed("that another thread reads, with no barrier between");
        if (write)
            b.written = interval, b.writer = me;
        else
            b.reader = races(b.read, b.reader, me, shared) ? SEVERAL : me, b.read = interval;
    }
}

// ---- a block

// Runs the lanes of a warp, then lets them pass their operation. Whether they can go on.
bool step(unsigned first) {
    unsigned lanes[WARP];
    std::iota(lanes, lanes + WARP, first);
    std::shuffle(lanes, lanes + WARP, random_number);
    for (const unsigned i : lanes) {
        if (fibers[i].state != Fiber::READY) continue;
        running = &fibers[i], thread = &running->thread;
        go_on(&scheduler, running->top);
        thread = nullptr;
        if (!error.empty()) return false;
    }
    const Fiber* const warp = &fibers[first];
    const auto waits = [](const Fiber& f) { return f.state == Fiber::AT_WARP; };
    if (std::none_of(warp, warp + WARP, waits)) return false;
    if (!std::all_of(warp, warp + WARP, [&](const Fiber& f) { return waits(f) && f.place == warp->place; }))
        return fail("an operation of a warp to which not all lanes come"), false;
    for (unsigned i = first; i < first + WARP; ++i) words[i] = fibers[i].word, fibers[i].state = Fiber::READY;
    return true;
}

void run_block() {
    const auto n = unsigned(fibers.size());
    std::vector<unsigned> ready;
    for (;;) {
        ready.clear();
        for (unsigned w = 0; w < n; w += WARP)
            if (std::any_of(&fibers[w], &fibers[w] + WARP, [](const Fiber& f) { return f.state == Fiber::READY; }))
                ready.push_back(w);
        if (ready.empty()) {  // all are done, or at a barrier
            const Fiber& first = fibers[0];
            if (!std::all_of(fibers.begin(), fibers.end(),
                             [&](const Fiber& f) { return f.state == first.state && f.place == first.place; }))
                return fail("a barrier to which not all threads of the block come");
            if (first.state == Fiber::DONE) return;
            for (Fiber& f : fibers) f.state = Fiber::READY;
            ++interval;
            continue;
        }
        // some warps run far ahead of others
        const unsigned warp = ready[random_number() % ready.size()];
        while (step(warp) && random_number() % 8) {}
        if (!error.empty()) return;
    }
}

cudaError_t checked(const Launch& l) {
    const auto fits = [](dim3 d, uint64_t x, uint64_t yz) { return d.x && d.y && d.z && d.x <= x && d.y <= yz && d.z <= yz; };
    if (!fits(l.grid, 0x7fffffff, 65535) || !fits(l.block, MOST_THREADS, MOST_THREADS) ||
        uint64_t(l.block.x) * l.block.y * l.block.z > MOST_THREADS)
        return cudaErrorInvalidConfiguration;
    const auto asked = allowed.find(l.kernel);
    if (l.shared > (asked == allowed.end() ? WITHOUT_ASKING : asked->second)) return cudaErrorInvalidValue;
    return card.has_code ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}

}  // namespace

const Thread* thread;
int fault;

void barrier(Place place) {
    leave(Fiber::AT_BARRIER, place);
}

const uint64_t* exchange(unsigned mask, uint64_t word, Place place) {
    if (mask != ~0u) fail("an operation of a warp with a mask of some lanes");
    running->word = word;
    leave(Fiber::AT_WARP, place);
    return &words[(running - fibers.data()) / WARP * WARP];
}

void copy_later(void* to, const void* from) { running->copies.back().emplace_back(to, from); }

void commit() { running->copies.emplace_back(); }

void wait(size_t left) {
    auto& copies = running->copies;
    for (; copies.size() > left + 1; copies.erase(copies.begin()))
        for (const auto& [to, from] : copies.front()) {
            if (from) see(const_cast<void*>(from), 16, false, true);
            see(to, 16, true, true);
            from ? memcpy(to, from, 16) : memset(to, 0, 16);
        }
}

void* shared_memory(size_t bytes, Place place) {
    for (const Array& a : arrays)
        if (a.place == place) return a.begin;
    return add_array(place, bytes).begin;
}

void* dynamic_memory() { return shared_bytes; }

cudaError_t allow_shared(const void* kernel, size_t bytes) {
    if (bytes > card.shared) return remembered(cudaErrorInvalidValue);
    allowed[kernel] = bytes;
    return cudaSuccess;
}

cudaError_t has_code() { return remembered(card.has_code ? cudaSuccess : cudaErrorNoKernelImageForDevice); }

void run(const Launch& launch, const std::function<void()>& of_thread) {
    if (remembered(checked(launch)) != cudaSuccess) return;
    const unsigned n = launch.block.x * launch.block.y * launch.block.z;
    if (n % WARP) throw std::runtime_error("emulated GPU: a block of " + std::to_string(n) + " threads, no multiple of 32");
    if (pages.size() > 2000) pages.clear();
    body = &of_thread, error.clear(), first_of_launch = ++interval;
    most_shared = allowed.count(launch.kernel) ? card.shared : WITHOUT_ASKING;
    fibers.resize(n), words.resize(n);

    std::vector<uint64_t> blocks(uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), random_number);
    for (const uint64_t b : blocks) {
        const dim3 block(b % launch.grid.x, b / launch.grid.x % launch.grid.y, b / launch.grid.x / launch.grid.y);
        for (unsigned i = 0; i < n; ++i) prepare(i, launch, block);
        first_of_block = ++interval;
        arrays.clear();
        add_array(nullptr, launch.shared);
        run_block();
        if (!error.empty()) throw std::runtime_error("emulated GPU, seed " + std::to_string(seed) + ": " + error);
    }
}

}  // namespace emulation

cudaError_t cudaGetLastError() { return std::exchange(emulation::last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
    }
    return "unrecognized error code";
}

extern "C" {

#define EXPORTED __attribute__((visibility("default")))

// what tests set
EXPORTED void emulation_seed(unsigned number) { emulation::random_number.seed(emulation::seed = number); }
EXPORTED void emulation_card(size_t shared, bool has_code) {
    emulation::card = {shared, has_code};
    emulation::allowed.clear();
}
EXPORTED void emulation_fault(int number) { emulation::fault = number; }

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) { return *stream = nullptr, 0; }

// what the compiler calls
#define ACCESS(SIZE)                                                                        \
    void __tsan_read##SIZE(void* p) { emulation::see(p, SIZE, false, true); }               \
    void __tsan_write##SIZE(void* p) { emulation::see(p, SIZE, true, true); }               \
    void __tsan_unaligned_read##SIZE(void* p) { emulation::see(p, SIZE, false, false); }    \
    void __tsan_unaligned_write##SIZE(void* p) { emulation::see(p, SIZE, true, false); }
ACCESS(1) ACCESS(2) ACCESS(4) ACCESS(8) ACCESS(16)
void __tsan_read_range(void* p, size_t size) { emulation::see(p, size, false, false); }
void __tsan_write_range(void* p, size_t size) { emulation::see(p, size, true, false); }
int __tsan_atomic32_fetch_add(int* p, int by, int /*order*/) { return __atomic_fetch_add(p, by, __ATOMIC_SEQ_CST); }
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
