/* Decode attention on a processor: one query per row and head over the tokens of some runs, each in
   memory and a dtype of its own: a cache, a ring, what was kept of a prompt, latents. */

#include "attention.h"

typedef struct {
    const void *keys, *values;
    const int64_t *starts;                  /* [H + 1], of heads behind each other; or none */
    int64_t key_head, value_head;           /* without starts: numbers from head to head, */
    int64_t key_line, value_line;           /* and always from token to token */
    int64_t length, dtype;                  /* without starts: tokens */
    const float *key_scales, *value_scales; /* [H], or none */
} Run;

typedef struct {
    int64_t rows, heads, group;     /* B, H, query heads of each */
    int64_t key_width, value_width; /* D, Dv */
    int64_t runs, most;             /* of a row; and the most parts of a KV head */
    int64_t threads;
    const float *q;                 /* [B, H, g, D] */
    const Run *read;                /* [B, runs] */
    const float *sink_logits;       /* [H, g], or none */
    const float *beside, *weight;   /* [B, H, g, Dv] and [B, H, g]: what else was found, and its mass; or none */
    float *parts;                   /* [B, H, most, g, 2 + Dv] */
    float *out, *masses;            /* [B, H, g, Dv]; [B, H, g], log Σ e^score */
    float scaling;
} Call;

static int64_t tokens_of(const Run *run, int64_t h) {
    return run->starts ? run->starts[h + 1] - run->starts[h] : run->length;
}

static int64_t parts_of(const Run *run, int64_t h) { return (tokens_of(run, h) + PART - 1) / PART; }

/* For the query heads from `start` to `end` of a KV head. */
static void read_part(const Call *call, int64_t head, int64_t part, int64_t start, int64_t end) {
    const int64_t b = head / call->heads, h = head % call->heads;
    const Run *run = call->read + b * call->runs;
    int64_t own = part; /* its number among those of the run */
    for (int64_t i = 0; i < call->runs && own >= parts_of(run, h); i++, run++) own -= parts_of(run, h);
    if (run == call->read + (b + 1) * call->runs) return;
    const int64_t first = (run->starts ? run->starts[h] : 0) + own * PART, bytes = bytes_of(run->dtype);
    const Tokens read = {
        (const char *)run->keys + (h * run->key_head + first * run->key_line) * bytes,
        (const char *)run->values + (h * run->value_head + first * run->value_line) * bytes,
        call->key_width, call->value_width, run->key_line, run->value_line,
        smaller(PART, tokens_of(run, h) - own * PART), run->dtype, 0,
    };
    const float key_scale = run->key_scales ? run->key_scales[h] : 1;
    const float value_scale = run->value_scales ? run->value_scales[h] : 1;
    const int64_t each = queries_of(call->group), width = call->key_width;
    float queries[QUERIES][WIDEST + LANES];
    Found found;
    for (int64_t i = start; i < end; i += each) {
        const int n = smaller(each, end - i);
        scale_queries(queries, call->q + (head * call->group + i) * width, n, width, call->scaling * key_scale);
        read_tokens(&found, queries, n, &read);
        float *to = call->parts + ((head * call->most + part) * call->group + i) * (2 + call->value_width);
        keep(to, &found, n, call->value_width, value_scale);
    }
}

static void merge(const Call *call, int64_t query) {
    const int64_t head = query / call->group, i = query % call->group, width = call->value_width;
    const Run *run = call->read + head / call->heads * call->runs;
    int64_t parts = 0;
    for (int64_t k = 0; k < call->runs; k++) parts += parts_of(run + k, head % call->heads);
    float *out = call->out + query * width, largest = -INFINITY;
    memset(out, 0, 4 * width);
    const float *logit = call->sink_logits ? call->sink_logits + query % (call->heads * call->group) : 0;
    const float *found = call->parts + (head * call->most * call->group + i) * (2 + width);
    float total = add_parts(out, out, found, parts, 0, call->group * (2 + width), width, logit, &largest);
    if (call->beside && call->weight[query] != -INFINITY) {
        const float mass = call->weight[query], top = mass <= largest ? largest : mass;
        const float own = total == 0 ? 0 : expf(largest - top), other = expf(mass - top);
        for (int64_t c = 0; c < width; c++) out[c] = own * out[c] + other * call->beside[query * width + c];
        total = own * total + other;
        largest = top;
        parts++;
    }
    if (parts)
        for (int64_t c = 0; c < width; c++) out[c] /= total;
    call->masses[query] = largest + logf(total);
}

void decode_attention(const Call *call) {
    const int64_t heads = call->rows * call->heads, queries = heads * call->group, parts = heads * call->most;
    /* Where there are fewer parts than threads, several of these read one, for some query heads each. */
    const int64_t each = parts < call->threads ? queries_of(call->group) : call->group;
    const int64_t times = each ? (call->group + each - 1) / each : 0;
#pragma omp parallel num_threads(call->threads) if (parts * times > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < parts * times; item++) {
            const int64_t part = item / times, start = item % times * each;
            read_part(call, part / call->most, part % call->most, start, smaller(start + each, call->group));
        }
#pragma omp for
        for (int64_t query = 0; query < queries; query++) merge(call, query);
    }
}
