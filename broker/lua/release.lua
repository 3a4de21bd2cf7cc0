-- A worker gives a job back that it holds: it drains, the model went away, the runtime broke before the first token, or
-- interactive work needs its slot.
--   KEYS[1] job   KEYS[2] lane   KEYS[3] due   KEYS[4] frames   KEYS[5] request   KEYS[6] readers   KEYS[7] dead
--   ARGV[1] now   ARGV[2] id   ARGV[3] group   ARGV[4] frames_prefix   ARGV[5] control_prefix   ARGV[6] usage_prefix
--   ARGV[7] attempt   ARGV[8] loss, 1 = counts against max_losses   ARGV[9] max_losses   ARGV[10] code   ARGV[11] message
--   ARGV[12] go_on_from   the last frame of an answer that can be gone on from (MOVED when there are more by now),
--                         "-1" = it cannot
--   ARGV[13] go_on_within_ms   how long it may wait for that
--   ARGV[14] put_backs_max     it is put back for interactive work, if that was done less often; 0 = it is not for that
--   ARGV[15] put_back_left_ms  and if it does not give up within this time
-- Returns {"queued", entry}, or {"failed", ""} when the losses are used up.
-- Errors: NOJOB, ENDED, STALE, BADTRANSITION, SEEN, MOVED, NOTPUTBACK.
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
local f = read_job(KEYS[1], "seen")
local refusal = holds(f.state, f.attempt, ARGV[7], KEYS[1])
if refusal then return refusal end
local to, wrong = follow(f.state, "release", KEYS[1])
if not to then return wrong end
local stands, goes_on, news = standing(f, ARGV[12])
if news then return news end
if stands and not goes_on then return redis.error_reply("SEEN " .. id) end
local put_backs_max = tonumber(ARGV[14])
if put_backs_max > 0 then
  local told = redis.call("HMGET", KEYS[1], "put_backs", "give_up_at")
  if tonumber(told[1] or 0) >= put_backs_max or tonumber(told[2]) < now + tonumber(ARGV[15]) then
    return redis.error_reply("NOTPUTBACK " .. id)
  end
end

local day = ARGV[6] .. day_of(now)
f.losses = redis.call("HINCRBY", KEYS[1], "losses", ARGV[8])
if ARGV[8] == "1" and f.losses > tonumber(ARGV[9]) then
  close({ job = KEYS[1], lane = KEYS[2], due = KEYS[3], frames = KEYS[4], request = KEYS[5], readers = KEYS[6],
    dead = KEYS[7] },
    { group = ARGV[3], frames_prefix = ARGV[4], control_prefix = ARGV[5], day = day },
    f, now, id, "failed", { code = ARGV[10], message = ARGV[11] })
  return { "failed", "" }
end
if put_backs_max > 0 then redis.call("HINCRBY", KEYS[1], "put_backs", 1) end
count_move(day, KEYS[1], f, now, put_backs_max > 0 and "put_back" or "released")
return { "queued", put_back(KEYS[2], ARGV[3], KEYS[3], KEYS[4], KEYS[1], id, now, f.attempt,
  goes_on and now + tonumber(ARGV[13])) }
