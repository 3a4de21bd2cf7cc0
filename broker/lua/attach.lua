-- Adds a reader to a job, or renews its lease. A synchronous streaming reader marks the job as seen: from its first
-- frame on, the answer may not be started again behind the client's back.
--   KEYS[1] job   KEYS[2] readers   KEYS[3] due
--   ARGV[1] now   ARGV[2] id   ARGV[3] reader, `api/reader`   ARGV[4] lease_ms   ARGV[5] sees, 1 = sync and streaming
--   ARGV[6] max_readers
-- Returns {state, attempt, last_seq}; an ended job is only read, no reader is noted.
-- Errors: NOJOB, READERS.
--- @include now_ms
--- @include schedule
local now = now_ms(ARGV[1])
local f = redis.call("HMGET", KEYS[1], "state", "attempt", "last_seq", "grace_ms", "ended_at")
if not f[1] then return redis.error_reply("NOJOB " .. KEYS[1]) end
if tonumber(f[5] or 0) > 0 then return { f[1], f[2], f[3] } end
local reading = redis.call("ZCOUNT", KEYS[2], "(" .. ms(now), "+inf")
if not redis.call("ZSCORE", KEYS[2], ARGV[3]) and reading >= tonumber(ARGV[6]) then
  return redis.error_reply("READERS " .. ARGV[6] .. " readers follow this job already")
end

redis.call("ZREMRANGEBYSCORE", KEYS[2], "-inf", ms(now - 600000))
redis.call("ZADD", KEYS[2], ms(now + tonumber(ARGV[4])), ARGV[3])
local apis, seen, last = {}, {}, 0
for _, reader in ipairs(redis.call("ZRANGE", KEYS[2], 0, -1)) do
  local api = string.match(reader, "^[^/]+")
  if not seen[api] then
    seen[api] = true
    apis[#apis + 1] = api
  end
end
redis.call("HSET", KEYS[1], "apis", table.concat(apis, ","))
if ARGV[5] == "1" then redis.call("HSET", KEYS[1], "seen", "1") end
local grace = tonumber(f[4])
if grace >= 0 then
  last = tonumber(redis.call("ZRANGE", KEYS[2], -1, -1, "WITHSCORES")[2])
  redis.call("HSET", KEYS[1], "abandon_at", ms(last + grace))
  schedule(KEYS[3], KEYS[1], ARGV[2])
end
return { f[1], f[2], f[3] }
