/* The arithmetic of docs/views-v2.md, compiled once for each instruction set: NAME(f) is f with the number of the set. */

/* --- vectors: LANES integers or floats, HALF doubles; the compilers' own conversions are slow on x86 -------------------------- */

#undef LANES
#undef HALF
#undef PIXELS
#if LEVEL == 2
#define LANES 16
#elif LEVEL == 1
#define LANES 8
#else
#define LANES 4
#endif
#define HALF (LANES / 2)
#define PIXELS (LANES / 4) /* of four bytes */

typedef int32_t NAME(ints) __attribute__((vector_size(4 * LANES)));
typedef float NAME(floats) __attribute__((vector_size(4 * LANES)));
typedef double NAME(doubles) __attribute__((vector_size(4 * LANES)));
typedef int64_t NAME(longs) __attribute__((vector_size(4 * LANES)));
#if LEVEL == 0 && defined(__x86_64__)
typedef NAME(ints) NAME(few); /* HALF integers, the others mean nothing: gcc is slow with vectors of 8 bytes */
#else
typedef int32_t NAME(few) __attribute__((vector_size(2 * LANES))); /* HALF integers */
#endif

/* Return the whole part of a number of at most 31 bits: SSE2 cannot round down. */
ALWAYS_INLINE double NAME(floor)(double v) {
#if LEVEL == 0 && defined(__x86_64__)
    double whole = (double)(int32_t)v;
    return whole > v ? whole - 1.0 : whole;
#else
    return __builtin_floor(v);
#endif
}

/* Return levels times a weight: SSE2 has no product of 32 bits. */
ALWAYS_INLINE NAME(ints) NAME(times)(NAME(ints) levels, int32_t weight) {
#if LEVEL == 0 && defined(__x86_64__)
    __m128i low = _mm_madd_epi16((__m128i)levels, _mm_set1_epi32(weight & 0x7FFF));
    __m128i high = _mm_madd_epi16((__m128i)levels, _mm_set1_epi32(weight >> 15 & 0xFFFF));
    return (NAME(ints))_mm_add_epi32(low, _mm_slli_epi32(high, 15));
#else
    return levels * weight;
#endif
}

