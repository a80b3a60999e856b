/* What the C files of the package share: their arguments, and the module that each of them is.

   Only the stable interface of Python is used, so that one build serves all its versions from 3.11 on. */

#ifndef DMAGENT_MODULE_H
#define DMAGENT_MODULE_H

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>

static PyObject *wrong_sizes(void)
{
    PyErr_SetString(PyExc_ValueError, "the arguments do not fit together");
    return NULL;
}

static int expects(Py_ssize_t given, Py_ssize_t expected)
{
    if (given == expected)
        return 0;
    PyErr_Format(PyExc_TypeError, "%zd arguments were expected, and %zd given", expected, given);
    return -1;
}

#define FUNCTION(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, name##_doc}

/* Defines the module `name` with its functions; for the number of the interface see _compiled.py. */
#define MODULE(name, doc, interface, ...)                                                                              \
    static PyMethodDef functions[] = {__VA_ARGS__, {NULL, NULL, 0, NULL}};                                             \
    static int add_interface(PyObject *module)                                                                         \
    {                                                                                                                  \
        return PyModule_AddIntConstant(module, "INTERFACE", interface);                                                \
    }                                                                                                                  \
    static PyModuleDef_Slot slots[] = {{Py_mod_exec, add_interface}, {0, NULL}};                                       \
    static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, #name, doc, 0, functions, slots, NULL, NULL, NULL};     \
    PyMODINIT_FUNC PyInit_##name(void)                                                                                 \
    {                                                                                                                  \
        return PyModuleDef_Init(&module);                                                                              \
    }

#endif
