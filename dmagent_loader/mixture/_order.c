/* The loops of the order of domains: the tree of a mix, and the domains of a range.

   Each function gives what Python code beside its caller gives (`mix_tree.py`, `domain_order.py`), which is in use
   where this module was not built. The samples of a run do not depend on that: integers wrap around, and floating-point
   numbers are rounded, as in numpy (see the options of the compiler in setup.py). Tests compare the two. */

#include "_columns.h"

#include <math.h>

#define RESOLUTION_BITS 30
#define RESOLUTION ((int64_t)1 << RESOLUTION_BITS)
#define DOMAIN_BITS 32
#define UNUSED_BITS 34 /* of the 64 random ones of a threshold */
#define DISCREPANCY 1.25

/* Rows of the table of a tree, of one number for each node. */
enum { LOW, SPLIT, HIGH, HEAVIER, LIGHTER, IS_LEFT, TOTAL, MINOR, LOWEST, WIDTH, ROWS };

/* The tree of a mix. */

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

typedef struct {
    double rounding, irregular;
} Error;

/* The first number from `low` to `high` whose `before` is not below `value`. */
static int64_t first_not_below(const int64_t *before, int64_t value, int64_t low, int64_t high)
{
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (before[middle] < value)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Fills the rows of the table, and the first node of each level, whose number is returned. */
static int64_t grow_nodes(const int64_t *before, int64_t leaves, int64_t *table, Error *errors, double *freedom,
                          int64_t *levels)
{
    int64_t nodes = leaves - 1, known = nodes > 0, count = 1;
    int64_t *low = table + LOW * nodes, *split = table + SPLIT * nodes, *high = table + HIGH * nodes;
    int64_t *heavier = table + HEAVIER * nodes, *lighter = table + LIGHTER * nodes;
    levels[0] = 0;
    if (nodes > 0) {
        low[0] = 0, high[0] = leaves;
        errors[0] = (Error){0.0, 0.0};
    }
    for (int64_t node = 0; node < known; node++) {
        if (node == levels[count - 1])
            levels[count++] = known;
        int64_t start = before[low[node]], stop = before[high[node]], at = low[node] + 1;
        if (at + 1 < high[node]) {
            at = first_not_below(before, (start + stop + 1) / 2, low[node], high[node]);
            if (at - 1 > low[node] && before[at - 1] + before[at] >= start + stop)
                at--;
        }
        split[node] = at;
        int64_t whole = stop - start, left = before[at] - start;
        int64_t right = whole - left, minor = left < right ? left : right;
        double added = (1.0 - (double)minor / (double)whole) / 2.0, share = (double)left / (double)whole;
        int64_t children[2];
        for (int side = 0; side < 2; side++) {
            int64_t first = side ? at : low[node], last = side ? high[node] : at;
            double part = side ? 1.0 - share : share;
            Error error = {0.5 + part * errors[node].rounding, added + part * errors[node].irregular};
            if (last - first == 1) {
                freedom[first] = (DISCREPANCY - error.rounding) / error.irregular;
                children[side] = ~first;
            } else {
                low[known] = first, high[known] = last, errors[known] = error;
                children[side] = known++;
            }
        }
        int is_left = left <= right;
        table[IS_LEFT * nodes + node] = is_left;
        lighter[node] = children[is_left ? 0 : 1], heavier[node] = children[is_left ? 1 : 0];
        table[TOTAL * nodes + node] = whole, table[MINOR * nodes + node] = minor;
    }
    /* The strictest leaf below a node, from the last node to the root; `errors` is not needed any more. */
    for (int64_t node = nodes - 1; node >= 0; node--) {
        int64_t ones[2] = {heavier[node], lighter[node]};
        double least = 1.0;
        for (int side = 0; side < 2; side++) {
            double its = ones[side] < 0 ? freedom[~ones[side]] : errors[ones[side]].rounding;
            least = its < least ? its : least;
        }
        errors[node].rounding = least;
        int64_t minor = table[MINOR * nodes + node], slack = table[TOTAL * nodes + node] - minor;
        int64_t width = (int64_t)((double)slack * (least > 0.0 ? least : 0.0));
        table[WIDTH * nodes + node] = width;
        table[LOWEST * nodes + node] = ((minor + 1) >> 1) + ((slack - width) >> 1);
    }
    return count;
}

PyDoc_STRVAR(grow_doc, "grow(quanta, leaves, table)\n--\n\n"
                       "Grows the tree of a mix: see `mixture.mix_tree.grow`.\n\n"
                       "Args:\n"
                       "    quanta: (D,) int64, the mix, which sums to 2**30.\n"
                       "    leaves: (L,) int64, to be filled with the leaves.\n"
                       "    table: (10, L - 1) int64, to be filled with the columns of `MixTree`.\n\n"
                       "Returns:\n"
                       "    First node of each level, and the number of nodes.");

static PyObject *grow(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Column columns[3];
    if (expects(nargs, 3) < 0 || take(args, 3, 2, columns) < 0)
        return NULL;
    Column quanta = columns[0], leaves = columns[1], table = columns[2];
    Py_ssize_t size = leaves.size, found = 0;
    PyObject *result = NULL;
    int64_t *before = malloc((size_t)(size + 1) * sizeof *before);
    int64_t *levels = malloc((size_t)(size + 2) * sizeof *levels);
    Error *errors = malloc((size_t)(size + 1) * sizeof *errors);
    double *freedom = malloc((size_t)(size + 1) * sizeof *freedom);
    if (!before || !levels || !errors || !freedom) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t domain = 0; domain < quanta.size; domain++)
        if (quanta.data[domain]) {
            if (found == size || quanta.data[domain] < 0 || quanta.data[domain] > RESOLUTION) {
                wrong_sizes();
                goto done;
            }
            /* Heaviest first; of equal ones, the first first. */
            leaves.data[found++] = ((RESOLUTION - quanta.data[domain]) << DOMAIN_BITS) | domain;
        }
    if (size < 1 || found != size || table.size != ROWS * (size - 1)) {
        wrong_sizes();
        goto done;
    }
    qsort(leaves.data, (size_t)size, sizeof *leaves.data, compare);
    before[0] = 0;
    for (Py_ssize_t leaf = 0; leaf < size; leaf++) {
        leaves.data[leaf] &= ((int64_t)1 << DOMAIN_BITS) - 1;
        before[leaf + 1] = before[leaf] + quanta.data[leaves.data[leaf]];
    }
    int64_t count = grow_nodes(before, size, table.data, errors, freedom, levels);
    result = PyList_New(count);
    for (int64_t level = 0; result && level < count; level++) {
        PyObject *number = PyLong_FromLongLong(levels[level]);
        if (!number || PyList_SetItem(result, level, number) < 0)
            Py_CLEAR(result);
    }
done:
    free(before), free(levels), free(errors), free(freedom);
    release(columns, 3);
    return result;
}