#if LEVEL == 2
ALWAYS_INLINE NAME(ints) NAME(load)(const uint8_t *from) {
    return (NAME(ints))_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
}
ALWAYS_INLINE void NAME(store)(uint8_t *to, NAME(ints) levels) {
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8((__m512i)levels));
}
ALWAYS_INLINE NAME(ints) NAME(clip)(NAME(ints) v) {
    return (NAME(ints))_mm512_min_epi32(_mm512_max_epi32((__m512i)v, _mm512_setzero_si512()), _mm512_set1_epi32(255));
}
ALWAYS_INLINE NAME(floats) NAME(to_floats)(NAME(ints) v) { return (NAME(floats))_mm512_cvtepi32_ps((__m512i)v); }
ALWAYS_INLINE NAME(ints) NAME(clip_floats)(NAME(floats) v) {
    return (NAME(ints))_mm512_cvttps_epi32(_mm512_min_ps(_mm512_max_ps((__m512)v, _mm512_setzero_ps()), _mm512_set1_ps(255)));
}
ALWAYS_INLINE NAME(few) NAME(load_few)(const uint8_t *from) {
    return (NAME(few))_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
}
ALWAYS_INLINE void NAME(store_few)(uint8_t *to, NAME(few) levels) {
    _mm_storel_epi64((__m128i *)to, _mm256_cvtepi32_epi8((__m256i)levels));
}
ALWAYS_INLINE NAME(doubles) NAME(to_doubles)(NAME(few) v) { return (NAME(doubles))_mm512_cvtepi32_pd((__m256i)v); }
ALWAYS_INLINE NAME(doubles) NAME(limited)(NAME(doubles) v, double most) {
    return (NAME(doubles))_mm512_min_pd(_mm512_max_pd((__m512d)v, _mm512_setzero_pd()), _mm512_set1_pd(most));
}
ALWAYS_INLINE NAME(few) NAME(truncated_to_few)(NAME(doubles) v) { return (NAME(few))_mm512_cvttpd_epi32((__m512d)v); }
ALWAYS_INLINE NAME(few) NAME(floors)(NAME(doubles) v) {
    return (NAME(few))_mm512_cvttpd_epi32(_mm512_roundscale_pd((__m512d)v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}
/* Return yes where 0 <= at < size, otherwise no. */
ALWAYS_INLINE NAME(few) NAME(inside)(NAME(doubles) at, double size, NAME(few) yes, NAME(few) no) {
    __mmask8 low = _mm512_cmp_pd_mask((__m512d)at, _mm512_setzero_pd(), _CMP_GE_OQ);
    __mmask8 both = _mm512_mask_cmp_pd_mask(low, (__m512d)at, _mm512_set1_pd(size), _CMP_LT_OQ);
    return (NAME(few))_mm256_mask_blend_epi32(both, (__m256i)no, (__m256i)yes);
}
#elif LEVEL == 1
ALWAYS_INLINE NAME(ints) NAME(load)(const uint8_t *from) {
    return (NAME(ints))_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
}
ALWAYS_INLINE void NAME(store)(uint8_t *to, NAME(ints) levels) {
    __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)levels), _mm256_extracti128_si256((__m256i)levels, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packus_epi16(words, words));
}
ALWAYS_INLINE NAME(ints) NAME(clip)(NAME(ints) v) {
    return (NAME(ints))_mm256_min_epi32(_mm256_max_epi32((__m256i)v, _mm256_setzero_si256()), _mm256_set1_epi32(255));
}
ALWAYS_INLINE NAME(floats) NAME(to_floats)(NAME(ints) v) { return (NAME(floats))_mm256_cvtepi32_ps((__m256i)v); }
ALWAYS_INLINE NAME(ints) NAME(clip_floats)(NAME(floats) v) {
    return (NAME(ints))_mm256_cvttps_epi32(_mm256_min_ps(_mm256_max_ps((__m256)v, _mm256_setzero_ps()), _mm256_set1_ps(255)));
}
ALWAYS_INLINE NAME(few) NAME(load_few)(const uint8_t *from) {
    return (NAME(few))_mm_cvtepu8_epi32(_mm_cvtsi32_si128(LOAD(int32_t, from)));
}
ALWAYS_INLINE void NAME(store_few)(uint8_t *to, NAME(few) levels) {
    __m128i words = _mm_packus_epi32((__m128i)levels, (__m128i)levels);
    STORE(to, _mm_cvtsi128_si32(_mm_packus_epi16(words, words)));
}
ALWAYS_INLINE NAME(doubles) NAME(to_doubles)(NAME(few) v) { return (NAME(doubles))_mm256_cvtepi32_pd((__m128i)v); }
ALWAYS_INLINE NAME(doubles) NAME(limited)(NAME(doubles) v, double most) {
    return (NAME(doubles))_mm256_min_pd(_mm256_max_pd((__m256d)v, _mm256_setzero_pd()), _mm256_set1_pd(most));
}
ALWAYS_INLINE NAME(few) NAME(truncated_to_few)(NAME(doubles) v) { return (NAME(few))_mm256_cvttpd_epi32((__m256d)v); }
ALWAYS_INLINE NAME(few) NAME(floors)(NAME(doubles) v) { return (NAME(few))_mm256_cvttpd_epi32(_mm256_floor_pd((__m256d)v)); }
ALWAYS_INLINE NAME(few) NAME(inside)(NAME(doubles) at, double size, NAME(few) yes, NAME(few) no) {
    __m256d both = _mm256_and_pd(_mm256_cmp_pd((__m256d)at, _mm256_setzero_pd(), _CMP_GE_OQ),
                                 _mm256_cmp_pd((__m256d)at, _mm256_set1_pd(size), _CMP_LT_OQ));
    __m128i mask = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(_mm256_castpd_si256(both), _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6)));
    return (NAME(few))_mm_blendv_epi8((__m128i)no, (__m128i)yes, mask);
}
#elif defined(__x86_64__)
ALWAYS_INLINE NAME(ints) NAME(widened)(int32_t bytes) {
    __m128i zero = _mm_setzero_si128();
    return (NAME(ints))_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(bytes), zero), zero);
}
ALWAYS_INLINE int32_t NAME(narrowed)(NAME(ints) levels) {
    __m128i words = _mm_packs_epi32((__m128i)levels, (__m128i)levels);
    return _mm_cvtsi128_si32(_mm_packus_epi16(words, words));
}
ALWAYS_INLINE NAME(ints) NAME(load)(const uint8_t *from) { return NAME(widened)(LOAD(int32_t, from)); }
ALWAYS_INLINE void NAME(store)(uint8_t *to, NAME(ints) levels) { STORE(to, NAME(narrowed)(levels)); }
ALWAYS_INLINE NAME(ints) NAME(clip)(NAME(ints) v) { return NAME(widened)(NAME(narrowed)(v)); }
ALWAYS_INLINE NAME(floats) NAME(to_floats)(NAME(ints) v) { return (NAME(floats))_mm_cvtepi32_ps((__m128i)v); }
ALWAYS_INLINE NAME(ints) NAME(clip_floats)(NAME(floats) v) {
    return (NAME(ints))_mm_cvttps_epi32(_mm_min_ps(_mm_max_ps((__m128)v, _mm_setzero_ps()), _mm_set1_ps(255)));
}
ALWAYS_INLINE NAME(few) NAME(load_few)(const uint8_t *from) { return NAME(widened)(LOAD(uint16_t, from)); }
ALWAYS_INLINE void NAME(store_few)(uint8_t *to, NAME(few) levels) { STORE(to, (uint16_t)NAME(narrowed)(levels)); }
ALWAYS_INLINE NAME(doubles) NAME(to_doubles)(NAME(few) v) { return (NAME(doubles))_mm_cvtepi32_pd((__m128i)v); }
ALWAYS_INLINE NAME(doubles) NAME(limited)(NAME(doubles) v, double most) {
    return (NAME(doubles))_mm_min_pd(_mm_max_pd((__m128d)v, _mm_setzero_pd()), _mm_set1_pd(most));
}
ALWAYS_INLINE NAME(few) NAME(truncated_to_few)(NAME(doubles) v) { return (NAME(few))_mm_cvttpd_epi32((__m128d)v); }
ALWAYS_INLINE NAME(few) NAME(floors)(NAME(doubles) v) {
    __m128i whole = _mm_cvttpd_epi32((__m128d)v);
    __m128d above = _mm_cmpgt_pd(_mm_cvtepi32_pd(whole), (__m128d)v);
    return (NAME(few))_mm_add_epi32(whole, _mm_shuffle_epi32(_mm_castpd_si128(above), 0x88));
}
ALWAYS_INLINE NAME(few) NAME(inside)(NAME(doubles) at, double size, NAME(few) yes, NAME(few) no) {
    __m128d both = _mm_and_pd(_mm_cmpge_pd((__m128d)at, _mm_setzero_pd()), _mm_cmplt_pd((__m128d)at, _mm_set1_pd(size)));
    __m128i mask = _mm_shuffle_epi32(_mm_castpd_si128(both), 0x88);
    return (NAME(few))_mm_or_si128(_mm_and_si128(mask, (__m128i)yes), _mm_andnot_si128(mask, (__m128i)no));
}
#else
ALWAYS_INLINE NAME(ints) NAME(load)(const uint8_t *from) {
    u8x16 zero = {0}, words = LOW_HALVES((u8x16)((u32x4){0} + LOAD(uint32_t, from)), zero);
    return (NAME(ints))LOW_WORDS((u16x8)words, (u16x8)zero);
}
ALWAYS_INLINE void NAME(store)(uint8_t *to, NAME(ints) levels) { STORE(to, ((u32x4)EVEN_BYTES((u8x16)EVEN_WORDS((u16x8)levels)))[0]); }
ALWAYS_INLINE NAME(ints) NAME(clip)(NAME(ints) v) {
    v = KEEP(v > 0, v);
    return SELECT(v > 255, (NAME(ints)){0} + 255, v);
}
ALWAYS_INLINE NAME(floats) NAME(to_floats)(NAME(ints) v) { return CONVERT(v, NAME(floats)); }
ALWAYS_INLINE NAME(ints) NAME(clip_floats)(NAME(floats) v) {
    v = KEEP(v > 0.0f, v);
    return CONVERT(SELECT(v < 255.0f, v, (NAME(floats)){0} + 255.0f), NAME(ints));
}
ALWAYS_INLINE NAME(few) NAME(load_few)(const uint8_t *from) { return (NAME(few)){from[0], from[1]}; }
ALWAYS_INLINE void NAME(store_few)(uint8_t *to, NAME(few) levels) { to[0] = (uint8_t)levels[0], to[1] = (uint8_t)levels[1]; }
ALWAYS_INLINE NAME(doubles) NAME(to_doubles)(NAME(few) v) { return CONVERT(CONVERT(v, NAME(longs)), NAME(doubles)); }
ALWAYS_INLINE NAME(doubles) NAME(limited)(NAME(doubles) v, double most) {
    v = KEEP(v > 0.0, v);
    return SELECT(v < most, v, (NAME(doubles)){0} + most);
}
ALWAYS_INLINE NAME(few) NAME(truncated_to_few)(NAME(doubles) v) { return CONVERT(CONVERT(v, NAME(longs)), NAME(few)); }
ALWAYS_INLINE NAME(few) NAME(floors)(NAME(doubles) v) {
    NAME(longs) whole = CONVERT(v, NAME(longs));
    return CONVERT(whole + (CONVERT(whole, NAME(doubles)) > v), NAME(few));
}
ALWAYS_INLINE NAME(few) NAME(inside)(NAME(doubles) at, double size, NAME(few) yes, NAME(few) no) {
    return SELECT(CONVERT((at >= 0.0) & (at < size), NAME(few)), yes, no);
}
#endif

ALWAYS_INLINE NAME(few) NAME(clip_doubles)(NAME(doubles) v) { return NAME(truncated_to_few)(NAME(limited)(v, 255)); }

ALWAYS_INLINE NAME(ints) NAME(load_part)(const uint8_t *from, int64_t left) {
    uint8_t part[LANES] = {0};
    if (left >= LANES) return NAME(load)(from);
    memcpy(part, from, (size_t)left);
    return NAME(load)(part);
}

