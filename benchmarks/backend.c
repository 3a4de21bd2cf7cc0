/* A very cheap runtime: speaks the OpenAI chat dialect the way a llama.cpp server does, costs almost nothing.
 *
 * One thread, one epoll. How an answer looks is said inside the prompt itself, because a prompt is the one
 * thing that every gateway passes through untouched:
 *
 *     bench:<ttft_us>,<tokens>,<interval_us>,<burst>
 *
 * waits ttft_us, sends `burst` tokens as fast as the reader takes them and the rest one every interval_us.
 * A prompt without it gets max_tokens tokens (two if that is not said either) at once.
 * Every token is "@" and the CLOCK_MONOTONIC nanosecond of its sending in 16 hex digits, so that the load
 * generator can time each token on its way.
 *
 *     backend PORT SLOTS LIFETIME_S       prints "ready PORT"; PORT 0 takes any free one
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FD = 8192, MODEL_LEN = 96, FIRST_ROOM = 16384, MAX_BODY = 64 << 20 };

struct peer {
    int fd;
    char *in;
    size_t in_len, in_cap;
    char *out;                      /* what the socket did not take yet */
    size_t out_len, out_sent, out_cap;
    int closing;                    /* close once everything is out */
    int active, place;              /* running a streamed generation; its place in running[] */
    int started, usage;
    long sent, tokens, burst;
    int64_t due_ns, interval_ns;
    char model[MODEL_LEN];
};

static struct peer *peers[MAX_FD], *running[MAX_FD];
static int n_running, epoll, slots = 64;
static unsigned long tokens_total, requests_total;

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void *grown(void *p, size_t size)
{
    p = realloc(p, size);
    if (!p) { perror("realloc"); exit(1); }
    return p;
}

/* ---- bytes out ------------------------------------------------------------------------------------- */

static void listen_for(struct peer *c, int writable)
{
    struct epoll_event e = {.events = EPOLLIN | (writable ? EPOLLOUT : 0), .data.fd = c->fd};
    epoll_ctl(epoll, EPOLL_CTL_MOD, c->fd, &e);
}

static int pending(const struct peer *c) { return c->out_len > c->out_sent; }

/* 0 = fine (sent or kept for later), -1 = the peer is gone */
static int put(struct peer *c, const char *bytes, size_t n)
{
    if (!pending(c)) {
        ssize_t w = send(c->fd, bytes, n, MSG_NOSIGNAL);
        if (w == (ssize_t)n) return 0;
        if (w < 0 && errno != EAGAIN) return -1;
        if (w > 0) { bytes += w; n -= w; }
        c->out_len = c->out_sent = 0;
        listen_for(c, 1);
    }
    if (c->out_len + n > c->out_cap) c->out = grown(c->out, c->out_cap = 2 * (c->out_len + n));
    memcpy(c->out + c->out_len, bytes, n);
    c->out_len += n;
    return 0;
}

static int flush(struct peer *c)
{
    ssize_t w = send(c->fd, c->out + c->out_sent, c->out_len - c->out_sent, MSG_NOSIGNAL);
    if (w < 0) return errno == EAGAIN ? 0 : -1;
    c->out_sent += w;
    if (!pending(c)) listen_for(c, 0);
    return 0;
}

static int answer_json(struct peer *c, int status, const char *body, size_t n)
{
    char head[160];
    int k = sprintf(head, "HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n", status,
                    status == 200 ? "OK" : "Not Found", n);
    char *all = grown(NULL, k + n);
    memcpy(all, head, k);
    memcpy(all + k, body, n);
    int gone = put(c, all, k + n);
    free(all);
    return gone;
}

/* ---- one generation -------------------------------------------------------------------------------- */

#define CHUNK_HEAD "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"%s\","

static int as_http_chunk(char *to, const char *event, int n)
{
    int k = sprintf(to, "%x\r\n", n);
    memcpy(to + k, event, n);
    memcpy(to + k + n, "\r\n", 2);
    return k + n + 2;
}

static void stop_running(struct peer *c)
{
    if (!c->active) return;
    c->active = 0;
    running[c->place] = running[--n_running];
    running[c->place]->place = c->place;
}

