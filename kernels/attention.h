/* What kernels for the processor share: vectors of floats, and attention cut into parts.

   The past of a KV head is cut into parts of PART tokens. Each is weighed by itself, by any thread,
   and the parts are put together by their maxima, as in flash decoding. Where the cuts are depends
   on lengths alone, and no compiler may reorder a sum: threads do not change a result.

   Vectors are those of GCC and Clang, so that the same lines become AVX-512, AVX2 or NEON. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#define QUERIES 4 /* whose sums fit into the registers together */

/* PART, tokens, and WIDEST, numbers of a head, are given by native.py. */

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)

INLINE int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

/* LANES bytes or halves as integers. GCC makes many instructions of __builtin_convertvector. */
INLINE Ints widen_bytes(const void *at) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at));
#else
    return __builtin_convertvector(*(const Bytes *)at, Ints);
#endif
}

INLINE Ints widen_halves(const void *at) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at));
#else
    return __builtin_convertvector(*(const Shorts *)at, Ints);
#endif
}

INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

/* fp16 in the lower half of each lane. Exponents begin 112 later; where there is none, it is taken
   as the first and what that has in front of the point taken off, as subnormal numbers of fp32 may
   be flushed to zero. */
INLINE Floats from_fp16(Ints x) {
    const Ints endless = (x & 0x7c00) == 0x7c00; /* infinite, or not a number */
    const Ints small = (x & 0x7c00) == 0;
    const Ints bits = ((x & 0x7fff) << 13) + (112 << 23) - (small << 23);
    const Floats size = (Floats)(bits | (endless & 0x7f800000)) - (Floats)(small & 0x38800000);
    return (Floats)((Ints)size | (x & 0x8000) << 16);
}

/* e4m3 in the lowest byte of each lane, whose 127 is not a number. */
INLINE Floats from_e4m3(Ints x) {
    const Ints none = (x & 0x7f) == 0x7f, small = (x & 0x78) == 0;
    const Ints bits = ((x & 0x7f) << 20) + (120 << 23) - (small << 23);
    const Floats size = (Floats)bits - (Floats)(small & 0x3c800000);
    return (Floats)((Ints)size | (none & 0x7fc00000) | (x & 0x80) << 24);
}

enum { FP32, BF16, FP16, E4M3 };

INLINE int64_t bytes_of(int dtype) { return dtype == FP32 ? 4 : dtype == E4M3 ? 1 : 2; }

/* The same from memory. Processors convert halves, also subnormal ones; e4m3 are halves with three
   digits, times 2^8. */
INLINE Floats load_fp16(const void *at) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
#elif defined(__AVX2__) && defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
#else
    return from_fp16(widen_halves(at));
#endif
}

INLINE Floats load_e4m3(const void *at) {
#if defined(__AVX512F__)
    const __m256i x = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)at)), 8);
    const __m256i half = _mm256_and_si256(_mm256_srai_epi16(x, 1), _mm256_set1_epi16((short)0xbfff));
    const __m256i size = _mm256_and_si256(half, _mm256_set1_epi16(0x3fff));
    const __m256i none = _mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x3f80));
    const __m256i found = _mm256_or_si256(half, _mm256_and_si256(none, _mm256_set1_epi16(0x7e00)));
    return (Floats)_mm512_cvtph_ps(found) * 0x1p8f;
#elif defined(__AVX2__) && defined(__F16C__)
    const __m128i x = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)at)), 8);
    const __m128i half = _mm_and_si128(_mm_srai_epi16(x, 1), _mm_set1_epi16((short)0xbfff));
    const __m128i size = _mm_and_si128(half, _mm_set1_epi16(0x3fff));
    const __m128i none = _mm_cmpeq_epi16(size, _mm_set1_epi16(0x3f80));
    const __m128i found = _mm_or_si128(half, _mm_and_si128(none, _mm_set1_epi16(0x7e00)));
    return (Floats)_mm256_cvtph_ps(found) * 0x1p8f;
#else
    return from_e4m3(widen_bytes(at));
#endif
}

