// Which tier runs: the best that processor and operating system support, or a lesser one by the
// environment variable DQW_CPU_ISA or torch.ops.dqw_cpu.set_instruction_set.

#include <atomic>
#include <cstdio>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "bf16.h"
#include "tensors.h"
#include "whisper.h"

namespace dqw {
namespace {

const Tier kScalar = {"scalar",          &fake_quant_scalar, &linear_scalar, &whisper_scalar,
                      &attention_scalar, &ceilings_scalar,   nullptr};

#if defined(__x86_64__)
const Tier kAvx2 = {"avx2",          &fake_quant_avx2, &linear_avx2, &whisper_avx2,
                    &attention_avx2, &ceilings_avx2,   nullptr};
const Tier kAvx512 = {"avx512",          &fake_quant_avx512, &linear_avx512, &whisper_avx512,
                      &attention_avx512, &ceilings_avx512,   nullptr};

// Those above AVX-512 are AVX-512 in all but their products of bfloat16.
CeilingKernels ceilings_with(int64_t (*bf16)(int64_t, void*), int64_t (*int8)(int64_t, void*)) {
    CeilingKernels k = ceilings_avx512;
    k.multiply_bf16 = bf16;
    k.multiply_int8 = int8;
    return k;
}
const CeilingKernels ceilings_avx512_bf16 =
    ceilings_with(multiply_bf16_avx512, ceilings_avx512.multiply_int8);
const CeilingKernels ceilings_amx = ceilings_with(multiply_bf16_amx, multiply_int8_amx);
constexpr Bf16Kernels bf16_with(void (*multiply)(const Bf16Block&), int64_t cycles, int64_t panel,
                                bool tiles) {
    return {.decode = decode_bf16,
            .convert = convert_bf16,
            .multiply = multiply,
            .pack_pairs = pack_pairs_bf16,
            .add_moment = tiles ? nullptr : add_moment_bf16,
            .add_columns = add_columns_bf16,
            .cycles = cycles,
            .panel_bytes = panel,
            .few = 16,
            .few_grouped = 64,
            .tiles = tiles};
}
constexpr Bf16Kernels bf16_avx512_bf16 = bf16_with(multiply_avx512_bf16, 2048, 1 << 19, false);
constexpr Bf16Kernels bf16_amx = bf16_with(multiply_amx, 170, 1 << 20, true);
LinearKernels linear_with(const Bf16Kernels& bf16) {
    LinearKernels k = linear_avx512;
    k.bf16 = &bf16;
    return k;
}
const LinearKernels linear_avx512_bf16 = linear_with(bf16_avx512_bf16);
const LinearKernels linear_amx = linear_with(bf16_amx);
const Tier kAvx512Bf16 = {"avx512_bf16",   &fake_quant_avx512,     &linear_avx512_bf16,
                          &whisper_avx512, &attention_avx512_bf16, &ceilings_avx512_bf16,
                          &kAvx512};
const Tier kAmx = {"amx",          &fake_quant_avx512, &linear_amx, &whisper_avx512,
                   &attention_amx, &ceilings_amx,      &kAvx512};

// __builtin_cpu_supports also asks whether the operating system saves the wide registers. clang
// before 18 does not compile it for "f16c".
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Tiles are 8 KiB of registers that Linux saves for a process only once it has asked for them; it
// refuses where a signal stack is too small to hold them.
bool has_amx() {
#if defined(__linux__)
    static const bool granted = [] {
        constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, its feature
        constexpr unsigned kBf16 = 1 << 22, kTile = 1 << 24, kInt8 = 1 << 25, kSaves = 1 << 27;
        constexpr unsigned kStates = 3 << 17;  // that the operating system knows tiles
        unsigned a, b, c, d;
        if (!has_avx512_bf16() || !__get_cpuid(1, &a, &b, &c, &d) || !(c & kSaves)) return false;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
        if ((d & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
        asm("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
        return (a & kStates) == kStates && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    }();
    return granted;
#else
    return false;
#endif
}
#endif

// What this machine runs, best first.
std::vector<const Tier*> tiers() {
    std::vector<const Tier*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (has_amx()) found.push_back(&kAmx);
    // Intel takes two cycles for vdpbf16ps: half as many products as in float32.
    const bool fast = __builtin_cpu_is("amd");
    if (has_avx512_bf16() && fast) found.push_back(&kAvx512Bf16);
    if (has_avx512()) found.push_back(&kAvx512);
    if (has_avx512_bf16() && !fast) found.push_back(&kAvx512Bf16);
    if (has_avx2()) found.push_back(&kAvx2);
#endif
    found.push_back(&kScalar);
    return found;
}

const Tier* find(const std::string& name) {
    for (const Tier* t : tiers()) {
        if (name == t->name) return t;
    }
    return nullptr;
}

const Tier* choose() {
    const char* wanted = std::getenv("DQW_CPU_ISA");
    if (wanted != nullptr && *wanted != '\0') {
        if (const Tier* t = find(wanted)) return t;
        std::fprintf(stderr,
                     "dqw: DQW_CPU_ISA=%s is not something this machine runs; using %s. "
                     "It may be scalar, avx2, avx512, avx512_bf16 or amx.\n",
                     wanted, tiers().front()->name);
    }
    return tiers().front();
}

std::atomic<const Tier*>& current() {
    static std::atomic<const Tier*> t{choose()};
    return t;
}

std::string instruction_set() { return current().load()->name; }

std::string instruction_sets() {
    std::string names;
    for (const Tier* t : tiers()) {
        if (!names.empty()) names += ' ';
        names += t->name;
    }
    return names;
}

// Returns the name it replaces.
std::string set_instruction_set(std::string name) {
    const Tier* t = find(name);
    DQW_CHECK(t != nullptr, "this machine runs ", instruction_sets(), ", not ", name);
    return current().exchange(t)->name;
}

}  // namespace

const Tier& tier() { return *current().load(std::memory_order_relaxed); }

}  // namespace dqw

STABLE_TORCH_LIBRARY(dqw_cpu, m) {
    m.def("instruction_set() -> str");
    m.def("instruction_sets() -> str");
    m.def("set_instruction_set(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dqw_cpu, CompositeExplicitAutograd, m) {
    m.impl("instruction_set", TORCH_BOX(&dqw::instruction_set));
    m.impl("instruction_sets", TORCH_BOX(&dqw::instruction_sets));
    m.impl("set_instruction_set", TORCH_BOX(&dqw::set_instruction_set));
}
