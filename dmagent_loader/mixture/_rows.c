/* The loop of the order of rows: the shards and rows of draws.

   It gives what the Python code of `row_order.py` gives, which is in use where this module was not built. The samples
   of a run do not depend on that: integers wrap around as in numpy. Tests compare the two. */

#include "_columns.h"

#define ROUNDS 4
#define SMALLEST_NETWORK 16
#define TILES ((uint64_t)1 << 61)
#define FIRST_ROWS ((uint64_t)1 << 62)

static inline uint64_t mixed(uint64_t z)
{
    z = (z ^ (z >> 27)) * MULTIPLIER_2;
    return z >> 31;
}

/* See `mixture.hashing.scatter`. */
static int64_t scatter(uint64_t key, int64_t position, int64_t length)
{
    uint64_t largest = (uint64_t)(length < SMALLEST_NETWORK ? SMALLEST_NETWORK : length) - 1;
    int bits = 0;
    while (largest >> bits)
        bits++;
    int low_bits = bits >> 1;
    uint64_t low_mask = ((uint64_t)1 << low_bits) - 1, high_mask = ((uint64_t)1 << (bits - low_bits)) - 1;
    uint64_t value = (uint64_t)position;
    do {
        uint64_t high = value >> low_bits, low = value & low_mask, of_round = key;
        for (int i = 0; i < ROUNDS; i++) {
            of_round += GAMMA;
            high ^= mixed((low ^ of_round) * MULTIPLIER_1) & high_mask;
            of_round += GAMMA;
            low ^= mixed((high ^ of_round) * MULTIPLIER_1) & low_mask;
        }
        value = (high << low_bits) | low;
    } while (value >= (uint64_t)length);
    return (int64_t)value;
}

/* The row of a draw in the sequence of shards of its domain: see `mixture.shuffle.Lanes.locate`. */
static int64_t row_of(uint64_t key, int64_t position, int64_t rows, int64_t length, int64_t lanes, int64_t tile,
                      int64_t stride)
{
    int64_t turn = position / lanes;
    if (turn >= length) {
        int64_t first = length * lanes;
        return first + scatter(random_bits(key, (uint64_t)first - FIRST_ROWS), position - first, rows - first);
    }
    int64_t shift = (int64_t)(random_bits(key, (uint64_t)turn) >> 32);
    int64_t lane = ((position - turn * lanes) * stride + shift) % lanes;
    lane += lane < 0 ? lanes : 0; /* from 2**32 lanes on, the sum wraps around; numpy rounds down */
    int64_t begins = lane ? (int64_t)(random_bits(key, FIRST_ROWS + (uint64_t)lane) >> 32) : 0;
    int64_t place = (turn + begins) % length, begin = place / tile * tile, first = lane * length + begin;
    int64_t size = length - begin < tile ? length - begin : tile;
    return first + scatter(random_bits(key, TILES + (uint64_t)first), place - begin, size);
}

#if defined(__GNUC__) || defined(__clang__)
#define PREFETCH(place) __builtin_prefetch(place)
#else
#define PREFETCH(place) ((void)(place))
#endif

/* The last shard from `low` to `high` - 1 that does not begin after a place; it is sought from a likely one on, in
   growing steps. */
static int64_t shard_of(const int64_t *starts, int64_t low, int64_t high, int64_t likely, int64_t place)
{
    int64_t step = 1;
    if (starts[likely] <= place) {
        low = likely;
        while (step < high - low && starts[low + step] <= place)
            low += step, step *= 2;
        high = step < high - low ? low + step : high;
    } else {
        high = likely;
        while (step < high - low && starts[high - step] > place)
            high -= step, step *= 2;
        low = step < high - low ? high - step : low;
    }
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (starts[middle] <= place)
            low = middle;
        else
            high = middle;
    }
    return low;
}

PyDoc_STRVAR(locate_doc, "locate(shuffle, keys, num_rows, first_row, first_shard, order, starts, domain, draw, shard, "
                         "row)\n--\n\n"
                         "Shard and row of draws: see `RowOrders.locate`.\n\n"
                         "Args:\n"
                         "    shuffle: (3,) int64, lanes, rows of a tile, and stride (`Lanes`).\n"
                         "    keys: (D,) uint64, key of each domain.\n"
                         "    num_rows: (D,) int64, rows of each domain.\n"
                         "    first_row: (D,) int64, rows of all domains before each.\n"
                         "    first_shard: (D + 1,) int64, first shard of each domain, and the number of all.\n"
                         "    order, starts: (S,) int64, the shards, and the rows before each\n"
                         "        (`RowOrders._sequence`).\n"
                         "    domain, draw: (n,) int64, the draws.\n"
                         "    shard, row: (n,) int64, to be filled.");

static PyObject *locate(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Column columns[11];
    if (expects(nargs, 11) < 0 || take(args, 11, 2, columns) < 0)
        return NULL;
    const int64_t *shuffle = columns[0].data, *keys = columns[1].data, *num_rows = columns[2].data;
    const int64_t *first_row = columns[3].data, *first_shard = columns[4].data, *order = columns[5].data;
    const int64_t *starts = columns[6].data, *domain = columns[7].data, *draw = columns[8].data;
    int64_t *shard = columns[9].data, *row = columns[10].data;
    Py_ssize_t domains = columns[2].size, shards = columns[5].size, count = columns[7].size;
    PyObject *result = NULL;
    if (columns[0].size != 3 || columns[1].size != domains || columns[3].size != domains ||
        columns[4].size != domains + 1 || first_shard[domains] != shards || columns[6].size != shards ||
        columns[8].size != count || columns[9].size != count || columns[10].size != count || shuffle[0] < 1 ||
        shuffle[1] < 1) {
        wrong_sizes();
        goto done;
    }
    /* A million shards do not fit into the caches of a core, so in each of three turns the memory for the next one is
       asked for. A row is likely in the shard where it would be if all shards of its domain had as many rows. */
    for (Py_ssize_t i = 0; i < count; i++) {
        int64_t of = domain[i];
        if (of < 0 || of >= domains || num_rows[of] < 1 || draw[i] < 0) {
            wrong_sizes();
            goto done;
        }
        int64_t rows = num_rows[of], epoch = draw[i] / rows, own_shards = first_shard[of + 1] - first_shard[of];
        int64_t place = row_of(random_bits((uint64_t)keys[of], (uint64_t)epoch), draw[i] - epoch * rows, rows,
                               rows / shuffle[0], shuffle[0], shuffle[1], shuffle[2]);
        int64_t likely = (int64_t)((double)place / (double)rows * (double)own_shards);
        row[i] = first_row[of] + place;
        shard[i] = first_shard[of] + (likely < own_shards ? likely : own_shards - 1);
        PREFETCH(&starts[shard[i]]);
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        shard[i] = shard_of(starts, first_shard[domain[i]], first_shard[domain[i] + 1], shard[i], row[i]);
        PREFETCH(&order[shard[i]]);
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        row[i] -= starts[shard[i]];
        shard[i] = order[shard[i]];
    }
    result = Py_NewRef(Py_None);
done:
    release(columns, 11);
    return result;
}

MODULE(_rows, "Loops of the order of rows, in C.", 1, FUNCTION(locate))
