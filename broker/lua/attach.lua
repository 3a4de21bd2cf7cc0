-- Adds a reader to a job, or renews its lease. A synchronous streaming reader marks the job as seen: from its first
-- frame on, the answer may not be started again behind the client's back.
--   KEYS[1] job   KEYS[2] readers   KEYS[3] due
--   ARGV[1] now   ARGV[2] id   ARGV[3] reader, `api/reader`   ARGV[4] lease_ms   ARGV[5] sees, 1 = sync and streaming
--   ARGV[6] max_readers
-- Returns {state, attempt, last_seq}; an ended job is only read, no reader is noted.
-- Errors: NOJOB, READERS.
--- @flags allow-oom
--- @include now_ms
--- @include schedule
--- @include read_along
local now = now_ms(ARGV[1])
local f = redis.call("HMGET", KEYS[1], "state", "attempt", "last_seq", "grace_ms", "ended_at")
if not f[1] then return redis.error_reply("NOJOB " .. KEYS[1]) end
if tonumber(f[5] or 0) > 0 then return { f[1], f[2], f[3] } end
local reading = redis.call("ZCOUNT", KEYS[2], "(" .. ms(now), "+inf")
if not redis.call("ZSCORE", KEYS[2], ARGV[3]) and reading >= tonumber(ARGV[6]) then
  return redis.error_reply("READERS " .. ARGV[6] .. " readers follow this job already")
end

read_along(KEYS[1], KEYS[2], KEYS[3], ARGV[2], now, ARGV[3], ARGV[4], ARGV[5], f[4])
return { f[1], f[2], f[3] }