ALWAYS_INLINE void NAME(store_part)(uint8_t *to, NAME(ints) levels, int64_t left) {
    uint8_t part[LANES];
    if (left >= LANES) {
        NAME(store)(to, levels);
    } else {
        NAME(store)(part, levels);
        memcpy(to, part, (size_t)left);
    }
}

/* --- resize ------------------------------------------------------------------------------------------------------------------ */

struct NAME(weights) {
    int32_t *first; /* [n]: first input of each output */
    int32_t *value; /* [n][stride]: weights times 2**22, 0 after the last input */
    int32_t stride, taps;
};

/* Return the weights of the outputs start..start+n-1 of a pass from `from` to `to` values; `mirrored`: in reverse order. */
static struct NAME(weights) NAME(weights_of)(struct scratch *scratch, int32_t from, int32_t to, int32_t start, int32_t n,
                                             int32_t filter, int mirrored) {
    int32_t stride = taps_of(from, to, filter);
    struct NAME(weights) weights = {take(scratch, 4ll * n), take(scratch, 4ll * n * stride), stride, 0};
    double *centre = take(scratch, 8ll * n), *first = take(scratch, 8ll * n), *last = take(scratch, 8ll * n);
    double *sum = take(scratch, 8ll * n), *kernel = take(scratch, 8ll * n * stride);
    double scale = (double)from / (double)to, stretch = scale > 1.0 ? scale : 1.0;
    double support = (filter == BICUBIC ? 2.0 : 1.0) * stretch, inverse = 1.0 / stretch;
    for (int32_t i = 0; i < n; i++) {
        double middle = ((double)(start + (mirrored ? n - 1 - i : i)) + 0.5) * scale;
        int32_t low = (int32_t)(middle - support + 0.5), high = (int32_t)(middle + support + 0.5);
        low = low < 0 ? 0 : low;
        high = high > from ? from : high;
        weights.taps = high - low > weights.taps ? high - low : weights.taps;
        weights.first[i] = low;
        centre[i] = middle, first[i] = low, last[i] = high, sum[i] = 0.0;
    }
    for (int32_t tap = 0; tap < weights.taps; tap++) {
        double *w = kernel + (int64_t)tap * n;
        for (int32_t i = 0; i < n; i++) {
            double at = first[i] + tap, x = (at - centre[i] + 0.5) * inverse;
            x = x < 0.0 ? -x : x;
            double near = ((1.5 * x - 2.5) * x) * x + 1.0, far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5;
            double cubic = x < 1.0 ? near : (x < 2.0 ? far : 0.0), linear = x < 1.0 ? 1.0 - x : 0.0;
            w[i] = at < last[i] ? (filter == BICUBIC ? cubic : linear) : 0.0;
            sum[i] += w[i];
        }
    }
    for (int32_t tap = 0; tap < weights.taps; tap++) {
        double *w = kernel + (int64_t)tap * n;
        for (int32_t i = 0; i < n; i++) {
            double share = w[i] / (sum[i] == 0.0 ? 1.0 : sum[i]) * 4194304.0;
            weights.value[(int64_t)i * stride + tap] = (int32_t)(share + (share < 0.0 ? -0.5 : 0.5));
        }
    }
    return weights;
}

ALWAYS_INLINE void NAME(transpose_16x16)(u8x16 *rows) {
    for (int stage = 0; stage < 4; stage++) {
        u8x16 next[16];
        for (int i = 0; i < 8; i++) {
            next[2 * i] = LOW_HALVES(rows[i], rows[i + 8]);
            next[2 * i + 1] = HIGH_HALVES(rows[i], rows[i + 8]);
        }
        memcpy(rows, next, sizeof next);
    }
}

/* Write 16 rows as columns: columns[i] has byte i of each row. */
static void NAME(rows_to_columns)(const uint8_t *const *rows, int64_t bytes, const uint8_t *end, u8x16 *columns) {
    for (int64_t at = 0; at < bytes; at += 16) {
        u8x16 block[16];
        for (int row = 0; row < 16; row++) {
            const uint8_t *from = rows[row] + at;
            if (from + 16 <= end) {
                block[row] = LOAD(u8x16, from);
            } else {
                block[row] = (u8x16){0};
                memcpy(block + row, from, (size_t)(end - from));
            }
        }
        NAME(transpose_16x16)(block);
        memcpy(columns + at, block, sizeof block);
    }
}

static void NAME(columns_to_rows)(const u8x16 *columns, int64_t bytes, uint8_t *rows, int64_t stride) {
    for (int64_t at = 0; at < bytes; at += 16) {
        u8x16 block[16];
        memcpy(block, columns + at, sizeof block);
        NAME(transpose_16x16)(block);
        for (int row = 0; row < 16; row++) STORE(rows + row * stride + at, block[row]);
    }
}

/* The first pass of 16 rows, which are the lanes of vectors. */
static void NAME(resize_columns)(const u8x16 *columns, const struct NAME(weights) *weights, int32_t n, u8x16 *out) {
    enum { PARTS = 16 / LANES };
    for (int32_t i = 0; i < n; i++, out += 3) {
        const uint8_t *in = (const uint8_t *)(columns + 3ll * weights->first[i]);
        const int32_t *w = weights->value + (int64_t)i * weights->stride;
        NAME(ints) sums[3 * PARTS];
        for (int part = 0; part < 3 * PARTS; part++) sums[part] = (NAME(ints)){0} + (1 << 21);
        for (int32_t tap = 0; tap < weights->taps; tap++, in += 48)
            for (int part = 0; part < 3 * PARTS; part++) sums[part] += NAME(times)(NAME(load)(in + LANES * part), w[tap]);
        for (int part = 0; part < 3 * PARTS; part++) NAME(store)((uint8_t *)out + LANES * part, NAME(clip)(sums[part] >> 22));
    }
}

/* The second pass: an output row is a weighted sum of rows. */
static void NAME(resize_rows)(const uint8_t *rows, int64_t stride, const struct NAME(weights) *weights, int32_t n,
                              int64_t bytes, uint8_t *out) {
    enum { PARTS = 4, CHUNK = PARTS * LANES };
    for (int32_t i = 0; i < n; i++, out += bytes) {
        const uint8_t *in = rows + (weights->first[i] - weights->first[0]) * stride;
        const int32_t *w = weights->value + (int64_t)i * weights->stride;
        for (int64_t at = 0; at < bytes; at += CHUNK) {
            NAME(ints) sums[PARTS];
            uint8_t levels[CHUNK], *to = bytes - at < CHUNK ? levels : out + at;
            const uint8_t *from = in + at;
            for (int part = 0; part < PARTS; part++) sums[part] = (NAME(ints)){0} + (1 << 21);
            for (int32_t tap = 0; tap < weights->taps; tap++, from += stride)
                for (int part = 0; part < PARTS; part++) sums[part] += NAME(times)(NAME(load)(from + LANES * part), w[tap]);
            for (int part = 0; part < PARTS; part++) NAME(store)(to + LANES * part, NAME(clip)(sums[part] >> 22));
            if (to == levels) memcpy(out + at, levels, (size_t)(bytes - at));
        }
    }
}

