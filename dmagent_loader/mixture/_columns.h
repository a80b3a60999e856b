/* Arrays of 8-byte numbers as arguments, and the random numbers of `hashing.py`, for the C files beside this one. */

#ifndef DMAGENT_COLUMNS_H
#define DMAGENT_COLUMNS_H

#include "../_module.h"

#define GAMMA 0x9E3779B97F4A7C15ULL
#define MULTIPLIER_1 0xBF58476D1CE4E5B9ULL
#define MULTIPLIER_2 0x94D049BB133111EBULL

static inline uint64_t random_bits(uint64_t key, uint64_t counter)
{
    uint64_t z = counter * GAMMA + key;
    z = (z ^ (z >> 30)) * MULTIPLIER_1;
    z = (z ^ (z >> 27)) * MULTIPLIER_2;
    return z ^ (z >> 31);
}

/* Arguments: arrays of 8-byte numbers. */

typedef struct {
    Py_buffer view;
    int64_t *data;
    Py_ssize_t size;
} Column;

static void release(Column *columns, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        PyBuffer_Release(&columns[i].view);
}

/* Takes `count` arrays, the last `written` of which are written to. */
static int take(PyObject *const *args, Py_ssize_t count, Py_ssize_t written, Column *columns)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        int flags = i < count - written ? PyBUF_SIMPLE : PyBUF_WRITABLE;
        if (PyObject_GetBuffer(args[i], &columns[i].view, flags) < 0) {
            release(columns, i);
            return -1;
        }
        if (columns[i].view.itemsize != sizeof(int64_t)) {
            PyErr_SetString(PyExc_TypeError, "an array has no numbers of 8 bytes");
            release(columns, i + 1);
            return -1;
        }
        columns[i].data = columns[i].view.buf;
        columns[i].size = columns[i].view.len / (Py_ssize_t)sizeof(int64_t);
    }
    return 0;
}

#endif
