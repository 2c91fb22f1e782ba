/* The part of libesp_rmaker_ota that has to be C: starting Python, the last error of each thread, waiting, restarting.
 *
 * Every other function of the headers is a forward (forward.c, generated): rmaker_ota_c_python(), then its body in
 * bodies.py through cffi. We start Python ourselves instead of having cffi do it at the first call, because then
 *   - it is the interpreter of the environment this library belongs to, whatever PATH and PYTHONHOME say,
 *   - a failure is an esp_err_t with a sentence, not a zero and text on standard error,
 *   - the library also works inside a process that runs Python already: cffi's own start waits there for ever once
 *     Python 3.11 has given PyCapsule a version tag.
 *
 * Defined at build: RMAKER_OTA_VERSION, RMAKER_OTA_PYTHON_BUILT_WITH (path of an interpreter),
 * RMAKER_OTA_LIBPYTHON (file name of the shared libpython). */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "host.h"

PyMODINIT_FUNC PyInit__c_abi(void); /* made by cffi, in this library */
void rmaker_ota_py_at_exit(void);   /* a body */

esp_event_base_t const RMAKER_OTA_EVENT = "RMAKER_OTA_EVENT";
esp_event_base_t const RMAKER_COMMON_EVENT = "RMAKER_COMMON_EVENT";
esp_event_base_t const RMAKER_EVENT = "RMAKER_EVENT";

/* ---- Small ones -------------------------------------------------------------------------------------------------- */

const char *rmaker_ota_version(void) {
    return RMAKER_OTA_VERSION;
}

const char *esp_err_to_name(esp_err_t code) {
    for (size_t i = 0; i < rmaker_ota_c_name_count; i++) {
        if (rmaker_ota_c_names[i].code == code) {
            return rmaker_ota_c_names[i].name;
        }
    }
    return "UNKNOWN ERROR";
}

#define ERROR_SIZE 1024

static _Thread_local char last_error[ERROR_SIZE];

const char *rmaker_ota_last_error(void) {
    return last_error;
}

/* Copies a text and ends it with NUL. A cut does not leave half a UTF-8 character. */
static void copy_text(char *to, size_t size, const char *text) {
    size_t len = strlen(text);
    if (len >= size) {
        len = size - 1;
        while (len > 0 && ((unsigned char)text[len] & 0xc0) == 0x80) {
            len--;
        }
    }
    memmove(to, text, len);
    to[len] = '\0';
}

void rmaker_ota_c_set_error(const char *text) {
    copy_text(last_error, sizeof(last_error), text);
}

/* ---- Waiting for the end ----------------------------------------------------------------------------------------- */

/* Two counters of the kernel: `ended` can be read from the end of a node until the next one is opened, `woken` while a
 * call of rmaker_ota_wake() has not been noticed. Made when the library is loaded, so that a signal handler finds them;
 * never closed, so that whoever waits needs no lock. */
static int ended_fd = -1;
static int woken_fd = -1;

static pthread_mutex_t end_lock = PTHREAD_MUTEX_INITIALIZER;
static bool was_opened;
static rmaker_ota_end_t end_kind;
static char end_text[ERROR_SIZE];