INLINE Floats load_whole(const void *at, int dtype) {
    switch (dtype) {
    case FP32: return *(const Floats *)at;
    case BF16: return (Floats)(widen_halves(at) << 16);
    case FP16: return load_fp16(at);
    default: return load_e4m3(at);
    }
}

/* The next numbers of a line of which `left` are left, zeros behind them: nothing else is read. */
INLINE Floats load(const void *at, int64_t left, int dtype) {
    if (left >= LANES) return load_whole(at, dtype);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 there = (1u << left) - 1;
    if (dtype == FP32) return (Floats)_mm512_maskz_loadu_ps(there, at);
    if (dtype == BF16)
        return (Floats)((Ints)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, at)) << 16);
    if (dtype == FP16) return (Floats)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, at));
#endif
    Floats some = {0};
    memcpy(&some, at, left * bytes_of(dtype));
    return load_whole(&some, dtype);
}

INLINE float sum_of(Floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x); /* which the loop would not become */
#elif defined(__AVX2__)
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
#endif
}

/* e^x for x <= 0 with a relative error below 1e-7, and 0 below -87. NaN stays. */
INLINE Floats exponential(Floats x) {
    const Floats zero = {0}, magic = zero + 12582912.0f; /* 1.5 * 2^23 */
    const Ints small = x < zero - 87.0f;
    x = (Floats)((Ints)x & ~small);
    const Floats rounded = x * 1.44269504f + magic;
    const Floats n = rounded - magic;
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats y = 1.9875691500e-4f * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const Ints power = ((Ints)rounded - (Ints)magic + 127) << 23;
    return (Floats)((Ints)(y * (Floats)power) & ~small);
}

/* Scores become e^(score - largest), with zeros behind n; returns their sum. */
static float weigh(float *scores, int64_t n, float *largest) {
    float most = scores[0], rest[LANES];
    for (int64_t i = 1; i < n; i++) most = scores[i] > most ? scores[i] : most;
    *largest = most;
    if (most == -INFINITY) most = 0; /* then all weights are 0, but of what is not a number */
    Floats sums = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums += *(Floats *)(scores + i) = exponential(*(Floats *)(scores + i) - most);
    if (i < n) {
        *(Floats *)rest = exponential(load(scores + i, n - i, FP32) - most);
        for (int64_t k = 0; k < LANES; k++) scores[i + k] = i + k < n ? rest[k] : 0;
        sums += *(Floats *)(scores + i);
    }
    return sum_of(sums);
}

/* What the queries of a KV head found in one part: their largest scores, sums of weights, and sums
   of values. */
typedef struct {
    float largest[QUERIES], total[QUERIES], sums[QUERIES][WIDEST + LANES];
} Found;

/* Tokens of a head: where the first lies, how many numbers there are of each, and how many lie from
   one to the next. */
typedef struct {
    const void *keys, *values;
    int64_t key_width, value_width, key_line, value_line, tokens, dtype;
    const int64_t *rows; /* which lines they are; none for 0, 1, 2, ... */
} Tokens;

/* Attention of n queries over up to PART tokens.

   queries: [n, key width], scaled, zeros behind the width. */
