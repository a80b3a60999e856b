/* The loops of reading: where the rows of a batch lie, and their bytes.

   Each function does what Python code beside its caller does (`array_rows.py`), which is in use where this module was
   not built. */

#include "../_module.h"

#include <errno.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>

/* A row to read. */
typedef struct {
    int descriptor;
    off_t offset;
} Place;

typedef enum { WHOLE, NOT_WHOLE, INTERRUPTED } Outcome;

/* Reads the head and the body of a row. */
static Outcome read_row(Place place, char *head, size_t head_size, char *body, size_t body_size)
{
    struct iovec parts[2] = {{head, head_size}, {body, body_size}};
    ssize_t taken = preadv(place.descriptor, parts, 2, place.offset);
    if (taken < 0 && errno == EINTR)
        return INTERRUPTED;
    return taken == (ssize_t)(head_size + body_size) ? WHOLE : NOT_WHOLE;
}

PyDoc_STRVAR(read_rows_doc, "read_rows(descriptors, offsets, heads, bodies)\n--\n\n"
                            "Reads the rows of a batch, which have the same size.\n\n"
                            "Other threads run meanwhile. They take turns once, and not once for each row.\n\n"
                            "Args:\n"
                            "    descriptors: List of n descriptors of open files.\n"
                            "    offsets: List of n offsets in them.\n"
                            "    heads, bodies: Memory for the first bytes of all rows, and for all others.\n\n"
                            "Returns:\n"
                            "    Whether all were read whole.\n\n"
                            "Raises:\n"
                            "    Exception: A handler of a signal has raised it, such as KeyboardInterrupt.");

static PyObject *read_rows(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (expects(nargs, 4) < 0)
        return NULL;
    Py_ssize_t count = PyList_Size(args[0]), offsets = PyList_Size(args[1]);
    if (count < 0 || offsets < 0)
        return NULL;
    if (count != offsets || count == 0)
        return wrong_sizes();
    Py_buffer heads, bodies;
    if (PyObject_GetBuffer(args[2], &heads, PyBUF_WRITABLE) < 0)
        return NULL;
    if (PyObject_GetBuffer(args[3], &bodies, PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(&heads);
        return NULL;
    }
    PyObject *result = NULL;
    Place *places = malloc((size_t)count * sizeof *places);
    if (!places) {
        PyErr_NoMemory();
        goto done;
    }
    if (heads.len % count || bodies.len % count) {
        wrong_sizes();
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        places[i].descriptor = (int)PyLong_AsLong(PyList_GetItem(args[0], i));
        places[i].offset = (off_t)PyLong_AsLongLong(PyList_GetItem(args[1], i));
    }
    if (PyErr_Occurred())
        goto done;
    size_t head_size = (size_t)(heads.len / count), body_size = (size_t)(bodies.len / count);
    Outcome outcome = WHOLE;
    Py_ssize_t row = 0;
    do {
        Py_BEGIN_ALLOW_THREADS
        for (; row < count; row++) {
            outcome = read_row(places[row], (char *)heads.buf + (size_t)row * head_size, head_size,
                               (char *)bodies.buf + (size_t)row * body_size, body_size);
            if (outcome != WHOLE)
                break;
        }
        Py_END_ALLOW_THREADS
        if (outcome == INTERRUPTED && PyErr_CheckSignals() < 0)
            goto done;
    } while (outcome == INTERRUPTED);
    result = PyBool_FromLong(outcome == WHOLE);
done:
    free(places);
    PyBuffer_Release(&heads);
    PyBuffer_Release(&bodies);
    return result;
}

/* The number at a place of a column whose type has this letter in the buffer protocol. */
static inline int64_t number_at(const char *place, char type)
{
    switch (type) {
    case 'b':
        return *(const signed char *)place;
    case 'B':
        return *(const unsigned char *)place;
    case 'h':
        return *(const short *)place;
    case 'H':
        return *(const unsigned short *)place;
    case 'i':
        return *(const int *)place;
    case 'I':
        return *(const unsigned int *)place;
    case 'l':
        return *(const long *)place;
    case 'L':
        return (int64_t) * (const unsigned long *)place;
    default:
        return *(const int64_t *)place;
    }
}

static int is_known(char type)
{
    return type && strchr("bBhHiIlLqQ", type) != NULL;
}

PyDoc_STRVAR(gather_doc, "gather(tables, ends, rows, found)\n--\n\n"
                         "Looks up rows in the tables of their shards.\n\n"
                         "Args:\n"
                         "    tables: List of T tuples of C columns of integers; None: its rows are skipped.\n"
                         "    ends: (T,) int64, the end of the rows of each table among all.\n"
                         "    rows: (n,) int64, rows, table by table.\n"
                         "    found: (C, n) int64, to be filled.");

static PyObject *gather(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (expects(nargs, 4) < 0)
        return NULL;
    Py_ssize_t tables = PyList_Size(args[0]), taken = 0;
    if (tables < 0)
        return NULL;
    Py_buffer views[3];
    for (; taken < 3; taken++)
        if (PyObject_GetBuffer(args[1 + taken], &views[taken], taken < 2 ? PyBUF_SIMPLE : PyBUF_WRITABLE) < 0)
            goto done;
    const int64_t *ends = views[0].buf, *rows = views[1].buf;
    int64_t *found = views[2].buf;
    Py_ssize_t count = views[1].len / 8, columns = count ? views[2].len / 8 / count : 0, begin = 0;
    if (views[0].len != 8 * tables || views[2].len != 8 * columns * count) {
        wrong_sizes();
        goto done;
    }
    for (Py_ssize_t table = 0; count && table < tables; begin = ends[table++]) {
        PyObject *its = PyList_GetItem(args[0], table);
        if (ends[table] < begin || ends[table] > count) {
            wrong_sizes();
            goto done;
        }
        if (its == Py_None)
            continue;
        if (PyTuple_Size(its) != columns) {
            if (!PyErr_Occurred())
                wrong_sizes();
            goto done;
        }
        for (Py_ssize_t column = 0; column < columns; column++) {
            Py_buffer view;
            if (PyObject_GetBuffer(PyTuple_GetItem(its, column), &view, PyBUF_STRIDES | PyBUF_FORMAT) < 0)
                goto done;
            char type = view.format && !view.format[1] ? view.format[0] : 0;
            int fits = view.ndim == 1 && is_known(type);
            for (int64_t i = begin; fits && i < ends[table]; i++) {
                fits = rows[i] >= 0 && rows[i] < view.shape[0];
                if (fits)
                    found[column * count + i] = number_at((const char *)view.buf + rows[i] * view.strides[0], type);
            }
            PyBuffer_Release(&view);
            if (!fits) {
                wrong_sizes();
                goto done;
            }
        }
    }
done:
    while (taken > 0)
        PyBuffer_Release(&views[--taken]);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

MODULE(_reading, "Loops of reading, in C.", 1, FUNCTION(read_rows), FUNCTION(gather))
