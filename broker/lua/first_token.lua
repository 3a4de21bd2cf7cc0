-- Marks a job as streaming and logs its first frame, held role-only chunks included.
--   KEYS[1] job   KEYS[2] frames
--   ARGV[1] now   ARGV[2] id   ARGV[3] attempt   ARGV[4] seq, always 1   ARGV[5] data   ARGV[6] frames_prefix
-- The due set stays as it is: lease and readers go on.
-- Returns 1. A repeat after a lost reply is harmless: returns 0.
-- Errors: NOJOB, ENDED, STALE, BADTRANSITION.
--- @include now_ms
--- @include check
--- @include publish
local id = ARGV[2]
local f = redis.call("HMGET", KEYS[1], "state", "attempt", "last_seq", "apis")
local refusal = holds(f[1], f[2], ARGV[3], KEYS[1])
if refusal then return refusal end
if tonumber(f[3]) >= tonumber(ARGV[4]) then return 0 end
local to, wrong = follow(f[1], "first_token", KEYS[1])
if not to then return wrong end

redis.call("XADD", KEYS[2], ARGV[3] .. "-" .. ARGV[4], "kind", "content", "data", ARGV[5])
redis.call("HSET", KEYS[1], "state", to, "first_token_at", ms(now_ms(ARGV[1])), "last_seq", ARGV[4])
publish(ARGV[6], f[4], id, ARGV[3], ARGV[4], "content", ARGV[5])
return 1
