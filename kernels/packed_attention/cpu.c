/* The decode step over packed heads of `paged.py` on a processor.

   Parts are first of the exact tokens, and then of blocks. Scales are folded: those of keys into the
   query, those of values into the weights, so a code costs the way from its byte to a float and one
   multiplication with each query. */

#include "attention.h"

#define LONGEST 64 /* tokens of a block */

typedef uint64_t Words __attribute__((vector_size(16), aligned(1), may_alias));

typedef struct {
    int64_t rows, heads, group, width;        /* B, H, query heads of each, D */
    int64_t size, key_bits, value_bits, each; /* N tokens of a block, and blocks of a page */
    int64_t columns;                          /* of the table */
    int64_t turned;                           /* whether packed values are behind a Hadamard transform */
    int64_t sink, window, room, dtype;        /* of the ring, and how many tokens it has place for */
    int64_t most, threads;                    /* parts of the longest row */
    const float *q;                           /* [B, H, g, D] */
    const void *ring_keys, *ring_values;      /* [R, H, room, D] */
    const int64_t *ring_rows;                 /* [B] */
    const uint8_t *keys, *values;             /* [P, H, each, lines, ·] */
    const uint16_t *key_scales, *value_scales;
    const int32_t *table, *lengths; /* [B, columns], [B] */
    const float *sink_logits;       /* [H, g], or none */
    float *parts;                   /* [B, H, most, g, 2 + D] */
    float *out;                     /* [B, H, g, D] */
    float scaling;
} Call;

/* The numbers of so many bits in a line of bytes, one behind the other: of `width` numbers byte c
   holds c, c + bytes, c + 2 bytes, ..., low bits first (`kernels/quantise`). They are put into the
   line `codes`, or to what is there. */
INLINE void unpack_plane(uint8_t *codes, const uint8_t *packed, int width, int bits, int up, int more) {
    const int bytes = (width * bits + 7) / 8, fields = 8 / bits;
    const uint64_t mask = ((1ull << bits) - 1) * 0x0101010101010101ull;
    Words found;
    if (bytes % 16 == 0 || (bytes == 8 && width == 64)) {
        for (int at = 0; at < width; at += 16) {
            if (bytes == 8) { /* two fields at once */
                uint64_t x;
                memcpy(&x, packed, 8);
                found = (Words){x >> at / 8 * bits, x >> (at / 8 + 1) * bits} & mask;
            } else {
                found = *(const Words *)(packed + at % bytes) >> (at / bytes * bits) & mask;
            }
            found <<= up;
            if (more) found |= *(const Words *)(codes + at);
            *(Words *)(codes + at) = found;
        }
        return;
    }
    for (int field = 0; field < fields; field++) {
        const int first = field * bytes, n = width - first < bytes ? width - first : bytes;
        for (int c = 0; c < n; c++) {
            const uint8_t code = (uint8_t)(packed[c] >> (field * bits) & (mask & 255)) << up;
            codes[first + c] = more ? codes[first + c] | code : code;
        }
    }
}

INLINE void unpack_lines(uint8_t *codes, int64_t stride, const uint8_t *packed, int64_t bytes, int lines,
                         int width, int bits) {
    for (int l = 0; l < lines; l++, codes += stride, packed += bytes) {
        if (bits == 8) {
            memcpy(codes, packed, width);
        } else if (bits == 3) {
            unpack_plane(codes, packed, width, 2, 0, 0);
            unpack_plane(codes, packed + (2 * width + 7) / 8, width, 1, 2, 1);
        } else {
            unpack_plane(codes, packed, width, bits, 0, 0);
        }
    }
}

/* Lines of codes as bytes, `stride` apart; sizes that the compiler knows are far faster. */
static void unpack(uint8_t *codes, int64_t stride, const uint8_t *packed, int64_t bytes, int lines, int width,
                   int bits) {
#define UNPACK(width) \
    switch (bits) { \
    case 2: unpack_lines(codes, stride, packed, bytes, lines, width, 2); break; \
    case 3: unpack_lines(codes, stride, packed, bytes, lines, width, 3); break; \
    case 4: unpack_lines(codes, stride, packed, bytes, lines, width, 4); break; \
    default: unpack_lines(codes, stride, packed, bytes, lines, width, 8); \
    }
    if (width == 64) {
        UNPACK(64)
    } else if (width == 128) {
        UNPACK(128)
    } else {
        UNPACK(width)
    }
}

/* Pairs of scale and minimum in fp16, apart. */
static void split_scales(float *scales, float *minima, const uint16_t *pairs, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        Ints x = {0};
        memcpy(&x, pairs + 2 * i, 4 * (n - i < LANES ? n - i : LANES));
        *(Floats *)(scales + i) = from_fp16(x & 0xffff);
        *(Floats *)(minima + i) = from_fp16((x >> 16) & 0xffff);
    }
}

