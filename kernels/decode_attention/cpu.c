/* Decode attention on a processor: one query per row and head over the tokens of some runs, each in
   memory and a dtype of its own: a cache, a ring, what was kept of a prompt. */

#include "attention.h"

typedef struct {
    const void *keys, *values;              /* rows of `width` numbers */
    const int64_t *starts;                  /* [H + 1], of heads behind each other; or none */
    int64_t stride, length, dtype;          /* without starts: rows from head to head, and tokens */
    const float *key_scales, *value_scales; /* [H], or none */
} Run;

typedef struct {
    int64_t rows, heads, group, width; /* B, H, query heads of each, D */
    int64_t runs, most;                /* of a row; and the most parts of a KV head */
    int64_t threads;
    const float *q;                    /* [B, H, g, D] */
    const Run *read;                   /* [B, runs] */
    const float *sink_logits;          /* [H, g], or none */
    float *parts;                      /* [B, H, most, g, 2 + D] */
    float *out;                        /* [B, H, g, D] */
    float scaling;
} Call;

static int64_t tokens_of(const Run *run, int64_t h) {
    return run->starts ? run->starts[h + 1] - run->starts[h] : run->length;
}

static int64_t parts_of(const Run *run, int64_t h) { return (tokens_of(run, h) + PART - 1) / PART; }

static void read_part(const Call *call, int64_t head, int64_t part) {
    const int64_t b = head / call->heads, h = head % call->heads, width = call->width;
    const Run *run = call->read + b * call->runs;
    int64_t own = part; /* its number among those of the run */
    for (int64_t i = 0; i < call->runs && own >= parts_of(run, h); i++, run++) own -= parts_of(run, h);
    if (run == call->read + (b + 1) * call->runs) return;
    const int64_t first = (run->starts ? run->starts[h] : h * run->stride) + own * PART;
    const int64_t tokens = smaller(PART, tokens_of(run, h) - own * PART), line = width * bytes_of(run->dtype);
    const float key_scale = run->key_scales ? run->key_scales[h] : 1;
    const float value_scale = run->value_scales ? run->value_scales[h] : 1;
    float queries[QUERIES][WIDEST + LANES];
    Found found;
    for (int64_t i = 0; i < call->group; i += QUERIES) {
        const int n = smaller(QUERIES, call->group - i);
        scale_queries(queries, call->q + (head * call->group + i) * width, n, width, call->scaling * key_scale);
        read_tokens(&found, queries, n, width, (const char *)run->keys + first * line,
                    (const char *)run->values + first * line, 0, tokens, run->dtype);
        keep(call->parts + ((head * call->most + part) * call->group + i) * (2 + width), &found, n, width, value_scale);
    }
}

static void merge(const Call *call, int64_t query) {
    const int64_t head = query / call->group, i = query % call->group, width = call->width;
    const Run *run = call->read + head / call->heads * call->runs;
    int64_t parts = 0;
    for (int64_t k = 0; k < call->runs; k++) parts += parts_of(run + k, head % call->heads);
    float *out = call->out + query * width;
    memset(out, 0, 4 * width);
    if (!parts) return;
    const float *logit = call->sink_logits ? call->sink_logits + query % (call->heads * call->group) : 0;
    const float *found = call->parts + (head * call->most * call->group + i) * (2 + width);
    const float total = add_parts(out, out, found, parts, 0, call->group * (2 + width), width, logit);
    for (int64_t c = 0; c < width; c++) out[c] /= total;
}

void decode_attention(const Call *call) {
    const int64_t heads = call->rows * call->heads, queries = heads * call->group;
#pragma omp parallel num_threads(call->threads) if (heads * call->most > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < heads * call->most; item++) read_part(call, item / call->most, item % call->most);
#pragma omp for
        for (int64_t query = 0; query < queries; query++) merge(call, query);
    }
}