/* The order of domains. */

PyDoc_STRVAR(prepare_doc, "prepare(key, carry, leaves, table, keys, shift)\n--\n\n"
                          "Fills the key of each node, and the carry of its lighter child: see `DomainOrder`.\n\n"
                          "Args:\n"
                          "    key: Key of the random stream.\n"
                          "    carry: (D,) int64, debts.\n"
                          "    leaves, table: As `grow` has filled them.\n"
                          "    keys: (L - 1,) uint64, to be filled.\n"
                          "    shift: (L - 1,) int64, to be filled.");

static PyObject *prepare(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Column columns[5];
    if (expects(nargs, 6) < 0)
        return NULL;
    uint64_t key = PyLong_AsUnsignedLongLong(args[0]);
    if (PyErr_Occurred() || take(args + 1, 5, 2, columns) < 0)
        return NULL;
    Column carry = columns[0], leaves = columns[1], table = columns[2], keys = columns[3], shift = columns[4];
    Py_ssize_t nodes = leaves.size - 1;
    PyObject *result = NULL;
    int64_t *owed = malloc((size_t)(leaves.size + 1) * sizeof *owed);
    if (!owed) {
        PyErr_NoMemory();
        goto done;
    }
    if (nodes < 0 || table.size != ROWS * nodes || keys.size != nodes || shift.size != nodes) {
        wrong_sizes();
        goto done;
    }
    uint64_t sum = 0; /* which may wrap around, as numpy's does */
    owed[0] = 0;
    for (Py_ssize_t leaf = 0; leaf < leaves.size; leaf++) {
        if (leaves.data[leaf] < 0 || leaves.data[leaf] >= carry.size) {
            wrong_sizes();
            goto done;
        }
        sum += (uint64_t)carry.data[leaves.data[leaf]];
        owed[leaf + 1] = (int64_t)sum;
    }
    for (Py_ssize_t node = 0; node < nodes; node++) {
        int64_t low = owed[table.data[LOW * nodes + node]], split = owed[table.data[SPLIT * nodes + node]];
        int64_t high = owed[table.data[HIGH * nodes + node]];
        int64_t of_minor = table.data[IS_LEFT * nodes + node] ? split - low : high - split;
        double due = (double)of_minor / (double)RESOLUTION * (double)table.data[TOTAL * nodes + node];
        double share = (double)table.data[MINOR * nodes + node] * ((double)(high - low) / (double)RESOLUTION);
        shift.data[node] = (int64_t)rint(due - share);
        keys.data[node] = (int64_t)random_bits(key, (uint64_t)node);
    }
    result = Py_NewRef(Py_None);
done:
    free(owed);
    release(columns, 5);
    return result;
}

