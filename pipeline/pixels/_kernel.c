/* Renderer 2 on the CPU: docs/views-v2.md, one call for all views of an image.

   kernel.py calls `render` through ctypes. The arithmetic is in _kernel_body.h, which is compiled once for each instruction set. All of
   them give the same pixels: integers are exact, and floating point is IEEE 754 without contraction (-ffp-contract=off). */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "records and vectors are those of a little-endian processor; without this library, torch renders the same pixels"
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* VERSION in kernel.py is the same number. Add 1 to both when the record, the functions that kernel.py calls, or any pixel changes: a
   library that was compiled before is then not used. */
enum { VERSION = 1 };

enum { AUTOCONTRAST, EQUALIZE, INVERT, AFFINE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR, CONTRAST, BRIGHTNESS, SHARPNESS, TURN = 15 };
enum { BILINEAR, BICUBIC };
enum { MAX_OPS = 15 };

/* The layout of pipeline/pixels/packed.py. */
struct op {
    int32_t kind, filter, number;
    float factor;
    double matrix[6];
};

struct record {
    int64_t offset;
    int32_t image_height, image_width;
    int32_t top, left, height, width; /* crop */
    int32_t resize_height, resize_width;
    int32_t window_top, window_left;
    int32_t size, flip, filter, num_ops;
    int32_t erase_top, erase_left, erase_height, erase_width;
    uint64_t noise[2];
    struct op ops[MAX_OPS];
};

static const uint8_t FILL[3] = {124, 116, 104};

typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));

#define LOAD(type, pointer) ({ type loaded_; memcpy(&loaded_, (pointer), sizeof(type)); loaded_; })
#define STORE(pointer, value) ({ __typeof__(value) stored_ = (value); memcpy((pointer), &stored_, sizeof stored_); })
#define CONVERT(value, type) __builtin_convertvector(value, type)
/* `yes` or `no` (or zero) in each lane, by a mask of all or no bits. */
#define SELECT(mask, yes, no) ({ __auto_type mask_ = (mask); __auto_type yes_ = (yes); \
    (__typeof__(yes_))(((__typeof__(mask_))yes_ & mask_) | ((__typeof__(mask_))(no) & ~mask_)); })
#define KEEP(mask, yes) ({ __auto_type mask_ = (mask); __auto_type yes_ = (yes); (__typeof__(yes_))((__typeof__(mask_))yes_ & mask_); })
#define CLAMP(at, size) ((at) < 0 ? 0 : ((at) < (size) ? (at) : (size) - 1))
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif
#define LOW_HALVES(a, b) SHUFFLE(u8x16, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define HIGH_HALVES(a, b) SHUFFLE(u8x16, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#define LOW_WORDS(a, b) SHUFFLE(u16x8, a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define EVEN_WORDS(a) SHUFFLE(u16x8, a, a, 0, 2, 4, 6, 0, 2, 4, 6)
#define EVEN_BYTES(a) SHUFFLE(u8x16, a, a, 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14)
#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* --- scratch memory: a caller gives it, so that no call takes new pages from the system ---------------------------------- */

struct scratch {
    uint8_t *at;
};

static void *take(struct scratch *scratch, int64_t bytes) {
    void *taken = scratch->at;
    scratch->at += (bytes + 127) / 64 * 64; /* at least 64 bytes more: vectors may read and write past the end */
    return taken;
}

static int64_t padded(int64_t bytes) { return (bytes + 127) / 64 * 64; }

/* Return the largest number of inputs of one output of a pass, and one or two more. */
static int32_t taps_of(int32_t from, int32_t to, int32_t filter) {
    double scale = (double)from / (double)to;
    return (int32_t)((filter == BICUBIC ? 4.0 : 2.0) * (scale > 1.0 ? scale : 1.0)) + 3;
}

static int64_t resize_bytes(const struct record *view) {
    int64_t row = view->size * 3ll, lanes = view->size + 8ll, bytes = 0, taps = 0;
    for (int pass = 0; pass < 2; pass++) {
        taps = pass ? taps_of(view->height, view->resize_height, view->filter) : taps_of(view->width, view->resize_width, view->filter);
        bytes += padded(4 * lanes) + padded(4 * lanes * taps) + 4 * padded(8 * lanes) + padded(8 * lanes * taps) + padded(48 * (view->width + taps + 8));
    }
    return bytes + padded(16 * (row + 16)) + padded((view->height + taps + 16) * padded(row));
}

static int64_t ops_bytes(const struct record *view) {
    int64_t size = view->size, row = 3 * size;
    return 8 * padded(8 * (row + 32)) + 2 * padded((size + 8) * (padded(row) + 4 * size + 64));
}

/* Return how many bytes of scratch memory `render` needs for these views. */
EXPORT int64_t scratch_bytes(const struct record *views, int32_t count) {
    int64_t most = 0;
    for (int32_t i = 0; i < count; i++) {
        int64_t one = resize_bytes(views + i), other = ops_bytes(views + i);
        most = one > most ? one : most;
        most = other > most ? other : most;
    }
    return most;
}

/* --- one body for each instruction set ------------------------------------------------------------------------------------ */

#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(name) PASTE(name, LEVEL)

#define LEVEL 0
#include "_kernel_body.h"
#undef LEVEL

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif
#define LEVEL 1
#include "_kernel_body.h"
#undef LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define LEVEL 2
#include "_kernel_body.h"
#undef LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

EXPORT int32_t kernel_version(void) { return VERSION; }

/* Return the highest level of this processor: 0 plain, 1 AVX2, 2 AVX-512. */
EXPORT int32_t best_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 ? (avx512 ? 2 : 1) : 0;
#else
    return 0;
#endif
}

/* Render views of the images in `pixels`.

   level: instruction set, at most best_level().
   pixels: decoded images, RGB.   pixels_end: one past their last byte.
   views: `count` records; the caller has checked that crops and windows are inside.
   noise: uint8 [3][65536], the levels of erasing noise.
   scratch: scratch_bytes(views, count) bytes, 64-byte aligned.
   out: for each view, where its uint8 [size][size][3] goes. */
EXPORT void render(int32_t level, const uint8_t *pixels, const uint8_t *pixels_end, const struct record *views, int32_t count,
                   const uint8_t *noise, uint8_t *scratch, uint8_t *const *out) {
    for (int32_t i = 0; i < count; i++) {
        const struct record *view = views + i;
        switch (level) {
#if defined(__x86_64__)
        case 2: render_view2(pixels, pixels_end, view, noise, scratch, out[i]); break;
        case 1: render_view1(pixels, pixels_end, view, noise, scratch, out[i]); break;
#endif
        default: render_view0(pixels, pixels_end, view, noise, scratch, out[i]);
        }
    }
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_kernel", .m_size = 0};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModuleDef_Init(&module); }