static void NAME(resize)(const uint8_t *pixels, const uint8_t *end, const struct record *view, uint8_t *memory, uint8_t *out) {
    struct scratch scratch = {memory};
    int32_t size = view->size;
    struct NAME(weights) across = NAME(weights_of)(&scratch, view->width, view->resize_width, view->window_left, size,
                                                   view->filter, view->flip);
    struct NAME(weights) down = NAME(weights_of)(&scratch, view->height, view->resize_height, view->window_top, size,
                                                 view->filter, 0);
    int32_t first = down.first[0], last = down.first[size - 1] + down.taps;
    last = last < view->height ? last : view->height;
    int64_t bytes = size * 3ll, stride = padded(bytes), wide = view->image_width * 3ll;
    /* Weights are 0 after the last input, but what they are multiplied with is read: there must be memory. */
    u8x16 *columns = take(&scratch, 16 * 3 * ((int64_t)view->width + across.taps + 8));
    u8x16 *resized = take(&scratch, 16 * (bytes + 16));
    uint8_t *rows = take(&scratch, (last - first + down.taps + 16ll) * stride);
    const uint8_t *corner = pixels + view->offset + view->top * wide + view->left * 3ll;
    for (int32_t top = first; top < last; top += 16) {
        const uint8_t *lines[16];
        for (int i = 0; i < 16; i++) lines[i] = corner + (top + i < last ? top + i : last - 1) * wide;
        NAME(rows_to_columns)(lines, view->width * 3ll, end, columns);
        NAME(resize_columns)(columns, &across, size, resized);
        NAME(columns_to_rows)(resized, bytes, rows + (top - first) * stride, stride);
    }
    NAME(resize_rows)(rows, stride, &down, size, bytes, out);
}

/* --- operations on levels: all of them in place ------------------------------------------------------------------------------ */

static void NAME(look_up)(uint8_t *image, int64_t count, uint8_t tables[3][256]) {
    for (int64_t i = 0; i < count; i++, image += 3)
        for (int channel = 0; channel < 3; channel++) image[channel] = tables[channel][image[channel]];
}

static void NAME(autocontrast)(uint8_t *image, int32_t size, struct scratch scratch) {
    int64_t bytes = size * 3ll;
    uint8_t *low = take(&scratch, bytes), *high = take(&scratch, bytes), tables[3][256];
    memcpy(low, image, bytes);
    memcpy(high, image, bytes);
    for (int32_t y = 1; y < size; y++) {
        const uint8_t *row = image + y * bytes;
        for (int64_t i = 0; i < bytes; i++) {
            low[i] = row[i] < low[i] ? row[i] : low[i];
            high[i] = row[i] > high[i] ? row[i] : high[i];
        }
    }
    for (int channel = 0; channel < 3; channel++) {
        int lowest = 255, highest = 0;
        for (int64_t i = channel; i < bytes; i += 3) {
            lowest = low[i] < lowest ? low[i] : lowest;
            highest = high[i] > highest ? high[i] : highest;
        }
        double scale = 255.0 / (highest > lowest ? highest - lowest : 1), offset = -lowest * scale;
        for (int level = 0; level < 256; level++) {
            double stretched = level * scale + offset;
            stretched = stretched < 0.0 ? 0.0 : (stretched > 255.0 ? 255.0 : stretched);
            tables[channel][level] = highest > lowest ? (uint8_t)stretched : (uint8_t)level;
        }
    }
    NAME(look_up)(image, (int64_t)size * size, tables);
}

static void NAME(equalize)(uint8_t *image, int32_t size) {
    uint32_t histogram[2][3][256] = {{{0}}}; /* two: the same level twice in a row would wait for itself */
    uint8_t tables[3][256];
    int64_t count = (int64_t)size * size;
    for (int64_t i = 0; i < count; i++)
        for (int channel = 0; channel < 3; channel++) histogram[i % 2][channel][image[3 * i + channel]]++;
    for (int channel = 0; channel < 3; channel++) {
        int64_t last = 0, below, step;
        for (int level = 0; level < 256; level++) {
            histogram[0][channel][level] += histogram[1][channel][level];
            last = histogram[0][channel][level] ? histogram[0][channel][level] : last;
        }
        step = (count - last) / 255; /* 0, too, if there is only one level */
        below = step / 2;
        for (int level = 0; level < 256; level++) {
            int64_t value = step ? below / step : level;
            tables[channel][level] = value < 255 ? (uint8_t)value : 255;
            below += histogram[0][channel][level];
        }
    }
    NAME(look_up)(image, count, tables);
}

static void NAME(posterize)(uint8_t *image, int64_t bytes, uint8_t mask) {
    for (int64_t i = 0; i < bytes; i++) image[i] &= mask;
}

static void NAME(solarize)(uint8_t *image, int64_t bytes, int32_t threshold) { /* 0: invert */
    if (threshold > 255) return;
    uint8_t limit = (uint8_t)threshold;
    for (int64_t i = 0; i < bytes; i++) image[i] = image[i] < limit ? image[i] : (uint8_t)~image[i];
}

static void NAME(solarize_add)(uint8_t *image, int64_t bytes, int32_t added) { /* at most 128: no level passes 255 */
    uint8_t plus = (uint8_t)added;
    for (int64_t i = 0; i < bytes; i++) image[i] = image[i] < 128 ? (uint8_t)(image[i] + plus) : image[i];
}

ALWAYS_INLINE NAME(ints) NAME(blend)(NAME(ints) base, NAME(ints) level, float factor) {
    return NAME(clip_floats)(NAME(to_floats)(base) + factor * NAME(to_floats)(level - base));
}

static void NAME(blend_with)(uint8_t *image, int64_t bytes, int32_t base, float factor) {
    for (int64_t i = 0; i < bytes; i += LANES) {
        NAME(ints) level = NAME(load_part)(image + i, bytes - i);
        NAME(store_part)(image + i, NAME(blend)((NAME(ints)){0} + base, level, factor), bytes - i);
    }
}

/* Write the luma of the pixel that begins at each byte of a row: what begins inside of a pixel means nothing. */
static void NAME(luma)(const uint8_t *row, int64_t bytes, uint8_t *line, uint8_t *out) {
    memcpy(line, row, bytes);
    for (int64_t i = 0; i < bytes; i += LANES) {
        NAME(ints) red = NAME(load)(line + i), green = NAME(load)(line + i + 1), blue = NAME(load)(line + i + 2);
        NAME(store)(out + i, (NAME(times)(red, 19595) + NAME(times)(green, 38470) + NAME(times)(blue, 7471) + 32768) >> 16);
    }
}

static void NAME(contrast)(uint8_t *image, int32_t size, float factor, struct scratch scratch) {
    int64_t bytes = size * 3ll, count = (int64_t)size * size, sum = 0;
    uint8_t *line = take(&scratch, bytes), *luma = take(&scratch, bytes);
    for (int32_t y = 0; y < size; y++) {
        NAME(luma)(image + y * bytes, bytes, line, luma);
        for (int64_t i = 0; i < bytes; i += 3) sum += luma[i];
    }
    NAME(blend_with)(image, count * 3, (int32_t)((2 * sum + count) / (2 * count)), factor);
}