__attribute__((constructor)) static void make_counters(void) {
    ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    woken_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

static bool take(int fd) {
    uint64_t count;
    return read(fd, &count, sizeof(count)) == (ssize_t)sizeof(count);
}

static void give(int fd) {
    const uint64_t one = 1;
    ssize_t written;
    do {
        written = write(fd, &one, sizeof(one));
    } while (written < 0 && errno == EINTR);
}

void rmaker_ota_c_opened(void) {
    pthread_mutex_lock(&end_lock);
    was_opened = true;
    take(ended_fd);
    pthread_mutex_unlock(&end_lock);
}

void rmaker_ota_c_ended(rmaker_ota_end_t end, const char *text) {
    pthread_mutex_lock(&end_lock);
    end_kind = end;
    copy_text(end_text, sizeof(end_text), text);
    give(ended_fd);
    pthread_mutex_unlock(&end_lock);
}

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

esp_err_t rmaker_ota_wait(int timeout_ms, rmaker_ota_end_t *end) {
    if (ended_fd < 0 || woken_fd < 0) {
        rmaker_ota_c_set_error(
            "rmaker_ota_wait: ESP_FAIL: there were no file descriptors left when the program started");
        return ESP_FAIL;
    }
    pthread_mutex_lock(&end_lock);
    bool opened = was_opened;
    pthread_mutex_unlock(&end_lock);
    if (!opened) {
        rmaker_ota_c_set_error("rmaker_ota_wait: ESP_ERR_INVALID_STATE: no node was opened");
        return ESP_ERR_INVALID_STATE;
    }
    int64_t deadline = now_ms() + timeout_ms;
    struct pollfd fds[2] = {{ended_fd, POLLIN, 0}, {woken_fd, POLLIN, 0}};
    for (;;) {
        int64_t left = timeout_ms < 0 ? -1 : deadline - now_ms();
        int ready = poll(fds, 2, timeout_ms < 0 ? -1 : left > 0 ? (int)left : 0);
        if (ready < 0 && errno != EINTR) {
            rmaker_ota_c_set_error("rmaker_ota_wait: ESP_FAIL: poll failed");
            return ESP_FAIL;
        }
        if (ready > 0 && fds[0].revents != 0) {
            pthread_mutex_lock(&end_lock);
            rmaker_ota_end_t kind = end_kind;
            if (kind == RMAKER_OTA_END_FAILED) {
                copy_text(last_error, sizeof(last_error), end_text);
            }
            pthread_mutex_unlock(&end_lock);
            if (end != NULL) {
                *end = kind;
            }
            return ESP_OK;
        }
        if (ready > 0 && take(woken_fd)) {
            if (end != NULL) {
                *end = RMAKER_OTA_END_WOKEN;
            }
            return ESP_OK;
        }
        if (ready == 0) {
            rmaker_ota_c_set_error("rmaker_ota_wait: ESP_ERR_TIMEOUT: the node runs");
            return ESP_ERR_TIMEOUT;
        }
    }
}

void rmaker_ota_wake(void) {
    /* Only what signal-safety(7) allows. */
    int saved = errno;
    give(woken_fd);
    errno = saved;
}

/* ---- Running the program anew ------------------------------------------------------------------------------------ */

static bool pipe_signal_is_ours; /* we made it ignored */

static char *read_command_line(size_t *size) {
    int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    char *text = NULL;
    size_t len = 0, capacity = 0;
    bool ok = fd >= 0;
    while (ok) {
        if (len == capacity) {
            capacity = capacity == 0 ? 4096 : 2 * capacity;
            char *larger = realloc(text, capacity + 1);
            if (larger == NULL) {
                ok = false;
                break;
            }
            text = larger;
        }
        ssize_t got = read(fd, text + len, capacity - len);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            ok = got == 0;
            break;
        }
        len += (size_t)got;
    }
    int saved = errno;
    if (fd >= 0) {
        close(fd);
    }
    if (!ok) {
        free(text);
        errno = saved;
        return NULL;
    }
    text[len] = '\0';
    *size = len;
    return text;
}

int rmaker_ota_c_exec(void) {
    static const char deleted[] = " (deleted)"; /* the file was replaced, as updates do: run the new one */
    char program[PATH_MAX];
    ssize_t got = readlink("/proc/self/exe", program, sizeof(program) - 1);
    if (got < 0) {
        return errno;
    }
    program[got] = '\0';
    size_t mark = sizeof(deleted) - 1;
    if ((size_t)got > mark && strcmp(program + got - mark, deleted) == 0 && access(program, X_OK) != 0) {
        program[(size_t)got - mark] = '\0';
    }

    int result = ENOMEM;
    size_t size;
    char *text = read_command_line(&size);
    if (text == NULL) {
        return errno;
    }
    size_t count = 0;
    for (size_t i = 0; i < size; i++) {
        count += text[i] == '\0';
    }
    char **argv = calloc(count + 2, sizeof(*argv));
    if (argv == NULL) {
        goto done;
    }
    size_t n = 0;
    for (size_t at = 0; at < size; at += strlen(text + at) + 1) {
        argv[n++] = text + at;
    }
    fflush(NULL);
    if (pipe_signal_is_ours) {
        signal(SIGPIPE, SIG_DFL); /* ignored signals survive exec */
    }
    execv(program, argv);
    result = errno;
    if (pipe_signal_is_ours) {
        signal(SIGPIPE, SIG_IGN);
    }
done:
    free(argv);
    free(text);
    return result;
}

