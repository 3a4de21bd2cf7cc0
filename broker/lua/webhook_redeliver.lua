-- Has an event delivered once more, or at once, because somebody asked; the endpoint gets it first, even if its
-- breaker is open.
--   KEYS[1] webhook   KEYS[2] webhook_line   KEYS[3] webhook_due   KEYS[4] webhooks   KEYS[5] webhook_endpoint
--   ARGV[1] now   ARGV[2] delivery   ARGV[3] endpoint
-- Returns 1.
-- Errors: NODELIVERY.
--- @include now_ms
--- @include webhook_line
local now = now_ms(ARGV[1])
local f = redis.call("HMGET", KEYS[1], "state", "lease_until")
if not f[1] then return redis.error_reply("NODELIVERY " .. ARGV[2]) end
local under_way = f[1] == "pending" and tonumber(f[2] or 0) > now
if under_way then return 1 end

if f[1] == "pending" then
  if redis.call("ZSCORE", KEYS[3], ARGV[2]) then redis.call("ZADD", KEYS[3], "0", ARGV[2]) end
else
  redis.call("PERSIST", KEYS[1])
  redis.call("HSET", KEYS[1], "state", "pending", "tries", "0", "ended_at", "0")
  line_up(KEYS[2], KEYS[3], ARGV[2], 0)
end
redis.call("HSET", KEYS[1], "since", ms(now), "next_at", ms(now))
redis.call("HDEL", KEYS[5], "open_until")
look_at(KEYS[4], KEYS[3], KEYS[5], ARGV[3])
return 1