/* Write what is at the first byte of each pixel to all of its bytes; `from` has 16 more bytes on each side. */
static void NAME(spread)(const uint8_t *from, int64_t bytes, uint8_t *to) {
    for (int64_t i = 0; i < bytes; i += 48) {
        STORE(to + i, SHUFFLE(u8x16, LOAD(u8x16, from + i), (u8x16){0}, 0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9, 12, 12, 12, 15));
        STORE(to + i + 16, SHUFFLE(u8x16, LOAD(u8x16, from + i + 15), (u8x16){0}, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9, 12, 12, 12, 15, 15));
        STORE(to + i + 32, SHUFFLE(u8x16, LOAD(u8x16, from + i + 30), (u8x16){0}, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9, 12, 12, 12, 15, 15, 15));
    }
}

static void NAME(color)(uint8_t *image, int32_t size, float factor, struct scratch scratch) {
    int64_t bytes = size * 3ll;
    uint8_t *line = take(&scratch, bytes), *luma = take(&scratch, bytes), *base = take(&scratch, bytes);
    for (int32_t y = 0; y < size; y++) {
        uint8_t *row = image + y * bytes;
        NAME(luma)(row, bytes, line, luma);
        NAME(spread)(luma, bytes, base);
        for (int64_t i = 0; i < bytes; i += LANES)
            NAME(store_part)(row + i, NAME(blend)(NAME(load)(base + i), NAME(load)(line + i), factor), bytes - i);
    }
}

static void NAME(sharpness)(uint8_t *image, int32_t size, float factor, struct scratch scratch) {
    int64_t bytes = size * 3ll;
    uint8_t *above = take(&scratch, bytes), *here = take(&scratch, bytes), *smooth = take(&scratch, bytes);
    uint16_t *columns = take(&scratch, 2 * bytes);
    memcpy(here, image, bytes);
    for (int32_t y = 1; y < size - 1; y++) {
        uint8_t *row = image + y * bytes, *below = row + bytes, *swapped = above;
        above = here, here = swapped;
        memcpy(here, row, bytes);
        for (int64_t i = 0; i < bytes; i++) columns[i] = (uint16_t)(above[i] + here[i] + below[i]);
        for (int64_t i = 3; i < bytes - 3; i++) {
            uint16_t twice = (uint16_t)(2 * (columns[i - 3] + columns[i] + columns[i + 3] + 4 * here[i]) + 13);
            smooth[i] = (uint8_t)((uint16_t)((uint32_t)twice * 20165 >> 16) >> 3); /* twice / 26, for every sum of levels */
        }
        for (int64_t i = 3; i < bytes - 3; i += LANES)
            NAME(store_part)(row + i, NAME(blend)(NAME(load)(smooth + i), NAME(load)(here + i), factor), bytes - 3 - i);
    }
}

/* --- warps -------------------------------------------------------------------------------------------------------------------- */

ALWAYS_INLINE double NAME(level_between)(const int32_t *taps, double share, int filter) {
    int32_t g = taps[0], h = taps[1], i = taps[2], j = taps[3];
    if (filter == BILINEAR) return h + (i - h) * share;
    return h + share * ((double)(i - g) + share * ((double)(2 * (g - h) + i - j) + share * (double)(h - g - i + j)));
}

ALWAYS_INLINE uint8_t NAME(truncated)(double level) { return level <= 0.0 ? 0 : (level >= 255.0 ? 255 : (uint8_t)level); }

ALWAYS_INLINE NAME(few) NAME(levels_between)(const uint8_t *in, int64_t step, NAME(doubles) share, int filter) {
    NAME(few) h = NAME(load_few)(in + step), i = NAME(load_few)(in + 2 * step);
    if (filter == BILINEAR) return NAME(clip_doubles)(NAME(to_doubles)(h) + NAME(to_doubles)(i - h) * share);
    NAME(few) g = NAME(load_few)(in), j = NAME(load_few)(in + 3 * step);
    NAME(doubles) p2 = NAME(to_doubles)(i - g), p3 = NAME(to_doubles)(2 * (g - h) + i - j), p4 = NAME(to_doubles)(h - g - i + j);
    return NAME(clip_doubles)(NAME(to_doubles)(h) + share * (p2 + share * (p3 + share * p4)));
}

/* Return the whole part of a shift, limited to where all of the image is outside. *exact: every position with this shift has this whole
   part, and rounding cannot make it another one. */
static int32_t NAME(whole_shift)(double shift, int32_t size, int is_constant, int *exact) {
    double limit = size + 4.0, held = shift < -limit ? -limit : (shift > limit ? limit : shift);
    double whole = NAME(floor)(held), part = held - whole;
    *exact = shift != held || (part > 1e-9 && part < 1 - 1e-9) || (is_constant && part == 0);
    return (int32_t)whole;
}

/* Numbers of a row of bytes: for each byte its column and its filling. */
struct NAME(row) {
    double *x;
    uint8_t *fill;
};

static struct NAME(row) NAME(row_of)(int32_t size, struct scratch *scratch) {
    struct NAME(row) row = {take(scratch, 8 * (size * 3ll + 8)), take(scratch, size * 3ll + 8)};
    for (int32_t x = 0; x < size; x++)
        for (int channel = 0; channel < 3; channel++) {
            row.x[3 * x + channel] = x;
            row.fill[3 * x + channel] = FILL[channel];
        }
    return row;
}

ALWAYS_INLINE void NAME(store_few_of)(uint8_t *to, NAME(few) levels, int64_t left) {
    uint8_t part[HALF];
    if (left >= HALF) {
        NAME(store_few)(to, levels);
    } else {
        NAME(store_few)(part, levels);
        memcpy(to, part, (size_t)left);
    }
}

/* (1, b, c, 0, 1, 0): pixels move within their row. */
ALWAYS_INLINE void NAME(slide_rows)(uint8_t *image, int32_t size, const double *m, struct scratch scratch, int filter) {
    int64_t bytes = size * 3ll;
    struct NAME(row) row = NAME(row_of)(size, &scratch);
    uint8_t *memory = take(&scratch, 3 * (3ll * size + 32)), *line = memory + 3 * (size + 8ll);
    for (int32_t y = 0; y < size; y++) {
        uint8_t *out = image + y * bytes;
        double rising = m[1] * (y + 0.5);
        int exact;
        int32_t whole = NAME(whole_shift)(rising + m[2], size, m[1] == 0, &exact);
        memcpy(line, out, bytes);
        for (int32_t x = whole - 2; x < 0; x++) memcpy(line + 3 * x, out, 3);
        for (int32_t x = size; x < size + whole + 4; x++) memcpy(line + 3 * x, line + bytes - 3, 3);
        if (exact) {
            for (int64_t i = 0; i < bytes; i += HALF) {
                NAME(doubles) x = LOAD(NAME(doubles), row.x + i), u = ((x + 0.5) + rising) + m[2];
                NAME(few) levels = NAME(levels_between)(line + i + 3 * (whole - 1), 3, (u - 0.5) - (x + (double)whole), filter);
                NAME(store_few_of)(out + i, NAME(inside)(u, size, levels, NAME(load_few)(row.fill + i)), bytes - i);
            }
            continue;
        }
        for (int32_t x = 0; x < size; x++) {
            double u = ((x + 0.5) + rising) + m[2], left = NAME(floor)(u - 0.5);
            int32_t taps[4], at = (int32_t)left;
            for (int channel = 0; channel < 3; channel++) {
                if (u < 0.0 || u >= size) {
                    out[3 * x + channel] = FILL[channel];
                    continue;
                }
                for (int tap = 0; tap < 4; tap++) taps[tap] = line[3 * CLAMP(at - 1 + tap, size) + channel];
                out[3 * x + channel] = NAME(truncated)(NAME(level_between)(taps, (u - 0.5) - left, filter));
            }
        }
    }
}

