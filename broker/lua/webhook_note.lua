-- Notes how an attempt at a delivery went. After a success, or when it is given up on, the job's next event is due.
--   KEYS[1] webhook   KEYS[2] webhook_line   KEYS[3] webhook_due   KEYS[4] webhooks   KEYS[5] webhook_endpoint
--   KEYS[6] webhook_counts
--   ARGV[1] now   ARGV[2] delivery   ARGV[3] endpoint   ARGV[4] attempt   ARGV[5] outcome   delivered, failed or dead
--   ARGV[6] retry_after_ms   where it failed
--   ARGV[7] told      the attempt, one line of JSON            ARGV[8] told_max   lines that are kept
--   ARGV[9] breaks    1 = it counts as a failure of the endpoint, 0 = it does not
--   ARGV[10] open_for_ms   how long the endpoint is left alone now, 0 = it is not
--   ARGV[11] kept_ms   how long an ended delivery is kept     ARGV[12] endpoint_ms   how long a failure is remembered
-- Returns 1.
-- Errors: STALE.
--- @flags allow-oom
--- @include now_ms
--- @include webhook_line
local now, outcome = now_ms(ARGV[1]), ARGV[5]
local f = redis.call("HMGET", KEYS[1], "state", "attempt", "history")
if f[1] ~= "pending" or f[2] ~= ARGV[4] then
  return redis.error_reply("STALE attempt " .. ARGV[4] .. ", delivery is " .. tostring(f[1]) .. " at " .. tostring(f[2]))
end

local lines = {}
for line in string.gmatch(f[3] or "", "[^\n]+") do lines[#lines + 1] = line end
lines[#lines + 1] = ARGV[7]
local history = table.concat(lines, "\n", math.max(1, #lines - tonumber(ARGV[8]) + 1))
redis.call("HSET", KEYS[1], "history", history, "lease_until", "0")
redis.call("HINCRBY", KEYS[1], "tries", 1)
redis.call("HINCRBY", KEYS[6], outcome, 1)
if outcome == "failed" then
  local retry_at = ms(now + tonumber(ARGV[6]))
  redis.call("HSET", KEYS[1], "next_at", retry_at)
  redis.call("ZADD", KEYS[3], retry_at, ARGV[2])
else
  redis.call("HSET", KEYS[1], "state", outcome, "ended_at", ms(now), "next_at", "0")
  redis.call("PEXPIRE", KEYS[1], ARGV[11])
  redis.call("ZREM", KEYS[3], ARGV[2])
  redis.call("ZREM", KEYS[2], ARGV[2])
  local first = redis.call("ZRANGE", KEYS[2], 0, 0)[1]
  if first then redis.call("ZADD", KEYS[3], ms(now), first) end
end
if outcome == "delivered" then
  redis.call("DEL", KEYS[5])
elseif ARGV[9] == "1" then
  redis.call("HINCRBY", KEYS[5], "failures", 1)
  if ARGV[10] ~= "0" then redis.call("HSET", KEYS[5], "open_until", ms(now + tonumber(ARGV[10]))) end
  redis.call("PEXPIRE", KEYS[5], ARGV[12])
end
look_at(KEYS[4], KEYS[3], KEYS[5], ARGV[3])
return 1