static int send_next_token(struct peer *c)
{
    char event[512], wire[2048];
    int n = 0, k;
    if (!c->started) {
        c->started = 1;
        n += sprintf(wire, "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\n"
                           "transfer-encoding: chunked\r\n\r\n");
        k = sprintf(event, CHUNK_HEAD "\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":null},"
                    "\"finish_reason\":null}]}\n\n", c->model);
        n += as_http_chunk(wire + n, event, k);
    }
    if (c->sent < c->tokens) {
        k = sprintf(event, CHUNK_HEAD "\"choices\":[{\"index\":0,\"delta\":{\"content\":\"@%016lx \"},"
                    "\"finish_reason\":null}]}\n\n", c->model, (unsigned long)now_ns());
        n += as_http_chunk(wire + n, event, k);
        c->sent++;
        tokens_total++;
        return put(c, wire, n);
    }
    k = sprintf(event, CHUNK_HEAD "\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n", c->model);
    n += as_http_chunk(wire + n, event, k);
    if (c->usage) {
        k = sprintf(event, CHUNK_HEAD "\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":%ld,"
                    "\"total_tokens\":%ld}}\n\n", c->model, c->tokens, c->tokens + 5);
        n += as_http_chunk(wire + n, event, k);
    }
    n += as_http_chunk(wire + n, "data: [DONE]\n\n", 14);
    n += sprintf(wire + n, "0\r\n\r\n");
    stop_running(c);
    return put(c, wire, n);
}

