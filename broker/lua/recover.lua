-- Deals with a held job whose lease ran out: nobody has heard of its worker.
--   KEYS[1] job   KEYS[2] lane   KEYS[3] due   KEYS[4] frames   KEYS[5] request   KEYS[6] readers   KEYS[7] dead
--   ARGV[1] now   ARGV[2] id   ARGV[3] group   ARGV[4] frames_prefix   ARGV[5] control_prefix   ARGV[6] usage_prefix
--   ARGV[7] attempt   ARGV[8] max_losses   ARGV[9] message
--   ARGV[10] host   ARGV[11] boot   whoever asks is the only worker of this host: its earlier boots are dead, whatever
--                                   their leases say; "" = go by the lease
--   ARGV[12] go_on_from   the last frame of an answer that can be gone on from (MOVED when there are more by now),
--                         "-1" = it cannot
--   ARGV[13] go_on_within_ms   how long it may wait for that
-- Returns {"queued", entry}; or {"failed", ""} when its client has seen part of an answer that cannot be gone on from, or
-- the losses are used up.
-- Errors: NOJOB, ENDED, BADTRANSITION, STALE, NOTDUE, MOVED.
--- @flags allow-oom
--- @include now_ms
--- @include check
--- @include publish
--- @include schedule
--- @include enter
--- @include usage
--- @include retries
--- @include close
--- @include go_on
local now, id = now_ms(ARGV[1]), ARGV[2]
local f = read_job(KEYS[1], "seen", "lease_until", "boot")
local to, wrong = follow(f.state, "recover", KEYS[1])
if not to then return wrong end
local refusal = holds(f.state, f.attempt, ARGV[7], KEYS[1])
if refusal then return refusal end
local proved_dead = ARGV[10] ~= "" and f.owner == ARGV[10] and f.boot ~= ARGV[11]
if tonumber(f.lease_until) > now and not proved_dead then return redis.error_reply("NOTDUE " .. f.lease_until) end
local stands, goes_on, news = standing(f, ARGV[12])
if news then return news end

local day = ARGV[6] .. day_of(now)
f.losses = redis.call("HINCRBY", KEYS[1], "losses", 1)
if (stands and not goes_on) or f.losses > tonumber(ARGV[8]) then
  close({ job = KEYS[1], lane = KEYS[2], due = KEYS[3], frames = KEYS[4], request = KEYS[5], readers = KEYS[6],
    dead = KEYS[7] },
    { group = ARGV[3], frames_prefix = ARGV[4], control_prefix = ARGV[5], day = day },
    f, now, id, "failed", { code = "worker_lost", message = ARGV[9] })
  count(day, counted_by(f), now, "recovered/failed", 1)
  return { "failed", "" }
end
count_move(day, KEYS[1], f, now, goes_on and "recovered/continued" or "recovered/queued")
return { "queued", put_back(KEYS[2], ARGV[3], KEYS[3], KEYS[4], KEYS[1], id, now, f.attempt,
  goes_on and now + tonumber(ARGV[13])) }
