-- Says when to try again to promote or to start a job that could not move at its instant.
--   KEYS[1] job   KEYS[2] due
--   ARGV[1] now   ARGV[2] id   ARGV[3] entry   ARGV[4] after_ms
-- Returns 1, or 0 when the job has moved on and there is nothing to postpone.
--- @flags allow-oom
--- @include now_ms
--- @include schedule
local f = redis.call("HMGET", KEYS[1], "state", "entry")
if (f[1] ~= "queued" and f[1] ~= "scheduled") or f[2] ~= ARGV[3] then return 0 end

redis.call("HSET", KEYS[1], "retry_at", ms(now_ms(ARGV[1]) + tonumber(ARGV[4])))
schedule(KEYS[2], KEYS[1], ARGV[2])
return 1
