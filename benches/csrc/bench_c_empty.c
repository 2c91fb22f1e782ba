/* A C program that does nothing: what bench_c_abi is compared with. */
#include <stdio.h>
#include <string.h>

int main(void) {
    FILE *file = fopen("/proc/self/status", "r");
    char line[256];
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        char name[64];
        long value;
        if (sscanf(line, "%63[A-Za-z]: %ld", name, &value) == 2 &&
            (strcmp(name, "VmRSS") == 0 || strcmp(name, "RssAnon") == 0 || strcmp(name, "Threads") == 0)) {
            printf("%s %ld\n", name, value);
        }
    }
    return 0;
}