INLINE void read_rows(Found *found, float queries[][WIDEST + LANES], int n, const Tokens *read, int dtype) {
    float scores[QUERIES][PART + LANES];
    const int64_t *rows = read->rows, tokens = read->tokens, bytes = bytes_of(dtype);
    const int64_t key_width = read->key_width, key_line = read->key_line * bytes;
    const int64_t value_width = read->value_width, value_line = read->value_line * bytes;
    for (int64_t t = 0; t < tokens; t++) {
        const char *at = (const char *)read->keys + (rows ? rows[t] : t) * key_line;
        Floats sums[QUERIES] = {{0}};
        for (int64_t c = 0; c < key_width; c += LANES, at += LANES * bytes) {
            const Floats x = load(at, key_width - c, dtype);
            for (int i = 0; i < n; i++) sums[i] += *(Floats *)(queries[i] + c) * x;
        }
        for (int i = 0; i < n; i++) scores[i][t] = sum_of(sums[i]);
    }
    for (int i = 0; i < n; i++) {
        found->total[i] = weigh(scores[i], tokens, &found->largest[i]);
        memset(found->sums[i], 0, sizeof found->sums[i]);
    }
    for (int64_t first = 0; first < tokens; first += 16) { /* rows that stay in the nearest cache */
        const int64_t end = smaller(tokens, first + 16);
        for (int64_t c = 0; c < value_width; c += LANES) {
            Floats sums[QUERIES];
            for (int i = 0; i < n; i++) sums[i] = *(Floats *)(found->sums[i] + c);
            for (int64_t t = first; t < end; t++) {
                const char *at = (const char *)read->values + (rows ? rows[t] : t) * value_line + c * bytes;
                const Floats x = load(at, value_width - c, dtype);
                for (int i = 0; i < n; i++) sums[i] += scores[i][t] * x;
            }
            for (int i = 0; i < n; i++) *(Floats *)(found->sums[i] + c) = sums[i];
        }
    }
}

/* The same for a number of queries that the compiler knows, so that sums stay in registers. */
INLINE void read_rows_of(Found *found, float queries[][WIDEST + LANES], int n, const Tokens *read, int dtype) {
    switch (n) {
    case 1: read_rows(found, queries, 1, read, dtype); break;
    case 2: read_rows(found, queries, 2, read, dtype); break;
    case 3: read_rows(found, queries, 3, read, dtype); break;
    case 4: read_rows(found, queries, 4, read, dtype); break;
    }
}

static void read_tokens(Found *found, float queries[][WIDEST + LANES], int n, const Tokens *read) {
    switch (read->dtype) {
    case FP32: read_rows_of(found, queries, n, read, FP32); break;
    case BF16: read_rows_of(found, queries, n, read, BF16); break;
    case FP16: read_rows_of(found, queries, n, read, FP16); break;
    default: read_rows_of(found, queries, n, read, E4M3);
    }
}

/* How many of the query heads of a KV head are read for together: QUERIES, or evenly fewer. */
INLINE int64_t queries_of(int64_t group) {
    const int64_t times = (group + QUERIES - 1) / QUERIES;
    return times ? (group + times - 1) / times : 1;
}

/* Queries [n, width] times a factor, with zeros behind the width. */
static void scale_queries(float to[][WIDEST + LANES], const float *q, int n, int64_t width, float factor) {
    for (int i = 0; i < n; i++)
        for (int64_t c = 0; c < PADDED(width); c++) to[i][c] = c < width ? q[i * width + c] * factor : 0;
}

/* Puts what n queries found, values times a factor, where they are put together: [n, 2 + width]. */
static void keep(float *to, const Found *found, int n, int64_t width, float factor) {
    for (int i = 0; i < n; i++, to += 2 + width) {
        to[0] = found->largest[i];
        to[1] = found->total[i];
        for (int64_t c = 0; c < width; c++) to[2 + c] = found->sums[i][c] * factor;
    }
}

/* One softmax of the parts of a query head, `stride` apart; returns what sums are to be divided by.
   logit: joins the softmax, and has no value; none if there is none.
   top: becomes the largest score. */
static float add_parts(float *sums, float *far, const float *found, int64_t parts, int64_t near, int64_t stride,
                       int64_t width, const float *logit, float *top) {
    float largest = logit ? *logit : -INFINITY;
    for (int64_t p = 0; p < parts; p++)
        if (!(found[p * stride] <= largest)) largest = found[p * stride];
    *top = largest;
    float total = logit && *logit != -INFINITY ? expf(*logit - largest) : 0;
    for (int64_t p = 0; p < parts; p++) {
        if (found[p * stride + 1] == 0) continue; /* scores of -inf alone */
        float *to = p < near ? sums : far;
        const float weight = expf(found[p * stride] - largest);
        total += weight * found[p * stride + 1];
        for (int64_t c = 0; c < width; c++) to[c] += weight * found[p * stride + 2 + c];
    }
    return total;
}
