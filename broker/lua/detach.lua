-- Takes a reader off a job. When it was the last and the job belongs to its readers, the grace period starts.
--   KEYS[1] job   KEYS[2] readers   KEYS[3] due
--   ARGV[1] now   ARGV[2] id   ARGV[3] reader
-- Returns the number of readers left.
--- @include now_ms
--- @include schedule
local f = redis.call("HMGET", KEYS[1], "state", "grace_ms", "ended_at")
if not f[1] or tonumber(f[3] or 0) > 0 then return 0 end

redis.call("ZREM", KEYS[2], ARGV[3])
local left = redis.call("ZCARD", KEYS[2])
local grace = tonumber(f[2])
if left == 0 and grace >= 0 then
  redis.call("HSET", KEYS[1], "abandon_at", ms(now_ms(ARGV[1]) + grace))
  schedule(KEYS[3], KEYS[1], ARGV[2])
end
return left