static int64_t packed_bytes(int64_t width, int64_t bits) {
    return bits == 3 ? (2 * width + 7) / 8 + (width + 7) / 8 : (width * bits + 7) / 8;
}

/* out[i][c] += Σ_l weights[i][l] codes[l][c] for n queries; lines of codes lie `stride` apart. */
INLINE void add_products(float *out, int64_t out_stride, const float *weights, int64_t weight_stride,
                         const uint8_t *codes, int64_t stride, int lines, int columns, int n) {
    int c = 0;
    for (; c + 2 * LANES <= columns; c += 2 * LANES) {
        Floats low[QUERIES], high[QUERIES];
        for (int i = 0; i < n; i++) {
            low[i] = *(Floats *)(out + i * out_stride + c);
            high[i] = *(Floats *)(out + i * out_stride + c + LANES);
        }
        for (int l = 0; l < lines; l++) {
            const Floats x = to_floats(widen_bytes(codes + l * stride + c));
            const Floats y = to_floats(widen_bytes(codes + l * stride + c + LANES));
            for (int i = 0; i < n; i++) {
                low[i] += weights[i * weight_stride + l] * x;
                high[i] += weights[i * weight_stride + l] * y;
            }
        }
        for (int i = 0; i < n; i++) {
            *(Floats *)(out + i * out_stride + c) = low[i];
            *(Floats *)(out + i * out_stride + c + LANES) = high[i];
        }
    }
    for (; c < columns; c += LANES) { /* the last may reach behind the columns: there is room */
        Floats sums[QUERIES];
        for (int i = 0; i < n; i++) sums[i] = *(Floats *)(out + i * out_stride + c);
        for (int l = 0; l < lines; l++) {
            const Floats x = to_floats(widen_bytes(codes + l * stride + c));
            for (int i = 0; i < n; i++) sums[i] += weights[i * weight_stride + l] * x;
        }
        for (int i = 0; i < n; i++) *(Floats *)(out + i * out_stride + c) = sums[i];
    }
}

static void products(float *out, int64_t out_stride, const float *weights, int64_t weight_stride,
                     const uint8_t *codes, int64_t stride, int lines, int columns, int n) {
    switch (n) { /* numbers of queries that the compiler knows, so that sums stay in registers */
    case 1: add_products(out, out_stride, weights, weight_stride, codes, stride, lines, columns, 1); break;
    case 2: add_products(out, out_stride, weights, weight_stride, codes, stride, lines, columns, 2); break;
    case 3: add_products(out, out_stride, weights, weight_stride, codes, stride, lines, columns, 3); break;
    case 4: add_products(out, out_stride, weights, weight_stride, codes, stride, lines, columns, 4); break;
    }
}

static int64_t blocks_of(const Call *call, int64_t length) {
    const int64_t behind = length - call->sink - call->window;
    return behind > 0 ? behind / call->size : 0;
}

static int64_t exact_of(const Call *call, int64_t length) { return length - blocks_of(call, length) * call->size; }

static int64_t parts_of(int64_t tokens) { return (tokens + PART - 1) / PART; }

/* Attention over the exact tokens from index `start` to `end`. */
static void read_exact(const Call *call, Found *found, float queries[][WIDEST + LANES], int n, int64_t b, int64_t h,
                       int64_t start, int64_t end) {
    const int64_t head = (call->ring_rows[b] * call->heads + h) * call->room;
    const int64_t packed = blocks_of(call, call->lengths[b]) * call->size, around = call->window + call->size;
    int64_t rows[PART];
    for (int64_t t = start; t < end; t++)
        rows[t - start] = head + (t < call->sink ? t : call->sink + (t - call->sink + packed) % around);
    const int64_t width = call->width;
    const Tokens read = {call->ring_keys, call->ring_values, width, width, width, width, end - start, call->dtype, rows};
    read_tokens(found, queries, n, &read);
}

