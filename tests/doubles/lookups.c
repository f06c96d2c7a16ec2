/* Looks up no name, and writes each that is asked for into the file LOOKUPS: preloaded. */
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    FILE *log = fopen(getenv("LOOKUPS"), "a");
    if (log) {
        fprintf(log, "%s\n", node ? node : "");
        fclose(log);
    }
    return EAI_FAIL;
}