typedef struct {
    int64_t received, to_lighter, next; /* `next`: number received with which the lighter child gets its next sample */
    int64_t lighter, heavier, total, minor, rest, lowest, width;
    uint64_t key;
} Node;

static inline int64_t next_passed(const Node *node)
{
    uint64_t bits = random_bits(node->key, (uint64_t)node->to_lighter) >> UNUSED_BITS;
    int64_t drawn = (int64_t)((bits * (uint64_t)node->width) >> RESOLUTION_BITS);
    /* A quotient below 0 is rounded another way than by numpy, and replaced as well. */
    int64_t next = (node->to_lighter * node->total + drawn + node->rest) / node->minor;
    return next > node->to_lighter + 1 ? next : node->to_lighter + 1;
}

PyDoc_STRVAR(follow_doc, "follow(table, leaves, keys, shift, before, after, domain, rank)\n--\n\n"
                         "The samples of a range, one after the other: see `DomainOrder._locate_range`.\n\n"
                         "Args:\n"
                         "    table, leaves, keys, shift: As `grow` and `prepare` have filled them.\n"
                         "    before: (2 L - 1,) int64, samples that each node and, from the end on, each leaf has\n"
                         "        received before the range.\n"
                         "    after: (2 L - 1,) int64, to be filled with those that it has received after it.\n"
                         "    domain, rank: (n,) int64, to be filled for each sample of the range.");

static PyObject *follow(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Column columns[8];
    if (expects(nargs, 8) < 0 || take(args, 8, 3, columns) < 0)
        return NULL;
    const int64_t *table = columns[0].data, *leaves = columns[1].data, *keys = columns[2].data;
    const int64_t *shift = columns[3].data, *before = columns[4].data;
    int64_t *after = columns[5].data, *domain = columns[6].data, *rank = columns[7].data;
    Py_ssize_t nodes = columns[1].size - 1, samples = columns[6].size;
    PyObject *result = NULL;
    Node *tree = NULL;
    if (nodes < 1 || columns[0].size != ROWS * nodes || columns[2].size != nodes || columns[3].size != nodes ||
        columns[4].size != 2 * nodes + 1 || columns[5].size != 2 * nodes + 1 || columns[7].size != samples) {
        wrong_sizes();
        goto done;
    }
    tree = malloc((size_t)nodes * sizeof *tree);
    if (!tree) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t node = 0; node < nodes; node++) {
        Node *its = &tree[node];
        its->lighter = table[LIGHTER * nodes + node], its->heavier = table[HEAVIER * nodes + node];
        its->total = table[TOTAL * nodes + node], its->minor = table[MINOR * nodes + node];
        its->lowest = table[LOWEST * nodes + node], its->width = table[WIDTH * nodes + node];
        its->key = (uint64_t)keys[node];
        its->rest = its->lowest - shift[node] + its->minor - 1;
        its->received = before[node];
        its->to_lighter = before[its->lighter < 0 ? 2 * nodes + 1 + its->lighter : its->lighter];
        its->next = next_passed(its);
    }
    int64_t *of_leaves = after + 2 * nodes + 1; /* counted from the end, as the numbers of leaves are */
    for (Py_ssize_t leaf = 1; leaf <= nodes + 1; leaf++)
        of_leaves[-leaf] = before[2 * nodes + 1 - leaf];
    for (Py_ssize_t sample = 0; sample < samples; sample++) {
        int64_t at = 0;
        while (at >= 0) {
            Node *node = &tree[at];
            if (++node->received == node->next) {
                node->to_lighter++;
                node->next = next_passed(node);
                at = node->lighter;
            } else
                at = node->heavier;
        }
        domain[sample] = leaves[~at];
        rank[sample] = of_leaves[at]++;
    }
    for (Py_ssize_t node = 0; node < nodes; node++)
        after[node] = tree[node].received;
    result = Py_NewRef(Py_None);
done:
    free(tree);
    release(columns, 8);
    return result;
}

MODULE(_order, "Loops of the order of domains, in C.", 2, FUNCTION(grow), FUNCTION(prepare), FUNCTION(follow))
