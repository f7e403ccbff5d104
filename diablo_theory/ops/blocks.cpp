// What a CPU does badly with diagonal blocks through batched products and strided copies: the product x D, the blocks
// of x^T g, and adding blocks into a weight and taking them out again. float32; nothing is needed but OpenMP.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <vector>

#include <omp.h>

namespace {

// Floats of a vector, and how many vectors the CPU has registers for.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int64_t LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int64_t LANES = 4, REGISTERS = 32;
#else
constexpr int64_t LANES = 4, REGISTERS = 16;
#endif
constexpr int64_t TOKENS = 12; // of a tile: as many rows as a first cache can hold where they lie a power of two apart
constexpr int64_t FEW = 4096;  // entries that one thread writes faster than it wakes others

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

int64_t vectors(int64_t columns) { return (columns + LANES - 1) / LANES; }

// The columns of one block for the tokens of one tile: d1 of x, and d2 of y (the outputs, or their gradient).
struct Tile {
    const float *x;
    const float *y;
    int64_t x_row, y_row; // floats from one token to the next
    int64_t d1, d2;
    int64_t tokens;
    bool more; // there is a whole tile after this one

    // Fetches tokens from..to of the next tile towards the cache: blocks are narrow, and without this every row of
    // every block is waited for.
    void fetch_next(int64_t from, int64_t to) const {
        for (int64_t t = TOKENS + from; more && t < TOKENS + to; t++) {
            for (int64_t c = 0; c < d1; c += LANES) __builtin_prefetch(x + t * x_row + c, 0, 2);
            for (int64_t c = 0; c < d2; c += LANES) __builtin_prefetch(y + t * y_row + c, 0, 2);
            asm volatile(""); // gcc takes a function that only prefetches for one without effect and drops it
        }
    }
};

// Calls work(n) with n, which is 1..Most, known to the compiler.
template <int Most, class Work> void dispatch(int64_t n, const Work &work) {
    if (n == Most)
        work(std::integral_constant<int, Most>{});
    else if constexpr (Most > 1)
        dispatch<Most - 1>(n, work);
}

// Calls work(I, J, i, j) for portions of I of the rows, from i on, and J vectors of y's columns, from vector j on, until
// all are done: so few that their sums stay in registers. Fetches the next tile in between.
template <class Work> void in_portions(int64_t rows, const Tile &tile, const Work &work) {
    const int64_t n = vectors(tile.d2);
    for (int64_t j = 0; j < n; j += 3)
        dispatch<3>(std::min<int64_t>(3, n - j), [&](auto J) {
            constexpr int64_t width = decltype(J)::value; // beside the sums, a row of y and one number of x
            constexpr int most = std::min<int64_t>(12, (REGISTERS - width - 1) / width);
            const int64_t portions = (rows + most - 1) / most;
            const int64_t rounds = portions * ((n + 2) / 3), round = portions * (j / 3);
            for (int64_t p = 0; p < portions; p++) {
                const int64_t from = rows * p / portions, to = rows * (p + 1) / portions;
                tile.fetch_next(TOKENS * (round + p) / rounds, TOKENS * (round + p + 1) / rounds);
                dispatch<most>(to - from, [&](auto I) { work(I, J, from, j); });
            }
        });
}

// sums[i, :] += sum over tokens t of x[t, i] y[t, :], for I columns of x and J vectors of y.
template <int I, int J>
void accumulate(const Tile &tile, const float *x, const float *y, float *sums, int64_t sums_row) {
    vec part[I][J] = {};
    for (int64_t t = 0; t < tile.tokens; t++) {
        vec row[J];
        for (int v = 0; v < J; v++) row[v] = *(const vec *)(y + t * tile.y_row + LANES * v);
        for (int i = 0; i < I; i++)
            for (int v = 0; v < J; v++) part[i][v] += x[t * tile.x_row + i] * row[v];
    }
    for (int i = 0; i < I; i++)
        for (int v = 0; v < J; v++) *(vec *)(sums + i * sums_row + LANES * v) += part[i][v];
}

// Writes the first `valid` numbers of a vector, or adds them where `add`; `room` says how many numbers may be touched.
void put(float *to, vec sum, int64_t valid, int64_t room, bool add) {
    if (room >= LANES) {
        ivec lane;
        for (int64_t c = 0; c < LANES; c++) lane[c] = c;
        const ivec chosen = lane < (int32_t)std::min(valid, LANES);
        const vec old = *(vec *)to;
        *(vec *)to = chosen ? (add ? old + sum : sum) : old;
    } else {
        for (int64_t c = 0; c < valid; c++) to[c] = add ? to[c] + sum[c] : sum[c];
    }
}

// y[t, :] (+)= sum over i of x[t, i] blocks[i, :], for I tokens and J vectors of y; `room` floats lie from y to the end
// of its row.
template <int I, int J>
void multiply(const Tile &tile, const float *x, float *y, const float *blocks, int64_t blocks_row, int64_t valid,
              int64_t room, bool add) {
    vec sums[I][J] = {};
    for (int64_t i = 0; i < tile.d1; i++) {
        vec row[J];
        for (int v = 0; v < J; v++) row[v] = *(const vec *)(blocks + i * blocks_row + LANES * v);
        for (int t = 0; t < I; t++)
            for (int v = 0; v < J; v++) sums[t][v] += x[t * tile.x_row + i] * row[v];
    }
    for (int t = 0; t < I; t++)
        for (int v = 0; v < J; v++)
            put(y + t * tile.y_row + LANES * v, sums[t][v], valid - LANES * v, room - LANES * v, add);
}

// Calls visit(place in the weight, place in blocks, place in kept) for each entry, weight and kept in memory order.
template <class Visit>
void each_entry(int64_t step, int64_t input, int64_t output, int64_t k, int64_t d1, int64_t d2, Visit visit) {
    const int64_t size = d1 * d2;
#pragma omp parallel for if (k * size > FEW)
    for (int64_t b = 0; b < k; b++)
        if (input == 1)
            for (int64_t j = 0; j < d2; j++)
                for (int64_t i = 0; i < d1; i++)
                    visit(b * step + i + j * output, b * size + i * d2 + j, b * size + j * d1 + i);
        else
            for (int64_t i = 0; i < d1; i++)
                for (int64_t j = 0; j < d2; j++)
                    visit(b * step + i * input + j * output, b * size + i * d2 + j, b * size + i * d2 + j);
}

} // namespace

