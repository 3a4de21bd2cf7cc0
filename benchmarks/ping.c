/* Times PING on a Redis server from C: the fastest that any client on this machine could be.
 *
 *     ping PORT COUNT PAUSE_US      prints one JSON object, microseconds
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    if (argc != 4) { fprintf(stderr, "usage: ping PORT COUNT PAUSE_US\n"); return 2; }
    int count = atoi(argv[2]), pause_us = atoi(argv[3]), one = 1;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (count < 1 || connect(fd, (void *)&a, sizeof a)) { perror("connect"); return 1; }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    double *us = calloc(count, sizeof *us);
    for (int i = 0; i < count; i++) {
        char reply[64];
        int64_t t = now_ns();
        if (write(fd, "*1\r\n$4\r\nPING\r\n", 14) != 14 || read(fd, reply, sizeof reply) < 7 || memcmp(reply, "+PONG", 5)) {
            fprintf(stderr, "no PONG\n");
            return 1;
        }
        us[i] = (now_ns() - t) / 1e3;
        if (pause_us) usleep(pause_us);
    }
    qsort(us, count, sizeof *us, by_size);
    printf("{\"p50\":%.1f,\"p90\":%.1f,\"p99\":%.1f}\n", us[count / 2], us[count * 9 / 10], us[count * 99 / 100]);
    return 0;
}