/* Attention over the blocks from `start` to `end`. */
static void read_blocks(const Call *call, Found *found, float queries[][WIDEST + LANES], int n, int64_t b, int64_t h,
                        int64_t start, int64_t end) {
    const int64_t width = call->width, size = call->size, groups = (width + size - 1) / size;
    const int64_t key_bytes = packed_bytes(size, call->key_bits), value_bytes = packed_bytes(width, call->value_bits);
    uint8_t codes[(WIDEST + LANES) * LONGEST];
    float scores[QUERIES][PART + LANES], weights[QUERIES][WIDEST + LANES];
    float scale[WIDEST + LONGEST], minimum[WIDEST + LONGEST]; /* up to N of the last group behind D */
    int64_t places[PART];
    for (int64_t block = start; block < end; block++) {
        const int64_t page = call->table[b * call->columns + block / call->each];
        places[block - start] = (page * call->heads + h) * call->each + block % call->each;
    }
    for (int64_t block = 0; block < end - start; block++) { /* q · k = (q s) · code + q · m */
        const int64_t place = places[block];
        unpack(codes, size, call->keys + place * width * key_bytes, key_bytes, width, size, call->key_bits);
        split_scales(scale, minimum, call->key_scales + place * width * 2, width);
        for (int i = 0; i < n; i++) {
            Floats shift = {0};
            for (int64_t c = 0; c < width; c += LANES) {
                *(Floats *)(weights[i] + c) = *(Floats *)(queries[i] + c) * *(Floats *)(scale + c);
                shift += *(Floats *)(queries[i] + c) * *(Floats *)(minimum + c);
            }
            const float sum = sum_of(shift);
            for (int64_t t = 0; t < size; t++) scores[i][block * size + t] = sum;
        }
        products(scores[0] + block * size, PART + LANES, weights[0], WIDEST + LANES, codes, size, width, size, n);
    }
    for (int i = 0; i < n; i++) {
        found->total[i] = weigh(scores[i], (end - start) * size, &found->largest[i]);
        memset(found->sums[i], 0, sizeof found->sums[i]);
    }
    for (int64_t block = 0; block < end - start; block++) { /* Σ p v = Σ (p s) code + Σ p m */
        const int64_t place = places[block];
        const uint8_t *packed = call->values + place * size * value_bytes;
        unpack(codes, WIDEST + LANES, packed, value_bytes, size, width, call->value_bits);
        split_scales(scale, minimum, call->value_scales + place * size * groups * 2, size * groups);
        for (int64_t j = 0; j < groups; j++) {
            const int64_t first = j * size, columns = smaller(size, width - first);
            for (int i = 0; i < n; i++) {
                const float *own = scores[i] + block * size;
                float shift = 0;
                for (int64_t t = 0; t < size; t++) {
                    weights[i][t] = own[t] * scale[t * groups + j];
                    shift += own[t] * minimum[t * groups + j];
                }
                for (int64_t c = first; c < first + columns; c++) found->sums[i][c] += shift;
            }
            products(found->sums[0] + first, WIDEST + LANES, weights[0], WIDEST + LANES, codes + first,
                     WIDEST + LANES, size, columns, n);
        }
    }
}

static void read_part(const Call *call, int64_t head, int64_t part) {
    const int64_t b = head / call->heads, h = head % call->heads, width = call->width;
    const int64_t exact = exact_of(call, call->lengths[b]), blocks = blocks_of(call, call->lengths[b]);
    const int64_t near = parts_of(exact), step = PART / call->size, start = (part - near) * step;
    if (part >= near && start >= blocks) return;
    float queries[QUERIES][WIDEST + LANES];
    Found found;
    const int64_t each = queries_of(call->group);
    for (int64_t i = 0; i < call->group; i += each) {
        const int n = smaller(each, call->group - i);
        scale_queries(queries, call->q + (head * call->group + i) * width, n, width, call->scaling);
        if (part < near)
            read_exact(call, &found, queries, n, b, h, part * PART, smaller(exact, (part + 1) * PART));
        else
            read_blocks(call, &found, queries, n, b, h, start, smaller(blocks, start + step));
        keep(call->parts + ((head * call->most + part) * call->group + i) * (2 + width), &found, n, width, 1);
    }
}

/* The Hadamard transform of the channels, in the largest blocks that their number has. */
static void turn(float *x, int64_t width) {
    const int64_t block = width & -width;
    const float factor = 1 / sqrtf((float)block);
    for (int64_t apart = 1; apart < block; apart *= 2)
        for (int64_t c = 0; c < width; c++)
            if (!(c & apart)) {
                const float even = x[c], odd = x[c + apart];
                x[c] = even + odd;
                x[c + apart] = even - odd;
            }
    for (int64_t c = 0; c < width; c++) x[c] *= factor;
}

static void merge(const Call *call, int64_t query) {
    const int64_t head = query / call->group, i = query % call->group, b = head / call->heads, width = call->width;
    const int64_t exact = exact_of(call, call->lengths[b]), near = parts_of(exact);
    const int64_t step = PART / call->size, parts = near + (blocks_of(call, call->lengths[b]) + step - 1) / step;
    float *out = call->out + query * width, far[WIDEST] = {0}, largest;
    memset(out, 0, 4 * width);
    if (!parts) return;
    const float *logit = call->sink_logits ? call->sink_logits + query % (call->heads * call->group) : 0;
    const float *found = call->parts + (head * call->most * call->group + i) * (2 + width);
    const float total = add_parts(out, far, found, parts, near, call->group * (2 + width), width, logit, &largest);
    if (call->turned) turn(far, width);
    for (int64_t c = 0; c < width; c++) out[c] = (out[c] + far[c]) / total;
}

void packed_attention(const Call *call) {
    const int64_t heads = call->rows * call->heads, queries = heads * call->group;
#pragma omp parallel num_threads(call->threads) if (heads * call->most > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < heads * call->most; item++) read_part(call, item / call->most, item % call->most);
#pragma omp for
        for (int64_t query = 0; query < queries; query++) merge(call, query);
    }
}