extern "C" {

// y[:, b d2 : (b + 1) d2] (+)= x[:, b d1 : (b + 1) d1] blocks[b] for b < k, where entry (i, j) of block b lies at
// blocks[b * step + i * input + j * output]. Rows of x and y are x_row and y_row floats apart; y has `columns` of them,
// of which only those above change. Returns 0, or 1 where memory ran out and y is as it was.
int diablo_product(const float *x, int64_t x_row, float *y, int64_t y_row, int64_t columns, int64_t tokens,
                   const float *blocks, int64_t step, int64_t input, int64_t output, int64_t k, int64_t d1, int64_t d2,
                   int add) {
    const bool columns_only = d2 == 1; // no vectors to be had from y: those of x are used
    const int64_t width = columns_only ? 1 : vectors(d2) * LANES;
    std::vector<float> packed; // rows of whole vectors, so that reading never ends outside
    try {
        packed.resize(k * d1 * width);
    } catch (const std::bad_alloc &) {
        return 1;
    }
#pragma omp parallel
    {
#pragma omp for
        for (int64_t b = 0; b < k; b++)
            for (int64_t i = 0; i < d1; i++)
                for (int64_t j = 0; j < d2; j++)
                    packed[(b * d1 + i) * width + j] = blocks[b * step + i * input + j * output];
        const int64_t n = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t begin = tokens * me / n, end = tokens * (me + 1) / n;
        if (columns_only) {
            const auto rows = [&](auto fixed) {
                const int64_t size = fixed ? int64_t(fixed) : d1;
                for (int64_t t = begin; t < end; t++) {
                    const float *const xs = x + t * x_row, *const column = packed.data();
                    float *const ys = y + t * y_row;
                    for (int64_t b = 0; b < k; b++) {
                        float sum = add ? ys[b] : 0;
#pragma omp simd reduction(+ : sum)
                        for (int64_t i = 0; i < size; i++) sum += xs[b * size + i] * column[b * size + i];
                        ys[b] = sum;
                    }
                }
            };
            d1 <= 8 ? dispatch<8>(d1, rows) : rows(std::integral_constant<int, 0>{});
        }
        for (int64_t t = begin; !columns_only && t < end; t += TOKENS)
            for (int64_t b = 0; b < k; b++) {
                float *const ys = y + t * y_row + b * d2;
                const float *const block = packed.data() + b * d1 * width;
                const Tile tile{x + t * x_row + b * d1,  ys, x_row, y_row, d1, d2, std::min(TOKENS, end - t),
                                t + 2 * TOKENS <= end};
                in_portions(tile.tokens, tile, [&](auto I, auto J, int64_t from, int64_t j) {
                    multiply<I, J>(tile, tile.x + from * x_row, ys + from * y_row + LANES * j, block + LANES * j, width,
                                   d2 - LANES * j, columns - b * d2 - LANES * j, add);
                });
            }
    }
    return 0;
}

// out[b] = x[:, b d1 : (b + 1) d1]^T y[:, b d2 : (b + 1) d2] for b < k; out is contiguous, (k, d1, d2).
// Rows of x and y are x_row and y_row floats apart. Whole vectors of y are read, at most LANES - 1 floats past a block:
// y_row must be at least LANES, and the last token, behind which there may be nothing, is added by itself.
// Tiles are summed first and then added up, so rounding grows with TOKENS + tokens / TOKENS, and the number of threads
// changes nothing. Returns 0, or 1 where memory ran out.
int diablo_gradient(const float *x, int64_t x_row, const float *y, int64_t y_row, int64_t tokens, float *out, int64_t k,
                    int64_t d1, int64_t d2) {
    const int64_t width = vectors(d2) * LANES, last = tokens - 1;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    try {
        const int64_t n = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t begin = k * me / n, end = k * (me + 1) / n;
        std::vector<float> all((end - begin) * d1 * width);
        for (int64_t t = 0; t < last; t += TOKENS)
            for (int64_t b = begin; b < end; b++) {
                const Tile tile{x + t * x_row + b * d1,     y + t * y_row + b * d2,    x_row, y_row, d1, d2,
                                std::min(TOKENS, last - t), t + 2 * TOKENS <= tokens};
                float *const sums = all.data() + (b - begin) * d1 * width;
                in_portions(d1, tile, [&](auto I, auto J, int64_t from, int64_t j) {
                    accumulate<I, J>(tile, tile.x + from, tile.y + LANES * j, sums + from * width + LANES * j, width);
                });
            }
        for (int64_t b = begin; b < end; b++)
            for (int64_t i = 0; i < d1; i++)
                for (int64_t j = 0; j < d2; j++)
                    out[(b * d1 + i) * d2 + j] = all[((b - begin) * d1 + i) * width + j] +
                                                 x[last * x_row + b * d1 + i] * y[last * y_row + b * d2 + j];
    } catch (const std::bad_alloc &) {
        failed = 1;
    }
    return failed;
}

// Entry (i, j) of block b of a weight lies at weight[b * step + i * input + j * output]; blocks is contiguous,
// (k, d1, d2).

// Copies the entries, adds the blocks to them and leaves the copy in *slot, which is empty. Returns 0, or 1 where memory
// ran out and nothing was done.
int diablo_write(float *weight, int64_t step, int64_t input, int64_t output, int64_t k, int64_t d1, int64_t d2,
                 const float *blocks, float **slot) {
    float *const kept = (float *)std::malloc(k * d1 * d2 * sizeof(float));
    if (!kept) return 1;
    each_entry(step, input, output, k, d1, d2, [=](int64_t place, int64_t block, int64_t keep) {
        kept[keep] = weight[place];
        weight[place] += blocks[block];
    });
    *slot = kept;
    return 0;
}

// Puts the copy in *slot back and frees it, if there is one.
void diablo_restore(float *weight, int64_t step, int64_t input, int64_t output, int64_t k, int64_t d1, int64_t d2,
                    float **slot) {
    const float *const kept = *slot;
    if (!kept) return;
    each_entry(step, input, output, k, d1, d2,
               [=](int64_t place, int64_t, int64_t keep) { weight[place] = kept[keep]; });
    std::free(*slot);
    *slot = nullptr;
}
}
