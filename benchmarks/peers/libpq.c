/* The limit: libpq in C, which only notes when each notification came.

   libpq CONNINFO CHANNEL RING

   RING is the file of recording.py: SLOTS timestamps of 64 bits. */

#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include <libpq-fe.h>

#define SLOTS (1UL << 17)

static void fail(const char *what)
{
    fprintf(stderr, "%s\n", what);
    exit(1);
}

int main(int argc, char **argv)
{
    if (argc != 4)
        fail("usage: libpq CONNINFO CHANNEL RING");

    int file = open(argv[3], O_RDWR);
    if (file < 0)
        fail("cannot open the ring");
    volatile int64_t *times = mmap(NULL, SLOTS * sizeof(int64_t), PROT_READ | PROT_WRITE,
                                   MAP_SHARED, file, 0);
    if (times == MAP_FAILED)
        fail("cannot map the ring");

    PGconn *connection = PQconnectdb(argv[1]);
    if (PQstatus(connection) != CONNECTION_OK)
        fail(PQerrorMessage(connection));
    char *channel = PQescapeIdentifier(connection, argv[2], 63);
    char statement[160];
    snprintf(statement, sizeof statement, "LISTEN %s", channel);
    PQclear(PQexec(connection, statement));
    puts("ready");
    fflush(stdout);

    struct pollfd ready = {.fd = PQsocket(connection), .events = POLLIN};
    for (uint64_t place = 0;;) {
        poll(&ready, 1, -1);
        if (!PQconsumeInput(connection))
            fail(PQerrorMessage(connection));
        PGnotify *notify;
        while ((notify = PQnotifies(connection)) != NULL) {
            struct timespec now;
            clock_gettime(CLOCK_MONOTONIC, &now);
            times[place++ % SLOTS] = now.tv_sec * 1000000000LL + now.tv_nsec;
            PQfreemem(notify);
        }
    }
}
