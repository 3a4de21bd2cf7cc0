-- Takes a reader off a job. When it was the last whose lease runs and the job belongs to its readers, the grace period
-- starts. A reader that is not there (a repeat after a lost reply) changes nothing.
--   KEYS[1] job   KEYS[2] readers   KEYS[3] due
--   ARGV[1] now   ARGV[2] id   ARGV[3] reader
--   ARGV[4] comes_back   1 = its client knows the job by its id: no retry is led to it
-- Returns the number of readers left, the silent ones of a dead api not counted.
--- @flags allow-oom
--- @include now_ms
--- @include schedule
--- @include retries
local f = redis.call("HMGET", KEYS[1], "state", "grace_ms", "ended_at", "retries")
if not f[1] or tonumber(f[3] or 0) > 0 then return 0 end
local now = now_ms(ARGV[1])

local was_there = redis.call("ZREM", KEYS[2], ARGV[3]) == 1
if was_there and ARGV[4] == "1" and f[4] and f[4] ~= "" then
  local index, fingerprint = string.match(f[4], "^(%S+) (%S+)$")
  settle_retries(index, now, fingerprint, ARGV[2], false)
  redis.call("HDEL", KEYS[1], "retries")
end
if was_there and tonumber(f[2]) >= 0 then
  local last = tonumber(redis.call("ZRANGE", KEYS[2], -1, -1, "WITHSCORES")[2] or 0)
  redis.call("HSET", KEYS[1], "abandon_at", ms(math.max(now, last) + tonumber(f[2])))
  schedule(KEYS[3], KEYS[1], ARGV[2])
end
return redis.call("ZCOUNT", KEYS[2], "(" .. ms(now), "+inf")
