-- Marks a job as streaming and logs its first frame, held role-only chunks included.
--   KEYS[1] job   KEYS[2] frames   KEYS[3] due
--   ARGV[1] now   ARGV[2] id   ARGV[3] attempt   ARGV[4] seq, always 1   ARGV[5] data   ARGV[6] frames_prefix
-- Returns 1. A repeat after a lost reply is harmless: returns 0.
-- Errors: NOJOB, ENDED, STALE, BADTRANSITION.
--- @include now_ms
--- @include check
--- @include schedule
--- @include publish
local id = ARGV[2]
local refusal = fence(KEYS[1], ARGV[3])
if refusal then return refusal end
if tonumber(redis.call("HGET", KEYS[1], "last_seq")) >= tonumber(ARGV[4]) then return 0 end
local to, wrong = check(KEYS[1], "first_token")
if not to then return wrong end

redis.call("XADD", KEYS[2], ARGV[3] .. "-" .. ARGV[4], "kind", "content", "data", ARGV[5])
redis.call("HSET", KEYS[1], "state", to, "first_token_at", ms(now_ms(ARGV[1])), "last_seq", ARGV[4])
schedule(KEYS[3], KEYS[1], id)
publish(ARGV[6], redis.call("HGET", KEYS[1], "apis"), id, ARGV[3], ARGV[4], "content", ARGV[5])
return 1