/* (1, 0, 0, d, 1, f): pixels move within their column. */
ALWAYS_INLINE void NAME(slide_columns)(uint8_t *image, int32_t size, const double *m, struct scratch scratch, int filter) {
    int64_t bytes = size * 3ll, stride = padded(bytes);
    struct NAME(row) row = NAME(row_of)(size, &scratch);
    double *rising = take(&scratch, 8 * (bytes + 8)), *whole = take(&scratch, 8 * (bytes + 8));
    int32_t *shift = take(&scratch, 4ll * size), *inexact = take(&scratch, 4ll * size), num_inexact = 0;
    uint8_t *before = take(&scratch, size * bytes), *moved = (uint8_t *)take(&scratch, (size + 3) * stride) + stride;
    memcpy(before, image, size * bytes);
    for (int32_t x = 0; x < size; x++) {
        int exact;
        double up = m[3] * (x + 0.5);
        shift[x] = NAME(whole_shift)(up + m[5], size, m[3] == 0, &exact);
        if (!exact) inexact[num_inexact++] = x;
        for (int channel = 0; channel < 3; channel++) rising[3 * x + channel] = up, whole[3 * x + channel] = shift[x];
    }
    for (int32_t y = -1; y < size + 2; y++) /* each column moved by its whole shift */
        for (int32_t x = 0; x < size;) {
            int32_t end = x + 1;
            while (end < size && shift[end] == shift[x]) end++;
            memcpy(moved + y * stride + 3 * x, before + CLAMP(y + shift[x], size) * bytes + 3 * x, 3 * (size_t)(end - x));
            x = end;
        }
    for (int32_t y = 0; y < size; y++) {
        uint8_t *out = image + y * bytes;
        for (int64_t i = 0; i < bytes; i += HALF) {
            NAME(doubles) v = (LOAD(NAME(doubles), rising + i) + (y + 0.5)) + m[5];
            NAME(doubles) share = (v - 0.5) - (LOAD(NAME(doubles), whole + i) + (double)y);
            NAME(few) levels = NAME(levels_between)(moved + (y - 1) * stride + i, stride, share, filter);
            NAME(store_few_of)(out + i, NAME(inside)(v, size, levels, NAME(load_few)(row.fill + i)), bytes - i);
        }
    }
    for (int32_t n = 0; n < num_inexact; n++)
        for (int32_t y = 0; y < size; y++) {
            int32_t x = inexact[n], taps[4];
            double v = (rising[3 * x] + (y + 0.5)) + m[5], top = NAME(floor)(v - 0.5);
            for (int channel = 0; channel < 3; channel++) {
                uint8_t *out = image + y * bytes + 3 * x + channel;
                if (v < 0.0 || v >= size) {
                    *out = FILL[channel];
                    continue;
                }
                for (int tap = 0; tap < 4; tap++) taps[tap] = before[CLAMP((int32_t)top - 1 + tap, size) * bytes + 3 * x + channel];
                *out = NAME(truncated)(NAME(level_between)(taps, (v - 0.5) - top, filter));
            }
        }
}

/* A row of a warp: for each output column whether its position is inside of the image, its place in the copy, and where between the pixels
   it is. Outside it is that of a position at the edge. */
struct NAME(places) {
    double *x; /* column + 0.5 */
    int32_t *inside, *offset;
    double *across, *down;
    float *weights_across, *weights_down; /* [4][columns] */
};

/* `columns`: the number of columns, up to a multiple of HALF. */
static void NAME(place_row)(const struct NAME(places) *places, int32_t y, int32_t columns, int32_t size, int64_t stride, const double *m) {
    double rising_u = m[1] * (y + 0.5), rising_v = m[4] * (y + 0.5);
    NAME(few) no = {0}, yes = no + 1;
    for (int32_t i = 0; i < columns; i += HALF) {
        NAME(doubles) x = LOAD(NAME(doubles), places->x + i), u = (m[0] * x + rising_u) + m[2], v = (m[3] * x + rising_v) + m[5];
        NAME(few) inside = NAME(inside)(u, size, yes, no) & NAME(inside)(v, size, yes, no);
        u = NAME(limited)(u, size) - 0.5, v = NAME(limited)(v, size) - 0.5;
        NAME(few) left = NAME(floors)(u), top = NAME(floors)(v), offset = (top + 1) * (int32_t)stride + (left + 1) * 4;
        STORE(places->across + i, u - NAME(to_doubles)(left));
        STORE(places->down + i, v - NAME(to_doubles)(top));
        memcpy(places->inside + i, &inside, 4 * HALF);
        memcpy(places->offset + i, &offset, 4 * HALF);
    }
}

ALWAYS_INLINE void NAME(warp_exactly)(const uint8_t *in, int64_t stride, double across, double down, int filter, uint8_t *out) {
    for (int channel = 0; channel < 3; channel++) {
        double rows[4];
        for (int row = 0; row < 4; row++) {
            const uint8_t *at = in + row * stride + channel;
            rows[row] = NAME(level_between)((int32_t[]){at[0], at[4], at[8], at[12]}, across, filter);
        }
        double g = rows[0], h = rows[1], i = rows[2], j = rows[3];
        double cubic = h + down * ((-g + i) + down * (((2 * (g - h)) + i - j) + down * ((-g + h) - i + j)));
        out[channel] = NAME(truncated)(filter == BILINEAR ? h + (i - h) * down : cubic);
    }
}

/* The weights of the four taps: what K multiplies g, h, i and j with. */
static void NAME(warp_weights)(const double *restrict share, int32_t columns, int filter, float *restrict weights) {
    for (int32_t x = 0; x < columns; x++) {
        double t = share[x], t2 = t * t, t3 = t2 * t;
        weights[x] = (float)(filter == BILINEAR ? 0.0 : 2 * t2 - t - t3);
        weights[columns + x] = (float)(filter == BILINEAR ? 1 - t : 1 - 2 * t2 + t3);
        weights[2 * columns + x] = (float)(filter == BILINEAR ? t : t + t2 - t3);
        weights[3 * columns + x] = (float)(filter == BILINEAR ? 0.0 : t3 - t2);
    }
}

/* Write PIXELS pixels by sums in binary32, and return a mask of the channels that are so near to a whole level, 1..255, that an error could
   matter: pixel n has the bits 4 * n to 4 * n + 2. (About 0 and above 255 it cannot: these become 0 and 255.) The error is below 3.5e-4: 255 * 2.25 is the largest sum of absolute products, and each of ten
   roundings (of weights, products and sums) adds 2**-24 of it. At most 16 bytes are written. */