static int answer_whole(struct peer *c, long tokens)
{
    if (tokens > 100000) tokens = 100000;
    char *body = grown(NULL, 600 + 18 * tokens);
    int n = sprintf(body, "{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"%s\","
                    "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"", c->model);
    for (long i = 0; i < tokens; i++) n += sprintf(body + n, "@%016lx ", (unsigned long)now_ns());
    n += sprintf(body + n, "\"},\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":5,\"completion_tokens\":%ld,"
                 "\"total_tokens\":%ld}}", tokens, tokens + 5);
    tokens_total += tokens;
    int gone = answer_json(c, 200, body, n);
    free(body);
    return gone;
}

static int says_true(const char *body, size_t n, const char *key)
{
    const char *at = memmem(body, n, key, strlen(key));
    if (!at) return 0;
    at += strlen(key);
    while (at < body + n && (*at == ' ' || *at == ':')) at++;
    return body + n - at >= 4 && !memcmp(at, "true", 4);
}

static int generate(struct peer *c, const char *body, size_t n)
{
    long ttft_us = 0, interval_us = 0;
    const char *at;
    char text[96] = "";
    requests_total++;
    c->tokens = 2;
    c->burst = 0;
    if ((at = memmem(body, n, "\"max_tokens\":", 13))) c->tokens = strtol(at + 13, NULL, 10);
    if ((at = memmem(body, n, "bench:", 6))) {
        size_t k = body + n - at < 95 ? (size_t)(body + n - at) : 95;
        memcpy(text, at, k);
        sscanf(text, "bench:%ld,%ld,%ld,%ld", &ttft_us, &c->tokens, &interval_us, &c->burst);
    }
    strcpy(c->model, "bench");
    if ((at = memmem(body, n, "\"model\"", 7)) && (at = memchr(at + 7, '"', body + n - at - 7))) {
        const char *end = memchr(at + 1, '"', body + n - at - 1);
        if (end && end - at - 1 < MODEL_LEN) {
            memcpy(c->model, at + 1, end - at - 1);
            c->model[end - at - 1] = 0;
        }
    }
    if (!says_true(body, n, "\"stream\"")) return answer_whole(c, c->tokens);
    c->usage = says_true(body, n, "\"include_usage\"");
    c->active = 1;
    c->started = 0;
    c->sent = 0;
    c->interval_ns = interval_us * 1000;
    c->due_ns = now_ns() + ttft_us * 1000;
    c->place = n_running;
    running[n_running++] = c;
    return 0;
}

/* ---- the other endpoints --------------------------------------------------------------------------- */

static int answer_slots(struct peer *c)
{
    char *body = grown(NULL, 64 * slots + 8);
    int n = sprintf(body, "[");
    for (int i = 0; i < slots; i++)
        n += sprintf(body + n, "%s{\"id\":%d,\"n_ctx\":8192,\"is_processing\":%s}", i ? "," : "", i,
                     i < n_running ? "true" : "false");
    n += sprintf(body + n, "]");
    int gone = answer_json(c, 200, body, n);
    free(body);
    return gone;
}

static int answer_get(struct peer *c, const char *path)
{
    char body[512];
    if (!strcmp(path, "/slots")) return answer_slots(c);
    if (!strcmp(path, "/health"))
        strcpy(body, "{\"status\":\"ok\"}");
    else if (!strcmp(path, "/v1/models") || !strcmp(path, "/models"))
        strcpy(body, "{\"object\":\"list\",\"data\":[{\"id\":\"bench\",\"object\":\"model\",\"owned_by\":\"bench\"}]}");
    else if (!strcmp(path, "/props"))
        sprintf(body, "{\"total_slots\":%d,\"default_generation_settings\":{\"n_ctx\":8192}}", slots);
    else if (!strcmp(path, "/stats"))
        sprintf(body, "{\"tokens\":%lu,\"requests\":%lu,\"running\":%d}", tokens_total, requests_total, n_running);
    else
        return answer_json(c, 404, "{\"error\":\"no such path\"}", 24);
    return answer_json(c, 200, body, strlen(body));
}

/* ---- requests in ----------------------------------------------------------------------------------- */

/* Handles every whole request that is there; one at a time, since a stream must end before the next begins. */
static int take_requests(struct peer *c)
{
    while (!c->active && !c->closing) {
        char *end = memmem(c->in, c->in_len, "\r\n\r\n", 4);
        if (!end) return 0;
        size_t head = end - c->in + 4, body = 0;
        for (char *line = c->in; line < end;) {
            char *next = memmem(line, end + 2 - line, "\r\n", 2) + 2;
            if (!strncasecmp(line, "content-length:", 15)) body = strtoul(line + 15, NULL, 10);
            if (!strncasecmp(line, "connection: close", 17)) c->closing = 1;
            line = next;
        }
        if (body > MAX_BODY) return -1;
        if (c->in_len < head + body) { c->closing = 0; return 0; }
        char path[64] = "", *query;
        int is_post = !strncmp(c->in, "POST ", 5);
        sscanf(c->in, "%*s %63s", path);
        if ((query = strchr(path, '?'))) *query = 0;
        int gone = is_post ? generate(c, c->in + head, body) : answer_get(c, path);
        memmove(c->in, c->in + head + body, c->in_len - head - body);
        c->in_len -= head + body;
        if (gone < 0) return -1;
    }
    return 0;
}

static int read_more(struct peer *c)
{
    if (c->in_cap - c->in_len < 8192) c->in = grown(c->in, c->in_cap *= 2);
    ssize_t r = recv(c->fd, c->in + c->in_len, c->in_cap - c->in_len, 0);
    if (r == 0 || (r < 0 && errno != EAGAIN)) return -1;
    if (r > 0) c->in_len += r;
    return take_requests(c);
}

static void drop(struct peer *c)
{
    stop_running(c);
    peers[c->fd] = NULL;
    close(c->fd);
    free(c->in);
    free(c->out);
    free(c);
}

static void accept_all(int door)
{
    int fd, one = 1;
    while ((fd = accept4(door, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        if (fd >= MAX_FD) { close(fd); continue; }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct peer *c = calloc(1, sizeof *c);
        if (!c) { perror("calloc"); exit(1); }
        c->fd = fd;
        c->in = grown(NULL, c->in_cap = FIRST_ROOM);
        peers[fd] = c;
        struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &e);
    }
}

static void serve(const struct epoll_event *e, int door)
{
    if (e->data.fd == door) { accept_all(door); return; }
    struct peer *c = peers[e->data.fd];
    if (!c) return;
    int gone = 0;
    if (e->events & EPOLLOUT) gone = flush(c);
    if (!gone && e->events & (EPOLLIN | EPOLLHUP | EPOLLERR)) gone = read_more(c);
    if (gone || (c->closing && !c->active && !pending(c))) drop(c);
}

static void send_due_tokens(void)
{
    int64_t now = now_ns();
    for (int i = n_running - 1; i >= 0; i--) {
        struct peer *c = running[i];
        if (pending(c) || c->due_ns > now) continue;
        if (send_next_token(c) < 0) { drop(c); continue; }
        c->due_ns = c->sent <= c->burst || !c->interval_ns ? now : c->due_ns + c->interval_ns;
        if (!c->active && take_requests(c) < 0) drop(c);
        else if (!c->active && c->closing && !pending(c)) drop(c);
    }
}

static int wait_for_events(struct epoll_event *events, int n)
{
    int64_t next = INT64_MAX, wait;
    for (int i = 0; i < n_running; i++)
        if (!pending(running[i]) && running[i]->due_ns < next) next = running[i]->due_ns;
    wait = next == INT64_MAX ? 1000000000LL : next - now_ns();
    if (wait < 0) wait = 0;
    struct timespec t = {wait / 1000000000LL, wait % 1000000000LL};
    return epoll_pwait2(epoll, events, n, &t, NULL);
}

int main(int argc, char **argv)
{
    if (argc != 4) { fprintf(stderr, "usage: backend PORT SLOTS LIFETIME_S\n"); return 2; }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    slots = atoi(argv[2]);
    int64_t last_ns = now_ns() + atoll(argv[3]) * 1000000000LL;
    int door = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t a_len = sizeof a;
    setsockopt(door, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(door, (void *)&a, sizeof a) || listen(door, 1024) || getsockname(door, (void *)&a, &a_len)) {
        perror("listen");
        return 1;
    }
    epoll = epoll_create1(0);
    struct epoll_event e = {.events = EPOLLIN, .data.fd = door}, events[256];
    epoll_ctl(epoll, EPOLL_CTL_ADD, door, &e);
    printf("ready %d\n", ntohs(a.sin_port));
    fflush(stdout);
    while (now_ns() < last_ns) {
        int n = wait_for_events(events, 256);
        for (int i = 0; i < n; i++) serve(&events[i], door);
        send_due_tokens();
    }
    return 0;
}
