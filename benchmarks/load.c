/* A load generator that times the first token and every token of each streamed answer. One thread, one epoll.
 *
 *     load --port P [--path /v1/chat/completions] [--model bench] [--prompt "bench:0,10,0,0"] [--no-stream]
 *          [--connections 1] [--seconds 2] [--requests 0] [--pause-us 0] [--ramp-ms 0] [--rate 0] [--skip-ms 0]
 *          [--expect 200] [--tokens 10] [--drain-ms 0] [--stall]
 *
 * Closed loop: each connection sends its next request when the last one ended (and --pause-us passed). With
 * --rate it is an open loop: requests are due at fixed instants whatever the answers do, and are timed from
 * the instant they were due, so that a server which falls behind cannot hide it.
 * It asks no more after --seconds or --requests and lets what runs end for at most --drain-ms; what has not ended
 * then is neither a success nor an error, and nothing after --seconds counts. The first --skip-ms are left out. --tokens is what each good answer must contain (0 = anything). --stall stops reading
 * a stream after its first token. Prints one JSON object; all times are microseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_ROOM = 8192, READ_ROOM = 1 << 17, SHOWN_ERRORS = 3, MAX_SAMPLES = 4000000 };
enum phase { RESTING, WAITING, READING_HEAD, READING_BODY, STALLED };
enum framing { BY_LENGTH, BY_CHUNKS, BY_CLOSE };

struct conn {
    int fd;
    enum phase phase;
    enum framing framing;
    int64_t asked_ns, first_ns, start_ns;
    char head[HEAD_ROOM];
    size_t head_len;
    int status, last_use, hex_left;      /* hex_left: digits still missing of a token that was cut in two */
    long tokens;
    uint64_t stamp;
    long length_left;                    /* of the body, or of the chunk */
    int in_size, in_trailer, size_digits;
};

struct samples { double *us; long n; };

static struct option options[] = {
    {"port", 1, 0, 'p'}, {"path", 1, 0, 'P'}, {"model", 1, 0, 'm'}, {"prompt", 1, 0, 'b'}, {"no-stream", 0, 0, 'n'},
    {"connections", 1, 0, 'c'}, {"seconds", 1, 0, 's'}, {"requests", 1, 0, 'r'}, {"pause-us", 1, 0, 'w'},
    {"ramp-ms", 1, 0, 'a'}, {"rate", 1, 0, 'R'}, {"skip-ms", 1, 0, 'k'}, {"expect", 1, 0, 'e'}, {"tokens", 1, 0, 't'},
    {"drain-ms", 1, 0, 'd'}, {"stall", 0, 0, 'S'}, {0, 0, 0, 0}};

static int port, n_conns = 1, expect = 200, streaming = 1, stall, shown, n_stalled;
static const char *path = "/v1/chat/completions", *model = "bench", *prompt = "bench:0,10,0,0";
static double seconds = 2, rate;
static long max_requests, pause_us, ramp_ms, skip_ms, drain_ms, want_tokens = 10;
static long n_sent, n_good, n_bad, n_counted, n_chunks, n_late;
static int64_t began_ns, counting_ns, ends_ns;
static int epoll;
static char *request;
static size_t request_len;
static struct conn *conns;
static struct samples firsts, totals, ways;

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void keep(struct samples *s, double us)
{
    if (s->n < MAX_SAMPLES) s->us[s->n++] = us;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double at(const struct samples *s, double share) { return s->n ? s->us[(long)(share * (s->n - 1) + 0.5)] : 0; }

static void print_samples(const char *name, struct samples *s)
{
    qsort(s->us, s->n, sizeof *s->us, by_size);
    printf(",\"%s\":{\"n\":%ld,\"p50\":%.1f,\"p90\":%.1f,\"p99\":%.1f,\"max\":%.1f}", name, s->n, at(s, 0.5), at(s, 0.9),
           at(s, 0.99), at(s, 1));
}

/* ---- asking ---------------------------------------------------------------------------------------- */

static void connect_to(struct conn *c)
{
    int one = 1, small = 4096;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (stall) setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    if (connect(c->fd, (void *)&a, sizeof a)) { perror("connect"); exit(1); }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &e);
}