ALWAYS_INLINE unsigned NAME(warp_nearly)(const uint8_t *copy, int64_t stride, const struct NAME(places) *places, int32_t x, int32_t columns,
                                         int filter, uint8_t *out) {
    const float *across = places->weights_across + x, *down = places->weights_down + x;
    const int32_t *offset = places->offset + x;
    int first = filter == BILINEAR ? 1 : 0, end = filter == BILINEAR ? 3 : 4; /* rows whose weight is not 0 */
#if LEVEL == 2
    __m512 sums[PIXELS];
    __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
    __m512 weights = _mm512_castps128_ps512(_mm_loadu_ps(across));
    weights = _mm512_insertf32x4(weights, _mm_loadu_ps(across + columns), 1);
    weights = _mm512_insertf32x4(weights, _mm_loadu_ps(across + 2 * columns), 2);
    weights = _mm512_insertf32x4(weights, _mm_loadu_ps(across + 3 * columns), 3);
    for (int pixel = 0; pixel < PIXELS; pixel++) {
        const uint8_t *in = copy + offset[pixel];
        __m512 sum = _mm512_setzero_ps();
        for (int row = first; row < end; row++) {
            __m512i levels = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(in + row * stride)));
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(levels), _mm512_set1_ps(down[row * columns + pixel]), sum);
        }
        sums[pixel] = _mm512_mul_ps(sum, _mm512_permutexvar_ps(_mm512_add_epi32(spread, _mm512_set1_epi32(pixel)), weights));
    }
    __m512 one = _mm512_add_ps(_mm512_shuffle_f32x4(sums[0], sums[1], 0x44), _mm512_shuffle_f32x4(sums[0], sums[1], 0xEE));
    __m512 other = _mm512_add_ps(_mm512_shuffle_f32x4(sums[2], sums[3], 0x44), _mm512_shuffle_f32x4(sums[2], sums[3], 0xEE));
    __m512 level = _mm512_add_ps(_mm512_shuffle_f32x4(one, other, 0x88), _mm512_shuffle_f32x4(one, other, 0xDD));
    __m512 distance = _mm512_abs_ps(_mm512_sub_ps(level, _mm512_roundscale_ps(level, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)));
    __m128i bytes = _mm512_cvtepi32_epi8((__m512i)NAME(clip_floats)((NAME(floats))level));
    bytes = _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    _mm_storeu_si128((__m128i *)out, bytes);
    __mmask16 close = _mm512_mask_cmp_ps_mask(0x7777, distance, _mm512_set1_ps(1 / 2048.0f), _CMP_LT_OQ);
    close = _mm512_mask_cmp_ps_mask(close, level, _mm512_set1_ps(0.5f), _CMP_GT_OQ);
    return _mm512_mask_cmp_ps_mask(close, level, _mm512_set1_ps(255.5f), _CMP_LT_OQ);
#elif LEVEL == 1
    __m256 sums[PIXELS];
    __m256i spread = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4);
    __m256 near = _mm256_castps128_ps256(_mm_loadu_ps(across)), far = _mm256_castps128_ps256(_mm_loadu_ps(across + 2 * columns));
    near = _mm256_insertf128_ps(near, _mm_loadu_ps(across + columns), 1);
    far = _mm256_insertf128_ps(far, _mm_loadu_ps(across + 3 * columns), 1);
    for (int pixel = 0; pixel < PIXELS; pixel++) {
        const uint8_t *in = copy + offset[pixel];
        __m256i lane = _mm256_add_epi32(spread, _mm256_set1_epi32(pixel));
        __m256 left = _mm256_setzero_ps(), right = left;
        for (int row = first; row < end; row++) {
            __m256 weight = _mm256_set1_ps(down[row * columns + pixel]);
            left = _mm256_fmadd_ps((__m256)NAME(to_floats)(NAME(load)(in + row * stride)), weight, left);
            right = _mm256_fmadd_ps((__m256)NAME(to_floats)(NAME(load)(in + row * stride + 8)), weight, right);
        }
        left = _mm256_mul_ps(left, _mm256_permutevar8x32_ps(near, lane));
        sums[pixel] = _mm256_fmadd_ps(right, _mm256_permutevar8x32_ps(far, lane), left);
    }
    __m256 level = _mm256_add_ps(_mm256_permute2f128_ps(sums[0], sums[1], 0x20), _mm256_permute2f128_ps(sums[0], sums[1], 0x31));
    __m256 distance = _mm256_sub_ps(level, _mm256_round_ps(level, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    __m256 close = _mm256_cmp_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), distance), _mm256_set1_ps(1 / 2048.0f), _CMP_LT_OQ);
    close = _mm256_and_ps(close, _mm256_cmp_ps(level, _mm256_set1_ps(0.5f), _CMP_GT_OQ));
    close = _mm256_and_ps(close, _mm256_cmp_ps(level, _mm256_set1_ps(255.5f), _CMP_LT_OQ));
    uint8_t bytes[LANES];
    NAME(store)(bytes, NAME(clip_floats)((NAME(floats))level));
    __m128i packed = _mm_loadl_epi64((const __m128i *)bytes);
    _mm_storel_epi64((__m128i *)out, _mm_shuffle_epi8(packed, _mm_setr_epi8(0, 1, 2, 4, 5, 6, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1)));
    return (unsigned)_mm256_movemask_ps(close) & 0x77;
#else
    NAME(floats) sums[4] = {{0}}, level = {0};
    for (int row = first; row < end; row++)
        for (int tap = first; tap < end; tap++)
            sums[tap] += NAME(to_floats)(NAME(load)(copy + offset[0] + row * stride + 4 * tap)) * down[row * columns];
    for (int tap = first; tap < end; tap++) level += sums[tap] * across[tap * columns];
    NAME(floats) whole = (level + 12582912.0f) - 12582912.0f, distance = level - whole; /* 1.5 * 2**23: what is added to it is rounded */
    NAME(ints) close = (distance < 1 / 2048.0f) & (distance > -1 / 2048.0f) & (level > 0.5f) & (level < 255.5f);
    NAME(store)(out, NAME(clip_floats)(level));
    return (close[0] & 1) | (close[1] & 2) | (close[2] & 4);
#endif
}

/* Return a mask of the channels that are not the same in all sixteen pixels. Where one is the same, every value is exactly this. */
ALWAYS_INLINE unsigned NAME(varying)(const uint8_t *in, int64_t stride) {
    u8x16 first = LOAD(u8x16, in), other = {0};
    first = (u8x16)(((u32x4)first)[0] + (u32x4){0});
    for (int row = 0; row < 4; row++) other |= LOAD(u8x16, in + row * stride) ^ first;
    u32x4 of_four = (u32x4)other;
    uint32_t differing = of_four[0] | of_four[1] | of_four[2] | of_four[3];
    return (differing & 0xFF ? 1 : 0) | (differing & 0xFF00 ? 2 : 0) | (differing & 0xFF0000 ? 4 : 0);
}