/* ---- Starting Python --------------------------------------------------------------------------------------------- */

enum {
    PYTHON_UNTRIED,
    PYTHON_RUNS,
    PYTHON_FAILED
};

static atomic_int python_state = PYTHON_UNTRIED;
static pthread_mutex_t python_lock = PTHREAD_MUTEX_INITIALIZER;
static char python_error[ERROR_SIZE]; /* why it failed; written once */

/* The file this library was loaded from, without links. */
static bool own_path(char path[PATH_MAX]) {
    Dl_info info;
    return dladdr((void *)&python_lock, &info) != 0 && info.dli_fname != NULL && realpath(info.dli_fname, path) != NULL;
}

/* Cuts the last `count` names off a path; false when there are not as many. */
static bool go_up(char *path, int count) {
    for (; count > 0; count--) {
        char *slash = strrchr(path, '/');
        if (slash == NULL || slash == path) {
            return false;
        }
        *slash = '\0';
    }
    return true;
}

/* The directory the package rmaker_ota lies in, when this library lies in rmaker_ota/embed/lib; otherwise "". */
static void find_package(char root[PATH_MAX]) {
    static const char place[] = "/rmaker_ota/embed/lib";
    if (own_path(root) && go_up(root, 1)) {
        size_t len = strlen(root), tail = sizeof(place) - 1;
        if (len > tail && strcmp(root + len - tail, place) == 0) {
            root[len - tail] = '\0';
            return;
        }
    }
    root[0] = '\0';
}

static void python_failed(const char *what, const char *which, const char *why) {
    snprintf(python_error, sizeof(python_error), "Python cannot be used: %.100s%.300s: %.500s", what, which,
             why != NULL ? why : "no reason given");
}

/* The interpreter whose environment Python is to have; "" leaves it to Python itself. */
static bool find_interpreter(const char *root, char python[PATH_MAX]) {
    const char *wanted = getenv("RMAKER_OTA_PYTHON");
    if (wanted != NULL && wanted[0] != '\0') {
        copy_text(python, PATH_MAX, wanted);
        if (access(python, X_OK) != 0) { /* Python would take its default one, without a word */
            python_failed("RMAKER_OTA_PYTHON=", python, strerror(errno));
            return false;
        }
        return true;
    }
    /* PREFIX/lib/python3.11/site-packages: installed, from wherever the library was built. */
    const char *name = strrchr(root, '/');
    if (name != NULL && strcmp(name, "/site-packages") == 0) {
        char prefix[PATH_MAX];
        copy_text(prefix, sizeof(prefix), root);
        if (go_up(prefix, 3) &&
            snprintf(python, PATH_MAX, "%s/bin/python%d.%d", prefix, PY_MAJOR_VERSION, PY_MINOR_VERSION) < PATH_MAX &&
            access(python, X_OK) == 0) {
            return true;
        }
    }
    copy_text(python, PATH_MAX, access(RMAKER_OTA_PYTHON_BUILT_WITH, X_OK) == 0 ? RMAKER_OTA_PYTHON_BUILT_WITH : "");
    return true;
}

static bool initialize(const char *interpreter) {
    /* Isolated: no variables of the environment, no user site, no signal handlers, and the program's locale stays. */
    PyPreConfig before;
    PyPreConfig_InitIsolatedConfig(&before);
    before.utf8_mode = 1; /* file names and texts, whatever the locale */
    const char *allocator = getenv("PYTHONMALLOC");
    if (allocator != NULL && strcmp(allocator, "malloc") == 0) {
        before.allocator = PYMEM_ALLOCATOR_MALLOC; /* for valgrind */
    }
    PyStatus status = Py_PreInitialize(&before);
    if (PyStatus_Exception(status)) {
        python_failed("its start", "", status.err_msg);
        return false;
    }
    PyConfig config;
    PyConfig_InitIsolatedConfig(&config);
    if (interpreter[0] != '\0') {
        status = PyConfig_SetBytesString(&config, &config.program_name, interpreter);
    }
    if (!PyStatus_Exception(status)) {
        status = Py_InitializeFromConfig(&config);
    }
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status)) {
        python_failed("its start as ", interpreter[0] != '\0' ? interpreter : "the default one", status.err_msg);
        return false;
    }
    PyEval_SaveThread();
    return true;
}