static void reconnect(struct conn *c)
{
    close(c->fd);
    connect_to(c);
}

static int may_ask(void) { return (!max_requests || n_sent < max_requests) && now_ns() < ends_ns; }

static int some_run(void)
{
    for (int i = 0; i < n_conns; i++)
        if (conns[i].phase == READING_HEAD || conns[i].phase == READING_BODY) return 1;
    return 0;
}

static void ask(struct conn *c, int64_t due_ns)
{
    c->phase = READING_HEAD;
    c->head_len = c->hex_left = c->tokens = c->first_ns = c->last_use = 0;
    c->asked_ns = due_ns;
    n_sent++;
    for (size_t sent = 0; sent < request_len;) {
        ssize_t w = send(c->fd, request + sent, request_len - sent, MSG_NOSIGNAL);
        if (w > 0) sent += w;
        else if (errno == EAGAIN) usleep(20);
        else if (sent == 0) reconnect(c);        /* the server closed an idle connection: not an error */
        else break;
    }
}

/* ---- reading an answer ----------------------------------------------------------------------------- */

static void ended(struct conn *c, int whole)
{
    int64_t now = now_ns();
    int good = whole && c->status == expect && (!want_tokens || expect != 200 || c->tokens == want_tokens);
    if (!good) {
        n_bad++;
        if (shown++ < SHOWN_ERRORS)
            fprintf(stderr, "bad answer: whole=%d status=%d tokens=%ld of %ld: %.200s\n", whole, c->status, c->tokens,
                    want_tokens, c->head);
    } else {
        n_good++;
        if (c->asked_ns >= counting_ns && now <= ends_ns) {
            n_counted++;
            keep(&totals, (now - c->asked_ns) / 1e3);
        }
    }
    if (!whole || c->last_use || c->framing == BY_CLOSE) reconnect(c);
    c->phase = RESTING;
    if (rate > 0 || !may_ask()) return;
    if (!pause_us) { ask(c, now_ns()); return; }
    c->phase = WAITING;
    c->start_ns = now + pause_us * 1000;
}

static int hex_value(char x) { return x >= '0' && x <= '9' ? x - '0' : x >= 'a' && x <= 'f' ? x - 'a' + 10 : -1; }

/* Counts the tokens in a piece of a body; a token may be cut anywhere. */
static void count_tokens(struct conn *c, const char *p, size_t n, int64_t now)
{
    const char *end = p + n;
    while (p < end) {
        if (!c->hex_left) {
            if (!(p = memchr(p, '@', end - p))) return;
            p++;
            c->hex_left = 16;
            c->stamp = 0;
            continue;
        }
        int v = hex_value(*p);
        if (v < 0) { c->hex_left = 0; continue; }
        c->stamp = c->stamp << 4 | (unsigned)v;
        p++;
        if (--c->hex_left) continue;
        if (!c->first_ns) {
            c->first_ns = now;
            if (c->asked_ns >= counting_ns && now <= ends_ns) keep(&firsts, (now - c->asked_ns) / 1e3);
        }
        c->tokens++;
        if (now >= counting_ns && now <= ends_ns) {
            n_chunks++;
            keep(&ways, (now - (int64_t)c->stamp) / 1e3);
        }
    }
}