/* Any matrix. The image is copied with two more pixels on each side and four bytes for a pixel. */
ALWAYS_INLINE void NAME(warp)(uint8_t *image, int32_t size, const double *m, struct scratch scratch, int filter) {
    int64_t bytes = size * 3ll, stride = 4 * (size + 4ll);
    int32_t columns = (size + LANES - 1) / LANES * LANES;
    uint8_t *copy = take(&scratch, (size + 4ll) * stride), *line = take(&scratch, 3ll * columns + 16), *fill = take(&scratch, bytes);
    struct NAME(places) places = {take(&scratch, 8ll * columns), take(&scratch, 4ll * columns), take(&scratch, 4ll * columns),
                                  take(&scratch, 8ll * columns), take(&scratch, 8ll * columns), take(&scratch, 16ll * columns),
                                  take(&scratch, 16ll * columns)};
    for (int32_t y = 0; y < size; y++) {
        uint8_t *to = copy + (y + 2) * stride;
        memcpy(line, image + y * bytes, bytes);
        for (int32_t x = 0; x < size; x++) STORE(to + 4 * (x + 2), LOAD(uint32_t, line + 3 * x));
        for (int side = 0; side < 2; side++) {
            memcpy(to + 4 * side, line, 3);
            memcpy(to + 4 * (size + 2 + side), line + bytes - 3, 3);
        }
    }
    for (int side = 0; side < 2; side++) {
        memcpy(copy + side * stride, copy + 2 * stride, stride);
        memcpy(copy + (size + 2 + side) * stride, copy + (size + 1) * stride, stride);
    }
    for (int32_t x = 0; x < size; x++) memcpy(fill + 3 * x, FILL, 3);
    for (int32_t x = 0; x < columns; x++) places.x[x] = x + 0.5;
    for (int32_t y = 0; y < size; y++) {
        int32_t begin = 0, end = size;
        NAME(place_row)(&places, y, columns, size, stride, m);
        NAME(warp_weights)(places.across, columns, filter, places.weights_across);
        NAME(warp_weights)(places.down, columns, filter, places.weights_down);
        /* Positions rise or fall along the row, so those inside are neighbours. */
        while (begin < size && !places.inside[begin]) begin++;
        while (end > begin && !places.inside[end - 1]) end--;
        for (int32_t x = begin / PIXELS * PIXELS; x < end; x += PIXELS) {
            unsigned unsure = NAME(warp_nearly)(copy, stride, &places, x, columns, filter, line + 3 * x);
            for (int32_t at = x; unsure; at++, unsure >>= 4) {
                if (!(unsure & 7)) continue;
                const uint8_t *in = copy + places.offset[at];
                if (unsure & NAME(varying)(in, stride)) {
                    NAME(warp_exactly)(in, stride, places.across[at], places.down[at], filter, line + 3 * at);
                    continue;
                }
                for (int channel = 0; channel < 3; channel++)
                    if (unsure >> channel & 1) line[3 * at + channel] = in[channel];
            }
        }
        memcpy(line, fill, 3ll * begin);
        memcpy(line + 3 * end, fill, 3ll * (size - end));
        memcpy(image + y * bytes, line, bytes);
    }
}

static void NAME(affine)(uint8_t *image, int32_t size, const double *m, int filter, struct scratch scratch) {
    int same_rows = m[0] == 1 && m[3] == 0 && m[4] == 1 && m[5] == 0, same_columns = m[0] == 1 && m[1] == 0 && m[2] == 0 && m[4] == 1;
    if (filter == BICUBIC) {
        if (same_rows) NAME(slide_rows)(image, size, m, scratch, BICUBIC);
        else if (same_columns) NAME(slide_columns)(image, size, m, scratch, BICUBIC);
        else NAME(warp)(image, size, m, scratch, BICUBIC);
    } else {
        if (same_rows) NAME(slide_rows)(image, size, m, scratch, BILINEAR);
        else if (same_columns) NAME(slide_columns)(image, size, m, scratch, BILINEAR);
        else NAME(warp)(image, size, m, scratch, BILINEAR);
    }
}

/* Quarter turns, anticlockwise. */
static void NAME(turn)(uint8_t *image, int32_t size, int32_t quarters, struct scratch scratch) {
    int64_t bytes = size * 3ll;
    uint8_t *before = take(&scratch, size * bytes);
    memcpy(before, image, size * bytes);
    for (int32_t y = 0; y < size; y++)
        for (int32_t x = 0; x < size; x++) {
            int32_t end = size - 1, from_y = y, from_x = x;
            if (quarters == 1) from_y = x, from_x = end - y;
            if (quarters == 2) from_y = end - y, from_x = end - x;
            if (quarters == 3) from_y = end - x, from_x = y;
            memcpy(image + y * bytes + 3 * x, before + from_y * bytes + 3 * from_x, 3);
        }
}

/* --- a view ------------------------------------------------------------------------------------------------------------------- */

static void NAME(operate)(uint8_t *image, int32_t size, const struct op *op, struct scratch scratch) {
    int64_t bytes = (int64_t)size * size * 3;
    switch (op->kind) {
    case AUTOCONTRAST: NAME(autocontrast)(image, size, scratch); break;
    case EQUALIZE: NAME(equalize)(image, size); break;
    case INVERT: NAME(solarize)(image, bytes, 0); break;
    case AFFINE: NAME(affine)(image, size, op->matrix, op->filter, scratch); break;
    case POSTERIZE: NAME(posterize)(image, bytes, (uint8_t)op->number); break;
    case SOLARIZE: NAME(solarize)(image, bytes, op->number); break;
    case SOLARIZE_ADD: NAME(solarize_add)(image, bytes, op->number); break;
    case COLOR: NAME(color)(image, size, op->factor, scratch); break;
    case CONTRAST: NAME(contrast)(image, size, op->factor, scratch); break;
    case BRIGHTNESS: NAME(blend_with)(image, bytes, 0, op->factor); break;
    case SHARPNESS: NAME(sharpness)(image, size, op->factor, scratch); break;
    case TURN: NAME(turn)(image, size, op->number, scratch); break;
    }
}

static void NAME(philox)(uint64_t counter, const uint64_t *key, uint64_t *words) {
    uint64_t a = counter, b = 0, c = 0, d = 0, k = key[0], l = key[1];
    for (int round = 0; round < 10; round++) {
        unsigned __int128 first = (unsigned __int128)a * 0xD2E7470EE14C6C93u, third = (unsigned __int128)c * 0xCA5A826395121157u;
        a = (uint64_t)(third >> 64) ^ b ^ k, b = (uint64_t)third;
        c = (uint64_t)(first >> 64) ^ d ^ l, d = (uint64_t)first;
        k += 0x9E3779B97F4A7C15u, l += 0xBB67AE8584CAA73Bu;
    }
    words[0] = a, words[1] = b, words[2] = c, words[3] = d;
}

static void NAME(erase)(uint8_t *image, const struct record *view, const uint8_t *noise) {
    uint64_t words[4], counter = 0;
    int used = 16;
    for (int channel = 0; channel < 3; channel++, noise += 65536)
        for (int32_t y = 0; y < view->erase_height; y++) {
            uint8_t *out = image + ((view->erase_top + y) * (int64_t)view->size + view->erase_left) * 3 + channel;
            for (int32_t x = 0; x < view->erase_width; x++, out += 3) {
                if (used == 16) NAME(philox)(++counter, view->noise, words), used = 0;
                *out = noise[words[used / 4] >> 16 * (used % 4) & 0xFFFF];
                used++;
            }
        }
}

static void NAME(render_view)(const uint8_t *pixels, const uint8_t *end, const struct record *view, const uint8_t *noise,
                              uint8_t *scratch, uint8_t *out) {
    NAME(resize)(pixels, end, view, scratch, out);
    for (int32_t i = 0; i < view->num_ops; i++) NAME(operate)(out, view->size, view->ops + i, (struct scratch){scratch});
    if (view->erase_height) NAME(erase)(out, view, noise);
}