/* Keeps the sentence of the exception that is set, and clears it. */
static void take_exception(const char *what) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    PyObject *text = value != NULL ? PyObject_Str(value) : NULL;
    const char *utf8 = text != NULL ? PyUnicode_AsUTF8(text) : NULL;
    python_failed(what, "", utf8);
    PyErr_Clear();
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

/* import rmaker_ota.embed.bodies, from the package this library belongs to, and have it define the bodies. */
static bool define_bodies(const char *root, bool is_ours) {
    bool ok = false;
    PyObject *place = NULL, *module = NULL, *bodies = NULL, *ffi = NULL, *lib = NULL, *done = NULL;
    PyObject *path = PySys_GetObject("path"); /* borrowed */
    if (root[0] != '\0' && path != NULL && PyList_Check(path)) {
        place = PyUnicode_DecodeFSDefault(root);
        int known = place != NULL ? PySequence_Contains(path, place) : -1;
        if (known < 0 || (known == 0 && PyList_Insert(path, 0, place) < 0)) {
            goto out;
        }
    }
    module = PyInit__c_abi();
    bodies = module != NULL ? PyImport_ImportModule("rmaker_ota.embed.bodies") : NULL;
    ffi = bodies != NULL ? PyObject_GetAttrString(module, "ffi") : NULL;
    lib = ffi != NULL ? PyObject_GetAttrString(module, "lib") : NULL;
    done = lib != NULL ? PyObject_CallMethod(bodies, "define", "OOi", ffi, lib, (int)is_ours) : NULL;
    ok = done != NULL;
out:
    if (!ok) {
        take_exception("import rmaker_ota");
    }
    Py_XDECREF(place);
    Py_XDECREF(bodies); /* stays imported */
    Py_XDECREF(ffi);
    Py_XDECREF(lib);
    Py_XDECREF(done);
    /* `module` is kept: the bodies are reached through it for as long as the process lives. */
    return ok;
}

static void at_exit(void) {
    if (python_state == PYTHON_RUNS && Py_IsInitialized()) {
        rmaker_ota_py_at_exit();
    }
}

static bool start_python(void) {
    char root[PATH_MAX], interpreter[PATH_MAX];
    bool is_ours = !Py_IsInitialized();
    find_package(root);
    if (is_ours) {
        /* Extension modules look for Python's symbols among the global ones, where a dlopen() of us has not put them. */
        (void)dlopen(RMAKER_OTA_LIBPYTHON, RTLD_LAZY | RTLD_NOLOAD | RTLD_GLOBAL);
        if (!find_interpreter(root, interpreter) || !initialize(interpreter)) {
            return false;
        }
        struct sigaction on_pipe;
        if (sigaction(SIGPIPE, NULL, &on_pipe) == 0 && on_pipe.sa_handler == SIG_DFL) {
            signal(SIGPIPE, SIG_IGN); /* a broker that is gone must not end the program */
            pipe_signal_is_ours = true;
        }
    }
    PyGILState_STATE gil = PyGILState_Ensure();
    bool ok = define_bodies(root, is_ours);
    PyGILState_Release(gil);
    if (ok) {
        /* After the import, so that it runs before OpenSSL's own handler takes away what a download is using. */
        atexit(at_exit);
    }
    return ok;
}

bool rmaker_ota_c_python(void) {
    int state = python_state;
    if (state == PYTHON_UNTRIED) {
        pthread_mutex_lock(&python_lock);
        if (python_state == PYTHON_UNTRIED) {
            python_state = start_python() ? PYTHON_RUNS : PYTHON_FAILED;
        }
        state = python_state;
        pthread_mutex_unlock(&python_lock);
    }
    if (state == PYTHON_FAILED) {
        rmaker_ota_c_set_error(python_error);
    }
    return state == PYTHON_RUNS;
}
