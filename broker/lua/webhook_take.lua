-- Takes the deliveries that an endpoint gets now, each under a lease: whoever dies with one leaves it to the next. Of an
-- endpoint that has failed too often in a row one is taken, as a trial, and those whose time is over.
--   KEYS[1] webhooks   KEYS[2] webhook_due   KEYS[3] webhook_endpoint
--   ARGV[1] now   ARGV[2] endpoint   ARGV[3] most   ARGV[4] lease_ms   ARGV[5] failures_max   ARGV[6] horizon_ms
--   ARGV[7] webhook_prefix
-- Returns delivery, attempt and "try" or "over" of each.
--- @flags allow-oom
--- @include now_ms
--- @include webhook_line
local now, most = now_ms(ARGV[1]), tonumber(ARGV[3])
local f = redis.call("HMGET", KEYS[3], "failures", "open_until")
if tonumber(f[2] or 0) > now then return {} end
local trial = tonumber(f[1] or 0) >= tonumber(ARGV[5])

local taken, tries, lease_until = {}, 0, ms(now + tonumber(ARGV[4]))
for _, delivery in ipairs(redis.call("ZRANGEBYSCORE", KEYS[2], "-inf", ms(now), "LIMIT", 0, trial and 1000 or most)) do
  local key = ARGV[7] .. delivery
  local since = redis.call("HGET", key, "since")
  local over = trial and since and tonumber(since) + tonumber(ARGV[6]) <= now
  if not since then
    redis.call("ZREM", KEYS[2], delivery)
  elseif over or not trial or tries == 0 then
    if not over then tries = tries + 1 end
    redis.call("ZADD", KEYS[2], lease_until, delivery)
    redis.call("HSET", key, "next_at", lease_until, "lease_until", lease_until)
    taken[#taken + 1] = delivery
    taken[#taken + 1] = redis.call("HINCRBY", key, "attempt", 1)
    taken[#taken + 1] = over and "over" or "try"
  end
end
if trial and tries > 0 then redis.call("HSET", KEYS[3], "open_until", lease_until) end
look_at(KEYS[1], KEYS[2], KEYS[3], ARGV[2])
return taken