/* Takes the chunked framing off; returns 1 at the end of the body. */
static int read_chunks(struct conn *c, const char *p, size_t n, int64_t now)
{
    const char *end = p + n;
    while (p < end) {
        if (c->in_size) {
            int v = hex_value(*p | 0x20);
            if (v >= 0) { c->length_left = c->length_left << 4 | v; c->size_digits++; }
            if (*p++ == '\n' && c->size_digits) {
                c->in_size = 0;
                c->in_trailer = c->length_left == 0;
                c->length_left += 2;                     /* its own line end */
                if (c->in_trailer) c->size_digits = 0;
            }
        } else if (c->in_trailer) {
            if (*p++ == '\n') return 1;
        } else {
            long k = end - p < c->length_left ? end - p : c->length_left;
            long body = k < c->length_left - 2 ? k : c->length_left - 2;
            if (body > 0) count_tokens(c, p, body, now);
            p += k;
            if (!(c->length_left -= k)) c->in_size = 1, c->size_digits = 0;
        }
    }
    return 0;
}

static int read_body(struct conn *c, const char *p, size_t n, int64_t now)
{
    if (c->framing == BY_CHUNKS) return read_chunks(c, p, n, now);
    count_tokens(c, p, n, now);
    c->length_left -= n;
    return c->framing == BY_LENGTH && c->length_left <= 0;
}

static char *header(struct conn *c, const char *name)
{
    char *line = strcasestr(c->head, name);
    return line ? line + strlen(name) : NULL;
}

/* Returns how many of the n bytes belonged to the head. */
static size_t read_head(struct conn *c, const char *p, size_t n)
{
    size_t before = c->head_len, room = HEAD_ROOM - 1 - before, take = n < room ? n : room;
    memcpy(c->head + before, p, take);
    c->head_len += take;
    c->head[c->head_len] = 0;
    char *end = strstr(c->head, "\r\n\r\n"), *value;
    if (!end) return n;
    size_t used = end + 4 - c->head - before;
    end[2] = 0;
    c->phase = READING_BODY;
    c->status = atoi(c->head + 9);
    c->framing = BY_CLOSE;
    c->length_left = 0;
    if ((value = header(c, "\r\ncontent-length:"))) { c->framing = BY_LENGTH; c->length_left = atol(value); }
    if ((value = header(c, "\r\ntransfer-encoding:")) && strcasestr(value, "chunked")) {
        c->framing = BY_CHUNKS;
        c->in_size = 1;
        c->in_trailer = c->size_digits = c->length_left = 0;
    }
    if ((value = header(c, "\r\nconnection:")) && !strncasecmp(value + 1, "close", 5)) c->last_use = 1;
    return used;
}

static void stop_reading(struct conn *c)
{
    c->phase = STALLED;
    n_stalled++;
    epoll_ctl(epoll, EPOLL_CTL_DEL, c->fd, NULL);
}

static void take(struct conn *c, const char *p, size_t n)
{
    int64_t now = now_ns();
    if (c->phase == READING_HEAD) {
        size_t used = read_head(c, p, n);
        if (c->phase == READING_HEAD) return;
        p += used;
        n -= used;
    }
    if (read_body(c, p, n, now) || (c->framing == BY_LENGTH && c->length_left <= 0)) ended(c, 1);
    else if (stall && c->tokens) stop_reading(c);
}

static void serve(struct conn *c)
{
    static char bytes[READ_ROOM];
    ssize_t n = recv(c->fd, bytes, stall ? 2048 : sizeof bytes, 0);
    if (n > 0 && (c->phase == READING_HEAD || c->phase == READING_BODY)) { take(c, bytes, n); return; }
    if (n < 0 && errno == EAGAIN) return;
    if (c->phase == READING_HEAD || c->phase == READING_BODY) ended(c, n == 0 && c->phase == READING_BODY && c->framing == BY_CLOSE);
    else reconnect(c);
}

/* ---- the clock ------------------------------------------------------------------------------------- */

/* Starts what is due now; returns the next instant at which something will be. */
static int64_t start_due(int64_t now)
{
    int64_t next = now < ends_ns ? ends_ns : now + 20000000;
    if (now >= ends_ns) return next;
    if (rate > 0) {
        for (int i = 0; i < n_conns && may_ask(); i++) {
            int64_t due = began_ns + (int64_t)(n_sent / rate * 1e9);
            if (due > now) return due < next ? due : next;
            if (conns[i].phase == RESTING) ask(&conns[i], due);
        }
        if (began_ns + (int64_t)(n_sent / rate * 1e9) <= now) n_late++;
        return may_ask() ? now + 100000 : next;
    }
    for (int i = 0; i < n_conns; i++) {
        if (conns[i].phase != WAITING) continue;
        if (conns[i].start_ns <= now && may_ask()) ask(&conns[i], now_ns());
        else if (conns[i].start_ns < next) next = conns[i].start_ns;
    }
    return next;
}

