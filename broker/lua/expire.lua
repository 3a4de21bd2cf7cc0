-- Ends a job that still waits at its give-up instant, or, with half an answer told, until which it might go on.
--   KEYS[1] job   KEYS[2] lane   KEYS[3] due   KEYS[4] frames   KEYS[5] request   KEYS[6] readers   KEYS[7] dead
--   ARGV[1] now   ARGV[2] id   ARGV[3] group   ARGV[4] frames_prefix   ARGV[5] control_prefix   ARGV[6] usage_prefix
--   ARGV[7] lane_name   ARGV[8] entry   ARGV[9] code   ARGV[10] message
--   ARGV[11] early   1 = nothing can come of it until that instant, so it need not wait for it
-- Returns 1.
-- Errors: NOJOB, ENDED, BADTRANSITION, MOVED, NOTDUE.
--- @flags allow-oom
--- @include now_ms
--- @include check
--- @include publish
--- @include enter
--- @include usage
--- @include retries
--- @include close
local now, id = now_ms(ARGV[1]), ARGV[2]
local f = read_job(KEYS[1])
local to, refusal = follow(f.state, "expire", KEYS[1])
if not to then return refusal end
local elsewhere = placed(f.lane, f.entry, ARGV[7], ARGV[8])
if elsewhere then return elsewhere end
local instants = redis.call("HMGET", KEYS[1], "give_up_at", "continue_by")
local give_up_at = tonumber(instants[2] or 0) > 0 and tonumber(instants[2]) or tonumber(instants[1])
if give_up_at > now and ARGV[11] ~= "1" then return redis.error_reply("NOTDUE " .. ms(give_up_at)) end

close({ job = KEYS[1], lane = KEYS[2], due = KEYS[3], frames = KEYS[4], request = KEYS[5], readers = KEYS[6],
  dead = KEYS[7] },
  { group = ARGV[3], frames_prefix = ARGV[4], control_prefix = ARGV[5], day = ARGV[6] .. day_of(now) },
  f, now, id, to, { code = ARGV[9], message = ARGV[10] })
return 1
