-- Leads an SDK's retry to the job that its first try left behind, and makes it that job's reader in the same step: a
-- job that somebody reads is nobody else's, so that two retries never share one. An ended job is handed out to one.
--   KEYS[1] retries   KEYS[2] due
--   ARGV[1] now   ARGV[2] fingerprint   ARGV[3] reader, `api/reader`   ARGV[4] lease_ms
--   ARGV[5] job_prefix   ARGV[6] readers_prefix
-- Returns {id, lane}; {} where there is none.
--- @flags allow-oom
--- @include now_ms
--- @include schedule
--- @include read_along
local now = now_ms(ARGV[1])
for _, member in ipairs(redis.call("ZREVRANGEBYSCORE", KEYS[1], "+inf", "(" .. ms(now))) do
  local fingerprint, id, fetched_by = string.match(member, "^([^/]+)/([^/]+)/?(.*)$")
  if fingerprint == ARGV[2] then
    local job, readers = ARGV[5] .. id, ARGV[6] .. id
    local f = redis.call("HMGET", job, "lane", "grace_ms", "ended_at", "stream", "mode")
    local ended = tonumber(f[3] or 0) > 0
    -- ours already: the reply was lost
    if f[1] and ended and (fetched_by == "" or fetched_by == ARGV[3]) then
      if fetched_by == "" then -- the new member first: a key whose last one goes forgets when to expire
        redis.call("ZADD", KEYS[1], redis.call("ZSCORE", KEYS[1], member), member .. "/" .. ARGV[3])
        redis.call("ZREM", KEYS[1], member)
      end
      return { id, f[1] }
    end
    local ours = redis.call("ZSCORE", readers, ARGV[3])
    if f[1] and not ended and (ours or redis.call("ZCOUNT", readers, "(" .. ms(now), "+inf") == 0) then
      local sees = f[4] == "1" and f[5] == "sync" and "1" or "0"
      read_along(job, readers, KEYS[2], id, now, ARGV[3], ARGV[4], sees, f[2])
      return { id, f[1] }
    end
  end
end
return {}