static void read_options(int argc, char **argv)
{
    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) switch (o) {
        case 'p': port = atoi(optarg); break;
        case 'P': path = optarg; break;
        case 'm': model = optarg; break;
        case 'b': prompt = optarg; break;
        case 'n': streaming = 0; break;
        case 'c': n_conns = atoi(optarg); break;
        case 's': seconds = atof(optarg); break;
        case 'r': max_requests = atol(optarg); break;
        case 'w': pause_us = atol(optarg); break;
        case 'a': ramp_ms = atol(optarg); break;
        case 'R': rate = atof(optarg); break;
        case 'k': skip_ms = atol(optarg); break;
        case 'e': expect = atoi(optarg); break;
        case 't': want_tokens = atol(optarg); break;
        case 'd': drain_ms = atol(optarg); break;
        case 'S': stall = 1; break;
        default: exit(2);
    }
}

static void make_request(void)
{
    char *body;
    int n = asprintf(&body, "{\"model\":\"%s\",\"messages\":[{\"role\":\"user\",\"content\":\"%s\"}],\"stream\":%s}", model,
                     prompt, streaming ? "true" : "false");
    request_len = asprintf(&request, "POST %s HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\n"
                           "authorization: Bearer sk-bench\r\ncontent-length: %d\r\n\r\n%s", path, port, n, body);
    free(body);
}

int main(int argc, char **argv)
{
    read_options(argc, argv);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGPIPE, SIG_IGN);
    make_request();
    firsts.us = malloc(MAX_SAMPLES * sizeof(double));
    totals.us = malloc(MAX_SAMPLES * sizeof(double));
    ways.us = malloc(MAX_SAMPLES * sizeof(double));
    conns = calloc(n_conns, sizeof *conns);
    epoll = epoll_create1(0);
    for (int i = 0; i < n_conns; i++) connect_to(&conns[i]);
    began_ns = now_ns();
    counting_ns = began_ns + skip_ms * 1000000;
    ends_ns = began_ns + (int64_t)(seconds * 1e9);
    for (int i = 0; i < n_conns && rate <= 0; i++) {
        conns[i].phase = WAITING;
        conns[i].start_ns = began_ns + ramp_ms * 1000000 * i / n_conns;
    }
    struct epoll_event events[256];
    int64_t now = began_ns;
    while ((now < ends_ns || (now < ends_ns + drain_ms * 1000000 && some_run())) &&
           (!max_requests || n_good + n_bad < max_requests)) {
        int64_t wait = start_due(now) - now_ns();
        if (wait < 0) wait = 0;
        struct timespec t = {wait / 1000000000LL, wait % 1000000000LL};
        int n = epoll_pwait2(epoll, events, 256, &t, NULL);
        for (int i = 0; i < n; i++) serve(events[i].data.ptr);
        now = now_ns();
    }
    double counted_s = ((now < ends_ns ? now : ends_ns) - counting_ns) / 1e9;
    printf("{\"sent\":%ld,\"good\":%ld,\"bad\":%ld,\"late\":%ld,\"stalled\":%d,\"seconds\":%.3f,\"per_s\":%.1f,\"chunks\":%ld,"
           "\"chunks_per_s\":%.1f", n_sent, n_good, n_bad, n_late, n_stalled, counted_s, n_counted / counted_s, n_chunks,
           n_chunks / counted_s);
    print_samples("first", &firsts);
    print_samples("total", &totals);
    print_samples("token", &ways);
    printf("}\n");
    return 0;
}
