-- Adds a reader to a live job, or renews its lease; `sees` = "1" marks the job as seen.
local function read_along(job, readers, due, id, now, reader, lease_ms, sees, grace_ms)
  redis.call("ZREMRANGEBYSCORE", readers, "-inf", ms(now - 600000))
  redis.call("ZADD", readers, ms(now + tonumber(lease_ms)), reader)
  local apis, known = {}, {}
  for _, name in ipairs(redis.call("ZRANGE", readers, 0, -1)) do
    local api = string.match(name, "^[^/]+")
    if not known[api] then
      known[api] = true
      apis[#apis + 1] = api
    end
  end
  redis.call("HSET", job, "apis", table.concat(apis, ","))
  if sees == "1" then redis.call("HSET", job, "seen", "1") end
  local grace = tonumber(grace_ms)
  if grace >= 0 then
    local last = tonumber(redis.call("ZRANGE", readers, -1, -1, "WITHSCORES")[2])
    redis.call("HSET", job, "abandon_at", ms(last + grace))
    schedule(due, job, id)
  end
end
