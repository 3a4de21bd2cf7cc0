-- Proves that a worker is alive and still holds the job.
--   KEYS[1] job   KEYS[2] due
--   ARGV[1] now   ARGV[2] id   ARGV[3] attempt   ARGV[4] boot   ARGV[5] lease_ms
-- Returns the new end of the lease.
-- Errors: NOJOB, ENDED, STALE.
--- @flags allow-oom
--- @include now_ms
--- @include check
--- @include schedule
local f = redis.call("HMGET", KEYS[1], "state", "attempt", "boot")
local refusal = holds(f[1], f[2], ARGV[3], KEYS[1])
if refusal then return refusal end
if f[3] ~= ARGV[4] then return redis.error_reply("STALE boot " .. ARGV[4]) end

local ends = ms(now_ms(ARGV[1]) + tonumber(ARGV[5]))
redis.call("HSET", KEYS[1], "lease_until", ends)
schedule(KEYS[2], KEYS[1], ARGV[2])
return ends
